"""Variants of attention against a formula, in value and gradient; how one is chosen; kernels on each device alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi_like.models import attention as module
from openpi_like.models.attention import VARIANTS, Sizes, Variant, attention, computed_by, sizes_in, splash
from openpi_like.partition import ShardingRules, placed
from openpi_like.train import fastest
from openpi_like.train.sharding import MeshConfig


def _inputs(B=2, T=5, S=7, N=4, K=2, H=8, masked=True):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    mask = rng.random((B, T, S)) < 0.6
    mask[:, 1] = False  # a query that sees nothing
    return draw(B, N, T, H), draw(B, S, K, H), draw(B, S, K, H), mask if masked else None


def _formula(q, k, v, mask, soft_cap=None):
    """In float64, head by head; nothing where nothing is seen."""
    out = np.zeros(q.shape)
    for b, n, t in np.ndindex(q.shape[:3]):
        kv = n // (q.shape[1] // k.shape[2])
        seen = np.ones(k.shape[1], bool) if mask is None else mask[b, t]
        if seen.any():
            logits = k[b, seen, kv].astype(np.float64) @ q[b, n, t] / np.sqrt(q.shape[-1])
            if soft_cap is not None:
                logits = soft_cap * np.tanh(logits / soft_cap)
            p = np.exp(logits - logits.max())
            out[b, n, t] = p @ v[b, seen, kv] / p.sum()
    return out


@pytest.mark.parametrize("name", ["einsum", "xla"])
@pytest.mark.parametrize(("K", "masked"), [(1, True), (2, True), (4, False)])
def test_variants_compute_the_formula(name, K, masked):
    q, k, v, mask = _inputs(K=K, masked=masked)
    with computed_by(name):
        shown = None if mask is None else jnp.asarray(mask)
        got = np.asarray(attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), shown))
    sees = np.ones(q.shape[:3], bool) if mask is None else np.broadcast_to(mask.any(-1)[:, None], q.shape[:3])
    np.testing.assert_allclose(got[sees], _formula(q, k, v, mask)[sees], atol=2e-6)
    assert np.isfinite(got).all()


def test_capped_logits():
    q, k, v, mask = _inputs()
    got = np.asarray(attention(*map(jnp.asarray, (q, k, v, mask)), soft_cap=0.7))
    sees = np.broadcast_to(mask.any(-1)[:, None], q.shape[:3])
    np.testing.assert_allclose(got[sees], _formula(q, k, v, mask, 0.7)[sees], atol=2e-6)
    assert np.abs(got - np.asarray(attention(*map(jnp.asarray, (q, k, v, mask)))))[sees].max() > 0.01


def test_only_variants_that_can_cap_are_chosen_for_capped_logits():
    q, k, v, mask = map(jnp.asarray, _inputs(K=1))
    (sizes,) = sizes_in(lambda *given: attention(*given, soft_cap=2.0), q, k, v, mask)
    assert sizes.soft_cap == 2.0
    able = {p: [n for n, v in VARIANTS.items() if v.takes(sizes, p)] for p in ("cpu", "gpu", "tpu")}
    assert able == {"cpu": ["einsum"], "gpu": ["einsum"], "tpu": ["einsum", "splash"]}
    with pytest.raises(ValueError, match=r"attention='xla' cannot compute .*soft_cap=2.0.* on cpu; einsum can"):
        fastest.check_attention("xla", {sizes}, MeshConfig().create())


@pytest.mark.parametrize(("K", "soft_cap"), [(1, None), (4, None), (1, 0.8)])
def test_the_tpu_kernel_gives_the_same_numbers_and_gradients(K, soft_cap):
    """Run by the interpreter; sizes that it has to pad."""
    q, k, v, mask = map(jnp.asarray, _inputs(B=1, T=9, S=140, K=K, H=24))
    sees = mask.any(-1)[:, None, :, None]

    def both(attend):
        def total(q, k, v):
            return jnp.square(jnp.where(sees, attend(q, k, v, mask, soft_cap=soft_cap), 0)).sum()

        return jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)

    expected, got = both(module.einsum), both(functools.partial(splash, interpret=True))
    assert got[0] == pytest.approx(float(expected[0]), rel=1e-5)
    for a, b in zip(got[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_kernel_gets_the_part_of_each_device(monkeypatch):
    """Batch over data and fsdp, heads over tensor; keys and values with as many heads too."""
    seen = []

    def kernel(q, k, v, mask):
        seen.append((q.shape, k.shape, None if mask is None else mask.shape))
        return module.einsum(q, k, v, mask)

    monkeypatch.setitem(VARIANTS, "kernel", Variant(kernel, alone=True))
    mesh = MeshConfig(data=1, fsdp=2, tensor=2).create()
    for K, masked in ((1, True), (4, False)):
        q, k, v, mask = _inputs(B=4, K=K, masked=masked)

        def run(q, k, v, mask, name):
            with placed(mesh, ShardingRules()), computed_by(name):
                return attention(q, k, v, mask)

        got = jax.jit(functools.partial(run, name="kernel"))(q, k, v, mask)
        np.testing.assert_allclose(got, jax.jit(functools.partial(run, name="einsum"))(q, k, v, mask), atol=1e-6)
        local = (2, 2, 5, 8), (2, 7, K if K == 1 else 2, 8), (2, 5, 7) if masked else None
        assert set(seen) == {local}
        seen.clear()


def test_kernels_refuse_heads_they_have_no_place_for():
    sizes = Sizes(B=1, T=8, S=8, N=8, K=2, H=64, dtype="bfloat16", masked=True)
    assert not VARIANTS["splash"].takes(sizes, "tpu")
    assert VARIANTS["splash"].takes(dataclasses.replace(sizes, K=1), "tpu")
    assert not VARIANTS["splash"].takes(dataclasses.replace(sizes, K=1), "gpu")
    assert VARIANTS["cudnn"].takes(sizes, "gpu")
    assert not VARIANTS["cudnn"].takes(dataclasses.replace(sizes, dtype="float32"), "gpu")


def test_sizes_are_those_that_are_called():
    q, k, v, mask = _inputs()

    def function(q, k, v, mask):
        first = attention(q, k, v, mask)
        return attention(first, k, v, mask) + attention(q, k[:, :3], v[:, :3], None)

    first = Sizes(B=2, T=5, S=7, N=4, K=2, H=8, dtype="float32", masked=True)
    assert sizes_in(function, q, k, v, mask) == {first, dataclasses.replace(first, S=3, masked=False)}


# ---- Which is fastest ------------------------------------------------------------------------------------------------


def test_the_fastest_that_is_right_is_chosen(monkeypatch):
    """Of one that is wrong, one that cannot, and two that are right, whatever machine this is."""

    def wrong(q, k, v, mask):
        return module.einsum(q, k, v, mask) * 1.2

    def unable(q, k, v, mask):
        raise NotImplementedError("not these sizes")

    variants = {
        "einsum": VARIANTS["einsum"],
        "wrong": Variant(wrong),
        "unable": Variant(unable),
        "xla": VARIANTS["xla"],
    }
    monkeypatch.setattr(fastest, "VARIANTS", variants)
    monkeypatch.setattr(module, "VARIANTS", variants)
    clock = iter(x for ms in (9.0, 0.1, 4.0) for x in (0, ms, 0, ms, 0, ms))
    monkeypatch.setattr(fastest.time, "perf_counter", lambda: next(clock))
    sizes = Sizes(B=8, T=5, S=7, N=4, K=1, H=8, dtype="float32", masked=True)
    mesh = MeshConfig(data=2, fsdp=2).create()
    monkeypatch.setattr(fastest, "_choose", functools.partial(_as_on_a_gpu, fastest._choose))
    (choice,) = fastest.fastest_attention({sizes}, mesh)
    assert (choice.name, set(choice.ms)) == ("xla", {"einsum", "wrong", "xla"})
    assert np.isnan(choice.ms["wrong"])
    assert choice.failed == {"unable": "not these sizes"}
    assert "unable failed: not these sizes" in str(choice)
    assert choice.ms["xla"] == pytest.approx(1e3 * 4 / fastest.REPEATS)
    assert str(choice).startswith("attention of 5 queries to 7 keys (B 8, N 4, K 1, H 8): xla (einsum 450.00 ms")


def _as_on_a_gpu(function, sizes, local, device, platform, gradient):
    assert (local.B, local.N) == (2, 4)  # a fourth of the batch
    return function(sizes, local, device, "gpu", gradient)


def test_a_run_goes_on_with_the_variants_it_has_had(tmp_path, monkeypatch):
    sizes = Sizes(B=8, T=5, S=7, N=4, K=1, H=8, dtype="float32", masked=True)
    other, mesh = dataclasses.replace(sizes, T=6), MeshConfig().create()
    measured = []

    def measure(every, mesh):
        measured.append(set(every))
        return [fastest.Choice(s, "xla" if len(measured) == 1 else "einsum", {"xla": 1.0}) for s in every]

    monkeypatch.setattr(fastest, "fastest_attention", measure)
    path = tmp_path / "attention.json"
    for every, expected in (({sizes}, "xla"), ({sizes}, "xla"), ({sizes, other}, "einsum"), ({other}, "einsum")):
        assert {c.name for c in fastest.attention_of_run(path, every, mesh)} == {expected}
    assert measured == [{sizes}, {sizes, other}]
    path.write_text(path.read_text().replace('"kind": "cpu"', '"kind": "another"'))
    fastest.attention_of_run(path, {sizes}, mesh)
    assert len(measured) == 3


def test_a_variant_that_cannot_run_here_is_refused_before_anything_is_compiled():
    sizes = Sizes(B=8, T=5, S=7, N=4, K=1, H=8, dtype="float32", masked=True)
    mesh = MeshConfig().create()
    fastest.check_attention("xla", {sizes}, mesh)
    for name in ("cudnn", "splash"):
        with pytest.raises(ValueError, match=f"attention='{name}' cannot compute .*T=5.* on cpu; einsum, xla can"):
            fastest.check_attention(name, {sizes}, mesh)


def test_on_a_cpu_nothing_is_measured():
    sizes = Sizes(B=8, T=5, S=7, N=4, K=1, H=8, dtype="float32", masked=True)
    (choice,) = fastest.fastest_attention({sizes}, MeshConfig().create())
    assert str(choice).endswith("H 8): einsum (not measured)")
    assert (choice.name, choice.ms) == ("einsum", {})
    assert fastest.decode_choices(fastest.encode_choices([choice])) == {sizes: "einsum"}


def test_heads_that_do_not_divide_are_whole():
    mesh = MeshConfig(data=1, fsdp=1, tensor=4).create()
    sizes = Sizes(B=8, T=5, S=7, N=6, K=6, H=8, dtype="float32", masked=True)
    assert fastest.on_one_device(sizes, mesh).N == 6
    other = fastest.on_one_device(dataclasses.replace(sizes, N=8, K=8), mesh)
    assert (other.N, other.K) == (2, 2)
