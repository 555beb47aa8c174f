"""Checkpoints: what is saved comes back bit for bit, nothing loads partly unasked, damage is named."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.weights import WeightsError, export_weights, flatten, write_openpi
from openpi_like.partition import ShardingRules
from openpi_like.robots.sawyer import SAWYER
from openpi_like.train.checkpoints.checkpoint import Checkpointer, Keep, find_step, stored_scores
from openpi_like.train.checkpoints.contract import CheckpointError, contract_problems
from openpi_like.train.checkpoints.load import load_policy_parts
from openpi_like.train.checkpoints.warm_start import WarmStart, warm_start
from openpi_like.train.muon import MuonConfig
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.sharding import MeshConfig, put_batch
from openpi_like.train.state import ModelDef, Trainer
from tests.train.run_files import ORDER

# When one array of a damaged Orbax directory cannot be read, the reads of all others are left behind, and reported at
# any later moment.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:Exception ignored in. (None|<coroutine object _read_array):pytest.PytestUnraisableExceptionWarning"
)


ADAMW = OptimizerConfig(peak_lr=1e-2, warmup_steps=1, decay_steps=10).create()


def _trainer(policy: Pi0Config, mesh: MeshConfig, optimizer: optax.GradientTransformation = ADAMW) -> Trainer:
    return Trainer(
        ModelDef(policy),
        optimizer,
        ema_decay=0.9,
        seed=0,
        mesh=mesh.create(),
        rules=ShardingRules(),
        dataset_names=("one", "two"),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_policy, tiny_batch, contract_of):
    """A run of two steps on four devices, saved: (directory, trainer, state, contract)."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    trainer = _trainer(tiny_policy, MeshConfig(fsdp=2, tensor=2))
    state = trainer.init()
    for _ in range(2):
        state, _ = trainer.train_step(state, put_batch(tiny_batch, trainer.mesh))
    contract = contract_of(tiny_policy)
    checkpointer = Checkpointer(directory)
    checkpointer.save(state, position=16, order=ORDER, contract=contract, config=OptimizerConfig())
    checkpointer.close()
    return directory, trainer, jax.device_get(state), contract


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the checkpoint, to damage."""
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_a_state_comes_back_bit_for_bit_on_another_mesh(saved, tiny_policy):
    directory, _, state, contract = saved
    other = _trainer(tiny_policy, MeshConfig(data=4))
    checkpointer = Checkpointer(directory)
    restored, position, order = checkpointer.restore(other.abstract, other.shardings, contract=contract)
    checkpointer.close()
    assert position == 16
    assert order == ORDER
    assert int(restored.step) == 2
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), state)
    placed = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), restored, other.shardings)
    assert all(jax.tree.leaves(placed))


def test_resuming_with_other_statistics_is_refused(saved):
    directory, trainer, _, contract = saved
    changed = dataclasses.replace(contract, renderers={SAWYER.name: "egl"})
    checkpointer = Checkpointer(directory)
    with pytest.raises(CheckpointError, match="this run differs in renderers"):
        checkpointer.restore(trainer.abstract, trainer.shardings, contract=changed)
    checkpointer.close()


def test_a_run_does_not_go_on_with_an_optimizer_of_another_kind(saved, tiny_policy, tmp_path):
    """AdamW's moments for Muon; and Muon's of fewer weights, where Orbax alone would leave a hole. These come back."""
    directory, trainer, _, contract = saved
    maps = trainer.model.maps
    few = MuonConfig().create({name: dims for name, dims in maps.items() if "vision" not in name})
    few_trainer = _trainer(tiny_policy, MeshConfig(data=4), few)
    state = few_trainer.init()
    moments = jax.tree.map(lambda x: x + 1 + np.arange(x.size).reshape(x.shape).astype(x.dtype), state.opt_state)
    state = dataclasses.replace(state, step=state.step + 1, opt_state=moments)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(state, position=0, order=ORDER, contract=contract, config=OptimizerConfig())
    checkpointer.close()
    checkpointer = Checkpointer(tmp_path)
    back, *_ = checkpointer.restore(few_trainer.abstract, few_trainer.shardings, contract=contract)
    checkpointer.close()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(back.opt_state), jax.device_get(state.opt_state))
    muon = _trainer(tiny_policy, MeshConfig(data=4), MuonConfig().create(maps))
    for where in (directory, tmp_path):
        checkpointer = Checkpointer(where)
        with pytest.raises(CheckpointError, match="another kind, train into another directory with warm_start"):
            checkpointer.restore(muon.abstract, muon.shardings, contract=contract)
        checkpointer.close()


def test_a_run_saved_before_robots_had_a_field_goes_on(saved, copy):
    """What is not in the record has its default."""
    _, trainer, _, contract = saved
    path = copy / "2" / "contract" / "metadata"
    record = json.loads(path.read_text())
    del record["contract"]["robots"][0]["stride"]
    record["contract"]["__class__"] = "openpi_like.train.checkpoint:Contract"  # where it was then
    del record["trainable"], record["base"]
    record["hash"] = hashlib.sha256(json.dumps(record["contract"], sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(record))
    checkpointer = Checkpointer(copy)
    assert checkpointer.restore(trainer.abstract, trainer.shardings, contract=contract)[1] == 16
    strided = dataclasses.replace(contract, robots=(dataclasses.replace(SAWYER, stride=2),))
    with pytest.raises(CheckpointError, match="this run differs in robots"):
        checkpointer.restore(trainer.abstract, trainer.shardings, contract=strided)
    checkpointer.close()


def test_serving_needs_the_directory_alone(saved, tiny_batch):
    directory, trainer, state, contract = saved
    parts = load_policy_parts(directory)
    assert (parts.step, parts.contract_hash) == (2, contract.hash())
    assert (parts.robots, parts.normalizations) == (contract.robots, contract.normalizations)
    assert parts.renderer == {"sawyer": "raycast"}
    assert parts.tokenizer.encode("press the button")[1].sum() > 2
    observation = {k: v for k, v in tiny_batch.items() if k not in ("actions", "action_mask", "dataset_id", "position")}
    sample = jax.jit(lambda model, obs: model.sample_actions(jax.random.key(0), obs, num_steps=1))
    served = sample(parts.model, observation)
    np.testing.assert_array_equal(served, sample(trainer.model.bind(state.ema), observation))
    assert not np.array_equal(served, sample(load_policy_parts(directory, ema=False).model, observation))


def test_find_step_says_what_is_there(saved, tmp_path):
    directory = saved[0]
    assert find_step(directory) == find_step(directory.parent) == find_step(directory / "2") == directory / "2"
    with pytest.raises(CheckpointError, match=r"no step 7; steps there: \[2\]"):
        find_step(directory, 7)
    with pytest.raises(CheckpointError, match="no checkpoint directory"):
        find_step(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        find_step(tmp_path)


def test_a_changed_contract_is_refused(copy):
    path = copy / "2" / "contract" / "metadata"
    record = json.loads(path.read_text())
    record["contract"]["normalizations"]["sawyer"]["mode"] = "quantile"
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="the contract was changed after training"):
        load_policy_parts(copy)


def test_damaged_weights_are_refused(copy):
    for chunk in (copy / "2" / "ema").rglob("d/*"):  # all: some are left over from writing in parallel
        chunk.write_bytes(chunk.read_bytes()[: chunk.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        load_policy_parts(copy)


def test_an_unfinished_step_does_not_count(copy, saved):
    _, _, state, contract = saved
    (copy / "9.orbax-checkpoint-tmp").mkdir()
    assert find_step(copy).name == "2"
    checkpointer = Checkpointer(copy)
    assert checkpointer.latest_step() == 2
    later = dataclasses.replace(state, step=np.int32(3))
    checkpointer.save(
        later, position=24, order=ORDER, contract=contract, config=OptimizerConfig()
    )  # waits for the cleaning
    checkpointer.close()
    assert find_step(copy).name == "3"
    assert not (copy / "9.orbax-checkpoint-tmp").exists()


def test_warm_start_takes_what_fits_and_says_why(saved, tiny_policy):
    directory, _, state, _ = saved
    bigger = dataclasses.replace(tiny_policy, action_dim=7, cameras=("base", "wrist_right", "wrist_left"))
    trainer = _trainer(bigger, MeshConfig(fsdp=2))
    fresh = trainer.init().params
    start = WarmStart(str(directory), reinitialize=("^action_in/kernel", "^action_out/"))
    params, plan = warm_start(start, trainer)
    by_name = {row["weight"]: row for row in plan.report}
    flat, old, new = (flatten(jax.device_get(x)) for x in (params, state.ema, fresh))
    assert set(by_name) == set(flat)
    assert {k for k, row in by_name.items() if row["from"] == "fresh"} == {
        "action_in/kernel",
        "action_out/kernel",
        "action_out/bias",
    }
    assert by_name["action_in/kernel"]["why"] == (
        "asked by '^action_in/kernel': action_in/kernel: got shape (4, 16), expected (7, 16)"
    )
    for name, row in by_name.items():
        np.testing.assert_array_equal(flat[name], (old if row["from"] == "checkpoint" else new)[name])


def test_warm_start_never_loads_partly_unasked(saved, tiny_policy):
    directory = saved[0]
    bigger = dataclasses.replace(tiny_policy, action_dim=7)
    trainer = _trainer(bigger, MeshConfig())
    start = WarmStart(str(directory), reinitialize=("^state_inn/",))
    with pytest.raises(WeightsError) as e:
        warm_start(start, trainer)
    for part in (
        "action_in/kernel: got shape (4, 16), expected (7, 16)",
        "action_out/bias: got shape (4,), expected (7,)",
        "pattern '^state_inn/' matches no weight",
    ):
        assert part in str(e.value)


def test_warm_start_from_published_weights(saved, tiny_policy, tmp_path):
    """Exported to openpi's layout and taken from there, onto a sharded mesh."""
    _, _, state, _ = saved
    mine = flatten(jax.device_get(state.ema))
    write_openpi(export_weights(tiny_policy, mine, "openpi"), tmp_path / "openpi")
    trainer = _trainer(tiny_policy, MeshConfig(fsdp=2))
    start = WarmStart(str(tmp_path / "openpi"))
    params, plan = warm_start(start, trainer)
    assert {row["from"] for row in plan.report} == {"checkpoint"}
    for name, value in flatten(jax.device_get(trainer.init_from(params).params)).items():
        np.testing.assert_array_equal(value, mine[name], err_msg=name)


def test_warm_start_from_two_places(saved, tiny_policy, tmp_path):
    """The backbone as published, the expert of a run, and the rest fresh."""
    directory, _, state, _ = saved
    mine = {name: np.asarray(x) for name, x in flatten(jax.device_get(state.ema)).items()}
    other = {name: x + 1 for name, x in mine.items()}
    write_openpi(export_weights(tiny_policy, other, "openpi"), tmp_path / "openpi")
    run = WarmStart(str(directory), reinitialize=("^action_in/",))
    start = WarmStart(str(tmp_path / "openpi"), reinitialize=("^(expert|action_\\w+)/",), beside=run)
    trainer = _trainer(tiny_policy, MeshConfig(fsdp=2))
    params, plan = warm_start(start, trainer)
    fresh, flat = flatten(jax.device_get(trainer.init().params)), flatten(jax.device_get(params))
    assert set(flat) == set(mine) == {row["weight"] for row in plan.report}
    for name, x in flat.items():
        of = fresh if name.startswith("action_in/") else mine if name.startswith(("expert/", "action_")) else other
        np.testing.assert_array_equal(x, of[name], err_msg=name)
    with pytest.raises(WeightsError, match=r"(?s)cannot start from .*matches no weight"):
        warm_start(dataclasses.replace(start, beside=WarmStart(str(directory), reinitialize=("^acton",))), trainer)


def test_weights_of_a_run_that_is_damaged(copy, tiny_policy):
    (copy / "2" / "ema" / "_METADATA").unlink()
    trainer = _trainer(tiny_policy, MeshConfig())
    with pytest.raises(WeightsError, match="no weights at"):
        warm_start(WarmStart(str(copy)), trainer)


def test_what_cannot_be_served_is_listed_but_for_cameras_that_are_dropped(tiny_policy, contract_of):
    policy = dataclasses.replace(tiny_policy, action_horizon=SAWYER.action_horizon)
    extra = dataclasses.replace(SAWYER.cameras[0], name="ceiling")
    robot = dataclasses.replace(SAWYER, cameras=(*SAWYER.cameras, extra))
    contract = dataclasses.replace(contract_of(policy), robots=(robot,))
    assert contract_problems(contract, drop_cameras=("ceiling",)) == []
    (problem,) = contract_problems(contract)
    assert "camera 'ceiling' is not a slot of the policy" in problem
    assert "room for 4" in contract_problems(dataclasses.replace(contract, policy=tiny_policy))[1]


# ---- Which are kept, and what cannot be written ----------------------------------------------------------------------


def _steps(directory):
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def test_the_newest_the_best_and_every_so_many_are_kept(tmp_path, small):
    scores = {1: 3.0, 2: 0.5, 3: 2.0, 4: 1.0, 5: 4.0, 6: None, 7: 5.0}
    keep = Keep(newest=2, best=2, every=3)
    for steps in (range(1, 5), range(5, 8)):  # in two processes' lives: the second knows what the first has measured
        checkpointer = Checkpointer(tmp_path, keep=keep)
        for step in steps:
            checkpointer.save(**small(step), score=scores[step])
            checkpointer.wait()
        checkpointer.close()
    assert _steps(tmp_path) == [2, 3, 4, 6, 7]  # 2 and 4 are the best, 3 and 6 multiples, 6 and 7 the newest
    kept = {1: (), 2: ("best",), 3: ("every",), 4: ("best",), 5: (), 6: ("newest", "every"), 7: ("newest",)}
    assert keep.kept_by(scores) == kept
    assert Keep(newest=1, best=1).kept_by({1: math.nan, 2: 3.0, 3: 3.0, 4: None}) == {
        1: (), 2: (), 3: ("best",), 4: ("newest",)
    }  # fmt: skip
    assert keep.score({"loss/a": 1.0, "loss/b": 2.0, "action_mae/a/x": 9.0}) == 1.5
    assert Keep(metric="action_mae", best=1).score({"loss/a": 1.0, "action_mae/a/x": 9.0}) == 9.0
    with pytest.raises(ValueError, match=r"keep.metric='los' is not measured in validation; got \['loss/a'\]"):
        Keep(metric="los", best=1).score({"loss/a": 1.0})
    with pytest.raises(ValueError, match=r"newest=0.*best=-1.*every=0"):
        Keep(newest=0, best=-1, every=0)


def test_scores_of_another_metric_are_not_compared(tmp_path, small):
    """A run may go on with another one: its best are then those that have it."""
    for metric, scores in (("loss", {1: 0.1}), ("action_mae", {2: 5.0, 3: 9.0, 4: 7.0})):
        checkpointer = Checkpointer(tmp_path, keep=Keep(newest=1, best=1, metric=metric))
        for step, score in scores.items():
            checkpointer.save(**small(step), score=score)
            checkpointer.wait()
        checkpointer.close()
    assert _steps(tmp_path) == [2, 4]
    assert [stored_scores(tmp_path / str(step)) for step in (2, 4)] == [{"action_mae": 5.0}, {"action_mae": 7.0}]


def test_a_step_that_is_not_complete_is_in_the_way_of_no_save_unseen(tmp_path, small):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(**small(5))
    with pytest.raises(CheckpointError, match=r"step 4 is not saved: .*, expected none from this step on"):
        checkpointer.save(**small(4))
    checkpointer.close()
    with pytest.raises(CheckpointError, match=r"step 5 is not saved"):
        Checkpointer(tmp_path).save(**small(5))
    (tmp_path / "9" / "params").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"9 is not complete: .*; the newest complete step is 5"):
        Checkpointer(tmp_path)
    (tmp_path / "9").rename(tmp_path / "3")  # of an old one that was being deleted: it goes
    checkpointer = Checkpointer(tmp_path, keep=Keep(newest=1))
    checkpointer.save(**small(6))
    checkpointer.close()
    assert _steps(tmp_path) == [6]


def test_a_full_disk_costs_no_checkpoint_but_the_one_that_did_not_fit(tmp_path):
    """In a process of its own, which may write files of 100 kB at most from the second save on."""
    program = tmp_path / "fill.py"
    program.write_text(FILL)
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "checkpoints")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    message, newest = done.stdout.splitlines()[-2:]
    assert "could not be written to" in message
    assert "the newest complete checkpoint is 1; make room" in message
    assert newest == "1 True 3"  # the intact one is what is restored; with room again, the next one is written
    assert _steps(tmp_path / "checkpoints") == [1, 3]


FILL = """
import resource, signal, sys
import jax, numpy as np
from openpi_like.train.checkpoints.checkpoint import Checkpointer, Keep
from openpi_like.train.checkpoints.contract import CheckpointError
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.state import TrainState
from openpi_like.data.sentencepiece_model import SentencePieceTokenizer
from openpi_like.models.pi0 import Pi0Config
from openpi_like.train.checkpoints.contract import Contract

config = Pi0Config.tiny(cameras=("a",), state_dim=1, action_dim=1, action_horizon=1, prompt_len=4, vocab_size=8)
contract = Contract(config, (), {}, SentencePieceTokenizer(""), {})
weights = lambda step: {"w": jax.random.normal(jax.random.key(step), (300_000,))}


def save(step):
    state = TrainState(np.int32(step), weights(step), {}, None, {"n": jax.numpy.int32(step)})
    checkpointer.save(state, position=0, order={}, contract=contract, config=OptimizerConfig())
    checkpointer.wait()


checkpointer = Checkpointer(sys.argv[1], keep=Keep(newest=5))
save(1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    save(2)
except CheckpointError as e:
    print(e)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpointer = Checkpointer(sys.argv[1], keep=Keep(newest=5))  # as a run that is started again
abstract = jax.eval_shape(lambda: TrainState(np.int32(0), weights(0), {}, None, {"n": jax.numpy.int32(0)}))
everywhere = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), abstract)
newest = checkpointer.latest_step()
restored = checkpointer.restore(abstract, everywhere, contract=contract)[0]
intact = bool((restored.params["w"] == weights(1)["w"]).all())
save(3)
checkpointer.close()
print(newest, intact, checkpointer.latest_step())
"""
