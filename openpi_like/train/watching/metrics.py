"""Metrics as one JSON object per line, always; and to the trackers that a config lists."""

import collections
import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from openpi_like.train.watching.trackers import Pictures, Run, Tracker, TrackerConfig, TrackerError


class MetricsWriter:
    """Appends metrics to `<directory>/metrics.jsonl`, and passes them on to trackers.

    On resume, lines of steps that the checkpoint does not contain are removed first, so no step appears twice. Trackers
    that cannot forget such steps are not told of them again.

    A tracker that fails while the run goes on does not stop it: that is said the first time and counted in `failures`.

    before: how many lines of each split there were before the run was resumed.
    """

    def __init__(
        self,
        directory: Path,
        *,
        resume_step: int,
        active: bool = True,
        trackers: Sequence[TrackerConfig] = (),
        config: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """
        Args:
            resume_step: the step training starts from; later lines are left over from a killed run.
            active: False on hosts that have nothing to write, as one writes for all.
            config: the run's, as JSON, for trackers.
            say: is called with what goes wrong with trackers.

        Raises:
            TrackerError: a tracker does not start. A run that is resumed goes on without it, as nobody may be there.
        """
        self.path = directory / "metrics.jsonl"
        self.failures: collections.Counter[str] = collections.Counter()
        self._say = say
        directory.mkdir(parents=True, exist_ok=True)
        lines = read_metrics(self.path) if resume_step else []
        kept = [line for line in lines if line["step"] <= resume_step]
        self.before = collections.Counter(line["split"] for line in kept)
        self._told = {(line["step"], line["split"]) for line in lines if line["step"] > resume_step}
        self._file: TextIO | None = None
        self._trackers: list[tuple[TrackerConfig, Tracker]] = []
        if not active:
            return
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, self.path)
        self._file = self.path.open("a", buffering=1)
        run = Run(directory.resolve(), directory.resolve().name, dict(config or {}), resume_step)
        for tracker in trackers:
            try:
                self._trackers.append((tracker, tracker.start(run)))
            except Exception as e:  # whatever a service's package raises
                name = type(tracker).__name__
                if not resume_step:
                    self.close()
                    raise TrackerError(f"{name} does not start: {e}; correct it, or leave it out of trackers") from e
                self._failed(tracker, e)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Writes one line. A value that is not finite is written as null, which JSON has and NaN is not."""
        finite = {k: (float(v) if math.isfinite(v) else None) for k, v in values.items()}
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, "split": split, **finite}) + "\n")
        named = {f"{split}/{name}": float(v) for name, v in values.items()}
        for tracker, started in self._trackers:
            if tracker.forgets or (step, split) not in self._told:
                self._try(tracker, functools.partial(started.scalars, step, named))

    def pictures(self, step: int, pictures: Pictures) -> None:
        """Passes pictures on to the trackers; the lines have none."""
        for tracker, started in self._trackers:
            self._try(tracker, functools.partial(started.pictures, step, pictures))

    def sync(self) -> None:
        """Makes sure of what has been written: a mounted bucket uploads a file that stays open only when it is told."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def close(self, *, failed: bool = False) -> None:
        """Flushes and closes. failed: the run ended with an error."""
        if self._file is not None:
            self._file.close()
        for tracker, started in self._trackers:
            self._try(tracker, functools.partial(started.close, failed=failed))
        for name, count in self.failures.items():
            self._say(f"{name} failed {count} times; all metrics are in {self.path}")

    def _try(self, tracker: TrackerConfig, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as e:
            self._failed(tracker, e)

    def _failed(self, tracker: TrackerConfig, error: Exception) -> None:
        name = type(tracker).__name__
        self.failures[name] += 1
        if self.failures[name] == 1:
            self._say(f"{name} failed, training goes on: {type(error).__name__}: {error}; further failures are counted")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics file; a last line that was cut by a kill is left out, as it was never complete."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
