"""Tokenizers of Hugging Face: a tokenizer.json, and the chat template that comes with it.

Read by the package `tokenizers` and rendered by jinja2, in its sandbox and with the settings of transformers'
`apply_chat_template`; transformers itself is not needed. What transformers adds to a text by itself (BOS, EOS) is not:
a prompt format says what a prompt begins with.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from openpi_like.config import near_names
from openpi_like.data.tokenizer import Message, Tokenizer, missing_token

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclasses.dataclass(frozen=True)
class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json. tokenizer, config, template: the texts of tokenizer.json, tokenizer_config.json (which names
    BOS, EOS and padding; {} where there is none) and of a chat template kept in a file of its own.
    """

    tokenizer: str = dataclasses.field(repr=False)
    config: str = dataclasses.field(default="{}", repr=False)
    template: str | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def read(cls, path: str | Path) -> "HuggingFaceTokenizer":
        """Returns the tokenizer of a directory, or of a tokenizer.json with the files beside it.

        Raises:
            FileNotFoundError: no tokenizer.json.
            ValueError: the files are damaged.
        """
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        at = folder / FILES[0] if path.is_dir() else path
        if not at.is_file():
            there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
            raise FileNotFoundError(
                f"no {at.name} in {folder}; {near_names(at.name, there) if there else 'it is empty'}"
            )
        config, jinja, wrapped = (
            (folder / name).read_text(encoding="utf-8") if (folder / name).is_file() else None for name in FILES[1:]
        )
        if jinja is None and wrapped is not None:
            jinja = _object(wrapped, FILES[3]).get("chat_template")
        found = cls(at.read_text(encoding="utf-8"), "{}" if config is None else config, jinja)
        try:
            found.check()
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from e
        return found

    def check(self) -> None:
        """Builds everything.

        Raises:
            ValueError: the files are damaged, or name special tokens that the vocabulary does not have.
        """
        _ = self._marked, self._special, self._template

    # ---- Tokens ------------------------------------------------------------------------------------------------------

    def _build(self) -> tokenizers.Tokenizer:
        try:
            built = tokenizers.Tokenizer.from_str(self.tokenizer)
        except Exception as e:  # the library raises bare Exception
            raise ValueError(
                f"tokenizer.json ({len(self.tokenizer):,} characters) cannot be read: {e}; it is damaged or not a "
                "tokenizer: take it again from where the weights are"
            ) from e
        built.no_truncation()
        built.no_padding()
        return built

    @functools.cached_property
    def _marked(self) -> tokenizers.Tokenizer:
        """Finds special tokens in a text."""
        return self._build()

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """Takes the names of special tokens as text."""
        built = self._build()
        built.encode_special_tokens = True
        return built

    @functools.cached_property
    def _special_pieces(self) -> list[str]:
        return [token.content for token in self._marked.get_added_tokens_decoder().values() if token.special]

    @functools.cached_property
    def _config(self) -> dict[str, Any]:
        return _object(self.config, FILES[1])

    @functools.cached_property
    def _special(self) -> dict[str, str]:
        """The pieces of BOS, EOS, padding and unknown by their names in tokenizer_config.json, where it has them."""
        named = {}
        for name in _NAMED:
            piece = self._config.get(name)
            piece = piece.get("content") if isinstance(piece, dict) else piece
            if piece is None:
                continue
            if not isinstance(piece, str):
                raise ValueError(f"tokenizer_config.json: {name}={piece!r}, expected a string or null")
            try:
                self.token_id(piece)
            except ValueError as e:
                raise ValueError(f"tokenizer_config.json: {name}: {e}; the files belong to different tokenizers") from e
            named[name] = piece
        return named

    def _named_id(self, name: str) -> int | None:
        piece = self._special.get(name)
        return None if piece is None else self.token_id(piece)

    @functools.cached_property
    def _vocab_size(self) -> int:
        return 1 + max(self._marked.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def bos_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        return self._named_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        return self._named_id("pad_token")

    @property
    def unk_id(self) -> int | None:
        return self._named_id("unk_token")

    def encode(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._marked.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_id(self, piece: str) -> int:
        found = self._marked.token_to_id(piece)
        if found is None:
            raise missing_token(piece, self.vocab_size, self._special_pieces)
        return found

    # ---- Chats -------------------------------------------------------------------------------------------------------

    def encode_marked(self, text: str) -> list[int]:
        return self._marked.encode(text, add_special_tokens=False).ids

    def marks(self, text: str) -> list[str]:
        return [piece for piece in self._special_pieces if piece in text]

    @functools.cached_property
    def _template(self) -> jinja2.Template | None:
        source = self.template
        if source is None:
            source = self._config.get("chat_template")
            if isinstance(source, list):  # several, by name
                by_name = {of.get("name"): of.get("template") for of in source if isinstance(of, dict)}
                source = by_name.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise ValueError(f"tokenizer_config.json: chat_template is a {type(source).__name__}, expected a string")
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.globals["raise_exception"] = _refuse
        # Templates are given no clock: what a policy reads must not depend on the day.
        environment.filters["tojson"] = _tojson
        try:
            return environment.from_string(source)
        except jinja2.TemplateSyntaxError as e:
            raise ValueError(f"the chat template cannot be read, line {e.lineno}: {e.message}") from e

    def render_chat(self, messages: Sequence[Message]) -> str:
        template = self._template
        if template is None:
            raise ValueError(
                "the tokenizer has no chat template: neither chat_template.jinja nor chat_template in "
                "tokenizer_config.json; give the directory of a chat model, or choose another prompt_format"
            )
        try:
            return template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._special
            )
        except Exception as e:  # anything that an expression of the template raises
            raise ValueError(
                f"the chat template fails: {type(e).__name__}: {e}; its model may expect other messages: set the "
                "system text, or whether images are part of messages, in the prompt_format"
            ) from e


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """jinja2's own escapes what HTML would read."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _object(text: str, name: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as e:
        raise ValueError(f"{name} is not JSON: {e}; take it again from where the weights are") from e
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds a {type(found).__name__}, expected a JSON object")
    return found
