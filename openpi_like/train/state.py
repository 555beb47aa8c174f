"""The training state as plain nested dicts of arrays, and the compiled step over it."""

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from openpi_like.batch import Batch
from openpi_like.config import near_names
from openpi_like.data.augment import Augment, augment_batch
from openpi_like.draws import named_key
from openpi_like.models.arrays import leaf_name
from openpi_like.models.attention import Sizes, computed_by, sizes_in
from openpi_like.models.lora import Lora, add_lora, base_name, is_lora
from openpi_like.models.param import MapDims, weight_name
from openpi_like.models.perceiving import training_counts, training_loss
from openpi_like.models.quantize import QUANTIZED, is_stacked, quantize
from openpi_like.models.weights import flatten, named_weights, put_weights, unflatten
from openpi_like.partition import ShardingRules, pin, placed
from openpi_like.train.sharding import batch_sharding, replicated, weight_shardings

Params = dict[str, Any]


# ---- What is trained -------------------------------------------------------------------------------------------------

FROZEN_DTYPES = ("float32", "bfloat16", *QUANTIZED)


@dataclasses.dataclass(frozen=True)
class Trainable:
    """What of a policy is trained, and how the rest is held.

    lora: an overlay on linear maps; then it is trained, and what it names besides. frozen: regular expressions of names
    of weights that are not trained. frozen_dtype: in which linear maps and tables that are not trained are held, one of
    `FROZEN_DTYPES`; tables never in fewer bits than bfloat16.
    """

    lora: Lora | None = None
    frozen: tuple[str, ...] = ()
    frozen_dtype: str = "float32"

    def __post_init__(self) -> None:
        problems = []
        if self.frozen_dtype not in FROZEN_DTYPES:
            problems.append(f"frozen_dtype={self.frozen_dtype!r}; {near_names(self.frozen_dtype, FROZEN_DTYPES)}")
        for pattern in self.frozen:
            try:
                re.compile(pattern)
            except re.error as e:
                problems.append(f"frozen: {pattern!r} is no regular expression: {e}")
        if problems:
            raise ValueError("Trainable: " + "; ".join(problems))


def trained_names(
    names: Sequence[str], trainable: Trainable, *, memory: frozenset[str] = frozenset()
) -> frozenset[str]:
    """Returns which of a model's weights are trained, by name; with LoRA, the names of its overlay are among them.

    memory: names of weights that are written, see `openpi_like.models.param.memory`; unless frozen, they are too.

    Raises:
        ValueError: a pattern matches no weight, or an overlay; nothing but memory is left, or nothing is held in
            `frozen_dtype`. Lists all that is wrong.
    """
    lora, frozen = trainable.lora, trainable.frozen
    also = () if lora is None else lora.also_train
    problems = [
        f"{where} {p!r} matches no weight; {near_names(p, names)}"
        for where, patterns in (("frozen", frozen), ("lora.also_train", also))
        for p in patterns
        if not any(re.search(p, name) for name in names)
    ]
    trained = [
        name
        for name in names
        if (lora is None or is_lora(name) or name in memory or any(re.search(p, name) for p in also))
        and not any(re.search(p, name) for p in frozen)
    ]
    problems += [
        f"frozen {p!r} matches overlays, such as {over[0]}; narrow the LoRA patterns, or leave it out"
        for p in frozen
        if (over := [name for name in names if is_lora(name) and re.search(p, name)])
    ]
    if len(trained) == len(names) and trainable.frozen_dtype != "float32":
        problems.append(f"frozen_dtype={trainable.frozen_dtype!r}, but all weights are trained, which float32 is for")
    if memory.issuperset(trained):
        problems.append(f"nothing is left to train: frozen={frozen} matches all weights")
    if problems:
        raise ValueError("what is to be trained:\n  " + "\n  ".join(problems))
    return frozenset(trained)


# ---- State and step --------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step: int32 (). params: nested dict of the float32 weights that are trained, and of memory, which is written.
    frozen: nested dict of the others, as they are held. ema: like params without memory (None when off). opt_state:
    optax, of params without memory.

    The same structure also holds the shapes, or the shardings, of these leaves.
    """

    step: Any
    params: Any
    frozen: Any
    ema: Any
    opt_state: Any

    def weights(self, *, average: bool = True) -> Params:
        """Returns all weights, nested: the averaged ones where an average is kept (and asked for), and the frozen."""
        averaged = self.ema if average and self.ema is not None else {}
        return join(self.params, averaged, self.frozen)


def join(*weights: Params) -> Params:
    """Returns nested dicts of weights as one; of a weight that is in several, the last is taken."""
    return unflatten({name: x for of in weights for name, x in flatten(of).items()})


class ModelDef:
    """A policy without its weights: binds nested dicts of weights to the module they belong to."""

    def __init__(self, config: Any, trainable: Trainable = Trainable()) -> None:
        """config: object with `create(key) -> nnx.Module`, for example `Pi0Config`. trainable: may add an overlay.

        Raises:
            ValueError: a pattern matches no weight, or nothing is trained.
        """
        self.config, self.trainable, self.lora = config, trainable, trainable.lora
        self.abstract = nnx.eval_shape(lambda: self._create(jax.random.key(0)))
        self._graph, self._state = nnx.split(self.abstract, nnx.Param)
        self.shapes: Params = named_weights(self._state)
        every = nnx.to_flat_state(self._state)
        self._metadata = {weight_name(path): variable.get_metadata() for path, variable in every}
        self.axes: Params = unflatten({name: metadata["axes"] for name, metadata in self._metadata.items()})
        self.memory = frozenset(name for name, metadata in self._metadata.items() if metadata.get("memory", False))
        self.trained = trained_names(sorted(self._metadata), trainable, memory=self.memory)
        self.learned = self.trained - self.memory  # by gradients; memory is written
        self.maps = self._inner_maps()  # see `openpi_like.train.muon`

    def _create(self, key: jax.Array) -> nnx.Module:
        model = self.config.create(key)
        return model if self.lora is None else add_lora(model, self.lora, named_key(key, "lora"))

    def _inner_maps(self) -> dict[str, MapDims]:
        """Returns the trained linear maps, without those to and from actions, states and tokens, and their overlays."""
        outer = {name for name, of in self._metadata.items() if {"action", "vocab"} & set(of["axes"])}
        return {
            name: MapDims.of(of["axes"], of["inputs"], per_head=of.get("per_head", False))
            for name, of in self._metadata.items()
            if name in self.trained and "inputs" in of and not {name, base_name(name)} & outer
        }

    def inputs(self, name: str) -> tuple[int, ...] | None:
        """Returns the dimensions that a weight sums over, where it is that of a linear map."""
        return self._metadata[name].get("inputs")

    def is_large(self, name: str) -> bool:
        """Says whether a weight is one of those that take the memory, used in the compute dtype: maps and tables."""
        metadata = self._metadata[name]
        return ("inputs" in metadata and is_stacked(metadata["axes"])) or metadata.get("table", False)

    def init(self, key: jax.Array) -> Params:
        """Returns fresh weights; call it under jit with the shardings as out_shardings."""
        return named_weights(nnx.state(self._create(key), nnx.Param))

    def bind(self, params: Params) -> Any:
        """Returns the policy with these weights."""
        state = jax.tree.map(lambda x: x, self._state)  # a copy: the next line writes into it
        put_weights(state, params)
        return nnx.merge(self._graph, state)

    def hold(self, name: str, value: jax.Array) -> Any:
        """Returns a weight as it is held: in float32 where it is trained, see `Trainable.frozen_dtype` otherwise."""
        dtype = self.trainable.frozen_dtype
        if name in self.trained or not self.is_large(name) or dtype == "float32":
            return value
        inputs = self.inputs(name)
        if dtype == "bfloat16" or inputs is None:
            return value.astype(jnp.bfloat16)
        return quantize(value, inputs, dtype)


def shardings_like(shardings: Mapping[str, NamedSharding], tree: Any, mesh: Mesh) -> Any:
    """Returns the shardings of an optimiser state: what belongs to a weight lies like it, all else everywhere.

    shardings: of the trained weights by name. tree: of shapes; what has the name of a weight (a moment, or the scales
    of one, which have fewer entries along an axis) is recognised by it.
    """

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        of_dicts = itertools.takewhile(lambda key: isinstance(key, jax.tree_util.DictKey), reversed(path))
        sharding = shardings.get(leaf_name(tuple(of_dicts)[::-1]))
        if sharding is None or len(leaf.shape) != len(sharding.spec):
            return replicated(mesh)
        fits = [
            part if part is None or n % mesh.shape[part] == 0 else None
            for part, n in zip(sharding.spec, leaf.shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*fits))

    return jax.tree_util.tree_map_with_path(of, tree)


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
        accumulate: int = 1,
    ) -> None:
        """
        Args:
            accumulate: parts that a batch is taken in, one after the other, in less memory.
        """
        self.model, self.optimizer, self.ema_decay, self.seed, self.mesh = model, optimizer, ema_decay, seed, mesh
        self.rules, self.dataset_names, self.augment = rules, dataset_names, augment
        self.trained = model.trained
        self.accumulate = accumulate
        # What computes attention, see `computed_by`; to be set before the first step.
        self.attention: Mapping[Sizes, str] | str = "einsum"
        self.abstract = jax.eval_shape(self._fresh, jax.random.key(seed))
        # Of all weights as they are drawn or read, in float32.
        self.placement: dict[str, NamedSharding] = flatten(weight_shardings(model.axes, model.shapes, mesh, rules))
        self.shardings = self._shardings()
        self._init = jax.jit(lambda: self._fresh(self._known_key()), out_shardings=self.shardings)
        self._from_weights = jax.jit(self._with_weights, out_shardings=self.shardings, donate_argnums=(0, 1))
        everywhere = replicated(mesh)
        self.train_step = jax.jit(
            self._step,
            in_shardings=(self.shardings, batch_sharding(mesh)),
            out_shardings=(self.shardings, everywhere),
            donate_argnums=0,
        )

    # ---- State -------------------------------------------------------------------------------------------------------

    def _shardings(self) -> TrainState:
        axes, everywhere = flatten(self.model.axes), replicated(self.mesh)

        def held(name: str, value: Any) -> Any:
            """A weight in fewer bits is an array and its scales; each lies by its own shape."""
            spec = lambda x: NamedSharding(self.mesh, self.rules.spec(axes[name], x.shape, self.mesh))  # noqa: E731
            return jax.tree.map(spec, value)

        params = unflatten({name: self.placement[name] for name in flatten(self.abstract.params)})
        frozen = unflatten({name: held(name, value) for name, value in flatten(self.abstract.frozen).items()})
        opt_state = shardings_like(self.placement, self.abstract.opt_state, self.mesh)
        ema = None if self.abstract.ema is None else self._learned(params)
        return TrainState(step=everywhere, params=params, frozen=frozen, ema=ema, opt_state=opt_state)

    def hold(self, name: str, value: jax.Array) -> Any:
        """Returns a weight as the state holds it, for `init_from`: frozen ones may take fewer bits."""
        of = self.shardings.params if name in self.trained else self.shardings.frozen
        return jax.jit(lambda x: self.model.hold(name, x), out_shardings=flatten(of)[name])(value)

    def _with_weights(self, params: Params, frozen: Params) -> TrainState:
        learned = self._learned(params)
        # A copy for the average: step donates the state, and a buffer cannot be donated twice.
        ema = None if self.ema_decay is None else jax.tree.map(jnp.copy, learned)
        opt_state = self.optimizer.init(learned)
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, frozen=frozen, ema=ema, opt_state=opt_state)

    def _split(self, weights: Mapping[str, Any]) -> tuple[Params, Params]:
        """Returns flat weights as nested dicts of those that are trained and those that are not."""
        trained = {name: value for name, value in weights.items() if name in self.trained}
        return unflatten(trained), unflatten({k: v for k, v in weights.items() if k not in trained})

    def _learned(self, params: Params) -> Params:
        """Returns what of `TrainState.params` gradients move: all but memory."""
        return unflatten({name: x for name, x in flatten(params).items() if name in self.model.learned})

    def _fresh(self, key: jax.Array) -> TrainState:
        weights = flatten(self.model.init(key))
        return self._with_weights(*self._split({name: self.model.hold(name, w) for name, w in weights.items()}))

    def init(self) -> TrainState:
        """Returns a state with fresh weights; no device ever holds more than its own part."""
        return self._init()

    def fresh_weights(self, names: Sequence[str]) -> dict[str, jax.Array]:
        """Returns freshly initialised weights, flat by name; computes no others."""

        def draw() -> dict[str, jax.Array]:
            weights = flatten(self.model.init(self._known_key()))
            return {name: self.model.hold(name, weights[name]) for name in names}

        held = flatten(self.shardings.params) | flatten(self.shardings.frozen)
        return jax.jit(draw, out_shardings={name: held[name] for name in names})()

    def _known_key(self) -> jax.Array:
        """Returns the seed's key as a constant: as an argument it would make fresh weights take twice as long to
        compile, see `named_key`."""
        with jax.ensure_compile_time_eval():
            return jax.random.key(self.seed)

    def init_from(self, weights: Params) -> TrainState:
        """Returns a state at step 0 that starts from given weights, as `hold` gives them; takes over their buffers."""
        return self._from_weights(*self._split(flatten(weights)))

    # ---- Step --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """While a function is traced: where its arrays lie on the mesh, and what computes attention, as in a step."""
        with placed(self.mesh, self.rules), computed_by(self.attention):
            yield

    def attention_sizes(self, batch: Batch) -> set[Sizes]:
        """Returns the sizes of attention in a step. batch: of shapes, over all devices."""
        part = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((x.shape[0] // self.accumulate, *x.shape[1:]), x.dtype), batch
        )
        weights = join(self.abstract.params, self.abstract.frozen)
        return sizes_in(self.losses, weights, part)

    def losses(
        self, weights: Params, batch: Batch, counts: dict[str, jax.Array] | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the loss and per-sample metrics of a step; what is drawn depends on (seed, position) alone.

        weights: all of them, nested. counts: what the policy's loss divides by, where `batch` is a part of one.
        """
        of_images, of_loss = self._key("augment"), self._key("loss")
        if self.augment is not None:
            with jax.named_scope("augment"):
                batch = augment_batch(of_images, batch, self.augment)
        return training_loss(self.model.bind(weights), of_loss, batch, counts=counts)

    def _key(self, name: str) -> jax.Array:
        return named_key(jax.random.key(self.seed), name)

    def _gradients(
        self, state: TrainState, batch: Batch, counts: dict[str, jax.Array] | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array], Params]:
        """Returns the loss, per-sample metrics and the gradient; of memory, which a loss may read, there is none."""
        of = lambda learned: self.losses(join(state.params, learned, state.frozen), batch, counts)  # noqa: E731
        (loss, per_sample), grads = jax.value_and_grad(of, has_aux=True)(self._learned(state.params))
        return loss, per_sample, grads

    def parts(self, batch: Batch) -> Batch:
        """Returns a batch in parts (parts, rows, ...): row i is in part i % accumulate, so no row moves."""
        n = self.accumulate

        def rows(x: jax.Array) -> jax.Array:
            parts = x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1)
            return pin(parts, None, "batch", *[None] * (x.ndim - 1))

        return jax.tree.map(rows, batch)

    @staticmethod
    def whole(parts: Any) -> Any:
        """Inverse of `parts`."""
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)

    def _accumulated(self, state: TrainState, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array], Params]:
        """As `_gradients` of the whole batch, in parts."""
        # Each part's loss is a part of the whole batch's: a sum over its own samples, by what counts in all of them.
        counts = training_counts(self.model.bind(state.weights(average=False)), batch)

        shardings = self._learned(self.shardings.params)

        def add(carry: tuple[jax.Array, Params], part: Batch) -> tuple[tuple[jax.Array, Params], dict[str, jax.Array]]:
            loss, per_sample, grads = self._gradients(state, part, counts)
            total = jax.tree.map(jnp.add, carry[1], grads)
            return (carry[0] + loss, jax.lax.with_sharding_constraint(total, shardings)), per_sample

        zero = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), self._learned(state.params))
        zero = jax.lax.with_sharding_constraint(zero, shardings)
        (loss, grads), every = jax.lax.scan(add, (jnp.float32(0), zero), self.parts(batch))
        return loss, self.whole(every), grads

    def _remembered(self, state: TrainState, batch: Batch) -> Params:
        """Returns what is written of the memory after a batch, nested; of what is frozen, nothing.

        Raises:
            ValueError: the policy writes what is no memory of it, or in another shape.
        """
        written = self.model.bind(state.weights(average=False)).remember(self._key("loss"), batch)
        have = {name: x for name, x in flatten(state.params).items() if name in self.model.memory}
        wrong = [
            f"{name}: {x.shape}, expected {have[name].shape if name in have else 'no such memory'}"
            for name, x in written.items()
            if name not in self.model.memory or (name in have and have[name].shape != x.shape)
        ]
        if wrong:
            raise ValueError(f"{type(self.model.config).__name__}.remember wrote what it has not: " + "; ".join(wrong))
        return unflatten({name: x.astype(have[name].dtype) for name, x in written.items() if name in have})

    def _updated(self, state: TrainState, grads: Params, written: Params) -> TrainState:
        with jax.named_scope("optimizer"):
            learned = self._learned(state.params)
            updates, opt_state = self.optimizer.update(grads, state.opt_state, learned)
            learned = optax.apply_updates(learned, updates)
        ema = state.ema
        if ema is not None and self.ema_decay is not None:
            decay = self.ema_decay
            with jax.named_scope("ema"):
                ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, learned)
        params = join(state.params, learned, written)
        return dataclasses.replace(state, params=params, ema=ema, opt_state=opt_state)

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimiser step; where the loss or the gradient is not finite, the state stays as it is but for the count.

        metrics["skipped"] is then 1. It costs no memory, and less than a hundredth of the time.
        """
        with self.tracing():
            compute = self._gradients if self.accumulate == 1 else self._accumulated
            loss, per_sample, grads = compute(state, batch)
            written = self._remembered(state, batch) if self.model.memory else {}
        norm = optax.tree.norm(grads)
        metrics = {"loss": loss, "grad_norm": norm}
        sound = jnp.isfinite(loss) & jnp.isfinite(norm)
        with self.tracing():
            new = jax.lax.cond(sound, self._updated, lambda state, *_: state, state, grads, written)
        metrics["skipped"] = 1 - sound.astype(jnp.int32)
        metrics["param_norm"] = optax.tree.norm(new.params)
        metrics |= self._by_part(per_sample) | self._by_dataset(per_sample, batch["dataset_id"])
        return dataclasses.replace(new, step=state.step + 1), metrics

    def _by_part(self, per_sample: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the parts of the loss that a policy names, each over the samples that have it."""
        metrics = {}
        for name in (k for k in per_sample if f"{k}_valid" in per_sample):
            count = per_sample[f"{name}_valid"].sum()
            metrics[f"loss/{name}"] = per_sample[name].sum() / jnp.maximum(count, 1)
            metrics[f"samples/{name}"] = count
        return metrics

    def _by_dataset(self, per_sample: dict[str, jax.Array], dataset_B: jax.Array) -> dict[str, jax.Array]:
        metrics = {}
        one_hot = jax.nn.one_hot(dataset_B, len(self.dataset_names))  # (B, datasets), a handful of columns
        # A product would make NaN of all datasets where one sample has it.
        sums, counts = jnp.where(one_hot > 0, per_sample["loss"][:, None], 0).sum(0), one_hot.sum(0)
        for name in dict.fromkeys(self.dataset_names):  # datasets of one name are one row
            own = np.flatnonzero([other == name for other in self.dataset_names])
            count = counts[own].sum()
            metrics[f"loss/{name}"] = sums[own].sum() / jnp.maximum(count, 1)
            metrics[f"samples/{name}"] = count
        return metrics
