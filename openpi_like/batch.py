"""The contract between data, models and serving: fixed shapes, and a mask for everything that is padded.

Letters: B batch, S prompt tokens, A action horizon, J action dims (padded to the model's), Ds state dims (padded).
Every leaf is an array, so the dictionaries are jax pytrees as they are; this module imports neither jax nor numpy.
"""

import dataclasses
from typing import Any, NotRequired, TypedDict

Array = Any  # numpy on the host, jax.Array or a tracer on the device


class Observation(TypedDict):
    """What a policy sees. A masked camera holds zeros and is invisible to attention."""

    images: dict[str, Array]  # camera slot -> uint8 (B, H, W, 3), RGB
    image_mask: dict[str, Array]  # camera slot -> bool (B,), False where this robot has no such camera
    state: Array  # float32 (B, Ds), normalised, zeros where state_mask is False
    state_mask: Array  # bool (B, Ds), False in padded dims
    prompt: Array  # int32 (B, S), 0 where padded
    prompt_mask: Array  # bool (B, S)
    # Where the policy has parts for each robot: which of its `robots` it is.
    robot: NotRequired[Array]  # int32 (B,)
    # Where the policy writes text before it acts, and it is written already, see `DexVla.think`:
    thought: NotRequired[Array]  # int32 (B, T), 0 where padded
    thought_mask: NotRequired[Array]  # bool (B, T)
    # Where the policy reads things beside images, by slot, see `EntityTokens`:
    entities: NotRequired[dict[str, Array]]  # float32 (B, N, F), zeros where there is none
    entity_mask: NotRequired[dict[str, Array]]  # bool (B, N)
    # Where they were kept, in the place of images, of which there are none then: what a frozen backbone makes of them,
    # see `Backbone.image_states`. In the policy's dtype.
    image_states: NotRequired[Array]  # (B, L + 1, T, D)
    # On the device alone, where it was looked at: what image towers see, `sequences.Seen`. Entities are then what is to
    # be read, whoever said them, see `Backbone.looked`.
    seen: NotRequired[Any]


@dataclasses.dataclass(frozen=True)
class ActionTokens:
    """FAST tokens in a text vocabulary of V ids: token w is id V - 1 - skip - w.

    count: W, tokens of the FAST vocabulary. skip: ids at the end of the vocabulary that are left alone. The defaults
    are those of the released weights, where action tokens take the ids of location tokens and of rare words.
    max_len: T, tokens of an answer at most: "Action: ", action tokens, "|" and the end; and, before it, a subtask.
    """

    max_len: int
    count: int = 2048
    skip: int = 128

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)}, expected at least {least}"
            for name, least in (("max_len", 1), ("count", 1), ("skip", 0))
            if getattr(self, name) < least
        ]
        if problems:
            raise ValueError("ActionTokens: " + "; ".join(problems))

    def first(self, vocab_size: int) -> int:
        """Returns the id of action token 0; token w is w less."""
        return vocab_size - 1 - self.skip


_TAKEN = {"names", "config", "slots", "decoder", "images_in"}  # by modules that have a part for each slot


@dataclasses.dataclass(frozen=True)
class EntityTokens:
    """Things around the robot (vehicles, lanes) that a model reads beside images: a slot, with a token for each thing.

    name: an identifier, as weights have it in their names. count: things at most. size: numbers of each.
    """

    name: str
    count: int
    size: int

    def __post_init__(self) -> None:
        if self.count < 1 or self.size < 1:
            raise ValueError(f"EntityTokens {self.name!r}: count={self.count}, size={self.size}, expected at least 1")
        if not self.name.isidentifier() or self.name in _TAKEN:
            raise ValueError(f"EntityTokens: name={self.name!r}, expected an identifier, and none of {sorted(_TAKEN)}")


class TextBatch(TypedDict):
    """Images and text with what is to be predicted of it: captions, answers, subtasks, action tokens."""

    images: dict[str, Array]  # as in Observation
    image_mask: dict[str, Array]
    prompt: Array  # int32 (B, S): a prefix, then what is to be predicted; 0 where padded
    prompt_mask: Array  # bool (B, S)
    prompt_causal: Array  # bool (B, S), True in the part whose tokens see only what is before them
    prompt_loss: Array  # bool (B, S), tokens to predict; the first one cannot be
    dataset_id: Array  # int32 (B,), index into the mixture's entries


class Batch(Observation):
    """An observation with what is to be predicted from it."""

    actions: Array  # float32 (B, A, J), normalised, zeros where action_mask is False
    action_mask: Array  # bool (B, A, J), False past the end of the episode and in padded dims
    dataset_id: Array  # int32 (B,), index into the mixture's entries
    # By what all is drawn that is drawn for a sample: its index in the run; in validation, among the frames of its
    # dataset that are looked at. As words of 32 bits, because integers of 64 are off in jax.
    position: Array  # uint32 (B, 2), high word first
    # Where the policy reads it: the episode of its dataset's split, counted from 0.
    episode: NotRequired[Array]  # int32 (B,)
    # Where the policy writes action tokens, its prompt is longer by them, (B, S + T), and these say what is what:
    prompt_causal: NotRequired[Array]  # as in TextBatch
    prompt_loss: NotRequired[Array]
    prompt_action: NotRequired[Array]  # bool (B, S + T), from "Action: " on: what an action expert does not see
