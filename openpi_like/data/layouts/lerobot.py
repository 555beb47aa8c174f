"""LeRobot datasets, read in place."""

import dataclasses
import logging

import numpy as np

from openpi_like.config import near_names
from openpi_like.data.files import Location
from openpi_like.data.index_build import digest, some_of
from openpi_like.data.layouts.layout import is_file
from openpi_like.data.layouts.lerobot_info import INFO, file_stats, folders, join, read_info, read_json, read_splits
from openpi_like.data.layouts.lerobot_meta import meta_files, read_episodes, read_schema
from openpi_like.data.layouts.lerobot_storage import LeRobotStorage
from openpi_like.data.schema import DatasetError, Schema, Split

_READER = 3  # an index that an older reader has built, which took more for whole, is built again

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LeRobotLayout:
    """A directory with `meta/info.json`."""

    marker: str = INFO

    def is_at(self, directory: Location) -> bool:
        return is_file(directory / "meta" / "info.json")

    def schema(self, directory: Location) -> Schema:
        return read_schema(directory)

    def split_names(self, directory: Location) -> list[str]:
        splits = read_splits(directory, read_info(directory))
        return [name for name, (first, end) in splits.items() if first < end]

    def read(self, directory: Location, split: str, *, allow_missing: bool) -> tuple[Split, Schema]:
        info = read_info(directory)
        ranges = read_splits(directory, info)
        if split not in ranges:
            raise DatasetError(
                f"{directory}: no split {split!r}; {near_names(split, list(ranges))}; a part of one is a split too, as "
                f"'{next(iter(ranges))}[90%:]'"
            )
        first, end = ranges[split]
        if first >= end:
            raise DatasetError(f"{directory}: split {split!r} is empty, {first}:{end} by {INFO}; take another")
        episodes = read_episodes(directory)
        chosen = (episodes.number >= first) & (episodes.number < end)
        if not chosen.any():
            raise DatasetError(f"{directory}: split {split!r} is episodes {ranges[split]}, and none of them is there")
        if chosen.sum() < end - first:
            raise DatasetError(
                f"{directory}: split {split!r} is episodes {first}:{end} by {INFO}, of which meta/ lists "
                f"{int(chosen.sum())}, the last is {int(episodes.number[chosen][-1])}; put the range right"
            )
        _tell_strays(directory, episodes.tables)
        needed = [int(i) for i in np.unique(episodes.table[chosen])]
        names = [episodes.tables[i] for i in needed]
        videos = sorted(
            {episodes.videos[key][i] for key, of in episodes.video.items() for i in np.unique(of[chosen]).tolist()}
        )
        stats = dict(file_stats(directory, [*names, *videos, *meta_files(directory)]))
        missing = [name for name in (*names, *videos) if name not in stats]
        if (missing and not allow_missing) or not any(name in stats for name in names):
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise DatasetError(
                f"{directory}: {len(missing)} files of split {split!r} are missing: {shown}; copy them again, or "
                "allow it with max_corrupt_fraction"
            )
        beside = {name: dataclasses.astuple(stat) for name, stat in stats.items() if name not in names}
        found = Split(
            name=split,
            dataset=directory.name,
            version=str(info["codebase_version"]),
            storage=LeRobotStorage(directory),
            shards=tuple(join(directory, name) for name in names),
            lengths=tuple(int((episodes.table[chosen] == i).sum()) for i in needed),
            stats=tuple(stats.get(name) for name in names),
            companions=digest([_READER, beside, sorted(missing)]),
            rate=float(info["fps"]),
            robot_type=info.get("robot_type"),
        )
        return found, read_schema(directory)


def _tell_strays(directory: Location, tables: list[str]) -> None:
    """Warns of tables that no episode is in by `meta/`: a recording that was stopped, or one of another dataset."""
    known = set(tables)
    there = [f"{folder}/{name}" for folder, names in folders(directory, tables).items() for name in names]
    if strays := [name for name in there if name.endswith(".parquet") and name not in known]:
        _log.warning("%s: meta/ has no episodes in these tables, which are not read:\n  %s", directory, some_of(strays))


class OldLeRobotLayout:
    """A LeRobot dataset of version 1, which is known only to say what to do with it."""

    marker = "meta_data/info.json"

    def is_at(self, directory: Location) -> bool:
        return is_file(join(directory, self.marker))

    def schema(self, directory: Location) -> Schema:
        raise self._refusal(directory)

    def split_names(self, directory: Location) -> list[str]:
        raise self._refusal(directory)

    def read(self, directory: Location, split: str, *, allow_missing: bool) -> tuple[Split, Schema]:
        raise self._refusal(directory)

    def _refusal(self, directory: Location) -> DatasetError:
        version = read_json(join(directory, self.marker)).get("codebase_version", "v1.x")
        return DatasetError(
            f"{directory} is a LeRobot dataset of version {version} (it has {self.marker}), expected v2.0, v2.1 or "
            "v3.x; convert it with lerobot 0.3.3, of the dataset on the Hugging Face hub: python -m "
            "lerobot.datasets.v2.convert_dataset_v1_to_v2 --repo-id ID --single-task 'what is done', which gives v2.0"
        )
