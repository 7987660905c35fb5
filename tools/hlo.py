"""What an optimised XLA program does, read from its text: kernels, bytes moved and copied, loops, collectives.

A loop's body stands in the text once, so everything in it is multiplied by the loop's trip count.

The bytes that a kernel moves are its operands and results, but of an operand that is only sliced or looked up, the
slice; and of a result that is an operand changed in place, the change. Only what lies in main memory counts.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?(\S+) = (.*?) ([a-z][a-z0-9-]*)\(")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+)\[([\d,]*)\](?:\{[^}]*?(S\(\d+\))?[^}S]*\})?")
_CALL = re.compile(r"\b(?:calls|to_apply|condition|body|async_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations=\{([^}]*)\}|true_computation=(\S+), false_computation=(\S+))")

# Instructions that only name or group what exists, and the ends of what has been started.
_NO_KERNEL = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|after-all|add-dependency|optimization-barrier|partition-id|"
    r"replica-id|domain|.*-done|.*-update(?<!dynamic-update)"
)
_SLICES = ("slice", "dynamic-slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # and the operand that holds what changes
_PASSES = ("copy", "transpose", "convert", "reshape", "bitcast", *_SLICES[:2])
_CALLERS = ("while", "conditional", "call", "async-start")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      shapes: arrays of the result, as (type, dimensions, whether in the device's main memory).
      operands: names.
      text: the whole line.
    """

    name: str
    opcode: str
    shapes: tuple[tuple[str, tuple[int, ...], bool], ...]
    operands: tuple[str, ...]
    text: str
    root: bool

    @functools.cached_property
    def bytes(self) -> int:
        """Of the result, where it lies in main memory."""
        return sum(array_bytes(kind, dims) for kind, dims, main in self.shapes if main)

    @functools.cached_property
    def elements(self) -> int:
        return sum(math.prod(dims) for _, dims, _ in self.shapes)

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Computations that it calls, branches not included."""
        return tuple(_CALL.findall(self.text))

    @functools.cached_property
    def branches(self) -> tuple[str, ...]:
        """Computations of which it calls one."""
        found = [part for match in _BRANCHES.findall(self.text) for part in match if part]
        return tuple(name for part in found for name in re.findall(r"[\w.-]+", part))

    @functools.cached_property
    def index(self) -> int:
        """Of a parameter, or of the element that a get-tuple-element takes."""
        pattern = r"parameter\((\d+)\)" if self.opcode == "parameter" else r"index=(\d+)"
        return int(re.search(pattern, self.text).group(1))


@dataclasses.dataclass(frozen=True)
class Work:
    """What a piece of a program does on one device, loops multiplied out; of branches, the one that moves least.

    Attributes:
      kernels: that are launched, collectives included.
      moved_bytes: that they read and write in main memory.
      copied_bytes: of the program's arguments, or slices of them, that are written again, at most in another type.
      dynamic_loops: loops whose number of rounds the compiler does not know, and
      conditionals: branches on a value. On a GPU the host waits for the device at each of both.
    """

    kernels: int
    moved_bytes: int
    copied_bytes: int
    dynamic_loops: int
    conditionals: int


def arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Every (type, dimensions) named in a piece of a program's text."""
    return [(kind, tuple(int(d) for d in dims.split(",") if d)) for kind, dims, _ in _ARRAY.findall(text)]


def array_bytes(kind: str, dims: tuple[int, ...]) -> int:
    bits = 8 if kind == "pred" else 8 if kind.startswith("f8") else int(re.search(r"\d+", kind).group())
    return math.prod(dims) * bits // 8


def instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if not match:
        return None
    root, name, result, opcode = match.groups()
    depth, end = 1, match.end()
    while depth and end < len(line):
        depth += {"(": 1, ")": -1}.get(line[end], 0)
        end += 1
    shapes = tuple(
        (kind, tuple(int(d) for d in dims.split(",") if d), space in ("", "S(0)"))
        for kind, dims, space in _ARRAY.findall(result)
    )
    operands = tuple(re.findall(r"%([\w.-]+)", line[match.end() : end]))
    return Instruction(name, opcode, shapes, operands, line, bool(root))


class Program:
    """A compiled program's text (`compiled.as_text()`), taken apart.

    Attributes:
      computations: the instructions of each computation by name; the entry under the name "ENTRY".
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        lines: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith((" ", "HloModule")):
                lines = self.computations.setdefault(
                    "ENTRY" if line.startswith("ENTRY") else line.split()[0].lstrip("%"), {}
                )
            elif line.startswith(" ") and (found := instruction(line)):
                lines[found.name] = found
        self._callers = {
            callee: (name, i)
            for name, lines in self.computations.items()
            for i in lines.values()
            if i.opcode in _CALLERS
            for callee in (*i.called, *i.branches)
        }
        self._held: dict[tuple[str, str], object] = {}

    def instructions(self, computation: str) -> Iterator[Instruction]:
        return iter(self.computations.get(computation, {}).values())

    def parameters(self, computation: str) -> list[Instruction]:
        return sorted((i for i in self.instructions(computation) if i.opcode == "parameter"), key=lambda i: i.index)

    def root(self, computation: str) -> Instruction:
        return next(i for i in self.instructions(computation) if i.root)

    # ------------------------------------------------------------------ how often

    def trip_count(self, loop: Instruction) -> int | None:
        """Of a while: what XLA knows, or that of a plain loop counting up from 0 to a constant, else None."""
        known = re.search(r"known_trip_count\D*(\d+)", loop.text)
        if known:
            return int(known.group(1))
        condition, body = (re.search(rf"{part}=%?([\w.-]+)", loop.text).group(1) for part in ("condition", "body"))
        tests = list(self.instructions(condition))
        tests += [inner for test in tests for callee in test.called for inner in self.instructions(callee)]
        bounds = [int(n) for test in tests for n in re.findall(r"[su]32\[\]\S* constant\((\d+)\)", test.text)]
        compares = [test for test in tests if test.opcode == "compare"]
        if len(bounds) != 1 or len(compares) != 1 or "direction=LT" not in compares[0].text:
            return None
        # The counter is the loop's state number `counter`; the body's root shows what it becomes.
        counter = next((t.index for t in tests if t.opcode == "get-tuple-element" and "32[]" in t.text), None)
        body = self.computations.get(body, {})
        state = next((i.operands for i in body.values() if i.root and i.opcode == "tuple"), ())
        new = body.get(state[counter]) if counter is not None and counter < len(state) else None
        added = new.operands if new and new.opcode == "add" else ()
        steps = [n for name in added if name in body for n in re.findall(r" constant\((\d+)\)", body[name].text)]
        return -(-bounds[0] // max(int(steps[0]) if steps else 1, 1))

    def run_counts(self, *, branches: bool = True) -> dict[str, int]:
        """How often each computation runs per call of the program, with or without those inside conditionals.

        In a loop whose trip count is not known: once per round.
        """
        callers = collections.defaultdict(list)
        for name, lines in self.computations.items():
            for i in lines.values():
                times = (self.trip_count(i) or 1) if i.opcode == "while" else 1
                for callee in i.called + (i.branches if branches else ()):
                    callers[callee].append((name, times))

        @functools.cache
        def runs(name: str) -> int:
            return 1 if name == "ENTRY" else sum(runs(caller) * times for caller, times in callers[name])

        return {name: runs(name) for name in self.computations}

    # ------------------------------------------------------------------ what is moved

    def walk(self, computation: str = "ENTRY", runs: int = 1) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, runs) of all that one run of a computation does.

        Of branches, the one that moves least; a fusion is one kernel, whatever is inside.
        """
        for i in self.instructions(computation):
            yield computation, i, runs
            if i.opcode == "conditional":
                yield from self.walk(min(i.branches, key=self._all_moved), runs)
            elif i.opcode in _CALLERS:
                times = (self.trip_count(i) or 1) if i.opcode == "while" else 1
                for callee in i.called:
                    yield from self.walk(callee, runs * times)

    def kernels(self, computation: str = "ENTRY") -> Iterator[tuple[str, Instruction, int]]:
        """Of `walk`, what is launched on the device."""
        for name, i, runs in self.walk(computation):
            if i.opcode not in _CALLERS and not _NO_KERNEL.fullmatch(i.opcode):
                yield name, i, runs

    def work(self, computation: str = "ENTRY", least: int = 0) -> Work:
        """Of one run of a computation.

        Args:
          least: bytes below which a copy is too small to count as one of weights or cache.
        """
        kernels = list(self.kernels(computation))
        waits = [(i, runs) for _, i, runs in self.walk(computation) if i.opcode in ("while", "conditional")]
        return Work(
            kernels=sum(runs for _, _, runs in kernels),
            moved_bytes=sum(self.moved(name, i) * runs for name, i, runs in kernels),
            copied_bytes=sum(self.copied(name, i, least) * runs for name, i, runs in kernels),
            dynamic_loops=sum(runs for i, runs in waits if i.opcode == "while" and self.trip_count(i) is None),
            conditionals=sum(runs for i, runs in waits if i.opcode == "conditional"),
        )

    def _all_moved(self, computation: str) -> int:
        return sum(self.moved(name, i) * runs for name, i, runs in self.kernels(computation))

    def moved(self, computation: str, kernel: Instruction) -> int:
        """Bytes that a kernel reads and writes in main memory."""
        lines = self.computations[computation]
        operands = [lines[name] for name in kernel.operands]
        if kernel.opcode == "fusion":
            inside = kernel.called[0]
            read, root = self._read(inside), self.root(inside)
            parts = [self.computations[inside][name] for name in root.operands] if root.opcode == "tuple" else [root]
            written = [self._written(inside, part) for part in parts]
        else:
            read = _read_by(kernel, operands, kernel.elements)
            written = [self._written(computation, kernel, lone=True)]
            if kernel.opcode.endswith("-start"):
                done = next(i for i in lines.values() if i.opcode.endswith("-done") and kernel.name in i.operands)
                written = [done.bytes]
            elif kernel.opcode == "custom-call" and len(kernel.shapes) > 1 and kernel.shapes[-1][0] in ("s8", "u8"):
                written = [kernel.bytes - array_bytes(*kernel.shapes[-1][:2])]  # all but the library's scratch
        # A slice as large as an operand reads all of it; fewer elements, that many.
        return sum(written) + sum(
            o.bytes * min(n, o.elements) // max(o.elements, 1) for o, n in zip(operands, read, strict=True)
        )

    def _read(self, computation: str, wanted: float = math.inf) -> list[int]:
        """Elements of each parameter that a fused computation reads for so many of its result (all), followed back from
        its root.
        """
        lines = self.computations[computation]
        needed = collections.Counter()
        for i in reversed(lines.values()):
            if i.root:
                needed[i.name] = min(i.elements, wanted)
            if i.opcode == "tuple":
                read = [lines[name].elements for name in i.operands]
            elif i.opcode == "fusion":
                read = self._read(i.called[0], needed[i.name])
            else:
                read = _read_by(i, [lines[name] for name in i.operands], min(needed[i.name], i.elements))
            for name, count in zip(i.operands, read, strict=True):
                needed[name] += count
        return [needed[p.name] for p in self.parameters(computation)]

    def _written(self, computation: str, result: Instruction, lone: bool = False) -> int:
        """Bytes of a kernel's result that it writes: of an operand updated in place, the update."""
        lines = self.computations[computation]
        while result.opcode == "bitcast" and not lone:
            result = lines[result.operands[0]]
        if result.opcode not in _UPDATES:
            return result.bytes
        update = lines[result.operands[_UPDATES[result.opcode]]]
        return result.bytes * update.elements // max(result.elements, 1)

    # ------------------------------------------------------------------ what is copied

    def copied(self, computation: str, kernel: Instruction, least: int) -> int:
        """Bytes that a kernel writes of an argument of the program and does not compute: all of it, or a slice."""
        lines = self.computations[computation]
        if kernel.opcode in ("copy", "copy-start", "transpose", "slice", "dynamic-slice"):
            size = lines[kernel.operands[0]].bytes if kernel.opcode == "copy-start" else kernel.bytes
            return size if size >= least and self.held(computation, kernel.operands[0]) is True else 0
        if kernel.opcode != "fusion":
            return 0
        root = self.root(kernel.called[0])
        parts = root.operands if root.opcode == "tuple" else (root.name,)
        total = 0
        for part in parts:
            path, source = self._source(kernel.called[0], part)
            size = self.computations[kernel.called[0]][part].bytes
            if size >= least and source is not None and set(path) - {"bitcast"} and set(path) <= set(_PASSES):
                total += size * (self.held(computation, kernel.operands[source.index]) is True)
        return total

    def _source(self, computation: str, name: str) -> tuple[list[str], Instruction | None]:
        """The parameter that a value is a part or a changed form of, and the instructions between."""
        path, i = [], self.computations[computation][name]
        while i.opcode in _PASSES or i.opcode in _UPDATES:
            path.append(i.opcode)
            i = self.computations[computation][i.operands[0]]
        return path, i if i.opcode == "parameter" else None

    def held(self, computation: str, name: str) -> bool | tuple:
        """Whether a value is an argument of the program, whole, in part or changed in place; a tuple: of each part."""
        key = computation, name
        if key not in self._held:
            self._held[key] = self._find_held(computation, self.computations[computation][name])
        return self._held[key]

    def _find_held(self, computation: str, i: Instruction) -> bool | tuple:
        of = lambda name: self.held(computation, name)
        if i.opcode == "parameter":
            if computation == "ENTRY":
                return True
            if computation not in self._callers:
                return False
            caller, call = self._callers[computation]
            shift = call.opcode == "conditional"
            at = call.branches.index(computation) + 1 if shift else i.index
            return self.held(caller, call.operands[at])
        if i.opcode == "tuple":
            return tuple(map(of, i.operands))
        if i.opcode == "get-tuple-element":
            flags = of(i.operands[0])
            return flags[i.index] if isinstance(flags, tuple) else flags
        if i.opcode in ("while", "optimization-barrier", "copy-start", "copy-done", *_PASSES, *_UPDATES):
            return of(i.operands[0])
        if i.opcode == "fusion":
            root = self.root(i.called[0])
            flags = []
            for part in root.operands if root.opcode == "tuple" else (root.name,):
                _, source = self._source(i.called[0], part)
                flags.append(source is not None and of(i.operands[source.index]) is True)
            return tuple(flags) if root.opcode == "tuple" else flags[0]
        return False

    def sources(self, kernel: Instruction) -> list[str]:
        """Where in the traced program a kernel comes from; if it has no name itself, what is fused into it."""
        names = re.findall(r'op_name="([^"]*)"', kernel.text)
        if names or kernel.opcode != "fusion":
            return names
        return [name for i in self.instructions(kernel.called[0]) for name in re.findall(r'op_name="([^"]*)"', i.text)]

    def outer_loop(self) -> str | None:
        """The body of the program's own loop: of those in the entry of unknown trip count, the one that moves most."""
        bodies = [
            re.search(r"body=%?([\w.-]+)", i.text).group(1)
            for i in self.instructions("ENTRY")
            if i.opcode == "while" and self.trip_count(i) is None
        ]
        return max(bodies, key=self._all_moved, default=None)


def _read_by(i: Instruction, operands: list[Instruction], needed: int) -> list[int]:
    """Elements of each operand that an instruction reads for so many elements of its result."""
    everything = [o.elements for o in operands]
    opcode = i.opcode.removesuffix("-start")
    if not needed or not operands:
        return [0] * len(operands)
    if opcode in _SLICES:
        return [min(needed, everything[0]), *everything[1:]]
    if opcode in _UPDATES:  # in place where it is a root; the rest of the first operand stays
        update = operands[_UPDATES[opcode]].elements
        return [0 if i.root or needed <= update else needed - update, *everything[1:]]
    if opcode == "reduce":
        return [needed * n // i.elements if n > i.elements else n for n in everything]
    if opcode in ("parameter", "dot", "convolution", "reduce-window", "custom-call", "concatenate", "sort", "pad"):
        return everything
    # Element by element; what is broadcast is read once.
    return [min(needed, n) for n in everything]
