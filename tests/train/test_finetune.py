"""The program that writes a fine-tuning and starts it: what it decides, what it refuses, and a run of what it wrote."""

import dataclasses
import io
import json
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from openpi_like.config import load_run, override, to_json
from openpi_like.data.augment import Augment
from openpi_like.data.blend import blend
from openpi_like.data.dataset import open_dataset
from openpi_like.data.rlds_writer import Episode, write_rlds
from openpi_like.data.schema import DatasetError
from openpi_like.data.stats import compute_normalization
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.smolvla import SmolVlaConfig
from openpi_like.models.vlm4vla import Vlm4VlaConfig
from openpi_like.models.weights import WeightsError, flatten, unflatten
from openpi_like.train import finetune
from openpi_like.train.checkpoints.checkpoint import Keep, find_step, save_policy
from openpi_like.train.checkpoints.contract import Contract, read_contract, read_record
from openpi_like.train.checkpoints.load import load_policy_parts
from openpi_like.train.finetune import FineTuning, fitted, make_config, splits, write_config
from openpi_like.train.hosts.process_group import ProcessGroup
from openpi_like.train.muon import MuonConfig
from openpi_like.train.state import ModelDef
from openpi_like.train.validation import Validator, action_errors
from openpi_like.train.watching.metrics import read_metrics
from tests.conftest import REPOSITORY
from tests.data.toy import ARM, CART, PROMPTS
from tests.models.test_policies import OWN

ROBOT = "tests.data.toy:ARM"


@pytest.fixture(scope="module")
def start(toy: Path, tiny_policy: Pi0Config, contract_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of random weights for the arm of the toy dataset, with one camera more, and statistics of its split val."""
    policy = dataclasses.replace(tiny_policy, cameras=("third", "base", "wrist"), state_dim=6, prompt_len=40)
    policy = dataclasses.replace(policy, action_horizon=6)
    rng = np.random.default_rng(0)
    shapes = flatten(ModelDef(policy).shapes)
    weights = {k: rng.normal(size=v.shape).astype(np.float32) * 0.1 for k, v in shapes.items()}
    normalization = compute_normalization(open_dataset(toy, ARM, "val"))
    contract: Contract = dataclasses.replace(
        contract_of(policy), robots=(ARM,), normalizations={"arm": normalization}, renderers={"arm": "ray"}
    )
    directory = tmp_path_factory.mktemp("start") / "run"
    save_policy(directory, unflatten(weights), contract=contract, origin="a test")
    return directory


@pytest.fixture
def asked(toy: Path, start: Path, tmp_path: Path) -> Callable[..., FineTuning]:
    """Returns a function that asks for a fine-tuning to the toy dataset's arm, whose chunks are shorter."""

    def make(**changes: Any) -> FineTuning:
        given = {
            "robot": ROBOT,
            "data": (str(toy),),
            "start": str(start),
            "run_dir": str(tmp_path / "run"),
            "fresh": True,
        }
        return FineTuning(**{**given, **changes})

    return make


@pytest.fixture
def copy(toy: Path, tmp_path: Path) -> Path:
    """A copy of the toy dataset without its split val."""
    there = Path(shutil.copytree(toy, tmp_path / "toy_arm" / "1.0.0"))
    info = json.loads((there / "dataset_info.json").read_text())
    info["splits"] = [s for s in info["splits"] if s["name"] == "train"]
    (there / "dataset_info.json").write_text(json.dumps(info))
    return there


# ---- What is written -------------------------------------------------------------------------------------------------


def test_a_longer_prompt_enlarges_the_policy(asked: Callable[..., FineTuning], start: Path, tmp_path: Path) -> None:
    """Its weights stay as they are, since none depends on it."""
    contract = read_contract(find_step(start))
    longest = max(int(contract.text_tokenizer().encode(text)[1].sum()) for text in PROMPTS)
    policy = dataclasses.replace(contract.policy, prompt_len=longest - 3)
    weights = {k: np.zeros(v.shape, np.float32) for k, v in flatten(ModelDef(policy).shapes).items()}
    short = tmp_path / "short"
    save_policy(short, unflatten(weights), contract=dataclasses.replace(contract, policy=policy), origin="a test")
    written = write_config(asked(start=str(short)), tmp_path / "config.py")
    assert f"prompt_len: {longest - 3} -> {longest}" in written.notes
    assert load_run(tmp_path / "config.py").model.prompt_len == longest


@pytest.mark.parametrize("preset", ["full", "lora", "expert_only", "frozen_vision"])
@pytest.mark.parametrize("statistics", ["own", "pretrained", "blended"])
def test_the_file_is_short_and_is_loaded(asked: Any, preset: str, statistics: str, tmp_path: Path) -> None:
    written = write_config(asked(preset=preset, statistics=statistics), tmp_path / "run" / "config.py")
    assert written.text.count("\n") <= 40
    config = load_run(tmp_path / "run" / "config.py")
    assert type(config.statistics).__name__.lower() == statistics
    assert (config.trainable.lora is None) == (preset != "lora")
    assert config.model.cameras == ("base", "wrist")
    assert (config.model.action_horizon, config.model.action_dim) == (5, 4)
    assert config.data.augment == Augment.colours()
    assert config.keep == Keep(best=1, metric="action_error")
    assert config.tokenizer is None
    assert written.notes[-2:] == ("cameras: base, wrist; new: none; gone: third", "action_horizon: 6 -> 5")


@pytest.mark.parametrize(
    ("name", "augment"),
    [
        ("none", None),
        ("octo", Augment.octo(wrist_cameras=("wrist",))),
        ("openpi", Augment.openpi(wrist_cameras=("wrist",))),
    ],
)
def test_images_are_changed_as_asked(asked: Any, tmp_path: Path, name: str, augment: Augment | None) -> None:
    assert _config(asked(augment=name), tmp_path).data.augment == augment


def test_the_same_command_goes_on_and_another_does_not(asked: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    first = write_config(asked(), path)
    assert write_config(asked(), path).text == first.text == path.read_text()
    with pytest.raises(FileExistsError, match=r"config\.py is there and says something else; python train/train"):
        write_config(asked(steps=7), path)
    assert path.read_text() == first.text


def test_several_datasets(asked: Any, toy: Path, copy: Path, tmp_path: Path) -> None:
    write_config(asked(data=(str(toy), str(copy))), tmp_path / "config.py")
    config = load_run(tmp_path / "config.py")
    assert [e.path for e in config.data.entries] == [str(toy), str(copy)]
    assert [e.val_split for e in config.data.entries] == ["val", "train[90%:]"]
    write_config(asked(data=(str(copy), str(copy))), tmp_path / "same.py")
    assert "for path in DATA" in (tmp_path / "same.py").read_text()
    config = load_run(tmp_path / "same.py")
    assert [(e.path, e.split, e.val_split) for e in config.data.entries] == [
        (str(copy), "train[:90%]", "train[90%:]")
    ] * 2


def test_the_last_episodes_are_held_out(toy: Path, copy: Path) -> None:
    """Where there is no split val; as many as open_dataset makes of the split's words."""
    assert splits(str(toy), ARM, 10)[:2] == ("train", "val")
    for percent, expected in ((10, 11), (25, 9), (50, 6), (1, 11)):
        split, val_split, said = splits(str(copy), ARM, percent)
        assert val_split is not None
        seen, held = (open_dataset(copy, ARM, of).episodes for of in (split, val_split))
        assert (seen, held) == (expected, 12 - expected)
        assert f"{seen} of 12 episodes are trained on, {held} held out" in said
    assert splits(str(copy), ARM, 0)[:2] == ("train", None)


@pytest.mark.parametrize("episodes", range(2, 30))
def test_one_episode_at_least_is_held_out(episodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = MagicMock()
    dataset.index.episodes = episodes
    monkeypatch.setattr("openpi_like.train.finetune.recorded", lambda _: None)
    monkeypatch.setattr("openpi_like.train.finetune.open_dataset", lambda *_, **__: dataset)
    monkeypatch.setattr("openpi_like.train.finetune.split_names", lambda _: ["train"])
    split, val_split, _ = splits("x", ARM, 10)
    assert val_split is not None
    percent = int(split.removeprefix("train[:").removesuffix("%]"))
    assert val_split == f"train[{percent}%:]"
    assert 1 <= round(percent * episodes / 100) < episodes
    if episodes >= 10:
        assert percent == 90


def test_of_recorded_episodes_it_says_how_they_ended(asked: Any, tmp_path: Path) -> None:
    """Four episodes of ten steps: one failed, one of which nobody knows, and the expert acted in the second half."""
    rng = np.random.default_rng(0)
    (base,), (wrist,) = ([cv2.imencode(".png", np.zeros(s, np.uint8))[1].tobytes()] for s in ((12, 16, 3), (9, 7, 3)))
    acts = np.arange(10) >= 5

    def episode(success: int) -> Episode:
        return Episode(
            images={"base": [base] * 10, "wrist": [wrist] * 10},
            state=rng.uniform(0, 1, (10, 6)).astype(np.float32),
            action=rng.uniform(0, 1, (10, 3)).astype(np.float32),
            prompt="go",
            success=success > 0,
            metadata={"success": success},
            steps={"intervened": acts},
        )

    ends = [episode(success) for success in (1, 0, -1, 1)]
    data = write_rlds(tmp_path, "did", ARM, {"train": ends, "val": [episode(1)]}, description="", metadata={})
    for selection, steps in (("all", 40), ("success", 20), ("corrections", 10)):
        path = tmp_path / f"{selection}.py"
        written = write_config(asked(data=(str(data),), selection=selection), path)
        assert written.notes[0].startswith(
            f"{data}: 4 episodes; its own split val is held out; 1 of 4 episodes failed, of 1 it is not known; an "
            f"expert acted at 20 of 40 steps; --selection {selection} trains on {steps} steps (or "
        )
        (entry,) = load_run(path).data.entries
        assert entry.selection == finetune.SELECTIONS[selection]
        assert written.text.count("\n") <= 40


def test_a_selection_that_the_data_do_not_know_is_refused(asked: Any, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"selection\.intervened: .*'intervened'"):
        write_config(asked(selection="corrections"), tmp_path / "config.py")


def test_without_held_out_episodes_nothing_ranks_the_steps(asked: Any, copy: Path, tmp_path: Path) -> None:
    write_config(asked(data=(str(copy),), held_out=0), tmp_path / "config.py")
    config = load_run(tmp_path / "config.py")
    assert (config.keep, config.patience, config.data.entries[0].val_split) == (Keep(), None, None)


def test_learning_rates(asked: Any, tmp_path: Path) -> None:
    """Of a start that says nothing of its own, that of pi0's recipe; LoRA's is eight times that."""
    rate = lambda **options: _config(asked(**options), tmp_path).optimizer.peak_lr  # noqa: E731
    assert rate() == 2.5e-5
    assert rate(preset="lora") == pytest.approx(2e-4)
    assert rate(preset="lora", peak_lr=1e-2) == 1e-2


@pytest.mark.parametrize("preset", ["full", "lora"])
def test_the_optimizer_is_of_the_kind_that_the_run_had(
    asked: Any, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    """A rate is one of its optimizer: Muon's is far too high for AdamW."""
    record, had = read_record(find_step(start)), MuonConfig(peak_lr=4e-3, beta=0.9, weight_decay=1e-4, clip_norm=2.0)
    record = {**record, "config": {**record["config"], "optimizer": to_json(had)}}
    monkeypatch.setattr(finetune, "read_record", lambda step: record)
    config = _config(asked(preset=preset, steps=500), tmp_path)
    expected = dataclasses.replace(had, peak_lr=4e-3, end_lr=4e-5, warmup_steps=100, decay_steps=500)
    assert config.optimizer == expected


def _config(asked: FineTuning, tmp_path: Path) -> Any:
    path = tmp_path / "some.py"
    path.write_text(make_config(asked, path).text)
    return load_run(path)


def test_normalisation_is_the_checkpoints(asked: Any, tmp_path: Path) -> None:
    of = asked(robot="tests.data.toy:CART")
    assert (
        "robot 'cart' is normalised by 'zscore', as the checkpoint's weights want it" in make_config(of, tmp_path).notes
    )
    assert _config(of, tmp_path).data.entries[0].robot == dataclasses.replace(CART, normalization="zscore")


# ---- What fits -------------------------------------------------------------------------------------------------------


def test_a_larger_robot_starts_fresh_only_where_it_is_asked_for(tiny_policy: Pi0Config) -> None:
    state = dataclasses.replace(ARM.state[2], size=8)
    big = dataclasses.replace(ARM, state=(*ARM.state[:2], state))
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        fitted(tiny_policy, big, fresh=False)
    assert "robot 'arm' is larger than the policy: state_dim 11, the policy has 4" in str(raised.value)
    assert "\n  state_in/kernel would start fresh; allow it with --fresh" in str(raised.value)
    changes, fresh = fitted(tiny_policy, big, fresh=True)
    assert fresh == ("state_in/kernel",)
    assert changes == {"cameras": ("base", "wrist"), "state_dim": 11, "action_horizon": 5}
    # Dims that it has not stay.
    assert fitted(tiny_policy, CART, fresh=False) == ({"cameras": ("base",), "action_horizon": 3}, ())


@settings(max_examples=40, deadline=None)
@given(drawn=st.sets(st.integers(0, 10**6), min_size=1))
def test_patterns_are_short_and_match_the_weights_that_start_fresh_and_no_others(
    tiny_policy: Pi0Config, drawn: set[int]
) -> None:
    every = sorted(flatten(ModelDef(tiny_policy).shapes))
    fresh = sorted({every[i % len(every)] for i in drawn})
    patterns = finetune._short(fresh, every)
    assert sorted(n for n in every if any(re.search(p, n) for p in patterns)) == fresh
    assert len(patterns) <= len(fresh)
    assert finetune._short([n for n in every if n.startswith("vlm/")], every) == ("^vlm(/|$)",)


def test_a_horizon_that_weights_depend_on_stays(tiny_policy: Pi0Config) -> None:
    cls, own = OWN["vlm4vla"]
    common = {f.name: getattr(tiny_policy, f.name) for f in dataclasses.fields(cls) if hasattr(tiny_policy, f.name)}
    policy: Vlm4VlaConfig = cls(**{**common, **own})
    changes, fresh = fitted(policy, CART, fresh=False)
    assert (changes, fresh) == ({"cameras": ("base",)}, ())
    _, fresh = fitted(policy, dataclasses.replace(CART, action_horizon=7), fresh=True)
    assert {name.rpartition("/")[0] for name in fresh} == {"action_head/pose/map_3", "action_head/binary/map_3"}


def test_images_among_the_words(tiny_policy: Pi0Config) -> None:
    policy = dataclasses.replace(tiny_policy, image_slots=(1, 1))
    assert fitted(policy, CART, fresh=False)[0]["image_slots"] == (1,)
    with pytest.raises(ValueError, match=r"images stand at \(1, 3\) .* write the config by hand, with image_slots"):
        fitted(dataclasses.replace(policy, image_slots=(1, 3)), CART, fresh=False)


def test_prompts_that_are_held_out_count_too(start: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contract, opened = read_contract(find_step(start)), finetune.open_dataset
    before = finetune.longest_prompt(str(toy), ARM, contract.policy, contract.tokenizer)
    words = SimpleNamespace(index=SimpleNamespace(text_table=lambda key: ["push " * 60]), close=lambda: None)
    monkeypatch.setattr(finetune, "open_dataset", lambda *of: words if of[2] == "val" else opened(*of))
    assert finetune.longest_prompt(str(toy), ARM, contract.policy, contract.tokenizer) > before + 30


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "loar"}, "preset='loar'; did you mean 'lora'"),
        (
            {"statistics": "blend", "steps": 0},
            "statistics='blend'; did you mean 'blended'.*\n  steps=0, expected at least",
        ),
        ({"selection": "sucess"}, "selection='sucess'; did you mean 'success'"),
        ({"statistics_of": "arm"}, "statistics_of='arm' is for pretrained or blended"),
        ({"data": ()}, "data: none"),
        ({"held_out": 60}, "held_out=60, expected 0 to 50"),
        ({"model": "pi0", "tokenizer": "t"}, "model, tokenizer: .* is a run, which knows its own; leave them out"),
        ({"start": "nowhere"}, "no checkpoint nowhere\n  model: missing, .*one of pi0, pi05.*\n  tokenizer: missing"),
    ],
)
def test_what_is_asked_for_wrongly(asked: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asked(**changes)


def test_what_does_not_fit_is_said_before_anything_is_written(asked: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    with pytest.raises(ValueError, match=r"do not fit each other:\n  the checkpoint has no statistics of robot 'cart'"):
        write_config(asked(robot="tests.data.toy:CART", statistics="blended"), path)
    (tmp_path / "my_robot.py").write_text(
        "import dataclasses\nfrom tests.data.toy import ARM as OTHER\nfrom openpi_like.robots import StateField\n"
        'MORE = StateField("more", "observation/state", 2)\n'
        'ARM = dataclasses.replace(OTHER, name="big", state=(*OTHER.state, MORE))\ndel OTHER\n'
    )
    with pytest.raises(ValueError, match="'big' is larger than the policy: state_dim 8, the policy has 6") as raised:
        write_config(asked(robot=str(tmp_path / "my_robot.py"), fresh=False), path)
    assert "state_in/kernel would start fresh; allow it with --fresh" in str(raised.value)
    written = make_config(asked(robot=str(tmp_path / "my_robot.py")), path)
    assert 'reinitialize=("^state_in/kernel(/|$)",)' in written.text
    assert "start fresh: state_in/kernel" in written.notes
    with pytest.raises(DatasetError, match="no_data"):
        write_config(asked(data=(str(tmp_path / "no_data"),)), path)
    with pytest.raises(ValueError, match="no robot 'tests\\.data\\.toys:ARM'"):
        write_config(asked(robot="tests.data.toys:ARM"), path)
    assert not path.exists()


def test_a_checkpoint_of_another_family(asked: Any, start: Path, tmp_path: Path, tiny_policy: Pi0Config) -> None:
    """Weights of pi0 as published ones, for a config of SmolVLA; and a run of another family in a config by hand."""
    cls, own = OWN["smolvla"]
    common = {f.name: getattr(tiny_policy, f.name) for f in dataclasses.fields(cls) if hasattr(tiny_policy, f.name)}
    other: SmolVlaConfig = cls(**{**common, **own, "state_dim": 6, "cameras": ("base", "wrist"), "action_horizon": 5})
    config = load_run(_written(asked, tmp_path))
    changed = dataclasses.replace(config, model=other)
    with pytest.raises(WeightsError) as raised:
        _train(changed)
    assert "these arrays look like" in str(raised.value)
    assert str(start) in str(raised.value)


# ---- A run -----------------------------------------------------------------------------------------------------------


def _written(asked: Any, tmp_path: Path, **options: Any) -> Path:
    options = {"preset": "lora", "statistics": "pretrained", **options}
    path = tmp_path / "run" / "config.py"
    write_config(asked(**options), path)
    return path


def _train(config: Any, validator: Any = Validator) -> str:
    """Trains in this process; returns what is printed."""
    text = io.StringIO()
    program = runpy.run_path(str(REPOSITORY / "train" / "train.py"))
    program["main"].__globals__["Validator"] = validator
    program["main"](config, ProcessGroup(), Console(file=text, width=200))
    return text.getvalue()


SCORES = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5}


class Scripted:
    """In the place of the validator: scores by step."""

    def __init__(self, *_: Any) -> None: ...

    def __call__(self, state: Any) -> dict[str, float]:
        return {"loss/arm": 1.0, "action_error/arm": SCORES[int(state.step)]}


def test_a_run_stops_when_it_learns_no_more_and_its_best_step_stays(
    asked: Any, start: Path, toy: Path, tmp_path: Path
) -> None:
    path = _written(
        asked,
        tmp_path,
        preset="expert_only",
        statistics="blended",
        steps=40,
        batch_size=8,
        validate_every=2,
        patience=2,
        augment="none",
    )
    stats = SimpleNamespace(**runpy.run_path(str(REPOSITORY / "data" / "stats.py")))
    stats.main(stats.Args(config=path), Console(quiet=True))
    config = override(load_run(path), ["log_every=100", "data.num_threads=1", "draw_batch=False", "attention=einsum"])
    config = dataclasses.replace(config, keep=dataclasses.replace(config.keep, newest=1))
    said = _train(config, Scripted)

    run = tmp_path / "run"
    assert "stopped at step 8: no better action_error in 2 validations" in said
    assert "best: step 4, action_error 1\n" in said
    assert sorted(int(p.name) for p in find_step(run).parent.iterdir() if p.name.isdigit()) == [4, 8]
    assert (find_step(run).name, find_step(run, "best").name) == ("8", "4")
    assert load_policy_parts(run, "best").step == 4

    # What it is normalised by is both, and what is fresh is printed: nothing.
    own, before = compute_normalization(open_dataset(toy, ARM, "train")), read_contract(find_step(start))
    weight = own.state.count / (own.state.count + before.normalizations["arm"].state.count)
    found = read_contract(find_step(run)).normalizations["arm"]
    assert found.action == blend(own.action, before.normalizations["arm"].action, weight)
    report = json.loads((run / "load_report.json").read_text())
    assert {row["from"] for row in report} == {"checkpoint"}

    # The same command finds that it is done.
    again = _train(config, Scripted)
    assert "resumed at step 8" in again
    assert "stopped at step 8" in again
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl") if line["split"] == "val"] == [2, 4, 6, 8]


def test_errors_of_actions_of_all_units_are_one_number() -> None:
    done = np.array([[0.0, 100.0, 7.0], [2.0, 300.0, 7.0]])
    error, relative = action_errors(done + np.array([0.5, -200.0, 3.0]), done)
    np.testing.assert_allclose(error, (0.5, 200.0, 3.0))
    assert relative == pytest.approx((0.5 / 1.0 + 200.0 / 100.0) / 2)  # the last dim does not vary
    assert action_errors(np.broadcast_to(done.mean(0), done.shape), done)[1] == 1.0
    assert np.isnan(action_errors(done[:1], done[:1])[1])


def test_the_program_says_what_it_decided(asked: Any, start: Path, toy: Path, tmp_path: Path) -> None:
    program = SimpleNamespace(**runpy.run_path(str(REPOSITORY / "train" / "finetune.py")))
    text = io.StringIO()
    args = program.Args(
        robot=ROBOT, data=(str(toy),), start=str(start), fresh=True, run_dir=tmp_path / "x", write_only=True
    )
    assert program.main(args, Console(file=text, width=200)) == 0
    assert f"{toy}: 12 episodes; its own split val is held out" in text.getvalue()
    assert f"written to {tmp_path / 'x' / 'config.py'}: " in text.getvalue()
    assert load_run(tmp_path / "x" / "config.py").run_dir == str(tmp_path / "x")
    assert {p.name for p in (tmp_path / "x").iterdir()} == {"config.py"}
    default = {f.name: f.default for f in dataclasses.fields(program.Args)}
    for f in dataclasses.fields(FineTuning):
        if f.default is not dataclasses.MISSING:
            assert default[f.name] == f.default, f.name
