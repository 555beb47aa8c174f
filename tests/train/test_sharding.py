"""Mesh and rules: which device holds which part, and what is refused."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.weights import flatten
from openpi_like.partition import WHOLE, ShardingRules, gathered, lookup, pin, placed, replication
from openpi_like.train.sharding import MeshConfig, check_batch, put_batch, weight_shardings
from openpi_like.train.state import ModelDef


@pytest.fixture(scope="module")
def mesh():
    return MeshConfig(data=1, fsdp=2, tensor=2).create()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MeshConfig(fsdp=2), (2, 2, 1)),
        (MeshConfig.replicated(), (4, 1, 1)),
        (MeshConfig.fully_sharded(), (1, 4, 1)),
        (MeshConfig.fsdp_and_tensor(2), (1, 2, 2)),
    ],
)
def test_mesh_takes_the_devices_that_are_left(config, expected):
    assert tuple(config.create().shape.values()) == expected
    assert config.create().axis_names == ("data", "fsdp", "tensor")


def test_meshes_that_do_not_fit_are_refused():
    for wrong, message in (
        ({"data": 3}, "data=3, fsdp=1, tensor=1 for 4 devices"),
        ({"data": -1, "fsdp": -1}, "-1 for one of data, fsdp and tensor at most"),
        ({"fsdp": 0}, "fsdp=0.*sizes of at least 1"),
        ({"slices": -1}, "slices=-1; expected sizes of at least 1"),
        ({"fsdp": -1, "data": 8}, "data=8, fsdp=-1, tensor=1 for 4 devices"),
        ({"data": 1, "fsdp": -1, "slices": 2}, "data=1, expected a multiple of slices=2"),
        ({"data": 2, "fsdp": -1, "slices": 2}, "slices=2, expected 1: so many processes these devices are of"),
    ):
        with pytest.raises(ValueError, match=message):
            MeshConfig(**wrong).create()


def test_data_goes_over_slices_first():
    """Devices of a topology that is not there: weights are split inside a slice, whatever order they come in."""
    pytest.importorskip("libtpu", reason="libtpu (the extra plan) is not installed")
    program = """
import jax
from jax.experimental import topologies
from openpi_like.train.sharding import MeshConfig
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=4).devices
mesh = MeshConfig(data=8, fsdp=-1, slices=4).create(devices[::-1])
print([[d.slice_index for d in row.flat] for row in mesh.devices])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "TPU_SKIP_MDS_QUERY": "1", "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    assert [set(row) for row in rows] == [{0}, {0}, {1}, {1}, {2}, {2}, {3}, {3}]


@pytest.mark.parametrize(
    ("size", "accumulate", "message"),
    [(6, 1, "expected a multiple of 2, such as"), (8, 3, "expected a multiple of 6, such as 6 or 12"), (8, 4, None)],
)
def test_batches_that_do_not_divide_are_refused(mesh, size, accumulate, message):
    if message is None or size % (2 * accumulate) == 0:
        check_batch(size, accumulate, mesh)
    else:
        with pytest.raises(ValueError, match=message):
            check_batch(size, accumulate, mesh)


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("layers", "embed", "mlp"), (3, 8, 16), P(None, "fsdp", "tensor")),
        # 2 does not divide 7: fsdp takes the largest other axis that it divides, never that of the layers
        (("layers", "embed", "mlp", "norm"), (4, 7, 16, 6), P(None, None, "tensor", "fsdp")),
        (("layers", "embed", "norm"), (4, 7, 5), P(None, None, None)),
        (("embed", "heads", "head_dim"), (7, 3, 12), P(None, None, "fsdp")),  # and tensor finds nothing free
        (("vocab", "embed"), (32, 8), P("tensor", "fsdp")),
        ((None, "head_dim"), (3, 4), P(None, None)),
    ],
)
def test_rules(mesh, axes, shape, expected):
    assert ShardingRules().spec(axes, shape, mesh) == expected


def test_an_axis_of_one_device_takes_no_place():
    alone = MeshConfig(data=1, fsdp=4).create()
    assert ShardingRules().spec(("embed", "mlp"), (7, 16), alone) == P(None, "fsdp")
    assert ShardingRules().spec(("vocab", "embed"), (32, 8), alone) == P(None, "fsdp")


def test_what_is_whole_on_many_devices_is_known(mesh):
    """Over fsdp and tensor; data is there to hold the same weights."""
    for spec, expected in ((P("tensor", "fsdp"), 1), (P(None, "fsdp"), 2), (P(), 4), (P(("fsdp", "tensor")), 1)):
        assert replication(NamedSharding(mesh, spec)) == expected
    assert replication(NamedSharding(MeshConfig().create(), P())) == 1


def test_large_weights_of_released_policies_are_split():
    """On any number of devices a weight above 1 MiB is whole only where none of its axes divides: none on 16 and 128,
    on 256 SigLIP, whose 1152 has no place for them."""
    model = ModelDef(Pi0Config.released())
    axes, shapes = flatten(model.axes), flatten(model.shapes)
    whole: dict[int, set[str]] = {}
    for fsdp in (2, 7, 16, 24, 28, 48, 56, 64, 112, 128, 224, 256, 512):
        absent = AbstractMesh((1, fsdp, 1), ("data", "fsdp", "tensor"))
        large = {name: leaf for name, leaf in shapes.items() if leaf.size * 4 > 2**20}
        split = {name: "fsdp" in ShardingRules().spec(axes[name], leaf.shape, absent) for name, leaf in large.items()}
        for name, leaf in large.items():
            divided = [n for axis, n in zip(axes[name], leaf.shape, strict=True) if axis not in WHOLE and n % fsdp == 0]
            assert split[name] == bool(divided), (name, fsdp)
        whole[fsdp] = {name for name, is_split in split.items() if not is_split}
    assert whole[16] == whole[128] == set()
    assert {name.split("/")[0] for name in whole[256]} == {"vision"}
    assert "vlm/embedding" not in whole[7]  # 257,152 rows divide by it


@pytest.mark.parametrize("config", [MeshConfig(data=1, fsdp=4), MeshConfig(data=1, fsdp=2, tensor=2)])
def test_ids_that_are_in_no_table_are_not_finite(config):
    """As without a mesh: a bad id is not to be the mean of a table here and nothing there."""
    mesh, rules, table = config.create(), ShardingRules(), np.ones((12, 8), np.float32)

    @jax.jit
    def rows(table, ids):
        with placed(mesh, rules):
            return lookup(table, ("vocab", "embed"), ids)

    found = np.asarray(rows(table, put_batch(np.array([[0], [11], [12], [3]], np.int32), mesh)))
    np.testing.assert_array_equal(np.isfinite(found).all((1, 2)), [True, True, False, True])


# ---- In models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=1, fsdp=4),
        MeshConfig(data=2, fsdp=2),
        MeshConfig(data=1, fsdp=2, tensor=2),
        MeshConfig(data=2, fsdp=1, tensor=2),
    ],
)
@pytest.mark.parametrize("width", [8, 7])  # of which only the first can be split
def test_rows_of_a_table_and_their_gradient(config, width):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(12, width)).astype(np.float32)
    ids = rng.integers(0, 12, (8, 3)).astype(np.int32)
    up = rng.normal(size=(8, 3, width)).astype(np.float32)
    mesh, rules = config.create(), ShardingRules()

    def total(table, ids):
        with placed(mesh, rules):
            rows = lookup(table, ("vocab", "embed"), ids)
            return (rows * up).sum(), rows

    where = NamedSharding(mesh, rules.spec(("vocab", "embed"), table.shape, mesh))
    value_and_grad = jax.jit(jax.value_and_grad(total, has_aux=True), out_shardings=((None, None), where))
    (_, rows), grad = value_and_grad(jax.device_put(table, where), put_batch(ids, mesh))
    np.testing.assert_array_equal(rows, table[ids])
    assert rows.sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"))), 3)
    expected = np.zeros_like(table)
    np.add.at(expected, ids, up)
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_weights_are_gathered_in_the_compute_dtype_and_gradients_lie_like_them(mesh):
    """The gather is of bfloat16, and no device holds a whole float32 gradient."""
    w = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
    where = NamedSharding(mesh, P("fsdp", "tensor"))

    def loss(w, x):
        with placed(mesh, ShardingRules()):
            y = pin(x, "batch", None).astype(jnp.bfloat16) @ gathered(w, ("embed", "mlp"), jnp.bfloat16)
            return jnp.square(pin(y, "batch", "mlp").astype(jnp.float32)).sum()

    lowered = jax.jit(jax.grad(loss)).lower(jax.device_put(w, where), put_batch(x, mesh))
    placed_weights = re.findall(r"sharding_constraint .* : tensor<8x16x(\w+)>", lowered.as_text())
    assert placed_weights
    assert set(placed_weights) == {"bf16"}
    compiled = lowered.compile()
    text = compiled.as_text()
    assert text is not None
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    assert gathers
    assert all("[8,8]" in line for line in gathers), gathers  # whole over fsdp, a half over tensor
    grad = compiled(jax.device_put(w, where), put_batch(x, mesh))
    assert grad.sharding.is_equivalent_to(where, 2)
    assert grad.dtype == jnp.float32
    expected = jax.grad(lambda w: jnp.square((x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype("f4")).sum())(w)
    np.testing.assert_allclose(grad, expected, rtol=0.05, atol=0.05)


def test_rules_refuse_what_they_do_not_know(mesh):
    with pytest.raises(ValueError, match="'embedd' has no rule; did you mean 'embed'"):
        ShardingRules().spec(("embedd",), (4,), mesh)
    with pytest.raises(ValueError, match="expected 2 of them"):
        ShardingRules().spec(("embed",), (4, 4), mesh)
    with pytest.raises(ValueError, match="ShardingRules: mlp='tensr'; did you mean 'tensor'"):
        ShardingRules(mlp="tensr")
    with pytest.raises(ValueError, match="two axes on one mesh axis"):
        ShardingRules().spec(("mlp", "heads"), (4, 4), mesh)


def test_weights_are_laid_out_as_the_rules_say(mesh):
    shapes = {"a": {"w": jax.ShapeDtypeStruct((8, 16), jnp.float32)}, "b": jax.ShapeDtypeStruct((5,), jnp.float32)}
    axes = {"a": {"w": ("embed", "mlp")}, "b": ("norm",)}
    shardings = weight_shardings(axes, shapes, mesh, ShardingRules())
    w = jax.device_put(np.arange(128.0, dtype=np.float32).reshape(8, 16), shardings["a"]["w"])
    assert {s.data.shape for s in w.addressable_shards} == {(4, 8)}
    assert shardings["b"].is_fully_replicated


def test_batches_are_split_over_data_and_fsdp(mesh):
    batch = put_batch({"x": np.arange(8), "images": {"base": np.zeros((8, 2, 2, 3), np.uint8)}}, mesh)
    assert {s.data.shape for s in batch["x"].addressable_shards} == {(4,)}
    assert batch["images"]["base"].dtype == jnp.uint8
