"""Mixtures of datasets as batches: a pure function of (seed, global sample index).

Sample p of a run comes from a dataset and frame that are computed from p alone, and so is everything that is drawn for
it, so samples do not depend on the number of hosts, of workers, of threads, or on where a run was resumed. Batch k of a
loader that starts at s holds the samples s + k * batch_size ... s + (k + 1) * batch_size - 1; host h of H holds every
H-th of them, from the h-th on.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import cv2
import grain
import numpy as np
from absl import flags

from openpi_like.batch import Batch
from openpi_like.data.assembly import Assembler
from openpi_like.data.config import DataConfig, PolicyShape, open_datasets
from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.fast import FastTokenizer
from openpi_like.data.image_states import ImageStates
from openpi_like.data.normalize import Normalization
from openpi_like.data.order import GroupedOrder, distinct_episodes, order_record, sample_order
from openpi_like.data.schema import DatasetError
from openpi_like.data.text import TextTokenizer
from openpi_like.robots.robot import Robot

WORKER_BYTES = 260 << 20  # resident memory of a worker process that has read nothing yet: Python and its libraries
_PILLOW_COPIES = 5  # sizes of an image that resizing it with Pillow holds: itself, a copy, 4 bytes a pixel twice
_END = 1 << 62  # of a run: grain divides by the batch size as a float, which makes more than a length may be of more
_CHUNK_STAGES = 8  # sizes of a chunk in float64 that are there at once while it is read and encoded


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
        kept = open_image_states(config, datasets, policy)
        assemble = Assembler(datasets, policy, tokenizer, normalizations, config, action_tokenizer, kept)
        episodes = [d.frames_per_episode() for d in datasets]
        for line in _announce(config, datasets, episodes, policy, batch_size, local, kept):
            print(line)
        order = sample_order(
            [len(d) for d in datasets],
            [e.weight for e in config.entries],
            config.seed,
            episodes=episodes,
            group_episodes=config.group_episodes,
        )
        mine = order.slice(slice(start + process_index, _END, process_count))
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


def open_image_states(config: DataConfig, datasets: Sequence[EpisodeDataset], policy: PolicyShape) -> list[ImageStates]:
    """Opens what a frozen backbone makes of training frames, of every dataset or of none.

    Raises:
        DatasetError: lists what is not there or of something else.
    """
    opened, problems = [], []
    for entry, dataset in zip(config.entries, datasets, strict=True):
        if entry.image_states is None:
            continue
        try:
            opened.append(ImageStates(entry.image_states))
            opened[-1].check(dataset, policy)
        except DatasetError as e:
            problems.append(str(e))
    if problems:
        raise DatasetError("\n".join(problems))
    return opened


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
    config: DataConfig,
    datasets: Sequence[EpisodeDataset],
    policy: PolicyShape,
    local_batch: int,
    kept: Sequence[ImageStates] = (),
) -> dict[str, int]:
    """Returns the most that loading holds on one host, in bytes, by what it is for; indexes are memory-mapped.

    local_batch: samples of a batch on one host. kept: what is read in the place of images, also memory-mapped.
    """
    height, width = policy.image_size
    chunk = policy.action_horizon * policy.action_dim
    tokens = policy.prompt_len + policy.answer_len
    # Numbers of 4 bytes with their masks; texts have up to four of these.
    row = 5 * chunk + 5 * policy.state_dim + 8 * tokens + len(policy.cameras) + 12
    images = kept[0].of.row_bytes if kept else len(policy.cameras) * height * width * 3
    batch = local_batch * (images + row)
    processes = max(config.num_workers, 1)
    threads = processes * config.num_threads
    # Being decoded or ready in a process; with workers also copied, sent, and received twice (grain's buffers).
    held = -(-config.prefetch // processes) + config.num_threads + (4 if config.num_workers else 1)
    image = 0
    for dataset in datasets if not kept else ():
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
        needed["order of groups"] = processes * sum(GroupedOrder.most_bytes(*x) for x in of)
    in_memory = {what: size for d in datasets for what, size in d.index.split.storage.kept.items()}
    needed |= {what: (1 + config.num_workers) * size for what, size in in_memory.items()}
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
    kept: Sequence[ImageStates],
) -> list[str]:
    """Returns lines that say what the loader of one host holds at most and how well it shuffles.

    Raises:
        ValueError: it would hold more than `memory_budget_mib`.
    """
    needed, budget = memory_needed(config, datasets, policy, local_batch, kept), config.memory_budget_mib
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
        assemble = Assembler(datasets, policy, tokenizer, normalizations, config, action_tokenizer)
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
