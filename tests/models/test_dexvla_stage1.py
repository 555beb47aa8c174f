"""What stage 1 of DexVLA sees and reads with, beside torchvision's and transformers' numbers; what it hands over."""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from openpi_like.models.ddim import Ddim
from openpi_like.models.dexvla import DexVlaConfig
from openpi_like.models.dexvla_stage1 import LEFT_BEHIND, DexVlaStage1Config
from openpi_like.models.distilbert import DistilBert, DistilBertConfig, distilbert_rows
from openpi_like.models.resnet import ResNet, ResNetConfig
from openpi_like.models.resnet_bert import ResNetBertConfig
from openpi_like.models.scale_dp import ScaleDpConfig
from openpi_like.models.weights import flatten, plan_load, put_weights, read_weights, unflatten, weight_shapes
from tests.models.test_policies import PRISMATIC
from tests.models.weight_arrays import MemoryArrays

GOLDEN = Path(__file__).parent / "golden"
KEY = jax.random.key(0)


def with_weights(model: Any, weights: dict[str, np.ndarray]) -> Any:
    state = nnx.state(model)
    put_weights(state, unflatten({name: jnp.asarray(x) for name, x in weights.items()}))
    nnx.update(model, state)
    return model


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: x.shape for name, x in flatten(nnx.to_pure_dict(nnx.state(model))).items()}


# ---- Parts -----------------------------------------------------------------------------------------------------------


def _theirs(name: str) -> str:
    """torchvision's name of one of our weights of a ResNet without FiLM."""
    parts = {"reduce": "1", "middle": "2", "expand": "3"}
    where, what = name.rsplit("/", 1)
    kind = {"kernel": "weight", "scale": "weight", "bias": "bias"}[what]
    if where.startswith("stem"):
        return f"{'conv1' if what == 'kernel' else 'bn1'}.{kind}"
    block, part = where.split("/")[:2]
    stage, i = block.removeprefix("stage_").split("_")
    if part == "shortcut":
        return f"layer{int(stage) + 1}.{i}.downsample.{0 if what == 'kernel' else 1}.{kind}"
    return f"layer{int(stage) + 1}.{i}.{'conv' if what == 'kernel' else 'bn'}{parts[part]}.{kind}"


def test_resnet() -> None:
    """Fresh FiLM leaves it as torchvision has it."""
    numbers = dict(np.load(GOLDEN / "resnet_groups.npz"))
    model = ResNet(KEY, ResNetConfig((1, 2, 1, 1)), language_dim=3, dtype="float32")
    weights, used = {}, set()
    for name, shape in shapes_of(model).items():
        if name.split("/")[-2] in ("scale", "shift"):  # of the language
            weights[name] = np.zeros(shape, np.float32)
            continue
        theirs = _theirs(name)
        used.add(theirs)
        # As `weight_of` of tests/bench/golden_dexvla_stage1.py.
        rng = np.random.default_rng(zlib.crc32(theirs.encode()))
        if len(shape) == 4:
            drawn = rng.standard_normal((shape[3], shape[2], shape[0], shape[1]))
            drawn = (drawn / np.sqrt(np.prod(drawn.shape[1:]))).transpose(2, 3, 1, 0)
        else:
            drawn = 1 + 0.2 * rng.standard_normal(shape)
        weights[name] = drawn.astype(np.float32)
    assert used == set(json.loads(str(numbers["shapes"])))
    images, language = jnp.asarray(numbers["images"]), jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)))
    run = nnx.jit(lambda model, images, language: model(images, language))
    model = with_weights(model, weights)
    np.testing.assert_allclose(run(model, images, language), numbers["out"], rtol=1e-3, atol=1e-4)
    model.stage_3_0.scale.bias[...] = jnp.full(2048, -1.0)  # what the block adds is gone
    changed = run(model, images, language)
    assert np.abs(changed - numbers["out"]).max() > 0.1


def test_distilbert() -> None:
    numbers = dict(np.load(GOLDEN / "distilbert.npz"))
    config = DistilBertConfig(width=16, depth=2, num_heads=2, mlp_dim=24, positions=12)
    model = DistilBert(KEY, config, vocab_size=40, dtype="float32", unroll=False)
    ours = {name: np.zeros(shape, np.float32) for name, shape in shapes_of(model).items()}
    rows = distilbert_rows(config, "", "")
    assert {row.theirs for row in rows} == {k[7:] for k in numbers if k.startswith("weight/")}
    for row in rows:
        ours[row.ours][row.at] = row.to_ours(numbers[f"weight/{row.theirs}"], ours[row.ours][row.at].shape)
    mask = jnp.asarray(numbers["mask"])
    out = with_weights(model, ours)(jnp.asarray(numbers["tokens"], jnp.int32), mask)
    np.testing.assert_allclose(jnp.where(mask[..., None], out, 0), numbers["out"], atol=2e-5)


def test_published_sizes() -> None:
    """ResNet-50 without its classes has 23.5 million weights, DistilBERT 66.4."""
    sizes = {"language_dim": 1, "dtype": "float32"}
    shapes = jax.eval_shape(lambda: nnx.state(ResNet(KEY, ResNetConfig.resnet50(), **sizes)))  # type: ignore[arg-type]
    flat = {name: x.size for name, x in flatten(nnx.to_pure_dict(shapes)).items()}
    film = sum(n for name, n in flat.items() if name.split("/")[-2] in ("scale", "shift"))
    assert (sum(flat.values()) - film) / 1e6 == pytest.approx(23.51, abs=0.005)
    text = jax.eval_shape(
        lambda: nnx.state(DistilBert(KEY, DistilBertConfig.base(), vocab_size=30_522, dtype="float32", unroll=False))
    )
    assert sum(x.size for x in jax.tree.leaves(text)) / 1e6 == pytest.approx(66.36, abs=0.005)


# ---- The policy ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tiny_policy: Any) -> DexVlaStage1Config:
    common = {f.name for f in dataclasses.fields(DexVlaStage1Config)} & {
        f.name for f in dataclasses.fields(tiny_policy)
    }
    text = DistilBertConfig(width=16, depth=2, num_heads=2, mlp_dim=24, positions=12)
    own: dict[str, Any] = {"backbone": ResNetBertConfig(ResNetConfig((1, 1), stem=8, groups=4), text, width=16)}
    own |= {"expert": ScaleDpConfig(width=16, depth=2, heads=2, combined=16), "diffusion": Ddim(20, 4)}
    return DexVlaStage1Config(**{**{name: getattr(tiny_policy, name) for name in common - own.keys()}, **own})


def test_what_is_masked_does_not_matter(config: DexVlaStage1Config, filled: Any, tiny_batch: Any) -> None:
    model = filled(lambda: config.create(KEY))
    loss = jax.jit(lambda batch: model.loss(KEY, batch)[0])
    batch = jax.tree.map(jnp.asarray, tiny_batch)
    seen = batch["image_mask"]["wrist_right"][:, None, None, None]
    other = batch | {
        "actions": jnp.where(batch["action_mask"], batch["actions"], 7.0),
        "prompt": jnp.where(batch["prompt_mask"], batch["prompt"], 9),
        "images": batch["images"] | {"wrist_right": jnp.where(seen, batch["images"]["wrist_right"], 200)},
    }
    expected = float(loss(batch))
    np.testing.assert_allclose(loss(other), expected, rtol=1e-5)
    changed = batch | {"prompt": batch["prompt"] + batch["prompt_mask"]}
    assert abs(float(loss(changed)) - expected) > 1e-6
    sample = jax.jit(lambda o, m: model.sample_actions(KEY, o, action_mask=m))
    actions = sample(config.observation(batch), batch["action_mask"])
    assert (actions[~batch["action_mask"]] == 0).all()
    np.testing.assert_allclose(sample(config.observation(other), batch["action_mask"]), actions, atol=1e-5)


def test_compiled_every_weight_learns(config: DexVlaStage1Config, filled: Any, tiny_batch: Any) -> None:
    """All but the embeddings of words and positions that no prompt has."""
    graph, state = nnx.split(filled(lambda: config.create(KEY)))
    batch = jax.tree.map(jnp.asarray, tiny_batch)
    grads = jax.jit(jax.grad(lambda state: nnx.merge(graph, state).loss(KEY, batch)[0]))(state)
    for name, grad in flatten(nnx.to_pure_dict(grads)).items():
        assert np.isfinite(grad).all(), name
        assert np.any(grad), name


def test_the_next_stage_takes_the_expert(config: DexVlaStage1Config, filled: Any) -> None:
    """And begins what it is told by anew; nothing else is left out without being named."""
    later = DexVlaConfig(
        **{
            f.name: getattr(config, f.name)
            for f in dataclasses.fields(config)
            if f.name not in ("backbone", "thought_len")
        },
        backbone=PRISMATIC,
        thought_len=4,
    )
    later = dataclasses.replace(later, image_slots=(1, 1))
    weights = flatten(nnx.to_pure_dict(nnx.state(filled(lambda: config.create(KEY)), nnx.Param)))
    source = MemoryArrays({name.removeprefix("backbone/"): np.asarray(x) for name, x in weights.items()})
    fresh = ("^(siglip|projector|vlm|fusion)/", "^expert/(combine_|condition_in)")
    plan = plan_load(later, source, fmt="ours", reinitialize=fresh, drop=LEFT_BEHIND)
    loaded = read_weights(source, plan)
    expert = {name for name in weight_shapes(later) if name.startswith("expert/")}
    told = {name for name in expert if name.startswith(("expert/combine_", "expert/condition_in"))}
    assert set(loaded) == expert - told
    for name, x in loaded.items():
        np.testing.assert_array_equal(x, weights[name])


def test_what_does_not_fit_is_named(config: DexVlaStage1Config) -> None:
    with pytest.raises(ValueError, match="backbone=PrismaticConfig, expected a ResNetBertConfig"):
        dataclasses.replace(config, backbone=PRISMATIC, image_slots=(1, 1))
    with pytest.raises(ValueError, match="prompt_len=13, expected at most the 12 positions"):
        dataclasses.replace(config, prompt_len=13)
    with pytest.raises(ValueError, match=r"image_size=\(4, 16\), expected at least 8 pixels"):
        dataclasses.replace(config, image_size=(4, 16))
    with pytest.raises(ValueError, match=r"blocks=.*stem=6, expected a multiple of groups=4"):
        ResNetConfig((0,), stem=6, groups=4)
    with pytest.raises(ValueError, match="width=9, expected a multiple of num_heads=2"):
        DistilBertConfig(width=9, num_heads=2)
