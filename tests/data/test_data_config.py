"""Configs of data: stored, described, opened; and settings without meaning."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from openpi_like.config import from_json, to_json
from openpi_like.data.config import DataConfig, MixtureEntry, describe, open_datasets
from openpi_like.data.damage import check_images
from openpi_like.data.index import open_index
from openpi_like.data.schema import DatasetError
from tests.data.toy import ARM, change_record, shard


def test_damage_of_a_camera_that_is_not_read_does_not_matter(config: DataConfig, copy: Path) -> None:
    whole = open_index(copy, "train").read_image(5, "observation/wrist")
    change_record(shard(copy), 0, lambda data: data.replace(whole, b"x" * len(whole)))
    check_images(open_index(copy, "train"))
    config = dataclasses.replace(config, entries=(dataclasses.replace(config.entries[0], path=str(copy)),))
    with pytest.raises(DatasetError, match="at 1 of 110 steps an image of its cameras is damaged"):
        open_datasets(config)
    (dataset,) = open_datasets(dataclasses.replace(config, drop_cameras=("wrist",)))
    assert dataset is not None
    assert len(dataset) == 110
    dataset.close()


def test_configs_are_stored_as_json(config: DataConfig) -> None:
    assert from_json(to_json(config)) == config


def test_describe(config: DataConfig) -> None:
    description = describe(config)
    assert description.renderers == {"arm": "ray", "cart": "ray"}
    assert description.frames == {"arm": 110, "cart": 19}
    assert description.episodes == {"arm": 12, "cart": 3}


def test_all_datasets_that_cannot_be_opened_are_listed(load: Any, config: DataConfig) -> None:
    entries = tuple(dataclasses.replace(e, split=f"{e.split}x") for e in config.entries)
    with pytest.raises(DatasetError, match=r"(?s)no split 'trainx'; .*no split 'valx'; "):
        load(entries=entries)


def test_settings_without_meaning_are_listed(config: DataConfig, load: Any) -> None:
    with pytest.raises(ValueError, match=r"weight 0.0 of x, .*; frame_stride=0, expected at least 1; .*max_corrupt"):
        DataConfig((MixtureEntry(ARM, "x", weight=0.0),), frame_stride=0, max_corrupt_fraction=1.5)
    with pytest.raises(ValueError, match=r"num_workers=-1, .*; group_episodes=0, .*; camera_dropout=1.0, exp"):
        DataConfig((MixtureEntry(ARM, "x"),), num_workers=-1, group_episodes=0, camera_dropout=1.0)
    with pytest.raises(ValueError, match="no entries"):
        DataConfig(())
    with pytest.raises(ValueError, match="batch_size=8 on 3 hosts, host 0, start=0; expected a batch_size that"):
        load(process_count=3)
