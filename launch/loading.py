"""What the engine does while it loads, read off its log: the phase, and how far it is."""

import re
from functools import cache

from launch.config_file import read_table
from launch.log_lines import clean

READ = 8192  # bytes that are read of what is new in a log, from its end
LOOKED_AT = 160  # characters of a line that are read
BAR = re.compile(  # tqdm's: `label:  33%|### | 1.74G/4.98G [...`, or `33% Completed | 2/6 [...`
    r"(?P<label>.*?):? +\d+%[^|]*\|(?:[^|]*\|)? *"
    r"(?P<done>[\d.]+)(?P<of>[kMGT]?)B?/(?P<total>[\d.]+)(?P<unit>[kMGT]?)B?\b"
)
COUNT = re.compile(r"(?P<label>.*?)\b(?P<done>\d+) of (?P<total>\d+)\b")
SHARE = re.compile(r"\b\d+ ?%")
GIGABYTES = {"k": 1e-6, "M": 1e-3, "G": 1.0, "T": 1e3}


@cache
def table() -> dict[str, re.Pattern[str]]:
    rows = read_table("phases.yaml").items()
    return {phase: re.compile("|".join(says)) for phase, says in rows}


def phase_of(text: str) -> str:
    """The first phase that fits; '' if none does."""
    return next((phase for phase, says in table().items() if says.search(text)), "")


class Loading:
    """The phase of an engine that is loading, from what is new in its log."""

    def __init__(self) -> None:
        self.phase, self.far = "", ""
        self.rest = b""  # the line that is not complete yet
        self.counts: dict[str, str] = {}  # of nested bars, those that are not full
        self.sizes: dict[str, tuple[float, float]] = {}  # GB, done and in total, by file

    @property
    def said(self) -> str:
        return f"{self.phase} {self.far}".strip()

    def read(self, new: bytes) -> None:
        *lines, self.rest = re.split(rb"[\r\n]+", (self.rest + new)[-READ:])
        if self.rest.endswith(b"]"):  # a bar: only the next one ends its line
            lines.append(self.rest)
        for line in lines:
            self.take(clean(line.decode(errors="replace")).text[:LOOKED_AT].strip())

    def take(self, text: str) -> None:
        if not (phase := phase_of(text)):
            return
        if phase != self.phase:
            self.phase, self.far, self.counts, self.sizes = phase, "", {}, {}
        if found := BAR.match(text):
            self.take_bar(found)
        elif found := COUNT.match(text):
            self.count(found)
        elif share := SHARE.search(text):
            self.far = share[0]

    def take_bar(self, bar: re.Match[str]) -> None:
        """Files that are fetched side by side have a bar each; their sizes are added up."""
        if not bar["unit"]:
            self.count(bar)
            return
        done, total = float(bar["done"]), float(bar["total"]) * GIGABYTES[bar["unit"]]
        self.sizes[bar["label"]] = done * GIGABYTES.get(bar["of"], 1e-9), total
        self.far = "{:.1f} of {:.1f} GB".format(*map(sum, zip(*self.sizes.values(), strict=True)))

    def count(self, found: re.Match[str]) -> None:
        """Of nested bars, the outer one, which begins first, tells how far it is."""
        label = re.sub(r"\(.*?\)|\d+", "", found["label"])  # the same bar, whatever it counts
        self.counts[label] = f"{found['done']} of {found['total']}"
        if not self.sizes:
            self.far = next(iter(self.counts.values()))
        if float(found["done"]) >= float(found["total"]):
            del self.counts[label]
