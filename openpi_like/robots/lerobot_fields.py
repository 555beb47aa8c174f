"""Fields and cameras under the keys of LeRobot datasets: vectors `observation.state` and `action` with named dims.

Robots of this folder that are recorded so say in their docstrings whose recorder it is, and where each number is from.
Cameras are named by who records: where yours are others, `dataclasses.replace(SO101, cameras=(image("base", "top"),))`.
"""

from openpi_like.robots.gripper import Gripper
from openpi_like.robots.limits import Limits
from openpi_like.robots.robot import ActionField, Camera, Robot, StateField

Pair = tuple[StateField, ActionField]


def image(slot: str, name: str) -> Camera:
    """Returns the camera that LeRobot calls `name`, in a slot of the model."""
    return Camera(slot, f"observation.images.{name}")


def joints(names: tuple[str, ...], limits: Limits, *, start: int = 0, field: str = "joints", unit: str = "rad") -> Pair:
    """Returns positions of joints from index `start` on, and their targets, which are predicted relative to them."""
    size = len(names)
    state = StateField(field, "observation.state", size, start, unit, names=names, limits=limits)
    target = ActionField(field, "action", size, start, unit, names=names, limits=limits, relative_to=field)
    return state, target


def gripper(
    name: str, ends: Gripper, *, start: int, field: str = "gripper", unit: str = "1", velocity: float | None = None
) -> Pair:
    """Returns the opening at index `start`, and its target, both within open and closed."""
    limits = Limits(min(ends.open, ends.closed), max(ends.open, ends.closed), velocity)
    state = StateField(field, "observation.state", 1, start, unit, gripper=ends, names=(name,), limits=limits)
    return state, ActionField(field, "action", 1, start, unit, gripper=ends, names=(name,), limits=limits)


def lerobot_robot(name: str, fps: int, cameras: tuple[Camera, ...], *pairs: Pair) -> Robot:
    """Returns a robot that is controlled at the rate it is recorded: chunks of one second, half of it executed."""
    return Robot(
        name=name,
        cameras=cameras,
        state=tuple(state for state, _ in pairs),
        action=tuple(target for _, target in pairs),
        control_hz=float(fps),
        action_horizon=fps,
        execute_steps=fps // 2,
        normalization="quantile",
        language_key="task",
    )
