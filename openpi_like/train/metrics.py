"""Metrics as one JSON object per line, always; TensorBoard when asked for."""

import json
import math
import os
from pathlib import Path
from typing import Any


class MetricsWriter:
    """Appends metrics to `<directory>/metrics.jsonl`, and to TensorBoard event files with `tensorboard=True`.

    On resume, lines of steps that the checkpoint does not contain are removed first, so no step appears twice.
    """

    def __init__(self, directory: Path, *, resume_step: int, tensorboard: bool = False) -> None:
        """resume_step: the step training starts from; later lines are left over from a killed run."""
        self.path = directory / "metrics.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(self.path) if line["step"] <= resume_step] if resume_step else []
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, self.path)
        self._file = self.path.open("a", buffering=1)
        self._tensorboard: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(directory / "tensorboard"))

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Writes one line. A value that is not finite is written as null, which JSON has and NaN is not."""
        finite = {k: (float(v) if math.isfinite(v) else None) for k, v in values.items()}
        self._file.write(json.dumps({"step": step, "split": split, **finite}) + "\n")
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Flushes and closes."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics file; a last line that was cut by a kill is left out, as it was never complete."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
