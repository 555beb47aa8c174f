"""Muon against its definition in NumPy, and what it does to which weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from numpy.testing import assert_allclose

from openpi_like.models.lora import Lora, LoraRule
from openpi_like.models.param import MapDims
from openpi_like.models.weights import flatten
from openpi_like.partition import WHOLE, ShardingRules, by_element, placed
from openpi_like.train.moments import BFloat16Moments
from openpi_like.train.muon import MuonConfig
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.planning.hlo_cost import read_program
from openpi_like.train.sharding import MeshConfig, put_batch
from openpi_like.train.state import ModelDef, Trainable, Trainer

RATE = 0.01
STEADY: dict[str, Any] = {"peak_lr": RATE, "end_lr": RATE, "warmup_steps": 0, "clip_norm": 1e9, "weight_decay": 0.1}
# A stack of two layers of heads (L, N, D, H), as queries have; inputs D, outputs all heads together.
QUERIES = MapDims.of(("layers", "heads", "embed", "head_dim"), (2,), per_head=False)


def _newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Five steps of Jordan's quintic, which takes singular values near to one."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_steps_are_those_of_the_definition():
    """Nesterov's momentum, by layer one matrix, the size of AdamW's update, decay."""
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=7)
    config = MuonConfig(**STEADY)
    optimizer = config.create({"layers/q": QUERIES})
    adamw = OptimizerConfig(**STEADY).create()
    params = {"layers": {"q": jnp.asarray(weight, jnp.float32)}, "bias": jnp.asarray(bias, jnp.float32)}
    alone = {"bias": params["bias"]}
    state, state_alone = optimizer.init(params), adamw.init(alone)
    momentum = np.zeros_like(weight)
    for _ in range(3):
        g, g_bias = rng.normal(size=weight.shape), rng.normal(size=7)
        grads = {"layers": {"q": jnp.asarray(g, jnp.float32)}, "bias": jnp.asarray(g_bias, jnp.float32)}
        updates, state = optimizer.update(grads, state, params)
        expected, state_alone = adamw.update({"bias": grads["bias"]}, state_alone, alone)
        params, alone = optax.apply_updates(params, updates), optax.apply_updates(alone, expected)
        momentum = 0.95 * momentum + g
        ahead = 0.95 * momentum + g
        for layer in range(2):
            matrix = ahead[layer].transpose(1, 0, 2).reshape(4, 15)
            update = 0.2 * np.sqrt(15) * _newton_schulz(matrix).reshape(4, 3, 5).transpose(1, 0, 2)
            weight[layer] -= RATE * (update + 0.1 * weight[layer])
        assert_allclose(params["layers"]["q"], weight, rtol=1e-4, atol=1e-6)
        assert_allclose(params["bias"], alone["bias"], rtol=1e-6)


def test_an_update_is_orthogonal_and_of_the_size_asked_for():
    """Whatever the gradient's size: exact ones would give all singular values 0.2 sqrt(64), Newton-Schulz is near."""
    rng = np.random.default_rng(1)
    u, v = (np.linalg.qr(rng.normal(size=(64, 16)))[0] for _ in range(2))
    gradient = u @ np.diag(10.0 ** np.linspace(-6, -5, 16)) @ v[:16, :16].T
    scale = MuonConfig().scale({"w": MapDims.of((None, None), (0,), per_head=False)})
    params = {"w": jnp.zeros((64, 16))}
    update, _ = scale.update({"w": jnp.asarray(gradient, jnp.float32)}, scale.init(params), params)
    values = np.linalg.svd(np.asarray(update["w"]), compute_uv=False) / (0.2 * np.sqrt(64))
    assert values.min() > 0.3 and values.max() < 1.3  # noqa: PT018
    assert_allclose(np.sqrt(np.mean(np.square(update["w"]))), 0.2, rtol=0.3)


def test_it_holds_one_moment_of_maps_and_is_refused_without_any(tiny_policy):
    model = ModelDef(tiny_policy)
    assert "vlm/layers/q" in model.maps
    others = {"vlm/embedding", "vision/position", "action_out/kernel", "state_in/kernel", "vlm/layers/mlp_norm/scale"}
    assert others < set(flatten(model.shapes)) - set(model.maps)
    size = lambda names: sum(flatten(model.shapes)[name].size for name in names)  # noqa: E731
    moments = BFloat16Moments()  # of AdamW's part
    shapes = jax.eval_shape(MuonConfig(moments=moments).create(model.maps).init, model.shapes)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    rest = set(flatten(model.shapes)) - set(model.maps)
    assert 4 * size(model.maps) + 4 * size(rest) < held < 4 * size(model.maps) + 4 * size(rest) + 100
    for beta, rms in ((1.0, 0.2), (-0.1, 0.2), (0.9, 0.0)):
        with pytest.raises(ValueError, match="expected 0 <= beta < 1, update_rms > 0"):
            MuonConfig(beta=beta, update_rms=rms)
    frozen = ModelDef(tiny_policy, Trainable(frozen=("layers/", "^vision", "^action_time")))
    with pytest.raises(ValueError, match="none of the model's inner linear maps is trained"):
        MuonConfig().create(frozen.maps)


def test_heads_that_have_overlays_of_their_own_are_maps_of_their_own(tiny_policy):
    """A head whose gradient is a hundredth of the others' is moved as far. What lies on a map to actions is not one."""
    rules = (
        LoraRule("^expert/layers/q$", rank=4, per_head=True),
        LoraRule("^(action_out|action_time_in)/kernel$", rank=4),
    )
    maps = ModelDef(tiny_policy, Trainable(lora=Lora(rules))).maps
    assert set(maps) == {
        *(f"expert/layers/q_lora/{part}" for part in "ab"),
        *(f"action_time_in/kernel_lora/{part}" for part in "ab"),
        "action_time_in/kernel",
        "action_time_out/kernel",
    }
    layers, heads, rank, head_dim = 2, 2, 4, 8
    g = np.random.default_rng(0).normal(size=(layers, heads, rank, head_dim))
    g[:, 0] /= 100
    scale = MuonConfig().scale({"b": maps["expert/layers/q_lora/b"]})
    params = {"b": jnp.zeros(g.shape)}
    update, _ = scale.update({"b": jnp.asarray(g, jnp.float32)}, scale.init(params), params)
    sizes = np.sqrt(np.mean(np.square(update["b"]), axis=(2, 3)))
    assert_allclose(sizes, np.full((layers, heads), 0.2), rtol=0.3)


@pytest.mark.parametrize(("sizes", "splits"), [((4, 1, 1), 0), ((2, 2, 1), 1), ((1, 2, 2), 2), ((1, 4, 1), 1)])
@pytest.mark.parametrize("stack", [(3, 2), (5, 1)])
def test_elements_of_a_stack_come_whole_to_a_device_and_back(sizes, splits, stack):
    """What a function does to whole elements, on meshes that split them along no, one or two axes, in odd numbers.

    No more is moved than a device's own part, filled up to as many elements as devices, there and back along each axis.
    """
    mesh, rules = MeshConfig(*sizes).create(), ShardingRules()
    axes = ("layers", "embed", "stack", "mlp")
    w = jnp.asarray(np.random.default_rng(0).normal(size=(stack[0], 8, stack[1], 12)), jnp.float32)
    spec = rules.spec(axes, w.shape, mesh)
    assert sum(part is not None for part in spec) == splits

    def function(elements: jax.Array) -> jax.Array:
        return elements / (1 + jnp.abs(elements).max(axis=(1, 2), keepdims=True)) + elements[:, ::-1]

    expected = jax.vmap(lambda x: jax.vmap(lambda y: function(y[None])[0], 1, 1)(x))(w)
    with placed(mesh, rules):
        of = jax.jit(lambda w: by_element(function, w, axes))
        there = jax.device_put(w, NamedSharding(mesh, spec))
        compiled = of.lower(there).compile()
        got = compiled(there)
    assert got.sharding.spec == spec
    assert_allclose(got, expected, rtol=1e-6)
    split = [mesh.shape[part] for part in spec if part is not None]
    devices = int(np.prod(split))
    part = -(-stack[0] * stack[1] // devices) * 8 * 12 * w.itemsize
    moved = read_program(compiled.as_text() or "", mesh.shape).collectives
    assert {c.kind for c in moved} <= {"all-to-all"}
    assert sum(c.total for c in moved) == pytest.approx(sum(2 * part * (n - 1) / n for n in split))


def test_it_lies_on_the_mesh_like_its_weights_and_makes_the_same_step(tiny_policy, tiny_batch):
    """One device, and four that split every weight."""

    def trainer(mesh: MeshConfig) -> Trainer:
        model = ModelDef(tiny_policy)
        devices = jax.devices()[: mesh.fsdp * mesh.tensor]
        optimizer = MuonConfig(peak_lr=1e-2, warmup_steps=1, decay_steps=10).create(model.maps)
        return Trainer(
            model,
            optimizer,
            ema_decay=None,
            seed=3,
            mesh=mesh.create(devices),
            rules=ShardingRules(),
            dataset_names=("a", "b"),
        )

    split = trainer(MeshConfig(data=1, fsdp=2, tensor=2))
    moments = split.shardings.opt_state[1][0].inner_states["maps"].inner_state[0].trace
    placed = {name: s.spec for name, s in flatten(moments).items() if isinstance(s, NamedSharding)}
    assert placed == {name: split.placement[name].spec for name in split.model.maps}
    after = []
    for one in (trainer(MeshConfig(data=1, fsdp=1, tensor=1)), split):
        state = one.init()
        for _ in range(2):
            state, _ = one.train_step(state, put_batch(tiny_batch, one.mesh))
        after.append(flatten(jax.device_get(state.params)))
    for name in split.model.maps:
        assert_allclose(after[1][name], after[0][name], atol=2e-4, err_msg=name)
    _moves_parts_of_maps_alone(split)


def _moves_parts_of_maps_alone(trainer: Trainer) -> None:
    """The optimizer's update moves each map's parts there and back, sums of norms, and nothing of other weights."""
    model, mesh = trainer.model, trainer.mesh
    held = lambda shapes, of: jax.tree.map(  # noqa: E731
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, of
    )
    abstract = jax.eval_shape(trainer.init)
    params = held(abstract.params, trainer.shardings.params)
    state = held(abstract.opt_state, trainer.shardings.opt_state)
    with placed(mesh, trainer.rules):
        compiled = jax.jit(trainer.optimizer.update).lower(params, state, params).compile()
    bound = 0.0
    for name, of in model.maps.items():
        split = [mesh.shape[axis] for axis in trainer.placement[name].spec if axis is not None]
        stack = [n for n, axis in zip(flatten(model.shapes)[name].shape, of.axes, strict=True) if axis in WHOLE]
        size, elements, devices = flatten(model.shapes)[name].size, int(np.prod(stack)), int(np.prod(split))
        part = -(-elements // devices) * (size // elements) * 4
        bound += sum(2 * part * (n - 1) / n for n in split)
    moved = read_program(compiled.as_text() or "", mesh.shape).collectives
    assert {c.kind for c in moved} == {"all-to-all", "all-reduce"}
    assert sum(c.total for c in moved if c.kind == "all-to-all") == pytest.approx(bound)
    assert sum(c.total for c in moved if c.kind == "all-reduce") < 1024  # norms
