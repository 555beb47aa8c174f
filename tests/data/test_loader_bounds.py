"""What a loader holds: the memory it announces is a bound of the sizes of its objects, and no file stays open."""

import contextlib
import dataclasses
import pickle
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_like.data import arrayrecord, assembly, files
from openpi_like.data.config import DataConfig, MixtureEntry, open_datasets
from openpi_like.data.dataset import EpisodeDataset, open_dataset
from openpi_like.data.index import open_index
from openpi_like.data.loader import make_loader, memory_needed, validation_batches
from openpi_like.data.normalize import Normalization
from openpi_like.data.order import GroupedOrder
from openpi_like.data.schema import DatasetError
from openpi_like.data.selection import Selection
from openpi_like.data.stats import compute_normalization
from openpi_like.data.text import TextTokenizer
from openpi_like.robots import ActionField, Camera, Robot, StateField
from tests.data.toy import ARM, CART, Shapes

ODD = Robot(
    name="odd",
    cameras=(Camera("base", "observation/image/front"), Camera("third", "observation/undeclared_jpeg", 16, 16)),
    state=(StateField("x", "observation/state", 3),),
    action=(ActionField("x", "action/world_vector", 3),),
    control_hz=5.0,
    action_horizon=4,
    execute_steps=1,
)


def term(needed: dict[str, int], name: str) -> int:
    (found,) = (size for what, size in needed.items() if name in what)
    return found


# ---- Memory ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=200).filter(any),
    st.integers(1, 250),
    st.lists(st.floats(0, 4), min_size=1, max_size=20),
)
def test_a_grouped_order_holds_no_more_than_is_counted(episodes: list[int], group: int, places: list[float]) -> None:
    """Its arrays at any time, over up to four passes in any order."""
    order = GroupedOrder(np.array(episodes), group, (0, 0))
    most = order.most_bytes(np.array(episodes), group, 1)
    for place in places:
        order[int(place * sum(episodes))]
        kept = [x for held in (*order._passes, *order._groups) for x in held if isinstance(x, np.ndarray)]
        assert sum(x.nbytes for x in (order._episodes, order._start, *kept)) <= most


@pytest.mark.parametrize(("episodes", "group"), [(20_000, 10), (50, 50), (1000, 300)])
def test_a_grouped_order_takes_no_more_than_is_counted_while_it_sorts(episodes: int, group: int) -> None:
    lengths = np.full(episodes, 400_000 // episodes)
    tracemalloc.start()
    try:
        order = GroupedOrder(lengths, group, (0, 0))
        for k in range(0, 3 * 400_000, 30_011):
            order[k]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    counted = order.most_bytes(lengths, group, 1)
    assert peak < counted + 50_000  # Python's own objects
    assert peak > 0.3 * counted


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=40), st.integers(0, 3))
def test_memory_is_used_again_only_when_nothing_refers_to_it(events: list[tuple[int, bool]], most: int) -> None:
    """Arrays or views of views of them are kept and let go in any order; what is kept is never written to."""
    arrays = pickle.loads(pickle.dumps(assembly._Recycled(most)))
    kept: list[tuple[np.ndarray, int]] = []
    for i, (let_go, view) in enumerate(events):
        del kept[:let_go]
        array = arrays.empty((2, 3, 4))
        array[:] = i
        kept.append((array[1:][:, ::2].T if view else array, i))
        del array
        assert all((of == number).all() for of, number in kept)
        assert all(len(free) <= most for free in arrays._free.values())


def test_memory_of_a_batch_is_that_of_one_before() -> None:
    arrays = assembly._Recycled(2)
    first = arrays.empty((5, 7))
    place = first.ctypes.data
    view = first[2]
    del first
    assert arrays.empty((5, 7)).ctypes.data != place
    del view
    arrays.empty((5, 8))  # of another size
    assert place in {a.ctypes.data for a in [arrays.empty((7, 5)) for _ in range(2)]}


@pytest.mark.parametrize("group_episodes", [None, 4])
def test_the_places_of_frames_are_counted(toy: Path, group_episodes: int | None) -> None:
    """Arrays that are not those of the index, of any name; and the texts."""
    config = DataConfig(
        (
            MixtureEntry(ARM, str(toy), selection=Selection(skip_first=1, labelled=True)),
            MixtureEntry(CART, str(toy), split="val"),
        ),
        group_episodes=group_episodes,
    )
    datasets = [d for d in open_datasets(config) if d is not None]
    needed = memory_needed(config, datasets, Shapes(), 8)
    held = 0
    for dataset in datasets:
        own = [x for v in vars(dataset).values() for x in (v.values() if isinstance(v, dict) else (v,))]
        held += sum(x.nbytes for x in own if isinstance(x, np.ndarray))
        for texts in (dataset.index.texts, dataset.index.episode_texts):
            held += sum(sys.getsizeof(text) for of in texts.values() for text in of.table)
        dataset.close()
    assert held <= term(needed, "places of frames and texts") < held + 4096
    assert any("order of groups" in what for what in needed) == (group_episodes is not None)


def images(dataset: EpisodeDataset, camera: Camera) -> list[tuple[int, int]]:
    """Bytes of every image of a camera, as stored and decoded."""
    frames = np.arange(len(dataset))
    encoded = [len(dataset.index.read_image(int(s), camera.key)) for s in dataset.steps(frames)]
    return list(zip(encoded, [dataset.image(int(f), camera).nbytes for f in frames], strict=True))


def test_images_are_counted_as_stored_and_decoded(toy: Path) -> None:
    """The second camera may have any size: that of its first image counts."""
    dataset = open_dataset(toy, ARM, "train")
    for camera, pixels in zip(ARM.cameras, (12 * 16 * 3, 24 * 16 * 3), strict=True):
        assert dataset.image_bytes(camera) == (max(e for e, _ in images(dataset, camera)), pixels)
        assert {p for _, p in images(dataset, camera)} == {pixels}
    config = DataConfig((MixtureEntry(ARM, str(toy)),), num_threads=3)
    cubic, pillow = (
        term(memory_needed(config, [dataset], Shapes(resize=resize), 8), "3 images and chunks")
        for resize in ("cubic", "pillow")
    )
    assert cubic >= 3 * max(sum(dataset.image_bytes(camera)) for camera in ARM.cameras)
    assert pillow > cubic
    dataset.close()


def test_array_records_are_counted_with_what_is_kept_of_them(
    odd_arrays: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small cache is full after one pass, and what it holds and what is read are within what is announced."""
    shards = open_index(odd_arrays, "train").split.shards
    sizes = [len(record) for shard in shards for record in arrayrecord.read_records(shard) if isinstance(record, bytes)]
    limit = max(sizes)  # not all of them at once
    assert sum(sizes) > limit
    monkeypatch.setattr(arrayrecord, "CACHE_BYTES", limit)
    monkeypatch.setattr(arrayrecord._cache, "_limit", limit)
    config = DataConfig((MixtureEntry(ODD, str(odd_arrays)),), group_episodes=2)
    dataset = open_dataset(odd_arrays, ODD, "train")
    with_cache = memory_needed(config, [dataset], Shapes(), 8)
    assert term(with_cache, "records that were read last") == limit
    in_workers = memory_needed(dataclasses.replace(config, num_workers=2), [dataset], Shapes(), 8)
    assert term(in_workers, "records that were read last") == 3 * limit
    normalizations = {"odd": compute_normalization(dataset)}
    batches = make_loader(config, batch_size=8, policy=Shapes(), tokenizer=tokenizer, normalizations=normalizations)
    kept = 0
    with contextlib.closing(batches):
        for _ in range(8):
            next(batches)
            with arrayrecord._cache._lock:  # else it is seen between taking one in and letting others go
                kept = max(kept, arrayrecord._cache._bytes)
    assert 0 < kept <= limit
    last = max(int(of.sum(axis=1).max()) for of in dataset.index.images.values())
    for camera in ODD.cameras:
        assert dataset.image_bytes(camera) == (2 * last, max(pixels for _, pixels in images(dataset, camera)))
    dataset.close()


# ---- Open files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(toy: Path) -> DataConfig:
    return DataConfig((MixtureEntry(ARM, str(toy)), MixtureEntry(CART, str(toy), split="val")))


@pytest.fixture(scope="module")
def normalizations(toy: Path) -> dict[str, Normalization]:
    return {r.name: compute_normalization(open_dataset(toy, r, "train")) for r in (ARM, CART)}


def test_opening_leaves_files_open_that_closing_closes(
    config: DataConfig, tokenizer: TextTokenizer, normalizations: dict[str, Normalization]
) -> None:
    """What the next test counts is there at all."""
    before = len(files._open_files)
    options: dict[str, Any] = dict(policy=Shapes(), tokenizer=tokenizer, normalizations=normalizations)
    batches = make_loader(config, batch_size=8, **options)
    next(batches)
    assert len(files._open_files) > before
    batches.close()
    assert len(files._open_files) == before
    held_out = validation_batches(config, batch_size=2, count=1, **options)
    next(held_out)
    assert len(files._open_files) > before
    held_out.close()  # type: ignore[attr-defined]  # before it has ended
    assert len(files._open_files) == before
    assert len(list(validation_batches(config, batch_size=2, count=1, **options))) == 2
    assert len(files._open_files) == before


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"policy": Shapes(cameras=("base",))}, "camera 'wrist' is not a slot"),
        ({}, {"normalizations": {}}, "no normalisation"),
        ({"memory_budget_mib": 1}, {"policy": Shapes(image_size=(224, 224))}, "more than memory_budget_mib=1"),
        ({"entries": (MixtureEntry(CART, "nowhere"),)}, {}, "no dataset directory"),
        ({"entries": (MixtureEntry(ARM, "{toy}", text_key="nothing"),)}, {}, "nothing"),
        ({"entries": (MixtureEntry(ARM, "{toy}", selection=Selection(min_length=99)),)}, {}, "no frame is left"),
    ],
)
@pytest.mark.parametrize("validation", [False, True])
def test_a_loader_that_cannot_be_made_leaves_no_file_open(
    config: DataConfig,
    toy: Path,
    tokenizer: TextTokenizer,
    normalizations: dict[str, Normalization],
    changes: dict[str, Any],
    options: dict[str, Any],
    message: str,
    validation: bool,
) -> None:
    """The first dataset can be opened, and is, before the failure."""
    before = len(files._open_files)
    more = tuple(dataclasses.replace(e, path=e.path.format(toy=toy)) for e in changes.get("entries", ()))
    config = dataclasses.replace(config, **(changes | {"entries": (*config.entries, *more)}))
    given: dict[str, Any] = {"policy": Shapes(), "tokenizer": tokenizer, "normalizations": normalizations} | options
    if not validation:
        with pytest.raises((ValueError, DatasetError), match=message):
            make_loader(config, batch_size=8, **given)
    elif "memory_budget_mib" not in changes:
        with pytest.raises((ValueError, DatasetError), match=message):
            next(validation_batches(config, batch_size=2, count=1, **given))
    assert len(files._open_files) == before
