"""What has to be the same on all processes of a run, and where it is not."""

import functools
import hashlib
import importlib.metadata
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import openpi_like

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
SHOWN = 5  # differences named in an error
ABSENT = object()


def software() -> dict[str, str]:
    """Returns what a process computes with: versions, the digest of this package's sources, and its devices."""
    versions = {name: _version(name) for name in PACKAGES}
    kinds = sorted({device.device_kind for device in jax.local_devices()})
    return {
        "python": platform.python_version(),
        **{name: version for name, version in versions.items() if version},
        "sources of openpi_like": _sources(),
        "devices": f"{jax.local_device_count()} x {', '.join(kinds)}",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _sources() -> str:
    root = Path(openpi_like.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def differences(mine: Any, theirs: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted name, value here, value there) of all that differs between two JSON-ready values."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in mine | theirs:
            yield from differences(mine.get(key, ABSENT), theirs.get(key, ABSENT), f"{path}.{key}" if path else key)
    elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            yield from differences(a, b, f"{path}.{i}")
    elif mine != theirs:
        yield path, mine, theirs


def describe_differences(mine: Any, theirs: Any) -> str:
    """Returns the first differences as text, and how many more there are; empty where there are none."""
    found = list(differences(mine, theirs))
    lines = [f"{path or 'value'}: {short(a)} here, {short(b)} there" for path, a, b in found[:SHOWN]]
    if len(found) > SHOWN:
        lines.append(f"and {len(found) - SHOWN} more")
    return "; ".join(lines)


def short(value: Any) -> str:
    """Returns a value, or `ABSENT`, as text for an error: its beginning where it is long."""
    text = "absent" if value is ABSENT else repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
