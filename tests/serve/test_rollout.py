"""Driving a simulator: closed loop against a server, resumed, and refused where it would mean nothing."""

import itertools
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence
from rich.console import Console

from openpi_like.robots.ego_vehicle import EGO_VEHICLE
from openpi_like.robots.pusht import PUSHT
from openpi_like.robots.sawyer import SAWYER
from openpi_like.robots.sims import make_sim
from openpi_like.serve.asked import state_places
from openpi_like.serve.closed_loop import Layout, StoppedError, Worker
from openpi_like.serve.evaluation import read_episodes
from openpi_like.serve.observation import ObservationError
from openpi_like.serve.policy import Reply, Thought
from openpi_like.serve.spool import open_spool
from openpi_like.serve.takeover import TakeOver
from tests.serve.running import Stub, serving

PROGRAM = str(Path(__file__).resolve().parents[2] / "serve" / "rollout.py")
ROLLOUT = runpy.run_path(PROGRAM, run_name="rollout")


_STATE = [[f.name, f.size, f.unit] for f in PUSHT.state]


def _metadata(renderer):
    about = {"renderer": renderer, "execute_steps": PUSHT.execute_steps, "cameras": {"base": [96, 96]}, "state": _STATE}
    return {"robots": {"pusht": about}}


def _hold(observation):
    """Answers: stay where you are."""
    return np.repeat(observation["state"][None], PUSHT.action_horizon, 0)


def test_a_server_is_told_the_state_that_it_asks_for():
    places, (first, *_) = state_places, EGO_VEHICLE.state
    every = [[f.name, f.size, f.unit] for f in EGO_VEHICLE.state]
    np.testing.assert_array_equal(places(every, EGO_VEHICLE), np.arange(17))
    np.testing.assert_array_equal(places([every[3], every[0]], EGO_VEHICLE), [5, 6, 0, 1])
    assert places([], EGO_VEHICLE).shape == (0,)
    with pytest.raises(ValueError, match=r"asks for the state velocity:3 of 'ego_vehicle', which has velocity:2, yaw"):
        places([[first.name, 3, "m/s"]], EGO_VEHICLE)


def _args(tmp_path, **changes):
    values = {"robot": "pusht", "policy": "trained", "out": tmp_path / "out.jsonl", "episodes": 1, "workers": 1}
    return ROLLOUT["Args"](**{**values, **changes})


def _drive(args, task, seed):
    worker = Worker(ROLLOUT["driving"](args, args.port))
    try:
        return worker.drive(Layout(args.robot, task, seed))
    finally:
        assert worker.client is not None
        worker.client._ws.close()


def test_an_episode_is_driven_and_films_are_kept(tmp_path):
    asked = []

    def infer(observation):
        asked.append(observation)
        return _hold(observation)

    with serving(Stub(infer, _metadata("pygame"))) as server:
        args = _args(tmp_path, port=server.port, frames_dir=tmp_path / "frames", first_seed=10_007)
        episode = _drive(args, "push-t", 10_007)
    assert (episode.success, episode.steps, episode.seed) == (False, 300, 10_007)
    # One request for every chunk, not for every step, and only then is the camera looked through.
    assert len(asked) == len(episode.latency_ms) == 300 / PUSHT.execute_steps
    assert asked[0]["robot"] == "pusht"
    assert asked[0]["images"]["base"].shape == (96, 96, 3)
    assert (tmp_path / "frames" / "pusht_push-t.gif").stat().st_size > 1000


class Thinking(Stub):
    """Writes one thing in its first ten answers and another one later."""

    def __init__(self):
        super().__init__(_hold, _metadata("pygame"))
        self.thinks, self.asked = True, 0

    def sample(self, requests):
        self.asked += 1
        later = "push the T with all of the words that there is no room for below it"
        text = "go around the T" if self.asked <= 10 else later
        thought = Thought(np.zeros(1, np.int32), np.ones(1, bool), text)
        return [Reply(_hold(request.observation), thought=thought) for request in requests]


@pytest.mark.parametrize("policy", ["trained", "corrected"])
def test_what_a_policy_thinks_is_noted_and_shown(tmp_path, policy):
    """Below every frame of the film, and nothing is while the expert acts."""
    takeover = TakeOver(share=1.0, late=0.0) if policy == "corrected" else TakeOver()
    with serving(Thinking()) as server:
        args = _args(tmp_path, policy=policy, port=server.port, frames_dir=tmp_path, first_seed=7, takeover=takeover)
        episode = _drive(args, "push-t", 7)
    with Image.open(tmp_path / "pusht_push-t.gif") as film:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(film)]
    assert {frame.shape for frame in frames} == {(164, 128, 3)}
    below = [frame[128:] for frame in frames]
    if policy == "corrected":
        assert episode.thoughts == ()
        assert max(strip.max() for strip in below) < 40
        return
    changed = 10 * PUSHT.execute_steps
    assert [step for step, _ in episode.thoughts] == [0, changed]
    assert [text.split()[0] for _, text in episode.thoughts] == ["go", "push"]
    assert min(strip.max() for strip in below) > 200
    lit = [int((strip > 100).sum()) for strip in below]
    assert lit[-1] > 1.5 * lit[0]  # the second is longer: three lines


def test_a_server_that_is_gone_is_said(tmp_path, capsys):
    with pytest.raises(
        StoppedError, match=r"no policy server at 127.0.0.1:1 \(.*\); start serve/policy_server.py first"
    ):
        ROLLOUT["main"](_args(tmp_path, port=1), Console())


def test_finished_episodes_are_not_driven_again(tmp_path):
    out = tmp_path / "out.jsonl"
    job = ["--robot", "sawyer", "--policy", "expert", "--tasks", "coffee-button", "--out", str(out), "--workers", "1"]
    subprocess.run([sys.executable, PROGRAM, *job, "--episodes", "1"], check=True, capture_output=True)
    first = read_episodes(out)
    assert [(e.task, e.seed, e.success, e.renderer) for e in first] == [("coffee-button", 10_000, True, "raycast")]
    done = subprocess.run(
        [sys.executable, PROGRAM, *job, "--episodes", "2"], check=True, capture_output=True, text=True
    )
    assert read_episodes(out)[:1] == first
    assert [e.seed for e in read_episodes(out)] == [10_000, 10_001]
    assert "2/2 [0.34, 1.00]" in done.stdout


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (_metadata("egl"), "trained on images of 'pusht' drawn by 'egl'.*set OPENPI_LIKE_RENDERER=egl"),
        ({"robots": {"pushed": {}}}, "does not serve robot 'pusht'; did you mean 'pushed'"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(tmp_path, metadata, message):
    with serving(Stub(_hold, metadata)) as server, pytest.raises(StoppedError, match=message):
        ROLLOUT["driving"](_args(tmp_path), server.port).check([(PUSHT, "pygame")])


def test_unknown_robots_and_tasks_are_named(tmp_path):
    with pytest.raises(SystemExit, match="no simulator of robot 'pushed'; did you mean 'pusht'"):
        ROLLOUT["main"](_args(tmp_path, robot="pushed"), Console(quiet=True))
    with pytest.raises(SystemExit, match="no tasks 'push': did you mean 'push-t'"):
        ROLLOUT["main"](_args(tmp_path, tasks=("push",)), Console(quiet=True))


def test_an_error_of_the_server_reaches_the_driver(tmp_path):
    def refuse(observation):
        raise ObservationError("state: got shape (3,)")

    with serving(Stub(refuse, _metadata("pygame"))) as server, pytest.raises(RuntimeError, match="got shape"):
        _drive(_args(tmp_path, port=server.port), "push-t", 10_000)


def test_corrections_are_recorded_as_they_were_executed(tmp_path):
    """The expert of a task takes over from a policy that holds still, and back; the file says at which steps."""
    asked = []

    def hold(observation):
        asked.append(observation)
        return np.zeros((SAWYER.action_horizon, 4), np.float32)

    about = {
        "cameras": {"base": [64, 64]},
        "state": [["hand", 3, "m"], ["gripper", 1, "1"]],
        "action": [["hand", 3, "1"], ["gripper", 1, "1"]],
        **{"renderer": "raycast", "execute_steps": 2},
    }
    rule = TakeOver(share=0.5, segment=3, late=0.2)
    with serving(Stub(hold, {"contract": "abc", "step": 7, "robots": {"sawyer": about}})) as server:
        changes = {"first_seed": 31, "record": tmp_path / "spool", "takeover": rule}
        args = _args(tmp_path, robot="sawyer", policy="corrected", port=server.port, **changes)
        episode = _drive(args, "coffee-button", 31)
    (recording,) = open_spool(tmp_path / "spool")
    steps = list(recording.read())
    expected = [rule.expert_acts(t, 125, 31) for t in range(len(steps))]
    assert [s["intervened"] for s in steps] == expected
    assert 0 < sum(expected) < len(steps)
    assert episode.success
    assert (episode.policy, episode.expert_steps, len(steps)) == ("corrected", sum(expected), episode.steps + 4)
    for step in steps:
        assert ("proposed" in step) != step["intervened"]
        assert np.any(step["action"]) == step["intervened"]
    runs = [list(run) for acts, run in itertools.groupby(range(len(steps)), expected.__getitem__) if not acts]
    starts = [t for run in runs for t in run[::2]]  # a chunk of two is asked for, anew whenever the expert hands back
    assert len(runs) > 0
    np.testing.assert_array_equal([a["state"] for a in asked], [steps[t]["state"] for t in starts])
    assert recording.head["metadata"] == {
        "task": "coffee-button",
        "seed": 31,
        "renderer": "raycast",
        "rollout": str(args.out),
    }
    assert (recording.success, recording.head["policy"]) == (True, {"contract": "abc", "step": 7})


def test_held_out_layouts_are_not_recorded(tmp_path):
    with pytest.raises(ValueError, match="--record of layouts 9999 to 10000: what is recorded is trained on"):
        _args(tmp_path, record=tmp_path / "spool", first_seed=9_999, episodes=2)


def test_a_stopped_rollout_keeps_what_ended_and_records_no_episode_twice(tmp_path):
    """Of two episodes side by side one meets an error; the other one goes on to its end, and counts."""
    sim = make_sim("pusht")
    sim.reset("push-t", 41)
    unlucky, failing, others = np.asarray(sim.observe()["state"]), [True], []

    def infer(observation):
        if not np.array_equal(observation["state"], unlucky):
            others.append(observation)
        elif failing[0] and others:  # both are on their way
            raise ObservationError("no more")
        return _hold(observation)

    about = {
        "cameras": {"base": [96, 96]},
        "state": [[f.name, f.size, f.unit] for f in PUSHT.state],
        "action": [[f.name, f.size, f.unit] for f in PUSHT.action],
        **{"renderer": "pygame", "execute_steps": PUSHT.execute_steps},
    }
    with serving(Stub(infer, {"robots": {"pusht": about}})) as server:
        out, spool = tmp_path / "out.jsonl", tmp_path / "spool"
        job = ["--robot", "pusht", "--policy", "trained", "--port", str(server.port), "--first-seed", "41"]
        job = [sys.executable, PROGRAM, *job, "--episodes", "2", "--out", str(out), "--record", str(spool)]
        stopped = subprocess.run(job, capture_output=True, text=True)
        assert (stopped.returncode, "no more" in stopped.stderr) == (1, True)
        (ended,) = read_episodes(out)
        assert (ended.seed, ended.steps) == (42, 300)
        failing[0] = False
        out.unlink()  # as if it had been killed before it wrote that down
        subprocess.run(job, check=True, capture_output=True)
    assert sorted(e.seed for e in read_episodes(out)) == [41, 42]
    recordings = open_spool(spool)
    assert sorted((r.head["metadata"]["seed"], r.finished, r.steps) for r in recordings) == [
        (41, True, 300),
        (42, True, 300),
    ]
    assert len(list(spool.glob("*.dropped"))) == 2
