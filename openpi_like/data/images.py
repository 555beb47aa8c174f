"""Encoded camera frames to the pixels that a policy sees; serving prepares its frames with the same `fit`."""

from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from jaxtyping import Float32, UInt8, UInt16
from PIL import Image

from openpi_like.config import near_names

_JPEG = b"\xff\xd8\xff"
ENCODINGS = {"jpeg": _JPEG, "png": b"\x89PNG"}  # what their first bytes are


def encoding(data: bytes) -> str:
    """Returns the name of an image's encoding, one of `ENCODINGS`, or "other"."""
    return next((name for name, magic in ENCODINGS.items() if data.startswith(magic)), "other")


class Target(NamedTuple):
    """The picture that a decoded one is made into, see `fit`. What is not needed for it may be left out in decoding."""

    height: int
    width: int
    fit: str = "pad"

    def least(self, height: int, width: int) -> tuple[float, float]:
        """Returns the size to which a picture of (height, width) is resized, before it is cut or padded."""
        h, w = self.height / height, self.width / width
        if self.fit == "stretch":
            return float(self.height), float(self.width)
        scale = min(h, w) if self.fit == "pad" else max(h, w)
        return scale * height, scale * width

    def factor(self, height: int, width: int) -> int:
        """Returns by how much smaller a JPEG of (height, width) may be decoded: 8, 4, 2 or 1.

        It divides the sides, and where the picture is cut its part. Else libjpeg rounds sides up, to pixels that are
        partly outside of the picture, and all of it would be shifted by up to half of one.
        """
        h, w = self.least(height, width)
        lengths = [height, width, *(cut(height, width, self.height, self.width) if self.fit == "crop" else ())]
        fits = (f for f in (8, 4, 2) if height >= f * h and width >= f * w and all(n % f == 0 for n in lengths))
        return next(fits, 1)


def cut(height: int, width: int, to_height: int, to_width: int) -> tuple[int, int, int, int]:
    """Returns (top, left, rows, columns) of the middle of a picture that has the aspect ratio of (to_height, to_width).

    It is the part that `fit="crop"` takes.
    """
    scale = max(to_height / height, to_width / width)
    rows, columns = (min(side, max(1, round(to / scale))) for side, to in ((height, to_height), (width, to_width)))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def decode_for(
    data: bytes, channel_order: str, target: Target | None
) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]]:
    """Decodes an image; returns it and the size it is stored in.

    target: a JPEG at least twice as large as that needs is decoded at a half, a quarter or an eighth of its size, by
        leaving out frequencies (libjpeg's scaled inverse DCT), where that keeps pixels in their places, see
        `Target.factor`. Of 640 x 480 for 224 x 224 that takes a third of the time, and the result is 45 dB from that of
        the full image, which is 1.4 of 255 levels (root mean square). None decodes in full.

    Raises:
        ValueError: as `decode`.
    """
    if data[:3] != _JPEG:
        image = decode(data, channel_order)
        return image, image.shape[:2]
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    factor = 1 if target is None else target.factor(height, width)
    image = simplejpeg.decode_jpeg(
        data,
        colorspace="BGR" if channel_order == "bgr" else "RGB",
        min_height=height // factor,
        min_width=width // factor,
        min_factor=factor,
    )
    return image, (height, width)


def decode(data: bytes, channel_order: str = "rgb") -> UInt8[np.ndarray, "H W 3"]:
    """Decodes a JPEG or PNG (or anything OpenCV reads) to RGB.

    channel_order: "bgr" where the stored image has its channels swapped.

    Raises:
        ValueError: these bytes are not an image.
    """
    if data[:3] == _JPEG:
        return decode_for(data, channel_order, None)[0]
    return _imdecode(data, cv2.IMREAD_COLOR if channel_order == "bgr" else cv2.IMREAD_COLOR_RGB)


def _imdecode(data: bytes, flags: int) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:  # of no bytes, and of a header with an absurd size
        image = None
    if image is None:
        raise ValueError(f"not an image: {len(data)} bytes that begin with {data[:8]!r}")
    return image


def encode(image: UInt8[np.ndarray, "H W 3"], form: str, quality: int = 95) -> bytes:
    """Returns an RGB image encoded as "png", which loses nothing, or "jpeg". quality: of JPEG, 1 to 100, 4:2:0."""
    if form == "png":
        return cv2.imencode(".png", image[..., ::-1])[1].tobytes()
    if form != "jpeg":
        raise ValueError(f"encoding {form!r} is unknown; {near_names(form, list(ENCODINGS))}")
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=quality, colorspace="RGB", colorsubsampling="420"
    )


def decode_depth(data: bytes, dtype: str) -> Float32[np.ndarray, "H W"] | UInt16[np.ndarray, "H W"]:
    """Decodes a depth image, in the units in which it is stored.

    dtype: as the dataset declares it: "uint16", a PNG of one channel; "float32", a PNG whose four channels are the
    bytes of a little-endian float.

    Raises:
        ValueError: these bytes are not such an image.
    """
    image = _imdecode(data, cv2.IMREAD_UNCHANGED)
    if dtype == "uint16" and image.dtype == np.uint16 and image.ndim == 2:
        return image
    if dtype == "float32" and image.dtype == np.uint8 and image.shape[2:] == (4,):
        # OpenCV returns blue, green, red, alpha
        return np.ascontiguousarray(image[..., [2, 1, 0, 3]]).view("<f4")[..., 0]
    raise ValueError(
        f"an image of shape {image.shape} and type {image.dtype}; expected (H, W) uint16 for depth of type 'uint16', "
        f"(H, W, 4) uint8 for 'float32'; asked for is {dtype!r}"
    )


FITS = ("pad", "crop", "stretch")


def fit(
    image: UInt8[np.ndarray, "H W 3"], out: UInt8[np.ndarray, "h w 3"], *, resize: str = "cubic", fit: str = "pad"
) -> None:
    """Writes `image` into `out`, resized.

    resize: "cubic", interpolation by OpenCV, averaging over areas where it shrinks below two thirds, against aliasing.
    "pillow", Pillow's antialiased bilinear filter, which the released openpi weights were trained with.
    fit: "pad" keeps the aspect ratio and centres the image on black, "crop" keeps it and takes the middle of the image,
    "stretch" does not keep it.
    """
    h, w = out.shape[:2]
    height, width = image.shape[:2]
    if (height, width) == (h, w):
        out[:] = image
        return
    if fit == "pad":
        scale = min(h / height, w / width)
        # The epsilon keeps 224 / 640 * 640 from becoming 223.
        height, width = (max(1, int(side * scale + 1e-6)) for side in (height, width))
        top, left = (h - height) // 2, (w - width) // 2
        out[:top], out[top + height :], out[:, :left], out[:, left + width :] = 0, 0, 0, 0
        out = out[top : top + height, left : left + width]
    elif fit == "crop":
        top, left, rows, columns = cut(height, width, h, w)
        image = image[top : top + rows, left : left + columns]
    elif fit != "stretch":
        raise ValueError(f"fit {fit!r} is unknown; {near_names(fit, FITS)}")
    size = (out.shape[1], out.shape[0])
    if resize == "pillow":
        out[:] = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    elif resize == "cubic":
        shrinks = out.shape[0] < 2 / 3 * image.shape[0] or out.shape[1] < 2 / 3 * image.shape[1]
        resized = cv2.resize(image, size, dst=out, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
        assert resized is out  # written in place
    else:
        raise ValueError(f"resize {resize!r} is unknown; {near_names(resize, ('cubic', 'pillow'))}")
