"""Says what is in a checkpoint, of a run, a conversion or in Hugging Face layout, without loading it.

python tools/inspect_checkpoint.py runs/tiny [--step 400] [--config]
python tools/inspect_checkpoint.py Qwen/Qwen3-0.6B
"""

import argparse
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
from absl import logging  # noqa: E402
from flax import traverse_util  # noqa: E402

from refusion_jax import storage  # noqa: E402
from refusion_jax.checkpoint import load, orbax, safetensors  # noqa: E402
from refusion_jax.errors import UserError, run_main  # noqa: E402
from refusion_jax.model.config import read_huggingface  # noqa: E402


def size(count: float) -> str:
    return next(
        f"{count / unit:.2f} {name}"
        for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
        if count >= unit or unit == 1
    )


def on_disk(folder: pathlib.Path) -> str:
    return size(storage.folder_bytes(folder))


def show_arrays(arrays: Iterable[tuple[str, tuple[int, ...], np.dtype, int]]) -> None:
    """One line for (name, shape, dtype, how many of them) each, and their sum."""
    arrays = list(arrays)
    width = max((len(name) for name, *_ in arrays), default=0)
    values = total = 0
    for name, shape, dtype, count in arrays:
        dtype, number = np.dtype(dtype), count * math.prod(shape)
        values, total = values + number, total + number * dtype.itemsize
        times = f" x {count}" if count > 1 else ""
        print(
            f"  {name:{width}}  {'x'.join(map(str, shape)) + times:>24}  {dtype.name:9} "
            f"{size(number * dtype.itemsize):>10}"
        )
    print(f"  {values:,} values, {size(total)}")


def inspect_orbax(folder: pathlib.Path, step: int | None, whole_config: bool) -> None:
    meta = orbax.read_meta(folder, step)
    path = orbax.checkpoint_path(folder, step)
    print(
        f"{folder}: checkpoint folder; complete steps {', '.join(map(str, orbax.steps_in(folder)))}; shown is step "
        f"{meta['step']}"
    )
    adapted = load.adapters_of(meta)
    holds = "a whole model" if adapted is None else f"adapters of rank {adapted[0].rank} on {adapted[1]}"
    print(f"format {meta['format']}, holds {holds}; tokenizer {meta['tokenizer'] or 'none'}")
    if meta.get("rows"):
        print("rows      " + ", ".join(f"{name} {value}" for name, value in meta["rows"].items()))
    print("model     " + ", ".join(f"{name} {value}" for name, value in meta["model"].items()))
    print("versions  " + ", ".join(f"{name} {value}" for name, value in meta["versions"].items()))
    for item in sorted(p for p in path.iterdir() if p.is_dir()):
        print(f"{item.name:9} {on_disk(item)} on disk")
        if item.name == "params":
            with ocp.StandardCheckpointer() as checkpointer:
                tree = traverse_util.flatten_dict(checkpointer.metadata(item).item_metadata.tree, sep="/")
            show_arrays((name, array.shape, array.dtype, 1) for name, array in tree.items())
        elif item.name == "data":
            print(f"  {(item / 'metadata').read_text()}")
    if whole_config:
        print("config\n" + json.dumps(meta["config"], indent=1))
    elif meta["config"]:
        print("config    of the run: --config shows it")


def inspect_huggingface(folder: pathlib.Path, whole_config: bool) -> None:
    config = read_huggingface(folder / "config.json")
    tensors, problems = safetensors.read_folder(folder)
    files = sorted({t.file for t in tensors.values()})
    print(
        f"{folder}: Hugging Face layout; {config.get('architectures')}, {len(tensors)} tensors in "
        f"{', '.join(f.name for f in files)}"
    )
    plain = {name: value for name, value in config.items() if isinstance(value, (int, float, str)) or value is None}
    print("config    " + ", ".join(f"{name} {value}" for name, value in plain.items()))
    print("tokenizer " + (", ".join(name for name in load.TOKENIZER_FILES if (folder / name).exists()) or "none"))
    grouped: dict[tuple, int] = {}
    for name, tensor in tensors.items():
        key = re.sub(r"\.\d+\.", ".{}.", name), tensor.shape, tensor.dtype
        grouped[key] = grouped.get(key, 0) + 1
    show_arrays((*key, count) for key, count in grouped.items())
    if whole_config:
        print(json.dumps(config, indent=1))
    if problems:
        raise UserError(
            f"The weights in {folder} are damaged, {safetensors.listed(problems)} Download or export the folder again."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder, or name on the Hugging Face hub")
    parser.add_argument("--step", type=int, default=None, help="of a checkpoint folder; the last unless given")
    parser.add_argument("--config", action="store_true", help="also show the whole config")
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)  # Orbax warns that `params` alone is no whole checkpoint
    folder = load.locate(args.source)
    if load.is_orbax(folder):
        inspect_orbax(folder, args.step, args.config)
    else:
        inspect_huggingface(folder, args.config)


if __name__ == "__main__":
    run_main(main)
