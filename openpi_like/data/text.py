"""Prompts as tokens, the way the released policies were trained.

pi0: BOS, the text, and a newline that is encoded separately. pi0.5: BOS, and a line that has the state in it as numbers
0 .. 255 (see `state_bins`).
"""

import io
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
from jaxtyping import Bool, Float, Int32, Int64


def state_bins(state: Float[np.ndarray, "*batch De"]) -> Int64[np.ndarray, "*batch De"]:
    """Returns which of 256 equal bins of [-1, 1] each value of a normalised state is in: floor((x + 1) * 128).

    As in the released pi0.5: 255 for everything above, and -1 (not 0) below, so that leaving the range can be told
    from its edge.
    """
    return np.digitize(state, np.linspace(-1, 1, 257)[:-1]) - 1


class TextTokenizer:
    """Tokenises prompts with a SentencePiece model. Safe to use from several threads."""

    def __init__(self, model: bytes, prompt_len: int, *, truncate: bool = False) -> None:
        """
        Args:
            model: a SentencePiece model file's content.
            prompt_len: S, tokens that a prompt is padded to.
            truncate: cut prompts that are too long instead of raising.

        Raises:
            ValueError: `model` is not a SentencePiece model, or has no BOS.
        """
        self.model, self.prompt_len, self.truncate = model, prompt_len, truncate
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

    def encode(
        self, text: str, state: Float[np.ndarray, "De"] | None = None
    ) -> tuple[Int32[np.ndarray, "S"], Bool[np.ndarray, "S"]]:
        """Returns ids, 0 where padded, and the mask of real tokens.

        state: normalised, without padding, where the policy reads it in its prompt (pi0.5); None for pi0.

        Raises:
            ValueError: the text has more than `prompt_len` tokens and is not to be truncated.
        """
        if state is None and text in self._cache:
            return self._cache[text]
        cleaned = text.strip().replace("_", " ").replace("\n", " ")
        pieces = [cleaned, "\n"]
        if state is not None:
            pieces = [f"Task: {cleaned}, State: {' '.join(map(str, state_bins(state)))};\nAction: "]
        tokens = [self._processor.bos_id(), *(i for piece in pieces for i in self._processor.encode(piece))]
        if len(tokens) > self.prompt_len and not self.truncate:
            values = "" if state is None else f" with {len(state)} state values"
            raise ValueError(
                f"prompt {text!r}{values} has {len(tokens)} tokens, expected at most prompt_len={self.prompt_len}; "
                "use a larger prompt_len or a shorter prompt"
            )
        tokens = tokens[: self.prompt_len]
        ids, mask = np.zeros(self.prompt_len, np.int32), np.zeros(self.prompt_len, bool)
        ids[: len(tokens)], mask[: len(tokens)] = tokens, True
        if state is None:  # few instructions, but no two states are alike
            self._cache[text] = ids, mask
        return ids, mask

    def encode_answer(
        self, text: str, answer: str
    ) -> tuple[Int32[np.ndarray, "S"], Bool[np.ndarray, "S"], Bool[np.ndarray, "S"]]:
        """Returns ids, 0 where padded, the mask of real tokens, and which of them are the answer.

        A prompt as for pi0 (BOS, text, newline), then the answer and EOS: what PaliGemma is trained on. The answer is
        both what is predicted and what is seen causally (`prompt_loss` and `prompt_causal` of a `TextBatch`).

        Raises:
            ValueError: both together have more than `prompt_len` tokens. An answer is never cut: its end would be lost.
        """
        ids, mask = self.encode(text)
        start, tokens = int(mask.sum()), [*self._processor.encode(answer), self._processor.eos_id()]
        if start + len(tokens) > self.prompt_len:
            raise ValueError(
                f"prompt {text!r} with answer {answer!r} has {start + len(tokens)} tokens, expected at most "
                f"prompt_len={self.prompt_len}; use a larger prompt_len"
            )
        place = (np.arange(self.prompt_len) >= start) & (np.arange(self.prompt_len) < start + len(tokens))
        ids, mask = ids.copy(), mask | place
        ids[place] = tokens
        return ids, mask, place

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids."""
        return self._processor.decode([int(i) for i in ids])

    def batch(
        self, texts: Sequence[str], states: Sequence[Float[np.ndarray, "De"]] | None = None
    ) -> tuple[Int32[np.ndarray, "B S"], Bool[np.ndarray, "B S"]]:
        """Returns ids and masks of several prompts; states: see `encode`."""
        rows = [self.encode(text, None if states is None else states[i]) for i, text in enumerate(texts)]
        return np.stack([ids for ids, _ in rows]), np.stack([mask for _, mask in rows])


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
