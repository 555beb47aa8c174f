"""The program that writes nuScenes as RLDS: the dataset that comes back, its summary, and what it refuses."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from openpi_like.data.dataset import open_dataset
from openpi_like.data.stats import compute_normalization
from openpi_like.driving.nuscenes.episodes import to_episode
from openpi_like.driving.nuscenes.scenes import read_scenes
from openpi_like.driving.nuscenes.tables import read_tables
from openpi_like.robots.ego_vehicle import EGO_VEHICLE
from tests.driving.nuscenes_copy import LEFT, STRAIGHT, Curve, Drive, write_copy

REPOSITORY = Path(__file__).resolve().parents[2]
pytest.importorskip("tensorflow_datasets")
pytest.importorskip("tensorflow")
pytestmark = pytest.mark.filterwarnings("ignore")  # TensorFlow and TFDS warn of their own future
SHORT = Drive("scene-0916", Curve(0, 0, 0, 5.0), 3, can_bus=False)
OTHER = dataclasses.replace(LEFT, name="scene-1100", can_bus=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_copy(tmp_path_factory.mktemp("nuscenes"), (LEFT, STRAIGHT, SHORT, OTHER))


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("nuscenes_to_rlds", REPOSITORY / "data" / "nuscenes_to_rlds.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*words):
    return subprocess.run(
        [sys.executable, "data/nuscenes_to_rlds.py", *map(str, words)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def written(root, tmp_path_factory):
    lists = tmp_path_factory.mktemp("lists")
    (lists / "train.txt").write_text(f"{LEFT.name}\n{OTHER.name}\n")
    (lists / "val.txt").write_text(f"{STRAIGHT.name}\n{SHORT.name}\n")
    out = tmp_path_factory.mktemp("out")
    return out, run(root, "--scenes", lists / "train.txt", lists / "val.txt", "--out", out)


def test_what_comes_back_is_what_was_read(root, written):
    out, done = written
    assert done.returncode == 0, done.stderr
    scenes = {scene.name: scene for scene in read_scenes(read_tables(root, "v1.0-mini"))}
    for split, names in (("train", [LEFT.name, OTHER.name]), ("val", [STRAIGHT.name])):
        episodes = [to_episode(root, scenes[name]) for name in names]
        data = open_dataset(out / "nuscenes" / "1.0.0", EGO_VEHICLE, split)
        known = np.concatenate([e.steps["plan_known"] for e in episodes])
        assert len(data) == (known > 0).sum()
        assert data.removed == {"no entry of the plan is known": len(names)}
        plans, mask = data.actions(np.arange(len(data)))
        states, _, _ = data.encoded(np.arange(len(data)))
        np.testing.assert_array_equal(mask, np.arange(6) < known[known > 0, None])
        np.testing.assert_array_equal(plans[mask], np.concatenate([e.action for e in episodes])[known > 0][mask])
        np.testing.assert_allclose(states, np.concatenate([e.state for e in episodes])[known > 0], rtol=1e-6)
    normalization = compute_normalization(open_dataset(out / "nuscenes" / "1.0.0", EGO_VEHICLE, "train"))
    assert normalization.action.count == 6


def test_the_summary_says_what_was_written_and_left_out(written):
    out, done = written
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    # scenes, steps, cut plans, left out, without CAN bus, ms
    assert ["train", "2", "18", "12", "8", "9", "500"] in rows
    assert ["val", "1", "5", "5", "4", "5", "500"] in rows
    assert f"left out, fewer than 5 keyframes: {SHORT.name}" in done.stdout
    metadata = json.loads((out / "nuscenes" / "1.0.0" / "metadata.json").read_text())
    assert metadata["scenes"] == {"train": [LEFT.name, OTHER.name], "val": [STRAIGHT.name]}
    assert metadata["source"] == "nuScenes v1.0-mini"


def test_a_dataset_is_not_written_over(root, written):
    out, _ = written
    again = run(root, "--out", out)
    assert again.returncode != 0
    assert "exists; delete it" in again.stderr
    assert "Traceback" not in again.stderr


def test_every_scene_where_none_is_chosen(root, program, tmp_path):
    program.main(program.Args(root, tmp_path, beginning="extrapolate", name="own"), Console(quiet=True))
    data = open_dataset(tmp_path / "own" / "1.0.0", EGO_VEHICLE, "every")
    assert len(data) == 13 + 9 + 3 + 13 - 4


def test_what_is_refused(root, program, tmp_path):
    lists = tmp_path / "mini_val.txt"
    lists.write_text("scene-0061\n")
    short = tmp_path / "short.txt"
    short.write_text(f"{SHORT.name}\n")
    for given, expected in (
        ({"split": ("mini_train",)}, ["no scene 'scene-0553'", "no scene 'scene-1077'"]),
        (
            {"split": ("mini_trian", "val"), "scenes": (tmp_path / "no.txt",)},
            ["'mini_trian' is not known here, did you mean", "'val' is not known here", "no.txt: No such file"],
        ),
        ({"split": ("mini_train",), "scenes": (lists,)}, ["share 1 scenes, such as scene-0061"]),
        ({"split": ("mini_val",), "scenes": (lists,)}, ["split 'mini_val' is given twice"]),
        ({"scenes": (short,)}, ["all scenes of short are too short"]),
        ({"version": "v1.0-trainval"}, ["no folder v1.0-trainval"]),
    ):
        with pytest.raises(ValueError, match="") as caught:  # noqa: PT011
            program.main(program.Args(root, tmp_path / "out", **given), Console(quiet=True))
        assert [text for text in expected if text not in str(caught.value)] == []
    assert not (tmp_path / "out").exists()


def test_pictures_are_missed_before_anything_is_written(program, tmp_path):
    root = write_copy(tmp_path / "nuscenes", (LEFT,))
    next((root / "samples" / "CAM_FRONT").iterdir()).unlink()
    with pytest.raises(ValueError, match=f"{LEFT.name}: 1 of 78 are missing or empty, the first: samples/CAM_FRONT/"):
        program.main(program.Args(root, tmp_path / "out"), Console(quiet=True))
    assert not (tmp_path / "out").exists()
