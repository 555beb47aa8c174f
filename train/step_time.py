"""Prints where the time of a training step goes: `python train/step_time.py RUN_OR_TRACE_DIR`.

Train with `profile=(20, 24)` in the config (steps of your choice), then give this program the run's directory, or any
directory with a trace in it; the newest one is read. By part of the model (the scopes of its code), with the forward
and the backward pass and what was computed again for it; by kind of work; and what the host did in the meantime.
"""

import sys
from pathlib import Path

from openpi_like.train.watching.step_time import find_traces, step_time, table
from openpi_like.train.watching.xplane import TraceError


def main(directory: Path) -> None:
    traces = find_traces(directory)
    print(f"{traces[0].parent}: {len(traces)} hosts")
    print("\n".join(table(step_time(traces))))


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(2 if len(sys.argv) != 2 else 0)
    try:
        main(Path(sys.argv[1]))
    except TraceError as e:
        sys.exit(str(e))
