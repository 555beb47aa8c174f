"""The head that reads every layer, and its memory, against plain formulas; what is frozen, counted and written."""

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_like.models.layer_mixture import JointBlock, LayerBlock, SeparateBlock, rotated
from openpi_like.models.llama import LlamaConfig
from openpi_like.models.m2vla import FROZEN, M2VlaConfig
from openpi_like.models.m2vla_noise import M2VlaNoiseConfig
from openpi_like.models.prismatic import PrismaticConfig
from openpi_like.models.siglip import SiglipConfig
from openpi_like.models.skill_memory import SkillMemory, SkillMemoryConfig
from openpi_like.models.vla_adapter import VlaAdapterConfig
from openpi_like.models.weights import (
    export_weights,
    flat_weights,
    flatten,
    layout,
    plan_load,
    read_weights,
    weight_shapes,
)
from openpi_like.partition import ShardingRules, placed
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.sharding import MeshConfig, put_batch
from openpi_like.train.state import ModelDef, Trainable, Trainer
from tests.models.weight_arrays import MemoryArrays

KEY = jax.random.key(0)
B, A, D, N, Q, P = 2, 3, 12, 2, 4, 5
SKILLS = SkillMemoryConfig(size=12, recalled=3, layers=(0, 2), written=0.5)


# ---- Blocks ----------------------------------------------------------------------------------------------------------


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _turned(x: np.ndarray, as_released: bool) -> np.ndarray:
    """x: (T, H) of one head. Written from the definition of a rotation, and from the released code's formula."""
    T, H = x.shape
    angle = np.arange(T)[:, None] / 10_000 ** (np.arange(0, H, 2) / H)
    if not as_released:
        turned = (x[:, : H // 2] + 1j * x[:, H // 2 :]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag], axis=1)
    double, swapped = np.concatenate([angle, angle], axis=1), np.empty_like(x)
    swapped[:, 0::2], swapped[:, 1::2] = -x[:, 1::2], x[:, 0::2]
    return x * np.cos(double) + swapped * np.sin(double)


def _block(cls: type[LayerBlock], rng: np.random.Generator) -> Any:
    """A block of one layer whose every weight is drawn."""
    block = cls(KEY, 1, D, N)
    graph, state = nnx.split(block)
    state = jax.tree.map(lambda x: jnp.asarray(0.4 * rng.standard_normal(x.shape[1:]), jnp.float32), state)
    return nnx.merge(graph, state)


@pytest.mark.parametrize("as_released", [False, True])
@pytest.mark.parametrize("cls", [SeparateBlock, JointBlock])
def test_a_block_is_its_formula(cls: type[LayerBlock], as_released: bool) -> None:
    rng = np.random.default_rng(0)
    block = _block(cls, rng)
    x, asked, seen, recalled = (rng.standard_normal((B, *s)) for s in ((A, D), (Q, D), (P, D), (2, A, D)))
    there = np.array([[True] * P, [True, False, True, True, False]])
    given = (*map(jnp.float32, (x, asked, seen)), jnp.array(there), jnp.float32(recalled))
    got = block(*given, as_released=as_released)

    w = {k: np.asarray(v, np.float64) for k, v in flatten(nnx.to_pure_dict(nnx.state(block))).items()}
    for b in range(B):
        tokens = {"self": x[b], "asked": asked[b], "seen": seen[b][there[b]]}
        contexts = []
        for n in range(N):
            q = _turned(x[b] @ w["q"][n] + w["q_bias"][n], as_released)
            scores, values = {}, {}
            for name in tokens:
                # Positions are those of all patches, there or not.
                source = seen[b] if name == "seen" else tokens[name]
                k = _turned(source @ w[f"kv_{name}"][0, n] + w[f"kv_{name}_bias"][0, n], as_released)
                v = source @ w[f"kv_{name}"][1, n] + w[f"kv_{name}_bias"][1, n]
                keep = there[b] if name == "seen" else slice(None)
                scores[name], values[name] = q @ k[keep].T / np.sqrt(D // N), v[keep]
            scores["seen"] *= np.tanh(w["gate"])
            if cls is JointBlock:
                weights = _softmax(np.concatenate(list(scores.values()), axis=1))
                contexts.append(weights @ np.concatenate(list(values.values())))
            else:
                gate = 1 / (1 + np.exp(-(asked[b] @ w["head_gate"][n] + w["head_gate_bias"][n]).mean()))
                each = {name: _softmax(scores[name]) @ values[name] for name in tokens}
                contexts.append((each["self"] + gate * each["asked"] + each["seen"]) / 3)
        attended = sum(contexts[n] @ w["out"][n] for n in range(N)) + w["out_bias"]
        memory = recalled[b].reshape(2, -1)
        attended += (_softmax(memory @ x[b].reshape(-1) / np.sqrt(A * D)) @ memory).reshape(A, D)
        y = attended + x[b]
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
        y = y * w["norm/scale"] + w["norm/bias"]
        expected = np.maximum(y @ w["map/kernel"] + w["map/bias"], 0)
        np.testing.assert_allclose(got[b], expected, rtol=2e-4, atol=2e-5)


def test_fresh_gates_take_the_mean_of_images_and_half_of_what_was_asked() -> None:
    rng = np.random.default_rng(1)
    block: Any = _block(SeparateBlock, rng)
    block.gate[...] = jnp.zeros(())
    block.head_gate[...], block.head_gate_bias[...] = jnp.zeros((N, D)), jnp.zeros(N)
    draw = lambda T, d: jnp.float32(rng.standard_normal((B, T, d)))  # noqa: E731
    q = jnp.float32(rng.standard_normal((B, A, N, D // N)))
    sources = {name: block.source(name, draw(T, D), None, as_released=False) for name, T in (("self", A), ("seen", P))}
    sources["asked"] = block.source("asked", jnp.zeros((B, Q, D)), None, as_released=False)
    got = block.attend(q, sources, draw(Q, D))
    own = jnp.einsum("BTNH,BSNH->BNTS", q, sources["self"].keys) / np.sqrt(D // N)
    own = jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(own, axis=-1), sources["self"].values)
    expected = (own + 0.5 * sources["asked"].values[:, :1] + sources["seen"].values.mean(1, keepdims=True)) / 3
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_rotations_depend_on_distance_alone_unless_as_released() -> None:
    rng = np.random.default_rng(2)
    x = jnp.broadcast_to(jnp.float32(rng.standard_normal((1, 1, 1, 6))), (1, 9, 1, 6))
    spread = lambda r: np.ptp([float(r[0, i, 0] @ r[0, i + 2, 0]) for i in range(7)])  # noqa: E731
    assert spread(rotated(x, as_released=False)) < 1e-5
    assert spread(rotated(x, as_released=True)) > 0.1


# ---- The memory ------------------------------------------------------------------------------------------------------


def _memory(size: int, R: int, K: int = 6, E: int = 4) -> SkillMemory:
    return SkillMemory(SkillMemoryConfig(size=size, recalled=R, layers=(0,)), K, E)


def _put(skills: SkillMemory, rows: dict[str, Any]) -> None:
    for name, value in rows.items():
        getattr(skills, name)[...] = jnp.asarray(value, jnp.float32)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), max_size=6), st.sampled_from([3, 7]))
def test_the_oldest_are_replaced(written: list[list[bool]], size: int) -> None:
    skills, expected, rng = _memory(size, 2), collections.deque[float](maxlen=size), np.random.default_rng(0)
    for valid in written:
        names = rng.standard_normal(5).astype(np.float32)
        rows = skills.written(jnp.tile(names[:, None], 6), jnp.tile(names[:, None], 4), jnp.array(valid))
        _put(skills, rows)
        expected.extend(names[np.array(valid)])
    total, start = sum(map(sum, written)), int(skills.count[...])
    assert (min(start, size), start % size) == (len(expected), total % size)
    assert start < 2 * size
    order = np.arange(start - len(expected), start) % size
    np.testing.assert_array_equal(np.asarray(skills.keys[...])[order, 0], np.array(expected, np.float32))
    np.testing.assert_array_equal(np.asarray(skills.values[...])[order, 3], np.array(expected, np.float32))


def test_a_samples_own_episode_is_left_out() -> None:
    config = SkillMemoryConfig(size=6, recalled=2, layers=(0,), apart=True)
    skills = SkillMemory(config, 1, 1)
    keys = jnp.arange(4.0)[:, None]
    episodes = jnp.array([[0, 5], [0, 5], [1, 5], [0, 7]])
    _put(skills, skills.written(keys, 10 * keys, jnp.ones(4, bool), episodes))
    asked, own = jnp.array([[0.1], [0.1], [2.9]]), jnp.array([[0, 5], [0, 6], [0, 7]])
    np.testing.assert_array_equal(skills.recall(asked, own)[..., 0], [[20, 30], [0, 10], [20, 10]])
    np.testing.assert_array_equal(skills.recall(asked)[..., 0], [[0, 10], [0, 10], [30, 20]])


@pytest.mark.parametrize("count", [0, 2, 700, 1200])
def test_what_is_recalled_is_what_brute_force_finds(count: int) -> None:
    """Of some blocks of rows, whole and not; on one device, and in parts on four."""
    rng, size, R = np.random.default_rng(3), 1200, 4
    skills = _memory(size, R)
    keys, values = rng.standard_normal((size, 6)), rng.standard_normal((size, 4))
    _put(skills, {"keys": keys, "values": values, "count": count})
    asked = rng.standard_normal((8, 6)).astype(np.float32)
    distance = np.abs(asked[:, None] - np.float32(keys[:count])).mean(-1)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :R]
    expected = np.zeros((8, R, 4))
    expected[:, : min(R, count)] = values[nearest]
    np.testing.assert_allclose(skills.recall(jnp.asarray(asked)), expected, rtol=1e-6)
    graph, state = nnx.split(skills)
    mesh = MeshConfig(data=1, fsdp=4).create()
    with placed(mesh, ShardingRules()):
        found = jax.jit(lambda state, keys: nnx.merge(graph, state).recall(keys))(state, jnp.asarray(asked))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# ---- The policy ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tiny_policy: Any) -> M2VlaConfig:
    siglip = SiglipConfig(width=16, depth=2, mlp_dim=32, num_heads=2, patch_size=8, select="second_to_last")
    llama = LlamaConfig.tiny(width=16, depth=2, mlp_dim=32, num_kv_heads=2, head_dim=8, tied=True)
    common = {f.name for f in dataclasses.fields(M2VlaConfig)} & {f.name for f in dataclasses.fields(tiny_policy)}
    own: dict[str, Any] = {"backbone": PrismaticConfig(None, siglip, llama), "image_slots": (1, 1)}
    own |= {"queries": 4, "head_heads": 2, "skills": SKILLS}
    return M2VlaConfig(**{**{name: getattr(tiny_policy, name) for name in common}, **own})


@pytest.mark.parametrize("kind", [M2VlaConfig, M2VlaNoiseConfig])
def test_it_trains_frozen_and_writes_some_batches_whole(
    config: M2VlaConfig, tiny_batch: Any, kind: type[M2VlaConfig]
) -> None:
    """On four devices: the backbone stays, the rest moves, and the memory holds the chunks of the batches it drew."""
    config = kind(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
    trainer = Trainer(
        ModelDef(config, Trainable(frozen=FROZEN)),
        OptimizerConfig(peak_lr=1e-2, warmup_steps=1, decay_steps=100).create(),
        ema_decay=None,
        seed=0,
        mesh=MeshConfig(fsdp=4).create(),
        rules=ShardingRules(),
        dataset_names=("one", "two"),
    )
    state, counts, losses = trainer.init(), [], []
    before = jax.device_get(state)
    for step in range(8):
        batch = tiny_batch | {"position": tiny_batch["position"] + np.array([0, 16 * step], np.uint32)}
        state, metrics = trainer.train_step(state, put_batch(batch, trainer.mesh))
        counts.append(int(state.params["skills"]["count"]))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    grown = np.diff([0, *counts])
    assert {0, 8} <= set(grown) <= {0, 8, -4}  # whole batches; from 24 on, 12 are left out of the count
    assert 12 <= counts[-1] < 24
    moved = {k for k, v in flatten(state.params).items() if not np.array_equal(v, flatten(before.params)[k])}
    assert {"queries", "head/map_out/kernel", "skills/keys", "skill_in/kernel"} <= moved
    assert not [name for name in moved if name.startswith(("siglip", "projector", "vlm"))]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.frozen), before.frozen)
    chunks = np.where(tiny_batch["action_mask"], tiny_batch["actions"], 0).reshape(8, -1)
    for row in np.asarray(state.params["skills"]["values"]):
        assert np.abs(chunks - row).max(1).min() < 1e-6


def test_what_images_become_depends_on_nothing_else(config: M2VlaConfig, filled: Any, tiny_batch: Any) -> None:
    """So they can be cached: neither the instruction, but for its first token, nor the queries are seen by them."""
    model = filled(lambda: config.create(KEY))
    batch = jax.tree.map(jnp.asarray, tiny_batch)
    first, keys = model.features(config.observation(batch))
    other = batch | {"prompt": batch["prompt"].at[:, 1:].add(1), "state": batch["state"] + 1}
    model.queries[...] += 1
    second, same = model.features(config.observation(other))
    there = np.broadcast_to(first.seen_mask[None, ..., None], first.seen.shape)
    np.testing.assert_array_equal(first.seen[there], second.seen[there])
    np.testing.assert_array_equal(keys, same)
    assert np.abs(first.asked - second.asked).max() > 0.1


def test_as_released_visual_tokens_begin_one_too_early(config: M2VlaConfig, filled: Any, tiny_batch: Any) -> None:
    """With the first token of the text, and without the last patch of the last camera."""
    both = config, dataclasses.replace(config, as_released=True)
    plain, released = (filled(lambda config=config: config.create(KEY)) for config in both)
    assert plain._visual_tokens().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]  # of two cameras, behind one token
    assert released._visual_tokens().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    observation = config.observation(jax.tree.map(lambda x: jnp.asarray(x[::2]), tiny_batch))  # rows with both cameras
    (mine, keys), (theirs, other) = plain.features(observation), released.features(observation)
    np.testing.assert_array_equal(theirs.seen[:, :, 1:], mine.seen[:, :, :-1])
    first = released.backbone.image_states(observation)[:, :, 0]
    np.testing.assert_array_equal(theirs.seen[:, :, 0], first[1:])
    np.testing.assert_array_equal(theirs.asked, mine.asked)
    # Keys are of what is seen: before the first layer and behind the second.
    said = np.concatenate([(first[i] - plain.backbone.image_states(observation)[i, :, 8]) / 8 for i in (0, 2)], axis=1)
    np.testing.assert_allclose(other - keys, said, atol=1e-5)


def test_memory_alone_is_nothing_to_train(config: M2VlaConfig) -> None:
    with pytest.raises(ValueError, match="nothing is left to train"):
        ModelDef(config, Trainable(frozen=("^(?!skills/)",)))


def test_released_sizes() -> None:
    """The head has 257.0 million weights with what the released code declares and never uses: keys and values of the
    memory, and a FiLM, in each block."""
    config = M2VlaConfig.released()
    sizes = {name: int(np.prod(x.shape)) for name, x in weight_shapes(config).items()}
    head = sum(n for name, n in sizes.items() if name.startswith(("head/", "norm_in/", "map_in/", "skill_in/")))
    D = 896
    unused = 24 * (2 * (D * D + D) + 2 * D * D + 2 * D)
    assert (head + unused) / 1e6 == pytest.approx(257.0, abs=0.05)
    block = sum(n for name, n in sizes.items() if name.startswith("head/blocks/")) // 24
    assert (block + unused // 24) / 1e6 == pytest.approx(10.46, abs=0.005)
    assert sizes["skills/keys"] == 10_000 * 2_688
    assert sizes["queries"] == 64 * 896


def test_sizes_that_do_not_fit_are_named(config: M2VlaConfig) -> None:
    wrong = SkillMemoryConfig(size=2, recalled=4, layers=(3,), written=1.5)
    with pytest.raises(ValueError, match="queries=0") as error:
        dataclasses.replace(config, queries=0, head_heads=5, perturbation=-1.0, skills=wrong, image_slots=())
    for said in ("head_heads=5", "perturbation=-1", "recalled=4, size=2", "written=1.5", "layers=(3,), expected some"):
        assert said in str(error.value)
    with pytest.raises(ValueError, match="expected cameras behind a text token"):
        dataclasses.replace(config, as_released=True, image_slots=(0, 0))


def test_the_released_layout_is_read_and_written(config: M2VlaConfig, filled: Any) -> None:
    """Names and shapes as the released code declares them; what it never uses is left out."""
    weights = {name: np.asarray(x) for name, x in flat_weights(filled(lambda: config.create(KEY))).items()}
    weights["skills/count"] = np.asarray(15.0, np.float32)  # of twelve rows, some replaced
    shapes = layout(config, "openvla")
    block = "action_head.model.mlp_resnet_blocks.1"
    width, heads = 16, 2
    assert shapes[f"{block}.k_adapter.weight"] == (width + heads, width)
    assert shapes[f"{block}.gating_factor"] == (1,)
    assert shapes["action_head.memory_value_proj.weight"] == (4 * width, 16)
    assert shapes["action_head.memory_bank.keys"] == (12, 2 * width)
    assert shapes["action_queries.weight"] == (4, width)
    written = {name: make() for name, make in export_weights(config, weights, "openvla")}
    assert {name: x.shape for name, x in written.items()} == shapes
    size = written["action_head.memory_bank.size"]
    assert (size, size.dtype, size.shape) == (12, np.int64, ())  # as torch has it
    np.testing.assert_array_equal(written[f"{block}.k_adapter.weight"][width:], weights["head/blocks/head_gate"][1])
    more = {f"{block}.{name}.weight": np.zeros(3) for name in ("k_memory", "v_memory", "film_gen.0")}
    source = MemoryArrays(written | more)
    back = read_weights(source, plan_load(config, source))
    for name, x in weights.items():
        assert (back[name].shape, back[name].dtype) == (x.shape, np.float32), name
        np.testing.assert_array_equal(back[name], np.float32(12) if name == "skills/count" else x, err_msg=name)
    adapter = VlaAdapterConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
    assert layout(dataclasses.replace(adapter, skills=None), "openvla")[f"{block}.k_adapter.weight"] == (width, width)
