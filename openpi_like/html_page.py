"""Reports as one HTML file without external resources: style, tables, and pictures inside the page."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; background: #f3f4f6; color: #111827; margin: 0; }
main { max-width: 1140px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { margin: 0 0 2px; font-size: 28px; } h2 { margin: 0 0 10px; font-size: 19px; }
.note { color: #6b7280; font-size: 13px; }
section { background: #fff; border-radius: 10px; padding: 18px 22px; margin-top: 18px; box-shadow: 0 1px 2px #0001; }
.headline { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; margin-top: 18px; }
.headline div { background: #fff; border-radius: 10px; padding: 14px 18px; box-shadow: 0 1px 2px #0001; }
.headline b { display: block; font-size: 26px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-size: 12px; color: #6b7280; border-bottom: 1px solid #e5e7eb; padding: 4px 10px 4px 0; }
td { padding: 4px 10px 4px 0; border-bottom: 1px solid #f3f4f6; vertical-align: top; }
img.plot { max-width: 100%; }
pre { background: #f9fafb; padding: 10px 12px; border-radius: 6px; white-space: pre-wrap; font-size: 12px; }
.films { display: grid; grid-template-columns: repeat(6, 1fr); gap: 12px; }
.films img { width: 100%; border-radius: 6px; } .films figure { margin: 0; font-size: 12px; color: #6b7280; }
.found { color: #6b7280; } .suspect { color: #b45309; font-weight: 600; } .error { color: #b91c1c; font-weight: 600; }
"""


def page(title: str, heading: str, note: str, headline: Sequence[tuple[str, str]], sections: Iterable[str]) -> str:
    """Returns a whole page.

    title: of the window. note: a line below the heading. headline: (big, small) texts of the boxes on top.
    sections: HTML, see `section`.
    """
    e = html.escape
    boxes = "".join(f"<div><b>{e(big)}</b>{e(small)}</div>" for big, small in headline)
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{e(title)}</title>
<style>{_STYLE}</style></head><body><main>
<h1>{e(heading)}</h1>
<div class="note">{e(note)}</div>
<div class="headline">{boxes}</div>
{"".join(sections)}</main></body></html>
"""


def section(heading: str, *parts: str) -> str:
    """Returns a part of a page. heading: text. parts: HTML."""
    return f"<section><h2>{html.escape(heading)}</h2>{''.join(parts)}</section>\n"


def note(text: str) -> str:
    """Returns a small grey paragraph."""
    return f'<p class="note">{html.escape(text)}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], classes: Iterable[str] | None = None) -> str:
    """Returns a table of texts. classes: of each row, such as "suspect", given to its first cell."""

    def row(values: Sequence[Any], name: str) -> str:
        first = f'<td class="{name}">' if name else "<td>"
        cells = "</td><td>".join(html.escape(str(v)) for v in values)
        return f"<tr>{first}{cells}</td></tr>\n"

    rows = list(rows)
    names = list(classes) if classes is not None else [""] * len(rows)
    heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(row(values, name) for values, name in zip(rows, names, strict=True))
    return f"<table><tr>{heads}</tr>\n{body}</table>"


def plot(figure: Figure, dpi: int = 110) -> str:
    """Returns a figure of matplotlib as an image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return f'<img class="plot" alt="" src="{data_uri(buffer.getvalue(), "png")}">\n'


def gallery(pictures: Iterable[tuple[str, bytes, str]], columns: int = 6) -> str:
    """Returns pictures in columns. pictures: (caption, content of the file, kind, like "jpeg")."""
    figures = (
        f'<figure><img alt="" src="{data_uri(content, kind)}">{html.escape(caption)}</figure>'
        for caption, content, kind in pictures
    )
    style = f' style="grid-template-columns: repeat({columns}, 1fr)"' if columns != 6 else ""
    return f'<div class="films"{style}>{"".join(figures)}</div>'


def data_uri(content: bytes, kind: str) -> str:
    """Returns a picture as an address that holds it. kind: "png", "jpeg" or "gif"."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
