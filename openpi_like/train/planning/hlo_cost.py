"""What a compiled program does on one chip, read from its text.

XLA's own account (`cost_analysis`) takes a loop's body once; here it counts as often as it runs. Counted are products
of matrices (FLOPs), what chips send each other (collectives), and what moves between a chip and its memory (HBM).

Bytes of a collective are those that one chip receives, n chips sharing the work in a ring, of its own operand of b
bytes: all-gather (n - 1) b, reduce-scatter and all-to-all (n - 1) / n b, all-reduce 2 (n - 1) / n b, permute b.
Traffic of HBM is a lower bound: operands and results of each instruction once, those that stay on the chip left out.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from openpi_like.train.planning.hlo import HOST, Buffer, Computation, Instruction, device_groups, mesh_axes, parse

# ---- What is counted -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective, as often as it runs.

    kind: as XLA names it; a reduction of which each chip keeps its part only is a "reduce-scatter", however written.
    buffers: what it takes and what it gives, on one chip. members: positions in the mesh of one of its groups; of a
        permute, of the two ends of its longest way. axes: of the mesh that it spans.
    nbytes: that one chip receives in one execution. times: executions in one run of the program.
    op_name: where in the traced program it comes from.
    """

    kind: str
    buffers: tuple[Buffer, ...]
    members: tuple[int, ...]
    axes: tuple[str, ...]
    nbytes: float
    op_name: str
    times: float = 1.0

    @property
    def total(self) -> float:
        return self.nbytes * self.times


@dataclasses.dataclass
class Cost:
    """What a program does on one chip.

    flops: of products of matrices. traffic: bytes between chip and HBM. host: bytes between chip and host memory.
    endless: loops whose number of rounds the text does not say, taken as `Reader.rounds`.
    unknown: kernels that the text says nothing about, by name.
    """

    flops: float = 0.0
    traffic: float = 0.0
    host: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    endless: set[str] = dataclasses.field(default_factory=set)
    unknown: set[str] = dataclasses.field(default_factory=set)

    def add(self, other: "Cost", times: float = 1.0) -> None:
        """Adds what another part does, so many times."""
        self.flops += other.flops * times
        self.traffic += other.traffic * times
        self.host += other.host * times
        self.collectives += [dataclasses.replace(c, times=c.times * times) for c in other.collectives]
        self.endless |= other.endless
        self.unknown |= other.unknown


_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# What moves nothing: names for values that are there, and ends of what was counted at its start.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "while", "conditional", "call", "add-dependency", "domain",
}  # fmt: skip
_KNOWN_CALLS = {
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveDone", "AsyncCollectiveStart", "ConcatBitcast",
    "GatherScatterIndicesBitpacked",
    "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "MoveToDevice", "MoveToHost", "TopK",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")


class _Reader:
    def __init__(self, computations: dict[str, Computation], mesh: Mapping[str, int], rounds: int) -> None:
        self.computations, self.mesh, self.rounds = computations, mesh, rounds
        self._done: dict[tuple[str, bool], Cost] = {}

    # ---- Walking -----------------------------------------------------------------------------------------------------

    def cost(self, name: str, *, fused: bool = False) -> Cost:
        """Returns what one run of a computation does; of one that is fused, without what moves inside."""
        key = name, fused
        if key not in self._done:
            cost, computation = Cost(), self.computations[name]
            for instruction in computation.instructions.values():
                self._add(cost, computation, instruction, fused=fused)
            self._done[key] = cost
        return self._done[key]

    def _add(self, cost: Cost, within: Computation, at: Instruction, *, fused: bool) -> None:
        base = at.opcode.removesuffix("-start")
        if at.opcode.endswith("-done"):
            return
        if at.opcode == "while":
            rounds = self._rounds(within, at)
            if rounds is None:
                cost.endless.add(at.name)
            cost.add(self.cost(at.calls("body")[0]), float(self.rounds if rounds is None else rounds))
        elif at.opcode == "conditional":
            branches = [self.cost(n) for n in at.calls("branch_computations", "true_computation", "false_computation")]
            cost.add(max(branches, key=lambda c: (c.flops, c.traffic)))
        elif at.opcode == "fusion":
            cost.add(self.cost(at.calls("calls")[0], fused=True))
        elif at.opcode in ("call", "async-start"):
            cost.add(self.cost(at.calls("to_apply", "calls")[0]))
        elif base in _COLLECTIVES and not (fused and _goes_on(within, at)):
            made = self._collective(within, at, base, fused=fused)
            cost.collectives += [made] if len(made.members) > 1 else []
        elif at.opcode == "dot":
            contracted = [int(i) for i in (at.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or "").split(",") if i]
            cost.flops += self._product(within, at, contracted)
        elif at.opcode == "convolution":
            cost.flops += 2 * _convolution(at, *within.buffers(at)[:2])
        elif at.opcode == "custom-call":
            self._custom(cost, within, at)
        if not fused and at.opcode not in _FREE and at.opcode != "async-start":
            for buffer, nbytes in self._moved(within, at):
                if buffer.space == 0:
                    cost.traffic += nbytes
                elif buffer.space == HOST:
                    cost.host += nbytes

    # ---- FLOPs -------------------------------------------------------------------------------------------------------

    @staticmethod
    def _product(within: Computation, at: Instruction, contracted: Sequence[int]) -> float:
        left = within.buffers(at)[0].shape
        return 2.0 * math.prod(at.results[0].shape) * math.prod(left[i] for i in contracted)

    def _custom(self, cost: Cost, within: Computation, at: Instruction) -> None:
        """Adds a call of a library (which says what it multiplies) or of a kernel (which may say its FLOPs)."""
        target = at.attribute(r'custom_call_target="([^"]*)"') or at.name
        contracted = at.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
        flops = at.attribute(r'"flops":"?(\d+)')
        if contracted is not None:
            cost.flops += self._product(within, at, [int(i) for i in re.findall(r"\d+", contracted)])
        elif flops is not None:
            cost.flops += float(flops)
        elif target not in _KNOWN_CALLS:
            cost.unknown.add(target)

    # ---- Collectives -------------------------------------------------------------------------------------------------

    def _collective(self, within: Computation, at: Instruction, kind: str, *, fused: bool) -> Collective:
        taken, count = within.buffers(at), math.prod(self.mesh.values())
        if fused and kind == "all-reduce" and _only_sliced(within, at):
            kind = "reduce-scatter"
        if kind == "collective-permute":
            pairs = np.array(json.loads(_as_json(at.attribute(r"source_target_pairs=(\{.*?\}\})"))))
            axes = {a for pair in pairs for a in mesh_axes(pair, self.mesh)}
            members = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
            spanned = tuple(a for a in self.mesh if a in axes)
        else:
            members = device_groups(at.attributes, count)[0]
            spanned = mesh_axes(members, self.mesh)
        size, own = len(members), sum(b.nbytes for b in taken)
        part = (size - 1) / size
        received = {
            "all-gather": (size - 1) * own,
            "all-reduce": 2 * part * own,
            "collective-permute": own,
        }.get(kind, part * own)
        return Collective(
            kind,
            tuple(dict.fromkeys(b for b in (*taken, *at.results) if b.shape)),
            tuple(int(i) for i in members),
            spanned,
            float(received),
            at.attribute(r'op_name="([^"]*)"') or "",
        )

    # ---- Loops -------------------------------------------------------------------------------------------------------

    def _rounds(self, within: Computation, at: Instruction) -> float | None:
        """Returns how often a loop runs: XLA may say so, or a counter is compared with a constant."""
        known = at.attribute(r'"known_trip_count":\{"n":"?(\d+)')
        if known is not None:
            return float(known)
        condition, body = (self.computations[at.calls(n)[0]] for n in ("condition", "body"))
        compare, carry = condition.root, within.instructions[at.operands[0]]
        if compare.opcode != "compare" or carry.opcode != "tuple" or body.root.opcode != "tuple":
            return None

        def start(value: int | tuple[str, int] | None) -> int | None:
            """Returns a constant, or the constant that a carried value starts from."""
            if isinstance(value, tuple):
                first = _value(within, carry.operands[value[1]])
                return first if isinstance(first, int) else None
            return value

        counter, limit = (_value(condition, name) for name in compare.operands)
        if not isinstance(counter, tuple):
            return None
        step = _step(body, counter[1])
        first, last = start(counter), start(limit)
        if step is None or first is None or last is None:
            return None
        direction = compare.attribute(r"direction=(\w+)")
        last += {"LE": 1, "GE": -1}.get(direction or "", 0)
        signs = {"LT": 1, "LE": 1, "GT": -1, "GE": -1, "NE": 1 if step > 0 else -1}
        if signs.get(direction or "", 0) * step <= 0:
            return None
        return float(max(0, math.ceil((last - first) / step)))

    # ---- Traffic -----------------------------------------------------------------------------------------------------

    def _moved(self, within: Computation, at: Instruction) -> Iterator[tuple[Buffer, float]]:
        """Yields buffers, and how many of their bytes are read or written."""
        taken = [within.instructions[name].results for name in at.operands]
        if at.opcode == "fusion":
            yield from self._moved_by_fusion(taken, at)
        elif at.opcode == "custom-call" and at.attribute(r'custom_call_target="([^"]*)"') in _KNOWN_CALLS:
            return
        elif at.opcode in _SLICES:
            yield taken[0][0], at.results[0].nbytes
            yield at.results[0], at.results[0].nbytes
        elif at.opcode in ("dynamic-update-slice", "scatter"):
            update = taken[1 if at.opcode == "dynamic-update-slice" else 2][0]
            yield update, update.nbytes
            yield at.results[0], update.nbytes
        elif at.opcode in ("copy-start", "slice-start"):
            # Both ends, of the size of what arrives; the others of its results are flags and the source again.
            source = taken[0][0]
            ends = [b for b in at.results if b.shape and b != source] or [source]
            yield source, ends[0].nbytes
            yield ends[0], ends[0].nbytes
        elif at.opcode.endswith("-start"):
            given = [b for b in at.results if b.shape]
            repeated = len(given) > len(taken)  # its results name its operands once more
            for buffer in (*(() if repeated else (b for t in taken for b in t)), *given):
                yield buffer, buffer.nbytes
        else:
            for buffer in (*(b for t in taken for b in t), *at.results):
                yield buffer, buffer.nbytes

    def _moved_by_fusion(self, taken: Sequence[tuple[Buffer, ...]], at: Instruction) -> Iterator[tuple[Buffer, float]]:
        inner = self.computations[at.calls("calls")[0]]
        shared = re.search(r"output_to_operand_aliasing=\{(.*?\)\})", at.attributes)
        pairs = re.findall(r"\{(\d*)\}: \((\d+)", shared.group(1)) if shared else []
        outer, own = {int(o or 0) for o, _ in pairs}, {int(i) for _, i in pairs}
        for i, buffers in enumerate(taken):
            if i not in own or self._updated(inner, i):
                for buffer in buffers:
                    yield buffer, self._read(at.calls("calls")[0], i)
        elements = inner.root.operands if inner.root.opcode == "tuple" else (inner.root.name,)
        if len(elements) != len(at.results):  # a start that makes its own flags
            elements = ("",) * len(at.results)
        for i, (buffer, name) in enumerate(zip(at.results, elements, strict=True)):
            made = _origin(inner, name) if name else None
            if made is not None and made.opcode == "dynamic-update-slice":
                yield buffer, inner.instructions[made.operands[1]].results[0].nbytes
            elif i not in outer and (made is None or made.opcode != "parameter"):
                yield buffer, buffer.nbytes

    @staticmethod
    def _updated(inner: Computation, i: int) -> bool:
        return any(u.opcode == "dynamic-update-slice" for u in inner.users[inner.parameters[i].name])

    def _read(self, name: str, i: int) -> float:
        """Returns how many bytes of its parameter i a fused computation reads: slices, or all of it."""
        computation = self.computations[name]
        whole = float(sum(b.nbytes for b in computation.parameters[i].results))
        total, left = 0.0, [computation.parameters[i].name]
        while left:
            at = left.pop()
            for user in computation.users[at]:
                if user.opcode == "bitcast":
                    left.append(user.name)
                elif user.opcode in _SLICES and user.operands[0] == at:
                    total += user.results[0].nbytes
                elif user.opcode == "fusion":
                    for j, operand in enumerate(user.operands):
                        total += self._read(user.calls("calls")[0], j) if operand == at else 0
                elif user.opcode != "dynamic-update-slice" or user.operands[0] != at:
                    return whole
        return min(total, whole)


def _as_json(pairs: str | None) -> str:
    return (pairs or "{}").replace("{", "[").replace("}", "]")


def _goes_on(within: Computation, at: Instruction) -> bool:
    """Tells whether a collective in a fusion was started in another one.

    What runs beside computation is written in its start, in all that it runs beside, and in its end.
    """
    starts = any("AsyncCollectiveStart" in i.attributes for i in within.instructions.values())
    return 'chain_id="' in at.attributes and not starts


def _only_sliced(within: Computation, at: Instruction) -> bool:
    """Tells whether of all that an instruction gives only slices are used."""
    left, sliced = [at], False
    while left:
        for user in within.users[left.pop().name]:
            if user.opcode in ("get-tuple-element", "bitcast"):
                left.append(user)
            elif user.opcode == "dynamic-slice":
                sliced = True
            else:
                return False
    return sliced


def _origin(within: Computation, name: str) -> Instruction:
    """Returns the instruction that makes a value, behind other names of it."""
    at = within.instructions[name]
    while at.opcode in ("bitcast", "copy") and at.operands:
        at = within.instructions[at.operands[0]]
    return at


def _value(within: Computation, name: str) -> int | tuple[str, int] | None:
    """Returns an integer constant, or ("carried", index) for an element of a loop's carry."""
    at = _origin(within, name)
    if at.opcode == "constant":
        return int(at.text) if re.fullmatch(r"-?\d+", at.text) else None
    if at.opcode == "get-tuple-element" and within.instructions[at.operands[0]].opcode == "parameter":
        return "carried", int(at.attribute(r"index=(\d+)") or 0)
    return None


def _step(body: Computation, index: int) -> int | None:
    """Returns what a loop's body adds to an element of its carry."""
    at = _origin(body, body.root.operands[index])
    if at.opcode != "add":
        return None
    values = [_value(body, name) for name in at.operands]
    steps = [v for v in values if isinstance(v, int)]
    return steps[0] if len(steps) == 1 and ("carried", index) in values else None


def _convolution(at: Instruction, left: Buffer, kernel: Buffer) -> float:
    """Returns the multiplications of a convolution; those with padding and with dilation's zeros do not count."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", at.attributes)
    assert labels is not None, at.attributes
    of_left, of_kernel, of_out = labels.groups()
    out = at.results[0].shape
    total = float(out[of_out.index("b")] * out[of_out.index("f")] * kernel.shape[of_kernel.index("i")])
    spatial = sorted(c for c in of_out if c.isdigit())
    window = dict(re.findall(r"(\w+)=([^ }]+)", at.attribute(r"window=\{([^}]*)\}") or ""))
    split = {k: v.split("x") for k, v in window.items()}
    for n, axis in enumerate(spatial):
        get = lambda key, default, n=n: split[key][n] if key in split else default  # noqa: E731
        size, stride = int(get("size", 1)), int(get("stride", 1))
        low = int(str(get("pad", "0_0")).split("_")[0])
        spread, gap = int(get("lhs_dilate", 1)), int(get("rhs_dilate", 1))
        length = (left.shape[of_left.index(axis)] - 1) * spread + 1
        at_left = np.arange(out[of_out.index(axis)])[:, None] * stride + np.arange(size) * gap - low
        total *= int(((at_left >= 0) & (at_left < length) & (at_left % spread == 0)).sum())
    return total


def read_program(text: str, mesh: Mapping[str, int], *, rounds: int = 1) -> Cost:
    """Returns what a compiled program does on one chip.

    Args:
        text: of `compiled.as_text()`.
        mesh: sizes of its mesh axes by name, in order.
        rounds: how often loops run that end on what they compute.

    Raises:
        ValueError: the text is none of a compiled program.
    """
    computations, entry = parse(text)
    return _Reader(computations, mesh, rounds).cost(entry)
