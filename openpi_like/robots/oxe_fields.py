"""Fields, grippers and lengths of chunks that robots of OXE have in common, see `oxe`."""

from openpi_like.robots.gripper import Gripper
from openpi_like.robots.robot import ActionField, Camera, Robot, StateField

OPENNESS = Gripper(open=1.0, closed=0.0)
CLOSEDNESS = Gripper(open=0.0, closed=1.0)
ROBOSUITE = Gripper(open=-1.0, closed=1.0)  # an effort: -1 opens, 1 closes
TRIGGER = Gripper(open=-1.0, closed=1.0, convention="trigger")
FRANKA_WIDTH = Gripper(open=0.08, closed=0.0)  # metres between the fingers

_SAID = "observation/natural_language_instruction"


def oxe_robot(
    name: str,
    hz: float,
    cameras: tuple[Camera, ...],
    state: tuple[StateField, ...],
    action: tuple[ActionField, ...],
    language: str = _SAID,
) -> Robot:
    """A chunk of 16 steps, or of 8 for robots slower than 8 Hz; half of it is executed."""
    horizon = 16 if hz >= 8 else 8
    return Robot(
        name=name,
        cameras=cameras,
        state=state,
        action=action,
        control_hz=hz,
        action_horizon=horizon,
        execute_steps=horizon // 2,
        normalization="quantile",
        language_key=language,
    )


def pose(key: str, *, start: int = 0, rotation: str = "rpy") -> tuple[StateField, StateField]:
    """Position in metres, then orientation, one behind the other in the state."""
    size = 4 if rotation.startswith("quaternion") else 3
    unit = "1" if size == 4 else "rad"
    model = "rpy" if rotation == "rpy" else "rotation_6d"
    turn = StateField("hand_rotation", key, size, start + 3, unit, rotation=rotation, model_rotation=model)
    return StateField("hand", key, 3, start, unit="m"), turn


def joints(key: str, size: int = 7, start: int = 0) -> StateField:
    """Joint angles in radians."""
    return StateField("joints", key, size, start, unit="rad")


def world_vector(gripper: ActionField, command: str = "delta") -> tuple[ActionField, ...]:
    """The actions of datasets that Google converted: fields of a dict."""
    rate, rotation = ("/s", None) if command == "velocity" else ("", "rpy")
    return (
        ActionField("hand", "action/world_vector", 3, unit=f"m{rate}", command=command),
        ActionField("hand_rotation", "action/rotation_delta", 3, unit=f"rad{rate}", rotation=rotation, command=command),
        gripper,
    )


def normalized(gripper: Gripper, key: str = "action") -> tuple[ActionField, ...]:
    """Seven commands as a fraction of the longest step that the controller takes."""
    return (
        ActionField("hand", key, 3, command="delta"),
        ActionField("hand_rotation", key, 3, start=3, command="delta"),
        ActionField("gripper", key, 1, start=6, gripper=gripper),
    )


def metric(gripper: Gripper, start: int = 0, rotation: str = "rpy") -> tuple[ActionField, ...]:
    """Changes in metres and radians, one behind the other in the action."""
    turn = ActionField(
        "hand_rotation", "action", 3, start + 3, "rad", rotation=rotation, model_rotation="rpy", command="delta"
    )
    return (
        ActionField("hand", "action", 3, start, unit="m", command="delta"),
        turn,
        ActionField("gripper", "action", 1, start + 6, gripper=gripper),
    )
