"""Random changes of what a policy is trained on, on the device: one warp and one change of colours per image, and noise
on the state.

Every draw is a function of the run's seed, the sample's position and the camera, so a run that was stopped, or goes on
with another number of hosts, sees the same. Letters: B batch, H, W pixels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from openpi_like.batch import Batch
from openpi_like.draws import named_key, sample_keys


@dataclasses.dataclass(frozen=True)
class Augment:
    """What is drawn for a sample; for an image, uniformly from each range. The defaults change nothing.

    scale: area of the part of the image that is kept, as a part of the whole. ratio: its width to its height, relative
        to those of the image. rotation: degrees to either side. What comes from outside the image is black.
    brightness: added, as a part of full range. contrast: factors within 1 +- this, about mid grey. saturation: factors
        within 1 +- this, of the distance from grey. hue: turns about the axis of grey, to either side.
    colour_probability: part of the images whose colours are changed at all.
    wrist_cameras: slots whose images keep their geometry, which says where the hand is.
    state_noise: standard deviation of what is added to each number of the state, normalised as it is: against policies
        that go on as the state says instead of looking. state_dropout: part of the samples whose state is zero, the
        middle of the data: below 1, or it would never learn to read the state that it is given later. Both are of
        states that are numbers to the policy, not words of its prompt.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)
    rotation: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    colour_probability: float = 1.0
    wrist_cameras: tuple[str, ...] = ()
    state_noise: float = 0.0
    state_dropout: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        for name, (low, high), least, most in (("scale", self.scale, 0, 1), ("ratio", self.ratio, 0, float("inf"))):
            if not least < low <= high <= most:
                problems.append(f"{name}={(low, high)}, expected a range within ({least}, {most}]")
        for name, most in (("rotation", 180), ("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                problems.append(f"{name}={getattr(self, name)}, expected a value in [0, {most}]")
        if not 0 <= self.colour_probability <= 1:
            problems.append(f"colour_probability={self.colour_probability}, expected a value in [0, 1]")
        if not 0 <= self.state_dropout < 1:
            problems.append(f"state_dropout={self.state_dropout}, expected a value in [0, 1)")
        if not 0 <= self.state_noise < float("inf"):
            problems.append(f"state_noise={self.state_noise}, expected a number of at least 0")
        if problems:
            raise ValueError("Augment: " + "; ".join(problems))

    @property
    def changes_states(self) -> bool:
        """Whether anything is drawn for states."""
        return bool(self.state_noise or self.state_dropout)

    @classmethod
    def openpi(cls, *, wrist_cameras: tuple[str, ...] = ()) -> "Augment":
        """The ranges of openpi: 95 % of each side, up to 5 degrees, and strong changes of colour.

        Its library (augmax 0.4.1) changes the colours of half of the images, and their hue by up to 0.1 unless told
        not to. It changes value and hue of HSV; it draws a saturation, too, and does not use it. Its contrast has
        slopes of tan(pi / 4 (1 +- 0.4)), 0.5 to 2, about mid grey, and its brightness blends with white or black.
        """
        return cls(
            scale=(0.95**2, 0.95**2), rotation=5.0, brightness=0.3, contrast=0.4, saturation=0.5, hue=0.1,
            colour_probability=0.5, wrist_cameras=wrist_cameras,
        )  # fmt: skip

    @classmethod
    def colours(cls) -> "Augment":
        """Those of openpi without its geometry: where a camera stands still, the picture says where things are."""
        return dataclasses.replace(cls.openpi(), scale=(1.0, 1.0), rotation=0.0)

    @classmethod
    def octo(cls, *, wrist_cameras: tuple[str, ...] = ()) -> "Augment":
        """The ranges of octo: a crop of 80 to 100 % of the area, and slight changes of colour.

        It scales contrast about the mean of each image and channel, and hue and saturation are those of HSV.
        """
        return cls(
            scale=(0.8, 1.0), ratio=(0.9, 1.1), brightness=0.1, contrast=0.1, saturation=0.1, hue=0.05,
            wrist_cameras=wrist_cameras,
        )  # fmt: skip


def augment_batch(key: Key[Array, ""], batch: Batch, config: Augment) -> Batch:
    """Returns the batch with changed images, float32 in [-1, 1], and states; what is masked stays black, or zero."""
    images = {}
    for name, image in batch["images"].items():
        keys = sample_keys(named_key(key, name), batch["position"])  # whatever other cameras there are
        one = functools.partial(augment_image, config=config, warp=name not in config.wrist_cameras)
        changed = jax.vmap(one)(keys, image)
        images[name] = jnp.where(batch["image_mask"][name][:, None, None, None], changed, -1.0)
    if not config.changes_states:
        return {**batch, "images": images}
    keys = sample_keys(named_key(key, "state"), batch["position"])
    states = jax.vmap(functools.partial(augment_state, config=config))(keys, batch["state"])
    return {**batch, "images": images, "state": jnp.where(batch["state_mask"], states, 0.0)}


def augment_state(key: Key[Array, ""], state: Float[Array, "Ds"], config: Augment) -> Float[Array, "Ds"]:
    """Returns one changed state, normalised as it was."""
    of_noise, of_dropout = jax.random.split(key)
    noisy = state + config.state_noise * jax.random.normal(of_noise, state.shape)
    return jnp.where(jax.random.bernoulli(of_dropout, config.state_dropout), 0.0, noisy)


def augment_image(
    key: Key[Array, ""], image: UInt8[Array, "H W 3"], config: Augment, *, warp: bool = True
) -> Float[Array, "H W 3"]:
    """Returns one changed image, in [-1, 1]. warp: whether its geometry may change."""
    geometry, colours = jax.random.split(key)
    if warp and (config.scale, config.ratio, config.rotation) != ((1.0, 1.0), (1.0, 1.0), 0.0):
        channels = _warp(geometry, image, config)
    else:
        channels = [image[..., c].astype(jnp.float32) for c in range(3)]
    if config.brightness or config.contrast or config.saturation or config.hue:
        # From [0, 255] to [0, 1], the change, and from there to [-1, 1], as one.
        matrix, offset = _change_of_colours(colours, config)
        matrix, offset = 2 / 255 * matrix, 2 * offset - 1
        # Three products written out: as a matrix product of depth three it is 30 times slower on a CPU.
        channels = [sum((matrix[i, c] * channels[c] for c in range(3)), offset) for i in range(3)]
        return jnp.clip(jnp.stack(channels, axis=-1), -1, 1)
    return 2 / 255 * jnp.stack(channels, axis=-1) - 1


def _warp(key: jax.Array, image: jax.Array, config: Augment) -> list[jax.Array]:
    """Crops, resizes back and rotates by bilinear interpolation of the source, once; returns channels in [0, 255].

    A pixel covers half a unit to each side of its middle; there the image goes on as at its edge, beyond it is black.
    """
    area, ratio, y, x, angle = jax.random.uniform(key, (5,))
    area = config.scale[0] + area * (config.scale[1] - config.scale[0])
    ratio = config.ratio[0] + ratio * (config.ratio[1] - config.ratio[0])
    H, W = image.shape[:2]
    size = jnp.array([H, W], jnp.float32)
    kept = jnp.minimum(jnp.sqrt(jnp.stack([area / ratio, area * ratio])), 1.0)  # parts of height and width
    middle = (size - 1) / 2
    center = middle + (jnp.stack([y, x]) - 0.5) * (1 - kept) * size  # of what is kept
    rows, columns = jnp.arange(H) - middle[0], jnp.arange(W) - middle[1]
    # A pixel is one number, so that it is looked up once and not by channel. It is made by a reduction, which XLA
    # computes once; a sum written out would be computed again in every look-up.
    packed = (image.astype(jnp.int32) << jnp.array([0, 8, 16])).sum(axis=-1)
    if not config.rotation:  # whole columns, then whole rows: a quarter of the work
        row, down = _first_of_two(center[0] + kept[0] * rows, H)
        column, right = _first_of_two(center[1] + kept[1] * columns, W)
        sides = [jnp.take(packed, column + d, axis=1, mode="clip") for d in (0, 1)]
        corners = [jnp.take(side, row + d, axis=0, mode="clip") for d in (0, 1) for side in sides]
        return _interpolate(corners, down[:, None], right)
    angle = jnp.deg2rad((2 * angle - 1) * config.rotation)
    turned = (
        jnp.cos(angle) * rows[:, None] - jnp.sin(angle) * columns,
        jnp.sin(angle) * rows[:, None] + jnp.cos(angle) * columns,
    )
    source_y, source_x = (c + k * t for c, k, t in zip(center, kept, turned, strict=True))
    row, down = _first_of_two(source_y, H)
    column, right = _first_of_two(source_x, W)
    inside = (source_y >= -0.5) & (source_y <= H - 0.5) & (source_x >= -0.5) & (source_x <= W - 0.5)
    at = jnp.where(inside, row * W + column, H * W)  # beyond the image is black
    flat = jnp.pad(packed.reshape(-1), (0, W + 2))
    corners = [jnp.take(flat[d : d + H * W + 1], at, mode="clip") for d in (0, 1, W, W + 1)]
    return _interpolate(corners, down, right)


def _first_of_two(at: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the first of the two pixels around a position, and how far it is from there to the second.

    Positions outside are brought to the edge.
    """
    at = jnp.clip(at, 0, size - 1)
    first = jnp.clip(at.astype(jnp.int32), 0, max(size - 2, 0))
    return first, at - first


def _interpolate(corners: list[jax.Array], down: jax.Array, right: jax.Array) -> list[jax.Array]:
    """Returns the channels between four packed pixels: upper left, upper right, lower left, lower right."""
    channels = []
    for shift in (0, 8, 16):
        a, b, c, d = (((corner >> shift) & 255).astype(jnp.float32) for corner in corners)
        upper, lower = a + right * (b - a), c + right * (d - c)
        channels.append(upper + down * (lower - upper))
    return channels


def _change_of_colours(key: jax.Array, config: Augment) -> tuple[jax.Array, jax.Array]:
    """Returns one affine map of colours in [0, 1], (3, 3) and (), to be clipped.

    What differs from grey is turned and scaled, then come contrast and brightness.
    """
    draws = jax.random.uniform(key, (5,))
    brightness, contrast, saturation, hue = 2 * draws[:4] - 1
    contrast, angle = 1 + config.contrast * contrast, 2 * jnp.pi * config.hue * hue
    # A rotation about the axis of grey n = (1, 1, 1) / sqrt(3), from n n', the rest of the identity, and n x.
    grey, rest = jnp.full((3, 3), 1 / 3), jnp.eye(3) - 1 / 3
    cross = jnp.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / jnp.sqrt(3.0)
    colour = (1 + config.saturation * saturation) * (jnp.cos(angle) * rest + jnp.sin(angle) * cross)
    changed = draws[4] < config.colour_probability
    matrix = jnp.where(changed, contrast * (grey + colour), jnp.eye(3))
    return matrix, jnp.where(changed, config.brightness * brightness + 0.5 * (1 - contrast), 0.0)
