"""Plans as characters, on the device: what is written for a chunk, and what may follow what is written already.

The text is that of `openpi_like.driving.waypoint_text.format_waypoints`, `[(x1,y1),...,(xA,yA)]` and the end, with as
many numbers a point as the robot has dims. A number has up to three digits without leading zeros, and two decimals;
zero has no sign. One character is one token, also where a tokenizer has tokens of several: the language model has seen
digits one by one, and what is written has one spelling.

Letters: B batch, A points of a plan, J numbers of a point, T characters, C characters that there are (17 and the end),
Q states of the grammar.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from openpi_like.batch import Array as Leaf
from openpi_like.data.tokenizer import Tokenizer
from openpi_like.driving.waypoint_text import CHARACTERS

MOST_M = 999.99  # three digits before the point
_MINUS, _DOT, _COMMA, _OPEN, _CLOSE, _BEGIN, _END = range(10, 17)
_EOS = len(CHARACTERS)
_NUMBER = 7  # characters of a number at most: -ddd.dd


# ---- Ids -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Characters:
    """What ids the characters of a plan have.

    ids: of each of `CHARACTERS`, "0" to "9", then "-", ".", ",", "(", ")", "[", "]". eos: what ends an answer.
    """

    ids: tuple[int, ...]
    eos: int

    @classmethod
    def fitted(cls) -> "Characters":
        """Returns the ids of every tokenizer that `data/fit_text.py --waypoints` fits, known before it is there."""
        return cls(tuple(range(5, 5 + len(CHARACTERS))), 1)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Characters":
        """Returns the ids that a tokenizer has.

        Raises:
            ValueError: some characters are several tokens, or there is no EOS.
        """
        ids = [tokenizer.encode(character) for character in CHARACTERS]
        several = {character: of for character, of in zip(CHARACTERS, ids, strict=True) if len(of) != 1}
        if several:
            raise ValueError(
                f"characters of a plan as ids of the {type(tokenizer).__name__}: {_shown(several)}, expected one each; "
                "choose another tokenizer, or fit one with data/fit_text.py --waypoints"
            )
        return cls(tuple(of[0] for of in ids), tokenizer.required("eos"))

    @property
    def every(self) -> Int[np.ndarray, "C"]:
        """The ids of all characters, and the end."""
        return np.array([*self.ids, self.eos], np.int32)

    def problems(self, vocab_size: int) -> list[str]:
        """Returns why a vocabulary of so many ids cannot have these."""
        problems = []
        if len(self.ids) != len(CHARACTERS):
            problems.append(f"characters.ids has {len(self.ids)} ids, expected one for each of {CHARACTERS!r}")
        every = [*self.ids, self.eos]
        if twice := sorted({i for i in every if every.count(i) > 1}):
            problems.append(f"characters has {twice} more than once, expected an id for each character and the end")
        if wrong := sorted({i for i in every if not 0 <= i < vocab_size}):
            problems.append(f"characters has {wrong}, expected ids below vocab_size={vocab_size}")
        return problems

    def tokenizer_problems(self, tokenizer: Tokenizer) -> list[str]:
        """Returns why these are not the ids of a tokenizer."""
        try:
            theirs = Characters.of(tokenizer)
        except ValueError as e:
            return [str(e)]
        if theirs == self:
            return []
        ours = {c: i for c, i in zip((*CHARACTERS, "EOS"), self.every.tolist(), strict=True)}
        differ = {c: i for c, i in zip(ours, theirs.every.tolist(), strict=True) if ours[c] != i}
        return [
            f"characters: {_shown({c: ours[c] for c in differ})}, the tokenizer has {_shown(differ)}; take "
            "Characters.of(tokenizer), or fit one with data/fit_text.py --waypoints for Characters.fitted()"
        ]


def _shown(ids: dict[str, Any]) -> str:
    return ", ".join(f"{character} {of}" for character, of in ids.items())


# ---- What is written -------------------------------------------------------------------------------------------------


def longest(points: int, numbers: int) -> int:
    """Returns T, the most characters of a plan with its end."""
    return points * (2 + numbers * (_NUMBER + 1)) + 2


def hundredths(metres: Float[Array, "*B"]) -> Int[Array, "*B"]:
    """Returns hundredths of a metre, the nearest to the number as it is and of two as near the even one, as Python
    writes it; +-99999 beyond `MOST_M`."""
    size = jnp.minimum(jnp.abs(metres), MOST_M)
    whole = jnp.floor(size)
    # A hundred times the fraction is rounded in float32. Its two halves are not: the first has 16 bits, and from 2^-8
    # on, below which all is rounded to zero, the second has no more.
    scaled = (size - whole) * 2.0**16
    coarse = jnp.floor(scaled)
    hundred = 100 * coarse
    down = jnp.floor(hundred / 2.0**16)
    above_half = 100 * (scaled - coarse) - (2.0**15 - (hundred - down * 2.0**16))
    up = (above_half > 0) | ((above_half == 0) & (down % 2 == 1))
    count = (100 * whole + down + up).astype(jnp.int32)
    return jnp.where(metres < 0, -count, count)


def plan_characters(
    metres: Float[Array, "B A J"], mask: Bool[Array, "B A J"]
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Returns the characters of plans, each where it stands in the longest one, and which of them there are.

    mask: what is known, the first points, and of these the numbers that the robot has. A plan of fewer points goes on
    as nobody knows: what stands behind its last known point is not there, nor is the end.
    """
    B, A, _ = mask.shape
    cents = jnp.where(mask, hundredths(jnp.where(mask, metres, 0.0)), 0)
    size = jnp.abs(cents)
    digits = [size // 10**k % 10 for k in (4, 3, 2, 1, 0)]
    like = lambda value: jnp.full(mask.shape, value, jnp.int32)  # noqa: E731
    more = jnp.pad(mask[..., 1:], ((0, 0), (0, 0), (0, 1)))
    behind = jnp.where(more, _COMMA, _CLOSE)
    numbers = jnp.stack([like(_MINUS), *digits[:3], like(_DOT), *digits[3:], behind], axis=-1)
    there = jnp.stack([cents < 0, size >= 10_000, size >= 1_000, *[like(True) > 0] * 5], axis=-1) & mask[..., None]
    first = jnp.where(jnp.arange(A) == 0, _BEGIN, _COMMA)
    before = jnp.broadcast_to(jnp.stack([first, jnp.full(A, _OPEN)], axis=-1), (B, A, 2))
    points = jnp.concatenate([before, numbers.reshape(B, A, -1)], axis=-1)
    known = jnp.broadcast_to(mask.any(-1, keepdims=True), (B, A, 2))
    end = jnp.broadcast_to(jnp.array([_END, _EOS]), (B, 2))
    characters = jnp.concatenate([points.reshape(B, -1), end], axis=1)
    there = jnp.concatenate([known, there.reshape(B, A, -1)], axis=-1).reshape(B, -1)
    whole = jnp.broadcast_to(mask[:, -1].any(-1, keepdims=True), (B, 2))
    return characters.astype(jnp.int32), jnp.concatenate([there, whole], axis=1)


# ---- What may follow -------------------------------------------------------------------------------------------------

_NONZERO = CHARACTERS[1:10]
_DIGITS = CHARACTERS[:10]
# What may follow in each state, and which state that leads to; "$" is the end. A comma or a closing bracket, where both
# are here, is decided by how much of the plan is left.
_RULES: dict[str, dict[str, str]] = {
    "plan": {"[": "point"},
    "point": {"(": "number"},
    "number": {"-": "minus", "0": "units", _NONZERO: "digit"},
    "digit": {_DIGITS: "two digits", ".": "dot"},
    "two digits": {_DIGITS: "units", ".": "dot"},
    "units": {".": "dot"},
    "dot": {_DIGITS: "tenth"},
    "tenth": {_DIGITS: "written"},
    "minus": {"0": "minus zero", _NONZERO: "digit"},
    "minus zero": {".": "minus dot"},
    "minus dot": {"0": "minus tenth", _NONZERO: "tenth"},
    "minus tenth": {_NONZERO: "written"},
    "written": {",": "number", ")": "behind"},
    "behind": {",": "point", "]": "closed"},
    "closed": {"$": "done"},
    "done": {},
}
_STATES = list(_RULES)
_START, _WRITTEN, _BEHIND, _DONE = (_STATES.index(name) for name in ("plan", "written", "behind", "done"))


def _following() -> Int[np.ndarray, "Q C"]:
    """Returns the state after each character in each state, -1 where it may not stand."""
    table = np.full((len(_STATES), _EOS + 1), -1, np.int32)
    for name, rules in _RULES.items():
        for characters, then in rules.items():
            table[_STATES.index(name), [f"{CHARACTERS}$".index(c) for c in characters]] = _STATES.index(then)
    return table


FOLLOWING = _following()


class Written(NamedTuple):
    """Plans of which a part is written. state: (B,), of the grammar. point, number: (B,), which comes next or is being
    written. size, minus: (B,), its digits so far, and its sign. cents: (B, A, J), hundredths of what is written.
    points, numbers: (B,), how many are to be written.
    """

    state: Leaf
    point: Leaf
    number: Leaf
    size: Leaf
    minus: Leaf
    cents: Leaf
    points: Leaf
    numbers: Leaf

    @classmethod
    def nothing(cls, mask: Bool[Array, "B A J"]) -> "Written":
        """Returns plans before their first character. mask: the first points, and of these the first numbers, that are
        to be written; nothing is written where there are none."""
        points, numbers = (mask.any(axis).sum(1).astype(jnp.int32) for axis in (2, 1))
        zero = jnp.zeros_like(points)
        state = jnp.where(points > 0, _START, _DONE)
        return cls(state, zero, zero, zero, zero > 0, jnp.zeros(mask.shape, jnp.int32), points, numbers)

    @property
    def is_whole(self) -> Bool[Array, "B"]:
        """Which plans have their end."""
        return self.state == _DONE

    def allowed(self) -> Bool[Array, "B C"]:
        """Returns what may be written next; at least one character, but for plans that are whole."""
        within = jnp.where(self.state == _BEHIND, self.point < self.points, self.number + 1 < self.numbers)
        choice = (self.state == _WRITTEN) | (self.state == _BEHIND)
        at = jnp.arange(_EOS + 1)
        wrong = jnp.where(within[:, None], (at == _CLOSE) | (at == _END), at == _COMMA)
        return (jnp.asarray(FOLLOWING)[self.state] >= 0) & ~(choice[:, None] & wrong)

    def after(self, character: Int[Array, "B"]) -> "Written":
        """Returns plans with one character more, one that is allowed; those that are whole stay as they are."""
        going = ~self.is_whole
        state = jnp.where(going, jnp.asarray(FOLLOWING)[self.state, character], self.state)
        digit = going & (character < 10)
        size = jnp.where(digit, 10 * self.size + character, self.size)
        minus = self.minus | (going & (character == _MINUS))
        written = going & (state == _WRITTEN)
        _, A, J = self.cents.shape
        here = (jnp.arange(A)[:, None] == self.point[:, None, None]) & (jnp.arange(J) == self.number[:, None, None])
        value = jnp.where(minus, -size, size)[:, None, None]
        next_number = (self.state == _WRITTEN) & (character == _COMMA)
        next_point = (self.state == _WRITTEN) & (character == _CLOSE)
        return self._replace(
            state=state,
            point=self.point + next_point,
            number=jnp.where(next_point, 0, self.number + next_number),
            size=jnp.where(written, 0, size),
            minus=minus & ~written,
            cents=jnp.where(here & written[:, None, None], value, self.cents),
        )

    def metres(self) -> Float[Array, "B A J"]:
        """Returns what is written, 0 where nothing is."""
        return self.cents.astype(jnp.float32) / 100
