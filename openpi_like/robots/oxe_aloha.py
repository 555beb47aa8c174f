"""Robots of OXE that are an ALOHA: two arms, absolute joint angles at 50 Hz, as in the simulator, see `oxe`."""

import dataclasses

from openpi_like.robots.aloha import ALOHA
from openpi_like.robots.robot import ActionField, Camera

_ALOHA_WRISTS = (
    Camera("wrist_left", "observation/cam_left_wrist"),
    Camera("wrist_right", "observation/cam_right_wrist"),
)
ALOHA_STATIC = dataclasses.replace(
    ALOHA,
    name="aloha_static",
    cameras=(Camera("base", "observation/cam_high"), Camera("base_1", "observation/cam_low"), *_ALOHA_WRISTS),
    action_horizon=50,
    execute_steps=25,
    normalization="quantile",
)
# Linear and angular velocity of the base follow the arms.
ALOHA_MOBILE = dataclasses.replace(
    ALOHA_STATIC,
    name="aloha_mobile",
    cameras=(Camera("base", "observation/cam_high"), *_ALOHA_WRISTS),
    action=(
        *ALOHA_STATIC.action,
        ActionField("base_velocity", "action", 1, start=14, unit="m/s", command="velocity"),
        ActionField("base_turn", "action", 1, start=15, unit="rad/s", command="velocity"),
    ),
)
