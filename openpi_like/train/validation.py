"""Validation on held-out episodes: a loss that can be compared between steps and runs, and errors in physical units."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from openpi_like.batch import Batch
from openpi_like.data.loader import ValidationBatch, validation_batches
from openpi_like.models.paligemma import masked_means
from openpi_like.models.pi0 import draw_noise
from openpi_like.train.checkpoint import Contract
from openpi_like.train.config import TrainConfig
from openpi_like.train.sharding import put_batch
from openpi_like.train.state import ModelDef, Params, TrainState

# Flow times and noise are the same at every call, so the loss moves only when the weights do.
FLOW_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
NOISE_SEED = 0


class Validator:
    """Evaluates the averaged weights (the raw ones where no average is kept)."""

    def __init__(self, config: TrainConfig, contract: Contract, model: ModelDef, mesh: Mesh) -> None:
        self._config, self._contract, self._model, self._mesh = config, contract, model, mesh
        self._evaluate = jax.jit(self._losses_and_actions)

    def _losses_and_actions(self, params: Params, batch: Batch, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the loss averaged over the grid of flow times, and sampled actions (B, A, J), normalised."""
        policy = self._model.bind(params)
        key = jax.random.fold_in(jax.random.key(NOISE_SEED), index)
        noise = draw_noise(key, batch["state"].shape[0], batch["actions"].shape[1:])
        mask = policy.loss_mask(batch)

        def at_time(time: jax.Array) -> jax.Array:
            error = policy.flow_loss(batch, noise, jnp.full(batch["state"].shape[0], time))
            return masked_means(error, mask)[0]

        loss = jax.lax.map(at_time, jnp.asarray(FLOW_TIMES)).mean()
        observation = {k: batch[k] for k in ("images", "image_mask", "state", "state_mask", "prompt", "prompt_mask")}
        dims = batch["action_mask"].any(1)
        return loss, policy.sample_actions(key, observation, noise=noise, action_dims=dims)

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Returns, per robot, "loss/<robot>" and "action_mae/<robot>/<dim [unit]>".

        The latter is the mean absolute error of whole sampled chunks in robot space, in the robot's own units, over
        steps before the end of the episode.
        """
        params = state.params if state.ema is None else state.ema
        losses: dict[str, list[float]] = {}
        errors: dict[str, list[np.ndarray]] = {}
        names: dict[str, tuple[str, ...]] = {}
        held_out = validation_batches(
            self._config.data,
            batch_size=self._config.validation_batch_size,
            count=self._config.validation_batches,
            policy=self._config.model,
            tokenizer=self._contract.text_tokenizer(),
            normalizations=self._contract.normalizations,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        for i, item in enumerate(held_out):
            loss, actions = self._evaluate(params, put_batch(item.batch, self._mesh), jnp.int32(i))
            losses.setdefault(item.robot.name, []).append(float(loss))
            errors.setdefault(item.robot.name, []).append(self._absolute_errors(item, actions))
            names[item.robot.name] = item.robot.robot_action_names
        values = {f"loss/{robot}": float(np.mean(of)) for robot, of in losses.items()}
        for robot, parts in errors.items():
            mean = np.concatenate(parts).mean(0)
            values.update({f"action_mae/{robot}/{n}": float(v) for n, v in zip(names[robot], mean, strict=True)})
        return values

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
