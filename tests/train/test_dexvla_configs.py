"""DexVLA's three stages at their released sizes: what each trains, and what it takes from where. No array is made."""

from typing import Any

import numpy as np
import pytest

from openpi_like.config import load_run
from openpi_like.models.text_model import TextModelConfig
from openpi_like.models.weights import layout, weight_shapes
from openpi_like.train.checkpoints import warm_start
from openpi_like.train.state import ModelDef
from tests.models.weight_arrays import PREFIX_FIELDS

CONFIGS = {stage: load_run(f"configs/dexvla_stage{stage}.py") for stage in (1, 2, 3)}
# Of the published table (arXiv 2502.05855, table 1): the parts that each stage has, and those of them that it trains.
# Ours beside: the FiLM of what was written (fusion) is trained with the expert.
PARTS = {
    1: {"ResNets", "maps of ResNets", "text encoder", "expert"},
    2: {"image tower", "projector", "language model", "fusion", "expert"},
    3: {"image tower", "projector", "language model", "fusion", "expert"},
}
TRAINED = {1: PARTS[1], 2: PARTS[2] - {"image tower"}, 3: PARTS[3]}
RATES = {1: (1e-4, 1e-4), 2: (2e-5, 2e-5), 3: (2e-5, 0.0)}  # behind the warm-up, and at the end
OF = {
    "text": "text encoder",
    "expert": "expert",
    "fusion": "fusion",
    "vlm": "language model",
    "vision": "image tower",
}
TOLD = ("combine_0", "combine_1", "combine_2", "condition_in")  # of the expert: what it is told by


def part_of(weight: str) -> str:
    if weight.startswith("vision/merger/"):
        return "projector"
    first = weight.split("/")[0]
    kinds = {"resnet": "ResNets", "map": "maps of ResNets"}
    return OF[first] if first in OF else kinds[first.split("_")[0]]


@pytest.mark.parametrize("stage", CONFIGS)
def test_what_each_stage_trains(stage: int) -> None:
    config = CONFIGS[stage]
    names = set(weight_shapes(config.model))
    assert {part_of(name) for name in names} == PARTS[stage]
    expected = {name for name in names if part_of(name) in TRAINED[stage]}
    assert ModelDef(config.model, config.trainable).trained == expected
    rate, optimizer = config.optimizer.schedule(), config.optimizer
    ends = float(rate(optimizer.warmup_steps)), float(rate(config.steps))
    np.testing.assert_allclose(ends, RATES[stage], rtol=1e-5, atol=1e-12)
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay) == (0.9, 0.95, 0.0)


class Shapes:
    """Arrays that are not there."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def read(self, name: str) -> np.ndarray:
        raise AssertionError(f"{name} was read")


def shapes_of(config: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in weight_shapes(config).items()}


def test_what_each_stage_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight is from where its stage says, or fresh because the stage says so: what the expert is told by. Of
    stage 1, only what told it is left behind."""
    one, two, three = (CONFIGS[stage].model for stage in (1, 2, 3))
    first, second = shapes_of(one), shapes_of(two)
    expert = {name for name in first if name.startswith("expert/")}
    told = {f"expert/{name}/{part}" for name in TOLD for part in ("kernel", "bias")}
    assert told < expert
    backbone = TextModelConfig(**{name: getattr(two, name) for name in PREFIX_FIELDS})
    where = {
        "weights/distilbert": layout(one, "huggingface"),
        "weights/qwen2-vl-2b": layout(backbone, "huggingface"),
        "runs/dexvla_stage1": first,
        "runs/dexvla_stage2": second,
    }
    monkeypatch.setattr(warm_start, "open_weights", lambda checkpoint, **_: Shapes(where[checkpoint]))

    def taken(stage: int) -> list[tuple[str, set[str], set[str]]]:
        """Of each place: its name, the weights that come from it, and those of its arrays that are left behind."""
        config = CONFIGS[stage]
        assert config.warm_start is not None
        sources = warm_start._sources(config.warm_start, ModelDef(config.model, config.trainable))
        return [(name, set(plan.rows), {d.split(":")[0] for d in plan.dropped}) for name, _, plan in sources]

    assert taken(1) == [("weights/distilbert", {name for name in first if name.startswith("text/")}, set())]
    of_backbone = {name for name in second if name.startswith(("vision/", "vlm/"))}
    assert taken(2) == [
        ("weights/qwen2-vl-2b", of_backbone, set()),
        ("runs/dexvla_stage1", expert - told, first.keys() - expert),
    ]
    fusion = {name for name in second if name.startswith("fusion/")}
    assert second.keys() - of_backbone - (expert - told) == told | fusion  # fresh
    assert taken(3) == [("runs/dexvla_stage2", set(second), set())]
    assert shapes_of(three) == second
