"""Compiles the programs of the tables in tools/README.md and prints them: `python tools/compile_table.py`.

Figures are kept in tools/compiled/, one JSON a program; only what is missing there is compiled (minutes each;
--again NAME compiles anew). The commands that are run are printed: each line of the table can be made by itself.
"""

import argparse
import json
import pathlib
import re
import shlex
import subprocess
import sys

FOLDER = pathlib.Path(__file__).resolve().parent / "compiled"
# `data` inside a slice keeps fsdp's group smaller than the slice, for gradients to be reduce-scattered (README.md).
TRAIN = {
    "8b-v5e-16x16": "--config configs/8b.py --topology v5e:16x16 --config.mesh.data=4",
    "8b-v5p-4x4x4": "--config configs/8b.py --topology v5p:4x4x4 --config.mesh.data=4 --config.model.remat=minimal",
    "8b-v6e-8x8": "--config configs/8b.py --topology v6e:8x8 --config.mesh.data=2 --config.accumulation=2",
    "8b-tpu7x-4x4x4": "--config configs/8b.py --topology tpu7x:4x4x4 --config.mesh.data=2 --config.model.remat=minimal",
    "8b-v5p-4x4x4-2slices": "--config configs/8b.py --topology v5p:4x4x4 --slices 2 --config.mesh.data=8 "
    "--config.model.remat=minimal",
    "1p7b-v5e-4x4": "--config configs/1p7b.py --topology v5e:4x4 --config.accumulation=16 --config.model.remat=minimal",
    "32b-v5p-8x8x4": "--config configs/32b.py --topology v5p:8x8x4 --config.mesh.data=4 --config.model.remat=minimal",
}
# Several copies of the weights where there is room for them and for the cache: with fewer shards less is sent.
DECODE = {
    f"8b-decode-{chip}-2x4-{batch}": f"--config configs/8b.py --topology {chip}:2x4 --decode --batch {batch} "
    f"--config.mesh.data={copies} --config.mesh.fsdp=1 --config.mesh.tensor=-1"
    for chip, batch, copies in (
        ("v5e", 1, 1),
        ("v5e", 32, 2),
        ("v5e", 256, 2),
        ("v6e", 1, 1),
        ("v6e", 32, 4),
        ("v6e", 256, 4),
    )
}


def compiled(name: str, arguments: str, again: bool) -> dict | None:
    """The figures of a program, compiled if need be; None where that failed (the reason is on stderr)."""
    path = FOLDER / f"{name}.json"
    if again or not path.exists():
        FOLDER.mkdir(exist_ok=True)
        command = [sys.executable, "tools/compile_step.py", *shlex.split(arguments), "--json", str(path)]
        print("+ python", shlex.join(command[1:]), file=sys.stderr, flush=True)
        if subprocess.run(command, cwd=FOLDER.parent.parent, stdout=sys.stderr).returncode:
            return None
    return json.loads(path.read_text())


def cells(result: dict) -> list[str]:
    """The columns that training and decoding share."""
    gib = lambda size: f"{size / 2**30:.1f}"
    mesh = " x ".join(str(size) for size in result["mesh"].values())
    config = re.search(r"configs/(\w+)", result["program"]).group(1)
    sent = sum(row["bytes"] for row in result["collectives"] if not row["conditional"])
    seconds = result["seconds"]
    milliseconds = lambda name: f"{seconds[name] * 1e3:.{0 if seconds[name] > 0.01 else 1}f}"
    return [
        f"{config}, {result['topology']}",
        result["settings"],
        mesh,
        gib(result["argument_bytes"]),
        gib(result["temporary_bytes"]),
        f"{gib(result['peak_bytes'])} of {gib(result['chip_bytes'])}",
        f"{sent / 1e9:.1f}",
        *map(milliseconds, ("compute", "memory", "interconnect")),
        seconds["limit"],
    ]


def table(results: list[dict], title: str) -> str:
    """Markdown."""
    head = [
        title,
        "settings",
        "data x fsdp x tensor",
        "arguments, GiB",
        "temporaries, GiB",
        "peak, GiB",
        "sent, GB",
        "compute, ms",
        "memory, ms",
        "interconnect, ms",
        "limit",
        "MFU at most",
    ]
    rows = [[*cells(result), f"{result['mfu_bound']:.2f}"] for result in results]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--again", action="append", default=[], metavar="NAME", choices=[*TRAIN, *DECODE], help="compile that one anew"
    )
    arguments = parser.parse_args()
    for title, programs in (("training step", TRAIN), ("decoding, one forward", DECODE)):
        results = [compiled(name, line, name in arguments.again) for name, line in programs.items()]
        print(table([result for result in results if result], title), end="\n\n")


if __name__ == "__main__":
    main()
