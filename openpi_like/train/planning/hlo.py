"""Compiled programs as text (`compiled.as_text()`): their computations, buffers, and the groups that chips work in."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

# ---- Text ------------------------------------------------------------------------------------------------------------


HOST = 5


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array as the program has it on one chip. space: where: 0 is HBM, `HOST` the host, others are on the chip."""

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def nbytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        width = 8 if self.dtype == "pred" else int(bits.group()) if bits else 0  # tokens have no size
        return math.prod(self.shape) * width // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """results: one, or the elements of a tuple. text: what stands in the parentheses. attributes: what follows."""

    name: str
    opcode: str
    results: tuple[Buffer, ...]
    operands: tuple[str, ...]
    text: str
    attributes: str

    def attribute(self, pattern: str) -> str | None:
        """Returns the first group of a pattern in the attributes."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None

    def calls(self, *names: str) -> tuple[str, ...]:
        """Returns the computations that attributes of these names refer to."""
        found = [re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|(%[\w.\-]+))", self.attributes) for name in names]
        return tuple(n for m in found if m for n in re.findall(r"%([\w.\-]+)", m.group(1) or m.group(2)))


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; the last of `roots` is the result."""

    instructions: dict[str, Instruction]
    root: Instruction

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                users[name].append(instruction)
        return users

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.text): i for i in self.instructions.values() if i.opcode == "parameter"}

    def buffers(self, instruction: Instruction) -> list[Buffer]:
        """Returns what an instruction takes."""
        return [b for name in instruction.operands for b in self.instructions[name].results]


_BUFFER = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")


def _buffers(text: str) -> tuple[Buffer, ...]:
    found = []
    for dtype, shape, layout in _BUFFER.findall(text):
        space = _SPACE.search(layout)
        dims = tuple(int(n) for n in shape.replace("<=", "").split(",") if n)
        found.append(Buffer(dtype, dims, int(space.group(1)) if space else 0))
    return tuple(found)


def _instruction(line: str, start: int, name: str) -> Instruction:
    opcode = _OPCODE.search(line, start - 1)
    assert opcode is not None, line
    depth, end = 1, opcode.end()
    while depth:
        depth += {"(": 1, ")": -1}.get(line[end], 0)
        end += 1
    text = line[opcode.end() : end - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", text))
    return Instruction(name, opcode.group(1), _buffers(line[start : opcode.start()]), operands, text, line[end:])


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations of a module by name, and the name of its entry.

    Raises:
        ValueError: this is not the text of a compiled program.
    """
    computations: dict[str, Computation] = {}
    entry = name = None
    instructions: dict[str, Instruction] = {}
    root = None
    for line in text.splitlines():
        if name is None:
            head = _HEAD.match(line)
            if head:
                name, instructions, root = head.group(2), {}, None
                entry = name if head.group(1) else entry
        elif line.startswith("}"):
            assert root is not None, name
            computations[name] = Computation(instructions, root)
            name = None
        else:
            begin = _NAME.match(line)
            if begin:
                made = _instruction(line, begin.end(), begin.group(2))
                instructions[made.name] = made
                root = made if begin.group(1) else root
    if entry is None:
        raise ValueError("got a text without an ENTRY computation, expected that of `compiled.as_text()`")
    return computations, entry


# ---- Groups of chips -------------------------------------------------------------------------------------------------


def device_groups(attributes: str, count: int) -> np.ndarray:
    """Returns the groups that a collective works in, (groups, members), by position in the mesh.

    Understands all ways of writing them: lists, `[2,4]<=[4,2]T(1,0)`, and axes of a mesh. count: of all chips.

    Raises:
        ValueError: groups that are not of one size.
    """
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", attributes)
    if mesh:
        axes = [(n, int(size)) for n, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))]
        ids = _iota(mesh.group(2)) if mesh.group(2) else np.arange(count)
        # A part of an axis, 'x':(before)size, is an axis of its own.
        sizes: list[int] = []
        chosen: list[int] = []
        parts = dict(re.findall(r"'([^']+)'(?::\((\d+\)\d+))?", mesh.group(3)))
        for axis, size in axes:
            before, _, own = parts.get(axis, "").partition(")")
            split = [int(before), int(own), size // int(before) // int(own)] if before else [size]
            if axis in parts:
                chosen.append(len(sizes) + bool(before))
            sizes += split
        grid = ids.reshape(sizes)
        kept = [i for i in range(len(sizes)) if i not in chosen]
        return grid.transpose(*kept, *chosen).reshape(-1, math.prod(sizes[i] for i in chosen))
    iota = re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        return _iota(iota.group(1))
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes)
    groups = [[int(i) for i in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", listed.group(1))] if listed else []
    if len({len(g) for g in groups}) > 1:
        raise ValueError(f"collective with groups of several sizes: {attributes[:200]}")
    return np.array(groups) if groups else np.arange(count)[None]


def _iota(text: str) -> np.ndarray:
    """Returns `[shape]<=[dims]T(order)`, or `[dims]T(order)`, as an array."""
    found = re.fullmatch(r"(?:\[([\d,]+)\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?", text.strip())
    if found is None:
        raise ValueError(f"cannot read the device list {text!r}")
    shape, dims, order = ([int(n) for n in g.split(",")] if g else None for g in found.groups())
    assert dims is not None
    array = np.arange(math.prod(dims)).reshape(dims)
    array = array if order is None else array.transpose(order)
    return array.reshape(-1 if shape is None else shape)


def mesh_axes(members: Sequence[int] | np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes along which these positions differ."""
    at = np.unravel_index(np.asarray(members), tuple(mesh.values()))
    return tuple(name for name, along in zip(mesh, at, strict=True) if len(np.unique(along)) > 1)
