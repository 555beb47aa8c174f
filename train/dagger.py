"""DAgger in a simulator: a policy runs, an expert corrects it, the corrections join its data, and it is trained again:

    python train/dagger.py configs/demo_pretrain.py --start runs/demo/pretrain --robot sawyer --run runs/dagger \\
        --tasks window-open faucet-close --set stats=runs/demo/stats data.entries.0.path=runs/demo/data/sawyer_sim/1.0.0

A round: the policy drives layouts that evaluation does not use, through a real server; the expert takes over as
`--takeover` says (openpi_like.serve.takeover: in segments drawn at random, as in DAgger, and from some time on until
the end, as in HG-DAgger), and everything is recorded. What the expert did in episodes that it brought to success
becomes RLDS and joins the mixture with `--share` of the samples; training goes on from the policy's weights.
`--control` trains as many steps as all rounds together without the corrections. Before, after and control drive the
same held-out episodes.

It can be stopped at any moment: started again, it skips the finished steps and the interrupted one goes on. The table
is in RUN/dagger.md, numbers are in RUN/results.json.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from openpi_like.config import load_run, override
from openpi_like.data.rlds_writer import dataset_directory
from openpi_like.job import SIMULATED, Job
from openpi_like.robots.sims.sim import HELD_OUT_SEED
from openpi_like.serve.evaluation import read_episodes
from openpi_like.serve.takeover import TakeOver
from openpi_like.train.checkpoints.checkpoint import find_step
from openpi_like.train.dagger import Round, config_file, round_config
from openpi_like.train.study import study_rows

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Args:
    """DAgger in a simulator.

    config: the run that trained the policy, whose data are joined; set: its overrides. start: the policy's run, of
    which the best step is taken where it keeps the best, else the newest; or a checkpoint of it.
    robot: which simulated robot. run: directory for all that this makes. tasks: default `Sim.tasks`. rounds: how many.
    corrected: episodes per task and round. first_seed: of the first of their layouts. steps: of training per round.
    share: part of the samples that are corrections. episodes: per task, held out, to compare with. control: also train
    without corrections. workers: simulator processes.
    """

    config: Annotated[str, tyro.conf.Positional]
    start: Path
    robot: str
    run: Path
    set: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    rounds: int = 1
    corrected: int = 20
    first_seed: int = 5_000
    takeover: TakeOver = TakeOver()
    steps: int = 500
    share: float = 0.3
    episodes: int = 20
    control: bool = True
    workers: int = 2

    def __post_init__(self) -> None:
        problems = []
        if min(self.rounds, self.corrected, self.episodes) < 1:
            problems.append(
                f"rounds={self.rounds}, corrected={self.corrected}, episodes={self.episodes}, all from 1 on"
            )
        if not 0 <= self.first_seed <= HELD_OUT_SEED - self.rounds * self.corrected:
            problems.append(
                f"first_seed={self.first_seed}: layouts of {self.rounds} rounds of {self.corrected} episodes, expected "
                f"below {HELD_OUT_SEED}, from where on they are for evaluation"
            )
        if problems:
            raise ValueError("; ".join(problems))


def drive(job: Job, args: Args, name: str, checkpoint: str, *more: str) -> None:
    """Drives the simulator with the policy of a run, as a step of the job."""
    port = ["--port-file", str(args.run / f"{name}.port")]
    out = ["--out", str(args.run / f"{name}.jsonl"), "--workers", str(args.workers)]
    tasks = ["--tasks", *args.tasks] if args.tasks else []
    command = ["serve/rollout.py", "--robot", args.robot, *out, *port, *more, *tasks]
    job.step(
        name,
        command,
        server=["serve/policy_server.py", checkpoint, "--robot", args.robot, "--port", "0", *port, *SIMULATED],
    )


def train(job: Job, args: Args, name: str, of: Round) -> None:
    """Trains one round, from a config file that is kept with it."""
    path, text = args.run / f"{name}.py", config_file(args.config, args.set, of)
    if path.is_file() and path.read_text() != text:
        raise ValueError(f"{path} is of other options; remove {args.run}, or give another one with --run")
    path.write_text(text)
    job.step(name, ["train/train.py", str(path)])


def lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Returns the table, its head first."""
    tasks = list(rows[0]["tasks"])
    table = [["policy", *tasks, "all", "beside before", "p"]]
    for row in rows:
        cells = [
            f"{of['successes']}/{of['episodes']} [{of['interval'][0]:.2f}, {of['interval'][1]:.2f}]"
            for of in (*(row["tasks"][t] for t in tasks), row)
        ]
        beside = "[{:+.2f}, {:+.2f}]".format(*row["difference"]) if "difference" in row else ""
        table.append([row["arm"], *cells, beside, f"{row['p']:.2g}" if "p" in row else ""])
    return table


def main(args: Args, console: Console) -> None:
    config, start = str(Path(args.config).resolve()), args.start.resolve()
    args = dataclasses.replace(args, config=config, start=start, run=args.run.resolve())
    os.chdir(ROOT)  # where the steps' programs are
    before = override(load_run(args.config), args.set)
    if not (args.start / "contract").is_dir():  # a run: of one that ranks its steps, the best
        args = dataclasses.replace(args, start=find_step(args.start, "best" if before.keep.best else None))
    shown = Round(str(args.start), str(args.run), args.robot, args.steps, "recorded", args.share)
    # What cannot be trained is refused before anything runs.
    round_config(before, shown).normalizations()
    job = Job(args.run, "dagger", console)
    held_out = ("--policy", "trained", "--episodes", str(args.episodes))
    spool, data = args.run / "spool", args.run / "data"
    rule = [
        *("--takeover.share", str(args.takeover.share), "--takeover.segment", str(args.takeover.segment)),
        *("--takeover.late", str(args.takeover.late)),
    ]

    drive(job, args, "before", str(args.start), *held_out)
    policy, policies = str(args.start), ["before"]
    for r in range(args.rounds):
        first = str(args.first_seed + r * args.corrected)
        episodes = ("--episodes", str(args.corrected), "--first-seed", first, "--record", str(spool))
        drive(job, args, f"correct_{r + 1}", policy, "--policy", "corrected", *episodes, *rule)
        convert = ["serve/record.py", str(spool), "--out", str(data), "--robot", args.robot, "--name", "corrections"]
        job.step(f"convert_{r + 1}", convert)
        recorded = dataset_directory(data, "corrections", f"1.{r}.0")  # of this round and those before
        run_dir = str(args.run / f"trained_{r + 1}")
        of = dataclasses.replace(shown, start=policy, run_dir=run_dir, recorded=str(recorded))
        train(job, args, f"train_{r + 1}", of)
        policy = run_dir
        policies.append(f"round_{r + 1}")
        drive(job, args, policies[-1], policy, *held_out)
    if args.control:
        run_dir, steps = str(args.run / "trained_control"), args.rounds * args.steps
        of = dataclasses.replace(shown, run_dir=run_dir, steps=steps, recorded=None)
        train(job, args, "train_control", of)
        policies.append("control")
        drive(job, args, "control", run_dir, *held_out)

    found = {n: {(e.task, e.seed): e.success for e in read_episodes(args.run / f"{n}.jsonl")} for n in policies}
    rows = study_rows(found)
    corrected = [e for r in range(args.rounds) for e in read_episodes(args.run / f"correct_{r + 1}.jsonl")]
    rescued = sum(e.success for e in corrected)
    helped = sum(e.expert_steps for e in corrected)
    head, *body = lines(rows)
    table = Table(*head, title=f"DAgger, {args.robot}")
    for row in body:
        table.add_row(*row)
    console.print(table)
    said = (
        f"{len(corrected)} corrected episodes, {rescued} brought to success; the expert acted at {helped} steps. "
        f"{args.rounds} x {args.steps} steps of training, {args.share:.0%} of the samples corrections."
    )
    console.print(said)
    markdown = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]
    (args.run / "dagger.md").write_text("\n".join([*markdown, "", said]) + "\n")
    result = {**{k: job.record[k] for k in ("date", "hardware", "seconds")}, "rows": rows}
    result |= {"corrected": len(corrected), "rescued": rescued, "expert_steps": helped}
    (args.run / "results.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args), Console(width=200, highlight=False))
    except (ValueError, OSError) as e:
        sys.exit(f"no round: {e}")
