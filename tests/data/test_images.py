"""Geometry, resampling, colours and depth against other implementations."""

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from openpi_like.data.images import FITS, Target, decode, decode_depth, decode_for, encode, fit


def test_fit_keeps_smooth_pictures() -> None:
    """Against Pillow's antialiased bilinear filter, on a picture without fine detail."""
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


def png_of_size(height: int, width: int) -> bytes:
    """The beginning of a PNG: a header that is right, and no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not an im", "not an image: 9 bytes that begin with b'not an i'"),
        (b"", "not an image: 0 bytes that begin with b''"),
        (png_of_size(1 << 20, 1 << 20), "not an image: 33 bytes that begin with b'.x89PNG"),
        (b"\xff\xd8\xff", "JPEG"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "JPEG"),
    ],
)
def test_bytes_that_are_no_image(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(data)


def test_decoding_is_the_exact_transform() -> None:
    """libjpeg's exact DCT and upsampling, which Pillow uses, on a picture with fine detail."""
    y, x = np.mgrid[0:64, 0:80]
    image = (127 + 60 * np.sin(x / 3.0) + 60 * np.cos(y / 2.0))[..., None].repeat(3, 2).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    np.testing.assert_array_equal(decode(file.getvalue()), np.asarray(Image.open(file)))
    np.testing.assert_array_equal(decode(file.getvalue(), "bgr"), decode(file.getvalue())[..., ::-1])


@pytest.mark.parametrize("resize", ["cubic", "pillow"])
@settings(max_examples=30, deadline=None)
@given(h=st.integers(1, 90), w=st.integers(1, 90), size=st.tuples(st.integers(1, 64), st.integers(1, 64)))
def test_crop_and_stretch_fill_everything(resize: str, h: int, w: int, size: tuple[int, int]) -> None:
    for how in ("crop", "stretch"):
        out = np.zeros((*size, 3), np.uint8)
        fit(np.full((h, w, 3), 200, np.uint8), out, resize=resize, fit=how)
        assert np.all(out == 200)


def test_crop_takes_the_middle_and_stretch_everything() -> None:
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = 100  # the middle square
    out = np.zeros((20, 20, 3), np.uint8)
    fit(image, out, fit="crop")
    np.testing.assert_array_equal(out, 100)
    fit(image, out, fit="stretch")
    np.testing.assert_array_equal(out[0, :, 0], [0] * 5 + [100] * 10 + [0] * 5)
    fit(image, out, fit="pad")
    assert not out[:5].any()
    assert not out[15:].any()
    # Each is what its library call alone gives.
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    out = np.zeros((36, 36, 3), np.uint8)
    fit(noise, out, fit="crop")
    np.testing.assert_array_equal(out, cv2.resize(noise[:, 8:56], (36, 36), interpolation=cv2.INTER_CUBIC))
    fit(noise, out, fit="stretch", resize="pillow")
    np.testing.assert_array_equal(out, Image.fromarray(noise).resize((36, 36), Image.Resampling.BILINEAR))


def test_names_that_mean_nothing() -> None:
    image, out = np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=r"fit 'crop_center' is unknown; did you mean 'crop'\?"):
        fit(image, out, fit="crop_center")
    with pytest.raises(ValueError, match=r"resize 'cubics' is unknown; did you mean 'cubic'\?"):
        fit(image, out, resize="cubics")


# ---- JPEGs at a part of their size -----------------------------------------------------------------------------------


def scene(height: int, width: int) -> np.ndarray:
    """A picture with edges, texture and smooth parts, as a camera has them."""
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 256, (9, 12, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    image[height // 3 : height // 2, width // 4 : width // 2] = 230
    cv2.line(image, (0, height), (width, 0), (20, 60, 20), max(1, height // 60))
    noise = rng.normal(0, 4, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


@settings(max_examples=40, deadline=None)
@given(
    h=st.integers(1, 300),
    w=st.integers(1, 300),
    size=st.tuples(st.integers(1, 100), st.integers(1, 100)),
    how=st.sampled_from(FITS),
)
def test_a_part_of_a_jpeg_is_large_enough(h: int, w: int, size: tuple[int, int], how: str) -> None:
    data = simplejpeg.encode_jpeg(scene(h, w), colorsubsampling="420")
    image, stored = decode_for(data, "rgb", Target(*size, how))
    assert stored == (h, w)
    least = Target(*size, how).least(h, w)
    kept = min(h / least[0], w / least[1])  # how many times larger than needed it is stored
    factor = Target(*size, how).factor(h, w)
    assert factor in (1, 2, 4, 8)
    assert factor <= max(kept, 1)
    assert image.shape == (h / factor, w / factor, 3)
    if factor == 1:
        np.testing.assert_array_equal(image, decode(data))


@pytest.mark.parametrize(("height", "width", "to"), [(480, 640, 224), (720, 1280, 224), (480, 640, 64), (256, 320, 96)])
@pytest.mark.parametrize("how", FITS)
def test_a_part_of_a_jpeg_differs_little(height: int, width: int, to: int, how: str) -> None:
    data = simplejpeg.encode_jpeg(scene(height, width), quality=90, colorsubsampling="420")
    of_all, of_part = np.zeros((2, to, to, 3), np.uint8)
    fit(decode(data), of_all, fit=how)
    part, _ = decode_for(data, "rgb", Target(to, to, how))
    assert part.size < decode(data).size / 3
    fit(part, of_part, fit=how)
    error = of_all.astype(float) - of_part
    assert 10 * np.log10(255**2 / (error**2).mean()) > 38
    assert abs(error.mean()) < 0.3  # no brightness is lost, and nothing is shifted:
    shifted = np.roll(of_part, 1, axis=1).astype(float) - of_all
    assert (error**2).mean() < 0.5 * (shifted**2).mean()


@pytest.mark.parametrize(
    ("size", "to", "how", "factor"),
    [
        ((480, 640), 224, "pad", 2), ((480, 640), 224, "crop", 2), ((720, 1280), 224, "pad", 4),
        ((720, 1280), 224, "crop", 2), ((1080, 1920), 224, "pad", 8), ((1080, 1920), 224, "crop", 4),
        ((480, 848), 224, "crop", 2), ((360, 640), 224, "pad", 2), ((512, 512), 224, "stretch", 2),
        # what does not divide: the sides by 8, by anything, and the part that is cut
        ((1084, 1924), 224, "pad", 4), ((479, 641), 224, "pad", 1), ((480, 641), 224, "pad", 1),
        ((238, 318), 96, "stretch", 2), ((238, 318), 96, "pad", 2), ((239, 319), 64, "pad", 1),
        ((480, 646), 96, "crop", 1),
    ],
)  # fmt: skip
def test_by_how_much_jpegs_are_reduced(size: tuple[int, int], to: int, how: str, factor: int) -> None:
    assert Target(to, to, how).factor(*size) == factor
    part, _ = decode_for(simplejpeg.encode_jpeg(np.zeros((*size, 3), np.uint8)), "rgb", Target(to, to, how))
    assert part.shape == (size[0] // factor, size[1] // factor, 3)


def shift(of_all: np.ndarray, of_part: np.ndarray) -> float:
    """Returns by how many pixels a soft picture is shifted, by least squares; the larger of both directions.

    In a direction in which it hardly changes (2.5 levels a pixel), rounding looks like a shift, and none is returned.
    """
    inner = slice(2, -2), slice(2, -2)
    slopes = np.stack([g[inner].ravel() for g in np.gradient(of_all.astype(float))], axis=1)
    change = (of_all.astype(float) - of_part)[inner].ravel()
    fitted = np.column_stack([slopes, np.ones(len(slopes))])  # brighter by a constant is no shift
    found = np.abs(np.linalg.lstsq(fitted, change, rcond=None)[0][:2])
    return float(found[slopes.std(axis=0) > 2.5].max(initial=0.0))


@settings(max_examples=30, deadline=None)
@given(
    sides=st.tuples(st.integers(60, 700), st.integers(60, 700)),
    of=st.sampled_from([1, 2, 8]),
    size=st.tuples(st.integers(24, 100), st.integers(24, 100)),
    how=st.sampled_from(FITS),
)
@example(sides=(264, 72), of=1, size=(24, 24), how="crop")
@example(sides=(360, 72), of=1, size=(24, 26), how="pad")
@example(sides=(657, 136), of=1, size=(29, 60), how="pad")  # rounded up by libjpeg, it was 0.8 pixels off
@example(sides=(344, 64), of=1, size=(30, 29), how="crop")  # cut between pixels, 0.5 pixels
@example(sides=(479, 641), of=1, size=(96, 96), how="stretch")
@example(sides=(238, 318), of=1, size=(96, 96), how="crop")
@example(sides=(152, 472), of=8, size=(71, 43), how="crop")
def test_a_part_of_a_jpeg_is_not_shifted(sides: tuple[int, int], of: int, size: tuple[int, int], how: str) -> None:
    """Against the full picture, on soft ones: no place is off by more than 0.04 pixels, no edge of the black around."""
    h, w = (side // of * of for side in sides)
    y, x = (np.mgrid[0:h, 0:w] + 0.5) / np.array([h, w])[:, None, None]
    soft = np.round(127 + 60 * np.sin(9 * x + 2 * y) + 50 * np.cos(7 * y - 3 * x)).astype(np.uint8)
    data = simplejpeg.encode_jpeg(soft[..., None].repeat(3, 2), quality=95)
    of_all, of_part = np.zeros((2, *size, 3), np.uint8)
    fit(decode(data), of_all, fit=how)
    fit(decode_for(data, "rgb", Target(*size, how))[0], of_part, fit=how)
    inside: np.ndarray = np.any(of_all, axis=2)
    np.testing.assert_array_equal(np.any(of_part, axis=2), inside)
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    wide = min(len(rows), len(columns)) > 8  # all of a narrow one is near an edge
    assert np.abs(of_all.astype(int) - of_part).max() <= (5 if wide else 10)
    if wide:
        shown = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1), 0
        assert shift(of_all[shown], of_part[shown]) < 0.04


def test_only_large_jpegs_are_decoded_in_part() -> None:
    image = scene(100, 120)
    target = Target(61, 61)
    for data in (cv2.imencode(".png", image)[1].tobytes(), simplejpeg.encode_jpeg(image)):
        found, stored = decode_for(data, "bgr", target)
        np.testing.assert_array_equal(found, decode(data, "bgr"))
        assert stored == (100, 120)
    with pytest.raises(ValueError, match=r"[Pp]remature end|[Nn]ot a JPEG|[Ii]nvalid"):
        decode_for(simplejpeg.encode_jpeg(scene(480, 640))[:3000], "rgb", target)


# ---- Depth -----------------------------------------------------------------------------------------------------------


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def test_depth_of_special_floats(tfds: Any) -> None:
    depth = np.array([[np.nan, np.inf, -np.inf], [-0.0, 1e-40, 3.4e38]], np.float32)
    data = tfds.features.Image(shape=(2, 3, 1), dtype=np.float32).encode_example(depth[..., None])
    assert decode_depth(data, "float32").tobytes() == depth.tobytes()


@pytest.mark.parametrize(
    ("data", "dtype", "message"),
    [
        (b"", "uint16", "not an image: 0 bytes"),
        (b"\x89PNG but no more", "float32", "not an image: 16 bytes"),
        (
            png(np.zeros((2, 3), np.uint8)),
            "uint16",
            r"an image of shape \(2, 3\) and type uint8; expected \(H, W\) uint16",
        ),
        (png(np.zeros((2, 3), np.uint16)), "float32", r"shape \(2, 3\) and type uint16; .* asked for is 'float32'"),
        (png(np.zeros((2, 3, 3), np.uint8)), "float32", r"an image of shape \(2, 3, 3\) and type uint8"),
        (png(np.zeros((2, 3), np.uint16)), "uint8", "asked for is 'uint8'"),
    ],
)
def test_what_is_not_depth_is_an_error(data: bytes, dtype: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_depth(data, dtype)


def test_encoded_pictures() -> None:
    image = np.random.default_rng(4).integers(0, 256, (10, 12, 3), np.uint8)
    data = encode(image, "png")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), image)
    assert encode(image[:, ::-1], "jpeg", 80) == simplejpeg.encode_jpeg(image[:, ::-1].copy(), 80, "RGB", "420")
    with pytest.raises(ValueError, match=r"encoding 'jpg' is unknown; did you mean 'jpeg'"):
        encode(image, "jpg")
