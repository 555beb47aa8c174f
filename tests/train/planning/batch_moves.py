"""Compiles training steps for 8 simulated devices, and says what their collectives move of the batch.

    JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 \
        python tests/train/planning/batch_moves.py 1x8x1 [2x2x2 ...]      # data x fsdp x tensor

Prints one line per collective that moves an array with rows of the batch, beyond what it may (see `moves`). Sizes are
chosen so that rows are unmistakable: 11 divides the batch and no other size, and what may be merged with rows (cameras,
patches, tokens, steps) is odd, so that an array whose size along one axis is 11 n has as many rows as 2 divides n.
"""

import functools
import sys
from collections.abc import Iterator
from typing import Any

import jax

from openpi_like.batch import ActionTokens
from openpi_like.data.prompts import FastPrompt
from openpi_like.models.gemma import GemmaConfig
from openpi_like.models.paligemma import PaliGemmaConfig
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.pi0_fast import Pi0FastConfig
from openpi_like.models.policy import PolicyConfig
from openpi_like.models.siglip import SiglipConfig
from openpi_like.partition import ShardingRules
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.planning.hlo_cost import Collective, read_program
from openpi_like.train.planning.plan import abstract_state
from openpi_like.train.sharding import MeshConfig, batch_sharding
from openpi_like.train.state import ModelDef, Trainer
from openpi_like.train.validation import held_out_losses, sampled_chunks

ROWS, ANSWER = 88, 5


def policies() -> dict[str, PolicyConfig]:
    gemma = GemmaConfig(width=64, depth=2, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16)
    common: dict[str, Any] = {
        "backbone": PaliGemmaConfig(SiglipConfig(width=64, depth=2, mlp_dim=128, num_heads=8, patch_size=8), gemma),
        "cameras": ("a", "b", "c"),
        "image_size": (24, 24),
        "vocab_size": 512,
        "state_dim": 5,
        "action_dim": 3,
        "action_horizon": 9,
        "remat": "nothing_saveable",
    }
    tokens = ActionTokens(max_len=ANSWER, count=64, skip=0)
    # With an answer, 9 tokens.
    written: dict[str, Any] = {"prompt_len": 4, "prompt_format": FastPrompt(), "action_tokens": tokens}
    return {
        "pi0": Pi0Config(**common, expert=gemma, prompt_len=5),
        "insulated": Pi0Config(**common, expert=gemma, pi05=True, **written),
        "fast": Pi0FastConfig(**common, **written),
    }


def compiled_texts(policy: PolicyConfig, mesh: MeshConfig, *, validation: bool) -> Iterator[tuple[str, str]]:
    """Yields (what, text) of the training step, and of what validation computes if that is asked for."""
    trainer = Trainer(
        ModelDef(policy),
        OptimizerConfig().create(),
        ema_decay=0.99,
        seed=0,
        mesh=mesh.create(),
        rules=ShardingRules(),
        dataset_names=("one",),
    )
    rows = batch_sharding(trainer.mesh)
    batch = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=rows), policy.batch_shapes(ROWS))
    state = abstract_state(trainer)
    programs = {"step": trainer.train_step.lower(state, batch)}
    if validation:
        given = (state.weights(), batch, jax.eval_shape(lambda: jax.random.key(0)))
        programs["losses"] = jax.jit(functools.partial(held_out_losses, trainer)).lower(*given)
        mask = jax.ShapeDtypeStruct((policy.action_horizon, policy.action_dim), "bool")
        sampled = jax.jit(functools.partial(sampled_chunks, trainer))
        programs["chunks"] = sampled.lower(*given, mask, policy.sampling_shapes())
    for what, lowered in programs.items():
        try:  # three times faster to compile; nobody runs it
            compiled = lowered.compile(compiler_options={"xla_cpu_use_fusion_emitters": False})
        except jax.errors.JaxRuntimeError:  # a version without this choice
            compiled = lowered.compile()
        yield what, str(compiled.as_text())


def moves(collective: Collective, mesh: dict[str, int]) -> str | None:
    """Returns what a collective moves of the batch that it may not; None where there is nothing."""
    own = ROWS // (mesh["data"] * mesh["fsdp"])
    carrying = [b for b in collective.buffers if any(n % 11 == 0 for n in b.shape)]
    if not carrying:
        return None
    said = f"{collective.kind} over {'+'.join(collective.axes)}: {' '.join(map(str, carrying))} at {collective.op_name}"
    if set(collective.axes) == {"tensor"}:
        # Of the rows that are a chip's own.
        more = [n for b in carrying for n in b.shape if n % 11 == 0 and (n & -n) > (own & -own)]
        return said if more else None
    largest = max(b.nbytes for b in carrying)
    if "all_gather" in collective.op_name and {b.dtype for b in carrying} == {"s32"} and largest <= 4 * ROWS * 9:
        return None  # token ids, of which each chip looks up its columns of the table
    if collective.kind == "all-to-all" and "all_to_all" in collective.op_name and largest <= 4 * own * 9 * 64:
        return None  # the rows it has looked up for others, for its own: as many as it has
    return said


def main(*sizes: str) -> None:
    for name, policy in policies().items():
        for size in sizes:
            data, fsdp, tensor = map(int, size.split("x"))
            mesh = {"data": data, "fsdp": fsdp, "tensor": tensor}
            for what, text in compiled_texts(policy, MeshConfig(**mesh), validation=size == sizes[0]):
                cost = read_program(text, mesh, rounds=ANSWER)
                print(f"{name}, {size}, {what}: {len(cost.collectives)} collectives")
                for collective in cost.collectives:
                    moved = moves(collective, mesh)
                    if moved:
                        print(f"{name}, {size}, {what}: moves rows of the batch: {moved}")


if __name__ == "__main__":
    main(*sys.argv[1:])
