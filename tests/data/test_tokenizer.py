"""Tokenizers: text there and back, what transformers makes of the same, files that are damaged."""

import dataclasses
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from openpi_like.config import from_json, to_json
from openpi_like.data.huggingface import HuggingFaceTokenizer
from openpi_like.data.sentencepiece_model import SentencePieceTokenizer, fit_text_tokenizer
from openpi_like.data.text import read_tokenizer
from openpi_like.data.tokenizer import Tokenizer
from tests.data import chat

GOLDEN = Path(__file__).with_name("golden") / "chat.json"
PIECES = fit_text_tokenizer(["open the drawer"], 300)
CHAT = HuggingFaceTokenizer(chat.tokenizer_json(), json.dumps(chat.CONFIG), chat.QWEN)
BOTH = pytest.mark.parametrize("tokenizer", [PIECES, CHAT], ids=["sentencepiece", "huggingface"])


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


# ---- Text ------------------------------------------------------------------------------------------------------------


@BOTH
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=20))
@example("<|im_end|>")
@example("<s></s>")
@example(" a\t\n\n b ")
def test_any_text_there_and_back(tokenizer: Tokenizer, text: str) -> None:
    """The names of special tokens too: what a robot is told cannot end a turn."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.replace("\u2581", " " if tokenizer is PIECES else "\u2581")
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id}
    assert not special.intersection(ids)


def test_special_tokens() -> None:
    p, h = PIECES, CHAT
    assert (p.pad_id, p.eos_id, p.bos_id, p.unk_id) == (0, 1, 2, 3)
    assert (p.token_id("</s>"), p.token_id("\n")) == (1, 4)
    assert [h.token_id(piece) for piece in chat.SPECIAL] == list(range(h.vocab_size - len(chat.SPECIAL), h.vocab_size))
    assert (h.bos_id, h.unk_id) == (None, None)
    assert h.eos_id == h.token_id("<|im_end|>")
    assert h.pad_id == h.token_id("<|endoftext|>")
    assert p.decode([2, *p.encode("open"), 1]) == "open"
    assert h.decode([*h.encode("open"), h.token_id("<|im_end|>")]) == "open"
    assert h.encode_marked("a<|im_end|>") == [*h.encode("a"), h.eos_id]
    assert p.encode_marked("a</s>") == p.encode("a</s>")
    assert h.marks("<|im_start|> and <image>, <|im_end|") == ["<|im_start|>", "<image>"]
    assert p.marks("<s>") == []


def test_tokens_that_are_not_there_are_told_with_near_names() -> None:
    with pytest.raises(ValueError, match=r"no token '<\|im_stop\|>' among the \d+ .* did you mean '<\|im_start\|>'"):
        CHAT.token_id("<|im_stop|>")
    with pytest.raises(ValueError, match=r"no token 'zz zz' .* special tokens, known: '<\|endoftext\|>'"):
        CHAT.token_id("zz zz")
    with pytest.raises(ValueError, match=r"no token '<eos>' .* special tokens, .*'</s>'"):
        PIECES.token_id("<eos>")
    with pytest.raises(ValueError, match=r"the HuggingFaceTokenizer has no BOS token, which begins every prompt"):
        CHAT.required("bos")
    with pytest.raises(ValueError, match=r"has no EOS token, which ends every answer; choose another tokenizer"):
        HuggingFaceTokenizer(CHAT.tokenizer).required("eos")


def test_texts_of_transformers(golden: dict[str, Any]) -> None:
    for case in golden["plain"]:
        assert CHAT.encode(case["text"]) == case["ids"]
        assert CHAT.decode(case["ids"]) == case["decoded"] == case["text"]


# ---- Chats -----------------------------------------------------------------------------------------------------------


def test_chats_of_transformers(golden: dict[str, Any]) -> None:
    """`apply_chat_template` gives the same text and the same ids."""
    assert {case["template"] for case in golden["cases"]} == set(chat.TEMPLATES)
    for case in golden["cases"]:
        tokenizer = dataclasses.replace(CHAT, template=chat.TEMPLATES[case["template"]])
        text = tokenizer.render_chat(case["messages"])
        assert text == case["text"]
        assert tokenizer.encode_marked(text) == case["ids"]


def test_a_template_is_found_where_models_keep_it(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x"}]
    jinja = HuggingFaceTokenizer.read(chat.write(tmp_path / "jinja", chat.TEXT))
    expected = jinja.render_chat(messages)
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": chat.TEXT}]
    for name, found in (("text", chat.TEXT), ("list", named)):
        directory = chat.write(tmp_path / name, None)
        (directory / "tokenizer_config.json").write_text(json.dumps({**chat.CONFIG, "chat_template": found}))
        assert read_tokenizer(directory).render_chat(messages) == expected
    (chat.write(tmp_path / "json", None) / "chat_template.json").write_text(json.dumps({"chat_template": chat.TEXT}))
    assert read_tokenizer(tmp_path / "json" / "tokenizer.json").render_chat(messages) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"no chat template: neither chat_template.jinja nor chat_template in tokenizer_config.json"),
        ("{% if %}", r"the chat template cannot be read, line 1: Expected an expression"),
        ("{{ raise_exception('no system') }}", r"the chat template fails: TemplateError: no system; its model may"),
        ("{{ messages[0].content + 1 }}", r"the chat template fails: TypeError"),
        ("{{ ''.__class__.__mro__ }}", r"the chat template fails: SecurityError"),  # no way out of the sandbox
        ("{{ messages.append(1) }}", r"the chat template fails: SecurityError"),
        ("{{ strftime_now('%Y') }}", r"the chat template fails: UndefinedError: 'strftime_now' is undefined"),
    ],
)
def test_templates_that_fail(template: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CHAT, template=template).render_chat([{"role": "user", "content": "x"}])
    with pytest.raises(ValueError, match=r"a SentencePieceTokenizer has no chat template; give the directory"):
        PIECES.render_chat([])


# ---- Files -----------------------------------------------------------------------------------------------------------


@BOTH
def test_stored_whole_pickled_and_shared_by_threads(tokenizer: Tokenizer) -> None:
    again = from_json(json.loads(json.dumps(to_json(tokenizer))))
    assert again == tokenizer
    assert hash(again) == hash(tokenizer)
    assert len(repr(tokenizer)) < 100  # in messages
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy == tokenizer
    texts = [f"open drawer {i}" for i in range(200)]
    expected = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:  # what is built is built while they wait for it
        assert list(pool.map(copy.encode, texts)) == expected


def test_read_from_a_path(tmp_path: Path) -> None:
    (tmp_path / "text.model").write_bytes(PIECES.content())
    assert read_tokenizer(tmp_path / "text.model") == PIECES
    assert read_tokenizer(chat.write(tmp_path / "chat")) == CHAT
    assert read_tokenizer(str(tmp_path / "chat" / "tokenizer.json")) == CHAT
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "tokenizer.json").write_text(CHAT.tokenizer)
    assert read_tokenizer(tmp_path / "alone") == HuggingFaceTokenizer(CHAT.tokenizer)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "text.model").write_bytes(PIECES.content())
    with pytest.raises(FileNotFoundError, match=r"no tokenizer .*txt.model; did you mean 'text.model'"):
        read_tokenizer(tmp_path / "txt.model")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer .*text.model; its directory is empty or missing"):
        read_tokenizer(tmp_path / "no" / "text.model")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json in .*; known: 'text.model'"):
        read_tokenizer(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json in .*empty; it is empty"):
        read_tokenizer(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", CHAT.tokenizer[:-100], r"tokenizer.json \([\d,]+ characters\) cannot be read: .*; it is"),
        ("tokenizer.json", "{}", r"tokenizer.json \(2 characters\) cannot be read: "),
        ("tokenizer_config.json", "{", r"tokenizer_config.json is not JSON: "),
        ("tokenizer_config.json", "[]", r"tokenizer_config.json holds a list, expected a JSON object"),
        ("tokenizer_config.json", '{"eos_token": "<|im_and|>"}', r"eos_token: no token .* did you mean '<\|im_end\|>'"),
        ("tokenizer_config.json", '{"eos_token": 3}', r"eos_token=3, expected a string or null"),
        ("chat_template.jinja", "{% for %}", r"chat template cannot be read, line 1"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (chat.write(tmp_path / "chat") / name).write_text(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path / 'chat'}: .*{message}"):
        read_tokenizer(tmp_path / "chat")


def test_another_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "norm_stats.json").write_text("{}")
    with pytest.raises(ValueError, match=r"norm_stats.json: tokenizer.json \(2 characters\) cannot be read"):
        read_tokenizer(tmp_path / "norm_stats.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"\(0 bytes\)"),
        (b"nope", r"\(4 bytes\): .*; give the .model file"),
        (PIECES.content()[:-50], r"\(4\d+ bytes\)"),
    ],
)
def test_what_is_no_model(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "text.model").write_bytes(content)
    with pytest.raises(ValueError, match=rf"text.model: not a SentencePiece model {message}"):
        read_tokenizer(tmp_path / "text.model")
    with pytest.raises(ValueError, match=r"the SentencePiece model \(3 characters\) is not base64"):
        SentencePieceTokenizer("###").encode("a")
