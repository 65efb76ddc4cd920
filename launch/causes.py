"""Why a server ended: the line of its logs that says so, what it means, what to do next.

The last line of a log is rarely the cause. We look for lines that have the shape of one:
exceptions, fatal signals, Open MPI's blocks, NCCL's warnings, usage errors. The table knows what
most of them mean and how much they prove. The earliest of those that prove the most is the cause.
"""

import glob
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from launch import cause_shapes as shapes
from launch.cause_table import Kind, Weight, known
from launch.log_lines import Line, lines_of

READ = 1 << 19  # bytes read of all logs of a launch together, from their ends
LEAST = 1 << 15
SHOWN = 400  # characters of the cause that are shown
UNFORESEEN = (
    "not a known cause: do what the line says, or read the log around it and "
    "search the engine's issues"
)


@dataclass(frozen=True)
class Cause:
    """The line that names the cause, what it means ('' if nobody knows), and what to do next."""

    line: str
    meaning: str
    next: str

    @property
    def advice(self) -> str:
        return f"{self.meaning}: {self.next}" if self.meaning else self.next


@dataclass(frozen=True)
class Finding:
    """Something with the shape of a cause, at the line `at`."""

    text: str
    at: int
    weight: Weight
    kind: Kind | None = None
    warning_of: re.Pattern[str] | None = None  # what it warns of; without that it proves nothing
    bare: bool = False  # an exception without a message
    ends: bool = False  # the process itself says that this ended it

    @property
    def says_why(self) -> bool:
        """Whether it says why: a report does so only if the table gives it a meaning."""
        report = self.kind and self.kind.weight == Weight.REPORT and self.kind.meaning
        return self.weight < Weight.REPORT or bool(report)

    @property
    def of_start(self) -> bool:
        """Whether it is about loading: once a server answers, only bad requests look like that."""
        return self.kind is not None and self.kind.group in ("The model", "Options")


# Reading
def judge(text: str, at: int, rest: Sequence[str] = (), unknown: Weight = Weight.CRASH) -> Finding:
    """Weigh a line by the table; `rest` are the further lines of its message."""
    first = known(text)
    if first and first.weight not in (Weight.CRASH, Weight.ECHO):
        return Finding(text, at, first.weight, first)
    for more in rest:
        if (found := known(more)) and found.weight < (first.weight if first else Weight.REPORT):
            return Finding(f"{text} {more.strip()}", at, found.weight, found)
    return Finding(text, at, first.weight if first else unknown, first)


def message(lines: Sequence[Line], at: int) -> list[str]:
    """The further lines of the message that begins at `at`, until somebody says something else."""
    said: list[str] = []
    for line in lines[at + 1 : at + 12]:
        other = (line.speaker, line.headed) != (lines[at].speaker, lines[at].headed)
        new = line.begins or shapes.EXCEPTION.match(line.text)
        if other or new or shapes.ENDS_MESSAGE.match(line.text.lstrip() or "x"):
            break
        if line.text.strip():
            said.append(line.text)
    return said


def pydantic(said: Iterable[str]) -> str:
    """`key: message` for every error that pydantic lists."""
    errors, key, words = [], "", ""
    for line in said:
        if words or (line.startswith(" ") and "For further information" not in line):
            words = f"{words} {line.strip()}".strip()
        elif not line.startswith(" "):
            key = line.strip()
        if found := re.search(r" *[\[(]type=", words):
            errors.append(f"{key}: {words[: found.start()]}" if key else words[: found.start()])
            key = words = ""
    return "; ".join(errors)


def exception(lines: Sequence[Line], at: int) -> Finding:
    """An exception with its message, or else with the statement that raised it."""
    text, said = shapes.WRAPS.sub("", lines[at].text.strip()), message(lines, at)
    if "validation error" in text and (errors := pydantic(said)):
        return judge(errors, at)
    if text.endswith(":"):  # its message begins with an empty line, or one like a logger's
        said = said or [each.text for each in lines[at + 1 : at + 2] if not each.headed]
        text = f"{text} {said.pop(0).strip()}" if said else text
    elif ":" not in text:
        code = lines[at - 1].text if re.search(r"\w", lines[at - 1].text) else lines[at - 2].text
        text = f"{text}: {code.strip()}" if at > 1 and code.startswith("    ") else text
        return replace(judge(text, at, said), bare=True)
    new = judge(text, at, said)
    refused = not new.kind and shapes.REFUSES.match(text)
    return replace(new, kind=by_place(lines, at)) if refused else new


def by_place(lines: Sequence[Line], at: int) -> Kind | None:
    """What an exception means by the file that raised it, if a row names that file."""
    frames = (shapes.FRAME.match(line.text) for line in reversed(lines[max(at - 6, 0) : at]))
    frame = next(filter(None, frames), None)
    kind = known(f"raised in {frame[1]}") if frame else None
    return kind if kind and "^raised in" in kind.says.pattern else None


def outside(new: Finding, where: str) -> Finding:
    """Weigh an exception that may have ended a thread, a task, a request or nothing at all.

    One that ended a request concerns only that request, unless it is about the GPU.
    """
    remote = new.kind and new.kind.group == "The model"  # such as usage reports that are sent home
    thread = where.startswith("Exception in thread") and new.weight != Weight.ROOT and not remote
    if thread or where == shapes.WENT_ON:
        return replace(new, weight=max(new.weight, Weight.ECHO))
    if where.startswith("Exception in ASGI") and not (new.kind and "GPU" in new.kind.group):
        return replace(new, weight=Weight.REPORT)
    ended = where.startswith(("Exception in", "Task ", "Future "))
    return new if ended and new.weight == Weight.ROOT else replace(new, weight=Weight.REPORT)


def block(lines: Sequence[Line], at: int) -> tuple[str, int]:
    """Open MPI's words between two rules, as one line, and the second rule's index; '' if none."""
    near = range(at + 1, min(at + 40, len(lines)))
    end = next((i for i in near if shapes.RULE.match(lines[i].text)), 0)
    words = " ".join(line.text.strip() for line in lines[at + 1 : end]) if end else ""
    return re.sub(r"\s+", " ", words).strip(), end


@dataclass
class Reader:
    """Collects a log's findings; linked exceptions count as one."""

    lines: Sequence[Line]
    serving: bool = False
    found: list[Finding] = field(default_factory=list)
    last: dict[str, int] = field(default_factory=dict)  # each speaker's last exception, in `found`
    linked: set[str] = field(default_factory=set)  # speakers whose next exception follows from it
    kills_itself: bool = False
    dying: set[str] = field(default_factory=set)  # speakers whose next exception ends them
    outside: dict[str, str] = field(default_factory=dict)  # whose next one ends nothing, and why
    around: dict[str, str] = field(default_factory=dict)  # what `outside` said of their last one
    failed: dict[re.Pattern[str], Sequence[int]] = field(default_factory=dict)  # see `failures`
    refused: list[range] = field(default_factory=list)  # lines about a request that was refused
    broken: list[range] = field(default_factory=list)  # or was answered with an error

    def read(self) -> list[Finding]:
        at, access = 0, 0
        while at < len(self.lines):
            text = self.lines[at].text
            if ' HTTP/1.1" ' in text:
                if found := shapes.REFUSED.search(text):
                    (self.refused if found[1] == "4" else self.broken).append(range(access, at))
                access = at
            elif shapes.RULE.match(text):
                at = self.take_block(at)
            else:
                self.take(at, self.lines[at])
            at += 1
        return [self.in_place(f) for f in self.found if self.counts(f)]

    def failures(self, of: re.Pattern[str]) -> Sequence[int]:
        """The lines of the failures that `of` describes, in order."""
        if of not in self.failed:
            others = (each for each in self.found if each.warning_of is not of)
            self.failed[of] = sorted(each.at for each in others if of.search(each.text))
        return self.failed[of]

    @cached_property
    def crashes(self) -> Sequence[int]:
        own = (each for each in self.found if not each.warning_of)
        return [each.at for each in own if each.weight == Weight.CRASH]

    @cached_property
    def worked(self) -> int:
        return last(shapes.WORKS, self.lines)

    def in_place(self, f: Finding) -> Finding:
        """Date a warning by the failure that it warned of: until then it may have done no harm.

        If an unknown exception comes between the two, that exception caused the failure.
        """
        if not f.warning_of or f.warning_of is shapes.NO_CUDA:
            return f
        failed = next((at for at in self.failures(f.warning_of) if at > f.at), None)
        if f.warning_of is not shapes.NCCL_FAILED and failed is None:
            return replace(f, weight=max(f.weight, Weight.REMARK))
        if failed and any(f.at < at < failed for at in self.crashes):
            return replace(f, weight=max(f.weight, Weight.ECHO))
        return replace(f, at=failed or f.at)

    def counts(self, f: Finding) -> bool:
        """Whether it counts. NCCL's and CUDA's warnings need a failure, others may stand alone."""
        if f.warning_of:
            failed = self.failures(f.warning_of)
            if failed and f.at < failed[-1]:
                return True
            alone = f.warning_of in (shapes.UCX_FAILED, shapes.BUILD_FAILED)
            return f.kind is not None and (bool(failed) or alone)
        if shapes.FATAL.search(f.text) or f.ends:
            return True
        asked = shapes.OF_REQUESTS.search(f.text) or f.of_start or self.survived(f)
        return not (self.serving and asked) and not any(f.at in each for each in self.refused)

    def survived(self, f: Finding) -> bool:
        """Whether only a request failed: unknown, and work went on or the request was answered."""
        told = any(f.at in each for each in self.broken)
        return f.kind is None and (told or f.at < self.worked)

    def take_block(self, at: int) -> int:
        words, end = block(self.lines, at)
        quiet = any(line.loud is False for line in self.lines[at : at + 3])
        said = re.split("[.:] ", words)[0] if quiet else words  # a warning's first sentence
        if words and not (quiet and not known(said)) and not shapes.REMARKS.match(words):
            self.found.append(judge(words, at, unknown=Weight.ECHO))
        return end or at

    def take(self, at: int, line: Line) -> None:
        text, speaker = line.text, line.speaker
        if shapes.DIES.search(text):
            self.dying.add(speaker)
        self.kills_itself |= bool(shapes.KILLS_ITSELF.search(text))
        if line.loud is False and not shapes.FAMILIAR.match(text):
            if "Traceback (most recent" in text:
                self.outside[speaker] = text
            elif shapes.EXCEPTION.match(text):
                self.outside.pop(speaker, None)
        elif shapes.OUTSIDE.match(text):
            self.outside[speaker] = text
        elif text.startswith("Traceback") and self.goes_on(at):
            self.outside[speaker] = shapes.WENT_ON
        elif text.startswith(shapes.LINKED):
            self.linked.add(speaker)
        elif shapes.EXCEPTION.match(text):
            self.take_exception(exception(self.lines, at), speaker)
        else:
            self.found += self.others(at, line)

    def goes_on(self, at: int) -> bool:
        """Whether the traceback at `at` belongs to a warning, after which the speaker went on."""
        before, *after = (line for line in self.lines[max(at - 1, 0) : at + 60])
        quiet = before.loud is False and before.speaker == self.lines[at].speaker
        says_so = quiet and self.lines[at].loud is None and shapes.WARNS.search(before.text)
        return bool(says_so) and any(x.loud is False and x.speaker == before.speaker for x in after)

    def ending(self, new: Finding) -> Finding:
        """Mark what ends the process; rows about loading do not explain a serving server's end."""
        unknown = self.serving and new.of_start
        kind, weight = (None, Weight.CRASH) if unknown else (new.kind, new.weight)
        return replace(new, kind=kind, weight=weight, ends=True)

    def take_exception(self, new: Finding, speaker: str) -> None:
        """Of a chain, keep the last exception that proves the most, at the place of the first."""
        linked = speaker in self.linked and speaker in self.last
        where = self.outside.pop(speaker, self.around.get(speaker, "") if linked else "")
        self.around[speaker] = where
        new = outside(new, where) if where else new
        if speaker in self.dying:
            new = self.ending(new)
            self.dying.discard(speaker)
        if linked:
            old = self.found[self.last[speaker]]
            proves_less = old.bare and not old.kind
            worse = new.weight + bool(shapes.CLEANING.search(new.text)) > old.weight + proves_less
            best = old if worse else new
            self.found[self.last[speaker]] = replace(best, at=old.at, ends=old.ends or new.ends)
        else:
            self.last[speaker] = len(self.found)
            self.found.append(new)
        self.linked.discard(speaker)

    def others(self, at: int, line: Line) -> Iterator[Finding]:
        """Findings that are not Python exceptions."""
        text = line.text.strip()
        if found := shapes.NCCL_WARNS.match(text):
            yield replace(judge((found[1] or "") + found[2], at), warning_of=shapes.NCCL_FAILED)
        elif shapes.UCX_WARNS.match(text):
            yield replace(judge(text, at, unknown=Weight.REPORT), warning_of=shapes.UCX_FAILED)
        elif shapes.BUILD_WARNS.match(text):
            yield replace(judge(text, at), warning_of=shapes.BUILD_FAILED)
        elif found := shapes.CUDA_WARNS.match(text):
            yield replace(judge(found[1], at), warning_of=shapes.NO_CUDA)
        elif found := shapes.WHAT.match(text):
            yield judge(found[1], at, message(self.lines, at))
        elif shapes.PLAIN.match(text):
            yield judge(text, at, message(self.lines, at))
        elif shapes.SHELL.match(text):
            yield replace(judge(text, at), weight=Weight.REMARK)
        elif self.kills_itself and shapes.KILLED.match(text):
            return
        elif shapes.FAMILIAR.match(text):
            yield judge(text, at, unknown=Weight.REPORT)
        elif line.loud and text and not self.only_reports(at):
            yield self.logged(at, text)

    def logged(self, at: int, text: str) -> Finding:
        """What a logger calls an error. It may be harmless, such as a failed optional import."""
        words, reported = shapes.REPORTED.subn("", text, count=1)
        new = judge(words, at, unknown=Weight.CRASH if reported else Weight.REMARK)
        optional = new.kind and new.kind.group == "Software" and new.weight == Weight.ROOT
        least = Weight.REMARK if optional and not reported else Weight.CRASH
        new = replace(new, weight=max(new.weight, least))
        return self.ending(new) if reported and shapes.DIES.search(text) else new

    def only_reports(self, at: int) -> bool:
        """Whether it says only that something failed: why is in a traceback, here or elsewhere."""
        line, *rest = self.lines[at : at + 2]
        if shapes.NO_ERROR.search(line.text):
            return True
        traced = rest and rest[0].speaker == line.speaker and rest[0].text.startswith("Traceback")
        return bool(traced or shapes.THAT_NOT_WHY.match(line.text)) and not known(line.text)


# Choosing
def find(lines: Sequence[Line]) -> tuple[Finding, str] | None:
    """A log's earliest finding among those that prove the most, with its time.

    Once a server has served, only what follows its last answer counts. A report counts only if
    there is nothing else and the table gives it a meaning.
    """
    ready = last(shapes.READY, lines)
    answered = max(last(shapes.ANSWERED, lines), ready)
    if again := last(shapes.STARTS, lines[answered:]) if answered else 0:
        return find(lines[answered + again :])
    found = told(lines[answered:], serving=answered > 0)
    if answered > ready and all(f.weight == Weight.REPORT for f in found):
        read = Reader(lines[ready:answered], serving=True).read()
        # a stream is answered with 200 before it fails
        if before := [f for f in read if f.ends or shapes.FATAL.search(f.text)]:
            found, answered = before, ready
    best = min(found, key=lambda f: (f.weight, f.at), default=None)
    return (best, lines[answered + best.at].time) if best else None


def told(lines: Sequence[Line], serving: bool) -> list[Finding]:
    """The candidates: remarks only from a failing start, echoes only from before a proper stop."""
    ended = last(shapes.IN_ORDER, lines)
    if not ended or last(shapes.STARTS, lines[ended:]):
        ended = len(lines)
    where = dict.fromkeys((Weight.ECHO, Weight.REPORT), range(ended))
    where[Weight.REMARK] = range(0) if serving else range(len(lines) - 15, len(lines))
    read = Reader(lines, serving).read()
    return [f for f in read if f.says_why and (f.weight not in where or f.at in where[f.weight])]


def last(pattern: re.Pattern[str], lines: Sequence[Line]) -> int:
    """The index after the last line that fits; 0 if none does."""
    fits = (i + 1 for i in range(len(lines) - 1, -1, -1) if pattern.search(lines[i].text))
    return next(fits, 0)


def of(*logs: str) -> Cause | None:
    """The cause of death, from the ends of a launch's logs, one per rank; None if unknown."""
    found = [each for log in logs if (each := find(lines_of(log)))]
    if not found:
        return None
    best = min(found, key=lambda each: (each[0].weight, each[1] or "~"))[0]
    line = best.text if len(best.text) <= SHOWN else best.text[: SHOWN - 3] + "..."
    return Cause(line, *((best.kind.meaning, best.kind.next) if best.kind else ("", UNFORESEEN)))


def ranks_of(log: Path) -> list[Path]:
    return sorted(log.parent.glob(f"{glob.escape(log.stem)}_rank*.log"))


def cause_in(logs: Iterable[Path], end: Callable[[Path, int], str]) -> Cause | None:
    """The cause that these files name; `end(path, n)` reads the last n bytes of one."""
    paths = list(dict.fromkeys(logs))
    size = max(READ // len(paths), LEAST)
    return of(*(end(path, size) for path in paths))
