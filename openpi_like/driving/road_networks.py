"""Road networks of highway-env, as lanes and paths in our world; see `mirrored`.

Of its environments only the functions that lay roads are used.
"""

import dataclasses
import functools
import itertools
import math
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from openpi_like.config import near_names
from openpi_like.driving.paths import Meetings, Path

LANES = 4  # of the highway
HIGHWAY_M = 1200.0
STOP_LINE = 100.0  # m along a path through the intersection
RAMP_BESIDE = (232.0, 312.0)  # m along the ramp: from where to where a car can change to the highway
NETWORKS = ("highway", "merge", "roundabout", "intersection")
_TOP = {"highway": 25.0, "merge": 20.0, "roundabout": 10.0, "intersection": 10.0}  # m/s
_SAMPLED = 1.0  # m between the points of a lane
LINES = ("none", "striped", "continuous", "continuous")  # names of highway-env's types of lines

LaneIndex = tuple[str, str, int]


def mirrored(position: Sequence[float] | np.ndarray, heading: float) -> tuple[np.ndarray, float]:
    """Takes a place and a heading from highway-env's world to ours, or back: there y points south and turns are
    clockwise, so that a left turn stays a left turn."""
    return np.array([position[0], -position[1]]), -heading


@dataclasses.dataclass(frozen=True, eq=False)
class Lane:
    """The middle of a lane in our world, (N, 2) metres; its width; and what is painted to the left and the right."""

    xy: Float[np.ndarray, "N 2"]
    width: float
    left: str
    right: str


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """graph: highway-env's `RoadNetwork`. paths: ways that cars take, by name. top: m/s, that is driven at most."""

    name: str
    graph: Any
    lanes: tuple[Lane, ...]
    paths: dict[str, Path]
    top: float
    meetings: Meetings = dataclasses.field(default_factory=Meetings)

    @functools.cached_property
    def middles(self) -> Float[np.ndarray, "M 2"]:
        """Points in the middle of all lanes, and of the paths that join them."""
        return np.concatenate([lane.xy for lane in self.lanes] + [path.xy[::2] for path in self.paths.values()])

    def on_road(self, x: float, y: float, margin: float) -> bool:
        """Returns whether a place is on a lane, or at most `margin` metres beside one."""
        near = np.min((self.middles[:, 0] - x) ** 2 + (self.middles[:, 1] - y) ** 2)
        return bool(near <= (self.lanes[0].width / 2 + margin) ** 2 + (_SAMPLED / 2) ** 2)


@functools.cache
def network(name: str) -> Network:
    """Returns one of `NETWORKS`, made once.

    Raises:
        ValueError: no such network.
    """
    if name not in NETWORKS:
        raise ValueError(f"no road network {name!r}; {near_names(name, NETWORKS)}")
    graph = _graph(name)
    lanes = tuple(_lane(lane) for lane in graph.lanes_list())
    routes = {"highway": _highway, "merge": _merge, "roundabout": _roundabout, "intersection": _intersection}[name]()
    paths = {route: _path(graph, indices, name) for route, indices in routes.items()}
    if name == "merge":
        paths["join"] = _join(paths)
    return Network(name, graph, lanes, paths, _TOP[name])


def _graph(name: str) -> Any:
    from highway_env.envs.intersection_env import IntersectionEnv
    from highway_env.envs.merge_env import MergeEnv
    from highway_env.envs.roundabout_env import RoundaboutEnv
    from highway_env.road.road import RoadNetwork

    if name == "highway":
        return RoadNetwork.straight_road_network(LANES, length=HIGHWAY_M, speed_limit=_TOP[name])
    env = {"merge": MergeEnv, "roundabout": RoundaboutEnv, "intersection": IntersectionEnv}[name]
    # Stands for the environment, of which this needs no more: nothing is registered, drawn or observed.
    config = {"show_trajectories": False, "neighbour_vehicles_connected_lanes": False}
    stand_in = types.SimpleNamespace(config=config, np_random=np.random.default_rng(0))
    env._make_road(stand_in)
    return stand_in.road.network


def _sampled(lane: Any) -> np.ndarray:
    along = np.linspace(0.0, lane.length, max(2, math.ceil(lane.length / _SAMPLED) + 1))
    return np.array([mirrored(lane.position(s, 0.0), 0.0)[0] for s in along])


def _lane(lane: Any) -> Lane:
    left, right = (LINES[kind] for kind in lane.line_types)
    return Lane(_sampled(lane), float(lane.width_at(0.0)), left, right)


def _path(graph: Any, indices: list[LaneIndex], name: str) -> Path:
    points: list[np.ndarray] = []
    limits: list[float] = []
    ranks: list[float] = []
    for index in indices:
        lane = graph.get_lane(index)
        xy = _sampled(lane)
        xy = xy[1:] if points and np.hypot(*(xy[0] - points[-1][-1])) < _SAMPLED / 2 else xy
        # Who is in the roundabout or on the highway goes first; at the intersection highway-env has set who does.
        goes_first = {"roundabout": type(lane).__name__ == "CircularLane", "merge": index[0] in "abc"}.get(name, False)
        points.append(xy)
        limits += [min(float(lane.speed_limit), _TOP[name])] * len(xy)
        ranks += [float(goes_first or lane.priority)] * len(xy)
    return Path(np.concatenate(points), limits, ranks, STOP_LINE if name == "intersection" else math.inf)


def _highway() -> dict[str, list[LaneIndex]]:
    """Lane 0 is the leftmost."""
    return {f"lane {i}": [("0", "1", i)] for i in range(LANES)}


def _merge() -> dict[str, list[LaneIndex]]:
    """The ramp's path ends where its lane does; see `_join`."""
    paths: dict[str, list[LaneIndex]] = {f"lane {i}": [(a, b, i) for a, b in ("ab", "bc", "cd")] for i in (0, 1)}
    return paths | {"ramp": [("j", "k", 0), ("k", "b", 0), ("b", "c", 2)]}


def _join(paths: dict[str, Path]) -> Path:
    """From the ramp to the highway's right lane, which it gives way to."""
    ramp, lane = paths["ramp"], paths["lane 1"]
    on_ramp, on_lane = ramp.xy[ramp.xy[:, 0] < 245.0], lane.xy[lane.xy[:, 0] > 285.0]
    points = np.concatenate([on_ramp, on_lane])
    return Path(points, [_TOP["merge"]] * len(points), [0.0 if x < 285.0 else 1.0 for x in points[:, 0]])


def _roundabout() -> dict[str, list[LaneIndex]]:
    """From each side by the outer lane to the exits on the right, ahead and on the left; and the inner lane, around."""
    sides, ring = "senw", ["se", "ex", "ee", "nx", "ne", "wx", "we", "sx"]
    paths: dict[str, list[LaneIndex]] = {}
    for i, side in enumerate(sides):
        for exits, turn in enumerate(("right", "ahead", "left"), start=1):
            leaves = sides[(i + exits) % 4]
            nodes = [ring[(2 * i + k) % 8] for k in range(2 * exits)]
            around = [(a, b, 1) for a, b in itertools.pairwise(nodes)]
            way_in: list[LaneIndex] = [(f"{side}er", f"{side}es", 0), (f"{side}es", f"{side}e", 0)]
            way_out: list[LaneIndex] = [(f"{leaves}x", f"{leaves}xs", 0), (f"{leaves}xs", f"{leaves}xr", 0)]
            paths[f"{i} {turn}"] = [*way_in, *around, *way_out]
    paths["inner"] = [(ring[k % 8], ring[(k + 1) % 8], 0) for k in range(24)]
    return paths


def _intersection() -> dict[str, list[LaneIndex]]:
    paths: dict[str, list[LaneIndex]] = {}
    for i in range(4):
        for turn, leaves in (("right", i - 1), ("left", i + 1), ("ahead", i + 2)):
            node = f"il{leaves % 4}"
            paths[f"{i} {turn}"] = [(f"o{i}", f"ir{i}", 0), (f"ir{i}", node, 0), (node, f"o{leaves % 4}", 0)]
    return paths
