"""A ROS 2 node around a remote policy: joint states and a camera in, joint commands out. Needs a ROS installation.

    pip install openpi-like
    python3 ros2_node.py --ros-args -p host:=gpu-machine -p robot:=my_robot -p prompt:="press the button"

Joints are taken in the order of `joints`, which must be that of the robot's state and action.
"""

import threading
import time

import numpy as np
import rclpy
from rclpy.node import Node
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray

from openpi_like.serve.chunks import RealTime
from openpi_like.serve.client import PolicyClient
from openpi_like.serve.runtime import Runtime

STALE_S = 0.5


class PolicyNode(Node):
    """Keeps the newest camera frame and joint state, and publishes commands at the control rate."""

    def __init__(self) -> None:
        super().__init__("policy")
        defaults = {"host": "127.0.0.1", "port": 8000, "robot": "my_robot", "prompt": "", "joints": ["joint1"]}
        self.options = {name: self.declare_parameter(name, value).value for name, value in defaults.items()}
        self.image: np.ndarray | None = None
        self.position: dict[str, float] = {}
        self.seen = {"image": 0.0, "joints": 0.0}  # when, on time.monotonic
        self.pose: np.ndarray | None = None  # that is held
        self.create_subscription(Image, "camera/image_raw", self.on_image, 1)
        self.create_subscription(JointState, "joint_states", self.on_joints, 1)
        self.commands = self.create_publisher(Float64MultiArray, "position_controller/commands", 1)

    def on_image(self, message: Image) -> None:
        if message.encoding not in ("rgb8", "bgr8"):
            raise ValueError(f"encoding {message.encoding!r}, expected rgb8 or bgr8")
        rows = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)
        image = rows[:, : 3 * message.width].reshape(message.height, message.width, 3)
        self.image = image if message.encoding == "rgb8" else image[..., ::-1]
        self.seen["image"] = time.monotonic()

    def on_joints(self, message: JointState) -> None:
        # Some publishers send the arm and the gripper one after the other.
        self.position |= dict(zip(message.name, message.position, strict=True))
        self.seen["joints"] = time.monotonic()

    @property
    def joints(self) -> np.ndarray | None:
        names = self.options["joints"]
        if not all(name in self.position for name in names):
            return None
        return np.array([self.position[name] for name in names], np.float32)

    def observe(self) -> dict:
        for what, at in self.seen.items():
            if time.monotonic() - at > STALE_S:
                raise RuntimeError(f"no new {what} for {STALE_S} s")  # the runtime holds, and ends
        return {"images": {"base": self.image}, "state": self.joints, "prompt": self.options["prompt"]}

    def act(self, action: np.ndarray) -> None:
        self.pose = action
        self.commands.publish(Float64MultiArray(data=action.astype(float).tolist()))

    def hold(self) -> None:
        """Commands what was commanded last: a measured pose, over and over, would creep."""
        pose = self.joints if self.pose is None else self.pose
        if pose is not None:
            self.act(pose)


def main() -> None:
    rclpy.init()
    node = PolicyNode()
    threading.Thread(target=rclpy.spin, args=(node,), daemon=True).start()
    while node.image is None or node.joints is None:
        node.get_logger().info("waiting for camera/image_raw and joint_states", throttle_duration_sec=2.0)
        node.get_clock().sleep_for(rclpy.duration.Duration(seconds=0.1))
    client = PolicyClient(node.options["host"], node.options["port"])
    runtime = Runtime(
        client, node.options["robot"], merge=RealTime() if client.metadata["real_time_chunking"] else None
    )
    report = runtime.run(observe=node.observe, act=node.act, hold=node.hold, steps=10_000, start=node.joints)
    node.get_logger().info(str(report))
    rclpy.shutdown()


if __name__ == "__main__":
    main()
