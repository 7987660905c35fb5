"""A training run's configuration: frozen, validated dataclasses, made once from `configs/*.py` and the command line."""

import argparse
import ast
import dataclasses
import json
import math
import pathlib
import runpy
import traceback
import types
import typing
from typing import Any

from ml_collections import ConfigDict

from refusion_jax.errors import UserError
from refusion_jax.model.config import ModelConfig, from_huggingface, qwen3
from refusion_jax.objective.autoregressive import Autoregressive
from refusion_jax.objective.block import Block
from refusion_jax.objective.masked import Masked
from refusion_jax.objective.refusion import Refusion
from refusion_jax.objective.sedd import Sedd
from refusion_jax.settings import build, choice, not_negative, positive

Objective = Refusion | Masked | Block | Sedd | Autoregressive  # `kind` says which
OBJECTIVES = typing.get_args(Objective)
SEEDS = 2**32  # JAX takes a seed modulo that: others would be the same run
SOURCE_KINDS = ("json", "jsonl", "tfds", "parquet", "array_record", "text", "procedural")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of examples.

    Attributes:
      kind: json (list of records), jsonl, parquet, array_record (JSON records), tfds, text (plain text for
        pretraining) or procedural (a reasoning-gym task).
      path: file, glob or folder; for tfds the data set's name or folder; for procedural the task's name.
      weight: passes over this source per epoch; with 0.5 the epochs take halves in turn.
      query_field, response_field: fields of a record; no query_field: the response is a plain document.
      split: split of a tfds data set.
      start, stop: the part of the source to use, as fractions of it. The split goes by a hash of the prompt, so no
        prompt is on two sides of a cut: give training and evaluation parts of the same source.
      size, seed, options: of a procedural task: number of examples, seed, parameters of the task and query_pattern
        (`data.tasks.Task`). Of other kinds: separator (text: what stands between documents), data_dir (tfds).
    """

    kind: str
    path: str
    weight: float = 1.0
    query_field: str = "query"
    response_field: str = "response"
    split: str = "train"
    start: float = 0.0
    stop: float = 1.0
    size: int = 10000
    seed: int = 0
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        choice("data source", self, "kind", SOURCE_KINDS)
        positive("data source", self, "weight", "size")
        if not 0 <= self.start < self.stop <= 1:
            raise UserError(
                f"data source {self.path}: start = {self.start} and stop = {self.stop} are fractions with 0 <= start "
                "< stop <= 1."
            )


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """Shares of the rows that the training sources have from a step on, in their order; they need not add up to 1."""

    step: int
    shares: tuple[float, ...]

    def __post_init__(self):
        not_negative("data.mixture", self, "step")
        if not (0 < sum(self.shares) < math.inf and min(self.shares) >= 0):
            raise UserError(
                f"data.mixture has the shares {self.shares} from step {self.step} on; they must be finite, "
                "none may be negative, and not all 0."
            )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained and evaluated on.

    Attributes:
      tokenizer: "bytes", or a Hugging Face name or folder.
      train, evaluation: sources; evaluation may be empty.
      max_length: length of a packed row, tokens; longer examples are dropped, longer documents (plain text) split.
      max_examples_per_row: static maximum of examples in a row; 0: chosen from the data.
      piece_positions: where positions begin in a piece of a split document: at 0 ("restart"), or where the piece is in
        its document ("continue"), which the model must have positions for.
      response_multiple: responses are filled with EOS tokens, which are learnt like others, to a multiple of so many
        tokens; documents are not. For diffusion over whole responses, which has to be told where one ends.
      cache_dir: local folder where a run tokenises its sources; empty: the run's folder, or, where that is in a bucket,
        ~/.cache/refusion_jax/data.
      store: folder or bucket into which `refusion_jax.prepare` has tokenised the sources, which are then not read;
        empty: the run does it itself.
      mixture: shares of the training sources from step 0 on and from each step on at which they change; empty: the
        sources' weights, in epochs.
      allow_change: go on with a run although its rows are no longer those of its checkpoint (other data, tokenizer,
        seed or lengths): from the same row number on, in the new rows.
    """

    tokenizer: str = "bytes"
    train: tuple[SourceConfig, ...] = ()
    evaluation: tuple[SourceConfig, ...] = ()
    max_length: int = 4096
    max_examples_per_row: int = 0
    piece_positions: str = "restart"
    response_multiple: int = 1
    cache_dir: str = ""
    store: str = ""
    mixture: tuple[MixtureConfig, ...] = ()
    allow_change: bool = False

    def __post_init__(self):
        positive("data", self, "max_length", "response_multiple")
        choice("data", self, "piece_positions", ("restart", "continue"))
        not_negative("data", self, "max_examples_per_row")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping, warm-up and a cosine or constant schedule (method section 5 for the defaults)."""

    lr: float = 2e-5
    schedule: str = "cosine"
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self):
        choice("optimizer", self, "schedule", ("cosine", "constant"))
        positive("optimizer", self, "lr", "eps", "clip_norm")
        not_negative("optimizer", self, "warmup_steps", "weight_decay", "b1", "b2")
        if max(self.b1, self.b2) >= 1:
            raise UserError(
                f"optimizer.b1 = {self.b1} and optimizer.b2 = {self.b2} are decay rates; they must be below 1."
            )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; -1: whatever the others leave."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on a frozen base; rank 0: train all parameters.

    Attributes:
      rank, alpha: the update is alpha / rank * A B.
      targets: projections that get adapters, of query, key, value, output, gate, up, down.
      base_dtype: how the frozen base is kept.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query", "key", "value", "output", "gate", "up", "down")
    base_dtype: str = "bfloat16"

    def __post_init__(self):
        names = ("query", "key", "value", "output", "gate", "up", "down")
        if self.rank < 0:
            raise UserError(f"lora.rank is {self.rank}; use 0 for none, or a positive rank.")
        if self.rank and (not self.targets or set(self.targets) - set(names)):
            raise UserError(f"lora.targets is {self.targets}; choose from {', '.join(names)}.")
        choice("lora", self, "base_dtype", ("float32", "bfloat16"))
        positive("lora", self, "alpha")


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run.

    Attributes:
      objective: what is learned; its `kind`, "refusion", "autoregressive", "masked", "block" or "sedd", says which
        settings there are.
      init_from: weights to start from: a Hugging Face folder or name, or a checkpoint folder; empty: random ones.
        Weights only; a run is continued by starting it again with the same --workdir.
      steps: optimizer steps; 0: as many as `epochs` take.
      epochs: passes over the data, when steps is 0.
      batch_size: rows per step over all devices; accumulation: microbatches a step is split into.
      eval_every, eval_batches: steps between evaluations (0: at the end only), batches of each (0: all).
      checkpoint_every_steps, checkpoint_every_minutes: 0 switches one off; the last step is always saved.
      keep_last, keep_best: checkpoints kept, by age and by evaluation loss.
      profile: trace that many steps, from step 10 on, into the run's folder.
    """

    model: ModelConfig
    data: DataConfig
    objective: Objective = Refusion()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    lora: LoraConfig = LoraConfig()
    init_from: str = ""
    steps: int = 0
    epochs: float = 1.0
    batch_size: int = 8
    accumulation: int = 1
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 0
    checkpoint_every_steps: int = 1000
    checkpoint_every_minutes: float = 30.0
    keep_last: int = 3
    keep_best: int = 1
    profile: int = 0

    def __post_init__(self):
        positive("config", self, "batch_size", "accumulation", "log_every", "keep_last")
        not_negative(
            "config",
            self,
            "steps",
            "epochs",
            "eval_every",
            "eval_batches",
            "checkpoint_every_steps",
            "checkpoint_every_minutes",
            "keep_best",
            "profile",
        )
        if not 0 <= self.seed < SEEDS:
            raise UserError(f"config.seed is {self.seed}; seeds are whole numbers from 0 to {SEEDS - 1}.")
        if not self.steps and not self.epochs:
            raise UserError("config.steps and config.epochs are both 0; say how long to train.")
        if self.batch_size % self.accumulation:
            raise UserError(
                f"config.batch_size = {self.batch_size} is not a multiple of config.accumulation = "
                f"{self.accumulation}; every microbatch has the same size."
            )
        last = max((m.step for m in self.data.mixture), default=0)
        if self.data.mixture and last >= self.steps:
            raise UserError(
                f"config.data.mixture changes the shares at step {last}, but config.steps is {self.steps}"
                f"{'' if self.steps else ', and a mixture knows no epochs'}. Make the run longer than that, or the "
                "schedule shorter."
            )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def from_config_dict(config: ConfigDict | dict) -> Config:
    """Validates a whole config.

    Raises:
      UserError: an unknown or missing setting, or one of the wrong type or range.
    """
    return build(Config, config.to_dict() if isinstance(config, ConfigDict) else dict(config), "config")


def model_settings(source: str | ModelConfig, **overrides: Any) -> ConfigDict:
    """The `config.model` group of a published size ("8b"), a Hugging Face `config.json` (its path) or a ModelConfig."""
    if isinstance(source, str):
        source = from_huggingface(source) if source.endswith(".json") else qwen3(source)
    settings = ConfigDict(dataclasses.asdict(source), type_safe=False)
    settings.update(overrides)
    return settings


def parse_arguments(argument: str | None, **defaults: Any) -> types.SimpleNamespace:
    """Typed arguments of a config file: `configs/tiny.py:steps=50,lr=1e-3` over `defaults`, whose types hold.

    Raises:
      UserError: an unknown name or a value of another type.
    """
    values = dict(defaults)
    for item in filter(None, (argument or "").split(",")):
        name, _, text = item.partition("=")
        if name not in defaults:
            raise UserError(f"Unknown config argument {name!r}; this config takes {', '.join(defaults)}.")
        kind = type(defaults[name])
        try:
            values[name] = text.lower() in ("1", "true", "yes", "") if kind is bool else kind(text)
        except ValueError:
            raise UserError(f"Config argument {name} = {text!r} is not of type {kind.__name__}.") from None
    return types.SimpleNamespace(**values)


def load_config(argument: str, overrides: dict[str, str] | None = None) -> Config:
    """Reads a config file and applies overrides.

    Args:
      argument: `path.py` or `path.py:name=value,...`; the file has `get_config(argument) -> ConfigDict`.
      overrides: dotted name -> text; texts are Python literals where they parse as one (`1e-4`, `[4, 8]`), else
        strings.

    Raises:
      UserError: no such file, one that does not run, or an unknown or impossible setting.
    """
    path, _, argument = argument.partition(":")
    if not pathlib.Path(path).is_file():
        raise UserError(f"There is no config file {path}; the ones that come with the project are in configs/.")
    settings = _run_file(path, argument)
    for name, text in (overrides or {}).items():
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        *groups, last = name.split(".")
        group = settings
        for part in groups:
            group = _item(group, part, name)
        if not isinstance(group, dict):
            _item(group, last, name)  # is there
        group[int(last) if isinstance(group, list) else last] = value
    return from_config_dict(settings)


def _run_file(path: str, argument: str) -> dict[str, Any]:
    """What a config file's `get_config(argument)` returns; a UserError names the line that raises anything."""
    try:
        get_config = runpy.run_path(path).get("get_config")
        settings = get_config(argument) if get_config else None
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, SyntaxError) and error.filename and pathlib.Path(error.filename).is_file():
            # In this file, or in one that it imports.
            place, reason = f"{error.filename} line {error.lineno}", f"{error.msg}: {(error.text or '').strip()!r}"
        else:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
            place, reason = f"{path} line {lines[-1]}" if lines else path, str(error)
        raise UserError(f"The config file {place} raises {type(error).__name__} ({reason}); fix that line.") from error
    if get_config is None:
        raise UserError(f"{path} has no function get_config(argument); see the files in configs/.")
    if not isinstance(settings, ConfigDict):
        raise UserError(f"get_config of {path} returns {settings!r}; it must return an ml_collections.ConfigDict.")
    return settings.to_dict()


def _item(group: Any, part: str, name: str) -> Any:
    """`group[part]` of nested settings; tuples were made lists by ConfigDict.to_dict or are read-only."""
    if isinstance(group, dict):
        group.setdefault(part, {})  # a group that the file leaves at its defaults; an unknown one is noticed later
        if isinstance(group[part], tuple):
            group[part] = list(group[part])
        return group[part]
    if isinstance(group, list) and part.isdigit() and int(part) < len(group):
        return group[int(part)]
    known = f"indices 0 to {len(group) - 1}" if isinstance(group, list) else "no settings"
    raise UserError(f"Unknown setting config.{name}: there is no {part!r}; here are {known}.")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --config to a command; `parse_config` then takes `--config.NAME=VALUE` overrides too."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:NAME=VALUE,...]",
        help="config file, with its arguments; override any setting with --config.NAME=VALUE",
    )


def parse_config(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """Parses a command line with --config and its overrides.

    Raises:
      UserError: an unknown argument, or what `load_config` raises.
    """
    arguments, rest = parser.parse_known_args(argv)
    overrides, rest = {}, list(rest)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--config."):
            raise UserError(f"Unknown argument {name}; see --help. Settings are overridden with --config.NAME=VALUE.")
        if not equals:
            if not rest:
                raise UserError(f"{name} has no value; write {name}=VALUE.")
            value = rest.pop(0)
        overrides[name.removeprefix("--config.")] = value
    return arguments, load_config(arguments.config, overrides)
