"""The names of what SmolVLA adds to its backbone, in LeRobot's layout."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from openpi_like.models.formats import Format, Row, Table, torch_linear
from openpi_like.models.smolvla_expert import ExpertConfig
from openpi_like.models.smolvlm import SmolVlmConfig
from openpi_like.models.smolvlm_names import lerobot_root

_PROJECTIONS = {
    "state_in": "state_proj",
    "action_in": "action_in_proj",
    "action_out": "action_out_proj",
    "action_time_in": "action_time_mlp_in",
    "action_time_out": "action_time_mlp_out",
}


def smolvla_formats(backbone: Mapping[str, Format], expert: ExpertConfig, depth: int) -> dict[str, Format]:
    """Returns the backbone's layouts, and in LeRobot's what the policy adds. depth: layers of the expert."""

    def lerobot(names: Sequence[str]) -> Table:
        root = lerobot_root(names)
        stack = f"{root}vlm_with_expert.lm_expert."
        rows = [Row("expert/final_norm/scale", f"{stack}norm.weight")]
        for i in range(depth):
            rows += _layer(expert, i, f"{stack}layers.{i}.")
        for ours, theirs in _PROJECTIONS.items():
            rows += torch_linear(ours, f"{root}{theirs}", "E D -> D E", "")
        return Table(tuple(rows))

    return {name: fmt.with_rows(lerobot) if name == "lerobot" else fmt for name, fmt in backbone.items()}


def _layer(expert: ExpertConfig, i: int, theirs: str) -> list[Row]:
    """Layer i of the expert; what its keys and values are maps of depends on its place in its block."""
    block, place = divmod(i, expert.self_every)
    ours, at = f"expert/layers/{'joint' if place == 0 else f'cross_{place}'}", (block,)
    return [
        Row(f"{ours}/q", f"{theirs}self_attn.q_proj.weight", "(N H) D -> N D H", at=at),
        Row(f"{ours}/kv", f"{theirs}self_attn.k_proj.weight", "(K H) D -> K D H", at=(block, 0)),
        Row(f"{ours}/kv", f"{theirs}self_attn.v_proj.weight", "(K H) D -> K D H", at=(block, 1)),
        Row(f"{ours}/out", f"{theirs}self_attn.o_proj.weight", "D (N H) -> N H D", at=at),
        Row(f"{ours}/gate_up", f"{theirs}mlp.gate_proj.weight", "F D -> D F", at=(block, 0)),
        Row(f"{ours}/gate_up", f"{theirs}mlp.up_proj.weight", "F D -> D F", at=(block, 1)),
        Row(f"{ours}/down", f"{theirs}mlp.down_proj.weight", "D F -> F D", at=at),
        Row(f"{ours}/attn_norm/scale", f"{theirs}input_layernorm.weight", at=at),
        Row(f"{ours}/mlp_norm/scale", f"{theirs}post_attention_layernorm.weight", at=at),
    ]


def lerobot_config(config: Any) -> dict[str, Any] | None:
    """Returns LeRobot's `config.json` of a `SmolVlaConfig`; None for a backbone other than SmolVLM2-500M.

    Its other files (processors, statistics) come from LeRobot's own tools.
    """
    language, expert = config.backbone.language, config.expert
    factor = expert.width / language.width
    fitting = ExpertConfig.beside(language, factor=factor, self_every=expert.self_every)
    known = SmolVlmConfig.smolvla(layers=language.depth)
    same = dataclasses.replace(language, tied=True) == known.language
    if not same or config.backbone.vision != known.vision or expert != fitting:
        return None
    height, width = config.image_size
    visual = {"type": "VISUAL", "shape": [3, height, width]}
    return {
        "type": "smolvla",
        "vlm_model_name": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        "load_vlm_weights": False,
        "num_vlm_layers": language.depth,
        "num_expert_layers": -1,
        "self_attn_every_n_layers": expert.self_every,
        "expert_width_multiplier": factor,
        "attention_mode": "cross_attn",
        "add_image_special_tokens": False,
        "min_period": 4e-3,
        "max_period": 4.0,
        "chunk_size": config.action_horizon,
        "n_action_steps": config.action_horizon,
        "max_state_dim": config.state_dim,
        "max_action_dim": config.action_dim,
        "num_steps": config.sample_steps,
        "resize_imgs_with_padding": [width, height],
        "tokenizer_max_length": config.prompt_len,
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
        "input_features": {
            **{f"observation.images.{c}": visual for c in config.cameras},
            "observation.state": {"type": "STATE", "shape": [config.state_dim]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [config.action_dim]}},
    }
