"""LoRA: the base at first, then what its formula says; merged, and in openpi's layout, the same."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_like.models.arrays import LoraMerged, MemoryArrays
from openpi_like.models.gemma import GemmaConfig
from openpi_like.models.lora import Lora, LoraRule, add_lora, lora_equations, overlays
from openpi_like.models.paligemma import PaliGemmaConfig
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.pi0_fast import Pi0FastConfig
from openpi_like.models.weights import (
    WeightsError,
    export_weights,
    flatten,
    plan_load,
    read_weights,
    unflatten,
    weight_shapes,
)
from openpi_like.train.state import ModelDef, Trainable, trained_names
from tests.merged import merged

KEY = jax.random.key(5)
MAPS = "/layers/(q|kv|out|gate_up|down)$"
CHOICES = {
    "every map there is": Lora((LoraRule(".*", rank=2, alpha=3.0),)),
    "openpi": Lora.openpi(),
}


@pytest.fixture(scope="module")
def heads_policy(tiny_policy) -> Pi0Config:
    """Two kv heads of four: heads are an axis of its own in keys and values too."""
    gemma = GemmaConfig(width=16, depth=2, mlp_dim=32, num_heads=4, num_kv_heads=2, head_dim=8)
    return dataclasses.replace(tiny_policy, backbone=PaliGemmaConfig(tiny_policy.backbone.vision, gemma), expert=gemma)


def _drawn(model: ModelDef) -> dict[str, np.ndarray]:
    """Flat weights of which none is zero."""
    rng = np.random.default_rng(1)
    return {name: (rng.normal(size=leaf.shape) / 4).astype(np.float32) for name, leaf in flatten(model.shapes).items()}


def _nested(weights):
    return unflatten({name: jnp.asarray(w) for name, w in weights.items()})


@pytest.fixture(scope="module")
def base_loss(heads_policy, batch):
    base = ModelDef(heads_policy)
    return jax.jit(lambda w: base.bind(w).loss(KEY, batch)[0])


@pytest.mark.parametrize("name", CHOICES)
def test_a_fresh_overlay_is_the_base_and_a_merged_one_computes_the_same(heads_policy, batch, base_loss, name):
    base, model = ModelDef(heads_policy), ModelDef(heads_policy, Trainable(CHOICES[name]))
    loss = jax.jit(lambda w: model.bind(w).loss(KEY, batch)[0])
    fresh = model.init(KEY)
    overlay = {k: v for k, v in flatten(fresh).items() if "_lora/" in k}
    assert {k.rsplit("_", 1)[0] for k in overlay} == set(overlays(model.abstract))
    assert all(float(jnp.abs(v).max()) == 0 for k, v in overlay.items() if k.endswith("/b"))
    assert all(float(jnp.abs(v).max()) > 0 for k, v in overlay.items() if k.endswith("/a"))
    assert loss(fresh) == base_loss(base.init(KEY))  # to the bit

    weights = _nested(_drawn(model))
    plain = merged(model, weights)
    assert str(jax.tree.structure(plain)) == str(jax.tree.structure(base.shapes))
    assert loss(weights) == pytest.approx(float(base_loss(plain)), rel=2e-5)
    without = {k: (v * 0 if "_lora/b" in k else v) for k, v in flatten(weights).items()}
    assert loss(weights) != pytest.approx(float(loss(_nested(without))), rel=1e-3)


def test_what_is_added_is_written_out(heads_policy):
    """Of queries, keys and values, and attention's output, head by head in numpy."""
    for per_head in (False, True):
        rule = LoraRule(MAPS, rank=3, alpha=6.0, rank_stabilized=True, per_head=per_head)
        model = ModelDef(heads_policy, Trainable(Lora((rule,))))
        w = _drawn(model)
        of = overlays(model.abstract)
        scale = 6.0 / np.sqrt(3)

        def delta(name, w=w, of=of):
            return np.asarray(of[name].delta(*(jnp.asarray(w[f"{name}_lora/{end}"]) for end in "ab")))

        a, b = w["vlm/layers/q_lora/a"][1], w["vlm/layers/q_lora/b"][1]
        for n in range(4):
            expected = scale * (a[n] @ b[n] if per_head else a @ b[:, n])
            np.testing.assert_allclose(delta("vlm/layers/q")[1, n], expected, atol=1e-6)
        a, b = w["expert/layers/kv_lora/a"][0, 1], w["expert/layers/kv_lora/b"][0, 1]
        for k in range(2):
            expected = scale * (a[k] @ b[k] if per_head else a @ b[:, k])
            np.testing.assert_allclose(delta("expert/layers/kv")[0, 1, k], expected, atol=1e-6)
        # Attention's output sums over heads, and so does A.
        a, b = w["vlm/layers/out_lora/a"][0], w["vlm/layers/out_lora/b"][0]
        np.testing.assert_allclose(delta("vlm/layers/out")[0], scale * np.einsum("nhr,rd->nhd", a, b), atol=1e-6)
        a, b = w["vlm/layers/gate_up_lora/a"][1, 0], w["vlm/layers/gate_up_lora/b"][1, 0]
        np.testing.assert_allclose(delta("vlm/layers/gate_up")[1, 0], scale * a @ b, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["BSD,DF->BSF", "BSD,NDH->BNSH", "BNSH,NHD->BSD", "BPD,DNH->BPNH", "BhpwqC,pqCD->BhwD"]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_the_two_products_are_one_with_their_product(equation, per_head, seed):
    rng = np.random.default_rng(seed)
    sizes = {c: int(rng.integers(1, 5)) for c in equation if c.isalpha()}
    x, kernel = equation.split("->")[0].split(",")
    inputs = [c for c in kernel if c not in equation.split("->")[1]]
    outputs = [c for c in kernel if c not in inputs]
    heads = [c for c in outputs if c == "N" and per_head]
    outputs = [*heads, *(c for c in outputs if c not in heads)]
    letters_a, letters_b = [*heads, *inputs, "r"], [*heads, "r", *outputs[len(heads) :]]
    draw = lambda letters: rng.normal(size=[sizes.get(c, 3) for c in letters])  # noqa: E731
    xs, a, b = draw(x), draw(letters_a), draw(letters_b)
    first, second = lora_equations(equation, a.ndim, b.ndim)
    got = np.einsum(second, np.einsum(first, xs, a), b)
    whole = np.einsum(f"{''.join(letters_a)},{''.join(letters_b)}->{kernel}", a, b)
    np.testing.assert_allclose(got, np.einsum(equation, xs, whole), atol=1e-9)


# ---- What is trained -------------------------------------------------------------------------------------------------


def test_what_is_trained_follows_from_the_overlay(tiny_policy):
    model = ModelDef(tiny_policy, Trainable(Lora()))
    names = set(flatten(model.shapes))
    expected = {n for n in names if "_lora/" in n or re.match("(action|state|time)_", n)}
    assert model.trained == expected
    assert {n.split("_lora/")[0] for n in expected if "_lora/" in n} == {
        f"{part}/layers/{name}" for part in ("vlm", "expert") for name in ("q", "kv", "out", "gate_up", "down")
    }
    vision = ModelDef(tiny_policy, Trainable(Lora.openpi())).trained
    assert {n for n in vision if n.startswith("vision/")} == {n for n in names if n.startswith("vision/")}
    frozen = ModelDef(tiny_policy, Trainable(frozen=("^vision/", "^vlm/"))).trained
    assert {n.split("/")[0] for n in frozen} == {n.split("/")[0] for n in names} - {"vision", "vlm"}


def test_patterns_that_match_nothing_are_all_named(tiny_policy):
    fast = Pi0FastConfig.released()
    model = nnx.eval_shape(lambda: tiny_policy.create(KEY))
    lora = Lora((LoraRule("^vlm/layers/qq$"), LoraRule("^vlm/layers/q$"), LoraRule("gate_upp")))
    with pytest.raises(ValueError, match="'gate_upp' matches no linear map; did you mean") as e:
        add_lora(model, lora, KEY)
    assert "'^vlm/layers/qq$' matches no linear map; did you mean 'vlm/layers/q'" in str(e.value)
    shadowed = Lora((LoraRule(".*layers.*", rank=2), LoraRule("^expert/", rank=32)))
    with pytest.raises(ValueError, match=r"'\^expert/': earlier rules take all that it matches \(expert/layers/"):
        add_lora(nnx.eval_shape(lambda: tiny_policy.create(KEY)), shadowed, KEY)
    with pytest.raises(ValueError, match=r"lora\.also_train .* matches no weight"):
        ModelDef(fast, Trainable(Lora()))  # it has no projections of actions
    names = ["vlm/q", "vision/patch"]
    with pytest.raises(ValueError, match="frozen '\\^vison/' matches no weight; did you mean 'vision/patch'"):
        trained_names(names, Trainable(frozen=("^vison/",)))
    with pytest.raises(ValueError, match="nothing is left to train"):
        trained_names(names, Trainable(frozen=("",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "(", "rank": 0, "alpha": 0.0}, "rank=0, expected at least 1; alpha=0.0.*no regular expression"),
        ({"pattern": "q", "alpha": float("inf")}, "alpha=inf"),
    ],
)
def test_rules_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        LoraRule(**options)


def test_what_trainable_refuses():
    with pytest.raises(ValueError, match="no rules"):
        Lora(rules=())
    with pytest.raises(ValueError, match=r"frozen_dtype='int7'; did you mean 'int[48]'.*; frozen: '\(' is no regular"):
        Trainable(frozen_dtype="int7", frozen=("(",))


# ---- openpi's layout -------------------------------------------------------------------------------------------------


def _exported(config, weights, lora):
    return {name: make() for name, make in export_weights(config, weights, "openpi", lora=lora)}


@pytest.mark.parametrize(("kv_heads", "per_head"), [(1, False), (2, True), (2, False), (4, True)])
def test_openpi_holds_our_overlay(heads_policy, kv_heads, per_head):
    """What openpi would merge of the file is what we merge, and reading it again gives the same.

    Of four kv heads, as many as heads, q, k and v are one array there.
    """
    gemma = dataclasses.replace(heads_policy.expert, num_kv_heads=kv_heads)
    config = dataclasses.replace(
        heads_policy, backbone=PaliGemmaConfig(heads_policy.backbone.vision, gemma), expert=gemma
    )
    lora = Lora((LoraRule(f"^(vlm|expert){MAPS}", rank=3, alpha=4.5, per_head=per_head),))
    model = ModelDef(config, Trainable(lora))
    weights = _drawn(model)
    arrays = _exported(config, weights, lora)
    read = LoraMerged(MemoryArrays(arrays), 1.0)
    got = read_weights(read, plan_load(config, read))
    expected = flatten(merged(model, _nested(weights)))
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, atol=2e-5, err_msg=name)
    again = MemoryArrays(arrays)
    plan = plan_load(config, again, lora=lora)
    assert {row["from"] for row in plan.report} == {"checkpoint"}
    for name, value in read_weights(again, plan).items():
        np.testing.assert_allclose(value, weights[name], atol=1e-5, err_msg=name)


def test_a_base_without_lora_starts_the_overlay_fresh(tiny_policy):
    arrays = MemoryArrays(_exported(tiny_policy, _drawn(ModelDef(tiny_policy)), None))
    plan = plan_load(tiny_policy, arrays, lora=Lora())
    fresh = {row["weight"]: row["why"] for row in plan.report if row["from"] == "fresh"}
    assert set(fresh) == set(weight_shapes(tiny_policy, Lora())) - set(weight_shapes(tiny_policy))
    assert set(fresh.values()) == {"the overlay starts at the base"}


def test_heads_of_their_own_do_not_fit_a_shared_overlay(heads_policy):
    own, shared = (Lora((LoraRule("^vlm/layers/q$", rank=2, per_head=p),)) for p in (True, False))
    arrays = MemoryArrays(_exported(heads_policy, _drawn(ModelDef(heads_policy, Trainable(own))), own))
    plan = plan_load(heads_policy, arrays, lora=shared)
    with pytest.raises(WeightsError, match=r"heads have weights of their own.*per_head=True"):
        read_weights(arrays, plan)
    other = Lora((LoraRule("^vlm/layers/q$", rank=4, per_head=True),))
    with pytest.raises(WeightsError, match=r"lora_a: got shape \(2, 4, 16, 2\), expected \(2, 4, 16, 4\)"):
        plan_load(heads_policy, arrays, lora=other)


def test_released_overlays_are_under_a_hundredth_of_the_base():
    shapes = flatten(ModelDef(Pi0Config.released(), Trainable(Lora())).shapes)
    size = lambda which: sum(leaf.size for name, leaf in shapes.items() if ("_lora/" in name) == which)  # noqa: E731
    assert size(False) == 3_238_048_528
    assert size(True) < 0.01 * size(False)


def test_an_expert_with_an_overlay_is_not_packed_without_it(tiny_policy, batch):
    """Sampling uses the overlay; where there is none it packs the expert, which computes the same."""
    model = ModelDef(tiny_policy, Trainable(Lora((LoraRule(f"^expert{MAPS}", rank=3),))))
    weights = _nested(_drawn(model))
    observation = {k: v for k, v in batch.items() if k not in ("actions", "action_mask", "dataset_id", "position")}
    sample = lambda of, w: jax.jit(lambda w: of.bind(w).sample_actions(KEY, observation, num_steps=2))(w)  # noqa: E731
    plain = sample(ModelDef(tiny_policy), merged(model, weights))
    np.testing.assert_allclose(sample(model, weights), plain, atol=2e-3 * float(jnp.abs(plain).max()))
    state = nnx.state(model.bind(weights).packed(), nnx.Param)
    assert any("_lora" in "/".join(map(str, path)) for path, _ in nnx.to_flat_state(state))
