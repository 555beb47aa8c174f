"""Robots whose chunks are plans, made anew at every step."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Plan:
    """Chunks that are plans: every RLDS step holds a whole one, of what is to come as seen from there.

    Waypoints in the frame of now are not the first waypoints of the steps to come, so a plan is stored, an array
    (A, size) under the key of its fields, and not put together of later actions. Its first entry is executed; then a
    new one is made.

    known: key of how many of its entries are known, the first ones (a recording ends); None: all of them.
    scale: how a plan is normalised. "per_step": each entry by statistics of its own, as what is farther ahead spreads
        more; "pooled": all by the same ones; "none": not at all, numbers stay as they are in model space.
    """

    known: str | None = None
    scale: str = "per_step"

    def __post_init__(self) -> None:
        if self.scale not in ("per_step", "pooled", "none"):
            raise ValueError(f"Plan: scale {self.scale!r}, expected 'per_step', 'pooled' or 'none'")
