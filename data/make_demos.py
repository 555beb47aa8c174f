"""Records demonstrations of a simulated robot's expert and writes them as an RLDS dataset.

    python data/make_demos.py --robot sawyer --out demos --episodes-per-task 40

writes demos/sawyer_sim/1.0.0 with splits train and val. The expert's clean action is recorded while a disturbed one is
executed, so that recoveries are demonstrated too; `subtask` of each step says in words what the expert is doing.
Layouts never overlap between episodes, nor with those that evaluation uses. Episodes in which the expert fails are not
written: they are counted, and another layout is tried.

Run it again after an interruption: finished episodes are kept. A finished dataset is left alone.
"""

import collections
import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import rich.progress
import rich.table
import tyro

from openpi_like.config import near_names
from openpi_like.data.rlds_writer import Episode, dataset_directory, write_rlds
from openpi_like.robots.robot import Robot
from openpi_like.robots.sims import make_sim
from openpi_like.robots.sims.render import VARIABLE, renderer_name
from openpi_like.robots.sims.sim import HELD_OUT_SEED, SECONDS_AFTER_SUCCESS, Sim

# Layouts of an episode: where the expert fails on one, the next is tried. Fewer where there are not as many layouts.
_FEWEST_ATTEMPTS, _MOST_ATTEMPTS = 3, 5


@dataclasses.dataclass(frozen=True)
class Args:
    """Records demonstrations of a simulated robot's expert and writes them as an RLDS dataset.

    robot: which simulated robot, a name of `openpi_like.robots.sims.SIMS`.
    out: directory for datasets; this one becomes OUT/ROBOT_sim/1.0.0.
    episodes_per_task, val_episodes_per_task: episodes in splits train and val.
    tasks: some of the robot's tasks (`Sim.known_tasks`), by default `Sim.tasks`.
    seed: of layouts and noise.
    workers: processes that simulate.
    file_format: "array_record" is for readers that need random access; other RLDS readers want "tfrecord".
    """

    robot: str
    out: Path
    episodes_per_task: int = 40
    val_episodes_per_task: int = 4
    tasks: tuple[str, ...] = ()
    seed: int = 0
    workers: int = 2
    file_format: Literal["tfrecord", "array_record"] = "tfrecord"


@dataclasses.dataclass(frozen=True)
class Job:
    """One episode to record: its place in the dataset, and the layouts to try until the expert succeeds."""

    split: str
    task: str
    index: int
    seeds: tuple[int, ...]
    noise_seed: tuple[int, ...]

    @property
    def file(self) -> str:
        """Name of its part file."""
        return f"{self.split}-{self.task}-{self.index:05d}.npz"


def main(args: Args) -> Path:
    """Records and writes; returns the dataset's directory.

    Raises:
        ValueError: an unknown robot or tasks, or more episodes than there are layouts.
        FileExistsError: a dataset made with other settings is there.
        RuntimeError: the expert failed on every layout tried for some episode.
    """
    sim = make_sim(args.robot)
    tasks = args.tasks or sim.tasks
    unknown = [t for t in tasks if t not in sim.known_tasks()]
    if unknown:
        raise ValueError(
            "; ".join(f"robot {args.robot} has no task {t!r}, {near_names(t, sim.known_tasks())}" for t in unknown)
        )
    recipe = {
        "robot": args.robot,
        "tasks": list(tasks),
        "episodes_per_task": args.episodes_per_task,
        "val_episodes_per_task": args.val_episodes_per_task,
        "seed": args.seed,
        "renderer": sim.renderer,
        "noises": list(sim.noises),
        "control_hz": sim.robot.control_hz,
        "file_format": args.file_format,
        "texts": ["subtask"],
    }
    name = f"{args.robot}_sim"
    final = dataset_directory(args.out, name)
    if final.exists():
        made_with = json.loads((final / "metadata.json").read_text())
        different = {k: (made_with.get(k), v) for k, v in recipe.items() if made_with.get(k) != v}
        if different == {"texts": (None, recipe["texts"])}:
            rich.print(f"{final} is complete, made before demonstrations had subtasks; delete it to make it with them")
            return final
        if different:
            raise FileExistsError(
                f"{final} was made with other settings (there, wanted): {different}; delete it or choose another --out"
            )
        rich.print(f"{final} is complete, nothing to do")
        return final

    parts = _parts_directory(args.out / name / "parts", recipe)
    jobs = _jobs(args, tasks)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # its greetings would break the progress bar
    started = time.perf_counter()
    with rich.progress.Progress(
        "{task.description}",
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        "left",
        rich.progress.TimeRemainingColumn(),
    ) as progress:
        _record(args, jobs, parts, progress)
        recorded = time.perf_counter() - started
        bar = progress.add_task(f"writing {name}", total=len(jobs))
        write_rlds(
            args.out,
            name,
            sim.robot,
            {
                split: _read_parts(parts, [j for j in jobs if j.split == split], sim)
                for split in dict.fromkeys(j.split for j in jobs)
            },
            description=(
                f"Scripted demonstrations of the simulated robot {args.robot} ({len(tasks)} tasks), drawn by the "
                f"renderer {sim.renderer} as PNG. Actions are the expert's clean ones, cut to the valid range; what "
                "was executed had Gaussian noise added (episode_metadata/noise, in units of the action)."
            ),
            metadata=recipe,
            file_format=args.file_format,
            on_episode=lambda: progress.advance(bar),
        )
    rich.print(_summary(parts, jobs))
    size = sum(f.stat().st_size for f in final.iterdir()) / 1e6
    rich.print(
        f"{final}: {len(jobs)} episodes, {size:.0f} MB; simulated in {recorded:.0f} s, "
        f"written in {time.perf_counter() - started - recorded:.0f} s"
    )
    shutil.rmtree(parts)
    return final


def _jobs(args: Args, tasks: tuple[str, ...]) -> list[Job]:
    """Task by task, train before val. No two episodes of a task share a layout."""
    counts = {"train": args.episodes_per_task, "val": args.val_episodes_per_task}
    total = sum(counts.values())
    if total * _FEWEST_ATTEMPTS > HELD_OUT_SEED or min(counts.values()) < 0 or total == 0:
        raise ValueError(
            f"episodes per task: train {counts['train']}, val {counts['val']}; "
            f"expected 1 .. {HELD_OUT_SEED // _FEWEST_ATTEMPTS} in all and none negative"
        )
    attempts = min(_MOST_ATTEMPTS, HELD_OUT_SEED // total)
    layouts = np.random.default_rng(args.seed).permutation(HELD_OUT_SEED).tolist()
    jobs = []
    for t, task in enumerate(tasks):
        slot = 0
        for split, count in counts.items():
            for i in range(count):
                jobs.append(Job(split, task, i, tuple(layouts[slot : attempts * total : total]), (args.seed, t, slot)))
                slot += 1
    return jobs


def _parts_directory(parts: Path, recipe: dict[str, Any]) -> Path:
    """Returns the directory of finished episodes, emptied if those are of another recipe."""
    text = json.dumps(recipe)
    stamp = parts / "recipe.json"
    if parts.exists() and not (stamp.exists() and stamp.read_text() == text):
        rich.print(f"{parts} holds episodes of an unfinished run with other settings: starting over")
        shutil.rmtree(parts)
    parts.mkdir(parents=True, exist_ok=True)
    stamp.write_text(text)
    return parts


def _record(args: Args, jobs: list[Job], parts: Path, progress: rich.progress.Progress) -> None:
    """Simulates what is missing, in processes of their own."""
    missing = [j for j in jobs if not (parts / j.file).exists()]
    bar = progress.add_task(f"simulating {args.robot}", total=len(jobs), completed=len(jobs) - len(missing))
    if not missing:
        return
    # A worker keeps what it has loaded for a task, so tasks stay together where there are enough to share out.
    by_task = collections.defaultdict(list)
    for job in missing:
        by_task[job.task].append(job)
    pieces = 1 if len(by_task) >= 2 * args.workers else 4 * args.workers
    chunks = [c for own in by_task.values() for i in range(pieces) if (c := own[i::pieces])]
    os.environ[VARIABLE] = renderer_name()  # workers need not try again what works here
    context = multiprocessing.get_context("spawn")  # OpenGL and threads do not survive a fork
    pool = concurrent.futures.ProcessPoolExecutor(args.workers, context, _start_worker, (args.robot, os.getpid()))
    failures = []
    try:
        waiting = {pool.submit(_record_chunk, chunk, parts) for chunk in chunks}
        while waiting:
            done, waiting = concurrent.futures.wait(waiting, 0.5, concurrent.futures.FIRST_COMPLETED)
            failures += [failure for future in done for failure in future.result()]
            progress.update(bar, completed=len(list(parts.glob("*.npz"))))
    finally:
        pool.shutdown(cancel_futures=True)
    if failures:
        tried = len(jobs[0].seeds)
        raise RuntimeError(f"the expert failed on all {tried} layouts of: {', '.join(sorted(failures))}")


_sim: Sim  # of this worker process


def _start_worker(robot: str, parent: int) -> None:
    global _sim

    def stop_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=stop_with_parent, daemon=True).start()
    _sim = make_sim(robot)


def _record_chunk(jobs: list[Job], parts: Path) -> list[str]:
    """Records episodes; returns the files of those that failed on every layout."""
    return [job.file for job in jobs if not any(_record_episode(_sim, job, k, parts) for k in range(len(job.seeds)))]


def _record_episode(sim: Sim, job: Job, attempt: int, parts: Path) -> bool:
    """Runs the expert once. If it succeeds the episode's file appears, complete, in `parts`."""
    rng = np.random.default_rng((*job.noise_seed, attempt))
    noise = float(rng.choice(sim.noises))
    sim.reset(job.task, job.seeds[attempt])
    expert = sim.expert(rng, noise)
    states, actions, subtasks, prompt = [], [], [], ""
    images: dict[str, list[np.ndarray]] = {c.name: [] for c in sim.robot.cameras}
    entities: dict[str, list[np.ndarray]] = {e.name: [] for e in sim.robot.entities}
    left = math.ceil(SECONDS_AFTER_SUCCESS * sim.robot.control_hz)
    for _ in range(sim.max_steps):
        observation = sim.observe()
        action = expert.act()
        for name, image in observation["images"].items():
            images[name].append(_png(image))
        for things in sim.robot.entities:
            entities[things.name].append(observation["entities"][things.name])
        states.append(observation["state"])
        actions.append(action)
        subtasks.append(expert.doing)
        prompt = observation["prompt"]
        sim.step(expert.disturb(action))
        left -= sim.success
        if left == 0 or sim.failed:
            break
    if not sim.success:
        return False
    arrays: dict[str, Any] = {f"png_{name}": np.concatenate(frames) for name, frames in images.items()}
    arrays |= {f"length_{name}": [len(f) for f in frames] for name, frames in images.items()}
    arrays |= {f"entities_{name}": np.concatenate(seen) for name, seen in entities.items()}
    arrays |= {f"things_{name}": [len(x) for x in seen] for name, seen in entities.items()}
    arrays |= {f"note_{key}": np.asarray(x) for key, x in sim.notes().items()}
    temporary = parts / f"{job.file}.{os.getpid()}"
    with temporary.open("wb") as f:
        np.savez(
            f,
            state=np.stack(states),
            action=np.stack(actions),
            subtask=np.array(subtasks),
            prompt=np.array(prompt),
            noise=noise,
            attempt=attempt,
            **arrays,
        )
    temporary.rename(parts / job.file)
    return True


def _png(image: np.ndarray) -> np.ndarray:
    ok, data = cv2.imencode(".png", image[..., ::-1])  # OpenCV takes BGR
    if not ok:
        raise RuntimeError(f"OpenCV cannot encode an image of shape {image.shape}, type {image.dtype}")
    return data


def _read_parts(parts: Path, jobs: list[Job], sim: Sim) -> Iterator[Episode]:
    # Shuffled once, so that a shard holds all tasks.
    for i in np.random.default_rng(0).permutation(len(jobs)):
        job = jobs[i]
        with np.load(parts / job.file) as part:
            images = {}
            for camera in sim.robot.cameras:
                ends = np.cumsum(part[f"length_{camera.name}"])
                images[camera.name] = [f.tobytes() for f in np.split(part[f"png_{camera.name}"], ends[:-1])]
            attempt = int(part["attempt"])
            yield Episode(
                images=images,
                state=part["state"],
                action=part["action"],
                prompt=str(part["prompt"]),
                success=True,
                metadata={
                    "task": job.task,
                    "seed": job.seeds[attempt],
                    "success": True,
                    "noise": float(part["noise"]),
                    "renderer": sim.renderer,
                    "file_path": f"{sim.robot.name}/{job.split}/{job.task}/{job.index}",
                },
                steps={
                    "subtask": part["subtask"],
                    **_known(sim.robot, len(part["action"])),
                    **_entities(sim.robot, part),
                    **{key.removeprefix("note_"): part[key] for key in part.files if key.startswith("note_")},
                },
            )


def _known(robot: Robot, steps: int) -> dict[str, np.ndarray]:
    """An expert's plan is known as a whole."""
    if robot.plan is None or robot.plan.known is None:
        return {}
    return {robot.plan.known: np.full(steps, robot.action_horizon, np.int64)}


def _entities(robot: Robot, part: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Things around the robot, filled up with zeros to as many as there may be, and which of them there are."""
    fields = {}
    for things in robot.entities:
        counts = part[f"things_{things.name}"]
        there = np.arange(things.count) < counts[:, None]
        values = np.zeros((*there.shape, things.size), np.float32)
        values[there] = part[f"entities_{things.name}"]
        fields[things.key] = values
        if things.mask_key is not None:
            fields[things.mask_key] = there.astype(np.int64)
    return fields


def _summary(parts: Path, jobs: list[Job]) -> rich.table.Table:
    table = rich.table.Table("task", "episodes", "steps", "expert failures")
    by_task = collections.defaultdict(list)
    for job in jobs:
        with np.load(parts / job.file) as part:
            by_task[job.task].append((len(part["action"]), int(part["attempt"])))
    for task, episodes in by_task.items():
        steps, failures = zip(*episodes, strict=True)
        table.add_row(task, str(len(episodes)), str(sum(steps)), str(sum(failures)))
    return table


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, FileExistsError, RuntimeError, ModuleNotFoundError) as e:
        sys.exit(str(e))
    except KeyboardInterrupt:
        sys.exit("interrupted; run it again to go on")
