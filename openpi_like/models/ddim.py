"""Diffusion by predicting noise, sampled without noise (DDIM, Song et al. 2021), with the squared-cosine schedule.

Steps are counted as in the published code: t = 0 is the least noisy of `train_steps`. (Flow policies of this project
count a flow time in [0, 1], see `flow`.) Everything here is float32: bfloat16 cannot hold 1 - beta.

Letters: B batch, A action horizon, J action dims.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Key

from openpi_like.draws import named_key


@dataclasses.dataclass(frozen=True)
class Ddim:
    """train_steps: of the schedule. sample_steps: of them that are taken when sampling.

    clip: what is predicted of the data is kept within [-clip, clip] at each step; None leaves it. What is normalised by
    quantiles is within [-1, 1] for the most part, by z-scores is not.
    """

    train_steps: int = 100
    sample_steps: int = 10
    clip: float | None = 1.0

    def problems(self) -> list[str]:
        """Returns what is wrong with it."""
        problems = []
        if not 1 <= self.sample_steps <= self.train_steps:
            got = f"sample_steps={self.sample_steps}, train_steps={self.train_steps}"
            problems.append(f"{got}, expected 1 <= sample_steps <= train_steps")
        if self.clip is not None and not self.clip > 0:
            problems.append(f"clip={self.clip}, expected a number above 0, or None")
        return [f"diffusion: {problem}" for problem in problems]

    def kept(self) -> Float32[np.ndarray, "steps"]:
        """Returns alpha-bar of each step: which part of a noised entry's variance is data (Nichol and Dhariwal 2021,
        eq. 17, beta at most 0.999)."""
        level = lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
        n = self.train_steps
        beta = np.array([min(1 - level((i + 1) / n) / level(i / n), 0.999) for i in range(n)], np.float32)
        return np.cumprod(np.float32(1) - beta, dtype=np.float32)

    def draw_steps(self, keys_B: Key[Array, "B"]) -> Int[Array, "B"]:
        """Returns a step of each sample, uniform, from its own key."""
        draw = lambda key: jax.random.randint(named_key(key, "step"), (), 0, self.train_steps)  # noqa: E731
        return jax.vmap(draw)(keys_B)

    def noised(
        self, actions_BAJ: Float[Array, "B A J"], noise_BAJ: Float[Array, "B A J"], step_B: Int[Array, "B"]
    ) -> Float[Array, "B A J"]:
        """Returns the actions at a step: sqrt(kept) actions + sqrt(1 - kept) noise."""
        kept = jnp.asarray(self.kept())[step_B][:, None, None]
        return jnp.sqrt(kept) * actions_BAJ + jnp.sqrt(1 - kept) * noise_BAJ

    def sample(
        self,
        predict: Callable[[Float[Array, "B A J"], Int[Array, "B"]], Float[Array, "B A J"]],
        start_BAJ: Float[Array, "B A J"],
    ) -> Float[Array, "B A J"]:
        """Returns data for noise. predict: the noise that is in x at a step (eta = 0; the last step leaves none).

        The steps are every `train_steps // sample_steps`-th, the largest first.
        """
        stride, n = self.train_steps // self.sample_steps, self.sample_steps
        steps = jnp.asarray(np.arange(n)[::-1] * stride)
        kept = self.kept()
        levels = jnp.asarray(kept[np.arange(n)[::-1] * stride])
        after = jnp.asarray(np.append(kept[np.arange(n)[::-1] * stride][1:], np.float32(1)))

        def step(i: jax.Array, x: jax.Array) -> jax.Array:
            noise = predict(x, jnp.broadcast_to(steps[i], len(x)))
            data = (x - jnp.sqrt(1 - levels[i]) * noise) / jnp.sqrt(levels[i])
            if self.clip is not None:
                data = jnp.clip(data, -self.clip, self.clip)
            return jnp.sqrt(after[i]) * data + jnp.sqrt(1 - after[i]) * noise

        return jax.lax.fori_loop(0, n, step, start_BAJ)


def step_embedding(step_B: Int[Array, "B"], dim: int, *, max_period: float = 10_000.0) -> Float[Array, "B dim"]:
    """Returns cosines, then sines, of a step at dim / 2 periods (as in DiT, Peebles and Xie 2023)."""
    frequency = jnp.exp(-math.log(max_period) * jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
    phase = step_B[:, None].astype(jnp.float32) * frequency
    return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)
