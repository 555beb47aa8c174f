"""The names of a Prismatic VLM's weights in the layout of OpenVLA's published files."""

import re
from collections.abc import Sequence

from openpi_like.models.dino import DinoConfig
from openpi_like.models.formats import Format, Row, Table
from openpi_like.models.hf_names import llama_rows
from openpi_like.models.hf_vision_names import prismatic_projector, timm_dino, timm_idle, timm_siglip
from openpi_like.models.llama import LlamaConfig
from openpi_like.models.siglip import SiglipConfig


def prismatic_formats(
    dino: DinoConfig | None, siglip: SiglipConfig, vlm: LlamaConfig, *, film: bool
) -> dict[str, Format]:
    """Returns the layouts that hold a Prismatic VLM's weights."""

    def openvla(names: Sequence[str]) -> Table:
        """OpenVLA's safetensors, and those of OpenVLA-OFT, which have the towers a level lower where there is FiLM.

        A model with FiLM can be loaded from a file without: FiLM must be asked to start fresh then.
        """
        with_film = any(".block." in name for name in names) if names else film
        root = next((m[0] for n in names if (m := re.match(r"(vision_backbone\.)+", n))), "vision_backbone.")
        if not names and film:
            root *= 2
        first, second = f"{root}featurizer.", f"{root}fused_featurizer."
        width = vlm.width if with_film else None
        rows: list[Row] = []
        if dino is None:
            second = first
        else:
            rows += timm_dino(dino, "dino/", first, film=with_film)
        rows += timm_siglip(siglip, "siglip/", second, film=with_film)
        idle = timm_idle(siglip, second, film_width=width)
        if dino is not None:
            idle |= timm_idle(dino, first, film_width=width)
        rows += prismatic_projector("projector/", "projector.", fused=dino is not None)
        rows += llama_rows(vlm, "vlm", "language_model.model.", head="language_model.lm_head")
        table, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
        return Table(
            tuple(rows),
            copies={head: table} if vlm.tied else {},
            unused={
                f"^({'|'.join(map(re.escape, idle))})$": "behind the chosen block, nobody computes with it",
                r"\.rotary_emb\.inv_freq$": "rotations, which are no weights",
            },
            fillers=idle,
        )

    return {"openvla": Format(r"^(vision_backbone\.)+featurizer\.", openvla)}
