"""The parts of bench_peers.py that run where a peer is installed; each needs no other."""

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def serve(infer: Callable[[dict[str, Any]], np.ndarray], handshake: str, port: str) -> None:
    """Answers in openpi's protocol, one request at a time."""
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.server import ServerConnection
    from websockets.sync.server import serve as listen

    from openpi_like.serve.protocol import pack, unpack

    metadata, turn = json.loads(Path(handshake).read_text()), threading.Lock()

    def answer(connection: ServerConnection) -> None:
        connection.send(pack(metadata))
        try:
            while True:
                message = unpack(connection.recv(decode=False))
                with turn:
                    actions = infer(message)
                connection.send(pack({"actions": np.ascontiguousarray(actions, np.float32)}))
        except ConnectionClosed:
            pass

    with listen(answer, "127.0.0.1", int(port), compression=None, max_size=None) as server:
        server.serve_forever()


# ---- LeRobot ---------------------------------------------------------------------------------------------------------


def smolvla_sizes(texts: str, out: str) -> None:
    """Writes what SmolVLA is made from, at a small size: a config, and a tokenizer of some texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        PreTrainedTokenizerFast,
        SmolVLMConfig,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    special = [
        "<|im_start|>",
        "<|endoftext|>",
        "<image>",
        "<fake_token_around_image>",
        "<global-img>",
        "<end_of_utterance>",
    ]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=letters)
    inner.train_from_iterator([f"{text}\n" for text in json.loads(Path(texts).read_text())], trainer)
    names = ("image_token", "fake_image_token", "global_image_token", "end_of_utterance_token")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=special[0], eos_token=special[5], pad_token=special[1], unk_token=special[1],
        extra_special_tokens=dict(zip(names, special[2:], strict=True)),
    )  # fmt: skip
    side = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 64}}
    pictures, films = SmolVLMImageProcessor(**side), SmolVLMVideoProcessor(**side)
    processor = SmolVLMProcessor(pictures, tokenizer, films, image_seq_len=16, chat_template="{{messages}}")
    processor.save_pretrained(out)
    width, layers = 96, 3
    sizes = {"hidden_size": width, "intermediate_size": 256, "num_hidden_layers": layers, "num_attention_heads": 4}
    words = {"vocab_size": len(tokenizer), "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 5}
    SmolVLMConfig(
        text_config={"model_type": "llama", **sizes, "num_key_value_heads": 2, "head_dim": 24, **words},
        vision_config={**sizes, "image_size": 64, "patch_size": 8},
        scale_factor=2, image_token_id=2, pad_token_id=1,
    ).save_pretrained(out)  # fmt: skip


def lerobot_serve(checkpoint: str, handshake: str, port: str) -> None:
    """Serves a policy of LeRobot: for every request a new chunk, of as many actions as the policy executes at most."""
    import torch
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(checkpoint)
    policy = get_policy_class(config.type).from_pretrained(checkpoint)
    policy.eval()
    before, after = make_pre_post_processors(policy.config, pretrained_path=checkpoint)
    (camera,) = policy.config.image_features

    def infer(message: dict[str, Any]) -> np.ndarray:
        (picture,) = message["images"].values()
        seen = {
            camera: torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255,
            "observation.state": torch.from_numpy(np.array(message["state"], np.float32)),
            "task": message["prompt"],
        }
        with torch.no_grad():
            batch = before(seen)
            policy.reset()  # what is left of the last chunk, and of other observations
            chunk = [after(policy.select_action(dict(batch)))[0] for _ in range(policy.config.n_action_steps)]
        return np.stack([action.numpy() for action in chunk])

    serve(infer, handshake, port)


# ---- openpi ----------------------------------------------------------------------------------------------------------


def openpi_train(checkout: str, data: str, out: str, steps: str) -> None:
    """Trains a pi0 with openpi's model, loss, augmentation, optimiser and step, on samples that are in memory."""
    import functools
    import importlib

    from tests.bench.other_servers_side import openpi_config

    about = json.loads((Path(data) / "about.json").read_text())
    sizes = openpi_config(checkout, about, ("wandb", "tqdm_loggable"))
    import jax
    from openpi.models import model
    from openpi.training import config as configs
    from openpi.training import optimizer, sharding

    train: Any = importlib.import_module("train")  # openpi's program
    rows = {n: np.load(Path(data) / f"{n}.npy") for n in ("images", "state", "prompt", "prompt_mask", "actions")}
    n = int(steps)
    config = configs.TrainConfig(
        name="peer", exp_name="peer", model=sizes, num_train_steps=n, batch_size=32,
        lr_schedule=optimizer.CosineDecaySchedule(min(200, n // 10 + 1), 1e-3, n, 1e-5),
    )  # fmt: skip
    mesh = sharding.make_mesh(1)
    rng, init_rng = jax.random.split(jax.random.key(config.seed))
    state, _ = train.init_train_state(config, init_rng, mesh, resume=False)
    step = jax.jit(functools.partial(train.train_step, config), donate_argnums=(1,))
    draws, started = np.random.default_rng(0), time.perf_counter()
    for i in range(n):
        chosen = draws.integers(0, len(rows["state"]), config.batch_size)
        of = {name: values[chosen] for name, values in rows.items()}
        observation = model.Observation.from_dict(
            {
                "image": {about["order"][0]: of["images"]},
                "image_mask": {about["order"][0]: np.ones(len(chosen), bool)},
                "state": of["state"],
                "tokenized_prompt": of["prompt"],
                "tokenized_prompt_mask": of["prompt_mask"],
            }
        )
        state, info = step(rng, state, (observation, of["actions"]))
        if i % 50 == 0 or i == n - 1:
            print(i, float(info["loss"]), f"{time.perf_counter() - started:.1f} s", flush=True)
    weights = {"/".join(map(str, path)): np.asarray(leaf.value) for path, leaf in state.ema_params.flat_state().items()}
    Path(out).mkdir(parents=True)
    np.savez(Path(out) / "weights.npz", **weights)  # type: ignore[arg-type]


def openpi_serve(checkout: str, data: str, weights: str, handshake: str, port: str) -> None:
    """Serves that pi0 with openpi's policy and transforms."""
    from tests.bench.other_servers_side import openpi_config, openpi_policy

    about = json.loads((Path(data) / "about.json").read_text())
    config = openpi_config(checkout, about)

    def inputs(said: dict[str, Any]) -> dict[str, Any]:
        (picture,) = said["images"].values()
        pictures = {about["order"][0]: np.asarray(picture)}
        masks = dict.fromkeys(pictures, np.True_)
        return {"image": pictures, "image_mask": masks, "state": np.asarray(said["state"]), "prompt": said["prompt"]}

    policy = openpi_policy(config, about, Path(weights) / "weights.npz", inputs)
    serve(lambda message: policy.infer(message)["actions"], handshake, port)


if __name__ == "__main__":
    of: dict[str, Callable[..., None]] = {
        "smolvla_sizes": smolvla_sizes,
        "lerobot_serve": lerobot_serve,
        "openpi_train": openpi_train,
        "openpi_serve": openpi_serve,
    }
    of[sys.argv[1]](*sys.argv[2:])
