"""A scripted demonstrator for the cubes of `openpi_like.robots.sims.robosuite_table`, which lifts and stacks them."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

from openpi_like.robots.sims.robosuite_table import TableSim

_GAIN = 40.0  # of the longest step per metre
_LEAD = 2.0  # control steps: where the hand will be by itself, since it stops late
_TURN_GAIN = 4.0  # of the longest turn per radian
OPEN, CLOSE = -1.0, 1.0
"""Commands to the gripper."""
_UP = np.array([0.0, 0.0, 1.0])
ABOVE = 0.1 * _UP
"""From a cube to where the hand goes down from, in metres."""

_FINGERTIPS = 0.05  # m between the hand and the cube where the fingers begin to be beside it
_ALIGNED = (0.006, 0.02)  # m, at least and at most: how near the hand has to be before it goes down there
_CALM = 0.2  # share of the noise where fingers go around a cube, or put it down
_GRASP_STEPS = 15  # at most
_RELEASE_STEPS = 8
_CLEARANCE = 0.03  # m between the two cubes on the way


class CubeExpert:
    """Goes through waypoints around the cubes, correcting at every step; starts again if it loses the cube.

    raised: metres that a cube is lifted by.
    """

    raised: float = 0.1

    def __init__(self, sim: TableSim, verb: str, rng: np.random.Generator, noise: float) -> None:
        self._sim, self._rng, self._noise = sim, rng, noise
        self._rotation = sim.hand_rotation
        self._hand, self._calm, self.doing = sim.hand, False, ""
        self._actions = self._deeds()[verb]()

    def _deeds(self) -> Mapping[str, Callable[[], Iterator[np.ndarray]]]:
        """Returns the ways to act, by verb."""
        return {"lift": self._lift, "stack": self._stack}

    def act(self) -> Float[np.ndarray, "7"]:
        """See `Expert.act`."""
        return np.clip(next(self._actions), -1.0, 1.0).astype(np.float32)

    def disturb(self, action: Float[np.ndarray, "7"]) -> Float[np.ndarray, "7"]:
        """Gaussian noise on the hand's position and orientation, less where it must fit; see `Expert.disturb`."""
        sigma = self._noise * (_CALM if self._calm else 1.0)
        noise = sigma * self._rng.standard_normal(7) * [1, 1, 1, 1, 1, 1, 0]
        return np.clip(action + noise, -1.0, 1.0).astype(np.float32)

    def _to(self, target: np.ndarray, gripper: float) -> np.ndarray:
        turn = (self._rotation * self._sim.hand_rotation.inv()).as_rotvec()
        hand = self._sim.hand
        coming = hand + _LEAD * (hand - self._hand)
        self._hand = hand
        return np.array([*_GAIN * (target - coming), *_TURN_GAIN * turn, gripper])

    def _off(self, target: np.ndarray) -> float:
        """Distance from the hand to `target`, seen from above."""
        return float(np.linalg.norm((target - self._sim.hand)[:2]))

    @property
    def _turned(self) -> float:
        """Angle in radians between the hand and how it should be."""
        return float((self._rotation * self._sim.hand_rotation.inv()).magnitude())

    @property
    def _colours(self) -> list[str]:
        return [cube.colour for cube in self._sim.kinds]

    def _cube(self) -> np.ndarray:
        return self._sim.cubes[0][0]

    def _grasp(self) -> Iterator[np.ndarray]:
        """Until the cube is held, or was lost."""
        self._rotation = facing(self._sim.cubes[0][1])
        self._calm, self.doing = False, f"go above the {self._colours[0]} cube"
        while self._off(self._cube()) > 0.015 or self._turned > 0.15:
            yield self._to(self._cube() + ABOVE, OPEN)
        self._calm, self.doing = True, f"go down to the {self._colours[0]} cube"
        play = self._sim.opened - self._sim.closed - 2 * self._sim.kinds[0].half_size
        aligned = np.clip(play / 4, *_ALIGNED)
        while (height := self._sim.hand[2] - self._cube()[2]) > 0.005:
            off = self._off(self._cube())
            if off > 0.03:
                return
            wait = off > aligned and height < _FINGERTIPS  # above the cube, until the fingers fit over it
            yield self._to(self._cube() + (_FINGERTIPS if wait else 0.0) * _UP, OPEN)
        self.doing = f"grasp the {self._colours[0]} cube"
        for _ in range(_GRASP_STEPS):
            yield self._to(self._cube(), CLOSE)
            if self._sim.holds_cube:
                return

    def _carry(self, goal: np.ndarray, near: float) -> Iterator[np.ndarray]:
        """Moves the cube to `goal`, or until it was lost."""
        while self._sim.holds_cube and np.linalg.norm(goal - self._cube()) > near:
            yield self._to(self._sim.hand + goal - self._cube(), CLOSE)

    def _lift(self) -> Iterator[np.ndarray]:
        while True:
            yield from self._grasp()
            self._calm, self.doing = False, f"raise the {self._colours[0]} cube"
            yield from self._carry(self._cube() + self.raised * _UP, 0.0)

    def _stack(self) -> Iterator[np.ndarray]:
        while True:
            yield from self._grasp()
            base = self._sim.cubes[1][0]
            on_top = base + (self._sim.kinds[0].half_size + self._sim.kinds[1].half_size) * _UP
            over = on_top + _CLEARANCE * _UP
            self._calm, self.doing = False, f"raise the {self._colours[0]} cube"
            yield from self._carry(np.array([*self._cube()[:2], over[2]]), 0.015)
            self.doing = f"bring it over the {self._colours[1]} cube"
            yield from self._carry(over, 0.01)
            self._calm, self.doing = True, f"put it down on the {self._colours[1]} cube"
            yield from self._carry(on_top, 0.005)
            self.doing = "let go"
            for _ in range(_RELEASE_STEPS):
                yield self._to(self._sim.hand, OPEN)
            rest, self.doing = self._sim.hand + ABOVE, "go up"
            while self._sim.success:
                yield self._to(rest, OPEN)


def facing(cube: Rotation) -> Rotation:
    """Fingers down and flat against a cube that lies on the table, turned as little as that needs."""
    angle = cube.as_euler("zyx")[0]
    angle -= np.pi / 2 * np.round(angle / (np.pi / 2))
    return Rotation.from_euler("z", angle) * Rotation.from_matrix([[0, 1, 0], [1, 0, 0], [0, 0, -1]])
