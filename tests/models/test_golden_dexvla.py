"""DexVLA's expert beside the released code's numbers, see tests/bench/golden_dexvla.py; and its published sizes."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from openpi_like.models.ddim import Ddim
from openpi_like.models.dexvla import Fusion
from openpi_like.models.dexvla_names import FUSION, expert_rows
from openpi_like.models.scale_dp import ScaleDp, ScaleDpConfig
from openpi_like.models.weights import flatten, put_weights, unflatten

GOLDEN = Path(__file__).parent / "golden"
NUMBERS = dict(np.load(GOLDEN / "dexvla_expert.npz"))
CONFIG = ScaleDpConfig(width=16, depth=2, heads=2, combined=24)
ROBOT = jnp.ones(3, jnp.int32)


def make(config: ScaleDpConfig, condition_dim: int, state_dim: int, action_dim: int, horizon: int, robots: int) -> Any:
    sizes = {"condition_dim": condition_dim, "state_dim": state_dim, "action_dim": action_dim, "horizon": horizon}
    of: Any = {**sizes, "dtype": "float32", "unroll": False, "remat": None}
    return ScaleDp(jax.random.key(0), config, robots=robots, **of)


@functools.cache
def expert() -> ScaleDp:
    """Their weights in the maps of the second of two robots."""
    model = make(CONFIG, 12, 5, 3, 4, 2)
    state = nnx.state(model)
    ours = {name: np.asarray(x).copy() for name, x in flatten(nnx.to_pure_dict(state)).items()}
    for row in expert_rows(CONFIG.depth, robot=1):
        value = row.to_ours(NUMBERS[f"weight/{row.theirs}"][row.take], ours[row.ours][row.at].shape)
        ours[row.ours][row.at] = value
    put_weights(state, unflatten({name: jnp.asarray(x) for name, x in ours.items()}))
    nnx.update(model, state)
    return model


def said(model: ScaleDp) -> jax.Array:
    told = model.told(jnp.asarray(NUMBERS["condition"]), jnp.asarray(NUMBERS["state"]))
    return model(jnp.asarray(NUMBERS["x"]), jnp.asarray(NUMBERS["step"]), told, ROBOT)


def test_noise() -> None:
    np.testing.assert_allclose(said(expert()), NUMBERS["noise"], rtol=2e-4, atol=2e-4)


def test_sampling() -> None:
    model = expert()
    told = model.told(jnp.asarray(NUMBERS["condition"][:1]), jnp.asarray(NUMBERS["state"][:1]))
    predict = lambda x, step: model(x, step, told, ROBOT[:1])  # noqa: E731
    got = Ddim().sample(predict, jnp.asarray(NUMBERS["start"]))
    np.testing.assert_allclose(got, NUMBERS["sampled"], atol=2e-4)


def test_gradients() -> None:
    """By their names; the maps of the robot that is not there have none."""
    grads = nnx.grad(lambda model: jnp.square(said(model) - NUMBERS["target"]).mean())(expert())
    ours = {name: np.asarray(x) for name, x in flatten(nnx.to_pure_dict(grads)).items()}
    found: dict[str, list[tuple[Any, np.ndarray]]] = {}
    for row in expert_rows(CONFIG.depth, robot=1):
        found.setdefault(row.theirs, []).append((row.take, row.to_theirs(ours[row.ours][row.at])))
    wanted = {name[9:]: x for name, x in NUMBERS.items() if name.startswith("gradient/")}
    assert len(wanted) == 13
    for name, expected in wanted.items():
        for take, got in found[name]:
            size = np.abs(expected).max()
            np.testing.assert_allclose(got, expected[take or ...], atol=1e-4 * size, err_msg=name)
    for name in ("action_in", "action_in_bias", "action_out", "action_out_bias"):
        assert not ours[name][0].any()
        assert ours[name][1].any()


@pytest.mark.parametrize(("config", "millions"), [(ScaleDpConfig.large(), 453), (ScaleDpConfig.huge(), 944)])
def test_published_sizes(config: ScaleDpConfig, millions: int) -> None:
    shapes = jax.eval_shape(lambda: nnx.state(make(config, 1536, 14, 14, 50, 1)))
    sizes = {name: x.size for name, x in flatten(nnx.to_pure_dict(shapes)).items()}
    blocks = sum(n for name, n in sizes.items() if name.startswith("layers/"))
    assert round(blocks / 1e6) == millions


def test_what_was_read_and_written_becomes_one_vector() -> None:
    numbers = dict(np.load(GOLDEN / "dexvla_film.npz"))
    fusion = Fusion(jax.random.key(0), 12)
    hidden, asked = jnp.asarray(numbers["hidden"]), int(numbers["asked"])
    read, written = hidden[:asked].mean(0, keepdims=True), hidden[asked:].mean(0, keepdims=True)
    # Fresh, it does not matter what was written.
    np.testing.assert_array_equal(fusion(read, written), fusion(read, 5 - written))
    for mine, theirs in FUSION.items():
        getattr(fusion, mine).kernel[...] = jnp.asarray(numbers[f"weight/{theirs}.weight"].T)
        getattr(fusion, mine).bias[...] = jnp.asarray(numbers[f"weight/{theirs}.bias"])
    np.testing.assert_allclose(fusion(read, written)[0], numbers["fused"], atol=1e-5)


def test_a_fresh_one_says_nothing() -> None:
    """Whatever it is told: so the loss on unit noise is that of saying zeros."""
    model = make(ScaleDpConfig.tiny(), 6, 2, 3, 4, 2)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.float32(rng.standard_normal(shape))  # noqa: E731
    out = model(draw(5, 4, 3), jnp.arange(5) * 20, model.told(draw(5, 6), draw(5, 2)), jnp.array([0, 1, 1, 0, 1]))
    assert out.shape == (5, 4, 3)
    assert not out.any()


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="depth=0, expected at least 1; combined=-1"):
        ScaleDpConfig(width=8, depth=0, heads=2, combined=-1)
    with pytest.raises(ValueError, match="width=9, expected a multiple of heads=2"):
        ScaleDpConfig(width=9, depth=1, heads=2)
