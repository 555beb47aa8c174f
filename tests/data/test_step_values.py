"""Commands that are derived from columns or combined, against plain loops over them."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.index import open_index
from openpi_like.robots import ActionField, Camera, Gripper
from openpi_like.robots.oxe_arms import BRIDGE
from tests.data.toy import ARM
from tests.data.toy_dataset import START, STEPS, TRAIN, acting, chunks_of, with_columns


@pytest.mark.parametrize("convention", ["trigger", "look_ahead"])
@pytest.mark.parametrize("block", [8, 1 << 16])
def test_grippers_are_derived_within_episodes(
    dataset: EpisodeDataset, monkeypatch: pytest.MonkeyPatch, convention: str, block: int
) -> None:
    """Whatever the size of the blocks that are looked at together; in the dataset's own numbers."""
    monkeypatch.setattr("openpi_like.data.blocks.BLOCK", block)
    gripper = Gripper(open=-1.0, closed=1.0, convention=convention)
    stored = np.random.default_rng(0).choice([-1.0, 0.0, 0.0, 0.0, 1.0], (STEPS, 3)).astype(np.float32)
    index = with_columns(dataset.index, action=stored)
    derived = EpisodeDataset(index, acting(ActionField("gripper", "action", 1, start=2, gripper=gripper)))
    got = derived.actions(np.arange(STEPS))[0][:, 0, 0]
    for a, b in itertools.pairwise(START):
        opens = gripper.opens(stored[a:b, 2].astype(np.float64), np.arange(b - a) == 0)
        np.testing.assert_array_equal(got[a:b], np.where(opens, -1, 1))
    assert derived.robot.encode_actions(got[:1, None], np.zeros(6))[0, 0] in (0.0, 1.0)


def test_commands_from_the_next_step(dataset: EpisodeDataset) -> None:
    """The last step of an episode is no frame, no chunk reaches it, and the episode of one step is gone."""
    move = ActionField("hand", "observation/joints", 2, unit="cm", command="delta", next_step="change")
    goal = ActionField("goal", "observation/joints", 1, start=2, next_step="value")
    derived = EpisodeDataset(dataset.index, acting(move, goal))
    assert derived.removed == {"no whole action left in the episode": len(TRAIN)}
    assert derived.frames_per_episode().tolist() == [n - 1 for n in TRAIN]
    assert (derived.episodes, len(derived)) == (len(TRAIN) - 1, STEPS - len(TRAIN))
    x = dataset.index.columns["observation/joints"]
    for e, length in enumerate(TRAIN):
        chunks, mask = chunks_of(derived, e)
        for t in range(length - 1):
            for a in range(ARM.action_horizon):
                assert mask[t, a] == (t + a + 1 < length)
                at = START[e] + min(t + a, length - 2)
                expected = [*(x[at + 1, :2] - x[at, :2]), x[at + 1, 2]]
                np.testing.assert_allclose(chunks[t, a], expected, rtol=1e-6)


@pytest.mark.parametrize("stride", [2, 3])
def test_control_steps_of_several_steps(dataset: EpisodeDataset, stride: int) -> None:
    """Targets: the last of a control step; changes: their sum; rates: their mean. All of it inside the episode."""
    fields = [
        ActionField(command, "action", 1, start=i, command=command)
        for i, command in enumerate(("absolute", "delta", "velocity"))
    ]
    strided = EpisodeDataset(dataset.index, acting(*fields, stride=stride))
    x = dataset.index.columns["action"]
    assert strided.removed == {"no whole action left in the episode": sum(min(stride - 1, n) for n in TRAIN)}
    for e, length in enumerate(TRAIN):
        chunks, mask = chunks_of(strided, e)
        assert len(chunks) == max(0, length - stride + 1)
        for t in range(len(chunks)):
            for a in range(ARM.action_horizon):
                assert mask[t, a] == (t + (a + 1) * stride <= length)
                begin = START[e] + t + min(a, (length - t) // stride - 1) * stride
                part = x[begin : begin + stride].astype(np.float64)
                expected = [part[-1, 0], part[:, 1].sum(), part[:, 2].mean()]
                np.testing.assert_allclose(chunks[t, a], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_targets_and_changes_say_the_same_at_any_stride(dataset: EpisodeDataset, stride: int) -> None:
    """Where targets are the sums of changes, those of a strided chunk are too."""
    changes = dataset.index.columns["action"].astype(np.float64)
    targets = np.concatenate([np.cumsum(changes[a:b], axis=0) for a, b in itertools.pairwise(START)])
    index = with_columns(dataset.index, action=changes, targets=targets)
    both = acting(
        ActionField("change", "action", 3, command="delta"), ActionField("target", "targets", 3), stride=stride
    )
    chunks, mask = EpisodeDataset(index, both).actions(np.arange(len(EpisodeDataset(index, both))))
    differences = np.diff(chunks[:, :, 3:], axis=1)
    valid = mask[:, 1:]
    np.testing.assert_allclose(differences[valid], chunks[:, 1:, :3][valid], atol=1e-5)


def test_bridge_actions_are_how_its_state_changes(bridge: Path, tmp_path: Path) -> None:
    """Against a loop over real episodes; and they are closer to what was commanded than differences of angles are."""
    index = open_index(bridge, "train", index_dir=tmp_path)
    dataset = EpisodeDataset(index, BRIDGE)
    state, stored = index.columns["observation/state"].astype(np.float64), index.columns["action"]
    chunks, mask = dataset.actions(np.arange(len(dataset)))
    assert (len(dataset), dataset.removed) == (225, {"no whole action left in the episode": 25})
    assert mask.sum() == 25 * sum(min(8, 9 - t) for t in range(9))
    frame = 0
    for e in range(25):
        for t in range(9):
            now, later = state[10 * e + t], state[10 * e + t + 1]
            turn = Rotation.from_euler("xyz", later[3:6]) * Rotation.from_euler("xyz", now[3:6]).inv()
            np.testing.assert_allclose(chunks[frame, 0, :3], later[:3] - now[:3], atol=1e-7)
            np.testing.assert_allclose(chunks[frame, 0, 3:6], turn.as_euler("xyz"), atol=1e-6)
            opening = stored[10 * e + t : 10 * e + 10, 6]
            reached = opening[(opening > 0.95) | (opening < 0.05)]
            assert chunks[frame, 0, 6] == round(float(reached[0] if len(reached) else opening[0]))
            frame += 1
    later = np.flatnonzero(np.arange(225) % 9 != 0)  # the first command of an episode is none
    rows = dataset.steps(later)
    correlation = [np.corrcoef(chunks[later, 0, d], stored[rows, d])[0, 1] for d in range(6)]
    np.testing.assert_allclose(correlation, [0.892, 0.824, 0.85, 0.954, 0.813, 0.903], atol=2e-3)
    wrapped = (state[rows + 1, 3:6] - state[rows, 3:6] + np.pi) % (2 * np.pi) - np.pi
    assert all(np.corrcoef(wrapped[:, d], stored[rows, 3 + d])[0, 1] < correlation[3 + d] for d in range(3))
    # black frames stand for absent cameras
    absent = Camera("absent", "observation/image_3", min_bytes=BRIDGE.cameras[0].min_bytes)
    assert not dataset.present(np.arange(225), absent).any()
    assert all(dataset.present(np.arange(225), c).all() for c in BRIDGE.cameras)
