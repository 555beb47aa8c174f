"""Configs and contracts as older versions of this package wrote them into checkpoints: read as today's.

A checkpoint's JSON names the classes of what it holds. Where a class has moved, `MOVED` says where to; where its fields
have changed, an entry of `CHANGED` turns the stored fields into today's, before anything is built from them.
"""

from collections.abc import Callable
from typing import Any

# Where classes are now that older checkpoints name by where they were.
MOVED = {
    "openpi_like.train.checkpoint:Contract": "openpi_like.train.checkpoints.contract:Contract",
    "openpi_like.data.dataset:Selection": "openpi_like.data.selection:Selection",
    "openpi_like.data.loader:DataConfig": "openpi_like.data.config:DataConfig",
    "openpi_like.data.loader:MixtureEntry": "openpi_like.data.config:MixtureEntry",
}


def _parts_of_backbone(fields: dict[str, Any]) -> dict[str, Any]:
    """Policies had the two towers of PaliGemma as fields of their own."""
    if "vlm" not in fields:
        return fields
    parts = {name: fields[name] for name in ("vision", "vlm")}
    backbone = {"__class__": "openpi_like.models.paligemma:PaliGemmaConfig", **parts}
    return {"backbone": backbone} | {name: value for name, value in fields.items() if name not in parts}


# Class path (of today) -> stored fields (JSON, without "__class__") -> today's fields (JSON).
CHANGED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "openpi_like.models.pi0:Pi0Config": _parts_of_backbone,
    "openpi_like.models.pi0_fast:Pi0FastConfig": _parts_of_backbone,
}


def todays(path: str, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the class path and the fields (JSON) that a stored object has in this version."""
    path = MOVED.get(path, path)
    change = CHANGED.get(path)
    return path, fields if change is None else change(fields)
