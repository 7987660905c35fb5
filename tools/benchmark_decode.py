"""Measures decoding on the local devices: autoregressive against plan-and-infill, speculation off and on, same weights,
same process.

    python tools/benchmark.py decode --checkpoint runs/tiny --batch 1,8,32
    python tools/benchmark.py decode --config configs/0p6b.py --batch 1 --prompt-length 128 --gen-length 128

Every batch size decodes the same prompts, a batch at a time: prefill, then the compiled loop until the slowest row is
done. Only response tokens up to the first EOS count. The time of a forward is that of a fixed number of steps of the
same loop.

With --config the weights are random, and so is what they accept: token_threshold is then searched until plan-and-infill
makes --tokens-per-forward (before speculation; thresholds are traced: nothing is compiled for it). What such a run
measures is the time of a forward; tokens per forward of a real model come from a trained one.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn
from jax.sharding import Mesh

from refusion_jax.config import load_config
from refusion_jax.decoder import (
    Decoder,
    add_model_arguments,
    add_sampler_arguments,
    decoder_of,
    held_out,
    parse_mesh,
    settings_of,
)
from refusion_jax.errors import UserError
from refusion_jax.model import qwen3
from refusion_jax.model.config import ModelConfig
from refusion_jax.parallel import sharding
from refusion_jax.sampling import Engine, Generation, Prompt, SamplerConfig
from refusion_jax.sampling.batching import UNLIMITED
from refusion_jax.sampling.config import check_prompts


def random_params(model: ModelConfig, mesh: Mesh) -> dict:
    """Random weights in the model's dtype, made where they belong."""
    make = lambda key: jax.tree.map(lambda x: x.astype(model.dtype), nn.unbox(qwen3.init_params(model, key)))
    return jax.jit(make, out_shardings=sharding.param_shardings(model, mesh, sharding.DECODE_RULES))(jax.random.key(0))


def random_prompts(model: ModelConfig, count: int, length: int) -> list[list[int]]:
    """Prompts of ordinary ids."""
    special = {model.mask_token_id, model.begin_token_id, model.eos_token_id, model.pad_token_id}
    ordinary = np.array([i for i in range(model.logical_vocab_size) if i not in special])
    return np.random.default_rng(0).choice(ordinary, (count, length)).tolist()


def random_decoder(model: ModelConfig, arguments: argparse.Namespace) -> Decoder:
    """Random weights, and ids 0 and 1 for an end and a mask that the model has not."""
    model = dataclasses.replace(
        model,
        dtype=arguments.dtype or model.dtype,
        eos_token_id=0 if model.eos_token_id is None else model.eos_token_id,
        mask_token_id=1 if model.mask_token_id is None else model.mask_token_id,
    )
    mesh = parse_mesh(arguments.mesh)
    return Decoder(random_params(model, mesh), model, tokenizer=None, mesh=mesh)


def prompts_of(arguments: argparse.Namespace, decoder: Decoder, count: int) -> list[list[int]]:
    """Held-out prompts of the run; random ones where there are none, or where their length is given."""
    if arguments.config or arguments.prompt_length:
        return random_prompts(decoder.model, count, arguments.prompt_length or 128)
    source = held_out(arguments.checkpoint, arguments.step)[0]
    queries = [source[i][0] for i in itertools.islice(source.part(), count)]
    return decoder.tokenizer.encode_prompts((queries * count)[:count])


def bandwidth() -> float:
    """Bytes per second that one device reads and writes in a large copy."""
    size = 1 << (26 if jax.default_backend() == "cpu" else 30)
    x = jnp.zeros(size, jnp.uint8)
    copy = jax.jit(lambda x: x + jnp.uint8(1))
    times = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(copy(x))
        times.append(time.perf_counter() - start)
    return 2 * size / min(times[1:])


def bytes_per_forward(params: dict, model: ModelConfig, batch: int, context: float) -> float:
    """What a forward cannot help reading: every weight (of an untied embedding only some rows) and `context` cache
    entries a row.
    """
    params = {name: tree for name, tree in params.items() if name != "tiles"}
    weights = sum(x.nbytes for x in jax.tree.leaves(params)) - (
        0 if model.tie_embeddings else params["embed"]["embedding"].nbytes
    )
    entry = 2 * model.num_layers * model.num_kv_heads * model.head_dim * jnp.dtype(model.dtype).itemsize
    return weights + batch * context * entry


class Case:
    """One compiled loop: a method, a batch size, settings of the sampler.

    `prompts` are decoded `batch` at a time; their number is a multiple of it.
    """

    def __init__(
        self, params: dict, model: ModelConfig, config: SamplerConfig, prompts: list[list[int]], batch: int, mesh: Mesh
    ):
        check_prompts(prompts, model, config)
        self.params, self.model, self.config = params, model, config
        self.prompts, self.batch, self.mesh = prompts, batch, mesh
        self.engine = Engine(params, model, config, batch, max_prompt_length=max(map(len, prompts)), mesh=mesh)
        if self.engine.batch != batch:
            raise UserError(
                f"A batch of {batch} does not spread over the devices of data x fsdp; change --batch or --mesh."
            )
        start = time.perf_counter()
        loop = self.engine.compiled()
        self.compile_seconds = time.perf_counter() - start
        self.temporary_bytes = loop.memory_analysis().temp_size_in_bytes
        entry = 2 * model.num_layers * model.num_kv_heads * model.head_dim * jnp.dtype(model.dtype).itemsize
        self.cache_bytes = batch * self.engine.cache_length * entry

    def prefill(self, first: int, own: dict[str, float]) -> None:
        """Puts a batch of prompts into the rows."""
        config = dataclasses.replace(self.config, **own)
        for index in range(first, first + self.batch):
            self.engine.add(Prompt(self.prompts[index], config, index))
        self.engine.prefill(UNLIMITED)
        self.engine.forward(0)  # waits for it

    def decode(self, **own: float) -> tuple[list[Generation], float, float]:
        """The answers to all prompts, seconds of the prefills and seconds of the loops."""
        answers, prefill_seconds, loop_seconds = [], 0.0, 0.0
        for first in range(0, len(self.prompts), self.batch):
            start = time.perf_counter()
            self.prefill(first, own)
            middle = time.perf_counter()
            while self.engine.busy:
                answers += self.engine.step(UNLIMITED)
            prefill_seconds += middle - start
            loop_seconds += time.perf_counter() - middle
        return sorted(answers, key=lambda answer: answer.index), prefill_seconds, loop_seconds

    def seconds_per_forward(self, steps: int) -> float:
        """Of `steps` passes of the loop, whether rows are done or not: that changes nothing. Median of three."""
        self.prefill(0, {})
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            self.engine.forward(steps)
            taken.append((time.perf_counter() - start) / steps)
        for row in range(self.batch):
            self.engine.cancel(row)
        return statistics.median(taken)


def tokens_per_forward(answers: Sequence[Generation]) -> float:
    return sum(len(a.tokens) for a in answers) / sum(a.forwards for a in answers)


def calibrate(case: Case, wanted: float, runs: int = 8) -> float:
    """The token_threshold at which random weights come closest to `wanted` tokens per forward."""
    low, high = -20.0, 0.0  # of its logarithm: probabilities of random weights lie around 1 / vocabulary
    best = (float("inf"), 1.0)
    for _ in range(runs):
        middle = (low + high) / 2
        answers, *_ = case.decode(token_threshold=float(np.exp(middle)))
        found = tokens_per_forward(answers)
        best = min(best, (abs(found - wanted), float(np.exp(middle))))
        if best[0] < 0.05 * wanted:
            break
        low, high = (middle, high) if found > wanted else (low, middle)
    return best[1]


def measure(case: Case, own: dict[str, float], steps: int, bytes_per_second: float) -> dict[str, Any]:
    """Figures of one case."""
    case.decode(**own)  # warm
    answers, prefill_seconds, loop_seconds = case.decode(**own)
    seconds_per_forward = case.seconds_per_forward(steps)
    tokens, forwards = sum(len(a.tokens) for a in answers), sum(a.forwards for a in answers)
    context = statistics.mean(len(prompt) + len(answer.order) / 2 for prompt, answer in zip(case.prompts, answers))
    reading = bytes_per_forward(case.params, case.model, case.batch, context) / case.mesh.size / bytes_per_second
    return {
        "batch": case.batch,
        "method": case.config.method,
        "speculate": "" if case.config.method == "autoregressive" else case.config.speculate,
        "window": case.engine.sampler.window,
        "token_threshold": own.get("token_threshold", 0.0),
        "tokens": tokens,
        "forwards": forwards,
        "tokens_per_forward": tokens / forwards,
        "forwards_per_token": forwards / tokens,
        "ms_per_forward": 1e3 * seconds_per_forward,
        "prefill_ms": 1e3 * prefill_seconds / len(answers),
        "tokens_per_second": tokens / (prefill_seconds + loop_seconds),
        "of_bandwidth": reading / seconds_per_forward,
        "compile_seconds": case.compile_seconds,
        "cache_bytes": case.cache_bytes,
        "temporary_bytes": case.temporary_bytes,
        "answers": [answer.tokens for answer in answers],
    }


COLUMNS = {
    "batch": "{}",
    "method": "{}",
    "speculate": "{}",
    "window": "{}",
    "tokens": "{}",
    "forwards": "{}",
    "tokens_per_forward": "{:.2f}",
    "forwards_per_token": "{:.2f}",
    "ms_per_forward": "{:.2f}",
    "prefill_ms": "{:.1f}",
    "tokens_per_second": "{:.1f}",
    "speed-up": "{:.2f}",
    "of_bandwidth": "{:.2f}",
    "compile_seconds": "{:.1f}",
    "cache_bytes": "{:.3g}",
    "temporary_bytes": "{:.3g}",
}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown; the speed-up is over autoregressive decoding with the same batch."""
    baseline = {r["batch"]: r["tokens_per_second"] for r in results if r["method"] == "autoregressive"}
    lines = [[name.replace("_", " ") for name in COLUMNS], ["---"] * len(COLUMNS)]
    for r in results:
        r = {**r, "speed-up": r["tokens_per_second"] / baseline.get(r["batch"], float("nan"))}
        lines.append([form.format(r[name]) for name, form in COLUMNS.items()])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; `batch` as numbers, `prompts` a multiple of each of them.

    Raises:
      UserError: they do not fit together.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, required=False)
    parser.add_argument(
        "--config",
        metavar="FILE[:NAME=VALUE,...]",
        help="instead of --checkpoint: random weights of this config's model",
    )
    parser.add_argument("--batch", default="1,8,32", metavar="N,..", help="batch sizes; default 1,8,32")
    parser.add_argument(
        "--prompt-length",
        type=int,
        default=0,
        metavar="N",
        help="random prompts of this length; default: held-out ones of the run, else 128",
    )
    parser.add_argument(
        "--tokens-per-forward",
        type=float,
        default=2.0,
        metavar="X",
        help="with --config: what acceptance is set to; default 2",
    )
    parser.add_argument(
        "--prompts", type=int, default=0, metavar="N", help="how many are decoded; default: the largest batch"
    )
    parser.add_argument(
        "--forwards", type=int, default=16, metavar="N", help="forwards that the time of one is taken from; default 16"
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures there too")
    add_sampler_arguments(parser)
    arguments = parser.parse_args(argv)
    if bool(arguments.checkpoint) == bool(arguments.config):
        raise UserError("Say what to measure: either --checkpoint DIR, or --config FILE for random weights.")
    try:
        batches = [int(size) for size in arguments.batch.split(",")]
    except ValueError:
        batches = [0]
    if min(*batches, arguments.forwards, 1) < 1:
        raise UserError(
            f"--batch is {arguments.batch!r} and --forwards {arguments.forwards}; give numbers of at least 1, such as "
            "--batch 1,8,32."
        )
    arguments.prompts = arguments.prompts or max(batches)
    if any(arguments.prompts % batch for batch in batches):
        raise UserError(
            f"--prompts {arguments.prompts} is not a multiple of every batch size in --batch {arguments.batch}; "
            "batches are decoded whole."
        )
    arguments.batch = batches
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = arguments_of(argv)
    logging.set_verbosity(logging.ERROR)
    decoder = (
        random_decoder(load_config(arguments.config).model, arguments) if arguments.config else decoder_of(arguments)
    )
    model = decoder.model
    prompts = prompts_of(arguments, decoder, arguments.prompts)

    device, rate = jax.devices()[0], bandwidth()
    print(
        f"{decoder.mesh.size} x {device.device_kind}, {rate / 1e9:.1f} GB/s measured in a copy; "
        f"{model.num_params():,} parameters in {model.dtype}"
    )
    speculations = [arguments.speculate] if arguments.speculate else ["off", "on"]
    results, threshold = [], None
    for batch in arguments.batch:
        for method, speculate in [("autoregressive", "off"), *(("plan_and_infill", s) for s in speculations)]:
            if arguments.method not in (None, method):
                continue
            plans = method == "plan_and_infill"
            given = {"speculate": speculate} if plans else {}
            config = settings_of(arguments, decoder, method=method, **given)
            case = Case(decoder.params, model, config, prompts, batch, decoder.mesh)
            if threshold is None and plans:
                threshold = (
                    calibrate(case, arguments.tokens_per_forward) if arguments.config else config.token_threshold
                )
                print(f"token_threshold {threshold:.3g}", flush=True)
            own = {"token_threshold": threshold} if plans else {}
            result = measure(case, own, arguments.forwards, rate)
            results.append(result)
            print(
                f"batch {batch}, {method} {speculate}: {result['tokens_per_second']:.1f} tokens/s, "
                f"{result['ms_per_forward']:.2f} ms per forward",
                flush=True,
            )
    same = all(
        a["answers"] == b["answers"]
        for a, b in itertools.combinations(results, 2)
        if (a["batch"], a["method"]) == (b["batch"], b["method"])
    )
    print(table(results))
    print(f"speculation left every token as it was: {'yes' if same else 'NO'}")
    if arguments.json:
        for result in results:
            del result["answers"]
        arguments.json.write_text(
            json.dumps(
                {"device": device.device_kind, "bytes_per_second": rate, "same_tokens": same, "results": results},
                indent=1,
            )
            + "\n"
        )
