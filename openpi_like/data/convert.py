"""A dataset of any layout as LeRobot, or as RLDS. Nothing is dropped that `leave_out` does not name.

Numbers and texts keep their values, and pictures that are stored one by one their bytes. Frames of a video (and raw
pictures) have to be encoded again: losslessly as PNG, else as JPEG or as a video. Names follow two rules:

    to LeRobot  observation/image_0 -> observation.images.image_0 (pictures), observation/state -> observation.state;
                one text becomes `task`; names without "/" stay
    to RLDS     observation.images.front -> observation/images/front, task -> language_instruction; names with "/" stay
"""

import dataclasses
import fnmatch
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openpi_like.config import near_names
from openpi_like.data import files
from openpi_like.data.files import Url
from openpi_like.data.images import ENCODINGS, encode
from openpi_like.data.index import FrameIndex, Texts, open_index
from openpi_like.data.layouts import split_names
from openpi_like.data.lerobot_writer import OWN, Column, LeRobotFormat, LeRobotWriter, Values
from openpi_like.data.rlds_tables import EpisodeTable, RldsFormat, TableField, write_tables
from openpi_like.data.schema import DatasetError, Feature
from openpi_like.data.video_writer import ENCODER

INSTRUCTION = "language_instruction"
_NEAR = 1e-4  # seconds that LeRobot tolerates between a time stamp and a frame

Progress = Callable[[int, int], None]  # episodes that are written, and all


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What of a dataset is converted.

    splits: default all. leave_out: keys of fields, or patterns of them ("episode_metadata/*"), that are dropped.
    rename: key -> its name in the result, where it is not to follow the rules.
    encoding, quality: "jpeg" or "png", of pictures that are not stored one by one and become so; quality is of JPEG.
    max_corrupt_fraction, workers, index_dir: of reading, see `open_index`.
    """

    splits: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    encoding: str = "jpeg"
    quality: int = 95
    max_corrupt_fraction: float = 0.0
    workers: int = 1
    index_dir: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.encoding not in ENCODINGS:
            problems.append(f"encoding {self.encoding!r} is unknown; {near_names(self.encoding, list(ENCODINGS))}")
        if not 1 <= self.quality <= 100:
            problems.append(f"quality {self.quality}, expected 1 to 100")
        if problems:
            raise ValueError("Conversion: " + "; ".join(problems))


@dataclasses.dataclass(frozen=True)
class Converted:
    """What was written. names: key -> its name there. skipped: damaged episodes. encoded: pictures encoded again."""

    episodes: int
    steps: int
    names: dict[str, str]
    left_out: tuple[str, ...]
    skipped: tuple[str, ...]
    encoded: tuple[str, ...]


# ---- What is converted -----------------------------------------------------------------------------------------------


class _Source:
    """The splits of a dataset, with the same fields, and what of them is left out."""

    def __init__(self, directory: str | Path | Url, conversion: Conversion) -> None:
        self.conversion = conversion
        there = split_names(files.locate(directory))
        if unknown := [name for name in conversion.splits if name not in there]:
            raise DatasetError(f"{directory}: no splits {unknown}; {near_names(unknown[0], there)}")
        self.indexes = {
            name: open_index(
                directory, name, index_dir=conversion.index_dir, workers=conversion.workers,
                max_corrupt_fraction=conversion.max_corrupt_fraction,
            )
            for name in conversion.splits or there
        }  # fmt: skip
        if not self.indexes:
            raise DatasetError(f"{directory} has no splits")
        if not conversion.splits and (shared := _shared(self.indexes)):
            raise DatasetError(f"{directory}: splits {shared} share episodes; name those that are meant in splits")
        self.index = next(iter(self.indexes.values()))
        steps, episode = self.index.schema.steps, self.index.schema.episode
        self.fields = episode | steps
        self.of_episodes = set(episode)
        patterns = conversion.leave_out
        self.left_out = tuple(k for k in self.fields if any(fnmatch.fnmatchcase(k, p) for p in patterns))
        self.problems = [
            f"leave_out {p!r} is no field; {near_names(p, list(self.fields))}"
            for p in patterns
            if not fnmatch.filter(self.fields, p)
        ]
        self.problems += [
            f"rename {k!r} is no field; {near_names(k, list(self.fields))}"
            for k in conversion.rename
            if k not in self.fields
        ]
        unread = _unread(self.indexes)
        self.unfit = {key: why for key, why in unread.items() if key not in self.left_out}
        self.kept = {k: f for k, f in self.fields.items() if k not in self.left_out and k not in unread}

    def rate(self, fps: float | None) -> float | None:
        """Returns the steps in a second, given or known; adds a problem where the two differ."""
        known = next((i.split.rate for i in self.indexes.values() if i.split.rate is not None), None)
        if fps is not None and known is not None and abs(fps - known) > 1e-6 * known:
            self.problems.append(f"fps={fps:g}, but the dataset says {known:g}; leave it out, or correct the dataset")
        return fps if known is None else known

    @property
    def robot_type(self) -> str | None:
        return next((i.split.robot_type for i in self.indexes.values() if i.split.robot_type is not None), None)

    def check(self, names: Mapping[str, str]) -> None:
        """Raises DatasetError with all problems. names: key -> name in the result."""
        of: dict[str, list[str]] = {}
        for key, name in names.items():
            of.setdefault(name, []).append(key)
        self.problems += [
            f"{keys} would all be called {name!r}; give them other names with rename, or name them in leave_out"
            for name, keys in of.items()
            if len(keys) > 1
        ]
        self.problems += [f"{key!r} cannot be kept: {why}" for key, why in self.unfit.items()]
        if self.unfit:
            self.problems.append(f"to do without these, name them in leave_out: {' '.join(self.unfit)}")
        if self.problems:
            raise DatasetError(f"{self.index.split.dataset} cannot be converted:\n  " + "\n  ".join(self.problems))

    def stored(self, key: str) -> bool:
        """Whether the pictures of a camera are stored one by one."""
        return self.index.image_encoding(0, key) in {*ENCODINGS, "other"}

    def pictures(self, index: FrameIndex, key: str, steps: range) -> list[bytes]:
        """Returns encoded pictures: those that are stored, else made of pixels."""
        if self.stored(key):
            return [index.read_image(step, key) for step in steps]
        form, quality = self.conversion.encoding, self.conversion.quality
        return [encode(pixels, form, quality) for pixels in _pixels(index, key, steps)]

    def episodes(self) -> Iterator[tuple[str, FrameIndex, int, range]]:
        """Yields (split, its index, episode, its steps)."""
        for name, index in self.indexes.items():
            ends = index.episode_start.tolist()
            for e, (first, end) in enumerate(itertools.pairwise(ends)):
                yield name, index, e, range(first, end)
            index.close()

    @property
    def total(self) -> int:
        return sum(index.episodes for index in self.indexes.values())

    def converted(self, names: dict[str, str], encoded: Sequence[str]) -> Converted:
        indexes = self.indexes.values()
        return Converted(
            self.total,
            sum(index.steps for index in indexes),
            names,
            self.left_out,
            tuple(itertools.chain.from_iterable(index.skipped for index in indexes)),
            tuple(encoded),
        )


def _unread(indexes: Mapping[str, FrameIndex]) -> dict[str, str]:
    """Returns key -> why a field cannot be read, in any of the splits: text that is none may be so in one of them."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, index in indexes.items():
        for key, why in index.left_out.items():
            found.setdefault(key, {}).setdefault(why, []).append(name)
    return {
        key: "; ".join(f"{'' if len(of) == len(indexes) else f'in {of}: '}{why}" for why, of in whys.items())
        for key, whys in found.items()
    }


def _shared(indexes: Mapping[str, FrameIndex]) -> list[str]:
    """Returns two splits that have an episode in common, if any have: one with the same numbers."""
    seen: dict[bytes, str] = {}
    for name, index in indexes.items() if len(indexes) > 1 else ():
        for first, end in itertools.pairwise(index.episode_start.tolist()):
            found = hashlib.blake2b(str(end - first).encode())
            for key in sorted(index.columns):
                found.update(index.columns[key][first:end].tobytes())
            if (other := seen.setdefault(found.digest(), name)) != name:
                return [other, name]
    return []


def _pixels(index: FrameIndex, key: str, steps: range) -> Iterator[np.ndarray]:
    return (index.read_pixels(step, key) for step in steps)


def _texts(texts: Texts, rows: Sequence[int] | range) -> list[str]:
    return [texts.table[i] for i in texts.ids[list(rows)].tolist()]


# ---- To LeRobot ------------------------------------------------------------------------------------------------------


def lerobot_name(key: str, *, picture: bool) -> str:
    """Returns the name of a field in LeRobot: see the top of this file."""
    if "/" not in key:
        return key
    name = key.replace("/", ".")
    for prefix in ("observations.", "obs."):  # of HDF5
        if name.startswith(prefix):
            name = f"observation.{name.removeprefix(prefix)}"
    if not picture:
        return name
    return "observation.images." + name.removeprefix("observation.").removeprefix("images.")


def to_lerobot(
    directory: str | Path | Url,
    out: Path,
    conversion: Conversion | None = None,
    *,
    fps: float | None = None,
    text: str | None = None,
    instruction: str | None = None,
    videos: str | None = ENCODER,
    robot_type: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Converted:
    """Writes a dataset as LeRobot v3.0 at `out`, where it appears when it is complete.

    Its splits become ranges of episodes. LeRobot's own numbers (`OWN`) are written anew. A number of shape (1,) is one
    of shape () there.

    Args:
        fps: steps in a second, where the dataset does not say it.
        text: which field becomes the task; default the instruction, or the only text of steps. Others are columns of
            strings. instruction: the task of all steps, instead of a field.
        videos: an encoder, see `video_writer.ENCODERS`; None stores pictures, encoded as they are.
        robot_type: default that of the dataset, if it says one.

    Raises:
        DatasetError: all that cannot be converted and is not left out, and names that collide.
        FileExistsError: there is something at `out`.
        ValueError: pictures of a camera differ in size, or one cannot be decoded.
    """
    source = _Source(directory, conversion or Conversion())
    rename = source.conversion.rename
    rate = source.rate(fps)
    if rate is None:
        source.problems.append("how many steps are in a second is not known; give fps")
    task = _task(source, text) if instruction is None else None
    if instruction is not None and text is not None:
        source.problems.append(f"text {text!r} and instruction {instruction!r} are given, expected one of them")
    numbering = {k for k in OWN if k not in rename} if OWN.keys() <= source.fields.keys() else set()
    if "timestamp" in numbering - set(source.left_out) and rate is not None:
        source.problems += [p for i in source.indexes.values() if (p := _time_problem(i, rate))]
    columns = {k: f for k, f in source.kept.items() if k != task and k not in numbering}
    for key, feature in columns.items():
        if key in source.of_episodes:
            source.unfit[key] = "it is of whole episodes, LeRobot has steps"
        elif feature.kind == "image" and (feature.dtype != "uint8" or (feature.shape or (3,))[-1] != 3):
            what = f"its pictures are of type {feature.dtype} and shape {feature.shape} (depth?)"
            source.unfit[key] = f"{what}, LeRobot has colours"
    names = {k: rename.get(k, lerobot_name(k, picture=f.kind == "image")) for k, f in columns.items()}
    source.problems += [
        f"{key!r} would be called {name!r}, which LeRobot has for itself; give it another name with rename, or name it "
        "in leave_out"
        for key, name in names.items()
        if name in OWN or name == "task"
    ]
    source.check(names)
    assert rate is not None  # checked
    cameras = [key for key, feature in columns.items() if feature.kind == "image"]
    form = LeRobotFormat(rate, videos or ENCODER, source.robot_type if robot_type is None else robot_type)
    with LeRobotWriter(out, {names[k]: _column(f, videos) for k, f in columns.items()}, form) as writer:
        for done, (split, index, e, steps) in enumerate(source.episodes(), start=1):
            values: dict[str, Values] = {}
            for key, feature in columns.items():
                if feature.kind == "image":
                    values[names[key]] = (
                        _pixels(index, key, steps) if videos else source.pictures(index, key, steps)
                    )  # fmt: skip
                elif feature.kind == "text":
                    values[names[key]] = _texts(index.texts[key], steps)
                else:
                    values[names[key]] = np.asarray(index.columns[key][steps.start : steps.stop])
            tasks = _instructions(index, task, e, steps) if task else [instruction or ""] * len(steps)
            writer.add_episode(values, tasks, split)
            progress(done, source.total)
    encoded = [key for key in cameras if videos or not source.stored(key)]
    return source.converted(names | ({task: "task"} if task else {}), encoded)


def _column(feature: Feature, videos: str | None) -> Column:
    if feature.kind == "image":
        return Column("video" if videos else "image")
    if feature.kind == "text":
        return Column("string", names=_labels(feature))
    return Column(feature.dtype, tuple(d for d in feature.shape if d is not None), _labels(feature))


def _labels(feature: Feature) -> Any:
    """Returns what the values of a field are called, as LeRobot has it, or None."""
    return json.loads(feature.labels) if feature.labels else list(feature.names) or None


def _task(source: _Source, text: str | None) -> str | None:
    """Returns the key of the instruction; None adds a problem."""
    there = [key for key, feature in source.kept.items() if feature.kind == "text"]
    if text is not None:
        if text not in there:
            source.problems.append(f"text {text!r} is no field of text; {near_names(text, there)}")
        return text
    steps = [key for key in there if key not in source.of_episodes]
    for name in ("task", INSTRUCTION):
        if found := [key for key in (*steps, *there) if key == name or key.endswith(f"/{name}")]:
            return found[0]
    if len(steps) == 1:
        return steps[0]
    source.problems.append(f"which text is the task is not known; give text, one of {there}, or an instruction")
    return None


def _instructions(index: FrameIndex, task: str, episode: int, steps: range) -> list[str]:
    table = index.text_table(task)
    return [table[i] for i in index.text_ids(task, np.full(len(steps), episode), np.asarray(steps)).tolist()]


def _time_problem(index: FrameIndex, rate: float) -> str | None:
    """Returns what is lost when time stamps are written anew, if anything is."""
    seconds = index.columns["timestamp"].astype(np.float64).reshape(-1)
    frame = np.arange(index.steps) - np.repeat(index.episode_start[:-1], np.diff(index.episode_start))
    off = np.abs(seconds - frame / rate)
    off -= np.spacing(np.abs(seconds).astype(np.float32))
    if not (off > _NEAR).any():
        return None
    worst = int(np.argmax(off))
    return (
        f"'timestamp' is up to {off[worst]:.4f} s from that of {rate:g} steps in a second, which LeRobot needs (first "
        f"{index.where(int(np.argmax(off > _NEAR)))}); name it in leave_out, or keep it under another name with rename"
    )


# ---- To RLDS ---------------------------------------------------------------------------------------------------------


def rlds_name(key: str) -> str:
    """Returns the name of a field in RLDS: see the top of this file."""
    if key == "task":
        return INSTRUCTION
    return key if "/" in key else key.replace(".", "/")


def to_rlds(
    directory: str | Path | Url,
    out: Path,
    conversion: Conversion | None = None,
    *,
    fps: float | None = None,
    form: RldsFormat | None = None,
    progress: Progress = lambda done, total: None,
) -> Converted:
    """Writes a dataset as RLDS: the TFDS directory `out`, best called name/version, appears when it is complete.

    `is_first`, `is_last` and `is_terminal` are added where they are not there; `is_terminal` is then false, since
    nothing says that an episode ended by itself. metadata.json keeps the rate as `fps`, what LeRobot says of the robot
    as `robot_type`, and what values are called as `names`, by field.

    Raises:
        DatasetError: all that cannot be converted and is not left out, and names that collide.
        FileExistsError: there is something at `out`.
        ValueError: an episode is larger than a record can be.
    """
    source = _Source(directory, conversion or Conversion())
    rate = source.rate(fps)
    names = {key: source.conversion.rename.get(key, rlds_name(key)) for key in source.kept}
    for short, long in itertools.permutations(names, 2):
        if names[long].startswith(f"{names[short]}/") and (short in source.of_episodes) == (long in source.of_episodes):
            source.problems.append(
                f"{long!r} would be called {names[long]!r}, inside {names[short]!r} ({short!r}); give one of them "
                "another name with rename"
            )
    source.check(names)
    cameras = [key for key, feature in source.kept.items() if feature.kind == "image"]
    encodings = {
        key: source.index.image_encoding(0, key) if source.stored(key) else source.conversion.encoding
        for key in cameras
    }
    added = [name for name in ("is_first", "is_last", "is_terminal") if name not in names.values()]
    fields = [
        TableField(names[key], f.kind, f.dtype, f.shape, encodings.get(key), of_episode=key in source.of_episodes)
        for key, f in source.kept.items()
    ]
    fields += [TableField(name, "numeric", "bool", ()) for name in added]

    def tables() -> Iterator[tuple[str, EpisodeTable]]:
        for done, (split, index, e, steps) in enumerate(source.episodes(), start=1):
            table = EpisodeTable(index.where(steps.start), len(steps), {}, {})
            for key, feature in source.kept.items():
                if key in index.episode_texts:
                    table.episode[names[key]] = _texts(index.episode_texts[key], [e])[0]
                elif key in index.episode_columns:
                    table.episode[names[key]] = index.episode_columns[key][e]
                elif feature.kind == "image":
                    table.steps[names[key]] = source.pictures(index, key, steps)
                elif feature.kind == "text":
                    table.steps[names[key]] = _texts(index.texts[key], steps)
                else:
                    table.steps[names[key]] = np.asarray(index.columns[key][steps.start : steps.stop])
            at = np.arange(len(steps))
            marks = {"is_first": at == 0, "is_last": at == len(steps) - 1, "is_terminal": np.zeros(len(steps), bool)}
            table.steps.update({name: marks[name] for name in added})
            yield split, table
            progress(done, source.total)

    metadata: dict[str, Any] = {"converted_from": str(source.index.split.dataset)}
    called = {names[k]: of for k, f in source.kept.items() if (of := _labels(f)) is not None}
    known = {"fps": rate, "robot_type": source.robot_type, "names": called or None}
    metadata |= {key: value for key, value in known.items() if value is not None}
    write_tables(out, fields, list(source.indexes), tables(), metadata, form or RldsFormat())
    return source.converted(names, [key for key in cameras if not source.stored(key)])
