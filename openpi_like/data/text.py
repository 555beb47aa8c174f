"""Prompts as tokens, the way pi0 was trained: BOS, the text, and a newline that is encoded separately."""

import io
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
from jaxtyping import Bool, Int32


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

    def encode(self, text: str) -> tuple[Int32[np.ndarray, "S"], Bool[np.ndarray, "S"]]:
        """Returns ids, 0 where padded, and the mask of real tokens.

        Raises:
            ValueError: the text has more than `prompt_len` tokens and is not to be truncated.
        """
        if text in self._cache:
            return self._cache[text]
        cleaned = text.strip().replace("_", " ").replace("\n", " ")
        tokens = [self._processor.bos_id(), *self._processor.encode(cleaned), *self._processor.encode("\n")]
        if len(tokens) > self.prompt_len and not self.truncate:
            raise ValueError(
                f"prompt {text!r} has {len(tokens)} tokens, expected at most prompt_len={self.prompt_len}; "
                "use a larger prompt_len or a shorter prompt"
            )
        tokens = tokens[: self.prompt_len]
        ids, mask = np.zeros(self.prompt_len, np.int32), np.zeros(self.prompt_len, bool)
        ids[: len(tokens)], mask[: len(tokens)] = tokens, True
        self._cache[text] = ids, mask
        return ids, mask

    def batch(self, texts: Sequence[str]) -> tuple[Int32[np.ndarray, "B S"], Bool[np.ndarray, "B S"]]:
        """Returns ids and masks of several prompts."""
        rows = [self.encode(text) for text in texts]
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
