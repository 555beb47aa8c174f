"""Backbones against tiny models of transformers and timm, see tests/bench/golden_backbones.py.

Names in both directions, hidden states, logits, gradients; decoding, queries, sampling; overlays and devices; and the
sizes of published models.
"""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from openpi_like.models.arrays import MemoryArrays
from openpi_like.models.backbone import Backbone
from openpi_like.models.dino import DinoConfig
from openpi_like.models.formats import recognise
from openpi_like.models.gemma2 import Gemma2Config
from openpi_like.models.llama import LlamaConfig
from openpi_like.models.lora import Lora, LoraRule
from openpi_like.models.paligemma2 import PaliGemma2Config
from openpi_like.models.prismatic import PrismaticConfig
from openpi_like.models.qwen_vision import Qwen3VisionConfig, Qwen25VisionConfig
from openpi_like.models.qwen_vl import QwenVlConfig
from openpi_like.models.sampling import for_sampling
from openpi_like.models.siglip import SiglipConfig
from openpi_like.models.text_model import TextModelConfig
from openpi_like.models.weights import (
    WeightsError,
    bind,
    flatten,
    known_formats,
    layout,
    plan_load,
    read_weights,
    unflatten,
)
from openpi_like.partition import ShardingRules
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.sharding import MeshConfig, put_batch
from openpi_like.train.state import ModelDef, Trainable, Trainer
from tests.models.weight_arrays import exported

GOLDEN = Path(__file__).parent / "golden"
VOCABULARY, ANSWER = 48, 4
Arrays = dict[str, np.ndarray]


# ---- Files and models ------------------------------------------------------------------------------------------------

_LANGUAGE: dict[str, Any] = {"width": 16, "mlp_dim": 24, "num_heads": 4, "num_kv_heads": 2, "depth": 2}
_VISION: dict[str, Any] = {"width": 16, "mlp_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 4}
_LLAMA = LlamaConfig(**_LANGUAGE, head_dim=4, rope_base=1e4, norm_eps=1e-5)
_SIGLIP = SiglipConfig(**_VISION, select="second_to_last", gelu="erf")
_QWEN: dict[str, Any] = {"width": 16, "hidden": 16, "mlp_dim": 24, "num_heads": 2, "patch_size": 4}


def _qwen(**variant: Any) -> LlamaConfig:
    return LlamaConfig(**{**_LANGUAGE, "rope_base": 1e4, "norm_eps": 1e-6, "tied": True, **variant})


BACKBONES: dict[str, tuple[Any, tuple[int, int]]] = {
    "prismatic": (PrismaticConfig(DinoConfig(**{**_VISION, "width": 12, "mlp_dim": 24}), _SIGLIP, _LLAMA), (8, 12)),
    "prismatic_film": (PrismaticConfig(None, _SIGLIP, _LLAMA, film=True), (8, 12)),
    "paligemma2": (
        PaliGemma2Config(
            SiglipConfig(**{**_VISION, "mlp_dim": 24, "depth": 2}),
            Gemma2Config(**_LANGUAGE, head_dim=12, query_scalar=20.0, attention_cap=2.0, final_cap=1.5, window=64),
        ),
        (8, 8),
    ),
    "qwen2_5_vl": (
        QwenVlConfig(
            Qwen25VisionConfig(**_QWEN, depth=3, full=(1,), window=16),
            _qwen(num_heads=2, head_dim=8, norm_eps=1e-5, qkv_bias=True, rope_sections=(1, 2, 1)),
        ),
        (24, 16),
    ),
    "qwen3_vl": (
        QwenVlConfig(
            Qwen3VisionConfig(**_QWEN, depth=2, deepstack=(0,), table=5),
            _qwen(depth=3, head_dim=12, qk_norm=True, rope_sections=(2, 2, 2), rope_interleaved=True),
        ),
        (24, 16),
    ),
}


class Case:
    """A golden file, and its model."""

    def __init__(self, name: str) -> None:
        self.name, (self.backbone, self.image_size) = name, BACKBONES[name]
        with np.load(GOLDEN / f"backbone_{name}.npz") as archive:
            self.arrays = dict(archive)
        # transformers 5 writes SigLIP's names shorter than they are published.
        long = lambda k: k.replace("vision_tower.", "vision_tower.vision_model.")  # noqa: E731
        self.theirs, self.gradients = (
            {long(k.removeprefix(start)): v for k, v in self.arrays.items() if k.startswith(start)}
            for start in ("weight/", "gradient/")
        )
        self.weights = self.read(self.theirs)

    def read(self, theirs: Arrays) -> Arrays:
        source = MemoryArrays(theirs)
        return read_weights(source, plan_load(self.config("two"), source))

    def config(self, which: str, **changes: Any) -> TextModelConfig:
        slots = tuple(map(int, self.arrays[f"{which}/slots"]))
        return TextModelConfig(
            backbone=self.backbone,
            cameras=("base", "wrist")[: len(slots)],
            image_size=self.image_size,
            prompt_len=self.arrays[f"{which}/tokens"].shape[1],
            vocab_size=VOCABULARY,
            image_slots=() if self.name == "paligemma2" else slots,
            **changes,
        )

    def model(self, which: str, **changes: Any) -> Any:
        return bind(self.config(which, **changes), unflatten(self.weights))

    def batch(self, which: str) -> Any:
        of = {name: self.arrays[f"{which}/{name}"] for name in ("images", "tokens", "mask", "answer")}
        cameras = self.config(which).cameras
        arrays = {
            "images": {camera: of["images"][:, i] for i, camera in enumerate(cameras)},
            "image_mask": {camera: np.ones(len(of["tokens"]), bool) for camera in cameras},
            "prompt": of["tokens"].astype(np.int32),
            "prompt_mask": of["mask"],
            "prompt_causal": of["answer"],
            "prompt_loss": of["answer"],
        }
        return jax.tree.map(jnp.asarray, arrays)

    def question(self) -> Any:
        """The batch of two images without its answers."""
        batch = dict(self.batch("two"))
        asked = batch["prompt_mask"] & ~batch["prompt_causal"]
        kept = {name: batch[name] for name in ("images", "image_mask")}
        return {**kept, "prompt": jnp.where(asked, batch["prompt"], 0), "prompt_mask": asked}

    def answers(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens of the answers to two images (B, T), 0 behind their end; which are real; golden logits before each."""
        tokens, answer = (self.arrays[f"two/{name}"] for name in ("tokens", "answer"))
        model = nnx.eval_shape(lambda: self.config("two").create(jax.random.key(0))).backbone
        logits = np.asarray(model.text_of(jnp.asarray(self.arrays["two/logits"]), tokens.shape[1]))
        said = np.zeros((len(tokens), ANSWER), np.int32)
        before = np.zeros((len(tokens), ANSWER, VOCABULARY), np.float32)
        for i, row in enumerate(answer):
            at = np.flatnonzero(row)
            said[i, : len(at)], before[i, : len(at)] = tokens[i, at], logits[i, at - 1]
        return said, np.arange(ANSWER) < answer.sum(1)[:, None], before


@functools.cache
def opened(name: str) -> Case:
    return Case(name)


@pytest.fixture(params=BACKBONES)
def case(request: pytest.FixtureRequest) -> Case:
    return opened(request.param)


def close(got: Any, expected: Any, tolerance: float, *, least: float = 0.0, name: str = "") -> None:
    """Within a tolerance relative to the largest number."""
    atol = tolerance * max(np.abs(expected).max(), least)
    np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=atol, err_msg=name)


# ---- Against transformers and timm -----------------------------------------------------------------------------------


def test_import_and_export_are_inverse(case: Case) -> None:
    config = case.config("two")
    fmt = "openvla" if "prismatic" in case.name else "huggingface"
    assert recognise(case.theirs, known_formats(config)) == fmt
    back = exported(config, case.weights, fmt)
    once = {k.replace("vision_backbone.vision_backbone.", "vision_backbone."): v for k, v in back.items()}
    assert once.keys() == case.theirs.keys()
    dropped = {line.split(":")[0] for line in plan_load(config, MemoryArrays(case.theirs)).dropped}
    for name, array in once.items():
        theirs = case.theirs[name]
        assert array.shape == theirs.shape
        if "embed_tokens" in name:  # padding of the vocabulary has no meaning
            array, theirs = array[:VOCABULARY], theirs[:VOCABULARY]
        if name in dropped and "embed_tokens" not in name:
            assert not array.any()
            continue
        np.testing.assert_array_equal(array, theirs, err_msg=name)
    assert {k: v.shape for k, v in back.items()} == layout(config, fmt)
    assert plan_load(config, MemoryArrays(back)).rows.keys() == case.weights.keys()


@pytest.mark.parametrize("which", ["one", "two"])
def test_hidden_states_and_logits(case: Case, which: str) -> None:
    batch, depth = case.batch(which), case.backbone.language.depth
    unroll = which == "one"

    def both(model: Backbone) -> Any:
        states, valid = model.hidden_states(batch, range(depth + 1))
        return states, valid, model.text_logits(batch)

    model = case.model(which, unroll=unroll).backbone
    states, valid, logits = nnx.jit(both)(model)
    seen, text = np.asarray(valid), np.asarray(batch["prompt_mask"])
    for got, expected in zip(states, case.arrays[f"{which}/states"], strict=True):
        close(got[seen], expected[seen], 2e-4)
    expected = np.asarray(model.text_of(jnp.asarray(case.arrays[f"{which}/logits"]), text.shape[1]))
    close(logits[text], expected[text], 2e-4)


def test_gradients_of_all_weights(case: Case) -> None:
    batch = case.batch("two")
    grads = nnx.value_and_grad(lambda model: model.backbone.text_loss(batch)[0])
    got, gradient = nnx.jit(grads)(case.model("two"))
    assert float(got) == pytest.approx(float(case.arrays["two/loss"]), rel=2e-4)
    expected = case.read(case.gradients)
    found = flatten(nnx.to_pure_dict(gradient)["backbone"])
    assert found.keys() == expected.keys()
    for name, value in found.items():
        # A bias of the keys moves no softmax: its gradient is nothing but rounding.
        close(value, expected[name], 1e-3, least=1e-2, name=name)


# ---- Ways to compute the same ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [False, True])
def test_decoding_is_the_whole_pass(case: Case, held: bool) -> None:
    """A prompt without its answer, then the answer token by token. held: with the model as a server holds it."""
    said, real, expected = case.answers()
    model = case.model("two")
    model = (for_sampling(model) if held else model).backbone
    start = nnx.jit(Backbone.prefill, static_argnames="max_new")
    step = nnx.jit(lambda m, token, cache: m.extend(token, cache))
    x, cache = start(model, case.question(), max_new=ANSWER)
    for i in range(ANSWER):
        logits = np.asarray(model.next_logits(x))
        close(logits[real[:, i]], expected[:, i][real[:, i]], 2e-4)
        x, cache = step(model, jnp.asarray(said[:, i]), cache)


def test_queries_stand_where_an_answer_would(case: Case) -> None:
    said, real, expected = case.answers()

    def logits(model: Backbone) -> jax.Array:
        out, _ = model.run_queries(case.question(), model.vlm.embed(jnp.asarray(said[:, :-1])))
        return model.vlm.logits(out[:, -(ANSWER - 1) :])

    got = np.asarray(nnx.jit(logits)(case.model("two").backbone))
    close(got[real[:, 1:]], expected[:, 1:][real[:, 1:]], 2e-4)


def test_a_camera_that_is_not_there_changes_nothing(case: Case) -> None:
    """Neither what is said nor where it stands: as if the sequence did not have it."""
    batch = case.batch("two")
    batch["image_mask"] = {"base": jnp.ones(2, bool), "wrist": jnp.zeros(2, bool)}
    alone: Any = {**batch, **{k: {"base": batch[k]["base"]} for k in ("images", "image_mask")}}
    run = nnx.jit(Backbone.text_logits)
    there = np.asarray(batch["prompt_mask"])
    expected = np.asarray(run(case.model("one").backbone, alone))[there]
    close(np.asarray(run(case.model("two").backbone, batch))[there], expected, 2e-5)


@pytest.mark.parametrize("case", ["paligemma2", "prismatic_film", "qwen3_vl"], indirect=True)  # every part is in one
def test_it_trains_on_several_devices(case: Case) -> None:
    """An overlay on all maps of the backbone, its weights over two devices and over two more."""
    batch = jax.tree.map(lambda x: np.concatenate([x, x]), case.batch("two"))
    batch["dataset_id"] = np.zeros(4, np.int32)
    lora = Lora(rules=(LoraRule("layers/|projector|merger|head/kernel", rank=2),), also_train=("vlm/final_norm",))
    model = ModelDef(case.config("two"), Trainable(lora=lora))
    mesh = MeshConfig(data=1, fsdp=2, tensor=2).create()
    optimizer = OptimizerConfig(peak_lr=1e-2, end_lr=1e-2, warmup_steps=0, decay_steps=10).create()
    trainer = Trainer(model, optimizer, ema_decay=None, seed=0, mesh=mesh, rules=ShardingRules(), dataset_names=("a",))
    fresh = trainer.fresh_weights([name for name in model.trained if "lora" in name])
    assert fresh
    held = flatten(trainer.shardings.params) | flatten(trainer.shardings.frozen)
    weights = {name: jax.device_put(value, held[name]) for name, value in case.weights.items()}
    state = trainer.init_from(unflatten({**weights, **fresh}))
    state, first = trainer.train_step(state, put_batch(batch, mesh))
    state, second = trainer.train_step(state, put_batch(batch, mesh))
    assert float(first["loss"]) == pytest.approx(float(case.arrays["two/loss"]), rel=2e-4)
    assert float(second["loss"]) < float(first["loss"])


# ---- What does not fit -----------------------------------------------------------------------------------------------


def test_film_starts_fresh_where_a_file_has_none() -> None:
    case = opened("prismatic_film")
    config = case.config("two")
    plain = dataclasses.replace(config, backbone=dataclasses.replace(case.backbone, film=False))
    without = {name: w for name, w in case.weights.items() if "/film/" not in name}
    theirs = MemoryArrays(exported(plain, without, "openvla"))
    with pytest.raises(WeightsError, match="film/scale/kernel: this format does not hold it"):
        plan_load(config, theirs)
    plan = plan_load(config, theirs, reinitialize=["/film/"])
    got = read_weights(theirs, plan)
    assert got.keys() == without.keys()


@pytest.mark.parametrize(
    ("create", "problem"),
    [
        (
            lambda: PrismaticConfig(DinoConfig.tiny(), SiglipConfig.tiny(8), LlamaConfig.tiny()),
            "patch sizes 16 and 8, expected one for both towers",
        ),
        (
            lambda: QwenVlConfig(Qwen3VisionConfig.tiny(width=64), LlamaConfig.tiny()),
            r"vision.width=64, expected vlm.width=96; vlm.rope_sections=None, expected those of positions in three",
        ),
        (
            lambda: QwenVlConfig(Qwen3VisionConfig.tiny(), dataclasses.replace(QwenVlConfig.tiny_3().vlm, depth=1)),
            r"vision.deepstack=\(0, 2\), expected at most vlm.depth=1",
        ),
    ],
)
def test_configs_that_do_not_fit_are_refused(create: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        create()


# ---- Published sizes -------------------------------------------------------------------------------------------------

PUBLISHED = json.loads((GOLDEN / "backbone_shapes.json").read_text())
SIZES: dict[str, tuple[Any, int, int]] = {  # backbone, rows of its vocabulary, numbers in its file
    "openvla_7b": (PrismaticConfig.openvla(), 32_064, 7_541_237_184),
    "paligemma2_3b": (PaliGemma2Config.paligemma2_3b(), 257_152, 3_032_242_416),
    "paligemma2_10b": (PaliGemma2Config.paligemma2_10b(), 257_152, 9_662_638_832),
    "qwen2_5_vl_3b": (QwenVlConfig.qwen2_5_vl_3b(), 151_936, 3_754_622_976),
    "qwen3_vl_2b": (QwenVlConfig.qwen3_vl_2b(), 151_936, 2_127_532_032),
    "qwen3_vl_4b": (QwenVlConfig.qwen3_vl_4b(), 151_936, 4_437_815_808),
}
# Names in memory -> names in files, as transformers maps them.
RENAMED = {
    "paligemma2": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    "qwen2_5_vl": {"model.visual.": "visual.", "model.language_model.": "model."},
}


def config_of(backbone: Any, vocab_size: int) -> TextModelConfig:
    sizes: dict[str, Any] = {"image_size": (224, 224), "prompt_len": 32, "vocab_size": vocab_size}
    return TextModelConfig(backbone=backbone, cameras=("image",), image_slots=(1,), **sizes)


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name: str) -> None:
    """Every array by name and shape, and how many numbers there are."""
    backbone, vocab_size, count = SIZES[name]
    renamed = next((v for k, v in RENAMED.items() if name.startswith(k)), {})
    expected = {}
    for theirs, (shape, number) in PUBLISHED[name].items():
        start = next((s for s in renamed if theirs.startswith(s)), "")
        expected[renamed.get(start, "") + theirs.removeprefix(start)] = (tuple(shape), number)
    got: dict[str, tuple[tuple[int, ...], int]] = {}
    every = layout(config_of(backbone, vocab_size), "openvla" if name.startswith("openvla") else "huggingface")
    for theirs, shape in every.items():
        starred = re.sub(r"\b(blocks|layers|deepstack_merger_list)\.\d+\.", r"\1.*.", theirs)
        got[starred] = (shape, got.get(starred, ((), 0))[1] + 1)
    assert got == expected
    assert sum(map(math.prod, every.values())) == count


@pytest.mark.parametrize(
    ("backbone", "vocab_size", "count"),
    [
        (QwenVlConfig.qwen2_5_vl_7b(), 152_064, 8_292_166_656),
        (PrismaticConfig.qwen2_5_0_5b(), 151_936, 1_209_415_968),  # without what nobody computes with
    ],
)
def test_other_sizes(backbone: Any, vocab_size: int, count: int) -> None:
    shapes = layout(config_of(backbone, vocab_size), "ours")
    assert sum(map(math.prod, shapes.values())) == count


@pytest.mark.parametrize(
    "backbone",
    [PrismaticConfig.tiny(), PaliGemma2Config.tiny(), QwenVlConfig.tiny_2_5(), QwenVlConfig.tiny_3()],
    ids=["prismatic", "paligemma2", "qwen2_5_vl", "qwen3_vl"],
)
def test_tiny_sizes(backbone: Any) -> None:
    size = (56, 56) if isinstance(backbone, QwenVlConfig) and "5" in type(backbone.vision).__name__ else (64, 64)
    sizes: dict[str, Any] = {"image_size": size, "prompt_len": 8, "vocab_size": 300}
    config = TextModelConfig(backbone=backbone, cameras=("image",), **sizes)
    assert sum(map(math.prod, layout(config, "ours").values())) < 2_000_000
