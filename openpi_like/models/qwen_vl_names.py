"""The names of the weights of Qwen2.5-VL and Qwen3-VL in Hugging Face's files."""

from collections.abc import Sequence

from openpi_like.models.formats import Format, Table
from openpi_like.models.hf_names import llama_rows
from openpi_like.models.hf_vision_names import qwen3_vision, qwen25_vision
from openpi_like.models.llama import LlamaConfig
from openpi_like.models.qwen_vision import Qwen3VisionConfig, Qwen25VisionConfig


def qwen_vl_formats(vision: Qwen25VisionConfig | Qwen3VisionConfig, vlm: LlamaConfig) -> dict[str, Format]:
    """Returns the layouts that hold the weights of a Qwen-VL model."""
    third = isinstance(vision, Qwen3VisionConfig)

    def huggingface(names: Sequence[str]) -> Table:
        """Safetensors as published: Qwen2.5-VL without a common root, as transformers before 4.52 named it, and
        Qwen3-VL with "model."; each is read with either.
        """
        rooted = any(name.startswith("model.visual.") for name in names) if names else third
        tower, language = ("model.visual.", "model.language_model.") if rooted else ("visual.", "model.")
        rows = qwen3_vision(vision, "vision/", tower) if third else qwen25_vision(vision, "vision/", tower)  # type: ignore[arg-type]
        rows += llama_rows(vlm, "vlm", language)
        table = f"{language}embed_tokens.weight"
        return Table(tuple(rows), copies={"lm_head.weight": table} if vlm.tied else {})

    return {"huggingface": Format(r"^(model\.)?visual\.", huggingface)}
