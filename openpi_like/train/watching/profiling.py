"""A profile of a window of training steps, for `train/step_time.py` and for any viewer of JAX's traces."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import jax

# What they are called in a trace: a step; in it, the waits for its batch and for the device.
STEP, DATA_WAIT, DEVICE_WAIT = "train", "data_wait", "device_wait"


class Profiler:
    """Annotates every step, and writes a trace of those in a window."""

    def __init__(
        self,
        window: tuple[int, int] | None,
        directory: Path,
        *,
        paused: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        say: Callable[[str], None] = print,
    ) -> None:
        """
        Args:
            window: first and last step, both included; None profiles nothing. A run that is resumed within them
                profiles the rest.
            directory: where the trace goes.
            paused: makes a context for what is not to count as time of steps, see `StepLog.paused`.
            say: is called when the trace is written.
        """
        self._window, self._directory, self._paused, self._say = window, directory, paused, say
        self._first: int | None = None  # step of the trace that is being recorded

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Is the context of one step, from the wait for its batch on."""
        if self._window is not None and self._window[0] <= number <= self._window[1] and self._first is None:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of a function would be an event
            with self._paused():
                jax.profiler.start_trace(str(self._directory), profiler_options=options)
            self._first = number
        try:
            with jax.profiler.StepTraceAnnotation(STEP, step_num=number):
                yield
        except BaseException:
            self.close()  # what was recorded until then may tell why
            raise
        if self._window is not None and number == self._window[1]:
            self.close()

    def close(self) -> None:
        """Writes what has been recorded, if anything is being recorded."""
        if self._first is not None:
            with self._paused():
                jax.profiler.stop_trace()
            self._say(f"profiled from step {self._first} on: python train/step_time.py {self._directory}")
            self._first = None
            self._window = None
