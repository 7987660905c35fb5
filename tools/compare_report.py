"""The report of tools/compare_methods.py: one table, curves of accuracy over speed, the areas under them."""

import collections
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import jax

from refusion_jax.errors import UserError
from refusion_jax.evaluation.report import markdown

BOUND = 8.0  # tokens per forward up to which the area is taken
MARKERS = "osD^v<>P*X"  # of ways to decode; methods have colours
NOTES = """\
Accuracy is the mean over tasks, and its error that of the mean over seeds. Tokens are those of the answers up to
their end, forwards those of the loop and of the prompts. Speed is relative to the autoregressive model of the same
seed, decoded token by token at the same batch size by the same compiled engine{clock}. The row of a decoding is its
most accurate threshold, the same one for all seeds (of equal ones the one with the most tokens per forward), chosen on
the examples that are shown. The area is that under accuracy over tokens per forward from 0 to {bound:g}, divided by
{bound:g}: at each abscissa the best accuracy of any threshold that reaches it. Nats per token of held-out answers are
exact, in the order in which the method writes; of the others a bound (≤); a few answers of each task were measured. Of
the learning rates, the same ones for all methods, the one with the lowest held-out loss after a part of the steps with
the first seed was kept; training is that of one run, with its compilation."""


def mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard error of it (0 of one value)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def accuracy_of(point: dict[str, Any]) -> float:
    """Mean over tasks."""
    return statistics.fmean(point["accuracy"].values())


def area(points: Sequence[tuple[float, float]], bound: float = BOUND) -> float:
    """Mean over x in [0, bound] of the best y among the points (x, y) that lie at x or beyond; 0 where none does."""
    total, reached = 0.0, 0.0
    for x in sorted({min(x, bound) for x, _ in points if x > 0}):
        total += (x - reached) * max(y for other, y in points if min(other, bound) >= x)
        reached = x
    return total / bound


def rows_of(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method and decoding."""
    base = {}  # tokens/s of the autoregressive model, by seed
    for run in runs:
        if run["method"] == "autoregressive":
            base[run["seed"]] = next(p for p in run["points"] if p["decoding"] == "token by token")
    grouped: dict[tuple[str, str], list[tuple[dict, list[dict]]]] = collections.defaultdict(list)
    for run in runs:
        for name in dict.fromkeys(point["decoding"] for point in run["points"]):
            grouped[run["method"], name].append((run, [p for p in run["points"] if p["decoding"] == name]))
    rows = []
    for (method, decoding), members in grouped.items():
        best, areas, speeds = chosen(members), [], {1: [], 16: []}
        for (run, points), point in zip(members, best, strict=True):
            areas.append(area([(point["tokens_per_forward"], accuracy_of(point)) for point in points]))
            if run["seed"] in base:
                for size, found in speeds.items():
                    name = f"tokens_per_second_{size}"
                    found.append(point[name] / base[run["seed"]][name])
        nats = [p["nats_per_token"] for _, points in members for p in points if p["nats_per_token"] is not None]
        rows.append(
            {
                "method": method,
                "decoding": decoding,
                "threshold": best[0]["threshold"],
                "accuracy": mean([accuracy_of(point) for point in best]),
                "tasks": {name: mean([p["accuracy"][name] for p in best]) for name in best[0]["accuracy"]},
                "tokens_per_forward": mean([point["tokens_per_forward"] for point in best]),
                "tokens_per_second_1": mean([point["tokens_per_second_1"] for point in best]),
                "tokens_per_second_16": mean([point["tokens_per_second_16"] for point in best]),
                "speed_1": mean(speeds[1]) if speeds[1] else None,
                "speed_16": mean(speeds[16]) if speeds[16] else None,
                "area": mean(areas),
                "nats_per_token": mean(nats) if nats else None,
                "bound": best[0]["bound"],
                "seconds": mean([run["seconds"] for run, _ in members]),
                "lr": members[0][0]["lr"],
                "seeds": len(members),
            }
        )
    return rows


def chosen(members: Sequence[tuple[dict[str, Any], list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Of each run the point at the threshold that is the most accurate over all runs."""

    def goodness(threshold: float | None) -> tuple[float, float]:
        found = [point for _, points in members for point in points if point["threshold"] == threshold]
        return mean([accuracy_of(p) for p in found])[0], mean([p["tokens_per_forward"] for p in found])[0]

    best = max([point["threshold"] for point in members[0][1]], key=goodness)
    return [next(point for point in points if point["threshold"] == best) for _, points in members]


def shown(value: tuple[float, float] | None, scale: float = 1.0, digits: int = 2) -> str:
    """With its error where it has one: a single seed has none."""
    if value is None:
        return ""
    return f"{scale * value[0]:.{digits}f}" + (f" ± {scale * value[1]:.{digits}f}" if value[1] else "")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    tasks = list(rows[0]["tasks"])
    head = ["method", "decoding", "threshold", "accuracy %", *tasks, "tokens per forward", "speed, batch 1"]
    head += ["speed, batch 16", "area", "nats per token", "training s", "lr", "seeds"]
    lines = []
    for row in rows:
        threshold = "" if row["threshold"] is None else f"{row['threshold']:g}"
        lines.append(
            [row["method"], row["decoding"], threshold, shown(row["accuracy"], 100, 1)]
            + [f"{100 * row['tasks'][name][0]:.0f}" for name in tasks]
            + [shown(row["tokens_per_forward"]), shown(row["speed_1"]), shown(row["speed_16"])]
            + [
                shown(row["area"], 1, 3),
                "≤ " * (row["bound"] and row["nats_per_token"] is not None) + shown(row["nats_per_token"], 1, 3),
                f"{row['seconds'][0]:.0f}",
                f"{row['lr']:g}",
                str(row["seeds"]),
            ]
        )
    return markdown(head, lines)


def curves(out: pathlib.Path, runs: Sequence[dict[str, Any]]) -> list[str]:
    """Accuracy over tokens per forward and over speed; a line for each method and decoding, thresholds along it."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("The curves need matplotlib; install it with: pip install 'refusion_jax[demo]'.") from None
    abscissae = {
        "tokens_per_forward": "tokens per forward",
        "tokens_per_second_1": "tokens/s, batch 1",
        "tokens_per_second_16": "tokens/s, batch 16",
    }
    names = []
    for field, label in abscissae.items():
        figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
        grouped: dict[tuple[str, str], dict[Any, list[dict]]] = collections.defaultdict(
            lambda: collections.defaultdict(list)
        )
        for run in runs:
            for point in run["points"]:
                grouped[run["method"], point["decoding"]][point["threshold"]].append(point)
        methods, decodings = (list(dict.fromkeys(name[i] for name in grouped)) for i in (0, 1))
        for (method, decoding), by_threshold in grouped.items():
            means = [
                (mean([p[field] for p in ps])[0], *mean([accuracy_of(p) for p in ps])) for ps in by_threshold.values()
            ]
            x, y, error = zip(*sorted(means))
            marker = MARKERS[decodings.index(decoding) % len(MARKERS)]
            style = dict(color=f"C{methods.index(method) % 10}", marker=marker, markersize=5, linewidth=1)
            axis.errorbar(
                x, [100 * v for v in y], yerr=[100 * v for v in error], label=f"{method}: {decoding}", **style
            )
        axis.set(xlabel=label, ylabel="accuracy, %")
        axis.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize=8)
        names.append(f"{field}.png")
        figure.savefig(out / names[-1], dpi=110)
        plt.close(figure)
    return names


def write(out: pathlib.Path, runs: Sequence[dict[str, Any]], command: str) -> None:
    """report.md with its pictures, and table.json; prints the table."""
    rows = rows_of(runs)
    pictures = curves(out, runs)
    first = runs[0]
    what = (
        f"{first['parameters']:,} parameters, {first['steps']} steps, {first['tokens']:,} tokens of rows, "
        f"{max(row['seeds'] for row in rows)} seeds."
    )
    clock = ", in tokens per second of the processor" if jax.default_backend() == "cpu" else ""
    parts = [
        "# Methods compared",
        f"```bash\n{command}\n```",
        what,
        table(rows),
        NOTES.format(bound=BOUND, clock=clock),
    ]
    parts += [f"![accuracy over {name.removesuffix('.png')}]({name})" for name in pictures]
    (out / "report.md").write_text("\n\n".join(parts) + "\n")
    (out / "table.json").write_text(json.dumps({"command": command, "rows": rows, "runs": list(runs)}, indent=1) + "\n")
    print(f"{what}\n\n{table(rows)}\n\nwrote {out / 'report.md'}")
