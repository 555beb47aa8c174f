"""Name tables of language models in Hugging Face's files: an array per layer, in torch's (out, in) order.

Rows for one stack under any prefix; the tables of whole models are made of them, see `openpi_like.models.formats`.
Axis letters: L layers, D width, N heads, K kv heads, H head dim, F mlp width, V vocabulary.
"""

from openpi_like.models.formats import Row
from openpi_like.models.gemma2 import Gemma2Config
from openpi_like.models.llama import LlamaConfig


def llama_rows(config: LlamaConfig, ours: str, theirs: str, *, head: str = "lm_head") -> list[Row]:
    """Returns the rows of a model of the Llama family.

    ours: what the module is called, "vlm" for example. theirs: what comes before "embed_tokens", "model." for example.
    head: where the table of logits is, of a model that is not tied; one that is tied may have a copy of
        `embed_tokens` there, see `Table.copies`.
    """
    rows = _outside(ours, theirs)
    if not config.tied:
        rows.append(Row(f"{ours}/head", f"{head}.weight"))
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.qk_norm:
        norms |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    for i in range(config.depth):
        rows += _layer(ours, f"{theirs}layers.{i}", i, norms)
        if config.qkv_bias:
            attn = f"{theirs}layers.{i}.self_attn"
            rows += [
                Row(f"{ours}/layers/q_bias", f"{attn}.q_proj.bias", "(N H) -> N H", at=(i,)),
                Row(f"{ours}/layers/kv_bias", f"{attn}.k_proj.bias", "(K H) -> K H", at=(i, 0)),
                Row(f"{ours}/layers/kv_bias", f"{attn}.v_proj.bias", "(K H) -> K H", at=(i, 1)),
            ]
    return rows


def gemma2_rows(config: Gemma2Config, ours: str, theirs: str) -> list[Row]:
    """Returns the rows of Gemma 2, which is tied; arguments as of `llama_rows`."""
    norms = {
        "attn_norm": "input_layernorm",
        "attn_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }
    rows = _outside(ours, theirs)
    for i in range(config.depth):
        rows += _layer(ours, f"{theirs}layers.{i}", i, norms)
    return rows


def _outside(ours: str, theirs: str) -> list[Row]:
    """What is outside of the layers."""
    return [
        Row(f"{ours}/embedding", f"{theirs}embed_tokens.weight"),
        Row(f"{ours}/final_norm/scale", f"{theirs}norm.weight"),
    ]


def _layer(ours: str, layer: str, i: int, norms: dict[str, str]) -> list[Row]:
    """The maps of layer i, and its norms, ours -> theirs."""
    return [
        Row(f"{ours}/layers/q", f"{layer}.self_attn.q_proj.weight", "(N H) D -> N D H", at=(i,)),
        Row(f"{ours}/layers/kv", f"{layer}.self_attn.k_proj.weight", "(K H) D -> K D H", at=(i, 0)),
        Row(f"{ours}/layers/kv", f"{layer}.self_attn.v_proj.weight", "(K H) D -> K D H", at=(i, 1)),
        Row(f"{ours}/layers/out", f"{layer}.self_attn.o_proj.weight", "D (N H) -> N H D", at=(i,)),
        Row(f"{ours}/layers/gate_up", f"{layer}.mlp.gate_proj.weight", "F D -> D F", at=(i, 0)),
        Row(f"{ours}/layers/gate_up", f"{layer}.mlp.up_proj.weight", "F D -> D F", at=(i, 1)),
        Row(f"{ours}/layers/down", f"{layer}.mlp.down_proj.weight", "D F -> F D", at=(i,)),
        *(Row(f"{ours}/layers/{mine}/scale", f"{layer}.{name}.weight", at=(i,)) for mine, name in norms.items()),
    ]
