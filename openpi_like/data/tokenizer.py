"""What every tokenizer of text is: text to ids and back. One file for each kind: `sentencepiece_model`, `huggingface`.

A tokenizer is a frozen dataclass that holds its files whole, so that a checkpoint stores it, and serving needs no other
file. What is built from them is built when it is first needed, and is not pickled.
"""

import abc
import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from openpi_like.config import near_names

# A turn of a conversation: {"role": "user", "content": a string, or a list of {"type": "text", "text": ...} and
# {"type": "image"}}, as chat templates of Hugging Face expect it.
Message = Mapping[str, Any]


class Tokenizer(abc.ABC):
    """Text as token ids and back. Implementations are frozen dataclasses, safe to use from several threads.

    Everything raises ValueError where the files that it holds are damaged, from the first use on.
    """

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of ids: the highest one plus 1."""

    @property
    @abc.abstractmethod
    def bos_id(self) -> int | None:
        """The token that begins a text, None where there is none, as in Qwen."""

    @property
    @abc.abstractmethod
    def eos_id(self) -> int | None:
        """The token that ends an answer."""

    @property
    @abc.abstractmethod
    def pad_id(self) -> int | None:
        """The token that fills up rows elsewhere; here padding is 0 and masked, whatever the tokenizer."""

    @property
    @abc.abstractmethod
    def unk_id(self) -> int | None:
        """The token for what cannot be encoded, None where everything can."""

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text` alone; the name of a special token in it is text like any other."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, special tokens left out."""

    @abc.abstractmethod
    def token_id(self, piece: str) -> int:
        """Returns the id of a token by its exact piece, such as "<|im_start|>".

        Raises:
            ValueError: there is none; with near names.
        """

    # ---- Chats -------------------------------------------------------------------------------------------------------

    def render_chat(self, messages: Sequence[Message]) -> str:
        """Returns a conversation as text, with the header that an answer follows.

        Raises:
            ValueError: there is no chat template, or it fails.
        """
        raise ValueError(
            f"a {type(self).__name__} has no chat template; give the directory with tokenizer.json and "
            "tokenizer_config.json of a chat model, or choose another prompt_format"
        )

    def encode_marked(self, text: str) -> list[int]:
        """Returns ids of a text in which special tokens are written by name, as `render_chat` gives it."""
        return self.encode(text)

    def marks(self, text: str) -> list[str]:
        """Returns the special tokens that `encode_marked` would find in `text`."""
        return []

    def required(self, which: Literal["bos", "eos"]) -> int:
        """Returns the id of BOS or EOS.

        Raises:
            ValueError: the tokenizer has none.
        """
        found = {"bos": self.bos_id, "eos": self.eos_id}[which]
        if found is None:
            what = {"bos": "begins every prompt of this format", "eos": "ends every answer"}[which]
            raise ValueError(
                f"the {type(self).__name__} has no {which.upper()} token, which {what}; choose another tokenizer, or a "
                "prompt_format without it"
            )
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the files alone."""
        assert dataclasses.is_dataclass(self)
        return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def missing_token(piece: str, vocab_size: int, special: Sequence[str]) -> ValueError:
    """Returns the error for a token that is not there. special: those to propose instead."""
    near = difflib.get_close_matches(piece, special, n=3, cutoff=0.5) or special[:20]
    end = f"; of its special tokens, {near_names(piece, near)}" if near else "; it has no special tokens"
    return ValueError(f"no token {piece!r} among the {vocab_size} of the tokenizer{end}")
