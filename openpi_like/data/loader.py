"""Mixtures of datasets as batches: a pure function of (seed, global sample index).

Sample p of a run comes from a dataset and frame that are computed from p alone, so the order does not depend on the
number of hosts, of threads, or on where a run was resumed. Batch k of a loader that starts at s holds the samples
s + k * batch_size ... s + (k + 1) * batch_size - 1; host h of H holds every H-th of them, from the h-th on.
"""

import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import grain
import numpy as np

from openpi_like.batch import ActionTokens, Batch
from openpi_like.config import near_names
from openpi_like.data.dataset import EpisodeDataset, Selection, open_dataset
from openpi_like.data.fast import FastError, FastTokenizer
from openpi_like.data.images import Augment, augment
from openpi_like.data.normalize import Normalization
from openpi_like.data.schema import DatasetError
from openpi_like.data.text import TextRow, TextTokenizer
from openpi_like.robots.robot import Robot, policy_problems

RENDERER_KEY = "episode_metadata/renderer"


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


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A mixture of datasets and how it is read.

    frame_stride: see `EpisodeDataset`. drop_cameras: slots that robots have and the policy is not to see.
    augment: None leaves training images as they are. num_threads: each decodes a batch at a time. prefetch: batches
    kept ready. index_dir, max_corrupt_fraction: see `open_index`.
    saturate_actions: where action tokens cannot write a coefficient, write the nearest one they can, and count; without
        it, such a chunk is an error. Held-out chunks, which no tokenizer was fitted to, are always treated so.
    """

    entries: tuple[MixtureEntry, ...]
    frame_stride: int = 1
    seed: int = 0
    drop_cameras: tuple[str, ...] = ()
    augment: Augment | None = None
    num_threads: int = 2
    prefetch: int = 4
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
        for name, least in (("frame_stride", 1), ("num_threads", 1), ("prefetch", 1), ("seed", 0)):
            if getattr(self, name) < least:
                problems.append(f"{name}={getattr(self, name)}, expected at least {least}")
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

    state: (B, Ds). actions: (B, A, Js), A the robot's horizon. action_mask: (B, A), False past the end of the episode.
    acts: whether actions are to be predicted, see `MixtureEntry.actions`. saturated: coefficients, see `DataConfig`.
    """

    batch: Batch
    robot: Robot
    state: np.ndarray
    actions: np.ndarray
    action_mask: np.ndarray
    acts: bool
    saturated: int


def open_datasets(config: DataConfig, *, validation: bool = False) -> list[EpisodeDataset | None]:
    """Opens the training (or validation) split of every entry; None where an entry has no validation split.

    Raises:
        DatasetError: lists what is wrong with all of the datasets.
    """
    datasets: list[EpisodeDataset | None] = []
    problems = []
    for entry in config.entries:
        split = entry.val_split if validation else entry.split
        if split is None:
            datasets.append(None)
            continue
        try:
            dataset = open_dataset(
                entry.path,
                entry.robot,
                split,
                frame_stride=config.frame_stride,
                selection=entry.selection,
                index_dir=config.index_dir,
                max_corrupt_fraction=config.max_corrupt_fraction,
            )
            if entry.text_key is not None:
                dataset.check_text(entry.text_key)
            datasets.append(dataset)
        except DatasetError as e:
            problems.append(str(e))
    if problems:
        raise DatasetError("\n".join(problems))
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


class _Assembler:
    """Turns (dataset, frame) pairs into batches of the policy's shape. Safe to use from several threads."""

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
        self.saturated, self._lock = 0, threading.Lock()
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

    def __call__(self, ids: np.ndarray, frames: np.ndarray, positions: Sequence[int] | None) -> Batch:
        """ids, frames: (B,) dataset and frame of each sample. positions: in the run, to augment by; None for as is."""
        policy, size = self.policy, len(ids)
        height, width = policy.image_size
        images = {name: np.zeros((size, height, width, 3), np.uint8) for name in policy.cameras}
        image_mask = {name: np.zeros(size, bool) for name in policy.cameras}
        state = np.zeros((size, policy.state_dim), np.float32)
        state_mask = np.zeros((size, policy.state_dim), bool)
        actions = np.zeros((size, policy.action_horizon, policy.action_dim), np.float32)
        action_mask = np.zeros((size, policy.action_horizon, policy.action_dim), bool)
        # Per sample: the instruction, the state for the prompt, what is said, and the action tokens.
        prompts, states_in_prompt = [""] * size, [np.zeros(0, np.float32)] * size
        said: list[str | None] = [None] * size
        written: list[np.ndarray | None] = [None] * size
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
            for row, prompt in zip(rows, dataset.prompts(frames[rows]), strict=True):
                prompts[row] = "" if entry.blank_language else prompt
            if entry.text_key is not None:
                for row, text in zip(rows, dataset.texts(entry.text_key, frames[rows]), strict=True):
                    said[row] = text
            if entry.actions:
                chunks = normalization.apply_actions(chunks)
                if self.action_tokenizer is not None:
                    # Past the end of the episode its last action is repeated: tokens are of whole chunks.
                    for row, tokens in zip(
                        rows, self._action_ids(dataset, chunks, frames[rows], positions is None), strict=True
                    ):
                        written[row] = tokens
                actions[rows, : robot.action_horizon, : robot.action_size] = np.where(mask[..., None], chunks, 0)
                action_mask[rows, : robot.action_horizon, : robot.action_size] = mask[..., None]
            for camera in robot.cameras:
                if camera.name not in images:
                    continue
                image_mask[camera.name][rows] = True
                slot = policy.cameras.index(camera.name)
                for row in rows:
                    out = images[camera.name][row]
                    dataset.image_into(int(frames[row]), camera, out, resize=policy.resize)
                    if self.config.augment is not None and positions is not None:
                        key = (self.config.seed, positions[int(row)], slot)
                        augment(out, self.config.augment, np.random.default_rng(key))
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
        return Batch(  # type: ignore[typeddict-item]  # text
            images=images,
            image_mask=image_mask,
            state=state,
            state_mask=state_mask,
            actions=actions,
            action_mask=action_mask,
            dataset_id=ids.astype(np.int32),
            **text,
        )

    def _action_ids(
        self, dataset: EpisodeDataset, chunks: np.ndarray, frames: np.ndarray, held_out: bool
    ) -> list[np.ndarray]:
        """Returns action tokens as ids of the text vocabulary."""
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
        with self._lock:
            self.saturated += int(encoded.outside.sum())
        return [tokens.first(self.policy.vocab_size) - ids for ids in encoded.ids]

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


def sample_order(lengths: Sequence[int], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """Returns the endless order of a mixture: element p is (p, dataset, frame), computed from p.

    Every dataset is shuffled anew in each of its passes, and each frame comes once in a pass.
    """
    orders = []
    for i, length in enumerate(lengths):
        shuffle_seed = int(np.random.SeedSequence([seed, i]).generate_state(1)[0])
        order = grain.MapDataset.range(length).shuffle(seed=shuffle_seed).repeat()
        orders.append(order.map(lambda frame, i=i: (i, int(frame))))
    mixed = grain.MapDataset.mix(orders, weights=[w / sum(weights) for w in weights])
    return mixed.map_with_index(lambda p, element: (p, *element))


class Loader:
    """Batches of this host, decoded ahead in threads. An iterator that never ends.

    position: global sample index of the next batch; a loader made with `start=position` goes on from there.
    wait_seconds: time spent waiting for batches so far.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        datasets: list[EpisodeDataset],
        assembler: _Assembler,
        batch_size: int,
        start: int,
    ) -> None:
        self._batches, self._datasets, self._assembler, self._batch_size = batches, datasets, assembler, batch_size
        self.position = start
        self.wait_seconds = 0.0

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch = next(self._batches)
        self.wait_seconds += time.perf_counter() - started
        self.position += self._batch_size
        return batch

    @property
    def saturated(self) -> int:
        """DCT coefficients of this host that action tokens could not write as they were, see `saturate_actions`."""
        return self._assembler.saturated

    def close(self) -> None:
        """Stops the threads and closes files."""
        self._batches.close()  # type: ignore[attr-defined]
        for dataset in self._datasets:
            dataset.close()


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

    Args:
        batch_size: over all hosts.
        normalizations: by robot name.
        action_tokenizer: for policies with action tokens.

    Raises:
        DatasetError: as `open_datasets`.
        ValueError: robots do not fit the policy or the statistics (lists all), or sizes do not divide.
    """
    if batch_size % process_count or not 0 <= process_index < process_count or start < 0:
        raise ValueError(
            f"batch_size={batch_size} on {process_count} hosts, host {process_index}, start={start}; expected a "
            "batch_size that the number of hosts divides, a host number below it, and start >= 0"
        )
    datasets = [d for d in open_datasets(config) if d is not None]
    assemble = _Assembler(datasets, policy, tokenizer, normalizations, config, action_tokenizer)
    local = batch_size // process_count
    order = sample_order([len(d) for d in datasets], [e.weight for e in config.entries], config.seed)

    def decode(samples: list[tuple[int, int, int]]) -> Batch:
        positions, ids, frames = zip(*samples, strict=True)
        return assemble(np.array(ids), np.array(frames), positions)

    batches = order.slice(slice(start + process_index, None, process_count)).batch(local, batch_fn=list).map(decode)
    options = grain.ReadOptions(num_threads=config.num_threads, prefetch_buffer_size=config.prefetch)
    print(memory_budget(config, datasets, policy, local))
    return Loader(iter(batches.to_iter_dataset(options)), datasets, assemble, batch_size, start)


def memory_budget(config: DataConfig, datasets: list[EpisodeDataset], policy: PolicyShape, local_batch: int) -> str:
    """Returns a line that says what the buffers of one host hold at most."""
    height, width = policy.image_size
    decoded = local_batch * len(policy.cameras) * height * width * 3
    sizes = [np.mean(d.index.images[c.key][:, 1]) for d in datasets for c in d.robot.cameras]
    held = config.prefetch + config.num_threads
    frames = sum(len(d) for d in datasets)
    return (
        f"data: {frames:,} frames in {len(datasets)} datasets; buffers per host: {held} batches of "
        f"{decoded / 2**20:.1f} MiB decoded = {held * decoded / 2**20:.0f} MiB, and {config.num_threads} "
        f"encoded images of about {np.mean(sizes) / 2**10:.0f} KiB; indexes are memory-mapped"
    )


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

    `batch_size` is over all hosts; each gets every `process_count`-th row. A split with fewer frames than asked for
    repeats some of them. Images are not augmented.

    Raises:
        DatasetError, ValueError: as `make_loader`.
    """
    datasets = open_datasets(config, validation=True)
    assemble = _Assembler(datasets, policy, tokenizer, normalizations, config, action_tokenizer)
    for i, dataset in enumerate(datasets):
        if dataset is None:
            continue
        chosen = np.linspace(0, len(dataset) - 1, count * batch_size).round().astype(np.int64)
        for frames in chosen.reshape(count, batch_size):
            mine = frames[process_index::process_count]
            actions, mask = dataset.actions(mine)
            before = assemble.saturated
            batch = assemble(np.full(len(mine), i), mine, None)
            yield ValidationBatch(
                batch=batch,
                acts=config.entries[i].actions,
                saturated=assemble.saturated - before,
                robot=dataset.robot,
                state=dataset.state(mine),
                actions=actions,
                action_mask=mask,
            )
        dataset.close()
