"""Meta-World's fifty tasks: successes and steps of the expert at 20 Hz, and what the camera sees.

    PYTHONPATH=. python tests/bench/bench_metaworld.py --episodes 20

Prints a row of a table per task: successes without noise and with the largest noise of demonstrations, control steps
until success (mean and most, without noise, of the episodes that succeed), and of each thing that is elsewhere in other
layouts, in how many of these the camera's first picture shows it by at least four pixels (in all, if not said), and the
least number of pixels. A pixel counts where the picture differs by more than 30 of 765 without the thing. Then sums,
control steps per second with the expert and without pictures, and milliseconds per picture. Seeds are those of
evaluation.
"""

import argparse
import time

import numpy as np

from openpi_like.robots.sims.metaworld_tasks import MT10, MT50, TASKS
from openpi_like.robots.sims.sawyer import SawyerSim
from openpi_like.robots.sims.sim import HELD_OUT_SEED


def varying(sim: SawyerSim, task: str, seeds: range) -> dict[str, np.ndarray]:
    """Returns, by the name of its outermost body, the bodies of each thing that is elsewhere in other layouts."""
    places = []
    for seed in seeds[:5]:
        sim.reset(task, seed)
        places.append(sim._envs[task].data.xpos.copy())
    model = sim._envs[task].model
    roots = model.body_rootid
    moves = np.ptp(np.array(places), axis=0).max(-1) > 0.004  # metres
    moves &= roots != roots[model.body("base").id]
    return {model.body(r).name or f"body {r}": np.flatnonzero(moves & (roots == r)) for r in np.unique(roots[moves])}


def pixels(sim: SawyerSim, task: str, seeds: range) -> dict[str, list[int]]:
    """Returns how many pixels of the camera's first picture each varying thing, and the ball at the goal, cover."""
    size = sim.robot.cameras[0].height or 0
    things = varying(sim, task, seeds)
    model = sim._envs[task].model
    covered: dict[str, list[int]] = {}
    for seed in seeds:
        sim.reset(task, seed)
        whole = sim.frame(size).astype(int)

        def count(name: str, whole: np.ndarray = whole) -> None:
            differs = np.abs(sim.frame(size).astype(int) - whole).sum(-1) > 30
            covered.setdefault(name, []).append(int(differs.sum()))

        for name, bodies in things.items():
            groups = model.geom_group.copy()
            model.geom_group[np.isin(model.geom_bodyid, bodies)] = 5  # which no renderer draws
            count(name)
            model.geom_group[:] = groups
        if TASKS[task].ball is not None:
            site = model.site(sim._envs[task]._target_site_config[0][0]).id
            model.site_rgba[site, 3] = 0.0
            count("ball")
            model.site_rgba[site, 3] = 1.0
    return covered


def told(name: str, counts: list[int]) -> str:
    """Returns what a row says of a thing's pixels."""
    seen = sum(n >= 4 for n in counts)
    return f"{name} {min(counts)}" if seen == len(counts) else f"{name} in {seen}/{len(counts)} ({min(counts)})"


def main() -> None:
    """Drives and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=20, help="per task and noise")
    parser.add_argument("--tasks", nargs="*", default=[])
    args = parser.parse_args()
    sim = SawyerSim()
    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + args.episodes)
    tasks = args.tasks or MT50
    done: dict[tuple[str, float], int] = {}
    steps_driven, seconds = 0, 0.0
    print("| task | expert | with noise | steps, mean (most) | seen of what varies |\n|---|---|---|---|---|")
    for task in tasks:
        steps = []
        for noise in (0.0, sim.noises[-1]):
            successes = 0
            for seed in seeds:
                sim.reset(task, seed)
                expert = sim.expert(np.random.default_rng(seed), noise)
                began, step = time.perf_counter(), 0
                while not sim.success and step < sim.max_steps:
                    sim.step(expert.disturb(expert.act()))
                    step += 1
                seconds += time.perf_counter() - began
                steps_driven += step
                successes += sim.success
                if sim.success and noise == 0.0:
                    steps.append(step)
            done[task, noise] = successes
        clean, noisy = (f"{done[task, noise]}/{args.episodes}" for noise in (0.0, sim.noises[-1]))
        taken = f"{np.mean(steps):.0f} ({max(steps)})" if steps else "-"
        seen = ", ".join(told(name, counts) for name, counts in pixels(sim, task, seeds).items())
        print(f"| {task} | {clean} | {noisy} | {taken} | {seen} |", flush=True)
    for name, some in (("MT-10", MT10), ("MT-50", MT50)):
        if set(some) <= set(tasks):
            sums = [sum(done[task, noise] for task in some) for noise in (0.0, sim.noises[-1])]
            print(f"{name}: {sums[0]} and, with noise, {sums[1]} of {len(some) * args.episodes}")
    began = time.perf_counter()
    for _ in range(50):
        sim.observe()
    picture = 1e3 * (time.perf_counter() - began) / 50
    print(f"{steps_driven / seconds:.0f} steps/s, {picture:.1f} ms per {sim.renderer} picture")


if __name__ == "__main__":
    main()
