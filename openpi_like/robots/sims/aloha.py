"""ALOHA's transfer-cube task on the model that comes with gym-aloha, driven through MuJoCo directly.

The right arm picks a cube up and hands it to the left arm. Layout, units and contacts follow the task of Zhao et al.
2023 (ACT) as packaged there; the package itself is not imported, since it renders three large frames at every step.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from openpi_like.robots.aloha import ALOHA
from openpi_like.robots.sims.render import Renderer, aim, import_mujoco, make_renderer, renderer_name
from openpi_like.robots.sims.sim import Sim, SlowNoise, check_action, prompt_of

PROMPTS = {"transfer-cube": ("hand the red cube from the right arm to the left arm",)}

_REPEAT = 10  # of the 2 ms step: 50 Hz
_HELD_STEPS = 10  # the cube must stay in the left gripper for 0.2 s
_START_JOINTS = np.array([0.0, -0.96, 1.16, 0.0, -0.3, 0.0])
_START_FINGER = 0.02239
_FINGER_CLOSED, _FINGER_OPEN = 0.01844, 0.058  # m, of the gripper values 0 and 1
_CUBE_LOW, _CUBE_HIGH = np.array([0.0, 0.4, 0.05]), np.array([0.2, 0.6, 0.05])
_ARMS = ("left", "right")
_QPOS = {"left": 0, "right": 8}  # first joint of each arm; six joints and two fingers follow
_CUBE_QPOS = 16
# The package's top camera is so high that the cube is two of 64 pixels wide; this one sees both hands and the cube.
_TOP_POSITION, _TOP_TARGET, _TOP_FOVY = (0.05, 0.12, 0.62), (0.05, 0.5, 0.12), 44.0
_MODEL_CAMERAS = {"base": "top", "wrist_right": "right_wrist"}


class AlohaSim(Sim):
    """See `Sim`. A seed is a position of the cube, in a square of 20 cm in front of the right arm."""

    robot = ALOHA
    tasks = tuple(PROMPTS)
    max_steps = 400
    noises: tuple[float, ...] = (0.0, 0.03, 0.06)  # rad

    def __init__(self) -> None:
        self._mujoco = import_mujoco()
        self.renderer = renderer_name()
        self.success = False
        self.model = self._mujoco.MjModel.from_xml_path(str(_model_path()))
        aim(self.model, "top", _TOP_POSITION, _TOP_TARGET, _TOP_FOVY)
        self.data = self._mujoco.MjData(self.model)
        self._renderers: dict[tuple[str, int], Renderer] = {}
        self._prompt, self._held = "", 0
        geom = self.model.geom
        self._cube, self._table = geom("red_box").id, geom("table").id
        self._fingers = {
            arm: [geom(f"vx300s_{arm}/10_{side}_gripper_finger").id for side in ("left", "right")] for arm in _ARMS
        }

    def reset(self, task: str, seed: int) -> None:
        """See `Sim.reset`."""
        self._prompt = prompt_of(PROMPTS, task, seed, self.robot)
        self._mujoco.mj_resetData(self.model, self.data)
        start = np.concatenate([_START_JOINTS, [_START_FINGER, -_START_FINGER]])
        cube = np.random.default_rng(seed).uniform(_CUBE_LOW, _CUBE_HIGH)
        self.data.qpos[:_CUBE_QPOS] = np.tile(start, 2)
        self.data.qpos[_CUBE_QPOS:] = [*cube, 1, 0, 0, 0]
        self.data.ctrl[:] = np.tile(start, 2)
        self._mujoco.mj_forward(self.model, self.data)
        self.success, self._held = False, 0

    @property
    def cube(self) -> np.ndarray:
        """Position of the cube, in metres; privileged."""
        return self.data.qpos[_CUBE_QPOS : _CUBE_QPOS + 3].copy()

    def gripper(self, arm: str) -> float:
        """How far a gripper is open: 0 closed, 1 open."""
        return float((self.data.qpos[_QPOS[arm] + 6] - _FINGER_CLOSED) / (_FINGER_OPEN - _FINGER_CLOSED))

    def observe(self) -> dict[str, Any]:
        """See `Sim.observe`."""
        state = [x for arm in _ARMS for x in (*self.data.qpos[_QPOS[arm] : _QPOS[arm] + 6], self.gripper(arm))]
        return {
            "images": {c.name: self._draw(_MODEL_CAMERAS[c.name], c.height or 0) for c in self.robot.cameras},
            "state": np.array(state, np.float32),
            "prompt": self._prompt,
        }

    def step(self, action: Float[np.ndarray, "14"]) -> None:
        """See `Sim.step`. MuJoCo cuts targets to the actuators' ranges."""
        action = check_action(action, self.robot)
        for k in range(2):
            joints, gripper = action[7 * k : 7 * k + 6], action[7 * k + 6]
            finger = gripper * (_FINGER_OPEN - _FINGER_CLOSED) + _FINGER_CLOSED
            self.data.ctrl[8 * k : 8 * k + 8] = [*joints, finger, -finger]
        self._mujoco.mj_step(self.model, self.data, _REPEAT)
        touched = self._touched()
        in_left_only = touched & {self._table, *self._fingers["left"], *self._fingers["right"]}
        held = bool(in_left_only) and in_left_only <= set(self._fingers["left"])
        self._held = self._held + 1 if held else 0
        self.success = self.success or self._held >= _HELD_STEPS

    def frame(self, size: int) -> UInt8[np.ndarray, "size size 3"]:
        """See `Sim.frame`."""
        return self._draw("angle", size)

    def expert(self, rng: np.random.Generator, noise: float) -> "AlohaExpert":
        """See `Sim.expert`."""
        return AlohaExpert(self, rng, noise)

    def _draw(self, camera: str, size: int) -> np.ndarray:
        if (camera, size) not in self._renderers:
            self._renderers[camera, size] = make_renderer(self.model, size, size, camera)
        return self._renderers[camera, size].render(self.data)

    def _touched(self) -> set[int]:
        """Geoms in contact with the cube."""
        pairs = self.data.contact.geom.reshape(-1, 2)
        pairs = pairs[(pairs == self._cube).any(axis=1)]
        return set(pairs[pairs != self._cube].tolist())


def _turned(axis: np.ndarray, degrees: float) -> np.ndarray:
    """Quaternion (wxyz) of a turn about a unit axis."""
    half = np.deg2rad(degrees) / 2
    return np.array([np.cos(half), *(np.sin(half) * axis)])


def _shortened(way: np.ndarray, longest: float) -> np.ndarray:
    """A way, or a turn, no longer than that."""
    return way * min(1.0, longest / max(float(np.linalg.norm(way)), 1e-9))


# The hand is 13.5 cm ahead of the gripper link along its x axis; on the right arm, turned by half a turn about z.
_HAND = {
    "left": (np.array([-0.134706, 0.0, 0.00205]), np.array([1.0, 0.0, 0.0, 0.0])),
    "right": (np.array([0.134706, 0.0, 0.00205]), np.array([0.0, 0.0, 0.0, 1.0])),
}
_ROTATION_WEIGHT = 0.3  # metres per radian in the error of the inverse kinematics
_DAMPING = 1e-4
# Pulls forearm roll and wrist rotation to zero: of the wrist's two solutions, always the same.
_POSTURE = np.diag([0.0, 0.0, 0.0, 0.03, 0.0, 0.003])
_LONGEST_STEP = 0.2  # rad per iteration
_FASTEST = 0.12  # rad per control step: near a singular pose a small step of the hand is a large one of the joints
_ITERATIONS = 20

_JOINTS = np.tile([1.0] * 6 + [0.0], 2)  # that are disturbed: not the grippers
_STEP, _TURN = 0.007, 0.035  # m and rad that a hand is moved by per control step
_LEAD = 0.04  # m by which what it is told may be away from where it is
_MEMORY = 0.95  # correlation of the noise from one control step to the next
_CALM, _WILD = 0.06, 0.2  # m from the cube, between which the noise grows
_OPEN, _EMPTY, _HOLDS = 0.85, 0.5, 0.66  # gripper values: wide open; and those that it has with the cube in it
_NEAR, _THERE = 0.035, 0.012  # m: the cube is in the hand; the hand is where it should be

_DOWN, _SIDEWAYS = _turned(np.array([0.0, 1.0, 0.0]), -60.0), _turned(np.array([1.0, 0.0, 0.0]), 90.0)
_ABOVE = np.array([0.0, 0.0, 0.08])  # m
_MEET, _PART = np.array([0.0, 0.5, 0.25]), np.array([0.12, 0.5, 0.25])
_WAIT, _LEAVE = (np.array([x, 0.5, 0.23]) for x in (-0.12, -0.1))

Goal = tuple[np.ndarray, np.ndarray, float]  # hand position, hand quaternion (wxyz), gripper
Hand = tuple[np.ndarray, np.ndarray]


class AlohaExpert:
    """Chooses a goal for each hand from where hands and cube are, and goes one step towards it.

    Nothing depends on the time since the start: what to do can be told from what cameras and joints show, also after a
    disturbance, and a cube that was missed or dropped is taken again. Damped-least-squares inverse kinematics makes
    joint targets of the hands' poses.
    """

    def __init__(self, sim: AlohaSim, rng: np.random.Generator, noise: float) -> None:
        self._mujoco, self._model, self._sim = import_mujoco(), sim.model, sim
        self._data = self._mujoco.MjData(sim.model)
        self._rng, self._noise = rng, noise
        self._joints = {arm: sim.data.qpos[_QPOS[arm] : _QPOS[arm] + 6].copy() for arm in _ARMS}
        self._commanded = {arm: self._hand(arm) for arm in _ARMS}
        self._drift, self._shaken = SlowNoise(14, _MEMORY), np.zeros(2)
        self.doing = ""

    def act(self) -> Float[np.ndarray, "14"]:
        """See `Expert.act`."""
        hands = {arm: self._hand(arm) for arm in _ARMS}
        action: list[float] = []
        for arm, (position, quaternion, gripper) in zip(_ARMS, self._goals(hands), strict=True):
            before, turned = self._commanded[arm]
            now = hands[arm][0]
            start = now + _shortened(before - now, _LEAD)
            target = start + _shortened(position - start, _STEP)
            self._commanded[arm] = target, self._turn_towards(turned, quaternion)
            action += [*self._solve(arm, *self._commanded[arm]), gripper]
        return np.array(action, np.float32)

    def disturb(self, action: Float[np.ndarray, "14"]) -> Float[np.ndarray, "14"]:
        """Slowly varying noise on the joints of an arm that is not near the cube; see `Expert.disturb`.

        The stiff arms would swallow noise that is new at every step. With little of it the joints tell where the arm is
        going, and a policy learns to look at them and not at the cube.
        """
        drift = self._drift.next(self._rng) * _JOINTS
        return (action + self._noise * np.repeat(self._shaken, 7) * drift).astype(np.float32)

    def _goals(self, hands: dict[str, Hand]) -> tuple[Goal, Goal]:
        """Of the left and the right hand; and how much each may be disturbed, from 0 to 1."""
        cube, (left, _), (right, _) = self._sim.cube, hands["left"], hands["right"]
        grippers = {arm: self._sim.gripper(arm) for arm in _ARMS}
        held = {arm: np.linalg.norm(cube - hands[arm][0]) < _NEAR and _EMPTY < grippers[arm] < _HOLDS for arm in _ARMS}
        meeting = held["right"] and np.linalg.norm(right - _MEET) < _THERE
        self._shaken = np.array(
            [
                np.interp(np.linalg.norm(left - cube), (_CALM, _WILD), (0.0, 1.0)),
                0.0 if any(held.values()) else np.interp(np.linalg.norm(right - cube), (_CALM, _WILD), (0.0, 1.0)),
            ]
        )
        if held["left"]:
            apart = grippers["right"] > _OPEN
            self.doing = "take it away with the left arm" if apart else "let go with the right arm"
            return (_LEAVE if apart else cube, _SIDEWAYS, 0.0), (_PART if apart else _MEET, _DOWN, 1.0)
        closing = np.linalg.norm(left - cube) < _THERE
        for_left = (cube, _SIDEWAYS, 0.0 if closing else 1.0) if meeting else (_WAIT, _SIDEWAYS, 1.0)
        if held["right"]:
            self.doing = "grasp the cube with the left arm" if meeting else "bring the cube to the middle"
            return for_left, (_MEET, _DOWN, 0.0)
        over = np.linalg.norm((right - cube)[:2])
        if np.linalg.norm(right - cube) < _THERE:
            self.doing = "grasp the cube with the right arm"
            return for_left, (cube, _DOWN, 0.0)
        lowering = over < _THERE and grippers["right"] > _OPEN
        self.doing = "go down to the cube" if lowering else "go above the cube with the right arm"
        return for_left, (cube if lowering else cube + _ABOVE, _DOWN, 1.0)

    def _hand(self, arm: str) -> Hand:
        """Position and quaternion of a hand now."""
        body = self._model.body(f"vx300s_{arm}/gripper_link").id
        offset, turn = _HAND[arm]
        inverse, quaternion, ahead = np.zeros(4), np.zeros(4), np.zeros(3)
        self._mujoco.mju_negQuat(inverse, turn)
        self._mujoco.mju_mulQuat(quaternion, self._sim.data.xquat[body], inverse)
        self._mujoco.mju_rotVecQuat(ahead, offset, quaternion)
        return self._sim.data.xpos[body] - ahead, quaternion

    def _turn_towards(self, quaternion: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """The quaternion one step on the way to the goal."""
        inverse, difference, axis, turned = np.zeros(4), np.zeros(4), np.zeros(3), quaternion.copy()
        self._mujoco.mju_negQuat(inverse, quaternion)
        self._mujoco.mju_mulQuat(difference, inverse, goal)
        self._mujoco.mju_quat2Vel(axis, difference, 1.0)
        self._mujoco.mju_quatIntegrate(turned, _shortened(axis, _TURN), 1.0)
        return turned

    def _solve(self, arm: str, position: np.ndarray, quaternion: np.ndarray) -> np.ndarray:
        """Joint angles that bring the arm's hand to a pose, starting from the last ones."""
        mujoco, model, data = self._mujoco, self._model, self._data
        first = _QPOS[arm]
        own = slice(first, first + 6)
        body = model.body(f"vx300s_{arm}/gripper_link").id
        offset, turn = _HAND[arm]
        target, target_quaternion, rotation_error, inverse, difference = (np.zeros(n) for n in (3, 4, 3, 4, 4))
        mujoco.mju_rotVecQuat(target, offset, quaternion)
        target += position
        mujoco.mju_mulQuat(target_quaternion, quaternion, turn)
        jacobian_position, jacobian_rotation = np.zeros((3, model.nv)), np.zeros((3, model.nv))
        low, high = model.jnt_range[own].T
        q = self._joints[arm]
        for _ in range(_ITERATIONS):
            data.qpos[own] = q
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            mujoco.mj_jacBody(model, data, jacobian_position, jacobian_rotation, body)
            mujoco.mju_negQuat(inverse, data.xquat[body])
            mujoco.mju_mulQuat(difference, target_quaternion, inverse)
            mujoco.mju_quat2Vel(rotation_error, difference, 1.0)
            error = np.concatenate([target - data.xpos[body], _ROTATION_WEIGHT * rotation_error])
            if np.linalg.norm(error) < 1e-4:
                break
            jacobian = np.concatenate(
                [jacobian_position[:, own], _ROTATION_WEIGHT * jacobian_rotation[:, own], _POSTURE]
            )
            error = np.concatenate([error, -_POSTURE @ q])
            change = np.linalg.solve(jacobian.T @ jacobian + _DAMPING * np.eye(6), jacobian.T @ error)
            q = np.clip(q + np.clip(change, -_LONGEST_STEP, _LONGEST_STEP), low, high)
        before = self._joints[arm]
        self._joints[arm] = before + np.clip(q - before, -_FASTEST, _FASTEST)
        return self._joints[arm]


def _model_path() -> Path:
    """Where gym-aloha keeps its model.

    Raises:
        ModuleNotFoundError: gym-aloha is not installed.
    """
    spec = importlib.util.find_spec("gym_aloha")  # finds without importing, which would need dm_control
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'gym_aloha', whose robot model this needs", name="gym_aloha")
    return Path(spec.submodule_search_locations[0]) / "assets" / "bimanual_viperx_transfer_cube.xml"
