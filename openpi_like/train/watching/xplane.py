"""Traces as JAX writes them (`*.xplane.pb`), without TensorFlow: planes of lines of events, and the compiled programs.

`jax.profiler.ProfileData` gives events, but neither the programs that are stored beside them, which know the
`jax.named_scope` of every operation, nor what is stored once for all events of one kind, where a TPU says it.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

# Of xplane.proto and hlo.proto, the fields that are read here: name -> number and type; [] are repeated.
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "XSpace": {"planes": (1, "[XPlane]")},
    "XPlane": {
        "name": (2, "string"),
        "lines": (3, "[XLine]"),
        "event_metadata": (4, "[XEventEntry]"),
        "stat_metadata": (5, "[XStatEntry]"),
    },
    "XEventEntry": {"key": (1, "int64"), "value": (2, "XEventMetadata")},
    "XStatEntry": {"key": (1, "int64"), "value": (2, "XStatMetadata")},
    "XEventMetadata": {"name": (2, "string"), "display_name": (4, "string"), "stats": (5, "[XStat]")},
    "XStatMetadata": {"name": (2, "string")},
    "XLine": {"name": (2, "string"), "timestamp_ns": (3, "int64"), "events": (4, "[XEvent]")},
    "XEvent": {
        "metadata_id": (1, "int64"),
        "offset_ps": (2, "int64"),
        "duration_ps": (3, "int64"),
        "stats": (4, "[XStat]"),
    },
    "XStat": {
        "metadata_id": (1, "int64"),
        "double_value": (2, "double"),
        "uint64_value": (3, "uint64"),
        "int64_value": (4, "int64"),
        "str_value": (5, "string"),
        "bytes_value": (6, "bytes"),
        "ref_value": (7, "uint64"),
    },
    "HloProto": {"hlo_module": (1, "HloModule")},
    "HloModule": {"name": (1, "string"), "computations": (3, "[HloComputation]")},
    "HloComputation": {"instructions": (2, "[HloInstruction]"), "id": (5, "int64")},
    "HloInstruction": {
        "name": (1, "string"),
        "opcode": (2, "string"),
        "metadata": (7, "OpMetadata"),
        "custom_call_target": (28, "string"),
        "called_computation_ids": (38, "[int64]"),
    },
    "OpMetadata": {"op_name": (2, "string")},
}


class TraceError(ValueError):
    """There is no trace, or nothing in it that can be read."""


@functools.cache
def _parser(name: str) -> type[message.Message]:
    types: Any = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="openpi_like_trace.proto", package="trace", syntax="proto3")
    for of, fields in _MESSAGES.items():
        described = file.message_type.add(name=of)
        for field, (number, kind) in fields.items():
            base = kind.strip("[]")
            scalar = getattr(types, f"TYPE_{base.upper()}", None)
            described.field.add(
                name=field,
                number=number,
                label=types.LABEL_REPEATED if kind[0] == "[" else types.LABEL_OPTIONAL,
                type=types.TYPE_MESSAGE if scalar is None else scalar,
                type_name=f".trace.{base}" if scalar is None else None,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"trace.{name}"))


@dataclasses.dataclass(frozen=True)
class Event:
    """start, end: nanoseconds. stats: what the event says about itself, and what all events of its kind say."""

    name: str
    start: float
    end: float
    stats: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a compiled program. inside: what a fusion is made of. path: its name scopes and primitive."""

    opcode: str
    path: str
    target: str
    inside: tuple["Instruction", ...]


class Plane:
    """One device, or the threads of the host."""

    def __init__(self, plane: Any) -> None:
        self.name: str = plane.name
        self._plane = plane
        self._stat_names = {entry.key: entry.value.name for entry in plane.stat_metadata}
        self._events = {entry.key: entry.value for entry in plane.event_metadata}
        self._shared = {key: self._stats(value.stats) for key, value in self._events.items()}

    @property
    def lines(self) -> list[str]:
        """Names of the lines."""
        return [line.name for line in self._plane.lines]

    def events(self, line: int) -> Iterator[Event]:
        """Yields the events of a line."""
        of = self._plane.lines[line]
        for event in of.events:
            start = of.timestamp_ns + event.offset_ps / 1e3
            kind = self._events.get(event.metadata_id)
            name = "" if kind is None else kind.display_name or kind.name
            stats = self._shared.get(event.metadata_id, {}) | self._stats(event.stats)
            yield Event(name, start, start + event.duration_ps / 1e3, stats)

    def shared_stats(self) -> Iterator[dict[str, Any]]:
        """Yields what is said of each kind of events."""
        yield from self._shared.values()

    def _stats(self, stats: Any) -> dict[str, Any]:
        return {self._stat_names.get(stat.metadata_id, ""): self._value(stat) for stat in stats}

    def _value(self, stat: Any) -> Any:
        for field, value in stat.ListFields()[::-1]:  # the value comes after the id of its name
            if field.number == 7:
                return self._stat_names.get(value, "")
            if field.number > 1:
                return value
        return 0  # what proto3 does not store


def read_planes(path: Path) -> list[Plane]:
    """Returns the planes of a trace file.

    Raises:
        TraceError: it is no such file.
    """
    space: Any = _parser("XSpace")()
    try:
        space.ParseFromString(path.read_bytes())
    except message.DecodeError as e:
        raise TraceError(f"{path} is not a trace, or was cut short: {e}; profile the run again") from e
    return [Plane(plane) for plane in space.planes]


def read_programs(planes: list[Plane]) -> dict[str, dict[str, Instruction]]:
    """Returns the instructions of the programs that a trace holds, by name, for "<program id>" and "<module>"."""
    programs: dict[str, dict[str, Instruction]] = {}
    for stats in (s for plane in planes for s in plane.shared_stats() if "Hlo Proto" in s):
        proto: Any = _parser("HloProto")()
        proto.ParseFromString(stats["Hlo Proto"])
        instructions = _instructions(proto.hlo_module)
        programs[str(stats.get("program_id", ""))] = instructions
        programs.setdefault(proto.hlo_module.name, {}).update(instructions)
    return programs


def _instructions(module: Any) -> dict[str, Instruction]:
    computations = {c.id: c.instructions for c in module.computations}

    @functools.cache
    def inside(computation: int) -> tuple[Instruction, ...]:
        return tuple(convert(i) for i in computations.get(computation, ()))

    def convert(instruction: Any) -> Instruction:
        # Of loops and branches the bodies are events of their own.
        called = instruction.called_computation_ids if instruction.opcode in ("fusion", "call", "custom-call") else ()
        parts = tuple(part for computation in called for part in inside(computation))
        return Instruction(instruction.opcode, instruction.metadata.op_name, instruction.custom_call_target, parts)

    return {i.name: convert(i) for c in module.computations for i in c.instructions}
