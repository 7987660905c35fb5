"""What a model is: sizes, special ids and how it computes; the published sizes; Hugging Face's config.json."""

import dataclasses
import json
import math
import pathlib
from typing import Any

from refusion_jax import storage
from refusion_jax.errors import UserError
from refusion_jax.settings import build, not_negative

DTYPES = ("float32", "bfloat16")
ATTENTION = ("auto", "xla", "cudnn", "splash")
REMAT = ("none", "minimal", "full")
QUANTISE = ("", "int8")
LARGEST_FACTOR = 1e9  # of the rotary base
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Qwen3 decoder (method section 7).

    `vocab_size` counts the rows of the embedding table; ids at or above `logical_vocab_size` are padding rows whose
    logits never enter a softmax or an argmax. Special ids are None where nobody has said what they are. `quantise` says
    what the matrices are stored as: "int8", each with a scale for every output channel, for decoding only; or empty.

    `original_max_position_embeddings` is the length that a model was trained for where it is to be used, or trained on,
    at the larger `max_position_embeddings`: the base of its rotary angles is then `rope_base`. 0: they are the same.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tie_embeddings: bool
    logical_vocab_size: int = 0  # 0: all rows
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 40960
    original_max_position_embeddings: int = 0
    mask_token_id: int | None = None
    begin_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    quantise: str = ""
    # How it is computed; no effect on what the parameters mean.
    dtype: str = "float32"
    attention: str = "auto"
    remat: str = "none"
    scan_layers: bool = True

    def __post_init__(self):
        if not self.logical_vocab_size:
            object.__setattr__(self, "logical_vocab_size", self.vocab_size)
        for name in SIZES:
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads = {self.num_heads} is not a multiple of model.num_kv_heads = {self.num_kv_heads}; "
                "every key/value head serves the same number of query heads."
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim = {self.head_dim} is odd; rotary embeddings need an even one.")
        if not 1 < self.rope_theta < math.inf:
            raise UserError(
                f"model.rope_theta is {self.rope_theta}; the base of rotary angles must be more than 1, and finite."
            )
        not_negative("model", self, "rms_norm_eps")
        if self.original_max_position_embeddings:
            self._check_original()
        if self.logical_vocab_size > self.vocab_size:
            raise UserError(
                f"model.logical_vocab_size = {self.logical_vocab_size} is larger than the table, model.vocab_size = "
                f"{self.vocab_size}; use a model whose table has a row for every id of the tokenizer."
            )
        choices = (("dtype", DTYPES), ("attention", ATTENTION), ("remat", REMAT), ("quantise", QUANTISE))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                allowed = ", ".join(choice or "''" for choice in allowed)
                raise UserError(f"model.{name} is {getattr(self, name)!r}; choose one of {allowed}.")
        for name in ("mask_token_id", "begin_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.logical_vocab_size:
                raise UserError(
                    f"model.{name} = {value} is outside the vocabulary of {self.logical_vocab_size} ids; use the "
                    "tokenizer the model was made for."
                )

    def _check_original(self):
        trained, length = self.original_max_position_embeddings, self.max_position_embeddings
        if not 0 < trained <= length:
            raise UserError(
                f"model.original_max_position_embeddings = {trained} must be from 1 to model.max_position_embeddings = "
                f"{length}: rotary angles are scaled for longer texts than those of training, not for shorter ones. "
                "Raise the second, or set the first to 0 for angles as they are."
            )
        if not 0 < self._critical_dimension() <= self.head_dim:
            least, most = math.ceil(2 * math.pi), math.floor(2 * math.pi * self.rope_theta)
            raise UserError(
                f"model.original_max_position_embeddings = {trained} gives no factor for model.rope_theta = "
                f"{self.rope_theta:g}; it must be the length that the model was trained for, from {least} to {most}. "
                "Set it to 0 for angles as they are."
            )
        if self._log_factor() > math.log(LARGEST_FACTOR):
            raise UserError(
                f"model.max_position_embeddings = {length} is too far beyond original_max_position_embeddings = "
                f"{trained}: the rotary base would grow more than {LARGEST_FACTOR:g} times. Lower the first."
            )

    def _critical_dimension(self) -> int:
        """Of head_dim, those whose rotary angles turn fully within the length of training."""
        turns = math.log(self.original_max_position_embeddings / (2 * math.pi), self.rope_theta)
        return 2 * math.ceil(self.head_dim / 2 * turns)

    @property
    def rope_factor(self) -> int:
        """What `rope_theta` is multiplied by: 1, or the factor of NTK scaling for `max_position_embeddings`.

        A model has seen all angles of the dimensions that turn fully within its training length T, and of the others a
        part. The factor is such that the fastest of the others does not turn fully within the new length t either
        (LongLLaDA, arXiv 2506.14429, after arXiv 2310.05209): with base b and head_dim d,

            critical = 2 ceil(d / 2 log_b(T / 2 pi)),   factor = (t / 2 pi)^(d / critical) / b

        rounded up, as in its experiments (LLaDA from 4096 tokens to 8192, 16384, 24576, 32768: 4, 14, 31, 55).
        """
        if not self.original_max_position_embeddings:
            return 1
        return max(1, math.ceil(math.exp(self._log_factor()) - 1e-9))

    def _log_factor(self) -> float:
        exponent = self.head_dim / self._critical_dimension()
        return exponent * math.log(self.max_position_embeddings / (2 * math.pi)) - math.log(self.rope_theta)

    @property
    def rope_base(self) -> float:
        """The base of the rotary angles."""
        return self.rope_theta * self.rope_factor

    def architecture(self) -> dict[str, Any]:
        """The fields that the parameters' shapes and meaning depend on: what two checkpoints must agree on."""
        return {name: getattr(self, name) for name in (*SIZES, "tie_embeddings", "rope_theta", "rms_norm_eps")}

    def num_params(self) -> int:
        """Number of parameters, a tied table counted once."""
        d, f, h = self.hidden_size, self.intermediate_size, self.head_dim
        attention = 2 * d * self.num_heads * h + 2 * d * self.num_kv_heads * h + 2 * h
        tables = (1 if self.tie_embeddings else 2) * self.vocab_size * d
        return tables + d + self.num_layers * (attention + 3 * d * f + 2 * d)


_QWEN3 = {
    "0.6b": (28, 1024, 16, 3072, True),
    "1.7b": (28, 2048, 16, 6144, True),
    "4b": (36, 2560, 32, 9728, True),
    "8b": (36, 4096, 32, 12288, False),
    "14b": (40, 5120, 40, 17408, False),
    "32b": (64, 5120, 64, 25600, False),
}


def qwen3(size: str) -> ModelConfig:
    """The published Qwen3 of that size with ReFusion's special ids (method sections 1 and 7).

    Args:
      size: one of 0.6b, 1.7b, 4b, 8b, 14b, 32b.

    Raises:
      UserError: no such size.
    """
    if size not in _QWEN3:
        raise UserError(f"There is no Qwen3 of size {size!r}; choose one of {', '.join(_QWEN3)}.")
    layers, hidden, heads, mlp, tied = _QWEN3[size]
    return ModelConfig(
        vocab_size=151936,
        logical_vocab_size=151671,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        tie_embeddings=tied,
        mask_token_id=151670,
        begin_token_id=151669,
        eos_token_id=151645,
        pad_token_id=151643,
    )


@dataclasses.dataclass(frozen=True)
class _HuggingFace:
    """What is read of a `config.json`, by its names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float = 1e6
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    attention_bias: bool = False
    use_sliding_window: bool = False
    mask_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None


def from_huggingface(source: dict[str, Any] | str | pathlib.Path) -> ModelConfig:
    """ModelConfig of a Hugging Face Qwen3 `config.json`, given as its dict or its path.

    Special ids are taken where the file names them (`mask_token_id`, `bos_token_id`, `eos_token_id`, `pad_token_id`).

    Raises:
      UserError: the file is missing or malformed, another architecture, scaled RoPE, biases, a sliding window, another
        activation, a missing field, or one of the wrong type or range.
    """
    where = "the given config" if isinstance(source, dict) else str(source)
    if not isinstance(source, dict):
        source = read_huggingface(source)
    if source.get("model_type") != "qwen3":
        raise UserError(
            f"{where} describes a model of type {source.get('model_type')!r} ({source.get('architectures')}); only "
            "the dense Qwen3 decoder (model_type 'qwen3') can be read."
        )
    rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(
            f"{where} asks for scaled rotary embeddings ({rope}); only the default kind is supported. Remove the "
            "scaling to use the model at its native length."
        )
    given = {f.name: source[f.name] for f in dataclasses.fields(_HuggingFace) if source.get(f.name) is not None}
    if rope.get("rope_theta") is not None:
        given.setdefault("rope_theta", rope["rope_theta"])
    if isinstance(given.get("eos_token_id"), list):
        given["eos_token_id"] = next(iter(given["eos_token_id"]), None)
    found = build(_HuggingFace, given, where)
    for name in ("hidden_act", "attention_bias", "use_sliding_window"):
        value, known = getattr(found, name), getattr(_HuggingFace, name)
        if value != known:
            raise UserError(
                f"{where} has {name} = {value!r}; only models with {known!r} there can be read, as the published "
                "Qwen3 are."
            )
    return ModelConfig(
        vocab_size=found.vocab_size,
        hidden_size=found.hidden_size,
        intermediate_size=found.intermediate_size,
        num_layers=found.num_hidden_layers,
        num_heads=found.num_attention_heads,
        num_kv_heads=found.num_key_value_heads,
        head_dim=found.head_dim,
        tie_embeddings=found.tie_word_embeddings,
        rope_theta=found.rope_theta,
        rms_norm_eps=found.rms_norm_eps,
        max_position_embeddings=found.max_position_embeddings,
        mask_token_id=found.mask_token_id,
        begin_token_id=found.bos_token_id,
        eos_token_id=found.eos_token_id,
        pad_token_id=found.pad_token_id,
    )


def read_huggingface(path: str | pathlib.Path) -> dict[str, Any]:
    """What a `config.json`, of a model of any kind, holds.

    Raises:
      UserError: it is missing or malformed.
    """
    try:
        content = storage.read(storage.as_path(path))
    except OSError as error:
        raise UserError(
            f"Cannot read the model's config {path}: {error.strerror or error}. Point at a folder with a config.json."
        ) from None
    try:
        found = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON (line {error.lineno}: {error.msg}); download or export it again."
        ) from None
    except (ValueError, RecursionError) as error:  # no text, thousands of digits or of brackets
        raise UserError(f"{path} is not valid JSON ({error}); download or export it again.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a JSON {type(found).__name__}, not an object; download or export it again.")
    return found


def to_huggingface(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` that transformers, and the authors' code, load this model with."""
    ids = {
        "mask_token_id": config.mask_token_id,
        "bos_token_id": config.begin_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_base,  # all that its scaling changes; rope_scaling has no name for a fixed base
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "torch_dtype": dtype,
        **{name: value for name, value in ids.items() if value is not None},
    }
