"""FAST tokens of our own fits: nothing is lost in the stated range, and what is outside is said."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from openpi_like.data.fast import FILES, FastError, FastFiles, FastTokenizer, dct_coefficients, fit_fast

SCALE = 8.0


def walks(seed: int, count: int = 300, horizon: int = 6, dims: int = 3) -> np.ndarray:
    steps = np.random.default_rng(seed).normal(size=(count, horizon, dims)) * 0.2
    return np.clip(np.cumsum(steps, axis=1), -1, 1).astype(np.float32)


@pytest.fixture(scope="module")
def fast() -> FastTokenizer:
    given = [dct_coefficients(walks(0), SCALE), dct_coefficients(walks(1, horizon=4, dims=2), SCALE)]
    return fit_fast(given, scale=SCALE, vocab_size=160)


chunks = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3)),
    elements=st.floats(-1, 1, width=32),
)


@settings(max_examples=200, deadline=None)
@given(actions=chunks)
def test_whatever_is_within_minus_one_and_one_comes_back(fast: FastTokenizer, actions: np.ndarray) -> None:
    """Each coefficient is off by half a step at most, and the transform is orthonormal: so is the chunk's norm."""
    encoded = fast.encode(actions)
    assert not encoded.outside.any()
    decoded = fast.decode(encoded.ids, horizon=actions.shape[1], dims=actions.shape[2])
    assert decoded.errors == [None] * len(actions)
    off = np.linalg.norm(decoded.actions - actions, axis=1)  # per chunk and dim
    assert (off <= 0.5 / fast.scale * np.sqrt(actions.shape[1]) + 1e-5).all()


@settings(max_examples=100, deadline=None)
@given(
    values=arrays.arrays(np.int64, st.tuples(st.integers(1, 3), st.just(4), st.just(2)), elements=st.integers(-20, 20))
)
def test_every_coefficient_of_the_range_comes_back(fast: FastTokenizer, values: np.ndarray) -> None:
    low, high = fast.span
    assert (low, high) == (-20, 20)  # ceil(8 * sqrt(6)): all that chunks within [-1, 1] can have
    actions = scipy.fft.idct(values / fast.scale, axis=1, norm="ortho")
    encoded = fast.encode(actions)
    back = fast.decode(encoded.ids, horizon=4, dims=2).actions
    np.testing.assert_array_equal(dct_coefficients(back, fast.scale), values)


def test_frequent_runs_become_one_token(fast: FastTokenizer) -> None:
    lengths = [len(ids) for ids in fast.encode(walks(2)).ids]
    assert np.mean(lengths) < 0.75 * 6 * 3
    still = fast.encode(np.zeros((1, 6, 3), np.float32)).ids[0]
    assert len(still) <= 5


def test_low_frequencies_come_first(fast: FastTokenizer) -> None:
    """A constant chunk has one coefficient per dim, at the front: sqrt(H) times its value, times scale."""
    constant = np.tile(np.array([0.5, -0.25, 0], np.float32), (1, 4, 1))
    np.testing.assert_array_equal(dct_coefficients(constant, SCALE)[0, 0], [8, -4, 0])
    assert not dct_coefficients(constant, SCALE)[0, 1:].any()


def test_what_is_outside_is_an_error_or_counted(fast: FastTokenizer) -> None:
    actions = walks(3, count=3)
    actions[1, :, 2] = 5.0  # 5 * 8 * sqrt(6) = 98
    with pytest.raises(
        FastError, match=r"1 DCT coefficients of 54 .*expected -20 to 20: 98 at frequency 0 of dim 2 of "
    ):
        fast.encode(actions)
    encoded = fast.encode(actions, outside="saturate")
    np.testing.assert_array_equal(encoded.outside, [0, 1, 0])
    back = dct_coefficients(fast.decode(encoded.ids, horizon=6, dims=3).actions, SCALE)
    expected = np.clip(dct_coefficients(actions, SCALE), -20, 20)
    np.testing.assert_array_equal(back, expected)
    actions[2, 1, 1] = np.nan
    for outside in ("error", "saturate", "released"):
        with pytest.raises(FastError, match=r"chunk 2: action dim 1 of step 1 is nan, expected finite numbers"):
            fast.encode(actions, outside=outside)


def test_what_is_no_chunk_is_an_error_and_never_zeros(fast: FastTokenizer) -> None:
    ids = fast.encode(walks(4, count=2)).ids
    decoded = fast.decode(
        [ids[0], ids[1][:-1], np.array([fast.vocab_size, -1]), np.zeros(0, np.int32)], horizon=6, dims=3
    )
    assert decoded.errors[0] is None
    assert np.isnan(decoded.actions[1:]).all()
    assert [str(e) for e in decoded.errors[2:]] == [
        f"chunk 2: ids [{fast.vocab_size}, -1] are not in the vocabulary, expected 0 to {fast.vocab_size - 1}",
        "chunk 3: 0 coefficients, expected 18",
    ]
    assert "coefficients, expected 18" in str(decoded.errors[1])


# ---- Decoding step by step -------------------------------------------------------------------------------------------


def assert_tables_agree(fast: FastTokenizer, seed: int) -> None:
    """Walks the automaton over random tokens, and compares with the library's decoding of them all."""
    tables, rng = fast.tables(12), np.random.default_rng(seed)
    words = tables.following.shape[1]
    assert words == fast.vocab_size
    for _ in range(300):
        state, ids, values = 0, [], []
        for _ in range(int(rng.integers(1, 8))):
            choice = rng.choice(np.flatnonzero(tables.following[state] >= 0))
            values += tables.values[state, choice, : tables.count[state, choice]].tolist()
            ids.append(int(choice))
            state = int(tables.following[state, choice])
        whole = fast.decode([np.array(ids)], horizon=max(len(values), 1), dims=1)
        assert (whole.errors[0] is None) == (state == 0 and bool(values))
        if whole.errors[0] is None:
            np.testing.assert_array_equal(
                dct_coefficients(whole.actions.astype(np.float64), fast.scale)[0, :, 0], values
            )
    # Every token alone: possible and complete is what the library decodes to as many coefficients.
    for word in range(words):
        complete = tables.following[0, word] == 0
        size = int(tables.count[0, word]) if complete else 1
        assert (fast.decode([np.array([word])], horizon=size, dims=1).errors[0] is None) == complete
    assert tables.least[0, 0] == 0
    assert (tables.least[1:, 0] >= 1).all()
    # A coefficient more never takes more tokens than that coefficient alone.
    assert (np.diff(tables.least[:, 0]) <= tables.least[1, 0]).all()


def test_tables_agree_with_the_library(fast: FastTokenizer) -> None:
    assert_tables_agree(fast, 0)


def released_kind(offset: int) -> FastTokenizer:
    """Fitted as the released one is: merges of bytes, in words as a regular expression splits them."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    codes = dct_coefficients(walks(0), SCALE) - offset
    texts = ["".join(map(chr, row)) for row in codes.reshape(len(codes), -1).tolist()]
    bpe.train_from_iterator(texts, vocab_size=400, min_frequency=2, special_tokens=[], show_progress=False)
    config = {"scale": SCALE, "min_token": offset, "vocab_size": 400}
    return FastTokenizer(FastFiles(json.dumps(config), bpe.to_str(), "{}", "{}"))


def test_tables_of_released_tokenizers_agree_with_the_library(golden: Path) -> None:
    """Their tokens may end in the middle of a character."""
    released = released_kind(-200)
    tables = released.tables(4)
    assert len(tables.following) > 2
    assert (tables.following[0] > 0).any()
    assert_tables_agree(released, 1)
    encoded = released.encode(walks(0))
    assert not encoded.outside.any()
    assert released.decode(encoded.ids, horizon=6, dims=3).errors == [None] * 300
    directory = golden / "item7_fast_tokenizer"
    if directory.is_dir():
        assert_tables_agree(FastTokenizer.load(directory), 2)


# ---- Files and fitting -----------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(fast: FastTokenizer, tmp_path: Path) -> None:
    fast.save(tmp_path)
    again = FastTokenizer.load(tmp_path)
    assert again.files == fast.files
    assert (again.span, again.scale, again.vocab_size) == (fast.span, fast.scale, fast.vocab_size)
    for a, b in zip(fast.encode(walks(5)).ids, again.encode(walks(5)).ids, strict=True):
        np.testing.assert_array_equal(a, b)


def test_fitting_is_deterministic_and_takes_a_range() -> None:
    given = [dct_coefficients(walks(0), SCALE)]
    one, two = (fit_fast(given, scale=SCALE, vocab_size=100, span=(-30, 40)) for _ in range(2))
    assert one.files == two.files
    assert one.span == (-30, 40)


def test_what_cannot_be_fitted_is_refused() -> None:
    given = [dct_coefficients(walks(0), SCALE)]
    with pytest.raises(FastError, match=r"no chunks to fit to"):
        fit_fast([], scale=SCALE, vocab_size=100)
    with pytest.raises(FastError, match=r"\d+ coefficients lie outside span=\(-1, 1\): they go from -\d+ to \d+"):
        fit_fast(given, scale=SCALE, vocab_size=100, span=(-1, 1))
    with pytest.raises(FastError, match=r"vocab_size=41, expected more than the 41 coefficients from -20 to 20"):
        fit_fast(given, scale=SCALE, vocab_size=41)


def test_files_that_are_no_processor_are_refused(fast: FastTokenizer, tmp_path: Path) -> None:
    with pytest.raises(FastError, match=r"lacks processor_config.json, tokenizer.json, .*; there: no such directory"):
        FastTokenizer.load(tmp_path / "nowhere")
    fast.save(tmp_path)
    (tmp_path / FILES[3]).unlink()
    with pytest.raises(FastError, match=r"lacks special_tokens_map.json; there: \['processor_config.json', "):
        FastTokenizer.load(tmp_path)
    config = json.loads(fast.files.processor_config)
    renamed = {**{k: v for k, v in config.items() if k != "min_token"}, "min_tokens": -20}
    broken = dataclasses.replace(fast.files, processor_config=json.dumps(renamed), tokenizer='{"version": "1.0"')
    with pytest.raises(FastError) as e:
        FastTokenizer(broken)
    for text in ("min_token is None, expected an integer; did you mean 'min_tokens'?", "tokenizer.json: "):
        assert text in str(e.value)
    for wrong, text in (
        ("[]", "holds a list, expected an object"),
        ("{}", "scale is None, expected a number above 0"),
        (json.dumps({**config, "scale": 0}), "scale is 0, expected a number above 0; take the processor's own file"),
        (json.dumps({**config, "min_token": -1.5}), "min_token is -1.5, expected an integer"),
        (json.dumps({**config, "vocab_size": True}), "vocab_size is True, expected an integer above 0"),
    ):
        with pytest.raises(FastError, match=re.escape(f"processor_config.json: {text}")):
            FastTokenizer(dataclasses.replace(fast.files, processor_config=wrong))
    other = dataclasses.replace(fast.files, processor_config=json.dumps({**config, "vocab_size": 50}))
    with pytest.raises(FastError, match=r"processor_config.json says 50; the files belong to different processors"):
        FastTokenizer(other)
