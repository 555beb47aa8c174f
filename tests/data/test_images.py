"""Geometry, resampling and colours against other implementations."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_like.data.images import Augment, augment, colour_matrix, decode, fit


def test_fit_keeps_smooth_pictures() -> None:
    """Against Pillow's antialiased bilinear filter, on a picture without fine detail."""
    from PIL import Image

    y, x = np.mgrid[0:256, 0:256] / 256
    image = np.stack([255 * x, 255 * y, 127 + 100 * np.sin(4 * x + 3 * y)], axis=2).astype(np.uint8)
    for size in (224, 96, 512):
        out = np.empty((size, size, 3), np.uint8)
        fit(image, out)
        reference = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
        assert np.abs(out.astype(int) - reference).mean() < 0.6


@settings(max_examples=60, deadline=None)
@given(h=st.integers(1, 90), w=st.integers(1, 90), size=st.tuples(st.integers(1, 64), st.integers(1, 64)))
def test_fit_fills_one_side_and_centres_the_other(h: int, w: int, size: tuple[int, int]) -> None:
    out = np.zeros((*size, 3), np.uint8)
    fit(np.full((h, w, 3), 200, np.uint8), out)
    rows, columns = np.flatnonzero(out.any(axis=(1, 2))), np.flatnonzero(out.any(axis=(0, 2)))
    assert np.all(out[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] == 200)
    gaps = [rows[0], size[0] - 1 - rows[-1], columns[0], size[1] - 1 - columns[-1]]
    assert gaps[:2] == [0, 0] or gaps[2:] == [0, 0]
    assert 0 <= gaps[1] - gaps[0] <= 1
    assert 0 <= gaps[3] - gaps[2] <= 1


def test_bytes_that_are_no_image() -> None:
    with pytest.raises(ValueError, match=r"not an image: 9 bytes that begin with b'not an i'"):
        decode(b"not an im")


def test_colours_against_opencv_and_identity() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    np.testing.assert_array_equal(cv2.transform(image, colour_matrix(0.0, 1.0, 1.0)), image)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    without_colour = cv2.transform(image, colour_matrix(0.0, 1.0, 0.0))
    assert np.abs(without_colour.astype(int) - grey[..., None]).max() <= 1
    np.testing.assert_array_equal(cv2.transform(image, colour_matrix(0.1, 0.0, 1.0)), np.full_like(image, 153))


def test_augment_shifts_and_repeats_the_edge() -> None:
    image = np.arange(10, dtype=np.uint8)[None, :, None].repeat(10, 0).repeat(3, 2) * 20
    seen = set()
    for seed in range(40):
        changed = image.copy()
        augment(changed, Augment(shift=0.2, brightness=0.0, contrast=0.0, saturation=0.0), np.random.default_rng(seed))
        row = changed[0, :, 0] // 20
        shift = int(row[5]) - 5
        np.testing.assert_array_equal(row, np.clip(np.arange(10) + shift, 0, 9))
        seen.add(shift)
    assert seen == {-2, -1, 0, 1, 2}


def test_augment_of_nothing_and_of_nonsense() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    changed = image.copy()
    augment(changed, Augment(0.0, 0.0, 0.0, 0.0), np.random.default_rng(0))
    np.testing.assert_array_equal(changed, image)
    with pytest.raises(ValueError, match=r"\{'shift': 1.5, 'contrast': -1.0\}, expected values in \[0, 1\)"):
        Augment(shift=1.5, contrast=-1.0)
