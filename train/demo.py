"""The main job, end to end, on simulated robots: what `make demo` runs.

Each step is one of the project's own programs; the exact command is printed, timed and put into the report. The demo
can be stopped at any moment: started again, it skips the finished steps and the interrupted one goes on where it was.
`DEMO_SCALE=full` makes more demonstrations and trains longer, into another directory.
"""

import contextlib
import datetime
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
SCALES: dict[str, dict[str, int]] = {
    "demo": {"sawyer": 40, "pusht": 60, "aloha": 25, "pretrain": 3000, "finetune": 900, "episodes": 20, "workers": 2},
    "full": {
        "sawyer": 100,
        "pusht": 300,
        "aloha": 100,
        "pretrain": 30000,
        "finetune": 8000,
        "episodes": 50,
        "workers": 2,
    },
}
CONSOLE = Console(highlight=False)


class Demo:
    """Runs steps in order and remembers, in `<run>/demo.json`, which are done and how long they took."""

    def __init__(self, run: Path) -> None:
        self.run, self.record_path = run, run / "demo.json"
        run.mkdir(parents=True, exist_ok=True)
        self.record = {"seconds": {}, "commands": {}, "done": []}
        if self.record_path.is_file():
            self.record = json.loads(self.record_path.read_text())
        self.record["hardware"] = {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version()}
        self.record["date"] = datetime.date.today().isoformat()

    def save(self) -> None:
        temporary = self.record_path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.record, indent=1))
        os.replace(temporary, self.record_path)

    def step(self, name: str, *commands: list[str], server: list[str] | None = None) -> None:
        """Runs the commands one after another, with a policy server beside them when one is given."""
        shown = [*([server] if server else []), *commands]
        text = "\n".join(shlex.join(["python", *c]) for c in shown)
        if name in self.record["done"] and self.record["commands"].get(name) == text:
            CONSOLE.print(f"[green]done before[/] {name} ({self.record['seconds'][name]:.0f} s)")
            return
        CONSOLE.rule(f"[bold]{name}")
        for line in text.splitlines():
            CONSOLE.print(f"[dim]$ {line}", soft_wrap=True)
        if self.record["commands"].get(name) != text:
            self.record["seconds"][name] = 0.0
        self.record["commands"][name] = text
        started = time.perf_counter()
        try:
            with _policy_server(server) if server else contextlib.nullcontext():
                for command in commands:
                    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        finally:
            # Time of interrupted tries counts too.
            self.record["seconds"][name] += time.perf_counter() - started
            self.save()
        self.record["done"] = [*(d for d in self.record["done"] if d != name), name]
        self.save()


@contextlib.contextmanager
def _policy_server(command: list[str]) -> Iterator[None]:
    """Starts a policy server, waits until it has compiled and listens, and stops it at the end."""
    port_file = ROOT / command[command.index("--port-file") + 1]
    port_file.unlink(missing_ok=True)
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    try:
        while not port_file.is_file():
            if process.poll() is not None:
                raise SystemExit(
                    f"the policy server ended with code {process.returncode} before it was ready, see above"
                )
            time.sleep(0.1)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    scale = os.environ.get("DEMO_SCALE", "demo")
    if scale not in SCALES:
        raise SystemExit(f"DEMO_SCALE={scale!r}, expected one of {', '.join(SCALES)}")
    n = SCALES[scale]
    run = f"runs/{scale}"
    demo = Demo(ROOT / run)
    robots = ("sawyer", "pusht", "aloha")
    data, stats, workers = f"{run}/data", f"{run}/stats", str(n["workers"])

    def train(config: str, name: str, *overrides: str) -> list[str]:
        return ["train/train.py", config, f"run_dir={run}/{name}", *overrides]

    def rollout(robot: str, policy: str, *more: str) -> list[str]:
        episodes = ["--episodes", str(n["episodes"]), "--workers", workers]
        out = ["--out", f"{run}/rollouts/{robot}_{policy}.jsonl"]
        return ["serve/rollout.py", "--robot", robot, "--policy", policy, *episodes, *out, *more]

    def drive(policy: str, trained: dict[str, tuple[str, ...]]) -> None:
        for checkpoint, robots in trained.items():
            port_file = f"{run}/{checkpoint}/port"
            server = ["serve/policy_server.py", f"{run}/{checkpoint}", "--port", "0", "--port-file", port_file]
            more = ["--port-file", port_file]
            frames = ["--frames-dir", f"{run}/frames"] if policy == "trained" else []
            commands = [rollout(robot, policy, *more, *frames) for robot in robots]
            demo.step(f"drive {', '.join(robots)} ({policy})", *commands, server=server)

    sets = [f"{data}/{robot}_sim/1.0.0" for robot in robots]
    for robot in robots:
        count = ["--episodes-per-task", str(n[robot]), "--workers", workers]
        demo.step(f"demonstrations of {robot}", ["data/make_demos.py", "--robot", robot, "--out", data, *count])
    demo.step(
        "statistics and text tokeniser",
        *(
            ["data/stats.py", "--robot", robot, "--data", path, "--out", f"{stats}/{robot}.json"]
            for robot, path in zip(robots, sets, strict=True)
        ),
        ["data/fit_text.py", "--data", *sets, "--out", f"{run}/text.model"],
    )
    steps = (f"steps={n['pretrain']}", f"optimizer.decay_steps={n['pretrain']}")
    paths = (f"stats={stats}", f"tokenizer={run}/text.model")
    demo.step("pretrain on sawyer and pusht", train("configs/demo_pretrain.py", "pretrain", *paths, *steps))
    steps = (f"steps={n['finetune']}", f"optimizer.decay_steps={n['finetune']}")
    start = f"warm_start.checkpoint={run}/pretrain"
    demo.step(
        "fine-tune to aloha", train("configs/demo_finetune_aloha.py", "finetune", f"stats={stats}", start, *steps)
    )
    demo.step(
        "untrained weights to compare with",
        train("configs/demo_pretrain.py", "untrained", *paths, "steps=0"),
        train("configs/demo_finetune_aloha.py", "untrained_aloha", *paths, "warm_start=None", "steps=0"),
    )
    drive("trained", {"pretrain": ("sawyer", "pusht"), "finetune": ("aloha",)})
    drive("untrained", {"untrained": ("sawyer", "pusht"), "untrained_aloha": ("aloha",)})
    demo.step("expert on the same goals", *(rollout(robot, "expert") for robot in robots))
    demo.step("report", ["serve/report.py", run])
    total = sum(demo.record["seconds"].values())
    CONSOLE.print(f"\n[bold]{run}/report.html[/] and {run}/report.json; {total / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
