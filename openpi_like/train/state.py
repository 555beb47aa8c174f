"""The training state as plain nested dicts of arrays, and the compiled step over it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from openpi_like.batch import Batch
from openpi_like.data.augment import Augment, augment_batch
from openpi_like.draws import named_key
from openpi_like.models.weights import flatten
from openpi_like.partition import ShardingRules, placed
from openpi_like.train.sharding import batch_sharding, replicated, weight_shardings

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step: int32 (). params, ema: nested dicts of float32 weights (ema None when off). opt_state: optax.

    The same structure also holds the shapes, or the shardings, of these leaves.
    """

    step: Any
    params: Any
    ema: Any
    opt_state: Any


class ModelDef:
    """A policy without its weights: binds nested dicts of weights to the module they belong to."""

    def __init__(self, config: Any) -> None:
        """config: object with `create(key) -> nnx.Module`, for example `Pi0Config`."""
        self.config = config
        abstract = nnx.eval_shape(lambda: config.create(jax.random.key(0)))
        self._graph, self._state = nnx.split(abstract, nnx.Param)
        self.shapes: Params = nnx.to_pure_dict(self._state)
        is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
        axes = jax.tree.map(lambda v: v.get_metadata()["axes"], self._state, is_leaf=is_variable)
        self.axes: Params = nnx.to_pure_dict(axes)

    def init(self, key: jax.Array) -> Params:
        """Returns fresh weights; call it under jit with the shardings as out_shardings."""
        return nnx.to_pure_dict(nnx.state(self.config.create(key), nnx.Param))

    def bind(self, params: Params) -> Any:
        """Returns the policy with these weights."""
        state = jax.tree.map(lambda x: x, self._state)  # a copy: the next line writes into it
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graph, state)


def state_shardings(abstract: TrainState, model: ModelDef, mesh: Mesh, rules: ShardingRules) -> TrainState:
    """Returns the shardings of a whole state; optimiser moments follow the weights they belong to."""
    weights = weight_shardings(model.axes, model.shapes, mesh, rules)
    everywhere = replicated(mesh)

    structure: Any = jax.tree.structure(model.shapes)

    def follow(subtree: Any) -> Any:
        return weights if jax.tree.structure(subtree) == structure else everywhere

    # Optimiser moments are the subtrees shaped like the weights; counts and the like are replicated.
    is_weights = lambda x: isinstance(x, dict)  # noqa: E731
    opt_state = jax.tree.map(follow, abstract.opt_state, is_leaf=is_weights)
    return TrainState(
        step=everywhere, params=weights, ema=None if abstract.ema is None else weights, opt_state=opt_state
    )


class Trainer:
    """Creates the state sharded from the first byte, and compiles the step."""

    def __init__(
        self,
        model: ModelDef,
        optimizer: optax.GradientTransformation,
        *,
        ema_decay: float | None,
        seed: int,
        mesh: Mesh,
        rules: ShardingRules,
        dataset_names: tuple[str, ...],
        augment: Augment | None = None,
    ) -> None:
        self.model, self.optimizer, self.ema_decay, self.seed, self.mesh = model, optimizer, ema_decay, seed, mesh
        self.rules, self.dataset_names, self.augment = rules, dataset_names, augment
        self.abstract = jax.eval_shape(self._fresh, jax.random.key(seed))
        self.shardings = state_shardings(self.abstract, model, mesh, rules)
        self._init = jax.jit(self._fresh, out_shardings=self.shardings)
        self._from_params = jax.jit(self._with_params, out_shardings=self.shardings, donate_argnums=0)
        everywhere = replicated(mesh)
        self.train_step = jax.jit(
            self._step,
            in_shardings=(self.shardings, batch_sharding(mesh)),
            out_shardings=(self.shardings, everywhere),
            donate_argnums=0,
        )

    def _with_params(self, params: Params) -> TrainState:
        # A copy for the average: step donates the state, and a buffer cannot be donated twice.
        ema = None if self.ema_decay is None else jax.tree.map(jnp.copy, params)
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, ema=ema, opt_state=self.optimizer.init(params))

    def _fresh(self, key: jax.Array) -> TrainState:
        return self._with_params(self.model.init(key))

    def init(self) -> TrainState:
        """Returns a state with fresh weights; no device ever holds more than its own part."""
        return self._init(jax.random.key(self.seed))

    def fresh_weights(self, names: Sequence[str]) -> dict[str, jax.Array]:
        """Returns freshly initialised weights, flat by name; computes no others."""
        shardings = flatten(self.shardings.params)

        def draw(key: jax.Array) -> dict[str, jax.Array]:
            weights = flatten(self.model.init(key))
            return {name: weights[name] for name in names}

        return jax.jit(draw, out_shardings={name: shardings[name] for name in names})(jax.random.key(self.seed))

    def init_from(self, params: Params) -> TrainState:
        """Returns a state at step 0 that starts from given weights, whose buffers it takes over."""
        return self._from_params(params)

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimiser step. What is drawn for a sample depends on (seed, position) alone."""
        of_images, of_loss = (named_key(jax.random.key(self.seed), name) for name in ("augment", "loss"))
        if self.augment is not None:
            batch = augment_batch(of_images, batch, self.augment)

        def loss_fn(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
            return self.model.bind(params).loss(of_loss, batch)

        with placed(self.mesh, self.rules):
            (loss, per_sample), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None and self.ema_decay is not None:
            decay = self.ema_decay
            ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
        # Parts of the loss that a policy names, each over the samples that have it.
        for name in (k for k in per_sample if f"{k}_valid" in per_sample):
            count = per_sample[f"{name}_valid"].sum()
            metrics[f"loss/{name}"] = per_sample[name].sum() / jnp.maximum(count, 1)
            metrics[f"samples/{name}"] = count
        one_hot = jax.nn.one_hot(batch["dataset_id"], len(self.dataset_names))  # (B, datasets), a handful of columns
        sums, counts = per_sample["loss"] @ one_hot, one_hot.sum(0)
        for i, name in enumerate(self.dataset_names):
            metrics[f"loss/{name}"] = sums[i] / jnp.maximum(counts[i], 1)
            metrics[f"samples/{name}"] = counts[i]
        return TrainState(state.step + 1, params, ema, opt_state), metrics
