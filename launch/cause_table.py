"""Why servers end, as far as we know: causes.yaml, for the launcher and as the page's tables.

python -m launch.cause_table docs/troubleshooting.md    writes them between the page's marks
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from itertools import groupby
from pathlib import Path

from launch.config_file import read_table

SUPPOSED = re.compile(r"(?<=[.;:)]) (If|There are some potential) ")
LOOKED = 1000  # characters of a line that are searched; the table takes long on longer ones
MARKS = ("<!-- causes: begin -->\n", "<!-- causes: end -->\n")


class Weight(IntEnum):
    """How much a line proves; the lowest counts first."""

    ROOT = 0
    CRASH = 1  # and exceptions that the table does not know
    ECHO = 2  # follows when another process has failed
    REMARK = 3  # an error that may have been survived
    REPORT = 4  # says that there was an error, but not which


@dataclass(frozen=True)
class Kind:
    """A row of the table; `shows` is its text for people."""

    group: str
    shows: str
    says: re.Pattern[str]
    meaning: str
    next: str
    weight: Weight


@cache
def table() -> Sequence[Kind]:
    groups = read_table("causes.yaml").items()
    return [kind(group, row) for group, rows in groups for row in rows]


def kind(group: str, row: dict[str, str]) -> Kind:
    says, shows = re.compile("|".join(row["says"]), re.IGNORECASE), plain(row["says"][0])
    weight = Weight[row.get("weight", "root").upper()]
    return Kind(group, shows, says, row.get("means", ""), row.get("next", ""), weight)


def plain(pattern: str) -> str:
    """A regular expression of plain words as people would write it."""
    return pattern.replace(" .* ", " ... ").replace(".*", " ... ").replace("\\", "")


def known(text: str) -> Kind | None:
    """The first row that fits a line up to its `If ...`: what follows may not have happened."""
    text = SUPPOSED.split(text[:LOOKED])[0]
    return next((each for each in table() if each.says.search(text)), None)


def markdown() -> str:
    """The page's tables, one for each group."""
    parts: list[str] = []
    causes = [each for each in table() if each.meaning]
    for group, kinds in groupby(causes, lambda each: each.group):
        parts += [f"### {group}", "", "| The log says | It means | What to do |", "|---|---|---|"]
        for each in kinds:
            cells = f"`{each.shows}`", f"{each.meaning}.", f"{sentence(each.next)}."
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)


def sentence(words: str) -> str:
    return words[0].upper() + words[1:]


def renewed(page: str) -> str:
    """The page with the current tables between its marks."""
    before, _, rest = page.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    return f"{before}{MARKS[0]}\n{markdown()}\n{MARKS[1]}{after}"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
