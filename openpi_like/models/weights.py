"""Import and export of published weights; `openpi_like.models.formats` says which array holds which weight.

Nothing is loaded partly without being asked for: every array of a file is used, or named in an error together with all
others that do not fit. A weight is read, converted and placed on its devices before the next one is read.
"""

import dataclasses
import functools
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from rich.console import Console
from rich.table import Table as ConsoleTable
from safetensors.numpy import save_file

from openpi_like.config import near_names
from openpi_like.models.arrays import Arrays, open_arrays
from openpi_like.models.formats import Format, Index, Row, Table, WeightsError, family, recognise, whole_shape
from openpi_like.models.lora import Lora, Overlay, add_lora, is_lora, overlays
from openpi_like.models.param import BACKBONE
from openpi_like.models.policy import VisionLanguageConfig

# ---- Weights by name -------------------------------------------------------------------------------------------------


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a nested dict as {"a/b/c": leaf}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree


def named_weights(state: Any) -> dict[str, Any]:
    """Returns a state as nested dicts by name, see `openpi_like.models.param.weight_name`.

    Raises:
        ValueError: two weights would have the same name.
    """
    tree: dict[str, Any] = nnx.to_pure_dict(state)
    inner = tree.pop(BACKBONE, {})
    both = sorted(tree.keys() & inner.keys())
    if both:
        raise ValueError(f"parts {both} are both the policy's and its backbone's; a policy gives its parts other names")
    return {**inner, **tree}


def put_weights(state: Any, weights: Mapping[str, Any]) -> None:
    """Writes weights, nested by name as `named_weights` returns them, into a state."""
    inner = nnx.to_pure_dict(state).get(BACKBONE)
    tree = dict(weights)
    if inner is not None:
        tree[BACKBONE] = {part: tree.pop(part) for part in inner}
    nnx.replace_by_pure_dict(state, tree)


def abstract_model(config: Any, lora: Lora | None = None) -> nnx.Module:
    """Returns a model, with its overlay where there is one, whose weights are shapes; allocates nothing."""

    def create() -> nnx.Module:
        key = jax.random.key(0)
        model = config.create(key)
        return model if lora is None else add_lora(model, lora, key)

    return nnx.eval_shape(create)


def weight_shapes(config: Any, lora: Lora | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns {"a/b/c": shape} of a model's weights; allocates nothing."""
    return flatten(named_weights(nnx.state(abstract_model(config, lora), nnx.Param)))


def model_overlays(config: Any, lora: Lora) -> dict[str, Overlay]:
    """Returns the overlays of a model, see `openpi_like.models.lora.overlays`; allocates nothing."""
    return overlays(abstract_model(config, lora))


def flat_weights(model: nnx.Module) -> dict[str, Any]:
    """Returns {"a/b/c": array} of a model's weights."""
    return flatten(named_weights(nnx.state(model, nnx.Param)))


def bind(config: Any, weights: Mapping[str, Any], lora: Lora | None = None) -> Any:
    """Returns the model with the given nested weights, and its overlay where there is one; draws nothing."""
    graph, state = nnx.split(abstract_model(config, lora), nnx.Param)
    put_weights(state, jax.tree.map(jnp.asarray, dict(weights)))
    return nnx.merge(graph, state)


# ---- Import ----------------------------------------------------------------------------------------------------------


def known_formats(config: VisionLanguageConfig) -> dict[str, Format]:
    """Returns the layouts that hold this model's weights: those that it is published in, and, last, "ours"."""
    names = tuple(weight_shapes(config))
    ours = Format(
        rf"^({'|'.join(sorted({name.split('/')[0] for name in names}))})/",
        lambda stored: Table(tuple(Row(name, name) for name in stored)),
        written_as=names,
    )
    return {**config.formats(), "ours": ours}


def table_for(
    config: VisionLanguageConfig, names: Sequence[str], fmt: str | None, *, lora: Lora | None = None
) -> Table:
    """Returns the name table of a format (recognised by the names when None), with the overlay's rows.

    Raises:
        WeightsError: unknown format, or names that belong to none.
    """
    formats = known_formats(config)
    chosen = recognise(names, formats) if fmt is None else fmt
    if chosen is None:
        raise WeightsError(
            f"names of no format that holds this model ({', '.join(list(names)[:5])} ...); known: {', '.join(formats)}"
            f"\nthese arrays look like {family(names)}, this config is {family(formats['ours'].written_as)}"
        )
    if chosen not in formats:
        raise WeightsError(f"no weight format {chosen!r}; {near_names(chosen, list(formats))}")
    table = formats[chosen].table(names)
    return table if lora is None else table.with_overlays(model_overlays(config, lora))


@dataclasses.dataclass(frozen=True)
class LoadPlan:
    """What to take from where; made before anything is read.

    shapes: of our weights. rows: by our weight. report: one row per weight, {"weight", "shape", "from": "checkpoint" |
        "fresh", "why"}.
    copies: arrays whose numbers must equal those of another one. padded: arrays whose last rows are not taken.
    dropped: one line for each array that is not used, or not all of it.
    """

    shapes: dict[str, tuple[int, ...]]
    rows: dict[str, list[Row]]
    report: list[dict[str, str]]
    copies: dict[str, str]
    padded: frozenset[str]
    dropped: list[str]


def plan_load(
    config: VisionLanguageConfig,
    arrays: Arrays,
    *,
    fmt: str | None = None,
    reinitialize: Sequence[str] = (),
    drop: Sequence[str] = (),
    lora: Lora | None = None,
) -> LoadPlan:
    """Returns which arrays become which weights of `config`'s model.

    lora: an overlay that the model has beside; it starts fresh, at the base, where the file has none at all.
    reinitialize: regular expressions of weights that start fresh, although the file may have them.
    drop: regular expressions of arrays, in the file's names, that this model has no place for.

    Raises:
        WeightsError: an array is missing, unused or of the wrong shape, or a pattern matches no weight; lists all.
    """
    names = list(arrays.shapes)
    shapes = {name: tuple(leaf.shape) for name, leaf in weight_shapes(config, lora).items()}
    table = table_for(config, names, fmt, lora=lora)
    stored_overlay = {row.ours for row in table.rows if is_lora(row.ours) and row.theirs in arrays.shapes}
    why = {name: next((p for p in reinitialize if re.search(p, name)), None) for name in shapes}
    problems = [
        f"pattern {p!r} matches no weight; {near_names(p, list(shapes))}"
        for p in reinitialize
        if not any(re.search(p, name) for name in shapes)
    ]
    problems += [
        f"pattern {p!r} matches no array; {near_names(p, names)}"
        for p in drop
        if not any(re.search(p, n) for n in names)
    ]
    used = {row.theirs for row in table.rows if row.ours in shapes and why[row.ours] is None}
    problems += [
        f"{n}: to be dropped by {p!r}, but it is used; narrow the pattern, or let its weight start fresh"
        for n in names
        for p in drop
        if n in used and re.search(p, n)
    ]
    by_weight: dict[str, list[Row]] = {name: [] for name in shapes}
    known: set[str] = set()
    for row in table.rows:
        if row.ours in by_weight:
            known.add(row.theirs)
            by_weight[row.ours].append(row)
    rows: dict[str, list[Row]] = {}
    report = []
    for name, shape in shapes.items():
        found = [_row_problem(row, shape, arrays, table) for row in by_weight[name]]
        wrong = [p for p in found if p is not None]
        if why[name] is not None:
            state = "the file has none" if not by_weight[name] else "; ".join(wrong) or "the file has it"
            report.append(
                {"weight": name, "shape": str(shape), "from": "fresh", "why": f"asked by {why[name]!r}: {state}"}
            )
        elif is_lora(name) and not stored_overlay:
            start = {"weight": name, "shape": str(shape), "from": "fresh", "why": "the overlay starts at the base"}
            report.append(start)
        elif not by_weight[name]:
            problems.append(f"{name}: this format does not hold it")
        elif wrong:
            problems += wrong
        else:
            rows[name] = by_weight[name]
            count = len({row.theirs for row in by_weight[name]})
            source = by_weight[name][0].theirs + (f" and {count - 1} more" if count > 1 else "")
            report.append({"weight": name, "shape": str(shape), "from": "checkpoint", "why": source})
    dropped = []
    for name in names:
        if name in known or name in table.copies:
            continue
        known_unused = {**table.unused, **{p: f"asked by {p!r}" for p in drop}}
        reason = next((text for pattern, text in known_unused.items() if re.search(pattern, name)), None)
        if reason is None:
            problems.append(f"{name}: not used; {near_names(name, sorted(known))}")
        else:
            dropped.append(f"{name}: {reason}")
    dropped += [
        f"{r.theirs}: rows {shapes[r.ours][0]} and up: padding of the vocabulary"
        for found in rows.values()
        for r in found
        if r.theirs in table.pad_rows and arrays.shapes[r.theirs][0] > shapes[r.ours][0]
    ]
    if problems:
        theirs, mine = family(names), family(list(shapes))
        advice = "; merge them with lora_scale" if "LoRA" in theirs else ": choose the other config"
        hint = "" if theirs == mine else f"\nthese arrays look like {theirs}, this config is {mine}{advice}"
        raise WeightsError(
            f"arrays do not fit the model ({len(problems)} problems):\n  " + "\n  ".join(problems) + hint
        )
    copies = {a: b for a, b in table.copies.items() if a in arrays.shapes and b in arrays.shapes}
    return LoadPlan(shapes, rows, report, copies, frozenset(table.pad_rows), dropped)


def _row_problem(row: Row, shape: tuple[int, ...], arrays: Arrays, table: Table) -> str | None:
    """Returns what is wrong with the array of one row, or None."""
    if row.theirs not in arrays.shapes:
        return f"{row.theirs}: missing (for {row.ours}); {near_names(row.theirs, list(arrays.shapes))}"
    part = _shape_at(shape, row.at)
    try:
        expected = row.their_shape(part)
        got = _shape_at(arrays.shapes[row.theirs], row.take)
    except (ValueError, IndexError):
        return f"{row.theirs}: got shape {arrays.shapes[row.theirs]}, which {row.ours} {shape} cannot be taken from"
    if row.theirs in table.pad_rows and got[0] == expected[0] + table.pad_rows[row.theirs]:
        got = (expected[0], *got[1:])
    if got == expected:
        return None
    whole = f" at {row.take}" if row.take else ""
    whole += f" (for {row.ours})" if row.ours != row.theirs else ""
    hint = "; the same sizes in another order: transposed?" if sorted(got) == sorted(expected) else ""
    return f"{row.theirs}: got shape {got}, expected {expected}{whole}{hint}"


def _shape_at(shape: tuple[int, ...], index: tuple[int | slice, ...]) -> tuple[int, ...]:
    return np.broadcast_to(np.zeros(()), shape)[index].shape


class WeightReader:
    """Reads planned weights one at a time, and collects what is wrong with arrays."""

    def __init__(self, arrays: Arrays, plan: LoadPlan) -> None:
        self._arrays, self._plan = arrays, plan
        self.problems: list[str] = []

    def array(self, name: str, *, counts: bool = False) -> np.ndarray:
        """Returns one array of the file. counts: it may be of integers.

        Raises:
            WeightsError: it cannot be read.
        """
        try:
            array = self._arrays.read(name)
        except Exception as e:  # Orbax raises bare Exception for a damaged array
            first = str(e.__cause__ or e).split("\n")[0]
            raise WeightsError(f"{name}: cannot be read: {first}; the file is damaged or incomplete") from e
        if counts and jnp.issubdtype(array.dtype, jnp.integer):
            return array
        if not jnp.issubdtype(array.dtype, jnp.floating):
            self.problems.append(f"{name}: got {array.dtype}, expected a floating-point array")
        elif not np.isfinite(array.sum(dtype=np.float64)):
            self.problems.append(f"{name}: holds values that are not finite")
        return array

    def weight(self, name: str, dtype: Any) -> np.ndarray:
        """Returns one of our weights, on the host."""
        shape, rows = self._plan.shapes[name], self._plan.rows[name]
        whole = np.empty(shape, dtype) if len(rows) > 1 or rows[0].at else None
        for row in rows:
            part = _shape_at(shape, row.at)
            theirs = np.asarray(self.array(row.theirs, counts=row.counts)[row.take])  # perhaps a number
            if row.theirs in self._plan.padded:
                theirs = theirs[: row.their_shape(part)[0]]
            converted = np.asarray(row.to_ours(theirs, part))
            if whole is None:
                return np.ascontiguousarray(converted.astype(dtype)).reshape(converted.shape)  # as below
            whole[row.at] = converted
        assert whole is not None  # a planned weight has at least one row
        return whole

    def check(self) -> None:
        """Compares copies, and reports.

        Raises:
            WeightsError: lists all arrays that are not of finite floats, or differ from the one they are a copy of.
        """
        for copy, main in self._plan.copies.items():
            if not np.array_equal(self.array(copy), self.array(main)):
                self.problems.append(f"{copy}: differs from {main}, expected the same numbers")
        if self.problems:
            raise WeightsError("weights cannot be used:\n  " + "\n  ".join(dict.fromkeys(self.problems)))


def read_weights(
    arrays: Arrays,
    plan: LoadPlan,
    *,
    dtype: str = "float32",
    shardings: Mapping[str, Any] | None = None,
    hold: Callable[[str, jax.Array], Any] | None = None,
) -> dict[str, Any]:
    """Returns the planned weights, flat by name, placed as `shardings` (flat; None: numpy arrays on the host).

    One weight is on the host at a time; each device receives its own part only.
    hold: what is to be made of each as soon as it is placed, by name, such as the same in fewer bits.

    Raises:
        WeightsError: an array cannot be read, is not of finite floats, or differs from the one it is a copy of.
    """
    target = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    reader = WeightReader(arrays, plan)
    weights: dict[str, Any] = {}
    for name in plan.rows:
        whole = reader.weight(name, target if plan.shapes[name] else np.float32)  # numbers alone stay exact
        if shardings is None:
            weights[name] = whole
        else:
            placed = jax.make_array_from_callback(plan.shapes[name], shardings[name], whole.__getitem__)
            weights[name] = placed if hold is None else hold(name, placed)
    reader.check()
    return weights


def load_weights(
    config: VisionLanguageConfig, path: str | Path, *, fmt: str | None = None, dtype: str = "float32"
) -> dict[str, Any]:
    """Returns all weights of a model from published files, nested by name, as numpy arrays on the host.

    Raises:
        WeightsError: as `open_arrays`, `plan_load` and `read_weights`.
    """
    arrays = open_arrays(path)
    return unflatten(read_weights(arrays, plan_load(config, arrays, fmt=fmt), dtype=dtype))


def print_load_report(plan: LoadPlan, console: Console) -> None:
    """Prints one line per weight: taken from the checkpoint or fresh, and from where or why; then what was dropped."""
    table = ConsoleTable(title="weights", show_lines=False)
    for column in ("weight", "shape", "from", "why"):
        table.add_column(column)
    for row in plan.report:
        style = None if row["from"] == "checkpoint" else "yellow"
        table.add_row(row["weight"], row["shape"], row["from"], row["why"], style=style)
    console.print(table)
    for line in plan.dropped:
        console.print(f"not used: {line}")


# ---- Export ----------------------------------------------------------------------------------------------------------


def _written_as(config: VisionLanguageConfig, fmt: str) -> tuple[str, ...]:
    formats = known_formats(config)
    return formats[fmt].written_as if fmt in formats else ()


def layout(config: VisionLanguageConfig, fmt: str) -> dict[str, tuple[int, ...]]:
    """Returns {their name: shape} of everything that `export_weights` writes; allocates nothing."""
    ours = {name: tuple(leaf.shape) for name, leaf in weight_shapes(config).items()}
    table = table_for(config, _written_as(config, fmt), fmt)
    parts: dict[str, list[tuple[Index, tuple[int, ...]]]] = {}
    for row in table.rows:
        parts.setdefault(row.theirs, []).append((row.take, row.their_shape(_shape_at(ours[row.ours], row.at))))
    whole = {name: whole_shape(each) for name, each in parts.items()}
    padded = {name: (whole[name][0] + rows, *whole[name][1:]) for name, rows in table.pad_rows.items()}
    return whole | padded | table.fillers


def export_weights(
    config: VisionLanguageConfig, weights: Mapping[str, Any], fmt: str, *, lora: Lora | None = None
) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Yields (their name, function that returns the array) for flat weights of ours: the inverse of an import.

    lora: the overlay that the weights have beside.

    Raises:
        WeightsError: the format cannot hold this model.
    """
    names = tuple(weights) if fmt == "ours" else _written_as(config, fmt)
    table = table_for(config, names, fmt, lora=lora)
    left = sorted(weights.keys() - {row.ours for row in table.rows})
    if left:
        raise WeightsError(f"format {fmt!r} cannot hold {', '.join(left)}; choose another format")
    by_array: dict[str, list[Row]] = {}
    for row in table.rows:
        by_array.setdefault(row.theirs, []).append(row)

    def make(name: str) -> np.ndarray:
        parts = [(row.take, row.to_theirs(np.asarray(np.asarray(weights[row.ours])[row.at]))) for row in by_array[name]]
        take, array = parts[0]
        if len(parts) > 1 or take:
            array = np.empty(whole_shape((take, part.shape) for take, part in parts), array.dtype)
            for take, part in parts:
                array[take] = part
        if name in table.pad_rows:
            mean = array.astype(np.float32).mean(axis=0, keepdims=True).astype(array.dtype)
            array = np.concatenate([array, np.repeat(mean, table.pad_rows[name], axis=0)])
        return np.ascontiguousarray(array).reshape(array.shape)  # which makes a row of a number

    for name in by_array:
        yield name, functools.partial(make, name)
    dtype = next(iter(weights.values())).dtype
    for name, shape in table.fillers.items():
        yield name, functools.partial(np.zeros, shape, dtype)


def write_safetensors(
    arrays: Iterator[tuple[str, Callable[[], np.ndarray]]], directory: Path, *, max_bytes: int = 4_500_000_000
) -> list[str]:
    """Writes `model.safetensors`, or several files and an index where there is more than `max_bytes`; returns names.

    Holds at most one file's arrays in memory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files: list[dict[str, tuple[int, ...]]] = []
    pending: dict[str, np.ndarray] = {}

    def flush() -> None:
        save_file(pending, directory / f"part-{len(files)}.safetensors", metadata={"format": "pt"})
        files.append({name: array.shape for name, array in pending.items()})
        pending.clear()

    size = total = 0
    for name, make in arrays:
        array = make()
        if pending and size + array.nbytes > max_bytes:
            flush()
            size = 0
        pending[name] = array
        size, total = size + array.nbytes, total + array.nbytes
    flush()
    if len(files) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        where = {name: file for file, held in zip(names, files, strict=True) for name in held}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for i, name in enumerate(names):
        (directory / f"part-{i}.safetensors").rename(directory / name)
    return names


def write_npz(arrays: Iterator[tuple[str, Callable[[], np.ndarray]]], path: Path) -> Path:
    """Writes a big_vision `.npz`, names under "params/", one array in memory at a time; returns the path."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as file:
        for name, make in arrays:
            with file.open(f"params/{name}.npy", "w", force_zip64=True) as f:
                np.lib.format.write_array(f, make(), allow_pickle=False)
    return path


def write_openpi(arrays: Iterator[tuple[str, Callable[[], np.ndarray]]], directory: Path) -> None:
    """Writes `params/` as openpi does: Orbax, {"params": ...}, and a last level "value"."""
    tree = {"params": unflatten({f"{name}/value": make() for name, make in arrays})}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save((directory / "params").resolve(), tree)
