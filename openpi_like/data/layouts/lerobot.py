"""LeRobot datasets, read in place."""

import dataclasses

import numpy as np

from openpi_like.config import near_names
from openpi_like.data.files import Location
from openpi_like.data.index_build import digest
from openpi_like.data.layouts.layout import is_file
from openpi_like.data.layouts.lerobot_meta import (
    INFO,
    file_stats,
    join,
    meta_files,
    read_episodes,
    read_info,
    read_schema,
    read_splits,
)
from openpi_like.data.layouts.lerobot_storage import LeRobotStorage
from openpi_like.data.schema import DatasetError, Schema, Split


@dataclasses.dataclass(frozen=True)
class LeRobotLayout:
    """A directory with `meta/info.json`."""

    marker: str = INFO

    def is_at(self, directory: Location) -> bool:
        return is_file(directory / "meta" / "info.json")

    def schema(self, directory: Location) -> Schema:
        return read_schema(directory)

    def split_names(self, directory: Location) -> list[str]:
        return list(read_splits(directory, read_info(directory)))

    def read(self, directory: Location, split: str, *, allow_missing: bool) -> tuple[Split, Schema]:
        info = read_info(directory)
        ranges = read_splits(directory, info)
        if split not in ranges:
            raise DatasetError(
                f"{directory}: no split {split!r}; {near_names(split, list(ranges))}; a part of one is a split too, as "
                f"'{next(iter(ranges))}[90%:]'"
            )
        episodes = read_episodes(directory)
        chosen = np.isin(episodes.number, np.arange(*ranges[split]))
        if not chosen.any():
            raise DatasetError(f"{directory}: split {split!r} is episodes {ranges[split]}, and none of them is there")
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
            companions=digest([beside, sorted(missing)]),
            rate=float(info["fps"]),
            robot_type=info.get("robot_type"),
        )
        return found, read_schema(directory)
