"""RGB frames from MuJoCo without OpenGL: one ray per pixel, Lambert shading, flat colours.

For machines with neither a GPU nor GL libraries. A texture is drawn as its mean colour, sites as spheres; there are no
shadows. Frames differ from OpenGL's, so train and evaluate with the same renderer.
"""

import mujoco
import numpy as np
from jaxtyping import UInt8

_LIGHT = np.array([0.3, 0.2, 0.93], np.float32)  # unit vector towards the light, in the world
_AMBIENT = 0.35
_SKY = (0.7, 0.8, 0.9)
_GROUPS = np.array([1, 1, 1, 0, 0, 0], np.uint8)  # geom groups that MuJoCo's own viewer shows; 3 and up is collision
_DEFAULT_RGBA = (0.5, 0.5, 0.5, 1.0)  # what MJCF gives a geom without a colour of its own
_DEFAULT_SITE_RADIUS = 0.01


class RayCaster:
    """Draws one camera of one model at one size.

    Args:
        model: an `mujoco.MjModel`. Colours are read now, camera and sites at every call.
        height, width: pixels.
        camera: name of a camera of the model.

    Raises:
        KeyError: the model has no camera of that name (MuJoCo's message lists those it has).
    """

    name = "raycast"

    def __init__(self, model: mujoco.MjModel, height: int, width: int, camera: str) -> None:
        self._model = model
        self._shape = (height, width)
        self._camera = model.camera(camera).id
        # Row -1 is the sky, which is what a ray that hits nothing (geom id -1) picks.
        self._palette = np.concatenate([_geom_colours(model), [_SKY]]).astype(np.float32)
        focal = 0.5 * height / np.tan(np.deg2rad(model.cam_fovy[self._camera]) / 2)
        y, x = np.mgrid[0:height, 0:width]
        rays = np.stack([(x + 0.5 - width / 2) / focal, (height / 2 - y - 0.5) / focal, -np.ones((height, width))], -1)
        self._rays = (rays / np.linalg.norm(rays, axis=-1, keepdims=True)).reshape(-1, 3)
        self._geom = np.zeros(height * width, np.int32)
        self._distance = np.zeros(height * width)
        # MuJoCo 3.4 and later can return normals too, through one more argument before the number of rays.
        self._extra = (None,) if "normal:" in (mujoco.mj_multiRay.__doc__ or "") else ()

    def render(self, data: mujoco.MjData) -> UInt8[np.ndarray, "height width 3"]:
        """Returns the frame of the state in `data`, whose positions must be up to date (`mj_forward`)."""
        height, width = self._shape
        origin = data.cam_xpos[self._camera].copy()
        rays = self._rays @ data.cam_xmat[self._camera].reshape(3, 3).T
        mujoco.mj_multiRay(
            self._model,
            data,
            origin,
            rays.ravel(),
            _GROUPS,
            1,  # static geoms too
            -1,  # exclude no body
            self._geom,
            self._distance,
            *self._extra,
            len(rays),
            mujoco.mjMAXVAL,
        )
        hit = self._geom >= 0
        colour = self._palette[self._geom] * self._shade(rays, hit)[:, None]
        self._draw_sites(colour, data, origin, rays, np.where(hit, self._distance, np.inf))
        return (np.clip(colour, 0.0, 1.0) * 255.0).astype(np.uint8).reshape(height, width, 3)

    def _shade(self, rays: np.ndarray, hit: np.ndarray) -> np.ndarray:
        """Brightness per pixel; the surface normal is the cross product of steps to the pixels right and below."""
        height, width = self._shape
        depth = np.where(hit, self._distance, 3.0).astype(np.float32)  # any distance: the sky is not shaded
        x, y, z = (rays.T.astype(np.float32) * depth).reshape(3, height, width)
        (ax, ay, az), (bx, by, bz) = [[_difference(v, axis) for v in (x, y, z)] for axis in (0, 1)]
        n = np.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx]).reshape(3, -1)
        cosine = np.abs(_LIGHT @ n) / np.sqrt(np.einsum("ij,ij->j", n, n) + 1e-18)
        return np.where(hit, _AMBIENT + (1 - _AMBIENT) * cosine, 1.0).astype(np.float32)

    def _draw_sites(
        self, colour: np.ndarray, data: mujoco.MjData, origin: np.ndarray, rays: np.ndarray, distance: np.ndarray
    ) -> None:
        model = self._model
        for i in np.flatnonzero((model.site_rgba[:, 3] > 0.05) & (model.site_group < 3)):
            radius = max(model.site_size[i, 0], _DEFAULT_SITE_RADIUS)
            offset = data.site_xpos[i] - origin
            along = rays @ offset
            squared = along * along - (offset @ offset - radius * radius)
            near = along - np.sqrt(np.maximum(squared, 0))
            colour[(squared > 0) & (near > 0) & (near < distance)] = model.site_rgba[i, :3]


def _difference(x: np.ndarray, axis: int) -> np.ndarray:
    """Forward difference along `axis`, the last one repeated to keep the shape."""
    d = np.diff(x, axis=axis)
    return np.concatenate([d, d[-1:] if axis == 0 else d[:, -1:]], axis=axis)


def _geom_colours(model: mujoco.MjModel) -> np.ndarray:
    """(ngeom, 3): the geom's own colour if it has one, else its material's times its texture's mean."""
    colours = model.geom_rgba[:, :3].copy()
    for geom in np.flatnonzero((model.geom_matid >= 0) & np.all(np.isclose(model.geom_rgba, _DEFAULT_RGBA), axis=1)):
        material = model.geom_matid[geom]
        colours[geom] = model.mat_rgba[material, :3]
        textures = np.ravel(model.mat_texid[material])
        textures = textures[textures >= 0]
        if len(textures):
            t = textures[0]
            channels = model.tex_nchannel[t]
            size = model.tex_height[t] * model.tex_width[t] * channels
            start = model.tex_adr[t]
            colours[geom] *= model.tex_data[start : start + size].reshape(-1, channels)[:, :3].mean(0) / 255.0
    return colours
