"""The names of SmolVLM's weights, in its own files and in those of LeRobot's SmolVLA."""

import dataclasses
import re
from collections.abc import Sequence

from openpi_like.models.formats import Format, Table
from openpi_like.models.hf_names import llama_rows
from openpi_like.models.hf_vision_names import smolvlm_connector, smolvlm_vision
from openpi_like.models.llama import LlamaConfig
from openpi_like.models.siglip import SiglipConfig


def smolvlm_formats(vision: SiglipConfig, vlm: LlamaConfig, layers: int, vocab_size: int) -> dict[str, Format]:
    """Returns the layouts that hold SmolVLM's weights.

    vlm: as published. layers: how many of its layers there are.
    """

    def table(root: str) -> Table:
        model, used = f"{root}model.", dataclasses.replace(vlm, depth=layers)
        rows = [
            *smolvlm_vision(vision, "vision/", f"{model}vision_model."),
            *smolvlm_connector("connector/", f"{model}connector."),
            *llama_rows(used, "vlm", f"{model}text_model.", head=f"{root}lm_head"),
        ]
        head = f"{root}lm_head.weight"
        unused: dict[str, str] = {}
        fillers: dict[str, tuple[int, ...]] = {}
        if vlm.tied:
            unused[rf"^{re.escape(head)}$"] = "the table of logits, for writing text"
            fillers[head] = (vocab_size, vlm.width)
        if layers < vlm.depth:
            behind = "|".join(map(str, range(layers, vlm.depth)))
            unused[rf"^{re.escape(model)}text_model\.layers\.({behind})\."] = "layers behind those that are used"
        return Table(tuple(rows), unused=unused, fillers=fillers)

    def huggingface(names: Sequence[str]) -> Table:
        """SmolVLM's safetensors."""
        return table("")

    def lerobot(names: Sequence[str]) -> Table:
        """The backbone in LeRobot's safetensors of SmolVLA; older files have normalisation statistics among them."""
        both = table(f"{lerobot_root(names)}vlm_with_expert.vlm.")
        statistics = {r"^(un)?normalize_(inputs|targets|outputs)\.": "normalisation statistics, which are no weights"}
        return dataclasses.replace(both, unused=both.unused | statistics)

    return {
        "lerobot": Format(r"^(model\.)?vlm_with_expert\.", lerobot, written_as=("model.",), partial=True),
        "huggingface": Format(r"^model\.text_model\.", huggingface),
    }


def lerobot_root(names: Sequence[str]) -> str:
    """Returns what LeRobot's names begin with: "model." or nothing."""
    return "model." if any(name.startswith("model.") for name in names) else ""
