"""FAST: a chunk of actions as a few tokens, by a cosine transform and byte-pair merges (Pertsch et al. 2025, arXiv
2501.09747).

A normalised chunk (H, D) is turned into the coefficients of the orthonormal DCT-II along time, times `scale`, rounded
half to even; read low frequencies first, that is all D dims of frequency 0, then those of frequency 1, and so on; every
coefficient c is the character chr(c - offset), and a byte-pair encoding merges frequent runs of characters.

Two kinds of tokenizer share this class. Released ones (physical-intelligence/fast) merge UTF-8 bytes, so that a token
may end in the middle of a character, and only coefficients whose bytes occurred when they were fitted can be encoded.
Ours (`fit_fast`) merge characters, and encode every coefficient of a stated range.

Letters: B chunks, H steps, D action dims, Q states of decoding, W tokens of the FAST vocabulary, M coefficients.
"""

import codecs
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.fft
import tokenizers
from jaxtyping import Float, Int

from openpi_like.config import near_names

FILES = ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
Outside = Literal["error", "saturate", "released"]
_PROCESSOR_CLASS = "UniversalActionProcessor"


class FastError(ValueError):
    """A chunk cannot be encoded, or tokens are no chunk. chunk: which one, where it is about one."""

    def __init__(self, message: str, chunk: int | None = None) -> None:
        super().__init__(message)
        self.chunk = chunk


class Encoded(NamedTuple):
    """ids: token ids per chunk. outside: (B,), coefficients per chunk that could not be encoded as they were."""

    ids: list[np.ndarray]
    outside: np.ndarray


class Decoded(NamedTuple):
    """actions: (B, H, D), NaN where a chunk could not be decoded. errors: why not, per chunk, or None."""

    actions: np.ndarray
    errors: list[FastError | None]


@dataclasses.dataclass(frozen=True)
class FastFiles:
    """The files of a processor as text, unchanged: what checkpoints store and `FastTokenizer.save` writes."""

    processor_config: str
    tokenizer: str
    tokenizer_config: str
    special_tokens_map: str


@dataclasses.dataclass(frozen=True)
class DecodingTables:
    """What decoding may do next: an automaton over tokens, for constrained sampling.

    A state says which bytes of an unfinished character are pending; state 0 is none. After token w in state q the state
    is following[q, w], or w is impossible there (-1), and count[q, w] further coefficients are complete: the first
    entries of values[q, w]. least[m, q]: the fewest tokens that complete exactly m more coefficients from state q.
    scale: see `FastTokenizer`.
    """

    following: Int[np.ndarray, "Q W"]
    count: Int[np.ndarray, "Q W"]
    values: Int[np.ndarray, "Q W longest"]
    least: Int[np.ndarray, "M Q"]
    scale: float


def dct_coefficients(actions_BHD: Float[np.ndarray, "B H D"], scale: float) -> Int[np.ndarray, "B H D"]:
    """Returns the scaled and rounded DCT-II coefficients of normalised chunks, frequency by frequency.

    The transform is computed in the dtype of the actions, as in the released processor.

    Raises:
        FastError: actions that are not finite.
    """
    if not np.isfinite(actions_BHD).all():
        chunk, step, dim = (int(i) for i in np.argwhere(~np.isfinite(actions_BHD))[0])
        value = actions_BHD[chunk, step, dim]
        raise FastError(f"chunk {chunk}: action dim {dim} of step {step} is {value}, expected finite numbers", chunk)
    return np.rint(scipy.fft.dct(actions_BHD, axis=1, norm="ortho") * scale).astype(np.int64)


class FastTokenizer:
    """Turns chunks into token ids and back. Safe to use from several threads.

    scale: coefficients per unit of the normalised actions' transform. offset: the least coefficient (`min_token` in
    released files). span: (low, high), coefficients that can be encoded lie between these, ends included.
    """

    def __init__(self, files: FastFiles) -> None:
        """
        Raises:
            FastError: the files are not those of a FAST processor; lists everything that is wrong.
        """
        self.files = files
        problems = []
        config: Any = {}
        try:
            config = json.loads(files.processor_config)
        except ValueError as e:
            problems.append(f"processor_config.json: {e}")
        else:
            problems += [f"processor_config.json: {p}" for p in _processor_problems(config)]
        try:
            self._bpe = tokenizers.Tokenizer.from_str(files.tokenizer)
        except Exception as e:  # the library raises bare Exception
            problems.append(f"tokenizer.json: {e}")
        if problems:
            raise FastError("not the files of a FAST processor:\n  " + "\n  ".join(problems))
        self._bpe.no_truncation()
        self._bpe.no_padding()
        self._byte_level = isinstance(self._bpe.decoder, tokenizers.decoders.ByteLevel)
        self.scale, self.offset = float(config["scale"]), int(config["min_token"])
        self.vocab_size = self._bpe.get_vocab_size()
        if self.vocab_size > config["vocab_size"]:
            raise FastError(
                f"tokenizer.json has {self.vocab_size} tokens, processor_config.json says {config['vocab_size']}; "
                "the files belong to different processors"
            )
        # A released processor is fitted to at most vocab_size + 1 values; surrogates are no characters.
        codes = np.arange(min(max(config["vocab_size"], self.vocab_size) + 1, 0xD800))
        back = self._bpe.decode_batch([e.ids for e in self._bpe.encode_batch(list(map(chr, codes)))])
        self._encodable: np.ndarray = np.array([chr(c) == text for c, text in zip(codes, back, strict=True)])
        if not self._encodable.any():
            raise FastError("tokenizer.json cannot encode a single coefficient; take the processor's own file")
        known = np.flatnonzero(self._encodable)
        self.span = (int(known[0]) + self.offset, int(known[-1]) + self.offset)
        self._known = known

    @classmethod
    def load(cls, directory: str | Path) -> "FastTokenizer":
        """Reads a processor's directory, as `save` or Hugging Face's `save_pretrained` writes it.

        Raises:
            FastError: files are missing or are not those of a FAST processor; lists everything.
        """
        directory = Path(directory)
        missing = [name for name in FILES if not (directory / name).is_file()]
        if missing:
            there = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else "no such directory"
            raise FastError(f"{directory} lacks {', '.join(missing)}; there: {there}")
        return cls(FastFiles(*((directory / name).read_text(encoding="utf-8") for name in FILES)))

    def save(self, directory: str | Path) -> None:
        """Writes the files as they were read; a released processor class reads those of our own fits too."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in zip(FILES, dataclasses.astuple(self.files), strict=True):
            (directory / name).write_text(text, encoding="utf-8")

    # ---- Encoding ----------------------------------------------------------------------------------------------------

    def encode(self, actions_BHD: Float[np.ndarray, "B H D"], *, outside: Outside = "error") -> Encoded:
        """Returns the token ids of normalised chunks.

        outside: what to do with coefficients that the tokenizer cannot encode. "error" raises; "saturate" takes the
            nearest one that it can, and counts; "released" does what the released processor does, and counts: too low
            ones become the lowest, of others the unknown bytes vanish, and such tokens decode to nothing.

        Raises:
            FastError: a coefficient is outside; names the worst ones. Or actions that are not finite.
        """
        codes = dct_coefficients(actions_BHD, self.scale) - self.offset
        at = np.clip(codes, 0, len(self._encodable) - 1)
        lost = ~(self._encodable[at] & (at == codes))
        if outside == "error" and lost.any():
            raise FastError(self._outside_message(codes, lost), int(np.argmax((np.abs(codes) * lost).max((1, 2)))))
        if outside == "saturate":
            right = np.clip(np.searchsorted(self._known, codes), 1, len(self._known) - 1)
            low, high = self._known[right - 1], self._known[right]
            codes = np.where(lost, np.where(codes - low <= high - codes, low, high), codes)
        codes = np.maximum(codes, 0)
        if codes.max(initial=0) >= 0xD800:  # no characters from here on; the released processor fails too
            raise FastError(self._outside_message(codes, lost), int(np.argmax(codes.max((1, 2)))))
        texts = ["".join(map(chr, row)) for row in codes.reshape(len(codes), -1).tolist()]
        ids = [np.array(e.ids, np.int32) for e in self._bpe.encode_batch_fast(texts)]
        return Encoded(ids, lost.sum(axis=(1, 2)))

    def _outside_message(self, codes: np.ndarray, lost: np.ndarray) -> str:
        low, high = self.span
        worst = np.argwhere(lost)
        order = np.argsort(-np.abs(codes[lost]), kind="stable")[:5]
        shown = "; ".join(
            f"{codes[chunk, k, dim] + self.offset} at frequency {k} of dim {dim} of chunk {chunk}"
            for chunk, k, dim in worst[order]
        )
        gaps = int(len(self._encodable[: self._known[-1] + 1]) - len(self._known))
        return (
            f"{int(lost.sum())} DCT coefficients of {codes.size} cannot be encoded, expected {low} to {high}"
            + (f" (but for {gaps} values between them that the fit had never seen)" if gaps else "")
            + f": {shown}; fit a tokenizer to this data (data/fit_fast.py), check its normalisation, or allow "
            'saturation with outside="saturate"'
        )

    # ---- Decoding ----------------------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[Int[np.ndarray, "_"]], *, horizon: int, dims: int) -> Decoded:
        """Returns the normalised chunks (B, horizon, dims) of token ids, float32.

        A chunk that is not exactly horizon x dims coefficients of the tokenizer's range is NaN, and its error says why.
        """
        actions = np.full((len(ids), horizon, dims), np.nan, np.float32)
        errors: list[FastError | None] = []
        good, rows = [], []
        known = [all(0 <= i < self.vocab_size for i in row) for row in (np.asarray(r).tolist() for r in ids)]
        texts = self._bpe.decode_batch([np.asarray(r).tolist() if k else [] for r, k in zip(ids, known, strict=True)])
        for i, text in enumerate(texts):
            problem = self._problem(text, horizon * dims) if known[i] else self._unknown(ids[i])
            errors.append(None if problem is None else FastError(f"chunk {i}: {problem}"))
            if problem is None:
                good.append(i)
                rows.append(np.frombuffer(text.encode("utf-32-le"), np.uint32))
        if good:
            coefficients = np.stack(rows).astype(np.float64).reshape(-1, horizon, dims) + self.offset
            actions[good] = scipy.fft.idct(coefficients / self.scale, axis=1, norm="ortho")
        return Decoded(actions, errors)

    def _unknown(self, ids: np.ndarray) -> str:
        wrong = [int(i) for i in ids if not 0 <= i < self.vocab_size]
        return f"ids {wrong[:5]} are not in the vocabulary, expected 0 to {self.vocab_size - 1}"

    def _problem(self, text: str, expected: int) -> str | None:
        if len(text) != expected:
            return f"{len(text)} coefficients, expected {expected}"
        wrong = [ord(c) for c in text if ord(c) >= len(self._encodable) or not self._encodable[ord(c)]]
        if wrong:
            return f"{len(wrong)} of {expected} coefficients are outside the range or broken bytes (codes {wrong[:5]})"
        return None

    # ---- Constrained decoding ----------------------------------------------------------------------------------------

    def tables(self, most: int, *, count: int | None = None) -> DecodingTables:
        """Returns what constrained sampling needs for chunks of up to `most` coefficients.

        count: tokens that a policy has room for; those beyond the vocabulary are impossible. None: the vocabulary's.

        Raises:
            FastError: no sequence of tokens completes some number of coefficients: the vocabulary is broken.
        """
        spelled = [self._bytes(w) for w in range(self.vocab_size)]
        characters = [chr(c).encode() for c in self._known.tolist()]
        prefixes = {c[:k] for c in characters for k in range(1, len(c))}
        valid = {c.decode() for c in characters}
        states: dict[bytes, int] = {b"": 0, **{p: i + 1 for i, p in enumerate(sorted(prefixes))}}
        following = np.full((len(states), self.vocab_size), -1, np.int32)
        produced: list[tuple[int, int, list[int]]] = []
        for prefix, q in states.items():
            for w, token in enumerate(spelled):
                decoder = codecs.getincrementaldecoder("utf-8")()
                try:
                    text = decoder.decode(prefix + token)
                except UnicodeDecodeError:
                    continue
                pending = decoder.getstate()[0]
                if pending in states and token and valid.issuperset(text):
                    following[q, w] = states[pending]
                    produced.append((q, w, [ord(c) + self.offset for c in text]))
        counts = np.zeros_like(following)
        values = np.zeros((*following.shape, max(len(row) for *_, row in produced)), np.int32)
        for q, w, row in produced:
            counts[q, w] = len(row)
            values[q, w, : len(row)] = row
        least = _least_tokens(following, counts, most)
        if (least[1:, 0] > most * 4).any():
            impossible = int(np.argmax(least[1:, 0] > most * 4)) + 1
            raise FastError(
                f"no tokens of tokenizer.json make {impossible} coefficients; take the processor's own files"
            )
        beyond = (0 if count is None else count) - self.vocab_size
        if beyond > 0:
            wider = ((0, 0), (0, beyond))
            following = np.pad(following, wider, constant_values=-1)
            counts, values = np.pad(counts, wider), np.pad(values, (*wider, (0, 0)))
        return DecodingTables(following, counts, values, least, self.scale)

    def _bytes(self, token: int) -> bytes:
        """Returns what a token adds to the decoded text, as UTF-8 or a part of it."""
        text = self._bpe.id_to_token(token) or ""
        if not self._byte_level:
            return text.encode()
        if all(c in _BYTE_OF for c in text):
            return bytes(_BYTE_OF[c] for c in text)
        return text.encode()  # an entry of the fitted alphabet that byte-level encoding never produces


def _processor_problems(config: Any) -> list[str]:
    """Returns what is wrong with the content of processor_config.json."""
    if not isinstance(config, dict):
        return [f"holds a {type(config).__name__}, expected an object"]
    problems = []
    for name, kinds in (("scale", (int, float)), ("min_token", (int,)), ("vocab_size", (int,))):
        value = config.get(name)
        if not isinstance(value, kinds) or isinstance(value, bool) or (name != "min_token" and value <= 0):
            expected = {"scale": "a number above 0", "min_token": "an integer", "vocab_size": "an integer above 0"}[
                name
            ]
            near = "take the processor's own file" if name in config else near_names(name, list(config))
            problems.append(f"{name} is {value!r}, expected {expected}; {near}")
    return problems


def _byte_level_alphabet() -> dict[str, int]:
    """Returns the printable character that stands for each byte in byte-level BPE, inverted.

    Printable Latin-1 characters stand for themselves, the others for the characters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(other)}


_BYTE_OF = _byte_level_alphabet()


def _least_tokens(following: np.ndarray, count: np.ndarray, most: int) -> np.ndarray:
    """Returns (most + 1, Q): the fewest tokens that complete exactly m coefficients from a state and end in state 0."""
    states = len(following)
    never = 1 << 20
    least = np.full((most + 1, states), never, np.int32)
    least[0, 0] = 0
    for m in range(1, most + 1):
        # Tokens that complete no coefficient lead to another state at the same m: repeat until these settle.
        while True:
            rest = m - count
            possible = (following >= 0) & (rest >= 0)
            best = np.where(possible, least[np.maximum(rest, 0), np.maximum(following, 0)] + 1, never).min(axis=1)
            if (best >= least[m]).all():
                break
            least[m] = np.minimum(least[m], best)
    return least


# ---- Fitting ---------------------------------------------------------------------------------------------------------


def fit_fast(
    coefficients: Sequence[Int[np.ndarray, "_ _ _"]],
    *,
    scale: float,
    vocab_size: int,
    span: tuple[int, int] | None = None,
    progress: bool = False,
) -> FastTokenizer:
    """Fits a tokenizer that encodes every coefficient of a range.

    Args:
        coefficients: of chunks (B, H, D), as `dct_coefficients` returns them; one array per shape.
        scale: what they were scaled with.
        vocab_size: tokens at most; fewer where the data has no more frequent runs.
        span: coefficients to be encodable, ends included. None takes those of every chunk within [-1, 1] (at most
            scale * sqrt(H)), and all that were given.

    Raises:
        FastError: nothing given, a range that does not hold the coefficients, or no room for merges.
    """
    given = [c for c in coefficients if c.size]
    if not given:
        raise FastError("no chunks to fit to, expected at least one")
    low, high = min(int(c.min()) for c in given), max(int(c.max()) for c in given)
    if span is None:
        bound = math.ceil(scale * math.sqrt(max(c.shape[1] for c in given)))
        span = min(low, -bound), max(high, bound)
    problems = []
    if low < span[0] or high > span[1]:
        outside = sum(int(((c < span[0]) | (c > span[1])).sum()) for c in given)
        problems.append(
            f"{outside} coefficients lie outside span={span}: they go from {low} to {high}; leave span out, or clip "
            "the actions yourself"
        )
    alphabet = [chr(c) for c in range(span[1] - span[0] + 1)]
    if vocab_size <= len(alphabet) or len(alphabet) > 0xD800:
        problems.append(
            f"vocab_size={vocab_size}, expected more than the {len(alphabet)} coefficients from {span[0]} to {span[1]}"
            "; raise it, lower the scale, or check the normalisation of actions this large"
        )
    if problems:
        raise FastError("; ".join(problems))
    # Neither bytes nor the word-splitting of text: any run of coefficients may be merged.
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.decoder = tokenizers.decoders.Fuse()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, initial_alphabet=alphabet, special_tokens=[], show_progress=progress
    )
    texts = ("".join(map(chr, row)) for c in given for row in (c.reshape(len(c), -1) - span[0]).tolist())
    bpe.train_from_iterator(texts, trainer, length=sum(map(len, given)))
    processor = {
        "action_dim": None,
        "min_token": span[0],
        "processor_class": _PROCESSOR_CLASS,
        "scale": scale,
        "time_horizon": None,
        "vocab_size": vocab_size,
    }
    # What the released processor class needs to open tokenizer.json as it is.
    opening = {
        "clean_up_tokenization_spaces": False,
        "processor_class": _PROCESSOR_CLASS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    files = (json.dumps(processor, indent=2), bpe.to_str(pretty=True), json.dumps(opening, indent=2), "{}")
    return FastTokenizer(FastFiles(*files))
