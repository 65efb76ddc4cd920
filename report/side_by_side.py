"""The comparison page: what is better or worse, by how much, and by more than chance?"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from common.talk import whole_file
from report.charts import all_charts
from report.compare import Change, compare, outcome, remarks
from report.draw import draw
from report.page import (
    breakable,
    charts,
    document,
    listed,
    measured,
    model_of,
    section,
    table,
)
from report.results import COMPARED, Found, groups

CLASSES = {"better": "good", "WORSE": "bad"}
KEY = ("Each figure is the change from before to after; point at it to see both. Coloured: "
       "better or worse by more than repeats differ. Grey: no more than that, or unknown, "
       "because one side had only one run.")  # fmt: skip


def write(names: tuple[str, str], before: Found, after: Found, path: Path) -> None:
    with whole_file(path) as file:
        file.write(html(names, before, after))


def html(names: tuple[str, str], before: Found, after: Found) -> str:
    changes = compare(before.records, after.records)
    sides = [("before", groups(before.records)), ("after", groups(after.records))]
    unlike = [*remarks(before.records, after.records), *before.left_out, *after.left_out]
    parts = [
        f"<p>Before: {escape(names[0])}. After: {escape(names[1])}. "
        f"Model: {escape(model_of(after.records))}.</p>",
        listed(outcome(changes)),
        section("What to mind", listed(unlike)),
        section("Every load", matrix(changes) + f"<p><small>{KEY}</small></p>" if changes else ""),
        charts(draw(all_charts(sides))),
        *(section(f"How it was measured {side}", measured(found)) for side, found in sides),
    ]
    return document(f"{names[0]} against {names[1]}", parts)


def write_several(names: Sequence[str], folders: Sequence[Found], path: Path) -> None:
    with whole_file(path) as file:
        file.write(html_of_several(names, folders))


def html_of_several(names: Sequence[str], folders: Sequence[Found]) -> str:
    """A section for each folder against the first one, then the curves of all."""
    sides = list(zip(names, folders, strict=True))
    (first, before), *others = sides
    parts = [f"<p>{escape(first)} is before, each of the others after. {KEY}</p>"]
    for name, after in others:
        changes = compare(before.records, after.records)
        said = [*outcome(changes), *remarks(before.records, after.records)]
        told = listed(said) + (matrix(changes) if changes else "")
        parts.append(section(f"{name} against {first}", told))
    parts.append(section("What was left out", listed([w for f in folders for w in f.left_out])))
    parts.append(charts(draw(all_charts([(name, groups(f.records)) for name, f in sides]))))
    parts += [section(f"How {name} was measured", measured(groups(f.records))) for name, f in sides]
    return document(" against ".join(names), parts)


def matrix(changes: Sequence[Change]) -> str:
    """A row per load, a column per figure."""
    columns = [c for c in COMPARED if any(change.column == c for change in changes)]
    found = {(change.label, change.column.key): change for change in changes}
    labels = dict.fromkeys(change.label for change in changes)
    rows = ([breakable(label), *(cell(found.get((label, c.key))) for c in columns)]
            for label in labels)  # fmt: skip
    return table(["load", *(escape(c.title) for c in columns)], rows)


def cell(change: Change | None) -> str:
    if change is None:
        return "-"
    before, after, relative, _, verdict = change.row[2:]
    told = f"{before} before, {after} after; {change.noise_in_words}"
    words = f"{relative} {verdict}" if verdict in CLASSES else relative
    return (f'<td class="{CLASSES.get(verdict, "soft")}" title="{escape(told)}">{words}'
            f"<small>{before} → {after}</small>")  # fmt: skip
