"""Open loop against a server: what it is asked, what is written, resumed, and refused where it would mean nothing."""

import io
import runpy
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from openpi_like.driving.open_loop_scores import read_frames
from openpi_like.robots.ego_vehicle import EGO_CONTROLS, EGO_VEHICLE, ENTITIES
from openpi_like.serve.observation import ObservationError
from openpi_like.serve.policy import Reply, Thought
from tests.driving.made_drives import ASIDE, A, write_drives
from tests.serve.running import Stub, serving

PROGRAM = runpy.run_path(str(Path(__file__).resolve().parents[2] / "serve" / "open_loop.py"), run_name="open_loop")
WHOLE = [(0, step) for step in range(6)] + [(1, step) for step in range(4)]  # (episode, step)
SLOTS = {e.name: [e.count, e.size] for e in ENTITIES}
AHEAD = np.arange(1, A + 1)[:, None] * np.array([0.0, 1.0])  # a waypoint each metre


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_drives(tmp_path_factory.mktemp("drives"))


def _metadata(robot="ego_vehicle", **changes):
    about = {"cameras": {c.name: None for c in EGO_VEHICLE.cameras}, "plans": True, "entities": {}}
    about["state"] = [[f.name, f.size, f.unit] for f in EGO_VEHICLE.state]
    return {"robots": {robot: {**about, **changes}}, "contract": "abc", "step": 7}


def _going_on(observation):
    """Answers: as the car goes now, on."""
    return (AHEAD / 2 * observation["state"][1]).astype(np.float32)


def _args(path, tmp_path, **changes):
    values = {"data": path, "out": tmp_path / "ours.jsonl", "label": "ours", "reconnect_s": 0.1, "timeout_s": 5.0}
    return PROGRAM["Args"](**{**values, **changes})


def _run(args):
    shown = io.StringIO()
    PROGRAM["main"](args, Console(file=shown, width=150))
    return shown.getvalue()


def test_frames_are_asked_as_they_were_recorded_and_judged(path, tmp_path):
    asked = []

    def infer(observation):
        asked.append(observation)
        return _going_on(observation)

    with serving(Stub(infer, _metadata())) as server:
        shown = _run(_args(path, tmp_path, port=server.port))
    assert "10 of 10 frames; 12 more are too near to the end" in shown
    found = read_frames(tmp_path / "ours.jsonl")
    assert [(r.episode, r.step) for r in found] == WHOLE
    assert [r.task for r in found] == ["straight"] * 6 + ["arc"] * 4
    # The step is told by the state, and by the green of every picture; the camera by its red.
    for (_, step), observation in zip(WHOLE, asked, strict=True):
        assert observation["state"].shape == (17,)
        assert observation["state"][2] == step
        for k, camera in enumerate(EGO_VEHICLE.cameras):
            assert observation["images"][camera.name].shape == (8, 12, 3)
            assert (observation["images"][camera.name] == (k, step, 0)).all()
        assert set(observation) == {"robot", "images", "state", "prompt"}
    assert [o["prompt"] for o in asked] == ["drive straight"] * 6 + ["drive arc"] * 4
    # Straight on is exactly what was driven; on a circle of 20 m at 5 m/s it is off by the difference to the tangent.
    for r in found[:6]:
        assert np.allclose(r.answers["ours"].plan, r.truth.plan, atol=2e-4)
        assert np.allclose(r.answers["driver's plan"].plan, np.add(r.truth.plan, (ASIDE, 0)), atol=2e-4)
    angle = 15 / 20
    off = np.hypot(20 * (1 - np.cos(angle)), 15 - 20 * np.sin(angle))
    (_, table), *others = [(row["name"], row["table"]) for row in PROGRAM["rows"](found, "ours")]
    assert table["uniad"]["l2"]["3s"][0] == pytest.approx(off * 4 / 10, abs=1e-3)
    assert others[0][1]["uniad"]["l2"] == table["uniad"]["l2"]
    assert all(r.latency_ms is not None and r.latency_ms > 0 for r in found)
    assert f"{off * 4 / 10:.2f}" in shown
    assert "10 frames of 2 drives; the truth itself collides at 0 of them" in shown


def test_frames_are_evenly_spaced_and_cameras_as_the_server_says(path, tmp_path):
    asked = []

    def infer(observation):
        asked.append(observation)
        return _going_on(observation)

    with serving(Stub(infer, _metadata(cameras={}, entities=SLOTS))) as server:
        (tmp_path / "port").write_text(str(server.port))
        _run(_args(path, tmp_path, port_file=tmp_path / "port", frames=4))
    assert [(r.episode, r.step) for r in read_frames(tmp_path / "ours.jsonl")] == [WHOLE[i] for i in (0, 3, 6, 9)]
    assert [o["images"] for o in asked] == [{}] * 4
    # One agent is there, whose numbers are the step; of the map nothing.
    assert [o["entities"]["agents"].tolist() for o in asked] == [[[float(s)] * 12] for s in (0, 3, 0, 3)]
    assert asked[0]["entities"]["map"].shape == (0, ENTITIES[1].size)


def test_what_is_done_is_not_asked_again(path, tmp_path):
    asked = []

    def infer(observation):
        asked.append(observation)
        return _going_on(observation)

    with serving(Stub(infer, _metadata())) as server:
        args = _args(path, tmp_path, port=server.port)
        _run(args)
        whole = args.out.read_text()
        first = read_frames(args.out)
        kept = whole.splitlines(keepends=True)[:7]
        args.out.write_text("".join(kept) + kept[0][:40])  # as if it had been killed
        asked.clear()
        _run(args)
    assert [o["state"][2] for o in asked] == [1, 2, 3]
    strip = lambda results: [(r.episode, r.step, r.truth, r.answers) for r in results]  # noqa: E731
    assert strip(read_frames(args.out)) == strip(first)


class Writing(Stub):
    """Writes text before it acts."""

    def __init__(self):
        super().__init__(_going_on, _metadata())
        self.thinks = True

    def sample(self, requests):
        thought = Thought(np.zeros(1, np.int32), np.ones(1, bool), "go on")
        return [Reply(_going_on(request.observation), thought=thought) for request in requests]


def test_what_is_written_before_is_kept(path, tmp_path):
    with serving(Writing()) as server:
        _run(_args(path, tmp_path, port=server.port, frames=1))
    assert [r.thought for r in read_frames(tmp_path / "ours.jsonl")] == ["go on"]


def test_baselines_need_no_server(path, tmp_path):
    shown = _run(_args(path, tmp_path, label="", baselines_only=True))
    (straight, *_), found = read_frames(tmp_path / "ours.jsonl"), read_frames(tmp_path / "ours.jsonl")
    assert set(straight.answers) == {"constant velocity", "standing still", "driver's plan"}
    assert straight.latency_ms is None
    still = [np.hypot(*r.truth.plan[5]) for r in found]
    assert f"{np.mean(still):.2f}" in shown
    assert "standing still" in shown


def test_plans_can_be_the_truth(path, tmp_path):
    _run(_args(path, tmp_path, label="", baselines_only=True, against="plan"))
    for r in read_frames(tmp_path / "ours.jsonl"):
        assert r.answers["driver's plan"].plan == r.truth.plan
    with pytest.raises(ValueError, match=r"other results \(there, wanted\): \{'against': \('plan', 'driven'\)"):
        _run(_args(path, tmp_path, label="", baselines_only=True))


# ---- Failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (_metadata("ego_vehicles"), "does not serve robot 'ego_vehicle'; did you mean 'ego_vehicles'.*set --robot"),
        (_metadata(plans=False), "has what recorded drives lack: actions that are no plans"),
        (_metadata(cameras={"fronts": None}), "lack: camera 'fronts'; did you mean 'front'"),
        (_metadata(entities={"agents": [4, 4]}), r"lack: entities 'agents' of \[4, 4\]; known: .*\[16, 12\]"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(path, tmp_path, metadata, message):
    with serving(Stub(_going_on, metadata)) as server, pytest.raises(ValueError, match=message):
        _run(_args(path, tmp_path, port=server.port))


def test_a_robot_that_does_not_plan_is_refused(path, tmp_path):
    robot = EGO_CONTROLS.name
    with (
        serving(Stub(_going_on, _metadata(robot, plans=False))) as server,
        pytest.raises(ValueError, match="actions that are no plans"),
    ):
        _run(_args(path, tmp_path, port=server.port, robot=robot))


def test_a_server_that_is_not_there_is_said(path, tmp_path):
    with pytest.raises(SystemExit, match=r"no policy server at .*start serve/policy_server.py first, or give --base"):
        _run(_args(path, tmp_path, port=1))
    assert not (tmp_path / "ours.jsonl").exists()


def test_a_server_that_refuses_or_goes_keeps_what_is_done(path, tmp_path):
    left = [3]

    def infer(observation):
        left[0] -= 1
        if left[0] < 0:
            raise ObservationError("state: got shape (3,)")
        return _going_on(observation)

    with serving(Stub(infer, _metadata())) as server:
        args = _args(path, tmp_path, port=server.port)
        with pytest.raises(SystemExit, match=r"(?s)stopped, what is done is in .*got shape \(3,\)"):
            _run(args)
    assert len(read_frames(args.out)) == 3


def test_a_server_that_goes_is_said(path, tmp_path):
    with serving(Stub(_going_on, _metadata())) as server:
        args = _args(path, tmp_path, port=server.port)
        ask = PROGRAM["Asker"].ask
        client = PROGRAM["PolicyClient"](port=server.port, timeout_s=2.0, reconnect_s=0.1)
        asker = PROGRAM["Asker"](client, EGO_VEHICLE)
    dataset = PROGRAM["open_dataset"](path, EGO_VEHICLE, "val")
    with pytest.raises(ConnectionError):
        ask(asker, dataset, 0)
    client.close()
    assert not args.out.exists()


@pytest.mark.parametrize("plan", [np.zeros((5, 2), np.float32), np.full((A, 2), np.nan, np.float32)])
def test_what_is_no_plan_is_refused(path, tmp_path, plan):
    expected = r"server answered .*episode 0, step 0.* shape \(\d, 2\), expected \(6, 2\), finite"
    with serving(Stub(lambda observation: plan, _metadata())) as server, pytest.raises(ValueError, match=expected):
        _run(_args(path, tmp_path, port=server.port))


def test_labels_are_asked_for(path, tmp_path):
    with pytest.raises(ValueError, match=r"--label '', expected a name.*--frames 0, expected at least 1"):
        _args(path, tmp_path, label="", frames=0)
    with pytest.raises(ValueError, match="--label 'standing still', expected a name of the policy, not that"):
        _args(path, tmp_path, label="standing still")
    with pytest.raises(ValueError, match="--label 'ours' with --baselines-only"):
        _args(path, tmp_path, baselines_only=True)


def test_a_policy_without_a_state_is_asked_without_one(path, tmp_path):
    """And another checkpoint, or other frames, are no continuation of the same results."""
    seen = []

    def infer(observation):
        seen.append(observation["state"].shape)
        return np.zeros((6, 2), np.float32)

    with serving(Stub(infer, _metadata(state=[]))) as server:
        _run(_args(path, tmp_path, port=server.port, frames=4))
        assert set(seen) == {(0,)}
        with pytest.raises(ValueError, match="frames that are not among these 2"):
            _run(_args(path, tmp_path, port=server.port, frames=2))
    with (
        serving(Stub(infer, {**_metadata(state=[]), "step": 8})) as server,
        pytest.raises(ValueError, match=r"'source': \('abc, step 7', 'abc, step 8'\)"),
    ):
        _run(_args(path, tmp_path, port=server.port, frames=4))
    with (
        serving(Stub(infer, _metadata(state=[["heading", 1, "rad"]]))) as server,
        pytest.raises(ValueError, match="asks for the state heading:1"),
    ):
        _run(_args(path, tmp_path, port=server.port, frames=4))
