"""Fine-tuning presets: of every policy, what is trained is what its parts are, and what makes no sense is refused."""

import dataclasses
from typing import Any

import pytest
from flax import nnx

from openpi_like.models.lora import Lora, is_lora
from openpi_like.models.openvla_oft import OpenVlaOftConfig
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.prismatic import PrismaticConfig
from openpi_like.models.weights import abstract_model, flatten
from openpi_like.train.presets import PRESETS, expert_only, frozen_vision, full, lora, parts
from openpi_like.train.state import ModelDef, Trainable
from tests.models.test_policies import OWN

# What looks at images, and what the policy adds to its backbone, by hand.
ADAPTER = ("head", "map_in", "norm_in", "queries", "state_in", "state_out")
PI0 = ("action_in", "action_out", "action_time_in", "action_time_out", "state_in")
ONE_TOWER = ("siglip",)
VISION = {
    "dima_teacher": ONE_TOWER,
    "prismatic": ("dino", "siglip"),
    "m2vla": ONE_TOWER,
    "m2vla_noise": ONE_TOWER,
    "vla_adapter": ONE_TOWER,
    "dexvla": ONE_TOWER,
}
EXPERT = dict.fromkeys(("pi0", "pi05", "smolvla", "pi0_entities"), ("expert",))
BLIND = ("dima_student",)  # has no language model, and so nothing that the preset of LoRA lies on
SMALL = {
    "pi0": PI0,
    "smolvla": PI0,
    "pi05": ("action_in", "action_out", "time_in", "time_out"),
    "pi0_entities": (*PI0, "entities"),
    "dima": ("student", "teacher"),
    "dima_student": ("student",),
    "dima_teacher": ("entities", "student", "teacher"),
    "dima_perception": ("entities", "perception", "student", "teacher"),
    "vlm4vla": ("action_head", "action_query"),
    "openvla_oft": ("action_head", "state_in", "state_out"),
    "prismatic": ("action_head", "state_in", "state_out"),
    "vla_adapter": ADAPTER,
    "dexvla": ("expert", "fusion"),  # the expert is no language model, and is trained in full beside LoRA
    "m2vla": (*ADAPTER, "skill_in", "skills"),
    "m2vla_noise": (
        *("action_in", "action_position", "head", "queries", "skill_in", "skills"),
        *("state_in", "state_out", "step_in", "step_out"),
    ),
}
KINDS = (*OWN, "pi0", "pi05", "prismatic")


@pytest.fixture(scope="module")
def policies(tiny_policy: Pi0Config) -> dict[str, Any]:
    """By name; "prismatic" is OpenVLA-OFT on the backbone with two towers."""

    def make(cls: Any, **own: Any) -> Any:
        common = {f.name: getattr(tiny_policy, f.name) for f in dataclasses.fields(cls) if hasattr(tiny_policy, f.name)}
        return cls(**{**common, **own})

    return {
        **{name: make(cls, **own) for name, (cls, own) in OWN.items()},
        "pi0": tiny_policy,
        "pi05": dataclasses.replace(tiny_policy, pi05=True),
        "prismatic": make(OpenVlaOftConfig, backbone=PrismaticConfig.tiny(), image_size=(32, 32), head_width=16),
    }


def trained(policy: Any, trainable: Trainable) -> tuple[set[str], set[str]]:
    """Returns the names of weights that are trained, and of those that are not."""
    model = ModelDef(policy, trainable)
    return set(model.trained), set(flatten(model.shapes)) - model.trained


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_those_of_the_module(policies: dict[str, Any], kind: str) -> None:
    of = parts(policies[kind])
    assert of.vision == VISION.get(kind, ("vision",))
    assert of.added == tuple(sorted({*EXPERT.get(kind, ()), *SMALL.get(kind, ())}))
    assert {*of.vision, *(() if kind in BLIND else ("vlm",))} <= set(of.backbone)
    state = nnx.to_flat_state(nnx.state(abstract_model(policies[kind]), nnx.Param))
    tops = {str(path[1]) if path[0] == "backbone" else str(path[0]) for path, _ in state}
    assert tops == {*of.backbone, *of.added}


@pytest.mark.parametrize("kind", KINDS)
def test_presets_train_what_they_say(policies: dict[str, Any], kind: str) -> None:
    policy, tower = policies[kind], VISION.get(kind, ("vision",))
    added = {*EXPERT.get(kind, ()), *SMALL.get(kind, ())}
    top = lambda names: {name.split("/")[0] for name in names}  # noqa: E731
    every, none = trained(policy, full(policy))
    assert not none

    yes, no = trained(policy, frozen_vision(policy))
    assert top(no) == set(tower)
    assert not top(yes) & set(tower)

    if kind in BLIND:
        with pytest.raises(ValueError, match="matches no linear map"):
            trained(policy, lora(policy))
        return
    yes, no = trained(policy, lora(policy))
    overlay = {name for name in yes if is_lora(name)}
    assert top(overlay) == {"vlm", *EXPERT.get(kind, ())}
    assert yes - overlay == {name for name in every if name.split("/")[0] in SMALL.get(kind, ())}
    assert no == every - yes

    if added:
        yes, no = trained(policy, expert_only(policy))
        assert top(yes) == added
        assert not top(no) & added
    else:
        message = r"has no weights beside those of its backbone \(vision, vlm\), .*; use full, lora or frozen_vision"
        with pytest.raises(ValueError, match=message):
            expert_only(policy)


def test_the_usual_lora_of_pi0_is_the_preset(tiny_policy: Pi0Config) -> None:
    assert trained(tiny_policy, lora(tiny_policy)) == trained(tiny_policy, Trainable(Lora()))


def test_what_is_not_trained_is_held_as_it_is_computed_with(tiny_policy: Pi0Config) -> None:
    half = dataclasses.replace(tiny_policy, dtype="bfloat16")
    assert [preset.trainable(half).frozen_dtype for name, preset in PRESETS.items() if name != "full"] == [
        "bfloat16"
    ] * 3
    assert lora(half, rank=4, alpha=8.0, frozen_dtype="int8").frozen_dtype == "int8"
    assert lora(half, rank=4, alpha=8.0).lora.rules[0].scale == 2.0  # type: ignore[union-attr]
    assert lora(tiny_policy).frozen_dtype == "float32"


def test_a_backbone_that_names_no_tower(tiny_policy: Pi0Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openpi_like.models.backbone.Backbone.towers", ("eyes",))
    with pytest.raises(ValueError, match=r"names none of its parts \(vision, vlm\) .*, see Backbone.towers; use full"):
        frozen_vision(tiny_policy)
