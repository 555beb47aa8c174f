"""Frames of nuScenes, and the one that plans are in: the only place where axes are turned.

The frame of now is that of LIDAR_TOP at a keyframe: x to the right, y ahead, its origin the lidar on the roof. This is
what published code does: it takes the ego pose of the LIDAR_TOP sample_data, goes on from there into the lidar's own
frame by its calibration, and what moves along history and plan is the lidar (UniAD, trajectory_api.py,
get_sdc_planning_label; VAD, vad_nuscenes_converter.py, get_global_sensor_pose). It is also the frame in which the
metrics' box of the car is 0.5 m ahead: the lidar stands ahead of the rear axle, which is the origin of the ego pose,
and the middle of the car another half a metre.

The ego frame, in which the CAN bus tells vectors, is x ahead and y to the left.
"""

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

_SLANT = np.cos(np.radians(15.0))  # that a lidar may be mounted off its axes; those of nuScenes are within about 2


def matrix(translation: list[float], rotation: list[float]) -> Float[np.ndarray, "4 4"]:
    """Returns the matrix of a pose, from its frame to the outer one; rotation: quaternion w, x, y, z."""
    pose = np.eye(4)
    w, x, y, z = rotation
    pose[:3, :3] = Rotation.from_quat([x, y, z, w]).as_matrix()
    pose[:3, 3] = translation
    return pose


def right_ahead(ego: Float[np.ndarray, "*N K"]) -> Float[np.ndarray, "*N 2"]:
    """Returns vectors of the ego frame, x ahead and y to the left, as x to the right and y ahead."""
    return np.stack([-ego[..., 1], ego[..., 0]], axis=-1)


def looks_ahead(calibration_44: Float[np.ndarray, "4 4"]) -> bool:
    """Returns whether a sensor's frame, given in that of the ego, has x to the right and y ahead."""
    return bool(-calibration_44[1, 0] > _SLANT and calibration_44[0, 1] > _SLANT)


def seen_from(frame_44: Float[np.ndarray, "4 4"], points_N3: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 2"]:
    """Returns points of the world, in metres, as (right, ahead) of a frame."""
    return ((points_N3 - frame_44[:3, 3]) @ frame_44[:3, :3])[:, :2]


def turned_into(frame_44: Float[np.ndarray, "4 4"], vectors_N3: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 2"]:
    """Returns directions of the world as (right, ahead) of a frame."""
    return (vectors_N3 @ frame_44[:3, :3])[:, :2]


def headings(frames_T44: Float[np.ndarray, "T 4 4"]) -> Float[np.ndarray, "T"]:
    """Returns where frames look, in rad from the world's x to the left, without jumps along T."""
    return np.unwrap(np.arctan2(frames_T44[:, 1, 1], frames_T44[:, 0, 1]))
