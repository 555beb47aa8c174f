"""A small run, a machine to plan it for, and its plan."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from openpi_like.config import load_run
from openpi_like.models.pi0 import Pi0Config
from openpi_like.train.config import TrainConfig
from openpi_like.train.planning.chips import Chip
from openpi_like.train.planning.plan import Plan, plan_step
from openpi_like.train.planning.topology import Target, this_machine
from openpi_like.train.sharding import MeshConfig
from tests.conftest import REPOSITORY

CHIP = Chip("toy", ("Toy",), tflops=0.001, memory_gib=1.0, memory_gbps=1.0, link_gbps=0.1)


@pytest.fixture(scope="module")
def config(tiny_policy: Pi0Config) -> TrainConfig:
    """A run of the smallest pi0 on four chips; its data are not there."""
    run = load_run(REPOSITORY / "configs" / "studies" / "pi0.py")
    # Not as a loop, which computes what the last layer's tokens would need, though nobody reads them.
    model = dataclasses.replace(tiny_policy, unroll=True)
    return dataclasses.replace(run, model=model, batch_size=8, mesh=MeshConfig(data=2, fsdp=2))


@pytest.fixture(scope="module")
def machine() -> Target:
    """The four devices of the tests, as chips with peaks."""
    return dataclasses.replace(this_machine(), chip=CHIP, limit=2**30)


@pytest.fixture(scope="session")
def compiled() -> dict[str, Any]:
    """Programs by their text, of all modules that plan."""
    return {}


@pytest.fixture(scope="module")
def compile_once(compiled: dict[str, Any]) -> Iterator[None]:
    """Programs are compiled once, for whatever machine they are planned; nobody runs them."""
    compile, made = jax.stages.Lowered.compile, compiled

    def cached(lowered: Any) -> Any:
        text = lowered.as_text()
        if text not in made:
            try:  # three times faster
                made[text] = compile(lowered, compiler_options={"xla_cpu_use_fusion_emitters": False})
            except jax.errors.JaxRuntimeError:  # a version without this choice
                made[text] = compile(lowered)
        return made[text]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", cached)
        yield


@pytest.fixture(scope="module")
def step(config: TrainConfig, machine: Target, compile_once: None) -> Plan:
    """The training step of `config` on `machine`."""
    return plan_step(config, machine)
