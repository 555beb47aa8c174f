"""Models as a server holds them compute what the models they were made of do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi_like.models.gemma import PackedLayer
from openpi_like.models.lora import Lora
from openpi_like.models.paligemma import PaliGemmaConfig
from openpi_like.models.sampling import for_sampling
from openpi_like.models.text_model import TextModelConfig
from openpi_like.models.vit import PackedVitLayer
from openpi_like.models.weights import flatten, unflatten
from openpi_like.train.state import ModelDef, Trainable

KEY = jax.random.key(3)


def observed(batch):
    return {k: v for k, v in batch.items() if k not in ("actions", "action_mask", "dataset_id", "position")}


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("pi05", [False, True])
def test_actions_are_the_same(tiny_policy, batch, filled, pi05, unroll):
    config = dataclasses.replace(tiny_policy, pi05=pi05, unroll=unroll)
    model = filled(lambda: config.create(KEY))
    held = for_sampling(model)
    for stack, kind in (
        (held.backbone.vision, PackedVitLayer),
        (held.backbone.vlm, PackedLayer),
        (held.expert, PackedLayer),
    ):
        assert len(stack.layers) == stack.config.depth
        assert all(isinstance(layer, kind) for layer in stack.layers)
    assert held.expert.layers[0].down[...].shape == model.expert.layers.down[...].shape[1:]
    sample = jax.jit(lambda model: model.sample_actions(KEY, observed(batch)))
    np.testing.assert_allclose(sample(held), sample(model), atol=2e-5)
    again = for_sampling(held)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(again), jax.tree.leaves(held))


def test_text_is_the_same(filled):
    config = TextModelConfig(
        **PaliGemmaConfig.tiny_fields(), cameras=("image",), image_size=(32, 32), prompt_len=6, vocab_size=64
    )
    model = filled(lambda: config.create(KEY))
    rng = np.random.default_rng(0)
    draw = lambda s: rng.integers(1, 60, s.shape).astype(s.dtype) if s.dtype != bool else np.ones(s.shape, bool)  # noqa: E731
    inputs = jax.tree.map(lambda s: jnp.asarray(draw(s)), config.text_shapes(2))
    write = jax.jit(lambda model: model.backbone.generate(KEY, inputs, max_new=5))
    jax.tree.map(np.testing.assert_array_equal, write(for_sampling(model)), write(model))


def test_layers_with_overlays_are_taken_apart_with_them(tiny_policy, batch):
    model = ModelDef(tiny_policy, Trainable(Lora()))
    rng = np.random.default_rng(0)
    drawn = {k: jnp.asarray(rng.normal(size=v.shape) / 8, jnp.float32) for k, v in flatten(model.shapes).items()}
    bound = model.bind(unflatten(drawn))
    held = for_sampling(bound)
    assert hasattr(held.backbone.vlm.layers[0], "q_lora")
    sample = jax.jit(lambda model: model.sample_actions(KEY, observed(batch), num_steps=2))
    expected = sample(bound)
    np.testing.assert_allclose(sample(held), expected, atol=2e-4 * float(jnp.abs(expected).max()))
