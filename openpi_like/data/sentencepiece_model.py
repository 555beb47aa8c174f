"""SentencePiece models as tokenizers: those of PaliGemma, pi0 and Llama 2, and our own, fitted to a mixture's texts."""

import base64
import binascii
import dataclasses
import functools
import io
from collections.abc import Iterable
from typing import Any

import sentencepiece

from openpi_like.data.tokenizer import Tokenizer, missing_token


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. model: its file's content, base64; `of` makes it from bytes."""

    model: str = dataclasses.field(repr=False)

    @classmethod
    def of(cls, model: bytes) -> "SentencePieceTokenizer":
        """Returns the tokenizer of a model file's content. What is no model is an error when it is first used."""
        return cls(base64.b64encode(model).decode("ascii"))

    def content(self) -> bytes:
        """Returns the model file's content.

        Raises:
            ValueError: `model` is not base64.
        """
        try:
            return base64.b64decode(self.model, validate=True)
        except binascii.Error as e:
            raise ValueError(f"the SentencePiece model ({len(self.model)} characters) is not base64: {e}") from e

    @functools.cached_property
    def _processor(self) -> Any:
        content = self.content()
        try:
            if not content:
                raise RuntimeError("empty")
            return sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as e:
            raise ValueError(
                f"not a SentencePiece model ({len(content)} bytes): {e}; give the .model file, or for a tokenizer.json "
                "of Hugging Face that file or its directory"
            ) from e

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def bos_id(self) -> int | None:
        return _there(self._processor.bos_id())

    @property
    def eos_id(self) -> int | None:
        return _there(self._processor.eos_id())

    @property
    def pad_id(self) -> int | None:
        return _there(self._processor.pad_id())

    @property
    def unk_id(self) -> int | None:
        return _there(self._processor.unk_id())

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def token_id(self, piece: str) -> int:
        p = self._processor
        found = p.piece_to_id(piece)  # unknown for what is not there
        if p.id_to_piece(found) != piece:
            special = [p.id_to_piece(i) for i in range(p.vocab_size()) if p.is_control(i) or p.is_unknown(i)]
            raise missing_token(piece, p.vocab_size(), special)
        return found


def _there(token: int) -> int | None:
    return None if token < 0 else token


def fit_text_tokenizer(texts: Iterable[str], vocab_size: int, *, symbols: str = "") -> SentencePieceTokenizer:
    """Fits a byte-pair SentencePiece model that can encode any text (by bytes, where it must), and returns it.

    Special ids are those of Gemma: 0 padding, 1 EOS, 2 BOS, 3 unknown; 4 is a newline. The result depends on the set of
    texts only. It has at most `vocab_size` tokens, fewer where the texts do not yield as many.

    symbols: characters with ids from 5 on, in this order, whatever the texts; they are part of no other token.

    Raises:
        ValueError: no texts, or `vocab_size` is too small for 256 bytes, special tokens and the characters in use.
    """
    cleaned = sorted({text.strip().replace("_", " ").replace("\n", " ") for text in texts} - {""})
    if not cleaned:
        raise ValueError("no texts to fit a tokenizer to, expected at least one that is not empty")
    needed = 4 + 1 + 256 + len(symbols) + len(set("".join(cleaned)) - set(symbols)) + 1
    if vocab_size < needed:
        raise ValueError(f"vocab_size={vocab_size}, expected at least {needed}: bytes, special tokens and characters")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(cleaned),
        model_writer=out,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=["\n", *symbols],
        # As in Gemma: the text is taken as it is, so that nothing a robot is told is lost.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    return SentencePieceTokenizer.of(out.getvalue())
