"""The ego vehicle: a car with six cameras, a state, a command in words, and a plan or controls.

Numbers are in the car's own frame of now, x to the right and y ahead, as those of nuScenes that language planners are
given (OpenDriveVLA, Zhou et al. 2025, arXiv 2503.23463, section 3.5).
"""

import dataclasses

from openpi_like.robots.entities import Entities
from openpi_like.robots.limits import Limits
from openpi_like.robots.plan import Plan
from openpi_like.robots.robot import ActionField, Camera, Robot, StateField

HISTORY = 4  # places where the car was, the farthest back first
STEP_S = 0.5  # from one waypoint, and one place of the history, to the next
VIEWS = ("front", "front_left", "front_right", "back", "back_left", "back_right")

CAMERAS = tuple(Camera(view, f"observation/image_{view}", fit="crop") for view in VIEWS)

# What OpenDriveVLA is told of the car, 17 numbers, in SI units: there velocities are per half second.
STATE = (
    StateField("velocity", "observation/velocity", 2, unit="m/s", names=("velocity_right", "velocity_ahead")),
    StateField("yaw_rate", "observation/yaw_rate", 1, unit="rad/s"),  # to the left
    # From the last two displacements of the history; and as an accelerometer has it.
    StateField("acceleration", "observation/acceleration", 2, unit="m/s^2", names=("change_right", "change_ahead")),
    StateField("felt", "observation/felt", 2, unit="m/s^2", names=("felt_right", "felt_ahead")),
    StateField("speed", "observation/speed", 1, unit="m/s"),
    StateField("steering", "observation/steering", 1, unit="rad"),  # of the front wheels, to the left
    StateField(
        "history",
        "observation/history",
        2 * HISTORY,
        unit="m",
        names=tuple(f"{axis}_{STEP_S * k:g}s_ago" for k in range(HISTORY, 0, -1) for axis in ("right", "ahead")),
    ),
)

AGENTS, AGENT_NUMBERS = 16, 12  # other vehicles, see `openpi_like.driving.scene_entities`
LINES, LINE_NUMBERS = 32, 23  # of the map

ENTITIES = (
    Entities("agents", "observation/agents", AGENTS, AGENT_NUMBERS, "observation/agents_there"),
    Entities("map", "observation/map", LINES, LINE_NUMBERS, "observation/map_there"),
)

# Where to be half a second from now, and on to 3 s. A car is driven by the first, and asks again.
_WAYPOINT = ActionField("waypoint", "plan", 2, unit="m", names=("right", "ahead"))

EGO_VEHICLE = Robot(
    name="ego_vehicle",
    cameras=CAMERAS,
    state=STATE,
    # A model says how far each is from where the present velocity would lead: most of a plan is told by that.
    action=(dataclasses.replace(_WAYPOINT, relative_to="velocity"),),
    control_hz=1 / STEP_S,
    action_horizon=6,
    execute_steps=1,
    plan=Plan(known="plan_known"),
)

EGO_CONTROLS = Robot(
    name="ego_controls",
    cameras=CAMERAS,
    state=STATE,
    action=(
        ActionField(
            "acceleration", "action", 1, unit="m/s^2", command="velocity", limits=Limits(lower=(-8.0,), upper=(5.0,))
        ),
        ActionField("steering", "action", 1, start=1, unit="rad", limits=Limits(lower=(-0.8,), upper=(0.8,))),
    ),
    control_hz=10.0,
    action_horizon=20,
    execute_steps=5,
)

# The same car with a perception, or a simulator, that says what is around it.
EGO_VEHICLE_SCENE = dataclasses.replace(EGO_VEHICLE, entities=ENTITIES)
EGO_CONTROLS_SCENE = dataclasses.replace(EGO_CONTROLS, entities=ENTITIES)

# The same car, whose plan is given and written in metres as they are, for policies that write digits.
EGO_VEHICLE_METRES = dataclasses.replace(EGO_VEHICLE, action=(_WAYPOINT,), plan=Plan(known="plan_known", scale="none"))
