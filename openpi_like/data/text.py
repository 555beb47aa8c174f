"""Prompts as tokens, the way the released policies were trained.

Formats of a prompt, `openpi_like.batch.PROMPT_FORMATS` (bins: the state as numbers 0 .. 255, see `state_bins`):
- "pi0": BOS, the text, and a newline that is encoded separately.
- "pi05": BOS, and `Task: {text}, State: {bins};\\nAction: ` as one piece.
- "fast": BOS, and `Task: {text in lower case}, State: {bins};\\n` as one piece. "Action: " begins the answer.

Letters: S tokens of a prompt, T tokens of an answer, De state dims.
"""

import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import sentencepiece
from jaxtyping import Bool, Float, Int, Int32, Int64

from openpi_like.batch import PROMPT_FORMATS
from openpi_like.config import near_names


def state_bins(state: Float[np.ndarray, "*batch De"]) -> Int64[np.ndarray, "*batch De"]:
    """Returns which of 256 equal bins of [-1, 1] each value of a normalised state is in: floor((x + 1) * 128).

    As in the released pi0.5: 255 for everything above, and -1 (not 0) below, so that leaving the range can be told
    from its edge.
    """
    return np.digitize(state, np.linspace(-1, 1, 257)[:-1]) - 1


class TextRow(NamedTuple):
    """A prompt and its answer, (S + T,) each: see the fields of the same names in `openpi_like.batch.TextBatch`."""

    prompt: np.ndarray
    prompt_mask: np.ndarray
    prompt_causal: np.ndarray
    prompt_loss: np.ndarray
    prompt_action: np.ndarray


class TextTokenizer:
    """Tokenises prompts and answers with a SentencePiece model. Safe to use from several threads."""

    def __init__(
        self,
        model: bytes,
        prompt_len: int,
        *,
        prompt_format: str = "pi0",
        answer_len: int = 0,
        truncate: bool = False,
    ) -> None:
        """
        Args:
            model: a SentencePiece model file's content.
            prompt_len: S, tokens that a prompt is padded to.
            prompt_format: one of `PROMPT_FORMATS`.
            answer_len: T, tokens of an answer at most, added to what a prompt is padded to; 0 where the two share
                `prompt_len`.
            truncate: cut prompts that are too long instead of raising.

        Raises:
            ValueError: `model` is not a SentencePiece model, or has no BOS; or an unknown format.
        """
        self.model, self.prompt_len, self.answer_len, self.truncate = model, prompt_len, answer_len, truncate
        self.prompt_format = prompt_format
        if prompt_format not in PROMPT_FORMATS:
            raise ValueError(f"prompt_format {prompt_format!r} is unknown; {near_names(prompt_format, PROMPT_FORMATS)}")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as e:
            raise ValueError(f"not a SentencePiece model ({len(model)} bytes): {e}") from e
        if self._processor.bos_id() < 0:
            raise ValueError(
                "the SentencePiece model has no BOS token, which begins every prompt; choose another model"
            )
        self._cache: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._processor.vocab_size()

    # ---- Prompts -----------------------------------------------------------------------------------------------------

    def encode(
        self, text: str, state: Float[np.ndarray, "De"] | None = None
    ) -> tuple[Int32[np.ndarray, "S"], Bool[np.ndarray, "S"]]:
        """Returns ids, 0 where padded, and the mask of real tokens.

        state: normalised, without padding; read where the format has it in the prompt.

        Raises:
            ValueError: the prompt has more than `prompt_len` tokens and is not to be truncated, or needs a state.
        """
        if self.prompt_format == "pi0" and text in self._cache:
            return self._cache[text]
        tokens = self._prompt(text, state, self.prompt_format)[: self.prompt_len]
        ids, mask = np.zeros(self.prompt_len, np.int32), np.zeros(self.prompt_len, bool)
        ids[: len(tokens)], mask[: len(tokens)] = tokens, True
        if self.prompt_format == "pi0":  # few instructions, but no two states are alike
            self._cache[text] = ids, mask
        return ids, mask

    def _prompt(self, text: str, state: np.ndarray | None, prompt_format: str) -> list[int]:
        cleaned = text.strip().replace("_", " ")
        if prompt_format == "pi0":
            pieces = [cleaned.replace("\n", " "), "\n"]
        elif state is None:
            raise ValueError(f"prompt {text!r}: the format {prompt_format!r} has the state in it, got none; give it")
        else:
            bins = " ".join(map(str, state_bins(state)))
            if prompt_format == "pi05":
                cleaned = cleaned.replace("\n", " ")
                pieces = [f"Task: {cleaned}, State: {bins};\nAction: "]
            else:  # as released: in lower case before it is stripped, and newlines stay
                pieces = [f"Task: {text.lower().strip().replace('_', ' ')}, State: {bins};\n"]
        tokens = [self._processor.bos_id(), *(i for piece in pieces for i in self._processor.encode(piece))]
        if len(tokens) > self.prompt_len and not self.truncate:
            values = "" if state is None or prompt_format == "pi0" else f" with {len(state)} state values"
            raise ValueError(
                f"prompt {text!r}{values} has {len(tokens)} tokens, expected at most prompt_len={self.prompt_len}; "
                "use a larger prompt_len or a shorter prompt"
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
        """Returns a prompt of format "pi0" with a text answer and EOS: what PaliGemma is trained on.

        Raises:
            ValueError: too many tokens. An answer is never cut: its end would be lost.
        """
        said = [*self._processor.encode(answer), self._processor.eos_id()]
        return self._row(text, self._prompt(text, None, "pi0"), said, [])

    def encode_actions(
        self,
        text: str,
        state: Float[np.ndarray, "De"] | None,
        action_ids: Int[np.ndarray, "_"],
        *,
        subtask: str | None = None,
    ) -> TextRow:
        """Returns a prompt with action tokens as its answer: "Action: ", the ids, "|" and EOS.

        action_ids: as ids of the text vocabulary. subtask: text said before the actions, as `Subtask: {subtask};\\n`.

        Raises:
            ValueError: too many tokens.
        """
        prompt = self._prompt(text, state, self.prompt_format)
        said = [] if subtask is None else self._processor.encode(f"Subtask: {subtask};\n")
        actions = [*self.action_indicator(), *map(int, action_ids), *self._processor.encode("|")]
        return self._row(text, prompt, said, [*actions, self._processor.eos_id()])

    def structure_ids(self) -> set[int]:
        """Returns the ids that give an answer its form: padding, BOS, EOS, unknown, and what is around actions."""
        p = self._processor
        return {p.pad_id(), p.bos_id(), p.eos_id(), p.unk_id(), *p.encode("Action: "), *p.encode("|")} - {-1}

    def action_indicator(self) -> list[int]:
        """Returns the tokens that announce actions in an answer; in format "pi05" the prompt ends with them."""
        return [] if self.prompt_format == "pi05" else self._processor.encode("Action: ")

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
        return self._processor.decode([int(i) for i in ids])


def fit_text_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Fits a byte-pair SentencePiece model that can encode any text (by bytes, where it must), and returns it.

    Special ids are those of Gemma: 0 padding, 1 EOS, 2 BOS, 3 unknown. The result depends on the set of texts only. It
    has at most `vocab_size` tokens, fewer where the texts do not yield as many.

    Raises:
        ValueError: no texts, or `vocab_size` is too small for 256 bytes, special tokens and the characters in use.
    """
    cleaned = sorted({text.strip().replace("_", " ").replace("\n", " ") for text in texts} - {""})
    if not cleaned:
        raise ValueError("no texts to fit a tokenizer to, expected at least one that is not empty")
    needed = 4 + 1 + 256 + len(set("".join(cleaned))) + 1
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
        user_defined_symbols=["\n"],
        # As in Gemma: the text is taken as it is, so that nothing a robot is told is lost.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()
