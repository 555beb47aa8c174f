"""The parts of bench_other_servers.py that run where openpi is installed, or lerobot; each needs no other."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np


def openpi_config(checkout: str, about: dict[str, Any], absent: tuple[str, ...] = ()) -> Any:
    """Returns the config of openpi's pi0 in other sizes than it has, which its modules are made to take.

    about: sizes, "order" of cameras, "image" size. absent: packages that are imported and not used, besides others'.
    """
    sys.path[:0] = [f"{checkout}/src", f"{checkout}/packages/openpi-client/src", f"{checkout}/scripts"]
    from tests.bench.bench_models import AbsentPackages

    class Absent(AbsentPackages):
        names = (*AbsentPackages.names, *absent)

    sys.meta_path.append(Absent())  # torch and others that only its other policies use
    from openpi.models import gemma, model, pi0_config, siglip

    gemma.get_config = {"gemma_2b": gemma.Config(**about["vlm"]), "gemma_300m": gemma.Config(**about["expert"])}.get
    gemma.PALIGEMMA_VOCAB_SIZE = about["vocab"]
    siglip.decode_variant = lambda variant: {**about["vision"], "patch_size": (about["patch"],) * 2}
    side = (about["image"],) * 2
    model.preprocess_observation.__kwdefaults__.update(image_keys=about["order"], image_resolution=side)
    model.IMAGE_RESOLUTION = side
    return pi0_config.Pi0Config(
        dtype="float32", action_dim=about["action_dim"], action_horizon=about["horizon"],
        max_token_len=about["prompt_len"],
    )  # fmt: skip


def openpi_policy(config: Any, about: dict[str, Any], weights: Path, inputs: Any, after: tuple[Any, ...] = ()) -> Any:
    """Returns openpi's policy with its own transforms. What it would download, its tokenizer, is a table of prompts.

    inputs: a message -> what a policy reads, as openpi has one for each robot. after: further transforms of answers.
    """
    from openpi import transforms
    from openpi.policies.policy import Policy

    from tests.bench.bench_models import _nested

    class Inputs(transforms.DataTransformFn):
        def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
            return inputs(data)

    class Tokenizer:
        """Of the prompts that are asked for."""

        def tokenize(self, prompt: str, state: Any = None) -> tuple[np.ndarray, np.ndarray]:
            ids, mask = about["tokens"][prompt]
            return np.asarray(ids), np.asarray(mask)

    stats = {n: types.SimpleNamespace(**{k: np.array(v) for k, v in of.items()}) for n, of in about["stats"].items()}
    return Policy(
        config.load(_nested(weights, np.float32)),
        transforms=[
            Inputs(),
            transforms.Normalize(stats),
            transforms.ResizeImages(about["image"], about["image"]),
            transforms.TokenizePrompt(Tokenizer()),
            transforms.PadStatesAndActions(about["action_dim"]),
        ],
        output_transforms=[transforms.Unnormalize(stats), *after],
    )


def openpi(checkout: str, folder: str, port: str) -> None:
    """Serves a pi0 with openpi's model, transforms, policy and server.

    folder: weights and what they were trained with, and a request, whose answer is left there.
    """
    about = json.loads((Path(folder) / "about.json").read_text())
    config, images = openpi_config(checkout, about), about["cameras"]
    from openpi import transforms
    from openpi.serving.websocket_policy_server import WebsocketPolicyServer

    def inputs(data: dict[str, Any]) -> dict[str, Any]:
        flat = transforms.flatten_dict(data)
        pictures = {name: np.asarray(flat[key]) for name, key in images.items()}
        if about["channels_first"]:
            pictures = {name: picture.transpose(1, 2, 0) for name, picture in pictures.items()}
        masks = {name: np.True_ for name in pictures}
        return {"image": pictures, "image_mask": masks, "state": flat[about["state"]], "prompt": flat["prompt"]}

    after = (transforms.AbsoluteActions(about["relative"]),)
    policy = openpi_policy(config, about, Path(folder) / "weights.npz", inputs, after)
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
