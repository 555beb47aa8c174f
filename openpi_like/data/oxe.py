"""The Open X-Embodiment (OXE) collection as data: what each dataset needs to be read well, and mixtures of them.

What the numbers mean is in `openpi_like.robots.oxe`; what the sources dispute, in `oxe_disputed`.
"""

import dataclasses
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from openpi_like.config import near_names
from openpi_like.data import files
from openpi_like.data.config import MixtureEntry
from openpi_like.data.dataset import open_dataset
from openpi_like.data.schema import DatasetError
from openpi_like.data.selection import Selection
from openpi_like.robots.dataset_copies import with_channel_order, with_upside_down
from openpi_like.robots.oxe import ROBOTS
from openpi_like.robots.robot import Robot

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class OxeDataset:
    """How one dataset is read.

    version: the one that `robot` was written for. folders: names that its directory goes by, besides its TFDS name.
    train, val: splits; where a dataset has one split only, its last twentieth is held out, as octo and openvla do.
    selection: what its users leave out. uninformative: octo blanks its instructions, which do not say what is done.
    """

    robot: Robot
    version: str = "0.1.0"
    folders: tuple[str, ...] = ()
    train: str = "train[:95%]"
    val: str = "train[95%:]"
    selection: Selection = Selection()
    uninformative: bool = False


_TEST = {"train": "train", "val": "test"}
_VAL = {"train": "train", "val": "val"}
_HOW: dict[str, dict[str, Any]] = {
    # RT-X and its successors train on successes only; the dataset has 580,392 attempts.
    "kuka": {"selection": Selection(success="success"), "uninformative": True},
    "bridge_dataset": {"version": "1.0.0", "folders": ("bridge_orig",), **_VAL},
    "bridge": {"folders": ("bridge_oxe",), "selection": Selection(skip_first=1), **_TEST},  # the first command is none
    "taco_play": _TEST,
    "jaco_play": _TEST,
    "berkeley_cable_routing": {"uninformative": True, **_TEST},
    "roboturk": {"uninformative": True, **_TEST},
    "nyu_door_opening_surprising_effectiveness": {"uninformative": True, **_TEST},
    "viola": {"uninformative": True, **_TEST},
    "berkeley_autolab_ur5": _TEST,
    "toto": {"uninformative": True, **_TEST},
    "stanford_hydra_dataset_converted_externally_to_rlds": {"uninformative": True},
    "austin_buds_dataset_converted_externally_to_rlds": {"uninformative": True},
    "nyu_franka_play_dataset_converted_externally_to_rlds": {"uninformative": True, **_VAL},
    "austin_sailor_dataset_converted_externally_to_rlds": {"uninformative": True},
    "austin_sirius_dataset_converted_externally_to_rlds": {"uninformative": True},
    "bc_z": {"selection": Selection(success="observation/episode_success"), **_VAL},
    "utaustin_mutex": {"uninformative": True},
    "dobbe": {"version": "0.0.1"},
    "fmb": {"version": "0.0.1", "folders": ("fmb_dataset",)},
    # `file_path` says whether it was a success. To leave out idle steps, give `keep_ranges` the published file.
    "droid": {
        "version": "1.0.1",
        "selection": Selection(success="episode_metadata/file_path", success_pattern="success"),
    },
    "libero_spatial_no_noops": {"version": "1.0.0"},
    "libero_object_no_noops": {"version": "1.0.0"},
    "libero_goal_no_noops": {"version": "1.0.0"},
    "libero_10_no_noops": {"version": "1.0.0"},
    "aloha_static_dataset": {"version": "1.0.0"},
    "aloha_mobile": {"version": "0.0.1", "folders": ("aloha_mobile_dataset",)},
}
# TFDS name -> how it is read
OXE: dict[str, OxeDataset] = {name: OxeDataset(robot, **_HOW.get(name, {})) for name, robot in ROBOTS.items()}

_EXTERNALLY = "_converted_externally_to_rlds"
_SOUP = {  # of octo and openvla
    "fractal20220817_data": 0.54087122203,
    "kuka": 0.8341046294,
    "bridge_dataset": 1.0,
    "taco_play": 2.0,
    "jaco_play": 1.0,
    "berkeley_cable_routing": 1.0,
    "roboturk": 2.0,
    "viola": 2.0,
    "berkeley_autolab_ur5": 2.0,
    "toto": 1.0,
    "language_table": 0.1,
    f"stanford_hydra_dataset{_EXTERNALLY}": 2.0,
    f"austin_buds_dataset{_EXTERNALLY}": 1.0,
    f"nyu_franka_play_dataset{_EXTERNALLY}": 3.0,
    f"furniture_bench_dataset{_EXTERNALLY}": 0.1,
    f"ucsd_kitchen_dataset{_EXTERNALLY}": 2.0,
    f"austin_sailor_dataset{_EXTERNALLY}": 1.0,
    f"austin_sirius_dataset{_EXTERNALLY}": 1.0,
    f"dlr_edan_shared_control{_EXTERNALLY}": 1.0,
    f"iamlab_cmu_pickup_insert{_EXTERNALLY}": 1.0,
    "utaustin_mutex": 1.0,
    "berkeley_fanuc_manipulation": 2.0,
    "cmu_stretch": 1.0,
}
# name -> dataset -> weight, as published
MIXTURES: dict[str, dict[str, float]] = {
    # octo's 25; openvla's of this name is without the last two
    "oxe_magic_soup": {**_SOUP, "nyu_door_opening_surprising_effectiveness": 1.0, "bc_z": 0.2},
    # openvla's 27
    "oxe_magic_soup_plus": {**_SOUP, "bc_z": 0.2, "fmb": 1.0, "dobbe": 0.2, "droid": 0.06},
    # octo's 11, of RT-1-X; openvla's is without the last one
    "rtx": {
        "fractal20220817_data": 0.54087122203,
        "kuka": 0.8341046294,
        "bridge_dataset": 1.0,
        "taco_play": 2.0,
        "jaco_play": 2.0,
        "berkeley_cable_routing": 3.0,
        "roboturk": 1.0,
        "viola": 2.0,
        "berkeley_autolab_ur5": 1.0,
        "toto": 1.0,
        "nyu_door_opening_surprising_effectiveness": 5.0,
    },
    "bridge": {"bridge_dataset": 1.0},
    "droid": {"droid": 1.0},
}


def mixture(
    name: str | Mapping[str, float],
    root: str | Path,
    *,
    balance: str = "transitions",
    images: str = "published",
    upside_down: Mapping[str, Collection[str]] | None = None,
    blank_language: bool = False,
    missing: str = "error",
    index_dir: str | Path | None = None,
    max_corrupt_fraction: float = 0.0,
) -> tuple[MixtureEntry, ...]:
    """Returns the entries of a mixture, for `DataConfig`.

    Args:
        name: of `MIXTURES`, or weights by the names of `OXE`.
        root: the directory (or URL) that holds a directory per dataset: `root/kuka/0.1.0`. A dataset that is there in
            one other version is taken in that, and a warning says so.
        balance: "transitions" multiplies weights by the number of training frames, as octo and openvla do; it opens
            every dataset, and builds the indexes that are not there. With "as_given" weights are shares of samples.
        images: "published" reads channels as the datasets of the OXE bucket have them, of which four are BGR; "rgb" is
            for copies in which that has been corrected.
        upside_down: dataset -> cameras whose pictures are stored upside down in your copy, and are turned. None turns
            none; `robots.oxe_disputed.UPSIDE_DOWN` are those that one source turns. Datasets that are not in the
            mixture may be in it.
        blank_language: replace instructions that do not say what is done by "", as octo does.
        missing: "error", or "skip" to go on without datasets that are not there, which are named in a warning; "expect"
            names them too, and takes them to be there when the run is: for planning it where its data are not. Then
            nothing is balanced.
        index_dir, max_corrupt_fraction: as in `DataConfig`, see `open_index`; needed where datasets are opened.

    Raises:
        ValueError: there is no such mixture or choice.
        DatasetError: lists all datasets that are not there, with what is, or all that cannot be opened, with why.
    """
    choices = {
        "balance": (balance, ("transitions", "as_given")),
        "images": (images, ("published", "rgb")),
        "missing": (missing, ("error", "skip", "expect")),
    }
    problems = [f"{k}={v!r}, expected one of {allowed}" for k, (v, allowed) in choices.items() if v not in allowed]
    if isinstance(name, str) and name not in MIXTURES:
        problems.append(f"no mixture {name!r}; {near_names(name, list(MIXTURES))}")
    weights = MIXTURES.get(name, {}) if isinstance(name, str) else name
    turned = upside_down or {}
    robots: dict[str, Robot] = {}
    for dataset in dict.fromkeys((*weights, *turned)):
        if dataset not in OXE:
            problems.append(f"no dataset {dataset!r} in the catalogue; {near_names(dataset, list(OXE))}")
            continue
        robot = OXE[dataset].robot if images == "published" else with_channel_order(OXE[dataset].robot, "rgb")
        try:
            robots[dataset] = with_upside_down(robot, turned.get(dataset, ()))
        except ValueError as e:
            problems.append(f"upside_down: {e}")
    if problems:
        raise ValueError("mixture: " + "; ".join(problems))

    entries, lacking = [], []
    for dataset, weight in weights.items():
        how, path = OXE[dataset], _find(dataset, files.locate(root))
        if isinstance(path, DatasetError):
            lacking.append(str(path))
            if missing != "expect":
                continue
            path = files.locate(root) / dataset / how.version
        entry = MixtureEntry(
            robot=robots[dataset],
            path=str(path),
            weight=weight,
            split=how.train,
            val_split=how.val,
            selection=how.selection,
            blank_language=blank_language and how.uninformative,
        )
        entries.append(entry)
    listed = "\n  ".join(lacking)
    if lacking and (missing == "error" or not entries):
        place = files.locate(root)
        raise DatasetError(f"{len(lacking)} of {len(weights)} datasets are not in {place}:\n  {listed}")
    if lacking and missing == "skip":
        _log.warning("mixture goes on without %d of %d datasets:\n  %s", len(lacking), len(weights), listed)
    elif lacking:
        first = ", ".join(line.partition(":")[0] for line in lacking[:3])
        _log.warning("mixture is not balanced: %d of %d datasets are not there (%s)", len(lacking), len(weights), first)
    if balance == "transitions" and (missing != "expect" or not lacking):
        entries = _balanced(entries, index_dir, max_corrupt_fraction)
    return tuple(entries)


def _find(dataset: str, root: files.Location) -> files.Location | DatasetError:
    """Returns where a dataset is below `root`, or what is wrong."""
    how = OXE[dataset]
    try:
        there = files.list_directories(root)
        folders = [f for f in (dataset, *how.folders) if f in there]
        if not folders:
            return DatasetError(f"{dataset}: not there; {near_names(dataset, there)}")
        versions = [v for v in files.list_directories(root / folders[0]) if not v.startswith(".")]
    except OSError as e:
        return DatasetError(f"{dataset}: cannot list {root}: {e}")
    if how.version in versions:
        return root / folders[0] / how.version
    if len(versions) != 1:
        return DatasetError(f"{dataset}: no version {how.version}; there: {', '.join(versions) or 'none'}")
    _log.warning("%s: taking version %s, the catalogue is for %s", dataset, versions[0], how.version)
    return root / folders[0] / versions[0]


def _balanced(
    entries: list[MixtureEntry], index_dir: str | Path | None, max_corrupt_fraction: float
) -> list[MixtureEntry]:
    """Returns the entries with their weights times their numbers of training frames."""
    balanced, wrong = [], []
    for entry in entries:
        try:
            dataset = open_dataset(
                entry.path,
                entry.robot,
                entry.split,
                selection=entry.selection,
                index_dir=index_dir,
                max_corrupt_fraction=max_corrupt_fraction,
            )
        except DatasetError as e:
            wrong.append(str(e))
            continue
        dataset.close()
        balanced.append(dataclasses.replace(entry, weight=entry.weight * len(dataset)))
    if wrong:
        raise DatasetError(f"{len(wrong)} of {len(entries)} datasets cannot be opened:\n" + "\n".join(wrong))
    return balanced
