"""Which method is better: the same model, data and steps for each, decoded by each of its samplers.

    python tools/compare_methods.py configs/compare.py --out runs/compare                 # hours on two CPU cores
    python tools/compare_methods.py configs/compare.py:scale=quick --quick --out runs/quick  # minutes, to see it work
    python tools/compare_methods.py configs/compare.py:scale=100m --out runs/compare100m  # one GPU

Every method is trained from the same initial weights on the same rows, with each of `--lr`, of which the one with the
lowest held-out loss is kept; then with that one for every other seed. Each run is decoded at a range of thresholds.
Whatever is finished is kept: the same command goes on where it was stopped. Out come report.md, table.json and PNGs.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import compare_report
from absl import logging

from refusion_jax import compilation
from refusion_jax.config import Config, load_config
from refusion_jax.decoder import Decoder
from refusion_jax.errors import UserError, run_main
from refusion_jax.evaluation import documents, run
from refusion_jax.evaluation.journal import totals
from refusion_jax.evaluation.likelihood import EXACT, log_likelihoods
from refusion_jax.evaluation.model import DecoderLM
from refusion_jax.evaluation.tasks import Benchmark, Document
from refusion_jax.sampling import SamplerConfig
from refusion_jax.sampling.methods import SUITED

METHODS = ("autoregressive", "refusion", "refusion_causal", "llada", "mdlm", "dream", "bd3", "sdar", "sedd")
QUICK_METHODS = ("autoregressive", "refusion", "llada", "bd3")
LENGTH_STEP = 16  # answers' lengths are rounded up to it, so that tasks share compiled programs


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A way to decode, over a range of a threshold.

    Attributes:
      name: for table and legend.
      method: of sampling.
      objectives: kinds of objectives whose models are decoded so.
      settings: besides the threshold.
      threshold: which setting is varied; empty: none is.
      values: of it.
    """

    name: str
    method: str
    objectives: tuple[str, ...]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    threshold: str = ""
    values: tuple[float, ...] = (0.0,)


THRESHOLDS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
SLOTS = {"speculate": "off"}
DECODINGS = (
    Decoding("token by token", "autoregressive", ("autoregressive", "refusion")),
    Decoding("slots of 8", "plan_and_infill", ("refusion",), SLOTS | {"slot_size": 8}, "slot_threshold", THRESHOLDS),
    Decoding("slots of 4", "plan_and_infill", ("refusion",), SLOTS | {"slot_size": 4}, "slot_threshold", THRESHOLDS),
    Decoding("masks, sure ones", "masked", ("masked",), {"select": "threshold"}, "threshold", THRESHOLDS),
    Decoding("masks, one by one", "masked", ("masked",), {"select": "topk"}),
    Decoding(
        "masks, cached", "masked", ("masked",), {"select": "threshold", "cache": "prefix"}, "threshold", THRESHOLDS
    ),
    Decoding("blocks, sure ones", "block", ("block",), {"reveal": "dynamic"}, "threshold", THRESHOLDS),
)


def decodings_of(kind: str, quick: bool = False) -> list[Decoding]:
    """The ways to decode a model of an objective; a quick comparison takes the first two, at every third threshold."""
    found = [d for d in DECODINGS if kind in d.objectives and d.method in SUITED.get(kind, ())]
    if quick:
        found = [dataclasses.replace(d, values=d.values[1::3] or d.values) for d in found[:2]]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="configs/compare.py, with its arguments")
    parser.add_argument("--out", required=True, type=pathlib.Path, metavar="DIR")
    parser.add_argument("--methods", default="", metavar="NAMES", help=f"default {','.join(METHODS)}")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--lr", default="1e-3,2e-3,4e-3", metavar="RATES", help="tried with the first seed")
    parser.add_argument("--examples", type=int, default=100, metavar="N", help="held-out examples of each task")
    parser.add_argument("--quick", action="store_true", help="few methods, examples, thresholds; one seed and rate")
    arguments = parser.parse_args(argv)
    compilation.keep_programs()
    logging.set_verbosity(logging.ERROR)
    arguments.methods = arguments.methods or ",".join(QUICK_METHODS if arguments.quick else METHODS)
    if arguments.quick:
        arguments.seeds, arguments.lr, arguments.examples = 1, "2e-3", min(arguments.examples, 20)
    if arguments.seeds < 1 or arguments.examples < 1:
        raise UserError("--seeds and --examples must be at least 1.")
    try:
        rates = [float(word) for word in arguments.lr.split(",")]
    except ValueError:
        raise UserError(f"--lr is {arguments.lr!r}; give learning rates with commas.") from None
    runs = []
    for method in arguments.methods.split(","):
        kind = load_config(with_arguments(arguments.config, method=method)).objective.kind
        if not decodings_of(kind):
            print(f"{method}: no sampler here decodes the objective {kind!r}; left out", file=sys.stderr)
            continue
        best = min(rates, key=lambda rate: train(arguments, method, 0, rate)["loss"])
        for seed in range(arguments.seeds):
            trained = train(arguments, method, seed, best)
            runs.append(trained | {"points": points(arguments, trained)})
    if not runs:
        raise UserError(f"None of the methods {arguments.methods} can be decoded here; name others.")
    compare_report.write(arguments.out, runs, command_of(arguments))


def with_arguments(config: str, **given: Any) -> str:
    """A config's path with these arguments of its own besides those that it has."""
    path, _, own = config.partition(":")
    return f"{path}:{','.join(filter(None, [own, *(f'{name}={value}' for name, value in given.items())]))}"


def command_of(arguments: argparse.Namespace) -> str:
    """The command line that gives this report."""
    words = ["python tools/compare_methods.py", arguments.config, "--out", str(arguments.out)]
    words += ["--methods", arguments.methods, "--seeds", str(arguments.seeds), "--lr", arguments.lr]
    return " ".join([*words, "--examples", str(arguments.examples), *["--quick"] * arguments.quick])


# --- Training: a process of its own, which resumes by itself.


def train(arguments: argparse.Namespace, method: str, seed: int, rate: float) -> dict[str, Any]:
    """Trains a run, or reads what it said; its held-out loss, its cost and where it is."""
    workdir = arguments.out / "runs" / f"{method}-lr{rate:g}-seed{seed}"
    config = with_arguments(arguments.config, method=method, seed=seed, lr=rate)
    wanted = load_config(config)
    if not finished(workdir, wanted):
        print(f"training {workdir}", file=sys.stderr)
        workdir.mkdir(parents=True, exist_ok=True)
        cache = (arguments.out / "cache").resolve()  # one for all: the data are the same
        command = [sys.executable, "-m", "refusion_jax.train", "--config", config, "--workdir", str(workdir)]
        with (workdir / "train.log").open("ab") as log:
            code = subprocess.call([*command, f"--config.data.cache_dir={cache}"], stdout=log, stderr=log)
        if code or not finished(workdir, wanted):
            raise UserError(f"Training {workdir} ended with code {code}; {workdir / 'train.log'} says why.")
    records = metrics_of(workdir)
    steps = [record for record in records if record["kind"] == "train"]
    return {
        "method": method,
        "seed": seed,
        "lr": rate,
        "workdir": str(workdir),
        "loss": [record["loss"] for record in records if record["kind"] == "evaluation"][-1],
        "steps": wanted.steps,
        "tokens": wanted.steps * wanted.batch_size * wanted.data.max_length,
        "seconds": sum(record["step_seconds"] for record in steps) / len(steps) * wanted.steps,
        "parameters": wanted.model.num_params(),
    }


def metrics_of(workdir: pathlib.Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def finished(workdir: pathlib.Path, config: Config) -> bool:
    """Whether the run's last evaluation was at its last step, and the checkpoint of that step is there."""
    evaluated = [record["step"] for record in metrics_of(workdir) if record["kind"] == "evaluation"]
    return config.steps in evaluated and (workdir / "checkpoints" / str(config.steps)).is_dir()


# --- Decoding: a file for each point.


def points(arguments: argparse.Namespace, trained: dict[str, Any]) -> list[dict[str, Any]]:
    """A run's points, those that are not known decoded now."""
    folder = arguments.out / "points" / pathlib.Path(trained["workdir"]).name
    folder.mkdir(parents=True, exist_ok=True)
    known = Known(folder, arguments.examples)
    found: list[dict[str, Any]] = []
    decoder = tasks = None
    kind = json.loads((pathlib.Path(trained["workdir"]) / "config.json").read_text())["objective"]["kind"]
    for decoding in decodings_of(kind, arguments.quick):
        for value in decoding.values:
            point = known.read(decoding, value)
            if point is None:
                if decoder is None:
                    decoder = Decoder.load(trained["workdir"])
                    tasks = documents.load(documents.HELD_OUT, {}, trained["workdir"], None)
                print(f"decoding {folder.name}: {decoding.name} {value:g}", file=sys.stderr)
                point = known.write(decoding, value, decoded(decoder, tasks, decoding, value, arguments.examples))
            found.append(point)
    return found


@dataclasses.dataclass(frozen=True)
class Known:
    """Points of a run that are decoded, a file each."""

    folder: pathlib.Path
    examples: int

    def path(self, decoding: Decoding, value: float) -> pathlib.Path:
        return self.folder / f"{decoding.name.replace(' ', '-').replace(',', '')}-{value:g}-{self.examples}.json"

    def read(self, decoding: Decoding, value: float) -> dict[str, Any] | None:
        path = self.path(decoding, value)
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, decoding: Decoding, value: float, point: dict[str, Any]) -> dict[str, Any]:
        path = self.path(decoding, value)
        path.with_suffix(".part").write_text(json.dumps(point, indent=1))
        path.with_suffix(".part").replace(path)
        return point


def decoded(
    decoder: Decoder,
    tasks: Sequence[tuple[Benchmark, list[Document]]],
    decoding: Decoding,
    value: float,
    examples: int,
) -> dict[str, Any]:
    """A point: accuracy of each task, tokens per forward, tokens/s at batch 16 and 1, nats per token where known."""
    accuracy, records, rates, known, tokens = {}, [], {1: [], 16: []}, 0.0, 0
    for benchmark, held_out in tasks:
        chosen = held_out[:examples]
        config = settings_of(decoder, decoding, value, chosen)
        lm = DecoderLM(decoder, config, batch_size=16)
        samples = run.samples_of(benchmark, chosen, run.texts_of(lm, benchmark, chosen))
        accuracy[benchmark.name] = sum(sample.score for sample in samples) / len(samples)
        records += lm.records
        for batch, timed in rates.items():
            for last in (False, True):  # the second time nothing is new
                lm = DecoderLM(decoder, config, batch_size=batch)
                run.texts_of(lm, benchmark, chosen[: max(batch, 4)])
                timed += lm.records * last
        if value == decoding.values[0]:  # a threshold changes no probability
            pairs = [pair_of(decoder, document) for document in (chosen if config.method in EXACT else chosen[:4])]
            known += sum(value for value, _ in log_likelihoods(decoder, config, pairs, batch_size=16))
            tokens += sum(len(response) for _, response in pairs)
    count, forwards, _ = totals(records)
    speeds = {}
    for batch, timed in rates.items():
        written, _, seconds = totals(timed)
        speeds[f"tokens_per_second_{batch}"] = written / max(seconds, 1e-9)
    return {
        "decoding": decoding.name,
        "threshold": value if decoding.threshold else None,
        "accuracy": accuracy,
        "tokens": count,
        "forwards": forwards,
        "tokens_per_forward": count / max(forwards, 1),
        **speeds,
        "nats_per_token": -known / tokens if tokens else None,
        "bound": decoding.method not in EXACT,
    }


def settings_of(decoder: Decoder, decoding: Decoding, value: float, chosen: Sequence[Document]) -> SamplerConfig:
    """Answers as long as the longest right one."""
    longest = max(len(decoder.tokenizer.encode(document["response"])) + 1 for document in chosen)
    given = decoding.settings | ({decoding.threshold: value} if decoding.threshold else {})
    return decoder.settings(method=decoding.method, gen_length=-(-longest // LENGTH_STEP) * LENGTH_STEP, **given)


def pair_of(decoder: Decoder, document: Document) -> tuple[list[int], list[int]]:
    """Ids of a query and of its response with the end."""
    tokenizer = decoder.tokenizer
    return tokenizer.encode_prompt(document["query"]), [*tokenizer.encode(document["response"]), tokenizer.eos_id]


if __name__ == "__main__":
    run_main(main)
