"""Reading compiled text: buffers, computations, and every way of writing groups of chips."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi_like.train.planning.hlo import HOST, Buffer, device_groups, mesh_axes, parse

LISTED = [[0, 2], [1, 3], [4, 6], [5, 7]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}, use_global_device_ids=true", LISTED),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", LISTED),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups={}, dimensions={0}", [list(range(8))]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}, dimensions={1}", LISTED),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", [list(range(8))]),
        # Devices in another order: the mesh is [4, 2] of them transposed.
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        # The second half of an axis of 8, as its own axis.
        ("replica_groups=mesh['a'=8] {'a':(2)2}", LISTED),
    ],
)
def test_groups(text: str, expected: list[list[int]]) -> None:
    np.testing.assert_array_equal(device_groups(text, 8), expected)


def test_groups_of_several_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of several sizes"):
        device_groups("replica_groups={{0,1},{2}}", 3)
    with pytest.raises(ValueError, match="cannot read the device list"):
        device_groups("replica_groups=mesh['a'=4], device_ids=(3,1,2,0) {'a'}", 4)


def test_mesh_axes_are_those_along_which_members_differ() -> None:
    mesh = {"data": 2, "fsdp": 4, "tensor": 2}
    assert mesh_axes([0, 1], mesh) == ("tensor",)
    assert mesh_axes([0, 2, 4, 6], mesh) == ("fsdp",)
    assert mesh_axes([1, 9], mesh) == ("data",)
    assert mesh_axes(range(16), mesh) == ("data", "fsdp", "tensor")
    assert mesh_axes([3], mesh) == ()


@pytest.mark.parametrize(
    ("buffer", "nbytes"),
    [
        (Buffer("f32", (2, 3)), 24),
        (Buffer("bf16", (5,)), 10),
        (Buffer("pred", (7,)), 7),
        (Buffer("s4", (8,)), 4),
        (Buffer("f8e4m3fn", (3,)), 3),
        (Buffer("u32", ()), 4),
        (Buffer("token", ()), 0),
    ],
)
def test_sizes_of_buffers(buffer: Buffer, nbytes: int) -> None:
    assert buffer.nbytes == nbytes


TEXT = """HloModule jit_f, is_scheduled=true

%inner (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0:T(8,128)S(1)} parameter(0)
  ROOT %tanh.1 = f32[4,8]{1,0} tanh(%p), metadata={op_name="jit(f)/tanh"}
}

ENTRY %main.2 (x: f32[4,8], y: s32[]) -> (f32[4,8], s32[]) {
  %y = s32[]{:T(128)} parameter(1)
  %x = f32[4,8]{1,0:T(8,128)S(5)} parameter(0)
  %fusion.3 = f32[4,8]{1,0} fusion(%x), kind=kLoop, calls=%inner
  ROOT %tuple.4 = (f32[4,8]{1,0:T(8,128)}, /*index=1*/s32[]{:T(128)}) tuple(%fusion.3, %y)
}
"""


def test_computations_and_where_their_buffers_are() -> None:
    computations, entry = parse(TEXT)
    assert (set(computations), entry) == ({"inner", "main.2"}, "main.2")
    main, inner = computations["main.2"], computations["inner"]
    assert main.instructions["x"].results == (Buffer("f32", (4, 8), HOST),)
    assert inner.parameters[0].results[0].space == 1
    assert main.root.results == (Buffer("f32", (4, 8)), Buffer("s32", ()))
    assert main.instructions["fusion.3"].calls("calls") == ("inner",)
    assert [u.name for u in main.users["y"]] == ["tuple.4"]
    assert inner.root.attribute(r'op_name="([^"]*)"') == "jit(f)/tanh"


def test_a_compiled_program_is_read_whole() -> None:
    compiled: Any = jax.jit(lambda x: jnp.sort(jnp.sin(x)) @ x.T).lower(jnp.ones((4, 6))).compile()
    computations, entry = parse(compiled.as_text())
    for computation in computations.values():
        for instruction in computation.instructions.values():
            assert instruction.results
            assert all(name in computation.instructions for name in instruction.operands)
    assert computations[entry].root.results[0].shape == (4, 4)


def test_other_text_is_refused() -> None:
    with pytest.raises(ValueError, match="without an ENTRY computation"):
        parse("module @jit_f attributes {}")
