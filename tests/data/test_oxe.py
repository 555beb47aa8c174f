"""Every dataset of the catalogue, written with the schema it is published in, is read as it is meant."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from openpi_like.config import from_json, to_json
from openpi_like.data import files
from openpi_like.data.config import DataConfig
from openpi_like.data.dataset import open_dataset
from openpi_like.data.images import fit
from openpi_like.data.loader import make_loader
from openpi_like.data.oxe import MIXTURES, OXE, mixture
from openpi_like.data.schema import DatasetError
from openpi_like.data.stats import compute_normalization
from openpi_like.data.text import TextTokenizer
from openpi_like.robots import with_channel_order, with_upside_down
from openpi_like.robots.oxe import OTHER_ACTIONS, ROBOTS
from openpi_like.robots.oxe_disputed import UPSIDE_DOWN
from tests.data.oxe_schemas import PUBLISHED
from tests.data.oxe_words import Published
from tests.data.oxe_writer import LENGTHS, colour, said, write
from tests.data.toy import ARM, Shapes


def test_every_dataset_of_the_catalogue_has_a_schema_here() -> None:
    assert PUBLISHED.keys() == OXE.keys() == ROBOTS.keys()
    assert len(OXE) == 35


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_dataset_is_read_as_it_is_meant(tfds: Any, tmp_path: Path, name: str) -> None:
    """States, chunks, masks, prompts and images of all frames, against what `oxe_schemas` says of the columns."""
    how, published = OXE[name], PUBLISHED[name]
    columns = write(tfds, tmp_path / name / "1.0.0", name, published)
    dataset = open_dataset(tmp_path / name / "1.0.0", how.robot, "train", selection=how.selection)
    frame, horizon = 0, how.robot.action_horizon
    for e, c in enumerate(columns):
        if e == 1 and name in ("kuka", "bc_z", "droid"):
            continue
        state, actions = published.state(c), published.actions(c)
        assert actions.shape == (len(actions), how.robot.action_size)
        for t in range(how.selection.skip_first, len(actions)):
            got_state, got_chunk, mask = (x[0] for x in dataset.encoded(np.array([frame])))
            np.testing.assert_allclose(got_state, state[t], atol=2e-6)
            inside = np.arange(horizon) < len(actions) - t
            np.testing.assert_array_equal(mask, inside)
            chunk = actions[np.minimum(t + np.arange(horizon), len(actions) - 1)].astype(np.float64)
            for d in published.relative:
                chunk[:, d] -= state[t, d]
            np.testing.assert_allclose(got_chunk, chunk, atol=2e-6)
            assert dataset.prompts(np.array([frame])) == [
                next(s for s in (said(name, e, k) for k in language_keys(published, name)) if s)
            ]
            frame += 1
        if e == 2:
            check_images(dataset, published, frame - 1, e, len(actions) - 1)
    assert frame == len(dataset)
    assert from_json(json.loads(json.dumps(to_json(how.robot)))) == how.robot


def language_keys(published: Published, name: str) -> list[str]:
    more = ["language_instruction_2", "language_instruction_3"] if name == "droid" else []
    return [published.language, *more]


def check_images(dataset: Any, published: Published, frame: int, episode: int, step: int) -> None:
    stored = [k for k, word in published.observation.items() if word.startswith(("jpeg", "png", "image"))]
    cameras = {c.name: c for c in dataset.robot.cameras}
    assert {slot: c.key for slot, c in cameras.items()} == {s: k for s, (k, _) in published.cameras.items()}
    for slot, (key, swapped) in published.cameras.items():
        image = dataset.image(frame, cameras[slot])
        expected = colour(episode, step, stored.index(key.removeprefix("observation/")))
        word = published.observation[key.removeprefix("observation/")]
        assert image.shape[:2] == tuple(int(n) for n in word.split()[1].split("x"))
        np.testing.assert_allclose(image[0, 0].astype(int), expected[::-1] if swapped else expected, atol=3)
        # A plain image is as small as the black ones that stand for an absent camera in Bridge
        assert dataset.present(np.array([frame]), cameras[slot]).all() == (dataset.robot.name != "bridge")


def test_droid_in_joints(tfds: Any, tmp_path: Path) -> None:
    """The same files with openpi's actions; a draw decides among the texts that are not empty."""
    columns = write(tfds, tmp_path / "droid" / "1.0.1", "droid", PUBLISHED["droid"])
    robot, selection = OTHER_ACTIONS["droid"], OXE["droid"].selection
    dataset = open_dataset(tmp_path / "droid" / "1.0.1", robot, "train", selection=selection)
    assert dataset.removed == {"episode_metadata/file_path says no": 1}
    state, actions, _ = dataset.encoded(np.array([4]))
    c = columns[2]
    np.testing.assert_allclose(state[0, :7], c["observation/joint_position"][0], rtol=1e-6)
    np.testing.assert_allclose(actions[0, 1, :7], c["action_dict/joint_velocity"][1], rtol=1e-6)
    frames = np.array([0, 4, 4, 4, 4])
    said_ = dataset.prompts(frames, np.array([0.99, 0.0, 0.34, 0.67, 0.999]))
    assert [s.split("(")[1][0] for s in said_] == ["3", "n", "2", "3", "3"]


# ---- The catalogue as a whole ----------------------------------------------------------------------------------------


def test_facts_agree_with_those_collected(shared: Path) -> None:
    """Weights, rates, splits and languages, against the collection beside the repository."""
    facts = json.loads((shared / "oxe_facts.json").read_text())
    names = {"bridge_orig": "bridge_dataset", "fmb_dataset": "fmb", "bridge_oxe": "bridge"}
    names["aloha_mobile_dataset"] = "aloha_mobile"
    for ours, (who, theirs) in {
        "oxe_magic_soup": ("octo", "OXE_MAGIC_SOUP"),
        "rtx": ("octo", "RT_X_MIX"),
        "oxe_magic_soup_plus": ("openvla", "oxe_magic_soup_plus"),
    }.items():
        assert MIXTURES[ours] == {names.get(k, k): w for k, w in facts["mixtures"][who][theirs]}
    for key, fact in facts["datasets"].items():
        how = OXE.get(names.get(key, key))
        if how is None:
            continue
        assert how.uninformative == fact["language_blanked_by_octo"], key
        assert fact["version"] in (None, how.version), key
        assert fact["control_hz"] in (None, how.robot.control_hz), key
        held_out = {"val", "test"} & set(fact["splits"] or {"train": 0})
        if fact["splits"]:
            assert how.val == (held_out.pop() if held_out else "train[95%:]"), key


# ---- Mixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tfds: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small datasets: one in another version, one under another name, and one that is not in the catalogue."""
    root = tmp_path_factory.mktemp("oxe")
    for name, folder in (
        ("utaustin_mutex", "utaustin_mutex/0.1.0"),
        ("cmu_stretch", "cmu_stretch/0.2.0"),
        ("fmb", "fmb_dataset/0.0.1"),
    ):
        write(tfds, root / folder, name, PUBLISHED[name])
    (root / "dobbbe" / "0.0.1").mkdir(parents=True)
    return root


HERE = {"utaustin_mutex": 1.0, "cmu_stretch": 2.0, "fmb": 0.5}


def test_a_mixture_is_balanced_by_its_frames(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        entries = mixture(HERE, root)
    # 95 % of three episodes are three
    assert [e.weight for e in entries] == [11.0, 22.0, 5.5]
    assert [Path(e.path).relative_to(root).as_posix() for e in entries] == [
        "utaustin_mutex/0.1.0",
        "cmu_stretch/0.2.0",
        "fmb_dataset/0.0.1",
    ]
    assert "cmu_stretch: taking version 0.2.0, the catalogue is for 0.1.0" in caplog.text
    assert [(e.split, e.val_split) for e in entries] == [("train[:95%]", "train[95%:]")] * 3
    assert [e.weight for e in mixture(HERE, root, balance="as_given")] == [1.0, 2.0, 0.5]
    assert from_json(json.loads(json.dumps(to_json(entries[0])))) == entries[0]


def test_copies_and_languages_are_switches(root: Path) -> None:
    published, corrected = (mixture(HERE, root, balance="as_given", images=i) for i in ("published", "rgb"))
    assert [c.channel_order for c in published[0].robot.cameras] == ["bgr", "bgr"]
    assert [c.channel_order for c in corrected[0].robot.cameras] == ["rgb", "rgb"]
    assert corrected[0].robot == with_channel_order(published[0].robot, "rgb")
    assert [e.blank_language for e in published] == [False] * 3
    assert [e.blank_language for e in mixture(HERE, root, balance="as_given", blank_language=True)] == [
        True, False, False,
    ]  # fmt: skip


def test_cameras_are_turned_where_a_copy_has_them_upside_down(root: Path) -> None:
    stored = mixture(HERE, root, balance="as_given")
    turned = mixture(HERE, root, balance="as_given", upside_down=UPSIDE_DOWN, images="rgb")
    assert not any(c.upside_down for e in stored for c in e.robot.cameras)
    assert {c.name for e in turned for c in e.robot.cameras if c.upside_down} == {"wrist", "wrist_1"}
    fmb = turned[2].robot
    assert [c.name for c in fmb.cameras if c.upside_down] == ["wrist", "wrist_1"]
    assert fmb == with_upside_down(stored[2].robot, ("wrist", "wrist_1"))
    assert [c.channel_order for c in turned[0].robot.cameras] == ["rgb", "rgb"]
    with pytest.raises(ValueError, match=r"Robot 'fmb': no camera 'top'; .* no dataset 'drojd' in .*'droid'"):
        mixture(HERE, root, upside_down={"drojd": ("wrist",), "fmb": ("top",)})


def test_a_picture_that_is_upside_down_is_turned(toy: Path) -> None:
    """The stored pixels by 180 degrees, before they are resized, as NumPy turns them."""
    turned = with_upside_down(ARM, ("base",))
    assert [c.upside_down for c in turned.cameras] == [True, False]
    as_stored, dataset = (open_dataset(toy, robot, "train") for robot in (ARM, turned))
    for camera, other in zip(ARM.cameras, turned.cameras, strict=True):
        expected = as_stored.image(17, camera)
        if camera.name == "base":
            assert (expected != np.rot90(expected, 2)).any()
            expected = np.rot90(expected, 2)
        np.testing.assert_array_equal(dataset.image(17, other), expected)
        out, fitted = np.zeros((2, 20, 20, 3), np.uint8)
        dataset.images_into(np.array([17]), other, [out])
        fit(np.ascontiguousarray(expected), fitted)
        np.testing.assert_array_equal(out, fitted)


def test_all_missing_datasets_are_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = {**HERE, "dobbe": 1.0, "taco_play": 1.0}
    with pytest.raises(DatasetError) as e:
        mixture(weights, root)
    assert "2 of 5 datasets are not in" in str(e.value)
    assert "dobbe: not there; did you mean 'dobbbe'?" in str(e.value)
    assert "taco_play: not there" in str(e.value)
    with caplog.at_level(logging.WARNING):
        assert len(mixture(weights, root, missing="skip", balance="as_given")) == 3
    assert "mixture goes on without 2 of 5 datasets:\n  dobbe: not there" in caplog.text
    with pytest.raises(DatasetError, match="1 of 1 datasets"):
        mixture({"kuka": 1.0}, root, missing="skip")
    # Where a run is planned, its data need not be: nothing is opened, and they are taken to be where the run is.
    with caplog.at_level(logging.WARNING):
        planned = mixture(weights, root / "nowhere", missing="expect")
    assert [(e.path, e.weight) for e in planned] == [
        (str(root / "nowhere" / name / OXE[name].version), weight) for name, weight in weights.items()
    ]
    assert "mixture is not balanced: 5 of 5 datasets are not there (" in caplog.text
    assert [e.path for e in mixture(HERE, root, missing="expect")] == [e.path for e in mixture(HERE, root)]
    with pytest.raises(DatasetError, match=r"cannot list .*nowhere"):
        mixture("bridge", root / "nowhere")


def test_all_datasets_that_cannot_be_opened_are_named(root: Path, tmp_path: Path) -> None:
    """A damaged file and one that is of another robot, in one message; a tolerated share of damage is passed on."""
    shutil.copytree(root / "utaustin_mutex", tmp_path / "utaustin_mutex")
    shutil.copytree(root / "cmu_stretch" / "0.2.0", tmp_path / "dobbe" / "0.0.1")
    shutil.copytree(root / "cmu_stretch" / "0.2.0", tmp_path / "cmu_stretch" / "0.1.0")
    (shard,) = (tmp_path / "utaustin_mutex" / "0.1.0").glob("*.tfrecord-*")
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1  # of the last episode, the longest
    shard.write_bytes(data)
    weights = {"utaustin_mutex": 1.0, "dobbe": 1.0, "cmu_stretch": 1.0}
    with pytest.raises(DatasetError) as e:
        mixture(weights, tmp_path)
    assert "2 of 3 datasets cannot be opened" in str(e.value)
    assert "checksum" in str(e.value)
    assert "does not fit robot 'dobbe'" in str(e.value)
    (entry,) = mixture({"utaustin_mutex": 1.0}, tmp_path, max_corrupt_fraction=0.5, index_dir=tmp_path / "indexes")
    assert entry.weight == sum(LENGTHS[:2])
    assert list((tmp_path / "indexes").iterdir())


@pytest.mark.parametrize("kind", [str, Path])
def test_a_mixture_of_a_store(memory: Any, root: Path, tokenizer: TextTokenizer, kind: type) -> None:
    """The same samples as from disk, also where a URL went through `Path`; all that is not there is named."""
    for path in root.rglob("*"):
        if path.is_file() and ".openpi_like_index" not in path.parts:
            memory.pipe_file(f"/bucket/oxe/{path.relative_to(root)}", path.read_bytes())
    url = "memory://bucket/oxe"
    entries, local = mixture(HERE, kind(url)), mixture(HERE, root)
    assert [e.path for e in entries] == [
        f"{url}/{name}" for name in ("utaustin_mutex/0.1.0", "cmu_stretch/0.2.0", "fmb_dataset/0.0.1")
    ]
    assert [dataclasses.replace(e, path="") for e in entries] == [dataclasses.replace(e, path="") for e in local]
    policy = Shapes(cameras=("base", "wrist"), state_dim=11, action_dim=10, action_horizon=16)
    normalizations = {e.robot.name: compute_normalization(open_dataset(e.path, e.robot, "train")) for e in local}
    batches = []
    for of in (entries, local):
        config = DataConfig(of, drop_cameras=("base_1", "wrist_1"))
        loader = make_loader(config, batch_size=16, policy=policy, tokenizer=tokenizer, normalizations=normalizations)
        batches.append(next(loader))
        loader.close()
    jax.tree.map(np.testing.assert_array_equal, *batches)
    with pytest.raises(DatasetError) as e:
        mixture({**HERE, "dobbe": 1.0, "taco_play": 1.0}, kind(url))
    lines = str(e.value).splitlines()
    assert lines[0] == f"2 of 5 datasets are not in {url}:"
    assert [line.split(";")[0] for line in lines[1:]] == ["  dobbe: not there", "  taco_play: not there"]
    with pytest.raises(DatasetError, match=r"(?s)3 of 3 datasets .*fmb: cannot list memory://bucket/nowhere"):
        mixture(HERE, kind("memory://bucket/nowhere"))


def test_a_directory_that_cannot_be_listed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = files.list_directories

    def refuse(location: files.Location) -> list[str]:
        if str(location).endswith("fmb_dataset"):
            raise PermissionError("not for you")
        return listed(location)

    monkeypatch.setattr(files, "list_directories", refuse)
    with pytest.raises(DatasetError, match=r"(?s)2 of 3 datasets .*fmb: cannot list .*not for you.*kuka: not there"):
        mixture({"fmb": 1.0, "kuka": 1.0, "cmu_stretch": 1.0}, root)


def test_several_other_versions_are_not_guessed(root: Path, tmp_path: Path) -> None:
    for version in ("0.1.0", "0.2.0"):
        (tmp_path / "dobbe" / version).mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"dobbe: no version 0\.0\.1; there: 0\.1\.0, 0\.2\.0"):
        mixture({"dobbe": 1.0}, tmp_path)


def test_wrong_choices_are_named_at_once(root: Path) -> None:
    with pytest.raises(ValueError, match=r"balance='size', .*missing='no', .*no mixture 'oxe_soup'; did you mean"):
        mixture("oxe_soup", root, balance="size", missing="no")
    with pytest.raises(ValueError, match=r"images='bgr', .*no dataset 'fractal' in the catalogue; did you mean"):
        mixture({"fractal": 1.0}, root, images="bgr")
