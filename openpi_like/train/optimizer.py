"""AdamW with linear warm-up, a decay and global-norm clipping, as in the pi0 recipes."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import optax

from openpi_like.models.param import MapDims
from openpi_like.train.moments import Float32Moments, Moments


@runtime_checkable
class Decay(Protocol):
    """What the learning rate does after the warm-up."""

    def schedule(self, peak: float, end: float, steps: int) -> optax.Schedule:
        """Returns step -> learning rate, from `peak` at 0 to `end` at `steps` and beyond."""
        ...


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Half a cosine."""

    def schedule(self, peak: float, end: float, steps: int) -> optax.Schedule:
        """Returns step -> learning rate."""
        return optax.cosine_decay_schedule(peak, steps, alpha=end / peak)


@dataclasses.dataclass(frozen=True)
class Linear:
    """A straight line; with `hold` of the steps at the peak before it (warm-up, stable, decay)."""

    hold: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.hold < 1:
            raise ValueError(f"Linear: hold={self.hold}, expected a part of the steps in [0, 1)")

    def schedule(self, peak: float, end: float, steps: int) -> optax.Schedule:
        """Returns step -> learning rate."""
        held = min(round(self.hold * steps), steps - 1)
        return optax.linear_schedule(peak, end, steps - held, transition_begin=held)


@dataclasses.dataclass(frozen=True)
class Rsqrt:
    """peak * sqrt(timescale / (timescale + step)), never below `end`; it does not depend on the number of steps."""

    timescale: int = 10_000

    def schedule(self, peak: float, end: float, steps: int) -> optax.Schedule:
        """Returns step -> learning rate."""
        return lambda step: jnp.maximum(peak * (1 + step / self.timescale) ** -0.5, end)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    The learning rate rises linearly from `peak_lr / (warmup_steps + 1)` to `peak_lr`, then follows `decay` to `end_lr`
    at step `decay_steps`, which counts from step 0 and so includes the warm-up.
    moments: how Adam's moments are held, see `openpi_like.train.moments`.
    """

    peak_lr: float = 2.5e-5
    end_lr: float = 2.5e-6
    warmup_steps: int = 1_000
    decay_steps: int = 30_000
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 1e-10
    clip_norm: float = 1.0
    decay: Decay = Cosine()
    moments: Moments = Float32Moments()

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps < self.decay_steps:
            raise ValueError(
                f"optimizer: got warmup_steps={self.warmup_steps}, decay_steps={self.decay_steps}; "
                "expected 0 <= warmup_steps < decay_steps (decay_steps counts the warm-up)"
            )

    def schedule(self) -> optax.Schedule:
        """Returns step -> learning rate."""
        warmup = optax.linear_schedule(self.peak_lr / (self.warmup_steps + 1), self.peak_lr, self.warmup_steps)
        decay = self.decay.schedule(self.peak_lr, self.end_lr, self.decay_steps - self.warmup_steps)
        return optax.join_schedules([warmup, decay], [self.warmup_steps])

    def scale(self, maps: Mapping[str, MapDims]) -> optax.GradientTransformation:
        """Returns what makes an update of rate 1 of gradients: Adam, for all weights alike."""
        return self.moments.hold(optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps))

    def create(self, maps: Mapping[str, MapDims] = MappingProxyType({})) -> optax.GradientTransformation:
        """Returns the optax transformation. maps: the linear maps among the trained weights, see `ModelDef.maps`."""
        decayed = optax.chain(
            self.scale(maps),
            optax.add_decayed_weights(self.weight_decay),
            optax.scale_by_learning_rate(self.schedule()),
        )
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), decayed)
