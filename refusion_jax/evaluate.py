"""Says how good a model is: accuracy and speed on benchmarks.

    python -m refusion_jax.evaluate --checkpoint runs/quickstart --tasks held_out --out runs/quickstart/evaluation
    python -m refusion_jax.evaluate --checkpoint GSAI-ML/ReFusion --tasks paper --authors --run-code --out runs/paper
    python -m refusion_jax.evaluate --checkpoint DIR --tasks gsm8k --data gsm8k=test.jsonl --out runs/gsm8k

Started again with the same --out it goes on: answers are kept from the first one on. Several processes (Slurm, TPU
pods, or by hand) each decode their share; --out is then a folder that all of them see.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging

from refusion_jax import compilation
from refusion_jax.checkpoint import load
from refusion_jax.decoder import (
    Decoder,
    add_batch_arguments,
    add_model_arguments,
    add_sampler_arguments,
    by_task,
    decoder_of,
    read_settings,
)
from refusion_jax.errors import UserError, run_main
from refusion_jax.parallel import distributed
from refusion_jax.sampling import SamplerConfig
from refusion_jax.sampling.methods import METHODS, suited

try:
    from refusion_jax.evaluation import documents, report, run, sandbox
    from refusion_jax.evaluation.journal import Journal, Record, check_settings
    from refusion_jax.evaluation.model import DecoderLM
    from refusion_jax.evaluation.tasks import Benchmark, Document
except ImportError as error:
    raise SystemExit(f"error: evaluation needs libraries ({error}): pip install 'refusion_jax[eval]'") from None


def main(argv: Sequence[str] | None = None) -> None:
    arguments = arguments_of(argv)
    compilation.keep_programs()
    logging.set_verbosity(logging.ERROR)  # Orbax warns that `params` alone is no whole checkpoint
    distributed.initialize()
    with distributed.together():
        evaluate(arguments)


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, parsed."""
    parser = argparse.ArgumentParser(
        prog="python -m refusion_jax.evaluate",
        description=__doc__,
        epilog=compilation.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--tasks",
        required=True,
        metavar="NAMES",
        help="held_out (what a run was not trained on), benchmarks of the paper, hellaswag (by likelihood), data sets "
        "of reasoning-gym, or the suites paper, offline, reasoning_gym",
    )
    parser.add_argument(
        "--out", required=True, type=pathlib.Path, metavar="DIR", help="results.json, samples/ and answers/"
    )
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="documents of each task; default 0: all")
    parser.add_argument(
        "--data", action="append", default=[], metavar="TASK=FILE.jsonl", help="a benchmark's documents from a file"
    )
    parser.add_argument("--authors", action="store_true", help="sampler settings that the authors used for each task")
    parser.add_argument(
        "--settings",
        type=pathlib.Path,
        metavar="FILE.json",
        help='sampler settings: {"slot_threshold": 0.8, ...}, or by task: {"gsm8k": {...}, ...}; flags come before it',
    )
    parser.add_argument("--run-code", action="store_true", help=f"run the programs that the model writes: {CODE}")
    add_batch_arguments(parser)
    add_sampler_arguments(parser)
    return parser.parse_args(argv)


CODE = "each in an interpreter of its own, with limits and, where the system allows it, without network"


def evaluate(arguments: argparse.Namespace) -> list[run.Result]:
    """Runs all tasks, one after the other; every process the same ones."""
    if arguments.limit < 0:
        raise UserError(f"--limit is {arguments.limit}; give a number of documents, or 0 for all.")
    files, tuned = files_of(arguments.data), read_settings(arguments.settings)
    found = [
        pair
        for name in documents.names_of(arguments.tasks)
        for pair in documents.load(name, files, arguments.checkpoint, arguments.step, arguments.limit)
    ]
    code = [benchmark.name for benchmark, _ in found if benchmark.program]
    if code and not arguments.run_code:
        raise UserError(
            f"The task {code[0]} runs programs that the model writes. Say --run-code if that is what you want; here "
            f"the sandbox has {sandbox.strength()}."
        )
    if code and jax.process_index() == 0:
        print(f"sandbox: {sandbox.strength()}")
    own = [benchmark.name for benchmark, _ in found]
    for name in tuned if by_task(tuned) else ():
        if name not in own and not documents.is_task(name):
            raise UserError(f"--settings {arguments.settings} has settings for {name!r}, which is no task.")
    decoder = decoder_of(arguments)
    told = {name: getattr(arguments, name) for name in ("checkpoint", "step", "dtype", "tokenizer", "seed")}
    told["weights"] = load.fingerprint(arguments.checkpoint, arguments.step)  # a run has others when it has gone on
    results = []
    for benchmark, chosen in found:
        config = config_of(arguments, decoder, benchmark, chosen, tuned)
        results += one(arguments, decoder, benchmark, chosen, config, told)
    if jax.process_index() == 0:
        print(report.table(results))
    return results


def one(
    arguments: argparse.Namespace,
    decoder: Decoder,
    benchmark: Benchmark,
    chosen: Sequence[Document],
    config: SamplerConfig,
    told: Mapping[str, Any],
) -> list[run.Result]:
    """The result of a task; nothing on all processes but the first. `told` is what answers depend on besides."""
    name = benchmark.name
    settings = {**told, "method": config.method, **dataclasses.asdict(config)}
    answers = arguments.out / "answers"
    check_settings(answers / f"{name}.json", settings)
    journal = Journal(answers, name)
    lm = DecoderLM(decoder, config, batch_size=arguments.batch_size, seed=arguments.seed, journal=journal)
    texts = run.texts_of(lm, benchmark, chosen)
    journal.close()
    if jax.process_index():
        return []
    samples = run.samples_of(benchmark, chosen, texts)
    records = lm.records or [Record(str(number)) for number in range(len(samples))]  # options: nothing was written
    result = run.result_of(name, config.method, samples, records)
    report.write_samples(arguments.out, name, samples, records)
    report.write(arguments.out, name, result, settings)
    print(f"{name}: {100 * result.accuracy:.1f} % of {result.examples}, {result.tokens_per_forward:.2f} tokens/forward")
    return [result]


def config_of(
    arguments: argparse.Namespace,
    decoder: Decoder,
    benchmark: Benchmark,
    chosen: Sequence[Document],
    tuned: Mapping[str, Any],
) -> SamplerConfig:
    """The sampler's settings for a task: flags, then the file's, then the authors', then what suits model and task."""
    flags = {name: getattr(arguments, name) for method in METHODS.values() for name in fields_of(method)}
    given = {name: value for name, value in flags.items() if value is not None}
    of_file = tuned.get(benchmark.name, {}) if by_task(tuned) else tuned
    method = suited(decoder.objective, arguments.method or of_file.get("method"))
    settings: dict[str, Any] = {}
    if all("response" in document for document in chosen):
        # A longer answer than the longest right one is wrong anyway: no need to decode it.
        settings["gen_length"] = max(len(decoder.tokenizer.encode(document["response"])) + 1 for document in chosen)
    if arguments.authors:
        settings |= {name: v for name, v in benchmark.settings.items() if name in fields_of(METHODS[method])}
    return decoder.settings(**(settings | dict(of_file) | given | {"method": method}))


def fields_of(method: type[SamplerConfig]) -> list[str]:
    return [field.name for field in dataclasses.fields(method)]


def files_of(words: Sequence[str]) -> dict[str, pathlib.Path]:
    """--data, by task.

    Raises:
      UserError: a word is not TASK=FILE, or the task is none that takes a file.
    """
    files = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or name not in documents.BENCHMARKS:
            raise UserError(
                f"--data is {word!r}; write TASK=FILE.jsonl with one of the tasks {', '.join(documents.BENCHMARKS)}."
            )
        files[name] = pathlib.Path(path)
    return files


if __name__ == "__main__":
    run_main(main)
