"""README.md and docs/: what they link to, name and tell to type is there."""

import ast
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import pytest

from tests.pages import (
    ROOT,
    anchors,
    command_problems,
    commands,
    docstring_commands,
    fences,
    link_problems,
    name_problems,
    path_problems,
    python_problems,
)

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = [p for folder in ("data", "train", "serve", "configs") for p in sorted((ROOT / folder).rglob("*.py"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


# ---- The pages -------------------------------------------------------------------------------------------------------


def test_the_front_page_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120


@each_page
def test_lines_are_short(page: Path) -> None:
    """Tables, whose rows cannot be wrapped, may be longer."""
    assert [line for line in page.read_text().splitlines() if len(line) > 160 and line[0] not in "|!"] == []


@each_page
def test_links_paths_and_names_exist(page: Path) -> None:
    text = page.read_text()
    assert link_problems(page, text) + path_problems(text) + name_problems(text) == []


@each_page
def test_code_can_be_imported(page: Path) -> None:
    blocks = [content for language, content in fences(page.read_text()) if language == "python"]
    assert [problem for block in blocks for problem in python_problems(block)] == []


@each_page
def test_commands_can_be_given(page: Path) -> None:
    assert [problem for line in commands(page.read_text()) for problem in command_problems(line)] == []


def test_commands_of_docstrings_can_be_given() -> None:
    lines = [line for path in PROGRAMS for line in docstring_commands(path.read_text())]
    assert len(lines) > 30
    assert [problem for line in lines for problem in command_problems(line)] == []


def test_every_page_is_reached_from_the_front_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name}" not in text] == []


def test_every_policy_and_backbone_is_named_with_its_config() -> None:
    text = (ROOT / "README.md").read_text()
    for name in ("pi0", "pi0.5", "knowledge insulation", "pi0-FAST", "VLM4VLA", "OpenVLA", "OpenVLA-OFT", "SmolVLA"):
        assert f"| {name} |" in text
    for name in ("PaliGemma", "PaliGemma 2", "Qwen2.5-VL", "Qwen3-VL", "Prismatic", "SmolVLM"):
        assert f"| {name} |" in text


def test_the_policy_of_the_docs_trains_and_acts(monkeypatch: Any) -> None:
    """The example of docs/policies.md, as it is printed there; shapes alone, nothing is compiled."""
    blocks = [
        content for language, content in fences((ROOT / "docs" / "policies.md").read_text()) if language == "python"
    ]
    policy, run = (next(b for b in blocks if word in b) for word in ("class LineConfig", "config = dataclasses"))
    module = ModuleType("my_policies")
    monkeypatch.setitem(sys.modules, "my_policies", module)
    exec(compile(policy, "my_policies.py", "exec"), vars(module))
    namespace: dict[str, Any] = {}
    monkeypatch.chdir(ROOT)
    exec(compile(run, "my_run.py", "exec"), namespace)
    c, key = namespace["config"].model, jax.random.key(0)

    def act(batch: Any) -> Any:
        model = c.create(key)
        loss, metrics = model.loss(key, batch, counts=model.loss_counts(batch))
        actions = model.sample_actions(key, c.observation(batch), action_mask=batch["action_mask"])
        return loss, metrics, model.validation_losses(key, batch), actions

    loss, metrics, held_out, actions = jax.eval_shape(act, c.batch_shapes(2))
    assert loss.shape == ()
    assert {name: x.shape for name, x in metrics.items()} == {"loss": (2,), "valid": (2,)}
    assert held_out["loss"].shape == ()
    assert actions.shape == (2, c.action_horizon, c.action_dim)


# ---- What the checks find, on made-up pages --------------------------------------------------------------------------


def test_dead_links_are_found(tmp_path: Path) -> None:
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# A title, with `code`\n\n```\n# no heading\n```\n")
    text = "# Here\n[a](other.md) [b](other.md#a-title-with-code) [c](#here) [d](https://x.org/y) `[e](no.md)`\n"
    assert link_problems(page, text, tmp_path) == []
    dead = "[a](no.md) [b](other.md#no-heading) [c](#there) ![d](no.gif)\n"
    assert len(link_problems(page, dead, tmp_path)) == 4
    assert anchors("## On a GPU\n### A, b & c\n") == {"on-a-gpu", "a-b--c"}


def test_missing_paths_and_names_are_found() -> None:
    assert path_problems("`train/train.py`, `configs/demo_*.py`, `my_robot.py`, `runs/x`, `openpi_like/robots/`") == []
    assert path_problems("`train/trian.py`") == ["no train/trian.py"]
    assert path_problems("`python data/stats.py --config\nconfigs/no_*.py`") == ["no configs/no_*.py"]
    assert path_problems("`trian.py`") == ["no file trian.py in any folder"]
    assert path_problems("```\nno/path.py\n```\ndata/no.py without backticks") == []
    assert name_problems("`openpi_like.data.oxe.mixture`, `openpi_like.models.pi0.Pi0Config.released()`") == []
    assert name_problems("`openpi_like.data.oxe.mixtures`") == ["no openpi_like.data.oxe.mixtures"]
    assert python_problems("from openpi_like.config import trust\nx = ...\n") == []
    assert python_problems("from openpi_like.config import trusts\n") == ["no openpi_like.config.trusts"]
    assert python_problems("x = (\n") != []


def test_commands_are_found_wherever_they_stand() -> None:
    text = "```\nmake demo  # all\ncd x\npython a.py --x \\\n    --y  # why\n```\nor `python b.py\nC`; `python` alone"
    assert commands(text) == ["make demo  # all", "python a.py --x --y  # why", "python b.py C"]
    assert commands('```python\npython = "x"\n```\n') == []
    source = '"""Head:\n\n    python a.py x \\\\\n        --y 1\n\ntext: `python no.py`\n"""\n'
    assert ast.get_docstring(ast.parse(source)) is not None
    assert docstring_commands(source) == ["python a.py x --y 1"]


GOOD = [
    "make test",
    "python train/train.py configs/demo_pretrain.py steps=10 data.num_threads=4  # a comment",
    "python train/train.py configs/my_robot.py no=1",
    "python train/train.py CONFIG [key=value]",
    "python data/stats.py --robot my_robot.py --data DIR --out stats/my_robot.json",
    "python serve/policy_server.py runs/my_robot --dtype int8 &",
    "python train/checkpoints.py ls runs/*",
    "python -m venv .venv",
]
BAD = {
    "make demos": "no target demos",
    "python train/trains.py CONFIG": "no program train/trains.py",
    "python train/train.py configs/no_such_run.py": "no config file",
    "python train/train.py configs/demo_pretrain.py mesh.fsdb=8": "no field 'fsdb'",
    "python train/train.py configs/demo_pretrain.py steps=many": "expected int",
    "python data/stats.py --robots sawyer --data DIR --out stats.json": "--robots",
    "python data/stats.py --robot sawyr --data DIR --out stats.json": "no robot 'sawyr'",
    "python data/stats.py --config configs/no_such_run.py": "no config file",
    "python data/fit_fast.py configs/studies/fast.py --out DIR --set no=1": "no field 'no'",
    "python serve/policy_server.py runs/x --dtype int3": "int3",
    "python serve/benchmarks/libero_client.py --suite libero_11": "libero_11",
    "python train/plan.py configs/pretrain_pi0.py --search": "--search",
    "python train/checkpoints.py prunes RUN": "prunes",
    "python train/checkpoints.py prune RUN --older 3": "--older",
    "python train/study.py configs/studies/no_such_study.py --run DIR": "no study",
    "python train/convert.py SRC DST --to openpi --model pi1": "no config file pi1",
}


@pytest.mark.parametrize("line", GOOD)
def test_a_right_command_has_no_problem(line: str) -> None:
    assert command_problems(line) == []


@pytest.mark.parametrize("line", BAD)
def test_a_wrong_command_is_found(line: str) -> None:
    (problem,) = command_problems(line)
    assert BAD[line] in problem
