"""A checkpoint as a policy: an observation from the wire in, actions in the robot's own units out."""

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
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
from openpi_like.serve.observation import ObservationError, check_observation, robot_of
from openpi_like.serve.protocol import PROTOCOL
from openpi_like.train.checkpoints.checkpoint import Step
from openpi_like.train.checkpoints.load import PolicyParts, load_policy_parts
from openpi_like.train.fastest import fastest_attention
from openpi_like.train.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class Request:
    """An observation that fits, as one row of a batch.

    state: raw, in the robot's own units. row: an `Observation` without its batch axis. mask: (A, J), the entries of the
    chunk that the robot has. words: uint32 (2,), seed and number of the request, which give its noise.
    """

    robot: Robot
    state: np.ndarray
    row: dict[str, Any]
    mask: np.ndarray
    words: np.ndarray


class Policy:
    """Answers observations of one or more robots; each robot is checked, normalised and unnormalised on its own.

    Of several requests one batch is made, filled up to the next of the sizes that were compiled. A request's noise, and
    so its answer, depends on its own seed and number; what else is in the batch changes at most how sums are rounded.
    """

    def __init__(
        self,
        parts: PolicyParts,
        *,
        robot: str | None = None,
        seed: int = 0,
        temperature: float | None = None,
        quantize: str | None = None,
        max_batch: int = 1,
    ) -> None:
        """
        Args:
            parts: of a checkpoint, see `load_policy_parts`.
            robot: serve this one only; None serves all robots of the checkpoint.
            seed: of the sampling noise.
            temperature: of the tokens that pi0-FAST writes; None takes the likeliest ones.
            quantize: hold linear maps in fewer bits, see `openpi_like.models.quantize.QUANTIZED`.
            max_batch: requests that are answered together at most.

        Raises:
            ValueError: the checkpoint was not trained for `robot`; a temperature for a policy that writes no tokens; no
                such `quantize`; or `max_batch` below 1.
        """
        robots = {r.name: r for r in parts.robots}
        if robot is not None and robot not in robots:
            raise ValueError(
                f"the checkpoint was trained for {', '.join(robots)}, not for robot {robot!r}; "
                f"{near_names(robot, list(robots))}"
            )
        self.robots = robots if robot is None else {robot: robots[robot]}
        seen = parts.model.config.cameras  # others were left out of training with drop_cameras
        self._cameras = {name: {c.name: c for c in r.cameras if c.name in seen} for name, r in self.robots.items()}
        if temperature is not None and not (parts.sampling_options and temperature >= 0):
            raise ValueError(
                f"temperature={temperature}, expected a number of at least 0 for a policy that writes action tokens, "
                f"and none for others; this one is a {type(parts.model).__name__}"
            )
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch}, expected at least 1")
        self.sizes = (*(2**i for i in range((max_batch - 1).bit_length())), max_batch)
        drawn = {} if temperature is None else {"temperature": temperature}
        # Once, instead of in every request; the weights this replaces are not kept.
        self._parts = dataclasses.replace(parts, model=for_sampling(parts.model, quantize=quantize))
        self.seed, self._requests, self._config = seed, 0, parts.model.config
        graph, state = nnx.split(self._parts.model)
        # A plain list: jax looks at every array in every request.
        self._weights, structure = jax.tree.flatten(state)

        # Tables for decoding are arguments, not constants of the compiled function, which they would only slow down.
        self._options = jax.device_put(parts.sampling_options)

        def sample(
            weights: Any, words_B2: jax.Array, observation: Observation, mask: jax.Array, options: dict[str, Any]
        ) -> jax.Array:
            keys = jax.vmap(lambda words: jax.random.fold_in(jax.random.key(words[0]), words[1]))(words_B2)
            with computed_by(self._attention):
                model = nnx.merge(graph, jax.tree.unflatten(structure, weights))
                return model.sample_actions(keys, observation, action_mask=mask, **options, **drawn)

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
        max_batch: int = 1,
    ) -> "Policy":
        """Loads a checkpoint directory; see `load_policy_parts` and `Policy`.

        dtype: of the weights in memory, None as stored; for one of `QUANTIZED` they are read in bfloat16 first.
        """
        quantize = dtype if dtype in QUANTIZED else None
        parts = load_policy_parts(checkpoint, step, dtype="bfloat16" if quantize else dtype)
        drawn = {"seed": seed, "temperature": temperature}
        return cls(parts, robot=robot, quantize=quantize, max_batch=max_batch, **drawn)

    def metadata(self) -> dict[str, Any]:
        """Returns the handshake: what a robot needs to know, and can check itself against."""

        def fields(of: tuple[Any, ...]) -> list[list[Any]]:
            return [[f.name, f.size, f.unit] for f in of]

        robots = {
            r.name: {
                "cameras": {
                    name: None if c.height is None else [c.height, c.width] for name, c in self._cameras[r.name].items()
                },
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

    def warm_up(self, say: Callable[[str], None] = lambda line: None) -> None:
        """Compiles, by sampling once in every batch size, before the first request.

        What computes attention fastest is measured before; say: is called with the choices.
        """
        middle = [self._in_the_middle(robot) for robot in self.robots.values()]
        calls = [self._batch((middle * size)[:size]) for size in self.sizes]
        mesh = MeshConfig().create(jax.local_devices()[:1])
        sizes = {found for call in calls for found in sizes_in(self._compute, *call)}
        choices = fastest_attention(sizes, mesh, gradient=False)
        self._attention = {choice.sizes: choice.name for choice in choices}
        for choice in choices:
            say(str(choice))
        for call in calls:
            jax.block_until_ready(self._sample(*call))

    def _in_the_middle(self, robot: Robot) -> Request:
        cameras = self._cameras[robot.name].values()
        pictures = {c.name: np.zeros((c.height or 64, c.width or 64, 3), np.uint8) for c in cameras}
        state = np.zeros(robot.state_size, np.float32)
        return self._request(robot, pictures, np.zeros(robot.robot_state_size), state, "", (0, 0))

    # ---- Requests ----------------------------------------------------------------------------------------------------

    def prepare(self, observation: Any, *, number: int = 0, seed: int | None = None) -> Request:
        """Checks an observation, and makes it a row of a batch. Threads may call it at the same time.

        observation: see `openpi_like.serve.protocol`. One with a "seed" has the noise of that, whatever its number.
        number, seed: of the request in its session, and of the session (None: that of the policy).

        Raises:
            ObservationError: everything that is wrong with the observation; the policy stays usable.
        """
        robot = robot_of(observation, self.robots)
        pictures = check_observation(observation, robot, self._cameras[robot.name])
        state = np.asarray(observation["state"], np.float32)
        encoded = self._parts.normalizations[robot.name].apply_state(robot.encode_state(state))
        own = observation.get("seed")
        words = (self.seed if seed is None else seed, 1 + number) if own is None else (int(own), 0)
        try:
            return self._request(
                robot, pictures, state, encoded, observation.get("prompt", robot.default_prompt), words
            )
        except ValueError as e:
            raise ObservationError(f"prompt: {e}") from e

    def _request(
        self,
        robot: Robot,
        pictures: dict[str, np.ndarray],
        state: np.ndarray,
        encoded: np.ndarray,
        prompt: str,
        words: tuple[int, int],
    ) -> Request:
        """encoded: the state, normalised (De,).

        Raises:
            ValueError: the prompt is too long.
        """
        c = self._config
        ids, prompt_mask = self._parts.tokenizer.encode(prompt, encoded)
        images = {name: np.zeros((*c.image_size, 3), np.uint8) for name in c.cameras}
        for name, camera in self._cameras[robot.name].items():
            if name in pictures:
                fit(pictures[name], images[name], resize=c.resize, fit=camera.fit)
        padded = np.zeros(c.state_dim, np.float32)
        padded[: robot.state_size] = encoded
        row = {
            "images": images,
            "image_mask": {name: np.bool_(name in pictures) for name in c.cameras},
            "state": padded,
            "state_mask": np.arange(c.state_dim) < robot.state_size,
            "prompt": ids,
            "prompt_mask": prompt_mask,
        }
        mask = c.chunk_mask(robot.action_horizon, robot.action_size)
        return Request(robot, state, row, mask, np.array(words, np.uint32))

    # ---- Answers -----------------------------------------------------------------------------------------------------

    def sample(self, requests: Sequence[Request]) -> list[np.ndarray | FloatingPointError]:
        """Returns actions, float32 (A, J) in robot space, for each request; A is its robot's horizon.

        Actions that are not finite are never sent: for such a request there is an error instead. One thread at a time.

        Raises:
            ValueError: more requests than `max_batch`, or none.
        """
        if not 1 <= len(requests) <= self.sizes[-1]:
            raise ValueError(f"got {len(requests)} requests, expected 1 to {self.sizes[-1]}")
        size = next(n for n in self.sizes if n >= len(requests))
        filled = [*requests, *[requests[-1]] * (size - len(requests))]
        sampled = np.asarray(self._sample(*self._batch(filled)))
        return [self._actions(request, row) for request, row in zip(requests, sampled, strict=False)]

    def infer(self, observation: Any) -> dict[str, Any]:
        """Returns {"actions": float32 (A, J) in robot space, "timing_ms": {"infer": ms}}, for one robot alone.

        observation: see `openpi_like.serve.protocol`. Without "seed", each request draws other noise.

        Raises:
            ObservationError: everything that is wrong with the observation; the policy stays usable.
            FloatingPointError: the network produced NaN or infinity, which is never sent.
        """
        started = time.perf_counter()
        (actions,) = self.sample([self.prepare(observation, number=self._requests)])
        self._requests += 1
        if isinstance(actions, FloatingPointError):
            raise actions
        return {"actions": actions, "timing_ms": {"infer": 1e3 * (time.perf_counter() - started)}}

    def _batch(self, requests: Sequence[Request]) -> tuple[Any, ...]:
        """Returns what is sampled from."""
        inputs = jax.tree.map(lambda *rows: np.stack(rows), *(r.row for r in requests))
        words, masks = (np.stack([getattr(r, name) for r in requests]) for name in ("words", "mask"))
        return self._weights, words, inputs, masks, self._options

    def _actions(self, request: Request, padded: np.ndarray) -> np.ndarray | FloatingPointError:
        """Returns a row of a sample in robot space."""
        robot = request.robot
        sampled = padded[: robot.action_horizon, : robot.action_size]
        normalization = self._parts.normalizations[robot.name]
        actions = robot.decode_actions(normalization.invert_actions(sampled), request.state)
        if not np.isfinite(actions).all():
            return FloatingPointError(f"the policy produced actions that are not finite for robot {robot.name!r}")
        return actions
