"""Converts weights between Hugging Face layout and this project's checkpoints, both ways, exactly.

    python tools/convert_qwen3.py to-orbax Qwen/Qwen3-0.6B runs/qwen3      a folder or a name on the Hugging Face hub
    python tools/convert_qwen3.py to-orbax Qwen/Qwen3-8B runs/small --quantise int8      for decoding in half the memory
    python tools/convert_qwen3.py to-hf runs/mine exported                 for PyTorch; the last step unless --step says

Memory stays at a piece of one parameter, whatever the model's size. Nothing appears at the destination until it is
whole.
"""

import argparse
import math
import os

os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is computed: leave accelerators to others

from absl import logging  # noqa: E402

from refusion_jax.checkpoint import convert  # noqa: E402
from refusion_jax.errors import UserError, run_main  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("to-orbax", "to-hf"):
        command = commands.add_parser(name)
        command.add_argument("source")
        command.add_argument("destination")
        command.add_argument(
            "--dtype", default="", choices=["", *convert.DTYPES], help="of the result; as in the source unless given"
        )
        command.add_argument("--dry-run", action="store_true", help="list what would be written, write nothing")
        if name == "to-orbax":
            command.add_argument(
                "--tokenizer", default="", help="'bytes', folder or name; the source's own unless given"
            )
            command.add_argument(
                "--new-tokens",
                default="source",
                choices=["source", "mean"],
                help="rows of the begin and mask token: as they are, or the mean of the others",
            )
            command.add_argument(
                "--vocab-rows",
                type=int,
                default=0,
                help="rows of the tables, if not as in the source (151680 lets a tensor axis of 8 divide the 151671 of "
                "the released ReFusion)",
            )
            command.add_argument(
                "--quantise",
                default="",
                choices=["int8"],
                help="matrices and tables in int8 with a scale for every output channel or row: half of bfloat16's "
                "memory, for decoding only",
            )
        else:
            command.add_argument("--step", type=int, default=None, help="of the checkpoint; the last unless given")
            command.add_argument("--shard-gb", type=float, default=4.0, help="largest file, in GB")
    args = parser.parse_args()
    logging.set_verbosity(
        logging.FATAL
    )  # Orbax logs its threads' errors as tracebacks; they arrive here as one paragraph
    if args.command == "to-orbax":
        convert.to_orbax(
            args.source,
            args.destination,
            dtype=args.dtype,
            tokenizer=args.tokenizer,
            new_tokens=args.new_tokens,
            vocab_rows=args.vocab_rows,
            quantise=args.quantise,
            dry_run=args.dry_run,
        )
    else:
        if not 0 < args.shard_gb < math.inf:
            raise UserError(f"--shard-gb is {args.shard_gb}; it must be greater than 0, and finite.")
        convert.to_huggingface(
            args.source,
            args.destination,
            step=args.step,
            dtype=args.dtype,
            shard_bytes=int(args.shard_gb * 1e9),
            dry_run=args.dry_run,
        )


if __name__ == "__main__":
    run_main(main)
