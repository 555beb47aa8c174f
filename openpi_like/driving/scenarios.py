"""Routes to drive, and who else is on the road: functions of task and seed alone."""

import dataclasses
import math

import numpy as np

from openpi_like.driving.road_networks import LANES, RAMP_BESIDE, STOP_LINE, Network, network
from openpi_like.driving.traffic_rules import Manner

PROMPTS = {
    "highway-keep": ("keep the lane", "stay in this lane", "follow the lane you are in", "drive on in this lane"),
    "highway-left": (
        "change to the left lane",
        "move one lane to the left",
        "go over to the lane on the left",
        "take the next lane on the left",
    ),
    "highway-right": (
        "change to the right lane",
        "move one lane to the right",
        "go over to the lane on the right",
        "take the next lane on the right",
    ),
    # Seeds take turns with the wordings, and with where the car is: on the ramp, on the highway beside it, and so on.
    "merge": (
        "merge onto the highway",
        "drive on past the ramp",
        "join the highway from the ramp",
        "stay on the highway where the ramp joins it",
    ),
    "roundabout-right": (
        "take the first exit of the roundabout",
        "turn right at the roundabout",
        "leave the roundabout at the first exit",
    ),
    "roundabout-ahead": (
        "take the second exit of the roundabout",
        "go straight on at the roundabout",
        "leave the roundabout at the second exit",
    ),
    "roundabout-left": (
        "take the third exit of the roundabout",
        "turn left at the roundabout",
        "leave the roundabout at the third exit",
    ),
    "intersection-left": (
        "turn left at the intersection",
        "take a left at the crossing",
        "go to the left where the roads cross",
    ),
    "intersection-ahead": (
        "go straight on at the intersection",
        "cross the intersection",
        "drive straight ahead where the roads cross",
    ),
    "intersection-right": (
        "turn right at the intersection",
        "take a right at the crossing",
        "go to the right where the roads cross",
    ),
}
LIGHTS = ("day", "dusk", "fog")
BUILDINGS = 24  # at most
FOOTPRINTS = ((10.0, 9.0), (14.0, 11.0), (18.0, 14.0))
"""Length and width of buildings in metres, in turns."""
_SEEDED = 20_11_29  # apart from other uses of the same small seeds


@dataclasses.dataclass(frozen=True)
class Body:
    """How big another vehicle is, in metres, and its colour as red, green, blue from 0 to 1."""

    kind: str
    length: float
    width: float
    height: float
    colour: tuple[float, float, float]


def _bodies() -> tuple[Body, ...]:
    sizes = {"car": (4.6, 1.85, 1.5), "van": (5.4, 2.0, 2.1), "truck": (7.5, 2.3, 3.0), "small car": (3.8, 1.7, 1.45)}
    kinds = ("car", "van", "car", "small car", "car", "truck", "car", "small car", "van", "car")
    colours = (
        *((0.8, 0.1, 0.1), (0.1, 0.25, 0.75), (0.92, 0.92, 0.92), (0.95, 0.75, 0.1), (0.1, 0.5, 0.2)),
        *((0.55, 0.58, 0.62), (0.08, 0.08, 0.1), (0.85, 0.4, 0.1), (0.4, 0.15, 0.5), (0.2, 0.65, 0.75)),
    )
    return tuple(Body(kinds[i % 10], *sizes[kinds[i % 10]], colours[(3 * i + i // 10) % 10]) for i in range(20))


BODIES = _bodies()
"""Other vehicles; one scenario has each of them at most once."""


@dataclasses.dataclass(frozen=True)
class Start:
    """Another vehicle: its body, a number of `BODIES`; path, metres along it, m/s, manner.

    lanes: keeps to lanes and changes them as it likes, instead of following its path; only on highways.
    """

    body: int
    path: str
    s: float
    speed: float
    manner: Manner
    lanes: bool


@dataclasses.dataclass(frozen=True)
class Change:
    """The lane that has to be changed to, a path, and where: metres along the own path."""

    path: str
    begin: float
    end: float


@dataclasses.dataclass(frozen=True)
class Building:
    """Its middle in the world and its height in metres, heading in rad; see `FOOTPRINTS`."""

    x: float
    y: float
    heading: float
    height: float


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What an episode begins with.

    path, s, speed: where the car is, metres along its path, and m/s. goal: metres along the path that is to be on then:
    `change.path` where there is a change, else `path`. phases: what is done from where on along the path, in words.
    """

    task: str
    seed: int
    network: str
    path: str
    s: float
    speed: float
    goal: float
    manner: Manner
    change: Change | None
    phases: tuple[tuple[float, str], ...]
    others: tuple[Start, ...]
    light: str
    buildings: tuple[Building, ...]

    @property
    def goal_path(self) -> str:
        """The path on which the goal is."""
        return self.change.path if self.change else self.path


def make_scenario(task: str, seed: int) -> Scenario:
    """Returns the scenario of a task of `PROMPTS`."""
    roads, _, turn = task.partition("-")
    rng = np.random.default_rng((_SEEDED, list(PROMPTS).index(task), seed))
    light = LIGHTS[int(rng.choice(3, p=(0.6, 0.2, 0.2)))]
    make = {"highway": _highway, "merge": _merge, "roundabout": _junction, "intersection": _junction}[roads]
    scenario = make(roads, turn, rng, seed)
    buildings = _buildings(network(roads), scenario, np.random.default_rng((_SEEDED, len(PROMPTS), seed)))
    return dataclasses.replace(scenario, task=task, seed=seed, light=light, buildings=buildings)


def _scenario(
    roads: str, path: str, s: float, speed: float, goal: float, manner: Manner, others: tuple[Start, ...]
) -> Scenario:
    return Scenario("", 0, roads, path, s, speed, goal, manner, None, (), others, "day", ())


def _manner(rng: np.random.Generator, speed: float) -> Manner:
    return Manner(
        speed,
        gap_m=float(rng.uniform(2.5, 4.0)),
        gap_s=float(rng.uniform(1.0, 1.6)),
        acceleration=float(rng.uniform(1.5, 2.3)),
        braking=float(rng.uniform(2.5, 3.5)),
    )


def _highway(roads: str, turn: str, rng: np.random.Generator, seed: int) -> Scenario:
    lane = int(rng.integers(1 if turn == "left" else 0, LANES - (turn == "right")))
    s, speed = float(rng.uniform(150.0, 170.0)), float(rng.uniform(18.0, 22.0))
    others = _in_lanes(roads, LANES, rng, (f"lane {lane}", s), (s - 70.0, s + 150.0), 14, (16.0, 22.0))
    scenario = _scenario(roads, f"lane {lane}", s, speed, s + 240.0, Manner(float(rng.uniform(19.0, 23.0))), others)
    if turn == "keep":
        return dataclasses.replace(scenario, phases=((0.0, "keep the lane"),))
    target = lane + (1 if turn == "right" else -1)
    change = Change(f"lane {target}", 0.0, math.inf)
    return dataclasses.replace(scenario, change=change, phases=((0.0, f"change to the {turn} lane"),))


def _merge(roads: str, turn: str, rng: np.random.Generator, seed: int) -> Scenario:
    if seed % 2 == 0:
        s, speed = float(rng.uniform(100.0, 130.0)), float(rng.uniform(14.0, 17.0))
        beside = ("lane 1", s)
        others = _in_lanes(roads, 2, rng, beside, (s - 60.0, s + 130.0), 9, (14.0, 18.0), clear=0.0)
        scenario = _scenario(roads, "ramp", s, speed, 370.0, Manner(float(rng.uniform(16.0, 18.0))), others)
        change = Change("lane 1", *RAMP_BESIDE)
        climbs = ((0.0, "drive up the ramp"), (RAMP_BESIDE[0] - 5.0, "merge to the left"))
        return dataclasses.replace(scenario, change=change, phases=climbs)
    s, speed = float(rng.uniform(120.0, 150.0)), float(rng.uniform(15.0, 18.0))
    others = _in_lanes(roads, 2, rng, ("lane 1", s), (s - 60.0, s + 110.0), 6, (14.0, 18.0))
    taken = iter([i for i in rng.permutation(len(BODIES)).tolist() if i not in {o.body for o in others}])
    ramp = float(rng.uniform(s - 30.0, s - 10.0))
    for _ in range(int(rng.integers(2, 4))):
        cruise = float(rng.uniform(14.0, 18.0))
        others += (Start(next(taken), "join", ramp, cruise, _manner(rng, cruise), lanes=False),)
        ramp += float(rng.uniform(22.0, 40.0))
    manner = Manner(float(rng.uniform(16.0, 19.0)))
    phases = ((0.0, "keep the lane"), (RAMP_BESIDE[0] - 30.0, "pass the ramp"), (RAMP_BESIDE[1], "keep the lane"))
    return dataclasses.replace(_scenario(roads, "lane 1", s, speed, 380.0, manner, others), phases=phases)


def _in_lanes(
    roads: str,
    lanes: int,
    rng: np.random.Generator,
    own: tuple[str, float],
    places: tuple[float, float],
    most: int,
    speeds: tuple[float, float],
    clear: float = 24.0,
) -> tuple[Start, ...]:
    """Vehicles in lanes, apart from each other, and from the car by `clear` metres."""
    taken, bodies = [(own[0], own[1], clear)], rng.permutation(len(BODIES)).tolist()
    found: list[Start] = []
    for _ in range(int(rng.integers(most - 5, most + 1)) + 4):
        lane, s = f"lane {rng.integers(lanes)}", float(rng.uniform(*places))
        cruise = float(rng.uniform(*speeds))
        if s > 8.0 and all(lane != path or abs(s - at) > apart for path, at, apart in taken):
            taken.append((lane, s, 26.0))
            found.append(Start(bodies.pop(), lane, s, cruise, _manner(rng, cruise), lanes=True))
    return tuple(found)


def _junction(roads: str, turn: str, rng: np.random.Generator, seed: int) -> Scenario:
    side, net = int(rng.integers(4)), network(roads)
    name = f"{side} {turn}"
    path = net.paths[name]
    if roads == "intersection":
        enters, leaves = STOP_LINE, path.length - STOP_LINE
        s, goal = enters - float(rng.uniform(26.0, 42.0)), leaves + float(rng.uniform(20.0, 30.0))
        does = {"left": "turn left", "right": "turn right", "ahead": "cross the intersection"}[turn]
        phases = [(0.0, "drive up to the intersection"), (enters - 4.0, does), (leaves, "drive away")]
    else:
        enters, leaves = 143.0, path.length - 145.0
        s, goal = enters - float(rng.uniform(18.0, 30.0)), path.length - 127.0 + float(rng.uniform(0.0, 6.0))
        phases = [
            (0.0, "drive up to the roundabout"),
            (enters - 4.0, "enter the roundabout"),
            (enters + 6.0, "go around the roundabout"),
            (leaves - 6.0, "leave the roundabout"),
        ]
    speed = float(rng.uniform(6.0, 8.5))
    others = _at_junction(net, rng, (name, s), int(rng.integers(6, 12)), enters)
    manner = Manner(float(rng.uniform(8.5, 10.0)))
    return dataclasses.replace(_scenario(roads, name, s, speed, goal, manner, others), phases=tuple(phases))


def _at_junction(
    net: Network, rng: np.random.Generator, own: tuple[str, float], most: int, enters: float
) -> tuple[Start, ...]:
    """Vehicles on the way to the junction, in the roundabout, and on the way from it, nowhere near each other."""
    places = [net.paths[own[0]].at(own[1])[:2]]
    bodies, found = rng.permutation(len(BODIES)).tolist(), list[Start]()
    names = list(net.paths)
    for _ in range(4 * most):
        name = names[int(rng.integers(len(names)))]
        path = net.paths[name]
        if name == "inner":
            s = float(rng.uniform(0.0, path.length / 3))
        elif net.name == "roundabout" and rng.random() < 0.4:
            s = float(rng.uniform(enters + 12.0, path.length - 150.0))
        elif rng.random() < 0.75:
            s = float(rng.uniform(enters - 75.0, enters - 14.0))
        else:
            s = float(rng.uniform(path.length - enters + 6.0, path.length - enters + 40.0))
        x, y, _ = path.at(s)
        if min(math.hypot(x - px, y - py) for px, py in places) < 14.0:
            continue
        places.append((x, y))
        cruise = float(rng.uniform(7.0, 9.5))
        # No faster than from where it can still stop.
        speed = min(cruise, float(path.limit[path.index(s)])) * float(rng.uniform(0.8, 1.0))
        found.append(Start(bodies.pop(), name, s, speed, _manner(rng, cruise), lanes=False))
        if len(found) == most:
            break
    return tuple(found)


def _buildings(net: Network, scenario: Scenario, rng: np.random.Generator) -> tuple[Building, ...]:
    """Along the roads near the car's way, none of them on one."""
    way = net.paths[scenario.path]
    route = way.xy[(way.along > scenario.s - 60.0) & (way.along < scenario.goal + 90.0)]
    near = np.abs(net.middles[:, None] - route[None, ::20]).max(-1).min(1) < 60.0
    sides = net.middles[near]
    found: list[Building] = []
    for _ in range(40 * BUILDINGS):
        x, y = sides[int(rng.integers(len(sides)))] + rng.uniform(-45.0, 45.0, 2)
        height, clear = float(rng.uniform(5.0, 22.0)), math.hypot(*FOOTPRINTS[len(found) % len(FOOTPRINTS)]) / 2 + 8.0
        if np.min((net.middles[:, 0] - x) ** 2 + (net.middles[:, 1] - y) ** 2) < clear**2:
            continue
        if any(math.hypot(x - b.x, y - b.y) < 24.0 for b in found):
            continue
        found.append(Building(float(x), float(y), float(rng.uniform(-0.2, 0.2)), height))
        if len(found) == BUILDINGS:
            break
    return tuple(found)
