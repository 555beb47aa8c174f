"""What the sources dispute of the datasets in `openpi_like.robots.oxe`: who says what, what is done here, and why."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Dispute:
    """One fact on which the sources disagree, or are silent. Check it on the first copy that you have."""

    about: str
    said: str
    done: str
    why: str


# TFDS name -> cameras that one source calls upside down, see `DISPUTED`; for the `upside_down` of `data.oxe.mixture`.
UPSIDE_DOWN: dict[str, tuple[str, ...]] = {
    "droid": ("wrist",),
    "berkeley_fanuc_manipulation": ("wrist",),
    "berkeley_autolab_ur5": ("wrist",),
    "fmb": ("wrist", "wrist_1"),
}
_WRISTS = Dispute(
    "which way up wrist views are",
    "openpi-cot turns them by 180 degrees; octo, openvla and openpi, which trained on them, do not",
    "as stored",
    "what released policies saw; look at data/show.py's contact sheet, and turn them with `UPSIDE_DOWN`",
)

DISPUTED: dict[str, tuple[Dispute, ...]] = {
    "droid": (_WRISTS,),
    "berkeley_autolab_ur5": (_WRISTS,),
    "taco_play": (
        Dispute(
            "gripper command",
            "catalogue: -1 is open, 1 is closed; octo and openvla: 1 is open",
            "1 is open, -1 closed",
            "CALVIN, by the same lab and in the same format, closes with -1, and the catalogue calls it open_gripper",
        ),
        Dispute(
            "gripper state",
            "catalogue: index 6 is the width, 7 the first joint; octo and openvla take 7",
            "index 6",
            "only the width can be a gripper",
        ),
        Dispute(
            "order of angles",
            "catalogue: yaw, pitch, roll for actions; octo and openvla: roll, pitch, yaw",
            "roll, pitch, yaw for the state; commands stay as stored",
            "CALVIN has Euler angles about x, y, z",
        ),
    ),
    "jaco_play": (
        Dispute(
            "pose",
            "the dataset's README: position and quaternion; octo and openvla: roll, pitch, yaw from [3:6], and the "
            "gripper from the last value, which is qw",
            "quaternion, and the two finger joints as the gripper",
            "its authors know",
        ),
    ),
    "roboturk": (
        Dispute(
            "range of the gripper command",
            "no source; octo and openvla clip to 0 .. 1 and invert",
            "0 is open, 1 closed",
            "its name is closedness; values below 0 would be reported when the dataset is opened",
        ),
    ),
    "viola": (
        Dispute(
            "range of the gripper command",
            "no source; octo and openvla clip to 0 .. 1 and invert",
            "-1 is open, 1 closed",
            "the lab's controller (deoxys) takes -1 and 1",
        ),
    ),
    "berkeley_fanuc_manipulation": (
        Dispute(
            "gripper state",
            "catalogue: gripper open status; octo and openvla invert it to get openness",
            "1 is closed",
            "octo and openvla agree, and had the videos before them; 'status' may mean either",
        ),
        Dispute(
            "gripper command",
            "octo and openvla append the state of the same step",
            "the state one step later",
            "a target that equals the state never asks for a change",
        ),
        _WRISTS,
    ),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": (
        Dispute(
            "action",
            "catalogue: position and quaternion; octo and openvla take it as a change",
            "absolute",
            "a change would not be called a position, and the quaternion fits",
        ),
    ),
    "ucsd_kitchen_dataset_converted_externally_to_rlds": (
        Dispute(
            "action",
            "catalogue: position and orientation; octo and openvla take it as a change; units are not given",
            "absolute, numbers as stored",
            "as above; quantiles do not care about units",
        ),
        Dispute("gripper command", "catalogue: open/close; octo and openvla leave it", "1 is open", "as octo"),
    ),
    "dlr_edan_shared_control_converted_externally_to_rlds": (
        Dispute(
            "action",
            "catalogue: position and angles; octo and openvla take it as a change",
            "a change",
            "the state is described by the same words, and as a target it would repeat the state",
        ),
    ),
    "cmu_stretch": (
        Dispute(
            "action",
            "catalogue: position and rotation; octo and openvla take it as a change",
            "a change",
            "the state has a position and no rotation, so a target pose was hardly recorded",
        ),
    ),
    "nyu_franka_play_dataset_converted_externally_to_rlds": (
        Dispute(
            "gripper command",
            "catalogue: none; octo and openvla clip to 0 .. 1 and call 1 open",
            "1 is open, -1 closed",
            "clipping would be needless for 0 .. 1",
        ),
    ),
    "austin_sailor_dataset_converted_externally_to_rlds": (
        Dispute("unit of actions", "catalogue: relative, no unit", "normalised", "the lab's controllers take -1 .. 1"),
    ),
    "austin_sirius_dataset_converted_externally_to_rlds": (
        Dispute(
            "state",
            "catalogue: seven joints and the gripper; octo and openvla: position and quaternion",
            "state_joint and state_gripper, which can only be read in one way",
            "needs no decision",
        ),
        Dispute(
            "action_mode",
            "it can serve as a filter of good actions; no source says which of its values are which",
            "all steps are used",
            "a wrong guess would drop the good ones; look at the values, then give a selection",
        ),
    ),
    "dobbe": (
        Dispute(
            "camera",
            "octo: wrist; openvla: the primary view",
            "wrist",
            "it sits on the gripper",
        ),
        Dispute("gripper", "octo and openvla leave it", "1 is open", "as octo"),
    ),
    "fmb": (
        Dispute(
            "gripper command",
            "the benchmark: state 0 open, 1 closed, nothing on the command; openvla leaves it as 1 open",
            "command 1 is open",
            "as openvla, which compared it with other datasets",
        ),
        Dispute(
            "channel order",
            "the benchmark's own files are BGR; openvla and the correction scripts of RT-X leave RLDS as it is",
            "RGB",
            "look at data/show.py's contact sheet",
        ),
        _WRISTS,
    ),
}
