"""An index against TFDS' own reader (tf.data), field by field."""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from openpi_like.data.index import FrameIndex


def assert_same_as_tfds(tfds: Any, directory: Path, split: str, index: FrameIndex) -> None:
    """Every field of every step and episode, images as encoded bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        builder = tfds.builder_from_directory(os.fspath(directory))
        episodes = builder.as_dataset(
            split=split,
            shuffle_files=False,
            decoders={"steps": _undecoded(tfds, builder.info.features["steps"].feature)},
            read_config=tfds.ReadConfig(interleave_cycle_length=1),
        )
        at = e = 0
        for e, episode in enumerate(tfds.as_numpy(episodes)):
            assert index.episode_start[e] == at
            flat = _flatten({k: v for k, v in episode.items() if k != "steps"})
            assert set(flat) == set(index.schema.episode)
            for key, column in index.episode_columns.items():
                np.testing.assert_array_equal(column[e], flat[key], err_msg=key)
            for key, texts in index.episode_texts.items():
                assert_same_text(texts.table[texts.ids[e]], flat[key])
            for step in episode["steps"]:
                flat = _flatten(step)
                left_out = set(index.left_out) - set(index.schema.episode)
                assert set().union(index.columns, index.texts, index.images, left_out) == set(flat)
                for key, column in index.columns.items():
                    assert column.dtype == flat[key].dtype
                    np.testing.assert_array_equal(column[at], flat[key], err_msg=key)
                for key, texts in index.texts.items():
                    assert_same_text(texts.table[texts.ids[at]], flat[key])
                for key in index.images:
                    assert index.read_image(at, key) == flat[key]
                at += 1
        assert (index.episodes, index.steps) == (e + 1, at)


def assert_same_text(ours: str, theirs: bytes | np.ndarray) -> None:
    if isinstance(theirs, np.ndarray):  # a code point per value
        np.testing.assert_array_equal(np.pad([ord(c) for c in ours], (0, len(theirs) - len(ours))), theirs)
    else:
        assert ours.encode() == theirs


def _undecoded(tfds: Any, features: Any) -> dict[str, Any]:
    """TFDS decoders that leave images as they are stored."""
    children = features.items()
    images = {k: tfds.decode.SkipDecoding() for k, f in children if isinstance(f, tfds.features.Image)}
    return images | {k: _undecoded(tfds, f) for k, f in children if isinstance(f, tfds.features.FeaturesDict)}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
