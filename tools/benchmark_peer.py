"""Measures this project beside PyTorch on the CPU: same weights, same tokens, runs in turn, CPU seconds of each side.

    python tools/benchmark.py peer --checkpoint runs/quickstart
    python tools/benchmark.py peer --config configs/0p6b.py --rows autoregressive,plan --gen-length 32 --json peer.json
    python tools/benchmark.py peer --checkpoint runs/mine --authors ReFusion --python envs/authors/bin/python

The peer is Hugging Face's Qwen3 in a process of its own (tools/torch_peer.py), with the weights as this project exports
them. With --authors plan-and-infill runs beside the authors' own loop, from a checkout of their code; without, beside
Hugging Face's autoregressive decoding. Both decode greedily in float32.

    autoregressive  tokens of answers, every batch size of --batch
    plan            plan-and-infill, one prompt at a time, speculation off, auto and on
    prefill         tokens of one prompt with one token of answer, every length of --prefill
    train           useful tokens of an optimizer step of next-token prediction: rows of one length, then packed rows
                    beside the same examples padded to the longest

After a run of each side that is not counted, both run in turn. A ratio is tokens per CPU-second here over those of the
peer in the same turn, above 1: less work here. Memory is what a run added at its peak. Other work on the machine
disturbs CPU seconds less than the clock, but it does. --config has random weights (see `benchmark.py decode --help`).
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import torch_peer
from absl import logging
from benchmark_data import synthetic_rows
from benchmark_decode import calibrate, prompts_of, random_decoder, random_prompts
from flax import traverse_util

from refusion_jax import step as steps_lib
from refusion_jax.checkpoint import convert, metadata, stream
from refusion_jax.config import Config, DataConfig, MeshConfig, OptimizerConfig, parse_config
from refusion_jax.data import pipeline
from refusion_jax.decoder import Decoder, add_model_arguments, add_sampler_arguments, decoder_of, settings_of
from refusion_jax.errors import UserError
from refusion_jax.model.qwen3 import stacked
from refusion_jax.objective.autoregressive import Autoregressive
from refusion_jax.objective.common import PackedBatch
from refusion_jax.sampling import SamplerConfig, generate
from refusion_jax.sampling.programs import decode_params
from refusion_jax.train import to_devices

ROWS = ("autoregressive", "plan", "prefill", "train")


class Peer:
    """The process with PyTorch; used as a context it ends with it."""

    def __init__(self, python: str, folder: pathlib.Path, authors: str):
        """Starts it.

        Raises:
          UserError: no such interpreter or checkout, or it has not what the peer imports.
        """
        if authors and not (pathlib.Path(authors) / "generate.py").is_file():
            raise UserError(
                f"--authors {authors} has no generate.py; name a checkout of the authors' code, or leave it out."
            )
        script = pathlib.Path(__file__).with_name("torch_peer.py")
        # Idle threads that spin would count as work.
        environment = os.environ | {
            "OMP_WAIT_POLICY": "PASSIVE",
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_OFFLINE": "1",
        }
        command = [python, str(script), str(folder), *([str(pathlib.Path(authors).absolute())] if authors else [])]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        except OSError as error:
            raise UserError(
                f"--python {python} cannot be started ({error.strerror}); name a Python interpreter."
            ) from None
        self.about = self._answer("does not start")

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.wait()

    def __call__(self, do: str, **arguments: Any) -> dict[str, Any]:
        """What `torch_peer.measured` says of one request."""
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer(f"failed in {do}")

    def _answer(self, what: str) -> dict[str, Any]:
        line = self._process.stdout.readline()
        found = json.loads(line) if line else {"error": f"it ended with exit code {self._process.wait()}"}
        if "error" in found:
            raise UserError(
                f"The peer {what}: {found['error']}. It needs PyTorch and transformers (pip install "
                "'refusion_jax[torch]'), and with --authors what their code needs; --python names the interpreter of "
                "another environment."
            )
        return found


def exported(arguments: argparse.Namespace, decoder: Decoder, folder: pathlib.Path) -> pathlib.Path:
    """The weights in Hugging Face layout, in a new folder below `folder`."""
    quiet, source, step = lambda line: None, arguments.checkpoint, arguments.step
    if arguments.config:
        flat = traverse_util.flatten_dict(jax.tree.map(np.asarray, decoder.params), sep="/")
        part = lambda p: stream.Stream(p.shape, p.dtype, lambda start, stop: p[start:stop])
        streams = {path: part(p) for path, p in flat.items()}
        source, step = folder / "run", None
        stream.save(source / "checkpoints" / "0", streams, metadata.make_meta(decoder.model, step=0, tokenizer=""))
    convert.to_huggingface(source, folder / "exported", step=step, dtype="float32", say=quiet)
    return folder / "exported"


@dataclasses.dataclass(frozen=True)
class Row:
    """What both sides do, and how many tokens of ours and of theirs that is, given what they returned."""

    name: str
    ours: Callable[[], Any]
    theirs: Callable[[], dict[str, Any]]
    tokens: Callable[[Any], int]
    same: Callable[[Any, Any], bool] | None = None


def compared(row: Row, repeats: int) -> dict[str, Any]:
    """Figures of a row."""
    torch_peer.measured(row.ours), row.theirs()
    turns = [(torch_peer.measured(row.ours), row.theirs()) for _ in range(repeats)]
    ours, theirs = zip(*turns)
    rate = lambda run, clock: row.tokens(run["result"]) / run[clock]
    ratios = lambda clock: [rate(a, clock) / rate(b, clock) for a, b in turns]
    peak = lambda runs: None if runs[0]["peak_bytes"] is None else max(run["peak_bytes"] for run in runs)
    cpu = ratios("cpu_seconds")
    here, there = peak(ours), peak(theirs)
    return {
        "row": row.name,
        "tokens": row.tokens(ours[0]["result"]),
        "same": None if row.same is None else row.same(ours[0]["result"], theirs[0]["result"]),
        "tokens_per_cpu_second": statistics.median(rate(run, "cpu_seconds") for run in ours),
        "peer": statistics.median(rate(run, "cpu_seconds") for run in theirs),
        "ratio": statistics.median(cpu),
        "least": min(cpu),
        "most": max(cpu),
        "ratio_by_clock": statistics.median(ratios("seconds")),
        "peak_bytes": here,
        "memory_ratio": here / there if here is not None and there > 2**20 else None,  # else it had kept what it needs
        "turns": [[{k: v for k, v in run.items() if k != "result"} for run in turn] for turn in turns],
    }


def decoding_rows(arguments: argparse.Namespace, decoder: Decoder, peer: Peer, wanted: Sequence[str]) -> Iterator[Row]:
    """Rows of "autoregressive", "plan" and "prefill"."""
    model = decoder.model
    eos = model.eos_token_id
    settings = lambda **given: settings_of(arguments, decoder, **given)
    plain = settings(method="autoregressive")
    params = decode_params(decoder.params, decoder.mesh)

    def ours(config: SamplerConfig, prompts: list[list[int]], batch: int) -> Callable[[], list[list[int]]]:
        options = dict(batch_size=batch, mesh=decoder.mesh)
        return lambda: [answer.tokens for answer in generate(params, model, config, prompts, **options)]

    def cut(answers: list[list[int]]) -> list[list[int]]:
        return [answer[: answer.index(eos) + 1] if eos in answer else answer for answer in answers]

    def count(answers: list[list[int]]) -> int:
        return sum(map(len, cut(answers)))

    def same(ours: list[list[int]], theirs: list[list[int]]) -> bool:
        return ours == cut(theirs)

    def continued(prompts: list[list[int]], batch: int, new: int) -> Callable[[], dict[str, Any]]:
        batches = [prompts[first : first + batch] for first in range(0, len(prompts), batch)]
        return lambda: _together([peer("autoregressive", prompts=part, new=new, eos=eos) for part in batches])

    if "autoregressive" in wanted:
        for batch in arguments.batch:
            prompts = prompts_of(arguments, decoder, max(batch, arguments.prompts))
            name = f"autoregressive, batch {batch}"
            theirs = continued(prompts, batch, plain.gen_length)
            yield Row(name, ours(plain, prompts, batch), theirs, count, same)
    if "plan" in wanted:
        prompts = prompts_of(arguments, decoder, arguments.prompts)
        config = settings(method="plan_and_infill", speculate="off")
        if arguments.config:
            case = lambda threshold: dataclasses.replace(config, token_threshold=threshold)
            decode = lambda token_threshold: (generate(params, model, case(token_threshold), prompts, batch_size=1),)
            config = case(calibrate(types.SimpleNamespace(decode=decode), arguments.tokens_per_forward))
        if arguments.authors:
            theirs = lambda: peer(
                "plan_and_infill",
                prompts=prompts,
                gen_length=config.gen_length,
                mask=model.mask_token_id,
                eos=eos,
                slot_size=config.slot_size,
                serial_num_blocks=config.blocks,
                slot_threshold=config.slot_threshold,
                token_threshold=config.token_threshold,
            )
        else:
            theirs = continued(prompts, 1, config.length)
        for speculate in ("off", "auto", "on"):
            run = ours(dataclasses.replace(config, speculate=speculate), prompts, 1)
            yield Row(f"plan-and-infill, {speculate}", run, theirs, count, same if arguments.authors else None)
    if "prefill" in wanted:
        for length in arguments.prefill:
            prompts = random_prompts(model, 1, length)
            config = dataclasses.replace(plain, gen_length=1)
            yield Row(
                f"prefill, {length}", ours(config, prompts, 1), continued(prompts, 1, 1), lambda answers: length, same
            )


def _together(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One run of several in a row, whose results are lists."""
    peaks = [run["peak_bytes"] for run in runs]
    return {
        "result": [answer for run in runs for answer in run["result"]],
        "seconds": sum(run["seconds"] for run in runs),
        "cpu_seconds": sum(run["cpu_seconds"] for run in runs),
        "peak_bytes": None if None in peaks else max(peaks),
    }


def training_rows(arguments: argparse.Namespace, decoder: Decoder, peer: Peer) -> Iterator[Row]:
    """Rows of "train"; weights move on both sides, from the same ones, by the same optimizer."""
    config = Config(
        model=dataclasses.replace(decoder.model, remat="none"),
        data=DataConfig(max_length=arguments.packed_length),
        objective=Autoregressive(),
        optimizer=OptimizerConfig(lr=1e-5, schedule="constant"),
        mesh=MeshConfig(),
        batch_size=arguments.packed_rows,
    )
    options = dict(batch_size=config.batch_size, local_rows=range(config.batch_size))
    with tempfile.TemporaryDirectory() as folder:
        rows = synthetic_rows(2000, folder, config.data.max_length, decoder.model.logical_vocab_size - 2)
        packed = next(pipeline.batches(rows, **options))
    rows, length = arguments.dense_rows, arguments.dense_length
    one = lambda value, dtype: np.full((rows, 1), value, dtype)
    dense = dict(
        tokens=np.array(random_prompts(decoder.model, rows, length), np.int32),
        prompt_lengths=one(1, np.int32),
        lengths=one(length, np.int32),
        example_ids=np.arange(rows, dtype=np.uint32)[:, None],
    )
    names = (
        f"training, {rows} rows of {length}",
        f"training, {config.batch_size} packed rows of {packed['tokens'].shape[1]}",
    )
    for name, batch in zip(names, (dense, packed)):
        yield _training_row(name, dataclasses.replace(config, batch_size=len(batch["tokens"])), decoder, peer, batch)


def _training_row(name: str, config: Config, decoder: Decoder, peer: Peer, batch: dict[str, np.ndarray]) -> Row:
    program = steps_lib.build(config, decoder.mesh, steps=1000)
    state = program.start(jax.tree.map(lambda x: x.copy(), stacked(decoder.params)))
    on_device: PackedBatch = to_devices(batch, program.batch_sharding, config.batch_size)
    examples, prompts = [], []
    for tokens, lengths, prompt_lengths in zip(batch["tokens"], batch["lengths"], batch["prompt_lengths"]):
        ends = np.cumsum(lengths)
        examples += [tokens[end - n : end].tolist() for end, n in zip(ends, lengths) if n]
        prompts += [int(p) for p, n in zip(prompt_lengths, lengths) if n]

    def ours() -> float:
        nonlocal state
        state, metrics = program.train(state, on_device)
        return float(metrics["loss"])

    peer("restart_training")
    theirs = lambda: peer("train", examples=examples, prompt_lengths=prompts)
    useful = int(batch["lengths"].sum())
    return Row(name, ours, theirs, lambda loss: useful, lambda a, b: bool(np.isclose(a, b, rtol=1e-3)))


COLUMNS = {
    "row": "{}",
    "tokens": "{}",
    "same": "{}",
    "tokens_per_cpu_second": "{:.1f}",
    "peer": "{:.1f}",
    "ratio": "{:.2f}",
    "least": "{:.2f}",
    "most": "{:.2f}",
    "ratio_by_clock": "{:.2f}",
    "memory_ratio": "{:.2f}",
}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [[name.replace("_", " ") for name in COLUMNS], ["---"] * len(COLUMNS)]
    lines += [["-" if r[name] is None else form.format(r[name]) for name, form in COLUMNS.items()] for r in results]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parsed(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Config | None]:
    """The command line, and the config that it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = lambda kind: lambda text: [kind(item) for item in text.split(",")]
    add_model_arguments(parser, required=False)
    add = parser.add_argument
    add(
        "--config",
        metavar="FILE[:NAME=VALUE,...]",
        help="instead of --checkpoint: random weights of this config's model",
    )
    add("--authors", default="", metavar="DIR", help="checkout of the authors' code; default: Hugging Face alone")
    add("--python", default=sys.executable, metavar="FILE", help="interpreter with PyTorch; default: this one")
    add("--rows", type=listed(str), default=ROWS, metavar="NAME,..", help=f"of {', '.join(ROWS)}; default: all")
    add("--batch", type=listed(int), default=[1, 16], metavar="N,..", help="of autoregressive rows; default 1,16")
    add("--prompts", type=int, default=2, metavar="N", help="decoded in a run of batch 1; default 2")
    add("--prompt-length", type=int, default=0, metavar="N", help="as for decode: default held-out prompts, else 128")
    add("--prefill", type=listed(int), default=[2048], metavar="N,..", help="lengths of prompts; default 2048")
    add("--dense-rows", type=int, default=4, metavar="N", help="training, rows; default 4")
    add("--dense-length", type=int, default=512, metavar="N", help="training, tokens of each; default 512")
    add("--packed-rows", type=int, default=1, metavar="N", help="training, packed rows; default 1")
    add("--packed-length", type=int, default=2048, metavar="N", help="training, tokens of each; default 2048")
    add("--tokens-per-forward", type=float, default=3.0, metavar="X", help="with --config: of plan rows; default 3")
    add("--repeats", type=int, default=5, metavar="N", help="turns that are counted; default 5")
    add("--json", type=pathlib.Path, metavar="FILE", help="write the figures there too")
    add_sampler_arguments(parser)
    given = parser.parse_known_args(argv)[0]
    if bool(given.checkpoint) == bool(given.config):
        raise UserError("Say what to measure: either --checkpoint DIR, or --config FILE for random weights.")
    unknown = set(given.rows) - set(ROWS)
    if unknown:
        raise UserError(f"--rows names {', '.join(sorted(unknown))}; choose from {', '.join(ROWS)}.")
    numbers = [given.prompts, given.repeats, given.dense_rows, given.packed_rows, *given.batch, *given.prefill]
    if min(numbers) < 1 or min(given.dense_length, given.packed_length) < 16:
        raise UserError(
            "Numbers of prompts, rows, turns and tokens must be at least 1, lengths in training at least 16."
        )
    return parse_config(parser, argv) if given.config else (parser.parse_args(argv), None)


def main(argv: Sequence[str] | None = None) -> None:
    arguments, config = parsed(argv)
    logging.set_verbosity(logging.FATAL)
    arguments.dtype = "float32"
    decoder = random_decoder(config.model, arguments) if config else decoder_of(arguments)
    with tempfile.TemporaryDirectory() as folder:
        weights = exported(arguments, decoder, pathlib.Path(folder))
        with Peer(arguments.python, weights, arguments.authors) as peer:
            model = decoder.model
            special = [id for id in (model.mask_token_id, model.begin_token_id) if id is not None]
            peer("never", ids=special, logical_vocab=model.logical_vocab_size)
            torch = f"PyTorch {peer.about['torch']} with {peer.about['threads']} threads"
            print(f"{model.num_params():,} parameters in float32, beside {torch}", flush=True)
            results = []
            rows = [decoding_rows(arguments, decoder, peer, arguments.rows)]
            rows += [training_rows(arguments, decoder, peer)] if "train" in arguments.rows else []
            for row in (row for part in rows for row in part):
                results.append(compared(row, arguments.repeats))
                print(f"{row.name}: {results[-1]['ratio']:.2f} times the peer's tokens per CPU-second", flush=True)
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps({"peer": peer.about, "results": results}, indent=1) + "\n")
