"""The collectives of a compiled program: what each device sends, how often, and over which mesh axes.

A collective that XLA runs asynchronously may stand in the text several times under one channel; it counts once.
"""

import dataclasses
import re

import hlo
import numpy as np
from jax.sharding import Mesh

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


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


def collective_list(program: hlo.Program, mesh: Mesh) -> list[Collective]:
    """The collectives of a compiled program, those inside one device left out."""
    counts, certain = program.run_counts(), program.run_counts(branches=False)
    found: dict[object, Collective] = {}
    for name, lines in program.computations.items():
        for i in lines.values():
            if counts[name] and i.opcode == "send" and "_xla_megascale_transfer_type" in i.text:
                found[name, i.name] = _between_slices(i, mesh, counts[name], not certain[name])
            kind = i.opcode.removesuffix("-start")
            if kind not in KINDS or not counts[name]:
                continue
            group = _group(i.text, mesh.size)
            axes = _axes(group, mesh)
            if not axes:
                continue
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # TPU fuses the pair
            channel = re.search(r"channel_id=(\d+)", i.text)
            source = re.search(r'op_name="([^"]*)"', i.text)
            new = Collective(
                kind,
                axes,
                tuple(shape[:2] for shape in i.shapes),
                _sent(kind, sum(_size(lines[operand]) for operand in i.operands), len(group)),
                counts[name],
                not certain[name],
                False,
                source.group(1) if source else "",
            )
            key = channel.group(1) if channel else (name, i.name)
            old = found.get(key)
            found[key] = new if old is None or new.bytes * new.runs > old.bytes * old.runs else old
    return list(found.values())


def _size(i: hlo.Instruction) -> int:
    """Bytes of a result, wherever it lies."""
    return sum(hlo.array_bytes(kind, dims) for kind, dims, _ in i.shapes)


def _sent(kind: str, size: int, devices: int) -> float:
    """Bytes that one of so many devices sends of an operand of that size.

    Not of a result's: those of asynchronous forms name the operand too.
    """
    share = (devices - 1) / devices
    return {
        "all-gather": size * (devices - 1),
        "all-reduce": 2 * size * share,
        "reduce-scatter": size * share,
        "all-to-all": size * share,
        "collective-permute": size,
    }[kind]


def _between_slices(send: hlo.Instruction, mesh: Mesh, runs: int, conditional: bool) -> Collective:
    """A collective that TPU slices do over the network through their hosts: a send of one device's part."""
    slices = np.vectorize(lambda d: d.slice_index)(mesh.devices)
    count = len(np.unique(slices))
    axes = tuple(name for i, name in enumerate(mesh.axis_names) if np.ptp(slices, axis=i).any())
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.text).group(1).lower().replace("_", "-")
    shapes = tuple(shape[:2] for shape in send.shapes[:1])
    size = sum(hlo.array_bytes(*a) for a in shapes)
    source = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', send.text)
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
