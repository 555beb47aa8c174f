"""Files of published weights as named arrays that are read one at a time."""

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from safetensors import SafetensorError, safe_open

from openpi_like.models.formats import WeightsError


@runtime_checkable
class Arrays(Protocol):
    """Named arrays that are read one at a time."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray:
        """Returns one array on the host."""
        ...


class MemoryArrays:
    """Arrays that are in memory already."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays
        self.shapes = {k: tuple(v.shape) for k, v in arrays.items()}

    def read(self, name: str) -> np.ndarray:
        return np.asarray(self._arrays[name])


class NpzArrays:
    """A big_vision `.npz`: names may begin with "params/"; bfloat16 is stored as two-byte records."""

    def __init__(self, path: Path) -> None:
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("its end is missing" if path.is_file() else "no such file")
        self._file = np.load(path, allow_pickle=False)
        prefix = "params/" if all(k.startswith("params/") for k in self._file) else ""
        self._names = {k.removeprefix(prefix): k for k in self._file}
        self.shapes = {}
        for name, stored in self._names.items():  # headers only
            with self._file.zip.open(f"{stored}.npy") as f:
                version = np.lib.format.read_magic(f)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                self.shapes[name] = read(f)[0]

    def read(self, name: str) -> np.ndarray:
        array = self._file[self._names[name]]
        return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


class SafetensorsArrays:
    """One safetensors file, or all that an index file or a directory names."""

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            there = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
            if len(there) != 1:
                raise WeightsError(
                    f"{path} holds {[p.name for p in there]}, expected one file or one index; name the one"
                )
            path = there[0]
        self._files: dict[str, Any] = {}
        if path.name.endswith(".json"):
            index = json.loads(path.read_text())
            if not (isinstance(index, dict) and isinstance(index.get("weight_map"), dict)):
                raise WeightsError(f"{path} is no index of safetensors, expected a JSON object with weight_map")
            stored = index["weight_map"]
            opened = {name: safe_open(path.parent / name, "numpy") for name in sorted(set(stored.values()))}
            held = {(k, name) for name, file in opened.items() for k in file.keys()}  # noqa: SIM118
            lost = sorted(set(stored.items()) ^ held)
            if lost:
                raise WeightsError(f"{path} and its files name different arrays: {[f'{k} in {n}' for k, n in lost]}")
            self._files = {k: opened[name] for k, name in stored.items()}
        else:
            file = safe_open(path, "numpy")
            self._files = dict.fromkeys(file.keys(), file)
        self.shapes = {k: tuple(f.get_slice(k).get_shape()) for k, f in self._files.items()}

    def read(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name)


class OrbaxArrays:
    """An Orbax directory of arrays; openpi's {"params": ...} level and its trailing "value" level are taken off."""

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        self._checkpointer = ocp.PyTreeCheckpointer()
        metadata = self._checkpointer.metadata(self._path).item_metadata
        if metadata is None:
            raise ValueError("its metadata cannot be read")
        leaves, self._structure = jax.tree_util.tree_flatten_with_path(metadata.tree, is_leaf=_is_array)
        stored = [leaf_name(path) for path, _ in leaves]
        prefix = "params/" if all(k.startswith("params/") for k in stored) else ""
        suffix = "/value" if all(k.endswith("/value") for k in stored) else ""
        self._names = [k.removeprefix(prefix).removesuffix(suffix) for k in stored]
        self.shapes = {name: tuple(leaf.shape) for name, (_, leaf) in zip(self._names, leaves, strict=True)}

    def read(self, name: str) -> np.ndarray:
        i = self._names.index(name)
        item = jax.tree.unflatten(self._structure, [np.zeros(0) if n == name else ocp.PLACEHOLDER for n in self._names])
        args = jax.tree.unflatten(self._structure, [ocp.RestoreArgs(restore_type=np.ndarray)] * len(self._names))
        restored = self._checkpointer.restore(self._path, args=ocp.args.PyTreeRestore(item=item, restore_args=args))
        return np.asarray(jax.tree.leaves(restored, is_leaf=_is_array)[i])


def leaf_name(path: tuple[Any, ...]) -> str:
    """Returns what a leaf of a tree is called where Orbax has written it, for its path in JAX."""
    return "/".join(str(next(getattr(k, a) for a in ("key", "idx", "name") if hasattr(k, a))) for k in path)


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") or x is ocp.PLACEHOLDER


def merge_lora(w: np.ndarray, a: np.ndarray, b: np.ndarray, *, scale: float, summed_heads: bool = False) -> np.ndarray:
    """Returns w + scale * a @ b over the last two axes: the map that openpi's LoRA layers compute, as one weight.

    summed_heads: for attention outputs (L, N, H, D), where openpi sums the heads in both factors, so that every head
    of `a` meets the sum over heads of `b`. In float32, whatever w is: rounding to bfloat16 would lose most of a delta.
    """
    if summed_heads:
        b = b.sum(axis=-3, keepdims=True)
    delta = np.matmul(a.astype(np.float32), b.astype(np.float32))
    return w.astype(np.float32) + np.float32(scale) * delta


class LoraMerged:
    """openpi arrays with their LoRA leaves merged into the weights they belong to.

    Attention has lora_a and lora_b beside w; the MLP has <name>_lora_a and <name>_lora_b, which openpi never scales.
    """

    def __init__(self, arrays: Arrays, scale: float) -> None:
        """scale: alpha / rank of the attention's LoRA (alpha / sqrt(rank) with rslora); 1 in openpi's own configs."""
        self._arrays, self._scale = arrays, scale
        leaves = [k for k in arrays.shapes if re.search(r"(/|_)lora_[ab]$", k)]
        self.shapes = {k: v for k, v in arrays.shapes.items() if k not in leaves}
        if not leaves:
            raise WeightsError("lora_scale is given, but there are no LoRA weights; leave it out")
        self._pairs: dict[str, tuple[str, str]] = {}
        problems = []
        for stem in sorted({k[:-1] for k in leaves}):  # ".../lora_" or "..._lora_"
            base = f"{stem.removesuffix('lora_')}w" if stem.endswith("/lora_") else stem.removesuffix("_lora_")
            a, b = (arrays.shapes.get(f"{stem}{end}", ()) for end in "ab")
            w = arrays.shapes.get(base, ())
            if not (w and a and b):
                have = [name for name, shape in ((base, w), (f"{stem}a", a), (f"{stem}b", b)) if shape]
                problems.append(f"{base}: expected {base}, {stem}a and {stem}b, got {have}")
            elif a != (*w[:-1], a[-1]) or b != (*w[:-2], a[-1], w[-1]):
                problems.append(
                    f"{base} {w}: lora_a {a} and lora_b {b}, expected {(*w[:-1], 'r')}, {(*w[:-2], 'r', w[-1])}"
                )
            self._pairs[base] = (f"{stem}a", f"{stem}b")
        if problems:
            raise WeightsError("LoRA weights that belong to nothing:\n  " + "\n  ".join(problems))

    def read(self, name: str) -> np.ndarray:
        w = self._arrays.read(name)
        if name not in self._pairs:
            return w
        a, b = (self._arrays.read(leaf) for leaf in self._pairs[name])
        scale = self._scale if name.endswith("/w") else 1.0
        return merge_lora(w, a, b, scale=scale, summed_heads="/attn_vec_einsum" in name)


def open_arrays(path: str | Path, *, lora_scale: float | None = None) -> Arrays:
    """Opens published weights: `.npz`, `.safetensors` (or its index file, or a directory with either), or Orbax.

    An Orbax path is the directory of arrays itself, or a checkpoint step that has it as `params`.
    lora_scale: merges openpi's LoRA weights, see `LoraMerged`; None leaves them, and no model has a place for them.

    Raises:
        WeightsError: there is nothing, or it cannot be read.
    """
    if lora_scale is not None:
        return LoraMerged(open_arrays(path), lora_scale)
    path = Path(path)
    try:
        if path.suffix == ".npz":
            return NpzArrays(path)
        if path.suffix in (".safetensors", ".json") or any(path.glob("*.safetensors")):
            return SafetensorsArrays(path)
        for directory in (path, path / "params"):
            if (directory / "_METADATA").is_file():
                return OrbaxArrays(directory)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, SafetensorError) as e:
        if isinstance(e, WeightsError):
            raise
        raise WeightsError(f"cannot read {path}: {e}; the file is damaged or incomplete, copy it again") from e
    there = sorted(p.name for p in path.iterdir()) if path.is_dir() else "no such file or directory"
    raise WeightsError(
        f"no weights at {path}: expected an .npz file, safetensors, or an Orbax directory (its `params`, or the step "
        f"above it); got {there}"
    )
