"""The FAST loss in memory and time, constrained decoding by trial, and time per decoded token:

    python tests/bench/bench_fast.py [--openpi ~/openpi --openpi-python ~/openpi/.venv/bin/python]

The loss is compared with the formulation that holds logits and one-hot targets of the whole vocabulary, each in a
process of its own. Decoding is compared, when given openpi, with its loop at the same tiny size and number of tokens.
"""

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

V, B, S = 257_152, 4, 250  # the released vocabulary, and the batch the goal is stated for
TINY: dict[str, Any] = {"width": 64, "depth": 3, "mlp_dim": 128, "num_heads": 4, "num_kv_heads": 1, "head_dim": 16}
VISION: dict[str, Any] = {"width": 48, "depth": 2, "mlp_dim": 96, "num_heads": 4}
IMAGE, PROMPT, NEW, VOCAB = 56, 24, 32, 512


@dataclasses.dataclass(frozen=True)
class Args:
    """See the file's head. width: of the tokens the loss is computed from. answer: tokens of 250 that count."""

    openpi: Path | None = None
    openpi_python: Path | None = None
    width: int = 256
    answer: int = 100
    trials: int = 10_000
    rounds: int = 3


# ---- Loss ------------------------------------------------------------------------------------------------------------


def loss_child(kind: str, width: int, answer: int) -> dict[str, float]:
    """Gradient of the loss with respect to tokens and table, timed; memory by the compiler and by the process."""
    import jax
    import jax.numpy as jnp

    from openpi_like.models.cross_entropy import cross_entropy

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(B, S, width)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(V, width)) / np.sqrt(width), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, S)))
    mask = jnp.asarray(np.arange(S) >= S - answer) & jnp.ones((B, 1), bool)

    def one_hot(x: jax.Array, table: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(jnp.einsum("BSD,VD->BSV", x, table))
        chosen = (jax.nn.one_hot(targets, V) * log_p).sum(-1)
        return -(chosen * mask).sum() / mask.sum()

    def in_parts(x: jax.Array, table: jax.Array) -> jax.Array:
        losses = cross_entropy(x.reshape(-1, width), table, targets.reshape(-1)).reshape(B, S)
        return (losses * mask).sum() / mask.sum()

    def in_parts_of_answers(x: jax.Array, table: jax.Array) -> jax.Array:
        order = jnp.argsort(~mask, axis=1, stable=True)[:, :answer]
        kept = jnp.take_along_axis(x, order[..., None], axis=1).reshape(-1, width)
        return cross_entropy(kept, table, jnp.take_along_axis(targets, order, axis=1).reshape(-1)).mean()

    function = {"one-hot": one_hot, "parts": in_parts, "parts, answers only": in_parts_of_answers}[kind]
    compiled = jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(x, table).compile()
    memory: Any = compiled.memory_analysis()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    value, grads = jax.block_until_ready(compiled(x, table))
    times = []
    for _ in range(3):
        started = time.perf_counter()
        jax.block_until_ready(compiled(x, table))
        times.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "loss": float(value),
        "norm": float(jnp.linalg.norm(grads[1])),
        "seconds": statistics.median(times),
        "temporary MiB": memory.temp_size_in_bytes / 2**20,
        "process MiB": (peak - before) / 2**10,
    }


# ---- Decoding --------------------------------------------------------------------------------------------------------


def decode_inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (3, 1, IMAGE, IMAGE, 3)).astype(np.float32)
    return {"images": images, "prompt": rng.integers(4, VOCAB, (1, PROMPT)).astype(np.int32)}


def ours_child() -> dict[str, float]:
    """Milliseconds of one request, and per token beyond the first ones: constrained, and free-running as openpi."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from openpi_like.batch import ActionTokens
    from openpi_like.data.fast import fit_fast
    from openpi_like.models.gemma import GemmaConfig
    from openpi_like.models.paligemma import PaliGemmaConfig
    from openpi_like.models.pi0_fast import ActionDecoding, Pi0FastConfig
    from openpi_like.models.siglip import SiglipConfig

    rng = np.random.default_rng(1)
    fast = fit_fast(
        [rng.integers(-3, 4, (500, NEW, 1))], scale=10.0, vocab_size=30, span=(-9, 9)
    )  # few merges: many tokens
    cameras = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")
    config = Pi0FastConfig(
        backbone=PaliGemmaConfig(SiglipConfig(**VISION, patch_size=14), GemmaConfig(**TINY)), cameras=cameras,
        image_size=(IMAGE, IMAGE), state_dim=8, action_dim=1, action_horizon=NEW, prompt_len=PROMPT, vocab_size=VOCAB,
        action_tokens=ActionTokens(max_len=NEW, count=fast.vocab_size, skip=0),
    )  # fmt: skip
    a = decode_inputs()
    observation: Any = {
        "images": dict(zip(cameras, a["images"], strict=True)),
        "image_mask": {c: np.ones(1, bool) for c in cameras},
        "state": np.zeros((1, 8), np.float32),
        "state_mask": np.ones((1, 8), bool),
        "prompt": a["prompt"],
        "prompt_mask": np.ones((1, PROMPT), bool),
    }
    tables = dataclasses.asdict(fast.tables(NEW))
    # Only tokens of one coefficient, so that every chunk takes as many tokens as openpi's loop is asked for.
    tables["following"] = np.where(tables["count"] == 1, tables["following"], -1)
    tables["least"] = np.arange(NEW + 1)[:, None]
    decoding = jax.tree.map(jnp.asarray, ActionDecoding(**tables, begin=np.array([5, 6], np.int32)))
    graph, weights = nnx.split(config.create(jax.random.key(0)).packed())
    key = jax.random.key(0)
    constrained = jax.jit(
        lambda w, o, n: nnx.merge(graph, w).sample_tokens(
            key, o, decoding=decoding, action_mask=(jnp.arange(NEW) < n)[None, :, None]
        )
    )
    free = jax.jit(lambda w, o: nnx.merge(graph, w).backbone.generate(key, o, max_new=NEW, skip=1))
    written = int(constrained(weights, observation, NEW)[2].sum())
    assert written == NEW, written
    whole, short = (_time(lambda n=n: constrained(weights, observation, n)) for n in (NEW, 8))
    return {
        "request ms": whole,
        "ms per token": (whole - short) / (NEW - 8),
        "free-running request ms": _time(lambda: free(weights, observation)),
    }


def openpi_child(openpi: str) -> dict[str, float]:
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [f"{openpi}/src", f"{openpi}/packages/openpi-client/src", str(root)]
    from tests.bench.bench_models import AbsentPackages

    sys.meta_path.append(AbsentPackages())
    import flax.nnx as nnx
    import jax
    import jax.numpy as jnp
    import ml_collections  # type: ignore[import-not-found]
    from openpi.models import gemma_fast, model, pi0_fast, siglip

    options = {"norm_eps": 1e-6, "vocab_size": VOCAB, "scan": True, "remat_policy": "nothing_saveable"}
    gemma_fast.get_config = lambda _: ml_collections.ConfigDict({"variant": "gemma_2b", **TINY, **options})
    siglip.decode_variant = lambda _: {**VISION, "patch_size": (14, 14)}
    model.IMAGE_RESOLUTION = (IMAGE, IMAGE)
    model.preprocess_observation.__kwdefaults__.update(image_resolution=model.IMAGE_RESOLUTION)
    a = decode_inputs()
    config = pi0_fast.Pi0FASTConfig(dtype="float32", action_dim=8, action_horizon=8, max_token_len=PROMPT)
    policy = config.create(jax.random.key(0))
    cameras = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")
    observation = model.Observation(
        images=dict(zip(cameras, map(jnp.asarray, a["images"]), strict=True)),
        image_masks={c: jnp.ones(1, bool) for c in cameras},
        state=jnp.zeros((1, 8)),
        tokenized_prompt=jnp.asarray(a["prompt"]),
        tokenized_prompt_mask=jnp.ones((1, PROMPT), bool),
        token_ar_mask=jnp.zeros((1, PROMPT), jnp.int32),
        token_loss_mask=jnp.zeros((1, PROMPT), bool),
    )
    graph, weights = nnx.split(policy)
    key = jax.random.key(0)
    run = lambda steps: jax.jit(  # noqa: E731
        lambda w, o: nnx.merge(graph, w).sample_actions(key, o, max_decoding_steps=steps)
    )
    whole, short = run(NEW), run(8)
    seconds = [_time(lambda f=f: f(weights, observation)) for f in (whole, short)]
    return {"request ms": seconds[0], "ms per token": (seconds[0] - seconds[1]) / (NEW - 8)}


def _time(function: Any, seconds: float = 4.0) -> float:
    """Median milliseconds of a call."""
    import jax

    jax.block_until_ready(function())
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def trials_child(count: int) -> dict[str, Any]:
    """Failures of constrained and of free decoding, by rule, with tokens of our own and of the released kind."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from openpi_like.batch import ActionTokens
    from openpi_like.data.fast import dct_coefficients, fit_fast
    from openpi_like.models.gemma import GemmaConfig
    from openpi_like.models.paligemma import PaliGemmaConfig
    from openpi_like.models.pi0_fast import Pi0FastConfig
    from openpi_like.models.siglip import SiglipConfig
    from tests.data.test_fast import released_kind
    from tests.models.test_pi0_fast import decoding_of, smooth, throws, trials

    fast = fit_fast([dct_coefficients(smooth(np.random.default_rng(0), 2000, 10, 7), 10.0)], scale=10.0, vocab_size=512)
    config = Pi0FastConfig(
        backbone=PaliGemmaConfig(SiglipConfig(**VISION, patch_size=14), GemmaConfig(**TINY)), cameras=("base",),
        image_size=(IMAGE, IMAGE), state_dim=8, action_dim=7, action_horizon=10, prompt_len=4, vocab_size=1024,
        action_tokens=ActionTokens(max_len=70, count=fast.vocab_size, skip=0),
    )  # fmt: skip
    bytes_ = released_kind(-200)
    smaller = dataclasses.replace(
        config,
        action_dim=3,
        action_horizon=6,
        action_tokens=dataclasses.replace(config.tokens, max_len=40, count=bytes_.vocab_size),
    )
    results = {}
    for name, tokenizer, policy in (("", fast, config), (", tokens of bytes", bytes_, smaller)):
        decoding = decoding_of(tokenizer, policy)
        for rule in throws(decoding, 1):
            results[rule + name] = trials(tokenizer, policy, decoding, rule, count, seed=1)
    return results


# ---- The table -------------------------------------------------------------------------------------------------------

CHILDREN: dict[str, Any] = {"loss": loss_child, "ours": ours_child, "openpi": openpi_child, "trials": trials_child}


def child(name: str, *arguments: Any, python: Path | None = None) -> dict[str, Any]:
    """Runs one measurement in a process of its own."""
    program = [str(python or sys.executable), __file__, "--child", json.dumps([name, *arguments])]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(args: Args) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=140)
    kinds = ("one-hot", "parts", "parts, answers only")
    runs = {kind: child("loss", kind, args.width, args.answer) for kind in kinds}
    whole = runs["one-hot"]
    size = f"V={V:,}, (B, S)=({B}, {S}), width {args.width}, {args.answer} tokens count"
    table = Table(title=f"loss and gradient: {size}")
    for column in ("", *whole, "time of one-hot / this", "memory of one-hot / this"):
        table.add_column(column, justify="left" if not column else "right")
    for kind, row in runs.items():
        times, memory = (whole[k] / row[k] for k in ("seconds", "temporary MiB"))
        table.add_row(kind, *(f"{v:,.4g}" for v in row.values()), f"{times:.2f}", f"{memory:.2f}")
    console.print(table)

    table = Table("logits", "constrained: failures", "unconstrained: failures", title=f"{args.trials:,} chunks each")
    for rule, (constrained, free) in child("trials", args.trials).items():
        table.add_row(rule, str(constrained), str(free))
    console.print(table)

    rows: dict[str, list[dict[str, float]]] = {"ours": [], "openpi": []}
    for _ in range(args.rounds):
        rows["ours"].append(child("ours"))
        if args.openpi is not None:
            rows["openpi"].append(child("openpi", str(args.openpi), python=args.openpi_python))
    medians = {side: {k: statistics.median(r[k] for r in of) for k in of[0]} for side, of in rows.items() if of}
    table = Table("", "request ms", "ms per token")
    table.title = f"{NEW} tokens after 3 cameras and {PROMPT} tokens, tiny, float32, batch 1"
    for side, row in medians.items():
        table.add_row(side, f"{row['request ms']:.2f}", f"{row['ms per token']:.3f}")
    table.add_row("ours, free-running", f"{medians['ours']['free-running request ms']:.2f}", "")
    if "openpi" in medians:
        ratios = (medians["openpi"][k] / medians["ours"][k] for k in ("request ms", "ms per token"))
        table.add_row("openpi / ours", *(f"{r:.2f}" for r in ratios))
    console.print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:  # imports nothing that openpi's environment may lack
        name, *arguments = json.loads(sys.argv[2])
        print(json.dumps(CHILDREN[name](*arguments)))
    else:
        import tyro

        main(tyro.cli(Args))
