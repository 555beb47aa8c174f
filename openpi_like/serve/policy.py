"""A checkpoint as a policy: an observation from the wire in, actions in the robot's own units out."""

import dataclasses
import functools
import importlib.metadata
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from openpi_like.batch import EntityTokens, Observation
from openpi_like.config import near_names
from openpi_like.data.images import fit
from openpi_like.models.attention import Sizes, computed_by, sizes_in
from openpi_like.models.chunking import Previous, previous_row
from openpi_like.models.fingerprint import fingerprint
from openpi_like.models.sampling import for_sampling
from openpi_like.robots import Robot
from openpi_like.serve.batch_sizes import largest_that_pays, least_seconds
from openpi_like.serve.observation import ObservationError, check_entities, check_observation, check_previous, robot_of
from openpi_like.serve.options import PolicyOptions
from openpi_like.serve.protocol import PROTOCOL
from openpi_like.serve.ranges import RangeError, RobotRanges
from openpi_like.train.checkpoints.checkpoint import Step, find_step
from openpi_like.train.checkpoints.load import PolicyParts, load_policy_parts
from openpi_like.train.fastest import fastest_attention
from openpi_like.train.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class Thought:
    """What a policy wrote before it acted. ids: (T,). mask: (T,), which are there. text: as a person reads it.

    warnings: what is to be said of it.
    """

    ids: np.ndarray
    mask: np.ndarray
    text: str
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Request:
    """An observation that fits, as one row of a batch.

    state: raw, in the robot's own units. row: an `Observation` without its batch axis. mask: (A, J), the entries of the
    chunk that the robot has. words: uint32 (2,), seed and number of the request, which give its noise. previous: what
    is left of the chunk before, if it was sent. warnings: what is to be said of the observation.
    """

    robot: Robot
    state: np.ndarray
    row: dict[str, Any]
    mask: np.ndarray
    words: np.ndarray
    previous: Previous | None = None
    warnings: tuple[str, ...] = ()

    @property
    def pictures(self) -> dict[str, np.ndarray]:
        """The pictures that there are, as the policy sees them."""
        return {name: image for name, image in self.row["images"].items() if self.row["image_mask"][name]}

    @property
    def lane(self) -> Hashable:
        """Requests of different lanes are not answered together: they are computed in different ways."""
        return self.previous is not None, "thought" in self.row


@dataclasses.dataclass(frozen=True)
class Reply:
    """actions: float32 (A, Js) in robot space, A the robot's horizon. warnings: what is to be said of them.

    thought: what was written before them, of policies that write.
    """

    actions: np.ndarray
    warnings: tuple[str, ...] = ()
    thought: Thought | None = None


def _asked(robot: Robot, slots: Sequence[EntityTokens]) -> Robot:
    """Returns a robot without the things around it that a policy sees for itself. slots: those that it asks for."""
    names = {slot.name for slot in slots}
    asked = tuple(things for things in robot.entities if things.name in names)
    return robot if asked == robot.entities else dataclasses.replace(robot, entities=asked)


_WHOLE, _ROWS = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("rows")


class _Function:
    """What is compiled of a policy: from weights and a batch to actions. attention: what computes that, by sizes.

    The devices of a mesh share the rows of a batch, none needs to know of the others; fewer rows are left to one.
    """

    def __init__(self, graph: Any, structure: Any, drawn: dict[str, float], mesh: jax.sharding.Mesh) -> None:
        self._graph, self._structure, self._drawn = graph, structure, drawn
        self.attention: Mapping[Sizes, str] | str = "einsum"
        self._devices, self._compiled = mesh.size, jax.jit(self.__call__)
        self._split: Callable[..., Any] = self.__call__
        if mesh.size > 1:
            specs = (_WHOLE, _ROWS, _ROWS, _ROWS, _WHOLE, _ROWS)
            self._split = jax.shard_map(self.__call__, mesh=mesh, in_specs=specs, out_specs=_ROWS, check_vma=False)
        self._compiled_split = jax.jit(self._split)

    def written(self, rows: int) -> Callable[..., Any]:
        """Returns what is compiled for so many rows."""
        return self if rows < self._devices else self._split

    def compiled(self, rows: int) -> Callable[..., Any]:
        """Returns it, compiled."""
        return self._compiled if rows < self._devices else self._compiled_split

    def __call__(
        self,
        weights: Any,
        words_B2: jax.Array,
        observation: Observation,
        mask: jax.Array,
        tables: dict[str, Any],
        previous: dict[str, Previous],
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        keys = jax.vmap(lambda words: jax.random.fold_in(jax.random.key(words[0]), words[1]))(words_B2)
        with computed_by(self.attention):
            model = nnx.merge(self._graph, jax.tree.unflatten(self._structure, weights))
            thought: dict[str, jax.Array] = {}
            if model.config.thought_len:
                if "thought" not in observation:
                    ids, there = model.think(observation, **tables)
                    observation = {**observation, "thought": ids, "thought_mask": there}
                thought = {name: observation[name] for name in ("thought", "thought_mask")}
            drawn = {**self._drawn, **previous}
            return model.sample_actions(keys, observation, action_mask=mask, **tables, **drawn), thought


class Policy:
    """Answers observations of one or more robots; each robot is checked, normalised and unnormalised on its own.

    Of several requests one batch is made, filled up to the next of the sizes that were compiled. A request's noise, and
    so its answer, depends on its own seed and number; what else is in the batch changes at most how sums are rounded.
    """

    def __init__(self, parts: PolicyParts, options: PolicyOptions | None = None) -> None:
        """
        Args:
            parts: of a checkpoint, see `load_policy_parts`.

        Raises:
            ValueError: the checkpoint was not trained for the robot of the options, or writes no tokens and has a
                temperature, or knows no flow matching and is to go on from chunks; or there are not so many devices.
        """
        self.options = o = options or PolicyOptions()
        robots = {r.name: _asked(r, parts.model.config.entities_asked) for r in parts.robots}
        kind = type(parts.model).__name__
        if o.robot is not None and o.robot not in robots:
            raise ValueError(
                f"the checkpoint was trained for {', '.join(robots)}, not for robot {o.robot!r}; "
                f"{near_names(o.robot, list(robots))}"
            )
        if o.temperature is not None and "decoding" not in parts.sampling_options:
            raise ValueError(
                f"temperature={o.temperature}, expected a number for a policy that writes action tokens, and none for "
                f"others; this is a {kind}"
            )
        if o.real_time_chunking and not parts.model.config.takes_previous:
            raise ValueError(f"a {kind} cannot go on from a chunk, only policies of flow matching can")
        if o.think_every != 1 and not parts.model.config.thought_len:
            raise ValueError(f"think_every={o.think_every}, expected 1: a {kind} writes no text before it acts")
        if o.devices > jax.local_device_count():
            raise ValueError(f"devices={o.devices}, this machine has {jax.local_device_count()}")
        self.robots = robots if o.robot is None else {o.robot: robots[o.robot]}
        seen = parts.model.config.cameras  # others were left out of training with drop_cameras
        self._cameras = {name: {c.name: c for c in r.cameras if c.name in seen} for name, r in self.robots.items()}
        self.sizes, self.ranges, self.think_every = o.sizes, o.ranges, o.think_every
        self.most = self.sizes[-1]
        self._ranges = {name: RobotRanges(r, parts.normalizations[name], o.ranges) for name, r in self.robots.items()}
        # Once, instead of in every request; the weights this replaces are not kept.
        self._parts = dataclasses.replace(parts, model=for_sampling(parts.model, quantize=o.quantize))
        self._requests, self._config = 0, parts.model.config
        self._masks = {
            name: self._config.chunk_mask(r.action_horizon, r.action_size) for name, r in self.robots.items()
        }
        graph, state = nnx.split(self._parts.model)
        # A plain list: jax looks at every array in every request.
        weights, structure = jax.tree.flatten(state)
        # Tables for decoding are arguments, not constants of the compiled function, which they would only slow down.
        self._held = self._held_alone = weights, jax.device_put(parts.sampling_options)
        mesh = jax.sharding.Mesh(np.array(jax.local_devices()[: o.devices]), ("rows",))
        if o.devices > 1:
            self._held = jax.device_put(self._held, jax.sharding.NamedSharding(mesh, _WHOLE))
            self._held_alone = jax.tree.map(lambda x: x.addressable_shards[0].data, self._held)
        drawn = {} if o.temperature is None else {"temperature": o.temperature}
        self._function = _Function(graph, structure, drawn, mesh)
        named = jax.tree.leaves_with_path(nnx.to_pure_dict(state))
        self.fingerprint = fingerprint({jax.tree_util.keystr(path): weight for path, weight in named})

    @classmethod
    def load(cls, checkpoint: str | Path, options: PolicyOptions | None = None, *, step: Step = None) -> "Policy":
        """Loads a checkpoint directory; see `load_policy_parts` and `Policy`."""
        o = options or PolicyOptions()
        # What is held in fewer bits is read in bfloat16 first.
        return cls(load_policy_parts(checkpoint, step, dtype="bfloat16" if o.quantize else o.dtype), o)

    def is_step(self, checkpoint: str | Path, step: Step = None) -> bool:
        """Returns whether `renewed` would load what this is already.

        Raises:
            CheckpointError: there is no such step.
        """
        return find_step(checkpoint, step) == self._parts.source

    def renewed(self, checkpoint: str | Path, *, step: Step = None) -> "Policy":
        """Loads another step, or run, that is served in the same way; it is compiled anew only where that is needed.

        The new one is warm; this one goes on meanwhile, and both are in memory. Raises what `load` does.
        """
        other = Policy.load(checkpoint, self.options, step=step)
        same = other._parts.contract_hash == self._parts.contract_hash
        of = lambda policy: [(w.shape, w.dtype) for w in jax.tree.leaves(policy._held)]  # noqa: E731
        if same and of(other) == of(self):
            other._function = self._function
        else:
            other.warm_up()
        return other

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
                "limits": {
                    **dataclasses.asdict(r.action_limits),
                    "command": [f.command for f in r.action for _ in range(f.size)],
                },
                "control_hz": r.control_hz,
                "action_horizon": r.action_horizon,
                "execute_steps": r.execute_steps,
                "plans": r.plan is not None,
                "entities": {e.name: [e.count, e.size] for e in r.entities},
                "renderer": self._parts.renderer[r.name],
            }
            for r in self.robots.values()
        }
        package = importlib.metadata.version("openpi-like")
        chunking = {"real_time_chunking": self.max_delay is not None, "max_delay": self.max_delay or 0}
        contract: dict[str, Any] = {"contract": self._parts.contract_hash, "step": self._parts.step}
        contract["weights"] = self.fingerprint
        if self.thinks:
            contract["think_every"] = self.think_every
        return {"protocol": PROTOCOL, "package": package, **contract, **chunking, "robots": robots}

    def warm_up(self, say: Callable[[str], None] = lambda line: None) -> None:
        """Compiles, by sampling once in every batch size, before the first request, and measures how large ones pay.

        What computes attention fastest is measured before; say: is called with the choices.
        """
        middle = [self._in_the_middle(robot) for robot in self.robots.values()]
        if self.options.real_time_chunking:
            middle = [*middle, *(dataclasses.replace(r, previous=self._previous(r, r.mask[:1], 0)) for r in middle)]
        if T := self._config.thought_len:
            nothing = {"thought": np.zeros(T, np.int32), "thought_mask": np.zeros(T, bool)}
            middle = [*middle, *(dataclasses.replace(r, row=r.row | nothing) for r in middle)]
        lanes = {r.lane: [other for other in middle if other.lane == r.lane] for r in middle}
        calls = [(size, self._batch((lane * size)[:size])) for lane in lanes.values() for size in self.sizes]
        mesh = MeshConfig().create(jax.local_devices()[:1])
        sizes = {found for n, call in calls for found in sizes_in(self._function.written(n), *call)}
        choices = fastest_attention(sizes, mesh, gradient=False)
        self._function.attention = {choice.sizes: choice.name for choice in choices}
        for choice in choices:
            say(str(choice))
        runs = [functools.partial(self._run, n, call) for n, call in calls]
        for run in runs:
            run()
        seconds = {n: least_seconds(run) for n, run in zip(self.sizes, runs, strict=False)}
        self.most = largest_that_pays(seconds)
        if self.most < self.sizes[-1]:
            told = " and ".join(f"{n} take {1e3 * seconds[n]:.1f} ms" for n in (self.most, self.sizes[-1]))
            say(f"batches of at most {self.most}: {told}")

    def _run(self, size: int, call: Sequence[Any]) -> None:
        jax.block_until_ready(self._function.compiled(size)(*call))

    def _in_the_middle(self, robot: Robot) -> Request:
        cameras = self._cameras[robot.name].values()
        pictures = {c.name: np.zeros((c.height or 64, c.width or 64, 3), np.uint8) for c in cameras}
        state = np.zeros(robot.state_size, np.float32)
        return self._request(robot, pictures, np.zeros(robot.robot_state_size), state, "", (0, 0))

    # ---- Requests ----------------------------------------------------------------------------------------------------

    def prepare(
        self, observation: Any, *, number: int = 0, seed: int | None = None, thought: Thought | None = None
    ) -> Request:
        """Checks an observation, and makes it a row of a batch. Threads may call it at the same time.

        observation: see `openpi_like.serve.protocol`. One with a "seed" has the noise of that, whatever its number.
        number, seed: of the request in its session, and of the session (None: that of the policy).
        thought: what was written before an earlier chunk, to act by it once more.

        Raises:
            ObservationError: everything that is wrong with the observation; the policy stays usable.
            RangeError: the state is too far from those of training.
        """
        robot = robot_of(observation, self.robots)
        pictures = check_observation(observation, robot, self._cameras[robot.name])
        state = np.asarray(observation["state"], np.float32)
        normalization, unscaled = self._parts.normalizations[robot.name], robot.encode_state(state)
        warnings = self._ranges[robot.name].check_state(unscaled)
        encoded = normalization.apply_state(unscaled)
        prompt = observation.get("prompt") or robot.default_prompt or ""  # `check_observation` wants one of them
        before, entities = check_previous(observation, robot, self.max_delay), check_entities(observation, robot)
        own = observation.get("seed")
        words = (self.options.seed if seed is None else seed, 1 + number) if own is None else (int(own), 0)
        try:
            request = self._request(robot, pictures, state, encoded, prompt, words, tuple(warnings), entities)
        except ValueError as e:
            raise ObservationError(f"prompt: {e}") from e
        if thought is not None:
            request.row.update(thought=thought.ids, thought_mask=thought.mask)
        if before is None:
            return request
        old = normalization.apply_actions(robot.encode_actions(before[0], state))
        return dataclasses.replace(request, previous=self._previous(request, old, before[1]))

    @property
    def thinks(self) -> bool:
        """Whether it writes text before it acts."""
        return self._config.thought_len > 0

    @functools.cached_property
    def no_thought(self) -> Thought:
        """What is acted by where nothing is to be written: what it was trained on at steps without a text."""
        T, text = self._config.thought_len, self._parts.tokenizer
        # Before action tokens nothing stands then; other policies have learned to end a text that they did not begin.
        said = [] if self._config.action_tokens is not None else text.prompt_format.thought(text.tokenizer, "")
        ids = np.array([*said, *[0] * (T - len(said))], np.int32)
        return Thought(ids, np.arange(T) < len(said), "")

    @property
    def max_delay(self) -> int | None:
        """Delay that the policy was trained for; 0 where it is guided instead, None where it takes no chunk before."""
        return self._config.max_delay if self.options.real_time_chunking else None

    def _previous(self, request: Request, old: np.ndarray, delay: int) -> Previous:
        return previous_row(np.asarray(old, np.float32), delay, request.mask.shape, self.options.guidance)

    def _request(
        self,
        robot: Robot,
        pictures: dict[str, np.ndarray],
        state: np.ndarray,
        encoded: np.ndarray,
        prompt: str,
        words: tuple[int, int],
        warnings: tuple[str, ...] = (),
        entities: Mapping[str, np.ndarray] = {},
    ) -> Request:
        """encoded: the state, normalised (De,). entities: of slots that have any.

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
        row: dict[str, Any] = {
            "images": images,
            "image_mask": {name: np.bool_(name in pictures) for name in c.cameras},
            "state": padded,
            "state_mask": np.arange(c.state_dim) < robot.state_size,
            "prompt": ids,
            "prompt_mask": prompt_mask,
        }
        if asked := c.entities_asked:
            row["entities"] = {e.name: np.zeros((e.count, e.size), np.float32) for e in asked}
            row["entity_mask"] = {e.name: np.arange(e.count) < len(entities.get(e.name, ())) for e in asked}
            for name, values in entities.items():
                row["entities"][name][: len(values)] = values
        if c.robots:
            row["robot"] = np.int32(c.robots.index(robot.name))
        mask = self._masks[robot.name]
        return Request(robot, state, row, mask, np.array(words, np.uint32), warnings=warnings)

    # ---- Answers -----------------------------------------------------------------------------------------------------

    def sample(self, requests: Sequence[Request]) -> list[Reply | FloatingPointError | RangeError]:
        """Returns a reply to each request, or an error: actions that are not finite are never sent, nor are those that
        are refused. One thread at a time.

        Raises:
            ValueError: more requests than `max_batch`, none, or of different lanes.
        """
        if not 1 <= len(requests) <= self.sizes[-1]:
            raise ValueError(f"got {len(requests)} requests, expected 1 to {self.sizes[-1]}")
        if len({r.lane for r in requests}) > 1:
            raise ValueError(
                "some requests have a chunk before, or a thought, and others have not; sample them one after the other"
            )
        size = next(n for n in self.sizes if n >= len(requests))
        filled = [*requests, *[requests[-1]] * (size - len(requests))]
        made, written = self._function.compiled(size)(*self._batch(filled))
        sampled, thoughts = np.asarray(made), self._thoughts(written, len(requests))
        rows: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            rows.setdefault(request.robot.name, []).append(i)
        replies = {
            i: reply
            for name, of in rows.items()
            for i, reply in zip(of, self._replies(name, [requests[i] for i in of], sampled[of]), strict=True)
        }
        for i, thought in enumerate(thoughts):
            reply = replies[i]
            if isinstance(reply, Reply):
                warnings = (*reply.warnings, *thought.warnings)
                replies[i] = dataclasses.replace(reply, thought=thought, warnings=warnings)
        return [replies[i] for i in range(len(requests))]

    def _thoughts(self, written: dict[str, Any], rows: int) -> list[Thought]:
        if not written:
            return []
        ids, mask = (np.asarray(written[name])[:rows] for name in ("thought", "thought_mask"))
        return [Thought(i, m, self._text(i[m]), self._cut(i, m)) for i, m in zip(ids, mask, strict=True)]

    def _cut(self, ids: np.ndarray, mask: np.ndarray) -> tuple[str, ...]:
        """Returns a line where there was no room for the end of a thought."""
        if not mask.all() or ids[-1] == self._parts.tokenizer.tokenizer.eos_id:
            return ()
        return (
            f"thought: cut at thought_len={len(ids)} tokens, before its end; train it with shorter ones or with more",
        )

    def _text(self, ids: np.ndarray) -> str:
        tokenizer = self._parts.tokenizer
        known = ids[ids < tokenizer.vocab_size]
        written, without = tokenizer.decode(known.tolist()).strip(), len(ids) - len(known)
        text = tokenizer.prompt_format.thought_said(written)
        if not without:
            return text
        return f"{text} ({without} id{'s' * (without > 1)} without text)".strip()

    def infer(self, observation: Any) -> dict[str, Any]:
        """Returns {"actions": float32 (A, J) in robot space, "timing_ms": {"infer": ms}}, for one robot alone.

        observation: see `openpi_like.serve.protocol`. Without "seed", each request draws other noise.

        Raises:
            ObservationError: everything that is wrong with the observation; the policy stays usable.
            RangeError: the state is too far from those of training, or actions beyond the limits are refused.
            FloatingPointError: the network produced NaN or infinity, which is never sent.
        """
        started = time.perf_counter()
        (reply,) = self.sample([self.prepare(observation, number=self._requests)])
        self._requests += 1
        if isinstance(reply, Exception):
            raise reply
        return {"actions": reply.actions, "timing_ms": {"infer": 1e3 * (time.perf_counter() - started)}}

    def _batch(self, requests: Sequence[Request]) -> tuple[Any, ...]:
        """Returns what is sampled from."""
        stack = lambda *rows: np.stack(rows) if len(rows) > 1 else rows[0][None]  # noqa: E731
        inputs = jax.tree.map(stack, *(r.row for r in requests))
        words, masks = (stack(*(getattr(r, name) for r in requests)) for name in ("words", "mask"))
        rows = [r.previous for r in requests if r.previous is not None]
        previous = {"previous": jax.tree.map(stack, *rows)} if rows else {}
        weights, tables = self._held if len(requests) >= self.options.devices else self._held_alone
        return weights, words, inputs, masks, tables, previous

    def _replies(
        self, name: str, requests: Sequence[Request], padded: np.ndarray
    ) -> Iterator[Reply | FloatingPointError | RangeError]:
        """Yields rows of a sample, all of one robot, in robot space and within the robot's limits."""
        robot, normalization = self.robots[name], self._parts.normalizations[name]
        sampled = padded[:, : robot.action_horizon, : robot.action_size]
        unscaled = normalization.invert_actions(sampled)
        finite = np.isfinite(unscaled).all((1, 2))
        unscaled[~finite] = 0.0  # they are not sent
        actions = robot.decode_actions(unscaled, np.stack([r.state for r in requests]))
        finite &= np.isfinite(actions).all((1, 2))
        checked = self._ranges[name].check_actions(unscaled, actions)
        for request, sound, found in zip(requests, finite, checked, strict=True):
            if not sound:
                yield FloatingPointError(f"the policy produced actions that are not finite for robot {name!r}")
            elif isinstance(found, RangeError):
                yield found
            else:
                inside, sentences = found
                yield Reply(inside, (*request.warnings, *sentences))
