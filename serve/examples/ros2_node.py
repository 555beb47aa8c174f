"""A ROS 2 node around a remote policy: joint states and a camera in, joint commands out. Needs a ROS installation.

    pip install openpi-like
    python3 ros2_node.py --ros-args -p host:=gpu-machine -p robot:=my_robot -p prompt:="press the button"

Joints are taken in the order of `joints`, which must be that of the robot's state and action.
"""

import threading

import numpy as np
import rclpy
from rclpy.node import Node
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray

from openpi_like.serve.chunks import RealTime
from openpi_like.serve.client import PolicyClient
from openpi_like.serve.runtime import Runtime


class PolicyNode(Node):
    """Keeps the newest camera frame and joint state, and publishes commands at the control rate."""

    def __init__(self) -> None:
        super().__init__("policy")
        defaults = {"host": "127.0.0.1", "port": 8000, "robot": "my_robot", "prompt": "", "joints": ["joint1"]}
        self.options = {name: self.declare_parameter(name, value).value for name, value in defaults.items()}
        self.image: np.ndarray | None = None
        self.joints: np.ndarray | None = None
        self.create_subscription(Image, "camera/image_raw", self.on_image, 1)
        self.create_subscription(JointState, "joint_states", self.on_joints, 1)
        self.commands = self.create_publisher(Float64MultiArray, "position_controller/commands", 1)

    def on_image(self, message: Image) -> None:
        if message.encoding not in ("rgb8", "bgr8"):
            raise ValueError(f"encoding {message.encoding!r}, expected rgb8 or bgr8")
        rows = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)
        image = rows[:, : 3 * message.width].reshape(message.height, message.width, 3)
        self.image = image if message.encoding == "rgb8" else image[..., ::-1]

    def on_joints(self, message: JointState) -> None:
        position = dict(zip(message.name, message.position, strict=True))
        self.joints = np.array([position[name] for name in self.options["joints"]], np.float32)

    def observe(self) -> dict:
        return {"images": {"base": self.image}, "state": self.joints, "prompt": self.options["prompt"]}

    def act(self, action: np.ndarray) -> None:
        self.commands.publish(Float64MultiArray(data=action.astype(float).tolist()))

    def hold(self) -> None:
        if self.joints is not None:
            self.act(self.joints)


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
    report = runtime.run(observe=node.observe, act=node.act, hold=node.hold, steps=10_000)
    node.get_logger().info(str(report))
    rclpy.shutdown()


if __name__ == "__main__":
    main()
