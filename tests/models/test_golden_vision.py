"""Image towers and projectors against timm and transformers, on what `tests/bench/golden_vision.py` wrote."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from openpi_like.models.dino import DinoConfig
from openpi_like.models.formats import Row, WeightsError
from openpi_like.models.hf_vision_names import (
    prismatic_projector,
    qwen2_vision,
    qwen3_vision,
    qwen25_vision,
    resized_positions,
    smolvlm_connector,
    smolvlm_vision,
    timm_dino,
    timm_idle,
    timm_siglip,
)
from openpi_like.models.lora import Lora, LoraRule, add_lora
from openpi_like.models.projectors import PixelShuffle, PrismaticProjector
from openpi_like.models.qwen_vision import Qwen2VisionConfig, Qwen3VisionConfig, Qwen25VisionConfig, Windows
from openpi_like.models.siglip import SiglipConfig
from openpi_like.models.vision import VisionEncoder, VisionEncoderConfig
from openpi_like.models.weights import flat_weights, flatten, unflatten
from openpi_like.partition import BATCH, MESH_AXES, ShardingRules, placed

GOLDEN = Path(__file__).parent / "golden"
KEY = jax.random.key(0)
FEATURIZER, FUSED = "vision_backbone.featurizer.", "vision_backbone.fused_featurizer."
RUN: dict[str, Any] = {"dtype": "float32", "unroll": False, "remat": None}
Arrays = dict[str, np.ndarray]

DINO = DinoConfig(width=16, depth=3, mlp_dim=32, num_heads=2, patch_size=4)
SIGLIP = SiglipConfig(width=16, depth=3, mlp_dim=32, num_heads=2, patch_size=4, select="second_to_last", gelu="erf")
SMOL = SiglipConfig(width=16, depth=2, mlp_dim=32, num_heads=2, patch_size=4)
QWEN: dict[str, Any] = {"width": 12, "hidden": 16, "mlp_dim": 24, "num_heads": 2, "patch_size": 4}
QWEN2 = Qwen2VisionConfig(**(QWEN | {"mlp_dim": 32}), depth=3)
QWEN25 = Qwen25VisionConfig(**QWEN, depth=3, full=(1,), window=16)
QWEN3 = Qwen3VisionConfig(**QWEN, depth=4, deepstack=(0, 2), table=5)


def opened(name: str) -> Arrays:
    with np.load(GOLDEN / f"vision_{name}.npz") as archive:
        return dict(archive)


def group(arrays: Arrays, prefix: str) -> Arrays:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def as_images(pixels: np.ndarray) -> jax.Array:
    return jnp.asarray(pixels.astype(np.float32) / 127.5 - 1)


# ---- Rows ------------------------------------------------------------------------------------------------------------


def imported(rows: Sequence[Row], theirs: Arrays, shapes: dict[str, tuple[int, ...]]) -> Arrays:
    ours = {name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items()}
    for row in rows:
        part = ours[row.ours][row.at]
        taken = theirs[row.theirs][row.take]
        assert row.their_shape(part.shape) == taken.shape, row
        ours[row.ours][row.at] = row.to_ours(taken, part.shape)
    assert all(np.isfinite(w).all() for w in ours.values())  # every row and every number
    return ours


def exported(rows: Sequence[Row], ours: Arrays) -> Arrays:
    """Parts of one array lie one below the other, in the order of the rows."""
    parts: dict[str, list[np.ndarray]] = {}
    for row in rows:
        parts.setdefault(row.theirs, []).append(row.to_theirs(ours[row.ours][row.at]))
    return {name: p[0] if len(p) == 1 else np.concatenate(p) for name, p in parts.items()}


def weight_shapes(create: Callable[[], Any]) -> dict[str, tuple[int, ...]]:
    state = nnx.state(nnx.eval_shape(create), nnx.Param)
    return {name: tuple(w.shape) for name, w in flatten(nnx.to_pure_dict(state)).items()}


def bound(create: Callable[[], Any], rows: Sequence[Row], theirs: Arrays) -> Any:
    """Returns the module with the weights of a file."""
    graph, state = nnx.split(nnx.eval_shape(create), nnx.Param)
    ours = imported(rows, theirs, weight_shapes(create))
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, unflatten(ours)))
    return nnx.merge(graph, state)


def assert_close(got: Any, expected: np.ndarray, relative: float) -> None:
    """relative: to the largest number."""
    np.testing.assert_allclose(got, expected, atol=relative * np.abs(expected).max(), rtol=0)


def outputs_and_gradients(model: Any, run: Callable[[Any], jax.Array], cotangent: np.ndarray) -> tuple[Any, Any]:
    """Returns the output, and the gradients of sum(output * cotangent)."""

    def loss(m: Any) -> tuple[jax.Array, jax.Array]:
        out = run(m)
        return (out * cotangent).sum(), out

    (_, out), grads = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(model)
    return out, grads


def assert_golden(
    model: Any, rows: Sequence[Row], arrays: Arrays, run: Callable[[Any], jax.Array], expected: np.ndarray
) -> None:
    """Checks the output, every gradient, and the way back."""
    out, grads = outputs_and_gradients(model, run, arrays["cotangent"])
    assert_close(out, expected, 2e-4)
    theirs = exported(rows, {k: np.asarray(v) for k, v in flatten(nnx.to_pure_dict(grads)).items()})
    expected_grads = group(arrays, "grad/")
    assert set(theirs) <= set(expected_grads)
    for name, grad in theirs.items():
        # A bias of the keys moves no softmax: its gradient is nothing but rounding.
        scale = max(np.abs(expected_grads[name]).max(), 1e-2)
        np.testing.assert_allclose(grad, expected_grads[name], atol=1e-3 * scale, rtol=0, err_msg=name)
    back = exported(rows, {k: np.asarray(v) for k, v in flat_weights(model).items()})
    stored = group(arrays, "weights/")
    for name, array in back.items():
        np.testing.assert_array_equal(array, stored[name], err_msg=name)


# ---- OpenVLA ---------------------------------------------------------------------------------------------------------

TIMM: list[Any] = [
    pytest.param("dino", DINO, timm_dino, FEATURIZER, id="dino"),
    pytest.param("siglip", SIGLIP, timm_siglip, FUSED, id="siglip"),
]


@pytest.mark.parametrize(("name", "config", "rows", "prefix"), TIMM)
def test_towers_of_openvla(name: str, config: Any, rows: Any, prefix: str) -> None:
    arrays = opened(name)
    weights, images = group(arrays, "weights/"), as_images(arrays["images"])
    create = lambda config: config.create(KEY, image_size=(12, 16), **RUN)  # noqa: E731
    table = rows(config, "", prefix)
    model = bound(lambda: create(config), table, weights)
    assert_golden(model, table, arrays, lambda m: m(images), arrays["second_to_last"])
    # What else is in such a file, and nothing more, is what nobody reads.
    idle = timm_idle(config, prefix)
    assert weights.keys() - {row.theirs for row in table} == idle.keys()
    assert {n: weights[n].shape for n in idle} == idle

    last = dataclasses.replace(config, select="last")
    table = rows(last, "", prefix)
    assert_close(nnx.jit(lambda m: m(images))(bound(lambda: create(last), table, weights)), arrays["last"], 2e-4)
    idle = timm_idle(last, prefix)
    assert weights.keys() - {row.theirs for row in table} == idle.keys()


def test_projector_of_openvla() -> None:
    arrays, rows = opened("prismatic"), prismatic_projector("", "projector.")
    model = bound(lambda: PrismaticProjector(KEY, 10, 12), rows, group(arrays, "weights/"))
    assert_golden(model, rows, arrays, lambda m: m(jnp.asarray(arrays["patches"])), arrays["out"])


@pytest.mark.parametrize("grid", [(3, 4), (2, 2), (7, 6)])
def test_positions_of_other_sizes(grid: tuple[int, int]) -> None:
    arrays = group(opened("dino"), "resized/")
    got = resized_positions(arrays["5x5"], (5, 5), grid)
    assert_close(got, arrays[f"{grid[0]}x{grid[1]}"], 2e-6)


def test_positions_of_other_sizes_come_through_rows() -> None:
    arrays, config = opened("dino"), dataclasses.replace(DINO, width=6, num_heads=2)
    rows = timm_dino(config, "", FEATURIZER, stored=(5, 5), grid=(3, 4))
    (row,) = [r for r in rows if r.ours == "position"]
    assert row.their_shape((1, 12, 6)) == (1, 25, 6)
    assert_close(row.to_ours(arrays["resized/5x5"], (1, 12, 6)), arrays["resized/3x4"], 2e-6)
    with pytest.raises(WeightsError, match=r"grid of \(3, 4\), which cannot be turned back into \(5, 5\)"):
        row.to_theirs(arrays["resized/3x4"])
    assert type(timm_dino(config, "", FEATURIZER, stored=(3, 4), grid=(3, 4))[2]) is Row


# ---- FiLM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [DINO, SIGLIP], ids=["dino", "siglip"])
def test_fresh_film_is_the_plain_tower(config: Any) -> None:
    create = lambda **film: config.create(KEY, image_size=(8, 12), **RUN, **film)  # noqa: E731
    plain, conditioned = nnx.jit(create)(), nnx.jit(lambda: create(film_width=5))()
    images = jax.random.uniform(KEY, (2, 8, 12, 3), minval=-1)
    language = jax.random.normal(KEY, (2, 5))
    run = nnx.jit(lambda m, *inputs: m(*inputs))
    np.testing.assert_array_equal(run(conditioned, images, language), run(plain, images))
    with pytest.raises(ValueError, match="got None with film_width"):
        conditioned(images)
    with pytest.raises(ValueError, match="got one without film_width"):
        plain(images, language)


def numpy_block(w: dict[str, np.ndarray], i: int, x: np.ndarray, language: np.ndarray) -> np.ndarray:
    """One block with exact GELU and FiLM, in float64, head by head, for one image."""

    def norm(y: np.ndarray, name: str) -> np.ndarray:
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
        return y * w[f"{name}/scale"][i] + w[f"{name}/bias"][i]

    linear = lambda y, name: np.tensordot(y, w[f"{name}/kernel"][i], 1) + w[f"{name}/bias"][i]  # noqa: E731
    scale = lambda name: w[name][i] if name in w else 1.0  # noqa: E731
    y = norm(x, "attn_norm")
    q, k, v = (linear(y, name) for name in ("query", "key", "value"))
    seen = np.zeros_like(q)
    for n in range(q.shape[1]):
        logits = q[:, n] @ k[:, n].T / math.sqrt(q.shape[-1])
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        seen[:, n] = probs / probs.sum(-1, keepdims=True) @ v[:, n]
    out = np.einsum("pnh,nhd->pd", seen, w["out/kernel"][i]) + w["out/bias"][i]
    x = x + scale("attn_scale") * out
    x = x * (1 + linear(language, "film/scale")) + linear(language, "film/shift")
    erf = np.vectorize(math.erf)
    hidden = linear(norm(x, "mlp_norm"), "mlp_up")
    hidden = hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))
    return x + scale("mlp_scale") * linear(hidden, "mlp_down")


@pytest.mark.parametrize("config", [DINO, SIGLIP], ids=["dino", "siglip"])
def test_film_is_between_attention_and_mlp_of_every_block(filled: Any, config: Any) -> None:
    model = filled(lambda: config.create(KEY, image_size=(8, 12), **RUN, film_width=5))
    language = np.random.default_rng(1).normal(size=(2, 5)).astype(np.float32)
    images = jax.random.uniform(KEY, (2, 8, 12, 3), minval=-1)
    weights = {k: np.asarray(v, np.float64) for k, v in flat_weights(model).items()}
    layers = group(weights, "layers/")
    pixels = np.asarray(images, np.float64)
    if config is DINO:
        pixels = (pixels / 2 + 0.5 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    patches = pixels.reshape(2, 2, 4, 3, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 6, 48)
    x = patches @ weights["patch/kernel"].reshape(48, 16) + weights["patch/bias"] + weights["position"]
    before = [np.repeat(weights[name], 2, axis=0) for name in ("class_token", "registers") if name in weights]
    x = np.concatenate([*before, x], axis=1)
    expected = []
    for row, vector in zip(x, language.astype(np.float64), strict=True):
        for i in range(config.layers):
            row = numpy_block(layers, i, row, vector)
        expected.append(row[-6:])
    assert_close(nnx.jit(lambda m: m(images, jnp.asarray(language)))(model), np.stack(expected), 2e-4)


def test_film_under_the_names_of_oft() -> None:
    """Blocks lie inside of others there: names only."""
    cases: list[Any] = [(DINO, timm_dino, FEATURIZER), (SIGLIP, timm_siglip, FUSED)]
    for config, rows, prefix in cases:
        shapes = weight_shapes(functools.partial(config.create, KEY, image_size=(12, 16), **RUN, film_width=5))
        table = rows(config, "", prefix, film=True)
        assert {row.ours for row in table} == shapes.keys()
        names = {row.theirs: row for row in table}
        assert f"{prefix}blocks.1.block.attn.qkv.weight" in names
        scale = names[f"{prefix}blocks.1.scale.weight"]
        assert scale.their_shape(shapes[scale.ours][1:]) == (16, 5)
        idle = timm_idle(config, prefix, film_width=5)
        assert idle[f"{prefix}blocks.2.scale.weight"] == (16, 5)
        assert not idle.keys() & names.keys()


# ---- SmolVLM ---------------------------------------------------------------------------------------------------------


class SmolVision(nnx.Module):
    """Tower and connector, as SmolVLM has them."""

    def __init__(self) -> None:
        self.vision = SMOL.create(KEY, image_size=(32, 32), **RUN)
        self.connector = PixelShuffle(KEY, 16, 12, grid=(8, 8), scale=4)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.connector(self.vision(images))


def test_tower_and_connector_of_smolvlm() -> None:
    arrays = opened("smol")
    rows = smolvlm_vision(SMOL, "vision/", "model.vision_model.")
    rows += smolvlm_connector("connector/", "model.connector.")
    model, images = bound(SmolVision, rows, group(arrays, "weights/")), as_images(arrays["images"])
    assert {row.theirs for row in rows} == group(arrays, "weights/").keys()
    assert model.connector.tokens == arrays["out"].shape[1]
    assert_golden(model, rows, arrays, lambda m: m(images), arrays["out"])


def test_pixel_shuffle_of_any_grid() -> None:
    shuffle = PixelShuffle(KEY, 1, 6, grid=(2, 6), scale=2)
    shuffle.kernel[...] = jnp.eye(4, 6)
    tokens = shuffle(jnp.arange(12.0).reshape(1, 12, 1))[0, :, :4]
    np.testing.assert_array_equal(tokens, [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]])
    with pytest.raises(ValueError, match=r"grid=\(2, 3\), expected multiples of scale=2"):
        PixelShuffle(KEY, 1, 6, grid=(2, 3), scale=2)


# ---- Qwen ------------------------------------------------------------------------------------------------------------

SIZES = ((40, 24), (32, 32), (16, 48))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("name", "config", "rows", "prefix"),
    [
        ("qwen2", QWEN2, qwen2_vision, "visual."),
        ("qwen25", QWEN25, qwen25_vision, "visual."),
        ("qwen3", QWEN3, qwen3_vision, "model.visual."),
    ],
)
def test_towers_of_qwen(name: str, config: Any, rows: Any, prefix: str, size: tuple[int, int]) -> None:
    arrays, table = opened(f"{name}_tower"), rows(config, "", prefix)
    weights, shown = group(arrays, "weights/"), f"{size[0]}x{size[1]}"
    assert {row.theirs for row in table} == weights.keys()
    images, expected = as_images(arrays[f"images/{shown}"]), arrays[f"out/{shown}"]
    model = bound(lambda: config.create(KEY, image_size=size, **RUN), table, weights)
    assert expected.shape[2] == config.tokens(size)

    def run(m: Any) -> jax.Array:
        if name != "qwen3":
            return m(images)[None]
        tokens, features = m.with_features(images)
        return jnp.stack([tokens, *features])

    if size == SIZES[0]:  # the one that has gradients
        assert_golden(model, table, arrays, run, expected)
    else:
        assert_close(nnx.jit(run)(model), expected, 2e-4)


def test_windows_of_all_sizes() -> None:
    windows = Windows.of((5, 3), 2)
    assert windows.groups == ((2, 4), (3, 2), (1, 1))
    drawn = [0, 1, 3, 4, 6, 7, 9, 10, 2, 5, 8, 11, 12, 13, 14]
    np.testing.assert_array_equal(windows.order, drawn)
    assert Windows.of((4, 4), 4).groups == ((1, 16),)


# ---- All of them -----------------------------------------------------------------------------------------------------

ENCODERS: dict[str, tuple[Any, tuple[int, int]]] = {
    "siglip": (SMOL, (8, 12)),
    "dino": (DINO, (8, 12)),
    "qwen2": (QWEN2, (24, 40)),
    "qwen25": (QWEN25, (24, 40)),
    "qwen3": (QWEN3, (16, 24)),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_what_models_expect(name: str) -> None:
    config, size = ENCODERS[name]
    assert isinstance(config, VisionEncoderConfig)
    assert config.problems(size) == []
    assert "expected multiples of patch_size" in config.problems((size[0], size[1] + 2))[0]
    model = nnx.eval_shape(lambda: config.create(KEY, image_size=size, **RUN))
    assert isinstance(model, VisionEncoder)
    assert model.config.patch_size == 4
    tokens = nnx.eval_shape(lambda m: m(jnp.zeros((2, *size, 3))), model)
    assert tokens.shape == (2, config.tokens(size), config.width)


@pytest.mark.parametrize("name", ["dino", "qwen25", "qwen3"])
def test_layers_as_a_loop_or_written_out(filled: Any, name: str) -> None:
    config, size = ENCODERS[name]
    images = jax.random.uniform(KEY, (2, *size, 3), minval=-1)
    cotangent = np.random.default_rng(0).normal(size=(2, config.tokens(size), config.width)).astype(np.float32)
    results = []
    for unroll, remat in ((False, None), (True, None), (False, "save:attention,mlp")):
        create = functools.partial(config.create, KEY, image_size=size, dtype="float32", unroll=unroll, remat=remat)
        out, grads = outputs_and_gradients(filled(create), lambda m: m(images), cotangent)
        results.append((out, flatten(nnx.to_pure_dict(grads))))
    tokens, grads = results[0]
    for other, other_grads in results[1:]:
        assert_close(other, np.asarray(tokens), 1e-5)
        for path, grad in grads.items():
            scale = max(float(jnp.abs(grad).max()), 1e-2)
            np.testing.assert_allclose(other_grads[path], grad, atol=1e-4 * scale, rtol=0, err_msg=path)


@pytest.mark.parametrize("name", ["dino", "qwen25", "qwen3"])
def test_towers_split_over_devices_and_with_overlays(filled: Any, name: str) -> None:
    """Every weight has axes that the rules know, every map its inputs; a fresh overlay changes nothing."""
    config, size = ENCODERS[name]
    film = {"film_width": 6} if name == "dino" else {}
    model = filled(functools.partial(config.create, KEY, image_size=size, **RUN, **film))
    images = jax.random.uniform(KEY, (4, *size, 3), minval=-1)
    language = [jax.random.normal(KEY, (4, 6))] if film else []
    expected = nnx.jit(lambda m: m(images, *language))(model)

    add_lora(model, Lora((LoraRule("layers/.*kernel$|patch"),)), KEY)
    auto = (jax.sharding.AxisType.Auto,) * 3
    mesh, rules = jax.make_mesh((1, 2, 2), MESH_AXES, axis_types=auto), ShardingRules()
    state = nnx.state(model, nnx.Param)
    specs = jax.tree.map(
        lambda w: NamedSharding(mesh, rules.spec(w.get_metadata()["axes"], w.shape, mesh)),
        state,
        is_leaf=lambda w: isinstance(w, nnx.Param),
    )
    split = jax.tree.leaves(specs)
    assert sum("tensor" in str(s.spec) for s in split) > 5
    nnx.update(model, jax.device_put(state, specs))
    batch = NamedSharding(mesh, PartitionSpec(BATCH))
    with placed(mesh, rules):
        got = nnx.jit(lambda m, *inputs: m(*inputs))(model, *jax.device_put((images, *language), batch))
    assert_close(got, np.asarray(expected), 1e-4)


@pytest.mark.parametrize("name", ["dino", "qwen25", "qwen3"])
def test_bfloat16_is_near_float32(filled: Any, name: str) -> None:
    config, size = ENCODERS[name]
    images = jax.random.uniform(KEY, (2, *size, 3), minval=-1)
    full, half = (
        nnx.jit(lambda m: m(images))(
            filled(functools.partial(config.create, KEY, image_size=size, **RUN | {"dtype": d}))
        )
        for d in ("float32", "bfloat16")
    )
    assert half.dtype == jnp.bfloat16
    assert_close(half.astype(jnp.float32), np.asarray(full), 0.03)


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda: dataclasses.replace(SMOL, select="first"), "SiglipConfig: select='first', expected one of"),
        (lambda: dataclasses.replace(SMOL, gelu="fast"), "SiglipConfig: gelu='fast', expected one of"),
        (lambda: dataclasses.replace(DINO, num_heads=3), "DinoConfig: vision width 16: expected a multiple of"),
        (lambda: dataclasses.replace(QWEN3, num_heads=8), r"hidden=16, expected a multiple of 4 \* num_heads=8"),
        (lambda: dataclasses.replace(QWEN3, deepstack=(2, 0)), r"deepstack=\(2, 0\), expected increasing numbers"),
        (lambda: dataclasses.replace(QWEN25, full=(3,)), r"full=\(3,\), expected increasing numbers of layers below"),
        (lambda: dataclasses.replace(QWEN25, window=20), "window=20, expected a multiple of 8"),
    ],
)
def test_impossible_towers_are_refused(create: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create()


# ---- Published sizes -------------------------------------------------------------------------------------------------


def starred(name: str) -> str:
    parts = name.split(".")
    of_layer = lambda i: i and parts[i].isdigit() and parts[i - 1] in ("blocks", "layers", "deepstack_merger_list")  # noqa: E731
    return ".".join("*" if of_layer(i) else part for i, part in enumerate(parts))


def published_cases() -> dict[str, tuple[Callable[[], Any], list[Row], dict[str, tuple]]]:
    run: dict[str, Any] = {"dtype": "bfloat16", "unroll": False, "remat": None}
    dino, siglip = DinoConfig.vit_l_14_reg4(), SiglipConfig.openvla()
    base = SiglipConfig.base_16()

    def smol() -> Any:
        tower = base.create(KEY, image_size=(512, 512), **run)
        return nnx.Dict(vision=tower, connector=PixelShuffle(KEY, 768, 960, grid=(32, 32), scale=4))

    smol_rows = smolvlm_vision(base, "vision/", "model.vision_model.")
    cases: dict[str, Any] = {
        "dino": (dino, timm_dino(dino, "", FEATURIZER), timm_idle(dino, FEATURIZER)),
        "siglip": (siglip, timm_siglip(siglip, "", FUSED), timm_idle(siglip, FUSED)),
        "smolvlm_500m": (smol, smol_rows + smolvlm_connector("connector/", "model.connector."), {}),
    }
    qwen2 = Qwen2VisionConfig.qwen2_vl_2b()
    cases["qwen2_vl_2b"] = (qwen2, qwen2_vision(qwen2, "", "visual."), {})
    qwen25 = Qwen25VisionConfig.qwen25_vl_3b()
    cases["qwen25_vl_3b"] = (qwen25, qwen25_vision(qwen25, "", "visual."), {})
    for name, config in (("2b", Qwen3VisionConfig.qwen3_vl_2b()), ("4b", Qwen3VisionConfig.qwen3_vl_4b())):
        cases[f"qwen3_vl_{name}"] = (config, qwen3_vision(config, "", "model.visual."), {})
    return {
        name: (
            create if callable(create) else functools.partial(create.create, KEY, image_size=(224, 224), **run),
            rows,
            idle,
        )
        for name, (create, rows, idle) in cases.items()
    }


@pytest.mark.parametrize("name", published_cases())
def test_published_sizes_have_the_published_weights(name: str) -> None:
    create, rows, idle = published_cases()[name]
    ours = weight_shapes(create)
    assert {row.ours for row in rows} == ours.keys()
    theirs: dict[str, tuple[int, ...]] = dict(idle)
    for row in rows:
        part = row.their_shape(np.broadcast_to(0, ours[row.ours])[row.at].shape)
        before = theirs.get(row.theirs)  # of one array, the parts before this one
        theirs[row.theirs] = part if before is None else (before[0] + part[0], *part[1:])
    found: dict[str, list[Any]] = {}
    for full, shape in theirs.items():
        entry = found.setdefault(starred(full), [list(shape), 0])
        assert entry[0] == list(shape), full
        entry[1] += 1
    expected = json.loads((GOLDEN / "vision_shapes.json").read_text())[name]
    assert found == expected
    idle_numbers = sum(math.prod(shape) for shape in idle.values())
    total = sum(math.prod(shape) * count for shape, count in expected.values())
    assert sum(math.prod(shape) for shape in ours.values()) == total - idle_numbers
