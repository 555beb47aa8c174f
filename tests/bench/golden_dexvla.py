"""Golden vectors of DexVLA: its own code on tiny random weights, inputs, outputs and gradients.

Runs in an environment of its own with torch, diffusers and numpy, never in that of the trainer, and reads a checkout of
juruobenruo/DexVLA (made with fc21a82), of which it loads the diffusion expert and the fusion modules:

    python tests/bench/golden_dexvla.py CHECKOUT tests/models/golden

Times are embedded in float32 here, where the released code rounds them to bfloat16, and the maps that bring condition
and state together are 24 wide, not 1,024. Writes dexvla_expert.npz with
  weight/...    float32, by the released names; rounded to few bits, so that they compress
  condition     (B, C); state (B, S); x (B, A, J); step (B,); noise, the model's answer (B, A, J)
  start, sampled  (1, A, J), of the first condition by the released sampling: 10 of 100 steps of DDIM
  target        (B, A, J); gradient/... of the mean squared error to it, with respect to some weights
and dexvla_film.npz with
  weight/...    of `input_action_proj`, `reasoning_action_proj` and `reasoning_film`
  hidden        (T, D), tokens of a prompt of `asked` tokens, then of an answer; fused (D,), what the expert is told
"""

import argparse
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

B, C, S, A, J, ASKED, ANSWERED = 3, 12, 5, 4, 3, 6, 4
# What is too large for a golden file, and what float32 weights cannot be multiplied with.
NARROWER = {"1024": "24", "bfloat16": "float32"}
GRADIENTS = (
    "combine.0.weight",
    "combine.4.bias",
    "cond_obs_emb.weight",
    "t_embedder.mlp.0.weight",
    "x_embedder.weight",
    "pos_embed",
    "blocks.0.attn.qkv.weight",
    "blocks.0.adaLN_modulation.1.weight",
    "blocks.1.attn.qkv.bias",
    "blocks.1.mlp.fc2.weight",
    "blocks.1.attn.proj.weight",
    "final_layer.adaLN_modulation.1.bias",
    "final_layer.linear.weight",
)


class Mlp(torch.nn.Module):
    """What timm's class of this name computes, with its names."""

    def __init__(self, in_features: int, hidden_features: int, act_layer: Any, drop: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = (
            torch.nn.Linear(in_features, hidden_features),
            torch.nn.Linear(hidden_features, in_features),
        )
        self.act = act_layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class PreTrained(torch.nn.Module):
    """In the place of transformers' class."""

    def __init__(self, config: Any) -> None:
        super().__init__()


def stub(name: str, **members: Any) -> None:
    """Puts a module of this name in the place of one that is not installed."""
    module: Any = types.ModuleType(name)
    module.__path__ = []
    module.__dict__.update(members)
    sys.modules[name] = module


def load(path: Path, name: str, **replaced: str) -> Any:
    """Returns a module of a file, some of its text replaced."""
    text = path.read_text()
    for old, new in replaced.items():
        text = text.replace(old, new)
    spec = importlib.util.spec_from_loader(name, loader=None, origin=str(path))
    assert spec is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module


def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    """Returns normal numbers that bfloat16 holds."""
    return (scale * torch.randn(*shape)).to(torch.bfloat16).float()


def fill(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Draws every weight; returns them by name."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(drawn(*weight.shape, scale=0.3))
    return dict(module.named_parameters())


def expert(checkout: Path) -> dict[str, Any]:
    """Returns what goes into dexvla_expert.npz."""
    stub("timm")
    stub("timm.models")
    stub("timm.models.vision_transformer", Mlp=Mlp, use_fused_attn=lambda: False)
    nothing = types.SimpleNamespace(register=lambda *a: None)
    stub("transformers", AutoModel=nothing, AutoConfig=nothing, AutoModelForCausalLM=nothing, PretrainedConfig=object)
    stub("transformers.modeling_utils", PreTrainedModel=PreTrained)
    stub("transformers.utils", logging=types.SimpleNamespace(get_logger=lambda *a: None))
    stub("scaledp")
    stub("scaledp.configuration_scaledp", ScaleDPPolicyConfig=object)
    folder = checkout / "policy_heads" / "models" / "transformer_diffusion"
    modeling = load(folder / "modeling_scaledp.py", "scaledp.modeling_scaledp", **NARROWER)
    config = types.SimpleNamespace(
        n_obs_steps=2,
        prediction_horizon=A,
        time_as_cond=True,
        cond_dim=C,
        state_dim=S,
        is_tinyvla=False,
        learn_sigma=False,
        input_dim=J,
        output_dim=J,
        num_heads=2,
        n_emb=16,
        mlp_ratio=4.0,
        depth=2,
        num_inference_timesteps=10,
        num_train_timesteps=100,
        num_queries=A,
        noise_samples=1,
    )
    model = modeling.ScaleDP(config)
    weights = fill(model)
    condition, state, x, target = drawn(B, C), drawn(B, S), drawn(B, A, J), drawn(B, A, J)
    step = torch.tensor([0, 37, 99])
    noise = model.model_forward(x, step, global_cond=condition[:, None], states=state)
    (noise - target).square().mean().backward()
    start = drawn(1, A, J)
    torch.randn = lambda *a, **k: types.SimpleNamespace(cuda=lambda: start)  # what the sampling begins with
    with torch.no_grad():
        sampled = model(None, condition[:1, None], state[:1], None)
    out: dict[str, Any] = {"condition": condition, "state": state, "x": x, "step": step, "noise": noise}
    out |= {"target": target, "start": start, "sampled": sampled}
    out |= {f"weight/{name}": weight for name, weight in weights.items()}
    return out | {f"gradient/{name}": weights[name].grad for name in GRADIENTS}


def film(checkout: Path) -> dict[str, Any]:
    """Returns what goes into dexvla_film.npz; put together as `film_forward` of the released model does."""
    modules = load(checkout / "qwen2_vla" / "utils" / "fusion_modules.py", "fusion_modules")
    parts = torch.nn.ModuleDict(
        {
            "input_action_proj": modules.ActionProjector(C, C),
            "reasoning_action_proj": modules.ActionProjector(C, C),
            "reasoning_film": modules.FiLM(feature_dim=C, condition_dim=C),
        }
    )
    weights, hidden = fill(parts), drawn(ASKED + ANSWERED, C)
    asked, answered = hidden[:ASKED], hidden[ASKED:]
    told = parts["reasoning_film"](parts["input_action_proj"](asked), parts["reasoning_action_proj"](answered))
    fused = told[0] + asked.mean(0)
    out: dict[str, Any] = {"hidden": hidden, "asked": torch.tensor(ASKED), "fused": fused}
    return out | {f"weight/{name}": weight for name, weight in weights.items()}


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    for name, make in (("dexvla_film", film), ("dexvla_expert", expert)):
        arrays: Any = {k: v.detach().numpy() for k, v in make(args.checkout).items()}
        np.savez_compressed(args.out / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
