"""Model config, tokenizer and parameters of a checkpoint, whichever kind it is.

A source is a checkpoint folder of a training run or of a conversion (Orbax), a Hugging Face folder, or a name on the
Hugging Face hub. Parameters go straight to their place on the mesh: each process reads only its own shards.
"""

import dataclasses
import hashlib
import math
import pathlib
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh

from refusion_jax import lora
from refusion_jax.checkpoint import huggingface, orbax, stream
from refusion_jax.checkpoint.metadata import Base
from refusion_jax.checkpoint.orbax import say
from refusion_jax.checkpoint.stream import Reader
from refusion_jax.config import LoraConfig
from refusion_jax.data.tokenizers import BYTES_FILE, Tokenizer, load_tokenizer
from refusion_jax.errors import UserError
from refusion_jax.model.config import ModelConfig, from_huggingface
from refusion_jax.parallel import sharding

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", BYTES_FILE)
_SMALL = 1 << 20  # bytes; norms of all layers, for example


def is_orbax(folder: pathlib.Path) -> bool:
    """Whether it is a checkpoint folder of this project; else it should be a Hugging Face one."""
    return (folder / "checkpoints").is_dir()


def locate(source: str | pathlib.Path) -> pathlib.Path:
    """The folder of `source`.

    Raises:
      UserError: no such folder, a name that cannot be downloaded, or a folder that is no checkpoint.
    """
    folder = huggingface.resolve(source)
    if not is_orbax(folder) and not (folder / "config.json").exists():
        found = sorted(p.name for p in folder.iterdir())[:6]
        raise UserError(
            f"{folder} is no checkpoint: a training run or a conversion has a folder 'checkpoints', a Hugging Face "
            f"model a 'config.json'; found {', '.join(found) or 'nothing'}. Give one of the two."
        )
    return folder


def with_tokenizer(config: ModelConfig, tokenizer: Tokenizer, where: Any) -> ModelConfig:
    """`config` with the tokenizer's logical vocabulary and special ids.

    Raises:
      UserError: the table has fewer rows than the tokenizer has ids, or was made for another mask id.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{where}: the embedding table has {config.vocab_size} rows, but the tokenizer (with its two added "
            f"tokens) has {tokenizer.vocab_size} ids; its mask id "
            f"is {tokenizer.mask_id}. Use the tokenizer the model was made for, set config.model.vocab_size to at "
            f"least {tokenizer.vocab_size} for a new model, or give "
            "a checkpoint's table more rows with tools/convert_qwen3.py to-orbax --new-tokens mean."
        )
    if config.mask_token_id not in (None, tokenizer.mask_id):
        raise UserError(
            f"{where}: the model's mask_token_id is {config.mask_token_id}, the tokenizer's is {tokenizer.mask_id}. "
            "Use the tokenizer the model was made for."
        )
    return dataclasses.replace(
        config,
        logical_vocab_size=tokenizer.vocab_size,
        mask_token_id=tokenizer.mask_id,
        begin_token_id=tokenizer.begin_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )


def tokenizer_source(source: str | pathlib.Path, step: int | None = None) -> str:
    """What `load_tokenizer` takes for the tokenizer a checkpoint was made with: a folder, or the name it was given.

    Raises:
      UserError: the checkpoint has none.
    """
    folder = locate(source)
    place = folder / "tokenizer" if is_orbax(folder) else folder
    if any((place / name).exists() for name in TOKENIZER_FILES):
        return str(place)
    named = orbax.read_meta(folder, step)["tokenizer"] if is_orbax(folder) else ""
    if not named:
        raise UserError(
            f"{place} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}). Copy the model's tokenizer files "
            "there, or name a tokenizer."
        )
    return named


def load_tokenizer_for(source: str | pathlib.Path, step: int | None = None) -> Tokenizer:
    """The tokenizer a checkpoint was made with.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    return load_tokenizer(tokenizer_source(source, step))


def load_model_config(source: str | pathlib.Path, step: int | None = None) -> ModelConfig:
    """What model a checkpoint holds; special ids and logical vocabulary from its tokenizer where it has one.

    Raises:
      UserError: no checkpoint, another architecture, or a tokenizer with more ids than the table has rows.
    """
    folder = locate(source)
    if is_orbax(folder):
        return ModelConfig(**orbax.read_meta(folder, step)["model"])
    config = from_huggingface(folder / "config.json")
    if any((folder / name).exists() for name in TOKENIZER_FILES):
        config = with_tokenizer(config, load_tokenizer(str(folder)), folder)
    return config


def check_architecture(found: ModelConfig, wanted: ModelConfig, source: Any) -> None:
    """Raises a UserError that says in what a checkpoint differs from the model it is loaded into."""
    there, here = found.architecture(), wanted.architecture()
    different = [
        f"{name} is {there[name]}, config.model has {here[name]}" for name in there if there[name] != here[name]
    ]
    if different:
        raise UserError(
            f"The checkpoint {source} is of another model: {'; '.join(different)}. Set config.model to the "
            "checkpoint's sizes, or load another one."
        )
    if found.quantise and not wanted.quantise:
        raise UserError(
            f"The checkpoint {source} holds {found.quantise} weights, which are for decoding and cannot be trained. "
            "Use the checkpoint that it was converted from."
        )
    if found.quantise != wanted.quantise:
        raise UserError(
            f"The checkpoint {source} is not quantised, but config.model.quantise is {wanted.quantise!r}. Convert it "
            f"with tools/convert_qwen3.py to-orbax --quantise {wanted.quantise}."
        )


def adapters_of(meta: dict[str, Any]) -> tuple[LoraConfig, Base] | None:
    """(LoRA settings, base) of a checkpoint that holds adapters only; None for a whole model."""
    config = meta.get("config") or {}
    settings = config.get("lora") or {}
    if not settings.get("rank"):
        return None
    base = Base(**(meta.get("base") or {"source": config["init_from"]}))
    return LoraConfig(**{**settings, "targets": tuple(settings["targets"])}), base


def stored(folder: pathlib.Path, step: int | None) -> tuple[Reader, dict[str, tuple[int, ...]]]:
    """What lies in a checkpoint of either kind, of one with adapters these alone: a reader, and shapes by path."""
    if not is_orbax(folder):
        weights = huggingface.Weights(folder)
        return weights, {path: p.shape for path, p in weights.parameters.items()}
    meta = orbax.read_meta(folder, step)
    config, adapted = ModelConfig(**meta["model"]), adapters_of(meta)
    if adapted is None:
        abstract = nn.unbox(sharding.abstract_params(config))
    else:
        abstract = lora.abstract(config, adapted[0])
    shapes = {path: a.shape for path, a in traverse_util.flatten_dict(abstract, sep="/").items()}
    return stream.StoredParams(orbax.checkpoint_path(folder, step) / "params", shapes), shapes


def fingerprint(source: str | pathlib.Path, step: int | None = None) -> str:
    """Of the weights in a checkpoint: a hash of every small parameter, and of the first and last entries of large ones.

    A copy has the same one, in the other layout too. Of adapters it covers the fingerprint of their base.

    Raises:
      UserError: no checkpoint, or a damaged one.
    """
    folder, digest = locate(source), hashlib.blake2b(digest_size=16)
    adapted = adapters_of(orbax.read_meta(folder, step)) if is_orbax(folder) else None
    if adapted:
        digest.update(adapted[1].fingerprint.encode())
    reader, shapes = stored(folder, step)
    for path, shape in sorted(shapes.items()):
        size, last = math.prod(shape) * reader.dtype(path).itemsize, shape[0] - 1
        for part in (slice(0, 1), slice(last, last + 1)) if size > _SMALL else (slice(0, last + 1),):
            value = reader.read(path, (part, *[slice(None)] * (len(shape) - 1)))
            digest.update(f"{path} {part} {value.dtype} {value.shape}".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def base_of(source: str, last: dict[str, Any] | None) -> Base:
    """What a run with adapters trains on: what it began with, or for a new run the latest step of `source`.

    Args:
      source: `init_from` of the run, which may have moved.
      last: metadata of the run's latest checkpoint; None for a new run.

    Raises:
      UserError: the run began on weights that are gone or others now.
    """
    if last and last.get("base"):
        base = dataclasses.replace(Base(**last["base"]), source=source)
        check_base(base)
        return base
    if last:
        say(f"the run does not say on which step of {source} it was begun; the latest is taken")
    folder = locate(source)
    step = orbax.steps_in(folder)[-1] if orbax.steps_in(folder) else None
    return Base(source, step, fingerprint(source, step))


def check_base(base: Base) -> None:
    """Raises a UserError if the weights that adapters were trained on are gone or others now."""
    if not base.fingerprint:
        say(f"the adapters do not say on which weights of {base.source} they were trained; the latest are taken")
        return
    reason = "Its weights are others now."
    try:
        if fingerprint(base.source, base.step) == base.fingerprint:
            return
    except UserError as error:
        reason = str(error)
    raise UserError(
        f"Adapters were trained on {base}, and mean nothing on other weights. {reason} Put the base back as it was. (A "
        "base that is to be trained on is copied or converted first.)"
    )


def checked_adapters_of(folder: pathlib.Path, step: int | None) -> tuple[LoraConfig, Base] | None:
    """`adapters_of` a checkpoint, with the base checked.

    Raises:
      UserError: the base is gone or has changed, or the checkpoint is, through its bases, a base of itself.
    """
    found = adapters_of(orbax.read_meta(folder, step))
    if found:
        check_base(found[1])
        _check_no_circle(folder, step)
    return found


def _check_no_circle(folder: pathlib.Path, step: int | None) -> None:
    places: list[str] = []
    while is_orbax(folder):
        places.append(str(orbax.checkpoint_path(folder, step).resolve()))
        if places[-1] in places[:-1]:
            raise UserError(
                f"The adapters in {places[0]} have no base to stand on: following bases leads in a circle, "
                f"{' -> '.join(places)}. Give the whole model that they were trained on its place back."
            )
        found = adapters_of(orbax.read_meta(folder, step))
        if found is None:
            return
        folder, step = locate(found[1].source), found[1].step


def load_params(
    source: str | pathlib.Path,
    config: ModelConfig,
    mesh: Mesh,
    rules: sharding.Rules,
    dtype: str = "float32",
    step: int | None = None,
) -> dict:
    """Sharded parameters of a checkpoint; of one with adapters, its base with the adapters merged in.

    Args:
      config: the model to run; must have the checkpoint's architecture.
      dtype: of the parameters; int8 ones, their scales and what lies beside them stay as they are stored.
      step: of a checkpoint folder; None: the last.

    Raises:
      UserError: no checkpoint, another architecture, damaged files, or a base that is not the one of the adapters.
    """
    folder = locate(source)
    if not is_orbax(folder):
        weights = huggingface.Weights(folder)
        check_architecture(weights.config, config, source)
        return huggingface.load_params(weights, config, mesh, rules, dtype)
    check_architecture(ModelConfig(**orbax.read_meta(folder, step)["model"]), config, source)
    found = checked_adapters_of(folder, step)
    if found is None:
        dtype = None if config.quantise else dtype
        return orbax.restore_params(folder, config, mesh, rules, dtype=dtype, step=step)
    settings, base = found
    params = load_params(base.source, config, mesh, rules, settings.base_dtype, base.step)
    adapters = orbax.restore_adapters(folder, config, settings, mesh, step)

    def merged(params: dict, adapters: dict) -> dict:
        return jax.tree.map(lambda x: x.astype(dtype), lora.merge(params, adapters, settings))

    return jax.jit(merged, out_shardings=sharding.param_shardings(config, mesh, rules))(params, adapters)
