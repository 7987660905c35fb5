"""What an evaluation says: a table for people, JSON for programs, and a line for each sample."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from refusion_jax.evaluation.journal import Record, writing
from refusion_jax.evaluation.run import Result, Sample
from refusion_jax.evaluation.tasks import BENCHMARKS

NOTE = (
    "tokens: of the answers, up to the end or the stop string. forwards: with the prompts' own. tokens/s: without "
    "compilation."
)
PUBLISHED_NOTE = (
    "The published rows are method section 6's: one A100, batch 1. They counted tokens behind the end and stop strings "
    "into tokens/s, and a mean of per-round ratios as tokens per forward; here neither is."
)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def table(results: Sequence[Result]) -> str:
    """The figures of all tasks, and beside them what was published."""
    head = [
        "task",
        "method",
        "examples",
        "accuracy %",
        "tokens per forward",
        "tokens",
        "forwards",
        "tokens/s",
        "failed",
    ]
    rows = []
    for result in results:
        rows.append(
            [
                result.task,
                result.method,
                str(result.examples),
                f"{100 * result.accuracy:.1f} ± {100 * result.error:.1f}",
                f"{result.tokens_per_forward:.2f}",
                str(result.tokens),
                str(result.forwards),
                f"{result.tokens_per_second:.1f}",
                str(len(result.failed)),
            ]
        )
        published = BENCHMARKS[result.task].published if result.task in BENCHMARKS else {}
        rows += [
            [result.task, f"{name}, published", "all", f"{accuracy}", "", "", "", f"{speed}", ""]
            for name, (accuracy, speed) in published.items()
        ]
    notes = [NOTE] + [PUBLISHED_NOTE] * any(result.task in BENCHMARKS for result in results)
    for result in results:
        notes += [f"{result.task}, prompt {number} failed: {why}" for number, why in list(result.failed.items())[:5]]
        if len(result.failed) > 5:
            notes.append(f"{result.task}: {len(result.failed) - 5} more failed; all are in results.json")
    return "\n\n".join([markdown(head, rows), *notes])


def write(folder: pathlib.Path, name: str, result: Result, settings: dict[str, Any]) -> None:
    """Puts a task's figures and settings into results.json, beside those of other tasks."""
    path = folder / "results.json"
    rates = {"tokens_per_forward": result.tokens_per_forward, "tokens_per_second": result.tokens_per_second}
    with writing(path):
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        known[name] = dataclasses.asdict(result) | rates | {"settings": settings}
        part = path.with_suffix(".part")
        part.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)


def write_samples(folder: pathlib.Path, name: str, samples: Sequence[Sample], records: Sequence[Record]) -> None:
    """samples/NAME.jsonl: every prompt with its answer, the verdict and what it cost."""
    with writing(folder / "samples"):
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        with (folder / "samples" / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for sample, record in zip(samples, records, strict=True):
                told = {name: getattr(record, name) for name in ("tokens", "forwards", "failure")}
                file.write(json.dumps(dataclasses.asdict(sample) | told, ensure_ascii=False) + "\n")
