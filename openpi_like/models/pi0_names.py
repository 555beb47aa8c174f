"""The names of what pi0 and pi0.5 add to their backbone, in the layouts that they are published in."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from openpi_like.models.formats import Format, Table, pair, torch_linear
from openpi_like.models.gemma import GemmaConfig
from openpi_like.models.paligemma_names import gemma_rows, lerobot_root, torch_gemma

_PROJECTIONS = {"action_in": "action_in_proj", "action_out": "action_out_proj"}
_PI0 = {"state_in": "state_proj", "action_time_in": "action_time_mlp_in", "action_time_out": "action_time_mlp_out"}
_PI05 = {"time_in": "time_mlp_in", "time_out": "time_mlp_out"}


def pi0_formats(
    backbone: Mapping[str, Format], expert: GemmaConfig, *, pi05: bool, vocab_size: int
) -> dict[str, Format]:
    """Returns the backbone's layouts, and in openpi's and LeRobot's what the policy adds."""
    projections = _PROJECTIONS | (_PI05 if pi05 else _PI0)

    def openpi(names: Sequence[str]) -> Table:
        rows = gemma_rows(expert, "expert", "PaliGemma/llm/", "_1", adaptive=pi05)
        for ours, theirs in projections.items():
            rows += pair(ours, theirs)
        return Table(tuple(rows))

    def lerobot(names: Sequence[str]) -> Table:
        root = lerobot_root(names)
        prefix = f"{root}paligemma_with_expert.gemma_expert."
        rows = torch_gemma(expert.depth, "expert", f"{prefix}model.", adaptive=pi05)
        for ours, theirs in projections.items():
            rows += torch_linear(ours, f"{root}{theirs}", "E D -> D E", "")
        idle = f"{prefix}lm_head.weight"
        return Table(
            tuple(rows),
            unused={rf"^{re.escape(idle)}$": "an output layer that the action expert never uses"},
            fillers={idle: (vocab_size, expert.width)},
        )

    added = {"openpi": openpi, "lerobot": lerobot}
    return {name: fmt.with_rows(added[name]) if name in added else fmt for name, fmt in backbone.items()}


def lerobot_config(config: Any, dtype: str) -> dict[str, Any] | None:
    """Returns LeRobot's `config.json` of a `Pi0Config`; None for other sizes than Gemma's 2B and 300M.

    Its other files (processors, statistics) come from LeRobot's own tools.
    """
    variants = {GemmaConfig.gemma_2b(): "gemma_2b", GemmaConfig.gemma_300m(): "gemma_300m"}
    if config.backbone.language not in variants or config.expert not in variants:
        return None
    visual = {"type": "VISUAL", "shape": [3, *config.image_size]}
    return {
        "type": "pi05" if config.pi05 else "pi0",
        "paligemma_variant": variants[config.backbone.language],
        "action_expert_variant": variants[config.expert],
        "dtype": dtype,
        "chunk_size": config.action_horizon,
        "n_action_steps": config.action_horizon,
        "max_state_dim": config.state_dim,
        "max_action_dim": config.action_dim,
        "num_inference_steps": config.sample_steps,
        "image_resolution": list(config.image_size),
        "tokenizer_max_length": config.prompt_len,
        "input_features": {
            **{f"observation.images.{c}": visual for c in config.cameras},
            "observation.state": {"type": "STATE", "shape": [config.state_dim]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [config.action_dim]}},
    }
