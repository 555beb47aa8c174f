"""What is around the car as rows of numbers, for the slots of `openpi_like.robots.ego_vehicle.ENTITIES`.

Numbers are scaled to about 1: places by `REACH_M`, sizes by 10 m, speeds by 10 m/s.
"""

import numpy as np
from jaxtyping import Float32

from openpi_like.driving.annotations import REACH_M, Agent, Annotations, MapLine
from openpi_like.robots.ego_vehicle import AGENT_NUMBERS, AGENTS, LINE_NUMBERS, LINES

_KINDS = ("car", "small car", "van", "truck")
_LINES = ("middle", "striped", "continuous")
_POINTS = (LINE_NUMBERS - len(_LINES)) // 2


def entities(annotations: Annotations) -> dict[str, Float32[np.ndarray, "n F"]]:
    """Returns "agents", the nearest first, and "map": middles of lanes, then edges that are painted, of either those
    that come nearest first. Beyond as many as there is room for, the farthest are left out, of edges first."""
    drawn = [line for line in annotations.lines if line.kind != "none"]
    order = lambda line: (line.kind != "middle", float(np.hypot(*line.points.T).min()))  # noqa: E731
    lines = sorted(drawn, key=order)
    agents = [_agent(agent) for agent in annotations.agents[:AGENTS]]
    return {
        "agents": np.array(agents, np.float32).reshape(len(agents), AGENT_NUMBERS),
        "map": np.array([_line(line) for line in lines[:LINES]], np.float32).reshape(-1, LINE_NUMBERS),
    }


def _agent(agent: Agent) -> list[float]:
    """Place (2), heading as sine and cosine (2), length and width (2), velocity (2), kind (4)."""
    places = [agent.right / REACH_M, agent.ahead / REACH_M, np.sin(agent.heading), np.cos(agent.heading)]
    sizes = [agent.length / 10, agent.width / 10, agent.velocity[0] / 10, agent.velocity[1] / 10]
    return [*places, *sizes, *(float(agent.kind == kind) for kind in _KINDS)]


def _line(line: MapLine) -> list[float]:
    """Points at even spaces along it (2 each), and its kind (4)."""
    along = np.append(0.0, np.cumsum(np.hypot(*np.diff(line.points, axis=0).T)))
    at = np.linspace(0.0, along[-1], _POINTS)
    points = np.stack([np.interp(at, along, line.points[:, axis]) for axis in (0, 1)], axis=1) / REACH_M
    return [*points.ravel().tolist(), *(float(line.kind == kind) for kind in _LINES)]
