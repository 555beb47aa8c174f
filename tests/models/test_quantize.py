"""Weights in fewer bits: how far they are from what they stand for, and that gradients pass through them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

from openpi_like.models.lora import Lora, LoraRule
from openpi_like.models.param import linear
from openpi_like.models.quantize import GROUP, QUANTIZED, quantize
from openpi_like.models.sampling import for_sampling
from openpi_like.models.weights import flatten, unflatten
from openpi_like.train.state import ModelDef, Trainable

KEY = jax.random.key(2)


@pytest.mark.parametrize(("dtype", "steps"), [("int8", 127), ("int4", 7)])
def test_integers_are_within_half_a_step(dtype, steps):
    """Of a scale per layer, head and output; the largest input of each keeps its value."""
    w = np.random.default_rng(0).normal(size=(2, 3, 16, 5)).astype(np.float32)
    held = quantize(jnp.asarray(w), (2,), dtype)
    got = np.asarray(qwix.dequantize(held))
    step = np.abs(w).max(axis=2, keepdims=True) / (steps + 0.5)  # qwix divides the range so, to use the last integer
    np.testing.assert_allclose(np.asarray(held.scale), step, rtol=1e-5)
    assert np.abs(got - w).max() <= step.max() / 2 * 1.001
    assert (np.abs(got - w) <= step / 2 * 1.001).all()
    assert held.qvalue.dtype == QUANTIZED[dtype][0]


def test_four_bits_have_a_scale_per_group_of_inputs():
    w = np.random.default_rng(0).normal(size=(1, 3 * GROUP, 4)).astype(np.float32)
    w[:, :GROUP] *= 100  # other groups must not pay for it
    held = quantize(jnp.asarray(w), (1,), "int4")
    assert held.scale.shape == (1, 3, 4)
    error = np.abs(np.asarray(qwix.dequantize(held)) - w)
    assert error[:, GROUP:].max() < 0.5 < error[:, :GROUP].max()
    # 383 is prime, so all its inputs share one; of 8 heads of 72, which GROUP does not divide, each has one.
    assert quantize(jnp.asarray(w[:, :-1]), (1,), "int4").scale.shape == (1, 1, 4)
    heads = quantize(jnp.ones((2, 8, 72, 5)), (1, 2), "int4")
    assert heads.scale.shape == (2, 8, 1, 5)
    np.testing.assert_allclose(qwix.dequantize(heads), 1.0, rtol=0.07)


def test_eight_bit_floats_keep_three_bits():
    w = np.random.default_rng(0).normal(size=(2, 64, 5)).astype(np.float32)
    got = np.asarray(qwix.dequantize(quantize(jnp.asarray(w), (1,), "float8_e4m3fn")))
    top = np.abs(w).max(axis=1, keepdims=True)
    assert (np.abs(got - w) <= np.maximum(np.abs(w) / 16, top * 2**-15)).all()


class Map(nnx.Module):
    def __init__(self, held, inputs):
        self.w = nnx.Param(held, axes=(None,) * held.qvalue.ndim, inputs=inputs)


@pytest.mark.parametrize("dtype", ["int8", "int4", "float8_e4m3fn"])
@pytest.mark.parametrize(
    ("equation", "shape", "inputs"),
    [("BSD,DE->BSE", (32, 6), (0,)), ("BSD,NDH->BNSH", (3, 32, 4), (1,)), ("BNSH,NHD->BSD", (3, 16, 5), (0, 1))],
)
def test_products_are_those_with_the_values_that_weights_stand_for(dtype, equation, shape, inputs):
    rng = np.random.default_rng(0)
    held = quantize(jnp.asarray(rng.normal(size=shape), jnp.float32), inputs, dtype)
    module = Map(held, inputs)
    letters = equation.split("->")[0].split(",")
    sizes = dict(zip(letters[1], shape, strict=True)) | {"B": 2, "S": 7}
    x = jnp.asarray(rng.normal(size=[sizes[letter] for letter in letters[0]]), jnp.float32)
    expected = np.einsum(equation, x, qwix.dequantize(held))
    np.testing.assert_allclose(linear(module, "w", equation, x), expected, atol=1e-4)
    low = linear(module, "w", equation, x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), expected, atol=0.03 * np.abs(expected).max())


def test_eight_bits_are_multiplied_in_the_compute_dtype():
    """A product in float32 would read four times as much; on an H200 it made sampling twice as slow as bfloat16."""
    module = Map(quantize(jnp.ones((16, 8)), (0,), "int8"), (0,))
    jaxpr = jax.make_jaxpr(lambda x: linear(module, "w", "BD,DE->BE", x))(jnp.ones((2, 16), jnp.bfloat16))
    (dot,) = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert [v.aval.dtype for v in dot.invars] == [jnp.bfloat16, jnp.bfloat16]


def test_an_unknown_dtype_is_named():
    with pytest.raises(ValueError, match="'int88' is unknown; did you mean 'int8'"):
        quantize(jnp.ones((2, 2)), (0,), "int88")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_gradients_of_the_overlay_are_those_over_the_values_the_base_stands_for(tiny_policy, batch, dtype):
    rule = LoraRule("^(vlm|expert)/layers/(q|down)$", rank=2)
    model = ModelDef(tiny_policy, Trainable(Lora((rule,)), frozen_dtype=dtype))
    rng = np.random.default_rng(0)
    drawn = {k: jnp.asarray(rng.normal(size=v.shape) / 4, jnp.float32) for k, v in flatten(model.shapes).items()}
    held = {k: model.hold(k, v) for k, v in drawn.items()}
    stacked = {k for k, v in held.items() if isinstance(v, qwix.QArray)}
    assert {"vlm/layers/gate_up", "vision/layers/query/kernel"} <= stacked
    assert not [k for k in stacked if "norm" in k or "bias" in k or k in model.trained or k == "vision/head/kernel"]
    assert held["vlm/embedding"].dtype == jnp.bfloat16
    stands_for = {k: qwix.dequantize(v) if k in stacked else v for k, v in held.items()}

    def gradients(weights):
        def loss(trained):
            return model.bind(unflatten(weights | trained)).loss(KEY, batch)[0]

        return jax.jit(jax.value_and_grad(loss))({k: v for k, v in weights.items() if k in model.trained})

    (value, got), (expected_value, expected) = gradients(held), gradients(stands_for)
    assert value == pytest.approx(float(expected_value), rel=1e-5)
    top = max(float(jnp.abs(g).max()) for g in expected.values())
    for name, g in expected.items():
        np.testing.assert_allclose(got[name], g, atol=5e-4 * top, err_msg=name)


@pytest.mark.parametrize(("dtype", "most"), [("int8", 0.03), ("float8_e4m3fn", 0.15), ("int4", 0.5)])
def test_what_sampling_pays(tiny_policy, batch, filled, dtype, most):
    """As a server has it; the projections of actions stay as they are."""
    model = filled(lambda: dataclasses.replace(tiny_policy, unroll=False).create(KEY))
    observation = {k: v for k, v in batch.items() if k not in ("actions", "action_mask", "dataset_id", "position")}
    sample = jax.jit(lambda model: model.sample_actions(KEY, observation, num_steps=2))
    low = for_sampling(model, quantize=dtype)
    for layers in (low.expert.layers, low.backbone.vlm.layers, low.backbone.vision.layers):
        assert all(isinstance(layer.qkv[...], qwix.QArray) for layer in layers)
    assert low.action_in.kernel[...].dtype == jnp.float32
    assert model.expert.layers.q[...].dtype == jnp.float32  # untouched
    expected, got = np.asarray(sample(model)), np.asarray(sample(low))
    error = np.abs(got - expected).mean() / np.abs(expected).mean()
    assert 0 < error < most
