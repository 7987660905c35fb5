"""Solves held-out tasks of a training run: plan-and-infill against autoregressive decoding of the same weights.

    python tools/evaluate_tasks.py --checkpoint runs/tiny [--examples 100] [--json tasks.json]

The examples are those of the run's config.data.evaluation, which it was not trained on. Procedural tasks are scored by
the task itself; of other sources the text after the last "####", or the whole text, must be equal.
"""

import argparse
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import logging

from refusion_jax import compilation
from refusion_jax.data.examples import Source
from refusion_jax.decoder import (
    Decoder,
    add_batch_arguments,
    add_model_arguments,
    add_sampler_arguments,
    decoder_of,
    held_out,
    settings_of,
)
from refusion_jax.errors import UserError, run_main
from refusion_jax.sampling import SamplerConfig
from refusion_jax.sampling.methods import SUITED


def solve(
    decoder: Decoder, config: SamplerConfig, source: Source, chosen: Sequence[int], **options: Any
) -> dict[str, Any]:
    """Exact match and counts over the examples `chosen` of a source."""
    queries = [source[i][0] for i in chosen]
    start, right, tokens, forwards, wrong = time.perf_counter(), 0, 0, 0, []
    for done, answer in enumerate(decoder.stream(queries, config, **options), 1):
        index = answer.generation.index
        if source.score(chosen[index], answer.text) == 1.0:
            right += 1
        else:
            wrong.append({"query": queries[index], "expected": source[chosen[index]][1], "text": answer.text})
        tokens += len(answer.generation.tokens)
        forwards += answer.generation.forwards
        if sys.stderr.isatty():
            print(
                f"\r{config.method} {done}/{len(queries)}: {right / done:.1%}\033[K",
                end="\n" if done == len(queries) else "",
                file=sys.stderr,
                flush=True,
            )
    return {
        "task": source.name,
        "method": config.method,
        "examples": len(queries),
        "exact_match": right / len(queries),
        "tokens": tokens,
        "forwards": forwards,
        "tokens_per_forward": tokens / forwards,
        "seconds": time.perf_counter() - start,
        "wrong": wrong,
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """The figures as a Markdown table, a row for each task and method."""
    columns = {
        "task": "{task}",
        "method": "{method}",
        "examples": "{examples}",
        "exact match": "{exact_match:.1%}",
        "tokens": "{tokens}",
        "forwards": "{forwards}",
        "tokens per forward": "{tokens_per_forward:.2f}",
        "seconds": "{seconds:.1f}",
    }
    rows = [columns, ["---"] * len(columns), *([text.format(**r) for text in columns.values()] for r in results)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument(
        "--examples", type=int, default=100, metavar="N", help="most examples of each source; default 100, 0: all"
    )
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="write the figures and the wrong answers there too"
    )
    add_batch_arguments(parser)
    add_sampler_arguments(parser)
    arguments = parser.parse_args(argv)
    compilation.keep_programs()
    logging.set_verbosity(logging.ERROR)
    if arguments.examples < 0:
        raise UserError(f"--examples is {arguments.examples}; give a number of examples, or 0 for all.")

    sources = held_out(arguments.checkpoint, arguments.step)
    decoder = decoder_of(arguments)
    results = []
    for source in sources:
        chosen = list(itertools.islice(source.part(), arguments.examples or None))
        if not chosen:
            raise UserError(
                f"{source.name} has no example in its part from {source.config.start} to {source.config.stop}; "
                "evaluate with a larger part or source."
            )
        # A longer answer than the longest right one is wrong anyway: no need to decode it.
        longest = max(len(decoder.tokenizer.encode(source[i][1])) + 1 for i in chosen)
        fitting = SUITED[decoder.objective.kind]
        for method in [arguments.method] if arguments.method else fitting:
            config = settings_of(arguments, decoder, method=method, gen_length=arguments.gen_length or longest)
            results.append(solve(decoder, config, source, chosen, batch_size=arguments.batch_size, seed=arguments.seed))

    print(table(results) + "\n(seconds with compilation)")
    if arguments.json:
        try:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"Cannot write {arguments.json}: {error.strerror or error}. Choose another file.") from None


if __name__ == "__main__":
    run_main(main)
