"""Steps whose loss or gradient is not finite: which samples they were of, and how many of them a run puts up with."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from openpi_like.batch import Batch
from openpi_like.models.weights import flatten
from openpi_like.train.sharding import put_batch, replicated
from openpi_like.train.state import Params, Trainer, TrainState

SHOWN = 8  # samples that a message names


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient became NaN or infinite."""


@dataclasses.dataclass(frozen=True)
class SampleLosses:
    """The losses of a whole batch, over all hosts, with given weights.

    loss: (B,). dataset_id: (B,). position: (B,), in the run's order of samples. bad_weights: those not finite.
    """

    loss: Float[np.ndarray, "B"]
    dataset_id: Int[np.ndarray, "B"]
    position: Int[np.ndarray, "B"]
    bad_weights: int


class SampleLoss:
    """Computes the loss of each sample of a batch as the training step does, with what it draws for them."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._compiled = jax.jit(self._losses, out_shardings=replicated(trainer.mesh))

    def _losses(
        self, weights: Params, batch: Batch
    ) -> tuple[Float[Array, "B"], Int[Array, "B"], UInt32[Array, "B 2"], Int[Array, ""]]:
        trainer = self._trainer
        with trainer.tracing():
            loss = jax.lax.map(lambda part: trainer.losses(weights, part)[1]["loss"], trainer.parts(batch))
        bad = sum((~jnp.isfinite(w)).sum() for w in jax.tree.leaves(weights))
        return trainer.whole(loss), batch["dataset_id"], batch["position"], jnp.asarray(bad)

    def __call__(self, state: TrainState, batch: Batch) -> SampleLosses:
        """batch: this host's rows, as the loader gives them. All hosts call it together."""
        values = self._compiled(state.weights(average=False), put_batch(batch, self._trainer.mesh))
        loss, dataset_id, words, bad = (np.asarray(x) for x in jax.device_get(values))
        position = (words[:, 0].astype(np.int64) << 32) + words[:, 1]
        return SampleLosses(loss, dataset_id, position, int(bad))


def describe_samples(found: SampleLosses, names: Sequence[str], where: Callable[[int], str]) -> str:
    """Returns lines that say which samples of a batch are to blame, as far as their losses tell.

    names: of the datasets. where: position -> where the sample comes from, see `Loader.where`.
    """
    bad = np.flatnonzero(~np.isfinite(found.loss))
    total = len(found.loss)
    if not len(bad):
        return (
            f"the losses of all {total} samples are finite with the weights as they are now: the gradient overflowed, "
            "or the weights have changed since"
        )
    if len(bad) == total:
        weights = f"{found.bad_weights:,} weights are not finite" if found.bad_weights else "all weights are finite"
        first = f"the losses of all {total} samples are not finite, so they do not say which one is to blame; {weights}"
    else:
        first = f"the losses of {len(bad)} of {total} samples are not finite"
    by_dataset = np.bincount(found.dataset_id[bad], minlength=len(names))
    counts = ", ".join(f"{names[i]} {n}" for i, n in enumerate(by_dataset) if n)
    bad = bad[np.argsort(found.position[bad])]
    lines = [f"{first} (by dataset: {counts}):"]
    lines += [
        f"  {names[found.dataset_id[i]]}: {where(int(found.position[i]))}: loss {found.loss[i]}, "
        f"sample {found.position[i]}"
        for i in bad[:SHOWN]
    ]
    if len(bad) > SHOWN:
        lines.append(f"  and {len(bad) - SHOWN} more")
    return "\n".join(lines)


class BadSteps:
    """Looks at every step's loss and gradient norm; explains bad ones, and ends the run when there are too many.

    The compiled step leaves the state as it is where they are not finite; here such steps are counted and explained.
    """

    def __init__(
        self,
        trainer: Trainer,
        where: Callable[[int], str],
        run_dir: Path,
        *,
        most: int,
        count: int = 0,
        paused: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        say: Callable[[str], None] = print,
    ) -> None:
        """
        Args:
            where: see `Loader.where`.
            most: how many bad steps a run goes on after.
            count: how many there were before it was resumed.
            paused: makes a context for what is not to count as time of steps, see `StepLog.paused`.
            say: is called with what there is to say about a step that is skipped.
        """
        self.count, self._most, self._paused, self._say = count, most, paused, say
        self._trainer, self._where, self._run_dir = trainer, where, run_dir
        self._sample_loss = SampleLoss(trainer)

    def look(self, step: int, values: Mapping[str, float], batch: Batch, state: TrainState) -> bool:
        """Returns whether the step counts: whether its loss and gradient norm are finite. All hosts call it together.

        batch: what the step was computed from, this host's rows. state: the newest.

        Raises:
            NonFiniteLossError: they are not, and there were as many such steps as may be.
        """
        if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            return True
        self.count += 1
        what = f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}, expected finite numbers"
        with self._paused():
            found = self._sample_loss(state, batch)
        samples = describe_samples(found, self._trainer.dataset_names, self._where)
        if self.count <= self._most:
            self._say(f"{what}; skipped, {self.count} of at most {self._most} (skip_bad_steps)\n{samples}")
            return False
        host = f"_host{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self._run_dir / f"nonfinite_step{step}{host}.npz"
        np.savez(path, **flatten(dict(batch)))
        allowed = f"; {self._most} such steps were skipped before" if self._most else ""
        raise NonFiniteLossError(
            f"{what}{allowed}; the batch is in {path}\n{samples}\nlook at these samples, lower optimizer.peak_lr, or "
            "set skip_bad_steps; the same command goes on from the newest checkpoint"
        )
