"""Rows of prompts and answers. The prompts themselves: test_prompts.py, and the golden vectors in tests/models."""

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_like.data.prompts import Pi05Prompt
from openpi_like.data.sentencepiece_model import SentencePieceTokenizer, fit_text_tokenizer
from openpi_like.data.text import TextTokenizer
from tests.data.toy import model_of


def test_batches_are_rows(tokenizer: TextTokenizer) -> None:
    ids, mask = tokenizer.batch(["open the drawer", "", "open the drawer"], [np.zeros(2, np.float32)] * 3)
    np.testing.assert_array_equal(ids[0], ids[2])
    assert ids[1, :2].tolist() == [2, 4]  # BOS and the newline
    assert mask.sum(axis=1).tolist() == [len(np.flatnonzero(row)) for row in ids]


def test_a_state_is_written_into_the_prompt(tokenizer: TextTokenizer) -> None:
    """By hand: floor((x + 1) * 128), 255 from the last edge on, -1 below the range."""
    wide = TextTokenizer(tokenizer.tokenizer, 100, prompt_format=Pi05Prompt())
    state = np.array([-1.01, -1.0, 0.0, 0.004, 0.0079, 1.0, 7.0], np.float32)
    ids, mask = wide.encode(" open_the drawer\n", state)
    assert wide.decode(ids[mask].tolist()) == "Task: open the drawer, State: -1 0 128 128 129 255 255;\nAction: "
    again, _ = wide.batch(["open the drawer"] * 2, [state, state + 1])
    np.testing.assert_array_equal(again[0], ids)
    assert (again[1] != ids).any()
    with pytest.raises(ValueError, match=r"with 7 state values has \d+ tokens, expected at most prompt_len=40"):
        TextTokenizer(tokenizer.tokenizer, 40, prompt_format=Pi05Prompt()).encode("open the drawer", state)
    with pytest.raises(ValueError, match=r"Pi05Prompt\(\) has the state in it, got none; give it"):
        wide.encode("open the drawer")


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=8))
def test_any_text_can_be_encoded_and_read_back(tokenizer: TextTokenizer, text: str) -> None:
    ids, mask = tokenizer.encode(text)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model_of(tokenizer))
    assert 3 not in ids[mask]  # unknown
    cleaned = text.strip().replace("_", " ").replace("\n", " ")
    assert pieces.decode(ids[mask].tolist()) == cleaned.replace("\u2581", " ") + "\n"


def test_fitting_depends_on_the_set_of_texts_only() -> None:
    texts = ["push the T", "pick up the cube", "slide the plate"]
    model = fit_text_tokenizer(texts, 350)
    assert fit_text_tokenizer([*reversed(texts), " push_the T"], 350) == model
    assert fit_text_tokenizer([*texts, "close the window"], 350) != model
    assert TextTokenizer(model, 8).vocab_size <= 350


def test_too_long_too_small_and_not_a_model(tokenizer: TextTokenizer) -> None:
    short = TextTokenizer(tokenizer.tokenizer, 3)
    with pytest.raises(ValueError, match=r"prompt 'zzzz' has 6 tokens, expected at most prompt_len=3; use a larger"):
        short.encode("zzzz")
    assert TextTokenizer(tokenizer.tokenizer, 3, truncate=True).encode("zzzz")[1].tolist() == [True] * 3
    with pytest.raises(ValueError, match="vocab_size=100, expected at least 2"):
        fit_text_tokenizer(["a"], 100)
    with pytest.raises(ValueError, match="no texts"):
        fit_text_tokenizer([" ", ""], 400)
    with pytest.raises(ValueError, match=r"not a SentencePiece model \(4 bytes\)"):
        TextTokenizer(SentencePieceTokenizer.of(b"nope"), 8)
