"""Prompts and answers as rows of a fixed length. What they say is up to `prompts`, what ids they have to `tokenizer`.

Letters: S tokens of a prompt, T tokens of an answer, De state dims.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from openpi_like.config import near_names
from openpi_like.data.config import PolicyShape
from openpi_like.data.huggingface import HuggingFaceTokenizer
from openpi_like.data.prompts import Pi0Prompt, PromptFormat
from openpi_like.data.sentencepiece_model import SentencePieceTokenizer
from openpi_like.data.tokenizer import Tokenizer


class TextRow(NamedTuple):
    """A prompt and its answer, (S + T,) each: see the fields of the same names in `openpi_like.batch.TextBatch`."""

    prompt: np.ndarray
    prompt_mask: np.ndarray
    prompt_causal: np.ndarray
    prompt_loss: np.ndarray
    prompt_action: np.ndarray


class TextTokenizer:
    """Writes prompts and answers as padded rows of ids. Safe to use from several threads.

    image_slots: after how many ids of a prompt each camera's image tokens go, see `PromptFormat.image_slots`.
    before_images: the ids before the last of them, which all prompts begin with.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_len: int,
        *,
        prompt_format: PromptFormat = Pi0Prompt(),
        cameras: int = 1,
        answer_len: int = 0,
        truncate: bool = False,
    ) -> None:
        """
        Args:
            tokenizer: of the text.
            prompt_len: S, tokens that a prompt is padded to.
            prompt_format: how prompts and answers are written.
            cameras: how many images a prompt is about.
            answer_len: T, tokens of an answer at most, added to what a prompt is padded to; 0 where the two share
                `prompt_len`.
            truncate: cut prompts that are too long instead of raising.

        Raises:
            ValueError: the tokenizer's files are damaged, or it lacks what the format needs.
        """
        self.tokenizer, self.prompt_format, self.cameras = tokenizer, prompt_format, cameras
        self.prompt_len, self.answer_len, self.truncate = prompt_len, answer_len, truncate
        self.vocab_size = tokenizer.vocab_size
        self.image_slots = prompt_format.image_slots(tokenizer, cameras)
        self.before_images = prompt_format.leading(tokenizer, cameras)[: max(self.image_slots, default=0)]
        if len(self.before_images) > prompt_len:
            raise ValueError(
                f"prompts of {prompt_format} have {len(self.before_images)} tokens before the last image, expected at "
                f"most prompt_len={prompt_len}; use a larger prompt_len"
            )
        self._cache: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def of_policy(cls, tokenizer: Tokenizer, policy: PolicyShape) -> "TextTokenizer":
        """Returns the one that writes what a policy reads.

        Raises:
            ValueError: see `__init__`.
        """
        return cls(
            tokenizer,
            policy.prompt_len,
            prompt_format=policy.prompt_format,
            cameras=len(policy.cameras),
            answer_len=policy.answer_len,
        )

    # ---- Prompts -----------------------------------------------------------------------------------------------------

    def encode(
        self, text: str, state: Float[np.ndarray, "De"] | None = None
    ) -> tuple[Int32[np.ndarray, "S"], Bool[np.ndarray, "S"]]:
        """Returns ids, 0 where padded, and the mask of real tokens.

        state: normalised, without padding; read where the format has it in the prompt.

        Raises:
            ValueError: the prompt has more than `prompt_len` tokens and is not to be truncated, or needs a state.
        """
        if text in self._cache:
            return self._cache[text]
        tokens = self._prompt(text, state)[: self.prompt_len]
        ids, mask = np.zeros(self.prompt_len, np.int32), np.zeros(self.prompt_len, bool)
        ids[: len(tokens)], mask[: len(tokens)] = tokens, True
        if not self.prompt_format.state_in_prompt:  # few instructions, but no two states are alike
            self._cache[text] = ids, mask
        return ids, mask

    def _prompt(self, text: str, state: np.ndarray | None) -> list[int]:
        if not self.prompt_format.state_in_prompt:
            state = None
        elif state is None:
            raise ValueError(f"prompt {text!r}: {self.prompt_format} has the state in it, got none; give it")
        tokens = self.prompt_format.prompt(self.tokenizer, text, state, self.cameras)
        return self._checked(text, tokens, "" if state is None else f" with {len(state)} state values")

    def _checked(self, text: str, tokens: list[int], values: str) -> list[int]:
        if len(tokens) > self.prompt_len and not self.truncate:
            raise ValueError(
                f"prompt {text!r}{values} has {len(tokens)} tokens, expected at most prompt_len={self.prompt_len}; "
                "use a larger prompt_len or a shorter prompt"
            )
        before = tokens[: len(self.before_images)]
        if before != self.before_images:
            raise ValueError(
                f"prompt {text!r} begins with the tokens {before}, expected {self.before_images}: images have fixed "
                f"places among these in {self.prompt_format}; choose a format with images before the text"
            )
        return tokens

    def batch(
        self, texts: Sequence[str], states: Sequence[Float[np.ndarray, "_"]]
    ) -> tuple[Int32[np.ndarray, "B S"], Bool[np.ndarray, "B S"]]:
        """Returns ids and masks of several prompts; states: see `encode`."""
        rows = [self.encode(text, state) for text, state in zip(texts, states, strict=True)]
        return np.stack([ids for ids, _ in rows]), np.stack([mask for _, mask in rows])

    # ---- Answers -----------------------------------------------------------------------------------------------------

    def encode_answer(self, text: str, answer: str) -> TextRow:
        """Returns a question with a text answer: what the format's backbone is trained on.

        Raises:
            ValueError: too many tokens. An answer is never cut: its end would be lost.
        """
        question = self._checked(text, self.prompt_format.question(self.tokenizer, text, self.cameras), "")
        return self._row(text, question, self.prompt_format.text_answer(self.tokenizer, answer), [])

    def encode_thought(self, text: str, state: Float[np.ndarray, "De"] | None, said: str) -> TextRow:
        """Returns a prompt, and text that is written before acting, "" for none, as the format ends it.

        Raises:
            ValueError: too many tokens.
        """
        return self._row(text, self._prompt(text, state), self.prompt_format.thought(self.tokenizer, said), [])

    def encode_actions(
        self,
        text: str,
        state: Float[np.ndarray, "De"] | None,
        action_ids: Int[np.ndarray, "_"],
        *,
        subtask: str | None = None,
    ) -> TextRow:
        """Returns a prompt with action tokens as its answer, as the format writes it.

        action_ids: as ids of the text vocabulary. subtask: text said before the actions.

        Raises:
            ValueError: too many tokens.
        """
        prompt = self._prompt(text, state)
        said = [] if subtask is None else self.prompt_format.subtask(self.tokenizer, subtask)
        return self._row(text, prompt, said, self.prompt_format.action_answer(self.tokenizer, action_ids.tolist()))

    def structure_ids(self) -> set[int]:
        """Returns the ids that give an answer its form, see `PromptFormat.structure_ids`."""
        return self.prompt_format.structure_ids(self.tokenizer)

    def action_indicator(self) -> list[int]:
        """Returns the tokens that announce actions in an answer, see `PromptFormat.action_indicator`."""
        return self.prompt_format.action_indicator(self.tokenizer)

    def _row(self, text: str, prompt: list[int], said: list[int], actions: list[int]) -> TextRow:
        room, answer = self.prompt_len + self.answer_len, len(said) + len(actions)
        total = len(prompt) + answer
        if total > room or (self.answer_len and answer > self.answer_len):
            raise ValueError(
                f"prompt {text!r} with its answer has {len(prompt)} + {answer} tokens ({len(actions)} of them for "
                f"actions), expected at most prompt_len={self.prompt_len} + answer_len={self.answer_len}; enlarge one"
            )
        at = np.arange(room)
        ids = np.zeros(room, np.int32)
        ids[:total] = [*prompt, *said, *actions]
        real, causal = at < total, (at >= len(prompt)) & (at < total)
        return TextRow(ids, real, causal, causal, causal & (at >= len(prompt) + len(said)))

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids."""
        return self.tokenizer.decode(ids)


def read_tokenizer(path: str | Path) -> Tokenizer:
    """Returns the tokenizer of a SentencePiece model's file, of a tokenizer.json, or of a directory with one.

    Raises:
        FileNotFoundError: there is none; with what is beside it.
        ValueError: the files are damaged.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".json":
        return HuggingFaceTokenizer.read(path)
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        near = near_names(path.name, beside) if beside else "its directory is empty or missing"
        raise FileNotFoundError(f"no tokenizer {path}; {near}")
    found = SentencePieceTokenizer.of(path.read_bytes())
    try:
        _ = found.vocab_size
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    return found
