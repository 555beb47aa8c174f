"""The contract between data, models and serving: fixed shapes, and a mask for everything that is padded.

Letters: B batch, S prompt tokens, A action horizon, J action dims (padded to the model's), Ds state dims (padded).
Every leaf is an array, so the dictionaries are jax pytrees as they are; this module imports neither jax nor numpy.
"""

from typing import Any, TypedDict

Array = Any  # numpy on the host, jax.Array or a tracer on the device


class Observation(TypedDict):
    """What a policy sees. A masked camera holds zeros and is invisible to attention."""

    images: dict[str, Array]  # camera slot -> uint8 (B, H, W, 3), RGB
    image_mask: dict[str, Array]  # camera slot -> bool (B,), False where this robot has no such camera
    state: Array  # float32 (B, Ds), normalised, zeros where state_mask is False
    state_mask: Array  # bool (B, Ds), False in padded dims
    prompt: Array  # int32 (B, S), 0 where padded
    prompt_mask: Array  # bool (B, S)


class TextBatch(TypedDict):
    """Images and text with what is to be predicted of it: captions, answers, subtasks."""

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
