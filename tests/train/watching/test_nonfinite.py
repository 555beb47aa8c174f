"""Which samples a step that is not finite was of, on the toy dataset; and how many such steps a run puts up with."""

import dataclasses
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from openpi_like.data.augment import Augment
from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.index import open_index
from openpi_like.data.loader import Loader, make_loader
from openpi_like.data.sentencepiece_model import fit_text_tokenizer
from openpi_like.data.stats import compute_normalization
from openpi_like.data.text import TextTokenizer
from openpi_like.draws import sample_keys
from openpi_like.partition import ShardingRules
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.sharding import MeshConfig
from openpi_like.train.state import ModelDef, Trainer
from openpi_like.train.watching.nonfinite import (
    SHOWN,
    BadSteps,
    NonFiniteLossError,
    SampleLoss,
    SampleLosses,
    describe_samples,
)
from tests.data.toy import ARM, CART, PROMPTS, Shapes

SIZE = 8
BAD = {"loss": float("nan"), "grad_norm": float("inf")}


class Effort(nnx.Module):
    """A policy whose loss of a sample is the size of its actions, with a draw, and more for bright images."""

    config = types.SimpleNamespace(perception=None)

    def __init__(self) -> None:
        self.weight = nnx.Param(jnp.ones(3), axes=("embed",))

    def loss(self, key: jax.Array, batch: Any) -> Any:
        image = batch["images"]["base"]
        image = image / 127.5 - 1 if image.dtype == jnp.uint8 else image
        drawn = jax.vmap(jax.random.uniform)(sample_keys(key, batch["position"]))
        size = jnp.square(batch["actions"]).mean(axis=(1, 2))
        per_sample = (size + drawn) * (image * self.weight[...] + 2).mean(axis=(1, 2, 3))
        return per_sample.mean(), {"loss": per_sample, "valid": jnp.ones(len(per_sample))}


def make_trainer(*, augment: Augment | None = None) -> Trainer:
    return Trainer(
        ModelDef(types.SimpleNamespace(create=lambda key: Effort())),
        OptimizerConfig().create(),
        ema_decay=None,
        seed=3,
        mesh=MeshConfig(data=2, fsdp=2).create(),
        rules=ShardingRules(),
        dataset_names=("arm", "cart"),
        augment=augment,
    )


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return make_trainer()


@pytest.fixture
def loader(toy: Path) -> Iterator[Loader]:
    """Three of four samples from one robot, one of four from the other; from sample 16 on."""
    made = make_loader(
        DataConfig((MixtureEntry(ARM, str(toy), weight=3.0), MixtureEntry(CART, str(toy), weight=1.0)), seed=5),
        batch_size=SIZE,
        policy=Shapes(),
        tokenizer=TextTokenizer(fit_text_tokenizer([*PROMPTS, "roll"], 400), Shapes().prompt_len),
        normalizations={
            r.name: compute_normalization(EpisodeDataset(open_index(toy, "train"), r)) for r in (ARM, CART)
        },
        start=16,
    )
    yield made
    made.close()


def spoil(batch: Any, rows: list[int]) -> Any:
    actions = batch["actions"].copy()
    actions[rows, 0, 0] = np.nan
    return batch | {"actions": actions}


def test_the_samples_of_a_bad_step_are_named_by_file_and_episode(
    trainer: Trainer, loader: Loader, tmp_path: Path
) -> None:
    batch = spoil(next(loader), [1, 6])
    bad = BadSteps(trainer, loader.where, tmp_path, most=0)
    state = trainer.init()
    with pytest.raises(NonFiniteLossError) as raised:
        bad.look(3, BAD, batch, state)
    text = str(raised.value)
    assert text.startswith("step 3: loss nan, gradient norm inf, expected finite numbers")
    assert "the losses of 2 of 8 samples are not finite" in text
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(lines) == 2
    for line, position in zip(lines, (17, 22), strict=True):
        name = ("arm", "cart")[batch["dataset_id"][position - 16]]
        assert line.startswith(f"  {name}: ")
        assert loader.where(position) in line
        assert re.search(r"episode \d+, step \d+ \(\S*tfrecord\S*, record \d+\)", line)
        assert line.endswith(f"loss nan, sample {position}")
    with np.load(tmp_path / "nonfinite_step3.npz") as file:
        kept = dict(file)
    np.testing.assert_array_equal(kept["actions"], batch["actions"])


def test_the_losses_are_those_of_the_step(trainer: Trainer, tiny_batch: Any) -> None:
    """With what augmentation and the loss draw for the samples, on four devices."""
    plain = SampleLoss(trainer)(trainer.init(), tiny_batch)
    trainer = make_trainer(augment=Augment.octo())
    state = trainer.init()
    found = SampleLoss(trainer)(state, tiny_batch)
    assert found.bad_weights == 0
    assert found.position.tolist() == (2**32 - 3 + np.arange(8)).tolist()
    values = trainer.train_step(state, tiny_batch)[1]
    assert values["loss"] == pytest.approx(found.loss.mean(), rel=1e-5)
    assert values["loss/arm"] == pytest.approx(found.loss[::2].mean(), rel=1e-5)
    assert np.abs(found.loss - plain.loss).max() > 1e-4  # other images


def test_weights_that_are_not_finite_blame_no_sample(trainer: Trainer, loader: Loader) -> None:
    state = dataclasses.replace(trainer.init(), params={"weight": jnp.array([jnp.nan, 1.0, jnp.inf])})
    found = SampleLoss(trainer)(state, next(loader))
    assert found.bad_weights == 2
    text = describe_samples(found, ("arm", "cart"), loader.where)
    assert "the losses of all 8 samples are not finite, so they do not say which one is to blame; 2 weights are" in text
    arms = int((found.dataset_id == 0).sum())
    assert f"(by dataset: arm {arms}, cart {8 - arms}):" in text


def test_what_is_said_is_bounded_and_says_how_much_is_left_out() -> None:
    loss = np.full(40, np.nan)
    loss[7] = 1.0
    found = SampleLosses(loss, np.zeros(40, int), np.arange(40)[::-1], 0)
    lines = describe_samples(found, ("arm",), lambda p: f"place {p}").splitlines()
    assert len(lines) == 1 + SHOWN + 1
    assert lines[0].startswith("the losses of 39 of 40 samples")
    assert lines[1] == "  arm: place 0: loss nan, sample 0"  # in the order of the run
    assert lines[-1] == f"  and {39 - SHOWN} more"
    finite = SampleLosses(np.ones(4), np.zeros(4, int), np.arange(4), 0)
    assert "the gradient overflowed" in describe_samples(finite, ("arm",), str)


def test_bad_steps_are_counted_also_those_before_and_the_one_too_many_ends_the_run(
    trainer: Trainer, loader: Loader, tmp_path: Path
) -> None:
    said: list[str] = []
    bad = BadSteps(trainer, loader.where, tmp_path, most=3, count=1, say=said.append)
    state, batch = trainer.init(), spoil(next(loader), [2])
    assert bad.look(10, {"loss": 1.0, "grad_norm": 2.0}, batch, state)
    assert bad.count == 1
    assert not bad.look(11, {"loss": 1.0, "grad_norm": float("nan")}, batch, state)
    assert not bad.look(13, BAD, batch, state)
    assert (bad.count, len(said)) == (3, 2)
    assert said[0].startswith("step 11: loss 1.0, gradient norm nan, expected finite numbers; skipped, 2 of at most 3")
    assert loader.where(18) in said[1]
    assert not list(tmp_path.iterdir())  # nothing is kept of steps that are skipped
    with pytest.raises(NonFiniteLossError, match="3 such steps were skipped before"):
        bad.look(20, BAD, batch, state)
    assert [p.name for p in tmp_path.iterdir()] == ["nonfinite_step20.npz"]
