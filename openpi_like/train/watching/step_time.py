"""Where the time of a training step goes, from a trace: by part of the model and by kind of work, idle time included.

Every instant of a device belongs to one operation, or to none: then it is idle. Where several run at once, it belongs
to those that compute, in equal parts; what runs behind them (collectives, transfers) takes no time, and is listed as
hidden. So the parts add up to the whole.
"""

import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from openpi_like.train.watching.profiling import DATA_WAIT, STEP
from openpi_like.train.watching.xplane import Event, Instruction, Plane, TraceError, read_planes, read_programs

MATMUL, ATTENTION, ELEMENTWISE = "matmul", "attention", "elementwise and reductions"
COLLECTIVE, COPY, TRANSFER, OTHER = "collectives", "copies", "transfers", "other"
PHASES = ("forward", "backward", "recomputed")
SEVERAL = "(several parts)"  # the scope of an operation of parts that have none in common
DEPTH = 3  # of scopes in the table
_BEHIND = {COLLECTIVE: 1, TRANSFER: 2}  # what is hidden behind computation; the larger number behind the smaller one

# ---- What operations are ---------------------------------------------------------------------------------------------

_CONTROL = ("while", "conditional", "call")  # what they run are operations of their own
_COLLECTIVES = re.compile(r"all-reduce|all-gather|reduce-scatter|(ragged-)?all-to-all|collective-|send|recv")
_TRANSFERS = re.compile(r"copy-start|copy-done|infeed|outfeed")
_MOVES = {
    "copy", "transpose", "bitcast", "reshape", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad",
    "broadcast", "iota", "gather", "reverse", "convert", "constant", "parameter", "tuple", "get-tuple-element",
}  # fmt: skip
# Of kernels and custom calls, whose names are all there is.
_NAMES = (
    (COLLECTIVE, re.compile(r"nccl|rccl|all.?reduce|all.?gather|reduce.?scatter|all.?to.?all", re.IGNORECASE)),
    (ATTENTION, re.compile(r"fmha|flash|splash|attention|sdpa", re.IGNORECASE)),
    (
        MATMUL,
        re.compile(r"gemm|matmul|cublas|nvjet|cutlass|onednn|xmma|wgmma|convolution|(\b|_)dot(\b|_)", re.IGNORECASE),
    ),
    (COPY, re.compile(r"memcpy(\d|D2D|Other)", re.IGNORECASE)),  # on one device
    (TRANSFER, re.compile(r"memcpy|memset|copy-(start|done)|infeed|outfeed", re.IGNORECASE)),
    (ELEMENTWISE, re.compile(r"fusion|reduce|scatter|sort", re.IGNORECASE)),
    (COPY, re.compile(r"copy|transpose|concatenate|slice|broadcast|data formatting", re.IGNORECASE)),
)
# What JAX adds to the user's scopes in a path: transformations around a name, and parts of loops and calls.
_WRAPPED = re.compile(r"([\w-]+)\((.*)\)$")
_NAME = re.compile(r"[\w. -]+$")  # a scope of ours; an einsum makes one of its equation
_STRUCTURE = re.compile(
    r"(while|body|cond|scan|closed_call|core_call|eval_jaxpr|checkpoint|remat2?|rematted_computation|branch_\d+_fun|shard_map"
    r"|custom_[jv]vp_call(_jaxpr)?|custom_lin)$"
)


@dataclasses.dataclass(frozen=True)
class Part:
    """scope: names of `jax.named_scope`, outermost first. phase: one of `PHASES`."""

    scope: tuple[str, ...]
    phase: str
    kind: str


def parse_path(path: str) -> tuple[tuple[str, ...], str]:
    """Returns the scopes and the phase of an operation, from its path, which ends with the name of the primitive.

    An operation that several were merged into, "jit(f)/(a/b:a/c)" or "jit(f)/a/b;jit(f)/a/c", has the scopes that they
    share, or `SEVERAL`.
    """
    before, merged, rest = path.removesuffix(":").partition("/(")
    one_by_one = [f"{before}/{one}" for one in rest.removesuffix(")").split(":")] if merged else path.split(";")
    if len(one_by_one) > 1:
        every = [parse_path(one) for one in one_by_one]
        levels = zip(*(scope for scope, _ in every if scope), strict=False)
        shared = itertools.takewhile(lambda level: len(set(level)) == 1, levels)
        phases = {phase for _, phase in every}
        scope_of_all = tuple(level[0] for level in shared)
        if not scope_of_all and any(scope for scope, _ in every):
            scope_of_all = (SEVERAL,)
        return scope_of_all, phases.pop() if len(phases) == 1 else "backward"
    scope: list[str] = []
    backward = False
    *parts, _ = path.split("/")
    for part in parts:
        name, function = part, False
        while wrapped := _WRAPPED.match(name):
            transform, name = wrapped.groups()
            backward |= transform == "transpose"
            function |= transform in ("jit", "pjit")
        if _NAME.match(name) and not function and not _STRUCTURE.match(name):
            scope.append(name)
    if "rematted_computation" in parts:
        return tuple(scope), "recomputed"
    return tuple(scope), "backward" if backward else "forward"


def kind_of(instruction: Instruction | None, name: str, scope: Sequence[str]) -> str:
    """Returns what kind of work an operation is. name: of its kernel, for what no program explains."""
    if instruction is None or instruction.opcode == "custom-call":
        text = f"{name} {'' if instruction is None else instruction.target}"
        named = next((kind for kind, pattern in _NAMES if pattern.search(text)), OTHER)
        return ATTENTION if named not in _BEHIND and ATTENTION in scope else named
    opcodes = {i.opcode.removesuffix("-start").removesuffix("-done") for i in (instruction, *instruction.inside)}
    if any(_COLLECTIVES.match(opcode) for opcode in opcodes):
        return COLLECTIVE
    if _TRANSFERS.match(instruction.opcode):
        return TRANSFER
    if ATTENTION in scope:
        return ATTENTION
    if opcodes & {"dot", "convolution"}:
        return MATMUL
    return COPY if opcodes - {"fusion"} <= _MOVES else ELEMENTWISE


# What an event may say of its operation.
_TOLD = ("hlo_op", "program_id", "hlo_module", "tf_op", "hlo_category")


def _part(event: Event, programs: dict[str, dict[str, Instruction]]) -> Part | None:
    """Returns what an event of a device is, None where it is no operation, or one made of others."""
    op = str(event.stats.get("hlo_op") or event.name.removeprefix("%").split(" = ")[0])
    by_id, by_name = (programs.get(str(event.stats.get(key)), {}) for key in ("program_id", "hlo_module"))
    # In a CUDA graph all that an event has of its own is the kernel, which has the instruction's name or a library's.
    names = op, event.name, re.sub(r"_(\d+)$", r".\1", event.name)
    instruction = next((of[name] for name in names for of in (by_id, by_name) if name in of), None)
    if (re.sub(r"[.\d]+$", "", op) if instruction is None else instruction.opcode) in _CONTROL:
        return None
    path = str(event.stats.get("tf_op") or "") if instruction is None else _path(instruction)
    scope, phase = parse_path(path) if path else ((), "forward")
    return Part(scope, phase, kind_of(instruction, f"{event.name} {event.stats.get('hlo_category', '')}", scope))


def _path(instruction: Instruction) -> str:
    """Returns the path of an instruction; of a fusion around a product, that of the product, which takes the time."""
    inner = [i.path for i in instruction.inside if i.opcode in ("dot", "convolution") and i.path]
    every = [*inner, instruction.path, *(i.path for i in instruction.inside[::-1])]
    return next((path for path in every if "/" in path), "")


# ---- What a trace holds ----------------------------------------------------------------------------------------------

_Span = tuple[float, float]  # nanoseconds
_Key = TypeVar("_Key")
_DEVICE = re.compile(r"/device:(TPU|GPU):\d+$")


def _operations(planes: list[Plane]) -> dict[str, list[list[tuple[float, float, Part]]]]:
    """Returns, by device, lines of operations."""
    programs = read_programs(planes)
    known: dict[tuple[Any, ...], Part | None] = {}  # the same operations come again and again
    devices: dict[str, list[list[tuple[float, float, Part]]]] = {}
    for plane in planes:
        on_device = _DEVICE.match(plane.name) is not None
        if not on_device and plane.name != "/host:CPU":
            continue
        # A TPU says what its core does on one line; a GPU has a line per stream; devices of the CPU share its threads.
        lines = [i for i, name in enumerate(plane.lines) if name == "XLA Ops"]
        lines = lines or [i for i, name in enumerate(plane.lines) if not on_device or name.startswith("Stream")]
        for line in lines:
            found: dict[str, list[tuple[float, float, Part]]] = {}
            for event in plane.events(line):
                if not on_device and "hlo_op" not in event.stats:
                    continue
                told = event.name, *map(event.stats.get, _TOLD)
                if told not in known:
                    known[told] = _part(event, programs)
                part = known[told]
                if part is not None:
                    name = plane.name if on_device else f"CPU:{event.stats.get('device_ordinal', 0)}"
                    found.setdefault(name, []).append((event.start, event.end, part))
            for name, of in found.items():
                devices.setdefault(name, []).append(of)
    return devices


def _innermost(line: list[tuple[float, float, Part]]) -> Iterator[tuple[float, float, Part]]:
    """Yields the operations of one line without those times in which one that they contain runs."""
    stack: list[tuple[float, float, Part]] = []
    at = 0.0

    def until(time: float) -> Iterator[tuple[float, float, Part]]:
        nonlocal at
        while stack and stack[-1][1] <= time:
            _, end, part = stack.pop()
            yield at, end, part
            at = max(at, end)
        if stack:
            yield at, time, stack[-1][2]
        at = max(at, time)

    for operation in sorted(line, key=lambda o: (o[0], -o[1])):
        yield from until(operation[0])
        stack.append(operation)
    yield from until(float("inf"))


def _attribute(
    lines: Sequence[list[tuple[float, float, Part]]], window: _Span
) -> tuple[dict[Part, float], dict[str, float], list[_Span]]:
    """Returns one device's time by part, by kind what ran behind other work, and when nothing ran."""
    start, end = window
    edges: list[tuple[float, int, Part]] = []
    for line in lines:
        for since, until, part in _innermost(line):
            since, until = max(since, start), min(until, end)
            if since < until:
                edges += [(since, 1, part), (until, -1, part)]
    edges.sort(key=lambda edge: edge[0])
    parts: defaultdict[Part, float] = defaultdict(float)
    hidden: defaultdict[str, float] = defaultdict(float)
    gaps: list[_Span] = []
    running: defaultdict[Part, int] = defaultdict(int)
    at = start
    for time, change, part in [*edges, (end, 0, Part((), "", ""))]:
        if time > at:
            rank = min((_BEHIND.get(p.kind, 0) for p in running), default=0)
            first = {p: n for p, n in running.items() if _BEHIND.get(p.kind, 0) == rank}
            for p, n in first.items():
                parts[p] += (time - at) * n / sum(first.values())
            for kind in {p.kind for p in running} - {p.kind for p in first}:
                hidden[kind] += time - at
            if not running:
                gaps.append((at, time))
            at = time
        running[part] += change
        if not running[part]:
            del running[part]
    return parts, hidden, gaps


def _host(planes: Sequence[Plane]) -> tuple[list[_Span], dict[str, float], list[_Span]]:
    """Returns when steps ran in the loop, the time in them by what it was spent on, and the waits for data."""
    steps: list[_Span] = []
    notes: defaultdict[str, float] = defaultdict(float)
    waits: list[_Span] = []
    for plane in planes:
        for line in range(len(plane.lines)) if plane.name == "/host:CPU" else ():
            events = sorted(plane.events(line), key=lambda e: (e.start, -e.end))
            own = [(e.start, e.end) for e in events if e.name == STEP and "step_num" in e.stats]
            if not own:
                continue
            steps += own
            notes[""] += sum(end - start for start, end in own)
            done = 0.0  # where the last event ended that lies in a step and in no other event
            for event in events:
                inside = any(s <= event.start and event.end <= e for s, e in own)
                if not inside or event.start < done or event.name == STEP:
                    continue
                done = event.end
                notes[event.name] += event.end - event.start
                notes[""] -= event.end - event.start
                if event.name == DATA_WAIT:
                    waits.append((event.start, event.end))
    return steps, notes, waits


def _overlap(a: Sequence[_Span], b: Sequence[_Span]) -> float:
    """Returns how long two lists of spans, each without overlaps of its own, are on at once."""
    return sum((max(0.0, min(x[1], y[1]) - max(x[0], y[0])) for x in a for y in b), 0.0)


# ---- What it comes to ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds per step, means over the devices and the steps of a trace.

    total: from one step to the next. parts: of the devices' time; with `idle` they add up to `total`. idle_for_data:
    the part of `idle` in which the host waited for a batch. hidden: by kind, what ran behind other work. host: of the
    host's time in the loop, by annotation; "" is what nothing says.
    """

    steps: int
    devices: int
    total: float
    parts: dict[Part, float]
    idle: float
    idle_for_data: float
    hidden: dict[str, float]
    host: dict[str, float]


def find_traces(directory: Path) -> list[Path]:
    """Returns the files of the newest trace below a directory, one per host; a run's are in its `profile` folder.

    Raises:
        TraceError: there is none.
    """
    found = [directory] if directory.is_file() else list(directory.rglob("*.xplane.pb"))
    if not found:
        what = "holds no trace (*.xplane.pb)" if directory.exists() else "does not exist"
        raise TraceError(
            f"{directory} {what}; set profile=(20, 24), steps of your choice, in a run's config and run it"
        )
    newest = max(found, key=lambda path: (path.stat().st_mtime, str(path))).parent
    return sorted(path for path in found if path.parent == newest)


def step_time(traces: Sequence[Path]) -> StepTime:
    """Reads the traces of one session, one per host.

    Raises:
        TraceError: they cannot be read, or hold no steps, or no operations of a device.
    """
    parts: defaultdict[Part, float] = defaultdict(float)
    hidden: defaultdict[str, float] = defaultdict(float)
    host: defaultdict[str, float] = defaultdict(float)
    devices = count = 0
    total = idle = for_data = 0.0
    for path in traces:
        planes = read_planes(path)
        steps, notes, waits = _host(planes)
        operations = _operations(planes)
        if not steps or not operations:
            missing = f"steps (jax.profiler.StepTraceAnnotation {STEP!r})" if operations else "operations of a device"
            held = ", ".join(repr(plane.name) for plane in planes)
            raise TraceError(
                f"{path} holds no {missing}, in none of its planes ({held}); profile a run of train/train.py"
            )
        window, count = (min(s for s, _ in steps), max(e for _, e in steps)), len(steps)
        for name, ns in notes.items():
            host[name] += ns / count / len(traces)
        for lines in operations.values():
            devices += 1
            busy, behind, gaps = _attribute(lines, window)
            for part, ns in busy.items():
                parts[part] += ns / count
            for kind, ns in behind.items():
                hidden[kind] += ns / count
            total += (window[1] - window[0]) / count
            idle += sum(end - start for start, end in gaps) / count
            for_data += _overlap(gaps, waits) / count
    mean = 1e-9 / devices
    return StepTime(
        steps=count,
        devices=devices,
        total=total * mean,
        parts={part: ns * mean for part, ns in _largest_first(parts)},
        idle=idle * mean,
        idle_for_data=for_data * mean,
        hidden={kind: ns * mean for kind, ns in _largest_first(hidden)},
        host={name: ns * 1e-9 for name, ns in _largest_first(host)},
    )


def _largest_first(sums: Mapping[_Key, float]) -> list[tuple[_Key, float]]:
    return sorted(sums.items(), key=lambda item: -item[1])


def table(found: StepTime) -> list[str]:
    """Returns the lines that `train/step_time.py` prints."""

    def row(name: str, seconds: float, *more: str) -> str:
        return f"{name:40}{seconds * 1e3:12.3f}{seconds / found.total:8.1%}{''.join(f'{x:>12}' for x in more)}".rstrip()

    lines = [
        f"{found.steps} steps on {found.devices} devices: {found.total * 1e3:.3f} ms per step, idle "
        f"{found.idle * 1e3:.3f} ms ({found.idle / found.total:.1%}), of which the host waited for data "
        f"{found.idle_for_data * 1e3:.3f} ms",
        "",
        f"{'by part of the model':40}{'ms':>12}{'':8}" + "".join(f"{phase:>12}" for phase in PHASES),
    ]
    for scope, phases in _by_scope(found.parts):
        name = "  " * (len(scope) - 1) + (scope[-1] or "(in no scope)")
        lines.append(row(name, sum(phases.values()), *(f"{phases[phase] * 1e3:.3f}" for phase in PHASES)))
    lines += [row("idle", found.idle), "", f"{'by kind':40}{'ms':>12}"]
    kinds: defaultdict[str, float] = defaultdict(float)
    for part, seconds in found.parts.items():
        kinds[part.kind] += seconds
    lines += [row(kind, seconds) for kind, seconds in _largest_first(kinds)] + [row("idle", found.idle)]
    lines += [row(f"{kind}, hidden behind these", seconds) for kind, seconds in found.hidden.items()]
    lines += ["", f"{'host, in the loop':40}{'ms':>12}"]
    shown = {name: s for name, s in found.host.items() if name and s >= found.total / 100}
    rest = sum(found.host.values()) - sum(shown.values())
    return lines + [row(name, seconds) for name, seconds in shown.items()] + [row("the rest", rest)]


def _by_scope(parts: dict[Part, float]) -> list[tuple[tuple[str, ...], dict[str, float]]]:
    """Returns the seconds of scopes and of the scopes in them, by phase, outer ones before inner ones."""
    sums: defaultdict[tuple[str, ...], dict[str, float]] = defaultdict(lambda: dict.fromkeys(PHASES, 0.0))
    for part, seconds in parts.items():
        scope = part.scope[:DEPTH] or ("",)
        for depth in range(1, len(scope) + 1):
            sums[scope[:depth]][part.phase] += seconds
    size = lambda scope: sum(sums[scope].values())  # noqa: E731
    order = sorted(sums, key=lambda scope: [(-size(scope[: i + 1]), scope[: i + 1]) for i in range(len(scope))])
    return [(scope, sums[scope]) for scope in order]
