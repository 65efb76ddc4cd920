"""report.html: one file that opens from a disk and reads on a telephone."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from report.charts import Chart, Picture
from report.results import Column, Group

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --bad: #c0392b; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: Canvas; }
tbody tr:hover { background: var(--soft); }
small { opacity: .7; }
.bad { color: var(--bad); font-weight: 600; }
figure { margin: 1rem 0; } figure img { width: 100%; max-width: 45rem; height: auto; display: block;
  background: #fff; border-radius: .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .9rem; }
dd { margin: 0; overflow-wrap: anywhere; } dt { opacity: .7; }
"""


def html(
    groups: Sequence[Group],
    columns: Sequence[Column],
    drawn: Sequence[Chart],
    pictures: Sequence[Picture],
    notes: Sequence[str],
) -> str:
    title = f"Benchmark of {model_of(groups)}"
    figures = "".join(figure(c, p) for c, p in zip(drawn, pictures, strict=False))
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{STYLE}</style>
<h1>{escape(title)}</h1>
{verdict(groups)}
<div class="wide"><table>
<thead>{header(columns)}</thead>
<tbody>{"".join(row(g, columns) for g in groups)}</tbody>
</table></div>
{figures}
{listed(notes)}
<h2>How it was measured</h2>
<dl>{"".join(fact(k, v) for k, v in metadata(groups).items())}</dl>
</html>
"""


def model_of(groups: Sequence[Group]) -> str:
    return str(groups[0].records[0]["model_id"]) if groups else "nothing"


def metadata(groups: Sequence[Group]) -> dict[str, Any]:
    return dict(groups[0].records[0].get("metadata", {})) if groups else {}


def verdict(groups: Sequence[Group]) -> str:
    wrong = [g for g in groups if not g.valid]
    if not wrong:
        return f"<p>{len(groups)} loads, every run valid.</p>"
    rows = "".join(f"<li><b>{escape(g.label)}</b>: {escape(p)}" for g in wrong for p in g.problems)
    return f'<p class="bad">{len(wrong)} of {len(groups)} loads are invalid:</p><ul>{rows}</ul>'


def header(columns: Iterable[Column]) -> str:
    return "<tr><th>load" + "".join(f"<th>{escape(c.title)}" for c in columns)


def row(group: Group, columns: Iterable[Column]) -> str:
    mark = "" if group.valid else ' <span class="bad">invalid</span>'
    cells = "".join("<td>" + cell(*group.shown(c)) for c in columns)
    return f"<tr><td>{escape(group.label)}{mark}{cells}\n"


def cell(value: str, around: str) -> str:
    return value + (f" <small>{around}</small>" if around else "")


def figure(chart: Chart, picture: Picture) -> str:
    data = b64encode(picture.svg).decode()
    return (
        f'<figure id="{escape(chart.name)}">'
        f'<img alt="{escape(chart.title)}" src="data:image/svg+xml;base64,{data}"></figure>\n'
    )


def listed(notes: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(note)}" for note in notes)
    return f"<ul>{items}</ul>" if items else ""


def fact(name: str, value: Any) -> str:  # noqa: ANN401
    if value in (None, "", [], {}):
        return ""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"<dt>{escape(name.replace('_', ' '))}<dd>{escape(text)}"
