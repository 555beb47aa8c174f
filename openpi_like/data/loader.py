"""Mixtures of datasets as batches: a pure function of (seed, global sample index).

Sample p of a run comes from a dataset and frame that are computed from p alone, and so is everything that is drawn for
it, so samples do not depend on the number of hosts, of workers, of threads, or on where a run was resumed. Batch k of a
loader that starts at s holds the samples s + k * batch_size ... s + (k + 1) * batch_size - 1; host h of H holds every
H-th of them, from the h-th on.
"""

import collections
import contextlib
import dataclasses
import math
import multiprocessing
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import cv2
import grain
import numpy as np
from absl import flags
from jaxtyping import Bool, Float, Int
from scipy.special import gammaln

from openpi_like.batch import ActionTokens, Batch
from openpi_like.config import near_names
from openpi_like.data import arrayrecord
from openpi_like.data.augment import Augment
from openpi_like.data.dataset import EpisodeDataset, Selection, open_dataset
from openpi_like.data.fast import FastError, FastTokenizer
from openpi_like.data.normalize import Normalization
from openpi_like.data.schema import DatasetError
from openpi_like.data.text import TextRow, TextTokenizer
from openpi_like.robots.robot import Camera, Robot, policy_problems

RENDERER_KEY = "episode_metadata/renderer"
WORKER_BYTES = 260 << 20  # resident memory of a worker process that has read nothing yet: Python and its libraries
_PILLOW_COPIES = 5  # sizes of an image that resizing it with Pillow holds: itself, a copy, 4 bytes a pixel twice
_CHUNK_STAGES = 8  # sizes of a chunk in float64 that are there at once while it is read and encoded
# What a draw is for; cameras take the streams from _CAMERA_STREAM on, in the policy's order.
_PROMPT_STREAM, _CAMERA_STREAM = 0, 1


@runtime_checkable
class PolicyShape(Protocol):
    """The part of a policy's config that decides the shapes of batches; `Pi0Config` is one."""

    @property
    def cameras(self) -> tuple[str, ...]: ...
    @property
    def image_size(self) -> tuple[int, int]: ...
    @property
    def state_dim(self) -> int: ...
    @property
    def action_dim(self) -> int: ...
    @property
    def action_horizon(self) -> int: ...
    @property
    def prompt_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def resize(self) -> str: ...
    @property
    def prompt_format(self) -> str: ...
    @property
    def action_tokens(self) -> ActionTokens | None: ...


@dataclasses.dataclass(frozen=True)
class MixtureEntry:
    """One dataset of a mixture.

    path: TFDS directory. weight: part of the samples that come from it, relative to the other weights, whatever its
    size. split, val_split: for training and validation; val_split None means there is nothing to validate on.
    text_key: a text field of the RLDS step that is to be said in answer to the instruction: a subtask, before the
        actions; or, where `actions` is False, all there is to predict: the answer to a question about the image.
        A policy does not write subtasks when it samples actions: give the same data once more without `text_key`, so
        that it knows prompts with and without.
    selection: which steps may begin a chunk. blank_language: replaces instructions that say nothing by "".
    """

    robot: Robot
    path: str
    weight: float = 1.0
    split: str = "train"
    val_split: str | None = "val"
    text_key: str | None = None
    actions: bool = True
    selection: Selection = Selection()
    blank_language: bool = False

    @property
    def name(self) -> str:
        """What it is called in metrics."""
        return self.robot.name if self.actions else f"{self.robot.name}, text"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A mixture of datasets and how it is read.

    frame_stride: see `EpisodeDataset`. drop_cameras: slots that robots have and the policy is not to see.
    group_episodes: for slow storage, read so many episodes at a time: in every pass of a dataset, its episodes are
        shuffled, and frames within each group of so many; None shuffles all frames. `distinct_episodes` says what that
        costs in variety.
    augment: random changes of training images, made in the training step; None leaves them as they are.
    camera_dropout: probability that a camera is masked in a training sample, as if the robot did not have it; one
        camera of each sample always remains.
    num_threads: each decodes a batch at a time. num_workers: processes with so many threads each; 0 decodes in this
        one. prefetch: batches kept ready. index_dir, max_corrupt_fraction: see `open_dataset`.
    memory_budget_mib: MiB that loading may take on one host, all its processes together; None sets no limit.
    saturate_actions: where action tokens cannot write a coefficient, write the nearest one they can, and count; without
        it, such a chunk is an error. Held-out chunks, which no tokenizer was fitted to, are always treated so.
    """

    entries: tuple[MixtureEntry, ...]
    frame_stride: int = 1
    seed: int = 0
    drop_cameras: tuple[str, ...] = ()
    augment: Augment | None = None
    camera_dropout: float = 0.0
    group_episodes: int | None = None
    num_threads: int = 2
    num_workers: int = 0
    prefetch: int = 4
    memory_budget_mib: int | None = None
    index_dir: str | None = None
    max_corrupt_fraction: float = 0.0
    saturate_actions: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not self.entries:
            problems.append("no entries, expected at least one dataset")
        for entry in self.entries:
            if not 0 < entry.weight < float("inf"):
                problems.append(f"weight {entry.weight} of {entry.path}, expected a number above 0")
            if not entry.actions and entry.text_key is None:
                problems.append(f"{entry.path} has actions=False and no text_key; then there is nothing to predict")
        numbers = {"frame_stride": 1, "num_threads": 1, "num_workers": 0, "prefetch": 1, "seed": 0}
        optional = {"group_episodes": 1, "memory_budget_mib": 1}
        for name, least in (numbers | {k: v for k, v in optional.items() if getattr(self, k) is not None}).items():
            if getattr(self, name) < least:
                problems.append(f"{name}={getattr(self, name)}, expected at least {least}")
        if not 0 <= self.camera_dropout < 1:
            problems.append(f"camera_dropout={self.camera_dropout}, expected a probability in [0, 1)")
        if not 0 <= self.max_corrupt_fraction < 1:
            problems.append(f"max_corrupt_fraction={self.max_corrupt_fraction}, expected a value in [0, 1)")
        if problems:
            raise ValueError("DataConfig: " + "; ".join(problems))


@dataclasses.dataclass(frozen=True)
class Description:
    """What the training split of each robot is: how it was rendered (None for real cameras), episodes and frames."""

    renderers: dict[str, str | None]
    episodes: dict[str, int]
    frames: dict[str, int]


@dataclasses.dataclass(frozen=True)
class ValidationBatch:
    """A batch of held-out frames of one dataset, with the same numbers in robot space for errors in physical units.

    name: see `MixtureEntry.name`. state: (B, Ds). actions: (B, A, Js), A the robot's horizon. action_mask: (B, A),
        False past the end of the episode.
    acts: whether actions are to be predicted, see `MixtureEntry.actions`. saturated: coefficients, see `DataConfig`.
    """

    batch: Batch
    name: str
    robot: Robot
    state: np.ndarray
    actions: np.ndarray
    action_mask: np.ndarray
    acts: bool
    saturated: int


def open_datasets(config: DataConfig, *, validation: bool = False) -> list[EpisodeDataset | None]:
    """Opens the training (or validation) split of every entry; None where an entry has no validation split.

    Their robots have only the cameras that are read, see `DataConfig.drop_cameras`.

    Raises:
        DatasetError: lists what is wrong with all of the datasets.
    """
    datasets: list[EpisodeDataset | None] = []
    problems = []
    with contextlib.ExitStack() as opened:  # closes them if anything raises
        for entry in config.entries:
            split = entry.val_split if validation else entry.split
            if split is None:
                datasets.append(None)
                continue
            # What is wrong with a camera that is not read does not matter. Where none is, the policy says so.
            read = tuple(c for c in entry.robot.cameras if c.name not in config.drop_cameras) or entry.robot.cameras
            try:
                dataset = open_dataset(
                    entry.path,
                    dataclasses.replace(entry.robot, cameras=read),
                    split,
                    frame_stride=config.frame_stride,
                    selection=entry.selection,
                    index_dir=config.index_dir,
                    max_corrupt_fraction=config.max_corrupt_fraction,
                )
                opened.callback(dataset.close)
                datasets.append(dataset)
                if entry.text_key is not None:
                    dataset.check_text(entry.text_key)
            except DatasetError as e:
                problems.append(str(e))
        if problems:
            raise DatasetError("\n".join(problems))
        opened.pop_all()
    return datasets


def describe(config: DataConfig) -> Description:
    """Says what the training data is.

    Raises:
        DatasetError: as `open_datasets`; or the images of one robot come from different renderers.
    """
    renderers: dict[str, set[str | None]] = {}
    episodes: dict[str, int] = {}
    frames: dict[str, int] = {}
    for dataset in open_datasets(config):
        assert dataset is not None  # only validation splits may be absent
        name, index = dataset.robot.name, dataset.index
        found = index.episode_texts.get(RENDERER_KEY)
        used = {None} if found is None else {found.table[i] for i in np.unique(found.ids)}
        renderers.setdefault(name, set()).update(used)
        episodes[name] = episodes.get(name, 0) + dataset.episodes
        frames[name] = frames.get(name, 0) + len(dataset)
        dataset.close()
    mixed = {name: sorted(map(str, used)) for name, used in renderers.items() if len(used) > 1}
    if mixed:
        raise DatasetError(
            f"images of one robot come from different renderers ({mixed}), which differ in their pixels; "
            "record them again with one renderer"
        )
    return Description({name: next(iter(used)) for name, used in renderers.items()}, episodes, frames)


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


class _Assembler:
    """Turns (dataset, frame) pairs into batches of the policy's shape. Safe to use from several threads; picklable."""

    def __init__(
        self,
        datasets: Sequence[EpisodeDataset | None],
        policy: PolicyShape,
        tokenizer: TextTokenizer,
        normalizations: Mapping[str, Normalization],
        config: DataConfig,
        action_tokenizer: FastTokenizer | None,
    ) -> None:
        self.datasets, self.policy, self.tokenizer, self.config = datasets, policy, tokenizer, config
        self.normalizations, self.action_tokenizer = normalizations, action_tokenizer
        self._under_way, self._recycled = _UnderWay(), _Recycled(config.prefetch + config.num_threads + 1)
        problems = action_token_problems(policy, tokenizer, action_tokenizer)
        if tokenizer.prompt_len != policy.prompt_len:
            problems.append(f"the tokenizer pads to {tokenizer.prompt_len} tokens, the policy to {policy.prompt_len}")
        if tokenizer.prompt_format != policy.prompt_format:
            problems.append(
                f"the tokenizer writes prompts of format {tokenizer.prompt_format!r}, the policy reads "
                f"{policy.prompt_format!r}"
            )
        if tokenizer.vocab_size > policy.vocab_size:
            problems.append(f"the tokenizer has {tokenizer.vocab_size} ids, the policy knows {policy.vocab_size}")
        for name in config.augment.wrist_cameras if config.augment is not None else ():
            if name not in policy.cameras:
                near = near_names(name, list(policy.cameras))
                problems.append(f"augment.wrist_cameras: {name!r} is not a slot of the policy ({near})")
        for entry in config.entries:
            problems += [f"robot {entry.robot.name!r}: {p}" for p in self._problems(entry.robot)]
            if entry.text_key is not None and policy.action_tokens is None:
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
        images = {name: self._recycled.empty((size, height, width, 3)) for name in policy.cameras}  # filled at the end
        image_mask = {name: np.zeros(size, bool) for name in policy.cameras}
        state = np.zeros((size, policy.state_dim), np.float32)
        state_mask = np.zeros((size, policy.state_dim), bool)
        actions = np.zeros((size, policy.action_horizon, policy.action_dim), np.float32)
        action_mask = np.zeros((size, policy.action_horizon, policy.action_dim), bool)
        # Per sample: the instruction, the state for the prompt, what is said, and the action tokens.
        prompts, states_in_prompt = [""] * size, [np.zeros(0, np.float32)] * size
        said: list[str | None] = [None] * size
        written: list[np.ndarray | None] = [None] * size
        draws = None if held_out else uniform_draws(self.config.seed, _PROMPT_STREAM, positions)
        for i in np.unique(ids):
            dataset = self.datasets[i]
            assert dataset is not None  # ids are of open datasets
            rows = np.flatnonzero(ids == i)
            entry, robot = self.config.entries[i], dataset.robot
            normalization = self.normalizations[robot.name]
            states, chunks, mask = dataset.encoded(frames[rows])
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
                    for row, of in zip(rows, tokens, strict=True):
                        written[row] = of
                actions[rows, : robot.action_horizon, : robot.action_size] = np.where(mask[..., None], chunks, 0)
                action_mask[rows, : robot.action_horizon, : robot.action_size] = mask[..., None]
            cameras = [camera for camera in robot.cameras if camera.name in images]
            seen = self._seen(dataset, cameras, frames[rows], None if held_out else positions[rows])
            for camera, mask in zip(cameras, seen, strict=True):
                image_mask[camera.name][rows] = mask
                at = rows[mask]
                dataset.images_into(frames[at], camera, [images[camera.name][row] for row in at], resize=policy.resize)
        for name, mask in image_mask.items():
            images[name][~mask] = 0
        if policy.action_tokens is None:
            prompt, prompt_mask = self.tokenizer.batch(prompts, states_in_prompt)
            text = {"prompt": prompt, "prompt_mask": prompt_mask}
        else:
            answers = []
            for at, asked in enumerate(zip(prompts, states_in_prompt, said, written, strict=True)):
                try:
                    answers.append(self._answer(*asked))
                except ValueError as e:
                    dataset, frame = self.datasets[ids[at]], frames[at]
                    assert dataset is not None  # as above
                    raise DatasetError(f"{dataset.where(int(frame))}: {e}") from e
            text = {k: np.stack([getattr(row, k) for row in answers]) for k in TextRow._fields}
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
        return batch, saturated

    def _seen(
        self, dataset: EpisodeDataset, cameras: Sequence[Camera], frames: np.ndarray, positions: np.ndarray | None
    ) -> np.ndarray:
        """Returns (C, B), which cameras of which frames are read."""
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

    def _answer(self, prompt: str, state: np.ndarray, said: str | None, written: np.ndarray | None) -> TextRow:
        if written is None:
            assert said is not None  # DataConfig has checked it
            return self.tokenizer.encode_answer(prompt, said)
        return self.tokenizer.encode_actions(prompt, state, written, subtask=said)


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
    if tokenizer.answer_len != tokens.max_len:
        problems.append(f"the tokenizer pads answers to {tokenizer.answer_len} tokens, the policy to {tokens.max_len}")
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


# ---- Order -----------------------------------------------------------------------------------------------------------


class _GroupedOrder:
    """The frames of one dataset, pass after pass, with frames shuffled in groups of episodes; a source for grain.

    Element k is computed from k. The permutations of the passes and groups that were used last are kept.
    """

    def __init__(self, episodes: np.ndarray, group: int, seed: Sequence[int]) -> None:
        """episodes: (E,) frames of each. group: how many episodes are shuffled together."""
        self._episodes, self._group, self._seed = np.asarray(episodes, np.int64), group, tuple(seed)
        self._start = np.cumsum(self._episodes) - self._episodes
        self._frames = int(self._episodes.sum())
        # Replaced whole, so that threads need no lock; at the border of two passes or groups they use both.
        self._passes: tuple[tuple[int, np.ndarray, np.ndarray], ...] = ()
        self._groups: tuple[tuple[tuple[int, int], np.ndarray], ...] = ()

    @staticmethod
    def most_bytes(episodes: np.ndarray, group: int, num_threads: int) -> int:
        """Returns what such an order takes at most while so many threads ask it."""
        frames = int(np.sort(episodes)[-group:].sum())  # of a group
        # Sorting random words holds these, their order, and as much again; then the order is kept.
        return 8 * (2 + 2 * 2) * (len(episodes) + 1) + 8 * 4 * frames + 3 * 8 * num_threads * max(len(episodes), frames)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k: int) -> int:
        number, at = divmod(int(k), self._frames)
        order, ends = self._pass(number)
        group = (int(np.searchsorted(ends, at, side="right")) - 1) // self._group
        first, last = group * self._group, min((group + 1) * self._group, len(order))
        start, stop = int(ends[first]), int(ends[last])
        at = start + int(self._shuffled(number, group, stop - start)[at - start])
        slot = first + int(np.searchsorted(ends[first : last + 1], at, side="right")) - 1
        return int(self._start[order[slot]] + at - ends[slot])

    def _pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the order of the episodes in a pass, and where each of them begins in it, (E + 1,)."""
        for known, order, ends in self._passes:
            if known == number:
                return order, ends
        order = self._permutation(len(self._episodes), number, 0)
        ends = np.concatenate([[0], np.cumsum(self._episodes[order])])
        self._passes = (*self._passes[-1:], (number, order, ends))
        return order, ends

    def _shuffled(self, number: int, group: int, size: int) -> np.ndarray:
        """Returns the order of the frames in a group."""
        for known, order in self._groups:
            if known == (number, group):
                return order
        order = self._permutation(size, number, group + 1)  # 0 is the pass
        self._groups = (*self._groups[-3:], ((number, group), order))
        return order

    def _permutation(self, size: int, *key: int) -> np.ndarray:
        words = np.random.SeedSequence([*self._seed, *key]).generate_state(2, np.uint64)
        return np.argsort(np.random.Philox(key=words).random_raw(size), kind="stable")


def sample_order(
    lengths: Sequence[int],
    weights: Sequence[float],
    seed: int,
    *,
    episodes: Sequence[Int[np.ndarray, "_"]] | None = None,
    group_episodes: int | None = None,
) -> grain.MapDataset:
    """Returns the endless order of a mixture: element p is (p, dataset, frame), computed from p.

    Every dataset is shuffled anew in each of its passes, and each frame comes once in a pass.

    Args:
        lengths: frames of each dataset.
        weights: relative parts of the samples, which grain rounds down to hundredths of the smallest.
        episodes: the same by episode; needed for `group_episodes`, see `DataConfig`.
    """
    orders = []
    for i, length in enumerate(lengths):
        if group_episodes is None:
            shuffle_seed = int(np.random.SeedSequence([seed, i]).generate_state(1)[0])
            order = grain.MapDataset.range(length).shuffle(seed=shuffle_seed).repeat()
        else:
            assert episodes is not None
            order = grain.MapDataset.source(_GroupedOrder(episodes[i], group_episodes, (seed, i)))
        orders.append(order.map(lambda frame, i=i: (i, int(frame))))
    mixed = grain.MapDataset.mix(orders, weights=[w / sum(weights) for w in weights])
    return mixed.map_with_index(lambda p, element: (p, *element))


def order_record(config: DataConfig, datasets: Sequence[EpisodeDataset]) -> dict[str, Any]:
    """Returns, as JSON, all that decides which step a position stands for: where two are equal, so are the orders.

    Where the data lies and what is drawn for a sample are no part of it.
    """
    entries = [
        {
            "robot": entry.robot.name,
            "data": f"{dataset.index.split.dataset}/{dataset.index.split.version}",
            "split": entry.split,
            "weight": entry.weight,
            "frames": len(dataset),
            "episodes": dataset.episodes,
            "steps": dataset.frames_digest(),
        }
        for entry, dataset in zip(config.entries, datasets, strict=True)
    ]
    return {"seed": config.seed, "group_episodes": config.group_episodes, "entries": entries}


def order_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns in what two orders differ, see `order_record`."""
    changes = [f"{k}: {before[k]} -> {now[k]}" for k in ("seed", "group_episodes") if before[k] != now[k]]
    if len(before["entries"]) != len(now["entries"]):
        changes.append(f"datasets: {len(before['entries'])} -> {len(now['entries'])}")
    for i, (old, new) in enumerate(zip(before["entries"], now["entries"], strict=False)):
        differ = [f"{k} {old[k]} -> {new[k]}" for k in new if old[k] != new[k]]
        if differ:
            changes.append(f"dataset {i} ({new['robot']}): {', '.join(differ)}")
    return changes


def distinct_episodes(
    episodes: Int[np.ndarray, "E"], batch_size: int, *, group_episodes: int | None = None, seed: int = 0
) -> float:
    """Returns how many distinct episodes a batch of one dataset has on average, which measures its shuffle.

    Without groups it is what a shuffle of all frames gives, the most there is. With groups it is the mean over the
    batches of one pass. A shuffle buffer of N frames that is filled episode by episode is about as good as groups of
    N frames.

    Args:
        episodes: frames of each episode, see `EpisodeDataset.frames_per_episode`.
    """
    order = np.argsort(np.random.default_rng(seed).random(len(episodes)), kind="stable")
    group = len(episodes) if group_episodes is None else group_episodes
    frames = int(np.sum(episodes))
    size = min(batch_size, frames)
    batches = frames // size  # whole ones
    total, start = 0.0, 0
    for at in range(0, len(episodes), group):
        of = np.asarray(episodes, np.float64)[order[at : at + group]]
        n = of.sum()
        stop = start + int(n)
        # The parts of this group that are in each batch, m frames of n: of its first batch, of whole ones, of its last.
        end = min(stop, batches * size)
        first = min(-start % size, max(end - start, 0))
        whole, last = divmod(max(end - start, 0) - first, size)
        for m, count in ((first, 1), (size, whole), (last, 1)):
            if not m * count:
                continue
            # An episode of f frames is not among them with probability C(n - f, m) / C(n, m).
            rest = n - of[of > 0]
            log_missing = gammaln(rest + 1) - gammaln(np.maximum(rest - m, 0) + 1) - gammaln(n + 1) + gammaln(n - m + 1)
            total += count * float(np.where(rest >= m, -np.expm1(log_missing), 1.0).sum())
        start = stop
    return total / batches


# ---- Loader ----------------------------------------------------------------------------------------------------------


class Loader:
    """Batches of this host, decoded ahead in threads or processes. An iterator that never ends.

    position: global sample index of the next batch; a loader made with `start=position` goes on from there.
    wait_seconds: time spent waiting for batches so far.
    saturated: DCT coefficients of this host that action tokens could not write as they were, see `saturate_actions`.
    order: see `order_record`.
    """

    def __init__(
        self,
        batches: Iterator[tuple[Batch, int]],
        opened: contextlib.ExitStack,
        batch_size: int,
        start: int,
        order: dict[str, Any],
        where: Callable[[int], str],
    ) -> None:
        """opened: what is to be closed when `batches` is. where: position -> where the sample comes from."""
        self._batches, self._opened, self._batch_size = batches, opened, batch_size
        self.position, self.order, self._where = start, order, where
        self._peeked: tuple[Batch, int] | None = None
        self.wait_seconds = 0.0
        self.saturated = 0

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        batch = self.peek()
        assert self._peeked is not None  # peek has put it there
        self.saturated += self._peeked[1]
        self.position += self._batch_size
        self._peeked = None
        return batch

    def peek(self) -> Batch:
        """Returns the next batch without moving on."""
        if self._peeked is None:
            started = time.perf_counter()
            self._peeked = next(self._batches)
            self.wait_seconds += time.perf_counter() - started
        return self._peeked[0]

    def where(self, position: int) -> str:
        """Returns where a sample comes from: dataset, episode, step, file and record; any sample, of any host."""
        return self._where(position)

    def close(self) -> None:
        """Stops threads and processes and closes files."""
        self._batches.close()  # type: ignore[attr-defined]  # leaves its threads to end what they have begun
        self._opened.close()


def make_loader(
    config: DataConfig,
    *,
    batch_size: int,
    policy: PolicyShape,
    tokenizer: TextTokenizer,
    normalizations: Mapping[str, Normalization],
    action_tokenizer: FastTokenizer | None = None,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """Returns the training batches of one host, from global sample `start` on; prints what they take in memory.

    A program with `num_workers` needs the usual `if __name__ == "__main__"`: each worker imports it again.

    Args:
        batch_size: over all hosts.
        normalizations: by robot name.
        action_tokenizer: for policies with action tokens.

    Raises:
        DatasetError: as `open_datasets`.
        ValueError: robots do not fit the policy or the statistics (lists all), sizes do not divide, or loading would
            take more memory than `memory_budget_mib`.
    """
    local = _rows_per_host(batch_size, process_index, process_count, start)
    datasets = [d for d in open_datasets(config) if d is not None]
    with contextlib.ExitStack() as opened:  # closes them if anything raises
        for dataset in datasets:
            opened.callback(dataset.close)
        assemble = _Assembler(datasets, policy, tokenizer, normalizations, config, action_tokenizer)
        episodes = [d.frames_per_episode() for d in datasets]
        for line in _announce(config, datasets, episodes, policy, batch_size, local):
            print(line)
        order = sample_order(
            [len(d) for d in datasets],
            [e.weight for e in config.entries],
            config.seed,
            episodes=episodes,
            group_episodes=config.group_episodes,
        )
        mine = order.slice(slice(start + process_index, None, process_count))
        batches = mine.batch(local, batch_fn=list).map(assemble.samples)
        ahead = -(-config.prefetch // max(config.num_workers, 1)) + config.num_threads
        stream = batches.to_iter_dataset(grain.ReadOptions(config.num_threads, prefetch_buffer_size=ahead))
        _one_thread_per_image()
        if config.num_workers:
            if not flags.FLAGS.is_parsed():  # grain asks for its flags; our programs have none of that kind
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(config.num_workers), _begin_worker)
        opened.callback(assemble.close)
        record = order_record(config, datasets)

        def where(position: int) -> str:
            _, dataset, frame = order[position]
            return datasets[dataset].where(frame)

        return Loader(iter(stream), opened.pop_all(), batch_size, start, record, where)


def _rows_per_host(batch_size: int, process_index: int, process_count: int, start: int = 0) -> int:
    if batch_size % process_count or not 0 <= process_index < process_count or start < 0:
        raise ValueError(
            f"batch_size={batch_size} on {process_count} hosts, host {process_index}, start={start}; expected a "
            "batch_size that the number of hosts divides, a host number below it, and start >= 0"
        )
    return batch_size // process_count


def _one_thread_per_image() -> None:
    """Batches are decoded in parallel; threads inside an image would only get in each other's way."""
    cv2.setNumThreads(1)


def _begin_worker(index: int, count: int) -> None:
    _one_thread_per_image()
    run = multiprocessing.parent_process()
    assert run is not None  # a worker is not the run itself

    def end_with() -> None:
        run.join()
        os._exit(1)

    # A run that is killed cannot end its workers, which would wait for it and keep their memory.
    threading.Thread(target=end_with, daemon=True).start()


def memory_needed(
    config: DataConfig, datasets: Sequence[EpisodeDataset], policy: PolicyShape, local_batch: int
) -> dict[str, int]:
    """Returns the most that loading holds on one host, in bytes, by what it is for; indexes are memory-mapped.

    local_batch: samples of a batch on one host.
    """
    height, width = policy.image_size
    chunk = policy.action_horizon * policy.action_dim
    tokens = policy.prompt_len + (0 if policy.action_tokens is None else policy.action_tokens.max_len)
    # Numbers of 4 bytes with their masks; texts have up to four of these.
    row = 5 * chunk + 5 * policy.state_dim + 8 * tokens + len(policy.cameras) + 12
    batch = local_batch * (len(policy.cameras) * height * width * 3 + row)
    processes = max(config.num_workers, 1)
    threads = processes * config.num_threads
    # Being decoded or ready in a process; with workers also copied, sent, and received twice (grain's buffers).
    held = -(-config.prefetch // processes) + config.num_threads + (4 if config.num_workers else 1)
    image = 0
    for dataset in datasets:
        for camera in dataset.robot.cameras:
            read, pixels = dataset.image_bytes(camera)
            image = max(image, read + (_PILLOW_COPIES if policy.resize == "pillow" else 1) * pixels)
    needed = {
        f"{processes * held} batches of {batch / 2**20:.1f} MiB": processes * held * batch,
        # Chunks are float64 until they are encoded, and are there in several stages at once.
        f"{threads} images and chunks being read": threads * (image + _CHUNK_STAGES * 8 * local_batch * chunk),
        # Workers get them through a pipe.
        "places of frames and texts": (1 + 2 * config.num_workers) * sum(d.held_bytes() for d in datasets),
    }
    if config.group_episodes is not None:
        of = [(d.frames_per_episode(), config.group_episodes, config.num_threads) for d in datasets]
        needed["order of groups"] = processes * sum(_GroupedOrder.most_bytes(*x) for x in of)
    if any(d.index.split.file_format == "array_record" for d in datasets):
        needed["records that were read last"] = (1 + config.num_workers) * arrayrecord.CACHE_BYTES
    if config.num_workers:
        needed[f"{config.num_workers} processes"] = config.num_workers * WORKER_BYTES
    return needed


def _announce(
    config: DataConfig,
    datasets: Sequence[EpisodeDataset],
    episodes: Sequence[np.ndarray],
    policy: PolicyShape,
    batch_size: int,
    local_batch: int,
) -> list[str]:
    """Returns lines that say what the loader of one host holds at most and how well it shuffles.

    Raises:
        ValueError: it would hold more than `memory_budget_mib`.
    """
    needed, budget = memory_needed(config, datasets, policy, local_batch), config.memory_budget_mib
    total = sum(needed.values()) / 2**20
    parts = ", ".join(f"{what} = {of / 2**20:.0f} MiB" for what, of in needed.items())
    if budget is not None and total > budget:
        raise ValueError(
            f"loading takes up to {total:.0f} MiB on this host, more than memory_budget_mib={budget}: {parts}; lower "
            "prefetch, num_threads, num_workers or the batch size, or raise the budget"
        )
    frames = sum(len(d) for d in datasets)
    lines = [
        f"data: {frames:,} frames in {len(datasets)} datasets; at most {total:.0f} MiB on this host"
        f"{'' if budget is None else f' of {budget}'}: {parts}; indexes are memory-mapped"
    ]
    if config.group_episodes is not None:
        sizes = [max(1, round(batch_size * e.weight / sum(e.weight for e in config.entries))) for e in config.entries]
        pairs = list(zip(episodes, sizes, strict=True))
        grouped = sum(distinct_episodes(of, n, group_episodes=config.group_episodes) for of, n in pairs)
        lines.append(
            f"data: {grouped:.1f} distinct episodes in a batch of {sum(sizes)}, in groups of {config.group_episodes}; "
            f"{sum(distinct_episodes(of, n) for of, n in pairs):.1f} without groups"
        )
    return lines


def validation_batches(
    config: DataConfig,
    *,
    batch_size: int,
    count: int,
    policy: PolicyShape,
    tokenizer: TextTokenizer,
    normalizations: Mapping[str, Normalization],
    action_tokenizer: FastTokenizer | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[ValidationBatch]:
    """Yields `count` batches of each dataset with a validation split: the same evenly spaced frames every time.

    `batch_size` is over all hosts; each gets a run of rows, so that a row of the global batch, by which actions are
    sampled, is the same frame with any number of hosts. A split with fewer frames than asked for repeats some of them.
    Nothing is drawn: no camera is dropped. Positions count the frames of a dataset that are yielded.

    Raises:
        DatasetError, ValueError: as `make_loader`.
    """
    local = _rows_per_host(batch_size, process_index, process_count)
    datasets = open_datasets(config, validation=True)
    with contextlib.ExitStack() as opened:
        for dataset in datasets:
            if dataset is not None:
                opened.callback(dataset.close)
        assemble = _Assembler(datasets, policy, tokenizer, normalizations, config, action_tokenizer)
        for i, dataset in enumerate(datasets):
            if dataset is None:
                continue
            chosen = np.linspace(0, len(dataset) - 1, count * batch_size).round().astype(np.int64)
            for first in range(process_index * local, count * batch_size, batch_size):
                mine = chosen[first : first + local]
                actions, mask = dataset.actions(mine)
                positions = first + np.arange(local)
                batch, saturated = assemble(np.full(local, i), mine, positions, held_out=True)
                yield ValidationBatch(
                    batch=batch,
                    name=config.entries[i].name,
                    acts=config.entries[i].actions,
                    saturated=saturated,
                    robot=dataset.robot,
                    state=dataset.state(mine),
                    actions=actions,
                    action_mask=mask,
                )
