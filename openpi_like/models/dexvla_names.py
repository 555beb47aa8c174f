"""The names of DexVLA's weights, as its code writes them."""

from openpi_like.models.formats import Row, torch_linear


def expert_rows(depth: int, *, robot: int = 0) -> list[Row]:
    """Returns the rows of the diffusion expert, without a prefix. robot: whose maps those of the file are."""
    linear = lambda mine, theirs, at=(): torch_linear(mine, theirs, "E D -> D E", "", at=at)  # noqa: E731
    one = (robot,)
    rows = [Row("position", "pos_embed", take=(0,))]
    for mine, theirs in (("combine_0", "combine.0"), ("combine_1", "combine.2"), ("combine_2", "combine.4")):
        rows += linear(mine, theirs)
    for mine, theirs in (
        ("condition_in", "cond_obs_emb"),
        ("step_0", "t_embedder.mlp.0"),
        ("step_1", "t_embedder.mlp.2"),
    ):
        rows += linear(mine, theirs)
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
            *linear("layers/mlp_up", f"{block}.mlp.fc1", at),
            *linear("layers/mlp_down", f"{block}.mlp.fc2", at),
            *torch_linear("layers/modulation", f"{block}.adaLN_modulation.1", *split, at=at),
        ]
    return rows
