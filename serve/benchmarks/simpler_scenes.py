"""The episodes of SimplerEnv's visual matching protocol, as tables. For simpler_env_client.py beside it.

From the scripts that made the published numbers: SimplerEnv (4ab7178), scripts/octo_bridge.sh and
scripts/rt1_*_visual_matching.sh (those for octo have the same numbers, but 501 instead of 513 simulation steps per
second for the coke can). `simpler_env.make` has the same scenes, but draws what these scripts go through, and its
`google_robot_move_near` is another version of the scene (v1, here v0).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

GOOGLE_CONTROL = (
    "arm_pd_ee_delta_pose_align_interpolate_by_planner_gripper_pd_joint_target_delta_pos_interpolate_by_planner"
)
WIDOWX_CONTROL = "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos"
BODIES = (
    None,
    "recolor_tabletop_visual_matching_1",
    "recolor_tabletop_visual_matching_2",
    "recolor_cabinet_visual_matching_1",
)
"""`urdf_version`: four colours of the Google robot, over which published rates are averaged."""
DRAWER_STANDS = {
    "a0": (0.644, -0.179, -0.03),
    "a1": (0.765, -0.182, -0.02),
    "a2": (0.889, -0.203, -0.06),
    "b0": (0.652, 0.009, 0.0),
    "b1": (0.752, 0.009, 0.0),
    "b2": (0.851, 0.035, 0.0),
    "c0": (0.665, 0.224, 0.0),
    "c1": (0.765, 0.222, -0.025),
    "c2": (0.865, 0.222, -0.025),
}
"""Where the robot stands before the cabinet: x, y (m), turn (rad); each has a background picture of its own."""


@dataclasses.dataclass(frozen=True)
class Start:
    """One initial state. build: what the environment is made with. options: what it is reset with."""

    build: dict[str, Any]
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scene:
    """A task. robot: "widowx" or "google_robot". steps: control steps of an episode. starts: by number."""

    robot: str
    steps: int
    starts: tuple[Start, ...]


def _stand(x: float, y: float, turn: float = 0.0) -> dict[str, Any]:
    """The robot's place, and its orientation w, x, y, z: half a turn about z, then `turn` about it."""
    quaternion = np.array([-math.sin(turn / 2), 0.0, 0.0, math.cos(turn / 2)])
    return {"robot_init_options": {"init_xy": np.array([x, y]), "init_rot_quat": quaternion}}


def _build(name: str, robot: str, steps: int, scene: str, picture: str, **more: Any) -> dict[str, Any]:
    google = robot.startswith("google")
    return {
        "env_name": name,
        "obs_mode": "rgbd",
        "robot": robot,
        "control_mode": GOOGLE_CONTROL if google else WIDOWX_CONTROL,
        "control_freq": 3 if google else 5,
        "sim_freq": 513 if google else 500,
        "max_episode_steps": steps,
        "scene_name": scene,
        "camera_cfgs": {"add_segmentation": True},
        "rgb_overlay_path": f"real_inpainting/{picture}.png",  # below the package's folder of assets
        **more,
    }


def _widowx(name: str, steps: int = 60, sink: bool = False) -> Scene:
    """24 layouts, by `episode_id`."""
    about = ("bridge_table_1_v2", "bridge_sink") if sink else ("bridge_table_1_v1", "bridge_real_eval_1")
    build = _build(name, "widowx_sink_camera_setup" if sink else "widowx", steps, *about)
    stand = _stand(0.127, 0.06) if sink else _stand(0.147, 0.028)
    starts = tuple(Start(build, {**stand, "obj_init_options": {"episode_id": i}}) for i in range(24))
    return Scene("widowx", steps, starts)


def _coke_can() -> Scene:
    """4 bodies x 3 ways in which the can lies x 25 places."""
    places = [(x, y) for x in np.linspace(-0.35, -0.12, 5) for y in np.linspace(-0.02, 0.42, 5)]
    about = ("GraspSingleOpenedCokeCanInScene-v0", "google_robot_static", 80, "google_pick_coke_can_1_v4")
    starts = [
        Start(
            {**_build(*about, "google_coke_can_real_eval_1", urdf_version=body), way: True},
            {**_stand(0.35, 0.20), "obj_init_options": {"init_xy": np.array(place)}},
        )
        for body in BODIES
        for way in ("lr_switch", "upright", "laid_vertically")
        for place in places
    ]
    return Scene("google_robot", 80, tuple(starts))


def _move_near() -> Scene:
    """4 bodies x 60 layouts."""
    about = ("MoveNearGoogleBakedTexInScene-v0", "google_robot_static", 80, "google_pick_coke_can_1_v4")
    starts = [
        Start(
            _build(*about, "google_move_near_real_eval_1", urdf_version=body),
            {**_stand(0.35, 0.21, -0.09), "obj_init_options": {"episode_id": i}},
        )
        for body in BODIES
        for i in range(60)
    ]
    return Scene("google_robot", 80, tuple(starts))


def _drawer(names: tuple[str, ...], steps: int, stands: tuple[str, ...], places: Any, **more: Any) -> Scene:
    """4 bodies x drawers x stands x places of an object. Ray traced: policies see depth by the shadows."""
    cabinet = {"shader_dir": "rt", "station_name": "mk_station_recolor", "light_mode": "simple"}
    starts = [
        Start(
            _build(
                *(name, "google_robot_static", steps, "dummy_drawer", f"open_drawer_{stand}"),
                **{**cabinet, "disable_bad_material": True, "urdf_version": body, **more},
            ),
            {**_stand(*DRAWER_STANDS[stand]), "obj_init_options": {"init_xy": np.array(place)}},
        )
        for body in BODIES
        for name in names
        for stand in stands
        for place in places
    ]
    return Scene("google_robot", steps, tuple(starts))


def _drawers(verb: str) -> Scene:
    names = tuple(f"{verb}{which}DrawerCustomInScene-v0" for which in ("Top", "Middle", "Bottom"))
    return _drawer(names, 113, tuple(DRAWER_STANDS), [(0.0, 0.0)])


def _apple() -> Scene:
    places = [(x, y) for x in np.linspace(-0.08, -0.02, 3) for y in np.linspace(-0.02, 0.08, 3)]
    name = "PlaceIntoClosedTopDrawerCustomInScene-v0"
    return _drawer((name,), 200, ("a0", "b0", "c0"), places, model_ids="baked_apple_v2")


SCENES = {
    "widowx_spoon_on_towel": _widowx("PutSpoonOnTableClothInScene-v0"),
    "widowx_carrot_on_plate": _widowx("PutCarrotOnPlateInScene-v0"),
    "widowx_stack_cube": _widowx("StackGreenCubeOnYellowCubeBakedTexInScene-v0"),
    "widowx_put_eggplant_in_basket": _widowx("PutEggplantInBasketScene-v0", 120, sink=True),
    "google_robot_pick_coke_can": _coke_can(),
    "google_robot_move_near_v0": _move_near(),
    "google_robot_open_drawer": _drawers("Open"),
    "google_robot_close_drawer": _drawers("Close"),
    "google_robot_place_apple_in_closed_top_drawer": _apple(),
}
"""By the names of `simpler_env.ENVIRONMENTS`."""
