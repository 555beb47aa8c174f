"""Changes of training images on the device, against numpy and scipy one image at a time."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from openpi_like.batch import Batch
from openpi_like.data.augment import Augment, augment_batch, augment_image

H, W = 24, 32
COLOURS = Augment(brightness=0.3, contrast=0.4, saturation=0.5, hue=0.2)


def pictures(count: int) -> np.ndarray:
    """Smooth pictures with colours everywhere, and noise."""
    y, x = np.mgrid[0:H, 0:W] / W
    smooth = np.stack([x, y / 2, 0.5 + 0.4 * np.sin(7 * x + 5 * y)], axis=2)
    noise = np.random.default_rng(0).random((count, H, W, 3))
    return (255 * (0.8 * smooth + 0.2 * noise)).astype(np.uint8)


def batch(count: int, first: int = 0, **masks: np.ndarray) -> Batch:
    positions = first + np.arange(count)
    return {  # type: ignore[typeddict-item]  # what is not about images
        "images": {name: pictures(count) for name in ("base", "wrist")},
        "image_mask": {name: masks.get(name, np.ones(count, bool)) for name in ("base", "wrist")},
        "position": np.stack([positions >> 32, positions & 0xFFFFFFFF], axis=1).astype(np.uint32),
    }


def changed(of: Batch, config: Augment, seed: int = 0) -> dict[str, np.ndarray]:
    images: dict[str, Any] = compiled(config)(jax.random.key(seed), of)
    return {name: np.asarray(image) for name, image in images.items()}


@functools.cache
def compiled(config: Augment) -> Any:
    return jax.jit(lambda key, batch: augment_batch(key, batch, config)["images"])


def as_float(image: np.ndarray) -> np.ndarray:
    return image / 255 * 2 - 1


def test_nothing_asked_for_changes_nothing() -> None:
    of = batch(3)
    for name, image in changed(of, Augment()).items():
        assert image.dtype == np.float32
        np.testing.assert_allclose(image, as_float(of["images"][name]), atol=2e-7)


@pytest.mark.parametrize("rotation", [20.0, 0.0])
def test_geometry_against_scipy(rotation: float) -> None:
    """A crop and a rotation, found from where the pixels come from, and then resampled by scipy."""
    config = Augment(scale=(0.5, 1.0), ratio=(0.8, 1.25), rotation=rotation)
    y, x = np.mgrid[0:H, 0:W].astype(np.float64)
    # A picture of its own coordinates says where each pixel was taken from.
    coordinates = np.stack([y, x, np.full_like(x, 255)], axis=2).astype(np.uint8)
    one = jax.jit(lambda key, image: augment_image(key, image, config))
    picture = pictures(1)[0]
    angles = []
    for number in range(12):
        key = jax.random.key(number)
        found = (np.asarray(one(key, coordinates)) + 1) * 127.5
        inside = found[..., 2] > 254.99
        for i, n in ((0, H), (1, W)):  # not where the edge goes on
            inside &= (found[..., i] > 0.01) & (found[..., i] < n - 1.01)
        design = np.stack([y, x, np.ones_like(x)], axis=2)[inside]
        (into, _, rank, _) = np.linalg.lstsq(design, found[inside][:, :2], rcond=None)
        assert rank == 3
        np.testing.assert_allclose(design @ into, found[inside][:, :2], atol=2e-3)  # it is affine
        source = [np.stack([y, x, np.ones_like(x)], axis=2) @ into[:, i] for i in (0, 1)]
        expected = np.stack(
            [map_coordinates(picture[..., c].astype(float), source, order=1, mode="nearest") for c in range(3)], axis=2
        )
        # A pixel reaches half a unit beyond its middle.
        beyond = np.max([np.abs(s - (n - 1) / 2) - n / 2 for s, n in zip(source, (H, W), strict=True)], axis=0)
        expected[beyond > 0] = 0
        got = (np.asarray(one(key, picture)) + 1) * 127.5
        sure = np.abs(beyond) > 0.01
        assert sure.mean() > 0.97
        assert np.abs(got - expected)[sure].max() < 0.3
        # into = rotation, then each side scaled by the part that is kept
        kept_y, kept_x = np.hypot(*into[:2, 0]), np.hypot(*into[:2, 1])
        assert kept_y * kept_x + 1e-4 >= 0.5
        assert kept_y * kept_x <= 1 + 1e-4
        angles.append(np.rad2deg(np.arctan2(into[0, 1] / kept_x, into[0, 0] / kept_y)))
        middle = np.array([(H - 1) / 2, (W - 1) / 2])
        shift = middle @ into[:2] + into[2] - middle
        assert np.all(np.abs(shift) <= (1 - np.array([kept_y, kept_x])) / 2 * (H, W) + 1e-3)  # the crop is inside
    assert np.all(np.abs(angles) <= rotation + 0.01)
    assert np.ptp(angles) >= 0.75 * rotation


def test_colours_against_scipy() -> None:
    """One affine map of RGB for a whole picture: grey stays grey, what differs from it is turned and scaled."""
    one = jax.jit(lambda key, image: augment_image(key, image, COLOURS))
    picture = pictures(1)[0]
    pixels = picture.reshape(-1, 3) / 255
    factors = []
    for number in range(20):
        got = (np.asarray(one(jax.random.key(number), picture)).reshape(-1, 3) + 1) / 2
        free = ((got > 1e-6) & (got < 1 - 1e-6)).all(axis=1)  # not clipped
        design = np.concatenate([pixels, np.ones((len(pixels), 1))], axis=1)
        affine = np.linalg.lstsq(design[free], got[free], rcond=None)[0]
        matrix, offset = affine[:3].T, affine[3]
        contrast = matrix.sum() / 3
        assert np.ptp(offset) < 1e-3
        brightness = offset.mean() - 0.5 * (1 - contrast)
        grey = np.full((3, 3), 1 / 3)
        part = matrix / contrast - grey
        saturation = np.sqrt((part**2).sum() / 2)
        turn = np.arctan2((part[1, 0] - part[0, 1]) * np.sqrt(3) / 2, part.trace() / 2)
        axis = np.ones(3) / np.sqrt(3)
        expected = contrast * (grey + saturation * (Rotation.from_rotvec(turn * axis).as_matrix() - grey))
        np.testing.assert_allclose(matrix, expected, atol=2e-3)
        np.testing.assert_allclose(got, np.clip(pixels @ matrix.T + offset, 0, 1), atol=2e-3)
        factors.append((brightness, contrast - 1, saturation - 1, turn / (2 * np.pi)))
    ranges = (COLOURS.brightness, COLOURS.contrast, COLOURS.saturation, COLOURS.hue)
    spread = np.abs(factors).max(axis=0) / ranges
    assert np.all(spread < 1.01)
    assert np.all(spread > 0.7)


def test_a_third_of_a_turn_makes_red_green() -> None:
    config = Augment(hue=0.5)
    red = np.broadcast_to(np.array([200, 0, 0], np.uint8), (1, 1, 3))
    one = jax.jit(lambda key: augment_image(key, jnp.asarray(red), config))
    seen = np.stack([np.asarray(one(jax.random.key(i)))[0, 0] for i in range(40)])
    nearest = np.abs(seen - as_float(np.array([0, 200, 0]))).max(axis=1).min()
    assert nearest < 0.2


def test_probability_of_colours() -> None:
    of = batch(200)
    images = changed(of, Augment(brightness=0.3, colour_probability=0.3))["base"]
    same = np.abs(images - as_float(of["images"]["base"])).max(axis=(1, 2, 3)) < 1e-5
    assert 0.6 < same.mean() < 0.8


@pytest.mark.parametrize("make", [Augment.openpi, Augment.octo])
def test_draws_belong_to_the_sample(make: Any) -> None:
    """Whatever row, batch, or other cameras it comes with; other positions, seeds and cameras draw others."""
    config, of = make(), batch(6, first=2**32 - 3)  # across the border of the words
    whole = changed(of, config)
    turned = changed(jax.tree.map(lambda x: x[::-1], of), config)
    for name, image in whole.items():
        np.testing.assert_allclose(turned[name][::-1], image, atol=1e-5)
    order = np.array([4, 1])
    part: Any = {k: {"base": of[k]["base"][order]} for k in ("images", "image_mask")} | {
        "position": of["position"][order]
    }
    np.testing.assert_allclose(changed(part, config)["base"], whole["base"][order], atol=1e-5)
    same: Any = {**of, "images": {k: np.repeat(v[:1], 6, axis=0) for k, v in of["images"].items()}}
    results = [changed(same, config), changed(same, config, seed=1)]
    flat = [image.tobytes() for result in results for images in result.values() for image in images]
    assert len(set(flat)) == 24


def test_wrist_cameras_keep_their_geometry_and_masked_ones_stay_black() -> None:
    of = batch(6, wrist=np.array([True, False] * 3))
    config = Augment(scale=(0.8, 1.0), wrist_cameras=("wrist",))
    images = changed(of, config)
    np.testing.assert_allclose(images["wrist"][::2], as_float(of["images"]["wrist"])[::2], atol=1e-6)
    assert np.abs(images["base"] - as_float(of["images"]["base"])).max(axis=(1, 2, 3)).min() > 0.05
    for each in (config, Augment.openpi()):
        np.testing.assert_array_equal(changed(of, each)["wrist"][1::2], -1.0)


def test_states_are_disturbed_by_their_position_and_padding_is_not() -> None:
    """Noise of the size that is asked for, a share of states that are nothing, and images that are what they were."""
    count, rng = 4_000, np.random.default_rng(0)
    mask = np.array([True, True, False])
    state = rng.standard_normal((count, 3)).astype(np.float32) * mask
    of: Any = {**batch(1), "state": state, "state_mask": np.tile(mask, (count, 1)), "images": {}, "image_mask": {}}
    of["position"] = np.stack([np.zeros(count), np.arange(count)], 1).astype(np.uint32)
    config = Augment(state_noise=0.2, state_dropout=0.25)
    step = jax.jit(lambda key, batch: augment_batch(key, batch, config)["state"])
    got = np.asarray(step(jax.random.key(0), of))
    assert (got[:, 2] == 0).all()
    gone = (got[:, :2] == 0).all(1)
    assert gone.mean() == pytest.approx(0.25, abs=0.03)
    noise = (got - state)[~gone, :2]
    assert (noise.mean(), noise.std()) == (pytest.approx(0, abs=0.02), pytest.approx(0.2, abs=0.01))
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.05
    turned: Any = jax.tree.map(lambda x: x[::-1], of)
    np.testing.assert_array_equal(np.asarray(step(jax.random.key(0), turned))[::-1], got)
    assert (np.asarray(step(jax.random.key(1), of))[~gone, 0] != got[~gone, 0]).mean() > 0.9
    assert "state" not in augment_batch(jax.random.key(0), jax.device_put(batch(1)), Augment.octo())


def test_ranges_without_meaning_are_listed() -> None:
    with pytest.raises(ValueError, match=r"scale=\(0.5, 1.5\), .*; ratio=\(1.1, 0.9\), .*; hue=0.6, expected .* 0.5\]"):
        Augment(scale=(0.5, 1.5), ratio=(1.1, 0.9), hue=0.6)
    with pytest.raises(ValueError, match=r"colour_probability=2.0.*; state_dropout=-1.*; state_noise=nan"):
        Augment(colour_probability=2.0, state_dropout=-1.0, state_noise=float("nan"))
