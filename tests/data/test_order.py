"""Which frame is at which position: weights, passes, groups of episodes, and what tells two orders apart."""

import dataclasses
import itertools
import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_like.data.config import DataConfig, MixtureEntry, open_datasets
from openpi_like.data.order import distinct_episodes, order_changes, order_record, sample_order
from openpi_like.data.selection import Selection


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
