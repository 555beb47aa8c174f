"""What a robot is: its cameras, state, actions, units and rate. The same object drives training and serving."""

from openpi_like.robots.robot import ActionField, Camera, Gripper, Robot, StateField

__all__ = ["ActionField", "Camera", "Gripper", "Robot", "StateField"]
