"""A checkpoint written by openpi's own trainer: both layouts of its weights, and its normalisation statistics."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openpi_like.data.stats import load_openpi_stats, save_openpi_stats
from openpi_like.models.arrays import MemoryArrays, open_arrays
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.weights import load_weights, plan_load, read_weights, unflatten
from openpi_like.robots import ActionField, Camera, Robot, StateField
from tests.models.golden_set import config_json, open_golden
from tests.models.test_golden_pi0 import config_of


@pytest.fixture(scope="module")
def expected(golden: Path) -> dict[str, Any]:
    return open_golden(golden / "item6_checkpoint_expected.npz")


@pytest.fixture(scope="module")
def step(golden: Path, expected: dict[str, Any]) -> Path:
    return golden / "item6_checkpoint" / str(config_json(expected)["step"])


@pytest.fixture(scope="module")
def pi0(golden: Path) -> tuple[Pi0Config, dict[str, np.ndarray]]:
    """Config and weights (ours, nested) of item 1, which the checkpoint holds."""
    arrays = open_golden(golden / "item1_pi0.npz")
    config = config_of(arrays)
    source = MemoryArrays({k.removeprefix("params/"): np.asarray(v) for k, v in arrays.items() if "params/" in k})
    return config, unflatten(read_weights(source, plan_load(config, source)))


def assert_same(got: Any, want: Any) -> None:
    for key, value in want.items():
        if isinstance(value, dict):
            assert_same(got[key], value)
        else:
            np.testing.assert_array_equal(got[key], value, err_msg=key)
    assert got.keys() == want.keys()


def test_golden_checkpoint_params_in_both_layouts(golden: Path, step: Path, pi0: Any) -> None:
    config, weights = pi0
    for path in (step, step / "params", golden / "item6_checkpoint_params_only"):
        assert_same(load_weights(config, path), weights)


def test_golden_checkpoint_raw_weights_of_the_train_state(step: Path, expected: dict[str, Any]) -> None:
    """The train state beside them holds the weights that were not averaged, under "params" again."""
    arrays = open_arrays(step / "train_state")
    norms = {k.removeprefix("train_state_params_norm/"): v for k, v in expected.items() if "params_norm/" in k}
    assert norms
    stored = {k.removesuffix("/value"): k for k in arrays.shapes if k.startswith("params/")}
    assert {k.removeprefix("params/") for k in stored} == norms.keys()
    for name, norm in norms.items():
        array = arrays.read(stored[f"params/{name}"])
        np.testing.assert_allclose(np.linalg.norm(array), norm, rtol=1e-5, err_msg=name)


def robot(dims: int, normalization: str) -> Robot:
    return Robot(
        name="golden",
        cameras=(Camera("base", "image"),),
        state=(StateField("s", "state", dims),),
        action=(ActionField("a", "action", dims),),
        control_hz=10.0,
        action_horizon=2,
        execute_steps=1,
        normalization=normalization,
    )


@pytest.mark.parametrize("mode", ["zscore", "quantile"])
def test_golden_checkpoint_statistics(step: Path, expected: dict[str, Any], mode: str, tmp_path: Path) -> None:
    with np.load(step.parents[1] / "item6_checkpoint_expected.npz") as z:
        want = {k: z[k] for k in z.files if k.startswith("norm_stats/")}
    path = step / "assets" / config_json(expected)["asset_id"] / "norm_stats.json"
    dims = want["norm_stats/state/mean"].size
    for used in (dims, dims - 1):
        normalization = load_openpi_stats(path, robot(used, mode))
        for what, stats in (("state", normalization.state), ("actions", normalization.action)):
            for k in ("mean", "std", "q01", "q99"):
                np.testing.assert_array_equal(getattr(stats, k), want[f"norm_stats/{what}/{k}"][:used])
    save_openpi_stats(load_openpi_stats(path, robot(dims, mode)), tmp_path / "again.json")
    theirs, again = (json.loads(p.read_text())["norm_stats"] for p in (path, tmp_path / "again.json"))
    assert again == theirs


def test_golden_checkpoint_statistics_that_do_not_fit(step: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    path = step / "assets" / config_json(expected)["asset_id"] / "norm_stats.json"
    with pytest.raises(ValueError, match=r"state has {'mean': \d+.*expected at least 40.*; actions has"):
        load_openpi_stats(path, robot(40, "zscore"))
    stored = json.loads(path.read_text())
    for what in ("state", "actions"):
        stored["norm_stats"][what] |= {"q01": None, "q99": None}
    (tmp_path / "old.json").write_text(json.dumps(stored))
    dims = len(stored["norm_stats"]["state"]["mean"])
    old = load_openpi_stats(tmp_path / "old.json", robot(dims, "zscore"))
    assert old.state.q01 == old.state.mean
    with pytest.raises(ValueError, match="state has no q01 and q99, which robot 'golden' is normalised by; actions"):
        load_openpi_stats(tmp_path / "old.json", robot(dims, "quantile"))
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r'expected \{"norm_stats"'):
        load_openpi_stats(tmp_path / "x.json", robot(dims, "zscore"))


def test_golden_checkpoint_of_another_family(step: Path, pi0: Any) -> None:
    with pytest.raises(ValueError, match=r"these arrays look like pi0, this config is pi0\.5"):
        load_weights(dataclasses.replace(pi0[0], pi05=True), step)
