"""Robots for copies of a dataset that store pictures in another way."""

import pytest

from openpi_like.robots.dataset_copies import with_channel_order, with_upside_down
from openpi_like.robots.robot import Camera
from tests.robots.single_fields import ACTION, STATE, make_robot


def test_a_copy_with_other_channels():
    robot = make_robot([STATE], [ACTION], cameras=(Camera("a", "x", channel_order="bgr"), Camera("b", "y")))
    assert [c.channel_order for c in with_channel_order(robot, "rgb").cameras] == ["rgb", "rgb"]
    with pytest.raises(ValueError, match="'grb', expected 'rgb' or 'bgr'"):
        with_channel_order(robot, "grb")


def test_a_copy_with_cameras_upside_down():
    robot = make_robot(
        [STATE], [ACTION], cameras=(Camera("a", "x", upside_down=True), Camera("b", "y"), Camera("c", "z"))
    )
    assert [c.upside_down for c in with_upside_down(robot, ("b", "c")).cameras] == [False, True, True]
    assert not any(c.upside_down for c in with_upside_down(robot, ()).cameras)
    with pytest.raises(ValueError, match=r"Robot 'r': no camera 'd'; known: 'a', 'b', 'c'; no camera 'e'"):
        with_upside_down(robot, ("d", "a", "e"))
