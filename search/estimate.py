"""Estimates how long a search will take, from an earlier one of the same kind or by a guess."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.talk import counted, read_json
from load.matrix import PER_STREAM
from search import race
from search.candidates import Candidate
from search.nodes import Nodes

START, TOKEN = (
    90.0,
    0.02,
)  # seconds of a start, and of each token of a stream, if nothing is known


@dataclass(frozen=True)
class Pace:
    """Seconds that a start and a run take, and how we know."""

    start: float
    run: float
    known_from: str


def earlier(results: Path, model: str, bench: Sequence[str]) -> Pace | None:
    """The pace of the newest search beside this one with the same model and loads."""
    for path in sorted(results.glob("*/tune.json"), key=lambda p: -p.stat().st_mtime):
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            found = read_json(path)
            if (found["model"], found["bench"]) == (model, list(bench)):
                start, run = (float(found["seconds"][name]) for name in ("start", "run"))
                return Pace(start, run, f"as in {path.parent}")
    return None


def guess(loads: Sequence[int], requests: int | None, output_len: int) -> Pace:
    """A guess: TOKEN seconds for each token of a stream, whatever the load."""
    each = [(requests or PER_STREAM * load) / load * output_len * TOKEN for load in loads]
    told = f"guessed, with {1000 * TOKEN:.0f} ms a token: nothing like it was measured here"
    return Pace(START, sum(each) / len(each), told)


def estimate(candidates: Sequence[Candidate], loads: Sequence[int], repeat: int, nodes: Nodes,
             pace: Pace) -> str:  # fmt: skip
    """The range from just the first round to all loads of all candidates, each started twice."""
    first, most = len(race.coarse(loads)) * repeat, len(loads) * repeat
    share = sum(nodes.needed(each.gpus) for each in candidates) / len(nodes.names)
    rounds = max(share, 1.0 if candidates else 0.0)  # groups that are served at the same time
    least, longest = (
        rounds * (starts * pace.start + runs * pace.run) / 60
        for starts, runs in ((1, first), (2, most))
    )
    number = len(candidates)
    return (
        f"{counted(number, 'server')} to start, {number * first} to {number * most} runs: "
        f"{least:.0f} to {longest:.0f} minutes at {pace.start:.0f} s a start and {pace.run:.0f} s "
        f"a run ({pace.known_from})"
    )
