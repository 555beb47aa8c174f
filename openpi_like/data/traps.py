"""What is often wrong with a robot dataset and shows in no loss: suspicions, each with the numbers it rests on.

Every check is a function of columns (of an index, see `FrameIndex`) or of a few decoded images. It returns what it
found, or None. Thresholds are stated where they are used; none of this changes any data.

Columns may be larger than memory. What one pass can tell is counted over all steps: values that are not finite, least
and greatest ones, ends of episodes, texts. The rest looks at a `Sample` of whole episodes.

Letters: N steps, E episodes, D values of one step. `starts` is the first step of each episode and the end, (E + 1,).
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Int, Shaped, UInt8

from openpi_like.data.blocks import blocks
from openpi_like.data.episode_sample import Sample, bounds, count_texts, rows
from openpi_like.data.field_roles import is_action, is_instruction, is_state
from openpi_like.data.index import FrameIndex

_SHOWN = 3  # places named per trap
BLACK = 16  # a camera that delivers nothing, stored as JPEG, stays below this
_DRAWN = 0.7  # of the pixels equal their neighbour in pictures that were drawn, in photographs at most 0.6
_COLOURED = 0.2  # HSV saturation from which on a pixel has a hue that can be trusted
_LAG = 8  # steps within which a gripper has followed its command
WRAPS = 3  # jumps by a turn that are no accident
OPPOSITE = -0.4  # `follows` of grippers with opposite polarity: right ones are above 0 by far


@dataclasses.dataclass(frozen=True)
class Trap:
    """One suspicion. kind: what it is. key: field or camera. found: the numbers. advice: what to look at or do."""

    kind: str
    key: str
    found: str
    advice: str


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def not_finite(key: str, x: Shaped[np.ndarray, "N D"], where: Callable[[int], str]) -> Trap | None:
    """NaN and infinite values. where: see `FrameIndex.where`."""
    count, first = 0, list[int]()
    for block in blocks(range(len(x))):
        bad = np.flatnonzero(~np.isfinite(x[block]).all(axis=1))
        count += len(bad)
        first += [block.start + int(i) for i in bad[: _SHOWN - len(first)]]
    if not count:
        return None
    places = "; ".join(map(where, first)) + ("; ..." if count > _SHOWN else "")
    return Trap(
        "not finite",
        key,
        f"{count} of {len(x)} steps have NaN or infinite values: {places}",
        "a robot that uses this field refuses the dataset; repair these episodes",
    )


def constant_dims(key: str, ends: Shaped[np.ndarray, "2 D"], count: int) -> Trap | None:
    """Dims with one value in the whole dataset. ends: see `bounds`. count: N."""
    same = np.flatnonzero(ends[0] == ends[1])
    if not len(same) or count < 2:
        return None
    return Trap(
        "constant",
        key,
        f"the same value in all {count} steps: " + ", ".join(f"[{d}] = {ends[0, d].item():.4g}" for d in same),
        "it carries no information, and a flag that never changes is often wrong; leave it out of the robot",
    )


def outliers(key: str, x: Shaped[np.ndarray, "n D"], ends: Shaped[np.ndarray, "2 D"]) -> Trap | None:
    """Dims with values farther outside q01 .. q99 than 10 times the distance of these two. ends: see `bounds`."""
    q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)
    low, high = ends
    reach = np.maximum(high - q99, q01 - low)
    trigger = np.isin(np.concatenate([x, ends]), (-1, 0, 1)).all(axis=0)  # rare by nature
    far = np.flatnonzero((reach > 10 * (q99 - q01)) & (reach > 1e-4) & ~trigger)
    if not len(far):
        return None
    shown = ", ".join(f"[{d}] {low[d]:.4g} .. {high[d]:.4g}, q01 .. q99 {q01[d]:.4g} .. {q99[d]:.4g}" for d in far)
    return Trap(
        "outliers",
        key,
        shown,
        "normalise by quantiles, or look at these episodes; least and greatest values would squash all others",
    )


def angle_wraps(key: str, x: Shaped[np.ndarray, "N D"], starts: Int[np.ndarray, "E1"]) -> Trap | None:
    """Dims that jump by one turn (2 pi or 360) three times or more, rarely by half of that, and stay within one."""
    inside = np.ones(len(x), bool)
    inside[starts[1:-1]] = False
    found = []
    for d in range(x.shape[1]):
        jumps, span = np.abs(np.diff(x[:, d]))[inside[1:]], float(np.ptp(x[:, d]))
        for turn, unit in ((2 * np.pi, "rad"), (360.0, "deg")):
            near = int((np.abs(jumps - turn) < 0.1 * turn).sum())
            between = int(((jumps > 0.3 * turn) & (jumps < 0.9 * turn)).sum())
            if near >= max(WRAPS, between + 1) and span < 1.05 * turn:
                found.append(f"[{d}] {near} times by one turn ({unit})")
    if not found:
        return None
    return Trap(
        "angle wraps",
        key,
        "jumps between steps: " + ", ".join(found),
        "declare it as a rotation, and do not subtract such angles: a difference must be taken between rotations",
    )


def zero_first_action(key: str, x: Shaped[np.ndarray, "N D"], starts: Int[np.ndarray, "E1"]) -> Trap | None:
    """Episodes that begin with an action of nothing: four in five dims (grippers have a value) below 0.1 % of usual."""
    size = np.abs(x[:, x.any(axis=0)])
    if not size.shape[1]:
        return None
    still = (size <= 1e-3 * size.mean(axis=0)).mean(axis=1) >= 0.8
    first, share = float(still[starts[:-1]].mean()), float(still.mean())
    if first <= 0.2 or first <= 2 * share:
        return None
    return Trap(
        "zero first action",
        key,
        f"{first:.0%} of the {len(starts) - 1} episodes begin with an action of about zero ({share:.1%} of all steps)",
        "the first action is a placeholder; a policy learns to stand still at the start of every episode",
    )


def idle_steps(key: str, x: Shaped[np.ndarray, "N D"], starts: Int[np.ndarray, "E1"]) -> Trap | None:
    """More than 20 % of the steps after which no dim changes by more than 0.1 % of its q01 .. q99."""
    inside = np.ones(len(x), bool)
    inside[starts[1:-1]] = False
    q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)
    still = (np.abs(np.diff(x, axis=0)) <= 1e-3 * (q99 - q01)).all(axis=1)[inside[1:]]
    if not len(still) or not (q99 > q01).any() or still.mean() <= 0.2:
        return None
    return Trap(
        "idle",
        key,
        f"in {still.mean():.0%} of the steps nothing moves before the next one",
        "a policy learns to stand still; filter idle steps, or take every n-th frame",
    )


def end_flags(key: str, flags: Shaped[np.ndarray, "N"], starts: Int[np.ndarray, "E1"]) -> Trap | None:
    """A field `is_last` that is not true at exactly the last step of every episode."""
    at_ends = np.count_nonzero(flags[starts[1:] - 1])
    missed, wrong = len(starts) - 1 - at_ends, np.count_nonzero(flags) - at_ends
    if not missed and not wrong:
        return None
    return Trap(
        "episode ends",
        key,
        f"False at the end of {missed} of {len(starts) - 1} episodes, True at {wrong} steps before an end",
        "trust the length of the record, as this library does; the episodes may be cut",
    )


# ---- Grippers --------------------------------------------------------------------------------------------------------


def gripper_dims(x: Shaped[np.ndarray, "N D"]) -> list[int]:
    """Dims that look like grippers: nine in ten values lie within 5 % of one of both ends, or are a trigger's."""
    found = []
    for d in range(x.shape[1]):
        low, high = float(x[:, d].min()), float(x[:, d].max())
        if low == high:
            continue
        at = (x[:, d] - low) / (high - low)
        two_ended = ((at < 0.05) | (at > 0.95)).mean() > 0.9 and 0.02 < (at > 0.5).mean() < 0.98
        if two_ended or _is_trigger(x[:, d]):
            found.append(d)
    return found


def _is_trigger(x: np.ndarray) -> bool:
    return bool(np.isin(x, (-1, 0, 1)).all() and (x == 0).mean() > 0.5 and (x == 1).any() and (x == -1).any())


def trigger_gripper(key: str, x: Shaped[np.ndarray, "N D"]) -> Trap | None:
    """Dims with the values -1, 0 and 1, mostly 0: commands to open and to close, not positions."""
    found = [d for d in range(x.shape[1]) if _is_trigger(x[:, d])]
    if not found:
        return None
    shown = ", ".join(f"[{d}] {(x[:, d] == 0).mean():.0%} zeros" for d in found)
    return Trap(
        "relative gripper",
        key,
        f"only -1, 0 and 1: {shown}",
        "0 means 'as before' here; make it an absolute position before a policy is trained on it",
    )


def follows(action: Shaped[np.ndarray, "N"], state: Shaped[np.ndarray, "N"], starts: Int[np.ndarray, "E1"]) -> float:
    """Returns how a command correlates with the change of a state within 8 steps, given that state; from -1 to 1.

    It is the partial correlation: what the state alone says about both (it returns to its mean) is taken out by least
    squares. Above 0 the state moves towards the command, below 0 the two have opposite polarity.
    """
    a, s = (np.asarray(v, np.float64) for v in (action, state))
    last = np.repeat(starts[1:], np.diff(starts)) - 1
    change = s[np.minimum(np.arange(len(s)) + _LAG, last)] - s
    known = np.stack([np.ones_like(s), s], axis=1)
    a, change = (v - known @ np.linalg.lstsq(known, v, rcond=None)[0] for v in (a, change))
    norm = np.sqrt((a @ a) * (change @ change))
    return float(a @ change / norm) if norm > 1e-12 else 0.0


def inverted_gripper(
    key: str,
    action: Shaped[np.ndarray, "N D"],
    states: Mapping[str, Shaped[np.ndarray, "N _"]],
    starts: Int[np.ndarray, "E1"],
) -> Trap | None:
    """Gripper dims of the action whose gripper state moves the other way (see `follows` and `OPPOSITE`).

    Gripper states are dims that look like one, fields with "grip" in their name, and the last dim of a state of the
    action's size: arms move with grippers (grasp, then lift), so that any other dim would correlate too.
    """
    candidates = []
    for name, x in states.items():
        like_one = gripper_dims(x)
        for d in range(x.shape[1]):
            if "grip" in name or d in like_one or d == action.shape[1] - 1 == x.shape[1] - 1:
                candidates.append((f"{name}[{d}]", x[:, d]))
    found = []
    for d in gripper_dims(action):
        if _is_trigger(action[:, d]):
            continue
        matches = [(follows(action[:, d], x, starts), name) for name, x in candidates]
        best, name = max(matches, key=lambda m: abs(m[0]), default=(0.0, ""))
        if best < OPPOSITE:
            found.append(f"[{d}] against {name}, correlation {best:.2f}")
    if not found:
        return None
    return Trap(
        "opposite grippers",
        key,
        "command and state move in opposite directions: " + ", ".join(found),
        "open is a large number in one and a small one in the other; give each field its own Gripper(open=, closed=)",
    )


# ---- Language --------------------------------------------------------------------------------------------------------


def instructions(key: str, texts: Mapping[str, int]) -> Trap | None:
    """Empty instructions, and those that differ in case, space or punctuation only.

    texts: how many steps, or episodes, have each.
    """
    found = []
    total, empty = sum(texts.values()), sum(n for t, n in texts.items() if not t.strip())
    if empty:
        found.append(f"{empty / total:.1%} of them are empty")
    alike: dict[str, list[str]] = {}
    for text in texts:
        alike.setdefault(" ".join(re.sub(r"[^\w\s]", " ", text.lower()).split()), []).append(text)
    twins = [group for plain, group in alike.items() if plain and len(group) > 1]
    if twins:
        shown = "; ".join(" = ".join(map(repr, group[:_SHOWN])) for group in twins[:_SHOWN])
        found.append(f"{len(twins)} are written in several ways: {shown}")
    if not found:
        return None
    return Trap("instructions", key, "; ".join(found), "leave out steps without one; clean the others if they matter")


# ---- Cameras ---------------------------------------------------------------------------------------------------------


def black_camera(
    key: str, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], sizes: Int[np.ndarray, "N"], sampled: Int[np.ndarray, "n"]
) -> Trap | None:
    """Sampled images without a pixel brighter than 16 of 255. sizes: bytes of all images, of which `sampled` are these.

    How many of all images are black is estimated by their encoded size, which is smaller than that of any other.
    """
    black = np.array([image.max() <= BLACK for image in images], bool)
    if not black.any():
        return None
    largest = int(sizes[sampled[black]].max())
    return Trap(
        "black camera",
        key,
        f"{black.sum()} of {len(images)} sampled images are black; {(sizes <= largest).mean():.0%} of all have no more "
        f"bytes than those ({largest})",
        "the camera was absent; leave it out, or mask it where it is black",
    )


def warmth(images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> float:
    """Returns how red the coloured pixels are, from -1 (all more blue than red) to 1 (all more red than blue).

    A pixel counts by its saturation (HSV), from 0.2 on. Wood, skin, cardboard and lamp light are warm and fill most
    indoor scenes; blue things are few. Pictures with both channels swapped have the opposite number.
    """
    total = weight = 0.0
    for image in images:
        x = image.reshape(-1, 3).astype(np.float32)
        high, low = x.max(axis=1), x.min(axis=1)
        saturation = (high - low) / np.maximum(high, 1)
        saturation[(saturation < _COLOURED) | (high < 32)] = 0
        total += float((saturation * np.sign(x[:, 0] - x[:, 2])).sum())
        weight += float(saturation.sum())
    return total / weight if weight else 0.0


def _even(image: np.ndarray) -> float:
    """Part of the pixels that have exactly the colour of the one to their right."""
    return float((image[:, 1:] == image[:, :-1]).all(axis=2).mean())


def swapped_channels(key: str, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> Trap | None:
    """Photographs that are mostly blue where they have a colour: `warmth` below -0.3. A blue table looks the same.

    What a simulator draws may have any colour, so pictures of even surfaces are not judged.
    """
    measured = warmth(images)
    if measured >= -0.3 or np.median([_even(image) for image in images]) > _DRAWN:
        return None
    return Trap(
        "swapped channels",
        key,
        f"coloured pixels are more blue than red (warmth {measured:.2f}, from -1 to 1)",
        'look at the pictures: if skin and wood are blue, set channel_order="bgr" for this camera',
    )


# ---- All of them -----------------------------------------------------------------------------------------------------


def action_keys(index: FrameIndex) -> list[str]:
    """Returns the keys of numeric fields of a step that are actions."""
    return [k for k, x in index.columns.items() if is_action(k) and x.dtype.kind == "f"]


def state_keys(index: FrameIndex) -> list[str]:
    """Returns the keys of numeric fields of a step that are observed."""
    return [k for k, x in index.columns.items() if is_state(k) and x.dtype.kind in "fiu"]


def floats(x: np.ndarray) -> np.ndarray:
    """Returns numbers of which differences can be taken: those of unsigned ones would go round."""
    return x if x.dtype.kind == "f" else x.astype(np.float64)


def find_traps(
    sample: Sample, images: Mapping[str, tuple[Int[np.ndarray, "n"], Sequence[UInt8[np.ndarray, "_ _ 3"]]]]
) -> list[Trap]:
    """Returns all suspicions about one split.

    Args:
        sample: of its steps, for the checks that cannot look at all.
        images: camera key -> some steps, and their decoded images.
    """
    index, starts = sample.index, sample.starts
    found: list[Trap | None] = []
    with_nan = {k: not_finite(k, rows(index, k), index.where) for k in index.columns}
    found += with_nan.values()
    # What follows compares numbers; steps without one would make all of it NaN.
    actions, states = (
        {k: floats(sample.rows(k)) for k in keys(index) if with_nan[k] is None} for keys in (action_keys, state_keys)
    )
    for key, x in (actions | states).items():
        ends = bounds(rows(index, key))
        found += [constant_dims(key, ends, index.steps), outliers(key, x, ends), angle_wraps(key, x, starts)]
    for key, x in actions.items():
        found += [
            zero_first_action(key, x, starts),
            trigger_gripper(key, x),
            inverted_gripper(key, x, states, starts),
        ]
    if states:
        found.append(idle_steps(", ".join(states), np.concatenate(list(states.values()), axis=1), starts))
    if "is_last" in index.columns:
        found.append(end_flags("is_last", index.columns["is_last"], np.asarray(index.episode_start)))
    for texts, level in ((index.texts, "step"), (index.episode_texts, "episode")):
        for key, text in texts.items():
            if is_instruction(key):
                found.append(instructions(f"{level}: {key}", count_texts(text)))
    for key, (steps, pictures) in images.items():
        sizes = np.asarray(index.images[key][:, 1])
        found += [black_camera(key, pictures, sizes, steps), swapped_channels(key, pictures)]
    return [trap for trap in found if trap is not None]
