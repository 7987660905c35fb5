"""Compiles the programs of the tables in the README and prints these: `python tools/compile_table.py [NAME ...]`.

Figures are kept in tools/compiled/, one JSON a program; only what is missing there, or was made by an older form of
compile_step.py, is compiled (minutes each; --again compiles anew). The commands that are run are printed: each line of
the tables can be made by itself.
"""

import argparse
import json
import pathlib
import re
import shlex
import subprocess
import sys

FOLDER = pathlib.Path(__file__).resolve().parent / "compiled"
# `data` inside a slice keeps the group of fsdp smaller than the slice, so that gradients can be reduce-scattered.
TRAIN = {
    "8b-v5e-16x16": "--config configs/8b.py --topology v5e:16x16 --config.mesh.data=4",
    "8b-v5p-4x4x4": "--config configs/8b.py --topology v5p:4x4x4 --config.mesh.data=4 --config.model.remat=minimal",
    "8b-v6e-8x8": "--config configs/8b.py --topology v6e:8x8 --config.mesh.data=2 --config.accumulation=2",
    "8b-tpu7x-4x4x4": "--config configs/8b.py --topology tpu7x:4x4x4 --config.mesh.data=2 --config.model.remat=minimal",
    "8b-v5p-4x4x4-2slices": "--config configs/8b.py --topology v5p:4x4x4 --slices 2 --config.mesh.data=8 "
    "--config.model.remat=minimal",
    "1p7b-v5e-4x4": "--config configs/1p7b.py --topology v5e:4x4 --config.accumulation=16 --config.model.remat=minimal",
    "32b-v5p-8x8x4": "--config configs/32b.py --topology v5p:8x8x4 --config.mesh.data=4 --config.model.remat=minimal",
    "8b-h100-8": "--config configs/8b.py --topology h100:8 --config.accumulation=16",
    "8b-h100-2x8": "--config configs/8b.py --topology h100:2x8 --config.mesh.data=2 --config.accumulation=8",
    "1p7b-h100-1": "--config configs/1p7b.py --topology h100:1 --config.accumulation=128",
}
# Several copies of the weights where there is room for them and for the cache: with fewer shards less is sent.
COPIES = "--config.mesh.data={} --config.mesh.fsdp=1 --config.mesh.tensor=-1"
PLACES = {"v5e-2x4": f"--topology v5e:2x4 {COPIES.format(2)}", "h100-1": "--topology h100:1"}
DECODE = (
    {
        f"8b-decode-{chip}-2x4-{batch}": f"--config configs/8b.py --topology {chip}:2x4 --decode --batch {batch} "
        + COPIES.format(copies)
        for chip, batch, copies in (
            ("v5e", 1, 1),
            ("v5e", 32, 2),
            ("v5e", 256, 2),
            ("v6e", 1, 1),
            ("v6e", 32, 4),
            ("v6e", 256, 4),
        )
    }
    | {
        f"8b-{method}-h100-1-{batch}": "--config configs/8b.py --topology h100:1 "
        f"--decode --batch {batch} --method {method}"
        for method in ("plan_and_infill", "autoregressive")
        for batch in (1, 32)
    }
    | {
        f"8b-{name}-{place}-32": f"--config configs/8b.py --decode --batch 32 --method {flags} {PLACES[place]}"
        for place in PLACES
        for name, flags in (("masked", "masked"), ("masked-dual", "masked --cache dual"), ("block", "block"))
    }
)


def compiled(name: str, arguments: str, again: bool) -> dict | None:
    """The figures of a program, compiled if need be; None where that failed (the reason is on stderr)."""
    path = FOLDER / f"{name}.json"
    if again or not path.exists() or "kernels" not in json.loads(path.read_text()):
        FOLDER.mkdir(exist_ok=True)
        command = [sys.executable, "tools/compile_step.py", *shlex.split(arguments), "--json", str(path)]
        print("+ python", shlex.join(command[1:]), file=sys.stderr, flush=True)
        if subprocess.run(command, cwd=FOLDER.parent.parent, stdout=sys.stderr).returncode:
            return None
    return json.loads(path.read_text())


def row(result: dict) -> dict[str, str]:
    """A program's line, by column."""
    gib = lambda size: f"{size / 2**30:.1f}"
    sent = sum(row["bytes"] for row in result["collectives"] if not row["conditional"])
    seconds = result["seconds"]
    milliseconds = lambda name: f"{seconds[name] * 1e3:.{0 if seconds[name] > 0.01 else 1}f}"
    config = re.search(r"configs/(\w+)", result["program"]).group(1)
    return {
        "program": f"{config}, {result['topology']}",
        "settings": result["settings"],
        "data x fsdp x tensor": " x ".join(str(size) for size in result["mesh"].values()),
        "arguments, GiB": gib(result["argument_bytes"]),
        "temporaries, GiB": gib(result["temporary_bytes"]),
        "peak, GiB": f"{gib(result['peak_bytes'])} of {gib(result['chip_bytes'])}",
        "sent, GB": f"{sent / 1e9:.1f}",
        "kernels (per layer)": f"{result['kernels']:.0f} ({result['kernels_per_layer']:.1f})",
        "moved, GB (of formula)": f"{result['moved_bytes'] / 1e9:.1f} ({result['moved_ratio']:.2f})",
        "copied, GB": f"{result['copied_bytes'] / 1e9:.2f}",
        "open loops": f"{result['dynamic_loops']:g}",
        "compute, ms": milliseconds("compute"),
        "memory, ms": milliseconds("memory"),
        "interconnect, ms": milliseconds("interconnect"),
        "limit": seconds["limit"],
        "MFU at most": f"{result['mfu_bound']:.2f}",
        "compiled in, s": f"{result['compile_seconds']:.0f}",
    }


def table(results: list[dict]) -> str:
    """Markdown."""
    rows = [row(result) for result in results]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(cells.values()) for cells in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join([*TRAIN, *DECODE])}")
    parser.add_argument("--again", action="store_true", help="compile anew")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {*TRAIN, *DECODE}
    if unknown:
        parser.error(f"no such program: {', '.join(sorted(unknown))}")
    for title, programs in (("Training step; per microbatch", TRAIN), ("Decoding; per forward pass", DECODE)):
        names = [name for name in programs if name in (arguments.names or programs)]
        results = [compiled(name, programs[name], arguments.again) for name in names]
        if any(results):
            print(f"{title}:\n\n{table([result for result in results if result])}", end="\n\n")


if __name__ == "__main__":
    main()
