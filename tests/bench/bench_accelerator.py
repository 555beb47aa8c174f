"""What a machine with a GPU or TPU can do with the real sizes, in one command, in under nine minutes:

    python tests/bench/bench_accelerator.py --out accelerator.json

Latency of sampling (pi0 with 1 to 3 cameras; weights in bfloat16, int8 and float8), of pi0-FAST (the prompt, and per
token), samples/s, model FLOPs utilisation and memory of training (all weights; LoRA on a base in
bfloat16 and int8), the variants of attention, and a profile of training steps. Weights are drawn on the device; of real
ones the times are the same. Each part runs in a process of its own, so that its peak of memory is its own, and what
fails or takes too long costs no other part. `--size tiny` runs all of it on any machine, as the test suite does.

Records of others at batch 1, for 1, 2 and 3 views: FlashRT (FP8 kernels in CUDA) on an RTX 5090, pi0 18.4, 21.2 and
24.5 ms, pi0-FAST 11 ms and 2.39 ms a token; realtime-vla (Triton, bfloat16) 17.6, 24.0 and 31.9 ms there, 20.0, 27.3
and 36.8 ms on an RTX 4090.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
# Parts, in the order of what is wanted most, and the seconds that each may take: about what an H200 took, together as
# many as there are. Compiling is most of them.
PARTS = {
    "sampling, bfloat16": 100,
    "training, all weights": 125,
    "training, LoRA": 60,
    "pi0-FAST": 60,
    "sampling, int8": 50,
    "training, LoRA on int8": 55,
    "sampling, float8_e4m3fn": 45,
    "attention": 25,
}
# Cameras and batches of sampling.
SAMPLING = ((1, 1), (2, 1), (3, 1), (3, 8))
SAMPLING_IN_FEWER_BITS = ((1, 1), (3, 1))
# Batches of training, and what is computed again there (see `stack.remat_problem`).
KEEP_PRODUCTS = "dots_with_no_batch_dims_saveable"
TRAINING = {
    "all weights": ((8, "nothing_saveable"), (24, KEEP_PRODUCTS)),
    "LoRA": ((32, KEEP_PRODUCTS),),
    "LoRA on int8": ((32, KEEP_PRODUCTS),),
}


@dataclasses.dataclass(frozen=True)
class Args:
    """See the file's head. size: released or tiny. out: JSON with all numbers. profile: directory to keep profiles in.

    only: parts to run, default all. seconds: for everything; parts that would begin later are left out, and named.
    """

    out: Path | None = None
    size: Annotated[str, tyro.conf.arg(help="released or tiny")] = "released"
    only: tuple[str, ...] = ()
    seconds: float = 520.0
    profile: Path | None = None


# ---- Configs ---------------------------------------------------------------------------------------------------------


def tiny() -> dict[str, Any]:
    """Returns fields that compile in seconds."""
    from openpi_like.models.gemma import GemmaConfig
    from openpi_like.models.paligemma import PaliGemmaConfig
    from openpi_like.models.siglip import SiglipConfig

    return {
        "backbone": PaliGemmaConfig(
            SiglipConfig(width=32, depth=1, mlp_dim=64, num_heads=2, patch_size=16),
            GemmaConfig(width=32, depth=2, mlp_dim=64, num_heads=2, num_kv_heads=1, head_dim=16),
        ),
        "image_size": (32, 32),
        "vocab_size": 512,
        "state_dim": 4,
        "action_dim": 4,
        "action_horizon": 4,
        "prompt_len": 8,
        "dtype": "bfloat16",
        "remat": "nothing_saveable",
    }


def pi0(size: str, cameras: int) -> Any:
    from openpi_like.models.pi0 import Pi0Config

    if size == "tiny":
        return Pi0Config(**tiny(), expert=tiny()["backbone"].vlm, cameras=CAMERAS[:cameras])
    return dataclasses.replace(Pi0Config.released(), cameras=CAMERAS[:cameras])


def pi0_fast(size: str) -> Any:
    from openpi_like.batch import ActionTokens
    from openpi_like.models.pi0_fast import Pi0FastConfig

    if size == "tiny":
        tokens = ActionTokens(max_len=12, count=64, skip=0)
        return Pi0FastConfig(**tiny(), cameras=CAMERAS[:1], action_tokens=tokens)
    return Pi0FastConfig.released()


# ---- Measuring -------------------------------------------------------------------------------------------------------


def random_weights(shapes: Any, dtype: str | None = None) -> Any:
    """Returns arrays on the device, drawn there."""
    import jax
    import jax.numpy as jnp

    leaves, structure = jax.tree.flatten(shapes)

    @jax.jit
    def draw() -> list[Any]:
        keys = jax.random.split(jax.random.key(0), len(leaves))
        return [
            (0.02 * jax.random.normal(key, x.shape)).astype(dtype or x.dtype)
            if jnp.issubdtype(x.dtype, jnp.floating)
            else jnp.ones(x.shape, x.dtype)
            for key, x in zip(keys, leaves, strict=True)
        ]

    return jax.tree.unflatten(structure, draw())


def inputs(shapes: Any) -> Any:
    """Returns arrays on the host: nothing masked, every number one of its kind."""
    import jax
    import numpy as np

    rng = np.random.default_rng(0)

    def fill(x: Any) -> Any:
        if x.dtype == bool:
            return np.ones(x.shape, bool)
        if np.issubdtype(x.dtype, np.floating):
            return rng.standard_normal(x.shape, np.float32).astype(x.dtype)
        return rng.integers(0, 200, x.shape).astype(x.dtype)

    return jax.tree.map(fill, shapes)


def latencies(call: Callable[[], Any], *, seconds: float, least: int = 5) -> dict[str, float]:
    """Returns the median and the 95th percentile of a call, in ms, the transfer of what it returns included."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < least:
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return {"p50_ms": statistics.median(times), "p95_ms": statistics.quantiles(times, n=20)[-1], "calls": len(times)}


def queued(function: Any, args: tuple[Any, ...], calls: int = 20) -> dict[str, float]:
    """Returns the time of one of many calls that do not wait for each other: that of the device, without the host's."""
    import jax

    args = jax.device_put(args)
    jax.block_until_ready(function(*args))
    started = time.perf_counter()
    for _ in range(calls):
        out = function(*args)
    jax.block_until_ready(out)
    return {"queued_ms": 1e3 * (time.perf_counter() - started) / calls}


def _seconds(args: Args) -> float:
    return 2.0 if args.size == "released" else 0.2


def _fetched(function: Any, args: tuple[Any, ...]) -> Any:
    import numpy as np

    return np.asarray(function(*args))


def compiled_memory(compiled: Any) -> float:
    """Returns GiB by the compiler's account."""
    m = compiled.memory_analysis()
    total = m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return total / 2**30


def peak_memory() -> float | None:
    """Returns the most GiB in use so far in this process, where the device says."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else None


# ---- Parts: each yields rows -----------------------------------------------------------------------------------------


def sampling(args: Args, quantize: str | None) -> Iterator[dict[str, Any]]:
    import jax
    import numpy as np
    from flax import nnx

    from openpi_like.models.sampling import for_sampling

    shown = pi0(args.size, len(CAMERAS))
    graph, shapes = nnx.split(nnx.eval_shape(lambda: shown.create(jax.random.key(0))))
    # They do not depend on the number of cameras.
    model = for_sampling(nnx.merge(graph, random_weights(shapes, "bfloat16")), quantize=quantize)

    def compiled(case: tuple[int, int]) -> tuple[Any, tuple[Any, ...], float]:
        config, B = pi0(args.size, case[0]), case[1]
        graph, state = nnx.split(model)
        held, structure = jax.tree.flatten(state)

        def sample(held: Any, key: Any, observation: Any, mask: Any) -> Any:
            policy = nnx.merge(graph, jax.tree.unflatten(structure, held))
            policy.config = policy.backbone.config = config
            return policy.sample_actions(key, observation, action_mask=mask)

        observation = inputs(config.input_shapes(B, actions=False))
        mask = np.ones((B, config.action_horizon, config.action_dim), bool)
        call, started = (held, jax.random.key(0), observation, mask), time.perf_counter()
        return jax.jit(sample).lower(*call).compile(), call, time.perf_counter() - started

    cases = SAMPLING if quantize is None else SAMPLING_IN_FEWER_BITS
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:  # nothing is measured before all are done
        programs = list(pool.map(compiled, cases))
    for (cameras, B), (program, call, seconds) in zip(cases, programs, strict=True):
        row = {"what": "pi0 sampling", "cameras": cameras, "batch": B, "weights": quantize or "bfloat16"}
        row |= {"compile_s": seconds, "gib": compiled_memory(program)}
        yield (
            row | latencies(functools.partial(_fetched, program, call), seconds=_seconds(args)) | queued(program, call)
        )


def fast(args: Args) -> Iterator[dict[str, Any]]:
    """Prompt and tokens apart: the time of one token, and of many more."""
    import jax
    from flax import nnx

    from openpi_like.models.sampling import for_sampling

    config = pi0_fast(args.size)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: config.create(jax.random.key(0))))
    graph, state = nnx.split(for_sampling(nnx.merge(graph, random_weights(shapes, "bfloat16"))))
    weights, structure = jax.tree.flatten(state)
    observation = inputs(config.input_shapes(1, actions=False))
    found = {}
    for new in (1, 33) if args.size == "released" else (1, 5):

        def write(weights: Any, observation: Any, new: int = new) -> Any:
            """Writes tokens like `sample_actions` does, and never ends early."""
            policy = nnx.merge(graph, jax.tree.unflatten(structure, weights))
            x, cache = policy.backbone.prefill(observation, max_new=new)

            def body(i: Any, carry: Any) -> Any:
                x, cache, ids = carry
                token = policy.action_logits(x).argmax(-1).astype("int32")
                x, cache = policy.backbone.extend(config.tokens.first(config.vocab_size) - token, cache)
                return x, cache, ids.at[i].set(token[0])

            return jax.lax.fori_loop(0, new, body, (x, cache, jax.numpy.zeros(new, "int32")))[2]

        compiled = jax.jit(write).lower(weights, observation).compile()
        call = functools.partial(_fetched, compiled, (weights, observation))
        found[new] = latencies(call, seconds=_seconds(args))["p50_ms"]
    (one, first), (many, last) = found.items()
    per_token = (last - first) / (many - one)
    row = {"what": "pi0-FAST", "cameras": len(config.cameras), "batch": 1, "weights": "bfloat16", "tokens": many}
    sound = per_token > 0  # or what is measured is noise
    row |= {"prompt_ms": first - per_token, "token_ms": per_token} if sound else {"prompt_ms": None, "token_ms": None}
    yield row | {"first_token_ms": first, "chunk_ms": last}


def training(args: Args, name: str, trainable: Any) -> Iterator[dict[str, Any]]:
    import jax
    import numpy as np

    from openpi_like.partition import ShardingRules
    from openpi_like.train.fastest import fastest_attention
    from openpi_like.train.optimizer import OptimizerConfig
    from openpi_like.train.planning.chips import find_chip
    from openpi_like.train.planning.flops import model_flops
    from openpi_like.train.sharding import MeshConfig, put_batch
    from openpi_like.train.state import ModelDef, Trainer
    from openpi_like.train.watching.profiling import STEP

    chip = find_chip(jax.devices()[0])
    mesh = MeshConfig.fully_sharded().create()
    state: Any = None
    for B, remat in TRAINING[name] if args.size == "released" else ((8, KEEP_PRODUCTS),):
        same = {"what": f"pi0 training, {name}", "cameras": 3, "batch": B, "remat": remat}
        model = ModelDef(dataclasses.replace(pi0(args.size, 3), remat=remat), trainable)
        trainer = Trainer(
            model,
            OptimizerConfig().create(),
            ema_decay=0.99,
            seed=0,
            mesh=mesh,
            rules=ShardingRules(),
            dataset_names=("bench",),
        )
        shapes = model.config.batch_shapes(B)
        choices = fastest_attention(trainer.attention_sizes(shapes), mesh)  # as a run does
        trainer.attention = {choice.sizes: choice.name for choice in choices}
        for choice in choices:
            yield {"what": f"attention in training, {name}", "sizes": str(choice), "fastest": choice.name, **choice.ms}
        batch = put_batch(inputs(shapes) | {"dataset_id": np.zeros(B, np.int32)}, mesh)
        started, flops = time.perf_counter(), model_flops(model)
        try:
            compiled = trainer.train_step.lower(trainer.abstract, batch).compile()
            row: dict[str, Any] = {**same, "compile_s": time.perf_counter() - started}
            state = trainer.init() if state is None else state
            state, values = compiled(state, batch)
            loss = float(values["loss"])
            times: list[float] = []
            until = time.perf_counter() + (5.0 if args.size == "released" else 0.5)
            while time.perf_counter() < until or len(times) < 4:
                started = time.perf_counter()
                state, values = compiled(state, batch)
                jax.block_until_ready(values)
                times.append(time.perf_counter() - started)
        except Exception as e:  # out of memory, in as many words as there are backends
            yield {**same, "failed": str(e).strip().split("\n")[0][:300]}
            return
        step = statistics.median(times)
        mfu = None if chip is None else B * flops / step / (chip.tflops * 1e12 * jax.device_count())
        row |= {"step_ms": 1e3 * step, "samples_per_s": B / step, "mfu": mfu, "model_tflop_a_sample": flops / 1e12}
        row |= {"gib": compiled_memory(compiled), "peak_gib": peak_memory(), "loss": loss}
        yield row
        with tempfile.TemporaryDirectory() as folder:
            kept = Path(folder) if args.profile is None else args.profile / f"{name.replace(' ', '_')}_batch_{B}"
            with jax.profiler.trace(str(kept)):
                for i in range(3):
                    with jax.profiler.StepTraceAnnotation(STEP, step_num=i):
                        state, values = compiled(state, batch)
                        jax.block_until_ready(values)  # or it would be done after the step is over
            yield {"what": f"where a step goes, {name}", "batch": B, **where_it_goes(kept)}


def where_it_goes(trace: Path) -> dict[str, Any]:
    """Returns milliseconds of a step from its trace: all of it, the most of it by part and kind, and the idle time."""
    from openpi_like.train.watching.step_time import find_traces, step_time

    found = step_time(find_traces(trace))
    by: dict[str, float] = {}
    for part, seconds in found.parts.items():
        name = f"{part.scope[0] if part.scope else 'other'}, {part.kind}"
        by[name] = by.get(name, 0.0) + 1e3 * seconds
    most = dict(sorted(by.items(), key=lambda item: -item[1])[:12])
    return {"step_ms": 1e3 * found.total, "idle_ms": 1e3 * found.idle} | most


def attention(args: Args) -> Iterator[dict[str, Any]]:
    """Of sampling at batch 1; training measures its own."""
    import jax

    from openpi_like.models.attention import sizes_in
    from openpi_like.train.fastest import fastest_attention
    from openpi_like.train.sharding import MeshConfig
    from openpi_like.train.state import ModelDef

    config, mesh = pi0(args.size, 3), MeshConfig().create()
    model = ModelDef(config)
    sample = lambda w, o: model.bind(w).sample_actions(jax.random.key(0), o)  # noqa: E731
    served = sizes_in(sample, model.shapes, config.input_shapes(1, actions=False))
    for choice in fastest_attention(served, mesh, gradient=False):
        yield {"what": "attention in sampling, batch 1", "sizes": str(choice), "fastest": choice.name, **choice.ms}


def run_part(args: Args, part: str) -> Iterator[dict[str, Any]]:
    from openpi_like.models.lora import Lora
    from openpi_like.train.state import Trainable

    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "sampling, bfloat16": lambda: sampling(args, None),
        "sampling, int8": lambda: sampling(args, "int8"),
        "sampling, float8_e4m3fn": lambda: sampling(args, "float8_e4m3fn"),
        "pi0-FAST": lambda: fast(args),
        "training, all weights": lambda: training(args, "all weights", Trainable()),
        "training, LoRA": lambda: training(args, "LoRA", Trainable(Lora(), frozen_dtype="bfloat16")),
        "training, LoRA on int8": lambda: training(args, "LoRA on int8", Trainable(Lora(), frozen_dtype="int8")),
        "attention": lambda: attention(args),
    }
    yield from parts[part]()


# ---- All of them -----------------------------------------------------------------------------------------------------


def start_part(args: Args, part: str, seconds: float) -> tuple[list[dict[str, Any]], str | None]:
    """Returns the rows of a part, run in a process of its own, and what went wrong, if anything did."""
    profile = "" if args.profile is None else str(args.profile)
    command = [sys.executable, str(Path(__file__).resolve()), "worker", part, args.size, profile]
    # Memory as it is needed, so that its peak says something; compiled programs are kept for the next time.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=seconds)
        problem = None if process.returncode == 0 else f"ended with {process.returncode}: {err.strip()[-600:]}"
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        problem = f"took more than {seconds:.0f} s"
    return [json.loads(line[4:]) for line in out.splitlines() if line.startswith("ROW ")], problem


def show(rows: list[dict[str, Any]], console: Console) -> None:
    for what in dict.fromkeys(row["what"] for row in rows):
        of = [{k: v for k, v in row.items() if k != "what"} for row in rows if row["what"] == what]
        columns = list(dict.fromkeys(k for row in of for k in row))
        table = Table(*columns, title=what)
        for row in of:
            cells = (row.get(c) for c in columns)
            table.add_row(*("" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells))
        console.print(table)


def worker(part: str, size: str, profile: str) -> None:
    """A process of this program, for one part."""
    from openpi_like.train.compile_cache import use_compile_cache

    use_compile_cache(None)
    for row in run_part(Args(size=size, profile=Path(profile) if profile else None), part):
        print("ROW " + json.dumps(row), flush=True)


def main(args: Args) -> int:
    unknown = sorted(set(args.only) - set(PARTS))
    if unknown or args.size not in ("released", "tiny"):
        sys.exit(f"got only={unknown}, size={args.size!r}; parts are {list(PARTS)}, sizes released and tiny")
    console, started = Console(width=160), time.perf_counter()
    probe = "import jax; d = jax.devices(); print(len(d), d[0].platform, d[0].device_kind, jax.__version__, sep='|')"
    asked = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    if asked.returncode:
        sys.exit(f"jax does not start here:\n{asked.stderr.strip()[-2000:]}")
    machine = asked.stdout.strip()
    count, platform, kind, version = machine.splitlines()[-1].split("|")
    result: dict[str, Any] = {"devices": int(count), "platform": platform, "kind": kind, "jax": version}
    result |= {"size": args.size, "rows": [], "problems": {}}
    console.print(f"{count} x {kind} ({platform}), jax {version}, {args.size} sizes")
    for part in args.only or PARTS:
        left = args.seconds - (time.perf_counter() - started)
        if left < min(30, PARTS[part]):
            result["problems"][part] = "no time was left for it"
            continue
        rows, problem = start_part(args, part, min(left, PARTS[part]) if args.size == "released" else 120)
        result["rows"] += rows
        if problem is not None:
            result["problems"][part] = problem
        if args.out is not None:  # after every part: whatever ends this program, what was measured stays
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result["rows"], console)
    for part, problem in result["problems"].items():
        console.print(f"{part}: {problem}", style="red", markup=False)
    console.print(f"{time.perf_counter() - started:.0f} s in all")
    return int(bool(result["problems"]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(*sys.argv[2:])
    else:
        sys.exit(main(tyro.cli(Args)))
