"""Finds the settings of plan-and-infill on the curve of accuracy against speed, for every task of a training run.

    python tools/tune_sampler.py --checkpoint runs/quickstart --out runs/quickstart/settings.json
    python -m refusion_jax.generate --checkpoint runs/quickstart --settings runs/quickstart/settings.json --prompt "..."
    python -m refusion_jax.serve --checkpoint runs/quickstart --settings runs/quickstart/settings.json

Settings are tried on examples of the run's training data; those chosen are reported on its held-out data, which choose
nothing. Thresholds are each request's own: all pairs of them share one compiled loop, side by side in one batch, and
only another slot size or number of blocks is another. Chosen is the fastest setting whose accuracy is within
--tolerance of the best one's. The curves are drawn beside --out.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging

from refusion_jax import compilation
from refusion_jax.data.examples import Source
from refusion_jax.decoder import (
    Decoder,
    add_batch_arguments,
    add_model_arguments,
    decoder_of,
    run_sources,
    task_names,
)
from refusion_jax.errors import UserError, run_main
from refusion_jax.progress import Progress
from refusion_jax.sampling import Engine, PlanAndInfillConfig, Prompt
from refusion_jax.sampling.batching import serve

THRESHOLDS = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
LENGTH_EXAMPLES = 1000  # whose longest response says how long an answer may be
WRITTEN = ("slot_size", "blocks", "slot_threshold", "token_threshold")


@dataclasses.dataclass(frozen=True)
class Point:
    """What a setting gives on some examples: accuracy in [0, 1], response tokens per forward of the loop."""

    config: PlanAndInfillConfig
    accuracy: float
    speed: float


def measure(
    decoder: Decoder,
    source: Source,
    chosen: Sequence[int],
    configs: Sequence[PlanAndInfillConfig],
    *,
    batch_size: int,
    seed: int = 0,
) -> list[Point]:
    """A point for each of `configs`, which differ in traced settings only, on the examples `chosen` of a source."""
    prompts = decoder.tokenizer.encode_prompts([source[i][0] for i in chosen])
    longest, count = max(map(len, prompts)), len(chosen)
    engine = Engine(decoder.params, decoder.model, configs[0], batch_size, max_prompt_length=longest, mesh=decoder.mesh)
    requests = (
        Prompt(prompt, config, index=number * count + at, seed=seed, stream=at)
        for number, config in enumerate(configs)
        for at, prompt in enumerate(prompts)
    )
    right, tokens, forwards = ([0] * len(configs) for _ in range(3))
    progress = Progress("tune", len(configs) * count)
    for done, answer in enumerate(serve(engine, requests), 1):
        number, at = divmod(answer.index, count)
        right[number] += source.score(chosen[at], decoder.tokenizer.decode(answer.tokens)) == 1.0
        tokens[number] += len(answer.tokens)
        forwards[number] += answer.forwards
        progress.show(done, {"task": source.name, "slot size": str(configs[0].slot_size)})
    return [Point(c, r / count, t / f) for c, r, t, f in zip(configs, right, tokens, forwards, strict=True)]


def grid(
    decoder: Decoder, gen_length: int, slot_sizes: Sequence[int], thresholds: Sequence[float], **given: Any
) -> Iterator[list[PlanAndInfillConfig]]:
    """The settings to try, those together that share a compiled loop: per slot size one block, and as many as suit."""
    for size in slot_sizes:
        settings = dict(method="plan_and_infill", gen_length=gen_length, slot_size=size, **given)
        suited = decoder.settings(**settings)
        for blocks in sorted({1, suited.blocks}):
            yield [
                dataclasses.replace(suited, blocks=blocks, slot_threshold=slot, token_threshold=token)
                for slot, token in itertools.product(thresholds, repeat=2)
            ]


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in accuracy without being slower, or in speed without being worse; from the
    most accurate to the fastest.
    """
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.accuracy, -p.speed)):
        if not found or point.speed > found[-1].speed:
            found.append(point)
    return found


def choose(points: Sequence[Point], tolerance: float) -> Point:
    """The fastest point whose accuracy is at most `tolerance` below the best."""
    best = max(point.accuracy for point in points)
    return max((p for p in points if p.accuracy >= best - tolerance - 1e-9), key=lambda p: (p.speed, p.accuracy))


def examples_of(source: Source, count: int) -> list[int]:
    """The first examples of a source's part."""
    return list(itertools.islice(source.part(), count))


def tune(decoder: Decoder, source: Source, arguments: argparse.Namespace) -> list[Point]:
    """All points of a task."""
    chosen = examples_of(source, arguments.examples)
    gen_length = max(len(decoder.tokenizer.encode(source[i][1])) + 1 for i in examples_of(source, LENGTH_EXAMPLES))
    sizes = arguments.slot_sizes or getattr(decoder.objective, "slot_sizes", ()) or (PlanAndInfillConfig.slot_size,)
    options = dict(batch_size=arguments.batch_size, seed=arguments.seed)
    tried = grid(decoder, gen_length, [k for k in sizes if k <= gen_length] or [min(sizes)], arguments.thresholds)
    return [point for configs in tried for point in measure(decoder, source, chosen, configs, **options)]


def row(task: str, what: str, point: Point) -> str:
    """A row of the table."""
    settings = " | ".join(f"{getattr(point.config, name)}" for name in WRITTEN)
    return f"| {task} | {what} | {settings} | {100 * point.accuracy:.1f} % | {point.speed:.2f} |"


def draw(path: pathlib.Path, curves: dict[str, tuple[list[Point], Point]]) -> None:
    """A panel for each task: what was tried, the curve, what was chosen."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("Curves need matplotlib; install it with: pip install 'refusion_jax[demo]'.") from None
    figure, axes = plt.subplots(1, len(curves), figsize=(5 * len(curves), 4), layout="constrained", squeeze=False)
    for axis, (task, (points, chosen)) in zip(axes[0], curves.items()):
        for size in sorted({point.config.slot_size for point in points}):
            own = [point for point in points if point.config.slot_size == size]
            axis.plot([p.speed for p in own], [p.accuracy for p in own], ".", alpha=0.5, label=f"slots of {size}")
        best = front(points)
        axis.plot([p.speed for p in best], [p.accuracy for p in best], "-", color="gray", label="best")
        axis.plot(chosen.speed, chosen.accuracy, "*", color="black", markersize=12, label="chosen")
        axis.set(title=task, xlabel="tokens per forward", ylabel="accuracy")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, parsed."""
    numbers = lambda kind: lambda text: tuple(map(kind, text.split(",")))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="FILE.json", help="settings by task")
    parser.add_argument("--examples", type=int, default=64, metavar="N", help="of each task; default 64")
    parser.add_argument("--tolerance", type=float, default=1.0, metavar="POINTS", help="of accuracy; default 1")
    parser.add_argument("--slot-sizes", type=numbers(int), metavar="K,K,...", help="default: those of the training")
    parser.add_argument(
        "--thresholds",
        type=numbers(float),
        default=THRESHOLDS,
        metavar="P,P,...",
        help=f"for slots and for tokens, in every combination; default {','.join(map(str, THRESHOLDS))}",
    )
    add_batch_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.examples < 1:
        raise UserError(f"--examples is {arguments.examples}; give at least one.")
    if arguments.tolerance < 0:
        raise UserError(f"--tolerance is {arguments.tolerance}; give points of accuracy, 0 or more.")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = arguments_of(argv)
    compilation.keep_programs()
    logging.set_verbosity(logging.ERROR)
    by_part = (run_sources(arguments.checkpoint, part, arguments.step) for part in ("train", "evaluation"))
    tasks, held_out = (dict(zip(task_names(sources), sources)) for sources in by_part)
    decoder = decoder_of(arguments)
    written, curves = {}, {}
    print("| task | | slot size | blocks | slot threshold | token threshold | accuracy | tokens per forward |")
    print("|---|---|---|---|---|---|---|---|")
    for task, source in tasks.items():
        points = tune(decoder, source, arguments)
        chosen = choose(points, arguments.tolerance)
        for point in front(points):
            print(row(task, "on the curve", point))
        print(row(task, "chosen", chosen))
        if task in held_out:
            examples = examples_of(held_out[task], arguments.examples)
            options = dict(batch_size=arguments.batch_size, seed=arguments.seed)
            print(row(task, "held out", measure(decoder, held_out[task], examples, [chosen.config], **options)[0]))
        written[task] = {"method": "plan_and_infill"} | {name: getattr(chosen.config, name) for name in WRITTEN}
        written[task]["gen_length"] = chosen.config.length
        curves[task] = points, chosen
    try:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        draw(arguments.out.with_suffix(".png"), curves)
    except OSError as error:
        raise UserError(f"Cannot write {arguments.out}: {error.strerror or error}. Choose another --out.") from None
    print(f"wrote {arguments.out} and {arguments.out.with_suffix('.png')}")


if __name__ == "__main__":
    run_main(main)
