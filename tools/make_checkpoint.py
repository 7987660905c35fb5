"""Writes a random Qwen3 checkpoint in Hugging Face layout: a stand-in for a large one where there is no network.

python tools/make_checkpoint.py DST --size 1.7b --dtype bfloat16
python tools/make_checkpoint.py DST --size 8b --layers 2 --vocab-rows 151671 --tokenizer Qwen/Qwen3-0.6B
"""

import argparse
import dataclasses
import json
import pathlib

import numpy as np

from refusion_jax.checkpoint import huggingface, safetensors, stream
from refusion_jax.checkpoint.convert import DTYPES, new_folder
from refusion_jax.data.tokenizers import load_tokenizer
from refusion_jax.errors import run_main
from refusion_jax.model.config import ModelConfig, qwen3, to_huggingface


def write(
    folder: pathlib.Path, config: ModelConfig, dtype: np.dtype, seed: int = 0, shard_bytes: int = 4_000_000_000
) -> None:
    """Fills a folder with random weights, piece by piece: norms around 1, the rest with standard deviation 0.02."""
    tensors = huggingface.in_file_order(config)
    writer = safetensors.Writer(folder, [(name, dtype, p.tensor_shape) for name, p in tensors], shard_bytes)
    rng = np.random.default_rng(seed)
    for name, parameter in tensors:
        rows, *rest = parameter.tensor_shape
        step = max(1, (16 << 20) // int(np.prod(rest, dtype=np.int64)))
        for start, stop in stream.row_ranges(rows, step):
            values = 0.02 * rng.standard_normal((stop - start, *rest), np.float32)
            writer.write(name, values + 1 if "norm" in name else values, row=start)
    writer.close()
    (folder / "config.json").write_text(json.dumps(to_huggingface(config, dtype.name), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", type=pathlib.Path)
    parser.add_argument("--size", default="0.6b", help="a published size: 0.6b, 1.7b, 4b, 8b, 14b, 32b")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--layers", type=int, default=0, help="another number of layers")
    parser.add_argument("--hidden", type=int, default=0, help="another hidden size, mlp three times as wide")
    parser.add_argument("--vocab-rows", type=int, default=0, help="another number of rows of the tables")
    parser.add_argument(
        "--tokenizer", default="", help="folder or name whose tokenizer files are put beside the weights"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = qwen3(args.size)
    sizes = {
        "num_layers": args.layers,
        "hidden_size": args.hidden,
        "intermediate_size": 3 * args.hidden,
        "vocab_size": args.vocab_rows,
    }
    changes = {name: value for name, value in sizes.items() if value}
    if args.vocab_rows:  # special ids are the tokenizer's to say
        changes |= dict(
            logical_vocab_size=0, mask_token_id=None, begin_token_id=None, eos_token_id=None, pad_token_id=None
        )
    config = dataclasses.replace(config, **changes)
    with new_folder(args.destination, print) as folder:
        write(folder, config, DTYPES[args.dtype], args.seed)
        if args.tokenizer:
            load_tokenizer(args.tokenizer).save(folder)
    print(f"wrote {args.destination}: {config.num_params():,} parameters in {args.dtype}")


if __name__ == "__main__":
    run_main(main)
