"""When an expert takes over from a policy. Of its actions, in states that the policy led to, the policy learns."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class TakeOver:
    """A rule for simulators, where no person watches.

    share: probability that the expert acts in a segment of an episode: the mixture of DAgger (Ross et al. 2011,
        section 3, its beta), drawn per segment instead of per step, since what is learned are chunks of actions.
    segment: control steps. late: from this part of the episode's longest time on, the expert acts until the end, as a
        person would who sees that the policy fails (HG-DAgger: Kelly et al. 2019).
    """

    share: float = 0.3
    segment: int = 10
    late: float = 0.5

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.share <= 1 or not 0 <= self.late <= 1:
            problems.append(f"share={self.share}, late={self.late}, expected both in [0, 1]")
        if self.segment < 1:
            problems.append(f"segment={self.segment}, expected at least 1")
        if problems:
            raise ValueError("TakeOver: " + "; ".join(problems))

    def expert_acts(self, step: int, max_steps: int, seed: int) -> bool:
        """Returns whether the expert acts at a step of the episode of a seed; what is drawn depends on these alone."""
        if step >= self.late * max_steps:
            return True
        return bool(np.random.default_rng((seed, step // self.segment)).random() < self.share)
