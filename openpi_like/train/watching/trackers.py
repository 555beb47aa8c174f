"""Where a run's numbers and pictures go besides `metrics.jsonl`: one small class per service.

A config lists the ones it wants, `trackers=(TensorBoard(), Wandb(project="pi0", mode="offline"))`. A new one is a
frozen dataclass as `TrackerConfig` describes it, whose `start` returns an object with the methods of `Tracker`.
"""

import dataclasses
import importlib.util
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import UInt8
from numpy import ndarray

Pictures = Mapping[str, UInt8[ndarray, "H W 3"]]


class TrackerError(RuntimeError):
    """A tracker cannot be used."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a tracker is told about the run.

    config: as JSON. resume_step: the step it starts from; what was logged after it, before a kill, is logged again.
    """

    directory: Path
    name: str
    config: dict[str, Any]
    resume_step: int


@runtime_checkable
class Tracker(Protocol):
    """A tracker that has started. What its methods raise does not stop a run, see `MetricsWriter`."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs numbers, some of which may not be finite. Names are "<split>/<metric>"."""

    def pictures(self, step: int, pictures: Pictures) -> None:
        """Logs pictures by name."""

    def close(self, *, failed: bool) -> None:
        """Flushes and ends. failed: the run ended with an error."""


@runtime_checkable
class TrackerConfig(Protocol):
    """A tracker as a config lists it.

    package: the module it imports. install: what to give to pip for it.
    forgets: whether `start` makes it forget what it has of steps after `Run.resume_step`.
    """

    @property
    def package(self) -> str: ...
    @property
    def install(self) -> str: ...
    @property
    def forgets(self) -> bool: ...

    def start(self, run: Run) -> Tracker: ...


def check_trackers(trackers: Iterable[TrackerConfig]) -> None:
    """Looks, without importing them, for the packages that trackers need.

    Raises:
        TrackerError: lists all that are not installed.
    """
    missing = [t for t in trackers if importlib.util.find_spec(t.package) is None]
    if missing:
        lines = [f"{type(t).__name__} needs the package {t.package}: pip install {t.install}" for t in missing]
        raise TrackerError("trackers of this run are not installed:\n  " + "\n  ".join(lines))


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TensorBoard:
    """Event files in `<run directory>/tensorboard`, written by tensorboardX."""

    package: ClassVar[str] = "tensorboardX"
    install: ClassVar[str] = "'openpi-like[trackers]'"
    forgets: ClassVar[bool] = True

    def start(self, run: Run) -> Tracker:
        from tensorboardX import SummaryWriter

        # Readers drop what older event files of the directory hold from this step on. Their names have only the second.
        first = run.resume_step + 1
        return _TensorBoard(
            SummaryWriter(str(run.directory / "tensorboard"), purge_step=first, filename_suffix=f".from_{first}")
        )


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def pictures(self, step: int, pictures: Pictures) -> None:
        for name, picture in pictures.items():
            self._writer.add_image(name, picture, step, dataformats="HWC")

    def close(self, *, failed: bool) -> None:
        self._writer.close()


# ---- Weights & Biases ------------------------------------------------------------------------------------------------

WANDB_MODES = ("online", "offline")


@dataclasses.dataclass(frozen=True)
class Wandb:
    """A run of Weights & Biases; in `<run directory>/wandb` until it is sent.

    mode: "online", or "offline": `wandb sync` sends it later. entity: None is the user's own. name: None is the name of
    the run directory.
    """

    project: str
    mode: str = "online"
    entity: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()

    package: ClassVar[str] = "wandb"
    install: ClassVar[str] = "wandb"
    forgets: ClassVar[bool] = False

    def __post_init__(self) -> None:
        problems = []
        if not self.project:
            problems.append("project='', expected a name")
        if self.mode not in WANDB_MODES:
            problems.append(f"mode={self.mode!r}, expected one of {WANDB_MODES}")
        if problems:
            raise ValueError("Wandb: " + "; ".join(problems))

    def start(self, run: Run) -> Tracker:
        import wandb

        # One run on their side for one of ours, however often it is resumed.
        kept = run.directory / "wandb_id"
        if not (run.resume_step and kept.is_file()):
            kept.write_text(secrets.token_hex(4))
        options: dict[str, Any] = {"project": self.project, "entity": self.entity, "tags": self.tags, "mode": self.mode}
        started = wandb.init(
            **options,
            name=self.name or run.name,
            id=kept.read_text(),
            resume="allow",
            dir=run.directory,
            config=run.config,
            settings=wandb.Settings(console="off", quiet=True),  # progress bars are no log
        )
        return _LikeWandb(started, wandb.Image, lambda failed: started.finish(exit_code=int(failed)))


class _LikeWandb:
    """A run of a service that is spoken to like wandb. image: its class of pictures. finish: is told of a failure."""

    def __init__(self, run: Any, image: Any, finish: Callable[[bool], None]) -> None:
        self._run, self._image, self._finish = run, image, finish

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def pictures(self, step: int, pictures: Pictures) -> None:
        self._run.log({name: self._image(picture) for name, picture in pictures.items()}, step=step)

    def close(self, *, failed: bool) -> None:
        self._finish(failed)


# ---- Trackio ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Trackio:
    """A run of Hugging Face's trackio, kept on this machine ($TRACKIO_DIR), and in a Space where one is named.

    name: None is the name of the run directory. space: "user/space", or None.
    """

    project: str
    name: str | None = None
    space: str | None = None

    package: ClassVar[str] = "trackio"
    install: ClassVar[str] = "trackio"
    forgets: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.project:
            raise ValueError("Trackio: project='', expected a name")

    def start(self, run: Run) -> Tracker:
        import trackio

        started = trackio.init(
            project=self.project,
            name=self.name or run.name,
            space_id=self.space,
            config={k: v for k, v in run.config.items() if k[0] != "_"},  # which it keeps for itself
            resume="allow" if run.resume_step else "never",
        )
        return _LikeWandb(started, trackio.Image, lambda failed: started.finish())
