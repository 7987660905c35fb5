"""Draws the loss curves of runs, in folders or buckets: `python tools/plot.py runs/a gs://bucket/b --out loss.png`."""

import argparse
import io
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


def draw(axes: Sequence[Any], name: str, color: str, records: dict[str, list[dict]]) -> None:
    """One run: the two losses in training (pale) and on held-out data, and the held-out accuracies."""
    train, held_out = records["train"], records["evaluation"]
    for axis, loss in zip(axes, ("ar_loss", "mdm_loss")):
        curve(axis, train, loss, label=f"{name} train", color=color, alpha=0.35)
        curve(axis, held_out, loss, label=f"{name} held out", color=color, marker=".")
        axis.set_yscale("log")
    for term, style in (("ar", "-"), ("mdm", "--")):
        label = f"{name} {term}"
        curve(axes[2], held_out, f"{term}_accuracy", label=label, color=color, marker=".", linestyle=style)


def curve(axis: Any, records: Sequence[dict], name: str, **style: Any) -> None:
    axis.plot([r["step"] for r in records], [r[name] for r in records], **style)


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

    titles = ("autoregressive loss", "denoising loss", "held-out token accuracy")
    figure, axes = plt.subplots(1, len(titles), figsize=(15, 4.2), layout="constrained")
    for index, workdir in enumerate(arguments.workdirs):
        draw(axes, workdir.name, f"C{index}", read(workdir))
    for axis, title in zip(axes, titles):
        axis.set(title=title, xlabel="step")
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
