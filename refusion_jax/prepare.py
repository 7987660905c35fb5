"""Tokenises a config's data with many processes: `python -m refusion_jax.prepare --config CONFIG --out STORE`.

STORE is a folder, or a bucket (gs://..); runs find the data there with `--config.data.store=STORE` and need no raw
data. Every machine that is started with the same arguments does its share: the Slurm array, the JobSet or the TPU pod
that started it, or --worker I/N, says which one it is. The result is the same byte for byte for any number of machines
and processes. Shards that are finished are kept, so a job that was killed is started again; damaged ones are made
again. The machine that finishes last writes the index, and what a run needs to know of the rows of this config.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import json
import math
import multiprocessing
import os
import pathlib
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping

from etils import epath

from refusion_jax import storage
from refusion_jax.config import DataConfig, SourceConfig, add_config_arguments, parse_config
from refusion_jax.data import pipeline, preparation
from refusion_jax.data.examples import Source
from refusion_jax.data.sources import open_source
from refusion_jax.data.store import describe, shard_path
from refusion_jax.data.tokenizers import Tokenizer, load_tokenizer
from refusion_jax.errors import UserError, run_main
from refusion_jax.progress import Progress


def which_worker(environ: Mapping[str, str], given: str = "") -> tuple[int, int]:
    """(index, number) of this machine among those that prepare the same data.

    Args:
      environ: of the process; a Slurm array, an indexed job of a JobSet and a TPU pod say there which one it is.
      given: "I/N", which has the last word.

    Raises:
      UserError: no such worker.
    """
    if given:
        index, _, count = given.partition("/")
    elif "SLURM_ARRAY_TASK_ID" in environ:
        first = int(environ.get("SLURM_ARRAY_TASK_MIN", 0))
        index, count = int(environ["SLURM_ARRAY_TASK_ID"]) - first, environ["SLURM_ARRAY_TASK_COUNT"]
    elif "JOB_COMPLETION_INDEX" in environ:
        index, count = environ["JOB_COMPLETION_INDEX"], environ.get("JOB_COMPLETIONS", "1")
    elif "TPU_WORKER_ID" in environ:
        hosts = len(environ.get("TPU_WORKER_HOSTNAMES", "localhost").split(","))
        slices, slice_id = int(environ.get("MEGASCALE_NUM_SLICES", 1)), int(environ.get("MEGASCALE_SLICE_ID", 0))
        index, count = slice_id * hosts + int(environ["TPU_WORKER_ID"]), slices * hosts
    else:
        index, count = 0, 1
    try:
        index, count = int(index), int(count)
    except ValueError:
        raise UserError(f"--worker is {given!r}; give I/N, as 0/4 for the first of four.") from None
    if not 0 <= index < count:
        raise UserError(f"worker {index} of {count} is out of range: of N workers the indices are 0 to N - 1.")
    return index, count


def prepare(
    data: DataConfig,
    out: str | os.PathLike,
    *,
    processes: int = 1,
    worker: tuple[int, int] = (0, 1),
    shard_bytes: int = 0,
) -> bool:
    """Makes this worker's share of the stores of all sources of a config, and what is left when it is the last one.

    Args:
      out: folder or bucket.
      processes: of this machine.
      worker: index and number of the machines that do the same.
      shard_bytes: of text in a shard, about; 0: the default.

    Returns:
      Whether the stores are complete.

    Raises:
      UserError: `out` cannot be written, or bad data.
    """
    root = storage.as_path(out)
    configs = {json.dumps(describe(config)): config for config in (*data.train, *data.evaluation)}
    if not configs:
        raise UserError("there is no data source: config.data.train is empty. Put at least one source into it.")
    tokenizer = load_tokenizer(data.tokenizer)
    storage.check_writable(root, "--out")
    begun = []
    with tempfile.TemporaryDirectory() as notes, several(processes) as mapped:
        try:
            for config in configs.values():
                begun.append(begin(open_source(config), tokenizer, root, pathlib.Path(notes), shard_bytes, worker))
                fill(config, data.tokenizer, *begun[-1], worker, mapped)
            # Of all sources once more: who is the last one of one source need not be that of another.
            complete = all([finish(folder, planned) for folder, planned in begun])
        except OSError as error:
            raise UserError(
                f"The store in {out} cannot be written: {error.strerror or error}. What is finished is kept: make "
                "room, or fix the permissions, and start again."
            ) from error
        if complete:
            settings = dict(max_length=data.max_length, max_examples_per_row=data.max_examples_per_row)
            settings |= dict(response_multiple=data.response_multiple, cache_dir="", store=out, mapped=mapped)
            for sources, shuffle in ((data.train, True), (data.evaluation, False)):
                if sources:
                    print(pipeline.load_rows(sources, tokenizer, shuffle=shuffle, **settings).report, file=sys.stderr)
    return complete


def begin(
    source: Source,
    tokenizer: Tokenizer,
    root: epath.Path,
    notes: pathlib.Path,
    shard_bytes: int,
    worker: tuple[int, int],
) -> tuple[epath.Path, dict]:
    """A source's folder and plan, which is written down there."""
    planned = preparation.plan(source, tokenizer, notes, shard_bytes)
    folder = preparation.folder_of(source, tokenizer, root, notes)
    if worker[1] == 1:  # else they may be of workers that run now
        preparation.remove_parts(folder)
    preparation.write_plan(folder, planned)
    return folder, planned


def fill(
    config: SourceConfig, tokenizer: str, folder: epath.Path, planned: dict, worker: tuple[int, int], mapped: Callable
) -> None:
    """Makes this worker's shards of a source."""
    mine = range(worker[0], len(planned["shards"]), worker[1])
    progress = Progress(f"tokenising {planned['source']}: shard", len(mine))
    shard = functools.partial(_shard, config, tokenizer, planned["shards"], folder)
    for done, made in enumerate(mapped(shard, mine), 1):
        progress.begun += not made
        progress.show(done)
    progress.say(f"{planned['source']}: this worker's {len(mine)} shards are finished")


def finish(folder: epath.Path, planned: dict) -> bool:
    """Makes a source's index if the shards of all workers are there; whether they are."""
    store, name = preparation.write_index(folder, planned), planned["source"]
    if store is None:
        print(f"{name}: some shards of other workers are not finished", file=sys.stderr)
        return False
    preparation.remove_parts(folder, "shard-*")
    print(f"{name}: {len(store):,} examples, {store.num_tokens:,} tokens in {folder}", file=sys.stderr)
    return True


def _shard(config: SourceConfig, tokenizer: str, units: list, folder: epath.Path, number: int) -> bool:
    """Makes a shard unless it is there; whether it made one."""
    if preparation.finished(folder, number):
        return False
    preparation.make_shard(_source(config), _tokenizer(tokenizer), units[number], shard_path(folder, number))
    return True


_source = functools.lru_cache(open_source)  # once in each process
_tokenizer = functools.lru_cache(load_tokenizer)


@contextlib.contextmanager
def several(processes: int) -> Iterator[Callable]:
    """Gives a `map` that works in so many processes; they end with this one, however it ends."""
    if processes == 1:
        yield map
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_end_with_parent
    )
    try:
        yield pool.map
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError(
            "A process that prepares data was killed, perhaps for want of memory. What is finished is kept: start "
            "again, with fewer --processes."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are as many as the cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    found = argparse.ArgumentParser(
        prog="python -m refusion_jax.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(found)
    found.add_argument("--out", required=True, metavar="STORE", help="folder, or bucket")
    found.add_argument("--processes", type=int, default=os.cpu_count(), help="on this machine (default: its cores)")
    found.add_argument("--worker", default="", metavar="I/N", help="which of N machines this is, counted from 0")
    found.add_argument("--shard-mib", type=float, default=256, help="text in a shard, MiB (default 256)")
    return found


def main() -> None:
    arguments, config = parse_config(parser())
    if arguments.processes < 1 or not 0 < arguments.shard_mib < math.inf:
        raise UserError(
            f"--processes is {arguments.processes} and --shard-mib {arguments.shard_mib}; both must be greater than 0, "
            "and finite."
        )
    prepare(
        config.data,
        arguments.out,
        processes=arguments.processes,
        worker=which_worker(os.environ, arguments.worker),
        shard_bytes=max(int(arguments.shard_mib * 2**20), 1),
    )


if __name__ == "__main__":
    run_main(main)
