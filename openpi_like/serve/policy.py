"""A checkpoint as a policy: an observation from the wire in, actions in the robot's own units out."""

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from openpi_like.batch import Observation
from openpi_like.config import near_names
from openpi_like.data.images import fit
from openpi_like.models.attention import Sizes, computed_by, sizes_in
from openpi_like.models.quantize import QUANTIZED
from openpi_like.models.sampling import for_sampling
from openpi_like.robots import Robot
from openpi_like.serve.protocol import PROTOCOL
from openpi_like.train.checkpoints.checkpoint import Step
from openpi_like.train.checkpoints.load import PolicyParts, load_policy_parts
from openpi_like.train.fastest import fastest_attention
from openpi_like.train.sharding import MeshConfig


class ObservationError(ValueError):
    """An observation does not fit the robot; the text says everything that is wrong with it."""


class Policy:
    """Answers observations of one or more robots; each robot is checked, normalised and unnormalised on its own."""

    def __init__(
        self,
        parts: PolicyParts,
        *,
        robot: str | None = None,
        seed: int = 0,
        temperature: float | None = None,
        quantize: str | None = None,
    ) -> None:
        """
        Args:
            parts: of a checkpoint, see `load_policy_parts`.
            robot: serve this one only; None serves all robots of the checkpoint.
            seed: of the sampling noise.
            temperature: of the tokens that pi0-FAST writes; None takes the likeliest ones.
            quantize: hold linear maps in fewer bits, see `openpi_like.models.quantize.QUANTIZED`.

        Raises:
            ValueError: the checkpoint was not trained for `robot`; a temperature for a policy that writes no tokens; or
                no such `quantize`.
        """
        robots = {r.name: r for r in parts.robots}
        if robot is not None and robot not in robots:
            raise ValueError(
                f"the checkpoint was trained for {', '.join(robots)}, not for robot {robot!r}; "
                f"{near_names(robot, list(robots))}"
            )
        self.robots = robots if robot is None else {robot: robots[robot]}
        if temperature is not None and not (parts.sampling_options and temperature >= 0):
            raise ValueError(
                f"temperature={temperature}, expected a number of at least 0 for a policy that writes action tokens, "
                f"and none for others; this one is a {type(parts.model).__name__}"
            )
        drawn = {} if temperature is None else {"temperature": temperature}
        # Once, instead of in every request; the weights this replaces are not kept.
        self._parts = dataclasses.replace(parts, model=for_sampling(parts.model, quantize=quantize))
        self._seed, self._requests, self._config = seed, 0, parts.model.config
        graph, state = nnx.split(self._parts.model)
        # A plain list: jax looks at every array in every request.
        self._weights, structure = jax.tree.flatten(state)

        # Tables for decoding are arguments, not constants of the compiled function, which they would only slow down.
        self._options = jax.device_put(parts.sampling_options)

        def sample(
            weights: Any, key: jax.Array, observation: Observation, mask: jax.Array, options: dict[str, Any]
        ) -> jax.Array:
            with computed_by(self._attention):
                model = nnx.merge(graph, jax.tree.unflatten(structure, weights))
                return model.sample_actions(key, observation, action_mask=mask, **options, **drawn)

        self._attention: Mapping[Sizes, str] | str = "einsum"
        self._compute, self._sample = sample, jax.jit(sample)

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        step: Step = None,
        robot: str | None = None,
        seed: int = 0,
        dtype: str | None = None,
        temperature: float | None = None,
    ) -> "Policy":
        """Loads a checkpoint directory; see `load_policy_parts` and `Policy`.

        dtype: of the weights in memory, None as stored; for one of `QUANTIZED` they are read in bfloat16 first.
        """
        quantize = dtype if dtype in QUANTIZED else None
        parts = load_policy_parts(checkpoint, step, dtype="bfloat16" if quantize else dtype)
        return cls(parts, robot=robot, seed=seed, temperature=temperature, quantize=quantize)

    def metadata(self) -> dict[str, Any]:
        """Returns the handshake: what a robot needs to know, and can check itself against."""

        def fields(of: tuple[Any, ...]) -> list[list[Any]]:
            return [[f.name, f.size, f.unit] for f in of]

        robots = {
            r.name: {
                "cameras": {c.name: None if c.height is None else [c.height, c.width] for c in self._cameras(r)},
                "state": fields(r.state),
                "action": fields(r.action),
                "control_hz": r.control_hz,
                "action_horizon": r.action_horizon,
                "execute_steps": r.execute_steps,
                "renderer": self._parts.renderer[r.name],
            }
            for r in self.robots.values()
        }
        package = importlib.metadata.version("openpi-like")
        contract = {"contract": self._parts.contract_hash, "step": self._parts.step}
        return {"protocol": PROTOCOL, "package": package, **contract, "robots": robots}

    def _cameras(self, robot: Robot) -> list[Any]:
        """The robot's cameras that the policy sees; others were left out of training with drop_cameras."""
        return [c for c in robot.cameras if c.name in self._config.cameras]

    def warm_up(self, say: Callable[[str], None] = lambda line: None) -> None:
        """Compiles, by sampling once for every robot from the middle of its training data; before the first request.

        What computes attention fastest is measured before; say: is called with the choices.
        """
        calls = []
        for robot in self.robots.values():
            images = {c.name: np.zeros((c.height or 64, c.width or 64, 3), np.uint8) for c in self._cameras(robot)}
            state = np.zeros(robot.state_size, np.float32)
            calls.append(self._call(robot, images, state, self._tokens("", state), jax.random.key(0)))
        # All robots are one size to the network.
        sizes, mesh = sizes_in(self._compute, *calls[0]), MeshConfig().create(jax.local_devices()[:1])
        choices = fastest_attention(sizes, mesh, gradient=False)
        self._attention = {choice.sizes: choice.name for choice in choices}
        for choice in choices:
            say(str(choice))
        for call in calls:
            jax.block_until_ready(self._sample(*call))

    def infer(self, observation: Any) -> dict[str, Any]:
        """Returns {"actions": float32 (A, J) in robot space, "timing_ms": {"infer": ms}}; A is the robot's horizon.

        observation: see `openpi_like.serve.protocol`. Without "seed", each request draws other noise.

        Raises:
            ObservationError: everything that is wrong with the observation; the policy stays usable.
            FloatingPointError: the network produced NaN or infinity, which is never sent.
        """
        started = time.perf_counter()
        robot = self._robot(observation)
        problems = self._problems(robot, observation)
        if problems:
            raise ObservationError(f"observation does not fit robot {robot.name!r}:\n  " + "\n  ".join(problems))
        seed = observation.get("seed")
        key = jax.random.key(self._seed if seed is None else int(seed))
        if seed is None:
            key = jax.random.fold_in(key, self._requests)
            self._requests += 1
        prompt = observation.get("prompt", robot.default_prompt)
        state, normalization = np.asarray(observation["state"], np.float32), self._parts.normalizations[robot.name]
        encoded = normalization.apply_state(robot.encode_state(state))
        try:
            tokens = self._tokens(prompt, encoded)
        except ValueError as e:
            raise ObservationError(f"prompt: {e}") from e
        padded = np.asarray(self._sample(*self._call(robot, observation["images"], encoded, tokens, key)))[0]
        sampled = padded[: robot.action_horizon, : robot.action_size]
        actions = robot.decode_actions(normalization.invert_actions(sampled), state)
        if not np.isfinite(actions).all():
            raise FloatingPointError(f"the policy produced actions that are not finite for robot {robot.name!r}")
        return {"actions": actions, "timing_ms": {"infer": 1e3 * (time.perf_counter() - started)}}

    def _robot(self, observation: Any) -> Robot:
        if not isinstance(observation, dict):
            raise ObservationError(f"got a {type(observation).__name__}, expected a dict with images, state and prompt")
        name = observation.get("robot")
        if name is None and len(self.robots) == 1:
            return next(iter(self.robots.values()))
        known = list(self.robots)
        if name is None:
            raise ObservationError(f"robot: missing, and this server has several; add one of {', '.join(known)}")
        if name not in self.robots:
            raise ObservationError(
                f"robot: got {name!r}, this checkpoint has not seen it; {near_names(str(name), known)}"
            )
        return self.robots[name]

    def _problems(self, robot: Robot, observation: dict[str, Any]) -> list[str]:
        """Returns everything that is wrong with an observation."""
        known = ("images", "state", "prompt", "robot", "seed")
        problems = [
            f"{k}: not part of an observation; {near_names(str(k), known)}" for k in observation if k not in known
        ]
        images, cameras = observation.get("images"), {c.name: c for c in self._cameras(robot)}
        if not isinstance(images, dict):
            problems.append(f"images: got {type(images).__name__}, expected a dict with cameras {', '.join(cameras)}")
            images = None
        for name in images or {}:
            if name not in cameras:
                problems.append(
                    f"images[{name!r}]: the robot has no such camera; {near_names(str(name), list(cameras))}"
                )
        for name, camera in cameras.items() if images is not None else ():
            assert images is not None
            if name not in images:
                if camera.steps_back:
                    continue  # as at the start of an episode
                problems.append(f"images[{name!r}]: missing; got {', '.join(map(repr, images)) or 'no images'}")
                continue
            image, size = images[name], (camera.height or "any", camera.width or "any")
            if not isinstance(image, np.ndarray):
                problems.append(f"images[{name!r}]: got {type(image).__name__}, expected a uint8 array {(*size, 3)}")
                continue
            if image.dtype != np.uint8:
                problems.append(f"images[{name!r}]: got dtype {image.dtype}, expected uint8 in 0 .. 255, RGB")
            fits = image.ndim == 3 and image.shape[2] == 3 and min(image.shape) > 0
            if not fits or (camera.height is not None and image.shape[:2] != (camera.height, camera.width)):
                problems.append(f"images[{name!r}]: got shape {image.shape}, expected {(*size, 3)}")
        problems += self._state_problems(robot, observation.get("state"))
        prompt, seed = observation.get("prompt"), observation.get("seed")
        if prompt is None and robot.default_prompt is None:
            problems.append("prompt: missing, and the robot has no default; say what to do")
        elif prompt is not None and not (isinstance(prompt, str) and prompt.strip()):
            problems.append(f"prompt: got {prompt!r}, expected a text that is not empty")
        if seed is not None and not (isinstance(seed, int | np.integer) and 0 <= seed < 2**32):
            problems.append(f"seed: got {seed!r}, expected an integer in 0 .. 2^32 - 1")
        return problems

    @staticmethod
    def _state_problems(robot: Robot, state: Any) -> list[str]:
        size, names = robot.robot_state_size, ", ".join(f"{f.name}:{f.size} [{f.unit}]" for f in robot.state)
        if not isinstance(state, np.ndarray):
            return [f"state: got {type(state).__name__}, expected a float array ({size},): {names}"]
        problems = []
        if state.dtype.kind != "f":
            problems.append(f"state: got dtype {state.dtype}, expected float32")
        if state.shape != (size,):
            problems.append(f"state: got shape {state.shape}, expected ({size},): {names}")
        elif state.dtype.kind == "f" and not np.isfinite(state).all():
            problems.append(f"state: not finite at {np.flatnonzero(~np.isfinite(state)).tolist()} of ({names})")
        return problems

    def _tokens(self, prompt: str, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids and mask, (1, S), of an instruction and a normalised state (De,)."""
        return self._parts.tokenizer.batch([prompt], [state])

    def _call(
        self,
        robot: Robot,
        images: dict[str, np.ndarray],
        state: np.ndarray,
        tokens: tuple[np.ndarray, np.ndarray],
        key: jax.Array,
    ) -> tuple[Any, ...]:
        """Returns what is sampled from, for a normalised state (De,)."""
        c = self._config
        pixels = {name: np.zeros((1, *c.image_size, 3), np.uint8) for name in c.cameras}
        for camera in self._cameras(robot):
            if camera.name in images:
                fit(images[camera.name], pixels[camera.name][0], resize=c.resize, fit=camera.fit)
        padded = np.zeros((1, c.state_dim), np.float32)
        padded[0, : robot.state_size] = state
        inputs: Observation = {
            "images": pixels,
            "image_mask": {name: np.array([name in images]) for name in c.cameras},
            "state": padded,
            "state_mask": np.arange(c.state_dim)[None] < robot.state_size,
            "prompt": tokens[0],
            "prompt_mask": tokens[1],
        }
        mask = c.chunk_mask(robot.action_horizon, robot.action_size)
        return self._weights, key, inputs, mask[None], self._options
