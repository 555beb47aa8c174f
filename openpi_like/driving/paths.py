"""Ways along roads as polylines, and where two of them meet.

The world of this package: x east, y north, metres; headings in rad, counter-clockwise from east.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.spatial import cKDTree

STEP = 0.5  # m between the points of a path
_SMOOTHED = 2.5  # m to each side over which corners where lanes are joined are rounded
_LATERAL = 2.8  # m/s^2, that curves are driven with
_BRAKES = 1.8  # m/s^2, with which a driver slows down for a curve
_NEAR = 2.9  # m between two paths on which cars, two metres wide, are in each other's way
_SAME = 1.2  # m between two paths that are one lane


class Path:
    """A way along lanes, a point every `STEP` metres.

    Args:
        points: (N, 2) metres, at any distances from each other, those of the lanes one behind the other.
        limits: N speeds, m/s, that the lanes allow. ranks: N numbers; where paths meet, the higher goes first.
        stop: metres to where cars wait that may not go yet; behind it they clear the way. inf: wherever it is free.
    """

    def __init__(
        self,
        points: Float[np.ndarray, "N 2"],
        limits: Sequence[float],
        ranks: Sequence[float],
        stop: float = math.inf,
    ) -> None:
        self.stop = stop
        along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
        even = np.arange(0.0, along[-1], STEP)
        xy = np.stack([np.interp(even, along, points[:, k]) for k in (0, 1)], axis=1)
        xy = _smoothed(xy, round(_SMOOTHED / STEP))
        # Rounding makes it shorter, by little: the distance along it is measured again.
        self.along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(xy, axis=0).T))])
        self.xy = xy
        self.length = float(self.along[-1])
        steps = np.gradient(xy, axis=0)
        self.heading = np.unwrap(np.arctan2(steps[:, 1], steps[:, 0]))
        self.rank = np.interp(even, along, np.asarray(ranks, float))
        self.limit = _slowed(np.interp(even, along, np.asarray(limits, float)), self.curvature, self.along)

    @property
    def curvature(self) -> Float[np.ndarray, "N"]:
        """Of every point, 1/m, positive to the left."""
        return np.gradient(self.heading) / STEP

    def index(self, s: float) -> int:
        """Returns the point nearest to `s` metres from the start, the first or last beyond the ends."""
        return min(max(round(s * (len(self.xy) - 1) / self.length), 0), len(self.xy) - 1)

    def at(self, s: float, left: float = 0.0) -> tuple[float, float, float]:
        """Returns x, y and heading `s` metres from the start and so much to the left; straight on beyond the ends."""
        exact = s * (len(self.xy) - 1) / self.length
        i = min(max(int(exact), 0), len(self.xy) - 2)
        part = exact - i
        inside = min(max(part, 0.0), 1.0)
        heading = (1 - inside) * self.heading[i] + inside * self.heading[i + 1]
        x, y = self.xy[i] + part * (self.xy[i + 1] - self.xy[i])
        return x - left * math.sin(heading), y + left * math.cos(heading), float(heading)

    def project(self, x: float, y: float) -> tuple[float, float]:
        """Returns (distance along the path, distance to the left of it) of a place."""
        dx, dy = self.xy[:, 0] - x, self.xy[:, 1] - y
        i = int(np.argmin(dx * dx + dy * dy))
        c, s = math.cos(self.heading[i]), math.sin(self.heading[i])
        ax, ay = x - self.xy[i, 0], y - self.xy[i, 1]
        return float(self.along[i] + c * ax + s * ay), float(c * ay - s * ax)


@dataclasses.dataclass(frozen=True)
class Meeting:
    """A stretch on which two paths are near each other. Distances along the own and the other path, in metres.

    joined: from here on, along the own path, the two are one lane; None where they only cross.
    first: whether who is on the other path goes first: 1, 0 where neither has a right to, or -1.
    """

    begin: float
    end: float
    other_begin: float
    other_end: float
    joined: float | None
    first: int

    def mapped(self, other: float) -> float:
        """Returns the place on the own path that lies where `other` lies on the other one."""
        share = (other - self.other_begin) / max(self.other_end - self.other_begin, 1e-6)
        return self.begin + share * (self.end - self.begin)


class Meetings(dict[tuple[Path, Path], tuple[Meeting, ...]]):
    """Where the second path of a pair comes near the first, in the order along that; found when first asked for."""

    def __missing__(self, key: tuple[Path, Path]) -> tuple[Meeting, ...]:
        self[key] = _meetings(*key)
        return self[key]


def _meetings(own: Path, other: Path) -> tuple[Meeting, ...]:
    if own is other:
        return (Meeting(0.0, own.length, 0.0, own.length, 0.0, 0),)
    distance, nearest = cKDTree(other.xy).query(own.xy)
    turned = np.cos(own.heading - other.heading[nearest])
    near = np.flatnonzero(distance < _NEAR)
    found = []
    for run in np.split(near, np.flatnonzero(np.diff(near) > 1) + 1):
        if not len(run):
            continue
        same = run[(distance[run] < _SAME) & (turned[run] > 0.9)]
        joined = float(own.along[same[0]]) if len(same) * STEP > 4.0 else None
        # Of paths that cross, all of the other that is near; of those that join, what lies beside the own.
        there = nearest[run] if joined is not None else np.flatnonzero(cKDTree(own.xy[run]).query(other.xy)[0] < _NEAR)
        a, b = int(there.min()), int(there.max())
        # Ranks just behind the beginning: there each is still on the lane that it comes from.
        here, across = own.rank[min(run[0] + 1, run[-1])], other.rank[min(a + 1, b)]
        ends = float(own.along[run[0]]), float(own.along[run[-1]])
        found.append(Meeting(*ends, float(other.along[a]), float(other.along[b]), joined, int(np.sign(across - here))))
    return tuple(found)


def _smoothed(xy: np.ndarray, reach: int) -> np.ndarray:
    """Two moving means, one after the other; the ends stay where they are."""
    for _ in range(2):
        padded = np.concatenate([2 * xy[:1] - xy[reach:0:-1], xy, 2 * xy[-1:] - xy[-2 : -reach - 2 : -1]])
        sums = np.cumsum(np.concatenate([np.zeros((1, 2)), padded]), axis=0)
        xy = (sums[2 * reach + 1 :] - sums[: -2 * reach - 1]) / (2 * reach + 1)
    return xy


def _slowed(limits: np.ndarray, curvature: np.ndarray, along: np.ndarray) -> np.ndarray:
    """Speeds, m/s, that keep to the limits and to what curves allow, and from which a car can slow down in time."""
    bends = np.convolve(np.pad(np.abs(curvature), 4, mode="edge"), np.full(9, 1 / 9), mode="valid")
    speeds = np.minimum(limits, np.sqrt(_LATERAL / np.maximum(bends, 1e-4)))
    for i in range(len(speeds) - 2, -1, -1):
        speeds[i] = min(speeds[i], math.sqrt(speeds[i + 1] ** 2 + 2 * _BRAKES * (along[i + 1] - along[i])))
    return speeds
