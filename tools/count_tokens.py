"""Counts the ids of a config's training data: `python tools/count_tokens.py --config FILE --out counts.npy`.

For the spindle schedule of masked diffusion (`config.objective.counts`). One epoch is counted, with filling and without
padding.
"""

import argparse
import pathlib

import numpy as np

from refusion_jax.config import add_config_arguments, parse_config
from refusion_jax.data.tokenizers import load_tokenizer
from refusion_jax.errors import run_main
from refusion_jax.train import open_data, with_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="FILE.npy")
    arguments, config = parse_config(parser)
    tokenizer = load_tokenizer(config.data.tokenizer)
    config = with_tokenizer(config, tokenizer)
    rows, _ = open_data(config, tokenizer, arguments.out.parent)
    counts = np.zeros(config.model.logical_vocab_size, np.int64)
    for i in range(rows.rows_per_epoch):
        row = rows[i]
        counts += np.bincount(row["tokens"][: row["lengths"].sum()], minlength=len(counts))
    np.save(arguments.out, counts)
    print(f"{arguments.out}: {counts.sum():,} tokens, {np.sum(counts > 0)} of {len(counts)} ids")


if __name__ == "__main__":
    run_main(main)
