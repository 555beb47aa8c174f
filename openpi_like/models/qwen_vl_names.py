"""The names of the weights of Qwen2-VL, Qwen2.5-VL and Qwen3-VL in Hugging Face's files."""

from collections.abc import Callable, Sequence
from typing import Any

from openpi_like.models.formats import Format, Row, Table
from openpi_like.models.hf_names import llama_rows
from openpi_like.models.hf_vision_names import qwen2_vision, qwen3_vision, qwen25_vision
from openpi_like.models.llama import LlamaConfig
from openpi_like.models.qwen_vision import Qwen2VisionConfig, Qwen3VisionConfig, Qwen25VisionConfig, QwenVisionConfig

TOWERS: dict[type[QwenVisionConfig], Callable[[Any, str, str], list[Row]]] = {
    Qwen2VisionConfig: qwen2_vision,
    Qwen25VisionConfig: qwen25_vision,
    Qwen3VisionConfig: qwen3_vision,
}


def qwen_vl_formats(vision: QwenVisionConfig, vlm: LlamaConfig) -> dict[str, Format]:
    """Returns the layouts that hold the weights of a Qwen-VL model."""
    third = isinstance(vision, Qwen3VisionConfig)

    def huggingface(names: Sequence[str]) -> Table:
        """Safetensors as published: Qwen2-VL and Qwen2.5-VL without a common root, as transformers before 4.52 named
        it, and Qwen3-VL with "model."; each is read with either.
        """
        rooted = any(name.startswith("model.visual.") for name in names) if names else third
        tower, language = ("model.visual.", "model.language_model.") if rooted else ("visual.", "model.")
        rows = TOWERS[type(vision)](vision, "vision/", tower)
        rows += llama_rows(vlm, "vlm", language)
        table = f"{language}embed_tokens.weight"
        return Table(tuple(rows), copies={"lm_head.weight": table} if vlm.tied else {})

    return {"huggingface": Format(r"^(model\.)?visual\.", huggingface)}
