"""The chain of the simulated car through its public entry points, at two training steps."""

import json

import numpy as np
import pytest

from openpi_like.serve.evaluation import read_episodes
from tests.compile_flags import IN_A_HURRY
from tests.programs import PULSE, program


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_driving_demo_reports_drives_and_plans(tmp_path):
    pytest.importorskip("highway_env")
    run = tmp_path / "run"
    options = ["--tasks", "intersection-right", "--run", str(run)]
    done = program("train/demo_driving.py", *PULSE, *options, XLA_FLAGS=IN_A_HURRY)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for policy in ("scene", "expert"):
        (episode,) = read_episodes(run / "rollouts" / f"{policy}.jsonl")
        assert episode.success == (policy == "expert")
        assert 0 <= episode.measures["progress"] <= 1
    plans = [json.loads(line) for line in (run / "open_loop" / "scene.jsonl").read_text().splitlines()]
    assert len(plans) == 4
    assert np.shape(plans[0]["answers"]["scene"]["plan"]) == (6, 2)
    assert (run / "report.html").stat().st_size > 10_000
