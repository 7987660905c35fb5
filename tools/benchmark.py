"""Measures what the project does on the devices at hand.

python tools/benchmark.py train --config configs/tiny.py --remat none,full
python tools/benchmark.py decode --help
python tools/benchmark.py serve --help     the server, beside decoding without it
python tools/benchmark.py peer --help      beside PyTorch, on a CPU
python tools/benchmark.py data --help      preparing data, and rows of very many examples
"""

import importlib
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from refusion_jax.errors import run_main

WHAT = ("train", "decode", "serve", "peer", "data")

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in WHAT:
        print(__doc__ + f"\nchoose one of: {', '.join(WHAT)} (each has --help)")
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    what = sys.argv.pop(1)
    sys.argv[0] += " " + what
    run_main(importlib.import_module(f"benchmark_{what}").main)
