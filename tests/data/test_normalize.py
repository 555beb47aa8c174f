"""Normalisation and statistics against golden vectors and plain numpy."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_like.config import from_json, to_json
from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.index import open_index
from openpi_like.data.normalize import Normalization
from openpi_like.data.stats import compute_normalization, load_normalization, save_normalization
from openpi_like.robots import StateField
from tests.data.reference_stats import stats_of, stats_of_blocks
from tests.data.toy import ARM, CART


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), count=st.integers(1, 300), blocks=st.integers(1, 5),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)  # fmt: skip
def test_statistics_in_blocks_are_those_of_numpy(seed: int, count: int, blocks: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(count, 3)) * scale).astype(np.float32)
    x[:, 1] = np.round(x[:, 1] / scale)  # with ties, zeros and both signs
    x[:, 2] = scale
    expected = stats_of(x)
    got = stats_of_blocks(expected.names, [b for b in np.array_split(x, blocks) if len(b)])
    assert (got.min, got.max, got.count) == (expected.min, expected.max, count)
    for name in ("mean", "std", "q01", "q99"):
        ours, theirs = getattr(got, name), getattr(expected, name)
        assert np.all(np.abs(np.array(ours) - theirs) <= 1e-14 * np.abs(x).max(axis=0)), name


def test_statistics_are_of_the_encoded_chunks_inside_episodes(toy: Path) -> None:
    dataset = EpisodeDataset(open_index(toy, "train"), ARM)
    rows = []
    for frame in range(len(dataset)):
        state, chunk, mask = dataset.encoded(np.array([frame]))
        rows += [(state[0], chunk[0, a] if mask[0, a] else None) for a in range(ARM.action_horizon)]
    states = stats_of(np.stack([s for s, _ in rows]))
    actions = stats_of(np.stack([c for _, c in rows if c is not None]))
    got = compute_normalization(dataset)
    assert (got.state.names, got.action.names) == (ARM.state_names, ARM.action_names)
    assert (got.state.count, got.action.count) == (110, actions.count)
    for ours, theirs in ((got.state, states), (got.action, actions)):
        for name in ("mean", "std", "min", "max"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got.action.q99, actions.q99, rtol=1e-5, atol=1e-7)


def test_statistics_of_two_datasets_are_those_of_their_union(toy: Path) -> None:
    train, val = (EpisodeDataset(open_index(toy, split), CART) for split in ("train", "val"))
    both = compute_normalization(train, val)
    x = np.concatenate([d.encoded(np.arange(len(d)))[0] for d in (train, val)])
    np.testing.assert_allclose(both.state.q01, np.quantile(x, 0.01, axis=0), rtol=1e-6)
    with pytest.raises(ValueError, match=r"robots \['cart', 'arm'\], expected one and the same"):
        compute_normalization(train, EpisodeDataset(train.index, ARM))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), mode=st.sampled_from(["zscore", "quantile"]))
def test_inverse_undoes_normalisation(seed: int, mode: str) -> None:
    rng = np.random.default_rng(seed)
    data = (rng.normal(size=(50, 4)) * 10.0 ** rng.uniform(-3, 3, 4) + rng.normal(size=4)).astype(np.float32)
    data[:, 3] = 0.25
    stats = stats_of(data)
    normalization = Normalization("r", mode, stats, stats)
    normalized = normalization.apply_actions(data)
    np.testing.assert_allclose(
        normalization.invert_actions(normalized), data, rtol=1e-4, atol=1e-5 * np.abs(data).max()
    )
    np.testing.assert_array_equal(normalized[:, 3], 0)
    if mode == "zscore":
        np.testing.assert_allclose(normalized[:, :3].std(axis=0), 1, rtol=2e-3)
    else:
        inside = (normalized[:, :3] >= -1 - 1e-3) & (normalized[:, :3] <= 1 + 1e-3)
        assert inside.mean(axis=0).min() >= 0.95


def test_constant_dims_are_named_and_keep_their_unit(toy: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = open_index(toy, "val")
    robot = dataclasses.replace(
        ARM, state=(*ARM.state, StateField("still", "observation/state", 1)), name="half", normalization="zscore"
    )
    dataset = EpisodeDataset(index, robot)
    constant = dataclasses.replace(index, columns=index.columns | {"observation/state": np.ones((19, 4), np.float32)})
    with caplog.at_level(logging.WARNING):
        normalization = compute_normalization(EpisodeDataset(constant, robot))
    assert "state of robot 'half': hand_0 [m], hand_1 [m], gripper_0 [1], still_0 [1] vary by less" in caplog.text
    x = dataset.encoded(np.arange(3))[0]
    np.testing.assert_allclose(normalization.apply_state(x)[:, 6], x[:, 6] - 1, atol=1e-6)


def test_files_come_back_and_are_checked(toy: Path, tmp_path: Path) -> None:
    normalization = compute_normalization(EpisodeDataset(open_index(toy, "train"), ARM))
    assert from_json(json.loads(json.dumps(to_json(normalization)))) == normalization
    save_normalization(normalization, tmp_path / "stats" / "arm.json")
    assert load_normalization(tmp_path / "stats" / "arm.json", ARM) == normalization
    with pytest.raises(ValueError, match="robot arm, expected cart; state dims"):
        load_normalization(tmp_path / "stats" / "arm.json", CART)
    # The numbers are those of both modes; the robot says which one it is.
    quantile = dataclasses.replace(ARM, normalization="quantile")
    assert load_normalization(tmp_path / "stats" / "arm.json", quantile) == dataclasses.replace(
        normalization, mode="quantile"
    )
    with pytest.raises(ValueError, match="robot 'arm': mode zscore, expected quantile; compute"):
        normalization.check(quantile)
    with pytest.raises(FileNotFoundError, match=r"no statistics .*cart.json; in .*: arm.json; make them with"):
        load_normalization(tmp_path / "stats" / "cart.json", CART)
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no normalisation"):
        load_normalization(tmp_path / "x.json", ARM)


def test_relative_actions_are_normalised_by_statistics_of_chunks_of_their_length(toy: Path, tmp_path: Path) -> None:
    index, path = open_index(toy, "train"), tmp_path / "stats.json"
    longer, cart = (dataclasses.replace(robot, action_horizon=7) for robot in (ARM, CART))
    for robot in (ARM, CART):
        save_normalization(compute_normalization(EpisodeDataset(index, robot)), tmp_path / f"{robot.name}.json")
    with pytest.raises(ValueError, match=r"chunks of 5 actions, expected 7 .*'hand' is relative to .* run's own"):
        load_normalization(tmp_path / "arm.json", longer)
    assert load_normalization(tmp_path / "cart.json", cart).action_horizon == 3  # of absolute actions
    old = to_json(load_normalization(tmp_path / "arm.json", ARM))
    del old["action_horizon"]  # as written before it was kept
    path.write_text(json.dumps(old))
    assert load_normalization(path, longer).action_horizon is None


def test_wrong_sizes_and_numbers() -> None:
    stats = stats_of(np.eye(3, dtype=np.float32))
    with pytest.raises(ValueError, match=r"got shape \(2, 4\), expected last axis 3: x0, x1, x2"):
        Normalization("r", "zscore", stats, stats).apply_state(np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"std has values that are not finite.*q01 has 1 values, expected 3") as e:
        dataclasses.replace(stats, std=(1.0, float("nan"), 1.0), q01=(1.0,))
    assert "FieldStats" in str(e.value)
    with pytest.raises(ValueError, match="mode 'minmax', expected 'zscore' or 'quantile'"):
        Normalization("r", "minmax", stats, stats)
