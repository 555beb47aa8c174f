"""The robots of OXE as a whole: their slots line up, their orientations do not jump, and all are found by name."""

import dataclasses

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from openpi_like.data.oxe import MIXTURES, OXE
from openpi_like.robots import policy_problems, with_upside_down
from openpi_like.robots.find import find_robot
from openpi_like.robots.oxe import OTHER_ACTIONS, ROBOTS
from openpi_like.robots.oxe_disputed import DISPUTED, UPSIDE_DOWN
from openpi_like.robots.representations import ROTATIONS
from tests.data.toy import Shapes


def test_robots_of_mixtures_share_their_slots() -> None:
    """Dims of the hand come first and in one order; one policy has room for all."""
    soup = Shapes(cameras=("base", "wrist"), state_dim=11, action_dim=10, action_horizon=16)
    for names in (MIXTURES["oxe_magic_soup"], MIXTURES["oxe_magic_soup_plus"], MIXTURES["rtx"]):
        for name in names:
            robot = ROBOTS[name]
            dropped = ("base_1", "base_2", "wrist_1")
            assert policy_problems(robot, soup, drop_cameras=dropped) == []
            fields = [f.name for f in robot.action]
            assert fields == [f for f in ("hand", "hand_rotation", "gripper") if f in fields], name
            assert robot.normalization == "quantile"


def test_orientations_do_not_jump() -> None:
    """A pose is shown as continuous numbers unless it is stored as others: turning on by 0.01 rad changes none by more
    than that, also through the half turn where roll, pitch, yaw jump."""
    angles = np.arange(0, 2 * np.pi, 0.01)
    for name, robot in ROBOTS.items():
        absolute = [f for f in robot.action if f.command == "absolute"]
        for field in (*robot.state, *absolute):
            if field.rotation in (None, "rpy") or name.startswith("libero"):
                continue
            for axis in "xyz":
                path = Rotation.from_euler(axis, angles[:, None]) * Rotation.from_euler("x", 1.0)
                stored = ROTATIONS[field.rotation][2](path)
                shown = field.to_model(stored)
                assert shown.shape == (len(angles), 6), name
                assert np.abs(np.diff(shown, axis=0)).max() <= 0.01 + 1e-9, name


def test_disputes_are_about_datasets_of_the_catalogue() -> None:
    assert set(DISPUTED) <= set(OXE)
    for disputes in DISPUTED.values():
        for dispute in disputes:
            assert all(dataclasses.astuple(dispute))


def test_names_of_robots_are_unique_and_all_are_found() -> None:
    robots = {id(r): r for r in ROBOTS.values()}.values()
    assert len({r.name for r in robots}) == len(robots)
    for name, robot in ROBOTS.items():
        assert find_robot(name) is robot
    assert find_robot("oxe:FRACTAL") is ROBOTS["fractal20220817_data"]
    assert find_robot("oxe:DROID_JOINTS") is OTHER_ACTIONS["droid"]
    with pytest.raises(ValueError, match="has no robot 'FRACTEL'; did you mean 'FRACTAL'"):
        find_robot("oxe:FRACTEL")
    with pytest.raises(ValueError, match=r"no robot 'tacoplay'.* did you mean .*'taco_play'"):
        find_robot("tacoplay")


def test_what_is_called_upside_down_is_disputed() -> None:
    assert UPSIDE_DOWN.keys() == {k for k, of in DISPUTED.items() if any("way up" in d.about for d in of)}
    for name, cameras in UPSIDE_DOWN.items():
        assert [c.name for c in with_upside_down(ROBOTS[name], cameras).cameras if c.upside_down] == [*cameras]
    assert not any(c.upside_down for robot in ROBOTS.values() for c in robot.cameras)
