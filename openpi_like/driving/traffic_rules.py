"""How a driver chooses an acceleration: speed limits and curves, the car ahead, and giving way where paths meet.

The car ahead is followed by the intelligent driver model (Treiber et al. 2000). All the others are taken to go on
along their paths.
"""

import dataclasses
import math
from collections.abc import Iterable

from openpi_like.driving.paths import Meeting, Meetings, Path

_HARDEST = -8.0  # m/s^2
_SEEN = 70.0  # m ahead
_PAST = 5.0  # m behind the end of a stretch, where a car is not in the way any more
_LINE = 1.0  # m between the front of a car that waits and what it waits for
_CLEAR = 0.9  # s between one car leaving a crossing and the other coming
_MERGE = 1.4  # s ahead of a car that has to be let in front of
_QUEUE = 4.0  # m; who stands farther than that from where cars enter waits for somebody else
_FIRM = 4.0  # m/s^2; who would have to brake harder than that to stop before a crossing drives on


@dataclasses.dataclass(slots=True)
class Mover:
    """A car on a path: `s` metres from the start of it, its middle; speed in m/s; length in metres."""

    path: Path
    s: float
    speed: float
    length: float


@dataclasses.dataclass(frozen=True)
class Manner:
    """How somebody drives. speed: m/s, what they like to drive at most. gap: m and s from the car ahead, bumper to
    bumper. acceleration, braking: m/s^2, comfortable ones."""

    speed: float
    gap_m: float = 3.0
    gap_s: float = 1.3
    acceleration: float = 2.0
    braking: float = 3.0


def following(speed: float, gap: float, ahead: float, manner: Manner, gap_m: float | None = None) -> float:
    """Returns what the car ahead takes off the acceleration, m/s^2, never above 0.

    gap: metres between the cars. ahead: speed of the car ahead.
    """
    closing = speed * (speed - ahead) / (2 * math.sqrt(manner.acceleration * manner.braking))
    wanted = (manner.gap_m if gap_m is None else gap_m) + max(0.0, speed * manner.gap_s + closing)
    return -manner.acceleration * (wanted / max(gap, 0.1)) ** 2


def standing(speed: float, gap: float, manner: Manner) -> float:
    """Returns the acceleration that stops in front of a line `gap` metres ahead, no earlier than need be."""
    if gap <= 0.1:
        return -_FIRM
    needed = speed * speed / (2 * gap)
    return -needed if needed > 0.6 * manner.braking else manner.acceleration


def free(path: Path, s: float, speed: float, manner: Manner) -> float:
    """Returns the acceleration on an empty road."""
    wanted = max(0.5, min(manner.speed, float(path.limit[path.index(s + 0.4 * speed)])))
    if speed > wanted:
        return max(-3.5, 1.6 * (wanted - speed))
    return float(manner.acceleration * (1 - (speed / wanted) ** 4))


def drive(own: Mover, others: Iterable[Mover], meetings: Meetings, manner: Manner) -> tuple[float, str]:
    """Returns the acceleration in m/s^2, and what it is for: "free", "follow" or "give way"."""
    best, why = free(own.path, own.s, own.speed, manner), "free"
    alone = best
    for other in others:
        for meeting in meetings[own.path, other.path]:
            if own.s > meeting.end or meeting.begin - own.s > _SEEN or other.s > meeting.other_end + _PAST:
                continue
            acceleration, reason = _because_of(own, other, meeting, manner, alone)
            if acceleration < best:
                best, why = acceleration, reason
    return max(best, _HARDEST), why


def matters(own: Mover, other: Mover, meetings: Meetings) -> bool:
    """Returns whether the car can meet the other on its way in what it sees ahead."""
    return any(
        own.s <= m.end and m.begin - own.s <= 2 * _SEEN and other.s <= m.other_end + _PAST
        for m in meetings[own.path, other.path]
    )


def _because_of(own: Mover, other: Mover, meeting: Meeting, manner: Manner, alone: float) -> tuple[float, str]:
    """The acceleration that `other` leaves, as far as it matters where the two paths meet."""
    half = 0.5 * (own.length + other.length)
    if meeting.joined is not None:
        ahead = meeting.mapped(other.s) - own.s
        inside = meeting.other_begin - 2.0 <= other.s <= meeting.other_end + 1.0
        if ahead > 0.0 and (inside or (other.s < meeting.other_begin and meeting.first > 0)):
            return alone + following(own.speed, ahead - half, other.speed, manner), "follow"
        if inside and own.s >= meeting.begin:
            return alone, "free"  # it is behind
    line = meeting.begin - 0.5 * own.length - _LINE
    if not _entered(own):
        line = min(line, own.path.stop - 0.5 * own.length)
    left = line - own.s
    if left < -0.5 * own.length or own.speed**2 > 2 * _FIRM * max(left, 0.0) + 4.0:
        return alone, "free"  # already there, or too late to stop
    if _may_go(own, other, meeting, line):
        return alone, "free"
    return standing(own.speed, left, manner), "give way"


def _entered(mover: Mover) -> bool:
    return mover.s + 0.5 * mover.length > mover.path.stop + 0.5


def _may_go(own: Mover, other: Mover, meeting: Meeting, line: float) -> bool:
    """Whether a car need not wait at `line` for another one that comes to where their paths meet."""
    arrives = meeting.other_begin - 0.5 * other.length - 0.5
    if meeting.joined is None:
        leaves, own_leaves = meeting.other_end + 0.5 * other.length, meeting.end + 0.5 * own.length
    else:
        shared = meeting.joined - meeting.begin
        leaves, own_leaves = meeting.other_begin + shared + 0.5 * other.length, meeting.joined + 0.5 * own.length
    queues = other.speed < 0.5 and other.s + 0.5 * other.length < other.path.stop - _QUEUE < math.inf
    if other.s > leaves or queues:
        return True
    own_in = _seconds(own, meeting.begin - 0.5 * own.length - own.s)
    own_out = _seconds(own, own_leaves - own.s)
    other_in = _seconds(other, arrives - other.s)
    inside, other_inside = _entered(own), _entered(other)
    if inside and other_inside:
        return other.s < arrives and own_in < other_in
    if inside:
        return other.s < arrives
    if other.s < arrives and not other_inside:
        committed = other.speed**2 > 2 * _FIRM * (min(arrives, other.path.stop) - other.s) and other_in < own_in
        own_first = meeting.first < 0 or (meeting.first == 0 and own_in < other_in)
        if own_first and not committed:
            return True
    other_out = (leaves - other.s) / max(other.speed, 0.5)
    if meeting.joined is not None:
        faster = max(0.0, other.speed - own.speed) / 2.5
        return own_out + _MERGE + faster < other_in
    return own_out + _CLEAR < other_in or own_in > other_out + 0.3


def _seconds(mover: Mover, distance: float) -> float:
    """Time until a car has gone so far, in s, if it speeds up as soon as it can."""
    if distance <= 0.0:
        return 0.0
    rate = 1.8
    top = max(mover.speed, float(mover.path.limit[mover.path.index(mover.s + 0.5 * distance)]))
    until = (top * top - mover.speed**2) / (2 * rate)
    if until >= distance:
        return (math.sqrt(mover.speed**2 + 2 * rate * distance) - mover.speed) / rate
    return (top - mover.speed) / rate + (distance - until) / top
