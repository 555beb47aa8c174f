"""pi0-FAST against vectors computed by openpi on tiny random weights: losses, gradients, logits, decoding."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from openpi_like.batch import ActionTokens, Batch, Observation
from openpi_like.models.arrays import MemoryArrays
from openpi_like.models.backbone import Backbone
from openpi_like.models.gemma import GemmaConfig, attention_mask
from openpi_like.models.paligemma import PaliGemmaConfig
from openpi_like.models.pi0_fast import Pi0Fast, Pi0FastConfig
from openpi_like.models.siglip import SiglipConfig
from openpi_like.models.weights import (
    bind,
    export_weights,
    flat_weights,
    flatten,
    named_weights,
    plan_load,
    read_weights,
    unflatten,
)
from tests.models.golden_set import assert_tokens, config_json, open_golden, patch_size

CASES = ("all_cameras", "masked_camera")


@pytest.fixture(scope="module")
def arrays(golden: Path) -> dict[str, Any]:
    return open_golden(golden / "item3_pi0fast.npz")


@pytest.fixture(scope="module")
def params(arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    return {k.removeprefix("params/"): np.asarray(v) for k, v in arrays.items() if k.startswith("params/")}


@pytest.fixture(scope="module")
def config(arrays: dict[str, Any]) -> Pi0FastConfig:
    c = config_json(arrays)
    answer = int(arrays["token_loss_mask"].sum(1).max())
    return Pi0FastConfig(
        backbone=PaliGemmaConfig(SiglipConfig(**patch_size(c["siglip"])), GemmaConfig(**c["vlm"])),
        cameras=tuple(c["fast_cameras"]),
        image_size=tuple(c["image_hw"]),
        state_dim=arrays["state"].shape[1],
        action_dim=c["action_dim"],
        action_horizon=c["action_horizon"],
        prompt_len=arrays["tokenized_prompt"].shape[1] - answer,
        vocab_size=arrays["params/PaliGemma/llm/embedder/input_embedding"].shape[0],
        action_tokens=ActionTokens(max_len=answer, count=16, skip=1),  # not used by these vectors
        openpi_positions=True,
    )


@pytest.fixture(scope="module")
def model(config: Pi0FastConfig, params: dict[str, np.ndarray]) -> Pi0Fast:
    source = MemoryArrays(params)
    return bind(config, unflatten(read_weights(source, plan_load(config, source))))


def inputs(arrays: dict[str, Any], config: Pi0FastConfig, case: str, prompt: str) -> dict[str, Any]:
    return {
        "images": {c: arrays[f"images/{c}"] for c in config.cameras},
        "image_mask": {c: arrays[f"{case}/image_masks/{c}"] for c in config.cameras},
        "state": arrays["state"],
        "state_mask": jnp.ones(arrays["state"].shape, bool),
        "prompt": arrays[f"{prompt}tokenized_prompt"],
        "prompt_mask": arrays[f"{prompt}tokenized_prompt_mask"],
    }


def batch_of(arrays: dict[str, Any], config: Pi0FastConfig, case: str) -> Any:
    actions = arrays["actions_unused"]
    return {
        **inputs(arrays, config, case, ""),
        "prompt_causal": arrays["token_ar_mask"].astype(bool),
        "prompt_loss": arrays["token_loss_mask"],
        "prompt_action": arrays["token_ar_mask"].astype(bool),
        "actions": actions,
        "action_mask": jnp.ones(actions.shape, bool),
        "dataset_id": jnp.zeros(len(actions), jnp.int32),
        "position": jnp.zeros((len(actions), 2), jnp.uint32),
    }


@pytest.mark.parametrize("case", CASES)
def test_golden_pi0_fast_tokens_and_masks(
    arrays: dict[str, Any], config: Pi0FastConfig, model: Pi0Fast, case: str
) -> None:
    batch = batch_of(arrays, config, case)
    tokens, valid, _ = nnx.jit(Backbone.embed_prefix)(model.backbone, batch)
    assert_tokens(tokens, arrays[f"{case}/input_embeddings"])
    np.testing.assert_array_equal(valid, arrays[f"{case}/input_mask"])
    starts = jnp.pad(batch["prompt_causal"], ((0, 0), (valid.shape[1] - batch["prompt"].shape[1], 0)))
    np.testing.assert_array_equal(starts, arrays[f"{case}/ar_mask"].astype(bool))
    np.testing.assert_array_equal(attention_mask(valid, starts), arrays[f"{case}/attn_mask"])


@pytest.mark.parametrize("case", CASES)
def test_golden_pi0_fast_losses(arrays: dict[str, Any], config: Pi0FastConfig, model: Pi0Fast, case: str) -> None:
    batch = batch_of(arrays, config, case)
    scalar, metrics = nnx.jit(Pi0Fast.loss)(model, jax.random.key(0), batch)
    np.testing.assert_allclose(metrics["loss"], arrays[f"{case}/loss"], atol=3e-5)
    np.testing.assert_allclose(scalar, arrays[f"{case}/loss"].mean(), atol=3e-5)
    logits = nnx.jit(Backbone.text_logits, static_argnames="count_masked")(model.backbone, batch, count_masked=True)[
        :, :-1
    ]
    real = np.asarray(batch["prompt_mask"][:, :-1])
    np.testing.assert_allclose(logits[real], arrays[f"{case}/text_logits"][real], atol=2e-4)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["prompt"][:, 1:, None], axis=-1)[..., 0]
    both = real & np.asarray(batch["prompt_mask"][:, 1:])
    np.testing.assert_allclose(chosen[both], arrays[f"{case}/target_token_logprobs"][both], atol=2e-4)


def test_golden_pi0_fast_positions_differ_where_a_camera_is_masked_only(
    arrays: dict[str, Any], config: Pi0FastConfig, model: Pi0Fast
) -> None:
    """Our own positions skip masked slots: the same loss with all cameras, another one for the rows that lack one."""
    text_loss = nnx.jit(Backbone.text_loss)
    np.testing.assert_allclose(
        text_loss(model.backbone, batch_of(arrays, config, "all_cameras"))[1]["loss"],
        arrays["all_cameras/loss"],
        atol=3e-5,
    )
    ours = np.asarray(text_loss(model.backbone, batch_of(arrays, config, "masked_camera"))[1]["loss"])
    lacks = ~np.all([arrays[f"masked_camera/image_masks/{c}"] for c in config.cameras], axis=0)
    assert lacks.any()
    apart = np.abs(ours - np.asarray(arrays["masked_camera/loss"]))
    assert (apart[~lacks] < 3e-5).all()
    assert apart[lacks].max() > 1e-3


def test_golden_pi0_fast_gradients(
    arrays: dict[str, Any], config: Pi0FastConfig, model: Pi0Fast, params: dict[str, np.ndarray]
) -> None:
    def objective(m: Pi0Fast, batch: Batch) -> jax.Array:
        return m.loss(jax.random.key(0), batch)[0]

    state = nnx.jit(nnx.grad(objective))(model, batch_of(arrays, config, "all_cameras"))
    grads = {k: v() for k, v in export_weights(config, flatten(named_weights(state)), "openpi")}
    assert set(grads) == set(params)
    for name, grad in grads.items():
        norm = np.linalg.norm(np.asarray(grad, np.float64))
        np.testing.assert_allclose(norm, arrays[f"all_cameras/grad_norm/{name}"], rtol=1e-3, atol=1e-6, err_msg=name)
        if f"all_cameras/grad/{name}" in arrays:
            expected = np.asarray(arrays[f"all_cameras/grad/{name}"])
            np.testing.assert_allclose(grad, expected, atol=1e-3 * np.abs(expected).max(), err_msg=name)


def asked(arrays: dict[str, Any], config: Pi0FastConfig, case: str) -> tuple[Pi0FastConfig, Observation]:
    observation = inputs(arrays, config, case, "decode/")
    return dataclasses.replace(config, prompt_len=observation["prompt"].shape[1]), observation  # type: ignore[return-value]


@pytest.mark.parametrize("case", CASES)
def test_golden_pi0_fast_step_logits(arrays: dict[str, Any], config: Pi0FastConfig, model: Pi0Fast, case: str) -> None:
    """Logits of every step, fed the tokens the reference wrote, with the position it leaves out."""
    longer, observation = asked(arrays, config, case)
    decoder = bind(longer, unflatten(flat_weights(model)))
    written = arrays[f"decode/{case}/output_tokens"].astype(jnp.int32)
    expected = np.asarray(arrays[f"decode/{case}/step_logits"])
    # Where a camera is masked, the reference's decoding drops valid slots and shows masked ones: not reproduced.
    whole = np.all([arrays[f"{case}/image_masks/{c}"] for c in config.cameras], axis=0)
    steps = written.shape[1]
    prefill = nnx.jit(lambda m, o: m.backbone.prefill(o, max_new=steps, skip=1))
    extend = nnx.jit(lambda m, t, c: m.backbone.extend(t, c))
    x, cache = prefill(decoder, observation)
    for s in range(steps):
        logits = np.asarray(decoder.backbone.next_logits(x))
        np.testing.assert_allclose(logits[whole], expected[whole, s], atol=2e-4, err_msg=f"step {s}")
        x, cache = extend(decoder, written[:, s], cache)


def test_golden_pi0_fast_generation(arrays: dict[str, Any], config: Pi0FastConfig, model: Pi0Fast) -> None:
    longer, observation = asked(arrays, config, "all_cameras")
    weights = flat_weights(model)
    expected = np.asarray(arrays["decode/all_cameras/output_tokens"]).astype(np.int32)

    def generate(m: Pi0Fast, o: Observation) -> Any:
        return m.backbone.generate(jax.random.key(0), o, max_new=expected.shape[1], skip=1)

    ids, real = nnx.jit(generate)(bind(longer, unflatten(weights)), observation)
    np.testing.assert_array_equal(ids, np.where(real, expected, 0))
    assert (real | (np.cumsum(expected == 1, axis=1) > 0)).all()
    # With the end-of-sequence token's row exchanged for that of a token it writes, it stops there.
    row, token = int(arrays["decode_eos/example_index"]), int(arrays["decode_eos/swapped_token"])
    table = np.array(weights["vlm/embedding"])
    table[[1, token]] = table[[token, 1]]
    one = jax.tree.map(lambda x: x[row : row + 1], observation)
    ids, real = nnx.jit(generate)(bind(longer, unflatten({**weights, "vlm/embedding": table})), one)
    np.testing.assert_array_equal(ids, arrays["decode_eos/output_tokens"].astype(jnp.int32))
    assert int(ids[0, int(real.sum()) - 1]) == 1
    assert int(real.sum()) < expected.shape[1]


def test_golden_pi0_fast_weights_are_those_of_the_published_layout(
    config: Pi0FastConfig, params: dict[str, np.ndarray], model: Pi0Fast
) -> None:
    for name, make in export_weights(config, flat_weights(model), "openpi"):
        np.testing.assert_array_equal(make(), params[name], err_msg=name)
