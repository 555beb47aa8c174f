"""Studies: tables that cannot be run are refused, and what is kept equal is compared."""

import dataclasses

import pytest

from openpi_like.config import load_run, override
from openpi_like.train.study import Arm, Study, learning_curve, unequal


def test_arms_do_not_share_files() -> None:
    arms = {name: Arm("configs/studies/pi0.py") for name in ("a, b", "a b", "c/d")}
    message = r"arm 'a b': its files would be 'a_b', as arm 'a, b'; .*; arm 'c/d': its files would be 'c/d'; give"
    with pytest.raises(ValueError, match=message):
        Study(arms, "sawyer", ("button-press",), 1)


def test_what_a_study_keeps_equal() -> None:
    one = load_run("configs/studies/pi0.py")
    assert unequal({}) == []
    two = dataclasses.replace(one, seed=one.seed + 1, steps=one.steps + 1)
    assert unequal({"one": one, "two": two, "three": one}) == [
        "arm 'two': steps is not that of 'one'",
        "arm 'two': seed is not that of 'one'",
    ]


def test_a_learning_curve_differs_in_its_data_alone() -> None:
    """The first so many episodes, each part of the next, and all validated on the same ones."""
    arms = learning_curve("configs/studies/new_task.py", (5, 10, 50), start="before", set=("seed=3",))
    assert list(arms) == ["5 episodes", "10 episodes", "50 episodes"]
    configs = {name: override(load_run(arm.config), arm.set) for name, arm in arms.items()}
    assert [c.data.entries[0].split for c in configs.values()] == ["train[:5]", "train[:10]", "train[:50]"]
    assert {(c.data.entries[0].val_split, c.seed) for c in configs.values()} == {("val", 3)}
    assert all(arm.own_statistics and arm.start == "before" for arm in arms.values())
    assert unequal(configs, ("data",)) == []
    assert len(unequal(configs)) == 2
    arms["one"] = Arm("configs/studies/new_task.py", ("seed=4",))
    configs["one"] = override(load_run(arms["one"].config), arms["one"].set)
    assert unequal(configs, ("data",)) == ["arm 'one': seed is not that of '5 episodes'"]


@pytest.mark.parametrize("episodes", [(), (0, 5), (10, 5), (5, 5)])
def test_a_learning_curve_grows(episodes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected numbers from 1 on, each greater than the one before"):
        learning_curve("configs/studies/new_task.py", episodes)


def test_what_a_study_cannot_vary() -> None:
    arms = {"a": Arm("configs/studies/pi0.py")}
    with pytest.raises(ValueError, match="varies='date'; did you mean 'data'"):
        Study(arms, "sawyer", ("button-press",), 1, varies=("date",))
