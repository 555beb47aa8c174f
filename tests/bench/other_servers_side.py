"""The parts of bench_other_servers.py that run where openpi is installed, or lerobot; each needs no other."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np


def openpi(checkout: str, folder: str, port: str) -> None:
    """Serves a pi0 with openpi's model, transforms, policy and server.

    folder: weights and what they were trained with, and a request, whose answer is left there. What openpi would
    download, its tokenizer, is a table of prompts.
    """
    sys.path[:0] = [f"{checkout}/src", f"{checkout}/packages/openpi-client/src"]
    from tests.bench.bench_models import AbsentPackages, _nested

    sys.meta_path.append(AbsentPackages())  # torch and others that only its other policies use
    from openpi import transforms
    from openpi.models import gemma, model, pi0_config, siglip
    from openpi.policies.policy import Policy
    from openpi.serving.websocket_policy_server import WebsocketPolicyServer

    about = json.loads((Path(folder) / "about.json").read_text())
    gemma.get_config = {"gemma_2b": gemma.Config(**about["vlm"]), "gemma_300m": gemma.Config(**about["expert"])}.get
    gemma.PALIGEMMA_VOCAB_SIZE = about["vocab"]
    siglip.decode_variant = lambda variant: {**about["vision"], "patch_size": (about["patch"],) * 2}
    side, images = (about["image"],) * 2, about["cameras"]
    model.preprocess_observation.__kwdefaults__.update(image_keys=about["order"], image_resolution=side)
    model.IMAGE_RESOLUTION = side
    config = pi0_config.Pi0Config(
        dtype="float32", action_dim=about["action_dim"], action_horizon=about["horizon"],
        max_token_len=about["prompt_len"],
    )  # fmt: skip

    class Inputs(transforms.DataTransformFn):
        """As openpi has one for each robot."""

        def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
            flat = transforms.flatten_dict(data)
            pictures = {name: np.asarray(flat[key]) for name, key in images.items()}
            if about["channels_first"]:
                pictures = {name: picture.transpose(1, 2, 0) for name, picture in pictures.items()}
            masks = {name: np.True_ for name in pictures}
            return {"image": pictures, "image_mask": masks, "state": flat[about["state"]], "prompt": flat["prompt"]}

    class Tokenizer:
        """Of the prompts that are asked for."""

        def tokenize(self, prompt: str, state: Any = None) -> tuple[np.ndarray, np.ndarray]:
            ids, mask = about["tokens"][prompt]
            return np.asarray(ids), np.asarray(mask)

    stats = {n: types.SimpleNamespace(**{k: np.array(v) for k, v in of.items()}) for n, of in about["stats"].items()}
    policy = Policy(
        config.load(_nested(Path(folder) / "weights.npz", np.float32)),
        transforms=[
            Inputs(),
            transforms.Normalize(stats),
            transforms.ResizeImages(*side),
            transforms.TokenizePrompt(Tokenizer()),
            transforms.PadStatesAndActions(about["action_dim"]),
        ],
        output_transforms=[transforms.Unnormalize(stats), transforms.AbsoluteActions(about["relative"])],
    )
    with np.load(Path(folder) / "asked.npz") as asked:
        noise, state = asked["noise"], asked["state"]
        pictures = {name: asked[name].transpose(2, 0, 1) if about["channels_first"] else asked[name] for name in images}
    first = {images[name]: picture for name, picture in pictures.items()}
    first |= {about["state"]: state, "prompt": next(iter(about["tokens"]))}
    np.save(Path(folder) / "answered.npy", policy.infer(first, noise=noise)["actions"])
    policy.infer(first)  # without noise it compiles once more
    WebsocketPolicyServer(policy, host="127.0.0.1", port=int(port)).serve_forever()


def lerobot(checkpoint: str, asked: str, answered: str) -> None:
    """Writes the chunk that a policy of LeRobot says by itself, without any server."""
    import torch
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(checkpoint)
    policy = get_policy_class(config.type).from_pretrained(checkpoint)
    before, after = make_pre_post_processors(policy.config, pretrained_path=checkpoint)
    with np.load(asked) as said:
        picture = torch.from_numpy(said["picture"]).permute(2, 0, 1).float() / 255
        observation = {"observation.images.image": picture, "observation.state": torch.from_numpy(said["state"])}
        chunk = policy.predict_action_chunk(before({**observation, "task": str(said["task"])}))
    np.save(answered, np.stack([after(chunk[:, i])[0].detach().numpy() for i in range(chunk.shape[1])]))


if __name__ == "__main__":
    {"openpi": openpi, "lerobot": lerobot}[sys.argv[1]](*sys.argv[2:])
