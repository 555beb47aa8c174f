"""What tests of several processes share, and those of checkpoints; the toy dataset of the data tests."""

import dataclasses
import io
import runpy
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from openpi_like.data.normalize import FieldStats, Normalization
from openpi_like.data.sentencepiece_model import fit_text_tokenizer
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.weights import flatten, unflatten
from openpi_like.robots.sawyer import SAWYER
from openpi_like.train.checkpoints.checkpoint import Checkpointer, save_policy
from openpi_like.train.checkpoints.contract import Contract
from openpi_like.train.checkpoints.warm_start import WarmStart
from openpi_like.train.config import TrainConfig
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.state import ModelDef, TrainState
from tests.conftest import REPOSITORY
from tests.data.conftest import tfds, toy  # noqa: F401  fixtures
from tests.train.run_files import LORA_BASE, ORDER, read, run_config


@pytest.fixture
def address() -> str:
    """A free port of this machine, as the coordinator's address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"localhost:{server.getsockname()[1]}"


@pytest.fixture(scope="session")
def contract_of() -> Callable[[Any], Contract]:
    """Returns a function that makes the contract of a policy for Sawyer."""

    def stats(names: tuple[str, ...]) -> FieldStats:
        n = len(names)
        return FieldStats(names, (0.5,) * n, (2.0,) * n, (-1.0,) * n, (1.0,) * n, (-3.0,) * n, (3.0,) * n, 10)

    normalization = Normalization(SAWYER.name, "zscore", stats(SAWYER.state_names), stats(SAWYER.action_names))
    tokenizer = fit_text_tokenizer(["press the button"], 300)

    def make(policy: Any) -> Contract:
        return Contract(
            policy=policy,
            robots=(SAWYER,),
            normalizations={SAWYER.name: normalization},
            tokenizer=tokenizer,
            renderers={SAWYER.name: "raycast"},
        )

    return make


@pytest.fixture(scope="session")
def policy(tiny_policy: Pi0Config) -> Pi0Config:
    """The tiny one, with room for Sawyer."""
    return dataclasses.replace(
        tiny_policy,
        cameras=tuple(c.name for c in SAWYER.cameras),
        state_dim=SAWYER.state_size,
        action_dim=SAWYER.action_size,
        action_horizon=SAWYER.action_horizon,
    )


@pytest.fixture(scope="session")
def small(contract_of: Callable[[Any], Contract], tiny_policy: Pi0Config) -> Callable[..., dict[str, Any]]:
    """Returns a function that makes a state of a step with hardly any weights, and what is saved with it."""

    def make(step: int, size: int = 4, config: Any = OptimizerConfig()) -> dict[str, Any]:
        weights = {"w": jnp.full(size, float(step))}
        state = TrainState(np.int32(step), weights, {}, None, {"count": jnp.int32(step)})
        rest = {"order": ORDER, "contract": contract_of(tiny_policy), "config": config}
        return {"state": state, "position": 8 * step, **rest}

    return make


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, policy: Pi0Config, contract_of: Callable[[Any], Contract]) -> Path:
    """Runs of random weights: base, of three steps; kept and noted, of LoRA on it; imported, of its weights."""
    root, contract = tmp_path_factory.mktemp("runs"), contract_of(policy)

    def weights(model: ModelDef, seed: int) -> dict[str, jax.Array]:
        rng = np.random.default_rng(seed)
        return {k: jnp.asarray(rng.normal(size=v.shape), jnp.float32) for k, v in flatten(model.shapes).items()}

    def save(
        checkpointer: Checkpointer,
        config: TrainConfig,
        step: int,
        params: dict[str, jax.Array],
        frozen: Any,
        score: float | None = None,
    ) -> None:
        nested = unflatten(params)
        ema = jax.tree.map(lambda x: x + 1, nested)
        state = TrainState(
            np.int32(step),
            nested,
            frozen,
            ema,
            config.optimizer.create(ModelDef(config.model, config.trainable).maps).init(nested),
        )
        if frozen:
            checkpointer.begin(state, source=None if config.save_frozen else config.warm_start)
        checkpointer.save(state, position=8 * step, order=ORDER, contract=contract, config=config, score=score)
        checkpointer.wait()

    config = run_config(root / "base", policy)
    model, checkpointer = ModelDef(policy), Checkpointer(root / "base" / "checkpoints", keep=config.keep)
    for step, score in ((10, 2.0), (20, 3.0), (30, None)):
        save(checkpointer, config, step, weights(model, step), {}, score)
    checkpointer.close()
    base = read(root / "base" / "checkpoints" / "30" / "ema")
    for name, trainable in LORA_BASE.items():
        start = WarmStart(str(root / "base"))
        config = run_config(root / name, policy, trainable=trainable, warm_start=start, save_frozen=name == "kept")
        model = ModelDef(policy, trainable)
        checkpointer = Checkpointer(root / name / "checkpoints", trainable=trainable)
        trained = {k: v for k, v in weights(model, 1).items() if k in model.trained}
        frozen = {k: model.hold(k, jnp.asarray(v)) for k, v in base.items() if k not in model.trained}
        save(checkpointer, config, 5, trained, unflatten(frozen))
        checkpointer.close()
    bfloat16 = {k: jnp.asarray(v, jnp.bfloat16) for k, v in base.items()}
    save_policy(root / "imported", unflatten(bfloat16), contract=contract, origin="a test")
    return root


@pytest.fixture
def copy_run(runs: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Returns a function that copies one of these runs, to damage it."""
    return lambda name: Path(shutil.copytree(runs / name, tmp_path / name))


@pytest.fixture(scope="session")
def call() -> Callable[..., tuple[int, str]]:
    """Returns a function that calls train/checkpoints.py, and returns its exit status and what it prints."""
    program = runpy.run_path(str(REPOSITORY / "train" / "checkpoints.py"))

    def run(*arguments: Any) -> tuple[int, str]:
        text = io.StringIO()
        status = program["main"]([str(a) for a in arguments], Console(file=text, width=250))
        return status, text.getvalue()

    return run
