"""FLOPs of training, against counts by hand, a formula of pi0, and the products of the gradient that jax makes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from openpi_like.models.paligemma import PaliGemmaConfig
from openpi_like.models.pi0 import Pi0Config
from openpi_like.train.planning.flops import model_flops, training_flops
from openpi_like.train.state import ModelDef, Trainable
from tests.train.planning.batch_moves import policies


def shaped(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


W1, W2, X = shaped(5, 7), shaped(7, 3), shaped(2, 5)
FIRST, SECOND = 2 * 2 * 5 * 7, 2 * 2 * 7 * 3  # FLOPs of the products going forward


def two_layers(params: dict[str, Any], x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.tanh(x @ params["w1"]) @ params["w2"])


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        (True, 2 * FIRST + 3 * SECOND),  # nobody wants the gradient of x
        ({"w1": False, "w2": True}, FIRST + 2 * SECOND),
        ({"w1": True, "w2": False}, 2 * FIRST + 2 * SECOND),
        (False, FIRST + SECOND),
    ],
)
def test_a_product_counts_again_for_each_factor_with_a_gradient(trained: Any, expected: int) -> None:
    params = {"w1": W1, "w2": W2}
    assert training_flops(two_layers, params, X, trained=trained) == expected
    again = jax.checkpoint(two_layers)
    assert training_flops(jax.jit(again), params, X, trained=trained) == expected  # what is recomputed is not counted


def test_what_no_gradient_reaches_counts_once() -> None:
    stopped = lambda w, x: jnp.sum(jax.lax.stop_gradient(x @ w) @ jnp.ones((7, 3)))  # noqa: E731
    assert training_flops(stopped, W1, X) == FIRST + SECOND
    chosen = lambda w, x: jnp.argmax(x @ w, -1).astype(jnp.float32).sum()  # noqa: E731
    assert training_flops(chosen, W1, X) == FIRST
    metric = lambda w, x: (jnp.sum(x @ w), x @ jnp.ones((5, 3)))  # noqa: E731
    assert training_flops(metric, W1, X) == 2 * FIRST + 2 * 2 * 5 * 3


def test_loops_branches_and_convolutions() -> None:
    square = shaped(4, 6, 6)

    def chain(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(lambda c, wi: (c @ wi, None), x, w)[0])

    one = 2 * 2 * 6 * 6
    assert training_flops(chain, square, shaped(2, 6)) == 2 * one + 3 * 3 * one  # x has no gradient, carries do

    def unread(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(lambda c, wi: (c @ wi, c), x, w)[1])  # the last carry is never used

    assert training_flops(unread, square, shaped(2, 6)) == 2 * one + 2 * 3 * one + one

    def branch(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w.T @ w))

    assert training_flops(branch, W1, X) == FIRST * (2 + 3 + 3)

    def convolved(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", feature_group_count=2))

    # Out: 1 image, 6 features, 3 x 3; each of 2 input features (of its group) in a window of 3 x 3.
    assert training_flops(convolved, shaped(6, 2, 3, 3), shaped(1, 4, 7, 7)) == 2 * (2 * 6 * 9 * 2 * 9)


def test_kernels_say_their_flops_or_are_read() -> None:
    def kernel(x: Any, w: Any, out: Any) -> None:
        out[...] = x[...] @ w[...]

    def call(w: jax.Array, x: jax.Array, cost: pl.CostEstimate | None) -> jax.Array:
        block = pl.BlockSpec((2, 8), lambda i: (i, 0))
        made = pl.pallas_call(
            kernel, grid=(3,), in_specs=[block, pl.BlockSpec((8, 8), lambda i: (0, 0))], out_specs=block,
            out_shape=shaped(6, 8), cost_estimate=cost,
        )  # fmt: skip
        return jnp.sum(made(x, w))

    w, x = shaped(8, 8), shaped(6, 8)
    read = lambda w, x: call(w, x, None)  # noqa: E731
    assert training_flops(read, w, x, trained=False) == 3 * 2 * 2 * 8 * 8
    said = lambda w, x: call(w, x, pl.CostEstimate(flops=1000, transcendentals=0, bytes_accessed=0))  # noqa: E731
    assert training_flops(said, w, x, trained=False) == 1000
    assert training_flops(said, w, x) == 3000


def formula(c: Pi0Config) -> int:
    """FLOPs of training pi0 on one sample, written down layer by layer."""

    def layer(of: Any, tokens: int, keys: int) -> tuple[int, int]:
        """What makes keys and values, and all else."""
        heads = of.num_heads * of.head_dim
        kv = 2 * tokens * of.width * 2 * of.num_kv_heads * of.head_dim
        rest = (
            2 * 2 * tokens * of.width * heads + 2 * 2 * tokens * keys * heads + 3 * 2 * tokens * of.width * of.mlp_dim
        )
        return kv, rest

    assert isinstance(c.backbone, PaliGemmaConfig)
    v = c.backbone.vision
    P = (c.image_size[0] // v.patch_size) ** 2
    images = len(c.cameras)
    block = 4 * 2 * P * v.width**2 + 2 * 2 * P * P * v.width + 2 * 2 * P * v.width * v.mlp_dim
    # Pixels have no gradient.
    tower = 2 * 2 * P * 3 * v.patch_size**2 * v.width + 3 * (
        v.depth * block + 2 * P * v.width * c.backbone.language.width
    )
    S, T, D, J = images * P + c.prompt_len, c.action_horizon + 1, c.expert.width, c.action_dim
    kv, rest = layer(c.backbone.language, S, S)
    # Of the last layer only keys and values are read.
    language = 3 * (c.backbone.language.depth * kv + (c.backbone.language.depth - 1) * rest) + rest
    expert = 3 * c.expert.depth * sum(layer(c.expert, T, S + T))
    A = c.action_horizon
    ends = 2 * 2 * A * J * D + 2 * 2 * c.state_dim * D + 3 * (2 * A * 2 * D * D + 2 * A * D * D + 2 * A * D * J)
    return images * tower + language + expert + ends


@pytest.mark.parametrize("options", [{"unroll": True}, {"remat": "nothing_saveable"}, {"dtype": "bfloat16"}])
def test_pi0_is_what_its_formula_says(tiny_policy: Pi0Config, options: dict[str, Any]) -> None:
    assert model_flops(ModelDef(dataclasses.replace(tiny_policy, **options))) == formula(tiny_policy)


def test_the_released_pi0_takes_11_7_tflop_a_sample() -> None:
    config = Pi0Config.released()
    assert model_flops(ModelDef(config)) == formula(config) == pytest.approx(11.7e12, rel=0.005)
    frozen = model_flops(ModelDef(config, Trainable(frozen=("^vision/",))))
    assert frozen == pytest.approx(11.727e12 - 1.320e12, rel=1e-3)  # two thirds of the tower, but for its first product


@pytest.mark.parametrize("name", ["pi0", "insulated", "fast"])
def test_policies_take_as_many_as_their_gradient_in_jax(name: str) -> None:
    config = dataclasses.replace(policies()[name], remat=None, unroll=True)
    model, batch = ModelDef(config), config.batch_shapes(1)

    def gradient(params: Any, batch: Any) -> Any:
        return jax.value_and_grad(lambda p: model.bind(p).loss(jax.random.key(0), batch), has_aux=True)(params)

    executed = training_flops(gradient, model.shapes, batch, trained=False)
    # The loss of the vocabulary computes logits again for its gradient, and of each target one more going forward.
    T, D, V = config.answer_len, config.backbone.language.width, config.vocab_size
    again = 2 * T * D * V
    targets = 2 * T * D  # whose gradient is part of those of all logits
    assert model_flops(model) == executed - again + 2 * targets
