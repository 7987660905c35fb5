"""Whether a run can go on from a checkpoint, by their metadata (metadata.py): model and rows must be the same."""

import pathlib
from typing import Any

from refusion_jax.errors import UserError
from refusion_jax.model.config import ModelConfig


def check_same_model(found: dict, wanted: dict, folder: pathlib.Path) -> None:
    """Raises a UserError naming the settings in which a checkpoint's model differs from the run's."""
    old, new = ModelConfig(**found["model"]).architecture(), ModelConfig(**wanted["model"]).architecture()
    old["lora"], new["lora"] = (_lora(meta) for meta in (found, wanted))
    differences = [
        f"{name} is {old[name]} in the checkpoint and {new[name]} here" for name in old if old[name] != new[name]
    ]
    if differences:
        raise UserError(
            f"The checkpoint in {folder} is of another model: {'; '.join(differences)}. Use its config, or another "
            "--workdir to start afresh."
        )


def check_same_rows(found: dict, wanted: dict, folder: pathlib.Path) -> str:
    """Makes sure that a run goes on in the rows of its checkpoint; a row number means nothing in others.

    Returns:
      What the user should know: that `config.data.allow_change` let changes pass, or that the checkpoint is from before
      rows were written down. Else nothing.

    Raises:
      UserError: naming what has changed.
    """
    old, new = found.get("rows"), wanted["rows"]
    if new is None:
        return ""
    if old is None:
        return f"the checkpoint in {folder} does not say what rows it was trained on; they are taken to be the same"
    differences = [
        f"{name} is {new.get(name, 'nothing')} here and {old.get(name, 'nothing')} in the checkpoint"
        for name in dict.fromkeys((*new, *old))
        if new.get(name) != old.get(name)
    ]
    if differences and wanted["config"]["data"]["allow_change"]:
        return f"the run in {folder} goes on with other rows: {'; '.join(differences)}"
    if differences:
        raise UserError(
            f"The run in {folder} was trained on other rows: {'; '.join(differences)}. Use the data and settings of "
            "the checkpoint, or another --workdir to start afresh, or --config.data.allow_change=true to go on from "
            "the same row number in the new rows."
        )
    return ""


def check_same_length(found: dict, wanted: dict, step: int, next_row: int) -> None:
    """Raises a UserError where a run that is as long as its epochs, in steps of `batch_size` rows, has steps of others.

    Args:
      step, next_row: where the checkpoint stands.
    """
    old, new = ((meta["config"] or {}).get("batch_size") for meta in (found, wanted))
    if old and new and old != new and wanted["config"]["steps"] == 0:
        raise UserError(
            f"config.batch_size is {new} here and {old} in the checkpoint of step {step}, and config.steps is 0: the "
            f"run would be as long as its epochs in steps of {new} rows, but has had {next_row} rows in {step} steps. "
            f"Set config.steps to {step} and as many more as it is to have, or config.batch_size to {old}."
        )


def _lora(meta: dict) -> Any:
    settings = dict((meta["config"] or {}).get("lora") or {"rank": 0})
    return {name: value for name, value in settings.items() if name != "base_dtype"} if settings["rank"] else "none"
