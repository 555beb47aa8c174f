"""What a policy puts into a backbone's sequence: tokens behind the cameras, and queries behind everything."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from openpi_like.models.backbone import Backbone
from openpi_like.models.gemma import GemmaConfig
from openpi_like.models.paligemma import PaliGemmaConfig
from openpi_like.models.siglip import SiglipConfig
from openpi_like.models.text_model import TextModelConfig

KEY = jax.random.key(0)
B, P, S, E, Q, D = 2, 4, 6, 2, 3, 32
CONFIG = TextModelConfig(
    backbone=PaliGemmaConfig(
        SiglipConfig(width=32, depth=1, mlp_dim=64, num_heads=2, patch_size=8),
        GemmaConfig(width=D, depth=2, mlp_dim=64, num_heads=2, num_kv_heads=1, head_dim=16),
    ),
    cameras=("base", "wrist"),
    image_size=(16, 16),
    prompt_len=S,
    vocab_size=40,
)


def backbone_of(image_slots: tuple[int, ...] = (), *, causal: bool = False) -> Backbone:
    model = dataclasses.replace(CONFIG, image_slots=image_slots).create(KEY).backbone
    model.causal = causal
    return model


@pytest.mark.parametrize("slots", [(-1, 2), (2, 1), (0, S), (1,)])
def test_image_slots_that_are_no_places_of_a_prompt(slots: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"image_slots=.*, each from 0 and less than prompt_len=6"):
        dataclasses.replace(CONFIG, image_slots=slots)


@pytest.fixture(scope="module")
def observation() -> Any:
    """The second row has no wrist camera and a shorter prompt."""
    rng = np.random.default_rng(0)
    mask = np.arange(S) < np.array([[S], [S - 2]])
    arrays = {
        "images": {c: rng.integers(0, 256, (B, 16, 16, 3), dtype=np.uint8) for c in CONFIG.cameras},
        "image_mask": {"base": np.ones(B, bool), "wrist": np.array([True, False])},
        "prompt": np.where(mask, rng.integers(1, 40, (B, S)), 0).astype(np.int32),
        "prompt_mask": mask,
    }
    return jax.tree.map(jnp.asarray, arrays)


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("slots", [(), (0, 0), (1, 3), (2, 2)])
def test_tokens_behind_the_cameras(observation: Any, slots: tuple[int, ...]) -> None:
    model, extra = backbone_of(slots), draw(1, B, E, D)
    plain, with_extra = (model.embed_prefix(observation, x) for x in (None, extra))
    at = 2 * P + (slots[-1] if slots else 0)
    np.testing.assert_array_equal(with_extra.tokens[:, at : at + E], extra)
    assert with_extra.valid[:, at : at + E].all()
    for a, b in zip(plain[:2], with_extra[:2], strict=True):
        np.testing.assert_array_equal(np.delete(b, np.s_[at : at + E], axis=1), a)
    text = model.vlm.embed(observation["prompt"])
    marked = observation["prompt_mask"]
    for sequence in (plain, with_extra):
        np.testing.assert_array_equal(model.text_of(sequence.tokens, S), text)
        where = model.text_slots(marked, sequence.valid.shape[1])
        np.testing.assert_array_equal(model.text_of(where, S), marked)
        assert where.sum() == marked.sum()
        starts = [start + E * (start > at) for start in model.image_starts()]
        for camera, start in zip(CONFIG.cameras, starts, strict=True):
            seen = np.broadcast_to(observation["image_mask"][camera][:, None], (B, P))
            np.testing.assert_array_equal(sequence.valid[:, start : start + P], seen)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("how", ["one by one", "bidirectional", "everything"])
def test_what_queries_see(observation: Any, causal: bool, how: str) -> None:
    model, queries, extra = backbone_of((1, 3), causal=causal), draw(2, B, Q, D), draw(3, B, E, D)
    options = {"bidirectional": how == "bidirectional", "everything_sees_everything": how == "everything"}
    sequence, mask, _ = model._with_queries(observation, queries, extra, **options)
    valid, n = np.asarray(sequence.valid), sequence.valid.shape[1]
    expected = np.tril(np.ones((n, n), bool))
    if not causal:
        expected[: n - Q, : n - Q] = True
    if how != "one by one":
        expected[n - Q :, n - Q :] = True
    if how == "everything":
        expected[:] = True
    np.testing.assert_array_equal(mask, expected & valid[:, None] & valid[:, :, None])


def test_an_answer_in_the_prompt_is_seen_as_in_training(observation: Any) -> None:
    answer = jnp.arange(S) >= jnp.array([[3], [2]])
    model = backbone_of((1, 3))
    batch: Any = {**observation, "prompt_causal": answer}
    sequence, mask, _ = model._with_queries(batch, draw(2, B, Q, D), None)
    starts = model.text_slots(answer, sequence.valid.shape[1] - Q)
    np.testing.assert_array_equal(mask[:, :-Q, :-Q], model.mask(sequence.valid[:, :-Q], starts))


def test_queries_stand_where_text_would_go_on(observation: Any) -> None:
    """A query that is a token's embedding is that token."""
    model = backbone_of((1, 3), causal=True)
    said = jnp.asarray([[7, 8, 9], [5, 6, 7]], jnp.int32)
    out, valid = nnx.jit(Backbone.run_queries)(model, observation, model.vlm.embed(said))
    x, cache = nnx.jit(Backbone.prefill, static_argnames="max_new")(model, observation, max_new=Q)
    for i in range(Q):
        x, cache = model.extend(said[:, i], cache)
        np.testing.assert_allclose(out[:, i - Q], x, atol=2e-5)
    assert valid[:, -Q:].all()


def test_hidden_states(observation: Any) -> None:
    model, queries, extra = backbone_of((1, 3)), draw(2, B, Q, D), draw(3, B, E, D)
    out, valid = model.run_queries(observation, queries, extra)
    states, same = model.hidden_states(observation, (0, 2), queries_BQD=queries, after_images=extra)
    np.testing.assert_array_equal(same, valid)
    np.testing.assert_array_equal(states[0, :, :-Q], model.embed_prefix(observation, extra).tokens)
    np.testing.assert_array_equal(states[0, :, -Q:], queries)
    seen = np.asarray(valid)
    np.testing.assert_allclose(states[1][seen], out[seen], atol=1e-5)
    alone, valid = model.hidden_states(observation, [1])
    assert alone.shape == (1, B, 2 * P + S, D)
    assert valid.shape == alone.shape[1:3]
