"""Our planning metrics beside the code that the field shares (in OpenDriveVLA's repository, after UniAD's and ST-P3's).

    git clone https://github.com/DriveVLA/OpenDriveVLA
    pip install torch scikit-image numpy jaxtyping
    python tests/bench/bench_planning_metrics.py OpenDriveVLA --out tests/driving/planning_golden.json

Runs in an environment of its own, with torch. Compares the numbers of every step, and the two tables as they are
printed, to the last digit; writes the shared code's numbers for the suite. Ends with an error where anything differs.
"""

import argparse
import importlib.util
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from openpi_like.driving.planning_metrics import PlanningScores, from_shared_code  # noqa: E402
from tests.bench.planning_samples import draw  # noqa: E402

CASES = [(seed, 40, dtype) for seed in range(40) for dtype in ("float32", "float64")]
GOLDEN = CASES[:6]
NAMES = {"l2": "L2", "collision": "obj_box_col", "point_collision": "obj_col"}


class Metric(torch.nn.Module):
    """As much of pytorch_lightning's base class as the shared code uses."""

    def __init__(self, compute_on_step: bool = False) -> None:
        super().__init__()

    def add_state(self, name: str, default: torch.Tensor, dist_reduce_fx: str) -> None:
        setattr(self, name, default)


def shared_metric(checkout: Path) -> type:
    """Returns the class of the shared code, without what it imports to draw and to train."""
    for name in ("pytorch_lightning", "pytorch_lightning.metrics", "pytorch_lightning.metrics.metric"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["pytorch_lightning.metrics.metric"].Metric = Metric  # type: ignore[attr-defined]
    sys.modules["matplotlib"] = types.ModuleType("matplotlib")
    sys.modules["matplotlib.pyplot"] = types.ModuleType("matplotlib.pyplot")
    path = checkout / "drivevla" / "eval_share" / "metric.py"
    spec = importlib.util.spec_from_file_location("shared_metric", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PlanningMetric


def shown(values: dict[str, float]) -> list[str]:
    return [f"{value:.2f}" for value in values.values()]


def tables_of(metric: Any) -> dict[str, dict[str, list[str]]]:
    """Returns the two tables as the shared code prints them."""
    scores = {name: metric.compute()[key] for name, key in NAMES.items()}
    tables: dict[str, dict[str, list[str]]] = {"uniad": {}, "stp3": {}}
    for name, x in scores.items():
        factor = 1 if name == "l2" else 100
        for table, at in (("uniad", [x[1], x[3], x[5]]), ("stp3", [x[:2].mean(), x[:4].mean(), x[:6].mean()])):
            mean = factor * sum(at) / 3.0 if table == "uniad" else (sum(at) / 3) * factor
            tables[table][name] = [f"{float(v):.2f}" for v in (*(factor * v for v in at), mean)]
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    metric_class, golden, wrong = shared_metric(args.checkout), [], []
    for seed, count, dtype in CASES:
        samples = draw(seed, count, dtype)
        theirs, ours, seconds = metric_class(6), PlanningScores(), {"theirs": 0.0, "ours": 0.0}
        for plan, truth, valid, occupancy in zip(*samples, strict=True):
            started = time.perf_counter()
            grid = torch.flip(torch.tensor(occupancy)[None], [-1])
            mask = torch.tensor(np.repeat(valid[:, None], 2, 1).astype(dtype))[None]
            theirs.update(torch.tensor(plan)[None], torch.tensor(truth)[None], grid, "token", mask)
            middle = time.perf_counter()
            ours.add(plan[None], truth[None], valid[None], from_shared_code(occupancy[None]))
            seconds["theirs"] += middle - started
            seconds["ours"] += time.perf_counter() - middle
        expected = {name: theirs.compute()[key].double().tolist() for name, key in NAMES.items()}
        for name, x in ours.steps.items():
            # Theirs are summed in single precision.
            if not np.allclose(x, expected[name], rtol=1e-6, atol=1e-7):
                wrong.append(f"seed {seed} {dtype}: {name} {x.tolist()}, theirs {expected[name]}")
        tables = tables_of(theirs)
        for table, of in (("uniad", ours.uniad()), ("stp3", ours.stp3())):
            for name, values in of.items():
                if shown(values) != tables[table][name]:
                    wrong.append(f"seed {seed} {dtype}, {table} {name}: {values}, theirs {tables[table][name]}")
        golden.append({"seed": seed, "count": count, "dtype": dtype, "steps": expected, "tables": tables})
        ratio = seconds["theirs"] / seconds["ours"]
        ms = 1e3 * seconds["ours"] / count
        print(f"seed {seed} {dtype}: {tables['uniad']}, {ms:.2f} ms a sample, {ratio:.1f} times faster")
    if wrong:
        sys.exit("\n".join(wrong))
    print("all numbers are equal")
    if args.out is not None:
        args.out.write_text(json.dumps(golden[: len(GOLDEN)], indent=1) + "\n")


if __name__ == "__main__":
    main()
