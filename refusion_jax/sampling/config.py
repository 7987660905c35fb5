"""What to decode and how: settings, their checks, and the result of one prompt."""

import abc
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from flax import struct

from refusion_jax.errors import UserError
from refusion_jax.model.config import ModelConfig

MAX_STOP_IDS = 8  # ids that may end an answer, the model's EOS among them


def setting(default: Any, text: str, *, choices: tuple[str, ...] = (), traced: bool = False) -> Any:
    """A field of a sampler's config, and its flag on a command line.

    Args:
      text: what it says and does.
      choices: the values it may have.
      traced: it is each request's own, and changing it compiles nothing.
    """
    return dataclasses.field(default=default, metadata={"text": text, "choices": choices, "traced": traced})


MAX_INT, MAX_FLOAT = 2**31 - 1, float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class SamplerConfig(abc.ABC):
    """What the settings of all methods have in common; each method's dataclass stands beside its sampler."""

    method: ClassVar[str]

    gen_length: int = setting(512, "tokens an answer may have")
    temperature: float = setting(0.0, "0 is greedy; above, drafts are sampled", traced=True)
    top_k: int = setting(0, "with a temperature, sample among the k most probable ids; 0: all", traced=True)
    top_p: float = setting(
        1.0, "with a temperature, sample among the fewest ids whose probability reaches this, in (0, 1]", traced=True
    )

    def __post_init__(self):
        if self.gen_length < 1:
            raise UserError(f"gen_length is {self.gen_length}; it must be at least 1.")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or above, and finite.")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (all ids) or above.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must lie in (0, 1], 1 being all ids.")
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices and value not in choices:
                raise UserError(f"{field.name} is {value!r}; choose one of {', '.join(choices)}.")
            largest = MAX_INT if isinstance(value, int) else MAX_FLOAT
            if isinstance(value, (int, float)) and not abs(value) <= largest:
                raise UserError(f"{field.name} is {value}; it must be a number of at most {largest:.10g}.")

    @classmethod
    def suited(cls, model: ModelConfig, objective: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The given settings, with others that suit the model and the objective it was trained with (None:
        unknown).
        """
        return {"gen_length": min(512, model.max_position_embeddings // 2)} | given

    @property
    def length(self) -> int:
        """Most tokens an answer can have."""
        return self.gen_length

    @property
    def groups(self) -> tuple[int, int]:
        """Tokens that are shown together, and tokens of a block that is written before the next; 0: no such thing."""
        return 0, 0

    def prompt_block(self, prompt_length: int) -> tuple[int, int]:
        """Size of the blocks of a prompt, whose tokens see each other and those of earlier blocks, and how many tokens
        the first block lacks. Only whole blocks are forwarded by themselves.
        """
        return 1, 0

    def up_to(self, limit: int) -> int:
        """Positions that an answer of at most `limit` tokens takes; 0: of the longest."""
        return self.length

    @property
    def static(self) -> dict[str, Any]:
        """The settings that are compiled in; the others are each request's own."""
        names = [field.name for field in dataclasses.fields(self) if not field.metadata["traced"]]
        return {"method": self.method} | {name: getattr(self, name) for name in names}

    @property
    def changeable(self) -> list[str]:
        """Names of the settings that a request may have otherwise."""
        return [field.name for field in dataclasses.fields(self) if field.metadata["traced"]]

    def traced(self, limit: int) -> dict[str, np.ndarray]:
        """By name, the settings of this method alone that are each request's own; `limit` is that of its tokens."""
        common = [field.name for field in dataclasses.fields(SamplerConfig)]
        fields = [field for field in dataclasses.fields(self) if field.metadata["traced"] and field.name not in common]
        of_type = lambda field: np.float32 if isinstance(field.default, float) else np.int32
        return {field.name: np.asarray(getattr(self, field.name), of_type(field)) for field in fields}

    def check(self, model: ModelConfig) -> None:
        """Raises a UserError where the model cannot be decoded in this way."""

    def check_holes(self, sizes: Sequence[int]) -> None:
        """Raises a UserError where the method cannot fill holes of so many tokens."""
        raise UserError(
            f"The method {self.method} writes behind a prompt and fills no holes; plan_and_infill and masked do, with "
            "models trained for them."
        )

    def own(self, prompt: Any) -> dict[str, np.ndarray]:
        """What the sampler is told of an `engine.Prompt` besides its length and last token, by name; the shapes do not
        depend on the prompt.
        """
        return {}

    @abc.abstractmethod
    def sampler(self, model: ModelConfig, batch: int, platform: str) -> Any:
        """The static part of a decoding: what compiled programs are kept by (see programs.py)."""


@struct.dataclass
class Settings:
    """The part of a request's settings that is traced, of one row: changing it compiles nothing.

    Attributes:
      temperature, top_k, top_p: as in `SamplerConfig`.
      limit: tokens the answer may have, at most the sampler's length.
      stop_ids: [MAX_STOP_IDS] ids that end the answer, the model's EOS first; -1 where there are fewer.
      own: by name, the other traced settings, which are the method's own.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    limit: jax.Array
    stop_ids: jax.Array
    own: dict[str, jax.Array]

    @classmethod
    def of(cls, config: SamplerConfig, eos: int, *, limit: int = 0, stop_ids: Sequence[int] = ()) -> "Settings":
        """Settings of a request, as NumPy scalars; `limit` 0 is the whole length, `stop_ids` end an answer besides
        `eos`.
        """
        stops = np.full(MAX_STOP_IDS, -1, np.int32)
        stops[: 1 + len(stop_ids)] = [eos, *stop_ids]
        return cls(
            temperature=np.float32(config.temperature),
            top_k=np.int32(config.top_k),
            top_p=np.float32(config.top_p),
            limit=np.int32(limit or config.length),
            stop_ids=stops,
            own=config.traced(limit or config.length),
        )

    def stops(self, tokens: jax.Array) -> jax.Array:
        """Which of `tokens`, of any shape, end the answer."""
        return (tokens[..., None] == self.stop_ids).any(axis=-1)


@dataclasses.dataclass(frozen=True)
class Generation:
    """The answer to one prompt, or what there is of it.

    Attributes:
      index: which prompt.
      tokens: response ids by position, cut after the first EOS (while decoding: up to the first open position).
      order: positions of all committed tokens in commit order, counted from the start of the response. Tokens committed
        behind an EOS are in here (they condition the slots before it) though not in `tokens`.
      committed: the ids that belong to `order`.
      rounds: the round (which plan; with masked, which forward) each entry of `order` was committed in.
      forwards: forward passes of the loop that this prompt took part in. The prompt's own, chunk by chunk, are not
        counted.
      tokens_forwarded: tokens in all passes, the prompt included, padding not.
      finished: the answer is complete.
      parts: how many of `tokens` each hole has, where holes were to be filled; else one number.
    """

    index: int
    tokens: list[int]
    order: list[int]
    committed: list[int]
    rounds: list[int]
    forwards: int
    tokens_forwarded: int
    finished: bool
    parts: Sequence[int] = ()

    @property
    def tokens_per_forward(self) -> float:
        """Response tokens, EOS included, per forward pass."""
        return len(self.tokens) / self.forwards

    @classmethod
    def of(
        cls, index: int, canvas: dict[str, np.ndarray], stop_ids: Sequence[int], sizes: Sequence[int], finished: bool
    ) -> "Generation":
        """From the canvas of one row (see `state.Canvas`); `sizes`: tokens of each of its holes, of a plain answer its
        limit.
        """
        when = canvas["when"].tolist()
        order = sorted((at for at, time in enumerate(when) if time >= 0), key=when.__getitem__)
        starts = itertools.accumulate(sizes, initial=0)
        parts = [_written(canvas, start, size, stop_ids) for start, size in zip(starts, sizes)]
        return cls(
            index=index,
            tokens=list(itertools.chain(*parts)),
            order=order,
            committed=canvas["tokens"][order].tolist(),
            rounds=canvas["round"][order].tolist(),
            forwards=int(canvas["forwards"]),
            tokens_forwarded=int(canvas["tokens_forwarded"]),
            finished=finished,
            parts=[len(part) for part in parts],
        )


def _written(canvas: dict[str, np.ndarray], start: int, size: int, stop_ids: Sequence[int]) -> list[int]:
    """What there is of a hole up to the first open place or stop id."""
    found, here = [], slice(start, start + size)
    for token, when in zip(canvas["tokens"][here].tolist(), canvas["when"][here].tolist()):
        if when < 0:
            break
        found.append(token)
        if token in stop_ids:
            break
    return found


def check_prompts(prompts: Sequence[Sequence[int]], model: ModelConfig, sampler: SamplerConfig, limit: int = 0) -> None:
    """Raises a UserError that names the first prompt that cannot be decoded, or what the model lacks; `limit`: of the
    answers' tokens, if they are to be shorter than the sampler's.
    """
    if model.eos_token_id is None:
        raise UserError(
            "The model has no end-of-sequence token (eos_token_id is not set); decode with a tokenizer or a "
            "checkpoint that names it."
        )
    sampler.check(model)
    for index, prompt in enumerate(prompts):
        check_prompt(prompt, model, sampler, limit, f"Prompt {index}")


def check_batch(batch_size: int, seed: int = 0) -> None:
    """Raises a UserError where there are no batches of this size, or no random streams of this seed."""
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1.")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; it must lie in 0 .. {2**32 - 1}.")


def check_prompt(
    prompt: Sequence[int], model: ModelConfig, sampler: SamplerConfig, limit: int = 0, where: str = "The prompt"
) -> None:
    """Raises a UserError where a prompt, called so in it, cannot be decoded; `limit` as for `check_prompts`."""
    check_ids(prompt, model, where)
    length = sampler.up_to(limit)
    total = len(prompt) + length
    if total > model.max_position_embeddings:
        raise UserError(
            f"{where} has {len(prompt)} tokens; with gen_length {length} that is {total} positions, more than the "
            f"model's {model.max_position_embeddings}. Shorten the prompt or gen_length."
        )


def check_ids(prompt: Sequence[int], model: ModelConfig, where: str = "The prompt") -> None:
    """Raises a UserError where a prompt, called so in it, has no ids, or some that no prompt may have."""
    if len(prompt) == 0:
        raise UserError(f"{where} is empty; a prompt needs at least one token, for example the begin token.")
    ids = np.asarray(prompt)
    bad = ids[(ids < 0) | (ids >= model.logical_vocab_size)]
    if bad.size:
        raise UserError(
            f"{where} contains id {bad[0]}, outside the model's vocabulary of {model.logical_vocab_size} ids; use the "
            "tokenizer the model was trained with."
        )
    if model.mask_token_id is not None and (ids == model.mask_token_id).any():
        raise UserError(
            f"{where} contains the mask token (id {model.mask_token_id}) at index "
            f"{int((ids == model.mask_token_id).argmax())}; remove it, only responses are masked."
        )
