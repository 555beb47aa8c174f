"""Language models against tiny models of transformers, see tests/bench/golden_language.py.

Name rows in both directions, hidden states of all layers, logits, gradients of every weight; and that decoding,
stacked and written-out layers, and packed ones compute the same.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from openpi_like.models.formats import Row
from openpi_like.models.gemma import attention_mask
from openpi_like.models.gemma2 import Gemma2, Gemma2Config
from openpi_like.models.hf_names import gemma2_rows, llama_rows
from openpi_like.models.language import KVCache, LanguageModel
from openpi_like.models.llama import Llama, LlamaConfig
from openpi_like.models.weights import flat_weights, flatten, unflatten
from tests.models.golden_set import config_json

GOLDEN = Path(__file__).parent / "golden"
LLAMAS = ("llama", "smollm2", "qwen2", "qwen3", "qwen2_5_vl", "qwen3_vl")
CASES = (*LLAMAS, "gemma2")
KEY = jax.random.key(0)
Arrays = dict[str, np.ndarray]


# ---- Files and models ------------------------------------------------------------------------------------------------


def opened(case: str) -> dict[str, Any]:
    with np.load(GOLDEN / f"language_{case}.npz") as archive:
        return dict(archive)


def group(arrays: dict[str, Any], name: str) -> Arrays:
    return {k.removeprefix(f"{name}/"): v for k, v in arrays.items() if k.startswith(f"{name}/")}


def sizes(theirs: dict[str, Any]) -> dict[str, Any]:
    heads = theirs["num_attention_heads"]
    return {
        "width": theirs["hidden_size"],
        "depth": theirs["num_hidden_layers"],
        "mlp_dim": theirs["intermediate_size"],
        "num_heads": heads,
        "num_kv_heads": theirs["num_key_value_heads"],
        "head_dim": theirs.get("head_dim") or theirs["hidden_size"] // heads,
    }


def config_of(case: str, theirs: dict[str, Any]) -> Any:
    if case == "gemma2":
        return Gemma2Config(
            **sizes(theirs),
            query_scalar=float(theirs["query_pre_attn_scalar"]),
            attention_cap=theirs["attn_logit_softcapping"],
            final_cap=theirs["final_logit_softcapping"],
            window=theirs["sliding_window"],
        )
    rope = theirs["rope_parameters"]
    sections = rope.get("mrope_section")
    return LlamaConfig(
        **sizes(theirs),
        rope_base=rope["rope_theta"],
        norm_eps=theirs["rms_norm_eps"],
        qkv_bias=case.startswith("qwen2"),
        qk_norm=case.startswith("qwen3"),
        tied=theirs["tie_word_embeddings"],
        rope_sections=None if sections is None else tuple(sections),
        rope_interleaved=rope.get("mrope_interleaved", False),
    )


def rows_of(config: Any) -> list[Row]:
    rows = gemma2_rows if isinstance(config, Gemma2Config) else llama_rows
    return rows(config, "lm", "model.")


def created(config: Any, *, unroll: bool, vocab_size: int = 64, dtype: str = "float32") -> LanguageModel:
    create: Any = Gemma2 if isinstance(config, Gemma2Config) else Llama
    return create(config, KEY, dtype=dtype, unroll=unroll, remat=None, vocab_size=vocab_size)


def imported(rows: list[Row], theirs: Arrays, shapes: dict[str, tuple[int, ...]]) -> Arrays:
    """Returns all weights; none is left as it was, and none is written twice."""
    every = {name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items()}
    for row in rows:
        into = every[row.ours.removeprefix("lm/")]
        assert np.isnan(into[row.at]).all(), row
        into[row.at] = row.to_ours(theirs[row.theirs], into[row.at].shape)
    for name, value in every.items():
        assert not np.isnan(value).any(), name
    return every


def with_weights(config: Any, weights: Arrays, *, unroll: bool = False) -> LanguageModel:
    graph, state = nnx.split(nnx.eval_shape(lambda: created(config, unroll=unroll)), nnx.Param)
    nnx.replace_by_pure_dict(state, unflatten({name: jnp.asarray(value) for name, value in weights.items()}))
    return nnx.merge(graph, state)


class Case:
    """A golden file, its model, and the masks and rotations of its tokens."""

    def __init__(self, name: str) -> None:
        arrays = opened(name)
        self.config = config_of(name, config_json(arrays))
        self.rows = rows_of(self.config)
        self.theirs, self.gradients = group(arrays, "weight"), group(arrays, "gradient")
        self.shapes = shapes_of(lambda: created(self.config, unroll=False))
        self.weights = imported(self.rows, self.theirs, self.shapes)
        self.model = with_weights(self.config, self.weights)
        self.states, self.logits, self.loss = arrays["states"], arrays["logits"], float(arrays["loss"])
        self.tokens = jnp.asarray(arrays["tokens"], jnp.int32)
        self.valid = jnp.asarray(arrays["mask"])
        self.mask = attention_mask(self.valid, jnp.ones(self.tokens.shape[1], bool))
        self.turns = self.model.rope(jnp.asarray(arrays["positions"], jnp.int32))
        self.given: dict[str, Any] = {}
        if "deepstack" in arrays:
            self.given = {"deepstack": tuple(map(jnp.asarray, arrays["deepstack"]))}

    def parts(self, tokens: slice) -> dict[str, Any]:
        """What a model is given, for some of the tokens."""
        return {name: tuple(x[:, tokens] for x in value) for name, value in self.given.items()}

    def run(self, model: LanguageModel, x: jax.Array) -> tuple[jax.Array, KVCache]:
        return model(x, self.mask, self.turns, **self.given)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def close(got: Any, expected: Any, tolerance: float, where: Any = ...) -> None:
    """Within a tolerance relative to the largest number."""
    expected = np.asarray(expected)[where]
    np.testing.assert_allclose(np.asarray(got)[where], expected, rtol=0, atol=tolerance * np.abs(expected).max())


# ---- Against transformers --------------------------------------------------------------------------------------------


def test_import_and_export_are_inverse(case: Case) -> None:
    assert {row.theirs for row in case.rows} == set(case.theirs)
    for row in case.rows:
        back = row.to_theirs(case.weights[row.ours.removeprefix("lm/")][row.at])
        np.testing.assert_array_equal(back, case.theirs[row.theirs])


def test_hidden_states_and_logits(case: Case) -> None:
    seen = np.asarray(case.valid)

    def both(model: LanguageModel) -> tuple[jax.Array, jax.Array]:
        x = model.embed(case.tokens)
        states = model.hidden_states(x, case.mask, case.turns, **case.given)
        return states, model.logits(case.run(model, x)[0])

    for unroll in (False, True):
        states, logits = nnx.jit(both)(with_weights(case.config, case.weights, unroll=unroll))
        assert states.shape == (case.config.depth + 1, *case.tokens.shape, case.config.width)
        for got, expected in zip(states, case.states, strict=True):
            close(got, expected, 2e-4, seen)
        close(logits, case.logits, 2e-4, seen)


def test_gradients_of_all_weights(case: Case) -> None:
    targets, there = case.tokens[:, 1:], case.valid[:, 1:]

    def loss(model: LanguageModel) -> jax.Array:
        x, _ = case.run(model, model.embed(case.tokens))
        return jnp.where(there, model.token_losses(x[:, :-1], targets), 0).sum() / there.sum()

    expected = imported(case.rows, case.gradients, case.shapes)
    got, gradient = nnx.jit(nnx.value_and_grad(loss))(case.model)
    assert float(got) == pytest.approx(case.loss, rel=2e-4)
    for name, value in flatten(nnx.to_pure_dict(gradient)).items():
        close(value, expected[name], 1e-3)


# ---- Ways to compute the same ----------------------------------------------------------------------------------------


def test_token_losses_are_those_of_the_logits(case: Case) -> None:
    x = jnp.asarray(case.states[-1])
    expected = -jnp.take_along_axis(jax.nn.log_softmax(jnp.asarray(case.logits)), case.tokens[..., None], -1)[..., 0]
    close(case.model.token_losses(x, case.tokens), expected, 2e-4)
    close(case.model.logits(x, rows=slice(5, 20)), case.logits[..., 5:20], 2e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_decoding_is_the_whole_pass(case: Case, packed: bool) -> None:
    """A prefix, then three single tokens, each on the cache of those before."""
    model = case.model.packed() if packed else case.model
    assert packed == (model is not case.model)
    assert model.packed() is model or not packed
    x, S = model.embed(case.tokens), case.tokens.shape[1]
    whole, every = nnx.jit(case.run)(case.model, x)
    first = S - 3
    turns, start = case.turns[:, :, :first], case.mask[:, :first, :first]
    past = nnx.jit(lambda m: m.prefill(x[:, :first], start, turns, **case.parts(slice(first))))(model)
    jax.tree.map(lambda a, b: close(a, b[:, :, :first], 2e-5), past, every)
    step = nnx.jit(lambda m, x, mask, turns, past, given: m(x, mask, turns, past=past, **given))
    for i in range(first, S):
        at = slice(i, i + 1)
        got, own = step(model, x[:, at], case.mask[:, at, : i + 1], case.turns[:, :, at], past, case.parts(at))
        seen = np.asarray(case.valid[:, at])
        close(got, whole[:, at], 2e-5, seen)
        past = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), past, own)


def test_prefill_is_the_cache_of_a_pass(case: Case) -> None:
    for unroll in (False, True):
        model = with_weights(case.config, case.weights, unroll=unroll)
        x = model.embed(case.tokens)
        own = nnx.jit(lambda m, x: case.run(m, x)[1])(model, x)
        got = nnx.jit(lambda m, x: m.prefill(x, case.mask, case.turns, **case.given))(model, x)
        jax.tree.map(lambda a, b: close(a, b, 2e-5), got, own)


# ---- Published sizes -------------------------------------------------------------------------------------------------


def shapes_of(create: Callable[[], LanguageModel]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(w.shape) for name, w in flat_weights(nnx.eval_shape(create)).items()}


PUBLISHED = json.loads((GOLDEN / "language_shapes.json").read_text())
COUNTS = {
    "llama_2_7b": 6_738_415_616,
    "qwen2_vl_2b": 1_543_714_304,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name: str) -> None:
    """Every weight by name and shape, and their number."""
    theirs = {k: tuple(v) for k, v in PUBLISHED[name].items()}
    config = getattr(Gemma2Config if name.startswith("gemma") else LlamaConfig, name)()
    vocab_size = theirs["model.embed_tokens.weight"][0]
    shapes = shapes_of(lambda: created(config, unroll=False, vocab_size=vocab_size))
    assert sum(map(math.prod, shapes.values())) == COUNTS[name]
    last = f".layers.{config.depth - 1}."
    rows = [row for row in rows_of(config) if ".layers." not in row.theirs or last in row.theirs]
    got = {row.theirs: row.their_shape(shapes[row.ours.removeprefix("lm/")][len(row.at) :]) for row in rows}
    assert got == theirs


def test_vision_language_models_have_the_sizes_of_their_text_models() -> None:
    """SmolVLM has a head of its own: 256 and 507 million weights with the tower need it."""
    pairs = {"qwen2_5_3b": "qwen2_5_vl_3b", "qwen2_5_7b": "qwen2_5_vl_7b", "qwen3_1_7b": "qwen3_vl_2b"}
    for names in (*pairs.items(), ("qwen3_4b", "qwen3_vl_4b")):
        plain, turned = (getattr(LlamaConfig, name)() for name in names)
        assert turned.rope_sections is not None
        same = {"rope_sections": None, "rope_interleaved": False, "rope_base": plain.rope_base}
        assert dataclasses.replace(turned, **same) == plain
    shapes = shapes_of(lambda: created(LlamaConfig.smollm2_360m(tied=False), unroll=False, vocab_size=49_280))
    assert shapes["head"] == shapes["embedding"] == (49_280, 960)
