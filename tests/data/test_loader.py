"""Loaders: hosts, resuming anywhere, workers, memory and validation."""

import json
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from openpi_like.data.config import DataConfig, open_datasets
from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.fast import fit_fast
from openpi_like.data.index import open_index
from openpi_like.data.loader import validation_batches
from openpi_like.data.normalize import Normalization
from openpi_like.data.order import sample_order
from openpi_like.data.prompts import FastPrompt
from openpi_like.data.schema import DatasetError
from openpi_like.data.stats import save_normalization
from openpi_like.data.text import TextTokenizer
from tests.data.reader import digests, read
from tests.data.samples import rows
from tests.data.toy import ARM, LENGTHS, WRITES, Shapes, model_of


def test_there_is_something_to_draw(load: Any, everything: dict[str, Any], config: DataConfig, toy: Path) -> None:
    """What the tests below are to keep: cameras come and go, and the four instructions have alternatives."""
    plain, batch = next(load(batch_size=96)), next(load(batch_size=96, **everything))
    (of_plain, arm) = (b["dataset_id"] == 0 for b in (plain, batch))
    for name in ("base", "wrist"):
        assert 0 < batch["image_mask"][name][arm].sum() < arm.sum()
    assert len(np.unique(plain["prompt"][of_plain], axis=0)) == 4
    assert len(np.unique(batch["prompt"][arm], axis=0)) > 8
    told = everything["entries"][0]
    some = EpisodeDataset(open_index(toy, "train"), told.robot, selection=told.selection)
    assert len(some) == sum(n - 2 for n in (12, 5, 9, 20, 16, 11, 8, 4, 14))


@pytest.mark.parametrize("kind", ["mixed", "grouped", "everything"])
@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_read_disjoint_parts_whose_union_is_the_whole(
    load: Any, hosts: int, kind: str, everything: dict[str, Any]
) -> None:
    """Interleaving the hosts' samples gives those of one host: nothing twice, nothing missing, the same draws."""
    kinds: dict[str, dict[str, Any]] = {"mixed": {}, "grouped": {"group_episodes": 3, "camera_dropout": 0.0}}
    options = kinds.get(kind, everything)
    loader = load(**options)
    whole = rows([next(loader) for _ in range(4)])
    loaders = [load(process_index=h, process_count=hosts, **options) for h in range(hosts)]
    parts = [rows([next(part) for _ in range(4)]) for part in loaders]
    assert [row for samples in zip(*parts, strict=True) for row in samples] == whole
    assert {part.position for part in loaders} == {32}


@pytest.mark.parametrize(
    ("start", "hosts", "batch", "threads"), [(8, 1, 8, 1), (13, 1, 4, 3), (16, 2, 8, 2), (6, 4, 4, 1), (24, 8, 8, 1)]
)
def test_resuming_anywhere_on_any_hosts_is_exact(
    load: Any, everything: dict[str, Any], start: int, hosts: int, batch: int, threads: int
) -> None:
    loader = load(**everything)
    whole = rows([next(loader) for _ in range(5)])
    options = dict(start=start, batch_size=batch, process_count=hosts, num_threads=threads, prefetch=threads)
    loaders = [load(process_index=h, **options, **everything) for h in range(hosts)]
    parts = [rows([next(part) for _ in range(16 // batch)]) for part in loaders]
    resumed = [row for samples in zip(*parts, strict=True) for row in samples]
    assert resumed == whole[start : start + 16]
    assert loaders[0].position == start + 16


def test_a_batch_may_be_one_sample(load: Any) -> None:
    whole, single = rows([next(load())]), load(batch_size=1, start=3)
    assert rows([next(single) for _ in range(3)]) == whole[3:6]


def test_workers_give_what_threads_give(load: Any, tokenizer: TextTokenizer, everything: dict[str, Any]) -> None:
    """Two processes, from the middle of the run, with action tokens and what these could not write."""
    narrow = fit_fast([np.zeros((4, 6, 3), np.int64)], scale=5.0, vocab_size=100, span=(-3, 3))
    text = TextTokenizer(tokenizer.tokenizer, 80, prompt_format=FastPrompt(), answer_len=60)
    options: dict[str, Any] = {"policy": WRITES, "tokenizer": text, "action_tokenizer": narrow, "start": 8}
    options |= {"saturate_actions": True, **everything}
    threads, workers = load(**options), load(num_workers=2, num_threads=2, prefetch=1, **options)
    expected, got = [next(threads) for _ in range(5)], [next(workers) for _ in range(5)]
    assert rows(got) == rows(expected)
    assert workers.saturated == threads.saturated > 0
    assert workers.position == threads.position == 48


def test_an_error_in_a_worker_reaches_the_run(load: Any, tokenizer: TextTokenizer) -> None:
    narrow = fit_fast([np.zeros((4, 6, 3), np.int64)], scale=5.0, vocab_size=100, span=(-3, 3))
    text = TextTokenizer(tokenizer.tokenizer, 80, prompt_format=FastPrompt(), answer_len=60)
    loader = load(num_workers=1, policy=WRITES, tokenizer=text, action_tokenizer=narrow)
    with pytest.raises(DatasetError, match=r"record \d+.*: action tokens: .*cannot be encoded"):
        next(loader)


def test_a_reader_that_is_killed_goes_on_where_it_was(
    toy: Path, tokenizer: TextTokenizer, normalizations: dict[str, Normalization], tmp_path: Path
) -> None:
    """SIGKILL after some samples, three times, with other threads and workers each time; workers end with the run."""
    (tmp_path / "text.model").write_bytes(model_of(tokenizer))
    for name, normalization in normalizations.items():
        save_normalization(normalization, tmp_path / f"{name}.json")
    where = (toy, tmp_path / "text.model", tmp_path)
    got: list[str] = []
    lives: list[tuple[int, dict[str, int]]] = [(13, {}), (22, {"num_workers": 2}), (5, {"num_threads": 3})]
    for samples, options in lives:
        command = [sys.executable, "-m", "tests.data.reader", *map(str, where), str(len(got)), json.dumps(options)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            got += [process.stdout.readline().strip() for _ in range(samples)]
            workers = psutil.Process(process.pid).children(recursive=True)
            process.kill()
        assert len(workers) >= options.get("num_workers", 0)
        assert psutil.wait_procs(workers, timeout=30)[1] == []
    loader = read(*where, 0)
    expected = [digest for _ in range(5) for digest in digests(next(loader))]
    loader.close()
    assert got == [f"{position} {digest}" for position, digest in enumerate(expected)]


def test_waiting_is_counted_and_memory_is_announced(load: Any, capsys: pytest.CaptureFixture) -> None:
    loader = load(prefetch=3, num_threads=2, policy=Shapes(image_size=(224, 224)))
    next(loader)
    assert loader.wait_seconds > 0
    # 3 ready, 2 being decoded and 1 handed out, of 8 samples with 3 cameras: 8 * 3 * 224 * 224 * 3 / 2^20 = 3.45
    expected = "129 frames in 2 datasets; at most 21 MiB on this host: 6 batches of 3.4 MiB = 21 MiB, 2 images and"
    assert expected in capsys.readouterr().out


def test_memory_does_not_grow(load: Any) -> None:
    """Over 1200 samples; what a process holds over a million is in tests/bench/bench_oxe.py."""
    loader = load(batch_size=100, camera_dropout=0.0, prefetch=1, group_episodes=4)
    given = []
    for _ in range(12):
        batch = next(loader)
        arrays = [batch["state"], batch["actions"], batch["prompt"], *batch["images"].values()]
        given += [weakref.ref(x) for x in arrays]
        assert all(x() is not None for x in given[-len(arrays) :])
        del batch, arrays
    # Nothing that was handed out is still held, not even the last.
    assert [x() is not None for x in given] == [False] * 12 * 6


def test_variety_of_groups_is_announced(load: Any, capsys: pytest.CaptureFixture) -> None:
    load(group_episodes=2)
    assert re.search(r"3\.\d distinct episodes in a batch of 8, in groups of 2; 6\.\d without", capsys.readouterr().out)


def test_more_memory_than_the_budget_is_refused(load: Any, capsys: pytest.CaptureFixture) -> None:
    shapes = Shapes(image_size=(224, 224))
    load(policy=shapes, memory_budget_mib=30)
    assert "at most 24 MiB on this host of 30: 7 batches" in capsys.readouterr().out
    message = (
        r"takes up to 24 MiB .* more than memory_budget_mib=20: 7 batches of 3\.4 MiB = 24 MiB, .*; lower prefetch"
    )
    with pytest.raises(ValueError, match=message):
        load(policy=shapes, memory_budget_mib=20)
    with pytest.raises(ValueError, match=r"16 batches of 3\.4 MiB.*2 processes = 520 MiB"):
        load(policy=shapes, num_workers=2, memory_budget_mib=100)


def test_validation_frames_are_held_out_evenly_spaced_and_the_same_every_time(
    config: DataConfig, toy: Path, tokenizer: TextTokenizer, normalizations: dict[str, Normalization]
) -> None:
    def batches(**options: Any) -> list:
        options |= dict(policy=Shapes(), tokenizer=tokenizer, normalizations=normalizations)
        return list(validation_batches(config, batch_size=4, count=2, **options))

    dataset = EpisodeDataset(open_index(toy, "val"), ARM)
    frames = np.array([0, 3, 5, 8, 10, 13, 15, 18])
    first, again = batches(), batches()
    assert [b.robot.name for b in first] == ["arm", "arm"]  # the other entry has nothing to validate on
    np.testing.assert_array_equal(np.concatenate([b.state for b in first]), dataset.state(frames))
    actions, mask = dataset.actions(frames)
    np.testing.assert_array_equal(np.concatenate([b.actions for b in first]), actions)
    np.testing.assert_array_equal(np.concatenate([b.action_mask for b in first]), mask)
    assert rows([b.batch for b in first]) == rows([b.batch for b in again])
    parts = [rows([b.batch for b in batches(process_index=h, process_count=2)]) for h in range(2)]
    # Host after host in each batch of four, as the global batch has them.
    whole = rows([b.batch for b in first])
    assert [[part[i] for part in parts for i in at] for at in ((0, 1), (2, 3))] == [whole[:4], whole[4:]]
    np.testing.assert_array_equal([b.batch["position"][:, 1] for b in first], np.arange(8).reshape(2, 4))
    with pytest.raises(ValueError, match=r"batch_size=4 on 3 hosts, host 0, .*; expected a batch_size that"):
        batches(process_index=0, process_count=3)
    # the physical actions come back from the normalised ones
    norm, batch = normalizations["arm"], first[0].batch
    model_space = norm.invert_actions(batch["actions"][:, :5, :3])
    back = ARM.decode_actions(model_space, first[0].state)
    inside = first[0].action_mask
    np.testing.assert_allclose(back[inside], first[0].actions[inside], rtol=1e-4, atol=1e-4)


def test_the_pipeline_never_imports_tensorflow(toy: Path) -> None:
    code = (
        "import sys, openpi_like.data.loader, openpi_like.data.stats; from openpi_like.data.index import open_index; "
        f"open_index({str(toy)!r}, 'train'); print([m for m in sys.modules if m.startswith('tensorflow')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_position_says_which_file_and_episode_its_sample_is_from(load: Any, config: DataConfig) -> None:
    """Whatever host has it, and wherever the loader is: found again by reading the two datasets themselves."""
    loader = load(process_index=1, process_count=2, start=40)
    datasets = open_datasets(config)
    batch = next(loader)
    positions = (batch["position"].astype(np.int64) @ [2**32, 1]).tolist()
    assert positions == [41, 43, 45, 47]
    order = sample_order([len(d) for d in datasets if d], [3.0, 1.0], 5)
    for at, i in zip(positions, batch["dataset_id"], strict=True):
        _, dataset, frame = order[at]
        assert dataset == i
        of = datasets[dataset]
        assert of is not None
        assert loader.where(at) == of.where(frame)
        # By another way than the index's own search: the step counted through whole episodes.
        step = int(of.steps(np.array([frame]))[0])
        lengths = LENGTHS["train" if dataset == 0 else "val"]
        episode = int(np.searchsorted(np.cumsum(lengths), step, side="right"))
        said = re.search(r"toy_arm.*episode (\d+), step (\d+) \(\S*tfrecord\S*, record \d+\)", loader.where(at))
        assert said is not None
        assert (int(said[1]), int(said[2])) == (episode, step - sum(lengths[:episode]))
    assert loader.where(0) == loader.where(0) != loader.where(1)


def test_peeking_moves_nothing_on(load: Any) -> None:
    plain, peeked = load(start=8), load(start=8)
    seen = peeked.peek()
    assert peeked.position == 8
    assert peeked.peek() is seen
    waited = peeked.wait_seconds
    assert waited > 0
    assert next(peeked) is seen
    assert peeked.wait_seconds == waited
    assert (peeked.position, peeked.saturated) == (16, plain.saturated)
    assert rows([seen, next(peeked)]) == rows([next(plain), next(plain)])
