"""A new robot with a stop watch: every command of docs/new_robot.md, timed, and then whether the policy works.

    python3 -m venv ~/lerobot && ~/lerobot/bin/pip install lerobot==0.4.4 psutil
    python tests/bench/bench_new_robot.py /tmp/new_robot --pretrained runs/full/pretrain \
        --lerobot-python ~/lerobot/bin/python

A robot that the checkpoint has not seen, Fetch's arm in Meta-World's scenes, stands for a lab's: its expert records
demonstrations, and lerobot's own writer makes the dataset, in the lab's columns (millimetres, a gripper in percent) and
AV1 of 256 pixels. Then a fresh clone and environment. Blanks of the draft are filled in as a person would, one of them
wrong at first, to see whether the check finds it. At the end the server of the last command is asked through the
unmodified openpi-client, in those columns, on layouts that no demonstration has. With `--scratch`, once more from
nothing, as long. Steps that are done are not repeated, but the commands of the watch are.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import tyro
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.base_policy import BasePolicy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from openpi_like.robots.sims import make_sim
from openpi_like.robots.sims.sim import HELD_OUT_SEED, Sim
from openpi_like.serve.evaluation import wilson
from openpi_like.train.watching.metrics import read_metrics
from tests.bench.bench_other_servers import free_port, run, running, wait_for

ROOT = Path(__file__).resolve().parents[2]
SIDE = Path(__file__).with_name("lerobot_side.py")
ROBOT = "metaworld_fetch"
SIZE = 256
NAME = "fetch_table"
WRONG, RIGHT = "open=0.0, closed=100.0", "open=100.0, closed=0.0"  # of the gripper's state


@dataclasses.dataclass(frozen=True)
class Args:
    """See the file's head. work: folder for all of it. tasks, demonstrations: what is recorded, of each. steps: of
    fine-tuning. episodes: driven of each task. scratch: also from nothing.
    """

    work: Annotated[Path, tyro.conf.Positional]
    pretrained: Path
    lerobot_python: Path
    tasks: tuple[str, ...] = ("faucet-open", "plate-slide")  # with another arm, pretraining saw the first
    demonstrations: int = 25
    steps: int = 600
    episodes: int = 20
    scratch: bool = False


def dataset(args: Args) -> Path:
    """Returns the lab's dataset, made where it is not there yet."""
    done = args.work / NAME
    if done.is_dir():
        return done
    demos, raw = args.work / "demos", args.work / "episodes"
    make = ["data/make_demos.py", "--robot", ROBOT, "--out", demos, "--tasks", *args.tasks]
    counts = ["--episodes-per-task", args.demonstrations, "--val-episodes-per-task", 1]
    run([sys.executable, *make, *counts], cwd=ROOT)
    with multiprocessing.get_context("spawn").Pool(1) as other:  # TensorFlow and OpenGL crash each other
        other.apply(export, (demos, raw))
    shutil.rmtree(args.work / "being_written", ignore_errors=True)
    run([args.lerobot_python, SIDE, "lab", args.work / "being_written", raw])
    (args.work / "being_written").rename(done)
    shutil.rmtree(raw)
    return done


def export(demos: Path, raw: Path) -> None:
    """Writes a file for each demonstration, in the lab's columns."""
    import tensorflow_datasets as tfds

    raw.mkdir(exist_ok=True)
    builder = tfds.builder_from_directory(str(demos / f"{ROBOT}_sim" / "1.0.0"))
    for i, episode in enumerate(builder.as_dataset(split="train")):
        steps = list(tfds.as_numpy(episode["steps"]))
        images = np.stack([enlarged(step["observation"]["image"]) for step in steps])
        state = np.stack([to_lab(step["observation"]["state"]) for step in steps])
        action = np.stack([step["action"] for step in steps]).astype(np.float32)
        text = steps[0]["language_instruction"].decode()
        np.savez(raw / f"{i:03}.npz", images=images, state=state, action=action, task=text)


def enlarged(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)


def to_lab(state: np.ndarray) -> np.ndarray:
    """Returns a state in the lab's columns: x, y, z in millimetres, the gripper in percent open."""
    return (np.asarray(state, np.float64) * [1000, 1000, 1000, 100]).astype(np.float32)


class Lab(BasePolicy):
    """The served policy, asked in the lab's columns."""

    def __init__(self, policy: BasePolicy, sim: Sim) -> None:
        self._policy, self._sim = policy, sim

    def infer(self, obs: dict) -> dict:
        seen = self._sim.observe()
        images, state = {"base": enlarged(seen["images"]["base"])}, to_lab(seen["state"])
        reply = self._policy.infer({"images": images, "state": state, "prompt": seen["prompt"]})
        return {"actions": np.asarray(reply["actions"])}


def driven(args: Args, port: int) -> dict[str, int]:
    """Returns successes of each task, on layouts that no demonstration has."""
    client, sim, done = WebsocketClientPolicy("127.0.0.1", port), make_sim(ROBOT), dict.fromkeys(args.tasks, 0)
    execute = client.get_server_metadata()["robots"]["my_robot"]["execute_steps"]
    for task in args.tasks:
        for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + args.episodes):
            sim.reset(task, seed)
            client.infer({"reset": True, "seed": seed})
            policy = ActionChunkBroker(Lab(client, sim), action_horizon=execute)
            for _ in range(sim.max_steps):
                if sim.success:
                    break
                sim.step(policy.infer({})["actions"])
            done[task] += sim.success
    return done


# ---- The watch -------------------------------------------------------------------------------------------------------


class Watch:
    """Runs commands of a new user's shell, and keeps how long each took."""

    def __init__(self, folder: Path, rows: list[tuple[str, float]]) -> None:
        self._folder, self.rows = folder, rows
        # As of who has never run anything: no compiled functions, no packages.
        cache = {name: str(folder / "cache" / name) for name in ("OPENPI_LIKE_CACHE", "PIP_CACHE_DIR")}
        alone = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self._environment = {**alone, **cache}

    def run(self, shown: str) -> str:
        """Returns what a command prints."""
        print(f"$ {shown}", flush=True)
        started = time.perf_counter()
        command = shown.replace("python ", ".venv/bin/python ", 1) if (self._folder / ".venv").is_dir() else shown
        command = re.sub(r"^pip ", ".venv/bin/pip ", command)
        done = subprocess.run(
            shlex.split(command), cwd=self._folder, env=self._environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.rows.append((shown, time.perf_counter() - started))
        if done.returncode:
            raise SystemExit(f"{shown} ended with {done.returncode}:\n{done.stdout[-4000:]}")
        return done.stdout

    @contextlib.contextmanager
    def serving(self, shown: str, port: int) -> Iterator[None]:
        """Runs a server, from when it listens on."""
        log, started = self._folder / "server.log", time.perf_counter()
        command = [".venv/bin/python", *shlex.split(shown)[1:], "--port", str(port)]
        with running(command, log, cwd=self._folder, env=self._environment) as process:
            wait_for(port, process, log)
            self.rows.append((shown, time.perf_counter() - started))
            yield


def blanks(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text().split("\n") if '="?"' in line]


def fill_in(path: Path, gripper: str) -> None:
    """Fills in a draft's blanks as who knows the robot would. gripper: of the state, which has a wrong way."""
    state, action = path.read_text().split("    action=(")
    state = state.replace('unit="?"', 'unit="mm"').replace('open="?", closed="?"', gripper)
    action = action.replace('unit="?"', 'unit="1"').replace('command="?"', 'command="delta"')
    action = action.replace('open="?", closed="?"', "open=1.0, closed=-1.0")
    path.write_text(f"{state}    action=({action}")


REQUEST = """
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy

policy = WebsocketClientPolicy("localhost", {port})
image = np.full((256, 256, 3), 180, np.uint8)  # a robot gives its cameras' pictures
state = np.array([0.0, 600.0, 200.0, 100.0], np.float32)
reply = policy.infer({{"images": {{"base": image}}, "state": state, "prompt": "open the faucet"}})
print(reply["actions"].shape, reply["actions"][0].round(2))
"""


def main(args: Args, console: Console) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    data, clone, port = dataset(args), args.work / "openpi_like", free_port()
    for left in (clone, args.work / "cache", data / ".openpi_like_index"):
        shutil.rmtree(left, ignore_errors=True)
    watch = Watch(args.work, [])
    watch.run(f"git clone -q {ROOT} openpi_like")
    watch = Watch(clone, watch.rows)
    os.symlink(data.resolve(), clone / NAME)
    os.symlink(args.pretrained.resolve(), clone / "pretrain")
    watch.run("python -m venv .venv")
    watch.run("pip install -q -e .[train,formats]")
    watch.run(f"python data/draft_robot.py {NAME} --out my_robot.py")
    robot = clone / "my_robot.py"
    draft = robot.read_text()
    print("blanks:", *blanks(robot), sep="\n  ")
    check = f"python data/check_robot.py {NAME} --robot my_robot.py --out my_robot.html"
    fill_in(robot, WRONG)
    said = watch.run(check)
    print(*(line for line in said.split("\n") if "suspect" in line), sep="\n")
    if "nothing looks wrong" in said:
        raise SystemExit(f"the check has not found the wrong gripper:\n{said}")
    robot.write_text(draft)
    fill_in(robot, RIGHT)
    said = watch.run(check)
    if "nothing looks wrong" not in said:
        raise SystemExit(f"the check suspects what is right:\n{said}")
    every = max(args.steps // 6, 1)
    tune = f"python train/finetune.py my_robot.py {NAME} --from pretrain --fresh --steps {args.steps}"
    watch.run(f"{tune} --validate-every {every}")
    for line in read_metrics(clone / "runs" / "my_robot_full" / "metrics.jsonl"):
        if line.get("split") == "val":
            print({name: value for name, value in line.items() if name == "step" or name.startswith("action_error")})
    successes = {}
    with watch.serving("python serve/policy_server.py runs/my_robot_full --step best", port):
        watch.run("pip install -q --no-deps openpi-client")
        (clone / "ask.py").write_text(REQUEST.format(port=port))
        print(watch.run("python ask.py"))
        successes["fine-tuned"] = driven(args, port)
    took = list(watch.rows)
    if args.scratch:
        fresh = "run_dir=runs/scratch \"warm_start.reinitialize=('.*',)\""
        watch.run(f"python train/train.py runs/my_robot_full/config.py {fresh}")
        with watch.serving("python serve/policy_server.py runs/scratch --step best", port):
            successes["from scratch"] = driven(args, port)
    report(args, console, took, successes)


def report(args: Args, console: Console, took: list[tuple[str, float]], successes: dict[str, dict[str, int]]) -> None:
    table = Table("", "command", "seconds")
    for i, (shown, seconds) in enumerate(took):
        table.add_row(str(i + 1), escape(shown.replace(str(ROOT), "URL")), f"{seconds:.1f}")
    table.add_row("", "together", f"{sum(seconds for _, seconds in took):.0f}")
    console.print(table)
    table = Table("policy", *args.tasks, "all")
    for name, done in successes.items():
        n, whole = args.episodes, (sum(done.values()), args.episodes * len(done))
        low, high = wilson(*whole)
        cells = [f"{k}/{n}" for k in done.values()]
        table.add_row(name, *cells, f"{whole[0]}/{whole[1]} [{low:.2f}, {high:.2f}]")
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Args), Console(width=160))
