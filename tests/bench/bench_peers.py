"""Peers on the same demonstrations, for the same wall time on the same cores, driven in the same suite:

    make benchmark
    python tests/bench/bench_peers.py runs/benchmark --minutes 20 --lerobot-python ~/lerobot/bin/python
    python tests/bench/bench_peers.py runs/benchmark --minutes 20 --only openpi_pi0 --openpi ~/openpi \
        --openpi-python ~/openpi/.venv/bin/python

Each is trained by its own code (LeRobot's lerobot-train; openpi's train step and optimiser), at sizes that two cores
train, served by its own policy class behind openpi's protocol, and driven by serve/evaluate.py. Weights are drawn fresh
everywhere. Two short runs of each say how long it takes to start and how long a step takes; of that follows how many
steps there is time for, over which the rate of learning falls. What it took is measured in the run itself.

Sizes and rates are those of `PEERS`. Where a recipe's own rate is for weights that were trained before, or for days, it
is larger here, and said. Ours was chosen in studies of this project, on three like tasks; theirs were not searched.
LeRobot's execute 4 actions of a chunk, the others 2. LeRobot's diffusion looks at one observation instead of two, since
a server of chunks sees no more. openpi's samples are in memory, not in a loader. lerobot 0.4.4's own pi0 needs a fork
of transformers, so pi0 is openpi's. Environments are made as serve/lerobot_bridge.py, bench_models.py and octo_side.py
say.
"""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from openpi_like.config import load_run, near_names
from openpi_like.models.weights import weight_shapes
from openpi_like.robots.sims import make_sim
from openpi_like.serve.results import TRAINING
from tests.bench.bench_other_servers import environment, free_port, openpi_sizes_of, run, running, wait_for

ROOT = Path(__file__).resolve().parents[2]
SIDE = Path(__file__).with_name("peers_side.py")
CONFIG = "configs/mt10.py"
SUITE = "metaworld_mt10"
BATCH = 32  # of openpi
SHORT = (20, 60)  # steps of the two runs that say how long one takes


@dataclasses.dataclass(frozen=True)
class Args:
    """Peers on the same demonstrations. run: of `make benchmark`, whose data it takes; all that is made goes there.

    minutes: of training, for each. only: of `PEERS`; default all whose environment is given. cores: all programs'.
    lerobot_python, octo_python: of their environments. openpi, openpi_python: a checkout, and its environment.
    episodes: of each task, default as the suite says. steps: instead of as many as there is time for.
    """

    run: Annotated[Path, tyro.conf.Positional]
    minutes: float = 20.0
    only: tuple[str, ...] = ()
    cores: int = 2
    lerobot_python: Path | None = None
    openpi: Path | None = None
    openpi_python: Path | None = None
    octo_python: Path | None = None
    episodes: int | None = None
    steps: int | None = None


@dataclasses.dataclass(frozen=True)
class Peer:
    """One that is trained and driven.

    needs: arguments without which it is not. what: said beside its numbers. prepare: makes what its training reads.
    train: (steps, where) -> command. serve: (where it was trained, port) -> command. sizes: of where it was trained ->
    weights and batch size.
    """

    needs: tuple[str, ...]
    what: str
    prepare: Callable[[Args], None]
    train: Callable[[Args, int, Path], list[Any]]
    serve: Callable[[Args, Path, int], list[Any]]
    sizes: Callable[[Path], tuple[int, int]]
    execute_steps: int | None = None


# ---- Ours ------------------------------------------------------------------------------------------------------------


def ours_train(args: Args, steps: int, where: Path) -> list[Any]:
    data = [f"data.entries.0.path={args.run}/data/sawyer_sim/1.0.0", f"stats={args.run}/stats"]
    length = [
        f"steps={steps}",
        f"optimizer.decay_steps={max(steps, 200)}",
        f"validate_every={steps}",
        f"save_every={steps}",
    ]
    return [
        sys.executable,
        "train/train.py",
        CONFIG,
        f"run_dir={where}",
        f"tokenizer={args.run}/text.model",
        *data,
        *length,
    ]


def ours_serve(args: Args, where: Path, port: int) -> list[Any]:
    return [
        sys.executable,
        "serve/policy_server.py",
        where,
        "--port",
        port,
        "--max-batch",
        2,
        "--ranges.refuse",
        "None",
    ]


def ours_sizes(where: Path) -> tuple[int, int]:
    config = load_run(CONFIG)
    return sum(int(leaf.size) for leaf in weight_shapes(config.model).values()), config.batch_size


# ---- LeRobot ---------------------------------------------------------------------------------------------------------


def lerobot_prepare(args: Args) -> None:
    """Converts the demonstrations, and writes the sizes of a small SmolVLA."""
    out = args.run / "peers" / "lerobot"
    if not out.is_dir():
        partial = out.with_name("lerobot.part")
        shutil.rmtree(partial, ignore_errors=True)
        demos = args.run / "data/sawyer_sim/1.0.0"
        convert = [sys.executable, "data/convert.py", demos, "--to", "lerobot", "--out", partial, "--split", "train"]
        run([*convert, "--fps", 20, "--videos", "none", "--leave-out", "episode_metadata/*"])
        partial.rename(out)
    (out.parent / "texts.json").write_text(json.dumps(texts()))
    run([args.lerobot_python, SIDE, "smolvla_sizes", out.parent / "texts.json", out.parent / "smol"])


def texts() -> list[str]:
    """Returns the instructions of the suite."""
    from openpi_like.robots.sims.metaworld_tasks import TASKS
    from openpi_like.robots.sims.suites import suite_of

    return sorted({text for task in suite_of(SUITE).tasks["sawyer"] for text in TASKS[task].prompts})


def lerobot(what: str, batch: int, execute_steps: int, **policy: str) -> Peer:
    """Returns a policy of LeRobot. policy: options of lerobot-train; a `{run}` in them is the peers' folder."""

    def train(args: Args, steps: int, where: Path) -> list[Any]:
        folder = args.run / "peers"
        options = {k: v.format(run=folder) for k, v in policy.items()}
        if "scheduler_decay_steps" in policy:
            options["scheduler_decay_steps"] = str(steps)
        assert args.lerobot_python is not None
        return [
            args.lerobot_python.with_name("lerobot-train"),
            *("--dataset.repo_id=local/sawyer", f"--dataset.root={folder / 'lerobot'}"),
            *("--policy.device=cpu", "--policy.push_to_hub=false", "--eval_freq=0", "--wandb.enable=false"),
            *(f"--batch_size={batch}", "--num_workers=0", f"--steps={steps}", f"--save_freq={steps}", "--log_freq=50"),
            *(f"--policy.{k}={v}" for k, v in options.items()),
            f"--output_dir={where}",
        ]

    def serve(args: Args, where: Path, port: int) -> list[Any]:
        checkpoint = where / "checkpoints/last/pretrained_model"
        return [args.lerobot_python, SIDE, "lerobot_serve", checkpoint, handshake(args, execute_steps), port]

    def sizes(where: Path) -> tuple[int, int]:
        stored = where / "checkpoints/last/pretrained_model/model.safetensors"
        head = stored.read_bytes()[: 8 + int.from_bytes(stored.open("rb").read(8), "little")][8:]
        tensors = {k: v for k, v in json.loads(head).items() if k != "__metadata__" and "normalize" not in k}
        return sum(int(np.prod(t["shape"])) for t in tensors.values()), batch

    return Peer(("lerobot_python",), what, lerobot_prepare, train, serve, sizes)


# ---- openpi ----------------------------------------------------------------------------------------------------------


def openpi_prepare(args: Args) -> None:
    """Writes all samples as openpi's transforms leave them, the sizes, and the tokens of the instructions.

    States and actions are those of the robot, as a dataset of LeRobot has them; how we encode grippers is undone.
    """
    out = args.run / "peers" / "openpi"
    if (out / "about.json").is_file():
        return
    from openpi_like.config import override
    from openpi_like.data.dataset import open_dataset
    from openpi_like.data.loader import make_loader
    from openpi_like.data.stats import load_normalization
    from openpi_like.data.text import TextTokenizer, read_tokenizer

    run = override(
        load_run(CONFIG),
        (f"data.entries.0.path={args.run}/data/sawyer_sim/1.0.0", f"tokenizer={args.run}/text.model"),
    )
    config: Any = run.model
    (entry,) = run.data.entries
    robot = entry.robot
    normalization = load_normalization(args.run / "stats/sawyer.json", robot)
    numbers = np.arange(robot.state_size, dtype=np.float32)
    if any(f.relative_to is not None for f in robot.action) or not np.array_equal(robot.encode_state(numbers), numbers):
        raise SystemExit("this needs a state as the robot has it, and actions that are relative to nothing")
    assert run.tokenizer is not None
    tokenizer = TextTokenizer.of_policy(read_tokenizer(run.tokenizer), config)
    dataset = open_dataset(entry.path, robot, entry.split)
    frames = len(dataset)
    dataset.close()
    loader = make_loader(
        run.data, batch_size=BATCH, policy=config, tokenizer=tokenizer, normalizations={robot.name: normalization}
    )
    (camera,) = config.cameras
    names = ("images", "state", "prompt", "prompt_mask", "actions")
    rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for _ in range(-(-frames // BATCH)):  # each frame once: an epoch is a permutation
        batch = next(loader)
        known = np.maximum(batch["action_mask"].any(-1).sum(-1), 1)
        last = np.minimum(np.arange(batch["actions"].shape[1]), known[:, None] - 1)
        # Past the end an action is repeated, as in LeRobot's dataset, which openpi reads.
        actions = np.take_along_axis(batch["actions"], last[..., None], axis=1)
        found = (batch["images"][camera], batch["state"], batch["prompt"], batch["prompt_mask"], actions)
        for name, value in zip(names, found, strict=True):
            rows[name].append(np.array(value))
    loader.close()
    whole = {name: np.concatenate(of)[:frames] for name, of in rows.items()}
    state = normalization.invert_state(whole["state"])
    actions = robot.decode_actions(normalization.invert_actions(whole["actions"]), state)
    whole |= {"state": state, "actions": actions}
    stats = {}
    for name in ("state", "actions"):
        every = whole[name].reshape(-1, whole[name].shape[-1])
        stats[name] = {"mean": every.mean(0), "std": every.std(0)}
        whole[name] = ((whole[name] - stats[name]["mean"]) / (stats[name]["std"] + 1e-6)).astype(np.float32)
    out.mkdir(parents=True, exist_ok=True)
    for name, values in whole.items():
        np.save(out / f"{name}.npy", values)
    about = openpi_sizes_of(config) | {
        "stats": {name: {k: v.tolist() for k, v in of.items()} for name, of in stats.items()},
        "tokens": {text: [x.tolist() for x in tokenizer.encode(text, None)] for text in texts()},
    }
    (out / "about.json").write_text(json.dumps(about))


def openpi_train(args: Args, steps: int, where: Path) -> list[Any]:
    return [args.openpi_python, SIDE, "openpi_train", args.openpi, args.run / "peers/openpi", where, steps]


def openpi_serve(args: Args, where: Path, port: int) -> list[Any]:
    data = args.run / "peers/openpi"
    return [args.openpi_python, SIDE, "openpi_serve", args.openpi, data, where, handshake(args, 2), port]


def openpi_sizes(where: Path) -> tuple[int, int]:
    with np.load(where / "weights.npz") as weights:
        return sum(int(weights[name].size) for name in weights.files), BATCH


# ---- octo ------------------------------------------------------------------------------------------------------------


def octo_prepare(args: Args) -> None:
    """Writes the instructions, of whose words its language is made."""
    (args.run / "peers" / "texts.json").write_text(json.dumps(texts()))


def octo_train(args: Args, steps: int, where: Path) -> list[Any]:
    data = (args.run / "data/sawyer_sim/1.0.0", args.run / "peers" / "texts.json")
    return [args.octo_python, SIDE.with_name("octo_side.py"), "train", *data, where, steps, 1e-3]


def octo_serve(args: Args, where: Path, port: int) -> list[Any]:
    return [args.octo_python, SIDE.with_name("octo_side.py"), "serve", where, handshake(args, 2), port]


def octo_sizes(where: Path) -> tuple[int, int]:
    about = json.loads((where / "about.json").read_text())
    return about["weights"], about["batch_size"]


# ---- All -------------------------------------------------------------------------------------------------------------

PEERS: Mapping[str, Peer] = {
    "pi0": Peer(
        (),
        "ours, configs/mt10.py; its rate was chosen in studies of this project",
        lambda args: None,
        ours_train,
        ours_serve,
        ours_sizes,
    ),
    "lerobot_act": lerobot(
        "ACT of LeRobot 0.4.4, ResNet-18 and a transformer of 128; rate 1e-4, ten times its own, not searched",
        8,
        4,
        type="act",
        pretrained_backbone_weights="null",
        dim_model="128",
        n_heads="4",
        dim_feedforward="256",
        n_encoder_layers="2",
        n_vae_encoder_layers="2",
        chunk_size="16",
        n_action_steps="16",
        optimizer_lr="1e-4",
        optimizer_lr_backbone="1e-4",
    ),
    "lerobot_diffusion": lerobot(
        "diffusion policy of LeRobot 0.4.4, its own rate, not searched; one observation, 10 DDIM steps",
        8,
        4,
        type="diffusion",
        down_dims="[64,128,256]",
        diffusion_step_embed_dim="64",
        n_obs_steps="1",
        horizon="16",
        n_action_steps="8",
        crop_shape="[56,56]",
        noise_scheduler_type="DDIM",
        num_inference_steps="10",
    ),
    "lerobot_smolvla": lerobot(
        "SmolVLA of LeRobot 0.4.4 at a width of 96, all of it trained; rate 1e-3, ten times its own, not searched",
        32,
        4,
        type="smolvla",
        vlm_model_name="{run}/smol",
        load_vlm_weights="false",
        resize_imgs_with_padding="[64,64]",
        num_vlm_layers="3",
        freeze_vision_encoder="false",
        train_expert_only="false",
        chunk_size="16",
        n_action_steps="16",
        tokenizer_max_length="24",
        optimizer_lr="1e-3",
        scheduler_warmup_steps="50",
        scheduler_decay_steps="0",
        scheduler_decay_lr="1e-5",
    ),
    "openpi_pi0": Peer(
        ("openpi", "openpi_python"),
        "openpi's own pi0 and train step, in the sizes of ours; AdamW, rate 1e-3, not searched",
        openpi_prepare,
        openpi_train,
        openpi_serve,
        openpi_sizes,
    ),
    "octo": Peer(
        ("octo_python",),
        "Octo (241fb35), a transformer of 1.8 M, see octo_side.py; rate 1e-3, three times its own, not searched",
        octo_prepare,
        octo_train,
        octo_serve,
        octo_sizes,
    ),
}


def handshake(args: Args, execute_steps: int) -> Path:
    """Returns a file with what a server says of the robot, as ours does."""
    sim = make_sim("sawyer")
    about = {
        "cameras": {c.name: [c.height, c.width] for c in sim.robot.cameras},
        "state": [[f.name, f.size, f.unit] for f in sim.robot.state],
        "execute_steps": execute_steps,
        "renderer": sim.renderer,
    }
    path = args.run / "peers" / f"handshake_{execute_steps}.json"
    path.write_text(json.dumps({"robots": {"sawyer": about}}))
    return path


def timed(command: Sequence[Any], cores: int, log: Path) -> tuple[float, float]:
    """Runs a program on the first cores; returns its seconds, and the most memory it had, in MB."""
    print("$", shlex.join(map(str, command)), flush=True)
    threads = {"OMP_NUM_THREADS": str(cores), "MKL_NUM_THREADS": str(cores), "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(word) for word in command],
            env=environment(**threads),
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            preexec_fn=lambda: os.sched_setaffinity(0, range(cores)),
        )
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"it ended with status {os.waitstatus_to_exitcode(status)}:\n{log.read_text()[-3000:]}")
    return time.perf_counter() - started, used.ru_maxrss / 1e3


def trained(name: str, args: Args) -> Path:
    """Trains a peer for the wall time that it has; returns where it is, and beside that `<name>.json` what it took."""
    peer, folder = PEERS[name], args.run / "peers"
    where, took = folder / name, folder / f"{name}.json"
    if took.is_file():
        return where
    peer.prepare(args)

    def run_of(steps: int) -> tuple[float, float]:
        shutil.rmtree(where, ignore_errors=True)
        return timed(peer.train(args, steps, where), args.cores, folder / f"{name}.log")

    steps = args.steps
    if steps is None:
        run_of(2)  # compiles, where that is kept
        short, longer = (run_of(n)[0] for n in SHORT)
        each = (longer - short) / (SHORT[1] - SHORT[0])
        start = short - SHORT[0] * each
        steps = max(int((60 * args.minutes - start) / each), SHORT[1])
        print(f"{name}: starts in {start:.1f} s, a step takes {each:.3f} s: {steps} steps", flush=True)
    seconds, memory = run_of(steps)
    weights, batch = peer.sizes(where)
    numbers = (seconds, args.cores, steps, batch, weights, memory)
    took.write_text(json.dumps({**dict(zip(TRAINING, numbers, strict=True)), "what": peer.what}, indent=1) + "\n")
    return where


def main(args: Args) -> None:
    if unknown := [name for name in args.only if name not in PEERS]:
        raise SystemExit(f"--only: {near_names(unknown[0], list(PEERS))}")
    folder = args.run / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    for name, peer in PEERS.items():
        missing = [f"--{need.replace('_', '-')}" for need in peer.needs if getattr(args, need) is None]
        if args.only and name not in args.only:
            continue
        if missing:
            print(f"{name}: not without {', '.join(missing)}", flush=True)
            continue
        where, port, log = trained(name, args), free_port(), folder / f"{name}.server.log"
        with running(peer.serve(args, where, port), log) as server:
            wait_for(port, server, log)
            drive: list[Any] = [sys.executable, "serve/evaluate.py", SUITE, "--policy", f"{name}_{args.minutes:g}_min"]
            drive += ["--port", port, "--out", args.run / "evaluation", "--training", folder / f"{name}.json"]
            run([*drive, "--films", 0, *([] if args.episodes is None else ["--episodes", args.episodes])])


if __name__ == "__main__":
    main(tyro.cli(Args))
