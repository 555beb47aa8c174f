"""Mesh and rules: which device holds which part, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from openpi_like.partition import ShardingRules
from openpi_like.train.sharding import MeshConfig, put_batch, weight_shardings


@pytest.fixture(scope="module")
def mesh():
    return MeshConfig(data=1, fsdp=2, tensor=2).create()


def test_mesh_takes_the_devices_that_are_left():
    assert dict(MeshConfig(fsdp=2).create().shape) == {"data": 2, "fsdp": 2, "tensor": 1}
    with pytest.raises(ValueError, match="data=3, fsdp=1, tensor=1 for 4 devices"):
        MeshConfig(data=3).create()


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("layers", "embed", "mlp"), (3, 8, 16), P(None, "fsdp", "tensor")),
        (("layers", "embed", "mlp"), (3, 7, 16), P(None, None, "tensor")),  # 7 does not divide by 2: replicated
        (("vocab", "embed"), (32, 8), P("tensor", "fsdp")),
        ((None, "head_dim"), (3, 4), P(None, None)),
    ],
)
def test_rules(mesh, axes, shape, expected):
    assert ShardingRules().spec(axes, shape, mesh) == expected


def test_rules_refuse_what_they_do_not_know(mesh):
    with pytest.raises(ValueError, match="'embedd' has no rule; did you mean 'embed'"):
        ShardingRules().spec(("embedd",), (4,), mesh)
    with pytest.raises(ValueError, match="expected 2 of them"):
        ShardingRules().spec(("embed",), (4, 4), mesh)
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
