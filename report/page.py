"""report.html: one file that opens from a disk, is readable on a phone, and prints well."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from common.talk import counted
from report.draw import Picture
from report.results import (
    CACHED,
    COLUMNS,
    COUNTS,
    GOODPUT,
    PER_GPU,
    PER_USER,
    SERVER,
    Column,
    Group,
    Record,
    groups,
    known,
    plain,
)
from report.words import in_short

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881;
  --bad: light-dark(#b3261e, #ff8a80); --good: light-dark(#146c2e, #81c995);
  --odd: light-dark(#8a5300, #fdd663); }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, li { max-width: 60rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .84rem; }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: top; }
th { vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas;
  white-space: normal; min-width: 8.5rem; }
tbody tr:hover { background: var(--soft); }
.words { text-align: left; white-space: normal; min-width: 9rem; overflow-wrap: anywhere; }
small { display: block; opacity: .6; font-size: .8em; line-height: 1.1; }
.bad { color: var(--bad); font-weight: 600; } .good { color: var(--good); font-weight: 600; }
.odd { color: var(--odd); font-weight: 600; } .soft { opacity: .6; }
.charts { columns: 2 24rem; column-gap: 1.5rem; margin: 1.5rem 0; }
figure { margin: 0 0 1.5rem; break-inside: avoid; }
figure svg { width: 100%; height: auto; display: block; }
figure text { font-family: inherit !important; } figure svg { overflow: visible; }
.tip:hover { stroke: currentColor; stroke-width: 2; cursor: default; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .9rem; }
dd { margin: 0; overflow-wrap: anywhere; } dt { opacity: .7; }
@page { size: A4 landscape; margin: 12mm; }
@media print { :root { color-scheme: light; } body { max-width: none; font-size: 10pt; padding: 0; }
  .wide { overflow: visible; } table { font-size: 7.5pt; } th, td { padding: .2rem .3rem; }
  tr, li { break-inside: avoid; } }
"""

MAIN = (*COUNTS, *COLUMNS)
MORE = (GOODPUT, CACHED, PER_USER, PER_GPU)


def html(records: Sequence[Record], pictures: Sequence[Picture], notes: Sequence[str]) -> str:
    found = groups(records)
    columns = (*MAIN, *known(MORE, records))
    own = known(SERVER, records)
    parts = [
        verdict(found),
        section("In short", listed(in_short(found))),
        section("Every load", load_table(found, columns)),
        charts(pictures),
        section("The server's own means, and by how much the client's are above them",
                load_table([g for g in found if known(own, g.records)], own) if own else ""),
        section("Notes", listed(notes)),
        section("How it was measured", measured(found)),
    ]  # fmt: skip
    return document(f"Benchmark of {model_of(records)}", parts)


def document(title: str, parts: Iterable[str]) -> str:
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{STYLE}</style>
<h1>{escape(title)}</h1>
{"".join(parts)}
</html>
"""


def section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}\n" if content else ""


def model_of(records: Sequence[Record]) -> str:
    return str(records[0]["model_id"]) if records else "nothing"


def verdict(found: Sequence[Group]) -> str:
    wrong = [g for g in found if not g.valid]
    if not wrong:
        return f"<p>{counted(len(found), 'load')}, every run valid.</p>"
    rows = "".join(f"<li><b>{escape(g.label)}</b>: {escape(p)}" for g in wrong for p in g.problems)
    return f'<p class="bad">{len(wrong)} of {len(found)} loads are invalid:</p><ul>{rows}</ul>'


# --- tables ---------------------------------------------------------------------------------------


def load_table(found: Sequence[Group], columns: Sequence[Column]) -> str:
    rows = ([name(g), *(cell(g, c) for c in columns)] for g in found)
    return table(["load", *(escape(c.title) for c in columns)], rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of HTML cells; a cell may begin with its own <td ...> or <th ...>."""
    body = "\n".join("<tr>" + "".join(map(whole_cell, row)) for row in rows)
    heads = "".join(text if text.startswith("<th") else f"<th>{text}" for text in head)
    return (f'<div class="wide"><table><thead><tr>{heads}</thead><tbody>\n{body}\n</tbody></table>'
            "</div>")  # fmt: skip


def whole_cell(text: str) -> str:
    return text if text.startswith("<td") else f"<td>{text}"


def name(group: Group) -> str:
    """A load's name. Long ones may wrap at their dashes, so that a phone has room for figures."""
    mark = "" if group.valid else ' <span class="bad">invalid</span>'
    return breakable(group.label) + mark


def breakable(label: str) -> str:
    return escape(label).replace("-", "-<wbr>")


def cell(group: Group, column: Column) -> str:
    value, around = group.shown(column)
    number = group.value(column.key) or 0
    odd = {"failed": "bad", "cached_share": "odd"}.get(column.key) if number > 0.01 else None
    text = f'<span class="{odd}">{value}</span>' if odd else value
    return text + (f" <small>{around}</small>" if around else "")


# --- charts, notes, conditions --------------------------------------------------------------------


def charts(pictures: Sequence[Picture]) -> str:
    figures = "".join(f'<figure id="{p.name}">{p.svg}</figure>\n' for p in pictures)
    return f'<div class="charts">{figures}</div>\n' if pictures else ""


def listed(items: Iterable[str]) -> str:
    rows = "".join(f"<li>{escape(item)}" for item in items)
    return f"<ul>{rows}</ul>" if rows else ""


def measured(found: Sequence[Group]) -> str:
    """What all runs have in common, and a table of how they differ if they do."""
    ways: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for group in found:
        for record in group.records:
            ways.setdefault(tuple(conditions(record).items()), []).append(group.label)
    keys = list(dict.fromkeys(key for way in ways for key, _ in way))
    facts = [dict(way) for way in ways]
    unlike = [key for key in keys if len({f.get(key, "-") for f in facts}) > 1]
    same = "".join(f"<dt>{escape(k)}<dd>{escape(facts[0][k])}" for k in keys if k not in unlike)
    heads = ['<th class="words">' + escape(key) for key in unlike]
    rows = [
        [breakable(", ".join(dict.fromkeys(labels))),
         *('<td class="words">' + escape(fact.get(key, "-")) for key in unlike)]
        for fact, labels in zip(facts, ways.values(), strict=True)
    ]  # fmt: skip
    return f"<dl>{same}</dl>" + (table(["loads", *heads], rows) if unlike else "")


def conditions(record: Record) -> dict[str, str]:
    """How one run was measured, in words."""
    client, data_set = record.get("client", {}), record.get("data_set")
    facts = {
        **record.get("metadata", {}),
        "data set": data_set,
        "time stamps": client.get("stamps"),
        "client processes": client.get("shards"),
    }
    return {key.replace("_", " "): plain(v) for key, v in facts.items() if not is_empty(v)}


def is_empty(value: Any) -> bool:  # noqa: ANN401
    return value is None or value in ("", [], {})
