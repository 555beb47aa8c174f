"""Every trap: on data that has it, on data that has it not, and on real data."""

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from openpi_like.data import traps
from openpi_like.data.episode_sample import Sample, bounds
from openpi_like.data.images import decode
from openpi_like.data.index import FrameIndex, Texts, open_index
from tests.data.hdf5_files import write_aloha, write_robomimic
from tests.data.toy_lerobot import FRONT, write_v30

E, T = 30, 40
STARTS = np.arange(0, E * T + 1, T)
N = E * T


def smooth(rng: np.random.Generator, dims: int = 3) -> np.ndarray:
    """Movement of an arm: (N, dims), episodes of T steps that start at random."""
    steps = rng.normal(scale=0.02, size=(E, T, dims)).cumsum(axis=1)
    return (steps + rng.normal(size=(E, 1, dims))).reshape(N, dims).astype(np.float32)


def grippers(rng: np.random.Generator, delay: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """A command that closes and opens once in every episode, 1 = open, and a width that follows it. (N,) each."""
    close = rng.integers(5, 15, E)[:, None]
    command = 1.0 - ((np.arange(T) >= close) & (np.arange(T) < close + 15))
    width = np.ones((E, T))
    for t in range(1, T):
        width[:, t] = width[:, t - 1] + (command[:, max(0, t - delay)] - width[:, t - 1]) * 0.5
    return command.reshape(N), (width + rng.normal(scale=0.01, size=(E, T))).reshape(N)


@pytest.fixture(scope="module")
def toy_index(toy: Path) -> FrameIndex:
    return open_index(toy, "train")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def found(trap: traps.Trap | None) -> str:
    assert trap is not None
    assert trap.advice
    return trap.found


# ---- Steps that are looked at ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), most=st.integers(1, 200))
@example(lengths=[1, 1, 3, 1], most=3)  # every second of four, though three may be taken
def test_a_sample_is_whole_episodes_evenly_spaced(toy_index: FrameIndex, lengths: list[int], most: int) -> None:
    starts = np.append(0, np.cumsum(lengths))
    x = np.arange(starts[-1])
    index = dataclasses.replace(toy_index, columns={"x": x}, episode_start=starts, episode_shard=np.zeros(len(lengths)))
    sample = Sample.take(index, most)
    assert sample.whole == (len(x) <= most)
    assert len(sample.steps) <= most
    parts = np.split(sample.rows("x")[:, 0], sample.starts[1:-1])
    episodes = [int(np.searchsorted(starts, part[0], side="right")) - 1 for part in parts]
    assert episodes[0] == 0
    assert len(set(np.diff(episodes))) <= 1
    of = np.array([lengths[e] for e in episodes])
    if len(sample.steps) < of.sum():  # too long to be whole
        spacing = -(-len(lengths) // most)  # any closer, and some would have no step
        assert len(parts) >= min(4, -(-len(lengths) // spacing))
        of = np.minimum(of, most // len(parts))
    for e, n, part in zip(episodes, of, parts, strict=True):
        np.testing.assert_array_equal(part, x[starts[e] : starts[e] + n])
    if not sample.whole:
        assert str(sample).startswith(
            f"{len(sample.steps):,} of {len(x):,} steps, those of {len(parts)} of {len(lengths)} "
        )
        assert str(sample).endswith("beginnings only") == (len(sample.steps) < sum(lengths[e] for e in episodes))


def test_memory_does_not_grow_with_the_dataset(toy_index: FrameIndex, tmp_path: Path) -> None:
    """Four million steps on disk, 80 MB of numbers, a text and a flag."""
    n, t = 4_000_000, 400
    columns: dict[str, np.ndarray] = {
        "action": np.memmap(tmp_path / "a", np.float32, "w+", shape=(n, 3)),
        "observation/state": np.memmap(tmp_path / "s", np.float32, "w+", shape=(n, 2)),
        "is_last": np.memmap(tmp_path / "l", bool, "w+", shape=(n,)),
    }
    columns["action"][3_000_000, 2] = np.nan
    columns["observation/state"][3_000_001, 1] = 9
    index = dataclasses.replace(
        toy_index,
        columns=columns,
        texts={"language": Texts(np.memmap(tmp_path / "t", np.int32, "w+", shape=(n,)), ("",))},
        episode_start=np.arange(0, n + 1, t),
        episode_shard=np.zeros(n // t, np.int64),
        episode_record=np.arange(n // t),
    )
    sample = Sample.take(index, 20_000)
    assert (len(sample.steps), len(sample.starts)) == (20_000, 51)
    tracemalloc.start()
    got = traps.find_traps(sample, {})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6
    assert [(trap.kind, trap.key) for trap in got] == [
        ("not finite", "action"),
        ("constant", "observation/state"),
        ("outliers", "observation/state"),
        ("episode ends", "is_last"),
        ("instructions", "step: language"),
    ]
    assert "1 of 4000000 steps have NaN" in got[0].found
    assert index.where(3_000_000) in got[0].found
    assert "the same value in all 4000000 steps: [0] = 0" in got[1].found
    assert "[1] 0 .. 9," in got[2].found
    assert "False at the end of 10000 of 10000 episodes" in got[3].found
    assert "100.0% of them are empty" in got[4].found


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def test_not_finite(rng: np.random.Generator) -> None:
    x = smooth(rng)
    assert traps.not_finite("state", x, str) is None
    x[[7, 100, 300, 900], 1] = np.nan, np.inf, -np.inf, np.nan
    assert found(traps.not_finite("state", x, lambda step: f"place {step}")) == (
        "4 of 1200 steps have NaN or infinite values: place 7; place 100; place 300; ..."
    )


def test_constant_dims(rng: np.random.Generator) -> None:
    x = smooth(rng)
    assert traps.constant_dims("state", bounds(x), N) is None
    x[:, 2] = 0.25
    assert found(traps.constant_dims("state", bounds(x), N)) == "the same value in all 1200 steps: [2] = 0.25"


def test_outliers(rng: np.random.Generator) -> None:
    x = rng.normal(size=(N, 2)).astype(np.float32)
    assert traps.outliers("action", x, bounds(x)) is None
    x[3, 1] = 600
    assert found(traps.outliers("action", x, bounds(x))).startswith("[1] -")
    x[:, 1] = 0  # rarely moves at all, as a constant dim with one jump
    x[9, 1] = 1e-6
    assert traps.outliers("action", x, bounds(x)) is None
    x[9, 1] = 0.5
    assert "[1] 0 .. 0.5, q01 .. q99 0 .. 0" in found(traps.outliers("action", x, bounds(x)))
    x[9, 1] = -1  # a trigger
    assert traps.outliers("action", x, bounds(x)) is None
    x[9, 1] = 0.5  # in a step that is not in the sample: what is largest is that of all
    assert "[1] 0 .. 0.5, q01 .. q99 0 .. 0" in found(traps.outliers("action", x[10:], bounds(x)))


@pytest.mark.parametrize(("turn", "unit"), [(2 * np.pi, "rad"), (360.0, "deg")])
def test_angle_wraps(rng: np.random.Generator, turn: float, unit: str) -> None:
    yaw = (smooth(rng, 2) * [0.5, 0.1]).astype(np.float32) + np.array([0.5, 0])
    wrapped = np.mod(yaw + 0.5, 1) - 0.5
    assert traps.angle_wraps("state", yaw * turn, STARTS) is None
    count = int((np.abs(np.diff(wrapped[:, 0].reshape(E, T), axis=1)) > 0.9).sum())
    assert count > 5
    assert found(traps.angle_wraps("state", wrapped * turn, STARTS)).endswith(f"[0] {count} times by one turn ({unit})")
    twice = np.zeros((N, 1))
    twice[100:102] = 0.99 * turn  # there and back
    assert traps.angle_wraps("state", twice, STARTS) is None
    twice[210:] = 0.99 * turn
    assert found(traps.angle_wraps("state", twice, STARTS)).endswith(f"[0] 3 times by one turn ({unit})")
    # jumps at the start of an episode, and noise over the same range, are no wraps
    ends = np.repeat(np.where(np.arange(E) % 2, 0.49, -0.49), T)[:, None] * turn
    assert traps.angle_wraps("state", ends, STARTS) is None
    assert traps.angle_wraps("state", rng.uniform(-turn / 2, turn / 2, (N, 1)), STARTS) is None


def test_zero_first_action(rng: np.random.Generator) -> None:
    x = np.concatenate([rng.normal(scale=0.01, size=(N, 6)), rng.integers(0, 2, (N, 1))], axis=1)
    assert traps.zero_first_action("action", x, STARTS) is None
    x[STARTS[:-1], :6] *= 1e-6  # Bridge: about 1e-8, never 0, and a gripper of 1
    assert found(traps.zero_first_action("action", x, STARTS)) == (
        "100% of the 30 episodes begin with an action of about zero (2.5% of all steps)"
    )
    idle = np.zeros((N, 2))  # all of it is zero: idle, and no matter of first steps
    idle[5] = 1
    assert traps.zero_first_action("action", idle, STARTS) is None
    assert traps.zero_first_action("action", np.zeros((N, 2)), STARTS) is None


def test_idle_steps(rng: np.random.Generator) -> None:
    x = smooth(rng)
    assert traps.idle_steps("state", x, STARTS) is None
    still = x.reshape(E, T, 3).copy()
    still[:, 10:20] = still[:, 10:11]
    assert found(traps.idle_steps("state", still.reshape(N, 3), STARTS)).startswith("in 23% of the steps")
    assert traps.idle_steps("state", np.zeros((N, 3)), STARTS) is None


def test_end_flags() -> None:
    flags = np.zeros(N, bool)
    flags[STARTS[1:] - 1] = True
    assert traps.end_flags("is_last", flags, STARTS) is None
    flags[STARTS[1] - 1] = False
    flags[3] = True
    assert found(traps.end_flags("is_last", flags, STARTS)) == (
        "False at the end of 1 of 30 episodes, True at 1 steps before an end"
    )


# ---- Grippers --------------------------------------------------------------------------------------------------------


def test_gripper_dims(rng: np.random.Generator) -> None:
    command, _ = grippers(rng)
    trigger = np.zeros(N)
    trigger[::20], trigger[10::20] = 1, -1
    x = np.stack([rng.normal(size=N), command, trigger, np.ones(N), rng.uniform(size=N)], axis=1)
    assert traps.gripper_dims(x) == [1, 2]
    assert found(traps.trigger_gripper("action", x)) == "only -1, 0 and 1: [2] 90% zeros"
    assert traps.trigger_gripper("action", x[:, [0, 1, 3, 4]]) is None


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), delay=st.integers(0, 5), scale=st.sampled_from([1.0, -1.0, 0.08, -1000.0]))
def test_polarity_of_a_gripper_does_not_depend_on_its_scale(seed: int, delay: int, scale: float) -> None:
    command, width = grippers(np.random.default_rng(seed), delay)
    got = traps.follows(2 * command - 1, width * scale + 5, STARTS)
    assert got * np.sign(scale) > 0.4
    assert -1 <= got <= 1


def test_inverted_gripper(rng: np.random.Generator) -> None:
    command, width = grippers(rng)
    arm = smooth(rng)
    arm[:, 2] += (1 - command) * 0.2  # it lifts while the gripper is closed: no reason to suspect the height
    action = np.concatenate([rng.normal(size=(N, 3)), command[:, None]], axis=1)
    good = {"observation/state": np.concatenate([arm, width[:, None]], axis=1)}
    bad = {"observation/state": np.concatenate([arm, 1 - width[:, None]], axis=1)}
    other = {"observation/arm": arm[:, :2], "observation/gripper_width": -width[:, None]}
    assert traps.inverted_gripper("action", action, good, STARTS) is None
    assert "[3] against observation/state[3], correlation -0." in found(
        traps.inverted_gripper("action", action, bad, STARTS)
    )
    assert "observation/gripper_width[0]" in found(traps.inverted_gripper("action", action, other, STARTS))
    assert traps.inverted_gripper("action", action, {}, STARTS) is None
    assert traps.inverted_gripper("action", action[:, :3], bad, STARTS) is None


# ---- Language --------------------------------------------------------------------------------------------------------


def test_instructions() -> None:
    assert traps.instructions("text", {"pick it up": 3, "put it down": 5}) is None
    got = found(traps.instructions("text", {"Pick it  up.": 3, "pick it up": 5, "": 1, " ": 1}))
    assert got == "20.0% of them are empty; 1 are written in several ways: 'Pick it  up.' = 'pick it up'"


# ---- Cameras ---------------------------------------------------------------------------------------------------------


def test_black_camera(rng: np.random.Generator) -> None:
    bright = [rng.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(4)]
    sizes, sampled = np.full(100, 4000), np.array([0, 30, 60, 90])
    assert traps.black_camera("image", bright, sizes, sampled) is None
    sizes[50:] = 691
    half = [*bright[:2], *(np.full((8, 8, 3), 3, np.uint8) for _ in range(2))]
    assert found(traps.black_camera("image", half, sizes, sampled)) == (
        "2 of 4 sampled images are black; 50% of all have no more bytes than those (691)"
    )


def test_swapped_channels_of_real_scenes(shared: Path, bridge: Path, tmp_path: Path) -> None:
    """Four photographs and three cameras of Bridge, as they are and flipped: which of them are told apart.

    No camera is suspected wrongly. Flipped, all photographs are found, and of the Bridge cameras the two whose scenes
    have wood in them; the third shows grey and white things and is missed.
    """
    scenes = {p.name: [np.asarray(Image.open(p).convert("RGB"))] for p in (shared / "data/camera_frames").glob("*.png")}
    assert len(scenes) == 4
    index = open_index(bridge, "train", index_dir=tmp_path)
    for key in ("observation/image_0", "observation/image_1", "observation/image_2"):
        scenes[key] = []
        for step in range(0, index.steps, 10):
            offset, length = index.images[key][step]
            shard = index.split.shards[index.episode_shard[step // 10]]
            scenes[key].append(decode(shard.read_bytes()[offset : offset + length]))
    flipped = {k: [np.ascontiguousarray(x[..., ::-1]) for x in images] for k, images in scenes.items()}
    for key, images in scenes.items():
        assert traps.warmth(flipped[key]) == pytest.approx(-traps.warmth(images), abs=1e-6)
        assert traps.swapped_channels(key, images) is None
    missed = [key for key, images in flipped.items() if traps.swapped_channels(key, images) is None]
    assert missed == ["observation/image_2"]
    grey = [np.full((8, 8, 3), 128, np.uint8)]
    assert traps.warmth(grey) == 0
    assert traps.swapped_channels("grey", grey) is None


# ---- All of them -----------------------------------------------------------------------------------------------------


def images_of(index: FrameIndex) -> dict:
    grey = [np.full((8, 8, 3), 128, np.uint8)]
    return {key: (np.array([0]), grey) for key in index.images}


def test_real_bridge_has_its_known_traps(bridge: Path, tmp_path: Path) -> None:
    index = open_index(bridge, "train", index_dir=tmp_path)
    got = {(t.kind, t.key) for t in traps.find_traps(Sample.take(index), images_of(index))}
    assert got == {("zero first action", "action"), ("episode ends", "is_last")}


def test_toy_has_only_what_is_put_into_it(toy: Path) -> None:
    index = open_index(toy, "train")
    (empty,) = traps.find_traps(Sample.take(index), images_of(index))
    assert (empty.kind, empty.key) == ("instructions", "step: language_instruction")
    action = np.array(index.columns["action"])
    action[40, 0], action[:, 2] = np.nan, 1
    state = np.array(index.columns["observation/state"])
    state[:, 1] = 7
    texts = Texts(index.texts["language_instruction"].ids, ("go", "Go!", "stop", "wait"))
    worse = dataclasses.replace(
        index,
        columns=index.columns | {"action": action, "observation/state": state},
        texts={"language_instruction": texts},
    )
    got = traps.find_traps(Sample.take(worse), images_of(index))
    assert [(t.kind, t.key) for t in got] == [
        ("not finite", "action"),
        ("constant", "observation/state"),
        ("instructions", "step: language_instruction"),
    ]
    assert index.where(40) in got[0].found


def test_which_fields_are_states_and_actions(toy: Path, tmp_path: Path) -> None:
    lerobot = open_index(write_v30(tmp_path / "lerobot", {FRONT: "image"}), "train", index_dir=tmp_path)
    aloha = open_index(write_aloha(tmp_path / "aloha"), "train", index_dir=tmp_path)
    robomimic = open_index(write_robomimic(tmp_path / "robomimic" / "lift.hdf5"), "train", index_dir=tmp_path)
    for index, states, actions in (
        (open_index(toy, "train"), {f"observation/{n}" for n in ("grid", "joints", "present/x", "state")}, "action"),
        (lerobot, {"observation.state"}, "action"),
        (aloha, {f"observations/{n}" for n in ("qpos", "qvel", "effort")}, "action"),
        (robomimic, {"obs/robot0_eef_pos", "obs/robot0_gripper_qpos"}, "actions"),
    ):
        assert set(traps.state_keys(index)) == states
        assert traps.action_keys(index) == [actions]


@pytest.mark.parametrize(
    ("state", "action", "text"),
    [
        ("observation/state", "action", "language_instruction"),
        ("observation.state", "action", "task"),
        ("state", "actions", "task"),
        ("observations/qpos", "action", "instruction"),
        ("obs/robot0_joint_pos", "actions", "language_instruction"),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint16])
def test_states_have_traps_in_every_layout(
    toy_index: FrameIndex, rng: np.random.Generator, state: str, action: str, text: str, dtype: type
) -> None:
    """Angles in degrees that wrap, a dim that is constant, one with outliers, and steps at which nothing moves."""
    x = np.zeros((E, T, 3))
    x[..., 0] = np.arange(T) // 2 * 25 % 360
    x[3, 4, 2] = 600
    index = dataclasses.replace(
        toy_index,
        columns={action: rng.normal(size=(N, 2)).astype(np.float32), state: x.reshape(N, 3).astype(dtype)},
        texts={text: Texts(np.zeros(N, np.int32), ("",))},
        episode_texts={},
        episode_start=STARTS,
        episode_shard=np.zeros(E, np.int64),
        episode_record=np.arange(E),
    )
    got = {(t.kind, t.key): t.found for t in traps.find_traps(Sample.take(index), {})}
    assert got == {
        ("constant", state): "the same value in all 1200 steps: [1] = 0",
        ("outliers", state): "[2] 0 .. 600, q01 .. q99 0 .. 0",
        ("angle wraps", state): "jumps between steps: [0] 30 times by one turn (deg)",
        ("idle", state): "in 51% of the steps nothing moves before the next one",
        ("instructions", f"step: {text}"): "100.0% of them are empty",
    }
