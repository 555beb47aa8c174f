"""The page about a robot and its data."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from openpi_like import html_page
from openpi_like.data.robot_check import CHECKS, Check, Curves, Finding, RobotSample

_COLUMNS = 4  # plots in a row
HEAD = ("", "about", "measured", "what to do")


def report(sample: RobotSample, found: dict[str, list[Finding]], checks: Sequence[Check] = CHECKS) -> str:
    """Returns one HTML page without external resources. found: see `check_robot`."""
    robot, index = sample.robot, sample.index
    suspected = [(name, f) for name, findings in found.items() for f in findings if f.level != "found"]
    counts = {level: sum(f.level == level for _, f in suspected) for level in ("error", "suspect")}
    headline = [
        (str(counts["suspect"]), "suspicions"),
        (str(counts["error"]), "errors"),
        (f"{len(sample.lengths):,} of {index.episodes:,}", "episodes looked at"),
        (f"{sample.hz:g} Hz", "steps per second" if sample.rate else "steps per second, as the robot says"),
    ]
    changes = html_page.table(
        ("", "check", *HEAD[1:]),
        [(f.level, name, f.about, f.message, f.advice) for name, f in suspected],
        [f.level for _, f in suspected],
    )
    sections = [html_page.section("What to change", changes if suspected else "<p>Nothing looks wrong.</p>")]
    questions = {check.name: check.question for check in checks}
    for name, findings in found.items():
        rows = [(f.level, f.about, f.message, f.advice) for f in findings]
        curves = [c for f in findings for c in f.curves]
        pictures = [(p.caption, _jpeg(p.image), "jpeg") for f in findings for p in f.pictures]
        sections.append(
            html_page.section(
                name,
                html_page.note(questions[name]),
                html_page.table(HEAD, rows, [f.level for f in findings]),
                html_page.plot(_plot(curves), dpi=70) if curves else "",
                html_page.gallery(pictures) if pictures else "",
            )
        )
    sections.append(html_page.section("Fields", _fields(sample)))
    title = f"{robot.name} on {index.split.dataset}"
    return html_page.page(title, f"Robot {robot.name}", f"{index.split}: {sample.sample}", headline, sections)


def _fields(sample: RobotSample) -> str:
    """The robot's fields, with what is stored in them."""
    rows = list[tuple[str, ...]]()
    robot = sample.robot
    for what, fields, values in (("state", robot.state, sample.states), ("action", robot.action, sample.commands)):
        for field in fields:
            for d, name in enumerate(field.dim_names):
                where = f"{field.key}[{field.start + d}]"
                if field.name not in values:
                    rows.append((what, name, where, "derived", "", ""))
                    continue
                quantiles = np.quantile(values[field.name][:, d], [0.01, 0.5, 0.99])
                rows.append((what, name, where, *(f"{q:.4g}" for q in quantiles)))
    return html_page.table(("", "dim", "stored in", "q01", "median", "q99"), rows)


def _plot(curves: Sequence[Curves]) -> Figure:
    lines = -(-len(curves) // _COLUMNS)
    figure = Figure(figsize=(14, 2.2 * lines), layout="constrained")
    axes = figure.subplots(lines, _COLUMNS, squeeze=False).reshape(-1)
    for axis, c in zip(axes, curves, strict=False):
        for label, (x, y) in c.lines.items():
            axis.plot(x, y, lw=1.3, label=label)
        axis.set_title(c.title, fontsize=8)
        axis.set_xlabel(c.x, fontsize=7)
        axis.set_ylabel(c.y, fontsize=7)
        axis.tick_params(labelsize=7)
        axis.grid(color="#f3f4f6")
        if len(c.lines) > 1:
            axis.legend(frameon=False, fontsize=7)
    for axis in axes[len(curves) :]:
        axis.axis("off")
    return figure


def _jpeg(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, format="jpeg", quality=75)
    return out.getvalue()
