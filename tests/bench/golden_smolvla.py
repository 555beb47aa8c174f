"""Golden vectors of SmolVLA: LeRobot's own code on tiny random weights, its inputs, outputs and gradients.

Runs in an environment of its own with torch, transformers, huggingface_hub and numpy, never in that of the trainer, and
reads a checkout of LeRobot (made with commit 7427f31), of which it loads the files of SmolVLA alone:

    python tests/bench/golden_smolvla.py LEROBOT_CHECKOUT tests/models/golden

Writes smolvla_<case>.npz for every case, each with
  config_json   sizes, by the names of transformers' config of the VLM, and those of LeRobot's config
  weight/...    float32, by the names of LeRobot's safetensors; rounded to few bits, so that they compress
  images        (B, C, H, W, 3), float32 in [-1, 1]; image_mask (B, C)
  tokens        (B, S), padded on the right; token_mask (B, S); state (B, Ds); actions, noise (B, A, J); time (B,)
  prefix        (B, P, D), the tokens of images, text and state before the VLM; prefix_mask (B, P)
  velocity      (B, A, J) at x_t; losses (B, A, J); sampled (B, A, J), 10 steps from the noise
  gradient/...  of the mean of the losses with respect to some weights
and smolvla_shapes.json, the shapes of all weights of lerobot/smolvla_base.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

B, SIDE, TOKENS, STATE, ACTION, HORIZON = 3, 32, 7, 6, 6, 5
CASES: dict[str, dict[str, Any]] = {
    "two": {"layers": 6, "num_vlm_layers": 4, "self_attn_every_n_layers": 2},
    "three": {"layers": 3, "num_vlm_layers": 3, "self_attn_every_n_layers": 3, "hidden_size": 16},
}
BASE = {"num_vlm_layers": 16, "self_attn_every_n_layers": 2, "state": 32, "action": 32, "horizon": 50}
GRADIENTS = (
    "state_proj.weight",
    "action_in_proj.weight",
    "action_time_mlp_out.bias",
    "action_out_proj.weight",
    "vlm_with_expert.lm_expert.layers.0.self_attn.k_proj.weight",
    "vlm_with_expert.lm_expert.layers.1.self_attn.k_proj.weight",
    "vlm_with_expert.lm_expert.layers.1.self_attn.v_proj.weight",
    "vlm_with_expert.lm_expert.layers.2.self_attn.q_proj.weight",
    "vlm_with_expert.lm_expert.layers.2.input_layernorm.weight",
    "vlm_with_expert.lm_expert.norm.weight",
    "vlm_with_expert.vlm.model.text_model.layers.0.self_attn.q_proj.weight",
    "vlm_with_expert.vlm.model.text_model.layers.2.self_attn.v_proj.weight",
    "vlm_with_expert.vlm.model.text_model.embed_tokens.weight",
    "vlm_with_expert.vlm.model.connector.modality_projection.proj.weight",
    "vlm_with_expert.vlm.model.vision_model.embeddings.patch_embedding.weight",
)


def load_lerobot(checkout: Path) -> Any:
    """Returns LeRobot's module of SmolVLA. What it imports and does not use here is a stub."""
    source = checkout / "src" / "lerobot"

    def stub(name: str, **members: Any) -> None:
        module = types.ModuleType(name)
        module.__path__ = []
        module.__dict__.update(members)
        sys.modules[name] = module

    def load(path: str) -> Any:
        name = f"lerobot.{path.replace('/', '.')}"
        spec = importlib.util.spec_from_file_location(name, source / f"{path}.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    for package in ("", ".utils", ".policies", ".policies.smolvla", ".policies.common", ".policies.rtc"):
        stub(f"lerobot{package}")
    stub("lerobot.utils.import_utils", require_package=lambda *a, **k: None, _transformers_available=True)
    stub("lerobot.policies.pretrained", PreTrainedPolicy=torch.nn.Module)
    stub("lerobot.policies.rtc.modeling_rtc", RTCProcessor=object)
    stub("lerobot.policies.utils", populate_queues=None)
    stub("lerobot.policies.smolvla.configuration_smolvla", SmolVLAConfig=object)
    for path in ("utils/constants", "utils/device_utils", "policies/common/flow_matching", "policies/common/vla_utils"):
        load(path)
    experts = load("policies/smolvla/smolvlm_with_expert")
    tokenizer = types.SimpleNamespace(fake_image_token_id=0, global_image_token_id=0)
    processor = types.SimpleNamespace(tokenizer=tokenizer)
    experts.AutoProcessor = types.SimpleNamespace(from_pretrained=lambda *a, **k: processor)
    return load("policies/smolvla/modeling_smolvla")


def vlm_config(text: dict[str, Any], vision: dict[str, Any], scale: int) -> Any:
    """Returns transformers' config of a SmolVLM."""
    return transformers.SmolVLMConfig(
        text_config={"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 1e5, **text},
        vision_config=vision,
        scale_factor=scale,
        image_token_id=1,
        tie_word_embeddings=False,
        pad_token_id=0,
    )


def tiny_vlm(layers: int, hidden_size: int) -> Any:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    text = {"hidden_size": hidden_size, "num_hidden_layers": layers, "intermediate_size": 40, "vocab_size": 64, **heads}
    side = {"image_size": SIDE, "patch_size": 8}
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "num_attention_heads": 2, **side}
    return vlm_config(text, vision, 2)


def base_vlm() -> Any:
    """Sizes of SmolVLM2-500M."""
    heads = {"num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 64}
    text = {"hidden_size": 960, "num_hidden_layers": 32, "intermediate_size": 2560, "vocab_size": 49_280, **heads}
    side = {"image_size": 512, "patch_size": 16}
    vision = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072, "num_attention_heads": 12, **side}
    return vlm_config(text, vision, 4)


def build(modeling: Any, vlm: Any, options: dict[str, Any]) -> Any:
    """Returns LeRobot's model; the config of the VLM goes through a file, as LeRobot reads it."""
    with tempfile.TemporaryDirectory() as directory:
        vlm.save_pretrained(directory)
        config = types.SimpleNamespace(
            vlm_model_name=directory,
            freeze_vision_encoder=False,
            train_expert_only=True,
            train_state_proj=True,
            load_vlm_weights=False,
            attention_mode="cross_attn",
            num_expert_layers=-1,
            num_vlm_layers=options["num_vlm_layers"],
            self_attn_every_n_layers=options["self_attn_every_n_layers"],
            expert_width_multiplier=0.75,
            device="cpu",
            max_state_dim=options.get("state", STATE),
            max_action_dim=options.get("action", ACTION),
            chunk_size=options.get("horizon", HORIZON),
            add_image_special_tokens=False,
            prefix_length=-1,
            compile_model=False,
            min_period=4e-3,
            max_period=4.0,
            num_steps=10,
            use_cache=True,
            rtc_config=None,
        )
        return modeling.VLAFlowMatching(config)


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Gives every weight a draw that matters, norms and biases too; in steps of 1/32."""
    for name, weight in model.named_parameters():
        draw = torch.randn(weight.shape, generator=generator)
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        inputs = int(np.prod(weight.shape[1:]))
        # Embeddings are multiplied by sqrt(width) in the policy.
        spread = 0.25 if weight.ndim == 1 or "embed_tokens" in name else 1.5 / inputs**0.5
        weight.data.copy_(torch.round((centre + spread * draw) * 32) / 32)


def inputs_of(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Returns images of two cameras, the second masked in one sample, text of several lengths, and the rest."""
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    pixels = torch.randint(0, 256, (B, 2, SIDE, SIDE, 3), generator=generator)
    mask = torch.arange(TOKENS) < torch.tensor([[7], [4], [2]])
    return {
        "images": pixels.float() / 127.5 - 1,
        "image_mask": torch.tensor([[True, True], [True, False], [True, True]]),
        "tokens": torch.where(mask, torch.randint(2, 64, (B, TOKENS), generator=generator), 0),
        "token_mask": mask,
        "state": normal(B, STATE),
        "actions": normal(B, HORIZON, ACTION),
        "noise": normal(B, HORIZON, ACTION),
        "time": torch.tensor([0.25, 0.7, 0.95]),
    }


def run(model: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns prefix, velocity, losses, samples and gradients."""
    images = [given["images"][:, i].permute(0, 3, 1, 2) for i in range(2)]
    seen = (images, [given["image_mask"][:, i] for i in range(2)], given["tokens"], given["token_mask"], given["state"])
    prefix, prefix_mask, _ = model.embed_prefix(*seen[:4], state=given["state"])
    found = {"prefix": prefix, "prefix_mask": prefix_mask}
    for weight in model.parameters():
        weight.requires_grad_(True)

    def keep(module: torch.nn.Module, args: Any, out: torch.Tensor) -> None:
        found["velocity"] = out

    hook = model.action_out_proj.register_forward_hook(keep)
    found["losses"] = model(*seen, given["actions"], given["noise"], given["time"])
    hook.remove()
    weights = {name: w for name, w in model.named_parameters() if name in GRADIENTS}
    gradients = torch.autograd.grad(found["losses"].mean(), list(weights.values()))
    found |= {f"gradient/model.{name}": value for name, value in zip(weights, gradients, strict=True)}
    with torch.no_grad():
        found["sampled"] = model.sample_actions(*seen, noise=given["noise"])
    return found


def write_case(modeling: Any, case: str, directory: Path) -> None:
    """Writes the file of one case, and prints its size."""
    options = CASES[case]
    generator = torch.Generator().manual_seed(zlib.crc32(case.encode()))
    vlm = tiny_vlm(options["layers"], options.get("hidden_size", 32))
    model = build(modeling, vlm, options).float().eval()
    randomise(model, generator)
    given = inputs_of(generator)
    arrays = {f"weight/model.{name}": w.detach().clone() for name, w in model.named_parameters()}
    arrays |= given | run(model, given)
    config = json.dumps({"vlm": vlm.to_dict(), **options}, default=str)
    path = directory / f"smolvla_{case}.npz"
    np.savez_compressed(path, config_json=config, **{k: v.detach().numpy() for k, v in arrays.items()})
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def write_shapes(modeling: Any, directory: Path) -> None:
    """Writes the shapes of lerobot/smolvla_base, a line for each name; no weight is allocated."""
    with torch.device("meta"):
        model = build(modeling, base_vlm(), BASE)
    shapes = {f"model.{name}": list(w.shape) for name, w in model.state_dict().items()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(shape)}" for name, shape in shapes.items())
    (directory / "smolvla_shapes.json").write_text(f"{{\n{lines}\n}}\n")
    print(f"smolvla_base: {len(shapes)} arrays, {sum(int(np.prod(s)) for s in shapes.values()):,} weights")


def main() -> None:
    """Writes all files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkout", type=Path)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    modeling = load_lerobot(arguments.checkout)
    for case in CASES:
        write_case(modeling, case, arguments.directory)
    write_shapes(modeling, arguments.directory)


if __name__ == "__main__":
    main()
