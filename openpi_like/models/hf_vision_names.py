"""Name tables of image towers and projectors as timm and transformers publish them, for the tables in `formats`.

`ours` and `theirs` are what all names begin with, such as "vision/dino/" and "vision_backbone.featurizer.".
Axis letters are those of the modules; M patches of a block, t frames.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from openpi_like.models.dino import DinoConfig
from openpi_like.models.formats import Index, Row, WeightsError
from openpi_like.models.qwen_vision import Qwen2VisionConfig, Qwen3VisionConfig, Qwen25VisionConfig, QwenVisionConfig
from openpi_like.models.siglip import SiglipConfig


def resized_positions(table_1PD: np.ndarray, stored: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Returns a table of positions for another grid, by cubic interpolation with antialiasing, as timm does it."""
    _, _, D = table_1PD.shape
    square = np.asarray(table_1PD, np.float32).reshape(*stored, D)
    # On the host: loading is not to compile anything, nor take memory of a device.
    rows, columns = (_cubic(n, m) for n, m in zip(stored, grid, strict=True))
    return np.einsum("hr,wc,rcD->hwD", rows, columns, square).reshape(1, -1, D).astype(np.float32)


def _cubic(stored: int, n: int) -> np.ndarray:
    """Returns the matrix (n, stored) of cubic interpolation (Keys 1981, a = -0.5), wider where it makes smaller."""
    scale = max(1.0, stored / n)
    centres = (np.arange(n) + 0.5) * stored / n
    x = np.abs(np.arange(stored) + 0.5 - centres[:, None]) / scale
    near, far = (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    kernel = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return kernel / kernel.sum(-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class ResizedRow(Row):
    """A table of positions of another image size: theirs is for the grid `stored`, ours for `grid`."""

    stored: tuple[int, int] = (1, 1)
    grid: tuple[int, int] = (1, 1)

    def their_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        return (ours[0], self.stored[0] * self.stored[1], *ours[2:])

    def to_ours(self, theirs: np.ndarray, ours: tuple[int, ...]) -> np.ndarray:
        return resized_positions(theirs, self.stored, self.grid)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        raise WeightsError(
            f"{self.theirs}: {self.ours} is for a grid of {self.grid}, which cannot be turned back into {self.stored}; "
            "write it at its own size"
        )


# ---- Parts -----------------------------------------------------------------------------------------------------------


def _linear(ours: str, theirs: str, kernel: str, bias: str = "", at: Index = (), take: Index = ()) -> list[Row]:
    return [
        Row(f"{ours}/kernel", f"{theirs}.weight", kernel, at=at, take=take),
        Row(f"{ours}/bias", f"{theirs}.bias", bias, at=at, take=take),
    ]


def _norm(ours: str, theirs: str, at: Index = ()) -> list[Row]:
    return [Row(f"{ours}/scale", f"{theirs}.weight", at=at), Row(f"{ours}/bias", f"{theirs}.bias", at=at)]


def _block(
    ours: str, theirs: str, at: Index, width: int, *, attn: str, out: str, mlp: Sequence[str], norms: Sequence[str]
) -> list[Row]:
    """A `VitLayer`. attn: their fused q, k, v, or, with "*" in its place, one each. width: D."""
    rows = []
    for i, (name, letter) in enumerate((("query", "q"), ("key", "k"), ("value", "v"))):
        # One array holds all three, one below the other.
        take = () if "*" in attn else (slice(i * width, (i + 1) * width),)
        source = f"{theirs}{attn.replace('*', letter)}"
        rows += _linear(f"{ours}/{name}", source, "(N H) D -> D N H", "(N H) -> N H", at, take)
    rows += _linear(f"{ours}/out", f"{theirs}{out}", "D (N H) -> N H D", "", at)
    for name, each in zip(("mlp_up", "mlp_down", "mlp_gate"), mlp, strict=False):
        rows += _linear(f"{ours}/{name}", f"{theirs}{each}", "F D -> D F", "", at)
    for name, each in zip(("attn_norm", "mlp_norm"), norms, strict=True):
        rows += _norm(f"{ours}/{name}", f"{theirs}{each}", at)
    return rows


# ---- timm, as in OpenVLA ---------------------------------------------------------------------------------------------


def _timm(config: DinoConfig | SiglipConfig, ours: str, theirs: str, *, film: bool) -> list[Row]:
    """Patches and blocks. film: blocks lie inside of ones with FiLM, as in OpenVLA-OFT."""
    rows = _linear(f"{ours}patch", f"{theirs}patch_embed.proj", "D C p q -> p q C D")
    for i in range(config.layers):
        layer, at = f"{theirs}blocks.{i}.", (i,)
        inner = f"{layer}block." if film else layer
        rows += _block(
            f"{ours}layers",
            inner,
            at,
            config.width,
            attn="attn.qkv",
            out="attn.proj",
            mlp=("mlp.fc1", "mlp.fc2"),
            norms=("norm1", "norm2"),
        )
        if film:
            for name in ("scale", "shift"):
                rows += _linear(f"{ours}layers/film/{name}", f"{layer}{name}", "D E -> E D", "", at)
        if isinstance(config, DinoConfig):
            for mine, name in (("attn_scale", "ls1"), ("mlp_scale", "ls2")):
                rows.append(Row(f"{ours}layers/{mine}", f"{inner}{name}.scale_factor", at=at))
    if config.select == "last":
        rows += _norm(f"{ours}final_norm", f"{theirs}norm")
    return rows


def timm_dino(
    config: DinoConfig,
    ours: str,
    theirs: str,
    *,
    film: bool = False,
    stored: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
) -> list[Row]:
    """DINOv2 with registers; the scales of layers are called as in files that went through transformers.

    film: see `timm_siglip`. stored, grid: of the positions in the file and in the model, where they differ.
    """
    tables = [Row(f"{ours}class_token", f"{theirs}cls_token"), Row(f"{ours}registers", f"{theirs}reg_token")]
    position = (f"{ours}position", f"{theirs}pos_embed")
    resized = stored is not None and grid is not None and stored != grid
    tables.append(ResizedRow(*position, stored=stored, grid=grid) if resized else Row(*position))  # type: ignore[arg-type]
    return tables + _timm(config, ours, theirs, film=film)


def timm_siglip(config: SiglipConfig, ours: str, theirs: str, *, film: bool = False) -> list[Row]:
    """SigLIP without its pooling. film: blocks lie inside of ones with FiLM, as in files of OpenVLA-OFT."""
    return [Row(f"{ours}position", f"{theirs}pos_embed"), *_timm(config, ours, theirs, film=film)]


def timm_idle(config: DinoConfig | SiglipConfig, theirs: str, *, film_width: int | None = None) -> dict[str, tuple]:
    """Returns the arrays that such a file has and nobody computes with, and their shapes: behind the chosen block.

    film_width: E, where blocks lie inside of ones with FiLM.
    """
    D, F = config.width, config.mlp_dim
    linear = lambda name, outputs, inputs: {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}  # noqa: E731
    norm = lambda name: {f"{name}.weight": (D,), f"{name}.bias": (D,)}  # noqa: E731
    idle: dict[str, tuple] = {}
    for i in range(config.layers, config.depth):
        layer = f"blocks.{i}."
        if film_width is not None:
            idle |= linear(f"{layer}scale", D, film_width) | linear(f"{layer}shift", D, film_width)
            layer += "block."
        idle |= norm(f"{layer}norm1") | linear(f"{layer}attn.qkv", 3 * D, D) | linear(f"{layer}attn.proj", D, D)
        idle |= norm(f"{layer}norm2") | linear(f"{layer}mlp.fc1", F, D) | linear(f"{layer}mlp.fc2", D, F)
        if isinstance(config, DinoConfig):
            idle |= {f"{layer}{name}.scale_factor": (D,) for name in ("ls1", "ls2")}
    if config.select != "last":
        idle |= norm("norm")
    if isinstance(config, SiglipConfig):
        pool = "attn_pool."
        idle |= {f"{pool}latent": (1, 1, D)} | linear(f"{pool}q", D, D) | linear(f"{pool}kv", 2 * D, D)
        idle |= linear(f"{pool}proj", D, D) | norm(f"{pool}norm")
        idle |= linear(f"{pool}mlp.fc1", F, D) | linear(f"{pool}mlp.fc2", D, F)
    return {f"{theirs}{name}": shape for name, shape in idle.items()}


def prismatic_projector(ours: str, theirs: str, *, fused: bool = True) -> list[Row]:
    """The projector of OpenVLA: "projector.". fused: see `PrismaticProjector`."""
    pairs = (("first", "fc1"), ("second", "fc2"), ("third", "fc3"))[: 3 if fused else 2]
    return [row for a, b in pairs for row in _linear(f"{ours}{a}", f"{theirs}{b}", "F D -> D F")]


# ---- transformers ----------------------------------------------------------------------------------------------------


def smolvlm_vision(config: SiglipConfig, ours: str, theirs: str) -> list[Row]:
    """SigLIP in SmolVLM: "model.vision_model."."""
    rows = [
        *_linear(f"{ours}patch", f"{theirs}embeddings.patch_embedding", "D C p q -> p q C D"),
        Row(f"{ours}position", f"{theirs}embeddings.position_embedding.weight", at=(0,)),
        *_norm(f"{ours}final_norm", f"{theirs}post_layernorm"),
    ]
    for i in range(config.layers):
        rows += _block(
            f"{ours}layers",
            f"{theirs}encoder.layers.{i}.",
            (i,),
            config.width,
            attn="self_attn.*_proj",
            out="self_attn.out_proj",
            mlp=("mlp.fc1", "mlp.fc2"),
            norms=("layer_norm1", "layer_norm2"),
        )
    return rows


def smolvlm_connector(ours: str, theirs: str) -> list[Row]:
    """`PixelShuffle` in SmolVLM: "model.connector."."""
    return [Row(f"{ours}kernel", f"{theirs}modality_projection.proj.weight", "E D -> D E")]


def _qwen_blocks(config: QwenVisionConfig, ours: str, theirs: str, mlp: Sequence[str]) -> list[Row]:
    return [
        row
        for i in range(config.depth)
        for row in _block(
            f"{ours}layers",
            f"{theirs}blocks.{i}.",
            (i,),
            config.hidden,
            attn="attn.qkv",
            out="attn.proj",
            mlp=[f"mlp.{name}" for name in mlp],
            norms=("norm1", "norm2"),
        )
    ]


_FRAMES = "D C t p q -> t p q C D"


def qwen3_vision(config: Qwen3VisionConfig, ours: str, theirs: str) -> list[Row]:
    """The tower of Qwen3-VL: "model.visual."."""

    def merger(mine: str, name: str, at: Index = ()) -> list[Row]:
        rows = _norm(f"{ours}{mine}/norm", f"{theirs}{name}.norm", at)
        rows += _linear(f"{ours}{mine}/up", f"{theirs}{name}.linear_fc1", "F D -> D F", "", at)
        return rows + _linear(f"{ours}{mine}/down", f"{theirs}{name}.linear_fc2", "E F -> F E", "", at)

    rows = _linear(f"{ours}patch", f"{theirs}patch_embed.proj", _FRAMES)
    rows.append(Row(f"{ours}position", f"{theirs}pos_embed.weight"))
    rows += _qwen_blocks(config, ours, theirs, ("linear_fc1", "linear_fc2")) + merger("merger", "merger")
    for i in range(len(config.deepstack)):
        rows += merger("deepstack", f"deepstack_merger_list.{i}", (i,))
    return rows


def qwen25_vision(config: Qwen25VisionConfig, ours: str, theirs: str) -> list[Row]:
    """The tower of Qwen2.5-VL: "visual."."""
    rows = [
        Row(f"{ours}patch", f"{theirs}patch_embed.proj.weight", _FRAMES),
        Row(f"{ours}merger/norm/scale", f"{theirs}merger.ln_q.weight"),
        *_linear(f"{ours}merger/up", f"{theirs}merger.mlp.0", "F D -> D F"),
        *_linear(f"{ours}merger/down", f"{theirs}merger.mlp.2", "E F -> F E"),
    ]
    blocks = _qwen_blocks(config, ours, theirs, ("up_proj", "down_proj", "gate_proj"))
    return rows + [row for row in blocks if not row.ours.endswith("_norm/bias")]


def qwen2_vision(config: Qwen2VisionConfig, ours: str, theirs: str) -> list[Row]:
    """The tower of Qwen2-VL: "visual."."""
    return [
        Row(f"{ours}patch", f"{theirs}patch_embed.proj.weight", _FRAMES),
        *_norm(f"{ours}merger/norm", f"{theirs}merger.ln_q"),
        *_linear(f"{ours}merger/up", f"{theirs}merger.mlp.0", "F D -> D F"),
        *_linear(f"{ours}merger/down", f"{theirs}merger.mlp.2", "E F -> F E"),
        *_qwen_blocks(config, ours, theirs, ("fc1", "fc2")),
    ]
