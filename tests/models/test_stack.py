"""Stacks of layers: what is kept changes memory, and no number."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi_like.models.stack import NAMES, kept, remat_policy, remat_problem, run_layers

LAYERS, WIDTH = 3, 8
POLICIES = [
    None,
    "nothing_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "save:attention,mlp",
    "offload:queries",
    "save:attention+offload:mlp,keys_values",
]


def loss(weights, x, *, remat, unroll=False):
    def body(x, w):
        for name in NAMES:  # each a product that is computed again where it is not kept
            x = kept(jnp.tanh(x @ w[name]), name)
        return jnp.sin(x), None

    return jnp.square(run_layers(body, x, weights, unroll=unroll, remat=remat)[0]).sum()


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape, scale=0.4), jnp.float32)  # noqa: E731
    return {name: draw(LAYERS, WIDTH, WIDTH) for name in NAMES}, draw(4, WIDTH)


@pytest.mark.parametrize("remat", POLICIES, ids=str)
def test_what_is_kept_changes_no_gradient(inputs, remat):
    expected = jax.grad(loss)(*inputs, remat=None, unroll=True)
    for unroll in (False, True):
        got = jax.jit(jax.grad(lambda *given, u=unroll: loss(*given, remat=remat, unroll=u)))(*inputs)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def kept_of(remat, capsys):
    """Returns the names of what a backward pass finds, and how many arrays of it lie in the host's memory."""
    weights, x = ({name: jnp.ones((LAYERS, WIDTH, WIDTH)) for name in NAMES}, jnp.ones((4, WIDTH)))
    jax.ad_checkpoint.print_saved_residuals(lambda *given: loss(*given, remat=remat, unroll=True), weights, x)
    text = capsys.readouterr().out
    return sorted(re.findall(r"\[4,8\] named '(\w+)'", text)), text.count("<host>[4,8]")


def test_what_is_named_is_kept_and_nothing_else(capsys):
    assert kept_of("nothing_saveable", capsys) == ([], 0)
    assert kept_of("save:attention,mlp", capsys) == (sorted(["attention", "mlp"] * LAYERS), 0)
    assert kept_of("offload:queries+save:attention", capsys) == (["attention"] * LAYERS, LAYERS)


@pytest.mark.parametrize(
    ("remat", "message"),
    [
        ("some", "expected None or a policy; "),
        ("save:atention", "nothing is called 'atention'; did you mean 'attention'"),
        ("save:mlp+ofload:queries", "did you mean 'offload:NAMES'"),
        ("save:mlp+offload:mlp", "'mlp' is named twice"),
        ("save:", "nothing is called ''"),
    ],
)
def test_policies_that_are_none_are_refused(remat, message):
    problem = remat_problem(remat)
    assert problem is not None
    assert message in problem


@pytest.mark.parametrize("remat", POLICIES[1:])
def test_policies_are_jaxs(remat):
    assert remat_problem(remat) is None
    assert callable(remat_policy(remat))
