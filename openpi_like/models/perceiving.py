"""How any policy is trained that may see for itself what is around the robot: by its own loss, of what it reads in
training, and by that of its perception, on the annotations of the data.

The trainer and the validator call these in the place of a policy's own `loss`, `loss_counts` and `validation_losses`,
which do not know of it: they read the entities of the batch that they are given. Acting has no need of this, see
`Backbone.looked`.

Letters: B batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from openpi_like.models.backbone import masked_means
from openpi_like.models.losses import Loss, weighted_sum
from openpi_like.models.scene_perception import Perceived


def training_loss(
    policy: Any, key: Key[Array, ""], batch: Any, *, counts: dict[str, Float[Array, ""]] | None = None
) -> Loss:
    """Returns the scalar and metrics by sample: the policy's own; with a perception, the sum of both.

    Then there are also "policy_loss" (unless it is trained alone), "perception_loss" and what that is made of, see
    `ScenePerception.errors`, each with its own "..._valid". counts: see `training_counts`.

    Raises:
        ValueError: the batch does not fit the config; lists everything that does not.
    """
    of, given = policy.config.perception, {} if counts is None else {"counts": counts}
    if of is None:
        return policy.loss(key, batch, **given)
    read, perceived = _looked(policy, batch)
    parts, named = {}, {}
    if not of.alone:
        scalar, metrics = policy.loss(key, read, **given)
        parts["policy_loss"] = 1.0, (scalar, metrics)
        named = {name: x for name, x in metrics.items() if name not in ("loss", "valid")}
    errors_B, made_of = policy.backbone.perception.errors(perceived, batch["entities"], batch["entity_mask"])
    samples, every_B1 = None if counts is None else counts["samples"], jnp.ones((len(errors_B), 1), bool)
    parts["perception_loss"] = of.weight, masked_means(errors_B[:, None], every_B1, samples)
    parts |= {name: (0.0, masked_means(*errors)) for name, errors in made_of.items()}
    total, metrics = weighted_sum(parts)
    return total, named | metrics


def training_counts(policy: Any, batch: Any) -> dict[str, Float[Array, ""]]:
    """Returns what `training_loss` divides by. A part of a batch, with these of all of it, has its part of the loss."""
    counts = policy.loss_counts(batch)
    if policy.config.perception is not None:
        counts |= {"samples": jnp.float32(len(batch["prompt"]))}
    return counts


def held_out_losses(policy: Any, key: Key[Array, ""], batch: Any) -> dict[str, Float[Array, ""]]:
    """Returns the policy's `validation_losses`; with a perception, "loss" is the sum of both, as in training.

    Then there are also the parts that `training_loss` adds; NaN where no sample has such.

    Raises:
        ValueError: the batch does not fit the config; lists everything that does not.
    """
    of = policy.config.perception
    if of is None:
        return policy.validation_losses(key, batch)
    read, perceived = _looked(policy, batch)
    own = {} if of.alone else policy.validation_losses(key, read)
    losses = {"policy_loss": own.pop("loss"), **own} if own else {}
    errors_B, made_of = policy.backbone.perception.errors(perceived, batch["entities"], batch["entity_mask"])
    losses["perception_loss"] = errors_B.mean()
    for name, (errors, real) in made_of.items():
        losses[name] = jnp.where(real.any(), masked_means(errors, real)[0], jnp.nan)
    return {"loss": losses.get("policy_loss", 0.0) + of.weight * losses["perception_loss"], **losses}


def _looked(policy: Any, batch: Any) -> tuple[Any, Perceived]:
    """Returns a batch with the entities that the policy reads in training, looked at once, and what is perceived."""
    of = policy.config.perception
    policy.config.check_batch(batch)
    seen = policy.backbone.see(batch)
    perceived: Perceived = policy.backbone.perception(seen)
    read = {}
    if of.reads == "predictions":
        read = (jax.lax.stop_gradient(perceived) if of.detached else perceived).entities()
    return {**batch, "seen": seen, **read}, perceived
