"""Own, pretrained and blended statistics: which numbers a run gets, and every reason why it cannot get them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openpi_like.data.blend import blend
from openpi_like.data.normalize import FieldStats, Normalization
from openpi_like.data.stats import save_normalization
from openpi_like.robots import ActionField, Robot, StateField
from openpi_like.robots.sawyer import SAWYER
from openpi_like.train.checkpoints.contract import CheckpointError, Contract
from openpi_like.train.statistics import Blended, Own, Pretrained, load_statistics, misfits
from tests.train.run_files import run_config


def field(names: tuple[str, ...], centre: float, count: int) -> FieldStats:
    of = lambda x: (x,) * len(names)  # noqa: E731
    return FieldStats(names, of(centre), of(1.0), of(centre - 2), of(centre + 2), of(centre - 3), of(centre + 3), count)


@pytest.fixture
def start(contract_of: Any, policy: Any) -> Contract:
    return contract_of(policy)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Of own statistics."""
    own = Normalization(SAWYER.name, "zscore", field(SAWYER.state_names, 4.0, 30), field(SAWYER.action_names, 5.0, 240))
    save_normalization(own, tmp_path / "sawyer.json")
    return tmp_path


def load(statistics: Any, directory: Path, start: Contract | None, robot: Robot = SAWYER) -> Normalization:
    return load_statistics(statistics, directory, {robot.name: robot}, start)[robot.name]


def test_each_takes_its_numbers(directory: Path, start: Contract) -> None:
    own, pretrained = load(Own(), directory, None), load(Pretrained(), directory / "none", start)
    assert own.state.mean == (4.0,) * 4
    assert pretrained == start.normalizations["sawyer"]
    blended = load(Blended(prior=10_000), directory, start)
    # 30 frames of one's own, 10 of the checkpoint's.
    assert blended.state == blend(own.state, pretrained.state, 0.75)
    assert blended.action == blend(own.action, pretrained.action, 0.75)
    np.testing.assert_allclose(blended.state.mean, 0.75 * 4 + 0.25 * 0.5)
    assert load(Blended(prior=2), directory, start).state == blend(own.state, pretrained.state, 30 / 32)


def test_weights_are_those_that_the_class_states() -> None:
    weights = [Blended().weight(200 * episodes, 10**6) for episodes in (5, 50, 1_000)]
    np.testing.assert_allclose(weights, (0.09, 0.5, 0.95), atol=0.003)
    assert Blended().weight(10_000, 0) == 0.5  # of statistics that do not say how many they are of
    with pytest.raises(ValueError, match="prior=0, expected at least 1 frame"):
        Blended(prior=0)


def test_a_robot_like_another_can_have_its_statistics(directory: Path, start: Contract) -> None:
    twin = dataclasses.replace(SAWYER, name="twin")
    with pytest.raises(CheckpointError, match=r"no statistics of robot 'twin'; known: 'sawyer'; name the one"):
        load(Pretrained(), directory, start, twin)
    found = load(Pretrained(robot="sawyer"), directory, start, twin)
    found.check(twin)
    assert found.action == start.normalizations["sawyer"].action


def test_every_difference_of_meaning_is_named() -> None:
    hand, gripper = SAWYER.action
    state = dataclasses.replace(SAWYER.state[0], unit="deg")
    other = dataclasses.replace(
        SAWYER,
        normalization="quantile",
        control_hz=10.0,
        state=(state, SAWYER.state[1]),
        action=(hand, dataclasses.replace(gripper, gripper=None, size=2)),
    )
    assert misfits(SAWYER, SAWYER) == []
    assert misfits(SAWYER, dataclasses.replace(SAWYER, name="x", cameras=SAWYER.cameras[:1], execute_steps=1)) == []
    assert misfits(SAWYER, other) == [
        "normalization='quantile', theirs is 'zscore'",
        "state 'hand': unit rad, theirs is m",
        "action 'hand': rate [Hz] 10.0, theirs is 20.0",
        "action 'gripper': size 2, theirs is 1",
        "action 'gripper': gripper False, theirs is True",
    ]
    joints = (StateField("joints", "s", 4, unit="rad"),)
    target = (ActionField("joints", "a", 4, unit="rad", relative_to="joints"),)
    arm = dataclasses.replace(SAWYER, state=joints, action=target)
    assert misfits(SAWYER, arm) == [
        "state fields joints; theirs are hand, gripper",
        "action fields joints; theirs are hand, gripper",
    ]
    absolute = dataclasses.replace(arm, action=(dataclasses.replace(target[0], relative_to=None),))
    assert misfits(arm, absolute) == ["action 'joints': relative_to None, theirs is joints"]
    assert misfits(absolute, arm) == ["action 'joints': relative_to joints, theirs is None"]
    delta = dataclasses.replace(arm, action=(dataclasses.replace(absolute.action[0], command="delta"),))
    assert misfits(absolute, delta) == ["action 'joints': command delta, theirs is absolute"]
    longer = dataclasses.replace(arm, action_horizon=2 * arm.action_horizon)
    ours, theirs = (f"of {n} actions at 20 Hz" for n in (longer.action_horizon, arm.action_horizon))
    assert misfits(arm, longer) == [f"action 'joints': chunks {ours}, theirs is {theirs}"]
    # Targets are where they are, at any rate.
    assert misfits(absolute, dataclasses.replace(absolute, control_hz=5.0)) == []


def test_all_robots_that_do_not_fit_are_named(directory: Path, start: Contract) -> None:
    robots = {name: dataclasses.replace(SAWYER, name=name, control_hz=5.0) for name in ("a", "sawyer")}
    with pytest.raises(CheckpointError) as raised:
        load_statistics(Pretrained(), directory, robots, start)
    assert "no statistics of robot 'a'" in str(raised.value)
    assert "of 'sawyer' do not fit robot 'sawyer':\n  action 'hand': rate [Hz] 5.0, theirs is 20.0\nuse" in str(
        raised.value
    )


def test_published_weights_have_none(directory: Path, policy: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'sawyer': published weights come without statistics; use Own\(\)"):
        load(Blended(), directory, None)
    with pytest.raises(ValueError, match=r"statistics=Pretrained\(robot=None\) needs a warm_start checkpoint"):
        run_config(
            tmp_path,
            policy,
            statistics=Pretrained(),
            keep=dataclasses.replace(run_config(tmp_path, policy).keep, best=0),
        )
