"""The names of DexVLA's weights, as its code writes them."""

import dataclasses

from openpi_like.models.formats import Index, Row, torch_linear

FUSION = {
    "read_0": "input_action_proj.mlps.0",
    "read_1": "input_action_proj.mlps.2",
    "written_0": "reasoning_action_proj.mlps.0",
    "written_1": "reasoning_action_proj.mlps.2",
    "scale": "reasoning_film.scale_fc",
    "shift": "reasoning_film.shift_fc",
}


def policy_rows(depth: int, *, one_robot: bool) -> list[Row]:
    """Returns the rows of what DexVLA has beside its language model.

    depth: of the expert. one_robot: a file holds the maps of one; where there are more, it holds none of them.
    """
    expert = [row for row in expert_rows(depth) if one_robot or not row.ours.startswith(("action_in", "action_out"))]
    rows = [dataclasses.replace(r, ours=f"expert/{r.ours}", theirs=f"policy_head.{r.theirs}") for r in expert]
    return rows + [row for mine, name in FUSION.items() for row in _linear(f"fusion/{mine}", name)]


def _linear(mine: str, theirs: str, at: Index = ()) -> list[Row]:
    return torch_linear(mine, theirs, "E D -> D E", "", at=at)


def expert_rows(depth: int, *, robot: int = 0) -> list[Row]:
    """Returns the rows of the diffusion expert, without a prefix. robot: whose maps those of the file are."""
    one = (robot,)
    rows = [Row("position", "pos_embed", take=(0,))]
    for i in range(3):
        rows += _linear(f"combine_{i}", f"combine.{2 * i}")
    rows += _linear("condition_in", "cond_obs_emb")
    rows += [*_linear("step_0", "t_embedder.mlp.0"), *_linear("step_1", "t_embedder.mlp.2")]
    for mine, theirs in (("action_in", "x_embedder"), ("action_out", "final_layer.linear")):
        rows += [Row(mine, f"{theirs}.weight", "E D -> D E", at=one), Row(f"{mine}_bias", f"{theirs}.bias", at=one)]
    split = ("(G E) D -> D G E", "(G E) -> G E")
    rows += torch_linear("last_modulation", "final_layer.adaLN_modulation.1", *split)
    for i in range(depth):
        block, at = f"blocks.{i}", (i,)
        rows += [
            Row("layers/qkv", f"{block}.attn.qkv.weight", "(P N H) W -> P W N H", at=at),
            Row("layers/qkv_bias", f"{block}.attn.qkv.bias", "(P N H) -> P N H", at=at),
            *torch_linear("layers/out", f"{block}.attn.proj", "E (N H) -> N H E", "", at=at),
            *_linear("layers/mlp_up", f"{block}.mlp.fc1", at),
            *_linear("layers/mlp_down", f"{block}.mlp.fc2", at),
            *torch_linear("layers/modulation", f"{block}.adaLN_modulation.1", *split, at=at),
        ]
    return rows
