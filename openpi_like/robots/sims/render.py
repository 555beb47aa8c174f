"""Chooses how MuJoCo frames are drawn: OpenGL off screen where it really works, else `RayCaster`.

The environment variable OPENPI_LIKE_RENDERER ("egl", "osmesa" or "raycast") forces one. Frames of different renderers
differ, so demonstrations record the one that drew them.
"""

import atexit
import copy
import ctypes
import functools
import importlib
import os
import subprocess
import sys
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from openpi_like.config import near_names

VARIABLE = "OPENPI_LIKE_RENDERER"
RENDERERS = ("egl", "osmesa", "raycast")
_LIBRARIES = {"egl": "libEGL.so.1", "osmesa": "libOSMesa.so.8"}
_PROBE_SECONDS = 60
_PROBE_MODEL = (
    "<mujoco><worldbody><light pos='0 0 3'/><geom type='sphere' size='.1' rgba='1 0 0 1'/>"
    "<camera name='c' pos='0 0 1'/></worldbody></mujoco>"
)


@runtime_checkable
class Renderer(Protocol):
    """Draws one camera of one MuJoCo model at one size."""

    name: str

    def render(self, data: Any) -> UInt8[np.ndarray, "height width 3"]:
        """Returns the RGB frame of the state in `data` (an `mujoco.MjData` after `mj_forward`)."""


class GLRenderer:
    """OpenGL, off screen, without shadows, reflections and multisampling: those are nine tenths of a frame's time.

    A GL context belongs to the thread that made it: build and use a renderer in one thread.
    fog: draws the model's fog.

    Raises:
        RuntimeError: this process has imported TensorFlow.
    """

    def __init__(self, name: str, model: Any, height: int, width: int, camera: str, fog: bool = False) -> None:
        if "tensorflow" in sys.modules:
            # Mesa's driver and TensorFlow each bring an LLVM: whichever comes second dies of a segmentation fault.
            raise RuntimeError(
                f"cannot draw with {name}: TensorFlow is loaded in this process, and the two crash each other; "
                f"draw in a process without TensorFlow, or set {VARIABLE}=raycast"
            )
        mujoco = import_mujoco()
        self.name = name
        self._mujoco, self._model = mujoco, model
        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        model.vis.global_.offheight, model.vis.global_.offwidth = height, width
        # The context classes are imported by name: which one `mujoco.GLContext` is was fixed when mujoco was imported.
        self._gl = importlib.import_module(f"mujoco.{name}").GLContext(width, height)
        # Before the interpreter takes the display down, or the context complains on standard error.
        atexit.register(self._gl.free)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        self._option = mujoco.MjvOption()
        self._camera = self._fixed(camera)
        self._rectangle = mujoco.MjrRect(0, 0, width, height)
        self._fog = fog

    def _fixed(self, camera: str) -> Any:
        fixed = self._mujoco.MjvCamera()
        fixed.type = self._mujoco.mjtCamera.mjCAMERA_FIXED
        fixed.fixedcamid = self._model.camera(camera).id
        return fixed

    def of(self, camera: str) -> "GLRenderer":
        """Returns a renderer of another camera that shares this one's context, which takes a while to make."""
        other = copy.copy(self)
        other._camera = self._fixed(camera)
        return other

    def render(self, data: Any) -> UInt8[np.ndarray, "height width 3"]:
        """See `Renderer.render`."""
        mujoco = self._mujoco
        self._gl.make_current()
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self._model, data, self._option, None, self._camera, everything, self._scene)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._scene.flags[mujoco.mjtRndFlag.mjRND_FOG] = self._fog
        frame = np.empty((self._rectangle.height, self._rectangle.width, 3), np.uint8)
        mujoco.mjr_render(self._rectangle, self._scene, self._context)
        mujoco.mjr_readPixels(frame, None, self._rectangle, self._context)
        return np.ascontiguousarray(frame[::-1])  # GL counts rows from the bottom


def import_mujoco() -> Any:
    """Imports mujoco without a GL backend: a MUJOCO_GL that does not work here would break the import itself."""
    if "mujoco" not in sys.modules:
        os.environ["MUJOCO_GL"] = "disabled"
    return importlib.import_module("mujoco")


def make_renderer(model: Any, height: int, width: int, camera: str) -> Renderer:
    """Returns a renderer of `camera` (a name in the MuJoCo model) at `height` x `width` pixels; see `renderer_name`."""
    name = renderer_name()
    if name == "raycast":
        import_mujoco()
        from openpi_like.robots.sims.raycast import RayCaster

        return RayCaster(model, height, width, camera)
    return GLRenderer(name, model, height, width, camera)


def make_renderers(
    model: Any, height: int, width: int, cameras: tuple[str, ...], fog: bool = False
) -> tuple[Renderer, ...]:
    """Returns a renderer for each of several cameras of one size, see `make_renderer`.

    fog: draws the model's fog; the ray caster has none.
    """
    name = renderer_name()
    if name == "raycast":
        return tuple(make_renderer(model, height, width, camera) for camera in cameras)
    first = GLRenderer(name, model, height, width, cameras[0], fog)
    return first, *(first.of(camera) for camera in cameras[1:])


def aim(
    model: Any,
    camera: str,
    position: tuple[float, float, float],
    target: tuple[float, float, float],
    fovy: float,
    body: str = "world",
) -> None:
    """Fixes `camera` to `body`, at `position` and looking at `target`, with the body's z axis up in the picture.

    Positions are metres in the body's frame; fovy is the vertical view in degrees. Do so before making a renderer.
    """
    mujoco = import_mujoco()
    index = model.camera(camera).id
    z = np.subtract(position, target)  # a MuJoCo camera looks along its -z axis
    z /= np.linalg.norm(z)
    x = np.cross([0.0, 0.0, 1.0], z)
    x /= np.linalg.norm(x)
    mujoco.mju_mat2Quat(model.cam_quat[index], np.stack([x, np.cross(z, x), z], axis=1).ravel())
    model.cam_mode[index] = mujoco.mjtCamLight.mjCAMLIGHT_FIXED
    model.cam_bodyid[index] = model.body(body).id
    model.cam_pos[index] = position
    model.cam_fovy[index] = fovy


@functools.cache
def renderer_name() -> str:
    """Returns "egl", "osmesa" or "raycast": the one forced, else the first that draws a frame, tried once.

    Raises:
        ValueError: the forced renderer is unknown.
        RuntimeError: the forced renderer does not work on this machine.
    """
    forced = os.environ.get(VARIABLE)
    if not forced:
        return next(name for name in RENDERERS if _failure(name) is None)
    if forced not in RENDERERS:
        raise ValueError(f"{VARIABLE}={forced!r} is no renderer; {near_names(forced, RENDERERS)}")
    failure = _failure(forced)
    if failure is not None:
        raise RuntimeError(
            f"{VARIABLE}={forced}, which does not work on this machine: {failure}; "
            f"install its libraries, or unset {VARIABLE} to take what works"
        )
    return forced


def _failure(name: str) -> str | None:
    """Why `name` cannot draw here, or None. GL is tried in a process of its own: it may crash."""
    if name == "raycast":
        return None
    try:
        ctypes.CDLL(_LIBRARIES[name])
    except OSError as e:
        return str(e)
    code = f"from openpi_like.robots.sims import render; render.probe({name!r})"
    command = [sys.executable, "-c", code]
    environment = {k: v for k, v in os.environ.items() if k != "PYOPENGL_PLATFORM"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no frame after {_PROBE_SECONDS} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def probe(name: str) -> None:
    """Draws a red ball on black with GL renderer `name`; run in a process of its own.

    Raises:
        RuntimeError: the frame does not show the ball.
    """
    mujoco = import_mujoco()
    model = mujoco.MjModel.from_xml_string(_PROBE_MODEL)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    frame = GLRenderer(name, model, 16, 16, "c").render(data).astype(int)
    if not frame[8, 8, 0] > frame[0, 0].max() + 50:
        raise RuntimeError(f"the frame does not show the ball: centre {frame[8, 8]}, corner {frame[0, 0]}")
