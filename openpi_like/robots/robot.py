"""The `Robot` dataclass: one frozen object per embodiment, used unchanged by training and by serving.

Two spaces are told apart everywhere:
- *robot space*: numbers as the dataset stores them and the controller takes them (its units, its gripper convention);
- *model space*: SI units (metres, radians), gripper 1 = open and 0 = closed, the chosen rotation representation, and
  fields with `relative_to` expressed relative to the state at the first step of the chunk.

`Robot.encode_*` goes from robot space to model space, `Robot.decode_actions` back. Normalisation is applied on top of
model space (see `openpi_like.data.normalize`).

Where a dataset stores no commands as a controller takes them (triggers instead of gripper positions, states instead of
commands), `Gripper.convention` and `ActionField.next_step` say how they are derived. Derived commands are in robot
space too, so a policy that learned them answers with what a controller can execute.
"""

import dataclasses
import functools
import itertools

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy.spatial.transform import Rotation

from openpi_like.config import near_names
from openpi_like.robots.entities import Entities
from openpi_like.robots.gripper import Gripper
from openpi_like.robots.limits import Limits, excess_problems, joined
from openpi_like.robots.plan import Plan
from openpi_like.robots.representations import ROTATIONS, UNITS

_NO_ROTATION = 1e-6  # a quaternion shorter than this has no direction


@dataclasses.dataclass(frozen=True)
class Camera:
    """One camera. The policy sees what `channel_order` and `upside_down` make of a stored picture; a client sends that.

    name: the slot the model sees; robots that share a slot name share its place in the prefix.
    key: path of the image in an RLDS step, e.g. "observation/image_0".
    height, width: pixels of the frames the robot delivers; None accepts any size.
    channel_order: "rgb", or "bgr" where a copy of a dataset stores the channels swapped.
    upside_down: a copy of a dataset stores the picture turned by 180 degrees, so it is turned back when it is read.
    steps_back: shows the frame of so many RLDS steps earlier; absent where the episode had not begun. History is a
        further camera with the same key.
    min_bytes: an encoded image smaller than this is an absent camera; some datasets store a black image for it.
    fit: how a frame of another shape fits the policy's: "pad", "crop" or "stretch", see `openpi_like.data.images.fit`.
    """

    name: str
    key: str
    height: int | None = None
    width: int | None = None
    channel_order: str = "rgb"
    steps_back: int = 0
    min_bytes: int = 0
    fit: str = "pad"
    upside_down: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.channel_order not in ("rgb", "bgr"):
            problems.append(f"channel_order {self.channel_order!r}, expected 'rgb' or 'bgr'")
        if self.fit not in ("pad", "crop", "stretch"):
            problems.append(f"fit {self.fit!r}, expected 'pad', 'crop' or 'stretch'")
        if self.steps_back < 0 or self.min_bytes < 0:
            problems.append(f"steps_back {self.steps_back} and min_bytes {self.min_bytes}, expected both >= 0")
        if problems:
            raise ValueError(f"camera {self.name!r}: " + "; ".join(problems))


@dataclasses.dataclass(frozen=True)
class StateField:
    """A run of numbers in the state: `size` values of RLDS field `key` from index `start` on.

    unit: one of `UNITS`. gripper: convention, for gripper fields. rotation, model_rotation: one of `ROTATIONS`, the
    representation stored and the one the model sees (default: as stored).
    names: of the dims, such as joints, as the dataset has them; () numbers them. limits: see `Limits`.
    """

    name: str
    key: str
    size: int
    start: int = 0
    unit: str = "1"
    gripper: Gripper | None = None
    rotation: str | None = None
    model_rotation: str | None = None
    names: tuple[str, ...] = ()
    limits: Limits | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.unit not in UNITS:
            problems.append(f"unit {self.unit!r} is unknown; {near_names(self.unit, list(UNITS))}")
        for name in (self.rotation, self.model_rotation):
            if name is not None and name not in ROTATIONS:
                problems.append(f"rotation {name!r} is unknown; {near_names(name, list(ROTATIONS))}")
        if self.model_rotation is not None and self.rotation is None:
            problems.append("model_rotation is given without rotation")
        if self.rotation in ROTATIONS and ROTATIONS[self.rotation][0] != self.size:
            problems.append(f"size {self.size}, expected {ROTATIONS[self.rotation][0]} for rotation {self.rotation!r}")
        if self.rotation is not None and self.gripper is not None:
            problems.append("a field is a rotation or a gripper, not both")
        if self.size < 1 or self.start < 0:
            problems.append(f"size {self.size} and start {self.start}, expected size >= 1 and start >= 0")
        if self.names and len(self.names) != self.size:
            problems.append(f"{len(self.names)} names {self.names}, expected {self.size}, or none")
        if self.limits is not None:
            problems += self.limits.size_problems(self.size)
            if self.rotation is not None and (self.limits.velocity, self.limits.acceleration) != (None, None):
                problems.append("limits of velocity and acceleration of a rotation, whose numbers have no speed")
        problems += self._command_problems()
        if problems:
            raise ValueError(f"{type(self).__name__} {self.name!r}: " + "; ".join(problems))

    def _command_problems(self) -> list[str]:
        if self.gripper is not None and self.gripper.convention != "absolute":
            return [f"gripper convention {self.gripper.convention!r} is for commands, a state is always absolute"]
        return []

    @property
    def model_size(self) -> int:
        """Number of values this field has in model space."""
        representation = self.model_rotation or self.rotation
        return self.size if representation is None else ROTATIONS[representation][0]

    @property
    def model_unit(self) -> str:
        """Unit in model space."""
        return "1" if self.gripper else UNITS[self.unit][0]

    @property
    def dim_names(self) -> tuple[str, ...]:
        """One name per dim in robot space, e.g. "waist [deg]", or "hand_0 [mm]" where `names` has none."""
        return tuple(f"{n} [{self.unit}]" for n in self.names or _numbered(self.name, self.size))

    @property
    def model_dim_names(self) -> tuple[str, ...]:
        """One name per dim in model space, e.g. "waist [rad]"."""
        names = self.names if self.model_rotation in (None, self.rotation) else ()
        return tuple(f"{n} [{self.model_unit}]" for n in names or _numbered(self.name, self.model_size))

    @property
    def _rotation_scale(self) -> float:
        return 1.0 if self.rotation is None or self.rotation.startswith("quaternion") else UNITS[self.unit][1]

    def usable(self, x: Shaped[np.ndarray, "N size"]) -> Bool[np.ndarray, "N"]:
        """Returns where stored values can be used: they are finite and, of a quaternion or 6-D, give a rotation."""
        good = np.isfinite(x).all(axis=1)
        if self.rotation == "rotation_6d":
            with np.errstate(invalid="ignore"):  # of values that are not finite
                length = np.linalg.norm(np.cross(x[:, :3], x[:, 3:]), axis=1)
        elif self.rotation is not None and self.rotation.startswith("quaternion"):
            length = np.linalg.norm(x, axis=1)
        else:
            return good
        return good & (length > _NO_ROTATION)

    def to_rotation(self, x: np.ndarray) -> Rotation:
        """Returns the rotations of stored values (..., size), one behind the other.

        Raises:
            ValueError: some are not `usable`.
        """
        x = x.reshape(-1, self.size)
        if not (usable := self.usable(x)).all():
            raise ValueError(
                f"{self.name!r} has values that are no rotation ({self.rotation}): {x[~usable][0].tolist()}; "
                "expected finite numbers, of a quaternion not all 0, of 6-D two directions"
            )
        return ROTATIONS[self.rotation or ""][1](x * self._rotation_scale)

    def from_rotation(self, rotation: Rotation) -> np.ndarray:
        """Returns rotations as they are stored, (N, size)."""
        return ROTATIONS[self.rotation or ""][2](rotation) / self._rotation_scale

    def to_model(self, x: np.ndarray) -> np.ndarray:
        """(..., size) in robot space -> (..., model_size) in model space."""
        if self.gripper is not None:
            return (x - self.gripper.closed) / (self.gripper.open - self.gripper.closed)
        if self.rotation is not None and (self.model_rotation or self.rotation) != self.rotation:
            rotation = self.to_rotation(x)
            return ROTATIONS[self.model_rotation or ""][2](rotation).reshape(*x.shape[:-1], self.model_size)
        return x * UNITS[self.unit][1]

    def to_robot(self, x: np.ndarray) -> np.ndarray:
        """Inverse of `to_model`: (..., model_size) -> (..., size)."""
        if self.gripper is not None:
            return x * (self.gripper.open - self.gripper.closed) + self.gripper.closed
        if self.rotation is not None and (self.model_rotation or self.rotation) != self.rotation:
            rotation = ROTATIONS[self.model_rotation or ""][1](x.reshape(-1, self.model_size))
            return self.from_rotation(rotation).reshape(*x.shape[:-1], self.size)
        return x / UNITS[self.unit][1]


def _numbered(name: str, size: int) -> list[str]:
    return [f"{name}_{i}" for i in range(size)]


@dataclasses.dataclass(frozen=True)
class ActionField(StateField):
    """A run of numbers in the action; see `StateField`.

    command: "absolute" (a target), "delta" (a change per control step) or "velocity" (a rate that is held for a control
        step), as the controller takes it.
    relative_to: name of a state field. The model then predicts an absolute command relative to that state at the first
        step of the chunk: by subtraction, or by composition `state^-1 * action` for rotations. In a plan it is a
        velocity, and the model predicts how far each entry is from where that would lead by then.
    next_step: the dataset has no such command; it is derived from a recorded state, which `key` and `start` point to.
        "value": the target is what the state is one RLDS step later. "change": the command is how the state changes to
        the next step; for rotations the turn about axes of the base that leads there, `next * now^-1`. On Bridge, which
        has both, that agrees better with what was commanded than a difference of angles does, and it never jumps.
        The last step of an episode has no such command, so no chunk reaches it.
    """

    command: str = "absolute"
    relative_to: str | None = None
    next_step: str | None = None

    def _command_problems(self) -> list[str]:
        problems = []
        if self.command not in ("absolute", "delta", "velocity"):
            problems.append(f"command {self.command!r}, expected 'absolute', 'delta' or 'velocity'")
        elif self.command != "absolute" and self.relative_to is not None:
            problems.append(f"a {self.command} command cannot be made relative to a state again")
        commands = {None: self.command, "value": "absolute", "change": "delta"}
        if self.next_step not in commands:
            problems.append(f"next_step {self.next_step!r}, expected None, 'value' or 'change'")
        elif self.command != commands[self.next_step]:
            problems.append(
                f"next_step {self.next_step!r} gives a command of kind {commands[self.next_step]!r}, "
                f"not {self.command!r}"
            )
        if self.gripper is not None and self.command != "absolute":
            problems.append(f"a gripper command of kind {self.command!r}; triggers are a gripper convention")
        if self.gripper is not None and self.gripper.convention != "absolute" and self.next_step is not None:
            problems.append(f"gripper convention {self.gripper.convention!r} and next_step exclude each other")
        if self.gripper is not None and self.gripper.convention != "absolute" and self.size != 1:
            problems.append(
                f"gripper convention {self.gripper.convention!r} and size {self.size}, expected a size of 1"
            )
        return problems

    def change(
        self, now: Float[np.ndarray, "*batch size"], later: Float[np.ndarray, "*batch size"]
    ) -> Float[np.ndarray, "*batch size"]:
        """Returns the command that leads from one recorded state to another, in robot space, see `next_step`."""
        if self.rotation is None:
            return later - now
        turn = self.to_rotation(later) * self.to_rotation(now).inv()
        return self.from_rotation(turn).reshape(now.shape)

    def combine(self, commands: Float[np.ndarray, "*batch K size"]) -> Float[np.ndarray, "*batch size"]:
        """Returns the one command, in robot space, that does what K commands do one after the other, see `stride`.

        That is the last target, the sum of changes (turns are about axes of the base), or the mean rate.
        """
        if self.command == "absolute" or commands.shape[-2] == 1:
            return commands[..., -1, :]
        if self.command == "velocity":
            return commands.mean(axis=-2)
        if self.rotation is None:
            return commands.sum(axis=-2)
        total = self.to_rotation(commands[..., 0, :])
        for k in range(1, commands.shape[-2]):
            total = self.to_rotation(commands[..., k, :]) * total
        return self.from_rotation(total).reshape(*commands.shape[:-2], self.size)


@dataclasses.dataclass(frozen=True)
class Robot:
    """One embodiment.

    name: identity, stored in checkpoints and checked when serving.
    cameras, state, action: in the order in which they are concatenated. The state may be empty, where a dataset has
        none.
    control_hz: rate at which actions are executed, in Hz.
    action_horizon: A, steps in a predicted chunk. execute_steps: how many of them are executed before asking again.
    normalization: "zscore" or "quantile".
    language_key: path of the instruction in an RLDS step, or None with a fixed `default_prompt`.
    stride: RLDS steps per control step, where the dataset was recorded faster than `control_hz`. An entry of a chunk
        does what so many stored commands do together, see `ActionField.combine`.
    language_alternatives: paths of further instructions that say the same; any of all of them may be empty.
    plan: where a chunk is a plan, see `Plan`; None where it is the actions of the steps to come.
    entities: what is known of the things around it, see `Entities`.

    Raises:
        ValueError: lists everything that is inconsistent.
    """

    name: str
    cameras: tuple[Camera, ...]
    state: tuple[StateField, ...]
    action: tuple[ActionField, ...]
    control_hz: float
    action_horizon: int
    execute_steps: int
    normalization: str = "zscore"
    language_key: str | None = "language_instruction"
    default_prompt: str | None = None
    stride: int = 1
    language_alternatives: tuple[str, ...] = ()
    plan: Plan | None = None
    entities: tuple[Entities, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        for what, items in (
            ("camera", self.cameras),
            ("state field", self.state),
            ("action field", self.action),
            ("entity slot", self.entities),
        ):
            names = [item.name for item in items]
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                problems.append(f"{what} names {twice} are used twice")
            if not items and what in ("camera", "action field"):
                problems.append(f"no {what}, expected at least one")
        for what, fields in (("state", self.state), ("action", self.action)):
            dims = [n for f in fields for n in f.names]
            if twice := sorted({n for n in dims if dims.count(n) > 1}):
                problems.append(f"{what} dims {twice} are named twice")
        states = {f.name: f for f in self.state}
        for field in self.action:
            if field.relative_to is None:
                continue
            if field.relative_to not in states:
                near = near_names(field.relative_to, list(states))
                problems.append(f"action {field.name!r} is relative to {field.relative_to!r}, no such state; {near}")
            elif states[field.relative_to].size != field.size or states[field.relative_to].rotation != field.rotation:
                problems.append(f"action {field.name!r} and state {field.relative_to!r} differ in size or rotation")
        if not 1 <= self.execute_steps <= self.action_horizon:
            problems.append(f"execute_steps {self.execute_steps}, expected 1 .. action_horizon {self.action_horizon}")
        if self.control_hz <= 0:
            problems.append(f"control_hz {self.control_hz}, expected > 0")
        if self.normalization not in ("zscore", "quantile"):
            problems.append(f"normalization {self.normalization!r}, expected 'zscore' or 'quantile'")
        if self.language_key is None and self.default_prompt is None:
            problems.append("language_key and default_prompt are both None, expected one of them")
        if self.stride < 1:
            problems.append(f"stride {self.stride}, expected at least 1")
        problems += self._plan_problems()
        texts = [t for t in (self.language_key, *self.language_alternatives) if t is not None]
        if self.language_alternatives and self.language_key is None:
            problems.append("language_alternatives without language_key, expected the first of them there")
        elif len(set(texts)) != len(texts):
            problems.append(f"language_key and language_alternatives name a text twice: {texts}")
        if problems:
            raise ValueError(f"Robot {self.name!r}: " + "; ".join(problems))

    def _plan_problems(self) -> list[str]:
        if self.plan is None:
            return []
        problems = [
            f"plan with {name} {value}, expected 1: it is seen from its own step, and made anew at each"
            for name, value in (("execute_steps", self.execute_steps), ("stride", self.stride))
            if value != 1
        ]
        states = {f.name: f for f in self.state}
        for field in self.action:
            derived = field.gripper is not None and field.gripper.convention != "absolute"
            if field.next_step is not None or derived:
                problems.append(f"action {field.name!r} of a plan is derived from other steps, expected it as stored")
            state = states.get(field.relative_to or "")
            if state is not None and (state.rotation is not None or state.model_unit != f"{field.model_unit}/s"):
                problems.append(
                    f"action {field.name!r} of a plan [{field.model_unit}] is relative to {state.name!r} "
                    f"[{state.model_unit}], expected a velocity [{field.model_unit}/s]"
                )
        return problems

    def _seconds(self, steps: int) -> float | Float[np.ndarray, "A 1"]:
        """What the state is multiplied by that entries are relative to: in a plan, their times; else nothing."""
        return 1.0 if self.plan is None else np.arange(1, steps + 1)[:, None] / self.control_hz

    @functools.cached_property
    def robot_state_size(self) -> int:
        """Values of the state in robot space."""
        return sum(f.size for f in self.state)

    @functools.cached_property
    def robot_action_size(self) -> int:
        """Values of one action in robot space."""
        return sum(f.size for f in self.action)

    @functools.cached_property
    def state_size(self) -> int:
        """Values of the state in model space."""
        return sum(f.model_size for f in self.state)

    @functools.cached_property
    def action_size(self) -> int:
        """Values of one action in model space."""
        return sum(f.model_size for f in self.action)

    @property
    def action_names(self) -> tuple[str, ...]:
        """One name per action dim in model space, e.g. "hand_0 [m]"."""
        return tuple(n for f in self.action for n in f.model_dim_names)

    @property
    def robot_action_names(self) -> tuple[str, ...]:
        """One name per action dim in robot space, e.g. "hand_0 [mm]"."""
        return tuple(n for f in self.action for n in f.dim_names)

    @functools.cached_property
    def statistics_names(self) -> tuple[str, ...]:
        """What actions are normalised by, a name for each number: their dims; of a plan, those of each entry."""
        if self.plan is None or self.plan.scale != "per_step":
            return self.action_names
        return tuple(f"{name} @{step}" for step in range(1, self.action_horizon + 1) for name in self.action_names)

    def statistics_rows(
        self, chunks: Float[np.ndarray, "B A J"], mask: Bool[np.ndarray, "B A"]
    ) -> Float[np.ndarray, "N Jn"]:
        """Returns what statistics are counted of, in model space: single actions, or plans that are known as a whole.

        Jn: as many as `statistics_names`.
        """
        if self.plan is None or self.plan.scale != "per_step":
            return chunks[mask]
        return chunks[mask.all(axis=1)].reshape(-1, len(self.statistics_names))

    def executed(self, action: Float[np.ndarray, "*A J"]) -> Float[np.ndarray, "J"]:
        """Returns what is executed of what an expert says: an action itself, of a plan (A, J) the first."""
        return action if self.plan is None else action[0]

    @property
    def state_names(self) -> tuple[str, ...]:
        """One name per state dim in model space."""
        return tuple(n for f in self.state for n in f.model_dim_names)

    @functools.cached_property
    def action_limits(self) -> Limits:
        """Limits of one action, a number per dim, in robot space."""
        return joined([(f.limits, f.size) for f in self.action])

    @functools.cached_property
    def state_limits(self) -> Limits:
        """Limits of the state, a number per dim, in robot space."""
        return joined([(f.limits, f.size) for f in self.state])

    def limit_problems(self, actions: Float[np.ndarray, "*batch T Js"], hz: float | None = None) -> list[str]:
        """Returns a line for each action dim and limit that consecutive actions, in robot space, go beyond.

        hz: their rate, `control_hz` where None. The numbers behind the lines are those of `action_excess`.
        """
        return excess_problems(self.action_excess(actions, hz), self.action_limits, self.robot_action_names)

    def action_excess(
        self, actions: Float[np.ndarray, "*batch T Js"], hz: float | None = None
    ) -> dict[str, Float[np.ndarray, "*batch T Js"]]:
        """Returns how far actions go beyond each kind of limit, see `Limits.excess`; hz as in `limit_problems`."""
        _check_size("actions", actions, self.robot_action_size, self)
        parts = [
            (f.limits or Limits()).excess(x, hz or self.control_hz, f.command)
            for f, x in zip(self.action, _split(actions, self.action), strict=True)
        ]
        return {kind: np.concatenate([part[kind] for part in parts], axis=-1) for kind in parts[0]}

    def encode_state(self, state: Float[np.ndarray, "*batch Ds"]) -> Float[np.ndarray, "*batch De"]:
        """Robot space -> model space. (..., robot_state_size) -> (..., state_size), float32."""
        _check_size("state", state, self.robot_state_size, self)
        parts = [f.to_model(x) for f, x in zip(self.state, _split(state, self.state), strict=True)]
        if not parts:
            return np.asarray(state, np.float32)
        return np.concatenate(parts, axis=-1).astype(np.float32)

    def encode_actions(
        self, actions: Float[np.ndarray, "*batch A Js"], state: Float[np.ndarray, "*batch Ds"]
    ) -> Float[np.ndarray, "*batch A J"]:
        """Robot space -> model space. `state` is that of the chunk's first step, in robot space. Float32."""
        _check_size("actions", actions, self.robot_action_size, self)
        _check_size("state", state, self.robot_state_size, self)
        states = {f.name: (f, x) for f, x in zip(self.state, _split(state, self.state), strict=True)}
        parts = []
        for field, x in zip(self.action, _split(actions, self.action), strict=True):
            if field.relative_to is None:
                parts.append(field.to_model(x))
                continue
            reference, s = states[field.relative_to]
            s = np.broadcast_to(s[..., None, :], x.shape)
            if field.rotation is None:
                parts.append(field.to_model(x) - self._seconds(x.shape[-2]) * reference.to_model(s))
            else:
                relative = reference.to_rotation(s).inv() * field.to_rotation(x)
                to_array = ROTATIONS[field.model_rotation or field.rotation][2]
                parts.append(to_array(relative).reshape(*x.shape[:-1], field.model_size))
        return np.concatenate(parts, axis=-1).astype(np.float32)

    def decode_actions(
        self, actions: Float[np.ndarray, "*batch A J"], state: Float[np.ndarray, "*batch Ds"]
    ) -> Float[np.ndarray, "*batch A Js"]:
        """Inverse of `encode_actions`: model space -> robot space. `state` is in robot space. Float32."""
        _check_size("actions", actions, self.action_size, self)
        _check_size("state", state, self.robot_state_size, self)
        states = {f.name: (f, x) for f, x in zip(self.state, _split(state, self.state), strict=True)}
        parts, start = [], 0
        for field in self.action:
            x = np.asarray(actions, np.float64)[..., start : start + field.model_size]
            start += field.model_size
            if field.relative_to is None:
                parts.append(field.to_robot(x))
                continue
            reference, s = states[field.relative_to]
            s = np.broadcast_to(s[..., None, :], (*x.shape[:-1], reference.size))
            if field.rotation is None:
                parts.append(field.to_robot(x + self._seconds(x.shape[-2]) * reference.to_model(s)))
            else:
                from_array = ROTATIONS[field.model_rotation or field.rotation][1]
                target = reference.to_rotation(s) * from_array(x.reshape(-1, field.model_size))
                parts.append(field.from_rotation(target).reshape(*x.shape[:-1], field.size))
        return np.concatenate(parts, axis=-1).astype(np.float32)


def _check_size(what: str, x: np.ndarray, size: int, robot: Robot) -> None:
    if x.shape[-1:] != (size,):
        fields = ", ".join(f"{f.name}:{f.size}" for f in (robot.state if what == "state" else robot.action))
        raise ValueError(f"{what} of robot {robot.name!r}: got shape {x.shape}, expected last axis {size} ({fields})")


def _split(x: np.ndarray, fields: tuple[StateField, ...]) -> list[np.ndarray]:
    x = np.asarray(x, np.float64)
    ends = itertools.accumulate(f.size for f in fields)
    return [x[..., end - f.size : end] for f, end in zip(fields, ends, strict=True)]
