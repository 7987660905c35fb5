"""Measures the data: how fast rows of a very large store begin and come, and how fast sources are tokenised.

    python tools/benchmark.py data rows --examples 100000000 --folder runs/synthetic
    python tools/benchmark.py data prepare --tokenizer DIR --file FILE.jsonl --processes 1,2
    python tools/benchmark.py data hosts --tokenizer DIR --file FILE.jsonl --hosts 2 --delay 0.5

`hosts` gives the rows of each batch to several hosts, processes without a model, and counts what each of them reads.
`rows` draws the examples of a store that does not exist, about 330 tokens each, block by block. The table of its
windows' rows is made first, as `refusion_jax.prepare` does; then a fresh process starts from it, as a run does.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
from etils import epath

from refusion_jax.config import DataConfig, SourceConfig
from refusion_jax.data import pipeline, shards
from refusion_jax.data.store import Store
from refusion_jax.data.tokenizers import load_tokenizer
from refusion_jax.data.windows import Windows

_WHO = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
PER_BLOCK = 790  # examples, about `shards.BLOCK_TOKENS` tokens


class SyntheticStore:
    """A store (`data.store.Store`) of random examples, log-normal around 330 tokens; its tables go to `folder`."""

    name = "synthetic"
    content = "synthetic"

    def __init__(self, examples: int, folder: str, max_length: int, vocab_size: int):
        self.folder, self._count = epath.Path(folder), examples
        self._max_length, self._vocab_size = max_length, vocab_size
        self.num_blocks = -(-examples // PER_BLOCK)
        self.cut = f"{examples} {max_length}"

    def examples(self, block: int) -> np.ndarray:
        count = min(PER_BLOCK, self._count - block * PER_BLOCK)
        found = np.zeros(count, shards.EXAMPLE)
        drawn = np.random.default_rng((0, block)).lognormal(np.log(300), 0.45, count)
        found["length"] = np.clip(drawn, 16, self._max_length)
        found["prompt_length"] = found["length"] // 4
        return found

    def tokens(self, block: int) -> np.ndarray:
        size = int(self.examples(block)["length"].sum())
        return np.random.default_rng((1, block)).integers(0, self._vocab_size, size, np.uint32)

    def read_ahead(self, block: int) -> None:
        pass


def synthetic_rows(
    examples: int, folder: str, max_length: int, vocab_size: int, max_examples: int = 0, mapped=map
) -> pipeline.Rows:
    """Packed rows of a synthetic store."""
    store = SyntheticStore(examples, folder, max_length, vocab_size)
    return pipeline.Rows(
        [Windows(store, max_length=max_length, mapped=mapped)],
        [1.0],
        max_length=max_length,
        max_examples_per_row=max_examples,
        seed=0,
        shuffle=True,
        pad_id=0,
    )


def memory() -> float:
    """Most memory that this process has had, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cpu_seconds() -> float:
    """Used by this process and by those of it that have ended."""
    return sum(map(sum, ((u.ru_utime, u.ru_stime) for u in map(resource.getrusage, _WHO))))


def start(arguments: argparse.Namespace) -> None:
    """In a fresh process: seconds and memory until the first row, and from it on."""
    before, begin = memory(), time.perf_counter()
    rows = synthetic_rows(arguments.examples, arguments.folder, arguments.max_length, 1000)
    started = time.perf_counter() - begin
    rows[0]
    first = time.perf_counter() - begin
    report = rows.report
    print(f"started in {started:.2f} s, first row after {first:.2f} s, {memory() - before:.0f} MB more than before")
    for row in np.random.default_rng(0).integers(0, rows.rows_per_epoch, 3).tolist():
        begin = time.perf_counter()
        rows[row]
        print(f"row {row:,}, somewhere else: {time.perf_counter() - begin:.2f} s; {memory() - before:.0f} MB")
    print(report)


def measure_rows(arguments: argparse.Namespace) -> None:
    os.makedirs(arguments.folder, exist_ok=True)
    begin = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        rows = synthetic_rows(
            arguments.examples, arguments.folder, arguments.max_length, 1000, mapped=lambda f, n: pool.imap(f, n, 8)
        )
    seconds = time.perf_counter() - begin
    print(f"table of {rows.rows_per_epoch:,} rows: {seconds:.0f} s in {arguments.processes} processes")
    words = [sys.executable, pathlib.Path(__file__).parent / "benchmark.py", "data", "start"]
    words += ["--examples", arguments.examples, "--folder", arguments.folder, "--max-length", arguments.max_length]
    subprocess.run([str(word) for word in words], check=True)


def measure_prepare(arguments: argparse.Namespace) -> None:
    from refusion_jax import prepare

    for processes in arguments.processes_list:
        with tempfile.TemporaryDirectory() as folder:
            data = DataConfig(tokenizer=arguments.tokenizer, train=(SourceConfig("jsonl", arguments.file),))
            begin, used = time.perf_counter(), cpu_seconds()
            prepare.prepare(data, folder, processes=processes, shard_bytes=arguments.shard_mib * 2**20)
            seconds, used = time.perf_counter() - begin, cpu_seconds() - used
            found = [json.loads(p.read_text())["content"] for p in pathlib.Path(folder).glob("*/index.json")]
            examples = sum(shard[0] for index in found for shard in index["shards"])
            tokens = sum(shard[1] for index in found for shard in index["shards"])
            print(
                f"{processes} processes: {examples:,} examples in {seconds:.1f} s, "
                f"{examples / seconds:,.0f} examples/s, {tokens / seconds:,.0f} tokens/s; {1000 * used / examples:.2f} "
                "s of CPU time for 1000 examples, start-up of processes included"
            )


def measure_hosts(arguments: argparse.Namespace) -> None:
    from refusion_jax import prepare

    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig(tokenizer=arguments.tokenizer, train=(SourceConfig("jsonl", arguments.file),))
        prepare.prepare(data, folder, processes=os.cpu_count(), shard_bytes=arguments.shard_mib * 2**20)
        with multiprocessing.get_context("spawn").Pool(arguments.hosts, maxtasksperchild=1) as pool:
            found = pool.starmap(host, [(arguments, folder, number) for number in range(arguments.hosts)], 1)
    for number, (steps, rows, read, size, seconds, longest) in enumerate(found):
        print(
            f"host {number} of {arguments.hosts}: {steps} steps, {rows} rows of {4 * rows * arguments.max_length:,} "
            f"bytes; read {read:,} bytes of {size:,}, {read / steps:,.0f} a step; {seconds:.1f} s, "
            f"of which it waited {longest:.2f} s at most for a batch after the first"
        )


def host(arguments: argparse.Namespace, folder: str, number: int) -> tuple[int, int, int, int, float, float]:
    """An epoch of one host's rows: steps, rows, bytes read, bytes of the store, seconds, and the longest wait."""
    count, read = arguments.batch_size // arguments.hosts, []
    fetch = Store.read_tokens

    def slow(store: Store, block: int) -> np.ndarray:
        time.sleep(arguments.delay)
        found = fetch(store, block)
        read.append(found.nbytes)
        return found

    Store.read_tokens = slow
    rows = pipeline.load_rows(
        [SourceConfig("jsonl", arguments.file)],
        load_tokenizer(arguments.tokenizer),
        max_length=arguments.max_length,
        cache_dir="",
        store=folder,
    )
    steps, waits = rows.rows_per_epoch // arguments.batch_size, []
    ours = range(number * count, (number + 1) * count)
    found = pipeline.batches(rows, batch_size=arguments.batch_size, local_rows=ours)
    begin = time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        next(found)
        waits.append(time.perf_counter() - asked)
        time.sleep(arguments.step)
    seconds = time.perf_counter() - begin
    size = sum(path.stat().st_size for path in pathlib.Path(folder).glob("*/shard-*.bin"))
    return steps, steps * count, sum(read), size, seconds, max(waits[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    for name in ("rows", "start"):
        rows = what.add_parser(name)
        rows.add_argument("--examples", type=int, default=1_000_000)
        rows.add_argument("--folder", default="runs/synthetic", help="where the table goes")
        rows.add_argument("--max-length", type=int, default=4096)
        rows.add_argument("--processes", type=int, default=os.cpu_count())
    prepare, hosts = what.add_parser("prepare"), what.add_parser("hosts")
    for parser_of in (prepare, hosts):
        parser_of.add_argument("--tokenizer", required=True)
        parser_of.add_argument("--file", required=True)
        parser_of.add_argument("--shard-mib", type=int, default=8)
    hosts.add_argument("--hosts", type=int, default=2)
    hosts.add_argument("--batch-size", type=int, default=32, help="rows of a step, of all hosts")
    hosts.add_argument("--max-length", type=int, default=4096)
    hosts.add_argument("--delay", type=float, default=0.0, metavar="SECONDS", help="that every read takes more")
    hosts.add_argument("--step", type=float, default=0.0, metavar="SECONDS", help="that a step takes")
    prepare.add_argument(
        "--processes", dest="processes_list", default=[1, 2], type=lambda t: list(map(int, t.split(",")))
    )
    arguments = parser.parse_args()
    commands = {"rows": measure_rows, "start": start, "prepare": measure_prepare, "hosts": measure_hosts}
    commands[arguments.what](arguments)
