"""OpenVLA's dataset_statistics.json: its formula on its numbers, and what does not fit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openpi_like.data.openvla_stats import load_openvla_stats
from openpi_like.robots.sawyer import SAWYER

ROBOT = dataclasses.replace(SAWYER, normalization="quantile")
RNG = np.random.default_rng(0)


def field(n: int, **more: Any) -> dict[str, Any]:
    low, high = -1 - RNG.random(n), 1 + RNG.random(n)
    return {
        "mean": [0.1] * n,
        "std": [0.5] * n,
        "q01": list(low),
        "q99": list(high),
        "min": list(low - 1),
        "max": list(high + 1),
        **more,
    }


@pytest.fixture
def stored() -> dict[str, Any]:
    dataset = {"action": field(4, mask=[True, True, True, False]), "proprio": field(4), "num_transitions": 7}
    return {"one": dataset, "two": dataset}


def written(tmp_path: Path, stored: Any) -> Path:
    path = tmp_path / "dataset_statistics.json"
    path.write_text(json.dumps(stored))
    return path


def test_its_formula(tmp_path: Path, stored: dict[str, Any]) -> None:
    normalization = load_openvla_stats(written(tmp_path, stored), ROBOT, dataset="two")
    q01, q99 = (np.array(stored["two"]["action"][k]) for k in ("q01", "q99"))
    actions = RNG.uniform(q01, q99, (20, 4))
    expected = np.where([True, True, True, False], 2 * (actions - q01) / (q99 - q01 + 1e-8) - 1, actions)
    got = normalization.apply_actions(actions)
    np.testing.assert_allclose(got, expected, atol=2e-6)
    np.testing.assert_allclose(normalization.invert_actions(got), actions, atol=2e-6)
    assert normalization.action.count == 7
    normalization.check(ROBOT)


@pytest.mark.parametrize("proprio", [None, field(4) | dict.fromkeys(("q01", "q99", "mean"), [0.0] * 4)])
def test_a_state_that_was_not_kept_stays_as_it_is(tmp_path: Path, stored: dict[str, Any], proprio: Any) -> None:
    one = {k: v for k, v in stored["one"].items() if k != "proprio"}
    if proprio is not None:
        one["proprio"] = proprio
    normalization = load_openvla_stats(written(tmp_path, {"one": one}), ROBOT)
    state = RNG.normal(size=4)
    np.testing.assert_allclose(normalization.apply_state(state), state, atol=2e-6)


def test_what_does_not_fit_is_listed(tmp_path: Path, stored: dict[str, Any]) -> None:
    path = written(tmp_path, stored)
    with pytest.raises(ValueError, match=r"2 datasets, expected one of them to be named: \['one', 'two'\]"):
        load_openvla_stats(path, ROBOT)
    with pytest.raises(ValueError, match="no dataset 'twoo'; did you mean 'two'"):
        load_openvla_stats(path, ROBOT, dataset="twoo")
    stored["one"]["proprio"] = field(3)
    del stored["one"]["action"]["std"]
    path = written(tmp_path, {"one": stored["one"]})
    with pytest.raises(ValueError, match=r"normalised by 'zscore'.*action lacks std.*proprio has .*'q01': 3") as e:
        load_openvla_stats(path, SAWYER)
    assert "hand_0" in str(e.value)
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_openvla_stats(path, ROBOT)
    with pytest.raises(ValueError, match=r"expected \{dataset"):
        load_openvla_stats(written(tmp_path, {"norm_stats": {}}), ROBOT)
