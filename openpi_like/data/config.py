"""What a run's data are, as a typed object: a mixture of datasets, and how they become samples."""

import contextlib
import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np

from openpi_like.batch import ActionTokens, EntityTokens
from openpi_like.data.augment import Augment
from openpi_like.data.dataset import EpisodeDataset, open_dataset
from openpi_like.data.prompts import PromptFormat
from openpi_like.data.schema import DatasetError
from openpi_like.data.selection import Selection
from openpi_like.robots.robot import Robot

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
    def prompt_format(self) -> PromptFormat: ...
    @property
    def image_slots(self) -> tuple[int, ...]: ...
    @property
    def action_tokens(self) -> ActionTokens | None: ...
    @property
    def answer_len(self) -> int: ...
    @property
    def reads_episodes(self) -> bool: ...
    @property
    def robots(self) -> tuple[str, ...]: ...
    @property
    def entities(self) -> tuple[EntityTokens, ...]: ...
    @property
    def perception(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class MixtureEntry:
    """One dataset of a mixture.

    path: TFDS directory. weight: part of the samples that come from it, relative to the other weights, whatever its
    size. split, val_split: for training and validation; val_split None means there is nothing to validate on.
    text_key: a text field of the RLDS step that is to be said in answer to the instruction: a subtask, before the
        actions; or, where `actions` is False, all there is to predict: the answer to a question about the image.
        A policy writes subtasks when it samples actions only with `thought_len` in its config: else give the same data
        once more without `text_key`, so that it knows prompts with and without.
    selection: which steps may begin a chunk. blank_language: replaces instructions that say nothing by "".
    label: what it is called in metrics, besides its robot: "recorded" makes "sawyer, recorded".
    image_states: directory of what a frozen backbone makes of its training frames, as train/image_states.py writes it;
        then no image of them is read.
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
    label: str | None = None
    image_states: str | None = None

    @property
    def name(self) -> str:
        """What it is called in metrics. Datasets of one name are counted together."""
        said = (self.robot.name, self.label, None if self.actions else "text")
        return ", ".join(word for word in said if word is not None)


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
    scaled_jpegs: decode JPEGs that are much larger than the policy's picture at a part of their size, see `decode_for`;
        not done for a policy that resizes as "pillow", whose filter wants all pixels.
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
    scaled_jpegs: bool = True
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
        kept = [entry.image_states is not None for entry in self.entries]
        if any(kept) and not all(kept):
            problems.append("image_states of some entries, expected of all or of none: a batch has images or has not")
        if any(kept) and (self.augment is not None or self.camera_dropout):
            problems.append("image_states with augment or camera_dropout, which change images; leave one of them out")
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

    @property
    def has_image_states(self) -> bool:
        """Whether training batches have what a frozen backbone makes of images, in the place of images."""
        return any(entry.image_states is not None for entry in self.entries)


@dataclasses.dataclass(frozen=True)
class Description:
    """What the training split of each robot is: how it was rendered (None for real cameras), episodes and frames."""

    renderers: dict[str, str | None]
    episodes: dict[str, int]
    frames: dict[str, int]


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
