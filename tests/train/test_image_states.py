"""What a frozen backbone makes of images, kept for every frame: read in their place, and refused where it is of other
frames, another policy or other weights."""

import dataclasses
import io
import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from openpi_like.data.augment import Augment
from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.data.dataset import open_dataset
from openpi_like.data.image_states import ImageStates, Writer
from openpi_like.data.loader import make_loader
from openpi_like.data.prompts import OpenVlaPrompt
from openpi_like.data.schema import DatasetError
from openpi_like.data.sentencepiece_model import fit_text_tokenizer
from openpi_like.data.stats import compute_normalization, save_normalization
from openpi_like.models.llama import LlamaConfig
from openpi_like.models.m2vla import FROZEN, M2VlaConfig
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.prismatic import PrismaticConfig
from openpi_like.models.siglip import SiglipConfig
from openpi_like.models.skill_memory import SkillMemoryConfig
from openpi_like.models.weights import flatten
from openpi_like.train.checkpoints.contract import CheckpointError
from openpi_like.train.config import TrainConfig
from openpi_like.train.image_states import check_image_states
from openpi_like.train.planning.flops import model_flops
from openpi_like.train.sharding import MeshConfig, put_batch
from openpi_like.train.state import Trainable
from tests.conftest import REPOSITORY
from tests.data.toy import ARM, PROMPTS

PROGRAM = runpy.run_path(str(REPOSITORY / "train" / "image_states.py"))
FRAMES = 110  # of split train


@pytest.fixture(scope="module")
def config(toy: Path, tiny_policy: Pi0Config, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    root = tmp_path_factory.mktemp("kept")
    siglip = SiglipConfig(width=16, depth=2, mlp_dim=32, num_heads=2, patch_size=8, select="second_to_last")
    llama = LlamaConfig.tiny(width=16, depth=2, mlp_dim=32, num_kv_heads=2, head_dim=8, tied=True)
    model = M2VlaConfig(
        backbone=PrismaticConfig(None, siglip, llama),
        cameras=("base", "wrist", "third"),
        image_slots=(1, 1, 1),
        image_size=(16, 16),
        state_dim=6,
        action_dim=4,
        action_horizon=6,
        prompt_len=64,
        vocab_size=300,
        prompt_format=OpenVlaPrompt(),
        queries=4,
        head_heads=2,
        skills=SkillMemoryConfig(size=12, recalled=3, layers=(0, 2), written=0.5, apart=True),
    )
    save_normalization(compute_normalization(open_dataset(toy, ARM, "train")), root / "stats" / "arm.json")
    (root / "text.model").write_bytes(fit_text_tokenizer([*PROMPTS, "x"], 300).content())
    return TrainConfig(
        run_dir=str(root / "run"),
        model=model,
        data=DataConfig((MixtureEntry(ARM, str(toy)),)),
        stats=str(root / "stats"),
        tokenizer=str(root / "text.model"),
        batch_size=8,
        steps=2,
        trainable=Trainable(frozen=FROZEN),
        mesh=MeshConfig(fsdp=4),
        seed=5,
    )


def keep(config: TrainConfig, out: Path) -> str:
    text = io.StringIO()
    PROGRAM["main"](PROGRAM["Args"](config=Path("c"), out=out), config, Console(file=text, width=300))
    return text.getvalue()


def with_states(config: TrainConfig, path: Path, **data: Any) -> TrainConfig:
    entry = dataclasses.replace(config.data.entries[0], image_states=str(path))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, entries=(entry,), **data))


def loader_of(config: TrainConfig) -> Any:
    contract = config.contract()
    return make_loader(
        config.data,
        batch_size=8,
        policy=config.model,
        tokenizer=contract.text_tokenizer(),
        normalizations=contract.normalizations,
    )


@pytest.fixture(scope="module")
def kept(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("states")
    assert f"{FRAMES} frames of" in keep(config, out)
    return out / "0"


@pytest.fixture
def copied(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "copied"))


def test_steps_with_and_without_are_the_same(config: TrainConfig, kept: Path) -> None:
    """From the same weights, the loss to the last bit or the one beside it; what a step makes of them up to rounding.

    They are two programs, and a compiler that sees where the states come from orders sums behind them otherwise. A
    batch has all that it had, but for the images.
    """
    of = with_states(config, kept)
    loaders, trainers = [loader_of(c) for c in (config, of)], [c.trainer(c.mesh.create()) for c in (config, of)]
    state, trainer = trainers[0].init(), trainers[1]
    check_image_states(of.data, trainer, state)
    make = jax.jit(lambda w, b: trainer.model.bind(w).backbone.image_states(config.model.observation(b)).swapaxes(0, 1))
    kept_rows, made_rows = [], []
    for _ in range(3):
        seen, read = (next(loader) for loader in loaders)
        states, losses = zip(
            *(
                t.train_step(jax.tree.map(jnp.copy, state), put_batch(b, t.mesh))
                for t, b in zip(trainers, (seen, read), strict=True)
            ),
            strict=True,
        )
        kept_rows.append(read["image_states"])
        with trainer.tracing():
            made_rows.append(jax.device_get(make(state.weights(average=False), put_batch(seen, trainer.mesh))))
        remade = {**read, "image_states": made_rows[-1]}
        _, same = trainer.train_step(jax.tree.map(jnp.copy, state), put_batch(remade, trainer.mesh))
        seen_loss, read_loss = (np.asarray(metrics["loss"]) for metrics in losses)
        np.testing.assert_array_equal(read_loss, same["loss"])
        np.testing.assert_array_max_ulp(seen_loss, read_loss, maxulp=1)
        weights, others = (flatten(jax.device_get(after.params)) for after in states)
        for name, x in weights.items():
            np.testing.assert_allclose(others[name], x, rtol=1e-5, atol=1e-6, err_msg=name)
        state = states[0]
    for loader in loaders:
        loader.close()
    # Other frames stood beside them when they were kept, in a batch as large.
    np.testing.assert_array_equal(np.concatenate(kept_rows), np.concatenate(made_rows))
    assert read["images"] == {}
    assert read["image_states"].shape == (8, 3, 3 * 4 + 1, 16)
    for name in seen.keys() - {"images"}:
        jax.tree.map(np.testing.assert_array_equal, read[name], seen[name])
    with_images = model_flops(trainer.model, config.batch_shapes(1))
    assert model_flops(trainer.model, of.batch_shapes(1)) < 0.97 * with_images


def test_a_stopped_program_goes_on(config: TrainConfig, kept: Path, copied: Path) -> None:
    """From the last whole row; and what is finished is not done again."""
    whole = (kept / "states.bin").read_bytes()
    (copied / "image_states.json").rename(copied / "begun.json")
    (copied / "states.bin").write_bytes(whole[: len(whole) // 2 + 3])
    with pytest.raises(DatasetError, match="not finished; make them with"):
        ImageStates(copied)
    target = copied.rename(copied.parent / "0")
    assert f"{FRAMES // 2} there" in keep(config, target.parent)
    assert (target / "states.bin").read_bytes() == whole
    # What nothing says anything of is made again.
    (target / "image_states.json").unlink()
    (target / "states.bin").write_bytes(bytes(len(whole)))
    assert ", 0 there" in keep(config, target.parent)
    assert (target / "states.bin").read_bytes() == whole
    assert f"{FRAMES} there" in keep(config, target.parent)
    assert (target / "states.bin").read_bytes() == whole


def _cut(path: Path) -> None:
    rows = path / "states.bin"
    rows.write_bytes(rows.read_bytes()[:-1])


def _edit(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        record = json.loads((path / "image_states.json").read_text())
        (path / "image_states.json").write_text(json.dumps({**record, **changes}))

    return edit


@pytest.mark.parametrize(("change", "said"), [
    (shutil.rmtree, "not there; make them with"),
    (_cut, "states.bin: .* bytes, expected"),
    (_edit(more=1), "of another version"),
    (lambda path: (path / "image_states.json").write_text("{"), "image_states.json: Expecting"),
    (_edit(frames="other"), "are not of .*'train' as the policy sees it:\n  frames: other, expected"),
    (_edit(robot="cart"), "robot: cart, expected arm"),
    (_edit(data="toy_arm/0.9.0 train"), r"data: toy_arm/0.9.0 train, expected toy_arm/1.0.0 train"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(config: TrainConfig, copied: Path, change: Any, said: str) -> None:
    change(copied)
    with pytest.raises(DatasetError, match=said):
        loader_of(with_states(config, copied))


def test_other_text_before_images_is_refused(config: TrainConfig, copied: Path) -> None:
    _edit(begins_with=[7])(copied)
    with pytest.raises(ValueError, match=r"text before the images is \[7\] in them, and \[2\] in prompts"):
        loader_of(with_states(config, copied))


def test_another_policy_other_weights_and_other_data_are_refused(config: TrainConfig, kept: Path) -> None:
    larger = dataclasses.replace(config, model=dataclasses.replace(config.model, image_size=(24, 24), resize="pillow"))
    with pytest.raises(DatasetError, match=r"image_size: .*16.*, expected .*24.*\n  resize: cubic, expected pillow"):
        loader_of(with_states(larger, kept))
    with pytest.raises(DatasetError, match="are of other data, another policy, or other weights; remove them"):
        keep(larger, kept.parent)
    other = with_states(dataclasses.replace(config, seed=6), kept)
    trainer = other.trainer(other.mesh.create())
    with pytest.raises(CheckpointError, match=r"are of other weights .* make them again"):
        check_image_states(other.data, trainer, trainer.init())
    moving = with_states(dataclasses.replace(config, trainable=Trainable(frozen=("^vlm/",))), kept)
    trainer = moving.trainer(moving.mesh.create())
    with pytest.raises(CheckpointError, match=r"weights are trained, such as 'projector/.*freeze it"):
        check_image_states(moving.data, trainer, trainer.init())
    part = dataclasses.replace(config.data.entries[0], split="train[:50%]", image_states=str(kept))
    with pytest.raises(DatasetError, match="count: 110, expected"):
        loader_of(dataclasses.replace(config, data=dataclasses.replace(config.data, entries=(part,))))


def test_images_that_change_and_policies_that_read_images_are_refused(
    config: TrainConfig, kept: Path, tiny_policy: Pi0Config
) -> None:
    for changed in ({"augment": Augment.octo()}, {"camera_dropout": 0.1}):
        with pytest.raises(ValueError, match="image_states with augment or camera_dropout"):
            with_states(config, kept, **changed)
    entry = dataclasses.replace(config.data.entries[0], image_states=str(kept))
    with pytest.raises(ValueError, match="image_states of some entries, expected of all or of none"):
        dataclasses.replace(config.data, entries=(entry, config.data.entries[0]))
    pi0 = dataclasses.replace(config, model=dataclasses.replace(tiny_policy, state_dim=6))
    with pytest.raises(ValueError, match="Pi0Config reads images, not image_states"):
        with_states(pi0, kept).batch_shapes(8)
    trainer = pi0.trainer(pi0.mesh.create())
    with pytest.raises(CheckpointError, match="Pi0Config reads images, not image_states"):
        check_image_states(with_states(pi0, kept).data, trainer, trainer.init())


def test_numbers_that_are_not_finite_are_not_written(kept: Path, tmp_path: Path) -> None:
    of = ImageStates(kept).of
    rows = np.zeros((2, *of.shape), np.float32)
    rows[1, 0, 0, 0] = np.nan
    with Writer(tmp_path, of) as writer:
        with pytest.raises(ValueError, match="frame 1 are not finite"):
            writer.write(rows)
        with pytest.raises(ValueError, match=r"got float64 .*, expected float32"):
            writer.write(rows.astype(np.float64))
        with pytest.raises(ValueError, match="0 frames, expected 110"):
            writer.finish()
        with pytest.raises(DatasetError, match="another program writes them"):
            Writer(tmp_path, of)
