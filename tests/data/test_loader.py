"""Order, mixing, resuming and shapes of batches, checked against one sample at a time."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_like.batch import ActionTokens, Batch
from openpi_like.config import from_json, to_json
from openpi_like.data.assembly import keep_cameras, uniform_draws
from openpi_like.data.augment import Augment
from openpi_like.data.config import DataConfig, MixtureEntry, describe, open_datasets
from openpi_like.data.damage import check_images
from openpi_like.data.dataset import EpisodeDataset, Selection
from openpi_like.data.fast import FastTokenizer, dct_coefficients, fit_fast
from openpi_like.data.images import fit
from openpi_like.data.index import open_index
from openpi_like.data.loader import Loader, make_loader, validation_batches
from openpi_like.data.normalize import Normalization
from openpi_like.data.order import distinct_episodes, order_changes, order_record, sample_order
from openpi_like.data.prompts import FastPrompt, Pi05Prompt
from openpi_like.data.schema import DatasetError
from openpi_like.data.stats import compute_normalization, save_normalization
from openpi_like.data.text import TextTokenizer
from openpi_like.robots import Camera
from tests.data.reader import digests, read
from tests.data.toy import ARM, CART, LENGTHS, SOME, TOLD, Shapes, change_record, model_of, shard


@pytest.fixture(scope="module")
def normalizations(toy: Path) -> dict[str, Normalization]:
    return {r.name: compute_normalization(EpisodeDataset(open_index(toy, "train"), r)) for r in (ARM, CART)}


@pytest.fixture(scope="module")
def config(toy: Path) -> DataConfig:
    """Three of four samples from one robot, one of four from the other, whose "training" data is the small split."""
    return DataConfig(
        entries=(
            MixtureEntry(ARM, str(toy), weight=3.0),
            MixtureEntry(CART, str(toy), weight=1.0, split="val", val_split=None),
        ),
        seed=5,
        augment=Augment.octo(),
        camera_dropout=0.3,
    )


@pytest.fixture
def load(config: DataConfig, tokenizer: TextTokenizer, normalizations: dict[str, Normalization]) -> Iterator[Any]:
    """Makes loaders of the config and closes them."""
    made: list[Loader] = []

    def make(**options: Any) -> Loader:
        defaults: dict[str, Any] = dict(
            batch_size=8, policy=Shapes(), tokenizer=tokenizer, normalizations=normalizations
        )
        changes = {k: options.pop(k) for k in list(options) if k in {f.name for f in dataclasses.fields(DataConfig)}}
        made.append(make_loader(dataclasses.replace(config, **changes), **(defaults | options)))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def flatten(batch: Batch) -> dict[str, np.ndarray]:
    flat = {f"images/{k}": v for k, v in batch["images"].items()}
    flat |= {f"image_mask/{k}": v for k, v in batch["image_mask"].items()}
    return flat | {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}


def rows(batches: list[Batch]) -> list[tuple[bytes, ...]]:
    """Every sample as bytes, pixels included."""
    flat = [flatten(b) for b in batches]
    return [tuple(f[k][i].tobytes() for k in sorted(f)) for f in flat for i in range(len(f["state"]))]


# ---- Order -----------------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4), seed=st.integers(0, 2**40),
    weights=st.lists(st.floats(0.05, 1), min_size=4, max_size=4),
)  # fmt: skip
def test_a_mixture_keeps_its_weights_and_repeats_no_frame_in_a_pass(
    lengths: list[int], seed: int, weights: list[float]
) -> None:
    weights = weights[: len(lengths)]
    order = sample_order(lengths, weights, seed)
    count = 200
    samples = [order[p] for p in range(count)]
    assert [p for p, _, _ in samples] == list(range(count))
    for i, length in enumerate(lengths):
        frames = [frame for _, dataset, frame in samples if dataset == i]
        share = weights[i] / sum(weights)
        assert abs(len(frames) - share * count) <= len(lengths)
        for at in range(0, len(frames) - length + 1, length):
            assert sorted(frames[at : at + length]) == list(range(length))


def test_passes_and_seeds_differ_and_far_positions_cost_nothing() -> None:
    order = sample_order([50], [1.0], 0)
    passes = [[order[p][2] for p in range(at, at + 50)] for at in (0, 50)]
    assert passes[0] != passes[1] != list(range(50))
    assert [sample_order([50], [1.0], 1)[p][2] for p in range(50)] not in passes
    assert order[10**12][0] == 10**12


@settings(max_examples=25, deadline=None)
@given(
    episodes=st.lists(st.integers(0, 6), min_size=1, max_size=9).filter(sum), group=st.integers(1, 11),
    seed=st.integers(0, 2**40),
)  # fmt: skip
def test_grouped_passes_have_each_frame_once_and_few_episodes_at_a_time(
    episodes: list[int], group: int, seed: int
) -> None:
    lengths = np.array(episodes)
    order = sample_order([sum(episodes)], [1.0], seed, episodes=[lengths], group_episodes=group)
    of_frame = np.repeat(np.arange(len(episodes)), lengths)
    for at in (0, 7 * sum(episodes)):
        frames = [order[p][2] for p in range(at, at + sum(episodes))]
        assert sorted(frames) == list(range(sum(episodes)))
        # A pass is a run of groups: once all frames of a group have come, no episode of it comes again.
        left, opened = lengths.copy(), set()
        for frame in frames:
            episode = int(of_frame[frame])
            left[episode] -= 1
            opened.add(episode)
            assert sum(1 for e in opened if left[e] > 0) <= group
    # An element does not depend on which others were asked for before.
    again = sample_order([sum(episodes)], [1.0], seed, episodes=[lengths], group_episodes=group)
    assert [again[p] for p in range(8 * sum(episodes) - 1, -1, -5)] == [
        order[p] for p in range(8 * sum(episodes) - 1, -1, -5)
    ]


def test_grouped_order_differs_between_passes_seeds_and_datasets() -> None:
    lengths = np.full(20, 5)

    def a_pass(seed: int, number: int, dataset: int) -> tuple[int, ...]:
        order = sample_order([100, 100], [0.5, 0.5], seed, episodes=[lengths] * 2, group_episodes=4)
        samples = [order[p] for p in range(200 * number, 200 * (number + 1))]
        return tuple(frame for _, i, frame in samples if i == dataset)

    passes = {a_pass(seed, number, dataset) for seed in (0, 1) for number in (0, 1) for dataset in (0, 1)}
    assert len(passes) == 8
    assert all(sorted(of) == list(range(100)) for of in passes)


ORDERS: list[dict[str, Any]] = [
    {},
    {"seed": 6},
    {"group_episodes": 2},
    {"group_episodes": 3},
    {"frame_stride": 2},
    {"selection": Selection(skip_first=1)},
    {"selection": Selection(skip_last=1)},  # as many frames of each episode as with the one before
    {"split": "train[:75%]"},
    {"split": "train[25%:]"},
    {"weight": 2.0},
    {"num_threads": 3, "prefetch": 9, "camera_dropout": 0.5, "augment": None},
    {"drop_cameras": ("wrist",)},
]


def test_orders_with_equal_records_are_equal_and_other_records_say_in_what(config: DataConfig) -> None:
    made: list[tuple[dict[str, Any], list[tuple[int, int]]]] = []
    for options in ORDERS:
        fields = {f.name for f in dataclasses.fields(MixtureEntry)}
        entry = dataclasses.replace(config.entries[0], **{k: v for k, v in options.items() if k in fields})
        changed = dataclasses.replace(
            config, entries=(entry, config.entries[1]), **{k: v for k, v in options.items() if k not in fields}
        )
        datasets = [d for d in open_datasets(changed) if d is not None]
        record = order_record(changed, datasets)
        assert json.loads(json.dumps(record)) == record
        order = sample_order(
            [len(d) for d in datasets],
            [e.weight for e in changed.entries],
            changed.seed,
            episodes=[d.frames_per_episode() for d in datasets],
            group_episodes=changed.group_episodes,
        )
        samples = [order[p] for p in range(200)]
        made.append((record, [(i, int(datasets[i].steps(np.array([frame]))[0])) for _, i, frame in samples]))
        for dataset in datasets:
            dataset.close()
    for (one, samples), (other, others) in itertools.combinations(made, 2):
        assert (samples == others) == (one == other) == (order_changes(one, other) == [])
    assert made[0] == made[-1] == made[-2]
    assert order_changes(made[0][0], made[1][0]) == ["seed: 5 -> 6"]
    assert order_changes(made[2][0], made[3][0]) == ["group_episodes: 2 -> 3"]
    assert order_changes(made[0][0], made[9][0]) == ["dataset 0 (arm): weight 3.0 -> 2.0"]
    (skips,) = order_changes(made[5][0], made[6][0])
    assert re.fullmatch(r"dataset 0 \(arm\): steps [0-9a-f]{16} -> [0-9a-f]{16}", skips)


def test_an_order_of_fewer_datasets_is_another(config: DataConfig) -> None:
    def record(config: DataConfig) -> dict[str, Any]:
        datasets = [d for d in open_datasets(config) if d is not None]
        for dataset in datasets:
            dataset.close()
        return order_record(config, datasets)

    fewer = dataclasses.replace(config, entries=config.entries[:1])
    assert order_changes(record(config), record(fewer)) == ["datasets: 2 -> 1"]


def test_damage_of_a_camera_that_is_not_read_does_not_matter(config: DataConfig, copy: Path) -> None:
    whole = open_index(copy, "train").read_image(5, "observation/wrist")
    change_record(shard(copy), 0, lambda data: data.replace(whole, b"x" * len(whole)))
    check_images(open_index(copy, "train"))
    config = dataclasses.replace(config, entries=(dataclasses.replace(config.entries[0], path=str(copy)),))
    with pytest.raises(DatasetError, match="at 1 of 110 steps an image of its cameras is damaged"):
        open_datasets(config)
    (dataset,) = open_datasets(dataclasses.replace(config, drop_cameras=("wrist",)))
    assert dataset is not None
    assert len(dataset) == 110
    dataset.close()


@settings(max_examples=60, deadline=None)
@given(
    episodes=st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(sum), batch=st.integers(1, 90),
    group=st.integers(1, 70),
)  # fmt: skip
def test_variety_lies_between_one_episode_and_all(episodes: list[int], batch: int, group: int) -> None:
    lengths = np.array(episodes)
    grouped, whole = (distinct_episodes(lengths, batch, group_episodes=g) for g in (group, None))
    for variety in (grouped, whole):  # a group may by chance spread over more batches than a shuffle would
        assert 1 - 1e-9 <= variety <= min(batch, int(np.count_nonzero(lengths))) + 1e-6
    if group >= len(episodes) or batch == 1:
        assert grouped == pytest.approx(whole)


@pytest.mark.parametrize(("group", "batch"), [(None, 16), (40, 16), (4, 16), (4, 50), (1, 7)])
def test_variety_of_a_batch_is_what_the_order_gives(group: int | None, batch: int) -> None:
    """Against counting, in five passes of 25 batches each or more."""
    lengths = np.random.default_rng(0).integers(0, 30, 90)
    frames = int(lengths.sum())
    order = sample_order([frames], [1.0], 3, episodes=[lengths], group_episodes=group)
    episode = np.repeat(np.arange(90), lengths)[[order[p][2] for p in range(5 * frames)]].reshape(5, frames)
    starts = range(0, frames - batch + 1, batch)
    counts = [len(set(a_pass[i : i + batch])) for a_pass in episode for i in starts]
    assert np.mean(counts) == pytest.approx(distinct_episodes(lengths, batch, group_episodes=group), rel=0.04)


@pytest.fixture
def everything(config: DataConfig) -> dict[str, Any]:
    """Options of a loader that draws all there is to draw: order in groups, instructions, cameras; of some steps."""
    told = dataclasses.replace(config.entries[0], robot=TOLD, selection=SOME)
    return {"entries": (told, config.entries[1]), "group_episodes": 4}


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


# ---- Draws -----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**63), stream=st.integers(0, 9), first=st.integers(0, 2**40), step=st.integers(1, 8),
    count=st.integers(1, 20),
)  # fmt: skip
def test_draws_are_a_function_of_the_position(seed: int, stream: int, first: int, step: int, count: int) -> None:
    positions = first + step * np.arange(count)
    together = uniform_draws(seed, stream, positions)
    alone = [float(uniform_draws(seed, stream, positions[i : i + 1])[0]) for i in range(count)]
    assert together.tolist() == alone
    assert uniform_draws(seed, stream, positions[::-1]).tolist() == alone[::-1]
    assert not set(alone) & set(uniform_draws(seed, stream + 1, positions).tolist())


def test_draws_are_uniform_and_streams_independent() -> None:
    a, b = (uniform_draws(5, stream, np.arange(40_000)) for stream in (0, 1))
    counts = np.histogram(a, 10, (0, 1))[0]
    assert ((counts - 4000) ** 2 / 4000).sum() < 27.9  # chi-square with 9 degrees of freedom, 0.1 %
    for x, y in ((a, b), (a[:-1], a[1:])):
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.017
    assert len(uniform_draws(5, 0, np.arange(0))) == 0


@pytest.mark.parametrize(("cameras", "dropout"), [(1, 0.5), (2, 0.3), (3, 0.6)])
def test_cameras_are_dropped_as_often_as_asked_and_never_all(cameras: int, dropout: float) -> None:
    """C cameras are each dropped with probability p, less p^C / C, for one of them stays where all would go."""
    draws = np.stack([uniform_draws(0, c, np.arange(30_000)) for c in range(cameras)])
    kept = keep_cameras(np.ones_like(draws, bool), draws, dropout)
    assert kept.any(axis=0).all()
    np.testing.assert_allclose(1 - kept.mean(axis=1), dropout - dropout**cameras / cameras, atol=0.012)
    # One that is not there neither comes back nor counts as the one that stays.
    present = np.ones_like(draws, bool)
    present[0] = False
    kept = keep_cameras(present, draws, dropout)
    assert not kept[0].any()
    assert kept.any(axis=0).all() == (cameras > 1)


def test_dropped_cameras_are_masked_and_black_and_the_others_as_they_were(load: Any) -> None:
    plain, dropped = next(load(batch_size=96, camera_dropout=0.0)), next(load(batch_size=96, camera_dropout=0.5))
    arm = plain["dataset_id"] == 0
    masks = {name: dropped["image_mask"][name] for name in ("base", "wrist")}
    assert (masks["base"] | masks["wrist"])[arm].all()
    assert masks["base"][~arm].all()  # its only camera
    for name, mask in masks.items():
        assert 0.2 < 1 - mask[arm].mean() < 0.6
        np.testing.assert_array_equal(dropped["images"][name][mask], plain["images"][name][mask])
        assert not dropped["images"][name][~mask].any()
    for name in ("state", "actions", "prompt"):
        np.testing.assert_array_equal(dropped[name], plain[name])


def test_cameras_without_an_image_are_masked(load: Any, config: DataConfig) -> None:
    """One that shows two steps before has none at the first two of each episode."""
    late = dataclasses.replace(ARM, cameras=(ARM.cameras[0], Camera("third", "observation/image", steps_back=2)))
    entry = dataclasses.replace(config.entries[0], robot=late)
    loader = load(entries=(entry,), batch_size=110, camera_dropout=0.0)
    batch = next(loader)
    assert int((~batch["image_mask"]["third"]).sum()) == 23  # 2 of each of 12 episodes, of which one has one step
    assert not batch["images"]["third"][~batch["image_mask"]["third"]].any()
    assert batch["image_mask"]["base"].all()


# ---- Batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shapes",
    [Shapes(), Shapes(prompt_len=80, image_size=(20, 20), resize="pillow", prompt_format=Pi05Prompt())],
    ids=["pi0", "pi05"],
)
def test_a_batch_is_its_samples_one_by_one(
    load: Any, config: DataConfig, toy: Path, tokenizer: TextTokenizer, normalizations: dict[str, Normalization],
    shapes: Shapes,
) -> None:  # fmt: skip
    """Every leaf of a batch, rebuilt from the columns and images sample by sample."""
    tokenizer = TextTokenizer(tokenizer.tokenizer, shapes.prompt_len, prompt_format=shapes.prompt_format)
    batch = next(load(camera_dropout=0.0, batch_size=64, frame_stride=2, policy=shapes, tokenizer=tokenizer))
    datasets = [EpisodeDataset(open_index(toy, e.split), e.robot, frame_stride=2) for e in config.entries]
    order = sample_order([len(d) for d in datasets], [3.0, 1.0], config.seed)
    assert Counter(batch["dataset_id"].tolist()) == {0: 48, 1: 16}
    for row in range(64):
        _, i, frame = order[row]
        dataset, robot = datasets[i], config.entries[i].robot
        assert batch["dataset_id"][row] == i
        state, chunk, inside = (x[0] for x in dataset.encoded(np.array([frame])))
        norm = normalizations[robot.name]
        expected = np.zeros(shapes.state_dim, np.float32)
        expected[: len(state)] = norm.apply_state(state)
        np.testing.assert_array_equal(batch["state"][row], expected)
        assert batch["state_mask"][row].tolist() == [d < len(state) for d in range(shapes.state_dim)]
        for a in range(shapes.action_horizon):
            valid = a < robot.action_horizon and inside[a]
            for d in range(shapes.action_dim):
                mask = bool(valid and d < robot.action_size)
                assert batch["action_mask"][row, a, d] == mask
                value = norm.apply_actions(chunk[a])[d] if mask else 0.0
                assert batch["actions"][row, a, d] == value
        ids, real = tokenizer.encode(dataset.prompts(np.array([frame]))[0], norm.apply_state(state))  # without padding
        np.testing.assert_array_equal(batch["prompt"][row], ids)
        np.testing.assert_array_equal(batch["prompt_mask"][row], real)
        cameras = {c.name: c for c in robot.cameras}
        for name in shapes.cameras:
            assert batch["image_mask"][name][row] == (name in cameras)
            image = np.zeros((*shapes.image_size, 3), np.uint8)
            if name in cameras:
                fit(dataset.image(frame, cameras[name]), image, resize=shapes.resize)
            np.testing.assert_array_equal(batch["images"][name][row], image)


@pytest.fixture(scope="module")
def fast(config: DataConfig, toy: Path, normalizations: dict[str, Normalization]) -> FastTokenizer:
    coefficients = []
    for entry in config.entries:
        dataset = EpisodeDataset(open_index(toy, entry.split), entry.robot)
        chunks = dataset.encoded(np.arange(len(dataset)))[1]
        coefficients.append(dct_coefficients(normalizations[entry.robot.name].apply_actions(chunks), 5.0))
    return fit_fast(coefficients, scale=5.0, vocab_size=200)


WRITES = Shapes(
    prompt_len=80, prompt_format=FastPrompt(), vocab_size=600, action_tokens=ActionTokens(max_len=60, count=200, skip=0)
)


def test_action_tokens_are_those_of_the_chunk(
    load: Any, config: DataConfig, toy: Path, tokenizer: TextTokenizer, normalizations: dict[str, Normalization],
    fast: FastTokenizer,
) -> None:  # fmt: skip
    """Sample by sample, in a mixture of two robots: the prompt, what is said, and which part of it is what."""
    text = TextTokenizer(tokenizer.tokenizer, 80, prompt_format=FastPrompt(), answer_len=60)
    said = dataclasses.replace(config.entries[1], text_key="language_instruction")
    asked = dataclasses.replace(config.entries[0], text_key="language_instruction", actions=False)
    entries = (config.entries[0], said, asked)
    options = {"policy": WRITES, "tokenizer": text, "action_tokenizer": fast, "entries": entries}
    batch = next(load(batch_size=64, **options))
    datasets = [EpisodeDataset(open_index(toy, e.split), e.robot) for e in entries]
    order = sample_order([len(d) for d in datasets], [e.weight for e in entries], config.seed)
    seen = Counter(batch["dataset_id"].tolist())
    assert min(seen[i] for i in range(3)) > 5
    for row in range(64):
        _, i, frame = order[row]
        dataset, entry = datasets[i], entries[i]
        norm, frames = normalizations[entry.robot.name], np.array([frame])
        state, chunk, _ = dataset.encoded(frames)
        prompt, answer = dataset.prompts(frames)[0], dataset.texts("language_instruction", frames)[0]
        if entry.actions:
            ids = WRITES.vocab_size - 1 - fast.encode(norm.apply_actions(chunk)).ids[0]
            expected = text.encode_actions(
                prompt, norm.apply_state(state)[0], ids, subtask=None if entry.text_key is None else answer
            )
        else:
            expected = text.encode_answer(prompt, answer)
            assert not batch["action_mask"][row].any()
            assert not batch["actions"][row].any()
        assert batch["action_mask"][row].any() == entry.actions
        for name, value in expected._asdict().items():
            np.testing.assert_array_equal(batch[name][row], value, err_msg=name)
        if entry.actions:
            again = WRITES.vocab_size - 1 - batch["prompt"][row][batch["prompt_action"][row]]
            again = again[len(text.action_indicator()) :]
            horizon, dims = entry.robot.action_horizon, entry.robot.action_size
            back = fast.decode([again[: len(ids)]], horizon=horizon, dims=dims).actions[0]
            assert np.abs(back - norm.apply_actions(chunk)[0]).max() < 0.5 / fast.scale * np.sqrt(horizon)


def test_chunks_out_of_range_stop_the_run_or_are_counted(
    load: Any, config: DataConfig, toy: Path, tokenizer: TextTokenizer, normalizations: dict[str, Normalization]
) -> None:
    narrow = fit_fast([np.zeros((4, 6, 3), np.int64)], scale=5.0, vocab_size=100, span=(-3, 3))
    text = TextTokenizer(tokenizer.tokenizer, 80, prompt_format=FastPrompt(), answer_len=60)
    options = {"policy": WRITES, "tokenizer": text, "action_tokenizer": narrow}
    with pytest.raises(
        DatasetError, match=r"record \d+.*: action tokens: .*cannot be encoded, expected -3 to 3.*saturate"
    ):
        next(load(**options))
    loader = load(saturate_actions=True, **options)
    next(loader)
    assert loader.saturated > 0
    held_out = dataclasses.replace(config, entries=config.entries[:1])
    item = next(
        validation_batches(
            held_out, batch_size=8, count=1, policy=WRITES, tokenizer=text, normalizations=normalizations,
            action_tokenizer=narrow,
        )
    )  # fmt: skip
    assert item.saturated > 0
    assert item.acts


def test_tokenizers_that_do_not_fit_the_policy_are_listed(
    load: Any, tokenizer: TextTokenizer, fast: FastTokenizer
) -> None:
    with pytest.raises(ValueError, match=r"there is an action tokenizer, but the policy has no action tokens"):
        load(action_tokenizer=fast)
    with pytest.raises(ValueError, match=r"has action tokens and there is no action tokenizer; fit one"):
        load(policy=WRITES)
    few = dataclasses.replace(WRITES, action_tokens=ActionTokens(max_len=50, count=100, skip=0))
    with pytest.raises(
        ValueError, match=r"(?s)answers to 0 tokens, the policy to 50.*\d+ tokens, the policy 100.*Pi0Prompt\(\)"
    ):
        load(policy=few, action_tokenizer=fast)


def test_action_tokens_never_take_the_ids_of_text(load: Any, tokenizer: TextTokenizer, fast: FastTokenizer) -> None:
    text = TextTokenizer(tokenizer.tokenizer, 80, prompt_format=FastPrompt(), answer_len=60)
    for vocab_size, message in (
        (
            557,
            r"ids 357 to 556, of which the text tokenizer uses those below 358; enlarge the policy's vocab_size by 1",
        ),
        (200, r"action tokens take ids 0 to 199, and with them \[0, 1, 2, 3, .*which give answers their form"),
    ):
        with pytest.raises(ValueError, match=message):
            load(
                policy=dataclasses.replace(WRITES, vocab_size=vocab_size),
                tokenizer=text,
                action_tokenizer=fast,
            )


def test_answers_that_are_too_long_are_located(load: Any, tokenizer: TextTokenizer, fast: FastTokenizer) -> None:
    short = dataclasses.replace(WRITES, action_tokens=ActionTokens(max_len=12, count=200, skip=0))
    text = TextTokenizer(tokenizer.tokenizer, 80, prompt_format=FastPrompt(), answer_len=12)
    with pytest.raises(DatasetError, match=r"record \d+.*: prompt .* with its answer has .*answer_len=12; enlarge one"):
        next(load(policy=short, tokenizer=text, action_tokenizer=fast))


def test_entries_without_anything_to_predict_are_refused(load: Any, config: DataConfig) -> None:
    entry = config.entries[0]
    with pytest.raises(ValueError, match=r"has actions=False and no text_key; then there is nothing to predict"):
        load(entries=(dataclasses.replace(entry, actions=False),))
    with pytest.raises(ValueError, match=r"has text_key='language_instruction', but the policy writes no answers"):
        load(entries=(dataclasses.replace(entry, text_key="language_instruction"),))
    with pytest.raises(DatasetError, match=r"text_key: the dataset has no 'subtask'"):
        load(entries=(dataclasses.replace(entry, text_key="subtask"),))


def test_leaves_have_the_types_of_the_contract(load: Any) -> None:
    flat = flatten(next(load()))
    assert {k.partition("/")[0]: v.dtype.name for k, v in flat.items()} == {
        "images": "uint8", "image_mask": "bool", "state": "float32", "state_mask": "bool", "prompt": "int32",
        "prompt_mask": "bool", "actions": "float32", "action_mask": "bool", "dataset_id": "int32",
        "position": "uint32",
    }  # fmt: skip
    assert {v.shape[0] for v in flat.values()} == {8}


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


def test_configs_are_stored_as_json(config: DataConfig) -> None:
    assert from_json(to_json(config)) == config


def test_describe(config: DataConfig) -> None:
    description = describe(config)
    assert description.renderers == {"arm": "ray", "cart": "ray"}
    assert description.frames == {"arm": 110, "cart": 19}
    assert description.episodes == {"arm": 12, "cart": 3}


# ---- Validation ------------------------------------------------------------------------------------------------------


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


# ---- What does not fit -----------------------------------------------------------------------------------------------


def test_everything_that_does_not_fit_the_policy_is_listed(
    load: Any, normalizations: dict[str, Normalization], tokenizer: TextTokenizer
) -> None:
    small = Shapes(cameras=("base", "wrists"), state_dim=5, action_dim=2, action_horizon=4, prompt_len=9, vocab_size=10)
    with pytest.raises(ValueError, match="do not fit each other") as e:
        load(policy=small, normalizations={"arm": dataclasses.replace(normalizations["cart"], robot="car")})
    for expected in (
        "the tokenizer pads to 40 tokens, the policy to 9",
        f"the tokenizer has {tokenizer.vocab_size} ids, the policy knows 10",
        "robot 'arm': camera 'wrist' is not a slot of the policy (did you mean 'wrists'?)",
        "robot 'arm': state size 6, the policy has room for 5",
        "robot 'arm': action size 3, the policy has room for 2",
        "robot 'arm': action_horizon 5, the policy has room for 4",
        "robot 'arm': normalisation does not fit robot 'arm': robot car, expected arm; mode quantile",
        "robot 'cart': no normalisation; did you mean 'arm'",
    ):
        assert expected in str(e.value)


def test_a_camera_may_be_dropped_when_asked_for(load: Any) -> None:
    batch = next(load(policy=Shapes(cameras=("base",)), drop_cameras=("wrist",)))
    assert list(batch["images"]) == ["base"]
    with pytest.raises(ValueError, match="none of its cameras is a slot of the policy: third"):
        load(policy=Shapes(cameras=("third",)), drop_cameras=("wrist", "base"))


def test_wrist_cameras_are_slots_of_the_policy(load: Any) -> None:
    with pytest.raises(
        ValueError, match=r"augment.wrist_cameras: 'wirst' is not a slot of the policy \(did you mean 'w"
    ):
        load(augment=Augment.octo(wrist_cameras=("wirst",)))


def test_all_datasets_that_cannot_be_opened_are_listed(load: Any, config: DataConfig) -> None:
    entries = tuple(dataclasses.replace(e, split=f"{e.split}x") for e in config.entries)
    with pytest.raises(DatasetError, match=r"(?s)no split 'trainx'; .*no split 'valx'; "):
        load(entries=entries)


def test_a_damaged_image_stops_the_run_and_is_located(load: Any, copy: Path, config: DataConfig) -> None:
    """The checksums are right: it was written like this."""
    path = shard(copy, 1)
    index = open_index(copy, "train")
    offset, length = (int(x) for x in index.images["observation/image"][index.episode_start[7] + 2])
    image = path.read_bytes()[offset : offset + length]
    change_record(path, 2, lambda data: data.replace(image, bytes(length)))
    entry = dataclasses.replace(config.entries[0], path=str(copy))
    loader = load(entries=(entry,), batch_size=110, camera_dropout=0.0)
    with pytest.raises(DatasetError, match=r"episode 7, step 2 \(.*, record 2\): cannot decode observation/image"):
        next(loader)


def test_settings_without_meaning_are_listed(config: DataConfig, load: Any) -> None:
    with pytest.raises(ValueError, match=r"weight 0.0 of x, .*; frame_stride=0, expected at least 1; .*max_corrupt"):
        DataConfig((MixtureEntry(ARM, "x", weight=0.0),), frame_stride=0, max_corrupt_fraction=1.5)
    with pytest.raises(ValueError, match=r"num_workers=-1, .*; group_episodes=0, .*; camera_dropout=1.0, exp"):
        DataConfig((MixtureEntry(ARM, "x"),), num_workers=-1, group_episodes=0, camera_dropout=1.0)
    with pytest.raises(ValueError, match="no entries"):
        DataConfig(())
    with pytest.raises(ValueError, match="batch_size=8 on 3 hosts, host 0, start=0; expected a batch_size that"):
        load(process_count=3)


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
