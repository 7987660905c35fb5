"""Draws the loss curves of one or several runs: `python tools/plot.py runs/a runs/b --out loss.png`."""

import argparse
import json
import pathlib

from refusion_jax.errors import UserError, run_main


def read(workdir: pathlib.Path) -> dict[str, list[dict]]:
    """Records of a run's metrics.jsonl by kind (train, evaluation).

    Raises:
      UserError: no such file, or a line that is not a record.
    """
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"There is no {path}; give the --workdir of a run.")
    records = {"train": [], "evaluation": []}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            records[record["kind"]].append(record)
        except (json.JSONDecodeError, KeyError):
            raise UserError(f"{path} line {number} is not a record of metrics: {line[:60]!r}.") from None
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("loss.png"))
    arguments = parser.parse_args()
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("Plots need matplotlib; install it with: pip install 'refusion_jax[demo]'.") from None

    panels = (
        ("ar_loss", "autoregressive loss"),
        ("mdm_loss", "denoising loss"),
        ("accuracy", "held-out token accuracy"),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 4.2), layout="constrained")
    for index, workdir in enumerate(arguments.workdirs):
        records, color = read(workdir), f"C{index}"
        for axis, (name, title) in zip(axes, panels):
            axis.set(title=title, xlabel="step")
            axis.grid(alpha=0.3)
            held_out = records["evaluation"]
            if name == "accuracy":
                for term, style in (("ar", "-"), ("mdm", "--")):
                    axis.plot(
                        [r["step"] for r in held_out],
                        [r[f"{term}_accuracy"] for r in held_out],
                        style,
                        color=color,
                        marker=".",
                        label=f"{workdir.name} {term}",
                    )
                continue
            train = records["train"]
            axis.plot(
                [r["step"] for r in train],
                [r[name] for r in train],
                color=color,
                alpha=0.35,
                label=f"{workdir.name} train",
            )
            axis.plot(
                [r["step"] for r in held_out],
                [r[name] for r in held_out],
                color=color,
                marker=".",
                label=f"{workdir.name} held out",
            )
            axis.set_yscale("log")
    for axis in axes:
        axis.legend(fontsize=8)
    try:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(arguments.out, dpi=110)
    except OSError as error:
        raise UserError(f"Cannot write {arguments.out}: {error.strerror or error}.") from None
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    run_main(main)
