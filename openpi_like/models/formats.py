"""Name tables: which array of a published checkpoint holds which of our weights. Import and export both read them.

A row says: our weight, at this index, is their array, at that index, with its axes in another order. Axis letters are
those of the modules: L layers, D width, N heads, K kv heads, H head dim, F mlp width, E width of the language model,
V vocabulary, p and q patch, C colours, J action dims.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import einops
import numpy as np

from openpi_like.models.gemma import GemmaConfig
from openpi_like.models.lora import HEADS, SUFFIX, Overlay
from openpi_like.models.paligemma import VisionLanguageConfig
from openpi_like.models.pi0 import Pi0Config

Index = tuple[int | slice, ...]


class WeightsError(ValueError):
    """Weights are damaged, or do not fit the model; the message lists everything that does not."""


@dataclasses.dataclass(frozen=True)
class Row:
    """ours[at] = rearrange(theirs[take], axes) / factor, with indices into leading axes.

    axes: "their axes -> our axes" as in einops; "" where they are the same.
    """

    ours: str
    theirs: str
    axes: str = ""
    at: Index = ()
    take: Index = ()
    factor: float = 1.0

    def their_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of theirs[take] for the shape of ours[at]."""
        if not self.axes:
            return ours
        left, right = self.axes.split("->")
        sizes = dict(zip(right.split(), ours, strict=True))
        groups = re.findall(r"\([^)]*\)|\S+", left)
        return tuple(int(np.prod([sizes[a] for a in group.strip("()").split()])) for group in groups)

    def to_ours(self, theirs: np.ndarray, ours: tuple[int, ...]) -> np.ndarray:
        """Returns ours[at], of shape `ours`, for theirs[take]."""
        if self.factor != 1:
            theirs = theirs / np.float32(self.factor)
        if not self.axes:
            return theirs
        names = self.axes.split("->")[1].split()
        return einops.rearrange(theirs, self.axes, **dict(zip(names, ours, strict=True)))

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """Inverse of `to_ours`."""
        if self.factor != 1:
            ours = ours * np.float32(self.factor)
        if not self.axes:
            return ours
        left, right = self.axes.split("->")
        return einops.rearrange(ours, f"{right} -> {left}")


@dataclasses.dataclass(frozen=True)
class RepeatedRow(Row):
    """theirs[take] repeats ours along an axis, `count` times."""

    axis: int = 0
    count: int = 1

    def their_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        return (*ours[: self.axis], self.count, *ours[self.axis :])

    def to_ours(self, theirs: np.ndarray, ours: tuple[int, ...]) -> np.ndarray:
        first = np.take(theirs, [0], axis=self.axis)
        if not (theirs == first).all():
            raise WeightsError(
                f"{self.theirs}: heads have weights of their own, {self.ours} is one for all of them; "
                "load them with LoraRule(per_head=True)"
            )
        return first.squeeze(self.axis)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        return np.repeat(np.expand_dims(ours, self.axis), self.count, axis=self.axis)


@dataclasses.dataclass(frozen=True)
class SummedRow(Row):
    """ours is the sum of theirs[take] along an axis of `count` entries, divided by `factor`."""

    axis: int = 0
    count: int = 1

    def their_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        return (*ours[: self.axis], self.count, *ours[self.axis :])

    def to_ours(self, theirs: np.ndarray, ours: tuple[int, ...]) -> np.ndarray:
        return theirs.astype(np.float32).sum(self.axis) / np.float32(self.factor)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        part = ours * np.float32(self.factor / self.count)
        return np.repeat(np.expand_dims(part, self.axis), self.count, axis=self.axis)


@dataclasses.dataclass(frozen=True)
class Table:
    """One published layout for one model config.

    copies: arrays that repeat another one, if they are there: {name: name}; they must be equal to it.
    unused: regular expressions of arrays that the layout has and our model does not: {pattern: why}.
    pad_rows: array -> rows it has beyond ours, without meaning: dropped when read, written as the mean row.
    fillers: arrays without meaning that the layout's own tools insist on, and their shapes; written as zeros.
    lora_names: returns what A and B of LoRA are called, for the array of a weight; None where the layout has no LoRA.
    """

    rows: tuple[Row, ...]
    copies: dict[str, str] = dataclasses.field(default_factory=dict)
    unused: dict[str, str] = dataclasses.field(default_factory=dict)
    pad_rows: dict[str, int] = dataclasses.field(default_factory=dict)
    fillers: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    lora_names: Callable[[str], tuple[str, str]] | None = None

    def with_overlays(self, overlays: Mapping[str, Overlay]) -> "Table":
        """Returns the table with rows for LoRA, by the name of its weight; as it is where the layout has none."""
        if self.lora_names is None:
            return self
        rows = [new for row in self.rows if row.ours in overlays for new in self._lora(row, overlays[row.ours])]
        return dataclasses.replace(self, rows=(*self.rows, *rows))

    def _lora(self, row: Row, overlay: Overlay) -> list[Row]:
        """In openpi B is not scaled, heads have an A and a B each, and maps that sum over heads sum B over them too."""
        assert self.lora_names is not None
        a_name, b_name = self.lora_names(row.theirs)
        a, b = f"{row.ours}{SUFFIX}/a", f"{row.ours}{SUFFIX}/b"
        common: dict[str, Any] = {"at": row.at, "take": row.take}
        heads = [i for i, axis in enumerate(overlay.axes) if axis in HEADS]
        if not heads or (overlay.per_head and heads[0] not in overlay.inputs):
            return [Row(a, a_name, **common), Row(b, b_name, factor=overlay.scale, **common)]
        (at,) = heads
        count = overlay.shape[at]
        if at in overlay.inputs:
            summed = SummedRow(b, b_name, factor=overlay.scale, axis=at, count=count, **common)
            return [Row(a, a_name, **common), summed]
        lead = " ".join("abcdefgh"[:at])
        order = f"{lead} N r H -> {lead} r N H"
        shared = RepeatedRow(a, a_name, axis=at, count=count, **common)
        return [shared, Row(b, b_name, order, factor=overlay.scale, **common)]


# ---- openpi and big_vision: stacked layers, our shapes ---------------------------------------------------------------


def _pair(ours: str, theirs: str, names: Sequence[str] = ("kernel", "bias")) -> list[Row]:
    return [Row(f"{ours}/{name}", f"{theirs}/{name}") for name in names]


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
        *_pair("vision/patch", f"{prefix}embedding"),
        Row("vision/position", f"{prefix}pos_embedding"),
        *_pair("vision/final_norm", f"{prefix}Transformer/encoder_norm", ("scale", "bias")),
    ]
    if head:
        rows += _pair("vision/head", f"{prefix}head")
    block = []
    for ours, theirs in _VISION_NORMS.items():
        block += _pair(f"vision/layers/{ours}", theirs, ("scale", "bias"))
    for ours, theirs in _VISION_BLOCK.items():
        block += _pair(f"vision/layers/{ours}", theirs)
    for row in block:
        if loop_depth is None:
            rows.append(Row(row.ours, f"{prefix}Transformer/encoderblock/{row.theirs}"))
        else:
            rows += [
                Row(row.ours, f"{prefix}Transformer/encoderblock_{i}/{row.theirs}", at=(i,)) for i in range(loop_depth)
            ]
    return rows


def _gemma(config: GemmaConfig, ours: str, prefix: str, suffix: str, *, adaptive: bool) -> list[Row]:
    """suffix: "" for the language model, "_1" for openpi's second expert."""
    layers, attn = f"{prefix}layers", f"{prefix}layers/attn"

    def norm(mine: str, theirs: str) -> list[Row]:
        if adaptive:
            return _pair(f"{ours}/{mine}/modulation", f"{theirs}{suffix}/Dense_0")
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


_PROJECTIONS = {"action_in": "action_in_proj", "action_out": "action_out_proj"}
_PI0 = {"state_in": "state_proj", "action_time_in": "action_time_mlp_in", "action_time_out": "action_time_mlp_out"}
_PI05 = {"time_in": "time_mlp_in", "time_out": "time_mlp_out"}


def _projections(config: Pi0Config) -> dict[str, str]:
    return _PROJECTIONS | (_PI05 if config.pi05 else _PI0)


def openpi(config: VisionLanguageConfig, names: Iterable[str]) -> Table:
    """openpi's Orbax `params`; a model without an expert is the `PaliGemma/` part (as in pi0-FAST)."""
    rows = _vision("PaliGemma/img/", head=True, loop_depth=None)
    rows.append(Row("vlm/embedding", "PaliGemma/llm/embedder/input_embedding"))
    rows += _gemma(config.vlm, "vlm", "PaliGemma/llm/", "", adaptive=False)
    if isinstance(config, Pi0Config):
        rows += _gemma(config.expert, "expert", "PaliGemma/llm/", "_1", adaptive=config.pi05)
        for ours, theirs in _projections(config).items():
            rows += _pair(ours, theirs)
    return Table(tuple(rows), lora_names=_openpi_lora)


def _openpi_lora(name: str) -> tuple[str, str]:
    """Attention has lora_a and lora_b beside w, the MLP has <name>_lora_a and <name>_lora_b."""
    stem = name.removesuffix("w") if name.endswith("/w") else f"{name}_"
    return f"{stem}lora_a", f"{stem}lora_b"


def big_vision(config: VisionLanguageConfig, names: Iterable[str]) -> Table:
    """big_vision's PaliGemma `.npz`: the prefix of every policy."""
    rows = _vision("img/", head=True, loop_depth=None)
    rows.append(Row("vlm/embedding", "llm/embedder/input_embedding"))
    return Table((*rows, *_gemma(config.vlm, "vlm", "llm/", "", adaptive=False)))


def siglip(config: VisionLanguageConfig, names: Iterable[str]) -> Table:
    """big_vision's SigLIP `.npz`: image tower with stacked or single layers, next to a text tower."""
    loop = any(name.startswith("img/Transformer/encoderblock_") for name in names)
    unused = {
        r"^img/MAPHead_0/": "pooling; a policy sees all patches",
        r"^img/head/": "projection of the pooled image; a policy has its own",
        r"^(txt/.*|t|b)$": "text tower and loss scale",
    }
    rows = _vision("img/", head=False, loop_depth=config.vision.depth if loop else None)
    return Table(tuple(rows), unused=unused)


# ---- Hugging Face and LeRobot: an array per layer, torch's (out, in) order -------------------------------------------


def _torch_linear(ours: str, theirs: str, kernel: str, bias: str, at: Index = ()) -> list[Row]:
    return [
        Row(f"{ours}/kernel", f"{theirs}.weight", kernel, at=at),
        Row(f"{ours}/bias", f"{theirs}.bias", bias, at=at),
    ]


def _torch_vision(depth: int, prefix: str, projector: str) -> list[Row]:
    rows = [
        *_torch_linear("vision/patch", f"{prefix}embeddings.patch_embedding", "D C p q -> p q C D", ""),
        Row("vision/position", f"{prefix}embeddings.position_embedding.weight", "P D -> P D", at=(0,)),
        Row("vision/final_norm/scale", f"{prefix}post_layernorm.weight"),
        Row("vision/final_norm/bias", f"{prefix}post_layernorm.bias"),
        *_torch_linear("vision/head", f"{projector}linear", "E D -> D E", ""),
    ]
    for i in range(depth):
        layer, at = f"{prefix}encoder.layers.{i}", (i,)
        for ours, theirs in (("attn_norm", "layer_norm1"), ("mlp_norm", "layer_norm2")):
            rows.append(Row(f"vision/layers/{ours}/scale", f"{layer}.{theirs}.weight", at=at))
            rows.append(Row(f"vision/layers/{ours}/bias", f"{layer}.{theirs}.bias", at=at))
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            name = f"{layer}.self_attn.{theirs}"
            rows += _torch_linear(f"vision/layers/{ours}", name, "(N H) D -> D N H", "(N H) -> N H", at)
        rows += _torch_linear("vision/layers/out", f"{layer}.self_attn.out_proj", "D (N H) -> N H D", "", at)
        rows += _torch_linear("vision/layers/mlp_up", f"{layer}.mlp.fc1", "F D -> D F", "", at)
        rows += _torch_linear("vision/layers/mlp_down", f"{layer}.mlp.fc2", "D F -> F D", "", at)
    return rows


def _torch_gemma(depth: int, ours: str, prefix: str, *, adaptive: bool) -> list[Row]:
    def norm(mine: str, theirs: str, at: Index = ()) -> list[Row]:
        if adaptive:
            return _torch_linear(f"{ours}/{mine}/modulation", f"{theirs}.dense", "E D -> D E", "", at)
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


HF_PAD_ROWS = 64  # Hugging Face's PaliGemma has these rows of embedding beyond the vocabulary


def huggingface(config: VisionLanguageConfig, names: Iterable[str]) -> Table:
    """Hugging Face PaliGemma safetensors, in any of the five spellings that transformers has written over time.

    Written in that of the published files, which all of its versions read.
    """
    stored = list(names)

    def spelling(*known: str) -> str:
        return next((s for s in known if any(n.startswith(s) for n in stored)), known[-1])

    language = spelling("model.language_model.model.", "model.language_model.", "language_model.model.")
    root = "model." if language.startswith("model.") else ""
    short = f"{root}vision_tower."
    vision = short if any(n.startswith(f"{short}embeddings.") for n in stored) else f"{short}vision_model."
    rows = _torch_vision(config.vision.depth, vision, f"{root}multi_modal_projector.")
    table = f"{language}embed_tokens.weight"
    rows.append(Row("vlm/embedding", table))
    rows += _torch_gemma(config.vlm.depth, "vlm", language, adaptive=False)
    copies = dict.fromkeys(("lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight"), table)
    return Table(tuple(rows), copies=copies, pad_rows={table: HF_PAD_ROWS})


def lerobot(config: VisionLanguageConfig, names: Iterable[str]) -> Table:
    """LeRobot's pi0 and pi0.5 safetensors, with or without the leading "model."; also openpi's PyTorch port.

    Older files have the language model and the vision tower one level higher, and normalisation statistics among the
    weights.
    """
    if not isinstance(config, Pi0Config):
        raise WeightsError(
            "format 'lerobot' holds pi0 and pi0.5, this config is neither; choose another format or config"
        )
    stored = set(names)
    root = "model." if any(name.startswith("model.") for name in stored) else ""
    both = f"{root}paligemma_with_expert."
    old = any(name.startswith(f"{both}paligemma.language_model.") for name in stored)
    vlm, expert = f"{both}paligemma." if old else f"{both}paligemma.model.", f"{both}gemma_expert."
    language = f"{vlm}language_model.model." if old else f"{vlm}language_model."
    short = f"{vlm}vision_tower."
    vision = short if any(n.startswith(f"{short}embeddings.") for n in stored) else f"{short}vision_model."
    rows = _torch_vision(config.vision.depth, vision, f"{vlm}multi_modal_projector.")
    rows += _torch_gemma(config.vlm.depth, "vlm", language, adaptive=False)
    rows += _torch_gemma(config.expert.depth, "expert", f"{expert}model.", adaptive=config.pi05)
    for ours, theirs in _projections(config).items():
        rows += _torch_linear(ours, f"{root}{theirs}", "E D -> D E", "")
    # The language model's table and its output layer are one array; files hold it under either name or both. LeRobot
    # makes the first from the second.
    table = f"{language}embed_tokens.weight"
    head = f"{vlm}language_model.lm_head.weight" if old else f"{both}paligemma.lm_head.weight"
    main, copy = (table, head) if table in stored else (head, table)
    rows.append(Row("vlm/embedding", main))
    idle = f"{expert}lm_head.weight"
    return Table(
        tuple(rows),
        copies={copy: main},
        unused={
            rf"^{re.escape(idle)}$": "an output layer that the action expert never uses",
            r"^(un)?normalize_(inputs|targets|outputs)\.": "normalisation statistics, which are no weights",
        },
        fillers={idle: (config.vocab_size, config.expert.width)},
    )


def ours(config: VisionLanguageConfig, names: Iterable[str]) -> Table:
    """Our own checkpoints: our names."""
    return Table(tuple(Row(name, name) for name in names))


FORMATS = {
    "ours": ours,
    "openpi": openpi,
    "big_vision": big_vision,
    "siglip": siglip,
    "huggingface": huggingface,
    "lerobot": lerobot,
}

# First match wins. What a set of arrays is, by a name that only this layout has.
_SIGNS = (
    ("lerobot", r"^(model\.)?paligemma_with_expert\."),
    ("huggingface", r"^(model\.)?language_model\.(model\.)?layers\."),
    ("openpi", r"^PaliGemma/"),
    ("big_vision", r"^llm/"),
    ("siglip", r"^img/"),
    ("ours", r"^(vision|vlm)/"),
)


def recognise(names: Iterable[str]) -> str | None:
    """Returns the format these names belong to, or None."""
    names = list(names)
    return next((fmt for fmt, sign in _SIGNS if any(re.search(sign, n) for n in names)), None)


def family(names: Iterable[str]) -> str:
    """Returns which model these names belong to, in words, for error messages."""
    names = list(names)
    has = lambda pattern: any(re.search(pattern, n) for n in names)  # noqa: E731
    if has(r"lora"):
        return "a model with LoRA weights"
    if has(r"(^|[/.])(action_time_mlp_in|action_time_in)[/.]"):
        return "pi0"
    if has(r"(^|[/.])(time_mlp_in|time_in)[/.]"):
        return "pi0.5"
    if has(r"^(PaliGemma/)?llm/|language_model|^vlm/"):
        return "PaliGemma or pi0-FAST (no action expert)"
    return "an image tower alone" if has(r"^img/|^vision/") else "no model we know"
