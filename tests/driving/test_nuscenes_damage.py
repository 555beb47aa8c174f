"""Copies of nuScenes that are incomplete or damaged: what is said, and that all of it is said at once."""

import json
import shutil

import pytest

from openpi_like.driving.nuscenes.can_bus import read_can_bus
from openpi_like.driving.nuscenes.episodes import Options, to_episode
from openpi_like.driving.nuscenes.scenes import check_images, read_scenes
from openpi_like.driving.nuscenes.splits import read_scene_names, split_scenes
from openpi_like.driving.nuscenes.tables import NuScenesError, read_tables
from tests.driving.nuscenes_copy import LEFT, STRAIGHT, Curve, Drive, about_z, change, token, write_copy

VERSION = "v1.0-mini"


@pytest.fixture
def root(tmp_path):
    return write_copy(tmp_path / "nuscenes")


def scenes_of(root, names=None):
    return read_scenes(read_tables(root, VERSION), names)


def said(root, names=None):
    with pytest.raises(NuScenesError) as caught:
        scenes_of(root, names)
    return str(caught.value)


def test_no_such_folder(root, tmp_path):
    with pytest.raises(NuScenesError, match=r"no folder v1\.0-trainval with tables, did you mean 'v1\.0-mini'"):
        read_tables(root, "v1.0-trainval")
    with pytest.raises(NuScenesError, match=r"no folder v1\.0-mini"):
        read_tables(tmp_path / "elsewhere", VERSION)


def test_missing_tables_are_all_named(root):
    (root / VERSION / "ego_pose.json").unlink()
    (root / VERSION / "scene.json").rename(root / VERSION / "scenes.json")
    message = said(root)
    assert "2 problems" in message
    assert "no ego_pose.json" in message
    assert "no scene.json, did you mean 'scenes.json'" in message


def test_tables_that_nobody_reads_may_be_missing(root):
    for name in ("map", "attribute", "visibility"):
        (root / VERSION / f"{name}.json").unlink()
    assert len(scenes_of(root)) == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'[{"token": "a", "name', "sample.json is not JSON"),
        (b"", "sample.json is not JSON"),
        (b"\xff\xfe\x00", "sample.json is not JSON"),
        (b"[" * 100_000, "sample.json is not JSON"),
        (b'{"token": "a"}', "sample.json holds a dict, expected a list of rows"),
        (b"[3]", "sample.json: 1 rows that are no objects, the first: row 0 is a int"),
    ],
)
def test_a_table_that_is_cut_off_or_something_else(root, content, expected):
    (root / VERSION / "sample.json").write_bytes(content)
    assert expected in said(root)


def test_fields_of_another_kind(root):
    def spoil(rows):
        rows[0]["timestamp"] = "1532402927612460"
        rows[1]["Timestamp"] = rows[1].pop("timestamp")
        rows[2]["next"] = None
        rows[4]["token"] = rows[3]["token"]

    change(root, "sample", spoil)
    change(root, "ego_pose", lambda rows: rows[0].update(translation=[1.0, float("nan"), 0.0]))
    change(root, "sample_annotation", lambda rows: rows[0].update(size=[0.0, 4.0, 1.0], rotation=[1, 1, 0, 0]))
    message = said(root)
    for expected in (
        "7 problems",
        "sample.json: 1 rows whose 'timestamp' is not a whole number, the first: row 0 has '1532402927612460'",
        "sample.json: 1 rows without 'timestamp', the first: row 1; did you mean 'Timestamp'",
        "sample.json: 1 rows whose 'next' is not a text",
        "sample.json: 1 rows with a token that another has, the first: row 4",
        "ego_pose.json: 1 rows whose 'translation' is not 3 finite numbers",
        "'size' is not 3 numbers above 0",
        "'rotation' is not 4 numbers of length 1",
    ):
        assert expected in message
    assert "does not have" not in message  # links to what is spoilt are no news


def test_links_that_lead_nowhere(root):
    change(root, "sample_data", lambda rows: rows[0].update(ego_pose_token="ffff"))
    change(root, "sample_annotation", lambda rows: [row.update(instance_token="") for row in rows[:3]] and None)
    change(root, "sample", lambda rows: rows[2].update(prev="eeee"))
    message = said(root)
    assert "3 problems" in message
    assert f"sample_data {token(LEFT.name, 'LIDAR_TOP', 0)} -> ffff" in message
    assert "sample_annotation.json: 3 rows whose instance_token instance.json does not have" in message
    assert "-> an empty text" in message
    assert "1 rows whose prev sample.json does not have" in message


def test_a_link_of_a_sweep_is_nobodys_business(root):
    change(root, "sample_data", lambda rows: rows[1].update(ego_pose_token="ffff"))
    assert not json.loads((root / VERSION / "sample_data.json").read_text())[1]["is_key_frame"]
    assert len(scenes_of(root)) == 2


def test_timestamps_out_of_order(root):
    change(root, "sample", lambda rows: rows[5].update(timestamp=rows[3]["timestamp"]))
    message = said(root)
    assert f"{LEFT.name}: sample {token(LEFT.name, 'sample', 5)} has timestamp" in message
    assert "expected later than" in message
    assert [scene.name for scene in scenes_of(root, [STRAIGHT.name])] == [STRAIGHT.name]  # the other one is whole


def test_chains_that_are_broken(root):
    first, fifth = (token(LEFT.name, "sample", k) for k in (0, 5))
    change(root, "sample", lambda rows: rows[5].update(next=""))
    message = said(root)
    assert "6 samples from first_sample_token on, expected nbr_samples 13" in message
    assert f"it ends at sample {fifth}, expected last_sample_token" in message
    change(root, "sample", lambda rows: rows[5].update(next=first))
    assert f"sample {fifth} leads back to {first}" in said(root)
    change(root, "sample", lambda rows: rows[5].update(next=token(STRAIGHT.name, "sample", 0)))
    message = said(root)
    assert f"says that it belongs to scene {token(STRAIGHT.name)}" in message
    assert f"has prev an empty text, expected {fifth}" in message


def test_a_camera_that_is_missing_or_twice(root):
    def spoil(rows):
        back = next(i for i, row in enumerate(rows) if "CAM_BACK/" in row["filename"] and row["is_key_frame"])
        rows.append({**rows[0], "token": "abcd"})
        del rows[back]

    change(root, "sample_data", spoil)
    message = said(root)
    assert f"{LEFT.name}: sample {token(LEFT.name, 'sample', 0)} has no keyframe of CAM_BACK in sample_data" in message
    assert f"sample {token(LEFT.name, 'sample', 0)} has two keyframes of LIDAR_TOP, expected one" in message


def test_a_lidar_that_does_not_look_ahead(root):
    change(root, "calibrated_sensor", lambda rows: rows[0].update(rotation=about_z(0.0)))
    message = said(root)
    assert "its x and y point to [1.0, 0.0, 0.0] and [0.0, 1.0, 0.0] of the car" in message
    change(root, "calibrated_sensor", lambda rows: rows[0].update(rotation=about_z(-1.52)))  # 3 degrees, as mounted
    assert len(scenes_of(root)) == 2


def test_scenes_that_are_not_there(root):
    message = said(root, ["scene-0062", LEFT.name, "lorry"])
    assert "2 problems" in message
    assert "no scene 'scene-0062', did you mean 'scene-0061'" in message


def test_pictures_that_are_missing(root):
    scenes = scenes_of(root)
    shutil.rmtree(root / "samples" / "CAM_BACK_LEFT")
    front = root / scenes[1].samples[3].images["front"]
    front.write_bytes(b"")
    with pytest.raises(NuScenesError) as caught:
        check_images(root, scenes)
    assert f"{LEFT.name}: 13 of 78 are missing or empty, the first: samples/CAM_BACK_LEFT" in str(caught.value)
    assert f"{STRAIGHT.name}: 10 of 54" in str(caught.value)
    with pytest.raises(NuScenesError, match=r"9 problems(.|\n)*No such file"):
        to_episode(root, scenes[0])


def test_pictures_that_are_no_jpeg(root):
    scenes = scenes_of(root, [STRAIGHT.name])
    for k, content in ((4, b"\x89PNG..."), (5, b"\xff\xd8\xff"), (6, b"<html>")):
        (root / scenes[0].samples[k].images["back"]).write_bytes(content)
    check_images(root, scenes)
    with pytest.raises(NuScenesError) as caught:
        to_episode(root, scenes[0])
    assert "3 problems" in str(caught.value)
    assert "no JPEG, 6 bytes that begin with b'<html>'" in str(caught.value)


def test_a_can_bus_that_is_partly_there(root):
    (scene,) = scenes_of(root, [LEFT.name])
    (root / "can_bus" / f"{LEFT.name}_steeranglefeedback.json").unlink()
    assert to_episode(root, scene).metadata["can_bus"] == "pose"
    (root / "can_bus" / f"{LEFT.name}_pose.json").write_text("[]")
    assert to_episode(root, scene).metadata["can_bus"] == "none"
    shutil.rmtree(root / "can_bus")
    assert to_episode(root, scene).metadata["state_from"] == "poses"


def test_messages_that_stop_early_or_come_out_of_order(root):
    (scene,) = scenes_of(root, [LEFT.name])
    whole = to_episode(root, scene)
    path = root / "can_bus" / f"{LEFT.name}_pose.json"
    messages = json.loads(path.read_text())
    path.write_text(json.dumps(messages[::-1]))
    assert (to_episode(root, scene).state == whole.state).all()
    path.write_text(json.dumps([m for m in messages if m["utime"] < LEFT.start_us + 4_000_000]))
    cut = to_episode(root, scene)
    assert cut.steps["can_bus"].tolist() == [True] * 5 + [False] * 4  # at 4 s the last message is 20 ms away
    assert cut.metadata["state_from"] == "poses and CAN bus, 4 steps poses alone"
    assert (cut.state[:4] == whole.state[:4]).all()
    assert (cut.state[5:, 5:7] == cut.state[5:, 3:5]).all()


def test_can_bus_files_that_are_damaged(root):
    pose, steering = (root / "can_bus" / f"{LEFT.name}_{kind}.json" for kind in ("pose", "steeranglefeedback"))
    pose.write_text(pose.read_text()[:1000])
    messages = json.loads(steering.read_text())
    messages[3]["value"] = None
    messages[4]["value"] = float("inf")
    messages[5]["utime"] = 1.5
    del messages[6]["value"]
    messages[7] = 3
    steering.write_text(json.dumps(messages))
    with pytest.raises(NuScenesError) as caught:
        read_can_bus(root, LEFT.name)
    message = str(caught.value)
    assert "2 problems" in message
    assert f"{pose.name} is not JSON" in message
    assert f"{steering.name}: 5 messages are not as expected, the first, message 3: value 'None'" in message
    pose.write_text('{"pose": []}')
    with pytest.raises(NuScenesError, match="holds a dict, expected a list of messages"):
        read_can_bus(root, LEFT.name)


@pytest.mark.parametrize(("beginning", "keyframes", "fewest"), [("leave_out", 4, 5), ("extrapolate", 1, 2)])
def test_scenes_that_are_too_short(tmp_path, beginning, keyframes, fewest):
    short = Drive("scene-0001", Curve(0, 0, 0, 5.0), keyframes, can_bus=False)
    (scene,) = scenes_of(write_copy(tmp_path, (short,)))
    with pytest.raises(NuScenesError, match=f"{keyframes} keyframes, expected {fewest} at least"):
        to_episode(tmp_path, scene, Options(beginning=beginning))


def test_very_many_problems_are_counted(root):
    with pytest.raises(NuScenesError, match=r"40 problems(.|\n)*\.\.\. and 20 more$"):
        scenes_of(root, [f"no_{i}" for i in range(40)])


def test_splits_and_lists_of_scenes(tmp_path):
    assert len(split_scenes("mini_train")) == 8
    assert set(split_scenes("mini_val")) == {"scene-0103", "scene-0916"}
    with pytest.raises(ValueError, match=r"split 'val' is not known here(.|\n)*val.txt"):
        split_scenes("val")
    names = tmp_path / "val.txt"
    names.write_text("scene-0003  # the first\n\n# none\nscene-0012\n")
    assert read_scene_names(names) == ("scene-0003", "scene-0012")
    names.write_text("a\na\nb c\n")
    with pytest.raises(ValueError, match="'a' twice; 'b c' has spaces"):
        read_scene_names(names)
    for content, expected in ((b"# nothing\n", "no names"), (b"\xff\xfe", "is no text")):
        names.write_bytes(content)
        with pytest.raises(ValueError, match=expected):
            read_scene_names(names)
