"""FAST against vectors of the released processor: ids and decodes exact, also where it fails."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openpi_like.batch import ActionTokens
from openpi_like.data.fast import FILES, FastError, FastTokenizer, dct_coefficients
from openpi_like.data.prompts import FastPrompt
from openpi_like.data.sentencepiece_model import SentencePieceTokenizer
from openpi_like.data.text import TextTokenizer


@pytest.fixture(scope="module")
def stored(golden: Path) -> dict[str, np.ndarray]:
    path = golden / "item7_fast_tokenizer.npz"
    if not path.is_file():
        pytest.skip(f"no golden vectors: {path} is absent")
    return dict(np.load(path))


@pytest.fixture(scope="module")
def fast(golden: Path) -> FastTokenizer:
    if not (golden / "item7_fast_tokenizer").is_dir():
        pytest.skip("no golden vectors: item7_fast_tokenizer is absent")
    return FastTokenizer.load(golden / "item7_fast_tokenizer")


def unpadded(stored: dict[str, np.ndarray], prefix: str = "") -> list[np.ndarray]:
    rows = zip(stored[f"{prefix}token_ids_padded"], stored[f"{prefix}token_lengths"], strict=True)
    return [row[:n] for row, n in rows]


def assert_rows(got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_golden_fast_coefficients(stored: dict[str, np.ndarray]) -> None:
    got = dct_coefficients(stored["test_chunks"], float(stored["scale"]))
    np.testing.assert_array_equal(got, stored["dct_quantized"])


def test_golden_fast_ids(stored: dict[str, np.ndarray], fast: FastTokenizer) -> None:
    encoded = fast.encode(stored["test_chunks"])
    assert_rows(encoded.ids, unpadded(stored))
    assert not encoded.outside.any()
    ends = np.cumsum(stored["train_token_lengths"])[:-1]
    assert_rows(fast.encode(stored["train_chunks"]).ids, np.split(stored["train_token_ids_flat"], ends))


def test_golden_fast_decodes(stored: dict[str, np.ndarray], fast: FastTokenizer) -> None:
    horizon, dims = stored["decoded"].shape[1:]
    decoded = fast.decode(unpadded(stored), horizon=horizon, dims=dims)
    assert decoded.errors == [None] * len(stored["decoded"])
    np.testing.assert_array_equal(decoded.actions, stored["decoded"].astype(np.float32))


def test_golden_fast_out_of_range(stored: dict[str, np.ndarray], fast: FastTokenizer) -> None:
    """What the reference clamps and drops silently is an error, or counted; its zeros are errors."""
    actions = stored["edge/actions"]
    encoded = fast.encode(actions, outside="released")
    assert_rows(encoded.ids, unpadded(stored, "edge/"))
    horizon, dims = actions.shape[1:]
    decoded = fast.decode(encoded.ids, horizon=horizon, dims=dims)
    for i, error in enumerate(decoded.errors):
        if error is None:
            np.testing.assert_array_equal(decoded.actions[i], stored["edge/decoded"][i].astype(np.float32))
        else:
            assert not stored["edge/decoded"][i].any()
            assert np.isnan(decoded.actions[i]).all()
            assert f"coefficients, expected {horizon * dims}" in str(error)
    outside = encoded.outside > 0
    assert outside.any()
    for i, chunk in enumerate(actions):
        if not outside[i]:
            fast.encode(chunk[None])
            continue
        with pytest.raises(FastError, match=r"DCT coefficients of \d+ cannot be encoded, expected -?\d+ to \d+"):
            fast.encode(chunk[None])
    saturated = fast.encode(actions, outside="saturate")
    np.testing.assert_array_equal(saturated.outside, encoded.outside)
    again = fast.decode(saturated.ids, horizon=horizon, dims=dims)
    assert again.errors == [None] * len(actions)
    low, high = fast.span
    back = dct_coefficients(again.actions, fast.scale)
    assert (back >= low).all()
    assert (back <= high).all()
    inside = ~outside
    np.testing.assert_array_equal(back[inside], dct_coefficients(actions, fast.scale)[inside])


def test_golden_fast_malformed_tokens_are_errors(stored: dict[str, np.ndarray], fast: FastTokenizer) -> None:
    ids = unpadded(stored)
    broken = [ids[0][:-1], np.append(ids[0], ids[0][-1]), ids[0][:0], ids[1][:3]]
    assert not stored["edge/malformed_decoded"].any()  # the reference returns zeros
    horizon, dims = stored["decoded"].shape[1:]
    decoded = fast.decode(broken, horizon=horizon, dims=dims)
    assert np.isnan(decoded.actions).all()
    assert all(e is not None for e in decoded.errors)


def test_golden_fast_files_are_written_unchanged(golden: Path, fast: FastTokenizer, tmp_path: Path) -> None:
    fast.save(tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (golden / "item7_fast_tokenizer" / name).read_bytes()


# ---- Prompts with action tokens --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(golden: Path) -> tuple[SentencePieceTokenizer, dict[str, Any]]:
    model, path = golden / "item8_tiny_text_tokenizer.model", golden / "item8_tokenization.npz"
    if not (model.is_file() and path.is_file()):
        pytest.skip("no golden vectors: item8 is absent")
    return SentencePieceTokenizer.of(model.read_bytes()), dict(np.load(path))


def test_golden_fast_prompts(texts: tuple[SentencePieceTokenizer, dict[str, Any]], fast: FastTokenizer) -> None:
    model, z = texts
    tokens = ActionTokens(max_len=250)
    for i in sorted({k.split("/")[0] for k in z if "/" in k}):
        prompt, state, actions = str(z[f"{i}/prompt"]), z[f"{i}/state"], z[f"{i}/actions"]
        at = {k.removeprefix(f"{i}/pi0fast/"): v for k, v in z.items() if k.startswith(f"{i}/pi0fast/")}
        room = len(at["long/tokens"])
        text = TextTokenizer(model, room - 100, prompt_format=FastPrompt(), answer_len=100)
        action_ids = tokens.first(text.vocab_size) - fast.encode(actions[None]).ids[0]
        row = text.encode_actions(prompt, state, action_ids)
        for name, got in (("tokens", row.prompt), ("mask", row.prompt_mask), ("ar_mask", row.prompt_causal)):
            np.testing.assert_array_equal(got, at[f"long/{name}"], err_msg=name)
        np.testing.assert_array_equal(row.prompt_loss, at["long/loss_mask"])
        np.testing.assert_array_equal(row.prompt_action, row.prompt_causal)
        # Where the reference cuts the end off, and with it the end marker, we refuse.
        short = len(at["short/tokens"])
        np.testing.assert_array_equal(row.prompt[:short], at["short/tokens"])
        if at["short/mask"].all() and row.prompt_mask.sum() > short:
            with pytest.raises(ValueError, match=rf"tokens .* for actions.*prompt_len={short - 10} \+ answer_len=10"):
                TextTokenizer(model, short - 10, prompt_format=FastPrompt(), answer_len=10).encode_actions(
                    prompt, state, action_ids
                )
        ids, mask = TextTokenizer(model, len(at["prefix_only/tokens"]), prompt_format=FastPrompt()).encode(
            prompt, state
        )
        np.testing.assert_array_equal(ids, at["prefix_only/tokens"])
        np.testing.assert_array_equal(mask, at["prefix_only/mask"])


def test_golden_fast_extracted_actions(
    texts: tuple[SentencePieceTokenizer, dict[str, Any]], fast: FastTokenizer
) -> None:
    """From generated ids back to actions: between "Action: " and "|"."""
    model, z = texts
    tokens = ActionTokens(max_len=100)
    for i in sorted({k.split("/")[0] for k in z if "/" in k}):
        written = z[f"{i}/pi0fast/generated_tokens"].astype(int)
        text = TextTokenizer(model, 100, prompt_format=FastPrompt(), answer_len=20)
        begin = text.action_indicator()
        assert written[: len(begin)].tolist() == begin
        first = tokens.first(text.vocab_size)
        ids = first - written[len(begin) :]
        end = text.encode_actions("", np.zeros(1), np.zeros(0, np.int32)).prompt_action.sum() - len(
            begin
        )  # "|" and EOS
        stop = int(np.argmax(written == 1)) + 1 - int(end) - len(begin)
        expected = z[f"{i}/pi0fast/extracted_actions"]
        decoded = fast.decode([ids[:stop]], horizon=expected.shape[0], dims=expected.shape[1])
        assert decoded.errors == [None]
        np.testing.assert_allclose(decoded.actions[0], expected, atol=1e-6)
