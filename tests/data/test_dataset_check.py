"""What of a dataset does not fit a robot or a selection is named, with near names and places."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest

from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.index import open_index
from openpi_like.data.schema import DatasetError
from openpi_like.robots import ActionField, Camera, Gripper, Robot, StateField
from tests.data.toy import ARM, change_record, shard
from tests.data.toy_dataset import STEPS, acting, problem, with_columns


def problems_of(directory: Path, robot: Robot) -> str:
    with pytest.raises(DatasetError) as e:
        EpisodeDataset(open_index(directory, "train"), robot)
    return str(e.value)


def test_all_wrong_keys_are_named_with_near_ones(toy: Path) -> None:
    robot = dataclasses.replace(
        ARM,
        cameras=(Camera("base", "observation/imagee"), Camera("wrist", "observation/state")),
        state=(*ARM.state, StateField("far", "observation/state", 3, start=2), StateField("big", "embedding", 300)),
        action=(dataclasses.replace(ARM.action[0], key="actions"),),
        language_key="language_instructions",
    )
    text = problems_of(toy, robot)
    for expected in (
        "does not fit robot 'arm'",
        "camera 'base': the dataset has no 'observation/imagee'; did you mean 'observation/image'",
        "camera 'wrist': 'observation/state' is a field of kind 'numeric'; fields that fit: 'observation/image'",
        "state field 'far': takes values 2 to 4 of 'observation/state', which has 4",
        "state field 'big': 'embedding' is not in the index, because it has 300 values, more than 256",
        "action field 'hand': the dataset has no 'actions'; did you mean 'action'",
        "language_key: the dataset has no 'language_instructions'; did you mean 'language_instruction'",
    ):
        assert expected in text


def test_images_of_another_size_than_the_robots_camera(toy: Path) -> None:
    cameras = (Camera("base", "observation/image", 12, 18), Camera("wrist", "observation/wrist", 16, 24))
    text = problems_of(toy, dataclasses.replace(ARM, cameras=cameras))
    assert "observation/image is 12 x 16 pixels, camera 'base' of robot 'arm' expects 12 x 18" in text
    assert "observation/wrist is 24 x 16 pixels, camera 'wrist' of robot 'arm' expects 16 x 24" in text


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_located(copy: Path, value: float) -> None:
    index = open_index(copy, "train")
    good = index.columns["action"][int(index.episode_start[6]) + 2]
    bad = good.copy()
    bad[1] = value
    change_record(shard(copy, 1), 1, lambda data: data.replace(good.tobytes(), bad.tobytes()))
    text = problems_of(copy, ARM)
    assert "toy_arm/1.0.0 split 'train', episode 6, step 2 (toy_arm-train.tfrecord-00001, record 1)" in text
    assert f"action field 'hand' (action) is [{good[0]}, {value}], expected finite numbers" in text
    assert "gripper" not in text  # it is finite


def test_a_selection_by_fields_that_are_not_there(dataset: EpisodeDataset) -> None:
    text = problem(
        dataset,
        dataclasses.replace(ARM, language_alternatives=("language_instruction_2",)),
        success="episode_metadata/sucess",
        keep_ranges="x.json",
        idle_below=0.1,
    )
    assert (
        "selection.success: the dataset has no 'episode_metadata/sucess'; did you mean 'episode_metadata/succ" in text
    )
    assert "keep_ranges_key: the dataset has no 'episode_metadata/recording_folderpath'" in text
    assert "language_alternatives: the dataset has no 'language_instruction_2'; did you mean 'language_ins" in text
    assert "'observation/state' has shape (4,), expected one number" in problem(dataset, success="observation/state")
    assert "'episode_metadata/success' is a field of kind 'numeric'" in problem(
        dataset, success="episode_metadata/success", success_pattern="x"
    )
    fixed = acting(ActionField("gripper", "action", 1, gripper=Gripper(1.0, 0.0)))
    assert "no action field is a delta, a velocity or relative" in problem(dataset, fixed, idle_below=0.1)


def test_a_gripper_that_is_not_as_described(dataset: EpisodeDataset, caplog: pytest.LogCaptureFixture) -> None:
    action = np.array(dataset.index.columns["action"])
    action[:, 2] = np.where(np.arange(STEPS) < 100, -1.0, 1.2)
    with caplog.at_level(logging.WARNING):
        EpisodeDataset(with_columns(dataset.index, action=action), ARM)
    assert (
        "action field 'gripper' lies outside closed=1 to open=-1 in 10 of 110 steps (-1 to 1.2); is that what this "
        "dataset stores?" in caplog.text
    )
