"""Every fault that is put into a robot or its numbers is found, named, and nothing else is."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from openpi_like.data.dataset_check import check_dataset
from openpi_like.data.index import FrameIndex, Texts, open_index
from openpi_like.data.robot_check import CHECKS, RobotSample, check_robot
from openpi_like.data.robot_check.normalized import Normalized
from openpi_like.data.robot_check.rates import Rates
from openpi_like.data.robot_check.values import Values
from openpi_like.data.schema import DatasetError
from openpi_like.data.selection import Selection
from openpi_like.robots import Gripper, Limits, Robot
from openpi_like.robots.widowx import WIDOWX
from tests.data.robot_check.arm import ARM, EPISODES, STEPS
from tests.data.robot_check.faults import (
    inverted,
    late,
    scaled,
    suspected,
    with_columns,
    with_field,
    with_quaternion,
)

DEGREES = 180 / np.pi
Fault = Callable[[FrameIndex], tuple[FrameIndex, Robot]]


def in_robot(robot: Robot) -> Fault:
    return lambda index: (index, robot)


def in_data(change: Callable[[FrameIndex], FrameIndex], robot: Robot = ARM) -> Fault:
    return lambda index: (change(index), robot)


def stored(key: str, change: Callable[[np.ndarray], None]) -> Callable[[FrameIndex], FrameIndex]:
    def changed(index: FrameIndex) -> FrameIndex:
        x = np.array(index.columns[key])
        change(x)
        return with_columns(index, **{key.replace("/", "__"): x})

    return changed


def cut(x: np.ndarray) -> None:
    x[:, :3] = np.clip(x[:, :3], -0.01, 0.01)


def saturated(joints: slice) -> Callable[[np.ndarray], None]:
    def change(x: np.ndarray) -> None:
        x[:, joints] = np.clip(x[:, joints], -0.4, 0.4)

    return change


def negated(*dims: int) -> Callable[[np.ndarray], None]:
    def change(x: np.ndarray) -> None:
        x[:, dims] *= -1

    return change


def jerked(x: np.ndarray) -> None:
    """Four turns of 100 degrees in a step among those of a few."""
    x[[77, 171, 234, 390], 3] = 1.75


def outlier(x: np.ndarray) -> None:
    x[77, 7] = 40.0


def trigger(x: np.ndarray) -> None:
    """The gripper's commands as changes: 1 opens, -1 closes."""
    wanted = x[:, 10].reshape(EPISODES, STEPS)
    x[:, 10] = np.diff(wanted, axis=1, prepend=1.0).reshape(-1)


def wrapped(x: np.ndarray) -> None:
    """Roll about half a turn, as of a hand that points down."""
    x[:, 3] = np.mod(x[:, 3] + 2 * np.pi, 2 * np.pi) - np.pi


def flipped(x: np.ndarray) -> None:
    """Joint 0 jumps by a turn."""
    x[:, 6] = np.mod(x[:, 6] + 2 * np.pi, 2 * np.pi)


S, A = "state", "action"
FREE = with_field(with_field(ARM, S, "joints", limits=None), A, "joints", limits=None)
MM = Gripper(open=80.0, closed=0.0)
QUANTILES = dataclasses.replace(ARM, normalization="quantile")
QUATERNION = with_field(
    ARM, S, "turn", key="observation/quaternion", start=0, size=4, unit="1", rotation="quaternion_xyzw"
)
ROLLS = with_field(ARM, S, "turn", model_rotation=None)
# name: (what is wrong, check, about, part of what to do)
FAULTS: dict[str, tuple[Fault, str, str, str]] = {
    "state in mm": (in_data(lambda i: scaled(i, "observation/state", slice(0, 3), 1e3)), "Units", "state hand", "'mm'"),
    "state said mm": (in_robot(with_field(ARM, S, "hand", unit="mm")), "Units", "state hand", "'m'"),
    "joints in degrees": (
        in_data(lambda i: scaled(i, "observation/state", slice(6, 10), DEGREES), FREE),
        "Units",
        "state joints",
        "'deg'",
    ),
    "both said degrees": (
        in_robot(with_field(with_field(FREE, S, "joints", unit="deg"), A, "joints", unit="deg")),
        "Units",
        "action joints",
        "'rad'",
    ),
    "action in cm": (
        in_data(lambda i: scaled(i, A, slice(0, 3), 100)),
        "Units",
        "action hand",
        'they would agree with unit="cm"',
    ),
    "rate for change": (
        in_robot(with_field(ARM, A, "hand", command="velocity", unit="m/s")),
        "Units",
        "action hand",
        'command="delta"',
    ),
    "turn in degrees": (
        in_data(lambda i: scaled(i, "observation/state", slice(3, 6), DEGREES)),
        "Rotations",
        "state turn",
        "look at unit",
    ),
    "state gripper inverted": (in_robot(inverted(ARM, S)), "Grippers", "action gripper", "the state (in 100%"),
    "action gripper inverted": (in_robot(inverted(ARM, A)), "Grippers", "action gripper", "the action (in 100%"),
    "gripper in mm": (
        in_data(lambda i: scaled(i, "observation/state", slice(10, 11), 80)),
        "Grippers",
        "state gripper",
        "set open=80 and closed=0,",
    ),
    "both grippers said mm": (
        in_robot(with_field(with_field(ARM, A, "gripper", gripper=MM), S, "gripper", gripper=MM)),
        "Grippers",
        "state gripper",
        "set open=1 and closed=0,",
    ),
    "gripper said mm": (
        in_robot(with_field(ARM, A, "gripper", gripper=MM)),
        "Grippers",
        "action gripper",
        "set open=1 and closed=0,",
    ),
    "triggers": (in_data(stored(A, trigger)), "Grippers", "action gripper", 'convention="trigger"'),
    "no triggers": (
        in_robot(with_field(ARM, A, "gripper", gripper=Gripper(1.0, 0.0, "trigger"))),
        "Grippers",
        "action gripper",
        'set convention="absolute"',
    ),
    "change for target": (
        in_robot(with_field(ARM, A, "hand", command="absolute", relative_to="hand")),
        "Commands",
        "action hand",
        'set command="delta" (or "velocity") and leave out relative_to=\'hand\'',
    ),
    "turn for target": (
        in_robot(with_field(ARM, A, "turn", command="absolute")),
        "Commands",
        "action turn",
        'command="delta"',
    ),
    "target for change": (
        in_robot(with_field(ARM, A, "joints", command="delta", relative_to=None)),
        "Commands",
        "action joints",
        "set command=\"absolute\", relative_to='joints'",
    ),
    "actions late": (in_data(lambda i: late(i, 2)), "Commands", "action joints", "actions look stored 2 steps late"),
    "dims swapped": (
        in_data(stored(A, lambda x: x.__setitem__((slice(None), slice(0, 3)), x[:, [1, 0, 2]].copy()))),
        "Commands",
        "action hand",
        "different order",
    ),
    "roll wraps": (in_data(stored("observation/state", wrapped), ROLLS), "Rotations", "state turn", '"rotation_6d"'),
    "joint wraps": (in_data(stored("observation/state", flipped), FREE), "Rotations", "state joints", "rotation"),
    "velocity limit": (
        in_robot(with_field(ARM, S, "joints", limits=Limits(velocity=(0.3, None, None, None)))),
        "Limits",
        "state joints",
        "unit, start and rate",
    ),
    "position limit": (
        in_robot(with_field(ARM, A, "joints", limits=Limits(upper=0.4))),
        "Limits",
        "action joints",
        "the limits are too narrow",
    ),
    "cut": (in_data(stored(A, cut)), "Values", "action hand", "before they are cut"),
    "targets saturated": (in_data(stored(A, saturated(slice(6, 8)))), "Values", "action joints", "a calibration"),
    "states saturated": (
        in_data(stored("observation/state", saturated(slice(6, 8)))),
        "Values",
        "state joints",
        "record what lies beyond",
    ),
    "far beyond quantiles": (in_data(stored(A, jerked), QUANTILES), "Normalization", "action turn", "keep_ranges"),
    "an axis negated": (in_data(stored(A, negated(1))), "Replay", "action hand", "another sign"),
    "a joint negated": (in_data(stored(A, negated(8))), "Replay", "action joints", "another sign"),
    "a turn negated": (in_data(stored(A, negated(5))), "Replay", "action turn", "another sign"),
    "steps too large": (in_data(lambda i: scaled(i, A, slice(0, 3), 2.5)), "Replay", "action hand", "does not lead"),
    "no quaternion": (
        in_data(lambda i: with_quaternion(i, 1.1), QUATERNION),
        "Rotations",
        "state turn",
        "these are probably other numbers",
    ),
    "outlier": (in_data(stored(A, outlier), FREE), "Values", "action joints", "normalise by quantiles"),
}
# What a fault shows elsewhere too: a unit that is wrong in a state is wrong beside its command.
CONSEQUENCES = {"Replay", "Units", "Limits", "Commands"}


def test_an_arm_that_is_as_described_is_not_suspected(arm_index: FrameIndex) -> None:
    found = check_robot(RobotSample.take(arm_index, ARM, rate=10.0))
    assert [f for findings in found.values() for f in findings if f.level != "found"] == []
    text = {name: " ".join(f"{f.about}: {f.message};" for f in findings) for name, findings in found.items()}
    assert list(found) == [check.name for check in CHECKS]
    assert "10 steps per second by what was given, as the robot says" in text["Rate"]
    assert "action hand: lag: the state is as commanded after 1 steps (0.1 s)" in text["Commands"]
    assert "action joints: lag: the state is as commanded after 1 steps (0.1 s)" in text["Commands"]
    assert "2 different instructions: 'pick up the cup', 'open the drawer'" in text["Language"]
    assert "state joints: within its limits" in text["Limits"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_where_it_is(fault: str, arm_index: FrameIndex) -> None:
    change, check, about, advice = FAULTS[fault]
    found = suspected(*change(arm_index))
    there = [f for name, f in found if (name, f.about) == (check, about)]
    assert any(advice in f.advice for f in there), found
    field = about.split()[1]
    if fault != "actions late":  # which concerns all of them
        assert {f.about.split()[-1] for _, f in found} == {field}
    assert {name for name, _ in found} - {check} <= CONSEQUENCES


@pytest.mark.parametrize(("hz", "advice"), [(20.0, "set control_hz=20, or keep 10 and set stride=2"), (7.0, "hz=7")])
def test_another_rate_is_found(arm_index: FrameIndex, hz: float, advice: str) -> None:
    (rate,) = suspected(arm_index, with_field(ARM, S, "joints", limits=None), rate=hz)
    assert rate[0] == "Rate"
    assert advice in rate[1].advice


@pytest.mark.parametrize(
    ("off", "fits"), [(0.009, True), (-0.009, True), (0.011, False), (-0.011, False), (0.04, False)]
)
def test_the_rate_is_as_exact_as_training_wants_it(arm_index: FrameIndex, off: float, fits: bool) -> None:
    """Where training refuses the rate of a dataset, the check suspects it, and nowhere else."""
    split = dataclasses.replace(arm_index.split, rate=10.0 * (1 + off))
    described = dataclasses.replace(arm_index, split=split)
    found = suspected(described, ARM)
    assert [name for name, _ in found] == ([] if fits else ["Rate"])
    with contextlib.nullcontext() if fits else pytest.raises(DatasetError, match="control_hz: the dataset has"):
        check_dataset(described, ARM, range(described.steps), Selection(), 0.0)


def test_time_stamps_in_whole_milliseconds(arm_index: FrameIndex) -> None:
    time = np.round(np.arange(EPISODES * STEPS) / 30 * 1e3).astype(np.int64)  # 33, 33, 34, ...
    fast = dataclasses.replace(FREE, control_hz=30.0)
    sample = RobotSample.take(with_columns(arm_index, timestamp=time), fast)
    assert sample.rate is not None
    assert sample.rate.hz == pytest.approx(30, rel=1e-3)
    assert [f.level for f in Rates().findings(sample)] == ["found", "found"]


def test_time_stamps_say_the_rate_and_what_was_dropped(arm_index: FrameIndex) -> None:
    n = EPISODES * STEPS
    for unit in (1.0, 1e3, 1e9):
        time = np.arange(n) * 0.1 * unit
        assert suspected(with_columns(arm_index, timestamp=time), ARM) == []
    described = dataclasses.replace(arm_index, split=dataclasses.replace(arm_index.split, rate=30.0))
    (rate,) = suspected(with_columns(described, timestamp=np.arange(n) * 0.1), FREE)
    assert "30 steps per second by the dataset's description, but control_hz 10" in rate[1].message
    assert rate[1].advice == "set control_hz=30, or keep 10 and set stride=3"
    time = np.arange(n) * 0.1
    (rate,) = suspected(with_columns(arm_index, timestamp=time / 2), FREE)
    assert "20 steps per second by timestamp (taken as s), but control_hz 10 times stride 1 is 10" in rate[1].message
    time = (np.arange(n) + np.arange(n) // 20) * 0.1  # every twentieth frame is lost
    (dropped,) = suspected(with_columns(arm_index, timestamp=time), ARM)
    assert "of the steps come more than 1.5 times as late as usual" in dropped[1].message


def test_not_finite_episodes_are_named_and_left_out(arm_index: FrameIndex) -> None:
    x = np.array(arm_index.columns["observation/state"])
    x[50, 1] = np.nan
    index = with_columns(arm_index, observation__state=x)
    (error,) = suspected(index, ARM)
    assert (error[0], error[1].level, error[1].about) == ("Values", "error", "state")
    assert "1 of 480 steps have values that are not finite" in error[1].message
    assert "episode 1, step 10" in error[1].message
    assert len(RobotSample.take(index, ARM).lengths) == EPISODES - 1
    x[:, 1] = np.nan
    with pytest.raises(DatasetError, match="in every episode that was looked at, values of robot 'arm' are not finite"):
        RobotSample.take(with_columns(arm_index, observation__state=x), ARM)


def test_what_the_data_do_not_have_is_refused_at_once(arm_index: FrameIndex) -> None:
    robot = dataclasses.replace(with_field(ARM, S, "hand", key="observation/stat"), language_key="instruction")
    with pytest.raises(DatasetError, match=r"(?s)did you mean 'observation/state'.*no 'instruction'"):
        RobotSample.take(arm_index, robot)


def test_quaternions_of_unit_length_are_not_suspected(arm_index: FrameIndex) -> None:
    for length in (1.0, 1.019, -0.981):
        assert suspected(with_quaternion(arm_index, length), QUATERNION) == []
    (norm,) = suspected(with_quaternion(arm_index, 1.03), QUATERNION)
    assert norm[1].message == "100% of these are not of length 1 (1.03 to 1.03), as quaternion_xyzw"


def test_instructions(arm_index: FrameIndex) -> None:
    def told(*table: str) -> list[str]:
        ids = np.repeat(np.arange(EPISODES) % len(table), STEPS)
        index = dataclasses.replace(arm_index, texts={"language_instruction": Texts(ids, table)})
        found = suspected(index, ARM)
        assert {name for name, _ in found} <= {"Language"}
        return [f"{f.message}; {f.advice}" for _, f in found]

    assert told("pick it up") == []
    (empty,) = told("pick it up", "")
    assert empty.startswith("empty in 50.0% of the steps; leave these steps out (labelled=True in the selection)")
    (nothing,) = told("")
    assert "set language_key=None and a default_prompt" in nothing
    (alike,) = told("pick it up", "Pick it up.")
    assert "1 are written in several ways" in alike
    (long,) = told("pick it up", "word " * 61)
    assert long.startswith("1 instructions have more than 60 words")
    silent = dataclasses.replace(ARM, language_key=None, default_prompt=" ")
    assert [f.message for _, f in suspected(arm_index, silent)] == ["the policy is told nothing"]


def test_constants_and_short_episodes_break_nothing(arm_index: FrameIndex) -> None:
    """What does not move is not judged, and neither are episodes of a single step."""
    still = {k: np.zeros_like(arm_index.columns[k]) for k in ("action", "observation/state")}
    index = dataclasses.replace(arm_index, columns=still)
    assert suspected(index, ARM) == []
    single = dataclasses.replace(
        arm_index,
        episode_start=np.arange(EPISODES * STEPS + 1),
        episode_shard=np.zeros(EPISODES * STEPS, np.int64),
        episode_record=np.arange(EPISODES * STEPS),
    )
    assert suspected(single, ARM) == []
    few = RobotSample.take(arm_index, ARM, most=2 * STEPS)
    assert len(few.sample.steps) <= 2 * STEPS
    assert [f for fs in check_robot(few).values() for f in fs if f.level != "found"] == []


def test_values_at_the_ends_are_counted(arm_index: FrameIndex) -> None:
    """In the midst of episodes they are suspected; where episodes begin and end there, at rest, they are not."""

    def said(change: Callable[[np.ndarray], None]) -> list[tuple[str, str]]:
        index = stored("observation/state", change)(arm_index)
        found = Values().findings(RobotSample.take(index, ARM))
        return [(f.level, f.message) for f in found if f.about == "state joints"]

    def rest(x: np.ndarray) -> None:
        x.reshape(EPISODES, STEPS, -1)[:, [0, 1, 2, 3, -2, -1], 8] = 2.5

    assert said(lambda x: None) == []
    assert said(rest) == [
        ("found", "at an end of the range: [2] 15.2% at -1.076 or 2.5, 0.0% in the midst of an episode")
    ]
    at = np.abs(arm_index.columns["observation/state"][:, 6].reshape(EPISODES, STEPS)) >= 0.4
    resting = [np.logical_and.accumulate(a, axis=1) for a in (at, at[:, ::-1])]
    midst = at & ~resting[0] & ~resting[1][:, ::-1]
    ((level, message),) = said(saturated(slice(6, 7)))
    assert 0.1 < midst.mean() < at.mean() < 0.6
    counted = f"{at.mean():.1%} at -0.4 or 0.4, {midst.mean():.1%} in the midst of an episode"
    assert (level, message) == ("suspect", f"saturated: [0] {counted}")


def test_values_beyond_the_quantiles_are_counted(arm_index: FrameIndex) -> None:
    found = {f.about: f.message for f in Normalized().findings(RobotSample.take(arm_index, QUANTILES))}
    x = arm_index.columns["observation/state"][:, :3].astype(np.float64)
    q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)
    outside = ((x < q01) | (x > q99)).mean(axis=0)
    farthest = np.abs((x - q01) / (q99 - q01 + 1e-6) * 2 - 1).max(axis=0)
    shown = ", ".join(f"hand_{d} [m] {outside[d]:.1%}, the farthest {farthest[d]:.3g}" for d in range(3))
    assert found["state hand"] == f"beyond the quantiles, which become -1 and 1: {shown}"
    assert found["action gripper"].endswith("gripper_0 [1] 0.0%, the farthest 1")
    (other,) = Normalized().findings(RobotSample.take(arm_index, ARM))
    assert (other.level, other.message) == (
        "found",
        "by mean and standard deviation, so there are no ends to be beyond",
    )


def test_derived_commands_are_not_compared_with_themselves(arm_index: FrameIndex) -> None:
    robot = with_field(ARM, A, "hand", key="observation/state", next_step="change")
    robot = with_field(robot, A, "joints", key="observation/state", next_step="value")
    assert suspected(arm_index, robot) == []
    messages = [f.message for f in check_robot(RobotSample.take(arm_index, robot))["Commands"]]
    assert messages.count("derived from recorded states, so there is nothing to compare") == 2


# ---- Real robots -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bridge_index(bridge: Path, tmp_path_factory: pytest.TempPathFactory) -> FrameIndex:
    return open_index(bridge, "train", index_dir=tmp_path_factory.mktemp("bridge"))


def test_bridge_is_as_described_and_its_faults_are_found(bridge_index: FrameIndex) -> None:
    """25 episodes of 10 steps of a real arm are enough."""
    for described in (WIDOWX, dataclasses.replace(WIDOWX, normalization="quantile")):
        found = check_robot(RobotSample.take(bridge_index, described))
        assert [f for findings in found.values() for f in findings if f.level != "found"] == []
    for index, robot, check, about in (
        (bridge_index, inverted(WIDOWX, A), "Grippers", "action gripper"),
        (bridge_index, inverted(WIDOWX, S), "Grippers", "action gripper"),
        (bridge_index, with_field(WIDOWX, S, "hand", unit="cm"), "Units", "state hand"),
        (bridge_index, with_field(WIDOWX, S, "hand_rotation", unit="deg"), "Units", "action hand_rotation"),
        (bridge_index, with_field(WIDOWX, A, "hand", command="velocity"), "Units", "action hand"),
        (bridge_index, with_field(WIDOWX, A, "hand", command="absolute"), "Commands", "action hand"),
        (bridge_index, with_field(WIDOWX, A, "hand_rotation", command="absolute"), "Commands", "action hand_rotation"),
        (late(bridge_index, 2), WIDOWX, "Commands", "action hand"),
        (scaled(bridge_index, A, slice(0, 3), 1e3), WIDOWX, "Units", "action hand"),
    ):
        assert (check, about) in {(name, f.about) for name, f in suspected(index, robot)}
