"""Compiles the programs of the README's table and prints it: `python tools/compile_table.py`.

Figures are kept in tools/compiled/, one JSON a program; only what is missing there is compiled (minutes each; --again NAME
compiles anew). The commands that are run are printed: each line of the table can be made by itself.
"""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys

FOLDER = pathlib.Path(__file__).resolve().parent / "compiled"
TRAIN = {
    "8b-v5e-16x16": "--config configs/8b.py --topology v5e:16x16",
    "8b-v5p-4x4x4": "--config configs/8b.py --topology v5p:4x4x4 --config.model.remat=minimal",
    "8b-v6e-8x8": "--config configs/8b.py --topology v6e:8x8",
    "8b-tpu7x-4x4x4": "--config configs/8b.py --topology tpu7x:4x4x4 --config.model.remat=minimal",
    "8b-v5p-4x4x4-2slices": "--config configs/8b.py --topology v5p:4x4x4 --slices 2 --config.mesh.data=2 --config.model.remat=minimal",
    "1p7b-v5e-4x4": "--config configs/1p7b.py --topology v5e:4x4 --config.accumulation=8 --config.model.remat=minimal",
    "32b-v5p-8x8x4": "--config configs/32b.py --topology v5p:8x8x4 --config.mesh.data=4 --config.model.remat=minimal",
}
DECODE = {
    f"8b-decode-{chip}-2x4-{batch}": f"--config configs/8b.py --topology {chip}:2x4 --decode --batch {batch} --config.mesh.fsdp=1 --config.mesh.tensor=-1"
    for chip in ("v5e", "v6e")
    for batch in (1, 32, 256)
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
    """The columns that training and decoding share, after the topology."""
    gib = lambda size: f"{size / 2**30:.1f}"
    mesh = " x ".join(str(size) for size in result["mesh"].values())
    sent = sum(row["bytes"] for row in result["collectives"] if not row["conditional"])
    seconds = result["seconds"]
    return [
        str(result["devices"]), mesh, gib(result["argument_bytes"]), gib(result["temporary_bytes"]), f"{gib(result['peak_bytes'])} of {gib(result['chip_bytes'])}",
        f"{sent / 1e9:.1f}", *(f"{seconds[name] * 1e3:.0f}" for name in ("compute", "memory", "interconnect")), seconds["limit"],
    ]  # fmt: skip


def table(results: dict[str, dict], title: str, extra: str) -> str:
    """Markdown; `extra` is the last column: "mfu_bound" or "tokens_per_second"."""
    last = {"mfu_bound": "MFU at most", "compile_seconds": "compile, s"}
    head = [title, "devices", "data x fsdp x tensor", "arguments, GiB", "temporaries, GiB", "peak, GiB", "sent, GB", "compute, ms", "memory, ms", "interconnect, ms", "limit", last[extra]]
    rows = [[name, *cells(result), f"{result[extra]:.2f}" if extra == "mfu_bound" else f"{result[extra]:.0f}"] for name, result in results.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="append", default=[], metavar="NAME", choices=[*TRAIN, *DECODE], help="compile that one anew")
    arguments = parser.parse_args()
    for title, programs, extra in (("training step", TRAIN, "mfu_bound"), ("decoding, one forward", DECODE, "compile_seconds")):
        results = {name: compiled(name, line, name in arguments.again) for name, line in programs.items()}
        print(table({name: result for name, result in results.items() if result}, title, extra), end="\n\n")


if __name__ == "__main__":
    main()
