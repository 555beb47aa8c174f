"""Single functions of openpi: masks, norms, LoRA, statistics, normalisation, prompts, resizing, optimiser."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from openpi_like.data.images import fit
from openpi_like.data.normalize import FieldStats, Normalization
from openpi_like.data.prompts import FastPrompt, Pi0Prompt, Pi05Prompt, PromptFormat, state_bins
from openpi_like.data.sentencepiece_model import SentencePieceTokenizer
from openpi_like.data.text import TextTokenizer
from openpi_like.models.arrays import merge_lora
from openpi_like.models.flow import time_embedding
from openpi_like.models.gemma import GemmaConfig, GemmaLayer, RMSNorm, attention_mask, rope, rotate
from openpi_like.models.siglip import LayerNorm
from openpi_like.robots import ActionField, Camera, Robot, StateField
from openpi_like.train.optimizer import OptimizerConfig
from tests.data.reference_stats import stats_of_blocks
from tests.models.golden_set import assert_flow, assert_tokens, open_golden

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def functions(golden: Path) -> dict[str, Any]:
    return open_golden(golden / "item5_functions.npz")


@pytest.fixture(scope="module")
def stored(golden: Path) -> dict[str, np.ndarray]:
    """The same on the host, at full precision."""
    path = golden / "item5_functions.npz"
    if not path.is_file():
        pytest.skip(f"no golden vectors: {path} is absent")
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def sentencepiece_model(golden: Path) -> SentencePieceTokenizer:
    path = golden / "item8_tiny_text_tokenizer.model"
    if not path.is_file():
        pytest.skip(f"no golden vectors: {path} is absent")
    return SentencePieceTokenizer.of(path.read_bytes())


def numbered(arrays: dict[str, Any], group: str) -> list[dict[str, Any]]:
    """Returns the cases of a group that are told apart by a number, each {name: array}."""
    numbers = sorted({k.split("/")[1] for k in arrays if k.startswith(f"{group}/")})
    assert numbers
    return [
        {k.removeprefix(f"{group}/{n}/"): v for k, v in arrays.items() if k.startswith(f"{group}/{n}/")}
        for n in numbers
    ]


# ---- Model -----------------------------------------------------------------------------------------------------------


def test_golden_function_attention_mask(functions: dict[str, Any]) -> None:
    for at in numbered(functions, "make_attn_mask"):
        np.testing.assert_array_equal(attention_mask(at["input_mask"], at["mask_ar"]), at["result"])
        np.testing.assert_array_equal(attention_mask(at["input_mask"], at["mask_ar_1d"]), at["result_1d"])


def test_golden_function_time_embedding(functions: dict[str, Any]) -> None:
    for at in numbered(functions, "posemb_sincos"):
        dim, low, high = at["dim_min_max"]
        result = time_embedding(at["pos"], int(dim), min_period=float(low), max_period=float(high))
        assert_flow(result, at["result"])


def test_golden_function_rope(functions: dict[str, Any]) -> None:
    x, positions = functions["rope/x"], functions["rope/positions"]
    assert_tokens(rotate(x, rope(positions, x.shape[-1])[:, :, :, None]), functions["rope/result"])


def test_golden_function_norms(functions: dict[str, Any]) -> None:
    D = functions["rmsnorm/x"].shape[-1]
    rms = RMSNorm(KEY, D, adaptive=False)
    rms.scale[...] = functions["rmsnorm/scale"]
    y, gate = rms(functions["rmsnorm/x"], None)
    assert gate is None
    assert_tokens(y, functions["rmsnorm/result"])

    ada = RMSNorm(KEY, D, adaptive=True)
    ada.modulation.kernel[...], ada.modulation.bias[...] = functions["adarmsnorm/kernel"], functions["adarmsnorm/bias"]
    y, gate = ada(functions["adarmsnorm/x"], functions["adarmsnorm/cond"][:, None])
    assert_tokens(y, functions["adarmsnorm/result"])
    assert_tokens(gate, functions["adarmsnorm/gate"])

    layer = LayerNorm(KEY, D)
    layer.scale[...], layer.bias[...] = functions["layernorm/scale"], functions["layernorm/bias"]
    assert_tokens(layer(functions["layernorm/x"]), functions["layernorm/result"])


def test_golden_function_gelu(functions: dict[str, Any]) -> None:
    """Through an MLP that computes gelu(x) * 1 from the tokens (x, 1)."""
    x = functions["gelu/x"]
    layer = jax.tree.map(lambda w: w[0], GemmaLayer(GemmaConfig(2, 1, 1, 1, 1, 2), KEY, adaptive=False))
    layer.gate_up[...] = jnp.array([[[1.0], [0.0]], [[0.0], [1.0]]])
    layer.down[...] = jnp.array([[1.0, 0.0]])
    tokens = jnp.stack([x, jnp.ones_like(x)], axis=-1)[None]
    assert_tokens(layer.mlp(tokens)[0, :, 0], functions["gelu/result"])


def test_golden_function_lora_einsum(stored: dict[str, np.ndarray]) -> None:
    rank, alpha, rs = (float(v) for v in stored["lora_einsum/plain/rank_alpha_scaling"])
    assert rs == pytest.approx(alpha / rank)
    for kind in ("plain", "rslora"):
        scale = float(stored[f"lora_einsum/{kind}/rank_alpha_scaling"][2])
        for name in ("q", "kv", "attn_vec"):
            at = {k: stored[f"lora_einsum/{kind}/{name}/{k}"] for k in ("eqn", "x", "w", "lora_a", "lora_b", "result")}
            merged = merge_lora(at["w"], at["lora_a"], at["lora_b"], scale=scale, summed_heads=name == "attn_vec")
            assert_tokens(np.asarray(jnp.einsum(str(at["eqn"]).replace("2", "C"), at["x"], merged)), at["result"])


def test_golden_function_lora_mlp(stored: dict[str, np.ndarray]) -> None:
    at = {k.split("/")[1]: v for k, v in stored.items() if k.startswith("lora_ffn/")}
    gate, up = merge_lora(at["gating_einsum"], at["gating_einsum_lora_a"], at["gating_einsum_lora_b"], scale=1.0)
    down = merge_lora(at["linear"], at["linear_lora_a"], at["linear_lora_b"], scale=1.0)
    hidden = np.asarray(jax.nn.gelu(jnp.asarray(at["x"] @ gate), approximate=True)) * (at["x"] @ up)
    assert_tokens(hidden @ down, at["result"])


# ---- Data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["zscore", "quantile"])
@pytest.mark.parametrize("what", ["state", "actions"])
@pytest.mark.parametrize("width", ["equal", "narrow"])
def test_golden_normalisation(stored: dict[str, np.ndarray], mode: str, what: str, width: str) -> None:
    """openpi's numbers, but for constant dims on the way in: there they explode by 1e6, ours are only centred."""
    z = stored
    x = z[f"normalize/{width}/in/{what}"]
    dims = x.shape[-1]  # with fewer dims than the statistics have, the first ones count
    values = {k: tuple(z[f"normalize/stats/{what}/{k}"][:dims].tolist()) for k in ("mean", "std", "q01", "q99")}
    stats = FieldStats(tuple("abcdef"[:dims]), **values, min=values["q01"], max=values["q99"], count=1)
    normalization = Normalization("r", mode, stats, stats)
    constant = np.array([name in stats.degenerate(mode) for name in stats.names])
    assert constant.tolist() == [what == "state" and i == {"zscore": 1, "quantile": 2}[mode] for i in range(dims)]
    got, expected = normalization.apply_state(x), z[f"normalize/{width}/{mode}/{what}"]
    np.testing.assert_allclose(got[..., ~constant], expected[..., ~constant], rtol=2e-6, atol=2e-6)
    assert np.abs(got[..., constant]).max(initial=0) < 5
    if width == "equal":
        back = normalization.invert_actions(z[f"unnormalize/equal/in/{what}"])
        np.testing.assert_allclose(back, z[f"unnormalize/equal/{mode}/{what}"], rtol=2e-6, atol=2e-6)


def test_golden_running_stats(stored: dict[str, np.ndarray]) -> None:
    """openpi's mean and std are float32 sums, its quantiles left edges of 5000 bins over the range."""
    z = stored
    cases = {
        "single_update": z["running_stats/data"],
        "multi_update": z["running_stats/data"],
        "three_dim_update_first2400_as_60x40": z["running_stats/data"][:2400],
    }
    for case, data in cases.items():
        names = tuple(f"x{i}" for i in range(data.shape[1]))
        splits = [s for s in z["running_stats/splits"][1:-1] if s < len(data)]
        blocks = np.split(data, splits)
        stats = stats_of_blocks(names, blocks)
        for name in ("mean", "std"):
            np.testing.assert_allclose(getattr(stats, name), z[f"running_stats/{case}/{name}"], rtol=1e-5)
        width = (data.max(0) - data.min(0)) / 5000
        spread = np.diff(np.sort(data, axis=0), axis=0)
        rank = len(data) // 100
        for name, at in (("q01", slice(rank - 5, rank + 5)), ("q99", slice(-rank - 5, -rank + 5))):
            # theirs is the rank at or before the quantile, ours interpolates to the next one; several updates re-bin
            tolerance = (6 if case == "multi_update" else 2) * width + spread[at].max(axis=0)
            assert np.all(np.abs(np.array(getattr(stats, name)) - z[f"running_stats/{case}/{name}"]) <= tolerance)


def robot_with(mask: np.ndarray, dims: int) -> Robot:
    """Returns a robot whose action dims are relative to the state where the mask says so."""
    relative = [bool(i < len(mask) and mask[i]) for i in range(dims)]
    return Robot(
        name="masked",
        cameras=(Camera("base", "image"),),
        state=tuple(StateField(f"s{i}", "state", 1, start=i) for i in range(dims)),
        action=tuple(
            ActionField(f"a{i}", "action", 1, start=i, relative_to=f"s{i}" if r else None)
            for i, r in enumerate(relative)
        ),
        control_hz=10.0,
        action_horizon=2,
        execute_steps=1,
    )


@pytest.mark.parametrize("case", ["mask_shorter_than_dim", "mask_equal"])
def test_golden_delta_actions(stored: dict[str, np.ndarray], case: str) -> None:
    at = {k.split("/")[-1]: v for k, v in stored.items() if k.startswith(f"delta_actions/{case}/")}
    robot = robot_with(stored["delta_actions/mask"], at["actions"].shape[1])
    np.testing.assert_allclose(robot.encode_actions(at["actions"], at["state"]), at["delta"], atol=1e-6)
    back = robot.decode_actions(at["delta"], at["state"])
    np.testing.assert_allclose(back, at["absolute_of_delta"], atol=1e-6)
    absolute = robot.decode_actions(at["actions"], at["state"])
    np.testing.assert_allclose(absolute, at["absolute_of_actions"], atol=1e-6)


def test_golden_resize_with_pad(stored: dict[str, np.ndarray]) -> None:
    """openpi's data pipeline pixel for pixel; its resize inside the model differs from it by a level at most."""
    for at in numbered(stored, "resize_with_pad"):
        image, expected = at["image_uint8"], at["client_pil_uint8"]
        out = np.full((*at["target_hw"], 3), 77, np.uint8)
        fit(image, out, resize="pillow")
        np.testing.assert_array_equal(out, expected)
        assert np.abs(out.astype(int) - at["jax_uint8"]).max() <= 1
        picture = np.abs(out / 127.5 - 1 - at["jax_float32"])
        assert picture.max() <= 1.01 / 127.5
        fit(image, out)  # the faster filter: the same place and size of the picture
        for axis in (0, 1):
            np.testing.assert_array_equal(out.any(axis=(axis, 2)), expected.any(axis=(axis, 2)))


@pytest.mark.parametrize(("kind", "prompt_format"), [("pi0", Pi0Prompt()), ("pi05", Pi05Prompt())])
@pytest.mark.parametrize("length", ["short", "long"])
def test_golden_prompts(
    golden: Path, sentencepiece_model: SentencePieceTokenizer, kind: str, prompt_format: PromptFormat, length: str
) -> None:
    path = golden / "item8_tokenization.npz"
    if not path.is_file():
        pytest.skip(f"no golden vectors: {path} is absent")
    z = np.load(path)
    for i in sorted({k.split("/")[0] for k in z.files if "/" in k}):
        expected, mask = z[f"{i}/{kind}/{length}/tokens"], z[f"{i}/{kind}/{length}/mask"]
        tokenizer = TextTokenizer(sentencepiece_model, len(expected), prompt_format=prompt_format, truncate=True)
        state = z[f"{i}/state"]
        ids, real = tokenizer.encode(str(z[f"{i}/prompt"]), state)
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_array_equal(real, mask)
        if not mask.all():
            continue
        with pytest.raises(ValueError, match=f"expected at most prompt_len={len(expected)}"):
            TextTokenizer(sentencepiece_model, len(expected), prompt_format=prompt_format).encode(
                str(z[f"{i}/prompt"]), state
            )


def test_golden_prompt_strings(stored: dict[str, np.ndarray], sentencepiece_model: SentencePieceTokenizer) -> None:
    """What is given to SentencePiece, call by call, and the bins of the state."""

    calls: list[str] = []

    class Recorder(SentencePieceTokenizer):
        def encode(self, text: str) -> list[int]:
            calls.append(text)
            return super().encode(text)

    formats: dict[str, PromptFormat] = {"pi0": Pi0Prompt(), "pi05": Pi05Prompt(), "pi0fast": FastPrompt()}
    for key, prompt_format in formats.items():
        recorder = Recorder(sentencepiece_model.model)
        tokenizer = TextTokenizer(recorder, 400, prompt_format=prompt_format, answer_len=20)
        for at in numbered(stored, "prompt_strings"):
            calls.clear()
            expected = [text for text, _, _ in json.loads(str(at[f"{key}_encode_calls_json"]))]
            if key == "pi0fast":
                tokenizer.encode_actions(str(at["prompt"]), at["state"], np.zeros(0, np.int32))
            else:
                tokenizer.encode(str(at["prompt"]), at["state"])
            assert calls == expected
            np.testing.assert_array_equal(state_bins(at["state"]), at["state_bins"])


# ---- Optimiser -------------------------------------------------------------------------------------------------------


def optimizer(z: dict[str, np.ndarray], weight_decay: float = 1e-10) -> OptimizerConfig:
    warmup, decay, peak, end = z["lr_schedule/warmup_decay_peak_end"]
    return OptimizerConfig(
        peak_lr=float(peak),
        end_lr=float(end),
        warmup_steps=int(warmup),
        decay_steps=int(decay),
        weight_decay=weight_decay,
    )


def test_golden_schedule(stored: dict[str, np.ndarray]) -> None:
    schedule = optimizer(stored).schedule()
    rates = [schedule(s) for s in stored["lr_schedule/steps"]]
    np.testing.assert_allclose(rates, stored["lr_schedule/lr"], rtol=1e-5)


def test_golden_adamw(stored: dict[str, np.ndarray]) -> None:
    z = stored
    adamw = optimizer(z, float(z["adamw/weight_decay"])).create()
    params = {k: jnp.asarray(z[f"adamw/params0/{k}"]) for k in "ab"}
    state = adamw.init(params)
    for i in range(5):
        grads = {k: jnp.asarray(z[f"adamw/grads{i}/{k}"]) for k in "ab"}
        updates, state = adamw.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for k in "ab":
            np.testing.assert_allclose(params[k], z[f"adamw/params{i + 1}/{k}"], rtol=1e-5, atol=1e-7)
