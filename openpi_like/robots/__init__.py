"""What a robot is. One file per embodiment; the same object drives training and serving."""

from openpi_like.robots.dataset_copies import with_channel_order, with_upside_down
from openpi_like.robots.entities import Entities
from openpi_like.robots.gripper import Gripper
from openpi_like.robots.limits import Limits
from openpi_like.robots.plan import Plan
from openpi_like.robots.policy_fit import policy_problems
from openpi_like.robots.robot import ActionField, Camera, Robot, StateField

__all__ = [
    "ActionField",
    "Camera",
    "Entities",
    "Gripper",
    "Limits",
    "Plan",
    "Robot",
    "StateField",
    "policy_problems",
    "with_channel_order",
    "with_upside_down",
]
