"""Runs the search: every candidate at a few loads, then only what may still be better."""

import itertools
import json
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from common.talk import Failure, counted, say
from launch.arguments import value_of, without
from report.results import Group, groups, load
from search import answer, race
from search.answer import points_of
from search.candidates import Candidate
from search.nodes import Nodes, side_by_side
from search.serving import ROOT, Process, Serving, serving

ASKED = "asked.txt"  # in a candidate's folder: a digest of what its results are of
PORTS_APART = 20  # a candidate shares no port with the one before, not even a replica's
TURNS = 16  # after so many the first port is free again


@dataclass
class Tuner:
    """What is measured, where, and until when."""

    outcome: answer.Outcome
    folder: Path
    loads: Sequence[int]
    port: int
    deadline: float  # by time.monotonic()
    nodes: Nodes
    more: Sequence[str] = ()  # launcher options that a workspace per candidate needs
    served: Iterator[int] = field(default_factory=itertools.count)
    stopping: threading.Event = field(default_factory=threading.Event)
    processes: list[Process] = field(default_factory=list)

    def run(self) -> None:
        """Measure until the answer cannot change. What there is by then is written in any case."""
        try:
            self.read_earlier()
            self.search()
        except BaseException as error:
            stopped = not isinstance(error, Exception)
            self.outcome.unfinished = "stopped" if stopped else f"an error: {error}"
            raise
        finally:
            answer.write(self.outcome, self.folder)

    def search(self) -> None:
        by_name = {candidate.name: candidate for candidate in self.outcome.candidates}
        first = race.coarse(self.loads)
        missing = {
            name: [each for each in first if each not in self.found(name)]
            for name in by_name
            if not race.is_over(self.points(name))
        }
        self.round({by_name[name]: loads for name, loads in missing.items() if loads})
        while not self.outcome.unfinished:
            ahead = race.order(self.outcome.measured, self.loads, self.outcome.limits)
            if not ahead:
                break
            # As many as fit, the most promising first: what they show may settle the others.
            self.round({by_name[name]: [] for name in ahead[: len(self.nodes.names)]})

    def round(self, loads: Mapping[Candidate, Sequence[int]]) -> None:
        """Examine these candidates, each on nodes of its own."""

        def work(candidate: Candidate, nodes: Sequence[str]) -> None:
            if not self.is_late(sum(self.outcome.starts[-1:])):  # it would be ready too late
                self.examine(candidate, loads[candidate], nodes)

        side_by_side(list(loads), lambda each: each.gpus, self.nodes, work, self.end_all)

    def began(self, process: Process) -> None:
        """Remember a process that ends with us. The thread that waits for it cleans up."""
        self.processes.append(process)
        if self.stopping.is_set():
            process.terminate()

    def end_all(self) -> None:
        self.stopping.set()
        for process in self.processes:
            if process.poll() is None:
                process.terminate()

    def is_late(self, ahead: float = 0.0) -> bool:
        """Whether it is too late to begin what takes `ahead` seconds at first; says so once."""
        if self.stopping.is_set():
            return True
        if time.monotonic() + ahead > self.deadline and not self.outcome.unfinished:
            self.outcome.unfinished = "the time of --minutes was up before the search was over"
            say(self.outcome.unfinished)
        return bool(self.outcome.unfinished)

    def found(self, name: str) -> dict[int, Group]:
        return self.outcome.groups.get(name, {})

    def points(self, name: str) -> dict[int, race.Point]:
        return points_of(self.found(name))

    # --- one candidate ----------------------------------------------------------------------------

    def examine(self, candidate: Candidate, loads: Sequence[int], nodes: Sequence[str]) -> None:
        """Serve it and measure these loads, or all that look promising. A failure is recorded."""
        name, where = candidate.name, ", ".join(filter(None, nodes))
        on = f" on {where}" if where else ""
        say(f"{name}: {candidate.shape}, {counted(candidate.gpus, 'GPU')}: starting{on}")
        began = time.monotonic()
        try:
            with self.serving(candidate, nodes) as served:
                self.outcome.starts.append(time.monotonic() - began)
                for each in loads:
                    self.measure(candidate, served, [each])
                    if race.is_over(self.points(name)) or self.is_late():
                        break
                while self.is_settling() and (more := self.promising(name)) and not self.is_late():
                    self.measure(candidate, served, more)
        except Failure as failure:
            if self.stopping.is_set():
                return
            say(f"{name}: {failure.message}")
            self.outcome.failed[name] = failure.message
            self.outcome.groups[name] = {}  # what it has shown by then stays in its folder

    def is_settling(self) -> bool:
        """Whether every candidate has been measured, or has failed."""
        seen = {*self.outcome.failed, *(n for n, found in self.outcome.groups.items() if found)}
        return all(candidate.name in seen for candidate in self.outcome.candidates)

    def promising(self, name: str) -> list[int]:
        return race.next_loads(self.outcome.measured, name, self.loads, self.outcome.limits)

    def serving(
        self, candidate: Candidate, nodes: Sequence[str]
    ) -> AbstractContextManager[Serving]:
        port = self.port + PORTS_APART * (next(self.served) % TURNS)
        folder = self.folder / candidate.name
        own = ("--workspace", str(folder), *self.more)
        words = [*candidate.words(self.outcome.command, *own), "--port", str(port)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ASKED).write_bytes(self.asked(candidate))
        return serving(words, nodes, folder, self.began)

    def measure(self, candidate: Candidate, served: Serving, loads: Sequence[int]) -> None:
        """Measure loads with bench.py, as a user would. Failure if the server is gone."""
        folder = self.folder / candidate.name
        command = [
            *[sys.executable, str(ROOT / "bench.py"), "--client", "builtin", "--resume"],
            *["--host", served.url, "--type", "concurrency", "--output", str(folder)],
            *["--concurrency", ",".join(map(str, loads)), "--gpus", str(max(candidate.gpus, 1))],
            *self.outcome.bench,
        ]
        began = time.monotonic()
        with (folder / "bench.txt").open("a") as talk:
            null = subprocess.DEVNULL
            bench = subprocess.Popen(
                command, stdin=null, stdout=talk, stderr=talk, start_new_session=True
            )
            self.began(bench)
            bench.wait()
        took = time.monotonic() - began
        self.read(candidate.name, loads)
        found = self.found(candidate.name)
        count = sum(len(found[each].records) for each in loads if each in found)
        self.outcome.runs += [took / count for _ in range(count)]
        if self.stopping.is_set():
            raise Failure("stopped")
        for each in loads:
            self.tell(candidate.name, each)
        if served.launcher.poll() is not None:
            raise Failure(served.cause())

    def read(self, name: str, now: Sequence[int] = ()) -> None:
        """Read the runs of bench.py in a candidate's folder, grouped by load.

        Loads that were not measured `now` or before count only if bench.py would not repeat them.
        """
        with suppress(Failure):
            records = [r for r in load(self.folder / name).records if r["case"]["concurrency"]]
            found = {int(g.case["concurrency"]): g for g in groups(records)}
            known = {*self.found(name), *now}
            self.outcome.groups[name] = {
                each: g for each, g in found.items() if each in known or self.is_whole(g)
            }

    def is_whole(self, group: Group) -> bool:
        repeats = int(value_of(self.outcome.bench, "--repeat") or 1)
        return group.valid and len(group.records) >= repeats

    def read_earlier(self) -> None:
        """With --resume, take over what an earlier search has measured."""
        for candidate in self.outcome.candidates:
            self.set_aside(candidate)
            self.read(candidate.name)
            if found := self.found(candidate.name):
                done = ", ".join(map(str, sorted(found)))
                say(f"{candidate.name}: loads measured before: {done}")

    def asked(self, candidate: Candidate) -> bytes:
        """A digest of what makes results comparable: what is served, and how it is measured.

        It is only a digest because the text may hold an API key.
        """
        bench = without(self.outcome.bench, "--repeat")  # more of them may be added
        command = without(without(self.outcome.command, "--ready-timeout"), "--restart")
        words = "\n".join([shlex.join(command), candidate.settings, shlex.join(bench)])
        # A path need not be UTF-8.
        return sha256(words.encode(errors="surrogateescape")).hexdigest().encode()

    def set_aside(self, candidate: Candidate) -> None:
        """Rename a candidate's folder if it holds results of something else."""
        folder = self.folder / candidate.name
        try:
            before = (folder / ASKED).read_bytes()
        except OSError:
            before = b""
        if not any(folder.glob("[!.]*.json")) or before == self.asked(candidate):
            return
        names = (folder.with_name(f"{folder.name}.before{n}") for n in itertools.count(1))
        aside = folder.rename(next(name for name in names if not name.exists()))
        known = "its folder holds results of other arguments, settings or lengths"
        what = known if before else "it is not known how the results in its folder were made"
        say(f"{candidate.name}: {what}: measured again; they are now in {aside.name}")

    def tell(self, name: str, streams: int) -> None:
        group = self.found(name).get(streams)
        if group is None:
            why = last_line(self.folder / name / "bench.txt")
            raise Failure(f"bench.py measured nothing at {counted(streams, 'stream')}: {why}")
        point = self.points(name)[streams]
        words = f"{answer.number(point.gpu)} tokens/s per GPU, {point.user:,.1f} per user"
        latencies = ", ".join(
            f"{answer.NAMES[m]} p99 {answer.ms(point, m)} ms" for m in ("ttft", "tpot")
        )
        wrong = "" if point.valid else f"INVALID: {'; '.join(group.problems)}"
        say(f"{name}, {counted(streams, 'stream')}: {wrong or f'{words}, {latencies}'}")


def last_line(path: Path) -> str:
    """What a program said last, except for bench.py's document for other programs."""
    said = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(said) if not is_document(line)), "no word")


def is_document(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
