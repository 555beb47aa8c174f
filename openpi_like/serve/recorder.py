"""The robot's side of recording: what a robot did goes to disk, step by step. Needs numpy and msgpack; no jax.

    recorder = Recorder("spool", "my_robot", policy=client.metadata)
    with recorder:
        recorder.begin("press the button")
        while ...:
            recorder.step(observation, executed, proposed=proposed, intervened=human_acts)
        recorder.end(success=True)

`serve/record.py` turns the episodes of a spool into RLDS. Frames are encoded (PNG, without loss) in threads and
appended to the episode's file by another, so `step` takes the time of a copy. When the program is killed, what is lost
are the steps still in memory: where disk and processor keep up, the last one or two.
"""

import contextlib
import datetime
import secrets
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from openpi_like.config import near_names
from openpi_like.serve.png import encode_png
from openpi_like.serve.spool import RESERVED, SUFFIX, EpisodeWriter, RecordingError, drop, pack_step

_ENCODED = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_SYNC_S = 1.0  # between waits for the disk, so that a loss of power costs little and what is in memory stays bounded

Metadata = Mapping[str, str | bool | int | float]


class Recorder:
    """Records the episodes of one robot, one at a time; for one thread.

    waited_s: how long `step` has waited, in all, for frames to be encoded and written; above 0, the control loop was
        held up.
    """

    def __init__(
        self,
        directory: str | Path,
        robot: str,
        *,
        policy: Mapping[str, Any] | None = None,
        metadata: Metadata | None = None,
        buffer_mib: int = 256,
        longest_wait_s: float = 1.0,
        encoders: int = 3,
        compress: bool = True,
        of_requests: bool = False,
    ) -> None:
        """
        Args:
            directory: the spool; one may hold episodes of many runs, and several recorders may write to it.
            robot: name of the `Robot`.
            policy: what the server sent on connection (`PolicyClient.metadata`): which checkpoint acted is recorded,
                and every step is checked against what it says of the robot. None where no policy acts.
            metadata: recorded with each episode: operator, scene, ...
            buffer_mib: of frames in memory that are not written yet. Once it is full, `step` waits for at most
                `longest_wait_s`, then raises.
            encoders: threads that encode frames.
            compress: False keeps frames as they are, which takes a third of the processor's time and two to three times
                the disk's: three cameras of 640 x 480 at 50 Hz are 138 MB/s.
            of_requests: a step is a request to a policy, not a control step: there is none in between.

        Raises:
            ValueError: the server does not serve this robot.
            OSError: the directory cannot be made.
        """
        served = None if policy is None else policy["robots"]
        if served is not None and robot not in served:
            raise ValueError(f"robot {robot!r}: the server does not serve it; {near_names(robot, list(served))}")
        self.directory, self.robot, self.waited_s = Path(directory), robot, 0.0
        self.directory.mkdir(parents=True, exist_ok=True)
        self._metadata, self._limit, self._longest_wait_s = dict(metadata or {}), buffer_mib << 20, longest_wait_s
        self._compress, self._of_requests = compress, of_requests
        self._policy = {} if policy is None else {k: policy[k] for k in ("contract", "step") if k in policy}
        self._about = None if served is None else served[robot]
        # Pools finish what was given to them even if the program ends without `close`.
        self._encoders = ThreadPoolExecutor(encoders, thread_name_prefix="encode frames")
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="write episode")
        self._held, self._written = 0, threading.Condition()  # bytes in memory; notified when some are written
        self._failure: Exception | None = None
        self._broken = False  # nothing more is appended to the file
        self._file: EpisodeWriter | None = None
        self._layout: dict[str, Any] = {}
        self._prompt, self._synced, self._closed = "", 0.0, False

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(RecordingError):  # it would hide the exception that is under way
            self.close()

    def begin(self, prompt: str, metadata: Metadata | None = None) -> str:
        """Begins an episode and returns its name. metadata: of this episode, besides that of all.

        Raises:
            RecordingError: one is open already, the recorder is closed, or the file cannot be written.
            ValueError: the prompt is no text; or metadata have a reserved name, or are no text, bool, int or float.
        """
        if self._closed:
            raise RecordingError(f"this recorder of {self.directory} is closed; make another one")
        if self._file is not None:
            raise RecordingError(f"episode {self._file.name} is open; call end() or drop() first")
        own = {**self._metadata, **(metadata or {})}
        problems = _prompt_problems(prompt)
        problems += [f"metadata: {k!r} is reserved, choose another name" for k in own if k in RESERVED]
        problems += [
            f"metadata: {k!r} is of type {type(v).__name__}, expected str, bool, int or float"
            for k, v in own.items()
            if not isinstance(v, str | bool | int | float)
        ]
        if problems:
            raise ValueError("; ".join(problems))
        now = datetime.datetime.now(datetime.UTC)
        name = f"{now:%Y%m%dT%H%M%S}.{now.microsecond // 1000:03d}-{secrets.token_hex(3)}"
        head = {
            "robot": self.robot,
            "prompt": prompt,
            "started": now.isoformat(timespec="milliseconds"),
            "policy": self._policy,
            "metadata": own,
            "of_requests": self._of_requests,
        }
        try:
            self._file = EpisodeWriter(self.directory / f"{name}{SUFFIX}", head)
        except OSError as e:
            raise RecordingError(f"cannot begin an episode in {self.directory}: {e}") from e
        self._broken, self._layout, self._prompt, self._synced = False, {}, prompt, time.monotonic()
        return name

    def step(
        self,
        observation: Mapping[str, Any],
        action: Any,
        *,
        proposed: Any = None,
        chunk: Any = None,
        intervened: bool = False,
        time_s: float | None = None,
    ) -> None:
        """Records one control step. All arrays are copied: they may be written to again at once.

        observation: as the policy gets it, see `openpi_like.serve.protocol`; "images" may have more cameras than the
            policy sees, and encoded ones (PNG or JPEG, as bytes) beside arrays. "prompt" is that of the step; without
            one, or with None, it is the one that the episode began with.
        action: (J,), what the robot was told in the end, after all limits. proposed: what the policy wanted, if any.
        chunk: (A, J), all that it answered, where it was asked at this step.
        intervened: an expert chose the action, not the policy.
        time_s: monotonic seconds of the observation, default now.

        Raises:
            ValueError: lists everything that is wrong with the step, of which nothing is recorded.
            RecordingError: no episode is open; or it cannot be written, or not fast enough: what was recorded before is
                kept, the episode stays unfinished, and another one may begin after `drop` or `leave`.
        """
        times = {"time_s": time.monotonic() if time_s is None else float(time_s), "wall_s": time.time()}
        file = self._open()
        images, numbers = self._check(observation, action, proposed, chunk)
        copies = {name: x if isinstance(x, bytes) else x.copy() for name, x in images.items()}
        said = {"intervened": bool(intervened), "prompt": self._prompt_of(observation), **times}
        size = sum(len(x) if isinstance(x, bytes) else x.nbytes for x in copies.values())
        self._wait_for(size)
        encoded = self._encoders.submit(self._encode, copies, numbers, said)
        self._disk.submit(self._append, file, encoded, size)

    def end(self, success: bool | None = None, notes: str = "") -> None:
        """Ends the episode; when this returns, the disk has it. success: None where nobody knows.

        Raises:
            RecordingError: no episode is open, or it could not be written; then it stays unfinished.
        """
        file = self._open()
        with self._written:
            self._written.wait_for(lambda: not self._held)
        self._raise_failure()
        try:
            file.conclude(success, notes)
        except OSError as e:
            self._failure = e
            self._raise_failure()
        self._file = None

    def drop(self) -> None:
        """Sets the open episode aside: its file gets another name, and is not converted."""
        file = self._file
        if file is None:
            raise RecordingError("no episode is open; call begin() first")
        self.leave()
        drop(file.path)

    def leave(self) -> None:
        """Closes the open episode, if any, as it is: it stays unfinished, to be kept or dropped later."""
        with self._written:
            self._written.wait_for(lambda: not self._held)
        if self._file is not None:
            self._file.close()
        self._file, self._failure = None, None

    def close(self) -> None:
        """Writes what is in memory and stops the threads. An open episode stays unfinished.

        Raises:
            RecordingError: something could not be written.
        """
        self._closed = True
        self._encoders.shutdown()
        self._disk.shutdown()
        try:
            self._raise_failure()
        finally:
            self.leave()

    # ---- Of the caller's thread --------------------------------------------------------------------------------------

    def _open(self) -> EpisodeWriter:
        if self._file is None:
            raise RecordingError("no episode is open; call begin() first")
        self._raise_failure()
        return self._file

    def _prompt_of(self, observation: Mapping[str, Any]) -> Any:
        own = observation.get("prompt")
        return self._prompt if own is None else own

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RecordingError(
                f"an episode in {self.directory} cannot be written: {self._failure}; what came before is kept, and the "
                "episode stays unfinished; call leave() or drop(), then begin() another"
            ) from self._failure

    def _wait_for(self, size: int) -> None:
        """Waits until a step of so many bytes fits into the buffer."""
        started = time.monotonic()
        with self._written:
            fits = self._written.wait_for(
                lambda: not self._held or self._held + size <= self._limit or self._failure is not None,
                self._longest_wait_s,
            )
            held = self._held
            if fits and self._failure is None:
                self._held += size
        self.waited_s += time.monotonic() - started
        if not fits:
            self._failure = TimeoutError(
                f"{held >> 20} MiB of frames were waiting for longer than {self._longest_wait_s} s; record smaller or "
                "fewer frames, or give it more encoders, a faster disk, or a larger buffer_mib"
            )
        self._raise_failure()

    def _check(
        self, observation: Mapping[str, Any], action: Any, proposed: Any, chunk: Any
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Returns images and numbers of a step that fit the robot and the steps before."""
        problems: list[str] = []
        images = dict(observation.get("images") or {})
        if not images:
            problems.append("images: none, expected one per camera")
        for name, image in images.items():
            if isinstance(image, bytes):
                if not image.startswith(_ENCODED):
                    problems.append(f"images[{name!r}]: bytes that begin with {image[:8]!r}, expected PNG or JPEG")
            elif not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,)):
                got = f"{image.dtype} of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
                problems.append(f"images[{name!r}]: got {got}, expected uint8 (H, W, 3), RGB")
        robot = observation.get("robot", self.robot)
        if robot != self.robot:
            problems.append(f"robot: got {robot!r}, this recorder is for {self.robot!r}")
        problems += _prompt_problems(self._prompt_of(observation))
        given = {"state": observation.get("state"), "action": action}
        numbers = {k: np.array(v, np.float32) for k, v in given.items() if v is not None}
        problems += [f"{k}: missing" for k in given if k not in numbers]
        if proposed is not None:
            numbers["proposed"] = np.array(proposed, np.float32)
        problems += [f"{k}: got shape {x.shape}, expected one axis" for k, x in numbers.items() if x.ndim != 1]
        if chunk is not None:
            numbers["chunk"] = np.array(chunk, np.float32)
        problems += [
            f"{k}: not finite in dims {np.flatnonzero(~np.isfinite(x).reshape(-1, x.shape[-1]).all(0)).tolist()}"
            for k, x in numbers.items()
            if x.ndim and not np.isfinite(x).all()
        ]
        if not problems:
            layout = {f"images[{k!r}]": x.shape for k, x in images.items() if not isinstance(x, bytes)}
            layout |= {f"images[{k!r}]": "encoded" for k, x in images.items() if isinstance(x, bytes)}
            layout |= {k: x.shape for k, x in numbers.items() if k not in ("proposed", "chunk")}
            if "proposed" in numbers and numbers["proposed"].shape != numbers["action"].shape:
                problems.append(f"proposed: got shape {numbers['proposed'].shape}, the action has {layout['action']}")
            if "chunk" in numbers and numbers["chunk"].shape[1:] != numbers["action"].shape:
                problems.append(f"chunk: got shape {numbers['chunk'].shape}, the action has {layout['action']}")
            if not self._layout:
                problems += self._server_problems(images, numbers)
            for k in sorted({*layout, *self._layout} if self._layout else ()):
                if layout.get(k) != self._layout.get(k):
                    was, now = self._layout.get(k, "none"), layout.get(k, "none")
                    problems.append(f"{k}: got {now}, in the steps before it was {was}")
        if problems:
            raise ValueError(f"step of robot {self.robot!r} is not recorded:\n  " + "\n  ".join(problems))
        self._layout = self._layout or layout
        return images, numbers

    def _server_problems(self, images: Mapping[str, Any], numbers: Mapping[str, np.ndarray]) -> list[str]:
        """Returns in what the first step of an episode differs from what the server says of the robot."""
        if self._about is None:
            return []
        problems = []
        for camera, size in self._about["cameras"].items():
            if camera not in images:
                problems.append(f"images[{camera!r}]: missing; got {', '.join(map(repr, images))}")
            elif size is not None and not isinstance(images[camera], bytes) and images[camera].shape[:2] != tuple(size):
                got = images[camera].shape[:2]
                problems.append(f"images[{camera!r}]: got {got[0]} x {got[1]}, expected {size[0]} x {size[1]}")
        for what in ("state", "action"):
            size = sum(n for _, n, _ in self._about[what])
            if numbers[what].shape != (size,):
                fields = ", ".join(f"{name}:{n} [{unit}]" for name, n, unit in self._about[what])
                problems.append(f"{what}: got shape {numbers[what].shape}, expected ({size},): {fields}")
        return problems

    # ---- Of other threads --------------------------------------------------------------------------------------------

    def _encode(self, images: dict[str, Any], numbers: dict[str, np.ndarray], said: dict[str, Any]) -> bytes:
        encoded = {k: x if isinstance(x, bytes) else encode_png(x, compress=self._compress) for k, x in images.items()}
        return pack_step(encoded, numbers, **said)

    def _append(self, file: EpisodeWriter, encoded: "Future[bytes]", size: int) -> None:
        """Runs in the one thread that writes, in the order of the steps."""
        failure: Exception | None = None
        try:
            message = encoded.result()
            if not self._broken:
                file.append(message)
                if (now := time.monotonic()) - self._synced > _SYNC_S:
                    file.sync()
                    self._synced = now
        except Exception as e:
            failure, self._broken = e, True  # what came after would be no continuation
        with self._written:
            self._held -= size
            self._failure = self._failure or failure
            self._written.notify_all()


def _prompt_problems(prompt: Any) -> list[str]:
    return [] if isinstance(prompt, str) else [f"prompt: got {prompt!r}, expected a text"]
