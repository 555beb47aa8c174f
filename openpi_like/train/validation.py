"""Validation on held-out episodes: a loss that can be compared between steps and runs, and errors in physical units."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float

from openpi_like.batch import Batch
from openpi_like.data.loader import ValidationBatch, validation_batches
from openpi_like.data.normalize import FLOOR
from openpi_like.models import perceiving
from openpi_like.train.checkpoints.contract import Contract
from openpi_like.train.config import TrainConfig
from openpi_like.train.sharding import check_batch, put_batch
from openpi_like.train.state import Params, Trainer, TrainState

# Noise is the same at every call, so losses move only when the weights do.
NOISE_SEED = 0


def held_out_losses(trainer: Trainer, params: Params, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
    """Returns the policy's losses of a batch. params: all weights, nested."""
    with trainer.tracing():
        return perceiving.held_out_losses(trainer.model.bind(params), key, batch)


def sampled_chunks(
    trainer: Trainer, params: Params, batch: Batch, key: jax.Array, action_mask: jax.Array, options: dict[str, Any]
) -> jax.Array:
    """Returns sampled actions (B, A, J), normalised. params: all weights, nested. action_mask: (A, J)."""
    with trainer.tracing():
        policy = trainer.model.bind(params)
        mask = jnp.broadcast_to(action_mask, batch["actions"].shape)
        return policy.sample_actions(key, policy.config.observation(batch), action_mask=mask, **options)


def action_errors(
    predicted: Float[np.ndarray, "steps Js"], done: Float[np.ndarray, "steps Js"]
) -> tuple[Float[np.ndarray, "Js"], float]:
    """Returns the mean absolute error of each dim, in its own unit, and one number for all of them, without one.

    That is the mean, over the dims that vary, of this error beside the mean absolute deviation of what was done. NaN
    where none of them varies.
    """
    error, spread = np.abs(predicted - done).mean(0), np.abs(done - done.mean(0)).mean(0)
    varies = spread >= FLOOR
    return error, float((error[varies] / spread[varies]).mean()) if varies.any() else float("nan")


class Validator:
    """Evaluates the averaged weights (the raw ones where no average is kept)."""

    def __init__(self, config: TrainConfig, contract: Contract, trainer: Trainer) -> None:
        """
        Raises:
            DatasetError, ValueError: the held-out data cannot be used, which a run is to learn before its first step.
        """
        check_batch(config.validation_batch_size, 1, trainer.mesh, name="validation_batch_size")
        self._config, self._contract, self._mesh = config, contract, trainer.mesh
        self._options = contract.sampling_options()
        for _ in self._batches(count=1):
            pass
        self._losses = jax.jit(functools.partial(held_out_losses, trainer))
        self._actions = jax.jit(functools.partial(sampled_chunks, trainer))

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Returns, per robot, "loss/<robot>", its parts where it has any, and errors of sampled actions.

        "action_mae/<robot>/<dim [unit]>": the mean absolute error of whole sampled chunks in robot space, in the
        robot's own units, over steps before the end of the episode. "action_error/<robot>": each of these beside how
        far the held-out actions themselves are from their mean, and the mean of that over the dims that vary: one
        number for dims of all units, 1 for a policy that always says the mean. Datasets without actions are
        "<robot>, text" and have losses alone.
        "saturated": coefficients of this host that action tokens could not write, where there are any.
        """
        params = state.weights()
        losses: dict[str, list[float]] = {}
        errors: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        names: dict[str, tuple[str, ...]] = {}
        saturated = 0
        for i, item in enumerate(self._batches(count=self._config.validation_batches)):
            robot, batch = item.robot, put_batch(item.batch, self._mesh)
            name = item.name
            key = jax.random.fold_in(jax.random.key(NOISE_SEED), i)
            saturated += item.saturated
            for part, value in self._losses(params, batch, key).items():
                if not np.isnan(value) or part == "loss":
                    losses.setdefault(f"{part}/{name}", []).append(float(value))
            if not item.acts:
                continue
            mask = self._config.model.chunk_mask(robot.action_horizon, robot.action_size)
            actions = self._actions(params, batch, key, mask, self._options)
            errors.setdefault(name, []).append(self._compared(item, actions))
            names[name] = robot.robot_action_names
        line = {name: float(np.mean(of)) for name, of in losses.items()}
        for name, parts in errors.items():
            mean, relative = action_errors(*(np.concatenate(of) for of in zip(*parts, strict=True)))
            line.update({f"action_mae/{name}/{n}": float(v) for n, v in zip(names[name], mean, strict=True)})
            line[f"action_error/{name}"] = relative
        return line | ({"saturated": float(saturated)} if saturated else {})

    def _batches(self, *, count: int) -> Iterator[ValidationBatch]:
        return validation_batches(
            self._config.data,
            batch_size=self._config.validation_batch_size,
            count=count,
            policy=self._config.model,
            tokenizer=self._contract.text_tokenizer(),
            normalizations=self._contract.normalizations,
            action_tokenizer=self._contract.fast_tokenizer(),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def _compared(self, item: ValidationBatch, actions_BAJ: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """Returns what is predicted and what was done at all valid steps of all hosts, (steps, Js), in robot space."""
        robot, gather = item.robot, _gather
        sampled = gather(actions_BAJ)[:, : robot.action_horizon, : robot.action_size]
        model_space = self._contract.normalizations[robot.name].invert_actions(sampled)
        predicted = robot.decode_actions(model_space, gather(item.state))
        mask = gather(item.action_mask)
        return predicted[mask], gather(item.actions)[mask]


def _gather(x: Any) -> np.ndarray:
    """Returns the rows of all hosts, in the order of the hosts."""
    if jax.process_count() == 1:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
