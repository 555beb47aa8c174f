"""Schedule and optimiser against the recorded reference."""

import pytest

from openpi_like.train.optimizer import OptimizerConfig


def test_schedule_by_hand():
    schedule = OptimizerConfig(peak_lr=1.0, end_lr=0.1, warmup_steps=3, decay_steps=13).schedule()
    expected = {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 8: 0.55, 13: 0.1, 99: 0.1}  # halfway the cosine: (1 + 0.1) / 2
    for step, value in expected.items():
        assert float(schedule(step)) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(("warmup", "decay"), [(10, 10), (11, 10), (-1, 10)])
def test_impossible_schedules_are_refused(warmup, decay):
    with pytest.raises(ValueError, match="expected 0 <= warmup_steps < decay_steps"):
        OptimizerConfig(warmup_steps=warmup, decay_steps=decay)
