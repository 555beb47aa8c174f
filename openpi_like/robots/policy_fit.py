"""Whether a policy has room for a robot."""

from collections.abc import Sequence
from typing import Any

from openpi_like.config import near_names
from openpi_like.robots.robot import Robot


def policy_problems(robot: Robot, policy: Any, *, drop_cameras: Sequence[str] = ()) -> list[str]:
    """Returns what of a robot does not fit a policy's config: cameras without a slot, more dims or steps than it has.

    policy: anything with cameras, entities, perception, robots, state_dim, action_dim and action_horizon.
    drop_cameras: cameras it need not see.
    """
    problems = []
    for camera in robot.cameras:
        if camera.name not in policy.cameras and camera.name not in drop_cameras:
            near = near_names(camera.name, list(policy.cameras))
            problems.append(
                f"camera {camera.name!r} is not a slot of the policy ({near}); add it to the policy's cameras, or to "
                "drop_cameras"
            )
    slots = {slot.name: slot for slot in policy.entities}
    for things in robot.entities:
        slot = slots.get(things.name)
        if slot is None:
            near = near_names(things.name, list(slots)) if slots else "it reads none"
            problems.append(
                f"entities {things.name!r} have no slot of the policy ({near}); leave them out of the robot"
            )
        elif things.size != slot.size or things.count > slot.count:
            problems.append(
                f"entities {things.name!r}: {things.count} of {things.size} numbers, the policy reads {slot.count} of "
                f"{slot.size}"
            )
    missing = sorted(slots.keys() - {things.name for things in robot.entities})
    if policy.perception is not None and missing:
        problems.append(
            f"no entities {', '.join(missing)}, which the policy's perception learns from all robots; leave the robot "
            "out, or the perception"
        )
    if policy.robots and robot.name not in policy.robots:
        problems.append(f"the policy has no parts for it; {near_names(robot.name, policy.robots)}")
    unseen = [c.name for c in robot.cameras if c.name not in policy.cameras]
    if len(unseen) == len(robot.cameras) and not set(unseen) <= set(drop_cameras):
        problems.append(f"none of its cameras is a slot of the policy: {', '.join(policy.cameras)}")
    for what, got, most in (
        ("state size", robot.state_size, policy.state_dim),
        ("action size", robot.action_size, policy.action_dim),
        ("action_horizon", robot.action_horizon, policy.action_horizon),
    ):
        if got > most:
            problems.append(f"{what} {got}, the policy has room for {most}; enlarge the policy")
    return problems
