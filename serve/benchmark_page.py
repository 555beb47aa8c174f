"""Makes the benchmark page from results of serve/evaluate.py: every number with its interval and where it comes from.

    python serve/benchmark_page.py runs/evaluation --studies runs/studies/what_helps runs/scaling --out docs

Writes OUT/benchmarks.md, the same numbers as OUT/benchmarks.json, and a figure of each suite in OUT/benchmarks/. With
--compare, nothing is written: it says which numbers are not those of a published benchmarks.json any more.

    python serve/benchmark_page.py runs/evaluation --compare docs/benchmarks.json
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure

from openpi_like.serve.benchmark import EXPERT, collect, compare, drawn, page
from openpi_like.train.scaling import PARTS, Curve, Run

_COLOURS = ("#2563eb", "#d97706", "#9333ea", "#0891b2", "#dc2626", "#4b5563", "#db2777", "#65a30d")
_OF_EXPERT = "#16a34a"


@dataclasses.dataclass(frozen=True)
class Args:
    """Makes the benchmark page from results of serve/evaluate.py.

    run: directory of results. studies: directories of train/study.py and train/scaling.py. out: directory of the page.
    compare: published numbers; nothing is written then, and the exit status is 3 where numbers have moved.
    """

    run: Annotated[Path, tyro.conf.Positional]
    studies: tuple[Path, ...] = ()
    out: Path = Path("docs")
    compare: Path | None = None


def figure(suite: str, policies: dict[str, Any]) -> Figure:
    """Returns success of each policy in a suite, with intervals."""
    fig = Figure(figsize=(8.0, 0.7 + 0.32 * len(policies)), layout="constrained")
    ax = fig.add_subplot()
    names = list(policies)[::-1]
    for k, name in enumerate(names):
        row = policies[name]
        rate, (low, high) = row["successes"] / row["episodes"], row["interval"]
        colour = _OF_EXPERT if name == EXPERT else _COLOURS[(len(names) - 1 - k) % len(_COLOURS)]
        ax.barh(k, rate, color=colour, height=0.7)
        ax.plot([low, high], [k, k], color="#111827", linewidth=1.2, marker="|", markersize=6)
    ax.set_yticks(range(len(names)), names)
    ax.set_xlim(0, 1)
    ax.set_xlabel(f"success in {suite}")
    ax.spines[["top", "right"]].set_visible(False)
    return fig


def curves(scaling: dict[str, Any]) -> Figure:
    """Returns held-out losses over what was scaled: each run, the curve through them where the other two sizes are in
    their middle, and what it said of the larger run beside that run."""
    said, of = scaling["prediction"], {name: Run(**run) for name, run in scaling["runs"].items()}
    stored: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in said["curve"].items()}
    curve, sizes = Curve(**stored), np.array([run.sizes() for run in of.values()])
    larger = list(of).index(said["of"])
    fig = Figure(figsize=(10.0, 3.2), layout="constrained")
    for k, ax in enumerate(fig.subplots(1, 3, sharey=True)):
        along = np.geomspace(sizes[:, k].min(), sizes[:, k].max(), 50)
        at = np.array([[x if i == k else curve.middle[i] for i in range(3)] for x in along])
        losses_along = [curve.loss(x) for x in at]
        ax.plot(along, losses_along, color="#4b5563", linewidth=1.2, label="curve, other sizes in their middle")
        losses = np.array([run.loss for run in of.values()])
        ax.plot(sizes[:, k], losses, "o", color="#2563eb", markersize=4, label="runs")
        x, (low, high) = sizes[larger, k], said["interval"]
        off = [[said["loss"] - low], [high - said["loss"]]]
        ax.errorbar(x, said["loss"], off, fmt="s", color="#d97706", capsize=4, label="said before")
        ax.plot(x, losses[larger], "*", color="#dc2626", markersize=11, label="the larger run")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel(PARTS[k])
        ax.spines[["top", "right"]].set_visible(False)
    fig.axes[0].set_ylabel("held-out loss")
    fig.axes[-1].legend(fontsize=7)
    return fig


def main(args: Args) -> None:
    numbers = collect(args.run, args.studies)
    if args.compare is not None:
        found = compare(json.loads(args.compare.read_text()), numbers)
        print("\n".join(found.lines()))
        sys.exit(3 if found.moved else 0)
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"  # the same numbers give the same file
    figures = args.out / "benchmarks"
    figures.mkdir(parents=True, exist_ok=True)
    for suite, driven in numbers["suites"].items():
        if not driven["policies"]:
            continue
        figure(suite, driven["policies"]).savefig(figures / f"{suite}.svg", metadata={"Date": None})
    for name, study in numbers["studies"].items():
        of = curves(study) if "prediction" in study else figure(name, {row["arm"]: row for row in study["rows"]})
        of.savefig(figures / drawn(name), metadata={"Date": None})
    (args.out / "benchmarks.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (args.out / "benchmarks.md").write_text(page(numbers, figures.name))
    print(f"{args.out / 'benchmarks.md'}: {', '.join(numbers['suites'])}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, OSError) as e:
        sys.exit(f"no page: {e}")
