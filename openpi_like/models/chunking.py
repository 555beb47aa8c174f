"""Real-time chunking: a chunk that goes on from the one that is being executed while it is computed.

Actions 0 .. delay - 1 of the new chunk are executed before it arrives, as the old chunk has them. Two ways to make the
rest fit to these: a policy of any training is guided, at every flow step, to what is left of the old chunk (Black et
al. 2025, "Real-time execution of action chunking flow policies", arXiv 2506.07339); one that was trained with delays
(`FlowConfig.max_delay`) takes them as given.

Letters: B batch, A action horizon, J action dims.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Key

from openpi_like.batch import Array as Leaf
from openpi_like.config import near_names
from openpi_like.draws import named_key

SCHEDULES = ("exp", "linear", "ones", "zeros")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Previous:
    """What is left of the chunk before, normalised, beginning at the step that the new one begins at.

    actions: (B, A, J), zeros behind its end. delay: int (B,), how many of them are executed before the new chunk
    arrives. weights: (B, A), of `soft_mask`; 0 leaves a row alone. limit: (B,), of the guidance (beta in the paper).
    """

    actions: Leaf
    delay: Leaf
    weights: Leaf
    limit: Leaf

    def given(self, horizon: int) -> Bool[Array, "B A"]:
        """Returns which actions are executed before the new chunk arrives."""
        return jnp.arange(horizon) < self.delay[:, None]

    def put(self, x_BAJ: Float[Array, "B A J"]) -> Float[Array, "B A J"]:
        """Returns chunks with the actions in their places that are executed before they arrive."""
        return jnp.where(self.given(x_BAJ.shape[1])[..., None], self.actions, x_BAJ)


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How a policy is led to the old chunk. limit: beta in the paper. schedule: of `soft_mask`."""

    limit: float = 5.0
    schedule: str = "exp"

    def __post_init__(self) -> None:
        if not self.limit >= 0 or self.schedule not in SCHEDULES:
            expected = f"expected limit >= 0 and one of {', '.join(SCHEDULES)}"
            raise ValueError(f"Guidance: limit={self.limit}, schedule={self.schedule!r}, {expected}")


def previous_row(actions: Float32[np.ndarray, "n J"], delay: int, shape: tuple[int, int], how: Guidance) -> Previous:
    """Returns one row of `Previous`, in numpy. actions: normalised. delay: at most n. shape: (A, J) of the model."""
    padded = np.zeros(shape, np.float32)
    padded[: len(actions), : actions.shape[1]] = actions
    weights = soft_mask(delay, len(actions), shape[0], how.schedule)
    return Previous(padded, np.int32(delay), weights, np.float32(how.limit))


def soft_mask(delay: int, until: int, horizon: int, schedule: str = "exp") -> Float32[np.ndarray, "A"]:
    """Returns how much each action of a new chunk is held to the old one (eq. 5 of the paper, where it is "exp").

    delay: actions before that are certain, weight 1. until: actions from there on are free, weight 0; between them the
    weight falls, linearly, or faster ("exp"); "ones" keeps it, and "zeros" lets go at once.

    Raises:
        ValueError: no such schedule, or not 0 <= delay, until <= horizon.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is unknown; {near_names(schedule, SCHEDULES)}")
    if not (0 <= delay <= horizon and 0 <= until <= horizon):
        raise ValueError(f"delay={delay}, until={until}, expected both in 0 .. {horizon}, the horizon")
    start, i = min(delay, until), np.arange(horizon)
    falling = 1 - (i - start + 1) / (until - start + 1)
    between = {
        "linear": falling,
        "exp": falling * np.expm1(falling) / np.expm1(1.0),
        "ones": np.ones(horizon),
        "zeros": np.zeros(horizon),
    }[schedule]
    return np.where(i < start, 1.0, np.where(i < until, between, 0.0)).astype(np.float32)


def guided(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    previous: Previous,
    action_mask: Bool[Array, "B A J"] | None = None,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns a velocity that leads to chunks which agree with the previous one, as far as `weights` say.

    The estimate of the clean chunk, x - t v(x, t), is pulled to it by the gradient of their weighted distance, through
    the network (eq. 2 to 4 of the paper, whose flow time counts the other way). action_mask: entries that there are.
    """

    def corrected(x_BAJ: jax.Array, time_B: jax.Array) -> jax.Array:
        t = time_B[:, None, None]

        def clean(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            v = velocity(x, time_B)
            return x - t * v, v

        estimate, pull_back, v = jax.vjp(clean, x_BAJ, has_aux=True)
        error = previous.weights[..., None] * (previous.actions - estimate)
        if action_mask is not None:
            error = jnp.where(action_mask, error, 0.0)
        (gradient,) = pull_back(error)
        done = 1 - time_B
        # At t = 1 the quotient is infinite, and the limit is what counts.
        strength = jnp.minimum((done**2 + time_B**2) / jnp.maximum(done * time_B, 1e-12), previous.limit)
        return v - strength[:, None, None] * gradient

    return corrected


def draw_delay(keys_B: Key[Array, "B"], mask_BAJ: Bool[Array, "B A J"], max_delay: int) -> Bool[Array, "B A"]:
    """Returns which actions of training chunks are given: the first d, d uniform in 0 .. max_delay.

    Of a chunk that ends with its episode at least the last action is left to be learned.
    """
    valid_BA = mask_BAJ.any(2)
    drawn = jax.vmap(lambda key: jax.random.randint(named_key(key, "delay"), (), 0, max_delay + 1))(keys_B)
    delay = jnp.minimum(drawn, jnp.maximum(valid_BA.sum(1) - 1, 0))
    return jnp.arange(mask_BAJ.shape[1]) < delay[:, None]
