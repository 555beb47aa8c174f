"""Writes small checkpoints with the code of another commit, for the test that today's code still loads them:

    git worktree add ../before COMMIT
    PYTHONPATH=../before python tests/bench/make_old_checkpoint.py --out tests/train/checkpoints/written_before

A run of all weights with their average, and one of LoRA with its base, two steps each, as `full.tar.gz` and
`lora.tar.gz`; beside them what the policy of each samples on seeded inputs, `actions.npz`. Needs nothing but the
package as it was at that commit (3157ead for the files that are there: policies inherited from their backbone).
"""

import argparse
import importlib
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import openpi_like
from openpi_like.data.normalize import FieldStats, Normalization
from openpi_like.models.gemma import GemmaConfig
from openpi_like.models.lora import Lora
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.siglip import SiglipConfig
from openpi_like.partition import ShardingRules
from openpi_like.robots.sawyer import SAWYER
from openpi_like.train.checkpoints.checkpoint import Checkpointer
from openpi_like.train.checkpoints.contract import Contract
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.sharding import MeshConfig, put_batch
from openpi_like.train.state import ModelDef, Trainable, Trainer

ORDER = {"seed": 0}
GEMMA = GemmaConfig(width=8, depth=1, mlp_dim=8, num_heads=1, num_kv_heads=1, head_dim=4)


def policy() -> Pi0Config:
    before: Any = Pi0Config  # with the fields that it had
    return before(
        vision=SiglipConfig(width=8, depth=1, mlp_dim=8, num_heads=1, patch_size=16),
        vlm=GEMMA,
        expert=GEMMA,
        cameras=tuple(c.name for c in SAWYER.cameras),
        image_size=(16, 16),
        state_dim=SAWYER.state_size,
        action_dim=SAWYER.action_size,
        action_horizon=SAWYER.action_horizon,
        prompt_len=8,
        vocab_size=300,
        pi05=True,
        prompt_format="pi0",
    )


def contract_of(config: Pi0Config) -> Contract:
    def stats(names: tuple[str, ...]) -> FieldStats:
        n = len(names)
        return FieldStats(names, (0.5,) * n, (2.0,) * n, (-1.0,) * n, (1.0,) * n, (-3.0,) * n, (3.0,) * n, 10)

    normalization = Normalization(SAWYER.name, "zscore", stats(SAWYER.state_names), stats(SAWYER.action_names))
    text, stored = (importlib.import_module(f"openpi_like.{m}") for m in ("data.text", "train.checkpoints.contract"))
    tokenizer = stored.encode_tokenizer(text.fit_text_tokenizer(["press the button"], 300))  # as they were then
    return Contract(config, (SAWYER,), {SAWYER.name: normalization}, tokenizer, {SAWYER.name: None})


def inputs(config: Pi0Config, B: int = 2) -> dict:
    rng = np.random.default_rng(0)

    def fill(x: jax.ShapeDtypeStruct) -> np.ndarray:
        if x.dtype == bool:
            return np.ones(x.shape, bool)
        if np.issubdtype(x.dtype, np.floating):
            return rng.standard_normal(x.shape, np.float32)
        return rng.integers(4, 200, x.shape).astype(x.dtype)

    return jax.tree.map(fill, config.batch_shapes(B)) | {"dataset_id": np.zeros(B, np.int32)}


def write(out: Path, name: str, trainable: Trainable) -> np.ndarray:
    config = policy()
    trainer = Trainer(
        ModelDef(config, trainable),
        OptimizerConfig(peak_lr=1e-2, warmup_steps=1, decay_steps=10).create(),
        ema_decay=0.9 if trainable.lora is None else None,
        seed=0,
        mesh=MeshConfig().create(),
        rules=ShardingRules(),
        dataset_names=("one",),
    )
    state, batch = trainer.init(), inputs(config)
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(Path(folder) / "checkpoints", trainable=trainable)
        checkpointer.begin(state)
        for _ in range(2):
            state, _ = trainer.train_step(state, put_batch(batch, trainer.mesh))
        checkpointer.save(state, position=4, order=ORDER, contract=contract_of(config), config=OptimizerConfig())
        checkpointer.close()
        with tarfile.open(out / f"{name}.tar.gz", "w:gz") as tar:
            tar.add(folder, arcname=".")
    model = trainer.model.bind(jax.device_get(state.weights()))
    noise = jnp.asarray(np.random.default_rng(1).standard_normal(batch["actions"].shape, np.float32))
    seen = {k: jax.tree.map(jnp.asarray, v) for k, v in batch.items() if k in config.input_shapes(2, actions=False)}
    return np.asarray(model.sample_actions(jax.random.key(0), seen, noise=noise))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    print(f"with {Path(openpi_like.__file__).parent}")
    out.mkdir(parents=True, exist_ok=True)
    kinds: dict[str, Any] = {"full": Trainable(), "lora": Trainable(Lora())}
    actions: dict[str, Any] = {k: write(out, k, v) for k, v in kinds.items()}
    np.savez_compressed(out / "actions.npz", **actions)


if __name__ == "__main__":
    main()
