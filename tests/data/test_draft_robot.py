"""Drafts of robots: what they take from a dataset, that they are refused as they are, and that completed ones work."""

import io
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from openpi_like.data.dataset import open_dataset
from openpi_like.data.episode_sample import Sample
from openpi_like.data.index import open_index
from openpi_like.data.schema import DatasetError, Feature, Schema
from openpi_like.robots import Robot
from openpi_like.robots.find import find_robot
from tests.conftest import REPOSITORY
from tests.data.toy_lerobot import FRONT, HEIGHT, LENGTHS, WIDTH, WRIST, write_v30

PROGRAM = REPOSITORY / "data" / "draft_robot.py"


@pytest.fixture(scope="module")
def program() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(PROGRAM)))


def load(path: Path) -> Robot:
    return find_robot(str(path))


def completed(text: str) -> str:
    for what, value in (("control_hz", 10.0), ("action_horizon", 5), ("execute_steps", 2)):
        text = text.replace(f"{what}={type(value)()}", f"{what}={value}")
    text = text.replace('open="?", closed="?"', "open=1.0, closed=0.0").replace('rotation="?"', 'rotation="rpy"')
    return text.replace('unit="?"', 'unit="1"').replace('command="?"', 'command="delta"')


def test_draft_of_lerobot_data(program: SimpleNamespace, tmp_path: Path) -> None:
    """Names, rate and chunks are known; what is left to say are units, the gripper's ends and what actions command."""
    directory = write_v30(tmp_path / "toy", {FRONT: "video", WRIST: "image"})
    out, shown = tmp_path / "so_arm.py", io.StringIO()
    program.main(program.Args(str(directory), out), Console(file=shown, width=300))
    text = out.read_text()
    with pytest.raises(ValueError, match='fill in every "\\?"'):
        load(out)
    assert 'fill in 5 "?" and no 0' in shown.getvalue()
    out.write_text(completed(text).replace('"delta"', '"absolute"'))
    robot = load(out)
    assert [(c.name, c.key, c.height, c.width) for c in robot.cameras] == [
        ("base", FRONT, HEIGHT, WIDTH), ("wrist", WRIST, HEIGHT, WIDTH)
    ]  # fmt: skip
    assert [(f.name, f.names) for f in robot.state] == [("state", ("waist", "elbow")), ("gripper", ("gripper",))]
    assert (robot.control_hz, robot.action_horizon, robot.execute_steps) == (20.0, 20, 10)
    assert robot.language_key == "task"
    assert len(open_dataset(directory, robot, "train")) == sum(LENGTHS)


def test_a_pose_is_cut_by_the_names_of_its_dims(program: SimpleNamespace, tmp_path: Path) -> None:
    """Blanks are all that is left to fill in: position, rotation and gripper are fields already."""
    state = ("x", "y", "z", "qw", "qx", "qy", "qz", "gripper")
    action = ("dx.pos", "ee_x", "ee_y", "ee_z", "roll", "pitch", "yaw", "gripper")
    features = [
        Feature("observation.image", "image", "uint8", (64, 64, 3)),
        Feature("observation.state", "numeric", "float32", (8,), names=state),
        Feature("action", "numeric", "float32", (8,), names=action),
    ]
    out = tmp_path / "posed.py"
    text = program.draft("posed", "nowhere", Schema({f.key: f for f in features}, {}), None)
    out.write_text(completed(text).replace("default_prompt=None", 'default_prompt="go"'))
    robot = load(out)
    assert [(f.name, f.size, f.rotation, f.model_size) for f in robot.state] == [
        ("position", 3, None, 3), ("rotation", 4, "quaternion_wxyz", 6), ("gripper", 1, None, 1)
    ]  # fmt: skip
    assert [(f.name, f.size, f.rotation) for f in robot.action] == [
        ("action", 1, None), ("position", 3, None), ("rotation", 3, "rpy"), ("gripper", 1, None)
    ]  # fmt: skip
    assert "relative_to" not in text


def test_draft_to_check(program: SimpleNamespace, toy: Path, tmp_path: Path) -> None:
    out, shown = tmp_path / "toy_robot.py", io.StringIO()
    program.main(program.Args(str(toy), out), Console(file=shown, width=300))
    text = out.read_text()
    assert "drafted from toy_arm/1.0.0 split 'train'" in text
    assert text in shown.getvalue()
    count = len(re.findall(r'=(?:"\?")', text))
    assert f'fill in {count} "?" and three 0' in shown.getvalue()
    # `state` is all of the state, so the other observations are left out by name
    assert "# not used: observation/joints, float64 of shape (3,)" in text
    out.write_text(completed(text))
    robot = load(out)
    assert [(c.name, c.key, c.height, c.width) for c in robot.cameras] == [
        ("base", "observation/image", 12, 16),
        ("wrist", "observation/wrist", None, None),
    ]
    assert [(f.key, f.start, f.size) for f in robot.state] == [("observation/state", 0, 4)]
    assert [(f.key, f.start, f.size) for f in robot.action] == [("action", 0, 3)]
    assert robot.language_key == "language_instruction"
    # The first command that is printed is run.
    printed = re.findall(r"^  python (\w+/\w+\.py .*)$", shown.getvalue(), re.MULTILINE)
    assert [line.split()[0] for line in printed] == ["data/check_robot.py", "train/finetune.py"]
    command = [sys.executable, *printed[0].split()]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "robot toy_robot on toy_arm/1.0.0" in done.stdout
    assert (tmp_path / "toy_robot.html").is_file()
    assert len(open_dataset(toy, robot, "train")) > 0


def test_uncompleted_drafts_are_refused(program: SimpleNamespace, toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "half_robot.py"
    program.main(program.Args(str(toy), out), Console(file=io.StringIO()))
    draft = out.read_text()
    lines = {i: line for i, line in enumerate(draft.splitlines(), 1) if '="?"' in line}
    with pytest.raises(ValueError, match="fill in every") as refused:
        load(out)
    # All of them at once, with what may stand there, of those alone that are asked for
    blank = re.compile(r'(\w+)="\?"')
    left = [f"line {i}: {', '.join(blank.findall(line))}" for i, line in lines.items()]
    assert str(refused.value).splitlines()[1 : len(left) + 2] == [*(f"  {line}" for line in left), "expected"]
    assert "unit: one of m, mm, cm" in str(refused.value)
    assert "rotation: " not in str(refused.value)
    ready = completed(draft)
    for change, message in (
        (('command="delta"', 'command="?"'), r"half_robot.py: fill in every \"\?\":\n  line \d+: command\nexpected"),
        (("control_hz=10.0", "control_hz=0.0"), "control_hz 0.0, expected > 0"),
        (("action_horizon=5", "action_horizon=0"), "expected 1 .. action_horizon 0"),
        (("execute_steps=2", "execute_steps=0"), "execute_steps 0, expected 1 .. action_horizon 5"),
    ):
        assert change[0] in ready
        out.write_text(ready.replace(*change, 1))
        with pytest.raises(ValueError, match=message):
            load(out)


def test_schema_alone_is_enough(program: SimpleNamespace, toy: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(toy / "features.json", tmp_path / "data")
    out, shown = tmp_path / "bare_robot.py", io.StringIO()
    program.main(program.Args(str(tmp_path / "data"), out), Console(file=shown, width=300))
    assert "records cannot be read, so the draft has no numbers: " in shown.getvalue()
    out.write_text(completed(out.read_text()))
    assert load(out).robot_state_size == 4
    with pytest.raises(DatasetError, match=r"dataset_info\.json"):  # asked for by name, it must be there
        program.main(
            program.Args(str(tmp_path / "data"), tmp_path / "other_robot.py", split="train"), Console(file=shown)
        )


def feature(key: str, kind: str = "numeric", dtype: str = "float32", shape: tuple[int | None, ...] = ()) -> Feature:
    return Feature(key, kind, dtype, shape)


def test_odd_schemas(program: SimpleNamespace, tmp_path: Path) -> None:
    """Dict actions, scalars, sided wrists, depth, names with slashes and quotes, and no instruction."""
    image = (256, 256, 3)
    features = [
        feature("action/gripper_closedness_action", shape=(1,)),
        feature("action/terminate_episode", shape=(3,)),
        feature("action/world_vector", shape=(3,)),
        feature("observation/depth", "image", "float32", (64, 64, 1)),
        feature("observation/embedding", shape=(512,)),
        feature('observation/odd"key/pose', shape=(7,)),
        feature("observation/height"),
        feature("observation/image", "image", "uint8", image),
        feature("observation/image_1", "image", "uint8", image),
        feature("observation/left_wrist_image", "image", "uint8", image),
        feature("observation/right_wrist_image", "image", "uint8", image),
        feature("observation/wrist_image", "image", "uint8", image),
    ]
    text = program.draft("odd_robot", "nowhere", Schema({f.key: f for f in features}, {}), None)
    out = tmp_path / "odd_robot.py"
    out.write_text(completed(text))
    with pytest.raises(ValueError, match="language_key and default_prompt are both None"):
        load(out)
    out.write_text(completed(text).replace("default_prompt=None", 'default_prompt="go"'))
    robot = load(out)
    assert [c.name for c in robot.cameras] == ["base", "base_1", "wrist_left", "wrist_right", "wrist"]
    assert [(f.name, f.key, f.size) for f in robot.state] == [
        ("pose", 'observation/odd"key/pose', 7),
        ("height", "observation/height", 1),
    ]
    assert [(f.name, f.key) for f in robot.action] == [
        ("gripper", "action/gripper_closedness_action"),
        ("world_vector", "action/world_vector"),
    ]
    for left_out in ("observation/depth: float32", "not used: observation/embedding", "not used: action/terminate"):
        assert left_out in text
    assert text.count('gripper=Gripper(open="?", closed="?")') == 1


@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_a_plain_state_is_in_the_draft(program: SimpleNamespace, tmp_path: Path, dtype: str) -> None:
    """As openpi's conversions of LIBERO call their fields; of numbers of motor steps, too."""
    features = [
        feature("actions", shape=(7,)),
        feature("image", "image", "uint8", (256, 256, 3)),
        feature("joint_position", shape=(7,)),
        feature("state", dtype=dtype, shape=(8,)),
        feature("task", "text", "string"),
    ]
    text = program.draft("plain_robot", "nowhere", Schema({f.key: f for f in features}, {}), None)
    out = tmp_path / "plain_robot.py"
    out.write_text(completed(text))
    assert [(f.key, f.size) for f in load(out).state] == [("state", 8)]
    assert [(f.key, f.size) for f in load(out).action] == [("actions", 7)]
    assert "# not used: joint_position, float32 of shape (7,): state has all of the state, as a rule" in text


def test_plain_names_without_a_whole_state(program: SimpleNamespace) -> None:
    """As in DROID for openpi; fields in the group of observations go before them."""
    plain = [feature("actions", shape=(8,)), feature("gripper_position", shape=(1,))]
    plain.append(feature("joint_position", shape=(7,)))
    used, others = program.numeric(plain, "state")
    assert ([f.key for f in used], others) == (["gripper_position", "joint_position"], {})
    used, others = program.numeric([*plain, feature("obs/eef", shape=(3,))], "state")
    assert [f.key for f in used] == ["obs/eef"]
    assert others == dict.fromkeys(("gripper_position", "joint_position"), "not among what is observed")


def test_every_field_of_a_step_is_in_the_draft(program: SimpleNamespace, toy: Path) -> None:
    """Or named as left out, with the reason; so of features of every kind."""
    features = [
        feature("action", shape=(7,)),
        feature("is_first", dtype="bool"),
        feature("lidar", "other", "Sequence", (None,)),
        feature("observation/flag", dtype="bool"),
        feature("observation/ticks", dtype="int32", shape=(6,)),
        feature("observation/cloud", shape=(100, 3)),
        feature("observation/nothing", shape=(0,)),
        feature("observation/pose", shape=(7,)),
        feature("reward"),
        feature("language_instruction", "text", "string"),
        feature("language_instruction_2", "text", "string"),
    ]
    text = program.draft("all_robot", "nowhere", Schema({f.key: f for f in features}, {}), None)
    for line in (
        "is_first, bool of shape (): by its name neither state nor action",
        "lidar, Sequence of shape (None,): cannot be read",
        "observation/flag, bool of shape (): no floats: as a rule a flag or a count",
        "observation/ticks, int32 of shape (6,): no floats: as a rule a flag or a count",
        "observation/cloud, float32 of shape (100, 3): has 300 values, expected 1 to 64",
        "observation/nothing, float32 of shape (0,): has 0 values, expected 1 to 64",
        "reward, float32 of shape (): by its name neither state nor action",
        "language_instruction_2, a text",
    ):
        assert f"# not used: {line}\n" in text
    assert text.count("# not used: ") == 8
    index = open_index(toy, "train")
    text = program.draft("toy_robot", "toy", index.schema, Sample.take(index))
    assert "# not used: embedding: it has 300 values, more than 256\n" in text
    assert [key for key in index.schema.steps if key not in text] == []


def test_draft_of_bridge(program: SimpleNamespace, bridge: Path, tmp_path: Path) -> None:
    """The gripper is cut out, the camera that was absent is told, and that the dataset is known."""
    out, shown = tmp_path / "bridge_robot.py", io.StringIO()
    program.main(program.Args(str(bridge), out, index_dir=tmp_path / "index"), Console(file=shown, width=300))
    text = out.read_text()
    assert text.count("bytes: a camera that was absent?") == 1
    assert re.search(r"# every image has 691 bytes: a camera .*\n +Camera\(.*image_3", text)
    assert "bridge_dataset is in openpi_like/robots/oxe.py: --robot bridge_dataset may be" in shown.getvalue()
    out.write_text(completed(text))
    assert [(f.name, f.start, f.size) for f in load(out).action] == [("action", 0, 6), ("gripper", 6, 1)]


def test_refusals(program: SimpleNamespace, toy: Path, tmp_path: Path) -> None:
    (tmp_path / "there.py").touch()
    for name, message in (
        ("there.py", "there.py exists; delete it"),
        ("my-robot.py", "expected a Python file that can be imported, like my_robot.py"),
        ("class.py", "expected a Python file that can be imported"),
        ("robot.txt", "expected a Python file"),
        ("queue.py", "queue is a module of Python"),
        ("nowhere/robot_a.py", "there is no directory .*nowhere; make it first"),
    ):
        with pytest.raises(ValueError, match=message):
            program.Args(str(toy), tmp_path / name)
    with pytest.raises(OSError, match="nowhere"):
        program.main(program.Args(str(tmp_path / "nowhere"), tmp_path / "new_robot.py"), Console(file=io.StringIO()))
    assert not (tmp_path / "new_robot.py").exists()
    command = [sys.executable, str(PROGRAM), str(tmp_path), "--out", str(tmp_path / "new_robot.py")]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "expected a TFDS directory, which has features.json; there: ['there.py']" in failed.stderr
    assert "Traceback" not in failed.stderr
