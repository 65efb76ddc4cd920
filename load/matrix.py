"""The table of what `bench.py` measures, and how the command line changes it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

UNLIMITED = None
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    type: str
    lengths: tuple[tuple[int, int], ...]  # pairs of input and output tokens; (): a data set's own
    requests: int
    concurrency: tuple[int | None, ...]
    per_stream: int = 0  # requests for each stream, if that is more than `requests`


PER_STREAM = 5

# fmt: off
MATRIX = (
    Row("throughput",  ((512, 256),), 100, (UNLIMITED,)),
    Row("prefill",     ((128, 1), (512, 1), (1024, 1), (2048, 1), (4096, 1)), 100, (4,)),
    Row("decode",      ((128, 128), (128, 256), (128, 512), (128, 1024)), 100, (4,)),
    Row("latency",     ((128, 128), (512, 256)), 100, (1,)),
    Row("concurrency", ((512, 256),), 0, (1, 4, 16, 64, 256), per_stream=PER_STREAM),
    Row("sharegpt",    (), 100, (UNLIMITED, 4)),
)
SWEEP = Row("sweep",   ((512, 256),), 20, (), per_stream=PER_STREAM)
# fmt: on
TYPES = tuple(row.type for row in MATRIX)
MANY = 20  # streams that `unlimited` counts as where requests are counted per stream


@dataclass(frozen=True)
class Case:
    """One run: a load, and the number of its repeat."""

    type: str
    input_len: int | None
    output_len: int | None
    num_prompts: int
    concurrency: int | None = None
    rate: float = math.inf
    repeat: int = 1

    @property
    def label(self) -> str:
        """The load's name, the same for every repeat."""
        lengths = [f"in{self.input_len}-out{self.output_len}"] if self.input_len else []
        streams = f"c{self.concurrency}" if self.concurrency else "unlimited"
        rate = [f"rate{self.rate:g}"] if math.isfinite(self.rate) else []
        return "-".join([self.type, *lengths, *rate, streams])

    @property
    def name(self) -> str:
        return self.label if self.repeat == 1 else f"{self.label}-r{self.repeat}"

    def facts(self) -> dict[str, Any]:
        """Its fields for a result file; JSON has no infinity."""
        rate = self.rate if math.isfinite(self.rate) else "inf"
        return {"name": self.name, "label": self.label, **asdict(self), "rate": rate}


@dataclass(frozen=True)
class Overrides:
    """What the command line changes in the table."""

    num_prompts: int | None = None
    concurrency: tuple[int | None, ...] = ()
    input_len: tuple[int, ...] = ()
    output_len: tuple[int, ...] = ()
    rates: tuple[float, ...] = (math.inf,)
    repeat: int = 1


def apply(row: Row, change: Overrides) -> Row:
    """The row with the lengths and the concurrency that were asked for."""
    lengths = row.lengths
    if lengths and (change.input_len or change.output_len):
        inputs = change.input_len or unique(i for i, _ in lengths)
        outputs = change.output_len or unique(o for _, o in lengths)
        lengths = tuple((i, o) for i in inputs for o in outputs)
    return replace(row, lengths=lengths, concurrency=change.concurrency or row.concurrency)


def unique(values: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(values))


def requests_for(row: Row, streams: int | None, change: Overrides) -> int:
    return change.num_prompts or max(row.requests, row.per_stream * (streams or MANY))


def cases(types: Sequence[str], change: Overrides) -> Iterator[Case]:
    """The runs of these types, in the table's order."""
    for row in (apply(row, change) for row in MATRIX if row.type in types):
        for inputs, outputs in unique(row.lengths) or ((None, None),):
            for streams in unique(row.concurrency):
                for rate in unique(change.rates):
                    count = requests_for(row, streams, change)
                    case = Case(row.type, inputs, outputs, count, streams, rate)
                    yield from (replace(case, repeat=n + 1) for n in range(change.repeat))


def too_few(case: Case) -> str:
    """A note if there are too few requests to fill the streams in the run's name."""
    if not case.concurrency or case.num_prompts >= case.concurrency:
        return ""
    return (f"no more than {case.num_prompts} of {case.concurrency} streams are in flight, since "
            f"there are no more requests: --num-prompts {PER_STREAM * case.concurrency} fills them"
            )  # fmt: skip


def surprises(planned: Sequence[Case], change: Overrides) -> Iterator[str]:
    """Notes on flags that do not do what one may think."""
    if (change.input_len or change.output_len) and any(c.input_len is None for c in planned):
        yield "conversations have lengths of their own: --input-len and --output-len do not apply"
    yield from unique(f"{c.label}: {words}" for c in planned if (words := too_few(c)))
