"""Jobs of several programs: each step is one of the project's own, printed, timed, and skipped when it is done."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from openpi_like.child import ended_by_sigterm, run_program
from openpi_like.provenance import commit, provenance

# How a policy is served to simulators: the requests of two of their processes in one batch; and no state is refused,
# lest an episode that a policy drives astray ends the evaluation.
SIMULATED = ("--max-batch", "2", "--ranges.refuse", "None")

# What makes runs of the tiny pi0 shorter still, where only the parts have to fit together: one layer of each tower,
# which is traced and compiled in half the time, and few samples.
SHALLOW = (
    *("model.backbone.vision.depth=1", "model.backbone.vlm.depth=1", "model.expert.depth=1", "model.flow_draws=1"),
    *("batch_size=8", "validation_batch_size=8", "validation_batches=1"),
)


class Job:
    """Runs steps in order and remembers, in `<run>/<name>.json`, which are done and how long they took."""

    def __init__(self, run: Path, name: str, console: Console) -> None:
        self.run, self.name, self.record_path, self._console = run, name, run / f"{name}.json", console
        run.mkdir(parents=True, exist_ok=True)
        self.record: dict[str, Any] = {"seconds": {}, "commands": {}, "done": []}
        if self.record_path.is_file():
            self.record = json.loads(self.record_path.read_text())
        self._from = provenance(Path(__file__).resolve().parents[1])
        self.record |= {key: self._from[key] for key in ("hardware", "date")}

    def origin(self) -> dict[str, Any]:
        """Returns where what its steps made comes from: see `provenance`, with the time of each step in seconds, and
        all commits at which steps ran, of one that was interrupted the last."""
        known = self.record.get("commits", {})
        commits = sorted({known.get(name, "unknown") for name in self.record["done"]})
        return {**self._from, "commits": commits, "seconds": self.record["seconds"]}

    def save(self) -> None:
        temporary = self.record_path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.record, indent=1))
        os.replace(temporary, self.record_path)

    def step(self, name: str, *commands: list[str], server: list[str] | None = None) -> None:
        """Runs the commands one after another, with a policy server beside them when one is given."""
        shown = [*([server] if server else []), *commands]
        text = "\n".join(shlex.join(["python", *c]) for c in shown)
        if self.record["commands"].get(name, text) != text:
            raise SystemExit(
                f"{self.run} holds another {self.name}: its step {name!r} was\n{self.record['commands'][name]}\n"
                f"and would now be\n{text}\nremove the directory, or give another one with --run"
            )
        if name in self.record["done"]:
            self._console.print(f"[green]done before[/] {name} ({self.record['seconds'][name]:.0f} s)")
            return
        self._console.rule(f"[bold]{name}")
        for line in text.splitlines():
            self._console.print(f"[dim]$ {line}", soft_wrap=True)
        self.record["seconds"].setdefault(name, 0.0)
        self.record["commands"][name] = text
        self.record.setdefault("commits", {})[name] = commit(self._from)
        started = time.perf_counter()
        try:
            with ended_by_sigterm(), _policy_server(server) if server else contextlib.nullcontext():
                for command in commands:
                    if status := run_program(command):
                        raise SystemExit(f"step {name!r}: {command[0]} ended with status {status}, see above")
        finally:
            # Time of interrupted tries counts too.
            self.record["seconds"][name] += time.perf_counter() - started
            self.save()
        self.record["done"].append(name)
        self.save()


@contextlib.contextmanager
def _policy_server(command: list[str]) -> Iterator[None]:
    """Starts a policy server, waits until it has compiled and listens, and stops it at the end."""
    port_file = Path(command[command.index("--port-file") + 1])
    port_file.unlink(missing_ok=True)
    process = subprocess.Popen([sys.executable, *command])
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
