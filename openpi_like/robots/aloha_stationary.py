"""Stationary ALOHA, as the datasets lerobot/aloha_static_* have it: 50 Hz, two ViperX arms, see `viperx`.

Left arm first, whatever names of dims say: openpi's conversion script names the right arm's first, though the numbers
that ALOHA's code writes begin with the left. Signs and gripper are as ALOHA's code writes them, not as openpi turns
them for its released checkpoints (`adapt_to_pi`).
"""

from openpi_like.robots.lerobot_fields import image, lerobot_robot
from openpi_like.robots.viperx import viperx

ALOHA_STATIONARY = lerobot_robot(
    "aloha_stationary",
    50,
    (
        image("base", "cam_high"),
        image("base_1", "cam_low"),
        image("wrist_left", "cam_left_wrist"),
        image("wrist_right", "cam_right_wrist"),
    ),
    *viperx("left_"),
    *viperx("right_", start=7),
)
