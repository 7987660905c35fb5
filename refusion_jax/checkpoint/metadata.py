"""What a checkpoint says of itself: model, config, rows, versions, the base of adapters."""

import dataclasses
import importlib.metadata
import json
import pathlib

from refusion_jax import __version__
from refusion_jax.config import LoraConfig
from refusion_jax.errors import UserError
from refusion_jax.model.config import ModelConfig
from refusion_jax.settings import build

FORMAT = 1
_LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "grain")


@dataclasses.dataclass(frozen=True)
class Base:
    """What adapters were trained on.

    Attributes:
      source: folder or name of the base.
      step: of a checkpoint folder; None: Hugging Face layout, or a checkpoint from before steps were written down.
      fingerprint: of its weights (`load.fingerprint`); empty: from before they were written down.
    """

    source: str
    step: int | None = None
    fingerprint: str = ""

    def __str__(self):
        return self.source if self.step is None else f"step {self.step} of {self.source}"


def make_meta(
    model: ModelConfig,
    *,
    step: int,
    tokenizer: str,
    config: dict | None = None,
    rows: dict | None = None,
    base: Base | None = None,
) -> dict:
    """The metadata of a checkpoint, as JSON knows it.

    Args:
      config: the run's; None for converted weights.
      rows: fingerprint of the rows that it is trained on (`pipeline.Rows`).
      base: of adapters.
    """
    versions = {"refusion_jax": __version__, **{name: importlib.metadata.version(name) for name in _LIBRARIES}}
    return {
        "format": FORMAT,
        "model": dataclasses.asdict(model),
        "config": config,
        "step": step,
        "versions": versions,
        "tokenizer": tokenizer,
        "rows": rows,
        "base": dataclasses.asdict(base) if base else None,
    }


def read(path: pathlib.Path) -> dict:
    """The metadata in a file (see `make_meta`).

    Raises:
      UserError: not a file of this project, or one with settings that this version does not know.
    """
    try:
        meta = json.loads(path.read_text())
        if meta["format"] != FORMAT:
            raise UserError(
                f"{path} has format {meta['format']}, this version reads {FORMAT}; use the version that wrote it "
                f"({meta['versions']})."
            )
        _check_known(meta, path)
        return meta
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not the metadata of a checkpoint of this project ({error!r}).") from None


def _check_known(meta: dict, path: pathlib.Path) -> None:
    groups = {"model": (ModelConfig, meta["model"])}
    if (meta["config"] or {}).get("lora"):
        groups["config.lora"] = LoraConfig, meta["config"]["lora"]
    if meta.get("base"):
        groups["base"] = Base, meta["base"]
    unknown = [
        f"{group}.{name}"
        for group, (kind, values) in groups.items()
        for name in values
        if name not in {field.name for field in dataclasses.fields(kind)}
    ]
    if unknown:
        raise UserError(
            f"{path} has settings that this version does not know: {', '.join(unknown)}. Use the version that wrote it "
            f"({meta['versions']})."
        )
    for group, (kind, values) in groups.items():  # none missing, each of its type
        build(kind, values, f"{path}: {group}")
