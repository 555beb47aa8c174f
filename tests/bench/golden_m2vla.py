"""Golden vectors of M2-VLA's and VLA-Adapter's heads: their own code on tiny random weights, outputs and gradients.

Runs in an environment of its own with torch and numpy, never in that of the trainer, and reads checkouts of both (made
with ShowiBin/M2-VLA at 4528e5a and OpenHelix-Team/VLA-Adapter at 838a36d), of which it loads one file each,
prismatic/models/action_heads.py:

    python tests/bench/golden_m2vla.py M2VLA_CHECKOUT VLA_ADAPTER_CHECKOUT tests/models/golden

Writes m2vla_head.npz and vla_adapter_head.npz, each with
  weight/...    float32, by the names of the released state dicts; rounded to few bits, so that they compress
  hidden        (B, L + 1, P + Q, D), behind each layer, images first; state_token (B, 1, D)
  actions       (B, A, J), what the gradient is of: the mean absolute error
  said          (B, A, J); gradient/... of some weights
and for M2-VLA, of a memory that was filled in three writes, beyond its size
  written       (3, B, P, D L-wise as `hidden`), hidden states of images; written_actions (3, B, A, J)
  keys          (B, K), of `hidden`; found (B, R, E), what it finds; empty (B, A, J), what is said before any write
"""

import argparse
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

B, L, P, Q, D, A, J = 3, 3, 5, 4, 32, 4, 3
SIZE, RECALLED, KEY_LAYERS = 7, 2, (0, 2, 3)
GRADIENTS = (
    "model.fc1.weight",
    "model.fc2.bias",
    "model.mlp_resnet_blocks.0.q_proj.weight",
    "model.mlp_resnet_blocks.0.gating_factor",
    "model.mlp_resnet_blocks.0.k_adapter.weight",
    "model.mlp_resnet_blocks.1.k_task.weight",
    "model.mlp_resnet_blocks.1.v_self.weight",
    "model.mlp_resnet_blocks.2.k_adapter.bias",
    "model.mlp_resnet_blocks.2.ffn.0.weight",
    "memory_value_proj.weight",
)


def load(checkout: Path, name: str) -> Any:
    """Returns the module of the heads, for chunks of A steps."""
    constants: Any = types.ModuleType("prismatic.vla.constants")
    constants.ACTION_DIM, constants.NUM_ACTIONS_CHUNK = J, A
    for unused in ("ACTION_TOKEN_BEGIN_IDX", "IGNORE_INDEX", "PROPRIO_DIM", "STOP_INDEX", "NUM_TOKENS"):
        setattr(constants, unused, 0)
    sys.modules.update({"prismatic": types.ModuleType("prismatic"), "prismatic.vla": types.ModuleType("prismatic.vla")})
    sys.modules["prismatic.vla.constants"] = constants
    path = checkout / "prismatic" / "models" / "action_heads.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    """Returns normal numbers that bfloat16 holds."""
    return (scale * torch.randn(*shape)).to(torch.bfloat16).float()


def golden(module: Any, **options: Any) -> dict[str, Any]:
    """Returns what goes into the file of one head."""
    head = module.L1RegressionActionHead(
        input_dim=D, hidden_dim=D, action_dim=J, num_task_tokens=P, use_pro_version=True, **options
    )
    head.model = module.MLPResNet(L, D * J, D, J, use_pro_version=True)  # 24 blocks by default
    with torch.no_grad():
        for weight in head.parameters():
            weight.copy_(drawn(*weight.shape, scale=0.4))
    hidden, token, actions = drawn(B, L + 1, P + Q, D), drawn(B, 1, D), drawn(B, A, J)
    out = {"hidden": hidden, "state_token": token, "actions": actions}

    def say(**memory: torch.Tensor) -> torch.Tensor:
        return head.model(torch.zeros(B, A, J * D), h_a=hidden[:, :, P:], p=token, h_t=hidden[:, :, :P], **memory)

    memory: dict[str, torch.Tensor] = {}
    if hasattr(head, "memory_bank"):
        head.key_layer_indices = list(KEY_LAYERS)
        find = lambda: head.memory_bank.query(head.build_key(hidden[:, :, :P]), top_k=RECALLED)[0].float()  # noqa: E731
        out["empty"] = say(h_memory=head.memory_value_proj(find()))
        out["written"], out["written_actions"] = drawn(3, B, L + 1, P, D), drawn(3, B, A, J)
        for seen, chunk in zip(out["written"], out["written_actions"], strict=True):
            head.memory_bank.add(head.build_key(seen), chunk.reshape(B, -1))
        out["keys"], out["found"] = head.build_key(hidden[:, :, :P]), find()
        memory = {"h_memory": head.memory_value_proj(out["found"])}
    out["said"] = say(**memory)
    (out["said"] - actions).abs().mean().backward()
    weights = dict(head.named_parameters())
    out |= {f"weight/{name}": x for name, x in weights.items()}
    out |= {f"gradient/{name}": weights[name].grad for name in GRADIENTS if name in weights}
    return {name: x.detach().numpy().astype(np.float32) for name, x in out.items()}


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("m2vla", type=Path)
    parser.add_argument("vla_adapter", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    of = {"memory_bank_max_size": SIZE, "memory_bank_top_k": RECALLED}
    np.savez_compressed(args.out / "m2vla_head.npz", **golden(load(args.m2vla, "m2vla_heads"), **of))
    np.savez_compressed(args.out / "vla_adapter_head.npz", **golden(load(args.vla_adapter, "vla_adapter_heads")))


if __name__ == "__main__":
    main()
