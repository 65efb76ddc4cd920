"""Results of bench.py: write a folder's report again, or compare folders.

Examples:
    python -m report results/20261124-101500         # write its report again
    python -m report compare results/A results/B     # better or worse?
    python -m report compare results/A results/B results/C      # B and C against A
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from common.talk import say
from load.bench_place import exit_code
from report.compare import comparison, several
from report.render import table, write
from report.results import load
from report.side_by_side import write as write_page
from report.side_by_side import write_several

LONGEST = 200  # bytes of the folders' names in a page's name


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m report",
        usage="%(prog)s FOLDER | %(prog)s compare BEFORE AFTER...",
    )
    parser.add_argument("words", nargs="+", metavar="FOLDER")
    args = parser.parse_args(argv)
    if len(args.words) < 3 if args.words[0] == "compare" else args.words[1:]:
        parser.error("one folder, or `compare` and two or more")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return exit_code(lambda: report(*map(Path, args.words)))


def report(first: Path, *others: Path) -> int:
    """Report on one folder or, after the word `compare`, compare others."""
    if others:
        return compare_several(others) if others[2:] else side_by_side(*others)
    found = load(first)
    try:
        write(first, *found)
    finally:  # even if only others may write to the folder
        print(table(*found))
    say(f"{first}/report.html")
    return 0


def side_by_side(first: Path, second: Path) -> int:
    """Compare two folders on the terminal and on a page in the second, which is the newer one."""
    before, after = load(first), load(second)
    print(comparison(before.records, after.records))
    for words in (*before.left_out, *after.left_out):
        say(words)
    one, other = names_of((first, second))
    page = second / page_name([first.resolve().name])
    write_page((one, other), before, after, page)
    say(f"{page}")
    return 0


def compare_several(folders: Sequence[Path]) -> int:
    """The same for more than two, each against the first; the page is in the last one."""
    found, names = [load(folder) for folder in folders], names_of(folders)
    print(several(names, [each.records for each in found]))
    for words in (words for each in found for words in each.left_out):
        say(words)
    page = folders[-1] / page_name([each.resolve().name for each in folders[:-1]])
    write_several(names, found, page)
    say(f"{page}")
    return 0


def page_name(names: Sequence[str]) -> str:
    """What a file system takes: 255 bytes, and a few more while the page is written."""
    words = "-".join(names)
    if len(os.fsencode(words)) > LONGEST:
        words = words[: LONGEST // 4] + "-and-more"  # a character has up to four bytes
    return f"compare-{words}.html"


def names_of(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or if two are alike their paths, without what those have in common."""
    whole = [each.resolve() for each in folders]
    if len({each.name for each in whole}) == len(whole):
        return [each.name for each in whole]
    common = os.path.commonpath([each.parent for each in whole])
    return [str(each.relative_to(common)) for each in whole]


if __name__ == "__main__":
    raise SystemExit(main())
