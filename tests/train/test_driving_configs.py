"""The configs of the driving family: that they build, what the stages of OpenDriveVLA train, and that one hands over to
the next, on a dataset of a few steps that are made up."""

import dataclasses
import io
import json
import re
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL.Image
import pytest
from rich.console import Console

from openpi_like.config import from_json, load_run, override, to_json
from openpi_like.data.dataset import open_dataset
from openpi_like.data.normalize import fields_of
from openpi_like.data.rlds_writer import Episode, write_rlds
from openpi_like.data.sentencepiece_model import fit_text_tokenizer
from openpi_like.data.stats import compute_normalization, save_normalization
from openpi_like.data.text import TextTokenizer, read_tokenizer
from openpi_like.driving.scene_texts import CAPTION_PROMPT, TEXTS
from openpi_like.driving.waypoint_text import CHARACTERS
from openpi_like.models.weights import flatten, weight_shapes
from openpi_like.robots.ego_vehicle import EGO_VEHICLE_SCENE, ENTITIES, VIEWS
from openpi_like.robots.policy_fit import policy_problems
from openpi_like.serve.observation import ObservationError
from openpi_like.serve.options import PolicyOptions
from openpi_like.serve.policy import Policy
from openpi_like.train.checkpoints.load import load_policy_parts
from openpi_like.train.checkpoints.warm_start import WarmStart, open_weights
from openpi_like.train.config import TrainConfig
from openpi_like.train.hosts.process_group import ProcessGroup
from openpi_like.train.state import ModelDef
from openpi_like.train.study import unequal_parts
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "configs" / "driving"
STUDIES = ("ablations", "distillation", "open_drive_vla", "policies")
SEVERAL = ("scenes", "stages")
CONFIGS = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in (*SEVERAL, *STUDIES))
TABLE = runpy.run_path(str(FOLDER / "stages.py"))


# ---- All of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_and_can_be_stored(name: str) -> None:
    path = FOLDER / f"{name}.py"
    config = load_run(path)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    assert config.run_dir == f"runs/driving/{name}"
    assert f"python train/train.py configs/driving/{name}.py\n" in path.read_text().split('"""')[1]
    for entry in config.data.entries:
        assert policy_problems(entry.robot, config.model, drop_cameras=config.data.drop_cameras) == []
        assert config.model.robot_problems(entry.robot, None) == []
    assert ModelDef(config.model, config.trainable).trained


def test_policies_told_of_the_scene_differ_in_nothing_else() -> None:
    for name, config in runpy.run_path(str(FOLDER / "scenes.py"))["configs"].items():
        base = load_run(FOLDER / f"{name}.py")
        assert {s.name for s in config.model.entities} == {e.name for e in ENTITIES}
        for entry, before in zip(config.data.entries, base.data.entries, strict=True):
            assert policy_problems(entry.robot, config.model, drop_cameras=config.data.drop_cameras) == []
            assert dataclasses.replace(entry.robot, entities=()) == before.robot
        assert dataclasses.replace(config.model, entities=()) == base.model
        if base.warm_start is not None and config.warm_start is not None:
            assert config.warm_start.checkpoint == f"{base.warm_start.checkpoint}_scene"
        same = ("model", "data", "run_dir", "warm_start")
        assert dataclasses.replace(config, **{f: getattr(base, f) for f in same}) == base


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_compares_what_can_be_compared(name: str) -> None:
    study = runpy.run_path(str(FOLDER / f"{name}.py"))["study"]
    files = {n: study.config_of(n) for n in study.arms}
    configs = {n: override(load_run(REPOSITORY / path), changes) for n, (path, changes) in files.items()}
    assert unequal_parts(study, {"": {n: c for n, c in configs.items() if study.arms[n].driven}}) == []
    for n, arm in study.arms.items():
        assert (configs[n].warm_start is None) == (arm.start is None)
    assert len({tuple(c.model.cameras) for c in configs.values()} - {("none",)}) == 1


def test_statistics_in_one_directory_are_of_the_same_numbers() -> None:
    """A run finds those of another one in its directory, or there are none."""
    robots: dict[tuple[str, str], set[Any]] = {}
    for name in CONFIGS:
        config = load_run(FOLDER / f"{name}.py")
        for entry in config.data.entries:
            robot = entry.robot
            numbers = robot.statistics_names, robot.state_names, fields_of(robot)
            robots.setdefault((config.stats, robot.name), set()).add(numbers)
    assert {key: len(of) for key, of in robots.items()} == {
        ("runs/driving/stats", "ego_vehicle"): 1,
        ("runs/driving/stats", "ego_controls"): 1,
        ("runs/driving/stats_pooled", "ego_vehicle"): 1,
        ("runs/driving/stats_one_scale", "ego_vehicle"): 1,
        ("runs/driving/stats_no_state", "ego_vehicle"): 1,
    }


# ---- The stages ------------------------------------------------------------------------------------------------------

# Of the published table: which parts each stage trains; here the image tower and the language model begin from nothing.
PUBLISHED = {
    "stage1_alignment": {"projectors"},
    "stage2_questions": {"projectors", "language model"},
    "stage2b_forecasting": {"projectors", "language model"},
    "stage3_planning": {"projectors", "language model"},
}
HERE = {
    "stage1_alignment": {"projectors", "language model", "2D backbone"},
    "stage2_questions": {"projectors", "language model", "2D backbone"},
    "stage2b_forecasting": {"projectors", "language model", "2D backbone"},
    "stage3_planning": {"projectors", "language model"},
    "single_stage": {"projectors", "language model", "2D backbone"},
}
# With a perception of their own, which is pretrained; all stages train it, as published the last.
PERCEIVED = {"perception": {"perception", "2D backbone"}} | {
    f"perceived_{name}": HERE[name] | {"perception"} for name in PUBLISHED
}
OF = {"vlm": "language model", "entities": "projectors", "vision": "2D backbone", "perception": "perception"}


def part_of(weight: str) -> str:
    return "projectors" if weight.startswith("vision/head/") else OF[weight.split("/")[0]]


@pytest.mark.parametrize("name", HERE | PERCEIVED)
def test_what_each_stage_trains(name: str) -> None:
    config = TABLE["configs"][name]
    model = ModelDef(config.model, config.trainable)
    names = set(weight_shapes(config.model))
    assert model.trained == {weight for weight in names if part_of(weight) in (HERE | PERCEIVED)[name]}
    if name in PUBLISHED:
        stage = TABLE["STAGES"][name]
        assert (set(stage.trained), set(stage.besides)) == (PUBLISHED[name], HERE[name] - PUBLISHED[name])


def test_parts_are_all_weights_and_each_is_in_one() -> None:
    for weight in weight_shapes(TABLE["configs"]["perceived_stage1_alignment"].model):
        assert [p for p, pattern in TABLE["PARTS"].items() if re.search(pattern, weight)] == [part_of(weight)]


def test_stages_follow_each_other() -> None:
    configs, before = TABLE["configs"], None
    shapes = weight_shapes(configs["single_stage"].model)
    for name in PUBLISHED:
        config = configs[name]
        start = None if config.warm_start is None else config.warm_start.checkpoint
        assert start == (None if before is None else configs[before].run_dir)
        # Nothing starts fresh and nothing is left behind: weights have the same names and shapes.
        assert config.warm_start is None or (config.warm_start.reinitialize, config.warm_start.drop) == ((), ())
        assert {k: v.shape for k, v in weight_shapes(config.model).items()} == {k: v.shape for k, v in shapes.items()}
        assert [entry.actions for entry in config.data.entries] == [name == "stage3_planning"] * len(
            config.data.entries
        )
        before = name
    assert configs["single_stage"].steps == sum(configs[name].steps for name in PUBLISHED)
    assert configs["single_stage"].data == configs["stage3_planning"].data
    asked = Counter(e.text_key for name in PUBLISHED for e in configs[name].data.entries if not e.actions)
    assert set(asked) == {key for key in TEXTS if "question" not in key or key == "answer"}


def test_perceived_stages_differ_in_the_perception_alone() -> None:
    configs, before = TABLE["configs"], "perception"
    shapes = {k: v.shape for k, v in weight_shapes(configs["perception"].model).items()}
    for name in PUBLISHED:
        config, told = configs[f"perceived_{name}"], configs[name]
        sees = config.model.perception
        assert (sees.reads, sees.detached, sees.alone) == ("predictions", name != "stage3_planning", False)
        assert config.warm_start == WarmStart(configs[before].run_dir)
        assert {k: v.shape for k, v in weight_shapes(config.model).items()} == shapes
        assert dataclasses.replace(config.model, perception=None) == told.model
        assert ("perception" in TABLE["PERCEIVED"][f"perceived_{name}"].trained) == (name == "stage3_planning")
        same = ("model", "run_dir", "warm_start", "trainable")
        assert dataclasses.replace(config, **{f: getattr(told, f) for f in same}) == told
        before = f"perceived_{name}"
    assert configs["perception"].model.perception.alone
    assert configs["perception"].warm_start is None


# ---- A run, on steps that are made up --------------------------------------------------------------------------------

STEPS = 5
SAID = {
    "caption": ["By day, at a roundabout, 23 km/h: give way. A car 18 m ahead stands."] * STEPS,
    "agent_question": ["what is agent 1?", "", "what is agent 2?", "", ""],
    "agent_caption": ["a car at (2,18), it stands", "", "a van at (0,9), it stands", "", ""],
    "question": ["how many vehicles are near?"] * STEPS,
    "answer": ["1", "2", "3", "2", "1"],
    "forecast_question": ["where will agent 1, at (2,18), be?", *[""] * (STEPS - 1)],
    "forecast": ["[(0.00,1.00)]", *[""] * (STEPS - 1)],
    "subtask": ["give way"] * STEPS,
}


def episode(seed: int) -> Episode:
    """A car that drives straight on at a speed of its own."""
    rng = np.random.default_rng(seed)

    def picture() -> bytes:
        out = io.BytesIO()
        PIL.Image.fromarray(rng.integers(0, 256, (48, 80, 3)).astype(np.uint8)).save(out, format="png")
        return out.getvalue()

    speed = rng.uniform(1, 10)
    plan = np.stack([np.zeros(6), 0.5 * speed * np.arange(1, 7)], axis=1)
    things = {}
    for e in ENTITIES:
        there = np.arange(e.count) < rng.integers(0, 3, (STEPS, 1))
        things[e.key] = np.where(there[..., None], rng.normal(size=(STEPS, e.count, e.size)), 0).astype(np.float32)
        assert e.mask_key is not None
        things[e.mask_key] = there.astype(np.int64)
    return Episode(
        images={view: [picture() for _ in range(STEPS)] for view in VIEWS},
        state=rng.normal(size=(STEPS, 17)).astype(np.float32),
        action=np.repeat(plan[None], STEPS, axis=0).astype(np.float32),
        prompt="keep the lane",
        success=True,
        metadata={"seed": seed},
        steps={"plan_known": np.array([6, 6, 6, 3, 0]), **things, **{k: np.array(v) for k, v in SAID.items()}},
    )


class Silent:
    """In the place of the validator, which would be compiled too."""

    def __init__(self, *_: Any) -> None: ...

    def __call__(self, state: Any) -> dict[str, float]:
        return {"loss": 1.0}


FIRST, LAST = "perceived_stage1_alignment", "perceived_stage3_planning"


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Any) -> dict[str, TrainConfig]:
    """Runs of two steps, smaller than they are: of stage 1 with a perception, and of stage 3 after it."""
    pytest.importorskip("tensorflow_datasets")
    root = tmp_path_factory.mktemp("driving")
    splits = {"train": [episode(0), episode(1)], "val": [episode(2)]}
    path = write_rlds(root, "ego_vehicle_sim", EGO_VEHICLE_SCENE, splits, description="A test.", metadata={})
    texts = {text for of in SAID.values() for text in of if text} | {CAPTION_PROMPT, "Task: keep the lane, State: 0 1;"}
    (root / "text.model").write_bytes(fit_text_tokenizer(sorted(texts), 330, symbols=CHARACTERS).content())
    train = runpy.run_path(str(REPOSITORY / "train" / "train.py"))["main"]
    train.__globals__["Validator"] = Silent
    runs: dict[str, TrainConfig] = {}
    for name in (FIRST, LAST):
        run = TABLE["configs"][name]
        entries = tuple(dataclasses.replace(e, path=str(path)) for e in run.data.entries)
        runs[name] = run = dataclasses.replace(
            run,
            run_dir=str(root / name),
            data=dataclasses.replace(run.data, entries=entries, num_threads=1),
            model=dataclasses.replace(run.model, backbone=tiny_policy.backbone, image_size=(16, 16)),
            stats=str(root),
            tokenizer=str(root / "text.model"),
            batch_size=4,
            steps=2,
            warm_start=None if name == FIRST else WarmStart(str(root / FIRST)),
            attention="einsum",
            draw_batch=False,
        )
        if not (root / "ego_vehicle.json").exists():  # the statistics of all stages
            dataset = open_dataset(path, entries[0].robot, "train")
            save_normalization(compute_normalization(dataset), root / "ego_vehicle.json")
        train(run, ProcessGroup(), Console(quiet=True))
    return runs


def weights_of(run: TrainConfig) -> dict[str, np.ndarray]:
    arrays = open_weights(run.run_dir, average=False)
    return {name: arrays.read(name) for name in arrays.shapes}


def test_a_stage_begins_with_every_weight_of_the_one_before(driven: dict[str, TrainConfig]) -> None:
    report = json.loads((Path(driven[LAST].run_dir) / "load_report.json").read_text())
    assert {row["from"] for row in report} == {"checkpoint"}
    assert {row["weight"] for row in report} == set(weight_shapes(driven[LAST].model))


def test_what_is_frozen_stays_and_all_else_is_trained(driven: dict[str, TrainConfig]) -> None:
    before, after = (weights_of(driven[name]) for name in (FIRST, LAST))
    averaged = open_weights(driven[FIRST].run_dir)
    same = {name for name, value in after.items() if np.array_equal(value, averaged.read(name))}
    assert same == {name for name in after if part_of(name) == "2D backbone"}
    # The first stage has moved all, too.
    fresh = flatten(ModelDef(driven[FIRST].model).init(jax.random.key(0)))
    moved = {name for name in before if not np.array_equal(before[name], fresh[name])}
    assert moved == set(before)


def test_the_last_stage_plans(driven: dict[str, TrainConfig]) -> None:
    policy = Policy(load_policy_parts(driven[LAST].run_dir))
    rng = np.random.default_rng(0)
    observation = {
        "images": {view: rng.integers(0, 256, (48, 80, 3)).astype(np.uint8) for view in VIEWS},
        "state": rng.normal(size=17).astype(np.float32),
        "prompt": "keep the lane",
    }
    plan = policy.infer(observation)["actions"]
    assert plan.shape == (6, 2)
    assert np.abs(plan).max() <= 999.99
    np.testing.assert_allclose(plan, plan.round(2), atol=1e-4)
    # It sees for itself what is around the car, and is told of nothing.
    assert policy.metadata()["robots"]["ego_vehicle"]["entities"] == {}
    told = {e.name: np.zeros((1, e.size), np.float32) for e in ENTITIES}
    with pytest.raises(ObservationError, match=r"entities"):
        policy.infer({**observation, "entities": told})
    assert not load_policy_parts(driven[FIRST].run_dir).robots


def test_what_is_acted_by_without_a_thought_is_its_end(driven: dict[str, TrainConfig]) -> None:
    """As at steps without a text: configs/driving/emma.py learns these, and is served so with `--think-every 0`."""
    run = driven[FIRST]
    policy = Policy(load_policy_parts(run.run_dir), PolicyOptions(think_every=0))
    thought = policy.no_thought
    text = TextTokenizer.of_policy(read_tokenizer(str(run.tokenizer)), run.model)
    row = text.encode_thought("keep the lane", np.zeros(1), "")
    np.testing.assert_array_equal(thought.ids[thought.mask], row.prompt[row.prompt_causal])
    assert (thought.ids.shape, thought.mask.sum(), thought.ids[0]) == ((112,), 1, text.tokenizer.required("eos"))
