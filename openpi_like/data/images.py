"""Encoded camera frames to the pixels that a policy sees; serving prepares its frames with the same `fit`."""

import dataclasses

import cv2
import numpy as np
import simplejpeg
from jaxtyping import Float, UInt8
from PIL import Image

_JPEG = b"\xff\xd8\xff"


def decode(data: bytes, channel_order: str = "rgb") -> UInt8[np.ndarray, "H W 3"]:
    """Decodes a JPEG or PNG (or anything OpenCV reads) to RGB.

    channel_order: "bgr" where the stored image has its channels swapped.

    Raises:
        ValueError: these bytes are not an image.
    """
    swapped = channel_order == "bgr"
    if data[:3] == _JPEG:
        return simplejpeg.decode_jpeg(data, colorspace="BGR" if swapped else "RGB")
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR if swapped else cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise ValueError(f"not an image: {len(data)} bytes that begin with {data[:8]!r}")
    return image


def fit(
    image: UInt8[np.ndarray, "H W 3"], out: UInt8[np.ndarray, "h w 3"], *, resize: str = "cubic", fit: str = "pad"
) -> None:
    """Writes `image` into `out`, resized with its aspect ratio kept and centred on black.

    resize: "cubic", interpolation by OpenCV, averaging over areas where it shrinks below two thirds, against aliasing.
    "pillow", Pillow's antialiased bilinear filter, which the released openpi weights were trained with.
    """
    if fit != "pad":
        raise ValueError(f"fit {fit!r}, expected 'pad'")
    h, w = out.shape[:2]
    if image.shape[:2] == (h, w):
        out[:] = image
        return
    scale = min(h / image.shape[0], w / image.shape[1])
    # The epsilon keeps 224 / 640 * 640 from becoming 223.
    height, width = (max(1, int(side * scale + 1e-6)) for side in image.shape[:2])
    top, left = (h - height) // 2, (w - width) // 2
    out[:top], out[top + height :], out[:, :left], out[:, left + width :] = 0, 0, 0, 0
    if resize == "pillow":
        resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    else:
        filter_ = cv2.INTER_AREA if scale < 2 / 3 else cv2.INTER_CUBIC
        resized = cv2.resize(image, (width, height), interpolation=filter_)
    out[top : top + height, left : left + width] = resized


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random changes of training images. All values 0 change nothing.

    shift: up to this part of the height and width, edges repeated. brightness: added, as part of full range.
    contrast, saturation: factors within 1 +- this value.
    """

    shift: float = 0.04
    brightness: float = 0.1
    contrast: float = 0.1
    saturation: float = 0.1

    def __post_init__(self) -> None:
        values = dataclasses.asdict(self)
        wrong = {k: v for k, v in values.items() if not 0 <= v < 1}
        if wrong:
            raise ValueError(f"Augment: {wrong}, expected values in [0, 1)")


_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def colour_matrix(brightness: float, contrast: float, saturation: float) -> Float[np.ndarray, "3 4"]:
    """Returns the affine map on RGB that scales saturation about luma, then contrast about mid grey, then brightens."""
    linear = contrast * (saturation * np.eye(3) + (1 - saturation) * _LUMA[None, :])
    offset = np.full((3, 1), 127.5 * (1 - contrast) + 255 * brightness)
    return np.concatenate([linear, offset], axis=1)


def augment(image: UInt8[np.ndarray, "H W 3"], config: Augment, rng: np.random.Generator) -> None:
    """Changes `image` in place."""
    h, w = image.shape[:2]
    draws = rng.uniform(-1, 1, 5)
    dy, dx = (round(config.shift * side * draw) for side, draw in ((h, draws[0]), (w, draws[1])))
    matrix = colour_matrix(
        config.brightness * draws[2], 1 + config.contrast * draws[3], 1 + config.saturation * draws[4]
    )
    padded = cv2.copyMakeBorder(image, abs(dy), abs(dy), abs(dx), abs(dx), cv2.BORDER_REPLICATE)
    shifted = padded[abs(dy) + dy : abs(dy) + dy + h, abs(dx) + dx : abs(dx) + dx + w]
    image[:] = cv2.transform(shifted, matrix)
