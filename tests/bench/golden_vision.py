"""Golden vectors of image towers and projectors, computed by timm and transformers on tiny random weights in float32:

    python tests/bench/golden_vision.py [--out tests/models/golden]

Needs torch, torchvision, timm and transformers, in an environment of its own; nothing of this repository. Each file has
weights by the names of published files, images as uint8, outputs, and gradients of sum(output * cotangent).
`vision_shapes.json` has names and shapes of the published sizes; the number of a layer is a star there.
"""

import argparse
import json
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm  # type: ignore[import-not-found]
import torch
from torch import nn
from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl as qwen25_config
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen25
from transformers.models.qwen2_vl import configuration_qwen2_vl as qwen2_config
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen3_vl import configuration_qwen3_vl as qwen3_config
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3
from transformers.models.smolvlm import configuration_smolvlm as smolvlm_config
from transformers.models.smolvlm import modeling_smolvlm as smolvlm

Arrays = dict[str, np.ndarray]
VisionTransformer = timm.models.vision_transformer.VisionTransformer
FEATURIZERS = ("vision_backbone.featurizer.", "vision_backbone.fused_featurizer.")


# ---- Weights ---------------------------------------------------------------------------------------------------------


def fill(model: nn.Module, seed: int) -> nn.Module:
    """Draws every weight: maps from N(0, 1 / inputs), everything else near what it starts at."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda w: torch.randn(w.shape, generator=generator)  # noqa: E731
    with torch.no_grad():
        for name, w in model.named_parameters():
            if w.ndim > 1 and name.endswith("weight"):
                w.copy_(draw(w) / np.sqrt(np.prod(w.shape[1:])))
            else:
                w.copy_((1.0 if name.endswith(("weight", "gamma")) else 0.0) + 0.3 * draw(w))
    return model.eval()


def published(name: str) -> str:
    """Returns the name of a weight of timm in a file that went through transformers, which renames gammas."""
    return re.sub(r"\.gamma$", ".scale_factor", name)


def stored(model: nn.Module, prefix: str, out: torch.Tensor, seed: int) -> Arrays:
    """Returns weights, and their gradients by a random cotangent of the output; none where nothing depends on one."""
    generator = torch.Generator().manual_seed(seed)
    cotangent = torch.randn(out.shape, generator=generator)
    model.zero_grad()
    (out * cotangent).sum().backward()
    arrays = {"cotangent": cotangent.numpy()}
    for name, w in model.named_parameters():
        arrays[f"weights/{prefix}{published(name)}"] = w.detach().numpy()
        if w.grad is not None:
            arrays[f"grad/{prefix}{published(name)}"] = w.grad.numpy()
    return arrays


def images(*shape: int) -> np.ndarray:
    """Returns random images as uint8, (B, height, width, 3)."""
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def channels_first(pixels: np.ndarray, mean: Any, std: Any) -> torch.Tensor:
    """Returns images as these towers take them."""
    x = (torch.tensor(pixels, dtype=torch.float32) / 255 - torch.tensor(mean)) / torch.tensor(std)
    return x.permute(0, 3, 1, 2)


# ---- Towers ----------------------------------------------------------------------------------------------------------


def timm_arrays(model: Any, prefix: str, pixels: np.ndarray, mean: Any, std: Any) -> Arrays:
    """Returns what OpenVLA takes, patches of the block before the last, and what comes out behind the last norm."""
    fill(model, 1)
    x = channels_first(pixels, mean, std)
    (chosen,) = model.get_intermediate_layers(x, n={len(model.blocks) - 2})
    arrays = stored(model, prefix, chosen, 2) | {"images": pixels, "second_to_last": chosen.detach().numpy()}
    with torch.no_grad():
        arrays["last"] = model.forward_features(x)[:, model.num_prefix_tokens :].numpy()
    return arrays


def dino() -> Arrays:
    model = VisionTransformer(
        img_size=(12, 16), patch_size=4, embed_dim=16, depth=3, num_heads=2, mlp_ratio=2, init_values=1e-5,
        reg_tokens=4, no_embed_class=True, num_classes=0,
    )  # fmt: skip
    imagenet = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    arrays = timm_arrays(model, FEATURIZERS[0], images(2, 12, 16), *imagenet)
    table = torch.randn((1, 25, 6), generator=torch.Generator().manual_seed(3))
    arrays["resized/5x5"] = table.numpy()
    for grid in ((3, 4), (2, 2), (7, 6)):
        resized = timm.layers.resample_abs_pos_embed(table, list(grid), old_size=[5, 5], num_prefix_tokens=0)
        arrays[f"resized/{grid[0]}x{grid[1]}"] = resized.numpy()
    return arrays


def siglip() -> Arrays:
    model = VisionTransformer(
        img_size=(12, 16), patch_size=4, embed_dim=16, depth=3, num_heads=2, mlp_ratio=2, class_token=False,
        global_pool="map", num_classes=0,
    )  # fmt: skip
    return timm_arrays(model, FEATURIZERS[1], images(2, 12, 16), (0.5,) * 3, (0.5,) * 3)


def prismatic() -> Arrays:
    """The layers that OpenVLA's projector has, called in its order."""
    maps = nn.ModuleDict({"fc1": nn.Linear(10, 40), "fc2": nn.Linear(40, 12), "fc3": nn.Linear(12, 12)})
    fill(maps, 4)
    x = torch.randn((2, 5, 10), generator=torch.Generator().manual_seed(5))
    gelu = nn.GELU()
    out = maps["fc3"](gelu(maps["fc2"](gelu(maps["fc1"](x)))))
    return stored(maps, "projector.", out, 6) | {"patches": x.numpy(), "out": out.detach().numpy()}


class SmolVision(nn.Module):
    """Tower and connector of SmolVLM under the names that its files have."""

    def __init__(self, vision: Any, *, scale: int, out: int) -> None:
        super().__init__()
        self.vision_model = smolvlm.SmolVLMVisionTransformer(vision)
        text = types.SimpleNamespace(hidden_size=out)
        config: Any = types.SimpleNamespace(scale_factor=scale, vision_config=vision, text_config=text)
        self.connector = smolvlm.SmolVLMConnector(config)


def smol_config(**sizes: Any) -> Any:
    return smolvlm_config.SmolVLMVisionConfig(attn_implementation="eager", **sizes)


def smol() -> Arrays:
    vision = smol_config(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4
    )
    model = SmolVision(vision, scale=4, out=12)
    fill(model, 7)
    pixels = images(2, 32, 32)
    patches = model.vision_model(channels_first(pixels, (0.5,) * 3, (0.5,) * 3)).last_hidden_state
    out = model.connector(patches)
    arrays = stored(model, "model.", out, 8)
    return arrays | {"images": pixels, "patches": patches.detach().numpy(), "out": out.detach().numpy()}


def qwen_arrays(
    model: nn.Module, prefix: str, run: Callable[..., list[torch.Tensor]], mean_std: dict[str, Any]
) -> Arrays:
    """Outputs for images of several sizes, gradients for the first; images as their processor cuts them."""
    processor = Qwen2VLImageProcessor(
        patch_size=4, temporal_patch_size=2, merge_size=2, do_resize=False, do_convert_rgb=False, **mean_std
    )
    fill(model, 9)
    arrays: Arrays = {}
    for height, width in ((40, 24), (32, 32), (16, 48)):
        pixels = images(2, height, width)
        inputs = processor(images=list(pixels), return_tensors="pt", input_data_format="channels_last")
        outs = [o.reshape(2, -1, o.shape[-1]) for o in run(inputs["pixel_values"], inputs["image_grid_thw"])]
        out = torch.stack(outs)  # (1 + G, B, T, E)
        if not arrays:
            arrays = stored(model, prefix, out, 10)
        arrays |= {f"images/{height}x{width}": pixels, f"out/{height}x{width}": out.detach().numpy()}
    return arrays


def qwen25_sizes(**sizes: Any) -> Any:
    return qwen25_config.Qwen2_5_VLVisionConfig(attn_implementation="eager", **sizes)


def qwen2_sizes(**sizes: Any) -> Any:
    return qwen2_config.Qwen2VLVisionConfig(attn_implementation="eager", **sizes)


def qwen3_sizes(**sizes: Any) -> Any:
    return qwen3_config.Qwen3VLVisionConfig(attn_implementation="eager", **sizes)


def qwen2_tower() -> Arrays:
    config = qwen2_sizes(depth=3, embed_dim=16, mlp_ratio=2, num_heads=2, patch_size=4, hidden_size=12)
    model = qwen2.Qwen2VisionTransformerPretrainedModel(config)
    return qwen_arrays(model, "visual.", lambda *args: [model(*args).pooler_output], {})


def qwen25_tower() -> Arrays:
    config = qwen25_sizes(
        depth=3, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, out_hidden_size=12, window_size=16,
        fullatt_block_indexes=[1],
    )  # fmt: skip
    model = qwen25.Qwen2_5_VisionTransformerPretrainedModel(config)
    return qwen_arrays(model, "visual.", lambda *args: [model(*args).pooler_output], {})


def qwen3_tower() -> Arrays:
    config = qwen3_sizes(
        depth=4, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, out_hidden_size=12,
        num_position_embeddings=25, deepstack_visual_indexes=[0, 2],
    )  # fmt: skip
    model = qwen3.Qwen3VLVisionModel(config)

    def run(*args: torch.Tensor) -> list[torch.Tensor]:
        out = model(*args)
        return [out.pooler_output, *out.deepstack_features]

    half = (0.5,) * 3
    return qwen_arrays(model, "model.visual.", run, {"image_mean": half, "image_std": half})


# ---- Published sizes -------------------------------------------------------------------------------------------------


def shapes(model: nn.Module, prefix: str) -> dict[str, list[Any]]:
    """Returns {name: [shape, how many]}, where the number of a layer is a star."""
    found: dict[str, list[Any]] = {}
    for name, w in model.state_dict().items():
        starred = re.sub(r"\b(blocks|layers|deepstack_merger_list)\.\d+\.", r"\1.*.", prefix + published(name))
        entry = found.setdefault(starred, [list(w.shape), 0])
        assert entry[0] == list(w.shape), name
        entry[1] += 1
    return found


def published_shapes() -> dict[str, dict[str, list[Any]]]:
    with torch.device("meta"):
        towers: dict[str, nn.Module] = {
            name: timm.create_model(name, pretrained=False, num_classes=0, img_size=224)
            for name in ("vit_large_patch14_reg4_dinov2", "vit_so400m_patch14_siglip_224")
        }
        large = {"num_heads": 16, "depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
        deepstack = {"deepstack_visual_indexes": [5, 11, 17]}
        qwen2_2b = qwen2_sizes(hidden_size=1536)
        qwen25_3b = qwen25_sizes(hidden_size=1280, out_hidden_size=2048)
        base = smol_config(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=512,
            patch_size=16,
        )  # fmt: skip
        return {
            "dino": shapes(towers["vit_large_patch14_reg4_dinov2"], FEATURIZERS[0]),
            "siglip": shapes(towers["vit_so400m_patch14_siglip_224"], FEATURIZERS[1]),
            "smolvlm_500m": shapes(SmolVision(base, scale=4, out=960), "model."),
            "qwen2_vl_2b": shapes(qwen2.Qwen2VisionTransformerPretrainedModel(qwen2_2b), "visual."),
            "qwen25_vl_3b": shapes(qwen25.Qwen2_5_VisionTransformerPretrainedModel(qwen25_3b), "visual."),
            "qwen3_vl_2b": shapes(
                qwen3.Qwen3VLVisionModel(qwen3_sizes(**large, **deepstack, out_hidden_size=2048)), "model.visual."
            ),
            "qwen3_vl_4b": shapes(
                qwen3.Qwen3VLVisionModel(qwen3_sizes(**large, **deepstack, out_hidden_size=2560)), "model.visual."
            ),
        }


def _json(groups: dict[str, dict[str, list[Any]]]) -> str:
    """One line per name."""
    lines = lambda names: ",\n".join(f"  {json.dumps(n)}: {json.dumps(names[n])}" for n in sorted(names))  # noqa: E731
    return "{\n" + ",\n".join(f" {json.dumps(g)}: {{\n{lines(names)}\n }}" for g, names in groups.items()) + "\n}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "models" / "golden"
    parser.add_argument("--out", type=Path, default=default, help="folder of the files")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.use_deterministic_algorithms(True)
    makers = (dino, siglip, prismatic, smol, qwen2_tower, qwen25_tower, qwen3_tower)
    for make in makers:
        path = out / f"vision_{make.__name__}.npz"
        np.savez_compressed(path, **make())  # type: ignore[arg-type]
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    (out / "vision_shapes.json").write_text(_json(published_shapes()) + "\n")


if __name__ == "__main__":
    main()
