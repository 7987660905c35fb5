"""Model config, tokenizer and parameters of a checkpoint, whichever kind it is.

A source is a checkpoint folder of a training run or of a conversion (Orbax), a Hugging Face folder, or a name on the
Hugging Face hub. Parameters go straight to their place on the mesh: each process reads only its own shards.
"""

import dataclasses
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from refusion_jax import lora
from refusion_jax.checkpoint import huggingface, orbax
from refusion_jax.config import LoraConfig
from refusion_jax.data.tokenizers import BYTES_FILE, Tokenizer, load_tokenizer
from refusion_jax.errors import UserError
from refusion_jax.model.config import ModelConfig, from_huggingface
from refusion_jax.parallel import sharding

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", BYTES_FILE)


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
    """Raises a UserError that names every field in which a checkpoint differs from the model it is loaded into."""
    there, here = found.architecture(), wanted.architecture()
    different = [
        f"{name} is {there[name]}, config.model has {here[name]}" for name in there if there[name] != here[name]
    ]
    if different:
        raise UserError(
            f"The checkpoint {source} is of another model: {'; '.join(different)}. Set config.model to the "
            "checkpoint's sizes, or load another one."
        )


def adapters_of(meta: dict[str, Any]) -> tuple[LoraConfig, str] | None:
    """(LoRA settings, source of the base) of a checkpoint that holds adapters only; None for a whole model."""
    config = meta.get("config") or {}
    settings = config.get("lora") or {}
    if not settings.get("rank"):
        return None
    return LoraConfig(**{**settings, "targets": tuple(settings["targets"])}), config["init_from"]


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
      dtype: of the parameters.
      step: of a checkpoint folder; None: the last.

    Raises:
      UserError: no checkpoint, another architecture, or damaged files.
    """
    folder = locate(source)
    if not is_orbax(folder):
        weights = huggingface.Weights(folder)
        check_architecture(weights.config, config, source)
        return huggingface.load_params(weights, config, mesh, rules, dtype)
    meta = orbax.read_meta(folder, step)
    check_architecture(ModelConfig(**meta["model"]), config, source)
    adapted = adapters_of(meta)
    if adapted is None:
        return orbax.restore_params(folder, config, mesh, rules, dtype=dtype, step=step)
    settings, base = adapted
    params = load_params(base, config, mesh, rules, settings.base_dtype)
    adapters = orbax.restore_adapters(folder, config, settings, mesh, step)
    merge = lambda params, adapters: jax.tree.map(lambda x: x.astype(dtype), lora.merge(params, adapters, settings))
    return jax.jit(merge, out_shardings=sharding.param_shardings(config, mesh, rules))(params, adapters)
