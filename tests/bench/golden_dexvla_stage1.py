"""Golden vectors of what stage 1 of DexVLA sees and reads with: torchvision's ResNet, transformers' DistilBERT.

Runs in an environment of its own with torch, torchvision, transformers and numpy, never in that of the trainer:

    python tests/bench/golden_dexvla_stage1.py [--out tests/models/golden]

Weights of the ResNet are too many for a file: each is drawn by its name, as `weight_of` says. Writes
  resnet_groups.npz   names, shapes: of the weights, JSON; images (B, H, W, 3) in [-1, 1]; out (B, D)
  distilbert.npz      weight/...; tokens (B, S), mask (B, S); out (B, S, D), of those that are there
"""

import argparse
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torchvision.models.resnet import Bottleneck, ResNet  # type: ignore[import-not-found]

BLOCKS, GROUPS = (1, 2, 1, 1), 32
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def weight_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns float32 normals of the generator seeded by the CRC of the name; of maps divided by sqrt(fan-in)."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    drawn = rng.standard_normal(shape)
    return (drawn / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 1 + 0.2 * drawn).astype(np.float32)


def resnet() -> dict[str, Any]:
    """Returns what goes into resnet_groups.npz."""
    model = ResNet(Bottleneck, list(BLOCKS), norm_layer=lambda channels: torch.nn.GroupNorm(GROUPS, channels))
    model.fc = torch.nn.Identity()
    shapes = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(weight_of(name, shape)) for name, shape in shapes.items()})
    images = np.random.default_rng(0).uniform(-1, 1, (2, 50, 64, 3)).astype(np.float32)
    scaled = ((images + 1) / 2 - MEAN) / STD
    with torch.no_grad():
        out = model.eval()(torch.from_numpy(scaled.transpose(0, 3, 1, 2)).float())
    return {"shapes": json.dumps(shapes), "images": images, "out": out.numpy()}


def distilbert() -> dict[str, Any]:
    """Returns what goes into distilbert.npz."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 12}
    model = transformers.DistilBertModel(transformers.DistilBertConfig(**sizes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_((0.5 * torch.randn_like(weight)).to(torch.bfloat16).float())
        tokens = torch.randint(1, 40, (3, 9))
        mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
        out = model(input_ids=tokens * mask, attention_mask=mask.long()).last_hidden_state * mask[..., None]
    arrays = {"tokens": (tokens * mask).numpy(), "mask": mask.numpy(), "out": out.numpy()}
    return arrays | {f"weight/{name}": w.numpy() for name, w in model.state_dict().items()}


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "models" / "golden"
    parser.add_argument("--out", type=Path, default=default)
    out = parser.parse_args().out
    np.savez_compressed(out / "resnet_groups.npz", **resnet())
    np.savez_compressed(out / "distilbert.npz", **distilbert())


if __name__ == "__main__":
    main()
