"""DAgger: when the expert takes over, what a round trains on, and the program's two steps that make its data."""

import dataclasses
import runpy
from pathlib import Path

import numpy as np
import pytest

from openpi_like.config import load_run
from openpi_like.data.selection import Selection
from openpi_like.serve.takeover import TakeOver
from openpi_like.train.checkpoints.checkpoint import Keep
from openpi_like.train.checkpoints.warm_start import WarmStart
from openpi_like.train.dagger import CORRECTIONS, Round, config_file, round_config
from openpi_like.train.statistics import Blended, Pretrained

ROOT = Path(__file__).resolve().parents[2]
ROUND = Round(start="runs/a", run_dir="runs/b", robot="sawyer", steps=300, recorded="data/c/1.0.0", share=0.25)


def test_corrections_have_their_share() -> None:
    before = load_run(ROOT / "configs" / "demo_pretrain.py")  # 0.9 of sawyer, 0.1 of pusht
    after = round_config(before, ROUND)
    weights = np.array([entry.weight for entry in after.data.entries])
    np.testing.assert_allclose(weights / weights.sum(), [0.675, 0.075, 0.25])
    assert after.data.entries[:2] == before.data.entries
    last = after.data.entries[2]
    assert (last.robot, last.path, last.val_split) == (before.data.entries[0].robot, "data/c/1.0.0", None)
    assert last.selection == CORRECTIONS == Selection(intervened="intervened", success="episode_metadata/success")
    assert [entry.name for entry in after.data.entries] == ["sawyer", "pusht", "sawyer, corrected"]
    assert after.warm_start is not None
    assert (after.warm_start.checkpoint, after.warm_start.reinitialize) == ("runs/a", ())
    assert (after.stats, after.tokenizer, after.steps, after.run_dir) == (before.stats, None, 300, "runs/b")
    assert (after.optimizer.warmup_steps, after.optimizer.decay_steps) == (30, 300)
    control = round_config(before, dataclasses.replace(ROUND, recorded=None))
    assert control == dataclasses.replace(after, data=before.data)


def test_a_round_of_a_policy_that_was_fine_tuned_means_the_same_by_numbers_and_is_of_full_length() -> None:
    before = load_run(ROOT / "configs" / "demo_pretrain.py")
    start = WarmStart("runs/base")
    tuned = dataclasses.replace(before, warm_start=start, statistics=Blended(), patience=3, keep=Keep(newest=3, best=1))
    after = round_config(tuned, ROUND)
    assert after.statistics == Pretrained()  # blended once more, they would be others
    assert (after.patience, after.keep) == (None, Keep(newest=3))


def test_a_round_is_a_config_file(tmp_path: Path) -> None:
    path, config = tmp_path / "round.py", str(ROOT / "configs" / "demo_pretrain.py")
    path.write_text(config_file(config, ("batch_size=4", "stats=elsewhere"), ROUND))
    before = dataclasses.replace(load_run(config), batch_size=4, stats="elsewhere")
    assert load_run(path) == round_config(before, ROUND)


def test_rounds_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"share=1\.0, expected .* between 0 and 1; steps=0"):
        dataclasses.replace(ROUND, share=1.0, steps=0)
    with pytest.raises(ValueError, match="does not train robot 'sawyr'; did you mean 'sawyer'"):
        round_config(load_run(ROOT / "configs" / "demo_pretrain.py"), dataclasses.replace(ROUND, robot="sawyr"))
    with pytest.raises(ValueError, match=r"share=2\.0, late=0\.5, expected both in \[0, 1\]; segment=0"):
        TakeOver(share=2.0, segment=0)
    args = runpy.run_path(str(ROOT / "train" / "dagger.py"), run_name="dagger")["Args"]
    values = {"config": "c.py", "start": Path("a"), "robot": "sawyer", "run": Path("b")}
    with pytest.raises(ValueError, match="first_seed=9980: layouts of 2 rounds of 20 episodes, expected below 10000"):
        args(**values, first_seed=9_980, rounds=2)
    args(**values, first_seed=9_960, rounds=2)


def test_the_expert_takes_over_in_segments_and_in_the_end() -> None:
    rule = TakeOver(share=0.3, segment=5, late=0.6)
    acts = np.array([[rule.expert_acts(t, 100, seed) for t in range(100)] for seed in range(400)])
    assert acts[:, 60:].all()
    segments = acts[:, :60].reshape(400, 12, 5)
    assert (segments.all(axis=2) == segments.any(axis=2)).all()
    # 4,800 draws of 0.3 have a standard deviation of 0.0066; neighbours are not alike more often than by chance.
    drawn = segments[:, :, 0]
    assert abs(drawn.mean() - 0.3) < 0.025
    assert abs((drawn[:, 1:] & drawn[:, :-1]).mean() - 0.09) < 0.02
    again = [rule.expert_acts(t, 100, 17) for t in reversed(range(100))]
    assert again[::-1] == acts[17].tolist()
    assert not any(TakeOver(share=0.0, late=1.0).expert_acts(t, 100, 1) for t in range(100))
