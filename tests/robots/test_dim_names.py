"""Groups of dims by their names, of datasets as they are published."""

import pytest

from openpi_like.robots import so101, unitree_g1
from openpi_like.robots.dim_names import Group, groups


def kinds(*names: str) -> list[tuple[int, str]]:
    return [(g.size, g.kind) for g in groups(names)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("x y z roll pitch yaw gripper", [(3, "position"), (3, "rotation"), (1, "gripper")]),
        ("ee.x ee.y ee.z ee.wx ee.wy ee.wz ee.gripper_pos", [(3, "position"), (3, "rotation"), (1, "gripper")]),
        ("delta_x delta_y delta_z gripper", [(3, "position"), (1, "gripper")]),
        ("x y z theta_x theta_y theta_z gripper.pos", [(3, "position"), (3, "rotation"), (1, "gripper")]),
        ("handX handY handZ handRotX handRotY handRotZ", [(3, "position"), (3, "rotation")]),
        ("pos_x pos_y pos_z quat_x quat_y quat_z quat_w", [(3, "position"), (4, "quaternion_xyzw")]),
        ("qw qx qy qz", [(4, "quaternion_wxyz")]),
        ("x y", [(2, "")]),
        ("z y x", [(3, "")]),
        ("left_gripper right_gripper", [(1, "gripper"), (1, "gripper")]),
        ("joint_0 joint_1 grip joint_2", [(2, ""), (1, "gripper"), (1, "")]),
        ("", []),
    ],
)
def test_groups(names: str, expected: list[tuple[int, str]]) -> None:
    assert kinds(*names.split()) == expected


def test_joints_are_no_poses() -> None:
    """Roll, pitch and yaw of a shoulder or a wrist are joints with an axis each."""
    assert kinds(*so101.NAMES) == [(5, "")]
    arms = tuple(n for f in unitree_g1.UNITREE_G1.state for n in f.names)
    assert {kind for _, kind in kinds(*arms)} == {""}


def test_groups_leave_no_gaps() -> None:
    assert groups(["a", "x", "y", "z", "b", "c", "gripper"]) == [
        Group(0, 1, ""), Group(1, 3, "position"), Group(4, 2, ""), Group(6, 1, "gripper")
    ]  # fmt: skip
