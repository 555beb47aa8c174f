"""Trackers hold the numbers of the run, also of one that was killed; and none of them can stop it.

Weights & Biases and trackio are the real packages where they are installed, offline; else a stand-in keeps what they
are told.
"""

import dataclasses
import importlib.util
import json
import sqlite3
import struct
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openpi_like.config import from_json, override, to_json
from openpi_like.data import tfrecord
from openpi_like.data.files import locate
from openpi_like.train.watching.metrics import MetricsWriter, read_metrics
from openpi_like.train.watching.trackers import TensorBoard, TrackerError, Trackio, Wandb, check_trackers

CONFIG = {"__class__": "openpi_like.train.config:TrainConfig", "steps": 4, "model": {"__class__": "x", "depth": 2}}
PICTURE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
Logged = list[tuple[int, str, Any]]  # step, name, value
# Step 3 is logged twice: by the run that was killed, and by the one that went on from step 2.
ONCE = [
    (1, "train/loss", 1.0),
    (2, "train/loss", 0.5),
    (2, "val/loss", 5.0),
    (3, "train/loss", 1 / 3),
    (4, "train/loss", 0.25),
]


def killed_and_resumed(directory: Path, tracker: Any, *, apart: float = 0.0) -> None:
    """Logs steps 1 to 3, and, resumed at step 2 after so many seconds, steps 3 and 4."""
    first = MetricsWriter(directory, resume_step=0, trackers=[tracker], config=CONFIG)
    first.pictures(0, {"first_batch": PICTURE})
    for step in (1, 2, 3):
        first.write(step, "train", {"loss": 1 / step})
        if step == 2:
            first.write(2, "val", {"loss": 5.0})
    first.close()
    time.sleep(apart)
    second = MetricsWriter(directory, resume_step=2, trackers=[tracker], config=CONFIG)
    for step in (3, 4):
        second.write(step, "train", {"loss": 1 / step})
    second.close()
    for writer in (first, second):
        assert not writer.failures
    lines = read_metrics(directory / "metrics.jsonl")
    assert sorted((x["step"], f"{x['split']}/loss", x["loss"]) for x in lines) == ONCE


def test_tensorboard_holds_every_step_once(tmp_path: Path) -> None:
    """Read as TensorBoard reads it: a start at a step makes it forget what earlier files have from there on."""
    from tensorboardX.proto import event_pb2

    killed_and_resumed(tmp_path, TensorBoard())
    found: Logged = []
    pictures = []
    for path in sorted((tmp_path / "tensorboard").glob("events.*")):
        for _, payload in tfrecord.read_records(locate(path)):
            event = event_pb2.Event.FromString(payload)
            if event.session_log.status == event.session_log.START and event.HasField("session_log"):
                found = [x for x in found if x[0] < event.step]
            for value in event.summary.value:
                if value.HasField("image"):
                    pictures.append((value.tag, value.image.height, value.image.width))
                else:
                    found.append((event.step, value.tag, value.simple_value))
    assert [x[:2] for x in sorted(found)] == [x[:2] for x in ONCE]
    np.testing.assert_allclose([x[2] for x in sorted(found)], [x[2] for x in ONCE], rtol=1e-6)
    assert pictures == [("first_batch", 4, 4)]


# ---- Weights & Biases, trackio ---------------------------------------------------------------------------------------


class StandIn(types.ModuleType):
    """Keeps what it is told, as both packages do."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.started: list[dict[str, Any]] = []
        self.logged: Logged = []
        self.ended: list[dict[str, Any]] = []

    def init(self, **options: Any) -> Any:
        self.started.append(options)
        return types.SimpleNamespace(log=self.log, finish=lambda **how: self.ended.append(how))

    def log(self, values: dict[str, Any], *, step: int) -> None:
        self.logged += [(step, name, value) for name, value in values.items()]

    def Image(self, value: np.ndarray) -> Any:
        return value.shape

    def Settings(self, **options: Any) -> Any:
        return options


def package(name: str, monkeypatch: pytest.MonkeyPatch) -> StandIn | None:
    """Returns a stand-in where the package is absent."""
    if importlib.util.find_spec(name) is not None:
        return None
    module = StandIn(name)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def wandb_logged(directory: Path) -> Logged:
    """Returns the history in the files that wait to be sent."""
    from wandb.proto import wandb_internal_pb2

    found: Logged = []
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_log(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            of = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            found += [(record.history.step.num, k, json.loads(v)) for k, v in of.items() if k[0] != "_"]
    return found


def leveldb_log(data: bytes) -> Iterator[bytes]:
    """Yields the records of LevelDB's log format, after a head of 7 bytes."""
    at, part, block = 7, b"", 1 << 15
    while at + 7 <= len(data):
        room = block - at % block
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if room < 7 or kind == 0:
            at += room
            continue
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield part
            part = b""


def trackio_logged(directory: Path) -> Logged:
    (path,) = directory.glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("select step, metrics from metrics").fetchall()
    return [(step, k, v) for step, metrics in rows for k, v in json.loads(metrics).items()]


def test_wandb_offline_holds_every_step_once_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = package("wandb", monkeypatch)
    # Its directories have the second in their names.
    killed_and_resumed(tmp_path, Wandb(project="p", mode="offline", tags=("t",)), apart=0 if fake else 1.1)
    if fake is None:
        found, until = wandb_logged(tmp_path), time.monotonic() + 60
        while not any(step == 4 for step, _, _ in found) and time.monotonic() < until:
            time.sleep(0.05)  # its process writes after it says that it has
            found = wandb_logged(tmp_path)
        ids = {path.name.split("-")[-1] for path in tmp_path.glob("wandb/offline-run-*")}
    else:
        found, ids = fake.logged, {options["id"] for options in fake.started}
        assert fake.ended == [{"exit_code": 0}] * 2
        assert fake.started[1]["config"] == CONFIG
        assert (fake.started[1]["mode"], fake.started[1]["name"]) == ("offline", tmp_path.name)
    scalars = [x for x in found if x[1].endswith("loss")]
    assert sorted(scalars) == ONCE
    assert any("first_batch" in name for _, name, _ in found)
    assert ids == {(tmp_path / "wandb_id").read_text()}
    # A new run in the same directory is another run there.
    MetricsWriter(tmp_path, resume_step=0, trackers=[Wandb(project="p", mode="offline")]).close()
    assert (tmp_path / "wandb_id").read_text() not in ids


def test_trackio_holds_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = package("trackio", monkeypatch)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which it reads when it is imported
    killed_and_resumed(tmp_path / "run", Trackio(project="p"))
    found = trackio_logged(tmp_path / "trackio") if fake is None else fake.logged
    assert sorted(x for x in found if x[1].endswith("loss")) == ONCE
    assert any(name == "first_batch" for _, name, _ in found)
    if fake is not None:
        assert [options["resume"] for options in fake.started] == ["never", "allow"]


# ---- What goes wrong -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Broken:
    """A tracker that fails from some step on, or does not start."""

    since: int = 0
    starts: bool = True
    package: str = "json"
    install: str = "json"
    forgets: bool = False

    def start(self, run: Any) -> Any:
        if not self.starts:
            raise ConnectionError("no route to host")
        return BrokenRun(self.since)


class BrokenRun:
    def __init__(self, since: int) -> None:
        self._since = since

    def scalars(self, step: int, values: Any) -> None:
        if step >= self._since:
            raise ConnectionError(f"lost at step {step}")

    def pictures(self, step: int, pictures: Any) -> None:
        raise OSError("no pictures")

    def close(self, *, failed: bool) -> None:
        raise TimeoutError("not flushed")


def test_a_tracker_that_fails_stops_neither_the_run_nor_the_others(tmp_path: Path) -> None:
    said: list[str] = []
    trackers: list[Any] = [Broken(since=2), TensorBoard()]
    with MetricsWriter(tmp_path, resume_step=0, trackers=trackers, say=said.append) as writer:
        for step in range(1, 5):
            writer.write(step, "train", {"loss": float(step)})
        writer.pictures(4, {"first_batch": PICTURE})
        assert len(said) == 1  # once, however often it fails
        assert "Broken failed, training goes on: ConnectionError: lost at step 2" in said[0]
        assert writer.failures == {"Broken": 4}
    assert said[1:] == [f"Broken failed 5 times; all metrics are in {tmp_path / 'metrics.jsonl'}"]
    assert [x["step"] for x in read_metrics(writer.path)] == [1, 2, 3, 4]
    (events,) = (tmp_path / "tensorboard").glob("events.*")
    assert len(list(tfrecord.read_records(locate(events)))) == 2 + 1 + 4 + 1  # version, start, numbers, picture


def test_a_tracker_that_does_not_start_is_an_error_until_there_is_a_run_to_lose(tmp_path: Path) -> None:
    with pytest.raises(TrackerError, match="Broken does not start: no route to host; correct it, or leave it out"):
        MetricsWriter(tmp_path, resume_step=0, trackers=[TensorBoard(), Broken(starts=False)])
    said: list[str] = []
    with MetricsWriter(tmp_path, resume_step=3, trackers=[Broken(starts=False)], say=said.append) as writer:
        writer.write(4, "train", {"loss": 1.0})
    assert writer.failures == {"Broken": 1}
    assert "no route to host" in said[0]
    assert [x["step"] for x in read_metrics(writer.path)] == [4]


def test_missing_packages_are_named_all_at_once_before_the_run() -> None:
    check_trackers([TensorBoard(), Broken()])
    absent: list[Any] = [
        Broken(package="no_such_tracker", install="'x[y]'"),
        TensorBoard(),
        Broken(package="nor_this", install="z"),
    ]
    with pytest.raises(TrackerError) as raised:
        check_trackers(absent)
    assert str(raised.value).splitlines()[1:] == [
        "  Broken needs the package no_such_tracker: pip install 'x[y]'",
        "  Broken needs the package nor_this: pip install z",
    ]


def test_trackers_are_values_of_a_config() -> None:
    trackers = (TensorBoard(), Wandb("p", mode="offline", tags=("a", "b")), Trackio("q", space="u/s"))
    assert from_json(json.loads(json.dumps(to_json(trackers)))) == trackers
    assert override(trackers[1], ["mode=online", "name=x"]) == Wandb("p", name="x", tags=("a", "b"))
    with pytest.raises(ValueError, match=r"project='', expected a name; mode='ofline', expected one of"):
        Wandb("", mode="ofline")
    with pytest.raises(ValueError, match="project=''"):
        Trackio("")
