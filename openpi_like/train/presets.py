"""What of a policy is fine-tuned: presets made of the policy's own parts, one line in a config.

    trainable=presets.lora(MODEL)

They are functions of the policy's config, whichever policy it is. What they return names weights, so a checkpoint says
what was trained whatever becomes of the presets. Weights that are not trained are held in the dtype that the policy
computes in, which changes nothing of what it computes with them.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from openpi_like.models.lora import Lora, linear_maps
from openpi_like.models.param import BACKBONE
from openpi_like.models.weights import abstract_model
from openpi_like.train.state import Trainable

MOST_RATE = 1e-3  # of AdamW, for presets that learn faster than the checkpoint did
# Within the backbone, of the robot: projectors of the things around it, and what sees these.
SCENE = frozenset({"entities", "perception"})
_LAYERS = Lora().rules[0].pattern  # linear maps of the language model's and the expert's layers


@dataclasses.dataclass(frozen=True)
class Parts:
    """Names of the parts of a policy, as its weights' names begin.

    vision: what looks at images alone. backbone: what it sees and reads with, and writes where it does: `vision`, the
    language model and what joins them. added: what the policy has beside: an action expert, heads, projections.
    """

    vision: tuple[str, ...]
    backbone: tuple[str, ...]
    added: tuple[str, ...]


def parts(policy: Any) -> Parts:
    """Returns the parts of a policy, of its config; allocates nothing."""
    model: Any = abstract_model(policy)
    tree = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    within = set(tree.pop(BACKBONE))
    backbone = tuple(sorted(within - SCENE))
    vision = tuple(name for name in model.backbone.towers if name in backbone)
    return Parts(vision, backbone, tuple(sorted({*tree, *(within & SCENE)})))


def full(policy: Any) -> Trainable:
    """Returns that all weights are trained."""
    return Trainable()


def lora(policy: Any, *, rank: int = 16, alpha: float = 16.0, frozen_dtype: str | None = None) -> Trainable:
    """Returns LoRA on the layers of the language model, and of an action expert where there is one.

    What else the policy adds to its backbone (projections of states and actions, heads) is trained in full: it is
    small, and belongs to the robot. frozen_dtype: of the base, see `Trainable`; None is the policy's own dtype.
    """
    rule = dataclasses.replace(Lora().rules[0], rank=rank, alpha=alpha)
    overlaid = {name.split("/")[0] for name, *_ in linear_maps(abstract_model(policy)) if re.search(_LAYERS, name)}
    also = patterns([name for name in parts(policy).added if name not in overlaid])
    return Trainable(Lora((rule,), also_train=also), frozen_dtype=frozen_dtype or policy.dtype)


def expert_only(policy: Any, *, frozen_dtype: str | None = None) -> Trainable:
    """Returns that only what the policy adds to its backbone is trained. frozen_dtype: see `lora`.

    Raises:
        ValueError: it adds nothing, as it writes actions with the backbone's own words.
    """
    of = parts(policy)
    if not of.added:
        raise ValueError(
            f"{type(policy).__name__} has no weights beside those of its backbone ({', '.join(of.backbone)}), so there "
            "is no expert to train alone; use full, lora or frozen_vision"
        )
    return Trainable(frozen=patterns(of.backbone), frozen_dtype=frozen_dtype or policy.dtype)


def frozen_vision(policy: Any, *, frozen_dtype: str | None = None) -> Trainable:
    """Returns that all is trained but what looks at images alone. frozen_dtype: see `lora`.

    Raises:
        ValueError: there is no such part.
    """
    of = parts(policy)
    if not of.vision:
        raise ValueError(
            f"the backbone of {type(policy).__name__} names none of its parts ({', '.join(of.backbone)}) as what looks "
            "at images alone, see Backbone.towers; use full, lora or expert_only"
        )
    return Trainable(frozen=patterns(of.vision), frozen_dtype=frozen_dtype or policy.dtype)


def patterns(names: Sequence[str]) -> tuple[str, ...]:
    """Returns regular expressions of parts, each for all weights of one."""
    return tuple(rf"^{re.escape(name)}(/|$)" for name in names)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A preset by name. trainable: of a policy's config. rate: its learning rate beside that of training all."""

    trainable: Callable[[Any], Trainable]
    rate: float = 1.0

    def peak_lr(self, base: float) -> float:
        """Returns its learning rate. base: that of training all; `rate` takes it to `MOST_RATE` at most."""
        return min(base * self.rate, max(base, MOST_RATE))


# An overlay learns at about ten times the rate of what it lies on; 8 is what configs/finetune_pi0_lora.py has.
PRESETS = {
    "full": Preset(full),
    "lora": Preset(lora, rate=8.0),
    "expert_only": Preset(expert_only),
    "frozen_vision": Preset(frozen_vision),
}
