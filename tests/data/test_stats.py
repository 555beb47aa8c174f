"""Statistics in parts, over processes and on Beam; those of Bridge against published ones; and the program."""

import dataclasses
import io
import itertools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from openpi_like.data import stats
from openpi_like.data.damage import check_images
from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.index import open_index
from openpi_like.data.normalize import Normalization
from openpi_like.data.schema import DatasetError
from openpi_like.data.stats import (
    Counts,
    Coverage,
    Moments,
    compute_coverage,
    compute_normalization,
    field_stats,
    load_normalization,
    save_normalization,
)
from openpi_like.robots import ActionField, Gripper
from openpi_like.robots.find import find_robot
from tests.conftest import REPOSITORY
from tests.data.beam import BEAM, import_beam
from tests.data.reference_stats import stats_of, stats_of_blocks
from tests.data.toy import ARM, CART, change_record, shard

SPLITS = ("train", "val")
PROGRAM = REPOSITORY / "data" / "stats.py"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts the toy dataset into many blocks."""
    monkeypatch.setattr(stats, "_BLOCK", 8)


# ---- Accumulators ----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), blocks=st.integers(1, 9), parts=st.integers(1, 5))
def test_any_partition_in_any_order_gives_the_same_bits(seed: int, blocks: int, parts: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(200, 2)) * 10.0 ** rng.uniform(-5, 5, 2)).astype(np.float32)
    x[:, 1] = np.round(x[:, 1])
    pieces = dict(enumerate(np.array_split(x, blocks)))
    expected = stats_of_blocks(("a", "b"), list(pieces.values()))

    def merged(start: Any) -> Any:
        owner = rng.integers(0, parts, blocks)
        accumulators = [start() for _ in range(parts)]
        for i in rng.permutation(blocks):
            accumulators[owner[i]].add(pieces[i], (0, int(i)))
        order = rng.permutation(parts)
        total = accumulators[order[0]]
        for i in order[1:]:
            total.merge(accumulators[i])
        return total

    first = merged(lambda: Moments(2))
    second = merged(lambda: Counts(first.bins()))
    assert field_stats(("a", "b"), first, second) == expected  # every number, to the bit


def test_mean_and_deviation_are_stable_far_from_zero() -> None:
    # E[x^2] - E[x]^2 in float32, which openpi computes, gives 0 or nonsense here.
    x = (1e4 + np.random.default_rng(0).normal(size=(5000, 1))).astype(np.float32)
    got = stats_of_blocks(("x",), np.array_split(x, 7))
    np.testing.assert_allclose(got.std, x.astype(np.float64).std(0), rtol=1e-9)
    np.testing.assert_allclose(got.mean, x.astype(np.float64).mean(0), rtol=1e-12)


def test_coverage_counts_what_lies_outside() -> None:
    rng = np.random.default_rng(1)
    x, y = (rng.normal(size=(n, 3)).astype(np.float32) * scale for n, scale in ((400, 1), (300, 2)))
    own = stats_of(x)
    total, other = Coverage(own, "quantile"), Coverage(own, "quantile")
    total.add(y[:100], (0, 0))
    other.add(y[100:], (0, 100))
    total.merge(other)
    outside = (y < np.array(own.q01)) | (y > np.array(own.q99))
    assert total.count == 300
    assert total.outside.tolist() == outside.sum(0).tolist()
    normalization = Normalization("r", "quantile", own, own)
    np.testing.assert_allclose(total.largest, np.abs(normalization.apply_state(y)).max(0), rtol=1e-6)


# ---- Datasets --------------------------------------------------------------------------------------------------------


def opened(directory: Path, *splits: str, robot: Any = ARM) -> list[EpisodeDataset]:
    return [EpisodeDataset(open_index(directory, split), robot) for split in splits]


@pytest.mark.usefixtures("small_blocks")
def test_blocks_cover_every_frame_once(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = opened(toy, "train", "val")
    blocks = list(itertools.chain.from_iterable(stats.blocks_of(datasets)))
    frames = [(i, at + k) for i, at in blocks for k in range(min(8, len(datasets[i]) - at))]
    assert sorted(frames) == [(0, f) for f in range(110)] + [(1, f) for f in range(19)]
    monkeypatch.setattr(stats, "_TASKS", 3)
    parts = stats.blocks_of(datasets)
    assert [len(p) for p in parts] == [5, 6, 6]
    assert list(itertools.chain.from_iterable(parts)) == blocks


def test_workers_give_the_same_file(toy: Path, tmp_path: Path) -> None:
    datasets = opened(toy, "train", "val")
    seen: list[tuple[int, int]] = []
    alone = compute_normalization(*datasets, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    save_normalization(alone, tmp_path / "alone.json")
    save_normalization(compute_normalization(*datasets, workers=2), tmp_path / "two.json")
    assert (tmp_path / "alone.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    with pytest.raises(ValueError, match="workers=0, expected at least 1"):
        compute_normalization(*datasets, workers=0)


def test_no_shard_is_opened(copy: Path, toy: Path, shards_read: list[str]) -> None:
    datasets = opened(copy, "train", "val")
    shards_read.clear()
    for path in copy.glob("*.tfrecord-*"):
        path.unlink()  # the index has all that is needed
    normalization = compute_normalization(*datasets)
    assert normalization == compute_normalization(*opened(toy, "train", "val"))
    assert compute_coverage(normalization, *datasets, workers=1)[0].count == 129
    assert not shards_read


@pytest.mark.usefixtures("small_blocks")
def test_own_statistics_cover_all_but_two_percent(toy: Path) -> None:
    datasets = opened(toy, "train", robot=CART)
    normalization = compute_normalization(*datasets)
    for coverage, field in zip(compute_coverage(normalization, *datasets), ("state", "action"), strict=True):
        own = getattr(normalization, field)
        assert coverage.count == own.count
        assert coverage.outside.tolist() == [2 * np.ceil(0.01 * (own.count - 1))]
        ends = np.array([own.min, own.max], np.float32)
        apply = normalization.apply_state if field == "state" else normalization.apply_actions
        np.testing.assert_allclose(coverage.largest, np.abs(apply(ends)).max(0), rtol=1e-6)
    with pytest.raises(ValueError, match="robot cart, expected arm"):
        compute_coverage(normalization, *opened(toy, "train", robot=ARM))


@pytest.mark.usefixtures("small_blocks")
def test_beam_gives_the_same_bits(toy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    beam = import_beam()
    still = ActionField("still", "action", 1, gripper=Gripper(open=1e6, closed=0.0))
    constant = dataclasses.replace(ARM, action=(*ARM.action, still))
    for robot in (CART, constant):
        datasets = opened(toy, "train", "val", robot=robot)
        alone = compute_normalization(*datasets)
        save_normalization(alone, tmp_path / "here.json")
        caplog.clear()
        got, covered = beam.write_normalization(datasets, str(tmp_path / "beam.json"), BEAM)
        assert got == alone
        assert (tmp_path / "beam.json").read_bytes() == (tmp_path / "here.json").read_bytes()
        assert ("action of robot 'arm': still_0 [1] vary by less than 0.0001" in caplog.text) == (robot is constant)
        assert_same_coverage(covered, compute_coverage(alone, *datasets))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["beam.json", "here.json"]


def assert_same_coverage(got: tuple[Coverage, Coverage], expected: tuple[Coverage, Coverage]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.count == theirs.count
        np.testing.assert_array_equal(ours.outside, theirs.outside, strict=True)
        np.testing.assert_array_equal(ours.largest, theirs.largest, strict=True)


def test_beam_refuses_what_does_not_belong_together(toy: Path, tmp_path: Path) -> None:
    beam = import_beam()
    mixed = [*opened(toy, "train"), *opened(toy, "val", robot=CART)]
    with pytest.raises(ValueError, match="expected one and the same robot"):
        beam.write_normalization(mixed, str(tmp_path / "x.json"), BEAM)
    with pytest.raises(ValueError, match="robot cart, expected arm"):
        beam.compute_coverage(compute_normalization(mixed[1]), mixed[:1], str(tmp_path / "x.json"), BEAM)
    assert not list(tmp_path.iterdir())


def test_program_on_beam_reads_nothing_itself(
    program: SimpleNamespace, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_beam()
    options = {"robot": "tests.data.toy:CART", "data": (str(toy),)}
    pipeline = {"beam": tuple(option.removeprefix("--") for option in BEAM)}
    for mode in ({"out": tmp_path / "new" / "cart.json"}, {"use": tmp_path / "new" / "cart.json", "split": "val"}):
        expected = run(program, **options, **mode)
        with monkeypatch.context() as patch:
            for name in ("compute_normalization", "compute_coverage"):
                patch.setitem(program.main.__globals__, name, None)
            assert run(program, **options, **mode, **pipeline).split() == expected.split()


@pytest.mark.parametrize("name", ["open-pi-zero_bridge_statistics", "RoboVLMs_dataset_statistics_bridge"])
def test_bridge_lies_inside_its_published_statistics(shared: Path, bridge: Path, tmp_path: Path, name: str) -> None:
    """What 50 episodes of a few scenes, cut to their first 10 steps, can say about numbers of 60 thousand.

    Exactly: no value lies outside the published least and greatest ones. Roughly: means and deviations, for the first
    steps of an episode are not like all of them (the hand is still high), and the published actions are differences
    of states where ours are commands. Quantiles cannot be compared.
    """
    published = json.loads((shared / "data" / "statistics" / f"{name}.json").read_text())
    robot = dataclasses.replace(find_robot("widowx"), execute_steps=1, action_horizon=1)
    ours = compute_normalization(*(EpisodeDataset(open_index(bridge, s, index_dir=tmp_path), robot) for s in SPLITS))
    assert ours.state.count == ours.action.count == 500
    compared = 0
    for what, own, near in (("action", ours.action, 0.5), ("proprio", ours.state, 2.0)):
        theirs = {k: np.array(v) for k, v in published[what].items()}
        if not theirs["std"].any():  # RoboVLMs has filled its states with zeros
            continue
        compared += 1
        assert np.all(np.array(own.min) >= theirs["min"])
        assert np.all(np.array(own.max) <= theirs["max"])
        assert np.all(np.abs(np.array(own.mean) - theirs["mean"]) < near * theirs["std"])
        assert np.all((np.array(own.std) > theirs["std"] / 3) & (np.array(own.std) < theirs["std"] * 2))
    assert compared == (2 if name.startswith("open-pi-zero") else 1)


# ---- The program -----------------------------------------------------------------------------------------------------

CONFIG = """
from types import SimpleNamespace
from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.train.statistics import Own
from tests.data.toy import ARM, CART, change_record, shard

entries = (MixtureEntry(ARM, {toy!r}), MixtureEntry(CART, {toy!r}), MixtureEntry(ARM, {toy!r}, split="val"))
config = SimpleNamespace(data=DataConfig(entries), stats={stats!r}, statistics=Own())
"""


@pytest.fixture(scope="module")
def program() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(PROGRAM)))


def run(program: SimpleNamespace, **options: Any) -> str:
    text = io.StringIO()
    program.main(program.Args(**options), Console(file=text, width=200))
    return text.getvalue()


def test_program_writes_and_measures(program: SimpleNamespace, toy: Path, tmp_path: Path) -> None:
    robot, out = "tests.data.toy:CART", tmp_path / "new" / "cart.json"
    text = run(program, robot=robot, data=(str(toy),), out=out)
    assert load_normalization(out, CART) == compute_normalization(*opened(toy, "train", robot=CART))
    assert "robot cart: 110 frames of 12 episodes, mode quantile" in text
    assert "outside q01..q99" in text
    held_out = run(program, robot=robot, data=(str(toy),), use=out, split="val")
    assert "19 frames of 3 episodes" in held_out
    assert "written" not in held_out


def test_program_leaves_out_damaged_images_when_asked(program: SimpleNamespace, copy: Path, tmp_path: Path) -> None:
    whole = open_index(copy, "train").read_image(5, "observation/image")
    change_record(shard(copy), 0, lambda data: data.replace(whole, b"x" * len(whole)))
    check_images(open_index(copy, "train"))
    options = {"robot": "tests.data.toy:ARM", "data": (str(copy),), "out": tmp_path / "arm.json"}
    with pytest.raises(DatasetError, match="at 1 of 110 steps an image of its cameras is damaged"):
        run(program, **options)
    assert "109 frames" in run(program, **options, max_corrupt_fraction=0.01)


def test_program_computes_what_a_run_lacks(program: SimpleNamespace, toy: Path, tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(CONFIG.format(toy=str(toy), stats=str(tmp_path / "stats")))
    text = run(program, config=tmp_path / "run.py")
    assert "129 frames of 15 episodes" in text  # both splits of the arm are one
    assert load_normalization(tmp_path / "stats" / "arm.json", ARM).state.count == 129
    (tmp_path / "stats" / "cart.json").unlink()
    before = (tmp_path / "stats" / "arm.json").stat().st_mtime_ns
    text = run(program, config=tmp_path / "run.py")
    assert "robot arm: " in text
    assert "arm.json is there" in text
    assert (tmp_path / "stats" / "arm.json").stat().st_mtime_ns == before
    load_normalization(tmp_path / "stats" / "cart.json", CART)
    (tmp_path / "stats" / "arm.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no normalisation; make it again"):
        run(program, config=tmp_path / "run.py")
    assert "129 frames" in run(program, config=tmp_path / "run.py", again=True)


def test_statistics_of_other_data_or_of_a_robot_described_otherwise_are_not_taken(
    program: SimpleNamespace, toy: Path, tmp_path: Path
) -> None:
    path, text = tmp_path / "run.py", CONFIG.format(toy=str(toy), stats=str(tmp_path / "stats"))
    path.write_text(text)
    run(program, config=path)
    path.write_text(text + "\nconfig.data = DataConfig(entries[:2])")
    with pytest.raises(ValueError, match=r"(?s)arm\.json: statistics of other data:.*'val'.*19 frames.*add --again"):
        run(program, config=path)
    closed = tuple(
        dataclasses.replace(f, gripper=Gripper(open=0.0, closed=1.0)) if f.gripper else f for f in ARM.action
    )
    assert closed != ARM.action
    expected = r"(?s)as it was described before:\n  action .*Gripper.*it is now:\n  action .*closed=1.0.*--again"
    with pytest.raises(ValueError, match=expected):
        load_normalization(tmp_path / "stats" / "arm.json", dataclasses.replace(ARM, action=closed))
    load_normalization(
        tmp_path / "stats" / "arm.json", dataclasses.replace(ARM, default_prompt="lift", execute_steps=1)
    )


def test_program_refuses(program: SimpleNamespace, toy: Path, tmp_path: Path) -> None:
    for options, message in (
        ({}, "give --robot, --data and one of --out and --use; or give --config"),
        ({"robot": "arm", "data": (str(toy),), "out": tmp_path, "use": tmp_path}, "one of --out and --use"),
        ({"config": tmp_path, "out": tmp_path, "workers": 0}, "leave out --robot.*; --workers 0, expected at least 1"),
        ({"robot": "arm", "data": (str(toy),), "out": tmp_path, "again": True}, "--set and --again belong to --config"),
    ):
        with pytest.raises(ValueError, match=message):
            program.Args(**options)
    with pytest.raises(ValueError, match=r"no robot 'widow'.*did you mean 'widowx'"):
        run(program, robot="widow", data=(str(toy),), out=tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"does not fit robot 'widowx':\n"):
        run(program, robot="widowx", data=(str(toy),), out=tmp_path / "x.json")
    with pytest.raises(ValueError, match="no dataset directory"):
        run(program, robot="widowx", data=(str(tmp_path / "nowhere"),), out=tmp_path / "x.json")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        run(program, robot="tests.data.toy:CART", data=(str(toy),), out=tmp_path / "file" / "x.json")


def test_program_says_what_beam_needs(
    program: SimpleNamespace, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "openpi_like.data.beam", raising=False)
    monkeypatch.delattr("openpi_like.data.beam", raising=False)
    with pytest.raises(SystemExit, match=r"--beam needs Apache Beam .*; pip install .*beam"):
        run(
            program,
            robot="tests.data.toy:ARM",
            data=(str(toy),),
            out=tmp_path / "x.json",
            beam=("runner=DirectRunner",),
        )


def test_program_from_a_shell(toy: Path, tmp_path: Path) -> None:
    def start(*options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(PROGRAM), "--robot", "tests.data.toy:ARM", "--data", str(toy), *options]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = start("--out", str(tmp_path / "arm.json"), "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert load_normalization(tmp_path / "arm.json", ARM) == compute_normalization(*opened(toy, "train"))
    failed = start("--out", str(tmp_path / "arm.json"), "--split", "trian")
    assert failed.returncode == 1
    assert "no split 'trian'; did you mean 'train'?" in failed.stderr
    assert "Traceback" not in failed.stderr
