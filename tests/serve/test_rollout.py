"""Driving a simulator: closed loop against a server, resumed, and refused where it would mean nothing."""

import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from openpi_like.robots.pusht import PUSHT
from openpi_like.serve.evaluation import read_episodes
from tests.serve.running import WrongObservationError, serving

PROGRAM = str(Path(__file__).resolve().parents[2] / "serve" / "rollout.py")
ROLLOUT = runpy.run_path(PROGRAM, run_name="rollout")


def _metadata(renderer):
    return {"robots": {"pusht": {"renderer": renderer, "execute_steps": PUSHT.execute_steps}}}


def _hold(observation):
    """Answers: stay where you are."""
    return {"actions": np.repeat(observation["state"][None], PUSHT.action_horizon, 0)}


def _args(tmp_path, **changes):
    values = {"robot": "pusht", "policy": "trained", "out": tmp_path / "out.jsonl", "episodes": 1, "workers": 1}
    return ROLLOUT["Args"](**{**values, **changes})


def test_an_episode_is_driven_and_films_are_kept(tmp_path):
    asked = []

    def infer(observation):
        asked.append(observation)
        return _hold(observation)

    with serving(infer, _metadata("pygame")) as server:
        args = _args(tmp_path, port=server.port, frames_dir=tmp_path / "frames", first_seed=10_007)
        ROLLOUT["start_worker"](args, server.port)
        episode = ROLLOUT["drive"]("push-t", 10_007)
        ROLLOUT["_worker"]["client"]._ws.close()
    assert (episode.success, episode.steps, episode.seed) == (False, 300, 10_007)
    # One request for every chunk, not for every step, and only then is the camera looked through.
    assert len(asked) == len(episode.latency_ms) == 300 / PUSHT.execute_steps
    assert asked[0]["robot"] == "pusht"
    assert asked[0]["images"]["base"].shape == (64, 64, 3)
    assert (tmp_path / "frames" / "pusht_push-t.gif").stat().st_size > 1000


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
        (_metadata("egl"), "trained on images drawn by 'egl'.*set OPENPI_LIKE_RENDERER=egl"),
        ({"robots": {"pushed": {}}}, "does not serve robot 'pusht'; did you mean 'pushed'"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(tmp_path, metadata, message):
    with serving(_hold, metadata) as server, pytest.raises(SystemExit, match=message):
        ROLLOUT["check_server"](_args(tmp_path), server.port, SimpleNamespace(renderer="pygame"))


def test_unknown_robots_and_tasks_are_named(tmp_path):
    with pytest.raises(SystemExit, match="no simulator of robot 'pushed'; did you mean 'pusht'"):
        ROLLOUT["main"](_args(tmp_path, robot="pushed"), Console(quiet=True))
    with pytest.raises(SystemExit, match="no tasks 'push': did you mean 'push-t'"):
        ROLLOUT["main"](_args(tmp_path, tasks=("push",)), Console(quiet=True))


def test_an_error_of_the_server_reaches_the_driver(tmp_path):
    def refuse(observation):
        raise WrongObservationError("state: got shape (3,)")

    with serving(refuse, _metadata("pygame")) as server:
        ROLLOUT["start_worker"](_args(tmp_path), server.port)
        with pytest.raises(RuntimeError, match="got shape"):
            ROLLOUT["drive"]("push-t", 10_000)
        ROLLOUT["_worker"]["client"]._ws.close()
