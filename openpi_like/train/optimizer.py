"""AdamW with linear warm-up, cosine decay and global-norm clipping, as in the pi0 recipes."""

import dataclasses

import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    The learning rate rises linearly from `peak_lr / (warmup_steps + 1)` to `peak_lr`, then follows a cosine to
    `end_lr` at step `decay_steps`, which counts from step 0 and so includes the warm-up.
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

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps < self.decay_steps:
            raise ValueError(
                f"optimizer: got warmup_steps={self.warmup_steps}, decay_steps={self.decay_steps}; "
                "expected 0 <= warmup_steps < decay_steps (decay_steps counts the warm-up)"
            )

    def schedule(self) -> optax.Schedule:
        """Returns step -> learning rate."""
        return optax.warmup_cosine_decay_schedule(
            init_value=self.peak_lr / (self.warmup_steps + 1),
            peak_value=self.peak_lr,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
            end_value=self.end_lr,
        )

    def create(self) -> optax.GradientTransformation:
        """Returns the optax transformation."""
        adamw = optax.adamw(self.schedule(), b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw)
