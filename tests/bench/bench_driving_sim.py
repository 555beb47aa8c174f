"""The simulated car: how often its experts succeed, and how long steps, pictures and plans take.

    PYTHONPATH=. python tests/bench/bench_driving_sim.py --robot ego_vehicle --episodes 20

Prints a line per task and noise: successes with their 95 % interval (Wilson), what went wrong, seconds that an episode
takes, and the means of the largest accelerations, m/s^2; then times. Seeds are those of evaluation.
"""

import argparse
import collections
import time

import numpy as np

from openpi_like.robots.sims import make_sim
from openpi_like.robots.sims.sim import HELD_OUT_SEED
from openpi_like.serve.evaluation import wilson


def main() -> None:
    """Drives and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--robot", default="ego_vehicle", choices=("ego_vehicle", "ego_controls"))
    parser.add_argument("--episodes", type=int, default=20, help="per task and noise")
    parser.add_argument("--tasks", nargs="*", default=[])
    args = parser.parse_args()
    sim = make_sim(args.robot)
    spent: dict[str, list[float]] = collections.defaultdict(list)

    def timed(what, call, *arguments):
        began = time.perf_counter()
        result = call(*arguments)
        spent[what].append(1e3 * (time.perf_counter() - began))
        return result

    for noise in (sim.noises[0], sim.noises[-1]):
        total = 0
        tasks = args.tasks or sim.tasks
        for task in tasks:
            ends: collections.Counter[str] = collections.Counter()
            seconds, largest = [], []
            for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + args.episodes):
                sim.reset(task, seed)
                expert = sim.expert(np.random.default_rng(seed), noise)
                for _ in range(sim.max_steps):
                    action = timed("ms per plan" if args.robot == "ego_vehicle" else "ms per action", expert.act)
                    timed("ms per step", sim.step, expert.disturb(action))
                    if sim.success or sim.failed:
                        break
                drive = sim.measures()
                fits = {"success": sim.success, "collided": drive["collided"], "off road": drive["off_road"]}
                ends[next((end for end, fit in fits.items() if fit), "late")] += 1
                seconds.append(drive["seconds"])
                largest.append((drive["acceleration"], drive["lateral"]))
            total += ends["success"]
            low, high = wilson(ends["success"], args.episodes)
            wrong = ", ".join(f"{end} {count}" for end, count in ends.items() if end != "success")
            ahead, aside = np.mean(largest, axis=0)
            print(
                f"noise {noise:<5g}{task:20}{ends['success']:4}/{args.episodes} [{low:.2f}, {high:.2f}]  "
                f"{np.mean(seconds):5.1f} s, at most {max(seconds):4.1f}  {ahead:.1f} ahead, {aside:.1f} aside  "
                f"{wrong}",
                flush=True,
            )
        episodes = args.episodes * len(tasks)
        low, high = wilson(total, episodes)
        print(f"noise {noise:<5g}{'all':20}{total:4}/{episodes} [{low:.2f}, {high:.2f}]")
    for task in ("intersection-left", "roundabout-left", "highway-left", "merge"):
        sim.reset(task, HELD_OUT_SEED)
        sim.observe()  # compiles the scene, makes the renderers
        for _ in range(10):
            timed(f"ms per six frames, {task}, {sim.renderer}", sim.observe)
    for what, times in spent.items():
        print(f"{what}: median {np.median(times):.1f}, 95 % within {np.quantile(times, 0.95):.1f}")
    print(f"steps per second, without pictures: {1e3 / np.mean(spent['ms per step']):.0f}")


if __name__ == "__main__":
    main()
