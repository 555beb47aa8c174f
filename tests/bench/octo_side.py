"""The part of bench_peers.py that runs where octo is installed: a small Octo, trained and served by its own modules.

octo (241fb35) wants Python 3.10, jax 0.4.20, tensorflow 2.15 and dlimp from its repository; pip takes for ever to find
that out, uv seconds. None of its code is changed. What is not as in octo-small:

- a transformer of 4 layers and a width of 192 (1.8 M; octo-small 12 layers and 384), images of 64 pixels in 16 tokens;
- language: a T5 of two layers that is trained with all else, and a tokenizer of the instructions' words, in the place
  of a frozen t5-base, whose weights are not at hand; octo takes a folder where it takes a name of the hub;
- the state as four tokens, as octo's example of fine-tuning has it; one frame instead of two; chunks of 8, not of 4;
- no goal images, a cosine schedule as in its fine-tuning, batches of 32.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, WIDTH, HEADS = 4, 192, 3
HORIZON, BATCH, NAME = 8, 32, "sawyer_sim"
CHANGES = {
    "random_resized_crop": {"scale": [0.8, 1.0], "ratio": [0.9, 1.1]},
    "random_brightness": [0.1],
    "random_contrast": [0.9, 1.1],
    "random_saturation": [0.9, 1.1],
    "random_hue": [0.05],
    "augment_order": [f"random_{of}" for of in ("resized_crop", "brightness", "contrast", "saturation", "hue")],
}
"""Of images: those of octo's pretraining, for a camera that stands."""


def language(folder: Path, texts: list[str]) -> None:
    """Writes a T5 encoder's sizes, and a tokenizer of the words of some texts. folder: with `t5` in its name."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config

    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text.lower())})
    known = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    inner.normalizer, inner.pre_tokenizer = normalizers.Lowercase(), split
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, **names, model_input_names=["input_ids", "attention_mask"]
    )
    tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": len(known), "d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 2}
    T5Config(**sizes, dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0).save_pretrained(
        folder
    )


def config_of(folder: Path, tokens: int, action_dim: int) -> dict[str, Any]:
    """Returns a model's config, in octo's form. tokens: of an instruction."""
    from octo.data.utils.text_processing import HFTokenizer
    from octo.model.components.action_heads import DiffusionActionHead
    from octo.model.components.tokenizers import ImageTokenizer, LanguageTokenizer, LowdimObsTokenizer
    from octo.model.components.vit_encoders import SmallStem16
    from octo.utils.spec import ModuleSpec

    make = ModuleSpec.create
    asked = {"max_length": tokens, "padding": "max_length", "truncation": True, "return_tensors": "np"}
    none = {"dropout_rate": 0.0, "attention_dropout_rate": 0.0, "add_position_embedding": False}
    return {
        "model": {
            "observation_tokenizers": {
                "primary": make(
                    ImageTokenizer, obs_stack_keys=["image_primary"], task_stack_keys=[], encoder=make(SmallStem16)
                ),
                "proprio": make(
                    LowdimObsTokenizer, n_bins=256, bin_type="normal", low=-2.0, high=2.0, obs_keys=["proprio"],
                    discretize=True,
                ),
            },
            "task_tokenizers": {"language": make(LanguageTokenizer, encoder=str(folder), finetune_encoder=True)},
            "heads": {
                "action": make(
                    DiffusionActionHead, readout_key="readout_action", use_map=False, action_horizon=HORIZON,
                    action_dim=action_dim, n_diffusion_samples=1, dropout_rate=0.0,
                )
            },
            "readouts": {"action": 1},
            "repeat_task_tokens": True,
            "use_correct_attention": True,
            "token_embedding_size": WIDTH,
            "max_horizon": 1,
            "transformer_kwargs": {
                "num_layers": LAYERS, "mlp_dim": 4 * WIDTH, "num_attention_heads": HEADS, **none
            },
        },
        "text_processor": make(
            HFTokenizer, tokenizer_name=str(folder), encode_with_model=False, tokenizer_kwargs=asked
        ),
    }  # fmt: skip


def train(data: str, texts: str, out: str, steps: str, rate: str) -> None:
    """Trains on an RLDS dataset of ours, with octo's reader, augmentations, loss and optimiser."""
    import jax
    import tensorflow as tf
    from octo.data.dataset import make_interleaved_dataset
    from octo.model.octo_model import OctoModel
    from octo.utils.spec import ModuleSpec
    from octo.utils.train_utils import TrainState, create_optimizer, process_text

    folder, n, told = Path(out).resolve(), int(steps), json.loads(Path(texts).read_text())
    seen = folder / "data" / NAME / "1.0.0"  # octo writes its statistics beside the records
    seen.mkdir(parents=True)
    for file in Path(data).resolve().iterdir():
        (seen / file.name).symlink_to(file)
    language(folder / "text_t5", told)
    features = json.loads((seen / "features.json").read_text())["featuresDict"]["features"]["steps"]
    shape = features["sequence"]["feature"]["featuresDict"]["features"]["action"]["tensor"]["shape"]["dimensions"]
    action_dim = int(shape[0])
    threads = len(os.sched_getaffinity(0))

    def batches(shuffled: int) -> Any:
        made = make_interleaved_dataset(
            [
                {
                    "name": NAME, "data_dir": str(folder / "data"), "image_obs_keys": {"primary": "image"},
                    "proprio_obs_key": "state", "language_key": "language_instruction",
                    "action_normalization_mask": [True] * (action_dim - 1) + [False],  # the gripper, as octo has it
                }
            ],
            train=True, shuffle_buffer_size=shuffled, batch_size=BATCH, traj_transform_threads=1, traj_read_threads=1,
            traj_transform_kwargs={"window_size": 1, "action_horizon": HORIZON, "max_action_dim": action_dim},
            frame_transform_kwargs={
                "resize_size": {}, "num_parallel_calls": threads, "image_augment_kwargs": {"primary": CHANGES}
            },
        )  # fmt: skip
        options = tf.data.Options()
        options.threading.private_threadpool_size = threads
        return made.dataset_statistics, made.with_options(options).iterator(prefetch=0)

    config = config_of(folder / "text_t5", max(8, *(len(text.split()) + 2 for text in told)), action_dim)
    processor = ModuleSpec.instantiate(config["text_processor"])()
    statistics, _ = batches(1)
    _, stream = batches(int(statistics[NAME]["num_transitions"]))

    def ready() -> Any:
        batch = process_text(next(stream), processor)
        del batch["dataset_name"]
        return batch

    rng, init_rng = jax.random.split(jax.random.PRNGKey(0))
    model = OctoModel.from_config(config, ready(), processor, rng=init_rng, dataset_statistics=statistics)
    schedule = {"init_value": 0.0, "peak_value": float(rate), "warmup_steps": max(n // 25, 1), "decay_steps": n}
    optimizer, _, _ = create_optimizer(
        model.params, learning_rate={"name": "cosine", **schedule}, weight_decay=0.01, clip_gradient=1.0,
        frozen_keys=None,
    )  # fmt: skip
    state = TrainState.create(rng, model, optimizer)

    def loss_of(params: Any, batch: Any, key: Any) -> Any:
        bound = model.module.bind({"params": params}, rngs={"dropout": key})
        mask = batch["observation"]["timestep_pad_mask"]
        read = bound.octo_transformer(batch["observation"], batch["task"], mask, train=True)
        return bound.heads["action"].loss(read, batch["action"], mask, batch["action_pad_mask"], train=True)[0]

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, batch: Any) -> Any:
        key, dropout = jax.random.split(state.rng)
        loss, slope = jax.value_and_grad(loss_of)(state.model.params, batch, dropout)
        return state.apply_gradients(grads=slope, rng=key), loss

    for i in range(n):
        state, loss = step(state, ready())
        if i % 50 == 0 or i == n - 1:
            print(i, float(loss), flush=True)
    state.model.save_pretrained(n, str(folder))
    weights = sum(int(leaf.size) for leaf in jax.tree_util.tree_leaves(state.model.params))
    (folder / "about.json").write_text(json.dumps({"weights": weights, "batch_size": BATCH}))


def serve(run: str, handshake: str, port: str) -> None:
    """Serves what was trained."""
    import jax
    from octo.model.octo_model import OctoModel

    from tests.bench.peers_side import serve as answer

    model = OctoModel.load_pretrained(str(Path(run).resolve()))
    of, keys, tasks = model.dataset_statistics[NAME], [jax.random.PRNGKey(0)], dict[str, Any]()
    there = np.ones((1, 1), bool)

    def infer(message: dict[str, Any]) -> np.ndarray:
        (picture,) = message["images"].values()
        state = (np.asarray(message["state"]) - of["proprio"]["mean"]) / (of["proprio"]["std"] + 1e-8)
        seen = {
            "image_primary": np.asarray(picture)[None, None],
            "proprio": state.astype(np.float32)[None, None],
            "timestep_pad_mask": there,
            "pad_mask_dict": {"image_primary": there, "proprio": there},
        }
        text = message["prompt"]
        if text not in tasks:
            tasks[text] = model.create_tasks(texts=[text])
        keys[0], key = jax.random.split(keys[0])
        return np.asarray(model.sample_actions(seen, tasks[text], unnormalization_statistics=of["action"], rng=key)[0])

    answer(infer, handshake, port)


if __name__ == "__main__":
    os.environ.update({"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"})
    programs: dict[str, Callable[..., None]] = {"train": train, "serve": serve}
    programs[sys.argv[1]](*sys.argv[2:])
