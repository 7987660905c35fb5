"""What an optimised XLA program communicates: collectives with their bytes and the mesh axes they cross.

Reads the text of a compiled program. A loop's body stands there once, so everything in it is multiplied by the loop's trip
count; a collective that XLA runs asynchronously stands there several times under one channel, and counts once.
"""

import collections
import dataclasses
import functools
import math
import re

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(r"^\s*(?:ROOT )?%?(\S+) = (.*?) (" + "|".join(KINDS) + r")(?:-start)?\(")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+)\[([\d,]*)\]")
_CALL = re.compile(r"\b(?:calls|to_apply|condition|body|async_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations=\{([^}]*)\}|true_computation=(\S+), false_computation=(\S+))")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of KINDS.
      axes: the mesh axes it crosses.
      shapes: of its result on one device, as (type, dimensions).
      bytes: that one device sends in one run.
      runs: how often it runs per call of the program. In a loop without a fixed trip count: once per round.
      conditional: whether it runs in a branch that may not be taken.
      between_slices: whether it goes over the network that joins TPU slices.
      source: where in the traced program it comes from.
    """

    kind: str
    axes: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    bytes: float
    runs: int
    conditional: bool
    between_slices: bool
    source: str


def arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Every (type, dimensions) named in a piece of a program's text."""
    return [(kind, tuple(int(d) for d in dims.split(",") if d)) for kind, dims in _ARRAY.findall(text)]


def array_bytes(kind: str, dims: tuple[int, ...]) -> int:
    bits = 8 if kind == "pred" else 8 if kind.startswith("f8") else int(re.search(r"\d+", kind).group())
    return math.prod(dims) * bits // 8


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation; the entry under the name "ENTRY"."""
    result: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            lines = result.setdefault("ENTRY" if line.startswith("ENTRY") else line.split()[0].lstrip("%"), [])
        elif line.startswith(" "):
            lines.append(line)
    return result


def run_counts(bodies: dict[str, list[str]], *, branches: bool = True) -> dict[str, int]:
    """How often each computation runs per call of the program, with or without those inside conditionals."""
    callers = collections.defaultdict(list)
    for name, lines in bodies.items():
        for line in lines:
            factor = _trip_count(line, bodies) if " while(" in line else 1
            chosen = [
                name.strip(" %,")
                for match in _BRANCHES.findall(line)
                for part in match
                if part
                for name in part.split(",")
            ]
            for callee in _CALL.findall(line) + (chosen if branches else []):
                callers[callee].append((name, factor))

    @functools.cache
    def runs(name: str) -> int:
        return 1 if name == "ENTRY" else sum(runs(caller) * factor for caller, factor in callers[name])

    return {name: runs(name) for name in bodies}


def _trip_count(line: str, bodies: dict[str, list[str]]) -> int:
    """Of a while loop: what XLA knows, or that of a plain loop counting from 0 by a constant to a constant, else 1."""
    known = re.search(r"known_trip_count\D*(\d+)", line)
    if known:
        return int(known.group(1))
    condition, body = (
        bodies.get(re.search(rf"{part}=%?([\w.-]+)", line).group(1), []) for part in ("condition", "body")
    )
    condition = condition + [
        inner for outer in condition for callee in _CALL.findall(outer) for inner in bodies.get(callee, [])
    ]
    bounds = [int(n) for inner in condition for n in re.findall(r"[su]32\[\]\S* constant\((\d+)\)", inner)]
    compares = [inner for inner in condition if " compare(" in inner]
    if len(bounds) != 1 or len(compares) != 1 or "direction=LT" not in compares[0]:
        return 1
    # The counter is the loop's state number `index`; the body's last line shows what it becomes.
    counter = next(
        (int(i) for inner in condition for i in re.findall(r"[su]32\[\]\S* get-tuple-element\(.*index=(\d+)", inner)),
        None,
    )
    define = {match.group(1): inner for inner in body if (match := re.match(r"\s*(?:ROOT )?(%?\S+) = ", inner))}
    state = next(
        (
            re.findall(r"%[\w.-]+", inner.split(" tuple(")[1])
            for inner in body
            if inner.lstrip().startswith("ROOT") and " tuple(" in inner
        ),
        [],
    )
    new = define.get(state[counter], "") if counter is not None and counter < len(state) else ""
    added = re.findall(r"%[\w.-]+", new.split(" add(")[1]) if " add(" in new else []
    step = next((int(n) for name in added for n in re.findall(r"constant\((\d+)\)", define.get(name, ""))), 1)
    return -(-bounds[0] // max(step, 1))


def collective_list(text: str, mesh: Mesh) -> list[Collective]:
    """The collectives of a compiled program's text (`compiled.as_text()`), those inside one device left out."""
    bodies = computations(text)
    counts, certain = run_counts(bodies), run_counts(bodies, branches=False)
    found: dict[object, Collective] = {}
    for name, lines in bodies.items():
        for number, line in enumerate(lines):
            if counts[name] and "_xla_megascale_transfer_type" in line and " send(" in line:
                found[name, number] = _between_slices(line, mesh, counts[name], not certain[name])
            match = _COLLECTIVE.match(line)
            if not match or not counts[name]:
                continue
            _, result, kind = match.groups()
            group = _group(line, mesh.size)
            axes = _axes(group, mesh)
            if not axes:
                continue
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # TPU fuses the pair; the line names the whole array
                size = sum(array_bytes(*a) for a in arrays(result)) / len(group)
            else:
                shapes = arrays(result)
                # An asynchronous start names its operand too, and words of state.
                size = (
                    max(array_bytes(*a) for a in shapes)
                    if f"{kind}-start(" in line and kind != "all-reduce"
                    else sum(array_bytes(*a) for a in shapes)
                )
            others = len(group) - 1
            sent = {
                "all-gather": size * others / len(group),
                "all-reduce": 2 * size * others / len(group),
                "reduce-scatter": size * others,
                "all-to-all": size * others / len(group),
                "collective-permute": size,
            }[kind]
            channel = re.search(r"channel_id=(\d+)", line)
            source = re.search(r'op_name="([^"]*)"', line)
            new = Collective(
                kind,
                axes,
                tuple(arrays(result)),
                sent,
                counts[name],
                not certain[name],
                False,
                source.group(1) if source else "",
            )
            key = channel.group(1) if channel else (name, number)
            old = found.get(key)
            found[key] = new if old is None or new.bytes * new.runs > old.bytes * old.runs else old
    return list(found.values())


def _between_slices(line: str, mesh: Mesh, runs: int, conditional: bool) -> Collective:
    """A collective that TPU slices do over the network through their hosts: a send of one device's part."""
    slices = np.vectorize(lambda d: d.slice_index)(mesh.devices)
    count = len(np.unique(slices))
    axes = tuple(name for i, name in enumerate(mesh.axis_names) if np.ptp(slices, axis=i).any())
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', line).group(1).lower().replace("_", "-")
    shapes = tuple(arrays(line.split(" send(")[0])[:1])
    size = sum(array_bytes(*a) for a in shapes)
    source = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', line)
    return Collective(
        kind,
        axes,
        shapes,
        2 * size * (count - 1) / count if kind == "all-reduce" else size,
        runs,
        conditional,
        True,
        source.group(1) if source else "",
    )


def _group(line: str, devices: int) -> list[int]:
    """One group of devices that a collective joins, as indices into the flattened mesh."""
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line)
    if pairs:
        return [int(pairs.group(1)), int(pairs.group(2))]
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return [int(i) for i in listed.group(1).split(",")]
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        shape = [int(i) for i in iota.group(3).split(",")]
        order = [int(i) for i in iota.group(4).split(",")] if iota.group(4) else range(len(shape))
        return list(np.arange(devices).reshape(shape).transpose(order).reshape(-1)[: int(iota.group(2))])
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", line
    )
    if named:
        sizes = {n: int(s) for n, s in re.findall(r"'([^']+)'=(\d+)", named.group(1))}
        ids = np.arange(devices)
        if named.group(2):
            ids = ids.reshape([int(i) for i in named.group(2).split(",")])
            ids = ids.transpose([int(i) for i in named.group(3).split(",")]) if named.group(3) else ids
        chosen = re.findall(r"'([^']+)'", named.group(4))
        grid = ids.reshape(list(sizes.values()))
        return list(grid[tuple(slice(None) if n in chosen else 0 for n in sizes)].reshape(-1))
    return list(range(devices))  # replica_groups={}: all


def _axes(group: list[int], mesh: Mesh) -> tuple[str, ...]:
    """Mesh axes along which the devices of a group differ."""
    places = np.stack(np.unravel_index(group, mesh.devices.shape))
    return tuple(name for name, row in zip(mesh.axis_names, places, strict=True) if len(set(row.tolist())) > 1)
