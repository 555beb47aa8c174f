"""Name tables: which array of a published checkpoint holds which of our weights. Import and export both read them.

A backbone's config, and a policy's, returns the formats that its weights are published in.

A row says: our weight, at this index, is their array, at that index, with its axes in another order. Axis letters are
those of the modules: L layers, D width, N heads, K kv heads, H head dim, F mlp width, E width of the language model,
V vocabulary, p and q patch, C colours, J action dims.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import einops
import numpy as np

from openpi_like.models.lora import SUFFIX, Overlay
from openpi_like.models.param import HEADS

Index = tuple[int | slice, ...]


class WeightsError(ValueError):
    """Weights are damaged, or do not fit the model; the message lists everything that does not."""


@dataclasses.dataclass(frozen=True)
class Row:
    """ours[at] = rearrange(theirs[take], axes) / factor, with indices into leading axes.

    axes: "their axes -> our axes" as in einops; "" where they are the same.
    counts: theirs may be of integers.
    """

    ours: str
    theirs: str
    axes: str = ""
    at: Index = ()
    take: Index = ()
    factor: float = 1.0
    counts: bool = False

    def their_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of theirs[take] for the shape of ours[at]."""
        if not self.axes:
            return ours
        left, right = self.axes.split("->")
        sizes = dict(zip(right.split(), ours, strict=True))
        groups = re.findall(r"\([^)]*\)|\S+", left)
        return tuple(int(np.prod([sizes[a] for a in group.strip("()").split()])) for group in groups)

    def to_ours(self, theirs: np.ndarray, ours: tuple[int, ...]) -> np.ndarray:
        """Returns ours[at], of shape `ours`, for theirs[take]."""
        if self.factor != 1:
            theirs = theirs / np.float32(self.factor)
        if not self.axes:
            return theirs
        names = self.axes.split("->")[1].split()
        return einops.rearrange(theirs, self.axes, **dict(zip(names, ours, strict=True)))

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """Inverse of `to_ours`."""
        if self.factor != 1:
            ours = ours * np.float32(self.factor)
        if not self.axes:
            return ours
        left, right = self.axes.split("->")
        return einops.rearrange(ours, f"{right} -> {left}")


@dataclasses.dataclass(frozen=True)
class RepeatedRow(Row):
    """theirs[take] repeats ours along an axis, `count` times."""

    axis: int = 0
    count: int = 1

    def their_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        return (*ours[: self.axis], self.count, *ours[self.axis :])

    def to_ours(self, theirs: np.ndarray, ours: tuple[int, ...]) -> np.ndarray:
        first = np.take(theirs, [0], axis=self.axis)
        if not (theirs == first).all():
            raise WeightsError(
                f"{self.theirs}: heads have weights of their own, {self.ours} is one for all of them; "
                "load them with LoraRule(per_head=True)"
            )
        return first.squeeze(self.axis)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        return np.repeat(np.expand_dims(ours, self.axis), self.count, axis=self.axis)


@dataclasses.dataclass(frozen=True)
class SummedRow(Row):
    """ours is the sum of theirs[take] along an axis of `count` entries, divided by `factor`."""

    axis: int = 0
    count: int = 1

    def their_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        return (*ours[: self.axis], self.count, *ours[self.axis :])

    def to_ours(self, theirs: np.ndarray, ours: tuple[int, ...]) -> np.ndarray:
        return theirs.astype(np.float32).sum(self.axis) / np.float32(self.factor)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        part = ours * np.float32(self.factor / self.count)
        return np.repeat(np.expand_dims(part, self.axis), self.count, axis=self.axis)


@dataclasses.dataclass(frozen=True)
class Table:
    """One published layout for one model config.

    copies: arrays that repeat another one, if they are there: {name: name}; they must be equal to it.
    unused: regular expressions of arrays that the layout has and our model does not: {pattern: why}.
    pad_rows: array -> rows it has beyond ours, without meaning: dropped when read, written as the mean row.
    fillers: arrays without meaning that the layout's own tools insist on, and their shapes; written as zeros.
    lora_names: returns what A and B of LoRA are called, for the array of a weight; None where the layout has no LoRA.
    """

    rows: tuple[Row, ...]
    copies: dict[str, str] = dataclasses.field(default_factory=dict)
    unused: dict[str, str] = dataclasses.field(default_factory=dict)
    pad_rows: dict[str, int] = dataclasses.field(default_factory=dict)
    fillers: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    lora_names: Callable[[str], tuple[str, str]] | None = None

    def with_overlays(self, overlays: Mapping[str, Overlay]) -> "Table":
        """Returns the table with rows for LoRA, by the name of its weight; as it is where the layout has none."""
        if self.lora_names is None:
            return self
        rows = [new for row in self.rows if row.ours in overlays for new in self._lora(row, overlays[row.ours])]
        return dataclasses.replace(self, rows=(*self.rows, *rows))

    def _lora(self, row: Row, overlay: Overlay) -> list[Row]:
        """In openpi B is not scaled, heads have an A and a B each, and maps that sum over heads sum B over them too."""
        assert self.lora_names is not None
        a_name, b_name = self.lora_names(row.theirs)
        a, b = f"{row.ours}{SUFFIX}/a", f"{row.ours}{SUFFIX}/b"
        common: dict[str, Any] = {"at": row.at, "take": row.take}
        heads = [i for i, axis in enumerate(overlay.axes) if axis in HEADS]
        if not heads or (overlay.per_head and heads[0] not in overlay.inputs):
            return [Row(a, a_name, **common), Row(b, b_name, factor=overlay.scale, **common)]
        (at,) = heads
        count = overlay.shape[at]
        if at in overlay.inputs:
            summed = SummedRow(b, b_name, factor=overlay.scale, axis=at, count=count, **common)
            return [Row(a, a_name, **common), summed]
        lead = " ".join("abcdefgh"[:at])
        order = f"{lead} N r H -> {lead} r N H"
        shared = RepeatedRow(a, a_name, axis=at, count=count, **common)
        return [shared, Row(b, b_name, order, factor=overlay.scale, **common)]


@dataclasses.dataclass(frozen=True)
class Format:
    """A published layout of one model.

    sign: a regular expression, found in a name that only this layout has. table: returns the rows, for the names of a
        file, by which variants are told apart. written_as: names that stand for a file where there is none to look at.
    partial: the layout is that of policies, of which these rows are the backbone's part alone.
    """

    sign: str
    table: Callable[[Sequence[str]], Table]
    written_as: tuple[str, ...] = ()
    partial: bool = False

    def with_rows(self, more: Callable[[Sequence[str]], Table]) -> "Format":
        """Returns the layout with the rows, and all else, of a second table: of what a policy adds to its backbone."""

        def both(names: Sequence[str]) -> Table:
            first, second = self.table(names), more(names)
            return Table(
                rows=(*first.rows, *second.rows),
                copies=first.copies | second.copies,
                unused=first.unused | second.unused,
                pad_rows=first.pad_rows | second.pad_rows,
                fillers=first.fillers | second.fillers,
                lora_names=second.lora_names or first.lora_names,
            )

        return dataclasses.replace(self, table=both, partial=False)


def whole_shape(parts: Iterable[tuple[Index, tuple[int, ...]]]) -> tuple[int, ...]:
    """Returns the shape of an array made of parts: where each lies in it (`Row.take`), and its shape."""
    shapes = []
    for take, shape in parts:
        sizes = list(shape)
        for axis, at in enumerate(take):
            if isinstance(at, int):
                sizes.insert(axis, at + 1)
            elif at.stop is not None:
                sizes[axis] = at.stop
        shapes.append(sizes)
    return tuple(map(max, zip(*shapes, strict=True)))


def pair(ours: str, theirs: str, names: Sequence[str] = ("kernel", "bias")) -> list[Row]:
    """Returns the rows of arrays with the same names below `ours` and `theirs`."""
    return [Row(f"{ours}/{name}", f"{theirs}/{name}") for name in names]


def torch_linear(ours: str, theirs: str, kernel: str, bias: str, at: Index = ()) -> list[Row]:
    """Returns the rows of an affine map in torch's (out, in) order; kernel, bias: `Row.axes`."""
    return [
        Row(f"{ours}/kernel", f"{theirs}.weight", kernel, at=at),
        Row(f"{ours}/bias", f"{theirs}.bias", bias, at=at),
    ]


def recognise(names: Iterable[str], formats: Mapping[str, Format]) -> str | None:
    """Returns the first of these formats that these names belong to, or None."""
    names = list(names)
    return next((name for name, fmt in formats.items() if any(re.search(fmt.sign, n) for n in names)), None)


def family(names: Iterable[str]) -> str:
    """Returns which model these names belong to, in words, for error messages."""
    names = list(names)
    has = lambda pattern: any(re.search(pattern, n) for n in names)  # noqa: E731
    if has(r"lora"):
        return "a model with LoRA weights"
    if has(r"(^|[/.])vlm_with_expert\.|^expert/layers/joint/"):
        return "SmolVLA"
    if has(r"(^|[/.])(action_time_mlp_in|action_time_in)[/.]"):
        return "pi0"
    if has(r"(^|[/.])(time_mlp_in|time_in)[/.]"):
        return "pi0.5"
    if has(r"^(PaliGemma/)?llm/|language_model|^vlm/"):
        return "PaliGemma or pi0-FAST (no action expert)"
    return "an image tower alone" if has(r"^img/|^vision/") else "no model we know"
