"""What a server records of its sessions: what was sent and answered, in episodes, and RLDS of it."""

import dataclasses
import io
import runpy
import threading

import numpy as np
import pytest
from rich.console import Console

from openpi_like.data.dataset import open_dataset
from openpi_like.data.images import decode
from openpi_like.data.schema import DatasetError
from openpi_like.serve.batching import Answer
from openpi_like.serve.client import PolicyClient
from openpi_like.serve.listeners import Client
from openpi_like.serve.policy import Reply
from openpi_like.serve.recorder import Recorder
from openpi_like.serve.session import Ask
from openpi_like.serve.session_recording import SessionRecorder
from openpi_like.serve.spool import open_spool
from tests.conftest import REPOSITORY
from tests.serve.running import ARM, Arm, Row, arm_observation, serving


def test_sessions_become_episodes_and_rlds(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    spool = tmp_path / "spool"
    with serving(Arm(), listeners=[SessionRecorder(spool)]) as server:
        one, other = PolicyClient(port=server.port), PolicyClient(port=server.port)
        for value in range(3):
            one.infer(arm_observation(float(value), "push"))
            other.infer(arm_observation(10.0 + value, "pull"))
        one.infer({"reset": True, "success": True})
        one.infer(arm_observation(5.0, "push"))
        one.infer(arm_observation(6.0, "lift"))  # another instruction, another episode
        one.infer({"reset": True, "success": False})
        one.close()
        other.close()
    recordings = open_spool(spool)
    assert all(r.finished and r.of_requests and r.head["robot"] == "arm" for r in recordings)
    found = {(r.head["metadata"]["session"], r.head["prompt"], r.steps, r.success) for r in recordings}
    assert found == {(1, "push", 3, True), (1, "push", 1, None), (1, "lift", 1, False), (2, "pull", 3, None)}
    first = next(r for r in recordings if r.success)
    assert first.head["metadata"]["policy_name"] == "default"
    for value, step in enumerate(first.read()):
        sent = arm_observation(float(value))
        np.testing.assert_array_equal(step["state"], sent["state"])
        np.testing.assert_array_equal(decode(step["images"]["wrist"]), sent["images"]["wrist"])
        np.testing.assert_array_equal(step["chunk"], sent["state"] + np.linspace(0, 1, 4, dtype=np.float32)[:, None])
        np.testing.assert_array_equal(step["action"], step["chunk"][0])

    program = runpy.run_path(str(REPOSITORY / "serve" / "record.py"), run_name="record")
    robot_file = tmp_path / "arm.py"
    robot_file.write_text("from tests.serve.running import ARM as robot\n")
    args = program["Args"](spool, out=tmp_path / "out", robot=str(robot_file))
    said = io.StringIO()
    console = Console(file=said, width=200)
    program["main"](args, console)
    assert "its steps are requests to a server" in said.getvalue()
    import tensorflow_datasets as tfds

    data = tfds.builder_from_directory(str(tmp_path / "out" / "arm_recorded" / "1.0.0"))
    assert "a step for each request" in data.info.description
    steps = [s for e in data.as_dataset("train") for s in e["steps"].as_numpy_iterator()]
    assert len(steps) == 8
    for s in steps:
        np.testing.assert_array_equal(s["proposed_chunk"][0], s["action"])

    with pytest.raises(DatasetError, match="its steps are requests to a policy server"):  # they make no chunks
        open_dataset(tmp_path / "out" / "arm_recorded" / "1.0.0", ARM, "train")

    with Recorder(spool, "arm") as recorder:  # of control steps, which are another thing
        recorder.begin("push")
        for value in range(3):
            recorder.step(arm_observation(float(value)), np.zeros(3), time_s=value / 10)
        recorder.end()
    args = dataclasses.replace(args, name="both")
    with pytest.raises(ValueError, match="not for one dataset, leave one kind out"):
        program["main"](args, console)


def _asked(value, prompt="push", policy=Arm()):  # noqa: B008
    sent = arm_observation(value, prompt)
    return Ask(policy, Row(sent, robot=ARM), sent, None, None, None, 0.0)


def _answer(actions):
    return Answer(Reply(actions), 0.0, 0.0, 1)


CLIENT = Client(1, "127.0.0.1:1", None, "default")
CHUNK = np.zeros((4, 3), np.float32)


def test_a_request_that_does_not_fit_the_episode_ends_its_recording_alone(tmp_path, caplog):
    recorder = SessionRecorder(tmp_path)
    recorder.connected(CLIENT, {})
    for actions in (CHUNK, CHUNK[:, :2], CHUNK):  # the second has another size
        recorder.answered(CLIENT, _asked(1.0), _answer(actions), {})
    recorder.began_anew(CLIENT, True)
    recorder.answered(CLIENT, _asked(2.0), _answer(CHUNK), {})
    recorder.disconnected(CLIENT)
    recorder.close()
    assert recorder.failures == 1
    assert "an episode of session 1 stays unfinished, until it begins anew: step of robot 'arm'" in caplog.text
    assert [(r.steps, r.finished) for r in open_spool(tmp_path)] == [(1, False), (1, True)]


def test_recording_never_holds_up_a_reply(tmp_path, monkeypatch, caplog):
    """Where the disk is too slow, the episode lacks nothing unsaid: it ends unfinished."""
    go_on = threading.Event()
    begin = Recorder.begin

    def slow(self, *args, **more):
        assert go_on.wait(10)
        return begin(self, *args, **more)

    monkeypatch.setattr(Recorder, "begin", slow)
    asked = [_asked(float(value)) for value in range(4)]
    bytes_of_one = CHUNK.nbytes + sum(x.nbytes for x in asked[0].observation["images"].values())
    recorder = SessionRecorder(tmp_path, memory_mib=2 * 2.5 * bytes_of_one / 2**20)
    recorder.connected(CLIENT, {})
    for ask in asked:
        recorder.answered(CLIENT, ask, _answer(CHUNK), {})
    recorder.disconnected(CLIENT)
    go_on.set()
    recorder.close()
    assert recorder.failures == 2
    assert "MiB wait to be written; the disk is too slow" in caplog.text
    assert [(r.steps, r.finished) for r in open_spool(tmp_path)] == [(2, False)]


def test_a_disk_that_cannot_be_written_costs_no_reply(tmp_path):
    (tmp_path / "file").write_text("")
    recorder = SessionRecorder(tmp_path / "file" / "spool")
    with serving(Arm(), listeners=[recorder]) as server:
        client = PolicyClient(port=server.port)
        for value in range(3):
            np.testing.assert_array_equal(client.infer(arm_observation(float(value)))["actions"][0, 0], value)
        client.close()
    assert recorder.failures == 1


def test_an_episode_says_which_policy_answered(tmp_path):
    """Also where another one takes its place in the middle of it."""

    class Step(Arm):
        def __init__(self, step):
            super().__init__()
            self.step = step

        def metadata(self):
            return {**super().metadata(), "contract": "c", "step": self.step}

    recorder = SessionRecorder(tmp_path)
    recorder.connected(CLIENT, {})
    for policy in (Step(1), Step(1), Step(2)):
        recorder.answered(CLIENT, _asked(1.0, policy=policy), _answer(CHUNK), {})
    recorder.disconnected(CLIENT)
    recorder.close()
    found = sorted((r.head["policy"]["step"], r.steps, r.finished) for r in open_spool(tmp_path))
    assert found == [(1, 2, True), (2, 1, True)]
    assert recorder.failures == 0
