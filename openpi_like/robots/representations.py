"""Units and representations of rotations in which datasets store numbers, and what they are in model space."""

import math
from collections.abc import Callable

import numpy as np
from scipy.spatial.transform import Rotation

# unit in the dataset -> (unit in model space, factor)
UNITS: dict[str, tuple[str, float]] = {
    "m": ("m", 1.0),
    "mm": ("m", 1e-3),
    "cm": ("m", 1e-2),
    "rad": ("rad", 1.0),
    "deg": ("rad", math.pi / 180.0),
    "px": ("px", 1.0),
    "m/s": ("m/s", 1.0),
    "rad/s": ("rad/s", 1.0),
    "m/s^2": ("m/s^2", 1.0),
    "1": ("1", 1.0),  # dimensionless, for example a normalised command in [-1, 1]
}

# name -> (size, to scipy Rotation, from scipy Rotation); all act on (N, size) arrays
ROTATIONS: dict[str, tuple[int, Callable[[np.ndarray], Rotation], Callable[[Rotation], np.ndarray]]] = {
    # Angles about fixed axes, in the order of the letters (SciPy's lower-case sequences).
    "rpy": (3, lambda x: Rotation.from_euler("xyz", x), lambda r: r.as_euler("xyz")),
    "zxy": (3, lambda x: Rotation.from_euler("zxy", x), lambda r: r.as_euler("zxy")),
    "axis_angle": (3, Rotation.from_rotvec, lambda r: r.as_rotvec()),
    "quaternion_xyzw": (4, Rotation.from_quat, lambda r: r.as_quat()),
    "quaternion_wxyz": (4, lambda x: Rotation.from_quat(x[:, [1, 2, 3, 0]]), lambda r: r.as_quat()[:, [3, 0, 1, 2]]),
    "rotation_6d": (6, lambda x: _from_6d(x), lambda r: r.as_matrix()[:, :, :2].transpose(0, 2, 1).reshape(-1, 6)),
}


def _from_6d(x: np.ndarray) -> Rotation:
    """First two columns of the rotation matrix, orthonormalised by Gram-Schmidt (Zhou et al. 2019, section 4)."""
    a, b = x[:, :3], x[:, 3:]
    a = a / np.linalg.norm(a, axis=1, keepdims=True)
    b = b - (a * b).sum(1, keepdims=True) * a
    b = b / np.linalg.norm(b, axis=1, keepdims=True)
    return Rotation.from_matrix(np.stack([a, b, np.cross(a, b)], axis=2))
