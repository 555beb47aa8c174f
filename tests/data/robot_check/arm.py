"""A dataset of an arm that is described as it is, and of cameras with every fault."""

from pathlib import Path

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from openpi_like.data.rlds_writer import Episode, write_rlds
from openpi_like.robots import ActionField, Camera, Gripper, Limits, Robot, StateField

HZ, EPISODES, STEPS = 10.0, 12, 40
PROMPTS = ("pick up the cup", "open the drawer")
HAND = Gripper(open=1.0, closed=0.0)

ARM = Robot(
    name="arm",
    cameras=(Camera("base", "observation/base"), Camera("wrist", "observation/wrist")),
    state=(
        StateField("hand", "observation/state", 3, unit="m"),
        StateField("turn", "observation/state", 3, start=3, unit="rad", rotation="rpy", model_rotation="rotation_6d"),
        StateField("joints", "observation/state", 4, start=6, unit="rad", limits=Limits(-3.0, 3.0, velocity=5.0)),
        StateField("gripper", "observation/state", 1, start=10, gripper=HAND),
    ),
    action=(
        ActionField("hand", "action", 3, unit="m", command="delta"),
        ActionField("turn", "action", 3, start=3, unit="rad", rotation="rpy", command="delta"),
        ActionField("joints", "action", 4, start=6, unit="rad", relative_to="joints", limits=Limits(-3.0, 3.0)),
        ActionField("gripper", "action", 1, start=10, gripper=HAND),
    ),
    control_hz=HZ,
    action_horizon=8,
    execute_steps=4,
)
# What the dataset has besides; `half` is black in every second episode, `slow` shows every frame three times.
FAULTY = ("black", "half", "frozen", "slow", "dark", "bright", "flat")
RECORDED = Robot(
    name="arm",
    cameras=(*ARM.cameras, *(Camera(name, f"observation/{name}") for name in FAULTY)),
    state=ARM.state,
    action=ARM.action,
    control_hz=HZ,
    action_horizon=8,
    execute_steps=4,
)


def write_arm(root: Path, episodes: int = EPISODES, steps: int = STEPS) -> Path:
    """Writes it and returns its directory."""
    rng = np.random.default_rng(3)
    made = (_episode(rng, e, steps) for e in range(episodes))
    return write_rlds(root, "arm", RECORDED, {"train": made}, description="", metadata={}, episodes_per_shard=64)


def _wander(rng: np.random.Generator, steps: int, dims: int, memory: float) -> np.ndarray:
    """(steps, dims), of variance 1, correlated from step to step."""
    x = np.zeros((steps, dims))
    x[0] = rng.normal(size=dims)
    for t in range(1, steps):
        x[t] = memory * x[t - 1] + np.sqrt(1 - memory**2) * rng.normal(size=dims)
    return x


def _episode(rng: np.random.Generator, number: int, steps: int) -> Episode:
    delta, turn = 0.01 * _wander(rng, steps, 3, 0.8), 0.03 * _wander(rng, steps, 3, 0.8)
    target = 0.5 * _wander(rng, steps, 4, 0.97)
    close = int(rng.integers(5, 15))
    wanted = np.where((np.arange(steps) >= close) & (np.arange(steps) < close + 15), 0.0, 1.0)
    state = np.zeros((steps, 11))
    hand, pose = rng.normal([0.4, 0, 0.2], 0.1), Rotation.from_rotvec(rng.normal(0, 0.3, 3))
    joints, width = target[0], 1.0
    for t in range(steps):
        state[t] = [*hand, *pose.as_euler("xyz"), *joints, width]
        hand = hand + delta[t] + rng.normal(0, 5e-4, 3)
        pose = Rotation.from_euler("xyz", turn[t]) * pose
        joints = joints + 0.7 * (target[t] - joints)
        width = width + 0.5 * (wanted[t] - width)
    action = np.concatenate([delta, turn, target, wanted[:, None]], axis=1).astype(np.float32)
    return Episode(
        images=_images(rng, number, steps),
        state=state.astype(np.float32),
        action=action,
        prompt=PROMPTS[number % 2],
        success=True,
        metadata={"success": True},
    )


def _images(rng: np.random.Generator, number: int, steps: int) -> dict[str, list[bytes]]:
    scene = cv2.resize(rng.integers(30, 220, (6, 8, 3), np.uint8), (32, 24), interpolation=cv2.INTER_CUBIC)
    live = [np.clip(np.roll(scene, t, axis=1) + rng.integers(0, 9, scene.shape), 0, 255) for t in range(steps)]
    black = [np.zeros_like(scene)] * steps
    pictures = {
        "base": live,
        "wrist": [255 - x for x in live],
        "black": black,
        "half": [x[::-1] for x in live] if number % 2 else black,
        "frozen": [live[0]] * steps,
        "slow": [live[t // 3] for t in range(steps)],
        "dark": [x // 8 for x in live],
        "bright": [255 - x // 32 for x in live],
        "flat": [np.full_like(scene, 120) + (t % 2) for t in range(steps)],
    }
    return {name: [_png(x) for x in frames] for name, frames in pictures.items()}


def _png(image: np.ndarray) -> bytes:
    ok, data = cv2.imencode(".png", image.astype(np.uint8)[..., ::-1])
    assert ok
    return data.tobytes()
