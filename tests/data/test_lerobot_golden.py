"""Datasets that lerobot recorded (`tests/bench/golden_lerobot.py`), read beside what lerobot returns for them."""

import json
from pathlib import Path

import numpy as np
import pytest

from openpi_like.data.index import open_index
from tests.conftest import REPOSITORY

GOLDEN = {"v2.1": "lerobot_v21", "v3.0": "lerobot_v30"}
LENGTHS = (6, 4, 7)


@pytest.mark.parametrize("version", GOLDEN)
def test_what_lerobot_recorded(version: str, tmp_path: Path) -> None:
    directory = REPOSITORY / "tests" / "data" / "golden" / GOLDEN[version]
    assert json.loads((directory / "meta" / "info.json").read_text())["codebase_version"] == version
    index = open_index(directory, "train", index_dir=tmp_path)
    assert np.diff(index.episode_start).tolist() == list(LENGTHS)
    with np.load(directory / "expected.npz") as file:
        expected = {key: file[key] for key in file.files}
    assert expected.keys() == index.columns.keys() | index.images.keys() | index.texts.keys()
    texts = index.texts["task"]
    assert [texts.table[i] for i in texts.ids] == expected["task"].tolist()
    for key, values in index.columns.items():
        np.testing.assert_array_equal(values.astype(expected[key].dtype), expected[key])  # lerobot has no float64
    assert {index.schema.steps[key].encoding for key in index.images} == {"video", "image"}
    for key in index.images:
        for step in (*range(index.steps), *reversed(range(index.steps))):
            np.testing.assert_array_equal(index.read_pixels(step, key), expected[key][step])
