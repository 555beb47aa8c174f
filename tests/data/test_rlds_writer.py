"""Writing RLDS: what goes in comes out of TFDS' own readers, and a dataset is either whole or not there."""

import dataclasses
import io
import json

import numpy as np
import PIL.Image
import pytest

from openpi_like.data.rlds_writer import Episode, dataset_directory, write_rlds
from openpi_like.robots.robot import ActionField, Camera, Robot, StateField

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("tensorflow")

# TensorFlow, TFDS and their protos warn of their own future while they read and write.
pytestmark = pytest.mark.filterwarnings("ignore")

ROBOT = Robot(
    name="twohanded",
    cameras=(Camera("base", "observation/image", 6, 8), Camera("wrist", "observation/wrist/image", 4, 4)),
    # Two keys, one of them shared by fields that are not in the order in which they are stored.
    state=(
        StateField("b", "observation/state", 2, start=3),
        StateField("a", "observation/state", 3),
        StateField("c", "observation/extra", 1),
    ),
    action=(ActionField("x", "action", 2), ActionField("y", "action", 1, start=2)),
    control_hz=10.0,
    action_horizon=4,
    execute_steps=2,
)


def png(image):
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, format="png")
    return buffer.getvalue()


def make_episode(seed, steps=5, success=True):
    """Returns (episode, its images before encoding)."""
    rng = np.random.default_rng(seed)
    frames = {
        c.name: rng.integers(0, 256, (steps, c.height or 0, c.width or 0, 3)).astype(np.uint8) for c in ROBOT.cameras
    }
    episode = Episode(
        images={name: [png(f) for f in x] for name, x in frames.items()},
        state=rng.normal(size=(steps, 6)).astype(np.float32),
        action=rng.normal(size=(steps, 3)).astype(np.float32),
        prompt=f"task {seed}",
        success=success,
        metadata={"task": f"t{seed}", "seed": seed, "success": success, "noise": 0.25},
    )
    return episode, frames


def write(root, splits, **options):
    return write_rlds(root, "tiny", ROBOT, splits, description="A test.", metadata={"renderer": "none"}, **options)


def check_steps(steps, episode, frames):
    assert len(steps) == len(episode.action)
    last = len(steps) - 1
    for t, step in enumerate(steps):
        observation = step["observation"]
        np.testing.assert_array_equal(observation["image"], frames["base"][t])
        np.testing.assert_array_equal(observation["wrist"]["image"], frames["wrist"][t])
        # By hand: robot order is b (2), a (3), c (1); on disk a comes before b.
        np.testing.assert_array_equal(
            observation["state"], np.concatenate([episode.state[t, 2:5], episode.state[t, :2]])
        )
        np.testing.assert_array_equal(observation["extra"], episode.state[t, 5:])
        np.testing.assert_array_equal(step["action"], episode.action[t])
        assert step["language_instruction"].decode() == episode.prompt
        assert (bool(step["is_first"]), bool(step["is_last"])) == (t == 0, t == last)
        assert bool(step["is_terminal"]) == (t == last and episode.success)
        assert float(step["reward"]) == float(t == last and episode.success)
        assert float(step["discount"]) == 1.0


def check_metadata(record, episode):
    got = record["episode_metadata"]
    assert got["task"].decode() == episode.metadata["task"]
    assert int(got["seed"]) == episode.metadata["seed"]
    assert bool(got["success"]) == episode.metadata["success"]
    assert float(got["noise"]) == 0.25


@pytest.fixture(scope="module")
def written():
    """Five train episodes of different lengths, one of them failed, and two for validation."""
    return [make_episode(i, steps=3 + i, success=i != 2) for i in range(5)], [make_episode(10 + i) for i in range(2)]


def test_round_trip_through_tf_data(tmp_path, written):
    train, val = written
    ticks = []
    directory = write(
        tmp_path,
        {"train": (e for e, _ in train), "val": [e for e, _ in val]},
        episodes_per_shard=2,
        on_episode=lambda: ticks.append(1),
    )
    assert directory == dataset_directory(tmp_path, "tiny") == tmp_path / "tiny" / "1.0.0"
    assert len(ticks) == 7
    builder = tfds.builder_from_directory(directory)
    assert builder.info.splits["train"].shard_lengths == [2, 2, 1]
    assert builder.info.splits["val"].shard_lengths == [2]
    assert builder.info.metadata == {"renderer": "none"}
    assert builder.info.description == "A test."
    for split, episodes in (("train", train), ("val", val)):
        records = list(builder.as_dataset(split=split))
        assert len(records) == len(episodes)
        for record, (episode, frames) in zip(records, episodes, strict=True):
            check_steps(list(record["steps"].as_numpy_iterator()), episode, frames)
            check_metadata({"episode_metadata": {k: v.numpy() for k, v in record["episode_metadata"].items()}}, episode)


def test_round_trip_through_data_source(tmp_path, written):
    train, _ = written
    directory = write(tmp_path, {"train": [e for e, _ in train]}, episodes_per_shard=2, file_format="array_record")
    source = tfds.builder_from_directory(directory).as_data_source(split="train")
    assert len(source) == len(train)
    for i in (3, 0, 4):  # any order
        episode, frames = train[i]
        check_steps(list(source[i]["steps"]), episode, frames)
        check_metadata(source[i], episode)


def test_images_are_stored_as_they_come(tmp_path, written):
    train, _ = written
    directory = write(tmp_path, {"train": [train[0][0]]})
    decoders = {"steps": tfds.decode.SkipDecoding()}
    record = next(iter(tfds.builder_from_directory(directory).as_dataset(split="train", decoders=decoders)))
    assert record["steps"]["observation"]["image"].numpy().tolist() == train[0][0].images["base"]


def test_texts_of_steps_come_back(tmp_path, written):
    said = [["go", "grasp it", "lift"], ["go to the cube", "", "ü", "lift"]]
    steps = [{"subtask": np.array(texts), "force": np.arange(len(texts))} for texts in said]
    episodes = [dataclasses.replace(e, steps=own) for (e, _), own in zip(written[0], steps, strict=False)]
    directory = write(tmp_path, {"train": episodes})
    records = list(tfds.builder_from_directory(directory).as_dataset(split="train"))
    got = [[step["subtask"].decode() for step in record["steps"].as_numpy_iterator()] for record in records]
    assert got == said
    assert [int(step["force"]) for step in records[1]["steps"].as_numpy_iterator()] == [0, 1, 2, 3]
    numbers = dataclasses.replace(episodes[0], steps={k: np.zeros(3) for k in steps[0]})
    with pytest.raises(ValueError, match=r"episode 1 .* differs from the first episode in .*text"):
        write(tmp_path / "mixed", {"train": [episodes[0], numbers]})
    short = dataclasses.replace(episodes[0], steps={"subtask": np.array(["a", "b"])})
    with pytest.raises(ValueError, match=r"'subtask' has 2 steps, expected 3"):
        write(tmp_path / "short", {"train": [short]})
    for texts in (np.array([["a", "b"]] * 3), np.array([b"a"] * 3), np.array(["a"] * 3, object)):
        with pytest.raises(ValueError, match=r"'subtask' is of .*, expected numbers, or one text \(str\) a step"):
            write(tmp_path / "other", {"train": [dataclasses.replace(episodes[0], steps={"subtask": texts})]})


def test_metadata_is_readable_without_tfds(tmp_path, written):
    directory = write(tmp_path, {"train": [written[0][0][0]]})
    assert json.loads((directory / "metadata.json").read_text()) == {"renderer": "none"}
    assert json.loads((directory / "dataset_info.json").read_text())["description"] == "A test."
    assert "steps" in (directory / "features.json").read_text()


def test_without_instruction(tmp_path, written):
    robot = dataclasses.replace(ROBOT, language_key=None, default_prompt="go")
    episode = written[0][0][0]
    directory = write_rlds(tmp_path, "mute", robot, {"train": [episode]}, description="", metadata={})
    assert "language_instruction" not in tfds.builder_from_directory(directory).info.features["steps"].feature


# ---- whole or not there


def test_interrupted_writing_leaves_no_dataset_and_can_be_repeated(tmp_path, written):
    episodes = [e for e, _ in written[0]]

    def stops():
        yield episodes[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, {"train": stops()})
    assert not dataset_directory(tmp_path, "tiny").exists()
    assert [p.name for p in (tmp_path / "tiny").iterdir()] == ["1.0.0.incomplete"]
    directory = write(tmp_path, {"train": episodes[1:3]})
    assert [p.name for p in (tmp_path / "tiny").iterdir()] == ["1.0.0"]
    assert tfds.builder_from_directory(directory).info.splits["train"].num_examples == 2


def test_existing_dataset_is_not_overwritten(tmp_path, written):
    episode = written[0][0][0]
    write(tmp_path, {"train": [episode]})
    with pytest.raises(FileExistsError, match="delete it to write the dataset again"):
        write(tmp_path, {"train": [episode]})


# ---- errors


def change(**changes):
    return lambda episode: dataclasses.replace(episode, **{k: f(episode) for k, f in changes.items()})


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (change(state=lambda e: e.state[:, :4]), r"state has shape \(5, 4\), expected \(5, 6\)"),
        (change(action=lambda e: e.action[:, :2]), r"action has shape \(5, 2\), expected \(5, 3\)"),
        (change(action=lambda e: e.action * np.float32(np.nan)), "action has values that are not finite"),
        (change(images=lambda e: {"base": e.images["base"]}), r"cameras \['base'\], expected \['base', 'wrist'\]"),
        (
            change(images=lambda e: {**e.images, "base": e.images["base"][:3]}),
            "camera 'base' has 3 images, expected 5",
        ),
        (
            change(images=lambda e: {**e.images, "wrist": [b"GIF89a"] * 5}),
            "'wrist' has images that are not all PNG, or not",
        ),
        (
            change(images=lambda e: {**e.images, "wrist": [*e.images["wrist"][:4], b"\xff\xd8\xff"]}),
            "'wrist' has images that are not all PNG, or not all JPEG",
        ),
        (change(prompt=lambda e: ["a"] * 4), "4 prompts, expected one, or 5"),
        (change(steps=lambda e: {"reached": np.zeros(6)}), "'reached' has 6 steps, expected 5"),
        (
            change(images=lambda e: {**e.images, "base": [png(np.zeros((8, 6, 3), np.uint8))] * 5}),
            r"'base' has images of \(height, width\) \[\(8, 6\)\], expected \(6, 8\)",
        ),
        (
            change(
                state=lambda e: e.state[:0],
                action=lambda e: e.action[:0],
                images=lambda e: {k: [] for k in e.images},
            ),
            "it has no steps",
        ),
    ],
)
def test_episodes_that_do_not_fit(tmp_path, broken, message):
    good, _ = make_episode(0)
    with pytest.raises(ValueError, match=f"episode 1 of split 'train' does not fit robot 'twohanded': .*{message}"):
        write(tmp_path, {"train": [good, broken(good)]})
    assert not dataset_directory(tmp_path, "tiny").exists()


def test_all_problems_of_an_episode_at_once(tmp_path):
    broken = change(state=lambda e: e.state[:, :4], images=lambda e: {})(make_episode(0)[0])
    with pytest.raises(ValueError, match=r"(?s)state has shape.*cameras \[\]"):
        write(tmp_path, {"train": [broken]})


def test_metadata_must_be_the_same_throughout(tmp_path):
    good, _ = make_episode(0)
    other = dataclasses.replace(good, metadata={"task": "t"})
    with pytest.raises(
        ValueError, match=r"differs from the first episode in \(here, there\): metadata {'task': 'str'}, {"
    ):
        write(tmp_path, {"train": [good, other]})


def test_empty_splits(tmp_path):
    good, _ = make_episode(0)
    with pytest.raises(ValueError, match="split 'val' has no episodes"):
        write(tmp_path, {"train": [good], "val": []})
    with pytest.raises(ValueError, match="no splits given"):
        write(tmp_path, {})
