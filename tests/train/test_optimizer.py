"""Schedule and optimiser against the recorded reference."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from openpi_like.train.optimizer import OptimizerConfig


def _config(z, weight_decay=1e-10):
    warmup, decay, peak, end = z["lr_schedule/warmup_decay_peak_end"]
    return OptimizerConfig(
        peak_lr=float(peak),
        end_lr=float(end),
        warmup_steps=int(warmup),
        decay_steps=int(decay),
        weight_decay=weight_decay,
    )


def test_golden_schedule(golden):
    z = np.load(golden / "item5_functions.npz")
    schedule = _config(z).schedule()
    np.testing.assert_allclose([schedule(s) for s in z["lr_schedule/steps"]], z["lr_schedule/lr"], rtol=1e-5)


def test_golden_adamw(golden):
    z = np.load(golden / "item5_functions.npz")
    optimizer = _config(z, float(z["adamw/weight_decay"])).create()
    params = {k: jnp.asarray(z[f"adamw/params0/{k}"]) for k in "ab"}
    state = optimizer.init(params)
    for i in range(5):
        grads = {k: jnp.asarray(z[f"adamw/grads{i}/{k}"]) for k in "ab"}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for k in "ab":
            np.testing.assert_allclose(params[k], z[f"adamw/params{i + 1}/{k}"], rtol=1e-5, atol=1e-7)


def test_schedule_by_hand():
    schedule = OptimizerConfig(peak_lr=1.0, end_lr=0.1, warmup_steps=3, decay_steps=13).schedule()
    expected = {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 8: 0.55, 13: 0.1, 99: 0.1}  # halfway the cosine: (1 + 0.1) / 2
    for step, value in expected.items():
        assert float(schedule(step)) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(("warmup", "decay"), [(10, 10), (11, 10), (-1, 10)])
def test_impossible_schedules_are_refused(warmup, decay):
    with pytest.raises(ValueError, match="expected 0 <= warmup_steps < decay_steps"):
        OptimizerConfig(warmup_steps=warmup, decay_steps=decay)
