"""Losses of the first steps of each policy on some meshes, as a line of JSON for each: run by test_meshes.py.

    python tests/train/mesh_losses.py 20 pi0,fast 1x1x1 8x1x1 1x8x1 2x2x2 1x2x4
    python tests/train/mesh_losses.py 20 insulated 1x8x1 localhost:1234 2 0

The arguments are steps, policies, meshes as data x fsdp x tensor, with ":2" for two slices; and, of several processes,
the coordinator's address, their number and the rank of this one. XLA_FLAGS sets how many devices this process has.
"""

import json
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from openpi_like.batch import ActionTokens, EntityTokens
from openpi_like.data.prompts import FastPrompt
from openpi_like.models.gemma import GemmaConfig
from openpi_like.models.llama import LlamaConfig
from openpi_like.models.paligemma import PaliGemmaConfig
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.pi0_fast import Pi0FastConfig
from openpi_like.models.plan_text import Characters
from openpi_like.models.policy import PolicyConfig
from openpi_like.models.scene_decoder import SceneDecoderConfig
from openpi_like.models.scene_perception import PerceptionConfig
from openpi_like.models.siglip import SiglipConfig
from openpi_like.models.smolvla import SmolVlaConfig
from openpi_like.models.smolvla_expert import ExpertConfig
from openpi_like.models.smolvlm import SmolVlmConfig
from openpi_like.models.text_waypoints import TextWaypointsConfig
from openpi_like.partition import ShardingRules
from openpi_like.train.hosts.places import Hosts
from openpi_like.train.hosts.process_group import join
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.sharding import MeshConfig, put_batch
from openpi_like.train.state import ModelDef, Trainer

BATCH = 16


def policies() -> dict[str, PolicyConfig]:
    gemma = GemmaConfig(width=16, depth=1, mlp_dim=32, num_heads=4, num_kv_heads=1, head_dim=8)
    common: dict[str, Any] = {
        "backbone": PaliGemmaConfig(SiglipConfig(width=16, depth=1, mlp_dim=32, num_heads=4, patch_size=8), gemma),
        "cameras": ("base", "wrist"),
        "image_size": (16, 16),
        "state_dim": 4,
        "action_dim": 4,
        "action_horizon": 4,
        "prompt_len": 8,
        "vocab_size": 320,
        "remat": "nothing_saveable",
    }
    tokens = ActionTokens(max_len=6, count=40, skip=0)
    siglip = SiglipConfig(width=16, depth=1, mlp_dim=32, num_heads=4, patch_size=4)
    llama = LlamaConfig.tiny(width=16, depth=2, mlp_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, tied=True)
    small = SmolVlmConfig(siglip, llama, shuffle=2)
    return {
        "pi0": Pi0Config(**common, expert=gemma),
        "insulated": Pi0Config(
            **common, expert=gemma, pi05=True, prompt_format=FastPrompt(), action_tokens=tokens, insulate=True
        ),
        "pi0_entities": Pi0Config(**common, expert=gemma, entities=(EntityTokens("agents", 3, 4),)),
        "pi0_perception": Pi0Config(
            **common,
            expert=gemma,
            entities=(EntityTokens("agents", 3, 4),),
            perception=PerceptionConfig(decoder=SceneDecoderConfig(16, 1, 4, 32), detached=False),
        ),
        "fast": Pi0FastConfig(**common, action_tokens=tokens),
        "text_waypoints": TextWaypointsConfig(**common, characters=Characters.fitted()),
        "smolvla": SmolVlaConfig(**{**common, "backbone": small}, expert=ExpertConfig(width=16, mlp_dim=32)),
    }


def batch_of(config: PolicyConfig) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    B, S = BATCH, config.prompt_len + config.answer_len
    at = np.arange(S)[None]
    valid = at < rng.integers(config.prompt_len // 2, S + 1, (B, 1))
    mask = np.ones((B, config.action_horizon, config.action_dim), bool)
    mask[::3, 2:] = False
    batch: dict[str, Any] = {
        "images": {c: rng.integers(0, 256, (B, *config.image_size, 3), dtype=np.uint8) for c in config.cameras},
        "image_mask": {"base": np.ones(B, bool), "wrist": np.arange(B) % 3 > 0},
        "state": rng.standard_normal((B, config.state_dim), np.float32),
        "state_mask": np.ones((B, config.state_dim), bool),
        "prompt": np.where(valid, rng.integers(4, config.vocab_size, (B, S)), 0).astype(np.int32),
        "prompt_mask": valid,
        "actions": rng.standard_normal(mask.shape, np.float32),
        "action_mask": mask,
        "dataset_id": (np.arange(B) % 2).astype(np.int32),
        "position": np.stack([np.zeros(B), np.arange(B)], axis=1).astype(np.uint32),
    }
    if config.entities:
        there = {e.name: rng.random((B, e.count)) < 0.7 for e in config.entities}
        values = {e.name: rng.standard_normal((B, e.count, e.size), np.float32) for e in config.entities}
        batch |= {"entities": {k: np.where(there[k][..., None], x, 0) for k, x in values.items()}, "entity_mask": there}
    if config.answer_len:
        answer = at >= config.prompt_len
        batch |= {"prompt_causal": valid & answer, "prompt_loss": valid & answer, "prompt_action": valid & answer}
    return batch


def losses(config: PolicyConfig, mesh: MeshConfig, steps: int, rank: int, count: int, fresh: list[Any]) -> list[float]:
    """fresh: keeps the first state of a policy for its other meshes: to compile what draws it takes as long as a step.

    That what is drawn does not depend on the mesh is seen from the processes of the test, which draw on different ones.
    """
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]
    optimizer = OptimizerConfig(peak_lr=3e-3, warmup_steps=2, decay_steps=100).create()
    trainer = Trainer(
        ModelDef(config),
        optimizer,
        ema_decay=0.9,
        seed=0,
        mesh=mesh.create(devices),
        rules=ShardingRules(),
        dataset_names=("one", "two"),
    )
    # The rows of a process are next to each other in the global batch, as its devices are in the mesh.
    local = BATCH // count
    batch = jax.tree.map(lambda x: x[rank * local : (rank + 1) * local], batch_of(config))
    if not fresh:
        fresh.append(jax.tree.map(_whole, trainer.init()))
    state, found = jax.tree.map(_laid_out, fresh[0], trainer.shardings), []
    for _ in range(steps):
        state, values = trainer.train_step(state, put_batch(batch, trainer.mesh))
        found.append(float(values["loss"]))
    return found


def _whole(x: jax.Array) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _laid_out(x: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def main() -> None:
    steps, names, *rest = sys.argv[1:]
    meshes = [m for m in rest if m.count("x") == 2]
    where = rest[len(meshes) :]
    hosts = Hosts(coordinator=where[0], count=int(where[1]), rank=int(where[2])) if where else Hosts(count=1)
    with join(hosts, lambda line: None) as group:
        for name in names.split(","):
            config, fresh = policies()[name], list[Any]()
            for mesh in meshes:
                shape, _, slices = mesh.partition(":")
                data, fsdp, tensor = map(int, shape.split("x"))
                sizes = MeshConfig(data, fsdp, tensor, int(slices or 1))
                of = losses(config, sizes, int(steps), group.rank, group.count, fresh)
                if group.lead:
                    line = {"policy": name, "mesh": mesh, "processes": group.count, "losses": of}
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
