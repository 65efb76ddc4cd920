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
    """Of one folder; or, after the word `compare`, of others side by side."""
    if others:
        return compare_several(others) if others[2:] else side_by_side(*others)
    found = load(first)
    try:
        write(first, *found)
    finally:  # in a folder that only others may write to, too
        print(table(*found))
    say(f"{first}/report.html")
    return 0


def side_by_side(first: Path, second: Path) -> int:
    """On the screen, and as a page in the second folder: it is the newer one."""
    before, after = load(first), load(second)
    print(comparison(before.records, after.records))
    for words in (*before.left_out, *after.left_out):
        say(words)
    names = (first.resolve().name, second.resolve().name)
    page = second / f"compare-{names[0]}.html"
    write_page(names, before, after, page)
    say(f"{page}")
    return 0


def compare_several(folders: Sequence[Path]) -> int:
    """The same of more than two, each against the first; the page is in the last one."""
    found, own = [load(folder) for folder in folders], [each.resolve().name for each in folders]
    names = own if len(set(own)) == len(own) else told_apart(folders)
    print(several(names, [each.records for each in found]))
    for words in (words for each in found for words in each.left_out):
        say(words)
    page = folders[-1] / f"compare-{'-'.join(own[:-1])}.html"
    write_several(names, found, page)
    say(f"{page}")
    return 0


def told_apart(folders: Sequence[Path]) -> list[str]:
    """Their paths, as far as they differ."""
    whole = [each.resolve() for each in folders]
    common = os.path.commonpath(whole)
    return [str(each.relative_to(common)) for each in whole]


if __name__ == "__main__":
    raise SystemExit(main())
