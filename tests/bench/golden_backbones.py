"""Golden vectors of backbones: tiny random models of transformers and timm that see images and read text, in float32.

Runs in an environment of its own with torch, torchvision, timm, transformers, safetensors and numpy, never in that of
the trainer:

    python tests/bench/golden_backbones.py tests/models/golden

Writes backbone_<case>.npz for every case, each with
  weight/...    by the names of published files
  gradient/...  of "two/loss" with respect to each of them
and, for sequences with one and with two images, "one/..." and "two/...":
  images        (B, C, height, width, 3), uint8
  tokens        (B, S), text alone; mask: (B, S), which are there; answer: (B, S), which are to be predicted
  slots         (C,), how many text tokens stand before each image
  states        (L + 1, B, S + images, D): the inputs of every layer, and the output of the final norm
  logits        (B, S + images, V)
  loss          the mean over samples of the mean cross-entropy of a sample's answer
and backbone_shapes.json, names and shapes of published models; the number of a layer is a star there.
"""

import argparse
import json
import re
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import timm  # type: ignore[import-not-found]
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

VOCABULARY, BATCH, TOKENS, IMAGE = 48, 2, 11, 1
HALF = ((0.5,) * 3, (0.5,) * 3)
IMAGENET = (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
LANGUAGE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
VISION = {"depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}


class Sequence:
    """Text with images in it. tokens, mask, answer: (B, S). slots: see above. P: tokens of an image."""

    def __init__(self, slots: tuple[int, ...], image_size: tuple[int, int], P: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.slots = slots
        self.images = rng.integers(0, 256, (BATCH, len(slots), *image_size, 3), dtype=np.uint8)
        self.mask = np.arange(TOKENS) < np.array([[TOKENS], [TOKENS - 3]])
        self.tokens = np.where(self.mask, rng.integers(5, VOCABULARY, (BATCH, TOKENS)), 0)
        begins = np.array([[TOKENS - 4], [TOKENS - 5]])
        self.answer = (np.arange(TOKENS) >= begins) & self.mask
        self.text_at = np.array([i + P * sum(i >= slot for slot in slots) for i in range(TOKENS)])
        self.is_image = np.ones(TOKENS + len(slots) * P, bool)
        self.is_image[self.text_at] = False

    def spread(self, text: np.ndarray, of_images: Any) -> torch.Tensor:
        """Returns (B, S + images) of what belongs to text and to images."""
        whole = np.full((BATCH, len(self.is_image)), of_images)
        whole[:, self.text_at] = text
        return torch.tensor(whole)

    def pixels(self, mean: Any, std: Any) -> torch.Tensor:
        """Returns all images, those of a sample together, as towers take them."""
        flat = torch.tensor(self.images, dtype=torch.float32).flatten(0, 1) / 255
        return ((flat - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)

    def arrays(self) -> dict[str, np.ndarray]:
        named = {name: getattr(self, name) for name in ("images", "tokens", "mask", "answer")}
        return named | {"slots": np.array(self.slots)}


# ---- Models ----------------------------------------------------------------------------------------------------------


class PaliGemma2(nn.Module):
    slots: ClassVar[dict[str, tuple[int, ...]]] = {"one": (0,), "two": (0, 0)}
    size, image_tokens = (8, 8), 4

    def __init__(self) -> None:
        super().__init__()
        vision = {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 8, "patch_size": 4, "vision_use_head": False, "model_type": "siglip_vision_model",
        }  # fmt: skip
        text = LANGUAGE | {
            "vocab_size": VOCABULARY + 64, "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 64,
            "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5, "model_type": "gemma2",
        }  # fmt: skip
        config = transformers.PaliGemmaConfig(
            vision_config=vision, text_config=text, projection_dim=16, hidden_size=16, image_token_index=IMAGE
        )
        config._attn_implementation = "eager"  # the only one with soft caps
        self.whole = transformers.PaliGemmaForConditionalGeneration(config)
        self.layers, self.norm = self.whole.model.language_model.layers, self.whole.model.language_model.norm

    def forward(self, s: Sequence) -> torch.Tensor:
        return self.whole(
            input_ids=s.spread(s.tokens, IMAGE),
            attention_mask=s.spread(s.mask, True).long(),
            token_type_ids=s.spread(s.answer, False).long(),
            pixel_values=s.pixels(*HALF),
        ).logits[..., :VOCABULARY]


class QwenVl(nn.Module):
    slots: ClassVar[dict[str, tuple[int, ...]]] = {"one": (2,), "two": (2, 4)}
    size, image_tokens = (24, 16), 6

    def __init__(self, model: str, vision: dict[str, Any], text: dict[str, Any], mean_std: dict[str, Any]) -> None:
        super().__init__()
        ids = {"image_token_id": IMAGE, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
        text = LANGUAGE | text | {"vocab_size": VOCABULARY, "tie_word_embeddings": True}
        config = getattr(transformers, f"{model}Config")(vision_config=vision, text_config=text, **ids)
        config.tie_word_embeddings = True
        config._attn_implementation = "eager"
        self.whole = getattr(transformers, f"{model}ForConditionalGeneration")(config)
        self.layers, self.norm = self.whole.model.language_model.layers, self.whole.model.language_model.norm
        self.processor = Qwen2VLImageProcessor(
            patch_size=4, temporal_patch_size=2, merge_size=2, do_resize=False, do_convert_rgb=False, **mean_std
        )

    def forward(self, s: Sequence) -> torch.Tensor:
        flat = list(s.images.reshape(-1, *s.images.shape[2:]))
        seen = self.processor(images=flat, return_tensors="pt", input_data_format="channels_last")
        return self.whole(
            inputs_embeds=None,
            input_ids=s.spread(s.tokens, IMAGE),
            attention_mask=s.spread(s.mask, True).long(),
            mm_token_type_ids=s.spread(np.zeros_like(s.tokens), 1).int(),
            pixel_values=seen["pixel_values"],
            image_grid_thw=seen["image_grid_thw"],
        ).logits


def qwen2_5_vl() -> QwenVl:
    vision = VISION | {"out_hidden_size": 16, "window_size": 16, "fullatt_block_indexes": [1]}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 1]}
    return QwenVl("Qwen2_5_VL", vision, {"head_dim": 8, "rope_parameters": rope, "num_attention_heads": 2}, {})


def qwen3_vl() -> QwenVl:
    vision = VISION | {"depth": 2, "num_position_embeddings": 25, "deepstack_visual_indexes": [0]}
    vision["out_hidden_size"] = 16
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2], "mrope_interleaved": True}
    half = {"image_mean": HALF[0], "image_std": HALF[1]}
    return QwenVl("Qwen3VL", vision, {"head_dim": 12, "rope_parameters": rope, "num_hidden_layers": 3}, half)


class FilmBlock(nn.Module):
    """A block whose tokens are scaled and shifted by the language, between attention and MLP."""

    def __init__(self, block: Any, width: int, owner: list[nn.Module]) -> None:
        super().__init__()
        self.block, self.owner = block, owner
        self.scale, self.shift = nn.Linear(LANGUAGE["hidden_size"], width), nn.Linear(LANGUAGE["hidden_size"], width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, language = self.block, self.owner[0].language
        x = x + b.drop_path1(b.ls1(b.attn(b.norm1(x))))
        x = x * (1 + self.scale(language)[:, None]) + self.shift(language)[:, None]
        return x + b.drop_path2(b.ls2(b.mlp(b.norm2(x))))


class Prismatic(nn.Module):
    """Towers of timm, a projector and Llama, put together as OpenVLA's model is: patches behind the first token.

    film: one tower alone, with FiLM, as OpenVLA-OFT has it; its language is the mean of the prompt's embeddings.
    """

    slots: ClassVar[dict[str, tuple[int, ...]]] = {"one": (1,), "two": (1, 1)}
    size, image_tokens = (8, 12), 6

    def __init__(self, *, film: bool) -> None:
        super().__init__()
        common = {"img_size": self.size, "patch_size": 4, "depth": 3, "num_heads": 2, "mlp_ratio": 2, "num_classes": 0}
        create = timm.models.vision_transformer.VisionTransformer
        siglip = create(**common, embed_dim=16, class_token=False, global_pool="map")
        dino = create(**common, embed_dim=12, init_values=1e-5, reg_tokens=4, no_embed_class=True)
        towers = {"featurizer": siglip} if film else {"featurizer": dino, "fused_featurizer": siglip}
        if film:
            siglip.blocks = nn.Sequential(*(FilmBlock(b, 16, [self]) for b in siglip.blocks))
        self.vision_backbone = nn.ModuleDict(towers)
        self.film, self.language = film, None
        D, E = sum(tower.embed_dim for tower in towers.values()), LANGUAGE["hidden_size"]
        widths = (D, E, E) if film else (D, 4 * D, E, E)
        maps = {f"fc{i + 1}": nn.Linear(*widths[i : i + 2]) for i in range(len(widths) - 1)}
        self.projector = nn.ModuleDict(maps)
        config = transformers.LlamaConfig(**LANGUAGE, vocab_size=VOCABULARY, rms_norm_eps=1e-5)
        self.language_model = transformers.LlamaForCausalLM(config)
        self.layers, self.norm = self.language_model.model.layers, self.language_model.model.norm

    def forward(self, s: Sequence) -> torch.Tensor:
        tokens = self.language_model.model.embed_tokens(torch.tensor(s.tokens))
        asked = torch.tensor(s.mask & ~s.answer)[..., None]
        self.language = ((tokens * asked).sum(1) / asked.sum(1)).repeat_interleave(len(s.slots), 0)
        seen = []
        for name, tower in self.vision_backbone.items():
            pixels = s.pixels(*(HALF if self.film or name == "fused_featurizer" else IMAGENET))
            seen.append(tower.get_intermediate_layers(pixels, n={len(tower.blocks) - 2})[0])
        x = torch.cat(seen, dim=2)
        for i, fc in enumerate(self.projector.values()):
            x = fc(nn.functional.gelu(x) if i else x)
        x = x.reshape(BATCH, -1, x.shape[-1])
        sequence = torch.cat([tokens[:, :1], x, tokens[:, 1:]], dim=1)
        mask = s.spread(s.mask, True).long()
        return self.language_model(inputs_embeds=sequence, attention_mask=mask, use_cache=False).logits


CASES: dict[str, Callable[[], Any]] = {
    "prismatic": lambda: Prismatic(film=False),
    "prismatic_film": lambda: Prismatic(film=True),
    "paligemma2": PaliGemma2,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
}

# ---- Files -----------------------------------------------------------------------------------------------------------


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Gives every weight a draw that matters: norms and biases too."""
    for name, weight in model.named_parameters():
        draw = torch.randn(weight.shape, generator=generator)
        around_zero = isinstance(model, PaliGemma2) and "language_model" in name
        one = weight.ndim == 1 and name.endswith(("weight", "gamma")) and not around_zero
        spread = 0.3 if weight.ndim == 1 else 1.2 / np.sqrt(np.prod(weight.shape[1:]))
        weight.data.copy_((1.0 if one else 0.0) + spread * draw)


def published(model: Any) -> dict[str, np.ndarray]:
    """Returns the weights by the names of a file."""
    if hasattr(model, "whole"):
        with tempfile.TemporaryDirectory() as folder:
            model.whole.save_pretrained(folder)
            return {k: v.numpy() for k, v in load_file(Path(folder) / "model.safetensors").items()}
    # transformers renames gammas of files that it reads
    return {re.sub(r"\.gamma$", ".scale_factor", k): w.detach().numpy().copy() for k, w in model.named_parameters()}


def run(model: Any, s: Sequence) -> dict[str, torch.Tensor]:
    """Returns states, logits and loss."""
    states: list[torch.Tensor] = []
    hooks = [x.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])) for x in model.layers]
    hooks.append(model.norm.register_forward_hook(lambda _, inputs, out: states.append(out)))
    logits = model(s)
    for hook in hooks:
        hook.remove()
    text, targets, answer = logits[:, s.text_at][:, :-1], torch.tensor(s.tokens[:, 1:]), torch.tensor(s.answer[:, 1:])
    errors = nn.functional.cross_entropy(text.swapaxes(1, 2), targets, reduction="none")
    loss = ((errors * answer).sum(1) / answer.sum(1)).mean()
    return {"states": torch.stack(states), "logits": logits, "loss": loss}


def write_case(case: str, directory: Path) -> None:
    """Writes the file of one case, and prints its size."""
    torch.manual_seed(0)
    model = CASES[case]().float().eval()
    randomise(model, torch.Generator().manual_seed(zlib.crc32(case.encode())))
    arrays = {f"weight/{name}": weight for name, weight in published(model).items()}
    for i, (name, slots) in enumerate(model.slots.items()):
        s = Sequence(slots, model.size, model.image_tokens, i)
        out = run(model, s)
        found = s.arrays() | {k: v.detach().numpy() for k, v in out.items()}
        arrays |= {f"{name}/{k}": v for k, v in found.items()}
    out["loss"].backward()
    for weight in model.parameters():
        weight.data = torch.zeros_like(weight) if weight.grad is None else weight.grad
    arrays |= {f"gradient/{name}": weight for name, weight in published(model).items()}
    path = directory / f"backbone_{case}.npz"
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB, {len(arrays)} arrays")


# ---- Shapes of published models --------------------------------------------------------------------------------------


def _qwen_shapes(model: str, vision: dict[str, Any], sizes: tuple[int, ...], **text: Any) -> dict[str, list[Any]]:
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    text |= dict(zip(names, sizes, strict=True)) | {"vocab_size": text.get("vocab_size", 151_936)}
    config = getattr(transformers, f"{model}Config")(vision_config=vision, text_config=text)
    config.tie_word_embeddings = text["tie_word_embeddings"]
    return _shapes(getattr(transformers, f"{model}ForConditionalGeneration")(config))


def _paligemma2_shapes(*sizes: int) -> dict[str, list[Any]]:
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    text = dict(zip(names, sizes, strict=True)) | {"model_type": "gemma2", "vocab_size": 257_216, "head_dim": 256}
    vision = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 14, "vision_use_head": False, "model_type": "siglip_vision_model",
    }  # fmt: skip
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=text, projection_dim=sizes[0], hidden_size=sizes[0]
    )
    return _shapes(transformers.PaliGemmaForConditionalGeneration(config))


def _openvla_shapes() -> dict[str, list[Any]]:
    model = nn.Module()
    towers = {"featurizer": "vit_large_patch14_reg4_dinov2", "fused_featurizer": "vit_so400m_patch14_siglip_224"}
    model.vision_backbone = nn.ModuleDict(
        {k: timm.create_model(v, pretrained=False, num_classes=0, img_size=224) for k, v in towers.items()}
    )
    widths = (2176, 8704, 4096, 4096)
    model.projector = nn.ModuleDict({f"fc{i + 1}": nn.Linear(*widths[i : i + 2]) for i in range(3)})
    model.language_model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32_064))
    return _shapes(model)


def _shapes(model: nn.Module) -> dict[str, list[Any]]:
    """Returns {name: [shape, how many]}, where the number of a layer is a star; names as in memory."""
    found: dict[str, list[Any]] = {}
    for name, w in model.named_parameters():
        starred = re.sub(r"\b(blocks|layers|deepstack_merger_list)\.\d+\.", r"\1.*.", name)
        entry = found.setdefault(re.sub(r"\.gamma$", ".scale_factor", starred), [list(w.shape), 0])
        assert entry[0] == list(w.shape), name
        entry[1] += 1
    return found


def published_shapes() -> dict[str, dict[str, list[Any]]]:
    """Returns the shapes of weights of models that hold none."""
    tied = {"tie_word_embeddings": True}
    large = {"num_heads": 16, "depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
    large |= {"deepstack_visual_indexes": [5, 11, 17]}  # type: ignore[dict-item]
    with torch.device("meta"):
        return {
            "openvla_7b": _openvla_shapes(),
            "paligemma2_3b": _paligemma2_shapes(2304, 26, 9216, 8, 4),
            "paligemma2_10b": _paligemma2_shapes(3584, 42, 14_336, 16, 8),
            "qwen2_5_vl_3b": _qwen_shapes(
                "Qwen2_5_VL", {"hidden_size": 1280, "out_hidden_size": 2048}, (2048, 36, 11_008, 16, 2), **tied
            ),
            "qwen3_vl_2b": _qwen_shapes(
                "Qwen3VL", {**large, "out_hidden_size": 2048}, (2048, 28, 6144, 16, 8), head_dim=128, **tied
            ),
            "qwen3_vl_4b": _qwen_shapes(
                "Qwen3VL", {**large, "out_hidden_size": 2560}, (2560, 36, 9728, 32, 8), head_dim=128, **tied
            ),
        }


def main() -> None:
    """Writes all files, or those of some cases."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    arguments = parser.parse_args()
    for case in arguments.cases:
        write_case(case, arguments.directory)
    shapes = published_shapes()
    for name, each in shapes.items():
        print(f"{name}: {sum(int(np.prod(shape)) * n for shape, n in each.values()):,} weights")
    lines = lambda each: ",\n".join(f"  {json.dumps(n)}: {json.dumps(each[n])}" for n in sorted(each))  # noqa: E731
    groups = (f" {json.dumps(name)}: {{\n{lines(each)}\n }}" for name, each in shapes.items())
    (arguments.directory / "backbone_shapes.json").write_text("{\n" + ",\n".join(groups) + "\n}\n")


if __name__ == "__main__":
    main()
