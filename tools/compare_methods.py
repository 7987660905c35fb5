"""Which method is better: the same model, data and steps for each, decoded by each of its samplers.

    python tools/compare_methods.py configs/compare.py --out runs/compare                 # hours on two CPU cores
    python tools/compare_methods.py configs/compare.py:scale=quick --quick --out runs/quick  # minutes, to see it work
    python tools/compare_methods.py configs/compare.py:scale=100m --out runs/compare100m  # one GPU

Every method is trained from the same initial weights on the same rows: with each of `--lr` for a part of the steps
(`--tuning`), then with the one of the lowest held-out loss for all steps, with every seed. Each run is decoded at a
range of thresholds. Whatever is finished is kept: the same command goes on where it was stopped. Out come report.md,
table.json and PNGs, after each seed those of the seeds so far. Seconds are the processor's on a CPU, so that what else
runs there counts little.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import compare_report
import jax
from absl import logging

from refusion_jax import compilation
from refusion_jax.config import Config, load_config
from refusion_jax.decoder import Decoder
from refusion_jax.errors import UserError, run_main
from refusion_jax.evaluation import documents
from refusion_jax.evaluation.likelihood import log_likelihoods
from refusion_jax.evaluation.tasks import Benchmark, Document
from refusion_jax.sampling import Generation, SamplerConfig, generate
from refusion_jax.sampling.engine import PREFILL_TOKENS
from refusion_jax.sampling.methods import SUITED
from refusion_jax.train import train as run_training

METHODS = ("autoregressive", "refusion", "refusion_causal", "llada", "dream", "sdar", "sedd")
QUICK_METHODS = ("autoregressive", "refusion", "llada", "sdar")
LENGTH_STEP = 8  # answers' lengths are rounded up to it: to whole slots and blocks
LIKELIHOOD = 4, 32  # documents of a task whose probability is estimated, and draws for each
BATCHES = (16, 1)
ALONE = 10  # prompts that are decoded one by one to measure the speed of batch 1


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


THRESHOLDS = (0.4, 0.6, 0.8, 0.95)
SLOTS = {"speculate": "off"}
SURE = {"select": "threshold"}
DECODINGS = (
    Decoding("token by token", "autoregressive", ("autoregressive", "refusion")),
    Decoding("slots of 8", "plan_and_infill", ("refusion",), SLOTS | {"slot_size": 8}, "slot_threshold", THRESHOLDS),
    Decoding("speculative", "speculative", ("autoregressive", "refusion")),
    Decoding("slots of 4", "plan_and_infill", ("refusion",), SLOTS | {"slot_size": 4}, "slot_threshold", THRESHOLDS),
    Decoding("masks, sure ones", "masked", ("masked",), SURE, "threshold", THRESHOLDS),
    Decoding("masks, one by one", "masked", ("masked",), {"select": "topk"}),
    Decoding(
        "masks, cached", "masked", ("masked",), SURE | {"cache": "prefix", "block_length": 8}, "threshold", THRESHOLDS
    ),
    Decoding("blocks, sure ones", "block", ("block",), {"reveal": "dynamic"}, "threshold", THRESHOLDS),
    Decoding("ratios, in steps", "masked", ("sedd",), {"select": "scores"}, "steps", (4, 8, 16)),
)


def decodings_of(kind: str, quick: bool = False) -> list[Decoding]:
    """The ways to decode a model of an objective; a quick comparison takes the first two, at every other threshold."""
    found = [d for d in DECODINGS if kind in d.objectives and d.method in SUITED.get(kind, ())]
    return [dataclasses.replace(d, values=d.values[1::2] or d.values) for d in found[:2]] if quick else found


def main(argv: Sequence[str] | None = None) -> None:
    arguments, rates = arguments_of(argv)
    compilation.keep_programs()
    logging.set_verbosity(logging.ERROR)
    best = {}
    for method in arguments.methods.split(","):
        kind = load_config(with_arguments(arguments.config, method=method)).objective.kind
        if decodings_of(kind):
            best[method] = tuned(arguments, method, rates)
        else:
            print(f"{method}: no sampler here decodes the objective {kind!r}; left out", file=sys.stderr)
    if not best:
        raise UserError(f"None of the methods {arguments.methods} can be decoded here; name others.")
    runs = []
    for seed in range(arguments.seeds):
        for method, rate in best.items():
            trained = train(arguments, method, seed, rate)
            first = runs[0]["workdir"] if runs else trained["workdir"]
            runs.append(trained | {"points": points(arguments, trained, first)})
        compare_report.write(arguments.out, runs, command_of(arguments))


def arguments_of(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[float]]:
    """The command line, and the learning rates that it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="configs/compare.py, with its arguments")
    parser.add_argument("--out", required=True, type=pathlib.Path, metavar="DIR")
    parser.add_argument("--methods", default="", metavar="NAMES", help=f"default {','.join(METHODS)}")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--lr", default="2e-3,4e-3", metavar="RATES", help="of which one is chosen for each method")
    parser.add_argument("--tuning", type=float, default=0.25, metavar="PART", help="of the steps, with each rate")
    parser.add_argument("--examples", type=int, default=60, metavar="N", help="held-out examples of each task")
    parser.add_argument("--quick", action="store_true", help="few methods, examples, thresholds; one seed and rate")
    arguments = parser.parse_args(argv)
    arguments.methods = arguments.methods or ",".join(QUICK_METHODS if arguments.quick else METHODS)
    if arguments.quick:
        arguments.seeds, arguments.lr, arguments.examples = 1, "3e-3", min(arguments.examples, 20)
    if arguments.seeds < 1 or arguments.examples < 1:
        raise UserError("--seeds and --examples must be at least 1.")
    if not 0 < arguments.tuning <= 1:
        raise UserError(f"--tuning is {arguments.tuning}; it is a part of the steps, above 0 and at most 1.")
    try:
        return arguments, [float(word) for word in arguments.lr.split(",")]
    except ValueError:
        raise UserError(f"--lr is {arguments.lr!r}; give learning rates with commas.") from None


def with_arguments(config: str, **given: Any) -> str:
    """A config's path with these arguments of its own besides those that it has."""
    path, _, own = config.partition(":")
    return f"{path}:{','.join(filter(None, [own, *(f'{name}={value}' for name, value in given.items())]))}"


def command_of(arguments: argparse.Namespace) -> str:
    """The command line that gives this report."""
    words = ["python tools/compare_methods.py", arguments.config, "--out", str(arguments.out)]
    words += ["--methods", arguments.methods, "--seeds", str(arguments.seeds), "--lr", arguments.lr]
    words += ["--tuning", f"{arguments.tuning:g}", "--examples", str(arguments.examples)]
    return " ".join([*words, *["--quick"] * arguments.quick])


def now() -> float:
    """Seconds: of the processor where it does the work, else of the clock."""
    return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


# --- Training, which resumes by itself.


def tuned(arguments: argparse.Namespace, method: str, rates: Sequence[float]) -> float:
    """The rate with the lowest held-out loss after a part of the steps."""
    if len(rates) == 1:
        return rates[0]
    steps = load_config(with_arguments(arguments.config, method=method)).steps
    short = max(1, round(arguments.tuning * steps))
    return min(rates, key=lambda rate: train(arguments, method, 0, rate, steps=short)["loss"])


def train(arguments: argparse.Namespace, method: str, seed: int, rate: float, **given: int) -> dict[str, Any]:
    """Trains a run, or reads what it said; its held-out loss, its cost and where it is. `given`: other steps."""
    config = load_config(with_arguments(arguments.config, method=method, seed=seed, lr=rate, **given))
    workdir = arguments.out / "runs" / f"{method}-lr{rate:g}-seed{seed}-steps{config.steps}"
    cost = workdir / "seconds.json"
    if not finished(workdir, config):
        print(f"training {workdir}", file=sys.stderr)
        workdir.mkdir(parents=True, exist_ok=True)
        cache = str((arguments.out / "cache").resolve())  # one for all: the data are the same
        start = now()
        with (workdir / "train.log").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            run_training(dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=cache)), workdir)
        if not finished(workdir, config):
            raise UserError(f"Training {workdir} was stopped; the same command goes on with it.")
        cost.write_text(json.dumps(now() - start), encoding="utf-8")
    return {
        "method": method,
        "seed": seed,
        "lr": rate,
        "workdir": str(workdir),
        "loss": [record["loss"] for record in metrics_of(workdir) if record["kind"] == "evaluation"][-1],
        "steps": config.steps,
        "tokens": config.steps * config.batch_size * config.data.max_length,
        "seconds": json.loads(cost.read_text()),
        "parameters": config.model.num_params(),
    }


def metrics_of(workdir: pathlib.Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def finished(workdir: pathlib.Path, config: Config) -> bool:
    """Whether the run's last evaluation was at its last step, and the checkpoint of that step is there."""
    evaluated = [record["step"] for record in metrics_of(workdir) if record["kind"] == "evaluation"]
    saved = (workdir / "checkpoints" / str(config.steps)).is_dir()
    return config.steps in evaluated and saved


# --- Decoding: a file for each point.

HeldOut = Sequence[tuple[Benchmark, list[Document]]]


@functools.cache
def held_out_of(workdir: str, examples: int) -> HeldOut:
    """A run's evaluation data. Those of one run do for all, and some tasks are slow to make."""
    return documents.load(documents.HELD_OUT, {}, workdir, None, limit=examples)


def points(arguments: argparse.Namespace, trained: dict[str, Any], first: str) -> list[dict[str, Any]]:
    """A run's points, those that are not known decoded now; `first`: the run whose data are asked."""
    folder = arguments.out / "points" / pathlib.Path(trained["workdir"]).name
    folder.mkdir(parents=True, exist_ok=True)
    known = Known(folder, arguments.examples)
    found: list[dict[str, Any]] = []
    decoder = None
    asked: set[str] = set()  # methods of decoding whose likelihood is known: no threshold changes it
    kind = json.loads((pathlib.Path(trained["workdir"]) / "config.json").read_text())["objective"]["kind"]
    for decoding in decodings_of(kind, arguments.quick):
        for value in decoding.values:
            point = known.read(decoding, value)
            if point is None:
                decoder = decoder or Decoder.load(trained["workdir"])
                print(f"decoding {folder.name}: {decoding.name} {value:g}", file=sys.stderr)
                held_out = held_out_of(first, arguments.examples)
                point = decoded(decoder, held_out, decoding, value)
                if decoding.method not in asked | {"speculative"}:  # whose is that of token by token
                    point["nats_per_token"] = nats(decoder, held_out, decoding)
                known.write(decoding, value, point)
            asked.add(decoding.method)
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

    def write(self, decoding: Decoding, value: float, point: dict[str, Any]) -> None:
        path = self.path(decoding, value)
        path.with_suffix(".part").write_text(json.dumps(point, indent=1))
        path.with_suffix(".part").replace(path)


def decoded(decoder: Decoder, held_out: HeldOut, decoding: Decoding, value: float) -> dict[str, Any]:
    """A point: accuracy of each task, tokens per forward, tokens/s at batch 16 and 1."""
    asked = [(benchmark, document) for benchmark, of_task in held_out for document in of_task]
    config = settings_of(decoder, decoding, value, [document for _, document in asked])
    prompts = [list(ids) for ids in decoder.tokenizer.encode_prompts([b.text(document) for b, document in asked])]
    apart = prompts[:: max(1, len(prompts) // ALONE)]
    if value == decoding.values[0]:  # programs are compiled; they know no threshold
        timed(decoder, config, prompts, BATCHES[0])
        timed(decoder, config, apart, BATCHES[1])
    answers, seconds = timed(decoder, config, prompts, BATCHES[0])
    alone, seconds_alone = timed(decoder, config, apart, BATCHES[1])
    scores: dict[str, list[float]] = {benchmark.name: [] for benchmark, _ in held_out}
    for (benchmark, document), answer in zip(asked, answers, strict=True):
        scores[benchmark.name].append(benchmark.verdict(document, decoder.tokenizer.decode(answer.tokens))[1])
    count = sum(len(answer.tokens) for answer in answers)
    passes = sum(-(-len(prompt) // PREFILL_TOKENS) for prompt in prompts)
    forwards = sum(answer.forwards for answer in answers) + passes
    return {
        "decoding": decoding.name,
        "threshold": value if decoding.threshold else None,
        "accuracy": {name: sum(of_task) / len(of_task) for name, of_task in scores.items()},
        "tokens": count,
        "forwards": forwards,
        "tokens_per_forward": count / forwards,
        "tokens_per_second_16": count / seconds,
        "tokens_per_second_1": sum(len(answer.tokens) for answer in alone) / seconds_alone,
        "nats_per_token": None,
        "bound": decoding.method in ("masked", "block"),
    }


def timed(
    decoder: Decoder, config: SamplerConfig, prompts: Sequence[Sequence[int]], batch: int
) -> tuple[list[Generation], float]:
    """Answers to all prompts, and the seconds that they took."""
    start = now()
    found = generate(decoder.params, decoder.model, config, prompts, batch_size=batch, mesh=decoder.mesh)
    return found, max(now() - start, 1e-9)


def nats(decoder: Decoder, held_out: HeldOut, decoding: Decoding) -> float:
    """Of a token of right answers: exact, or a bound from above."""
    chosen, samples = LIKELIHOOD
    asked = [document for _, of_task in held_out for document in of_task[:chosen]]
    pairs = [pair_of(decoder, document) for document in asked]
    config = settings_of(decoder, decoding, decoding.values[0], asked)
    total = sum(value for value, _ in log_likelihoods(decoder, config, pairs, batch_size=16, samples=samples))
    return -total / sum(len(response) for _, response in pairs)


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
    if os.environ.get("PYTHONHASHSEED") != "0":  # word ladders depend on it, and must be the same in every process
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONHASHSEED": "0"})
    run_main(main)
