"""Other servers driven by serve/evaluate.py: openpi's, and LeRobot's behind serve/lerobot_bridge.py.

    git clone https://github.com/Physical-Intelligence/openpi ~/openpi      # and its environment, as it says
    python tests/bench/bench_other_servers.py openpi runs/full/finetune_aloha --suite aloha --dialect openpi_aloha \
        --openpi ~/openpi --openpi-python ~/openpi/.venv/bin/python
    python tests/bench/bench_other_servers.py lerobot --python ~/lerobot/bin/python --work /tmp/act

`openpi`: one checkpoint behind serve/policy_server.py; in openpi's server, behind a function of the keys of its
examples; and, where openpi's environment is given, its weights in openpi's own model, with openpi's own transforms, in
openpi's server. The same layouts; noise, and how pictures are resized, differ.

`lerobot`: demonstrations of PushT, converted, train LeRobot's ACT for some steps (lerobot-train; it learns nothing in
so few), which LeRobot's server serves. Beside it, how far a chunk is from what the policy says when it is asked
directly, in LeRobot's own environment. That one is made as lerobot_bridge.py says.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
SIDE = Path(__file__).with_name("other_servers_side.py")
LEFT_OUT = "episode_metadata/*"  # what LeRobot's layout cannot hold
ACT = {
    "type": "act", "device": "cpu", "push_to_hub": "false", "pretrained_backbone_weights": "null", "dim_model": 128,
    "n_heads": 4, "dim_feedforward": 256, "n_encoder_layers": 2, "n_vae_encoder_layers": 2, "chunk_size": 16,
    "n_action_steps": 16,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OpenPi:
    """One checkpoint behind our server and in openpi's.

    checkpoint: of a pi0, for the third way. openpi: a checkout. openpi_python: of its environment. suite, dialect: see
    serve/evaluate.py. execute_steps: of a chunk, default as the robot says.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    openpi: Path
    openpi_python: Path | None = None
    suite: str = "pusht"
    dialect: str = "openpi_libero"
    execute_steps: int | None = None
    episodes: int = 4


@dataclasses.dataclass(frozen=True)
class LeRobot:
    """LeRobot's ACT, trained here for a moment. python: of its environment. work: what is made is kept there."""

    python: Path
    work: Path
    steps: int = 60
    demonstrations: int = 20
    execute_steps: int = 8
    episodes: int = 2


@dataclasses.dataclass(frozen=True)
class Served:
    """A server of this program itself: openpi's class around our policy, with keys as a dialect has them."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    openpi: Path
    robot: str
    dialect: str
    port: int


def environment(**more: str) -> dict[str, str]:
    """Returns that of the programs: no accelerator, no hub, a thread each, since they share the cores."""
    alone = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    return {**os.environ, "PYTHONPATH": str(ROOT), **alone, **more}


def run(command: Sequence[Any], **options: Any) -> None:
    print("$", *command, flush=True)
    subprocess.run([str(word) for word in command], env=environment(), check=True, **options)


@contextlib.contextmanager
def running(command: Sequence[Any], log: Path, **options: Any) -> Iterator[subprocess.Popen]:
    print("$", *command, flush=True)
    with log.open("w") as out:
        options = {"env": environment(), **options}
        process = subprocess.Popen([str(word) for word in command], stdout=out, stderr=subprocess.STDOUT, **options)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def wait_for(port: int, process: subprocess.Popen, log: Path) -> None:
    """Waits until something listens on a port."""
    while process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    raise SystemExit(f"the server ended:\n{log.read_text()[-3000:]}")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def evaluate(suite: str, policy: str, port: int, out: Path, episodes: int, *how: Any) -> None:
    run(
        [sys.executable, ROOT / "serve/evaluate.py", suite, "--policy", policy, "--port", port, "--out", out,
         "--episodes", episodes, "--workers", 1, "--films", 0, *how]
    )  # fmt: skip


def report(folder: Path, console: Console) -> None:
    """Prints a row for each policy of a suite's folder."""
    from openpi_like.serve.results import read_results

    table = Table("server", "success", "requests", "ms, median", "ms, 95 %")
    for name, episodes in read_results(folder).items():
        ms = [x for e in episodes.values() for x in e.latency_ms]
        done = f"{sum(e.success for e in episodes.values())} of {len(episodes)}"
        table.add_row(name, done, str(len(ms)), *(f"{np.percentile(ms, q):.1f}" for q in (50, 95)))
    console.print(table)


# ---- openpi ----------------------------------------------------------------------------------------------------------


class InTheirWords:
    """Our policy, asked with the keys of openpi's examples."""

    def __init__(self, policy: Any, robot: str, dialect: str) -> None:
        from openpi_like.serve.dialects import DIALECTS

        self._policy, self._robot, self._keys = policy, policy.robots[robot], DIALECTS[dialect]

    def infer(self, said: dict[str, Any]) -> dict[str, Any]:
        from openpi_like.data.images import fit

        keys: Any = self._keys
        found = {f"{k}/{inner}": x for k, v in said.items() if isinstance(v, dict) for inner, x in v.items()} | said
        images = {}
        for camera, key in zip(self._robot.cameras, keys.images, strict=False):
            picture = found[key].transpose(1, 2, 0) if keys.channels_first else found[key]
            images[camera.name] = np.empty((camera.height, camera.width, 3), np.uint8)
            fit(np.ascontiguousarray(picture), images[camera.name])
        state = np.asarray(found[keys.state], np.float32)
        prompt = {"prompt": found[keys.prompt], "robot": self._robot.name}
        return {"actions": self._policy.infer({"images": images, "state": state, **prompt})["actions"]}


def serve(args: Served) -> None:
    """Serves until it is ended."""
    from openpi_like.serve.policy import Policy
    from tests.bench.openpi_server import websocket_policy_server

    module = websocket_policy_server(args.openpi)
    policy = Policy.load(args.checkpoint)
    policy.warm_up()
    theirs = InTheirWords(policy, args.robot, args.dialect)
    module.WebsocketPolicyServer(theirs, host="127.0.0.1", port=args.port).serve_forever()


def openpi_sizes_of(config: Any) -> dict[str, Any]:
    """Returns the sizes of one of our pi0, as `other_servers_side.openpi_config` takes them."""
    fields = ("width", "depth", "mlp_dim", "num_heads")
    heads = (*fields, "num_kv_heads", "head_dim")
    return {
        "vision": {k: getattr(config.backbone.vision, k) for k in fields},
        "patch": config.backbone.vision.patch_size,
        "vlm": {k: getattr(config.backbone.vlm, k) for k in heads},
        "expert": {k: getattr(config.expert, k) for k in heads},
        "order": list(config.cameras),
        "image": config.image_size[0],
        "vocab": config.vocab_size,
        "prompt_len": config.prompt_len,
        "horizon": config.action_horizon,
        "action_dim": config.action_dim,
    }


def export(checkpoint: Path, robot_name: str, dialect: str, suite: str, out: Path) -> np.ndarray:
    """Writes a pi0 as openpi's model takes it, what its transforms need, and a request; returns our answer to that."""
    import jax

    from openpi_like.models.weights import export_weights, plan_load, read_weights
    from openpi_like.robots.sims import SIMS
    from openpi_like.robots.sims.suites import suite_of
    from openpi_like.serve.dialects import DIALECTS
    from openpi_like.serve.policy import Policy
    from openpi_like.train.checkpoints.load import load_policy_parts
    from openpi_like.train.checkpoints.warm_start import open_weights

    parts = load_policy_parts(checkpoint)
    assert parts.source is not None
    config: Any = parts.model.config
    robot = next(r for r in parts.robots if r.name == robot_name)
    keys: Any = DIALECTS[dialect]
    numbers = np.arange(robot.state_size, dtype=np.float32)
    normalization = parts.normalizations[robot.name]
    alike = np.array_equal(robot.encode_state(numbers), numbers) and robot.action_size == config.action_dim
    if not alike or normalization.mode != "zscore" or robot.action_horizon != config.action_horizon:
        raise SystemExit(f"robot {robot.name} is not one that openpi's own transforms suffice for; try aloha")
    arrays = open_weights(parts.source)
    weights = read_weights(arrays, plan_load(config, arrays, fmt="ours"), dtype="float32")
    theirs = {name: make() for name, make in export_weights(config, weights, "openpi")}
    np.savez(out / "weights.npz", **theirs)  # type: ignore[arg-type]
    prompts = importlib.import_module(f"openpi_like.robots.sims.{SIMS[robot.name].module}").PROMPTS
    said = [text for task in suite_of(suite).tasks[robot.name] for text in prompts[task]]
    tokens = {text: [x.tolist() for x in parts.tokenizer.encode(text, None)] for text in said}
    about = openpi_sizes_of(config) | {
        "cameras": {c: k for c, k in zip((c.name for c in robot.cameras), keys.images, strict=False)},
        "channels_first": keys.channels_first,
        "state": keys.state,
        "stats": {
            name: {"mean": of.mean, "std": of.std}
            for name, of in (("state", normalization.state), ("actions", normalization.action))
        },
        "relative": [f.relative_to is not None for f in robot.action for _ in range(f.size)],
        "tokens": tokens,
    }
    (out / "about.json").write_text(json.dumps(about))
    rng = np.random.default_rng(0)
    pictures: dict[str, Any] = {c: rng.integers(0, 256, (*config.image_size, 3), np.uint8) for c in about["cameras"]}
    state, noise = (
        np.array(normalization.state.mean, np.float32),
        rng.normal(size=(1, robot.action_horizon, robot.action_size)),
    )
    np.savez(out / "asked.npz", state=state, noise=noise[0], **pictures)
    request = Policy(parts).prepare({"images": pictures, "state": state, "prompt": said[0], "robot": robot.name})
    row = jax.tree.map(lambda x: np.asarray(x)[None], request.row)
    chunk = parts.model.sample_actions(jax.random.key(0), row, noise=noise)
    return robot.decode_actions(normalization.invert_actions(np.asarray(chunk)), state[None])[0]


def openpi(args: OpenPi, console: Console) -> None:
    from openpi_like.robots.sims.suites import suite_of
    from openpi_like.train.checkpoints.load import load_policy_parts

    (name,) = suite_of(args.suite).tasks
    robots = {r.name: r for r in load_policy_parts(args.checkpoint).robots}
    steps = args.execute_steps or robots[name].execute_steps
    asked = ("--dialect", args.dialect, "--execute-steps", steps)
    with tempfile.TemporaryDirectory() as directory:
        folder, log = Path(directory), Path(directory) / "log"
        port = free_port()
        ours = [sys.executable, ROOT / "serve/policy_server.py", args.checkpoint, "--port", port]
        with running(ours, log) as server:
            wait_for(port, server, log)
            evaluate(args.suite, "ours", port, folder, args.episodes, "--execute-steps", steps)
        port = free_port()
        words = ["served", args.checkpoint, "--openpi", args.openpi, "--robot", name, "--dialect", args.dialect]
        with running([sys.executable, __file__, *words, "--port", port], log) as server:
            wait_for(port, server, log)
            evaluate(args.suite, "ours_in_openpis_server", port, folder, args.episodes, *asked)
        if args.openpi_python is not None:
            ours_says = export(args.checkpoint, name, args.dialect, args.suite, folder)
            port = free_port()
            with running([args.openpi_python, SIDE, "openpi", args.openpi, folder, port], log) as server:
                wait_for(port, server, log)
                apart = np.abs(np.load(folder / "answered.npy") - ours_says).max()
                print(f"the same request and noise: actions at most {apart:.2g} apart from openpi's", flush=True)
                evaluate(args.suite, "openpi", port, folder, args.episodes, *asked)
        report(folder / args.suite, console)


# ---- LeRobot ---------------------------------------------------------------------------------------------------------


def lerobot(args: LeRobot, console: Console) -> None:
    work = args.work.absolute()
    data, act = work / "lerobot", work / "act"
    if not data.is_dir():
        count = ("--episodes-per-task", args.demonstrations, "--val-episodes-per-task", 1)
        run([sys.executable, ROOT / "data/make_demos.py", "--robot", "pusht", "--out", work / "demos", *count])
        run(
            [sys.executable, ROOT / "data/convert.py", work / "demos/pusht_sim/1.0.0", "--to", "lerobot", "--out", data,
             "--split", "train", "--fps", 10, "--videos", "none", "--leave-out", LEFT_OUT]
        )  # fmt: skip
    if not act.is_dir():
        train = [args.python.with_name("lerobot-train"), "--dataset.repo_id=local/pusht", f"--dataset.root={data}"]
        train += [f"--policy.{k}={v}" for k, v in ACT.items()]
        train += [f"--output_dir={act}", f"--steps={args.steps}", f"--save_freq={args.steps}", "--log_freq=10"]
        run([*train, "--batch_size=8", "--num_workers=0", "--eval_freq=0", "--wandb.enable=false"])
    checkpoint = act / "checkpoints/last/pretrained_model"
    port, front, log = free_port(), free_port(), work / "server.log"
    theirs = ["-m", "lerobot.async_inference.policy_server", "--host=127.0.0.1", f"--port={port}"]
    bridge = [ROOT / "serve/lerobot_bridge.py", checkpoint, "--server", f"127.0.0.1:{port}", "--port", front]
    with (
        running([args.python, *theirs, "--inference_latency=0"], log, cwd=work) as server,
        running([args.python, *bridge], work / "bridge.log") as bridging,
    ):
        wait_for(port, server, log)
        wait_for(front, bridging, work / "bridge.log")
        compare(args, checkpoint, front, work)
        asked = ("--dialect", "openpi_libero", "--execute-steps", args.execute_steps)
        evaluate("pusht", "lerobot_act", front, work / "results", args.episodes, *asked)
    report(work / "results/pusht", console)


def compare(args: LeRobot, checkpoint: Path, port: int, work: Path) -> None:
    """Prints how far a chunk through both servers is from that of the policy alone, for pictures of its size."""
    from openpi_client.image_tools import resize_with_pad
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    from openpi_like.robots.sims import make_sim

    sim = make_sim("pusht")
    sim.reset("push-t", 10_000)
    observation = sim.observe()
    picture = observation["images"]["base"]
    np.savez(work / "asked.npz", picture=picture, state=observation["state"], task=observation["prompt"])
    run([args.python, SIDE, "lerobot", checkpoint, work / "asked.npz", work / "answered.npy"])
    alone = np.load(work / "answered.npy")
    client = WebsocketClientPolicy("127.0.0.1", port)
    for name, sent in (("its own size", picture), ("224 pixels", np.asarray(resize_with_pad(picture, 224, 224)))):
        said = {"observation/image": sent, "observation/state": observation["state"], "prompt": observation["prompt"]}
        apart = np.abs(client.infer(said)["actions"] - alone).max()
        print(f"a picture of {name}: actions of {alone.shape} at most {apart:.2g} px from the policy's own", flush=True)
    client._ws.close()


def main(args: OpenPi | LeRobot | Served, console: Console) -> None:
    if isinstance(args, OpenPi):
        openpi(args, console)
    elif isinstance(args, LeRobot):
        lerobot(args, console)
    else:
        serve(args)


COMMANDS: dict[str, Any] = {"openpi": OpenPi, "lerobot": LeRobot, "served": Served}

if __name__ == "__main__":
    main(tyro.extras.subcommand_cli_from_dict(COMMANDS), Console(width=120))
