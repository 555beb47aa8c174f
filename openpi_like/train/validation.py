"""Validation on held-out episodes: a loss that can be compared between steps and runs, and errors in physical units."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from openpi_like.batch import Batch
from openpi_like.data.loader import ValidationBatch, validation_batches
from openpi_like.train.checkpoint import Contract
from openpi_like.train.config import TrainConfig
from openpi_like.train.sharding import put_batch
from openpi_like.train.state import ModelDef, Params, TrainState

# Noise is the same at every call, so losses move only when the weights do.
NOISE_SEED = 0


class Validator:
    """Evaluates the averaged weights (the raw ones where no average is kept)."""

    def __init__(self, config: TrainConfig, contract: Contract, model: ModelDef, mesh: Mesh) -> None:
        self._config, self._contract, self._model, self._mesh = config, contract, model, mesh
        self._options = contract.sampling_options()
        self._evaluate = jax.jit(self._losses_and_actions)

    def _losses_and_actions(
        self, params: Params, batch: Batch, index: jax.Array, action_mask: jax.Array, options: dict[str, Any]
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Returns the policy's validation losses, and sampled actions (B, A, J), normalised. action_mask: (A, J)."""
        policy = self._model.bind(params)
        key = jax.random.fold_in(jax.random.key(NOISE_SEED), index)
        mask = jnp.broadcast_to(action_mask, batch["actions"].shape)
        actions = policy.sample_actions(key, policy.config.observation(batch), action_mask=mask, **options)
        return policy.validation_losses(key, batch), actions

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Returns, per robot, "loss/<robot>", its parts where it has any, and "action_mae/<robot>/<dim [unit]>".

        The latter is the mean absolute error of whole sampled chunks in robot space, in the robot's own units, over
        steps before the end of the episode.
        """
        params = state.params if state.ema is None else state.ema
        losses: dict[str, list[float]] = {}
        c = self._config.model
        errors: dict[str, list[np.ndarray]] = {}
        names: dict[str, tuple[str, ...]] = {}
        held_out = validation_batches(
            self._config.data,
            batch_size=self._config.validation_batch_size,
            count=self._config.validation_batches,
            policy=self._config.model,
            tokenizer=self._contract.text_tokenizer(),
            normalizations=self._contract.normalizations,
            action_tokenizer=self._contract.fast_tokenizer(),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        for i, item in enumerate(held_out):
            robot = item.robot
            mask = (np.arange(c.action_horizon) < robot.action_horizon)[:, None] & (
                np.arange(c.action_dim) < robot.action_size
            )
            values, actions = self._evaluate(
                params, put_batch(item.batch, self._mesh), jnp.int32(i), mask, self._options
            )
            for name, value in values.items():
                losses.setdefault(f"{name}/{robot.name}", []).append(float(value))
            errors.setdefault(item.robot.name, []).append(self._absolute_errors(item, actions))
            names[item.robot.name] = item.robot.robot_action_names
        line = {name: float(np.mean(of)) for name, of in losses.items()}
        for name, parts in errors.items():
            mean = np.concatenate(parts).mean(0)
            line.update({f"action_mae/{name}/{n}": float(v) for n, v in zip(names[name], mean, strict=True)})
        return line

    def _absolute_errors(self, item: ValidationBatch, actions_BAJ: jax.Array) -> np.ndarray:
        """Returns the absolute errors of all valid steps of all hosts, (steps, Js), in robot space."""
        robot, gather = item.robot, _gather
        sampled = gather(actions_BAJ)[:, : robot.action_horizon, : robot.action_size]
        model_space = self._contract.normalizations[robot.name].invert_actions(sampled)
        predicted = robot.decode_actions(model_space, gather(item.state))
        return np.abs(predicted - gather(item.actions))[gather(item.action_mask)]


def _gather(x: Any) -> np.ndarray:
    """Returns the rows of all hosts, in the order of the hosts."""
    if jax.process_count() == 1:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
