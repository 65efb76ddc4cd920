"""The matrix as a table, and the sweep's search for the knee."""

from __future__ import annotations

import math
from typing import Any

import pytest

import bench
from load.matrix import MATRIX, Case, Overrides, cases
from load.metrics import growth
from load.sweep import RATE_SECONDS, stop_reason, sustained_rate, sweep, verdict
from load.sweep import knee as best

pytestmark = pytest.mark.usefixtures("clean_environment")


def test_the_matrix() -> None:
    found = list(cases([row.type for row in MATRIX], Overrides()))
    assert [c.name for c in found] == [
        "throughput-in512-out256-unlimited",
        *(f"prefill-in{n}-out1-c4" for n in (128, 512, 1024, 2048, 4096)),
        *(f"decode-in128-out{n}-c4" for n in (128, 256, 512, 1024)),
        "latency-in128-out128-c1",
        "latency-in512-out256-c1",
        *(f"concurrency-in512-out256-c{n}" for n in (1, 4, 16, 64, 256)),
        "sharegpt-unlimited",
        "sharegpt-c4",
    ]
    assert [c.num_prompts for c in found if c.type == "concurrency"] == [5, 20, 80, 320, 1280]
    assert {c.num_prompts for c in found if c.type != "concurrency"} == {100}


def test_overrides_change_the_table() -> None:
    change = Overrides(7, (1, None), (10,), (20, 30), (math.inf, 2.5), repeat=2)
    found = list(cases(["prefill"], change))
    assert len(found) == 2 * 2 * 2 * 2
    assert found[0] == Case("prefill", 10, 20, 7, 1)
    assert found[-1].name == "prefill-in10-out30-rate2.5-unlimited-r2"


def test_unlimited_streams_get_more_than_a_handful_of_requests() -> None:
    [case] = cases(["concurrency"], Overrides(concurrency=(None,)))
    assert case.num_prompts == 100


def test_a_load_that_is_named_twice_is_measured_once() -> None:
    """The second run would have the prompts of the first, which a prefix cache knows."""
    twice = Overrides(concurrency=(4, 4), input_len=(8, 8), rates=(1.0, 1.0))
    assert len(list(cases(["latency"], twice))) == 2


def record(throughput: float, **facts: Any) -> dict[str, Any]:
    return {"valid": True, "output_throughput": throughput, "request_throughput": 1.0,
            "duration": 10.0, "completed": 10, "mean_e2el_ms": 0.0, "request_rate": "inf",
            **facts}  # fmt: skip


def test_the_sweep_stops_where_more_load_brings_no_more() -> None:
    speed = {1: 100, 2: 190, 4: 350, 8: 360, 16: 365}
    found, knee = sweep(Overrides(), lambda c: record(speed[c.concurrency or 0]), False)
    assert len(found) == 4
    assert knee is not None
    assert knee["output_throughput"] == 350
    assert stop_reason(found, False) == "twice the streams brought +3% throughput"


def test_the_sweep_stops_where_the_limits_break() -> None:
    def run(case: Case) -> dict[str, Any]:
        streams = case.concurrency or 0
        return record(100 * streams, goodput_share=1.0 if streams < 8 else 0.9)

    found, knee = sweep(Overrides(), run, False)
    assert knee is not None
    assert (len(found), knee["output_throughput"]) == (4, 400)


def served(load: Case, most: float, seconds: float = 1.0) -> dict[str, Any]:
    """An open-loop run on a server that does `most` requests a second, one after the other."""
    due = [n / load.rate for n in range(load.num_prompts)]
    ends, free = [], 0.0
    for at in due:
        free = max(free + 1 / most, at + seconds)
        ends.append(free)
    latencies = [end - at for end, at in zip(ends, due, strict=True)]
    return record(
        load.num_prompts / ends[-1], request_rate=load.rate, duration=ends[-1],
        completed=load.num_prompts, mean_e2el_ms=1e3 * sum(latencies) / len(latencies),
        e2el_growth=growth(due, latencies),
    )  # fmt: skip


def test_a_sweep_by_rate_stops_where_the_server_falls_behind() -> None:
    found, knee = sweep(Overrides(), lambda case: served(case, 5.0), True)
    assert [r["request_rate"] for r in found] == [1, 2, 4, 8]
    assert knee is not None
    assert knee["request_rate"] == 4
    assert stop_reason(found, True) == "the server does 5.0 requests/s and no more"


@pytest.mark.parametrize(("most", "enough"), [(10.0, True), (9.8, True), (9.1, False), (5, False)])
def test_a_tenth_too_much_load_is_seen(most: float, enough: bool) -> None:
    found = served(Case("sweep", 512, 256, 300, None, 10.0), most)
    assert (stop_reason([found], True) == "") == enough
    assert sustained_rate(found) == pytest.approx(most, rel=0.01)


def test_requests_that_grow_slower_as_a_batch_fills_are_no_queue() -> None:
    due = [n / 10 for n in range(300)]
    latencies = [2 + min(at / 4, 1.0) for at in due]
    assert growth(due, latencies) == pytest.approx(0)
    assert growth([1.0, 1.0], [1.0, 2.0]) is None


def test_a_rate_is_held_for_longer_than_requests_take() -> None:
    asked: list[Case] = []

    def run(case: Case) -> dict[str, Any]:
        asked.append(case)
        return record(1, valid=len(asked) < 3, mean_e2el_ms=20_000.0, e2el_growth=0.0,
                      request_rate=case.rate)  # fmt: skip

    sweep(Overrides(), run, True)
    assert [c.num_prompts / c.rate for c in asked] == [RATE_SECONDS, 80, 80]


def test_a_sweep_repeats_each_step_and_goes_by_the_median() -> None:
    speed = iter([100, 900, 110, 200, 190, 10, 195, 210, 1])
    asked: list[str] = []

    def run(case: Case) -> dict[str, Any]:
        asked.append(case.name)
        return record(next(speed))

    found, _ = sweep(Overrides(repeat=3), run, False)
    assert [r["output_throughput"] for r in found] == [110, 190, 195]
    assert asked[:4] == ["sweep-in512-out256-c1", "sweep-in512-out256-c1-r2",
                         "sweep-in512-out256-c1-r3", "sweep-in512-out256-c2"]  # fmt: skip


def test_one_invalid_repeat_ends_a_sweep() -> None:
    valid = iter([True, False, True])
    found, knee = sweep(Overrides(repeat=3), lambda _: record(1, valid=next(valid)), False)
    assert (len(found), knee) == (1, None)


@pytest.mark.parametrize(
    "args",
    [
        ["--input-len", "1,2"], ["--output-len", "1,2"], ["--concurrency", "1,2"],
        ["--concurrency", "unlimited"], ["--request-rate", "5"],
        ["--sweep-by", "rate", "--request-rate", "1,2"],
        ["--sweep-by", "rate", "--concurrency", "4"], ["--sweep-by", "rate", "--num-prompts", "4"],
        ["--concurrency", "5000"], ["--sweep-by", "rate", "--request-rate", "5000"],  # past its end
    ],
)  # fmt: skip
def test_what_a_sweep_would_ignore_is_refused(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.parse(["-t", "sweep", *args], {})
    assert stop.value.code == 2
    assert "sweep" in capsys.readouterr().err


def test_what_a_sweep_takes() -> None:
    args = ["-t", "sweep", "--input-len", "9", "--output-len", "5", "--repeat", "3"]
    assert bench.parse([*args, "--concurrency", "4"], {}).type == ("sweep",)
    assert bench.parse([*args, "--sweep-by", "rate", "--request-rate", "2"], {}).sweep_by == "rate"
    with pytest.raises(SystemExit):
        bench.parse(["--sweep-by", "rate"], {})


def test_a_sweep_whose_first_step_is_invalid_has_no_knee() -> None:
    found, knee = sweep(Overrides(), lambda _: record(1, valid=False), False)
    assert (len(found), knee) == (1, None)


@pytest.mark.parametrize(
    ("by_rate", "runs", "words"),
    [
        (False, [record(1, valid=False, problems=["4 answers came without usage"])],
         "no knee: at the first step the run is invalid (4 answers came without"),
        (False, [record(1, goodput_share=0.5)], "no knee: at the first step only 50% of the"),
        (True, [record(1, request_rate=1.0, e2el_growth=1.0)],
         "no knee: at the first step the server does 0.5 requests/s and no more"),
        (False, [record(1, case={"name": "c1"}), record(1)], "+0% throughput; the knee: c1"),
        (False, [record(1, case={"name": "c1"}), record(9, valid=False, problems=["slow client"])],
         "no knee found, since the run is invalid (slow client); the last good step: c1"),
        (False, [record(1), record(9, case={"name": "c2"})],
         "no knee found, since 4,096 is the end of the range; the last good step: c2"),
    ],
)  # fmt: skip
def test_what_is_said_of_a_sweep(by_rate: bool, runs: list[dict[str, Any]], words: str) -> None:
    assert words in verdict(runs, best(runs, by_rate), by_rate)


def test_a_sweeps_requests_fill_its_streams_whatever_num_prompts_says() -> None:
    """Else the knee is where they run out, and not where the server does."""
    found, knee = sweep(
        Overrides(num_prompts=8),
        lambda c: record(100 * min(c.concurrency or 0, c.num_prompts)),
        False,
    )
    assert knee is found[-1]
    assert len(found) == 13  # up to the end of the range
