"""Three cubes, a red, a green and a blue one: one scene for 15 tasks, so that only the words say which one is meant.

The same seed has the same layout, and so the same first picture, in every task: a policy that does not listen has to
guess. Deeds are told apart, too: who lifts raises higher than who stacks, and what was pushed may not have been raised.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from openpi_like.robots.cubes_panda import CUBES_PANDA
from openpi_like.robots.sims.robosuite_expert import ABOVE, CLOSE, CubeExpert, facing
from openpi_like.robots.sims.robosuite_table import TABLE, Cube, Scene, TableSim, View

COLOURS = ("red", "green", "blue")

# Verb -> wordings of demonstrations, and others, which have other words or another order. A, B: colours.
_SAID = {
    "lift": ("lift the A cube", "pick up the A cube", "grasp the A block and raise it"),
    "stack": (
        "stack the A cube on the B cube",
        "put the A cube on top of the B one",
        "place the A block onto the B block",
    ),
    "push-left": ("push the A cube to the left", "slide the A block left", "move the A cube over to the left"),
    "push-right": ("push the A cube to the right", "slide the A block right", "move the A cube over to the right"),
}
_SAID_OTHERWISE = {
    "lift": ("take the A cube off the table", "hold up the block that is A", "get the A one and bring it up high"),
    "stack": (
        "on the B cube, set the A cube",
        "the A block belongs on the B block",
        "build a tower with B below and A above",
    ),
    "push-left": (
        "shove the A one leftwards",
        "the A block should go further left",
        "to the left with the A cube, without lifting it",
    ),
    "push-right": (
        "shove the A one rightwards",
        "the A block should go further right",
        "to the right with the A cube, without lifting it",
    ),
}
# task -> verb, and colours of the cubes: the one to move, and of a stack the lower one.
_MEANT = {
    **{f"lift-{a}": ("lift", (a,)) for a in COLOURS},
    **{f"stack-{a}-on-{b}": ("stack", (a, b)) for a in COLOURS for b in COLOURS if a != b},
    **{f"push-{side}-{a}": (f"push-{side}", (a,)) for side in ("left", "right") for a in COLOURS},
}


def _wordings(said: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    def filled(text: str, colours: tuple[str, ...]) -> str:
        of = dict(zip("AB", colours, strict=False))
        return " ".join(of.get(word, word) for word in text.split(" "))

    return {task: tuple(filled(text, colours) for text in said[verb]) for task, (verb, colours) in _MEANT.items()}


PROMPTS = _wordings(_SAID)
PARAPHRASES = _wordings(_SAID_OTHERWISE)
"""Task -> instructions that no demonstration has, to test with: see `--words` of serve/evaluate.py."""

UNSEEN = ("stack-green-on-red", "stack-blue-on-green", "push-left-blue", "push-right-red")
"""Combinations that demonstrations leave out. Those that they have (`SEEN`) have every deed, with every colour in every
role: to lift, to push, to put on another cube, and to have one put on."""
SEEN = tuple(task for task in PROMPTS if task not in UNSEEN)

_HALF_SIZE = 0.025  # m
_RGBA = {"red": (0.85, 0.1, 0.1, 1.0), "green": (0.1, 0.65, 0.15, 1.0), "blue": (0.1, 0.2, 0.85, 1.0)}
_REGION = np.array([0.1, 0.15])  # m from the middle of the table, to the front and sideways
# m. Two cubes are apart by one of these, to the front or sideways: open fingers fit between them, and a pushed one has
# room on both sides.
_APART = np.array([0.1, 0.15])
_TURN = 0.3  # rad, at most: pushed at a corner, a cube would turn and slip off sideways

_RAISED = 0.12  # m that a lifted cube is raised by: more than to be put on another one
_PUSHED = 0.06  # m that a cube is pushed by
_TOUCHED = 0.03  # m that the others may move, on the table or up; and up what is to be pushed
_SIDES = {"push-left": -1.0, "push-right": 1.0}  # along y, as the base camera sees it


@functools.cache
def _env_class() -> Any:
    """A scene like the package's own, which has none of three cubes."""
    from robosuite.environments.manipulation.manipulation_env import ManipulationEnv
    from robosuite.models.arenas import TableArena
    from robosuite.models.objects import BoxObject
    from robosuite.models.tasks import ManipulationTask

    class Cubes(ManipulationEnv):
        def _load_model(self) -> None:
            super()._load_model()
            arena, arm = TableArena(table_offset=(0.0, 0.0, TABLE)), self.robots[0].robot_model
            arena.set_origin([0, 0, 0])
            arm.set_base_xpos(arm.base_xpos_offset["table"](arena.table_full_size[0]))
            for colour in COLOURS:
                setattr(self, colour, BoxObject(colour, size=[_HALF_SIZE] * 3, rgba=_RGBA[colour]))
            self.model = ManipulationTask(arena, [arm], [getattr(self, colour) for colour in COLOURS])

        def _setup_observables(self) -> dict[str, Any]:
            return {}

        def reward(self, action: Any = None) -> float:
            return 0.0

    return Cubes


_SCENE = Scene("cubes", _env_class, {colour: Cube(_HALF_SIZE, colour) for colour in COLOURS})


class ColouredCubesSim(TableSim):
    """See `TableSim`. Tasks that programs do when they are told none are those that demonstrations are made of.

    It fails when another cube than the one that was told was raised or moved, or the right one was put on the wrong
    one (`wrong_cube`); or when that was put on another one where it was not to be, or was raised or pushed to the other
    side where it was to be pushed (`wrong_deed`).
    """

    robot, model_name, closed, opened = CUBES_PANDA, "Panda", 0.008, 0.086
    prompts = PROMPTS
    tasks = SEEN
    more_tasks = UNSEEN
    # From the front: the robot's right is the picture's left. Nearer than that of the other arms.
    view = View((0.72, 0.0, 1.3), (-0.01, 0.0, 0.86), 36.0)

    def __init__(self) -> None:
        super().__init__()
        self._start: dict[str, np.ndarray] = {}
        self._wrong_cube = self._wrong_deed = False

    def reset(self, task: str, seed: int) -> None:
        """See `Sim.reset`."""
        super().reset(task, seed)
        self._start = {colour: self._pose(colour)[0] for colour in COLOURS}
        self._wrong_cube = self._wrong_deed = self.failed = False

    def measures(self) -> dict[str, float]:
        """See `Sim.measures`: 1 for what happened."""
        return {"wrong_cube": float(self._wrong_cube), "wrong_deed": float(self._wrong_deed)}

    def expert(self, rng: np.random.Generator, noise: float) -> "ColouredCubesExpert":
        """See `Sim.expert`."""
        return ColouredCubesExpert(self, _MEANT[self._task][0], rng, noise)

    def _scene_of(self, task: str) -> Scene:
        return _SCENE

    def _names_of(self, task: str) -> tuple[str, ...]:
        told = _MEANT[task][1]
        return (*told, *(colour for colour in COLOURS if colour not in told))

    def _places(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        pairs = np.triu_indices(len(COLOURS), 1)
        while True:
            places = rng.uniform(-_REGION, _REGION, (len(COLOURS), 2))
            between = np.abs(places[pairs[0]] - places[pairs[1]])
            if np.all(np.any(between > _APART, axis=1)):
                return places, rng.uniform(-_TURN, _TURN, len(COLOURS))

    def _judge(self) -> None:
        if self.success or self.failed:
            return
        verb, (named, *told) = _MEANT[self._task]
        moved = {colour: self._pose(colour)[0] - start for colour, start in self._start.items()}
        along, up = moved[named][1] * _SIDES.get(verb, 0.0), moved[named][2]
        lies_on = self._lies_on(named)
        others = any(np.linalg.norm(by) > _TOUCHED for colour, by in moved.items() if colour != named)
        self._wrong_cube = others or (verb == "stack" and lies_on not in (None, *told))
        away = verb in _SIDES and bool(along < -_PUSHED or up > _TOUCHED)
        self._wrong_deed = away or (verb != "stack" and lies_on is not None)
        self.failed = self._wrong_cube or self._wrong_deed
        if not self.failed:
            done = {"lift": up > _RAISED, "stack": lies_on is not None}
            self.success = bool(done.get(verb, along > max(_PUSHED, abs(moved[named][0]))))

    def _lies_on(self, named: str) -> str | None:
        """Returns the cube that `named` lies on and was let go."""
        for other in COLOURS:
            apart = np.abs(self._pose(named)[0] - self._pose(other)[0] - [0.0, 0.0, 2 * _HALF_SIZE])
            if other != named and np.all(apart < [_HALF_SIZE, _HALF_SIZE, 0.005]):
                env = self._env
                if env.check_contact(getattr(env, named), getattr(env, other)) and not self._holds(named):
                    return other
        return None


_BESIDE = 0.065  # m between the middle of a cube and the hand that goes down beside it
_AHEAD = 0.03  # m: how far ahead of the hand it is told to go, so that the cube does not slide on by itself


class ColouredCubesExpert(CubeExpert):
    """See `CubeExpert`. Pushes with closed fingers, from the other side, and begins again where the cube slips off."""

    raised = 0.16

    def _deeds(self) -> Mapping[str, Callable[[], Iterator[np.ndarray]]]:
        return {**super()._deeds(), **{verb: functools.partial(self._push, verb) for verb in _SIDES}}

    def _push(self, verb: str) -> Iterator[np.ndarray]:
        side, said = np.array([0.0, _SIDES[verb], 0.0]), f"the {self._colours[0]} cube"
        self._rotation = facing(Rotation.identity())
        while True:
            self._calm, self.doing = False, f"go beside {said}"
            while self._off(self._cube() - _BESIDE * side) > 0.015 or self._turned > 0.15:
                yield self._to(self._cube() - _BESIDE * side + ABOVE, CLOSE)
            self._calm, self.doing = True, f"go down beside {said}"
            while self._sim.hand[2] - self._cube()[2] > 0.005 and self._off(self._cube() - _BESIDE * side) < 0.03:
                yield self._to(self._cube() - _BESIDE * side, CLOSE)
            self.doing = f"{verb.replace('-', f' {said} to the ')}"
            while not self._sim.success and self._is_behind(side):
                goal = self._cube()
                goal[1] = self._sim.hand[1] + _AHEAD * side[1]
                yield self._to(goal, CLOSE)
            rest, self.doing = self._sim.hand + ABOVE, "go up"
            while self._sim.success:
                yield self._to(rest, CLOSE)

    def _is_behind(self, side: np.ndarray) -> bool:
        """Whether the hand can push the cube there from where it is."""
        across, along, up = self._sim.hand - self._cube()
        return bool(abs(across) < 0.02 and -0.1 < along * side[1] < 0.0 and up < 0.02)
