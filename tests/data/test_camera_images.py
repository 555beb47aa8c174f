"""Which images a camera shows, looks back to or lacks; and which of them are damaged."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_like.data.damage import check_images
from openpi_like.data.dataset import EpisodeDataset, open_dataset
from openpi_like.data.index import open_index
from openpi_like.data.schema import DatasetError
from openpi_like.robots import Camera
from tests.data.toy import ARM, change_record, shard
from tests.data.toy_dataset import START, STEPS, by_step, kept_steps, with_damage

PAST = dataclasses.replace(ARM, cameras=(*ARM.cameras, Camera("past", "observation/image", steps_back=2)))


@settings(max_examples=20, deadline=None)
@given(
    st.sets(st.integers(0, STEPS - 1), max_size=40),
    st.sets(st.integers(0, STEPS - 1), max_size=40),
    st.sampled_from([1, 3]),
    st.sampled_from([7, 1 << 16]),
)
def test_frames_show_no_damaged_image(
    dataset: EpisodeDataset, image: set[int], wrist: set[int], stride: int, block: int
) -> None:
    """Neither now nor in the past; what no camera shows is no matter, nor are images of other keys."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("openpi_like.data.blocks.BLOCK", block)
        index = with_damage(dataset.index, image=image, wrist=wrist, other={0})
        seeing = EpisodeDataset(index, PAST, frame_stride=stride, max_corrupt_fraction=0.99)
    frames = EpisodeDataset(dataset.index, PAST, frame_stride=stride)
    episode = np.searchsorted(START, np.arange(STEPS), side="right") - 1
    expected = [
        s
        for s in kept_steps(frames)
        if s not in image | wrist and not (s - 2 in image and episode[s - 2] == episode[s])
    ]
    assert kept_steps(seeing) == expected
    lost = len(frames) - len(expected)
    assert seeing.removed == ({"damaged image": lost} if lost else {})
    for camera in PAST.cameras:
        shown = seeing.present(np.arange(len(seeing)), camera)
        at = seeing.steps(np.arange(len(seeing)))[shown] - camera.steps_back
        assert not set(at.tolist()) & (wrist if camera.name == "wrist" else image)


def test_damaged_images_are_told(dataset: EpisodeDataset, caplog: pytest.LogCaptureFixture) -> None:
    index = with_damage(dataset.index, image=range(8, 15), wrist={9, 40})
    seeing = EpisodeDataset(index, ARM, max_corrupt_fraction=0.08)
    assert seeing.removed == {"damaged image": 8}
    warning = next(r.getMessage() for r in caplog.records if "damaged" in r.getMessage())
    assert "at 8 of 110 steps an image of robot 'arm' is damaged; they are left out:" in warning
    assert "episode 2, step 4 (toy_arm-train.tfrecord-00000, record 2): observation/image\n" in warning
    assert "... and 2 more images of observation/image\n" in warning
    assert "episode 6, step 3 (toy_arm-train.tfrecord-00001, record 1): observation/wrist" in warning


def test_more_damaged_images_than_tolerated(dataset: EpisodeDataset) -> None:
    index = with_damage(dataset.index, image=range(8, 15), wrist={9, 40})
    for tolerated in (0.0, 0.07):
        with pytest.raises(DatasetError) as error:
            EpisodeDataset(index, ARM, max_corrupt_fraction=tolerated)
        for part in (
            f"at 8 of 110 steps an image of its cameras is damaged, tolerated are {tolerated:g} of them",
            "(max_corrupt_fraction); copy these files again, or tolerate them:",
            "episode 2, step 0 (toy_arm-train.tfrecord-00000, record 2): observation/image",
            "... and 2 more images of observation/image",
        ):
            assert part in str(error.value)
    one = dataclasses.replace(ARM, cameras=ARM.cameras[1:])
    assert EpisodeDataset(index, one, max_corrupt_fraction=0.02).removed == {"damaged image": 2}
    start = EpisodeDataset(index, ARM, episodes=range(2))  # steps 0 to 7, where all is well
    assert (len(start), start.removed) == (8, {})


def test_damaged_images_of_an_absent_camera_are_no_matter(dataset: EpisodeDataset) -> None:
    lengths = dataset.index.images["observation/wrist"][:, 1]
    camera = Camera("wrist", "observation/wrist", min_bytes=int(np.median(lengths)) + 1)
    absent = np.flatnonzero(lengths < camera.min_bytes).tolist()
    robot = dataclasses.replace(ARM, cameras=(ARM.cameras[0], camera))
    assert len(EpisodeDataset(with_damage(dataset.index, wrist=absent), robot)) == STEPS
    one = int(np.argmax(lengths))
    assert len(EpisodeDataset(with_damage(dataset.index, wrist=[one]), robot, max_corrupt_fraction=0.01)) == STEPS - 1


def test_a_checked_dataset_opens_and_is_read_without_its_damaged_images(copy: Path) -> None:
    """Before it is checked, opening stops at its first image and says what to do."""
    index = open_index(copy, "train")
    whole = index.read_image(0, "observation/image")
    change_record(shard(copy), 0, lambda data: data.replace(whole, b"x" * len(whole)))
    with pytest.raises(
        DatasetError, match=r"step 0 .*cannot decode .*camera 'base'.*data/index\.py --decode finds all"
    ):
        open_dataset(copy, ARM, "train", max_corrupt_fraction=0.01)
    check_images(open_index(copy, "train"))
    with pytest.raises(DatasetError, match=r"(?s)at 1 of 110 steps .*record 0\): observation/image"):
        open_dataset(copy, ARM, "train")
    dataset = open_dataset(copy, ARM, "train", max_corrupt_fraction=0.01)
    assert kept_steps(dataset) == list(range(1, STEPS))
    out = np.empty((STEPS - 1, 12, 16, 3), np.uint8)
    dataset.images_into(np.arange(STEPS - 1), ARM.cameras[0], list(out))
    np.testing.assert_array_equal(out, [dataset.image(i, ARM.cameras[0]) for i in range(STEPS - 1)])


def test_history_is_a_camera_that_looks_back(dataset: EpisodeDataset) -> None:
    past = Camera("past", "observation/image", steps_back=2)
    robot = dataclasses.replace(ARM, cameras=(*ARM.cameras, past))
    with_past = EpisodeDataset(dataset.index, robot)
    present = with_past.present(np.arange(STEPS), past)
    assert np.flatnonzero(present).tolist() == by_step(lambda e, t: t >= 2)
    assert with_past.present(np.arange(STEPS), ARM.cameras[0]).all()
    for frame in np.flatnonzero(present)[::9]:
        np.testing.assert_array_equal(with_past.image(int(frame), past), dataset.image(int(frame) - 2, ARM.cameras[0]))
    with pytest.raises(
        DatasetError, match=r"episode 2, step 1 .* camera 'past' shows 2 steps before, when the episode"
    ):
        with_past.image(int(START[2]) + 1, past)


def test_images_that_are_too_small_are_absent(dataset: EpisodeDataset) -> None:
    lengths = dataset.index.images["observation/wrist"][:, 1]
    least = int(np.median(lengths)) + 1
    camera = Camera("wrist", "observation/wrist", min_bytes=least)
    present = dataset.present(np.arange(STEPS), camera)
    np.testing.assert_array_equal(present, lengths >= least)
    assert 0 < present.sum() < STEPS


@pytest.mark.parametrize("looks_back", [False, True])
def test_an_absent_image_need_not_be_one(copy: Path, looks_back: bool) -> None:
    """The first image that is shown is looked at when a dataset is opened, not those that are absent."""
    index = open_index(copy, "train")
    step = int(index.episode_start[1]) if looks_back else 0  # episode 1 has one step, so nothing looks back to it
    whole = index.read_image(step, "observation/image")
    change_record(shard(copy), int(looks_back), lambda data: data.replace(whole, b"x" * len(whole)))
    part = "train[9%:]" if looks_back else "train"
    camera = Camera("base", "observation/image", steps_back=1)
    if not looks_back:
        camera = Camera("base", "observation/image", min_bytes=len(whole) + 1)
    robot = dataclasses.replace(ARM, cameras=(camera,))
    dataset = open_dataset(copy, robot, part)
    assert not dataset.present(np.zeros(1, int), camera).any()
    with pytest.raises(
        DatasetError, match=rf"step 0 .*: cannot decode observation/image: not an image: {len(whole)} by"
    ):
        open_dataset(copy, dataclasses.replace(ARM, cameras=(Camera("base", "observation/image"),)), part)


def test_a_camera_that_is_never_there_is_told(toy: Path, caplog: pytest.LogCaptureFixture) -> None:
    camera = Camera("base", "observation/image", min_bytes=1 << 20)
    dataset = open_dataset(toy, dataclasses.replace(ARM, cameras=(camera,)), "train")
    assert not dataset.present(np.arange(len(dataset)), camera).any()
    assert "camera 'base' (observation/image) is absent at every step" in caplog.text
