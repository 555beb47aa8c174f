"""PaliGemma as a language model in its own right: it learns captions and writes them, and refuses what does not fit."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from openpi_like.batch import ActionTokens
from openpi_like.data.prompts import FastPrompt
from openpi_like.data.sentencepiece_model import fit_text_tokenizer
from openpi_like.data.text import TextTokenizer
from openpi_like.models.decoding import EOS
from openpi_like.models.gemma import GemmaConfig
from openpi_like.models.paligemma import PaliGemma, PaliGemmaConfig
from openpi_like.models.siglip import SiglipConfig
from openpi_like.models.text_model import TextModelConfig
from openpi_like.partition import ShardingRules
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.sharding import MeshConfig, put_batch
from openpi_like.train.state import ModelDef, Trainer

KEY = jax.random.key(0)
ANSWERS = ("red", "green", "blue", "black and white")
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]], np.uint8)
NEW = 12


@pytest.fixture(scope="module")
def text() -> TextTokenizer:
    return TextTokenizer(fit_text_tokenizer(["what colour", "caption", *ANSWERS], 290), 24)


@pytest.fixture(scope="module")
def config(text: TextTokenizer) -> TextModelConfig:
    return TextModelConfig(
        backbone=PaliGemmaConfig(
            SiglipConfig(width=32, depth=1, mlp_dim=64, num_heads=2, patch_size=8),
            GemmaConfig(width=32, depth=2, mlp_dim=64, num_heads=2, num_kv_heads=1, head_dim=16),
        ),
        cameras=("image",),
        image_size=(16, 16),
        prompt_len=text.prompt_len,
        vocab_size=text.vocab_size,
    )


@pytest.fixture(scope="module")
def captions(text: TextTokenizer) -> Any:
    """Eight pictures of one colour each and what is to be said of them, the prompts of different lengths."""
    rows = [text.encode_answer("what colour" if i < 4 else "caption", ANSWERS[i % 4]) for i in range(8)]
    ids, mask, answer, _, _ = (np.stack(part) for part in zip(*rows, strict=True))
    images = np.broadcast_to(COLOURS[np.arange(8) % 4, None, None], (8, 16, 16, 3)).copy()
    images[3::4, ::2] = 255  # black and white
    return {
        "images": {"image": images},
        "image_mask": {"image": np.ones(8, bool)},
        "prompt": ids,
        "prompt_mask": mask,
        "prompt_causal": answer,
        "prompt_loss": answer,
        "dataset_id": np.zeros(8, np.int32),
    }


@pytest.fixture(scope="module")
def questions(captions: Any) -> Any:
    """The same without the answers."""
    kept = captions["prompt_mask"] & ~captions["prompt_loss"]
    return {
        "images": captions["images"],
        "image_mask": captions["image_mask"],
        "prompt": np.where(kept, captions["prompt"], 0),
        "prompt_mask": kept,
    }


@pytest.fixture(scope="module")
def trained(config: TextModelConfig, captions: Any) -> tuple[PaliGemma, list[float]]:
    model = ModelDef(config)
    mesh = MeshConfig(fsdp=2).create()
    optimizer = OptimizerConfig(peak_lr=3e-3, end_lr=1e-4, warmup_steps=10, decay_steps=150).create()
    trainer = Trainer(
        model, optimizer, ema_decay=None, seed=0, mesh=mesh, rules=ShardingRules(), dataset_names=("captions",)
    )
    state, losses = trainer.init(), []
    batch = put_batch(captions, mesh)
    for _ in range(150):
        state, metrics = trainer.train_step(state, batch)
        losses.append(float(metrics["loss"]))
    return model.bind(jax.device_get(state.params)).backbone, losses


def test_it_learns_to_say_what_it_sees(trained: Any, questions: Any, text: TextTokenizer) -> None:
    model, losses = trained
    assert losses[0] > 4  # about the logarithm of the vocabulary
    assert losses[-1] < 0.05
    ids, mask = nnx.jit(PaliGemma.generate, static_argnames="max_new")(model, KEY, questions, max_new=NEW)
    for i in range(8):
        row = np.asarray(ids[i])[np.asarray(mask[i])]
        assert row[-1] == EOS
        assert text.decode(row[:-1].tolist()) == ANSWERS[i % 4]
    assert not np.asarray(ids)[~np.asarray(mask)].any()


def test_generation_is_the_same_in_company_and_alone(trained: Any, questions: Any) -> None:
    model, _ = trained
    generate = nnx.jit(PaliGemma.generate, static_argnames=("max_new", "temperature"))
    for temperature in (0.0, 3.0):
        ids, mask = generate(model, KEY, questions, max_new=NEW, temperature=temperature)
        first = jax.tree.map(lambda x: x[:1], questions)
        alone, alone_mask = generate(model, KEY, first, max_new=NEW, temperature=temperature)
        np.testing.assert_array_equal(alone[0], ids[0])
        np.testing.assert_array_equal(alone_mask[0], mask[0])
    other, _ = generate(model, jax.random.key(1), questions, max_new=NEW, temperature=3.0)
    assert not np.array_equal(other, ids)  # at this temperature, another key writes another text


def test_loss_counts_marked_tokens_only(trained: Any, captions: Any) -> None:
    model, _ = trained
    run = nnx.jit(PaliGemma.text_loss)
    _, metrics = run(model, captions)
    unmarked: Any = {**captions, "prompt_loss": captions["prompt_loss"].copy()}
    unmarked["prompt_loss"][0] = False
    loss, fewer = run(model, unmarked)
    np.testing.assert_array_equal(fewer["valid"], [0, 1, 1, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(fewer["loss"][1:], metrics["loss"][1:], rtol=1e-5)
    np.testing.assert_allclose(loss, np.asarray(metrics["loss"])[1:].mean(), rtol=1e-5)
    # What stands in the padding reaches nobody.
    noise: Any = {**captions, "prompt": np.where(captions["prompt_mask"], captions["prompt"], 7).astype(np.int32)}
    np.testing.assert_allclose(run(model, noise)[1]["loss"], metrics["loss"], atol=1e-6)


def test_an_answer_is_seen_causally(trained: Any, captions: Any) -> None:
    model, _ = trained
    run = nnx.jit(PaliGemma.text_logits)
    logits = run(model, captions)
    start = int(np.argmax(captions["prompt_causal"][0]))
    changed: Any = {**captions, "prompt": captions["prompt"].copy()}
    changed["prompt"][0, start + 1] = 9
    after = run(model, changed)
    np.testing.assert_allclose(after[0, : start + 1], logits[0, : start + 1], atol=1e-6)
    assert np.abs(after[0, start + 1] - logits[0, start + 1]).max() > 1e-3


def test_answers_that_do_not_fit_are_refused(text: TextTokenizer) -> None:
    ids, mask, answer, loss, action = text.encode_answer("caption", "red")
    np.testing.assert_array_equal(loss, answer)
    assert not action.any()
    assert ids[np.flatnonzero(answer)[-1]] == EOS
    assert mask.sum() == np.flatnonzero(answer)[-1] + 1
    prompt, prompt_mask = text.encode("caption")  # the cache is not written into
    assert prompt_mask.sum() == np.flatnonzero(answer)[0]
    assert not prompt[~prompt_mask].any()
    with pytest.raises(
        ValueError, match=r"'caption' with its answer .* expected at most prompt_len=24 \+ answer_len=0"
    ):
        text.encode_answer("caption", "black and white " * 8)


def test_batches_that_do_not_fit_are_refused(config: TextModelConfig, captions: Any) -> None:
    model: Any = nnx.eval_shape(lambda: config.create(KEY)).backbone
    wrong = {**captions, "prompt_causal": captions["prompt_causal"].astype(np.int32)}
    wrong["images"] = {"imag": captions["images"]["image"]}
    with pytest.raises(ValueError, match=r"prompt_causal: got int32(.|\n)*images\['image'\]: missing; did you mean"):
        jax.eval_shape(lambda: model.text_logits(wrong))
    with pytest.raises(ValueError, match="prompt_loss: missing"):
        jax.eval_shape(lambda: model.text_loss({k: v for k, v in captions.items() if k != "prompt_loss"}))


def test_shapes_are_those_of_batches(config: TextModelConfig, captions: Any, tiny_policy: Any, tiny_batch: Any) -> None:
    """What is planned with is what loaders give, and what models take."""

    def named(batch: Any) -> dict[str, Any]:
        leaves = jax.tree.flatten_with_path(dict(batch))[0]
        return {jax.tree_util.keystr(path): (tuple(x.shape), str(x.dtype)) for path, x in leaves}

    assert named(tiny_policy.batch_shapes(8)) == named(tiny_batch)
    made = named(config.batch_shapes(len(captions["prompt"])))
    assert {name: of for name, of in named(captions).items() if name in made} == made
    written = dataclasses.replace(
        tiny_policy, prompt_format=FastPrompt(), action_tokens=ActionTokens(max_len=5, count=9, skip=0)
    )
    for policy, length in ((tiny_policy, 8), (written, 13)):
        shapes = policy.batch_shapes(3)
        assert shapes["prompt"].shape == (3, length)
        policy.check_inputs(shapes, actions=True)
        policy.check_inputs(policy.input_shapes(3, actions=False), actions=False)
    with pytest.raises(ValueError, match="prompt_causal: missing"):
        written.check_inputs(tiny_policy.batch_shapes(3), actions=True)


def test_configs_that_do_not_fit_are_refused(config: TextModelConfig) -> None:
    with pytest.raises(ValueError, match=r"TextModelConfig: image_size=\(16, 20\).*resize='lanczos', expected one of"):
        dataclasses.replace(config, image_size=(16, 20), resize="lanczos")
