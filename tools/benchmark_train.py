"""Measures the training step on the local devices, over batch sizes, lengths, remat policies and kinds of attention.

    python tools/benchmark.py train --config configs/tiny.py --batch 8,16 --remat none,full
    python tools/benchmark.py train --config configs/8b.py --config.model.num_layers=4 --synthetic --batch 8 --torch

Every line is the compiled step of refusion_jax.train fed by its input pipeline: from the config's data, or with
--synthetic from random tokens in examples of about 330 tokens. Times are of whole steps, the devices never waiting for
the host to read a result.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from benchmark_data import synthetic_rows

from refusion_jax import step as steps_lib
from refusion_jax.config import Config, add_config_arguments, parse_config
from refusion_jax.data import pipeline
from refusion_jax.data.tokenizers import load_tokenizer
from refusion_jax.errors import UserError
from refusion_jax.metrics import flops
from refusion_jax.parallel.mesh import make_mesh
from refusion_jax.train import local_rows, to_devices, with_tokenizer

WARM_UP = 2  # steps before the clock starts


def seconds_of(run: Callable[[], object], times: int = 5) -> float:
    """Median seconds of `run`, whose result is waited for, after one call that is not counted."""
    jax.block_until_ready(run())
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def matmul_rate() -> float:
    """Measured bfloat16 operations per second of one device in a large matrix product."""
    n = 8192
    x = jnp.ones((n, n), jnp.bfloat16)
    chain = jax.jit(lambda x: jax.lax.fori_loop(0, 8, lambda _, y: (x @ y) * jnp.bfloat16(1 / n), x))
    return 8 * 2 * n**3 / seconds_of(lambda: chain(x))


def measure(config: Config, rows: pipeline.Rows, steps: int, profile: pathlib.Path | None) -> dict:
    """Figures of `steps` training steps of one configuration."""
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    program = steps_lib.build(config, mesh, steps=1000)
    state = program.init(jax.random.key(0))
    batches = pipeline.batches(
        rows, batch_size=config.batch_size, local_rows=local_rows(program.batch_sharding, config.batch_size)
    )
    fetch = lambda: to_devices(next(batches), program.batch_sharding, config.batch_size)
    batch = fetch()
    start = time.perf_counter()
    compiled = program.train.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()

    waited, tokens, needed, metrics = 0.0, 0.0, 0.0, []
    for step in range(-WARM_UP, steps):
        if step == 0:
            jax.block_until_ready(state)
            if profile:
                jax.profiler.start_trace(str(profile))
            start = time.perf_counter()
        state, values = compiled(state, batch)
        before = time.perf_counter()
        batch = fetch()
        if step >= 0:
            waited += time.perf_counter() - before
            metrics.append(values)
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - start) / steps
    if profile:
        jax.profiler.stop_trace()
    for values in metrics:
        tokens += float(values["tokens"]) / steps
        needed += float(values["flops"]) / steps

    corruption = jax.jit(lambda batch: config.objective.corrupt(jax.random.key(0), batch, config.model, 0))
    chip = flops.CHIPS.get(jax.devices()[0].device_kind)
    stats = jax.devices()[0].memory_stats() or {}
    result = {
        "batch": config.batch_size,
        "length": config.data.max_length,
        "remat": config.model.remat,
        "attention": config.model.attention,
        "compile_seconds": compile_seconds,
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "padding": 1 - tokens / (config.batch_size * config.data.max_length),
        "model_flops_per_second": needed / seconds / mesh.size,
        "mfu": needed / seconds / (chip.peak_flops * mesh.size) if chip else None,
        "peak_bytes": stats.get("peak_bytes_in_use") or memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "input_wait": waited / (seconds * steps),
        "corruption": seconds_of(lambda: corruption(batch)) / seconds,
        "forward_seconds": seconds_of(lambda: program.evaluate(state.params, state.frozen, batch)),
    }
    return result


def input_rate(rows: pipeline.Rows, batch_size: int, seconds: float = 3.0) -> dict[str, float]:
    """Examples and tokens per second of the input pipeline alone, from cached tokens to batches in host memory."""
    batches = pipeline.batches(rows, batch_size=batch_size, local_rows=range(batch_size))
    next(batches)
    examples = tokens = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        lengths = next(batches)["lengths"]
        examples += int((lengths > 0).sum())
        tokens += int(lengths.sum())
    return {"examples_per_second": examples / elapsed, "tokens_per_second": tokens / elapsed}


def torch_seconds(config: Config) -> dict[str, float]:
    """A plain PyTorch Hugging Face Qwen3 of the same size with SDPA in bfloat16: seconds of the loss of a batch of full
    rows, and of the loss with its gradients (no optimizer).

    Raises:
      UserError: PyTorch or transformers is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"--torch needs PyTorch and transformers ({error}); pip install 'refusion_jax[torch]'."
        ) from error
    from refusion_jax.model.config import to_huggingface

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = transformers.Qwen3Config.from_dict(to_huggingface(config.model))
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa").to(
        device, torch.bfloat16
    )
    tokens = torch.randint(
        0, config.model.logical_vocab_size, (config.batch_size, config.data.max_length), device=device
    )

    def timed(run: Callable[[], object]) -> float:
        taken = []
        for _ in range(4):
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[1:])

    def loss() -> torch.Tensor:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    with torch.no_grad():
        forward = timed(loss)
    return {"forward_seconds": forward, "gradient_seconds": timed(lambda: loss().backward())}


COLUMNS = {
    "batch": "{}",
    "length": "{}",
    "remat": "{}",
    "attention": "{}",
    "compile_seconds": "{:.1f}",
    "step_seconds": "{:.4f}",
    "tokens_per_second": "{:.0f}",
    "padding": "{:.1%}",
    "mfu": "{:.3f}",
    "of_matmul": "{:.3f}",
    "peak_bytes": "{:.3g}",
    "input_wait": "{:.1%}",
    "corruption": "{:.1%}",
    "forward_seconds": "{:.4f}",
}


def table(results: list[dict]) -> str:
    """Markdown; figures that do not exist on this device are left out."""
    shown = {name: form for name, form in COLUMNS.items() if any(r.get(name) is not None for r in results)}
    lines = [[name.replace("_", " ") for name in shown], ["---"] * len(shown)]
    lines += [[form.format(r[name]) for name, form in shown.items()] for r in results]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rows_of(config: Config, length: int, synthetic: bool) -> pipeline.Rows:
    """Rows of so many tokens: the config's data, or random ones."""
    most = config.data.max_examples_per_row
    if synthetic:
        with tempfile.TemporaryDirectory() as folder:
            return synthetic_rows(20000, folder, length, config.model.logical_vocab_size - 2, most)
    return pipeline.load_rows(
        config.data.train,
        load_tokenizer(config.data.tokenizer),
        cache_dir=config.data.cache_dir or "runs/benchmark-cache",
        max_length=length,
        max_examples_per_row=most,
        response_multiple=config.data.response_multiple,
        seed=config.seed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    listed = lambda kind: lambda text: [kind(item) for item in text.split(",")]
    parser.add_argument("--batch", type=listed(int), metavar="N,..", help="rows per step (default: the config's)")
    parser.add_argument("--length", type=listed(int), metavar="N,..", help="tokens per row (default: the config's)")
    parser.add_argument("--remat", type=listed(str), metavar="NAME,..", help="remat policies (default: the config's)")
    parser.add_argument(
        "--attention", type=listed(str), metavar="NAME,..", help="attention implementations (default: the config's)"
    )
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    parser.add_argument("--synthetic", action="store_true", help="random tokens instead of the config's data")
    parser.add_argument(
        "--torch", action="store_true", help="time a plain PyTorch Hugging Face model of the same size too"
    )
    parser.add_argument(
        "--profile", type=pathlib.Path, metavar="FOLDER", help="write a trace of each line's steps there"
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures there too")
    arguments, config = parse_config(parser)
    if not arguments.synthetic or (config.objective.needs_mask_token and config.model.mask_token_id is None):
        config = with_tokenizer(config, load_tokenizer(config.data.tokenizer))

    device = jax.devices()[0]
    matmul = matmul_rate() if device.platform != "cpu" else None
    print(
        f"{jax.device_count()} x {device.device_kind}"
        + (f", {matmul / 1e12:.0f} TFLOP/s measured in a bfloat16 matrix product" if matmul else "")
    )
    results = []
    choices = [arguments.batch or [config.batch_size], arguments.length or [config.data.max_length]]
    choices += [arguments.remat or [config.model.remat], arguments.attention or [config.model.attention]]
    for batch, length, remat, attention in itertools.product(*choices):
        case = dataclasses.replace(
            config,
            batch_size=batch,
            data=dataclasses.replace(config.data, max_length=length),
            model=dataclasses.replace(config.model, remat=remat, attention=attention),
        )
        rows = rows_of(config, length, arguments.synthetic)
        profile = arguments.profile and arguments.profile / f"batch{batch}-length{length}-{remat}-{attention}"
        result = measure(case, rows, arguments.steps, profile) | {"input": input_rate(rows, batch)}
        if matmul:
            result["of_matmul"] = result["model_flops_per_second"] / matmul
        if arguments.torch:
            result["torch"] = torch_seconds(case)
        results.append(result)
        print(
            f"batch {batch}, length {length}, {remat}, {attention}: step {result['step_seconds']:.4f} s, "
            f"{result['tokens_per_second']:.0f} useful tokens/s; "
            f"input pipeline alone {result['input']['examples_per_second']:.0f} examples/s, "
            f"{result['input']['tokens_per_second']:.0f} tokens/s",
            flush=True,
        )
        if arguments.torch:
            print(
                f"  PyTorch: loss {result['torch']['forward_seconds']:.4f} s (here {result['forward_seconds']:.4f} "
                f"s), with gradients {result['torch']['gradient_seconds']:.4f} s (here, with the optimizer, "
                f"{result['step_seconds']:.4f} s)"
            )
    print(table(results))
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                {"device": device.device_kind, "devices": jax.device_count(), "matmul": matmul, "results": results},
                indent=1,
            )
            + "\n"
        )
