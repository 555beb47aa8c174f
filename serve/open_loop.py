"""Asks a policy server for plans at recorded frames of simulated drives, and judges them: open loop.

    python serve/policy_server.py runs/driving/flow --port-file port &
    python serve/open_loop.py --data DATASET --port-file port --label flow --out open_loop/flow.jsonl

The two tables of the field, with intervals, and beside every number those of a car that goes on as it is, or stands
still, at the same frames, and of the driver's own plan. Run again after an interruption, it skips the frames that are
done. `--baselines-only` needs no server.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from openpi_like.config import near_names
from openpi_like.data.dataset import EpisodeDataset, open_dataset
from openpi_like.driving.open_loop import Against, RecordedDrives, judge
from openpi_like.driving.open_loop_scores import (
    BASELINES,
    CONSTANT_VELOCITY,
    CONVENTIONS,
    DRIVERS_PLAN,
    METRICS,
    STANDING_STILL,
    FrameResult,
    append_frame,
    read_frames,
    rows,
    shown,
)
from openpi_like.driving.planning_metrics import constant_velocity
from openpi_like.robots.ego_vehicle import ENTITIES
from openpi_like.robots.find import find_robot
from openpi_like.robots.robot import Robot
from openpi_like.serve.asked import asked_for, state_places
from openpi_like.serve.client import DeadlineError, PolicyClient, ServerError

_TASK = "episode_metadata/task"
_SHOWN_AS = {"l2": "L2, m", "collision": "collisions on the grid, %", "exact_collision": "collisions, exact, %"}


@dataclasses.dataclass(frozen=True)
class Args:
    """Asks a policy server for plans at recorded frames of simulated drives, and judges them.

    data: dataset of the simulated car, as data/make_demos.py writes it. out: JSONL file, one line per frame. label: of
    the policy, in results. frames: how many, evenly spaced over those whose truth is known up to 3 s; all, where there
    are fewer. against: what was driven from there, or the plan that is stored, the driver's own. port_file: read the
    port from this file, as the server writes it. baselines_only: asks no server. timeout_s: longest wait for an answer.
    reconnect_s: longest wait for a server that is not there.
    """

    data: Path
    out: Path
    label: str = ""
    split: str = "val"
    robot: str = "ego_vehicle"
    frames: int = 300
    against: Against = "driven"
    host: str = "127.0.0.1"
    port: int = 8000
    port_file: Path | None = None
    baselines_only: bool = False
    timeout_s: float = 60.0
    reconnect_s: float = 10.0

    def __post_init__(self) -> None:
        problems = []
        if self.baselines_only and self.label:
            problems.append(f"--label {self.label!r} with --baselines-only, which asks no policy; leave one out")
        if not self.baselines_only and self.label in ("", *BASELINES):
            problems.append(
                f"--label {self.label!r}, expected a name of the policy, not that of a baseline; or --baselines-only"
            )
        if self.frames < 1:
            problems.append(f"--frames {self.frames}, expected at least 1")
        if problems:
            raise ValueError("; ".join(problems))


class Asker:
    """Asks a server for the plans of recorded frames."""

    def __init__(self, client: PolicyClient, robot: Robot) -> None:
        """
        Raises:
            ValueError: the server does not serve the robot, or sees cameras or entities that it does not have.
        """
        robots = client.metadata["robots"]
        if robot.name not in robots:
            raise ValueError(
                f"the server does not serve robot {robot.name!r}; {near_names(robot.name, list(robots))}; set --robot, "
                "or serve another policy"
            )
        about, known = robots[robot.name], {c.name: c for c in robot.cameras}
        slots = {e.name: e for e in (*ENTITIES, *robot.entities)}
        cameras = about["cameras"]
        problems = [f"camera {name!r}; {near_names(name, list(known))}" for name in cameras if name not in known]
        problems += [
            f"entities {name!r} of {shape}; known: {[(s.name, [s.count, s.size]) for s in slots.values()]}"
            for name, shape in about.get("entities", {}).items()
            if name not in slots or list(shape) != [slots[name].count, slots[name].size]
        ]
        if not about.get("plans", False):
            problems.append("actions that are no plans, expected a policy trained on plans")
        try:
            state_places(about["state"], robot)
        except ValueError as e:
            problems.append(str(e))
        if problems:
            raise ValueError(f"the server's robot {robot.name!r} has what recorded drives lack: " + "; ".join(problems))
        self.robot = dataclasses.replace(robot, entities=tuple(slots[name] for name in about.get("entities", {})))
        self._client, self._about, self._cameras = client, about, [known[name] for name in cameras]
        # Which weights answer: a contract, and a step of its run.
        self.source = f"{client.metadata['contract']}, step {client.metadata['step']}"

    def ask(self, dataset: EpisodeDataset, frame: int) -> tuple[np.ndarray, float, str | None]:
        """Returns the plan of a frame, the milliseconds that it took, and what was written before it, if anything was.

        The answer depends on nothing but the frame: the conversation begins anew.

        Raises:
            ValueError: what came is not a plan.
        """
        at = np.array([frame])
        seen: dict[str, Any] = {
            "images": {camera.name: dataset.image(frame, camera) for camera in self._cameras},
            "state": dataset.state(at)[0],
            "prompt": dataset.prompts(at)[0],
        }
        seen["entities"] = {}
        for things in self.robot.entities:
            values, there = dataset.entities(at, things)
            seen["entities"][things.name] = values[0][there[0]]
        observation = asked_for(seen, self._about, self.robot)
        self._client.infer({"reset": True, "seed": frame})
        started = time.perf_counter()
        reply = self._client.infer(observation)
        took, plan = 1e3 * (time.perf_counter() - started), np.asarray(reply["actions"])
        expected = (self.robot.action_horizon, self.robot.robot_action_size)
        if plan.shape != expected or not np.isfinite(plan).all():
            raise ValueError(
                f"the server answered {dataset.where(frame)} with numbers of shape {plan.shape}, expected {expected}, "
                "finite; does it serve a policy of this robot?"
            )
        return plan.astype(np.float64), took, reply.get("thought")


def baselines(dataset: EpisodeDataset, frame: int) -> dict[str, np.ndarray]:
    """Returns the plans of `BASELINES` at a frame, by name."""
    at, horizon = np.array([frame]), dataset.robot.action_horizon
    names = [(f.name, i) for f in dataset.robot.state for i in range(f.size)]
    columns = [names.index(("velocity", i)) for i in (0, 1)]
    velocity = dataset.state(at)[:, columns].astype(np.float64)
    return {
        CONSTANT_VELOCITY: constant_velocity(velocity, horizon)[0],
        STANDING_STILL: np.zeros((horizon, 2)),
        DRIVERS_PLAN: dataset.actions(at)[0][0].astype(np.float64),
    }


def results(args: Args, dataset: EpisodeDataset, asker: Asker | None, frames: np.ndarray) -> Iterator[FrameResult]:
    """Asks at frames, and judges what comes."""
    drives = RecordedDrives(dataset, args.against)
    for frame in frames.tolist():
        at, truth = np.array([frame]), drives.truth(frame)
        plans = {"truth": truth.truth, **baselines(dataset, frame)}
        took, thought = None, None
        if asker is not None:
            plans[args.label], took, thought = asker.ask(dataset, frame)
        judged = judge(plans, truth)
        (episode,), (step,) = dataset.episodes_of(at).tolist(), dataset.steps(at).tolist()
        yield FrameResult(
            data=dataset.frames_digest(),
            label=args.label,
            source=None if asker is None else asker.source,
            episode=episode,
            step=step - int(dataset.index.episode_start[episode]),
            task=dataset.texts(_TASK, at)[0],
            against=args.against,
            valid=tuple(truth.valid.tolist()),
            truth=judged.pop("truth"),
            answers=judged,
            latency_ms=None if took is None else round(took, 3),
            thought=thought,
        )


def choose(args: Args, dataset: EpisodeDataset, console: Console) -> np.ndarray:
    """Returns the frames to ask at, evenly spaced."""
    whole = RecordedDrives(dataset, args.against).whole()
    if not len(whole):
        sys.exit(f"{dataset.index.split}: no frame has a truth that is known up to 3 s; record longer drives")
    left_out = len(dataset) - len(whole)
    count = min(args.frames, len(whole))
    console.print(f"{count} of {len(whole)} frames; {left_out} more are too near to the end of their drives")
    return whole[np.linspace(0, len(whole) - 1, count).round().astype(int)]


def still_to_do(
    args: Args, dataset: EpisodeDataset, source: str | None, frames: np.ndarray
) -> tuple[np.ndarray, set[tuple[int, int]]]:
    """Returns the frames that are not in the results yet, and the places, (episode, step), of all.

    Raises:
        ValueError: the results are of something else.
    """
    episodes = dataset.episodes_of(frames)
    steps = dataset.steps(frames) - dataset.index.episode_start[episodes]
    places = [(int(e), int(s)) for e, s in zip(episodes, steps, strict=True)]
    own = {"data": dataset.frames_digest(), "label": args.label, "against": args.against, "source": source}
    done = read_frames(args.out)
    for result in done:
        if wrong := {k: (getattr(result, k), v) for k, v in own.items() if getattr(result, k) != v}:
            raise ValueError(
                f"{args.out} holds other results (there, wanted): {wrong}; remove it, or give another --out"
            )
    known = {(r.episode, r.step) for r in done}
    if others := known - set(places):
        raise ValueError(
            f"{args.out} has {len(others)} frames that are not among these {len(places)}, asked with other --frames or "
            "another --split; remove it, or give another --out"
        )
    return frames[[place not in known for place in places]], set(places)


def tables(found: list[FrameResult], label: str) -> Iterator[Table]:
    """Returns the table of either convention: a row for each name and metric."""
    scored = rows(found, label)
    for convention, title in CONVENTIONS.items():
        table = Table("", "", "1 s", "2 s", "3 s", "avg", title=title, title_justify="left")
        for metric in METRICS:
            for row in scored:
                cells = [shown(number) for number in row["table"][convention][metric].values()]
                table.add_row(_SHOWN_AS[metric] if row is scored[0] else "", row["name"], *cells)
        yield table


def main(args: Args, console: Console) -> None:
    robot, asker, client = find_robot(args.robot), None, None
    if not args.baselines_only:
        port = int(args.port_file.read_text()) if args.port_file is not None else args.port
        try:
            client = PolicyClient(args.host, port, timeout_s=args.timeout_s, reconnect_s=args.reconnect_s)
        except ConnectionError as e:
            sys.exit(f"{e}; start serve/policy_server.py first, or give --baselines-only")
        asker = Asker(client, robot)
        robot = asker.robot
    dataset = open_dataset(args.data, robot, args.split)
    frames = choose(args, dataset, console)
    dataset.check_text(_TASK)
    todo, wanted = still_to_do(args, dataset, None if asker is None else asker.source, frames)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        answers = results(args, dataset, asker, todo)
        for result in track(answers, args.label or "baselines", total=len(todo), console=console):
            append_frame(args.out, result)
    except (ConnectionError, DeadlineError, ServerError) as e:
        why = "" if isinstance(e, ServerError) else "; start it and run this again"
        sys.exit(f"stopped, what is done is in {args.out}: {e}{why}")
    finally:
        dataset.close()
        if client is not None:
            client.close()
    found = [r for r in read_frames(args.out) if (r.episode, r.step) in wanted]
    for table in tables(found, args.label):
        console.print(table)
    met = {what: sum(any(getattr(r.truth, what)) for r in found) for what in ("collided", "overlapped")}
    console.print(
        f"{len(found)} frames of {len({r.episode for r in found})} drives; the truth itself collides at "
        f"{met['collided']} of them on the grid, and at {met['overlapped']} exactly"
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Args), Console(highlight=False, width=150))
    except ValueError as e:
        sys.exit(str(e))
