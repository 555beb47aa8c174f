"""Runs as objects: JSON that restores the same object, overrides that refuse what they do not know."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from openpi_like.config import from_json, load_run, override, to_json, trust
from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.data.selection import Selection
from openpi_like.robots.sawyer import SAWYER
from openpi_like.robots.widowx import WIDOWX
from openpi_like.train.optimizer import OptimizerConfig


@pytest.mark.parametrize("robot", [SAWYER, WIDOWX], ids=lambda r: r.name)
def test_json_restores_the_same_object(robot):
    assert from_json(json.loads(json.dumps(to_json(robot)))) == robot


@pytest.mark.parametrize(
    ("name", "now", "then"),
    [
        ("DataConfig", "openpi_like.data.config:", "openpi_like.data.loader:"),
        ("MixtureEntry", "openpi_like.data.config:", "openpi_like.data.loader:"),
        ("DataConfig", "openpi_like.data.selection:", "openpi_like.data.dataset:"),
        ("Selection", "openpi_like.data.selection:", "openpi_like.data.dataset:"),
    ],
)
def test_json_written_before_a_class_moved_is_read(name, now, then):
    selection = Selection(success="success", skip_first=1)
    entry = MixtureEntry(robot=SAWYER, path="data", selection=selection)
    of = {"MixtureEntry": entry, "DataConfig": DataConfig((entry,)), "Selection": selection}[name]
    text = json.dumps(to_json(of)).replace(now, then)
    assert then in text
    assert from_json(json.loads(text)) == of


def test_trust_is_given_to_whole_packages():
    with pytest.raises(ValueError, match=r"\['my.policies', ''\], expected top-level names"):
        trust("fine", "my.policies", "")


@pytest.mark.parametrize("named", ["mine, yours", " mine,yours,"])
def test_trust_in_the_environment(named):
    shown = "from openpi_like import config; print(*sorted(config._trusted))"
    done = subprocess.run(
        [sys.executable, "-c", shown], env=os.environ | {"OPENPI_LIKE_TRUST": named}, stdout=subprocess.PIPE, check=True
    )
    assert done.stdout.split() == [b"mine", b"openpi_like", b"yours"]


def test_json_names_fields_of_another_version():
    data = to_json(OptimizerConfig())
    data["peak_learning_rate"] = data.pop("peak_lr")
    with pytest.raises(ValueError, match=r"unknown \['peak_learning_rate'\], missing \[\]"):
        from_json(data)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("os:system", "outside openpi_like"),
        ("openpi_like.robots:Rabbit", "does not exist"),
        ("openpi_like.config:to_json", "not a dataclass"),
        ("openpi_likeness.evil:Robot", "outside openpi_like"),
    ],
)
def test_json_loads_only_our_dataclasses(name, message):
    with pytest.raises(ValueError, match=message):
        from_json({"__class__": name})


def test_json_refuses_foreign_objects():
    @dataclasses.dataclass
    class Foreign:
        x: int = 1

    with pytest.raises(TypeError, match="only dataclasses of openpi_like"):
        to_json(Foreign())
    with pytest.raises(TypeError, match="cannot write set"):
        to_json({"x": {1, 2}})


def test_override_replaces_nested_values_and_keeps_the_rest():
    robot = override(SAWYER, ["control_hz=5", "default_prompt=press the button"])
    assert (robot.control_hz, robot.default_prompt) == (5.0, "press the button")
    assert type(robot.control_hz) is float
    assert dataclasses.replace(robot, control_hz=SAWYER.control_hz, default_prompt=SAWYER.default_prompt) == SAWYER


def test_override_reaches_into_tuples():
    robot = override(SAWYER, ["cameras.0.height=128", "state.1.name=fingers"])
    assert (robot.cameras[0].height, robot.state[1].name, robot.state[0]) == (128, "fingers", SAWYER.state[0])
    with pytest.raises(ValueError, match="'7' is not a position in a tuple of 1, counted from 0"):
        override(SAWYER, ["cameras.7.height=128"])


def test_override_reports_all_failures_with_near_names():
    with pytest.raises(ValueError, match="cannot apply overrides") as e:
        override(OptimizerConfig(), ["peek_lr=1e-3", "warmup_steps=ten", "b1", "b1.x=3", "decay_steps=None"])
    text = str(e.value)
    assert "did you mean 'peak_lr'" in text
    assert "got 'ten' of type str, expected int" in text
    assert "'b1': expected key=value" in text
    assert "'x' would be a field of 0.9" in text
    assert "'decay_steps': got None, expected int: it cannot be left out" in text
    assert override(SAWYER, ["cameras.0.height=None"]).cameras[0].height is None


def test_override_changes_fields_that_have_to_agree_together():
    policy = load_run("configs/demo_pretrain.py").model
    both = ["backbone.vlm.depth=2", "expert.depth=2"]
    assert [x.depth for x in (override(policy, both).backbone.vlm, override(policy, both).expert)] == [2, 2]
    with pytest.raises(ValueError, match=r"expert\.depth=3, expected the backbone's 2"):
        override(policy, both[:1])


def test_override_keeps_the_later_of_two_values():
    assert override(SAWYER, ["control_hz=5", "control_hz=7"]).control_hz == 7
    run = load_run("configs/demo_finetune_metaworld_fetch.py")
    fresh = ["tokenizer=text.model", "warm_start=None"]
    assert override(run, ["warm_start.checkpoint=here", *fresh]).warm_start is None
    with pytest.raises(ValueError, match="'checkpoint' would be a field of None"):
        override(run, [*fresh, "warm_start.checkpoint=here"])
    with pytest.raises(ValueError, match=r"'data\.entires\.0\.weight': DataConfig has no field 'entires'"):
        override(run, ["data.entires.0.weight=1"])


def test_load_run_names_the_files_beside(tmp_path):
    (tmp_path / "good.py").write_text("config = 3\n")
    (tmp_path / "bad.py").write_text("value = 3\n")
    assert load_run(tmp_path / "good.py") == 3
    with pytest.raises(FileNotFoundError, match=r"bad\.py, good\.py"):
        load_run(tmp_path / "god.py")
    with pytest.raises(ValueError, match="no variable named config"):
        load_run(tmp_path / "bad.py")


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_builds_and_can_be_stored(path: Path) -> None:
    config = load_run(path)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    assert path.name in (path.read_text().split('"""')[1]), "its docstring gives the command"
