"""Batches of frames: images decoded and resized, numbers normalised, texts and actions as tokens, padded to a size."""

import collections
import math
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from openpi_like.batch import Batch
from openpi_like.config import near_names
from openpi_like.data.config import DataConfig, PolicyShape
from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.fast import FastError, FastTokenizer
from openpi_like.data.image_states import ImageStates
from openpi_like.data.normalize import Normalization
from openpi_like.data.schema import DatasetError
from openpi_like.data.text import TextRow, TextTokenizer
from openpi_like.robots.policy_fit import policy_problems
from openpi_like.robots.robot import Camera, Robot

# What a draw is for; cameras take the streams from _CAMERA_STREAM on, in the policy's order.
_PROMPT_STREAM, _CAMERA_STREAM = 0, 1


def uniform_draws(seed: int, stream: int, positions: Int[np.ndarray, "B"]) -> Float[np.ndarray, "B"]:
    """Returns numbers in [0, 1), each a function of the seed, the stream and its position alone."""
    if not len(positions):
        return np.zeros(0)
    # Philox is a function of (key, counter) that gives four words; the counter is the position.
    first, last = int(positions.min()), int(positions.max())
    words = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=first).random_raw(4 * (last - first + 1))
    return (words[4 * (positions - first)] >> np.uint64(11)) * 2.0**-53


def keep_cameras(
    present: Bool[np.ndarray, "C B"], draws: Float[np.ndarray, "C B"], dropout: float
) -> Bool[np.ndarray, "C B"]:
    """Returns which of the cameras that are there remain: all but those whose draw is below `dropout`.

    Where that would leave none, the one with the largest draw remains.
    """
    kept = present & (draws >= dropout)
    best = np.where(present, draws, -1.0).argmax(axis=0)
    kept[best, np.arange(len(best))] |= present.any(axis=0) & ~kept.any(axis=0)
    return kept


class _UnderWay:
    """Counts the calls under way in this process, so that closing can wait for them. A pickled copy has none."""

    def __init__(self) -> None:
        self._count, self._closed, self._changed = 0, False, threading.Condition()

    def __reduce__(self) -> tuple[Any, ...]:
        return _UnderWay, ()

    def __enter__(self) -> None:
        with self._changed:
            if self._closed:
                raise RuntimeError("the loader is closed")
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._count)


class _Recycled:
    """Arrays whose memory is used again once nothing refers to it: the system would fill new pages with zeros first.

    May be used from several threads. A pickled copy has nothing to use again.
    """

    def __init__(self, most: int) -> None:
        """most: how many arrays of one size are kept to be used again."""
        self._most = most
        self._free: dict[int, collections.deque[memoryview]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _Recycled, (self._most,)

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """Returns an array of uint8 with any content."""
        size = math.prod(shape)
        free = self._free.setdefault(size, collections.deque(maxlen=self._most))
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(size, np.uint8).data
        # Views of an array that does not own its memory, and whose base is no array, refer to the array itself.
        array = np.frombuffer(memory, np.uint8)
        weakref.finalize(array, free.append, memory).atexit = False
        return array.reshape(shape)


class Assembler:
    """Turns (dataset, frame) pairs into batches of the policy's shape. Safe to use from several threads; picklable."""

    def __init__(
        self,
        datasets: Sequence[EpisodeDataset | None],
        policy: PolicyShape,
        tokenizer: TextTokenizer,
        normalizations: Mapping[str, Normalization],
        config: DataConfig,
        action_tokenizer: FastTokenizer | None,
        image_states: Sequence[ImageStates] = (),
    ) -> None:
        """image_states: of each dataset, in the place of its images; none of any reads these."""
        self.image_states = image_states
        self.datasets, self.policy, self.tokenizer, self.config = datasets, policy, tokenizer, config
        self.normalizations, self.action_tokenizer = normalizations, action_tokenizer
        self._under_way, self._recycled = _UnderWay(), _Recycled(config.prefetch + config.num_threads + 1)
        problems = action_token_problems(policy, tokenizer, action_tokenizer)
        problems += image_slot_problems(policy, tokenizer)
        problems += [
            f"image_states {kept.directory}: text before the images is {list(kept.of.begins_with)} in them, and "
            f"{tokenizer.before_images} in prompts; make them again with train/image_states.py"
            for kept in image_states
            if list(kept.of.begins_with) != tokenizer.before_images
        ]
        if tokenizer.prompt_len != policy.prompt_len:
            problems.append(f"the tokenizer pads to {tokenizer.prompt_len} tokens, the policy to {policy.prompt_len}")
        if tokenizer.answer_len != policy.answer_len:
            lengths = f"{tokenizer.answer_len} tokens, the policy to {policy.answer_len}"
            problems.append(f"the tokenizer pads answers to {lengths}")
        if tokenizer.prompt_format != policy.prompt_format:
            problems.append(
                f"the tokenizer writes prompts as {tokenizer.prompt_format}, the policy reads {policy.prompt_format}"
            )
        if tokenizer.vocab_size > policy.vocab_size:
            problems.append(f"the tokenizer has {tokenizer.vocab_size} ids, the policy knows {policy.vocab_size}")
        for name in config.augment.wrist_cameras if config.augment is not None else ():
            if name not in policy.cameras:
                near = near_names(name, list(policy.cameras))
                problems.append(f"augment.wrist_cameras: {name!r} is not a slot of the policy ({near})")
        for entry in config.entries:
            problems += [f"robot {entry.robot.name!r}: {p}" for p in self._problems(entry.robot)]
            if entry.text_key is not None and not policy.answer_len:
                problems.append(f"{entry.path} has text_key={entry.text_key!r}, but the policy writes no answers")
        if problems:
            raise ValueError(
                "robots, tokenizer and policy do not fit each other:\n  " + "\n  ".join(dict.fromkeys(problems))
            )

    def _problems(self, robot: Robot) -> list[str]:
        problems = policy_problems(robot, self.policy, drop_cameras=self.config.drop_cameras)
        if robot.name not in self.normalizations:
            problems.append(f"no normalisation; {near_names(robot.name, list(self.normalizations))}")
        else:
            try:
                self.normalizations[robot.name].check(robot)
            except ValueError as e:
                problems.append(str(e))
        return problems

    def samples(self, samples: Sequence[tuple[int, int, int]]) -> tuple[Batch, int]:
        """Returns the batch of elements of `sample_order`; see `__call__`."""
        positions, ids, frames = np.array(samples, np.int64).T
        with self._under_way:
            return self(ids, frames, positions)

    def close(self) -> None:
        """Waits for batches under way in this process; none is begun any more."""
        self._under_way.close()

    def __call__(
        self, ids: np.ndarray, frames: np.ndarray, positions: np.ndarray, *, held_out: bool = False
    ) -> tuple[Batch, int]:
        """Returns a batch, and how many coefficients its action tokens could not write, see `saturate_actions`.

        ids, frames: (B,) dataset and frame of each sample. positions: (B,), which decide all draws; nothing is drawn
        here for held-out samples.
        """
        policy, size = self.policy, len(ids)
        saturated = 0
        height, width = policy.image_size
        # Filled at the end.
        read = () if self.image_states else policy.cameras
        images = {name: self._recycled.empty((size, height, width, 3)) for name in read}
        states_kept = self.image_states[0].empty(size) if self.image_states else None
        image_mask = {name: np.zeros(size, bool) for name in policy.cameras}
        state = np.zeros((size, policy.state_dim), np.float32)
        state_mask = np.zeros((size, policy.state_dim), bool)
        actions = np.zeros((size, policy.action_horizon, policy.action_dim), np.float32)
        action_mask = np.zeros((size, policy.action_horizon, policy.action_dim), bool)
        episode, robots = np.zeros(size, np.int32), np.zeros(size, np.int32)
        entities = {e.name: np.zeros((size, e.count, e.size), np.float32) for e in policy.entities}
        entity_mask = {e.name: np.zeros((size, e.count), bool) for e in policy.entities}
        # Per sample: the instruction, the state for the prompt, what is said, and the action tokens.
        prompts, states_in_prompt = [""] * size, [np.zeros(0, np.float32)] * size
        said: list[str | None] = [None] * size
        written: list[np.ndarray | None] = [None] * size
        told = np.ones(size, bool)  # whether the answer teaches; tokens are of whole plans, and some are known in part
        draws = None if held_out else uniform_draws(self.config.seed, _PROMPT_STREAM, positions)
        for i in np.unique(ids):
            dataset = self.datasets[i]
            assert dataset is not None  # ids are of open datasets
            rows = np.flatnonzero(ids == i)
            entry, robot = self.config.entries[i], dataset.robot
            normalization = self.normalizations[robot.name]
            states, chunks, mask = dataset.encoded(frames[rows])
            for things in robot.entities:
                values, there = dataset.entities(frames[rows], things)
                entities[things.name][rows, : things.count] = values
                entity_mask[things.name][rows, : things.count] = there
            if policy.robots:
                robots[rows] = policy.robots.index(robot.name)
            episode[rows] = dataset.episodes_of(frames[rows])
            state[rows, : robot.state_size] = normalization.apply_state(states)
            for row in rows:
                states_in_prompt[row] = state[row, : robot.state_size]
            state_mask[rows, : robot.state_size] = True
            drawn = None if draws is None else draws[rows]
            for row, prompt in zip(rows, dataset.prompts(frames[rows], drawn), strict=True):
                prompts[row] = "" if entry.blank_language else prompt
            if entry.text_key is not None:
                for row, text in zip(rows, dataset.texts(entry.text_key, frames[rows]), strict=True):
                    said[row] = text
            if entry.actions:
                chunks = normalization.apply_actions(chunks)
                if self.action_tokenizer is not None:
                    # Past the end of the episode its last action is repeated: tokens are of whole chunks.
                    tokens, outside = self._action_ids(dataset, chunks, frames[rows], held_out)
                    saturated += outside
                    if robot.plan is not None:
                        told[rows] = mask.all(axis=1)
                    for row, of in zip(rows, tokens, strict=True):
                        written[row] = of
                actions[rows, : robot.action_horizon, : robot.action_size] = np.where(mask[..., None], chunks, 0)
                action_mask[rows, : robot.action_horizon, : robot.action_size] = mask[..., None]
            cameras = [camera for camera in robot.cameras if camera.name in image_mask]
            if states_kept is not None:
                self.image_states[i].read_into(frames[rows], [states_kept[row] for row in rows])
            seen = self._seen(dataset, cameras, frames[rows], None if held_out else positions[rows])
            for camera, mask in zip(cameras, seen, strict=True):
                image_mask[camera.name][rows] = mask
                at = rows[mask] if images else rows[:0]
                dataset.images_into(
                    frames[at],
                    camera,
                    [images[camera.name][row] for row in at],
                    resize=policy.resize,
                    scaled=self.config.scaled_jpegs and policy.resize == "cubic",
                )
        for name in images:
            images[name][~image_mask[name]] = 0
        if not policy.answer_len:
            prompt, prompt_mask = self.tokenizer.batch(prompts, states_in_prompt)
            text = {"prompt": prompt, "prompt_mask": prompt_mask}
        else:
            answers = []
            for at, asked in enumerate(zip(prompts, states_in_prompt, said, written, strict=True)):
                try:
                    acts = self.config.entries[ids[at]].actions
                    answers.append(self._answer(*asked, acts=acts))
                except ValueError as e:
                    dataset, frame = self.datasets[ids[at]], frames[at]
                    assert dataset is not None  # as above
                    raise DatasetError(f"{dataset.where(int(frame))}: {e}") from e
            text = {k: np.stack([getattr(row, k) for row in answers]) for k in TextRow._fields}
            text["prompt_loss"] &= told[:, None]
        batch = Batch(  # type: ignore[typeddict-item]  # text
            images=images,
            image_mask=image_mask,
            state=state,
            state_mask=state_mask,
            actions=actions,
            action_mask=action_mask,
            dataset_id=ids.astype(np.int32),
            position=np.stack([positions >> 32, positions & 0xFFFFFFFF], axis=1).astype(np.uint32),
            **text,
        )
        if policy.robots:
            batch["robot"] = robots
        if policy.entities:
            batch["entities"], batch["entity_mask"] = entities, entity_mask
        if policy.reads_episodes:
            batch["episode"] = episode
        if states_kept is not None:
            batch["image_states"] = states_kept
        return batch, saturated

    def _seen(
        self, dataset: EpisodeDataset, cameras: Sequence[Camera], frames: np.ndarray, positions: np.ndarray | None
    ) -> np.ndarray:
        """Returns (C, B), which cameras of which frames are read."""
        if not cameras:  # all of them were dropped
            return np.zeros((0, len(frames)), bool)
        present = np.stack([dataset.present(frames, camera) for camera in cameras])
        if positions is None or not self.config.camera_dropout:
            return present
        streams = [_CAMERA_STREAM + self.policy.cameras.index(camera.name) for camera in cameras]
        draws = np.stack([uniform_draws(self.config.seed, stream, positions) for stream in streams])
        return keep_cameras(present, draws, self.config.camera_dropout)

    def _action_ids(
        self, dataset: EpisodeDataset, chunks: np.ndarray, frames: np.ndarray, held_out: bool
    ) -> tuple[list[np.ndarray], int]:
        """Returns action tokens as ids of the text vocabulary, and the number of coefficients outside it."""
        tokens = self.policy.action_tokens
        assert self.action_tokenizer is not None
        assert tokens is not None
        try:
            encoded = self.action_tokenizer.encode(
                chunks, outside="saturate" if self.config.saturate_actions or held_out else "error"
            )
        except FastError as e:
            where = dataset.where(int(frames[e.chunk or 0]))
            raise DatasetError(f"{where}: action tokens: {e}; or set saturate_actions") from e
        ids = [tokens.first(self.policy.vocab_size) - written for written in encoded.ids]
        return ids, int(encoded.outside.sum())

    def _answer(
        self, prompt: str, state: np.ndarray, said: str | None, written: np.ndarray | None, *, acts: bool
    ) -> TextRow:
        if acts and self.action_tokenizer is None:
            return self.tokenizer.encode_thought(prompt, state, said or "")
        if written is None:
            assert said is not None  # DataConfig has checked it
            return self.tokenizer.encode_answer(prompt, said)
        return self.tokenizer.encode_actions(prompt, state, written, subtask=said)


def image_slot_problems(policy: PolicyShape, tokenizer: TextTokenizer) -> list[str]:
    """Returns where images are in prompts, if the policy reads them elsewhere."""
    read, written = policy.image_slots or (0,) * len(policy.cameras), tokenizer.image_slots
    if read == written or not any(read + written):
        return []
    return [
        f"prompts of {tokenizer.prompt_format} have images after their first {written} tokens, one for each camera, "
        f"the policy reads them after {read}; choose another prompt_format, or image_slots={written}"
    ]


def action_token_problems(
    policy: PolicyShape, tokenizer: TextTokenizer, action_tokenizer: FastTokenizer | None
) -> list[str]:
    """Returns what of a policy's action tokens does not fit its tokenizers."""
    tokens = policy.action_tokens
    if tokens is None:
        return [] if action_tokenizer is None else ["there is an action tokenizer, but the policy has no action tokens"]
    if action_tokenizer is None:
        return ["the policy has action tokens and there is no action tokenizer; fit one with data/fit_fast.py"]
    problems = []
    if action_tokenizer.vocab_size > tokens.count:
        problems.append(f"the action tokenizer has {action_tokenizer.vocab_size} tokens, the policy {tokens.count}")
    first = tokens.first(policy.vocab_size)
    taken = range(first - tokens.count + 1, first + 1)
    form = sorted(tokenizer.structure_ids().intersection(taken))
    if form:
        problems.append(
            f"action tokens take ids {taken[0]} to {first}, and with them {form}, which give answers their form"
        )
    # The released weights give up rare words for actions; a policy of its own has no need to.
    elif taken[0] < tokenizer.vocab_size < policy.vocab_size:
        problems.append(
            f"action tokens take ids {taken[0]} to {first}, of which the text tokenizer uses those below "
            f"{tokenizer.vocab_size}; enlarge the policy's vocab_size by {tokenizer.vocab_size - taken[0]}"
        )
    return problems
