"""Golden vectors of language models: tiny random models of transformers, their inputs, outputs and gradients.

Runs in an environment of its own with torch, transformers, safetensors and numpy, never in that of the trainer:

    python tests/bench/golden_language.py tests/models/golden

Writes language_<case>.npz for every case, each with
  config_json   sizes, by the names of transformers' config
  weight/...    float32, by the names of a safetensors file
  tokens        (B, S), padded on the right; mask: (B, S); positions: (B, S) or (3, B, S)
  deepstack     (n, B, S, D), for Qwen3-VL
  states        (L + 1, B, S, D): the inputs of every layer, and the output of the final norm
  logits        (B, S, V)
  loss          the mean cross-entropy of the next token, over targets that are there
  gradient/...  of that loss with respect to every weight
and language_shapes.json, the shapes of all weights of published models: {model: {name: shape}}.
"""

import argparse
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

VOCABULARY, BATCH, TOKENS = 64, 2, 12
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",  # the only one with soft caps
}
MROPE = {"rope_type": "default", "rope_theta": 1e6}


def causal(model: str, **sizes: Any) -> torch.nn.Module:
    """Returns a model for text, of transformers' class <model>ForCausalLM."""
    config = getattr(transformers, f"{model}Config")(**SIZES | sizes)
    return getattr(transformers, f"{model}ForCausalLM")(config)


class TextPart(torch.nn.Module):
    """The text part of a model for images, with a head beside it."""

    def __init__(self, model: str, tied: bool, **sizes: Any) -> None:
        super().__init__()
        config = getattr(transformers, f"{model}TextConfig")(**SIZES | sizes)
        module = getattr(transformers, f"{model}TextModel")
        self.model, self.config = module(config), config
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        config.tie_word_embeddings = tied


def cases() -> dict[str, Any]:
    """Returns functions that build the model of each case."""
    return {
        "llama": lambda: causal("Llama", num_hidden_layers=2, rms_norm_eps=1e-5, num_key_value_heads=4),
        "smollm2": lambda: causal(
            "Llama", num_hidden_layers=2, rms_norm_eps=1e-5, tie_word_embeddings=True, rope_theta=1e5
        ),
        "qwen2": lambda: causal("Qwen2", num_hidden_layers=2, tie_word_embeddings=True, rope_theta=1e6),
        "qwen3": lambda: causal("Qwen3", num_hidden_layers=2, tie_word_embeddings=True, head_dim=12, rope_theta=1e6),
        "gemma2": lambda: causal(
            "Gemma2",
            num_hidden_layers=3,
            head_dim=12,
            query_pre_attn_scalar=20,
            sliding_window=5,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=1.5,
        ),
        "qwen2_5_vl": lambda: TextPart(
            "Qwen2_5_VL",
            True,
            num_hidden_layers=2,
            head_dim=8,
            rope_parameters={**MROPE, "mrope_section": [1, 2, 1]},
        ),
        "qwen3_vl": lambda: TextPart(
            "Qwen3VL",
            False,
            num_hidden_layers=3,
            intermediate_size=24,
            head_dim=12,
            rope_parameters={**MROPE, "mrope_section": [3, 2, 1], "mrope_interleaved": True},
        ),
    }


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Gives every weight a draw that matters: norms and biases too."""
    for name, weight in model.named_parameters():
        draw = torch.randn(weight.shape, generator=generator)
        norm = weight.ndim == 1 and name.endswith("norm.weight")
        centre = 1.0 if norm and "Gemma" not in type(model).__name__ else 0.0
        spread = 0.3 if weight.ndim == 1 else 1.5 / weight.shape[1] ** 0.5
        weight.data.copy_(centre + spread * draw)


def inputs_of(case: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Returns tokens, which of them are there, positions, and what is added for images."""
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    mask[1, TOKENS - 3 :] = False
    # Without token 0: torch gives the embedding of a padding token no gradient.
    given = {"tokens": torch.randint(1, VOCABULARY, (BATCH, TOKENS), generator=generator), "mask": mask}
    given["positions"] = torch.clamp(mask.long().cumsum(-1) - 1, min=0)
    if "_vl" in case:  # a text, an image of 2 x 3 patches, and a text again
        start, width, patches = 3, 3, 6
        time = torch.cat([torch.arange(start), torch.full((patches,), start), start + width + torch.arange(3)])
        height, column = time.clone(), time.clone()
        height[start : start + patches] += torch.arange(patches) // width
        column[start : start + patches] += torch.arange(patches) % width
        given["positions"] = torch.stack([time, height, column])[:, None].expand(3, BATCH, TOKENS).contiguous()
        if case == "qwen3_vl":
            added = torch.zeros(2, BATCH, TOKENS, SIZES["hidden_size"])
            added[:, :, start : start + patches] = torch.randn(2, BATCH, patches, added.shape[-1], generator=generator)
            given["deepstack"] = added
    return given


def run(model: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns states, logits, loss and gradients."""
    language, states = model.model, []
    for layer in language.layers:
        layer.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    extra = {}
    if "deepstack" in given:
        shown = torch.zeros_like(given["mask"])
        shown[:, 3:9] = True
        extra = {"visual_pos_masks": shown, "deepstack_visual_embeds": [x[shown] for x in given["deepstack"]]}
    last = language(
        input_ids=given["tokens"],
        attention_mask=given["mask"].long(),
        position_ids=given["positions"],
        use_cache=False,
        **extra,
    ).last_hidden_state
    states.append(last)
    logits = model.lm_head(last)
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    targets, there = given["tokens"][:, 1:], given["mask"][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1][there], targets[there])
    loss.backward()
    gradients = {f"gradient/{name}": weight.grad for name, weight in model.named_parameters()}
    return {"states": torch.stack(states), "logits": logits, "loss": loss, **gradients}


def write_case(case: str, directory: Path) -> None:
    """Writes the file of one case, and prints its size."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(zlib.crc32(case.encode()))
    model = cases()[case]().float().eval()
    randomise(model, generator)
    given = inputs_of(case, generator)
    arrays = {f"weight/{name}": weight for name, weight in model.named_parameters()} | given | run(model, given)
    if not isinstance(model, TextPart):  # what a user gets, against what was put together here
        with torch.no_grad():
            whole = model(given["tokens"], attention_mask=given["mask"].long(), position_ids=given["positions"])
        torch.testing.assert_close(whole.logits, arrays["logits"])
    config = json.dumps(model.config.to_dict(), default=str)
    path = directory / f"language_{case}.npz"
    np.savez_compressed(path, config_json=config, **{k: v.detach().numpy() for k, v in arrays.items()})
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


# ---- Shapes of published models --------------------------------------------------------------------------------------

_QWEN = {"vocab_size": 151_936}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_2_7b": ("Llama", {}),  # transformers' own defaults
    "qwen2_vl_2b": ("Qwen2", {**_QWEN, "sizes": (1536, 28, 8960, 12, 2), "tie_word_embeddings": True}),
    "qwen2_5_0_5b": ("Qwen2", {**_QWEN, "sizes": (896, 24, 4864, 14, 2), "tie_word_embeddings": True}),
    "qwen2_5_3b": ("Qwen2", {**_QWEN, "sizes": (2048, 36, 11_008, 16, 2), "tie_word_embeddings": True}),
    "qwen2_5_7b": ("Qwen2", {"vocab_size": 152_064, "sizes": (3584, 28, 18_944, 28, 4)}),
    "qwen3_1_7b": ("Qwen3", {**_QWEN, "sizes": (2048, 28, 6144, 16, 8), "head_dim": 128, "tie_word_embeddings": True}),
    "qwen3_4b": ("Qwen3", {**_QWEN, "sizes": (2560, 36, 9728, 32, 8), "head_dim": 128, "tie_word_embeddings": True}),
    "smollm2_135m": ("Llama", {"vocab_size": 49_152, "sizes": (576, 30, 1536, 9, 3), "tie_word_embeddings": True}),
    "smollm2_360m": ("Llama", {"vocab_size": 49_152, "sizes": (960, 32, 2560, 15, 5), "tie_word_embeddings": True}),
    "smollm2_1_7b": ("Llama", {"vocab_size": 49_152, "sizes": (2048, 24, 8192, 32, 32), "tie_word_embeddings": True}),
    "gemma2_2b": ("Gemma2", {}),
    "gemma2_9b": ("Gemma2", {"sizes": (3584, 42, 14_336, 16, 8)}),
}
_NAMES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def published_shapes() -> dict[str, dict[str, list[int]]]:
    """Returns the shapes of weights of models that hold none; of the layers, which are alike, those of the last."""
    found = {}
    for name, (model, given) in PUBLISHED.items():
        sizes = dict(zip(_NAMES, given.get("sizes", ()), strict=False))
        config = getattr(transformers, f"{model}Config")(**sizes, **{k: v for k, v in given.items() if k != "sizes"})
        with torch.device("meta"):
            module = getattr(transformers, f"{model}ForCausalLM")(config)
        last = f".layers.{config.num_hidden_layers - 1}."
        shapes = {k: list(v.shape) for k, v in module.named_parameters()}
        found[name] = {k: v for k, v in shapes.items() if ".layers." not in k or last in k}
        print(f"{name}: {sum(int(np.prod(v)) for v in shapes.values()):,} weights")
    return found


def main() -> None:
    """Writes all files, or those of some cases."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("cases", nargs="*", default=list(cases()))
    arguments = parser.parse_args()
    for case in arguments.cases:
        write_case(case, arguments.directory)
    shapes = json.dumps(published_shapes(), indent=0).replace("[\n", "[").replace("\n]", "]").replace(",\n", ", ")
    (arguments.directory / "language_shapes.json").write_text(
        shapes.replace("], ", "],\n").replace("}, ", "},\n") + "\n"
    )


if __name__ == "__main__":
    main()
