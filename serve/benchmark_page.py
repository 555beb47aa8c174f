"""Makes the benchmark page from results of serve/evaluate.py: every number with its interval and where it comes from.

    python serve/benchmark_page.py runs/evaluation --out docs

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
import tyro
from matplotlib.figure import Figure

from openpi_like.serve.benchmark import EXPERT, collect, moved, page

_COLOURS = ("#2563eb", "#d97706", "#9333ea", "#0891b2", "#dc2626", "#4b5563", "#db2777", "#65a30d")
_OF_EXPERT = "#16a34a"


@dataclasses.dataclass(frozen=True)
class Args:
    """Makes the benchmark page from results of serve/evaluate.py.

    run: directory of results. out: directory of the page. compare: published numbers; nothing is written then, and the
    exit status is 3 where numbers have moved.
    """

    run: Annotated[Path, tyro.conf.Positional]
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


def main(args: Args) -> None:
    numbers = collect(args.run)
    if args.compare is not None:
        lines = moved(json.loads(args.compare.read_text()), numbers)
        print("\n".join(lines) or "no number has moved beyond its interval")
        sys.exit(3 if lines else 0)
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"  # the same numbers give the same file
    figures = args.out / "benchmarks"
    figures.mkdir(parents=True, exist_ok=True)
    for suite, of in numbers["suites"].items():
        if not of["policies"]:
            continue
        figure(suite, of["policies"]).savefig(figures / f"{suite}.svg", metadata={"Date": None})
    (args.out / "benchmarks.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (args.out / "benchmarks.md").write_text(page(numbers, figures.name))
    print(f"{args.out / 'benchmarks.md'}: {', '.join(numbers['suites'])}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, OSError) as e:
        sys.exit(f"no page: {e}")
