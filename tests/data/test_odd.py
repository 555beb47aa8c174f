"""Each odd kind of field that published datasets have, against TFDS' own reader and against what was written."""

import importlib.util
import os
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from openpi_like.data.images import decode, decode_depth
from openpi_like.data.index import open_index
from tests.data.crosscheck import assert_same_as_tfds
from tests.data.odd import DEPTH, DEPTH_16, FOLDER, IMAGES, INSTRUCTIONS, LEFT_OUT, LENGTHS, NAME, episode


def test_it_is_read_as_tfds_reads_it(tfds: Any, odd: Path) -> None:
    index = open_index(odd, "train")
    assert_same_as_tfds(tfds, odd, "train", index)
    assert index.left_out == LEFT_OUT
    assert tuple(np.diff(index.episode_start)) == LENGTHS
    assert (odd.parent.name, index.split.dataset) == (FOLDER, NAME)
    assert set(index.images) == set(IMAGES)


def test_steps_are_those_of_the_rlds_package(
    tfds: Any, bridge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its windows of steps, statistics, last steps and lengths of episodes, against slices of the columns."""
    if importlib.util.find_spec("reverb") is None:
        # The package imports it to write patterns of steps to a Reverb server, and cannot be imported without.
        monkeypatch.setitem(sys.modules, "reverb", mock.MagicMock())
    rlds = pytest.importorskip("rlds", reason="the cross-check needs the rlds extra")
    index, window = open_index(bridge, "train", index_dir=tmp_path), 4
    columns = {key: index.columns[key] for key in ("action", "observation/state", "is_first", "is_last")}
    state, text = columns["observation/state"], index.texts["language_instruction"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        builder = tfds.builder_from_directory(os.fspath(bridge))
        decoders = {"steps": {"observation": {k.partition("/")[2]: tfds.decode.SkipDecoding() for k in index.images}}}
        episodes = builder.as_dataset(
            split="train",
            shuffle_files=False,
            decoders=decoders,
            read_config=tfds.ReadConfig(interleave_cycle_length=1),
        )
        transform, steps = rlds.transformations, lambda e: e[rlds.STEPS]
        for e, episode in enumerate(episodes.take(5)):
            first, end = (int(x) for x in index.episode_start[e : e + 2])
            assert int(transform.episode_length(steps(episode))) == end - first
            last = transform.final_step(steps(episode))
            np.testing.assert_array_equal(last[rlds.OBSERVATION]["state"], state[end - 1])
            total = transform.sum_dataset(steps(episode), lambda step: step[rlds.ACTION])
            np.testing.assert_allclose(total, columns["action"][first:end].sum(axis=0), atol=1e-5)
            windows = transform.batch(steps(episode), window, shift=1, drop_remainder=True)
            starts = range(first, end - window + 1)
            for at, found in zip(starts, tfds.as_numpy(windows), strict=True):
                rows = slice(at, at + window)
                np.testing.assert_array_equal(found[rlds.ACTION], columns["action"][rows])
                np.testing.assert_array_equal(found[rlds.OBSERVATION]["state"], state[rows])
                np.testing.assert_array_equal(found[rlds.IS_FIRST], columns["is_first"][rows])
                np.testing.assert_array_equal(found[rlds.IS_LAST], columns["is_last"][rows])
                assert [t.decode() for t in found["language_instruction"]] == [text.table[i] for i in text.ids[rows]]
                for key in index.images:
                    images = found[rlds.OBSERVATION][key.partition("/")[2]]
                    assert list(images) == [index.read_image(i, key) for i in range(at, at + window)]
        states = episodes.map(
            lambda e: {rlds.STEPS: e[rlds.STEPS].map(lambda s: {"state": s[rlds.OBSERVATION]["state"]})}
        )
        mean, std = transform.mean_and_std(states, lambda step: (step, {"state": True}))
    np.testing.assert_allclose(mean["state"], state.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(std["state"], state.std(axis=0, ddof=1), rtol=1e-4)


def test_it_holds_what_was_written(odd: Path) -> None:
    """Against the values themselves: TFDS and we could agree on something wrong."""
    index = open_index(odd, "train")
    at = 0
    for e, length in enumerate(LENGTHS):
        for step in episode(e, length)["steps"]:
            for key, column in index.columns.items():
                top, _, rest = key.partition("/")
                value = step[key] if key in step else step[top][rest]
                np.testing.assert_array_equal(column[at], value, err_msg=key)
            for key, dtype in ((DEPTH, "float32"), (DEPTH_16, "uint16")):
                depth = decode_depth(index.read_image(at, key), dtype)
                np.testing.assert_array_equal(depth, step["observation"][key.partition("/")[2]][..., 0])
            undeclared = decode(index.read_image(at, "observation/undeclared"))
            np.testing.assert_array_equal(undeclared, step["observation"]["undeclared"])
            text = index.texts["observation/instruction"]
            assert text.table[text.ids[at]] == INSTRUCTIONS[e % len(INSTRUCTIONS)]
            at += 1


def test_decoded_images_are_those_of_tensorflow(tfds: Any, odd: Path, bridge: Path, tmp_path: Path) -> None:
    """PNG and depth exactly; JPEG exactly where TensorFlow is told to be accurate, else within 38 dB."""
    import tensorflow as tf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for directory, keys in ((odd, IMAGES), (bridge, {"observation/image_0": "jpeg"})):
            index = open_index(directory, "train", index_dir=tmp_path)
            builder = tfds.builder_from_directory(os.fspath(directory))
            config = tfds.ReadConfig(interleave_cycle_length=1)
            episodes = builder.as_dataset(split="train", shuffle_files=False, read_config=config).take(3)
            steps = [step for e in tfds.as_numpy(episodes) for step in e["steps"]]
            for at, step in enumerate(steps):
                for key, kind in keys.items():
                    theirs = step["observation"][key.partition("/")[2]]
                    data = index.read_image(at, key)
                    if kind == "depth":
                        ours = decode_depth(data, index.schema.steps[key].dtype)[..., None]
                        assert ours.dtype == theirs.dtype
                    else:
                        ours = decode(data)
                    rmse = np.sqrt(np.mean((ours.astype(np.float64) - theirs) ** 2))
                    assert rmse <= (3.2 if kind == "jpeg" else 0.0), key
                    if kind == "jpeg":
                        accurate = tf.io.decode_jpeg(data, dct_method="INTEGER_ACCURATE").numpy()
                        np.testing.assert_array_equal(ours, accurate)
