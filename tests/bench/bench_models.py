"""Train step, sampling, compile time and memory, beside openpi's JAX code on the same weights and inputs:

    python tests/bench/bench_models.py --openpi ~/openpi --openpi-python ~/openpi/.venv/bin/python

Our weights, in openpi's names, go into openpi's own classes. Both run the same inputs, each in a process of its
own, in turns, for several rounds; the medians and their ratio are printed, and how far the outputs are apart.
Packages that openpi imports without needing them here (torch, lerobot ...) may be absent.
"""

import dataclasses
import importlib.abc
import importlib.machinery
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import numpy as np

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vision": {"width": 48, "depth": 2, "mlp_dim": 96, "num_heads": 4},
        "vlm": {"width": 64, "depth": 3, "mlp_dim": 128, "num_heads": 4, "num_kv_heads": 1, "head_dim": 16},
        "expert": {"width": 32, "depth": 3, "mlp_dim": 64, "num_heads": 4, "num_kv_heads": 1, "head_dim": 16},
        "image": 56,
        "vocab": 512,
        "horizon": 16,
        "action_dim": 8,
        "prompt": 12,
    },
    "small": {
        "vision": {"width": 192, "depth": 6, "mlp_dim": 768, "num_heads": 6},
        "vlm": {"width": 256, "depth": 6, "mlp_dim": 1024, "num_heads": 8, "num_kv_heads": 1, "head_dim": 32},
        "expert": {"width": 128, "depth": 6, "mlp_dim": 512, "num_heads": 8, "num_kv_heads": 1, "head_dim": 32},
        "image": 112,
        "vocab": 8192,
        "horizon": 50,
        "action_dim": 32,
        "prompt": 48,
    },
}
TRAIN_BATCH = 8
PATCH = 14


def inputs(size: dict[str, Any], batch: int) -> dict[str, np.ndarray]:
    """Returns the same random inputs on both sides."""
    rng = np.random.default_rng(batch)
    arrays: dict[str, np.ndarray] = {
        f"images/{c}": rng.uniform(-1, 1, (batch, size["image"], size["image"], 3)).astype(np.float32) for c in CAMERAS
    }
    arrays["state"] = rng.normal(size=(batch, size["action_dim"])).astype(np.float32)
    arrays["prompt"] = rng.integers(0, size["vocab"], (batch, size["prompt"]), dtype=np.int32)
    arrays["prompt_mask"] = np.arange(size["prompt"])[None] < rng.integers(2, size["prompt"], (batch, 1))
    arrays["actions"] = rng.normal(size=(batch, size["horizon"], size["action_dim"])).astype(np.float32)
    arrays["noise"] = rng.normal(size=arrays["actions"].shape).astype(np.float32)
    return arrays


# ---- What both sides measure with ------------------------------------------------------------------------------------


def measure(
    name: str, function: Any, args: tuple[Any, ...], *, chain: bool, seconds: float
) -> tuple[dict[str, float], Any]:
    """Compiles, then calls for some seconds. chain: the first output is the next first argument (a training state)."""
    import jax

    started = time.perf_counter()
    compiled = function.lower(*args).compile()
    compile_s = time.perf_counter() - started
    memory = compiled.memory_analysis()
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak -= memory.alias_size_in_bytes
    out = jax.block_until_ready(compiled(*args))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        if chain:
            args = (out[0], *args[1:])
        started = time.perf_counter()
        out = jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - started)
    row = {f"{name}, ms": 1e3 * statistics.median(times), f"{name}: compile, s": compile_s}
    return {**row, f"{name}: memory, MiB": peak / 2**20}, out


# ---- Ours ------------------------------------------------------------------------------------------------------------


def ours(size: dict[str, Any], kind: str, dtype: str, folder: Path, seconds: float) -> dict[str, Any]:
    import jax
    from flax import nnx

    from openpi_like.models.gemma import GemmaConfig
    from openpi_like.models.paligemma import PaliGemmaConfig
    from openpi_like.models.pi0 import Pi0Config
    from openpi_like.models.siglip import SiglipConfig
    from openpi_like.models.weights import bind, export_weights, flatten, unflatten
    from openpi_like.partition import ShardingRules
    from openpi_like.train.optimizer import OptimizerConfig
    from openpi_like.train.sharding import MeshConfig, put_batch
    from openpi_like.train.state import ModelDef, Trainer

    config = Pi0Config(
        backbone=PaliGemmaConfig(SiglipConfig(**size["vision"], patch_size=PATCH), GemmaConfig(**size["vlm"])),
        expert=GemmaConfig(**size["expert"]),
        cameras=CAMERAS,
        image_size=(size["image"],) * 2,
        state_dim=size["action_dim"],
        action_dim=size["action_dim"],
        action_horizon=size["horizon"],
        prompt_len=size["prompt"],
        vocab_size=size["vocab"],
        pi05=kind == "pi05",
        dtype=dtype,
        remat="nothing_saveable",  # as openpi has it
        train_on_padding=True,
    )

    def batch_of(B: int) -> dict[str, Any]:
        a = inputs(size, B)
        return {
            "images": {c: a[f"images/{c}"] for c in CAMERAS},
            "image_mask": {c: np.ones(B, bool) for c in CAMERAS},
            "state": a["state"],
            "state_mask": np.ones(a["state"].shape, bool),
            "prompt": a["prompt"],
            "prompt_mask": a["prompt_mask"],
            "actions": a["actions"],
            "action_mask": np.ones(a["actions"].shape, bool),
            "dataset_id": np.zeros(B, np.int32),
            "position": np.stack([np.zeros(B), np.arange(B)], axis=1).astype(np.uint32),
        }

    mesh = MeshConfig().create()
    trainer = Trainer(
        ModelDef(config), OptimizerConfig().create(), ema_decay=0.99, seed=0, mesh=mesh, rules=ShardingRules(),
        dataset_names=("bench",),
    )  # fmt: skip
    state = trainer.init()
    weights = jax.device_get(state.params)
    if not (folder / "ours.npz").exists():
        # Zero-initialised maps, such as adaptive norms, would hide differences.
        rng = np.random.default_rng(0)
        weights = jax.tree.map(lambda w: w + rng.normal(size=w.shape).astype(np.float32) * 0.02, weights)
        theirs = {name: make() for name, make in export_weights(config, flatten(weights), "openpi")}
        np.savez(folder / "theirs.npz", **theirs)  # type: ignore[arg-type]
        np.savez(folder / "ours.npz", **flatten(weights))
    else:
        with np.load(folder / "ours.npz") as stored:
            weights = unflatten(dict(stored))
    rows: dict[str, Any] = {}
    # As a server loads them.
    graph, served = nnx.split(bind(config, jax.tree.map(lambda w: jax.numpy.asarray(w, dtype), weights)).packed())
    for B in (1, 8):
        a, observation = (
            inputs(size, B),
            {k: v for k, v in batch_of(B).items() if "action" not in k and k not in ("dataset_id", "position")},
        )

        def sample(params: Any, observation: Any, noise: Any) -> Any:
            return nnx.merge(graph, params).sample_actions(jax.random.key(0), observation, noise=noise)

        args = jax.device_put((served, observation, a["noise"]))
        row, out = measure(f"sampling, batch {B}", jax.jit(sample), args, chain=False, seconds=seconds)
        rows |= row
        rows[f"actions {B}"] = np.asarray(out).tolist()
    state = trainer.init_from(jax.device_put(weights, trainer.shardings.params))
    batch = put_batch(batch_of(TRAIN_BATCH), mesh)
    row, _ = measure(
        f"train step, batch {TRAIN_BATCH}", trainer.train_step, (state, batch), chain=True, seconds=seconds
    )
    return rows | row


# ---- openpi ----------------------------------------------------------------------------------------------------------


class _Nothing(type):
    """The type of what stands in for an absent package's names: it can be subclassed, called and looked into."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name, (), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__


class AbsentPackages(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives an empty stand-in for packages that openpi imports at the top and that nothing here uses."""

    names: tuple[str, ...] = ("torch", "lerobot", "tensorflow", "tensorflow_datasets", "dlimp", "transformers")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        wanted = name.split(".")[0] in self.names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec: Any) -> types.ModuleType:
        class Stand(types.ModuleType):
            def __getattr__(self, attribute: str) -> Any:
                if attribute.startswith("__"):
                    raise AttributeError(attribute)
                return _Nothing(attribute, (), {})

        return Stand(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _nested(path: Path, dtype: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    with np.load(path) as stored:
        for name in stored.files:
            *parents, leaf = name.split("/")
            node = tree
            for key in parents:
                node = node.setdefault(key, {})
            node[leaf] = stored[name].astype(dtype)
    return tree


def openpi(size: dict[str, Any], kind: str, dtype: str, folder: Path, seconds: float) -> dict[str, Any]:
    sys.meta_path.append(AbsentPackages())  # after the real finders
    import flax.nnx as nnx
    import jax
    import jax.numpy as jnp
    import optax
    from openpi.models import gemma, model, pi0_config, siglip

    gemma.get_config = {
        "gemma_2b": gemma.Config(**size["vlm"]),
        "gemma_300m": gemma.Config(**size["expert"]),
    }.__getitem__
    gemma.PALIGEMMA_VOCAB_SIZE = size["vocab"]
    siglip.decode_variant = lambda variant: {**size["vision"], "patch_size": (PATCH, PATCH)}
    resolution = (size["image"],) * 2
    model.preprocess_observation.__kwdefaults__.update(image_keys=CAMERAS, image_resolution=resolution)
    model.IMAGE_RESOLUTION = resolution
    config = pi0_config.Pi0Config(
        dtype=dtype, action_dim=size["action_dim"], action_horizon=size["horizon"], max_token_len=size["prompt"],
        pi05=kind == "pi05",
    )  # fmt: skip

    def observation_of(B: int) -> Any:
        a = inputs(size, B)
        return model.Observation(
            images={c: jnp.asarray(a[f"images/{c}"]) for c in CAMERAS},
            image_masks={c: jnp.ones(B, bool) for c in CAMERAS},
            state=jnp.asarray(a["state"]),
            tokenized_prompt=jnp.asarray(a["prompt"]),
            tokenized_prompt_mask=jnp.asarray(a["prompt_mask"]),
        )

    rows: dict[str, Any] = {}
    # Its server loads all weights as bfloat16; in a float32 comparison they stay float32.
    served = config.load(_nested(folder / "theirs.npz", jnp.dtype(dtype)))
    graph, weights = nnx.split(served)
    for B in (1, 8):

        def sample(weights: Any, observation: Any, noise: Any) -> Any:
            return nnx.merge(graph, weights).sample_actions(jax.random.key(0), observation, num_steps=10, noise=noise)

        args = (weights, observation_of(B), jnp.asarray(inputs(size, B)["noise"]))
        row, out = measure(f"sampling, batch {B}", jax.jit(sample), args, chain=False, seconds=seconds)
        rows |= row
        rows[f"actions {B}"] = np.asarray(out).tolist()

    graph, weights = nnx.split(config.load(_nested(folder / "theirs.npz", jnp.dtype("float32"))))
    schedule = optax.warmup_cosine_decay_schedule(2.5e-8, 2.5e-5, 1000, 30_000, 2.5e-6)
    adamw = optax.adamw(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=1e-10)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    state = (weights, jax.tree.map(jnp.copy, weights), optimizer.init(weights), jnp.int32(0))

    def step(state: Any, observation: Any, actions: Any) -> Any:
        weights, average, moments, count = state
        key = jax.random.fold_in(jax.random.key(0), count)

        def loss_of(weights: Any) -> Any:
            return nnx.merge(graph, weights).compute_loss(key, observation, actions, train=False).mean()

        loss, gradient = jax.value_and_grad(loss_of)(weights)
        updates, moments = optimizer.update(gradient, moments, weights)
        weights = optax.apply_updates(weights, updates)
        average = jax.tree.map(lambda a, w: 0.99 * a + 0.01 * w, average, weights)
        norms = optax.global_norm(gradient), optax.global_norm(weights)
        return (weights, average, moments, count + 1), (loss, norms)

    batch = (observation_of(TRAIN_BATCH), jnp.asarray(inputs(size, TRAIN_BATCH)["actions"]))
    jitted = jax.jit(step, donate_argnums=0)
    row, _ = measure(f"train step, batch {TRAIN_BATCH}", jitted, (state, *batch), chain=True, seconds=seconds)
    return rows | row


# ---- The table -------------------------------------------------------------------------------------------------------


def worker(side: str, size: str, kind: str, dtype: str, folder: str, seconds: str) -> None:
    rows = {"ours": ours, "openpi": openpi}[side](SIZES[size], kind, dtype, Path(folder), float(seconds))
    rows["process: memory, MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print("RESULT " + json.dumps(rows))


@dataclasses.dataclass(frozen=True)
class Args:
    """Benchmarks our policies beside openpi's.

    openpi: a checkout. openpi_python: an interpreter that has openpi's dependencies; it may be ours. kind: pi0 or
    pi05. rounds: both sides are run once in each. seconds: each measurement runs at least this long.
    """

    openpi: Path
    openpi_python: Path
    sizes: tuple[str, ...] = ("tiny", "small")
    kind: str = "pi0"
    dtype: str = "float32"
    rounds: int = 3
    seconds: float = 4.0


def run_side(side: str, args: Args, size: str, folder: Path) -> dict[str, Any]:
    root = Path(__file__).parents[2]
    python = sys.executable if side == "ours" else str(args.openpi_python)
    client = args.openpi / "packages" / "openpi-client" / "src"
    paths = [root] if side == "ours" else [args.openpi / "src", client]
    command = [python, __file__, "worker", side, size, args.kind, args.dtype, str(folder), str(args.seconds)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "JAXTYPING_DISABLE": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


def main(args: Args) -> None:
    from rich.console import Console
    from rich.table import Table

    for size in args.sizes:
        found: dict[str, list[dict[str, Any]]] = {"ours": [], "openpi": []}
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(args.rounds):
                for side, results in found.items():
                    results.append(run_side(side, args, size, Path(folder)))
        table = Table(title=f"{args.kind}, {size}, {args.dtype}: medians of {args.rounds} rounds")
        for column in ("", "openpi", "ours", "openpi / ours"):
            table.add_column(column, justify="left" if not column else "right")
        names = [k for k, v in found["ours"][0].items() if isinstance(v, float)]
        for name in names:
            theirs, mine = (statistics.median(r[name] for r in found[side]) for side in ("openpi", "ours"))
            table.add_row(name, f"{theirs:.2f}", f"{mine:.2f}", f"{theirs / mine:.2f}")
        console = Console(width=120)
        console.print(table)
        for B in (1, 8):
            a, b = (np.array(found[side][0][f"actions {B}"]) for side in ("ours", "openpi"))
            console.print(
                f"actions of batch {B}: largest difference {np.abs(a - b).max():.2g} of {np.abs(b).max():.3g}"
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(*sys.argv[2:])
    else:
        import tyro

        main(tyro.cli(Args))
