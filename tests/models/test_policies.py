"""What the trainer, the validator and the server need of a policy, asked of each of them at tiny size."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from openpi_like.batch import ActionTokens, EntityTokens
from openpi_like.data.fast import dct_coefficients, fit_fast
from openpi_like.models.ddim import Ddim
from openpi_like.models.dexvla import DexVlaConfig
from openpi_like.models.dima import DimaConfig, DimaStudentConfig
from openpi_like.models.entities import EntityProjectors
from openpi_like.models.llama import LlamaConfig
from openpi_like.models.lora import Lora
from openpi_like.models.m2vla import M2VlaConfig
from openpi_like.models.m2vla_noise import M2VlaNoiseConfig
from openpi_like.models.openvla import OpenVlaConfig
from openpi_like.models.openvla_oft import OpenVlaOftConfig
from openpi_like.models.perceiving import held_out_losses, training_counts, training_loss
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.pi0_fast import Pi0FastConfig
from openpi_like.models.plan_text import Characters
from openpi_like.models.prismatic import PrismaticConfig
from openpi_like.models.scale_dp import ScaleDpConfig
from openpi_like.models.scene_decoder import SceneDecoderConfig
from openpi_like.models.scene_perception import PerceptionConfig
from openpi_like.models.siglip import SiglipConfig
from openpi_like.models.skill_memory import SkillMemoryConfig
from openpi_like.models.smolvla import SmolVlaConfig
from openpi_like.models.smolvla_expert import ExpertConfig
from openpi_like.models.smolvlm import SmolVlmConfig
from openpi_like.models.text_waypoints import TextWaypointsConfig
from openpi_like.models.vla_adapter import VlaAdapterConfig
from openpi_like.models.vlm4vla import Vlm4VlaConfig
from openpi_like.train import presets
from openpi_like.train.state import ModelDef, Trainable

KEY = jax.random.key(0)
SMOLVLM = SmolVlmConfig(
    SiglipConfig(width=16, depth=1, mlp_dim=32, num_heads=2, patch_size=4),
    LlamaConfig.tiny(width=16, depth=2, mlp_dim=32, num_kv_heads=2, head_dim=8, tied=True),
    shuffle=2,
)
PRISMATIC = PrismaticConfig(
    None,
    SiglipConfig(width=16, depth=2, mlp_dim=32, num_heads=2, patch_size=8, select="second_to_last"),
    LlamaConfig.tiny(width=16, depth=2, mlp_dim=32, num_kv_heads=2, head_dim=8, tied=True),
)
SKILLS = SkillMemoryConfig(size=12, recalled=3, layers=(0, 2), written=0.5)
STUDENT = SceneDecoderConfig(width=16, depth=2, num_heads=2, mlp_dim=32)
THINGS = (EntityTokens("agents", 3, 4), EntityTokens("map", 2, 5))
OWN: dict[str, tuple[Any, dict[str, Any]]] = {
    "vlm4vla": (Vlm4VlaConfig, {"binary_dims": (3,), "head_width": 16}),
    "openvla": (OpenVlaConfig, {"bin_end": 300, "eos": 1, "action_horizon": 2}),
    "text_waypoints": (TextWaypointsConfig, {"characters": Characters.fitted(), "action_horizon": 2}),
    "openvla_oft": (OpenVlaOftConfig, {"head_width": 16}),
    "m2vla": (M2VlaConfig, {"backbone": PRISMATIC, "queries": 4, "head_heads": 2, "skills": SKILLS}),
    "m2vla_noise": (
        M2VlaNoiseConfig,
        {"backbone": PRISMATIC, "queries": 4, "head_heads": 2, "skills": SKILLS, "diffusion": Ddim(20, 4)},
    ),
    "vla_adapter": (VlaAdapterConfig, {"backbone": PRISMATIC, "queries": 4, "head_heads": 2}),
    "smolvla": (SmolVlaConfig, {"backbone": SMOLVLM, "expert": ExpertConfig(width=16, mlp_dim=32)}),
    "dima": (DimaConfig, {"student": STUDENT, "teacher_width": 16}),
    "dima_student": (DimaStudentConfig, {"student": STUDENT}),
    "dima_teacher": (
        DimaConfig,
        {"student": STUDENT, "teacher_width": 16, "acts_as": "teacher", "backbone": PRISMATIC, "entities": THINGS},
    ),
    "dima_perception": (
        DimaConfig,
        {"student": STUDENT, "teacher_width": 16, "entities": THINGS, "perception": PerceptionConfig(decoder=STUDENT)},
    ),
    "pi0_entities": (Pi0Config, {"entities": THINGS}),
    "dexvla": (
        DexVlaConfig,
        {
            "backbone": PRISMATIC,
            "expert": ScaleDpConfig(width=16, depth=2, heads=2, combined=16),
            "thought_len": 4,
            "diffusion": Ddim(20, 4),
        },
    ),
    "pi0_fast": (Pi0FastConfig, {"action_tokens": ActionTokens(max_len=20, count=120, skip=4)}),
}


@pytest.fixture(scope="module", params=[*OWN, "pi0"])
def config(request: Any, tiny_policy: Any) -> Any:
    if request.param == "pi0":
        return tiny_policy
    cls, own = OWN[request.param]
    common = {f.name: getattr(tiny_policy, f.name) for f in dataclasses.fields(cls) if hasattr(tiny_policy, f.name)}
    return cls(**{**common, **own})


@pytest.fixture(scope="module")
def model(config: Any, filled: Any) -> Any:
    return filled(lambda: config.create(KEY))


@pytest.fixture(scope="module")
def samples(config: Any, tiny_batch: Any) -> Any:
    """`tiny_batch` with the policy's horizon."""
    A = config.action_horizon
    cut = {k: tiny_batch[k][:, :A] for k in ("actions", "action_mask")}
    more = things(config, len(tiny_batch["state"])) | written(config, tiny_batch)
    return jax.tree.map(jnp.asarray, tiny_batch | cut | more)


def written(config: Any, batch: Any) -> dict[str, Any]:
    """Draws what is written behind the prompts, by policies that learn text: thoughts, or action tokens."""
    T, (B, S) = config.answer_len, batch["prompt"].shape
    if not T:
        return {}
    rng, at, asked = np.random.default_rng(6), np.arange(S + T), batch["prompt_mask"].sum(1)[:, None]
    said = (at >= asked) & (at < asked + 1 + np.arange(B)[:, None] % T)
    prompt = np.pad(batch["prompt"], ((0, 0), (0, T)))
    text = {
        "prompt": np.where(said, rng.integers(180, 290, said.shape), prompt).astype(np.int32),
        "prompt_mask": (at < asked) | said,
        "prompt_causal": said,
        "prompt_loss": said,
        "prompt_action": said,
    }
    return {name: x for name, x in text.items() if name in config.batch_shapes(B)}


def things(config: Any, B: int) -> dict[str, Any]:
    """Draws what is around the robot, where the policy reads such; row 0 has none of it."""
    if not config.entities:
        return {}
    rng = np.random.default_rng(5)
    there = {e.name: (rng.random((B, e.count)) < 0.7) & (np.arange(B) > 0)[:, None] for e in config.entities}
    values = {e.name: rng.normal(size=(B, e.count, e.size)).astype(np.float32) for e in config.entities}
    return {
        "entities": {name: np.where(there[name][..., None], x, 0) for name, x in values.items()},
        "entity_mask": there,
    }


@pytest.fixture(scope="module")
def options(config: Any) -> dict[str, Any]:
    """What sampling takes of tokenizers."""
    text = types.SimpleNamespace(
        tokenizer=types.SimpleNamespace(required=lambda name: 1), action_indicator=lambda: [7, 9]
    )
    waves = np.sin(np.random.default_rng(0).uniform(0, 6, (200, 1, 4)) + np.linspace(0, 3, 4)[:, None])
    fast = fit_fast([dct_coefficients(waves.astype(np.float32), 6.0)], scale=6.0, vocab_size=120)
    return jax.tree.map(jnp.asarray, config.sampling_options(text, fast))


@pytest.fixture(scope="module")
def functions(model: Any, options: dict[str, Any]) -> Any:
    """The policy's calls, compiled once."""
    return (
        jax.jit(lambda batch, counts: training_loss(model, KEY, batch, counts=counts)),
        jax.jit(lambda observation, mask: model.sample_actions(KEY, observation, action_mask=mask, **options)),
    )


def test_the_loss_of_parts_is_that_of_the_whole(config: Any, model: Any, samples: Any, functions: Any) -> None:
    loss, _ = functions
    whole, metrics = loss(samples, None)
    assert np.isfinite(whole)
    assert {"loss", "valid"} <= metrics.keys()
    counts = training_counts(model, samples)
    halves = [jax.tree.map(lambda x, h=h: x[h], samples) for h in (slice(0, 4), slice(4, 8))]
    np.testing.assert_allclose(sum(loss(half, counts)[0] for half in halves), whole, rtol=2e-5)
    for name in (k for k in metrics if f"{k}_valid" in metrics):
        assert metrics[name].shape == (8,)


def test_what_is_masked_does_not_matter(config: Any, samples: Any, functions: Any) -> None:
    loss, sample = functions
    expected, _ = loss(samples, None)
    seen = samples["image_mask"]["wrist_right"][:, None, None, None]
    other = samples | {
        "actions": jnp.where(samples["action_mask"], samples["actions"], 7.0),
        "prompt": jnp.where(samples["prompt_mask"], samples["prompt"], 9),
        "images": samples["images"] | {"wrist_right": jnp.where(seen, samples["images"]["wrist_right"], 200)},
    }
    if config.entities:
        there = samples["entity_mask"]
        other["entities"] = {k: jnp.where(there[k][..., None], x, 3.0) for k, x in samples["entities"].items()}
    np.testing.assert_allclose(loss(other, None)[0], expected, rtol=1e-5)
    mask = samples["action_mask"]
    first, second = (sample(config.observation(batch), mask) for batch in (samples, other))
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_actions_are_those_that_the_robot_has(config: Any, samples: Any, functions: Any) -> None:
    _, sample = functions
    dims = jnp.broadcast_to(samples["action_mask"].any(1, keepdims=True), samples["action_mask"].shape)
    actions = np.asarray(sample(config.observation(samples), dims))
    assert actions.shape == samples["actions"].shape
    assert np.isfinite(actions).all()
    assert (actions[~np.asarray(dims)] == 0).all()
    assert (actions[np.asarray(dims)] != 0).any()


def test_a_row_is_the_same_in_company_and_alone(config: Any, samples: Any, functions: Any) -> None:
    _, sample = functions
    together = sample(config.observation(samples), samples["action_mask"])
    first = jax.tree.map(lambda x: x[:4], samples)
    np.testing.assert_allclose(sample(config.observation(first), first["action_mask"]), together[:4], atol=1e-5)


def test_validation_and_comparison(config: Any, model: Any, samples: Any) -> None:
    losses = held_out_losses(model, KEY, samples)
    assert "loss" in losses
    assert all(np.isfinite(float(v)) for v in losses.values())
    assert np.isfinite(np.asarray(model.outputs(KEY, samples))).all()


def test_packed_samples_the_same(
    config: Any, model: Any, samples: Any, functions: Any, options: dict[str, Any]
) -> None:
    observation, mask = config.observation(samples), samples["action_mask"]
    packed = model.packed()
    again = jax.jit(lambda o, m: packed.sample_actions(KEY, o, action_mask=m, **options))(observation, mask)
    np.testing.assert_allclose(again, functions[1](observation, mask), atol=2e-5)


def test_a_policy_reads_the_things_that_are_there(tiny_policy: Any, tiny_batch: Any, filled: Any) -> None:
    config = dataclasses.replace(tiny_policy, entities=THINGS)
    batch = jax.tree.map(jnp.asarray, tiny_batch | things(config, len(tiny_batch["state"])))
    model = filled(lambda: config.create(KEY))
    without = filled(lambda: tiny_policy.create(KEY))
    graph, _ = nnx.split(without)
    _, state = nnx.split(model)
    del state["backbone"]["entities"]
    without = nnx.merge(graph, state)  # the same weights
    loss, plain = (jax.jit(lambda b, m=m: m.loss(KEY, b)[1]["loss"]) for m in (model, without))
    # Where there is nothing, all is as if the policy had no slots: a masked token takes no position.
    own, bare = loss(batch), plain({k: v for k, v in batch.items() if not k.startswith("entit")})
    np.testing.assert_allclose(own[0], bare[0], rtol=1e-5)
    assert np.all(np.abs(np.asarray(own - bare)[1:]) > 1e-4)
    # Each slot has a map of its own.
    for name, numbers in (("agents", 4), ("map", 5)):
        kernel = getattr(model.backbone.entities, name).first.kernel
        assert kernel.shape == (numbers, tiny_policy.backbone.language.width)
    with pytest.raises(ValueError, match=r"entities\['map'\]: missing"):
        model.loss(KEY, batch | {"entities": {"agents": batch["entities"]["agents"]}})
    with pytest.raises(ValueError, match=r"entities\['agents'\]: got float32 \(8, 3, 5\)"):
        model.loss(KEY, batch | {"entities": batch["entities"] | {"agents": jnp.zeros((8, 3, 5))}})


def test_projectors_have_the_published_sizes() -> None:
    """OpenDriveVLA: three projectors of features of 256 numbers, 3.1, 14.2 and 41.3 million weights."""
    slots = [EntityTokens(name, 1, 256) for name in ("scene", "agents", "map")]
    for width, millions in ((896, 3.1), (2048, 14.2), (3584, 41.3)):
        made = nnx.eval_shape(lambda width=width: EntityProjectors(KEY, slots, width))
        assert round(sum(x.size for x in jax.tree.leaves(nnx.state(made))) / 1e6, 1) == millions


def test_a_policy_of_kept_image_states_takes_no_entities(tiny_policy: Any) -> None:
    common = {
        f.name: getattr(tiny_policy, f.name) for f in dataclasses.fields(M2VlaConfig) if hasattr(tiny_policy, f.name)
    }
    own = {"backbone": PRISMATIC, "queries": 4, "head_heads": 2, "entities": THINGS}
    with pytest.raises(ValueError, match="no entities"):
        M2VlaConfig(**{**common, **own}).create(KEY)


def test_entity_projectors_belong_to_the_robot(tiny_policy: Any) -> None:
    """Presets that leave the backbone alone train them: they are drawn anew for every robot."""
    config = dataclasses.replace(tiny_policy, entities=THINGS)
    names = {"entities/agents/first/kernel", "entities/map/second/bias"}
    beside = Trainable(lora=Lora(also_train=("^entities/",)))
    for trainable in (presets.lora(config), presets.expert_only(config), beside):
        assert names <= ModelDef(config, trainable).trained
    for name in ("names", "decoder", "a b", "1st", "a/b"):
        with pytest.raises(ValueError, match="expected an identifier"):
            EntityTokens(name, 1, 1)
