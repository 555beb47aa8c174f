"""SmolVLA against LeRobot's own code, on what `tests/bench/golden_smolvla.py` wrote.

Import and export of its names, tokens of the prefix, velocity, loss, gradients, samples; and the released sizes.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from openpi_like.models.arrays import MemoryArrays
from openpi_like.models.flow import exact_time_embedding
from openpi_like.models.llama import LlamaConfig
from openpi_like.models.sampling import for_sampling
from openpi_like.models.siglip import SiglipConfig
from openpi_like.models.smolvla import SmolVla, SmolVlaConfig
from openpi_like.models.smolvla_expert import ExpertConfig
from openpi_like.models.smolvlm import SmolVlmConfig
from openpi_like.models.text_model import TextModelConfig
from openpi_like.models.weights import (
    WeightsError,
    bind,
    flat_weights,
    flatten,
    layout,
    named_weights,
    plan_load,
    unflatten,
    weight_shapes,
)
from tests.models.golden_set import config_json
from tests.models.weight_arrays import Arrays, assert_same, exported, loaded

GOLDEN = Path(__file__).parent / "golden"
KEY = jax.random.key(0)
CAMERAS = ("first", "second")
HEAD = "model.vlm_with_expert.vlm.lm_head.weight"


def group(arrays: dict[str, Any], prefix: str) -> Arrays:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def config_of(arrays: dict[str, Any]) -> SmolVlaConfig:
    theirs = config_json(arrays)
    text, vision = theirs["vlm"]["text_config"], theirs["vlm"]["vision_config"]
    vlm = LlamaConfig(
        width=text["hidden_size"],
        depth=text["num_hidden_layers"],
        mlp_dim=text["intermediate_size"],
        num_heads=text["num_attention_heads"],
        num_kv_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"],
        rope_base=10_000.0,
        norm_eps=text["rms_norm_eps"],
        tied=True,
    )
    siglip = SiglipConfig(
        width=vision["hidden_size"],
        depth=vision["num_hidden_layers"],
        mlp_dim=vision["intermediate_size"],
        num_heads=vision["num_attention_heads"],
        patch_size=vision["patch_size"],
    )
    A, J = arrays["actions"].shape[1:]
    return SmolVlaConfig(
        backbone=SmolVlmConfig(siglip, vlm, theirs["num_vlm_layers"], theirs["vlm"]["scale_factor"]),
        expert=ExpertConfig.beside(vlm, self_every=theirs["self_attn_every_n_layers"]),
        cameras=CAMERAS,
        image_size=(vision["image_size"], vision["image_size"]),
        vocab_size=text["vocab_size"],
        prompt_len=arrays["tokens"].shape[1],
        state_dim=arrays["state"].shape[1],
        action_dim=J,
        action_horizon=A,
    )


@dataclasses.dataclass(frozen=True)
class Case:
    arrays: dict[str, Any]
    config: SmolVlaConfig
    model: SmolVla
    batch: Any

    @property
    def draws(self) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(self.arrays["noise"]), jnp.asarray(self.arrays["time"])


@functools.cache
def case_of(name: str) -> Case:
    with np.load(GOLDEN / f"smolvla_{name}.npz") as archive:
        arrays = dict(archive)
    config = config_of(arrays)
    model = bind(config, unflatten(loaded(config, group(arrays, "weight/"))))
    B = len(arrays["time"])
    batch = {
        "images": {c: arrays["images"][:, i] for i, c in enumerate(CAMERAS)},
        "image_mask": {c: arrays["image_mask"][:, i] for i, c in enumerate(CAMERAS)},
        "state": arrays["state"],
        "state_mask": np.ones(arrays["state"].shape, bool),
        "prompt": arrays["tokens"].astype(np.int32),
        "prompt_mask": arrays["token_mask"],
        "actions": arrays["actions"],
        "action_mask": np.ones(arrays["actions"].shape, bool),
        "position": np.zeros((B, 2), np.uint32),
    }
    return Case(arrays, config, model, jax.tree.map(jnp.asarray, batch))


@pytest.fixture(params=["two", "three"])
def case(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


def error(got: Any, expected: np.ndarray) -> float:
    """Returns the largest difference, as a part of the largest value."""
    return float(np.abs(np.asarray(got) - expected).max() / np.abs(expected).max())


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def test_tokens_of_the_prefix(case: Case) -> None:
    got = nnx.jit(SmolVla.embed_prefix)(case.model, case.batch)
    np.testing.assert_array_equal(got.valid, case.arrays["prefix_mask"])
    assert error(got.tokens, case.arrays["prefix"]) < 2e-6


def test_velocity_and_loss(case: Case) -> None:
    noise, time = case.draws
    t = time[:, None, None]
    x = t * noise + (1 - t) * case.batch["actions"]
    velocity = nnx.jit(lambda m, b: m.velocity(m.prefix(b), b, x, time))(case.model, case.batch)
    assert error(velocity, case.arrays["velocity"]) < 1e-5
    losses = nnx.jit(SmolVla.flow_loss)(case.model, case.batch, noise, time)
    assert error(losses, case.arrays["losses"]) < 1e-5


def test_gradients(case: Case) -> None:
    def objective(model: SmolVla, batch: Any) -> jax.Array:
        return model.flow_loss(batch, *case.draws).mean()

    gradients = nnx.jit(nnx.grad(objective))(case.model, case.batch)
    ours = {k: np.asarray(v) for k, v in flatten(named_weights(gradients)).items()}
    found = exported(case.config, ours, "lerobot")
    expected = group(case.arrays, "gradient/")
    assert len(expected) >= 14
    errors = {name: error(found[name], value) for name, value in expected.items()}
    assert {name: e for name, e in errors.items() if e > 5e-5} == {}


@pytest.mark.parametrize(("name", "how"), [
    ("two", "plain"), ("two", "packed"), ("two", "unrolled"), ("two", "apart"), ("three", "packed"),
])  # fmt: skip
def test_ten_steps(name: str, how: str) -> None:
    case = case_of(name)
    model = case.model.packed() if how == "packed" else case.model
    if how == "unrolled":
        model = bind(dataclasses.replace(case.config, unroll=True), unflatten(flat_weights(case.model)))
    elif how == "apart":
        model = for_sampling(case.model)
        assert model.expert.is_taken_apart
    observation = case.config.observation(case.batch)
    sampled = nnx.jit(SmolVla.sample_actions)(model, KEY, observation, noise=case.draws[0])
    assert error(sampled, case.arrays["sampled"]) < 1e-5


def test_flow_time_is_embedded_as_in_float64() -> None:
    time = np.append(np.random.default_rng(0).random(500), [0, 1]).astype(np.float32)
    phase = time.astype(np.float64)[:, None] / (4e-3 * (4.0 / 4e-3) ** np.linspace(0, 1, 36)) * 2 * np.pi
    expected = np.concatenate([np.sin(phase), np.cos(phase)], axis=1)
    np.testing.assert_allclose(jax.jit(exact_time_embedding, static_argnums=1)(time, 72), expected, atol=2e-6)


# ---- Names -----------------------------------------------------------------------------------------------------------


def test_import_and_export_are_inverse(case: Case) -> None:
    """All but the VLM's table of logits, which the policy is without; it is written as zeros."""
    weights = group(case.arrays, "weight/")
    written = exported(case.config, loaded(case.config, weights), "lerobot")
    assert not written[HEAD].any()
    assert_same(written, weights | {HEAD: np.zeros_like(weights[HEAD])})


def test_a_table_of_logits_is_kept_where_it_is_asked_for() -> None:
    case = case_of("two")
    backbone = dataclasses.replace(case.config.backbone, vlm=dataclasses.replace(case.config.backbone.vlm, tied=False))
    config, weights = dataclasses.replace(case.config, backbone=backbone), group(case.arrays, "weight/")
    assert_same(exported(config, loaded(config, weights), "lerobot"), weights)


def test_names_without_the_first_level_and_with_statistics() -> None:
    case = case_of("two")
    weights = {name.removeprefix("model."): value for name, value in group(case.arrays, "weight/").items()}
    weights["normalize_inputs.buffer_observation_state.mean"] = np.zeros(6, np.float32)
    plan = plan_load(case.config, MemoryArrays(weights))
    assert sorted(line.split(": ")[0] for line in plan.dropped) == [
        "normalize_inputs.buffer_observation_state.mean",
        HEAD.removeprefix("model."),
    ]
    assert_same(loaded(case.config, weights), {k: np.asarray(v) for k, v in flat_weights(case.model).items()})


def test_the_backbone_alone_is_read_from_files_of_smolvlm() -> None:
    """A file of the whole VLM, of which the policy uses the first layers; without its expert, which starts fresh."""
    case = case_of("two")
    vlm, fields = case.config.backbone, [f.name for f in dataclasses.fields(TextModelConfig)]
    whole = dataclasses.replace(vlm, layers=None, vlm=dataclasses.replace(vlm.vlm, tied=False))
    text = TextModelConfig(**{f: getattr(case.config, f) for f in fields} | {"backbone": whole})
    shapes = layout(text, "huggingface")
    rng = np.random.default_rng(0)
    published = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    assert_same(exported(text, loaded(text, published), "huggingface"), published)
    fresh = ("^expert/", "^(state|action)_")
    plan = plan_load(case.config, MemoryArrays(published), reinitialize=fresh)
    reasons = {line.split(": ")[1] for line in plan.dropped}
    assert reasons == {"layers behind those that are used", "the table of logits, for writing text"}
    assert "vlm/layers/q" in plan.rows
    with pytest.raises(WeightsError, match="expert/layers/joint/q"):
        plan_load(case.config, MemoryArrays(published))


# ---- Released sizes --------------------------------------------------------------------------------------------------


def test_released_sizes_leaf_by_leaf() -> None:
    published = {k: tuple(v) for k, v in json.loads((GOLDEN / "smolvla_shapes.json").read_text()).items()}
    config = SmolVlaConfig.released()
    assert layout(config, "lerobot") == published
    assert sum(map(math.prod, published.values())) == 450_046_176
    ours = sum(math.prod(leaf.shape) for leaf in weight_shapes(config).values())
    assert ours == 450_046_176 - math.prod(published[HEAD])


def test_lerobot_config_of_the_released_sizes() -> None:
    config = SmolVlaConfig.released()
    written = config.lerobot_config("float32")
    assert written is not None
    expected = {"type": "smolvla", "num_vlm_layers": 16, "self_attn_every_n_layers": 2, "chunk_size": 50}
    expected |= {"expert_width_multiplier": 0.75, "max_action_dim": 32, "tokenizer_max_length": 48}
    assert {name: written[name] for name in expected} == expected
    assert written["resize_imgs_with_padding"] == [512, 512]
    assert len(written["input_features"]) == 4
    assert (
        SmolVlaConfig.tiny(
            cameras=("a",), state_dim=4, action_dim=4, action_horizon=4, prompt_len=8, vocab_size=64
        ).lerobot_config("float32")
        is None
    )
