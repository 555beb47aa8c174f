"""SO-101 of TheRobotStudio, as LeRobot's `so101_follower` records it: 30 Hz, degrees from the middle of each range.

Names, units and the gripper's 0 (closed) to 100 (open) are those of lerobot/robots/so_follower. Angles are limited as
in SO-ARM100/Simulation/SO101/so101_new_calib.urdf, whose zero is the middle too; the wrist turns all the way round, as
LeRobot calibrates it. The speed is that of an STS3215 without load at 7.4 V (Feetech: 0.192 s for 60 degrees).

Recordings with `use_degrees=False`, once LeRobot's default, are SO101_NORMALIZED: -100 to 100 over the range that was
calibrated, so nothing in their `meta/stats.json` is beyond 100, where degrees often are.
"""

from openpi_like.robots.gripper import Gripper
from openpi_like.robots.lerobot_fields import gripper, image, joints, lerobot_robot
from openpi_like.robots.limits import Limits

NAMES = ("shoulder_pan.pos", "shoulder_lift.pos", "elbow_flex.pos", "wrist_flex.pos", "wrist_roll.pos")
GRIPPER = gripper("gripper.pos", Gripper(open=100.0, closed=0.0), start=5)
CAMERAS = (image("base", "front"), image("wrist", "wrist"))
SPEED = 312.5  # degrees per second

SO101 = lerobot_robot(
    "so101",
    30,
    CAMERAS,
    joints(
        NAMES,
        Limits((-110.0, -100.0, -96.83, -95.0, -180.0), (110.0, 100.0, 96.83, 95.0, 180.0), SPEED),
        unit="deg",
    ),
    GRIPPER,
)

# How many degrees a unit is depends on the calibration, but for the wrist's full turn.
SO101_NORMALIZED = lerobot_robot(
    "so101_normalized",
    30,
    CAMERAS,
    joints(NAMES, Limits(-100.0, 100.0, (None, None, None, None, SPEED / 1.8)), unit="1"),
    GRIPPER,
)
