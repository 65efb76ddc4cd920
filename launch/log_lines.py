"""Log lines without the prefixes of loggers and launchers: who speaks, when, how loud."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from launch.engines import DATE, LEVEL, every

LONGEST = 4000  # characters of a line that are read
MARK = re.compile(r"^===== run_sbatch\.py: .* =====$", re.M)  # what follows is another server's

ANSI = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07]*\x07|[()].)")
TIME = re.compile(r"\d\d:\d\d:\d\d")
PREFIXES = (
    r"(?P<speaker>\[(?:prterun-[^\]]*@\d+,\d+\]<std\w+>: |\d+,\d+\]<std\w+>:))",  # mpirun
    r"(?P<speaker>(?:[\w.-]*: )?\[(?:rank|default)\d+\]): ?(?!$)",  # pdsh: the host before it
    r"(?P<speaker> *\d{1,5}): (?=\S|  )",  # srun --label
    r"(?P<speaker>[\w.-]+) +\| (?=\S|  )",  # docker compose
    r"slurmstepd(?:-\S+)?: (?P<level>error): pyxis: {4} *",  # what enroot has said
    r"\w{3} [ \d]\d \d\d:\d\d:\d\d [\w.-]+ [\w.@-]+\[\d+\]: ",  # journald
    rf"\[{DATE} (?P<level>[DIWEF]) \d+ \d+\] ",  # Ray
    r"\[\d\d/\d\d/\d{4}-\d\d:\d\d:\d\d\] ",
    r"\[?(?P<level>[IWEF])\d{3,4} \d\d:\d\d:\d\d\.\d+ +(?:\d+ )?[\w./]+:\d+\] ?",  # glog
    rf"\[{LEVEL}\|[^\]]*\] {DATE} >> ",  # transformers
    rf"{DATE} (?:stdout|stderr) [FP] ",  # containerd
    rf"{DATE} - [\w.]+ - {LEVEL} - ",
    rf"{LEVEL} [\w.]+\.py:\d+: ",
    rf"{DATE} ?[-|]? *{LEVEL} *[-|] *(?:[\w.]+:[\w<>.]+:\d+ - |[\w.]+: )?",
    rf"{DATE}(?: |$)",
    rf"\[?{LEVEL}\]?:? +",
    rf"{LEVEL}:(?=[\w.]+:)",
    r" *(?:\+-\+-+ \d+ -+|\| )(?! *\d+/\d+)",  # an exception group's
    r"[^|]{,99}\d%\|[^|]{,200}\| *\d+/\d+ \[[^\]]*\](?=\S)",  # a bar, on the same line
)


@dataclass(frozen=True)
class Line:
    text: str
    speaker: str = ""  # a rank or a process, by the prefix
    loud: bool | None = None  # an error; False: information or a warning; None: it does not say
    time: str = ""
    headed: bool = False  # it has a logger's prefix, so it is not the rest of a message
    begins: bool = False  # it begins a message, as its logger heads only first lines


@cache
def prefixes() -> Sequence[re.Pattern[str]]:
    """The engines' own come first. Compiled with the first line, as a start does not need them."""
    own = (pattern for engine in every() for pattern in engine.PREFIXES)
    return [re.compile(pattern) for pattern in (*own, *PREFIXES)]


def clean(raw: str, time: str = "") -> Line:
    """A line without colours, prefixes and what a bar overwrote; `time` is used if it has none."""
    text = ANSI.sub("", raw.rstrip("\r\n")).rpartition("\r")[2][:LONGEST]
    when = TIME.search(text[:120])
    speaker, level, headed, begins = "", "", False, False
    while found := next(filter(None, (prefix.match(text) for prefix in prefixes())), None):
        groups = found.groupdict()
        speaker += (groups.get("speaker") or "").strip()
        headed |= "speaker" not in groups
        begins |= "begins" in groups
        level = groups.get("level") or level
        text = text[found.end() :]
    loud = level[0] in "eEFC" if level else None
    return Line(text, speaker, loud, when[0] if when else time, headed, begins)


def lines_of(text: str) -> list[Line]:
    lines: list[Line] = []
    for raw in MARK.split(text)[-1].split("\n"):
        lines.append(clean(raw, lines[-1].time if lines else ""))
    return lines
