"""What training says of itself: log lines of means over steps, speed, waiting and memory; and a progress bar."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

GIB = 2.0**30
_MUCH_WAITING = 0.1  # part of the time


@runtime_checkable
class Source(Protocol):
    """What is asked of the loader, see `openpi_like.data.loader.Loader`."""

    wait_seconds: float
    saturated: int


class StepLog:
    """Sums up steps, one `add` each, until `line` returns their means and starts anew.

    Time runs from the making of this object: make it when everything is compiled. It is that of this host, as are
    waiting and memory; losses and norms are those of the whole batch.
    """

    def __init__(
        self,
        loader: Source,
        *,
        step: int,
        batch_size: int,
        schedule: Callable[[int], Any],
        model_flops_per_sample: float | None = None,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            step: steps done before.
            batch_size: samples per step over all hosts.
            schedule: step, from 0 -> learning rate.
            model_flops_per_sample: floating-point operations of the model, forward and backward, without recomputation.
            peak_flops: what all devices of the run together can do in a second; None where that is not known.
        """
        self._loader, self._step, self._batch_size, self._schedule = loader, step, batch_size, schedule
        self._flops, self._peak, self._clock = model_flops_per_sample, peak_flops, clock
        self._begin(step)

    def _begin(self, step: int) -> None:
        self._step, self._since, self._waited = step, self._clock(), self._loader.wait_seconds
        self._sums: dict[str, float] = {}
        self._added = 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out of the time of steps what is done in this context: validation, a profile being written."""
        began, waited = self._clock(), self._loader.wait_seconds
        yield
        self._since += self._clock() - began
        self._waited += self._loader.wait_seconds - waited

    def add(self, values: Mapping[str, float]) -> None:
        """Adds the metrics of one step. "loss/<part>" is a mean over "samples/<part>" samples, where that is given."""
        for name, value in values.items():
            weight = values.get(_samples(name), 1.0)
            # A part of which a batch has no sample has no loss there either.
            self._sums[name] = self._sums.get(name, 0.0) + (value * weight if weight else 0.0)
        self._added += 1

    def line(self, step: int, *, skipped: int) -> dict[str, float]:
        """Returns the log line after so many steps. skipped: steps whose update was left out, in all of the run.

        "loss", "loss/<part>", norms: means over the steps that were added, of parts over their samples; NaN where there
        are none. "samples/<part>": their numbers. "learning_rate": of the last step. "step_time": seconds.
        "samples_per_s". "mfu": part of the peak that the model's own operations take, where both are known.
        "data_wait": part of the time that was spent waiting for data. "saturated": see `Loader`. "skipped".
        "host_memory_gib": see `host_memory`. "device_memory_gib": see `device_memory`, where devices say it.
        """
        seconds, steps = self._clock() - self._since, step - self._step
        rate = steps * self._batch_size / seconds
        line = {"loss": math.nan}
        for name, total in self._sums.items():
            count = self._sums.get(_samples(name), float(self._added))
            line[name] = total if name.startswith("samples/") else total / count if count else math.nan
        line |= {
            "learning_rate": float(self._schedule(step - 1)),
            "step_time": seconds / steps,
            "samples_per_s": rate,
            "data_wait": (self._loader.wait_seconds - self._waited) / seconds,
            "saturated": float(self._loader.saturated),
            "skipped": float(skipped),
            "host_memory_gib": host_memory() / GIB,
        }
        if self._flops is not None and self._peak is not None:
            line["mfu"] = self._flops * rate / self._peak
        if (used := device_memory()) is not None:
            line["device_memory_gib"] = used / GIB
        self._begin(step)
        return line


def waiting_advice(line: Mapping[str, float], *, workers: int, cores: int) -> str | None:
    """Returns what to do about a log line in which more than a tenth of the time went by waiting for data, else None.

    workers: `data.num_workers` of the run; cores: of this host.
    """
    if line["data_wait"] <= _MUCH_WAITING:
        return None
    more = min(max(2 * workers, 2), cores - 1)
    advice = (
        f"data.num_workers={more} decodes in more processes"
        if more > workers
        else f"all {cores} cores are in use: smaller pictures in the dataset, or more cores, would help"
    )
    return f"{line['data_wait']:.0%} of the time went by waiting for data; {advice}"


def _samples(name: str) -> str:
    """Returns the name of the number of samples that a metric is a mean over."""
    return f"samples/{name.removeprefix('loss/')}" if name.startswith("loss/") else ""


def progress_bar(console: Console, *, shown: bool) -> Progress:
    """Returns the bar of a run: steps, times, and its field `loss`, a text."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    return Progress(*columns, console=console, disable=not shown, refresh_per_second=2)


def host_memory() -> int:
    """Returns the resident memory of this process and of its workers, in bytes; pages that they share count in each."""
    own = psutil.Process()
    total = own.memory_info().rss
    for process in own.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since
            total += process.memory_info().rss
    return total


def device_memory() -> int | None:
    """Returns the most that was in use on any device of this host since it began, in bytes; None where none says."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return max(peaks, default=None)
