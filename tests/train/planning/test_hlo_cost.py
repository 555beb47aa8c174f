"""What compiled programs do: programs compiled here, whose work is known, and lines as the TPU compiler writes them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from openpi_like.train.planning.hlo_cost import Collective, Cost, read_program
from openpi_like.train.sharding import MeshConfig

ONE = {"data": 1}


def read(function: Callable[..., Any], *args: Any, rounds: int = 1) -> tuple[Cost, Any]:
    """Returns what we say of a compiled function, and what XLA does."""
    compiled: Any = jax.jit(function).lower(*args).compile()
    return read_program(compiled.as_text(), ONE, rounds=rounds), compiled.cost_analysis()


# ---- FLOPs and traffic on one device ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [lambda x, w: jnp.tanh(x @ w) @ w, lambda x, w: jnp.sum(jax.nn.softmax(x @ w) ** 2), lambda x, w: x[3:5] @ w],
)
def test_without_loops_traffic_is_what_xla_says(function: Callable[..., Any]) -> None:
    cost, theirs = read(function, jnp.ones((64, 128)), jnp.ones((128, 128)))
    assert cost.traffic == theirs["bytes accessed"]


def test_a_loop_counts_as_often_as_it_runs() -> None:
    def chain(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.scan(lambda c, wi: (jnp.tanh(c @ wi), c[0]), x, w)

    cost, theirs = read(chain, jnp.ones((64, 128)), jnp.ones((10, 128, 128)))
    assert cost.flops == 10 * 2 * 64 * 128 * 128 > 9 * theirs["flops"]
    # Of w, a round reads its own element; of the stacked rows, it writes one.
    w, x, row = 128 * 128 * 4, 64 * 128 * 4, 128 * 4
    least = 10 * (w + 2 * x + row)
    assert least < cost.traffic < 4 * least < 10 * 10 * w  # as if each round read all of it
    inner = lambda x, w: jax.lax.scan(lambda c, _: (chain(c, w)[0], None), x, length=3)[0]  # noqa: E731
    assert read(inner, jnp.ones((64, 128)), jnp.ones((10, 128, 128)))[0].flops == 3 * cost.flops


def test_loops_that_end_on_what_they_compute_are_named() -> None:
    def until(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ w, x)

    cost, _ = read(until, jnp.ones((4, 8)), jnp.ones((8, 8)), rounds=7)
    assert cost.flops == 7 * 2 * 4 * 8 * 8
    assert len(cost.endless) == 1


def test_of_branches_the_dearest_counts() -> None:
    def choose(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x)

    assert read(choose, jnp.ones((4, 8)), jnp.ones((8, 8)))[0].flops == 2 * 2 * 4 * 8 * 8


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (1, 1), "padding": "SAME"},
        {"window_strides": (2, 3), "padding": ((2, 1), (0, 4))},
        {"window_strides": (1, 1), "padding": ((0, 0), (1, 0)), "lhs_dilation": (2, 3)},
        {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 1), "feature_group_count": 2},
    ],
)
def test_convolutions_are_what_xla_says(options: dict[str, Any]) -> None:
    groups = options.get("feature_group_count", 1)
    x, w = jnp.ones((2, 4, 9, 11)), jnp.ones((6, 4 // groups, 3, 2))
    cost, theirs = read(lambda x, w: jax.lax.conv_general_dilated(x, w, **options), x, w)
    assert cost.flops == theirs["flops"]


# ---- Collectives -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layers() -> list[Collective]:
    """Collectives of five layers whose weights are kept in parts and gathered one by one, and of their gradients."""
    mesh = MeshConfig(data=2, fsdp=2).create()
    kept, rows, whole = (NamedSharding(mesh, spec) for spec in (P(None, "fsdp"), P(("data", "fsdp")), P()))

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        def layer(c: jax.Array, wi: jax.Array) -> tuple[jax.Array, None]:
            gathered = jax.lax.with_sharding_constraint(wi, whole)
            return jax.lax.with_sharding_constraint(jnp.tanh(c @ gathered), rows), None

        return jnp.sum(jax.lax.scan(layer, x, w)[0] ** 2)

    step = jax.jit(jax.grad(loss), in_shardings=(kept, rows), out_shardings=kept)
    compiled: Any = step.lower(jnp.ones((5, 32, 32)), jnp.ones((16, 32))).compile()
    return read_program(compiled.as_text(), {"data": 2, "fsdp": 2, "tensor": 1}).collectives


def test_gathered_weights_are_counted_by_hand(layers: list[Collective]) -> None:
    gathers = [c for c in layers if c.kind == "all-gather"]
    assert {c.axes for c in gathers} == {("fsdp",)}
    # Each layer, going forward (XLA keeps what it has gathered for going backward): half of 32 x 32 floats comes over.
    assert {c.nbytes for c in gathers} == {32 * 32 * 4 / 2}
    assert sum(c.times for c in gathers) in (5, 10)


def test_gradients_are_reduced_over_the_batch(layers: list[Collective]) -> None:
    received: dict[tuple[str, ...], float] = {}
    for c in layers:
        if c.kind == "all-reduce":
            received[c.axes] = received.get(c.axes, 0.0) + c.total
    # This backend makes no reduce-scatter: whole gradients over all four, or over two and then their half over two.
    whole = 5 * 32 * 32 * 4
    assert sum(received.values()) in (2 * whole * 3 / 4, 2 * whole / 2 + 2 * (whole / 2) / 2)


@pytest.mark.parametrize(
    ("call", "kind", "nbytes"),
    [
        (lambda x: jax.lax.psum(x, "fsdp"), "all-reduce", 2 * 3 / 4 * 64 * 4),
        (lambda x: jax.lax.all_gather(x, "fsdp"), "all-gather", 3 * 64 * 4),
        (lambda x: jax.lax.all_to_all(x.reshape(4, 16), "fsdp", 0, 0), "all-to-all", 3 / 4 * 64 * 4),
        (lambda x: jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]), "collective-permute", 64 * 4),
    ],
)
def test_bytes_that_a_chip_receives(call: Callable[..., Any], kind: str, nbytes: float) -> None:
    mesh = MeshConfig(data=1, fsdp=4).create()
    mapped = jax.shard_map(call, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False)
    compiled: Any = jax.jit(mapped).lower(jnp.ones(256)).compile()
    (found,) = read_program(compiled.as_text(), {"data": 1, "fsdp": 4, "tensor": 1}).collectives
    assert (found.kind, found.axes, found.nbytes, found.times) == (kind, ("fsdp",), nbytes, 1)


# ---- As the TPU compiler writes it -----------------------------------------------------------------------------------

LOOP = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %c = f32[]{:T(128)} add(%a, %b)
}

%start (p: bf16[8,16]) -> (bf16[8,16], bf16[32,16], u32[]) {
  %p = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %g0 = bf16[32,16]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %s = (bf16[8,16]{1,0}, bf16[32,16]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) custom-call(%g0), custom_call_target="AsyncCollectiveStart"
}

%beside (q: bf16[8,16], r: bf16[32,16], x: bf16[4,32], w: bf16[32,64]) -> (bf16[4,64], bf16[8,16], bf16[32,16]) {
  %q = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %r = bf16[32,16]{1,0:T(8,128)S(1)} parameter(1)
  %x = bf16[4,32]{1,0:T(8,128)S(1)} parameter(2)
  %w = bf16[32,64]{1,0:T(8,128)(2,1)} parameter(3)
  %conv = bf16[4,64]{1,0:T(8,128)(2,1)} convolution(%x, %w), dim_labels=bf_io->bf
  %g1 = bf16[32,16]{1,0:T(8,128)S(1)} all-gather(%q), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %t = (bf16[4,64]{1,0:T(8,128)S(1)}, bf16[8,16]{1,0}, bf16[32,16]{1,0:T(8,128)S(1)}) tuple(%conv, %q, %g1)
}

%end (q: bf16[8,16], r: bf16[32,16]) -> bf16[32,16] {
  %q = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %r = bf16[32,16]{1,0:T(8,128)S(1)} parameter(1)
  %g2 = bf16[32,16]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %d = bf16[32,16]{1,0:T(8,128)S(1)} custom-call(%q, %r, %g2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter (i: bf16[64,4]) -> bf16[16,4] {
  %i = bf16[64,4]{1,0:T(8,128)(2,1)} parameter(0)
  %ar = bf16[64,4]{1,0:T(8,128)(2,1)} all-reduce(%i), channel_id=8, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %ds = bf16[16,4]{1,0:T(8,128)(2,1)} dynamic-slice(%ar, %zero, %zero), dynamic_slice_sizes={16,4}
}

%body (c: (s32[], bf16[8,16], bf16[4,32], bf16[32,64], bf16[64,4])) -> (s32[], bf16[8,16], bf16[4,32], bf16[32,64], bf16[64,4]) {
  %c = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[4,32]{1,0:S(1)}, bf16[32,64]{1,0}, bf16[64,4]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %copy = s32[]{:T(128)S(6)} copy(%i)
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%copy, %one)
  %p = bf16[8,16]{1,0} get-tuple-element(%c), index=1
  %x = bf16[4,32]{1,0:S(1)} get-tuple-element(%c), index=2
  %w = bf16[32,64]{1,0} get-tuple-element(%c), index=3
  %g = bf16[64,4]{1,0} get-tuple-element(%c), index=4
  %f0 = (bf16[8,16]{1,0}, bf16[32,16]{1,0:S(1)}, u32[]{:S(2)}) fusion(%p), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%start
  %q = bf16[8,16]{1,0} get-tuple-element(%f0), index=0
  %r = bf16[32,16]{1,0:S(1)} get-tuple-element(%f0), index=1
  %f1 = (bf16[4,64]{1,0:S(1)}, bf16[8,16]{1,0}, bf16[32,16]{1,0:S(1)}) fusion(%q, %r, %x, %w), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, calls=%beside
  %q1 = bf16[8,16]{1,0} get-tuple-element(%f1), index=1
  %r1 = bf16[32,16]{1,0:S(1)} get-tuple-element(%f1), index=2
  %f2 = bf16[32,16]{1,0:S(1)} fusion(%q1, %r1), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%end
  %f3 = bf16[16,4]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
  ROOT %t = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[4,32]{1,0:S(1)}, bf16[32,64]{1,0}, bf16[64,4]{1,0}) tuple(%next, %p, %x, %w, %g)
}

%condition (c: (s32[], bf16[8,16], bf16[4,32], bf16[32,64], bf16[64,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(START_PLUS_6)
  %c = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[4,32]{1,0:S(1)}, bf16[32,64]{1,0}, bf16[64,4]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (p: bf16[8,16], x: bf16[4,32], w: bf16[32,64], g: bf16[64,4]) -> bf16[8,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  %x = bf16[4,32]{1,0} parameter(1)
  %w = bf16[32,64]{1,0} parameter(2)
  %g = bf16[64,4]{1,0} parameter(3)
  %from = s32[]{:T(128)} constant(START)
  %begin = (bf16[4,32]{1,0:S(1)}, bf16[4,32]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %there = bf16[4,32]{1,0:S(1)} copy-done(%begin)
  %carry = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[4,32]{1,0:S(1)}, bf16[32,64]{1,0}, bf16[64,4]{1,0}) tuple(%from, %p, %there, %w, %g)
  %while = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[4,32]{1,0:S(1)}, bf16[32,64]{1,0}, bf16[64,4]{1,0}) while(%carry), condition=%condition, body=%body
  ROOT %out = bf16[8,16]{1,0} get-tuple-element(%while), index=1
}
"""  # noqa: E501


@pytest.mark.parametrize("start", [0, 3])
def test_a_loop_as_written_for_tpus(start: int) -> None:
    text = LOOP.replace("START_PLUS_6", str(start + 6)).replace("START", str(start))
    cost = read_program(text, {"data": 1, "fsdp": 4})
    assert not cost.endless
    assert not cost.unknown
    assert cost.flops == 6 * 2 * 4 * 32 * 64
    # Started, passed through what it runs beside, and ended: one gather. An all-reduce of which a part is kept: half.
    by_kind = {c.kind: c for c in cost.collectives}
    assert len(cost.collectives) == len(by_kind) == 2
    gather, scatter = by_kind["all-gather"], by_kind["reduce-scatter"]
    assert (gather.times, gather.nbytes, gather.axes) == (6, 3 * 8 * 16 * 2, ("fsdp",))
    assert (scatter.times, scatter.nbytes) == (6, 3 / 4 * 64 * 4 * 2)
    # HBM: x once, on its way onto the chip. In each round w, what is gathered from, what is reduced, the part of it
    # that is kept, and a counter. All else stays on the chip.
    part, w, g, kept, counter = 8 * 16 * 2, 32 * 64 * 2, 64 * 4 * 2, 16 * 4 * 2, 3 * 4
    assert cost.traffic == 4 * 32 * 2 + 6 * (part + w + g + kept + counter)


def test_libraries_and_kernels_say_their_flops_or_are_named() -> None:
    text = """
ENTRY %main (x: f32[4,8], w: f32[8,6]) -> f32[4,6] {
  %x = f32[4,8]{1,0} parameter(0)
  %w = f32[8,6]{1,0} parameter(1)
  %gemm = (f32[4,6]{1,0}, s8[64]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %y = f32[4,6]{1,0} get-tuple-element(%gemm), index=0
  %k = f32[4,6]{1,0} custom-call(%y), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000"}}}
  ROOT %z = f32[4,6]{1,0} custom-call(%k), custom_call_target="some_kernel"
}
"""  # noqa: E501
    cost = read_program(text, ONE)
    assert cost.flops == 2 * 4 * 8 * 6 + 1000
    assert cost.unknown == {"some_kernel"}


def test_what_goes_to_the_host_is_told_apart() -> None:
    text = """
ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0:T(8,128)} parameter(0)
  %go = (f32[4,8]{1,0:T(8,128)S(5)}, f32[4,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  ROOT %gone = f32[4,8]{1,0:T(8,128)S(5)} copy-done(%go)
}
"""
    cost = read_program(text, ONE)
    assert (cost.traffic, cost.host) == (128, 128)
