"""M2-VLA's and VLA-Adapter's heads beside the released code's numbers, see tests/bench/golden_m2vla.py."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from openpi_like.models.layer_mixture import LayerFeatures
from openpi_like.models.llama import LlamaConfig
from openpi_like.models.m2vla import M2Vla, M2VlaConfig
from openpi_like.models.prismatic import PrismaticConfig
from openpi_like.models.siglip import SiglipConfig
from openpi_like.models.skill_memory import SkillMemoryConfig
from openpi_like.models.vla_adapter import VlaAdapterConfig
from openpi_like.models.weights import (
    bind,
    export_weights,
    flat_weights,
    flatten,
    named_weights,
    plan_load,
    read_weights,
    unflatten,
)
from tests.models.weight_arrays import MemoryArrays

GOLDEN = Path(__file__).parent / "golden"
SKILLS = SkillMemoryConfig(size=7, recalled=2, layers=(0, 2, 3))


@dataclasses.dataclass(frozen=True)
class Case:
    """Our policy with their weights, and their numbers."""

    model: M2Vla
    numbers: dict[str, np.ndarray]

    def features(self, hidden_BLTD: np.ndarray) -> LayerFeatures:
        """Returns hidden states as the head reads them."""
        hidden = jnp.moveaxis(jnp.asarray(hidden_BLTD), 1, 0)
        P = hidden.shape[2] - self.model.config.queries
        return LayerFeatures(hidden[1:, :, P:], hidden[1:, :, :P], jnp.ones((hidden.shape[1], P), bool))

    def keys(self, seen_BLPD: np.ndarray) -> jax.Array:
        """Returns keys of the memory for hidden states of images."""
        mask = jnp.ones((len(seen_BLPD), seen_BLPD.shape[2]), bool)
        return self.model.keys(jnp.moveaxis(jnp.asarray(seen_BLPD), 1, 0), mask)

    def found(self) -> jax.Array:
        """Returns what the memory finds for the case's images."""
        seen = self.numbers["hidden"][:, :, : -self.model.config.queries]
        return self.model.skills.recall(self.keys(seen))


def said(model: M2Vla, case: Case, found: jax.Array | None) -> jax.Array:
    """Returns the chunk, as `M2Vla.predict` makes it of what the backbone says."""
    A, E = model.config.action_horizon, model.map_in.kernel[...].shape[0]
    x = jax.nn.relu(model.map_in(model.norm_in(jnp.zeros((3, A, E)))))
    recalled = None if found is None else model.skill_in(found)
    return model.head(x, case.features(case.numbers["hidden"]), jnp.asarray(case.numbers["state_token"]), recalled)


@pytest.fixture(scope="module", params=["m2vla", "vla_adapter"])
def case(request: pytest.FixtureRequest) -> Case:
    numbers = dict(np.load(GOLDEN / f"{request.param}_head.npz"))
    A, J = numbers["actions"].shape[1:]
    L, D = numbers["hidden"].shape[1] - 1, numbers["hidden"].shape[3]
    cls, skills = {"m2vla": (M2VlaConfig, SKILLS), "vla_adapter": (VlaAdapterConfig, None)}[request.param]
    siglip = SiglipConfig(width=8, depth=2, mlp_dim=8, num_heads=2, patch_size=8, select="second_to_last")
    llama = LlamaConfig.tiny(width=D, depth=L, mlp_dim=8, num_kv_heads=2, head_dim=8, tied=True)
    config = cls(
        backbone=PrismaticConfig(None, siglip, llama),
        cameras=("base",),
        image_slots=(1,),
        image_size=(16, 16),
        state_dim=2,
        action_dim=J,
        action_horizon=A,
        prompt_len=4,
        vocab_size=32,
        queries=4,
        skills=skills,
        as_released=True,
    )
    fresh = flat_weights(config.create(jax.random.key(0)))
    theirs = {name: make() for name, make in export_weights(config, fresh, "openvla")}
    theirs |= {f"action_head.{k[7:]}": v for k, v in numbers.items() if k.startswith("weight/")}
    source = MemoryArrays(theirs)
    return Case(bind(config, unflatten(read_weights(source, plan_load(config, source)))), numbers)


def test_what_it_says(case: Case) -> None:
    """With what three writes left in a memory of seven rows, and before any."""
    if case.model.config.skills is None:
        np.testing.assert_allclose(said(case.model, case, None), case.numbers["said"], atol=2e-5)
        return
    empty = case.found()
    assert not empty.any()
    np.testing.assert_allclose(said(case.model, case, empty), case.numbers["empty"], atol=2e-5)
    for seen, chunk in zip(case.numbers["written"], case.numbers["written_actions"], strict=True):
        rows = case.model.skills.written(case.keys(seen), jnp.asarray(chunk).reshape(3, -1), jnp.ones(3, bool))
        for name, value in rows.items():
            getattr(case.model.skills, name)[...] = value
    np.testing.assert_allclose(case.keys(case.numbers["hidden"][:, :, :-4]), case.numbers["keys"], atol=1e-6)
    np.testing.assert_array_equal(case.found(), case.numbers["found"])
    np.testing.assert_allclose(said(case.model, case, case.found()), case.numbers["said"], atol=2e-5)


def test_gradients(case: Case) -> None:
    """Of the mean absolute error, by their names."""
    found = None if case.model.config.skills is None else jnp.asarray(case.numbers["found"])

    def error(model: M2Vla) -> jax.Array:
        return jnp.abs(said(model, case, found) - case.numbers["actions"]).mean()

    ours = {name: np.asarray(x) for name, x in flatten(named_weights(nnx.grad(error)(case.model))).items()}
    theirs = dict(export_weights(case.model.config, ours, "openvla"))
    wanted = {name[9:]: x for name, x in case.numbers.items() if name.startswith("gradient/")}
    assert len(wanted) >= 9
    for name, expected in wanted.items():
        np.testing.assert_allclose(theirs[f"action_head.{name}"](), expected, atol=1e-5, err_msg=name)
