"""Heads and bins of VLM4VLA, OpenVLA and OpenVLA-OFT against formulas, published counts, and what the papers say."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_like.batch import ActionTokens
from openpi_like.models.gemma import GemmaConfig
from openpi_like.models.openvla import BINS, OpenVlaConfig, action_bins, bin_centres
from openpi_like.models.openvla_oft import L1Head, OpenVlaOftConfig
from openpi_like.models.paligemma import PaliGemmaConfig
from openpi_like.models.siglip import SiglipConfig
from openpi_like.models.vlm4vla import ActionHead, Vlm4VlaConfig
from openpi_like.models.weights import flat_weights, weight_shapes
from openpi_like.train.state import ModelDef, Trainable

KEY = jax.random.key(0)
# Hidden width of the language model -> millions of weights of the head with chunks of ten (paper, table 9).
PUBLISHED = {2048: 6.577, 2560: 8.019, 3584: 11.690, 4096: 13.918}


def vlm4vla(tiny_policy: Any, width: int = 16, **options: Any) -> Vlm4VlaConfig:
    vlm = dataclasses.replace(tiny_policy.backbone.vlm, width=width)
    fields = {f.name: getattr(tiny_policy, f.name) for f in dataclasses.fields(Vlm4VlaConfig) if f.name in COMMON}
    backbone = PaliGemmaConfig(tiny_policy.backbone.vision, vlm)
    return Vlm4VlaConfig(**{**fields, "backbone": backbone, "binary_dims": (3,), **options})


COMMON = ("cameras", "image_size", "state_dim", "action_dim", "action_horizon", "prompt_len", "vocab_size")


@pytest.mark.parametrize("width", PUBLISHED)
def test_counts_of_vlm4vla_are_the_published_ones(tiny_policy: Any, width: int) -> None:
    config = vlm4vla(tiny_policy, width, action_dim=7, action_horizon=10, binary_dims=(6,), head_width=1024)
    shapes = weight_shapes(config)
    count = sum(s.size for name, s in shapes.items() if name.startswith("action_head/"))
    assert round(count / 1e6, 3) == PUBLISHED[width]
    if width == 2048:
        assert count == 6_577_222
    assert shapes["action_query"].shape == (1, width)


def test_the_head_of_vlm4vla_by_hand(tiny_policy: Any, filled: Any) -> None:
    config = vlm4vla(tiny_policy, action_dim=3, binary_dims=(0,), action_horizon=2, head_width=8)
    head = filled(lambda: ActionHead(KEY, config))
    w = {k: np.asarray(v, np.float64) for k, v in flat_weights(head).items()}
    x = np.random.default_rng(1).normal(size=(5, 16))

    def mlp(x: np.ndarray, part: str, maps: int) -> np.ndarray:
        for i in range(maps):
            x = x @ w[f"{part}/map_{i}/kernel"] + w[f"{part}/map_{i}/bias"]
            x = np.maximum(x, 0) if i < maps - 1 else x
        return x

    trunk = mlp(x, "trunk", 2)
    pose, binary = np.tanh(mlp(trunk, "pose", 4)).reshape(5, 2, 2), mlp(trunk, "binary", 4).reshape(5, 2, 1)
    expected = np.concatenate([binary, pose], axis=-1)
    np.testing.assert_allclose(head(jnp.asarray(x, jnp.float32)), expected, atol=1e-5)


def test_the_loss_of_vlm4vla_by_hand(tiny_policy: Any, filled: Any, batch: Any) -> None:
    config = vlm4vla(tiny_policy, gripper_weight=0.3, head_width=16)
    model = filled(lambda: config.create(KEY))
    said = np.asarray(model.predict(config.observation(batch)))
    mask, actions = (np.asarray(batch[k]) for k in ("action_mask", "actions"))
    target = np.clip(actions, -0.65, 0.65) / 0.65
    huber = np.asarray(optax.losses.huber_loss(said[..., :3], target[..., :3]))
    entropy = np.asarray(
        optax.losses.sigmoid_binary_cross_entropy(said[..., 3], (actions[..., 3] > 0).astype(np.float32))
    )
    pose = np.array([h[m].mean() for h, m in zip(huber, mask[..., :3], strict=True)])
    has = mask[..., 3].any(1)
    gripper = np.array([e[m].mean() for e, m in zip(entropy[has], mask[has][..., 3], strict=True)])
    loss, metrics = model.loss(KEY, batch)
    assert float(loss) == pytest.approx(pose.mean() + 0.3 * gripper.mean(), rel=1e-4)
    np.testing.assert_allclose(metrics["pose_loss"], pose, rtol=1e-4)
    np.testing.assert_allclose(np.asarray(metrics["gripper_loss"])[has], gripper, rtol=1e-4)
    sampled = np.asarray(model.sample_actions(KEY, config.observation(batch)))
    assert set(np.unique(sampled[..., 3])) <= {-1.0, 1.0}
    assert np.abs(sampled[..., :3]).max() < 0.65


def test_what_has_two_states_is_never_between_them(tiny_policy: Any) -> None:
    said = jnp.broadcast_to(jnp.array([0.0, -0.0, 1e-9, jnp.nan])[:, None], (4, 4))[None]
    chosen = np.asarray(vlm4vla(tiny_policy, head_width=16).create(KEY).chosen(said))[0]
    np.testing.assert_array_equal(chosen[:, 3], [-1.0, -1.0, 1.0, np.nan])
    np.testing.assert_array_equal(np.isnan(chosen[3]), [True] * 4)


@pytest.mark.parametrize(("pattern", "part"), [("^vision/", "vision/"), ("^vlm/embedding$", "vlm/embedding")])
def test_freezing_leaves_out_exactly_that_part(tiny_policy: Any, pattern: str, part: str) -> None:
    config = vlm4vla(tiny_policy, head_width=16)
    every, some = ModelDef(config), ModelDef(config, Trainable(frozen=(pattern,)))
    assert every.trained - some.trained == {name for name in every.trained if name.startswith(part)}


def test_a_fresh_head_starts_small(tiny_policy: Any) -> None:
    model = vlm4vla(tiny_policy, head_width=64).create(KEY)
    assert not np.asarray(model.action_query[...]).any()
    weights = flat_weights(model)
    kernel = np.asarray(weights["action_head/trunk/map_1/kernel"])
    assert kernel.var() == pytest.approx(2 / sum(kernel.shape), rel=0.1)
    assert not np.asarray(weights["action_head/pose/map_0/bias"]).any()


# ---- Bins ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1.5, 1.5, width=32), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_bins_are_those_of_numpy(values: list[float]) -> None:
    x = np.array(values, np.float32)
    edges = np.linspace(-1, 1, BINS).astype(np.float32)
    np.testing.assert_array_equal(action_bins(jnp.asarray(x)), np.digitize(np.clip(x, -1, 1), edges))
    back = bin_centres()[np.asarray(action_bins(jnp.asarray(x))) - 1]
    assert (np.abs(back - np.clip(x, -1, 1)) <= 1 / 255 + 1e-6).all()


def test_ends_of_the_bins() -> None:
    ids = 32_000 - np.asarray(action_bins(jnp.array([-1.0, 1.0])))
    assert ids.tolist() == [31_999, 31_744]
    assert bin_centres()[[0, -1]] == pytest.approx([-0.99608, 0.99608], abs=1e-5)


def test_configs_of_openvla_that_do_not_fit(tiny_policy: Any) -> None:
    fields = {name: getattr(tiny_policy, name) for name in (*COMMON, "backbone")}
    with pytest.raises(ValueError, match=r"bin_end=200, expected 256 to vocab_size=300; eos=300, expected an id below"):
        OpenVlaConfig(**fields, bin_end=200, eos=300)
    with pytest.raises(ValueError, match=r"action_tokens=ActionTokens.*, expected None: actions are not written"):
        OpenVlaOftConfig(**fields, action_tokens=ActionTokens(max_len=4, count=64, skip=0))
    with pytest.raises(ValueError, match=r"binary_dims=\(0, 9\).*head_width=6, expected a multiple of 4.*clip=0"):
        Vlm4VlaConfig(**fields, binary_dims=(0, 9), head_width=6, clip=0.0)
    with pytest.raises(ValueError, match=r"eos=300, .*head_width=0.*head_blocks=-1"):
        OpenVlaOftConfig(**fields, head_width=0, head_blocks=-1, eos=300)


# ---- OpenVLA-OFT -----------------------------------------------------------------------------------------------------


def oft(tiny_policy: Any, **options: Any) -> OpenVlaOftConfig:
    return OpenVlaOftConfig(**{n: getattr(tiny_policy, n) for n in (*COMMON, "backbone")}, **options)


def test_the_head_of_oft_by_hand(tiny_policy: Any, filled: Any) -> None:
    config = oft(tiny_policy, head_width=12)
    head = filled(lambda: L1Head(KEY, config))
    w = {k: np.asarray(v, np.float64) for k, v in flat_weights(head).items()}
    x = np.random.default_rng(1).normal(size=(3, 4, 4, 16))

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y * w[f"{name}/scale"] + w[f"{name}/bias"]

    linear = lambda x, name: x @ w[f"{name}/kernel"] + w[f"{name}/bias"]  # noqa: E731
    y = np.maximum(linear(norm(x.reshape(3, 4, 64), "norm_in"), "map_in"), 0)
    for i in range(2):
        y = y + np.maximum(linear(norm(y, f"block_{i}/norm"), f"block_{i}/map"), 0)
    expected = linear(norm(y, "norm_out"), "map_out")
    np.testing.assert_allclose(head(jnp.asarray(x, jnp.float32)), expected, atol=1e-4 * np.abs(expected).max())


def test_oft_is_as_large_as_published() -> None:
    """The head of 7 dims on Llama-2 7B, and the projection of 8 state dims."""
    sizes = GemmaConfig(width=4096, depth=1, mlp_dim=8, num_heads=1, num_kv_heads=1, head_dim=8)
    config = OpenVlaOftConfig(
        backbone=PaliGemmaConfig(SiglipConfig(width=8, depth=1, mlp_dim=8, num_heads=1, patch_size=14), sizes),
        cameras=("base", "wrist"),
        image_size=(224, 224),
        state_dim=8,
        action_dim=7,
        action_horizon=8,
        prompt_len=8,
        vocab_size=8,
    )
    shapes = weight_shapes(config)
    D, J = 4096, 7
    block = 2 * D + D * D + D
    head = 2 * J * D + (J * D * D + D) + 2 * block + 2 * D + (D * J + J)
    assert sum(s.size for n, s in shapes.items() if n.startswith("action_head/")) == head
    assert sum(s.size for n, s in shapes.items() if n.startswith("state_")) == 8 * D + D + D * D + D


def test_behind_the_slots_of_oft_stands_the_end(tiny_policy: Any, filled: Any, batch: Any) -> None:
    """Only its embedding differs between two ids; without one it is a slot like the others."""
    models = [filled(lambda eos=eos: oft(tiny_policy, head_width=12, eos=eos).create(KEY)) for eos in (None, 1, 2)]
    observation = models[0].config.observation(batch)
    empty, one, two = (np.asarray(model.predict(observation)) for model in models)
    assert (np.abs(one - two).max((1, 2)) > 1e-6).all()
    table = models[1].backbone.vlm.embedding
    table[...] = table[...].at[1].set(0.0)
    unused = observation | {"prompt": jnp.where(observation["prompt"] == 1, 3, observation["prompt"])}
    np.testing.assert_allclose(models[1].predict(unused), models[0].predict(unused), atol=1e-5)
    assert (np.abs(empty - one).max((1, 2)) > 1e-6).all()


def test_every_token_of_oft_sees_every_other(tiny_policy: Any, filled: Any, batch: Any) -> None:
    """The first slot's number changes with the state, the last word and any camera; without proprioception, not with
    the state."""
    model = filled(lambda: oft(tiny_policy, head_width=12).create(KEY))
    observation = model.config.observation(batch)
    first = lambda o: np.asarray(nnx.jit(lambda m, o: m.predict(o))(model, o))[0, 0, 0]  # noqa: E731
    before = first(observation)
    last = int(np.asarray(observation["prompt_mask"])[0].sum()) - 1
    assert first(observation | {"prompt": observation["prompt"].at[0, last].add(1)}) != before
    assert first(observation | {"state": observation["state"].at[0, 0].add(1.0)}) != before
    blind = filled(lambda: oft(tiny_policy, head_width=12, proprioception=False).create(KEY))
    moved = observation | {"state": batch["state"] + 1}
    np.testing.assert_array_equal(blind.predict(observation), blind.predict(moved))


def test_answers_end_as_the_tokenizer_has_it(tiny_policy: Any) -> None:
    fields = {name: getattr(tiny_policy, name) for name in (*COMMON, "backbone")}
    text = SimpleNamespace(tokenizer=SimpleNamespace(eos_id=1))
    assert OpenVlaConfig(**fields, bin_end=300, eos=2).tokenizer_problems(text) == [
        "eos=2, expected 1, the id of the tokenizer"
    ]
    assert OpenVlaOftConfig(**fields, eos=7).tokenizer_problems(text) == ["eos=7, expected 1, the id of the tokenizer"]
    for fits in (OpenVlaConfig(**fields, bin_end=300, eos=1), OpenVlaOftConfig(**fields)):
        assert fits.tokenizer_problems(text) == []
