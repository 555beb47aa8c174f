"""Studies: tables that cannot be run are refused, and what is kept equal is compared."""

import dataclasses

import pytest

from openpi_like.config import load_run
from openpi_like.train.study import Arm, Study, unequal


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
