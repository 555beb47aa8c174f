"""Robots that plan: a whole chunk in every step of a dataset, from the writer to statistics, batches and the server."""

import dataclasses
import io

import numpy as np
import PIL.Image
import pytest

from openpi_like.batch import ActionTokens, EntityTokens
from openpi_like.data import rlds_writer, stats
from openpi_like.data.assembly import Assembler
from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.data.dataset import open_dataset
from openpi_like.data.fast import dct_coefficients, fit_fast
from openpi_like.data.normalize import fields_of
from openpi_like.data.prompts import FastPrompt
from openpi_like.data.rlds_writer import Episode, write_rlds
from openpi_like.data.schema import DatasetError
from openpi_like.data.selection import Selection
from openpi_like.data.sentencepiece_model import fit_text_tokenizer
from openpi_like.data.stats import (
    compute_normalization,
    load_normalization,
    load_openpi_stats,
    save_normalization,
    save_openpi_stats,
)
from openpi_like.data.text import TextTokenizer
from openpi_like.robots.ego_vehicle import EGO_VEHICLE
from openpi_like.robots.entities import Entities
from openpi_like.robots.plan import Plan
from openpi_like.robots.policy_fit import policy_problems
from openpi_like.robots.robot import ActionField, Camera, Robot, StateField
from openpi_like.serve.observation import ObservationError, check_entities, check_previous
from openpi_like.serve.ranges import RangeError, Ranges, RobotRanges
from openpi_like.serve.runtime import Runtime
from openpi_like.train.statistics import misfits
from tests.data.toy import Shapes

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("tensorflow")
pytestmark = pytest.mark.filterwarnings("ignore")

# Two fields that share a key and lie there in the other order.
ROBOT = Robot(
    name="planner",
    cameras=(Camera("front", "observation/image", 4, 4),),
    state=(StateField("speed", "observation/speed", 1, unit="m/s"),),
    action=(ActionField("ahead", "plan", 1, start=1, unit="mm"), ActionField("right", "plan", 1, unit="m")),
    control_hz=2.0,
    action_horizon=3,
    execute_steps=1,
    plan=Plan(known="plan_known"),
)
STEPS = 6


def episode(seed, known=None):
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    PIL.Image.fromarray(rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)).save(buffer, format="png")
    # What is farther ahead spreads more; plans of different steps have nothing in common.
    plan = rng.normal(size=(STEPS, 3, 2)) * np.array([[1000.0, 1.0], [2000.0, 2.0], [4000.0, 4.0]])
    return Episode(
        images={"front": [buffer.getvalue()] * STEPS},
        state=rng.normal(size=(STEPS, 1)).astype(np.float32),
        action=plan.astype(np.float32),
        prompt="go",
        success=True,
        metadata={"seed": seed},
        steps={"plan_known": np.full(STEPS, 3) if known is None else np.asarray(known)},
    )


def write(root, *episodes, robot=ROBOT):
    return write_rlds(root, "plans", robot, {"train": episodes}, description="A test.", metadata={})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    episodes = [episode(0), episode(1, known=[3, 3, 2, 1, 0, 3])]
    return write(tmp_path_factory.mktemp("plans"), *episodes), episodes


def test_a_frame_has_the_plan_of_its_own_step(written):
    path, episodes = written
    data = open_dataset(path, ROBOT, "train")
    assert len(data) == 2 * STEPS - 1
    assert data.removed == {"no entry of the plan is known": 1}
    actions, mask = data.actions(np.arange(len(data)))
    stored = np.concatenate([episodes[0].action, episodes[1].action[[0, 1, 2, 3, 5]]])
    known = np.array([3] * STEPS + [3, 3, 2, 1, 3])
    np.testing.assert_array_equal(mask, np.arange(3) < known[:, None])
    np.testing.assert_array_equal(actions[mask], stored[mask])
    # What is not known repeats the last that is.
    np.testing.assert_array_equal(actions[8, 2], stored[8, 1])
    np.testing.assert_array_equal(actions[9, 1:], stored[[9, 9], [0, 0]])
    _, encoded, _ = data.encoded(np.arange(2))
    np.testing.assert_allclose(encoded, actions[:2] * [1e-3, 1.0], rtol=1e-6)


@pytest.mark.parametrize("scale", ["per_step", "pooled", "none"])
def test_statistics_of_each_entry_of_all_or_none(written, tmp_path, scale):
    path, _ = written
    robot = dataclasses.replace(ROBOT, plan=Plan("plan_known", scale=scale))
    data = open_dataset(path, robot, "train")
    _, chunks, mask = data.encoded(np.arange(len(data)))
    normalization = compute_normalization(data)
    if scale == "per_step":
        whole = chunks[mask.all(1)].astype(np.float64)
        np.testing.assert_allclose(normalization.action.mean, whole.mean(0).ravel(), atol=1e-9)
        np.testing.assert_allclose(normalization.action.std, whole.std(0).ravel(), rtol=1e-9)
        assert normalization.action.names[:3] == ("ahead_0 [m] @1", "right_0 [m] @1", "ahead_0 [m] @2")
        assert normalization.action.count == 9
    else:
        known = chunks[mask].astype(np.float64)
        np.testing.assert_allclose(normalization.action.mean, known.mean(0), atol=1e-9)
    scaled = normalization.apply_actions(chunks)
    assert scaled.shape == chunks.shape
    if scale == "none":
        np.testing.assert_array_equal(scaled, chunks)
    elif scale == "per_step":  # by hand, of one number
        own = (chunks[0, 2, 1] - normalization.action.mean[5]) / (normalization.action.std[5] + 1e-6)
        np.testing.assert_allclose(scaled[0, 2, 1], own, rtol=1e-6)
    np.testing.assert_allclose(normalization.invert_actions(scaled), chunks, atol=1e-5)
    # They come back from a file, and only for this robot.
    save_normalization(normalization, tmp_path / "stats.json")
    assert load_normalization(tmp_path / "stats.json", robot) == normalization
    other = dataclasses.replace(ROBOT, plan=Plan("plan_known", scale="pooled" if scale == "per_step" else "per_step"))
    with pytest.raises(ValueError, match="action dims"):
        load_normalization(tmp_path / "stats.json", other)


def test_a_plan_may_be_relative_to_where_the_velocity_leads(written):
    action = (dataclasses.replace(ROBOT.action[0], relative_to="speed"), ROBOT.action[1])
    robot = dataclasses.replace(ROBOT, action=action)
    data = open_dataset(written[0], robot, "train")
    state, (actions, _) = data.state(np.arange(4)), data.actions(np.arange(4))
    _, encoded, _ = data.encoded(np.arange(4))
    # By hand: metres ahead, less metres a second times 0.5, 1 and 1.5 s.
    expected = 1e-3 * actions[..., 0] - state * [0.5, 1.0, 1.5]
    np.testing.assert_allclose(encoded[..., 0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(encoded[..., 1], actions[..., 1])
    np.testing.assert_allclose(robot.decode_actions(encoded, state), actions, rtol=1e-5, atol=1e-3)


def test_statistics_of_blocks_without_a_whole_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(stats, "_BLOCK", 4)
    part = [episode(0, known=[3, 3, 3, 3, 2, 1]), episode(1, known=[2] * STEPS)]
    data = open_dataset(write(tmp_path / "a", *part), ROBOT, "train")
    normalization = compute_normalization(data)
    assert (normalization.action.count, normalization.state.count) == (4, 2 * STEPS)
    nothing = open_dataset(write(tmp_path / "b", part[1]), ROBOT, "train")
    with pytest.raises(ValueError, match="no plan is known as a whole"):
        compute_normalization(nothing)
    pooled = dataclasses.replace(ROBOT, plan=Plan("plan_known", scale="pooled"))
    some = compute_normalization(open_dataset(tmp_path / "b" / "plans" / "1.0.0", pooled, "train"))
    assert some.action.count == 2 * STEPS


def test_statistics_of_plans_are_not_taken_for_others(written, tmp_path):
    normalization = compute_normalization(open_dataset(written[0], ROBOT, "train"))
    with pytest.raises(ValueError, match="openpi cannot be told"):
        save_openpi_stats(normalization, tmp_path / "norm_stats.json")
    with pytest.raises(ValueError, match="openpi's statistics are of actions"):
        load_openpi_stats(tmp_path / "norm_stats.json", ROBOT)
    relative = dataclasses.replace(ROBOT, action=(dataclasses.replace(ROBOT.action[0], relative_to="speed"),))
    faster = dataclasses.replace(relative, control_hz=4.0)
    assert fields_of(relative) != fields_of(faster)
    assert not misfits(ROBOT, dataclasses.replace(ROBOT, plan=Plan("other")))
    for other in ({"plan": Plan("plan_known", scale="none")}, {"action_horizon": 4}, {"plan": None}):
        assert any("plan=" in line for line in misfits(dataclasses.replace(ROBOT, **other), ROBOT)), other


def test_tokens_are_learned_of_whole_plans_alone(tmp_path):
    """Beyond what is known the last entry is repeated, which is no plan."""
    path = write(tmp_path / "a", episode(0, known=[3, 3, 2, 3, 1, 3]), episode(1))
    entry = MixtureEntry(ROBOT, str(path), val_split=None)
    data = open_dataset(path, ROBOT, "train")
    normalization = compute_normalization(data)
    _, chunks, mask = data.encoded(np.arange(len(data)))
    coefficients = dct_coefficients(normalization.apply_actions(chunks[mask.all(1)]), 10.0).astype(np.int32)
    fast = fit_fast([coefficients], scale=10.0, vocab_size=80)
    policy = Shapes(
        cameras=("front",),
        prompt_len=60,
        prompt_format=FastPrompt(),
        vocab_size=600,
        action_tokens=ActionTokens(max_len=40, count=200, skip=0),
    )
    text = TextTokenizer(fit_text_tokenizer(["go"], 300), 60, prompt_format=FastPrompt(), answer_len=40)
    config = DataConfig(entries=(entry,), saturate_actions=True)
    assembler = Assembler([data], policy, text, {"planner": normalization}, config, fast)
    batch, _ = assembler(np.zeros(12, np.int64), np.arange(12), np.arange(12))
    whole = np.array([True, True, False, True, False, True, *[True] * 6])
    np.testing.assert_array_equal(batch["prompt_loss"].any(1), whole)
    np.testing.assert_array_equal(batch["action_mask"][:, :3, 0].all(1), whole)


def test_what_is_far_from_training_is_said_by_entry(written):
    data = open_dataset(written[0], ROBOT, "train")
    normalization = compute_normalization(data)
    ranges = RobotRanges(ROBOT, normalization, Ranges())
    state, chunks, _ = data.encoded(np.arange(1))

    def said() -> list[str]:
        (found,) = ranges.check_actions(chunks, ROBOT.decode_actions(chunks, state))
        assert not isinstance(found, RangeError)
        return found[1]

    assert not said()
    chunks[0, 0, 1] = normalization.action.max[1] + (normalization.action.max[1] - normalization.action.min[1])
    assert said() == ["actions is beyond the training data in 1 of 6 dims: right_0 [m] @1 (1 times its range)"]


def test_plans_that_do_not_fit(written, tmp_path):
    path, episodes = written
    for change, said in (
        ({"action_horizon": 4}, "expected a plan of 4 entries"),
        ({"plan": Plan("known")}, "no 'known'"),
        ({"action": (ActionField("ahead", "observation/speed", 1),)}, "has shape \\(1,\\) at each step"),
        ({"action": (ActionField("ahead", "plan", 7),)}, "takes values 0 to 6"),
        ({"action": (ActionField("ahead", "plan", 3),)}, r"expected a plan of 3 entries, \(3, 3\) or more dims"),
    ):
        with pytest.raises(DatasetError, match=said):
            open_dataset(path, dataclasses.replace(ROBOT, **change), "train")
    with pytest.raises(ValueError, match=r"action has shape \(6, 3, 2\), expected \(6, 4, 2\)"):
        write(tmp_path / "a", episodes[0], robot=dataclasses.replace(ROBOT, action_horizon=4))
    with pytest.raises(ValueError, match="how many entries of each plan are known"):
        write(tmp_path / "b", dataclasses.replace(episodes[0], steps={}))
    wrong = write(tmp_path / "c", episode(0, known=[3, 3, 4, 3, 3, 3]))
    with pytest.raises(DatasetError, match="expected one number, 0 to 3"):
        open_dataset(wrong, ROBOT, "train")


def test_a_plan_that_is_not_finite_is_found_in_any_entry(tmp_path, monkeypatch):
    spoilt, unknown = episode(0), episode(1, known=[3, 3, 2, 3, 3, 3])
    spoilt.action[4, 2, 0] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        write(tmp_path / "a", spoilt)
    monkeypatch.setattr(rlds_writer, "_check", lambda *_: None)  # as other writers, which do not look
    unknown.action[2, 2, 0] = np.nan  # not known, so whatever is there
    path = write(tmp_path / "b", unknown, spoilt)
    with pytest.raises(DatasetError, match=r"1 plans are not finite, the first is at .*episode 1.*step 4"):
        open_dataset(path, ROBOT, "train")
    data = open_dataset(path, ROBOT, "train", selection=Selection(skip_not_finite=True))
    assert data.removed == {"not finite": 1}
    nothing = episode(2, known=[3, 3, 0, 3, 3, 3])
    nothing.action[2] = np.nan  # of a step that is no frame
    assert len(open_dataset(write(tmp_path / "c", nothing), ROBOT, "train")) == STEPS - 1
    with pytest.raises(DatasetError, match=r"selection\.idle_below: a plan does not say"):
        open_dataset(path, ROBOT, "train", selection=Selection(skip_not_finite=True, idle_below=0.1))
    assert np.isfinite(data.actions(np.arange(len(data)))[0]).all()


def test_robots_that_plan(written):
    for change, said in (
        ({"execute_steps": 2}, "plan with execute_steps 2"),
        ({"stride": 2}, "plan with stride 2"),
        ({"action": (ActionField("ahead", "plan", 1, relative_to="speed"),)}, r"expected a velocity \[1/s\]"),
        ({"action": (ActionField("speed", "plan", 1, next_step="value"),)}, "derived from other steps"),
    ):
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(ROBOT, **change)
    with pytest.raises(ValueError, match="scale 'each'"):
        Plan(scale="each")
    plan = np.arange(12, dtype=np.float32).reshape(6, 2)
    np.testing.assert_array_equal(EGO_VEHICLE.executed(plan), [0, 1])
    assert EGO_VEHICLE.robot_state_size == 17
    # Selections of a step have nothing to do with the steps that come after it.
    data = open_dataset(written[0], ROBOT, "train", selection=Selection(skip_last=2))
    assert data.actions(np.array([3]))[1].all()


def test_things_around_the_robot(written, tmp_path):
    seeing = dataclasses.replace(ROBOT, entities=(Entities("agents", "observation/agents", 3, 2, "observation/there"),))
    rng = np.random.default_rng(0)
    values, there = rng.normal(size=(STEPS, 3, 2)).astype(np.float32), rng.random((STEPS, 3)) < 0.6
    values[~there] = np.nan  # whatever is stored of what is not there
    steps = {"plan_known": np.full(STEPS, 3), "observation/agents": values, "observation/there": there.astype(np.int64)}
    path = write(tmp_path / "a", dataclasses.replace(episode(0), steps=steps), robot=seeing)
    data = open_dataset(path, seeing, "train")
    read, mask = data.entities(np.array([4, 1]), seeing.entities[0])
    np.testing.assert_array_equal(mask, there[[4, 1]])
    np.testing.assert_array_equal(read, np.nan_to_num(values[[4, 1]]))
    # Failures: of the data, of the writer, of the policy
    spoilt = steps | {"observation/there": np.ones((STEPS, 3), np.int64)}
    bad = write(tmp_path / "b", dataclasses.replace(episode(0), steps=spoilt), robot=seeing)
    with pytest.raises(DatasetError, match="'observation/agents' is not finite at"):
        open_dataset(bad, seeing, "train")
    with pytest.raises(DatasetError, match="no 'observation/agents'"):
        open_dataset(written[0], seeing, "train")
    with pytest.raises(ValueError, match=r"has shape \(0,\), expected \(6, 3, 2\)"):
        write(tmp_path / "c", episode(0), robot=seeing)
    policy = Shapes(cameras=("front",), entities=(EntityTokens("map", 3, 2),))
    assert "no slot of the policy" in "; ".join(policy_problems(seeing, policy))
    policy = Shapes(cameras=("front",), entities=(EntityTokens("agents", 2, 2),))
    assert "3 of 2 numbers, the policy reads 2 of 2" in "; ".join(policy_problems(seeing, policy))
    with pytest.raises(ValueError, match="used twice"):
        dataclasses.replace(seeing, entities=seeing.entities * 2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "got NoneType, expected a dict with agents"),
        ({}, "agents.*expected a float array"),
        ({"agents": np.zeros((1, 2), np.float32), "map": 0}, "'map'.*no such slot"),
        ({"agents": np.zeros((4, 2), np.float32)}, "got shape \\(4, 2\\)"),
        ({"agents": np.zeros((1, 3), np.float32)}, "got shape \\(1, 3\\)"),
        ({"agents": np.zeros((1, 2), np.int64)}, "got int64"),
        ({"agents": np.full((1, 2), np.nan, np.float32)}, "not finite"),
    ],
)
def test_things_that_a_client_sends(given, said):
    seeing = dataclasses.replace(ROBOT, entities=(Entities("agents", "observation/agents", 3, 2),))
    with pytest.raises(ObservationError, match=said):
        check_entities({} if given is None else {"entities": given}, seeing)
    sent = {"agents": np.ones((2, 2), np.float64)}
    np.testing.assert_array_equal(check_entities({"entities": sent}, seeing)["agents"], np.ones((2, 2)))
    assert check_entities({}, ROBOT) == {}


def test_plans_are_not_merged():
    with pytest.raises(ObservationError, match="none goes on from another"):
        check_previous({"previous": np.zeros((2, 2), np.float32), "delay": 0}, ROBOT, 0)

    class Client:
        metadata = {"robots": {"planner": {"plans": True, "control_hz": 2.0, "execute_steps": 1}}}  # noqa: RUF012

        def infer(self, observation):
            raise AssertionError

    with pytest.raises(ValueError, match="is given plans"):
        Runtime(Client(), "planner")
