"""When a run has learned what its held-out episodes can tell: early stopping."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from openpi_like.train.checkpoints.checkpoint import Keep


class Patience:
    """Counts validations since the best one. All hosts see the same scores, so all of them stop at the same step.

    best: step and score of the best one so far, None before there is any. since: validations after it.
    """

    def __init__(self, most: int | None) -> None:
        """most: validations without a better score that are waited for; None waits for ever."""
        self._most = most
        self.best: tuple[int, float] | None = None
        self.since = 0

    def look(self, step: int, score: float | None) -> None:
        """Takes the score of a validation; lower is better, and one that is not finite, or None, is not better.

        Of equal ones the last is the best, as it is for `Keep`; but it is no progress.
        """
        found = math.inf if score is None or math.isnan(score) else score
        before = math.inf if self.best is None else self.best[1]
        self.since = 0 if found < before else self.since + 1
        if math.isfinite(found) and found <= before:
            self.best = (step, found)

    def look_back(self, keep: Keep, lines: Iterable[Mapping[str, Any]], *, until: int) -> None:
        """Takes the validations of a run that goes on at step `until`, from its metrics, see `read_metrics`."""
        for line in lines:
            if line["split"] == "val" and line["step"] <= until:
                values = {k: math.nan if v is None else v for k, v in line.items() if k not in ("step", "split")}
                self.look(line["step"], keep.score(values))

    @property
    def spent(self) -> bool:
        """Says whether the run is to stop."""
        return self._most is not None and self.since >= self._most
