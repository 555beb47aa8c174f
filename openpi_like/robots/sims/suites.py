"""Suites of the simulators: which tasks, from which layouts, for how long. What counts as success is the simulator's.

Layouts are seeds that no demonstration uses (`HELD_OUT_SEED`), the same for every policy. How long an episode may take
is `Sim.max_steps`.
"""

import dataclasses
from collections.abc import Mapping

from openpi_like.config import near_names
from openpi_like.driving.scenarios import PROMPTS as DRIVES
from openpi_like.robots.sims.coloured_cubes import PARAPHRASES, SEEN, UNSEEN
from openpi_like.robots.sims.metaworld_tasks import FIRST, MT10, MT50
from openpi_like.robots.sims.sim import HELD_OUT_SEED

_ARMS = ("panda", "sawyer", "ur5e", "iiwa", "kinova3")


@dataclasses.dataclass(frozen=True)
class Suite:
    """What policies are compared on.

    about: in words, with its source. tasks: of each robot. success: when a task is done, in words. episodes: of each
    task. first_seed: of the layouts. paraphrases: task -> instructions that no demonstration has, for tests of what a
    policy listens to.
    """

    about: str
    tasks: Mapping[str, tuple[str, ...]]
    success: str
    episodes: int = 20
    first_seed: int = HELD_OUT_SEED
    paraphrases: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


# What a policy learns that learns the other robots' tasks beside them (configs/generalist.py).
_THIRTY = (
    *FIRST,
    *("button-press-topdown-wall", "button-press-wall", "dial-turn", "door-lock", "door-open", "door-unlock"),
    *("handle-press-side", "handle-pull", "handle-pull-side", "lever-pull", "peg-unplug-side", "plate-slide-back"),
    *("plate-slide-back-side", "plate-slide-side", "push", "reach", "reach-wall", "sweep-into"),
)
_METAWORLD = "(Meta-World, Yu et al. 2019), one camera, layouts drawn from the package's ranges"
_CUBES = "of one scene with three cubes, so that only the words say which is meant (an arm of robosuite 1.5)"
_CUBE_IS = (
    "the cube that was told is raised by 12 cm, let go on the right one, or pushed by 6 cm to the right side, and the "
    "others are within 3 cm of where they were"
)
_SAYS_SO = "the package says so at any of its 500 steps"

SUITES = {
    "metaworld_mt10": Suite(f"the ten tasks of MT-10 {_METAWORLD}", {"sawyer": MT10}, _SAYS_SO),
    "metaworld_mt50": Suite(f"the fifty tasks of MT-50 {_METAWORLD}", {"sawyer": MT50}, _SAYS_SO),
    "metaworld_30": Suite(f"thirty tasks {_METAWORLD}", {"sawyer": _THIRTY}, _SAYS_SO),
    "robosuite_arms": Suite(
        "five arms at one table (robosuite 1.5, Zhu et al. 2020)",
        {f"robosuite_{arm}": ("lift", "stack") for arm in _ARMS},
        "the package's: the cube's middle is 4 cm above the table, or it lies on the other one and is let go",
    ),
    "cubes_seen": Suite(
        f"the tasks that demonstrations are of, {_CUBES}",
        {"cubes_panda": SEEN},
        _CUBE_IS,
        paraphrases={task: PARAPHRASES[task] for task in SEEN},
    ),
    "cubes_unseen": Suite(
        f"deeds and cubes that demonstrations have in other combinations, {_CUBES}",
        {"cubes_panda": UNSEEN},
        _CUBE_IS,
        paraphrases={task: PARAPHRASES[task] for task in UNSEEN},
    ),
    "fetch": Suite(
        "a mobile manipulator's arm (gymnasium-robotics, Plappert et al. 2018)",
        {"fetch": ("reach", "push", "lift", "pick-and-place")},
        "what has to be there, hand or block, is within 5 cm of the mark; to lift, the block is 8 cm above the table",
    ),
    "aloha": Suite(
        "two arms hand a cube over (gym-aloha, Zhao et al. 2023)",
        {"aloha": ("transfer-cube",)},
        "for 0.2 s the left gripper's fingers touch the cube, and neither the right one's nor the table do",
        episodes=50,
    ),
    "pusht": Suite(
        "a disc pushes a T onto its mark (gym-pusht, Chi et al. 2023)",
        {"pusht": ("push-t",)},
        "the package's: the T covers 95 % of its mark",
        episodes=50,
    ),
    "driving": Suite(
        "a car on highways, at a ramp, a roundabout and an intersection (roads: highway-env, Leurent 2018)",
        {"ego_vehicle": tuple(DRIVES)},
        "the goal of the route is reached without a collision and on the road",
        episodes=10,
    ),
}


def suite_of(name: str) -> Suite:
    """Returns a suite by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in SUITES:
        raise ValueError(f"no suite {name!r}; {near_names(name, list(SUITES))}")
    return SUITES[name]
