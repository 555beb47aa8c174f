"""Draws a drive with MuJoCo: what the car's six cameras see, and the scene from above.

Roads and their markings are two meshes, so that a ray caster, whose time goes with the number of shapes, is not slower
for curves. One model is compiled per road network and light; other vehicles and buildings are moved about in it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from openpi_like.driving.ego_motion import LENGTH, WIDTH, CarState
from openpi_like.driving.road_networks import Lane, Network, network
from openpi_like.driving.scenarios import BODIES, BUILDINGS, FOOTPRINTS, Building
from openpi_like.robots.sims.render import Renderer, import_mujoco, make_renderers, renderer_name

HEIGHT, FRAME_WIDTH = 48, 80  # px of the cameras' frames
OWN_COLOUR = (0.95, 0.95, 0.2)
_EYE = 1.6  # m above the road
_ABOVE = 45.0  # m, of the camera for people
_TALLEST = 24.0  # m
_HORIZON, _WALLS_AROUND = 400.0, 12  # m
_FAR_BELOW = -500.0  # m, where vehicles and buildings wait that a scene does not have
_ROAD_Z, _LINE_Z = 0.03, 0.06  # m
_LINE_WIDTH, _STRIPE, _STRIPE_GAP = 0.18, 3.0, 4.5  # m
_SPAN = 4  # points of a lane between edges of a mesh where it is straight


class _View(NamedTuple):
    """Where a camera is on the car, metres ahead and to the left; where it looks, degrees to the left; its width."""

    ahead: float
    left: float
    looks: float
    wide: float


# As on nuScenes' car, at its sides so that it does not see itself.
VIEWS = {
    "front": _View(2.0, 0.0, 0.0, 70.0),
    "front_left": _View(1.2, 0.9, 55.0, 70.0),
    "front_right": _View(1.2, -0.9, -55.0, 70.0),
    "back": _View(-2.0, 0.0, 180.0, 110.0),
    "back_left": _View(0.2, 0.9, 110.0, 70.0),
    "back_right": _View(0.2, -0.9, -110.0, 70.0),
}


class _Light(NamedTuple):
    """Colours of sky and ground, brightness of what is lit, and where it begins and ends to fade into the sky, m."""

    sky: tuple[float, float, float]
    ground: tuple[float, float, float]
    brightness: float
    fog: tuple[float, float]


_LIGHTS = {
    "day": _Light((0.55, 0.75, 0.95), (0.36, 0.5, 0.28), 1.0, (150.0, 390.0)),
    "dusk": _Light((0.45, 0.3, 0.4), (0.16, 0.18, 0.14), 0.5, (100.0, 390.0)),
    "fog": _Light((0.72, 0.74, 0.76), (0.5, 0.55, 0.48), 0.85, (15.0, 75.0)),
}
_WALLS = ((0.62, 0.42, 0.34), (0.75, 0.7, 0.6), (0.5, 0.52, 0.56), (0.68, 0.6, 0.45))


class StreetScene:
    """One road network in one light, drawn in the thread that made it."""

    def __init__(self, roads: str, light: str) -> None:
        mujoco = import_mujoco()
        self._mujoco = mujoco
        self.model = mujoco.MjModel.from_xml_string(_xml(network(roads), _LIGHTS[light]))
        self.data = mujoco.MjData(self.model)
        self._views: dict[str, Renderer] = {}
        self._above: dict[int, Renderer] = {}

    def place_buildings(self, buildings: Sequence[Building]) -> None:
        """Puts up those of an episode."""
        for i in range(BUILDINGS):
            if i < len(buildings):
                b = buildings[i]
                # All boxes are equally tall: they go into the ground.
                self._put(f"building {i}", b.x, b.y, b.height - _TALLEST / 2, b.heading)
            else:
                self._put(f"building {i}", 0.0, 0.0, _FAR_BELOW, 0.0)

    def place(self, car: CarState, slots: Sequence[int], poses: Float[np.ndarray, "N 4"]) -> None:
        """Moves the car and the others: numbers of `BODIES`, and x, y, heading, speed of each."""
        self._put("car", car.x, car.y, 0.0, car.heading)
        # The ray caster has a sky of its own.
        self._put("sky", car.x, car.y, _FAR_BELOW if renderer_name() == "raycast" else 0.0, 0.0)
        there = dict(zip(slots, poses, strict=True))
        for i in range(len(BODIES)):
            if i in there:
                x, y, heading, _ = there[i].tolist()
                self._put(f"vehicle {i}", x, y, 0.0, heading)
            else:
                self._put(f"vehicle {i}", 0.0, 0.0, _FAR_BELOW, 0.0)
        self._mujoco.mj_kinematics(self.model, self.data)
        self._mujoco.mj_camlight(self.model, self.data)

    def views(self) -> dict[str, UInt8[np.ndarray, "48 80 3"]]:
        """Returns what the six cameras see."""
        if not self._views:
            made = make_renderers(self.model, HEIGHT, FRAME_WIDTH, tuple(VIEWS), fog=True)
            self._views = dict(zip(VIEWS, made, strict=True))
        return {name: renderer.render(self.data) for name, renderer in self._views.items()}

    def above(self, size: int) -> UInt8[np.ndarray, "size size 3"]:
        """Returns the scene from above, where the car drives up in the picture."""
        if size not in self._above:
            (self._above[size],) = make_renderers(self.model, size, size, ("above",))
        return self._above[size].render(self.data)

    def _put(self, body: str, x: float, y: float, z: float, heading: float) -> None:
        index = self.model.body(body).mocapid[0]
        self.data.mocap_pos[index] = (x, y, z)
        self.data.mocap_quat[index] = (math.cos(heading / 2), 0.0, 0.0, math.sin(heading / 2))


def _xml(net: Network, light: _Light) -> str:
    b = light.brightness
    asphalt, lines = _mesh_xml("asphalt", _asphalt(net)), _mesh_xml("lines", _lines(net))
    sky = _rgb(light.sky)
    # OpenGL leaves what nothing covers as it was, and MuJoCo's own sky is not drawn by every driver: walls all around,
    # so far away that they have faded.
    walls = "".join(
        f'<geom type="box" pos="{_HORIZON * math.cos(a)} {_HORIZON * math.sin(a)} 0" euler="0 0 {math.degrees(a)}" '
        f'size="1 {_HORIZON * math.tan(math.pi / _WALLS_AROUND) + 2} {_HORIZON}" rgba="{sky} 1"/>'
        for a in (2 * math.pi * k / _WALLS_AROUND for k in range(_WALLS_AROUND))
    )
    bodies = [_vehicle_xml(f"vehicle {i}", (v.length, v.width, v.height), v.colour, b) for i, v in enumerate(BODIES)]
    houses = [
        f'<body name="building {i}" mocap="true"><geom type="box" size="{w / 2} {d / 2} {_TALLEST / 2}" '
        f'rgba="{_rgb(_WALLS[i % len(_WALLS)], b)} 1"/></body>'
        for i in range(BUILDINGS)
        for w, d in (FOOTPRINTS[i % len(FOOTPRINTS)],)
    ]
    cameras = [_camera_xml(name, view) for name, view in VIEWS.items()]
    return f"""<mujoco>
  <statistic center="0 0 0" extent="100"/>
  <visual>
    <map znear="0.003" zfar="6" fogstart="{light.fog[0] / 100}" fogend="{light.fog[1] / 100}"/>
    <rgba fog="{sky} 1"/>
    <headlight ambient="{_rgb((0.55, 0.55, 0.55), b)}" diffuse="{_rgb((0.25, 0.25, 0.25), b)}" specular="0 0 0"/>
  </visual>
  <asset>
    {asphalt}{lines}
  </asset>
  <worldbody>
    <light directional="true" dir="-0.3 -0.2 -1" diffuse="{_rgb((0.35, 0.35, 0.35), b)}" specular="0 0 0"/>
    <geom type="plane" size="2000 2000 1" rgba="{_rgb(light.ground)} 1"/>
    <geom type="mesh" mesh="asphalt" contype="0" conaffinity="0" rgba="{_rgb((0.33, 0.33, 0.35), b)} 1"/>
    <geom type="mesh" mesh="lines" contype="0" conaffinity="0" rgba="{_rgb((0.98, 0.98, 0.98), b)} 1"/>
    {_vehicle_xml("car", (LENGTH, WIDTH, 1.5), OWN_COLOUR, b, "".join(cameras))}
    {"".join(bodies)}{"".join(houses)}<body name="sky" mocap="true">{walls}</body>
  </worldbody>
</mujoco>"""


def _rgb(colour: Sequence[float], factor: float = 1.0) -> str:
    return " ".join(f"{c * factor:.3f}" for c in colour)


def _vehicle_xml(
    name: str, size: tuple[float, float, float], colour: Sequence[float], brightness: float, inside: str = ""
) -> str:
    """A lower and an upper box; lights tell front from back."""
    length, width, height = size
    low = 0.55 * height
    geoms = [
        (0.0, 0.2 + low / 2, length / 2, width / 2, low / 2, _rgb(colour, brightness)),
        (-0.08 * length, (low + height) / 2 + 0.1, 0.28 * length, 0.42 * width, (height - low) / 2 + 0.1,
         _rgb([0.35 * c + 0.1 for c in colour], brightness)),
        (length / 2, 0.7, 0.04, 0.4 * width, 0.12, "1 1 0.85"),
        (-length / 2, 0.8, 0.04, 0.4 * width, 0.12, "0.9 0.05 0.05"),
    ]  # fmt: skip
    boxes = "".join(
        f'<geom type="box" pos="{x} 0 {z}" size="{a} {b} {c}" contype="0" conaffinity="0" rgba="{rgb} 1"/>'
        for x, z, a, b, c, rgb in geoms
    )
    return f'<body name="{name}" mocap="true">{boxes}{inside}</body>'


def _camera_xml(name: str, view: _View) -> str:
    """A MuJoCo camera looks along its -z axis, x to the right; those of the car look level, a little down."""
    c, s = math.cos(math.radians(view.looks)), math.sin(math.radians(view.looks))
    fovy = math.degrees(2 * math.atan(math.tan(math.radians(view.wide) / 2) * HEIGHT / FRAME_WIDTH))
    down = 0.06
    up = (down * c, down * s, 1.0)
    pose = f'pos="{view.ahead} {view.left} {_EYE}" xyaxes="{s} {-c} 0 {up[0]} {up[1]} {up[2]}"'
    above = f'<camera name="above" pos="8 0 {_ABOVE}" xyaxes="0 -1 0 1 0 0" fovy="55"/>' if name == "front" else ""
    return f'<camera name="{name}" {pose} fovy="{fovy}"/>{above}'


def _mesh_xml(name: str, strips: list[np.ndarray]) -> str:
    """Strips, (N, 2, 3) left and right edges, as one mesh that is seen from above. `shell`: it has no volume."""
    vertices, faces, count = [], [], 0
    for strip in strips:
        vertices.append(strip.reshape(-1, 3))
        for k in range(len(strip) - 1):
            a, b, c, d = (count + 2 * k + j for j in range(4))  # left, right, next left, next right
            faces += [(a, b, d), (a, d, c)]
        count += 2 * len(strip)
    vertex = " ".join(f"{v:.3f}" for v in np.concatenate(vertices).ravel())
    face = " ".join(str(i) for f in faces for i in f)
    return f'<mesh name="{name}" inertia="shell" vertex="{vertex}" face="{face}"/>'


def _strip(xy: np.ndarray, left: float, right: float, z: float) -> np.ndarray:
    """The strip between two distances to the left of a polyline."""
    steps = np.gradient(xy, axis=0)
    normal = np.stack([-steps[:, 1], steps[:, 0]], axis=1) / np.linalg.norm(steps, axis=1, keepdims=True)
    edges = np.stack([xy + left * normal, xy + right * normal], axis=1)
    return np.concatenate([edges, np.full((len(xy), 2, 1), z)], axis=-1)


def _thinned(xy: np.ndarray) -> np.ndarray:
    """Fewer points where it is straight."""
    chord = xy[-1] - xy[0]
    off = np.abs(chord[0] * (xy[:, 1] - xy[0, 1]) - chord[1] * (xy[:, 0] - xy[0, 0])) / max(np.hypot(*chord), 1e-6)
    if off.max() < 0.01:
        return np.linspace(xy[0], xy[-1], max(2, len(xy) // 40))
    keep = np.unique([*range(0, len(xy), _SPAN // 2), len(xy) - 1])
    return xy[keep]


def _asphalt(net: Network) -> list[np.ndarray]:
    """Lanes, and what joins them along paths, each a little higher or lower than the next where they overlap."""
    middles = [(lane.xy, lane.width) for lane in net.lanes]
    middles += [(path.xy[path.limit < net.top - 0.1], net.lanes[0].width) for path in net.paths.values()]
    return [
        _strip(_thinned(xy), width / 2 + 0.1, -width / 2 - 0.1, _ROAD_Z)
        for xy, width in middles
        if len(xy) > 4 and np.hypot(*np.diff(xy, axis=0).T).max() < 2.0
    ]


def _lines(net: Network) -> list[np.ndarray]:
    return [strip for lane in net.lanes for strip in _lines_of(lane)]


def _lines_of(lane: Lane) -> list[np.ndarray]:
    found = []
    for kind, at in ((lane.left, lane.width / 2), (lane.right, -lane.width / 2)):
        left, right = at + _LINE_WIDTH / 2, at - _LINE_WIDTH / 2
        if kind == "continuous":
            found.append(_strip(_thinned(lane.xy), left, right, _LINE_Z))
        elif kind == "striped":
            along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(lane.xy, axis=0).T))])
            for begin in np.arange(0.0, along[-1] - _STRIPE, _STRIPE + _STRIPE_GAP):
                at_s = np.linspace(begin, begin + _STRIPE, 3)
                xy = np.stack([np.interp(at_s, along, lane.xy[:, k]) for k in (0, 1)], axis=1)
                found.append(_strip(xy, left, right, _LINE_Z))
    return found
