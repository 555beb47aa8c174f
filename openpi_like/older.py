"""Configs and contracts as older versions of this package wrote them into checkpoints: read as today's.

A checkpoint's JSON names the classes of what it holds. Where a class has moved, `MOVED` says where to; where its fields
have changed, an entry of `CHANGED` turns the stored fields into today's, before anything is built from them.
"""

import functools
from collections.abc import Callable
from typing import Any

# Where classes are now that older checkpoints name by where they were.
MOVED = {
    "openpi_like.train.checkpoint:Contract": "openpi_like.train.checkpoints.contract:Contract",
    "openpi_like.data.dataset:Selection": "openpi_like.data.selection:Selection",
    "openpi_like.data.loader:DataConfig": "openpi_like.data.config:DataConfig",
    "openpi_like.data.loader:MixtureEntry": "openpi_like.data.config:MixtureEntry",
    "openpi_like.robots.robot:Gripper": "openpi_like.robots.gripper:Gripper",
}


Fields = dict[str, Any]
Change = Callable[[Fields], Fields]


def _in_turn(*changes: Change) -> Change:
    """Returns the change that makes these one after the other, the oldest first."""
    return lambda fields: functools.reduce(lambda now, change: change(now), changes, fields)


def _parts_of_backbone(fields: Fields) -> Fields:
    """Policies had the two towers of PaliGemma as fields of their own."""
    if "vlm" not in fields:
        return fields
    parts = {name: fields[name] for name in ("vision", "vlm")}
    backbone = {"__class__": "openpi_like.models.paligemma:PaliGemmaConfig", **parts}
    return {"backbone": backbone} | {name: value for name, value in fields.items() if name not in parts}


def _prompt_format_object(fields: Fields) -> Fields:
    """A prompt's format was a name."""
    stored = fields.get("prompt_format")
    if not isinstance(stored, str):
        return fields
    names = {"pi0": "Pi0Prompt", "pi05": "Pi05Prompt", "fast": "FastPrompt"}
    if stored not in names:
        known = list(names)
        raise ValueError(f"prompt_format {stored!r} of an older checkpoint, expected one of {known}; it is damaged")
    return {**fields, "prompt_format": {"__class__": f"openpi_like.data.prompts:{names[stored]}"}}


def _tokenizer_object(fields: Fields) -> Fields:
    """A tokenizer was a SentencePiece model, base64."""
    stored = fields.get("tokenizer")
    if not isinstance(stored, str):
        return fields
    path = "openpi_like.data.sentencepiece_model:SentencePieceTokenizer"
    return {**fields, "tokenizer": {"__class__": path, "model": stored}}


def _maps_in_blocks(fields: Fields) -> Fields:
    """The default pattern of LoRA did not reach maps that lie deeper in their layers, which no policy had."""
    before = r"^(vlm|expert)/layers/(q|kv|out|gate_up|down)$"
    if fields.get("pattern") != before:
        return fields
    return {**fields, "pattern": before.replace("layers/", r"layers/(\w+/)?")}


# Class path (of today) -> stored fields (JSON, without "__class__") -> today's fields (JSON).
CHANGED: dict[str, Change] = {
    "openpi_like.models.pi0:Pi0Config": _in_turn(_parts_of_backbone, _prompt_format_object),
    "openpi_like.models.pi0_fast:Pi0FastConfig": _in_turn(_parts_of_backbone, _prompt_format_object),
    "openpi_like.train.checkpoints.contract:Contract": _tokenizer_object,
    "openpi_like.models.lora:LoraRule": _maps_in_blocks,
}


def todays(path: str, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the class path and the fields (JSON) that a stored object has in this version."""
    path = MOVED.get(path, path)
    change = CHANGED.get(path)
    return path, fields if change is None else change(fields)
