"""The names of the weights of PaliGemma, PaliGemma 2, SigLIP and Gemma, in the layouts that they are published in."""

from collections.abc import Callable, Sequence

from openpi_like.models.formats import Format, Index, Row, Table, pair, torch_linear
from openpi_like.models.gemma import GemmaConfig
from openpi_like.models.gemma2 import Gemma2Config
from openpi_like.models.hf_names import gemma2_rows

HF_PAD_ROWS = 64  # Hugging Face's PaliGemma has these rows of embedding beyond the vocabulary

# ---- openpi and big_vision: stacked layers, our shapes ---------------------------------------------------------------

_VISION_BLOCK = {  # ours -> theirs, inside one transformer block
    "query": "MultiHeadDotProductAttention_0/query",
    "key": "MultiHeadDotProductAttention_0/key",
    "value": "MultiHeadDotProductAttention_0/value",
    "out": "MultiHeadDotProductAttention_0/out",
    "mlp_up": "MlpBlock_0/Dense_0",
    "mlp_down": "MlpBlock_0/Dense_1",
}
_VISION_NORMS = {"attn_norm": "LayerNorm_0", "mlp_norm": "LayerNorm_1"}


def _vision(prefix: str, *, head: bool, loop_depth: int | None) -> list[Row]:
    """loop_depth: number of layers where each has its own arrays (big_vision without scan), None where stacked."""
    rows = [
        *pair("vision/patch", f"{prefix}embedding"),
        Row("vision/position", f"{prefix}pos_embedding"),
        *pair("vision/final_norm", f"{prefix}Transformer/encoder_norm", ("scale", "bias")),
    ]
    if head:
        rows += pair("vision/head", f"{prefix}head")
    block = []
    for ours, theirs in _VISION_NORMS.items():
        block += pair(f"vision/layers/{ours}", theirs, ("scale", "bias"))
    for ours, theirs in _VISION_BLOCK.items():
        block += pair(f"vision/layers/{ours}", theirs)
    for row in block:
        if loop_depth is None:
            rows.append(Row(row.ours, f"{prefix}Transformer/encoderblock/{row.theirs}"))
        else:
            rows += [
                Row(row.ours, f"{prefix}Transformer/encoderblock_{i}/{row.theirs}", at=(i,)) for i in range(loop_depth)
            ]
    return rows


def gemma_rows(config: GemmaConfig, ours: str, prefix: str, suffix: str, *, adaptive: bool) -> list[Row]:
    """suffix: "" for the language model, "_1" for openpi's second expert."""
    layers, attn = f"{prefix}layers", f"{prefix}layers/attn"

    def norm(mine: str, theirs: str) -> list[Row]:
        if adaptive:
            return pair(f"{ours}/{mine}/modulation", f"{theirs}{suffix}/Dense_0")
        return [Row(f"{ours}/{mine}/scale", f"{theirs}{suffix}/scale")]

    if config.num_heads == config.num_kv_heads:  # then q, k and v are one array (L, 3, N, D, H)
        fused, every = f"{attn}/qkv_einsum{suffix}/w", slice(None)
        rows = [
            Row(f"{ours}/layers/q", fused, take=(every, 0)),
            Row(f"{ours}/layers/kv", fused, take=(every, slice(1, 3))),
        ]
    else:
        rows = [Row(f"{ours}/layers/{w}", f"{attn}/{w}_einsum{suffix}/w") for w in ("q", "kv")]
    return [
        *rows,
        Row(f"{ours}/layers/out", f"{attn}/attn_vec_einsum{suffix}/w"),
        Row(f"{ours}/layers/gate_up", f"{layers}/mlp{suffix}/gating_einsum"),
        Row(f"{ours}/layers/down", f"{layers}/mlp{suffix}/linear"),
        *norm("layers/attn_norm", f"{layers}/pre_attention_norm"),
        *norm("layers/mlp_norm", f"{layers}/pre_ffw_norm"),
        *norm("final_norm", f"{prefix}final_norm"),
    ]


def openpi_lora(name: str) -> tuple[str, str]:
    """Attention has lora_a and lora_b beside w, the MLP has <name>_lora_a and <name>_lora_b."""
    stem = name.removesuffix("w") if name.endswith("/w") else f"{name}_"
    return f"{stem}lora_a", f"{stem}lora_b"


# ---- Hugging Face and LeRobot: an array per layer, torch's (out, in) order -------------------------------------------


def torch_vision(depth: int, prefix: str, projector: str) -> list[Row]:
    rows = [
        *torch_linear("vision/patch", f"{prefix}embeddings.patch_embedding", "D C p q -> p q C D", ""),
        Row("vision/position", f"{prefix}embeddings.position_embedding.weight", "P D -> P D", at=(0,)),
        Row("vision/final_norm/scale", f"{prefix}post_layernorm.weight"),
        Row("vision/final_norm/bias", f"{prefix}post_layernorm.bias"),
        *torch_linear("vision/head", f"{projector}linear", "E D -> D E", ""),
    ]
    for i in range(depth):
        layer, at = f"{prefix}encoder.layers.{i}", (i,)
        for ours, theirs in (("attn_norm", "layer_norm1"), ("mlp_norm", "layer_norm2")):
            rows.append(Row(f"vision/layers/{ours}/scale", f"{layer}.{theirs}.weight", at=at))
            rows.append(Row(f"vision/layers/{ours}/bias", f"{layer}.{theirs}.bias", at=at))
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            name = f"{layer}.self_attn.{theirs}"
            rows += torch_linear(f"vision/layers/{ours}", name, "(N H) D -> D N H", "(N H) -> N H", at)
        rows += torch_linear("vision/layers/out", f"{layer}.self_attn.out_proj", "D (N H) -> N H D", "", at)
        rows += torch_linear("vision/layers/mlp_up", f"{layer}.mlp.fc1", "F D -> D F", "", at)
        rows += torch_linear("vision/layers/mlp_down", f"{layer}.mlp.fc2", "D F -> F D", "", at)
    return rows


def torch_gemma(depth: int, ours: str, prefix: str, *, adaptive: bool) -> list[Row]:
    """adaptive: of an action expert whose norms take a condition."""

    def norm(mine: str, theirs: str, at: Index = ()) -> list[Row]:
        if adaptive:
            return torch_linear(f"{ours}/{mine}/modulation", f"{theirs}.dense", "E D -> D E", "", at)
        return [Row(f"{ours}/{mine}/scale", f"{theirs}.weight", at=at)]

    rows = norm("final_norm", f"{prefix}norm")
    for i in range(depth):
        layer = f"{prefix}layers.{i}"
        rows += [
            Row(f"{ours}/layers/q", f"{layer}.self_attn.q_proj.weight", "(N H) D -> N D H", at=(i,)),
            Row(f"{ours}/layers/kv", f"{layer}.self_attn.k_proj.weight", "(K H) D -> K D H", at=(i, 0)),
            Row(f"{ours}/layers/kv", f"{layer}.self_attn.v_proj.weight", "(K H) D -> K D H", at=(i, 1)),
            Row(f"{ours}/layers/out", f"{layer}.self_attn.o_proj.weight", "D (N H) -> N H D", at=(i,)),
            Row(f"{ours}/layers/gate_up", f"{layer}.mlp.gate_proj.weight", "F D -> D F", at=(i, 0)),
            Row(f"{ours}/layers/gate_up", f"{layer}.mlp.up_proj.weight", "F D -> D F", at=(i, 1)),
            Row(f"{ours}/layers/down", f"{layer}.mlp.down_proj.weight", "D F -> F D", at=(i,)),
            *norm("layers/attn_norm", f"{layer}.input_layernorm", (i,)),
            *norm("layers/mlp_norm", f"{layer}.post_attention_layernorm", (i,)),
        ]
    return rows


# ---- Formats ---------------------------------------------------------------------------------------------------------


def paligemma_formats(vision_depth: int, vlm: GemmaConfig) -> dict[str, Format]:
    """Returns the layouts that hold PaliGemma's weights, or a part of them."""
    torch = lambda language, vision, projector: (  # noqa: E731
        *torch_vision(vision_depth, vision, projector),
        *torch_gemma(vlm.depth, "vlm", language, adaptive=False),
    )

    def lerobot(names: Sequence[str]) -> Table:
        """The backbone in LeRobot's pi0 and pi0.5 safetensors, with or without the leading "model."; also openpi's
        PyTorch port. Older files have the language model and the vision tower one level higher, and normalisation
        statistics among the weights.
        """
        stored = set(names)
        root = lerobot_root(names)
        both = f"{root}paligemma_with_expert."
        old = any(name.startswith(f"{both}paligemma.language_model.") for name in stored)
        tower = f"{both}paligemma." if old else f"{both}paligemma.model."
        language = f"{tower}language_model.model." if old else f"{tower}language_model."
        # The language model's table and its output layer are one array; files hold it under either name or both.
        # LeRobot makes the first from the second.
        table = f"{language}embed_tokens.weight"
        head = f"{tower}language_model.lm_head.weight" if old else f"{both}paligemma.lm_head.weight"
        main, copy = (table, head) if table in stored else (head, table)
        rows = torch(language, _vision_prefix(names, f"{tower}vision_tower."), f"{tower}multi_modal_projector.")
        return Table(
            (*rows, Row("vlm/embedding", main)),
            copies={copy: main},
            unused={r"^(un)?normalize_(inputs|targets|outputs)\.": "normalisation statistics, which are no weights"},
        )

    def language_rows(prefix: str) -> list[Row]:
        table = Row("vlm/embedding", f"{prefix}embed_tokens.weight")
        return [*torch_gemma(vlm.depth, "vlm", prefix, adaptive=False), table]

    def openpi(names: Sequence[str]) -> Table:
        """The `PaliGemma/` part of openpi's Orbax `params`; pi0-FAST has no other."""
        rows = _vision("PaliGemma/img/", head=True, loop_depth=None)
        rows.append(Row("vlm/embedding", "PaliGemma/llm/embedder/input_embedding"))
        rows += gemma_rows(vlm, "vlm", "PaliGemma/llm/", "", adaptive=False)
        return Table(tuple(rows), lora_names=openpi_lora)

    def big_vision(names: Sequence[str]) -> Table:
        """big_vision's PaliGemma `.npz`."""
        rows = _vision("img/", head=True, loop_depth=None)
        rows.append(Row("vlm/embedding", "llm/embedder/input_embedding"))
        return Table((*rows, *gemma_rows(vlm, "vlm", "llm/", "", adaptive=False)))

    def siglip(names: Sequence[str]) -> Table:
        """big_vision's SigLIP `.npz`: image tower with stacked or single layers, next to a text tower."""
        loop = any(name.startswith("img/Transformer/encoderblock_") for name in names)
        unused = {
            r"^img/MAPHead_0/": "pooling; a policy sees all patches",
            r"^img/head/": "projection of the pooled image; a policy has its own",
            r"^(txt/.*|t|b)$": "text tower and loss scale",
        }
        rows = _vision("img/", head=False, loop_depth=vision_depth if loop else None)
        return Table(tuple(rows), unused=unused)

    return {
        "lerobot": Format(r"^(model\.)?paligemma_with_expert\.", lerobot, written_as=("model.",), partial=True),
        "huggingface": _huggingface(vision_depth, language_rows),
        "openpi": Format("^PaliGemma/", openpi),
        "big_vision": Format("^llm/", big_vision),
        "siglip": Format("^img/", siglip),
    }


def paligemma2_formats(vision_depth: int, vlm: Gemma2Config) -> dict[str, Format]:
    """Returns the layouts that hold PaliGemma 2's weights."""
    return {"huggingface": _huggingface(vision_depth, lambda prefix: gemma2_rows(vlm, "vlm", prefix))}


def _huggingface(vision_depth: int, language_rows: Callable[[str], list[Row]]) -> Format:
    """language_rows: of names that begin with this, the table of tokens among them."""

    def table(names: Sequence[str]) -> Table:
        """Hugging Face PaliGemma safetensors, in any of the five spellings that transformers has written over time.

        Written in that of the published files, which all of its versions read.
        """
        known = ("model.language_model.model.", "model.language_model.", "language_model.model.")
        language = next((s for s in known if any(n.startswith(s) for n in names)), known[-1])
        root = "model." if language.startswith("model.") else ""
        vision = _vision_prefix(names, f"{root}vision_tower.")
        rows = [*torch_vision(vision_depth, vision, f"{root}multi_modal_projector."), *language_rows(language)]
        main = f"{language}embed_tokens.weight"
        copies = dict.fromkeys(("lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight"), main)
        return Table(tuple(rows), copies=copies, pad_rows={main: HF_PAD_ROWS})

    return Format(r"^(model\.)?language_model\.(model\.)?layers\.", table)


def lerobot_root(names: Sequence[str]) -> str:
    """Returns what LeRobot's names begin with: "model." or nothing."""
    return "model." if any(name.startswith("model.") for name in names) else ""


def _vision_prefix(names: Sequence[str], short: str) -> str:
    return short if any(n.startswith(f"{short}embeddings.") for n in names) else f"{short}vision_model."
