"""What more weights, demonstrations and steps are worth: fourteen runs, a curve, and what it says of a fifteenth.

    python train/scaling.py --run runs/scaling

Runs are those of configs/studies/scaling.py. The curve and what it says of the larger run are, with the date, in
`<run>/prediction.json` before that run is begun; what became of it is in `<run>/results.json` and `<run>/scaling.md`.
It can be stopped at any moment and goes on where it was.
"""

import dataclasses
import datetime
import json
import os
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from openpi_like.config import override
from openpi_like.job import SIMULATED, Job
from openpi_like.models.weights import weight_shapes
from openpi_like.provenance import provenance
from openpi_like.serve.evaluation import read_episodes, wilson
from openpi_like.train.scaling import PARTS, Run, fit, predict, success, success_of_loss
from openpi_like.train.watching.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
FILE = "configs/studies/scaling.py"
TASKS = ("button-press", "drawer-open", "window-close")


@dataclasses.dataclass(frozen=True)
class Args:
    """What more weights, demonstrations and steps are worth. run: directory for all that it makes. episodes: driven of
    each task and run. workers: simulator processes. set: overrides of every run.
    """

    run: Path = Path("runs/scaling")
    episodes: int = 20
    workers: int = 2
    set: tuple[str, ...] = ()


def outcome(folder: Path, name: str, config: Any) -> Run:
    """Returns what became of a run.

    Raises:
        ValueError: it has no held-out loss, or was not driven.
    """
    lines = read_metrics(folder / name / "metrics.jsonl")
    losses = [line["loss/sawyer"] for line in lines if line.get("split") == "val" and line["step"] == config.steps]
    driven = read_episodes(folder / f"{name}.jsonl")
    if not losses or not driven:
        raise ValueError(
            f"{folder / name}: {len(losses)} validations at step {config.steps}, {len(driven)} episodes, expected some "
            "of both; remove the directory to begin anew"
        )
    _, demonstrations, _ = sizes_of(name)
    weights = sum(int(leaf.size) for leaf in weight_shapes(config.model).values())
    done = (sum(e.success for e in driven), len(driven))
    return Run(weights, demonstrations, config.steps * config.batch_size, losses[-1], done)


def sizes_of(name: str) -> tuple[int, ...]:
    """Returns width, demonstrations and steps of a run of the file."""
    return tuple(int(part[1:]) for part in name.split("_"))


def row(name: str, run: Run) -> list[str]:
    low, high = wilson(*run.success) if run.success else (0.0, 1.0)
    driven = "" if run.success is None else f"{run.success[0]}/{run.success[1]} [{low:.2f}, {high:.2f}]"
    return [name, f"{run.weights / 1e6:.2f} M", str(run.demonstrations), f"{run.samples:,}", f"{run.loss:.4f}", driven]


def main(args: Args, console: Console) -> None:
    folder = args.run.resolve()
    os.chdir(ROOT)
    configs = {name: override(config, args.set) for name, config in runpy.run_path(FILE)["configs"].items()}
    *names, larger = configs
    job, data = Job(folder, "scaling", console), f"{folder}/data/sawyer_sim/1.0.0"

    # ---- 1. Demonstrations, statistics, words ------------------------------------------------------------------------
    most = max(sizes_of(name)[1] for name in configs)
    count = ["--episodes-per-task", str(most // len(TASKS)), "--val-episodes-per-task", "8"]
    make = ["data/make_demos.py", "--robot", "sawyer", "--out", f"{folder}/data", *count, "--tasks", *TASKS]
    job.step(
        "demonstrations",
        [*make, "--workers", str(args.workers)],
        ["data/stats.py", "--robot", "sawyer", "--data", data, "--out", f"{folder}/stats/sawyer.json"],
        ["data/fit_text.py", "--data", data, "--out", f"{folder}/text.model"],
    )

    # ---- 2. Runs, and drives with each -------------------------------------------------------------------------------
    def do(name: str) -> Run:
        sets = [f"data.entries.0.path={data}", f"stats={folder}/stats", f"tokenizer={folder}/text.model", *args.set]
        job.step(f"train {name}", ["train/train.py", f"{FILE}:{name}", f"run_dir={folder}/{name}", *sets])
        port = ["--port-file", f"{folder}/port"]
        drive = ["serve/rollout.py", "--robot", "sawyer", "--policy", "trained", "--tasks", *TASKS]
        drive += ["--episodes", str(args.episodes), "--out", f"{folder}/{name}.jsonl", *port]
        server = ["serve/policy_server.py", f"{folder}/{name}", "--port", "0", *port, *SIMULATED]
        job.step(f"drive with {name}", [*drive, "--workers", str(args.workers)], server=server)
        return outcome(folder, name, configs[name])

    runs = {name: do(name) for name in names}

    # ---- 3. What the larger run will be, before it is begun ----------------------------------------------------------
    before = folder / "prediction.json"
    if not before.is_file():
        if f"train {larger}" in job.record["commands"]:
            raise ValueError(f"{before} is gone and {larger} was begun: what is said now would not be said before it")
        weights = sum(int(leaf.size) for leaf in weight_shapes(configs[larger].model).values())
        sizes = np.array([weights, sizes_of(larger)[1], configs[larger].steps * configs[larger].batch_size], float)
        loss, low, high = predict(list(runs.values()), sizes)
        rate = success_of_loss(list(runs.values()))
        said = {"loss": loss, "interval": [low, high], "success": [success(rate, x) for x in (loss, high, low)]}
        curve = dataclasses.asdict(fit(list(runs.values())))
        at = {**provenance(ROOT), "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        temporary = before.with_suffix(".tmp")
        temporary.write_text(json.dumps({"of": larger, **at, **said, "curve": curve}, indent=1) + "\n")
        os.replace(temporary, before)
    prediction = json.loads(before.read_text())

    # ---- 4. The larger run, and the table ----------------------------------------------------------------------------
    runs[larger] = do(larger)
    head = ["run", *PARTS, "held-out loss", "success"]
    lines = [head, ["---"] * len(head), *(row(name, run) for name, run in runs.items())]
    low, high = prediction["interval"]
    rate, least, most_likely = prediction["success"]
    lines += [
        [
            f"{larger}, as was said on {prediction['date'][:10]} before",
            *([""] * 3),
            f"{prediction['loss']:.4f} [{low:.4f}, {high:.4f}]",
            f"{rate:.2f}, at the ends of that interval {least:.2f} and {most_likely:.2f}",
        ]
    ]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    (folder / "scaling.md").write_text(table + "\n")
    result = {"runs": {name: dataclasses.asdict(run) for name, run in runs.items()}, "prediction": prediction}
    about = " ".join((__doc__ or "").split("\n\n")[0].split())
    shown = {"file": FILE, "about": about, "table": [head, *lines[2:]], **job.origin()}
    (folder / "results.json").write_text(json.dumps({**shown, **result}, indent=1) + "\n")
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Args), Console(highlight=False, width=160))
