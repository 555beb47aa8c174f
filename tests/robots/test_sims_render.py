"""Renderers: geometry against a scene worked out by hand, agreement with OpenGL, and the choice between them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from openpi_like.robots.sims import render
from openpi_like.robots.sims.render import GLRenderer, aim, make_renderer, renderer_name

mujoco = pytest.importorskip("mujoco")
RayCaster = pytest.importorskip("openpi_like.robots.sims.raycast").RayCaster

REPOSITORY = Path(__file__).resolve().parents[2]
SCENE = """
<mujoco>
  <asset>
    <texture name="checks" type="2d" builtin="checker" rgb1="1 0 0" rgb2="0 0 1" width="64" height="64"/>
    <material name="checks" texture="checks" rgba="1 1 1 1"/>
    <material name="plain" rgba="0 1 0 1"/>
  </asset>
  <worldbody>
    <light pos="0 0 5" dir="0 0 -1"/>
    <geom name="floor" type="plane" size="5 5 .1" rgba=".2 .2 .2 1"/>
    <geom name="ball" type="sphere" size=".2" pos="0 0 .2" rgba="1 0 0 1"/>
    <geom name="hidden" type="sphere" size=".5" pos="0 0 .5" rgba="1 1 1 1" group="3"/>
    <geom name="green" type="box" size=".1 .1 .01" pos=".6 0 .01" material="plain"/>
    <geom name="checked" type="box" size=".1 .1 .01" pos="-.6 0 .01" material="checks"/>
    <site name="goal" pos="0 .6 .05" size=".05" rgba="1 1 0 1"/>
    <site name="invisible" pos="0 -.6 .05" size=".05" rgba="1 1 0 0"/>
    <camera name="down" pos="0 0 2" fovy="53.130102"/>
    <camera name="level" pos="0 -3 .5" xyaxes="1 0 0 0 0 1"/>
  </worldbody>
</mujoco>
"""


@pytest.fixture(scope="module")
def scene():
    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


def test_ray_caster_draws_what_geometry_says(scene):
    model, data = scene
    # tan(53.13 / 2) = 0.5: at 2 m the view is 2 m wide, 40 pixels per metre; x to the right, y up.
    image = RayCaster(model, 80, 80, "down").render(data).astype(int)
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    ball = (red > 80) & (green == 0) & (blue == 0)
    rows, columns = np.nonzero(ball)
    assert abs(rows.mean() - 39.5) < 0.6
    assert abs(columns.mean() - 39.5) < 0.6
    # Its outline is seen at asin(0.2 / 1.8) from the axis: 2 m * tan of that is 0.2236 m, a disc of 251 pixels.
    assert abs(ball.sum() - 251) < 15
    box = (green > 80) & (red == 0)
    rows, columns = np.nonzero(box)
    assert abs(columns.mean() - (39.5 + 0.6 * 40)) < 1.0
    assert abs(box.sum() - 64) <= 18  # 8 x 8 pixels
    # A checker of red and blue is drawn as its mean.
    assert abs(image[40, 40 - 24, 0] - image[40, 40 - 24, 2]) <= 1
    assert image[40, 40 - 24, 0] > 60
    # The goal is where y = 0.6 is, in its own colour; an invisible site is floor.
    assert tuple(image[40 - 24, 40]) == (255, 255, 0)
    assert image[40 + 24, 40, 0] == image[40 + 24, 40, 2]


def test_ray_caster_hides_sites_behind_things(scene):
    model, data = scene
    yellow = lambda im: ((im[..., 0] == 255) & (im[..., 1] == 255)).sum()  # noqa: E731
    assert yellow(RayCaster(model, 64, 64, "level").render(data)) == 0  # the ball is before it
    assert yellow(RayCaster(model, 64, 64, "down").render(data)) > 0


def test_ray_caster_shows_sky_above_the_horizon(scene):
    model, data = scene
    image = RayCaster(model, 64, 64, "level").render(data)
    np.testing.assert_array_equal(image[0, 0], (np.array([0.7, 0.8, 0.9]) * 255).astype(np.uint8))
    assert image[-1, 0, 0] == image[-1, 0, 2]  # grey floor
    assert image.shape == (64, 64, 3)


def test_ray_caster_follows_the_camera(scene):
    model, _ = scene
    moved = mujoco.MjModel.from_xml_string(SCENE)
    aim(moved, "down", (0.6, -0.5, 2.0), (0.6, 0.0, 0.0), 20.0)
    other = mujoco.MjData(moved)
    mujoco.mj_forward(moved, other)
    image = RayCaster(moved, 32, 32, "down").render(other).astype(int)
    assert image[16, 16, 1] > 80  # the green box is in the middle
    assert image[16, 16, 0] == 0
    # Upright: the world's z axis points up in the image.
    assert other.camera("down").xmat.reshape(3, 3)[2, 1] > 0.9 * np.sin(np.arctan2(0.5, 2.0))
    with pytest.raises(KeyError, match="nowhere"):
        RayCaster(model, 8, 8, "nowhere")


DRAW = """
import sys
import numpy as np
from openpi_like.robots.sims.render import GLRenderer, import_mujoco
mujoco = import_mujoco()
model = mujoco.MjModel.from_xml_path(sys.argv[2])
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
np.save(sys.argv[3], GLRenderer(sys.argv[1], model, 80, 80, "down").render(data))
"""


@pytest.mark.parametrize("name", ["egl", "osmesa"])
def test_open_gl_and_rays_agree_on_where_things_are(scene, tmp_path, name):
    failure = render._failure(name)
    if failure is not None:
        pytest.skip(f"{name} does not work here: {failure}")
    (tmp_path / "scene.xml").write_text(SCENE)
    # In a process of its own: other tests load TensorFlow.
    command = [sys.executable, "-c", DRAW, name, str(tmp_path / "scene.xml"), str(tmp_path / "gl.npy")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""  # no complaints at exit
    gl = np.load(tmp_path / "gl.npy").astype(int)
    model, data = scene
    rays = RayCaster(model, 80, 80, "down").render(data).astype(int)
    assert gl.shape == rays.shape
    gl, rays = gl[:, 24:], rays[:, 24:]  # without the checked box, half of whose squares are red in OpenGL
    for high, low in ((0, 1), (1, 0)):  # the red ball, the green box
        masks = [(im[..., high] > im[..., low] + 60) & (im[..., 2] < 60) for im in (gl, rays)]
        in_gl, in_rays = (np.argwhere(m).mean(axis=0) for m in masks)
        np.testing.assert_allclose(in_gl, in_rays, atol=1.0)
        assert abs(masks[0].sum() - masks[1].sum()) < 0.15 * masks[1].sum() + 8


def test_open_gl_refuses_a_process_with_tensorflow(scene, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", sys)
    with pytest.raises(RuntimeError, match=r"TensorFlow is loaded.*OPENPI_LIKE_RENDERER=raycast"):
        GLRenderer("egl", scene[0], 8, 8, "down")


def test_make_renderer_draws(scene):
    model, data = scene
    renderer = make_renderer(model, 24, 32, "down")
    assert renderer.name == renderer_name()
    image = renderer.render(data)
    assert image.shape == (24, 32, 3)
    assert image.std() > 10


@pytest.fixture
def fresh_choice():
    renderer_name.cache_clear()
    yield
    renderer_name.cache_clear()


def test_choice_can_be_forced(monkeypatch, fresh_choice, scene):
    monkeypatch.setenv("OPENPI_LIKE_RENDERER", "raycast")
    assert renderer_name() == "raycast"
    model, data = scene
    assert make_renderer(model, 8, 8, "down").render(data).shape == (8, 8, 3)


def test_forced_choice_must_exist(monkeypatch, fresh_choice):
    monkeypatch.setenv("OPENPI_LIKE_RENDERER", "raycst")
    with pytest.raises(ValueError, match="OPENPI_LIKE_RENDERER='raycst' is no renderer; did you mean 'raycast'"):
        renderer_name()


def test_forced_choice_must_work(monkeypatch, fresh_choice):
    monkeypatch.setenv("OPENPI_LIKE_RENDERER", "osmesa")
    monkeypatch.setitem(render._LIBRARIES, "osmesa", "libnothing.so.0")
    with pytest.raises(RuntimeError, match=r"osmesa, which does not work.*libnothing.so.0.*unset OPENPI_LIKE_RENDERER"):
        renderer_name()


@pytest.mark.parametrize("how", ["no libraries", "crash", "hang"])
def test_choice_falls_back_to_rays(monkeypatch, fresh_choice, how):
    monkeypatch.delenv("OPENPI_LIKE_RENDERER", raising=False)
    library = "libnothing.so.0" if how == "no libraries" else "libc.so.6"
    for name in ("egl", "osmesa"):
        monkeypatch.setitem(render._LIBRARIES, name, library)

    def run(command, **options):
        if how == "hang":
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return subprocess.CompletedProcess(command, -11, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert renderer_name() == "raycast"
    reason = {"no libraries": "libnothing", "crash": "exit status -11", "hang": "no frame after"}[how]
    assert reason in str(render._failure("egl"))


def test_probe_notices_an_empty_frame(monkeypatch):
    class Blank:
        def __init__(self, *args):
            pass

        def render(self, data):
            return np.zeros((16, 16, 3), np.uint8)

    monkeypatch.setattr(render, "GLRenderer", Blank)
    with pytest.raises(RuntimeError, match="the frame does not show the ball"):
        render.probe("egl")
