"""Robots of the Open X-Embodiment (OXE) collection: one per dataset, as published in RLDS.

Sources, where a comment does not say otherwise: the TFDS catalogue's feature descriptions, and how octo (241fb35) and
openvla (c8f03f4) read these datasets. Where these contradict each other, `oxe_disputed` says who says what, and what is
done.

Robots whose actions move a hand have one order of slots: hand (3), hand_rotation (3), gripper (1), so that the dims of
a mixture line up. One that lacks rotation or gripper has fewer dims, and what follows moves up: they are not padded
with zeros that a policy would learn. Positions are in the robot's base frame.

Rotations in model space: changes are roll, pitch, yaw. Normalised commands (unit "1"), velocities and bc_z's
differences of vectors are no rotations, and stay as they are stored. Orientations that are stored as roll, pitch, yaw
stay so too, as does LIBERO's axis-angle; all others are 6-D (the first two columns of the matrix), because a hand that
points down is about half a turn from the base frame, where angles jump.

Camera slots: "base" (and "base_1") see the scene, "wrist" (and "wrist_1") ride on the hand. No image sizes are
demanded, because copies that were resized are common.

Normalisation is by quantiles: some of these datasets have single values that are a hundred times what a robot can do (a
command of 22 m in fractal20220817_data), which would set the scale of a z-score.
"""

from openpi_like.robots.oxe_aloha import ALOHA_MOBILE, ALOHA_STATIC
from openpi_like.robots.oxe_arms import (
    BERKELEY_AUTOLAB_UR5,
    BERKELEY_FANUC,
    BRIDGE,
    BRIDGE_OXE,
    CMU_STRETCH,
    DLR_EDAN,
    DOBBE,
    JACO_PLAY,
    NYU_DOOR_OPENING,
    ROBOTURK,
    UCSD_KITCHEN,
)
from openpi_like.robots.oxe_franka import (
    AUSTIN_BUDS,
    AUSTIN_SAILOR,
    AUSTIN_SIRIUS,
    BERKELEY_CABLE_ROUTING,
    DROID,
    DROID_JOINTS,
    FMB,
    FURNITURE_BENCH,
    IAMLAB_CMU_PICKUP_INSERT,
    LIBERO,
    NYU_FRANKA_PLAY,
    STANFORD_HYDRA,
    TACO_PLAY,
    TOTO,
    UTAUSTIN_MUTEX,
    VIOLA,
)
from openpi_like.robots.oxe_google import BC_Z, FRACTAL, KUKA, LANGUAGE_TABLE
from openpi_like.robots.robot import Robot

# TFDS name -> robot
ROBOTS: dict[str, Robot] = {
    "fractal20220817_data": FRACTAL,
    "kuka": KUKA,
    "bridge_dataset": BRIDGE,
    "bridge": BRIDGE_OXE,
    "taco_play": TACO_PLAY,
    "jaco_play": JACO_PLAY,
    "berkeley_cable_routing": BERKELEY_CABLE_ROUTING,
    "roboturk": ROBOTURK,
    "nyu_door_opening_surprising_effectiveness": NYU_DOOR_OPENING,
    "viola": VIOLA,
    "berkeley_autolab_ur5": BERKELEY_AUTOLAB_UR5,
    "toto": TOTO,
    "language_table": LANGUAGE_TABLE,
    "stanford_hydra_dataset_converted_externally_to_rlds": STANFORD_HYDRA,
    "austin_buds_dataset_converted_externally_to_rlds": AUSTIN_BUDS,
    "nyu_franka_play_dataset_converted_externally_to_rlds": NYU_FRANKA_PLAY,
    "furniture_bench_dataset_converted_externally_to_rlds": FURNITURE_BENCH,
    "ucsd_kitchen_dataset_converted_externally_to_rlds": UCSD_KITCHEN,
    "austin_sailor_dataset_converted_externally_to_rlds": AUSTIN_SAILOR,
    "austin_sirius_dataset_converted_externally_to_rlds": AUSTIN_SIRIUS,
    "bc_z": BC_Z,
    "dlr_edan_shared_control_converted_externally_to_rlds": DLR_EDAN,
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": IAMLAB_CMU_PICKUP_INSERT,
    "utaustin_mutex": UTAUSTIN_MUTEX,
    "berkeley_fanuc_manipulation": BERKELEY_FANUC,
    "cmu_stretch": CMU_STRETCH,
    "dobbe": DOBBE,
    "fmb": FMB,
    "droid": DROID,
    "libero_spatial_no_noops": LIBERO,
    "libero_object_no_noops": LIBERO,
    "libero_goal_no_noops": LIBERO,
    "libero_10_no_noops": LIBERO,
    "aloha_static_dataset": ALOHA_STATIC,
    "aloha_mobile": ALOHA_MOBILE,
}

# TFDS name -> the same data with other actions, by `find_robot`'s name "oxe:DROID_JOINTS"
OTHER_ACTIONS: dict[str, Robot] = {"droid": DROID_JOINTS}
