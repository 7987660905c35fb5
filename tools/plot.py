"""Draws the loss curves of runs, in folders or buckets: `python tools/plot.py runs/a gs://bucket/b --out loss.png`."""

import argparse
import io
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from refusion_jax import storage
from refusion_jax.errors import UserError, run_main


def read(workdir: pathlib.Path) -> dict[str, list[dict]]:
    """Records of a run's metrics.jsonl by kind (train, evaluation).

    Raises:
      UserError: no such file, or a line that is not a record.
    """
    path = workdir / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"There is no {path}; give the --workdir of a run.")
    records = {"train": [], "evaluation": []}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            records[record["kind"]].append(record)
        except (json.JSONDecodeError, KeyError):
            raise UserError(f"{path} line {number} is not a record of metrics: {line[:60]!r}.") from None
    return records


def terms_of(runs: Sequence[dict[str, list[dict]]]) -> list[str]:
    """Names of the loss terms that the runs have: ar, mdm, .."""
    fields = {
        field: None for records in runs for record in records["train"] + records["evaluation"] for field in record
    }
    return [field.removesuffix("_loss") for field in fields if field.endswith("_loss")]


def draw(axes: Sequence[Any], terms: Sequence[str], name: str, color: str, records: dict[str, list[dict]]) -> None:
    """One run: each loss term in training (pale) and on held-out data, and the held-out accuracies on the last axis."""
    train, held_out = records["train"], records["evaluation"]
    for axis, term, style in zip(axes, terms, itertools.cycle(("-", "--", ":", "-."))):
        curve(axis, train, f"{term}_loss", label=f"{name} train", color=color, alpha=0.35)
        curve(axis, held_out, f"{term}_loss", label=f"{name} held out", color=color, marker=".")
        label = f"{name} {term}"
        curve(axes[-1], held_out, f"{term}_accuracy", label=label, color=color, marker=".", linestyle=style)


def curve(axis: Any, records: Sequence[dict], field: str, **style: Any) -> None:
    """Nothing where the records lack the field: not every run has every term."""
    points = [(record["step"], record[field]) for record in records if field in record]
    if points:
        axis.plot(*zip(*points), **style)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdirs", nargs="+", type=storage.as_path)
    parser.add_argument("--out", type=storage.as_path, default=storage.as_path("loss.png"))
    arguments = parser.parse_args()
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("Plots need matplotlib; install it with: pip install 'refusion_jax[demo]'.") from None

    runs = [read(workdir) for workdir in arguments.workdirs]
    terms = terms_of(runs)
    figure, axes = plt.subplots(
        1, len(terms) + 1, figsize=(5 * len(terms) + 5, 4.2), layout="constrained", squeeze=False
    )
    for index, (workdir, records) in enumerate(zip(arguments.workdirs, runs)):
        draw(axes[0], terms, workdir.name, f"C{index}", records)
    for axis, title in zip(axes[0], (*(f"{term} loss" for term in terms), "held-out token accuracy")):
        axis.set(title=title, xlabel="step", yscale="log" if title.endswith("loss") else "linear")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    picture = io.BytesIO()
    try:
        figure.savefig(picture, dpi=110, format=arguments.out.suffix.removeprefix(".") or "png")
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        storage.write(arguments.out, picture.getvalue())
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not know
        raise UserError(f"Cannot write {arguments.out}: {getattr(error, 'strerror', None) or error}.") from None
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    run_main(main)
