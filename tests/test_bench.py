"""bench.py from the command line to the exit code, by both clients; its parts by table."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from array import array
from collections import Counter
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest

import bench
from common import talk
from common.live import LiveLine
from common.talk import Failure
from launch import nodes, provide, slurm
from launch.runtimes import pyxis
from load import bench_place, clients, endpoint, metrics, nvidia, sharegpt
from load.answer import Outcome
from load.endpoint import Endpoint
from load.loadgen import measure
from load.matrix import Case
from load.metrics import Distribution, Wanted, goodput_of, summarise
from load.payload import RandomPrompts, Requests
from load.target import Load, Result, Target
from report.results import is_sound
from tests.conftest import PATIENCE
from tests.loopback import (
    MODEL,
    Answer,
    Request,
    Server,
    model_server,
    obedient,
    serving,
    stream,
)

ROOT = Path(__file__).parent.parent
STAND_IN = ROOT / "tests" / "stand_in"
SHORT = ("--num-prompts", "4", "--concurrency", "2", "--output-len", "4")
QUICK = (*SHORT, "--warmup", "1")
PROBES = 1  # what it takes to know a server that understands everything
MS = 1_000_000


pytestmark = pytest.mark.usefixtures("same_signals", "any_machine")


@pytest.fixture(autouse=True)
def own_folder(clean_environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of the developer's, no results in the repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_place, "gpu_names", lambda _: [])


class Run:
    """What bench.py made of a server that answers like this."""

    def __init__(self, capsys: pytest.CaptureFixture[str], answer: Answer, *args: str) -> None:
        began = time.monotonic()
        with serving(model_server(answer)) as server:
            self.code = bench.main(["-p", str(server.port), "-o", "out", *args])
        self.server, self.seconds = server, time.monotonic() - began
        captured = capsys.readouterr()
        self.stdout, self.stderr = captured.out, captured.err
        lines = self.stdout.splitlines()
        self.last: dict[str, Any] = json.loads(lines[-1]) if lines else {}

    def record(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(Path("out", f"{name}.json").read_text())
        return found


# --- a whole run ----------------------------------------------------------------------------------


def test_a_run_from_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, obedient, "-t", "throughput", *QUICK)
    assert run.code == 0, run.stdout
    name = "throughput-in512-out4-c2"
    record = run.record(name)
    assert record["valid"]
    assert record["completed"] == record["num_prompts"] == 4
    assert (record["total_input_tokens"], record["total_output_tokens"]) == (4 * 512, 4 * 4)
    assert 30 <= record["mean_ttft_ms"] <= record["mean_e2el_ms"] <= run.seconds * 1000
    assert record["metadata"]["server_version"] == "1.1.0"
    assert (run.last["valid"], run.last["model"]) == (True, MODEL)
    assert run.last["runs"][0]["name"] == name
    assert name in run.stdout
    assert "1 run of 4 requests in all" in run.stderr
    for file in ("summary.json", "summary.csv", "report.html"):
        assert name in Path("out", file).read_text()


def test_requests_have_only_fields_that_every_server_knows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Run(capsys, obedient, "-t", "throughput", *QUICK)
    body = next(r.body for r in run.server.requests if r.body)
    assert set(body) == {
        "model", "prompt", "max_tokens", "temperature", "stream", "stream_options", "ignore_eos",
    }  # fmt: skip
    assert body["stream_options"] == {"include_usage": True}


def test_the_warm_up_is_not_counted_and_has_prompts_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Run(capsys, obedient, "-t", "throughput", *QUICK, "--warmup", "2")
    prompts = [tuple(r.body["prompt"]) for r in run.server.requests if r.body]
    assert len(prompts) == PROBES + 2 + 4
    assert len(set(prompts)) == len(prompts)
    assert "run: 1 to find out what the server understands, 2 of warm-up" in run.stdout


def test_chat(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, obedient, "-t", "throughput", *QUICK, "--backend", "openai-chat")
    assert run.code == 0, run.stdout
    assert "only the server knows its exact length" in run.stdout
    request = next(r for r in run.server.requests if r.body)
    assert "/v1/chat/completions" in request.line
    assert request.body["max_tokens"] == 8  # of the probe


def test_results_behind_a_link_to_nowhere_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "results").symlink_to("/no/such/place")
    with pytest.raises(OSError, match=r"exists|No such"):
        bench_place.new_folder(tmp_path / "results/x")


def test_repeats_have_their_spread(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, obedient, "-t", "throughput", *QUICK, "--repeat", "2")
    assert [r["name"][-3:] for r in run.last["runs"]] == ["-c2", "-r2"]
    assert "±" in run.stdout
    first, second = (
        {tuple(r.body["prompt"]) for r in part} for part in halves(run.server.requests)
    )
    assert not first & second  # the second must not meet the first one's prefix cache


def halves(requests: list[Request]) -> tuple[list[Request], list[Request]]:
    measured = [r for r in requests if r.body]
    return measured[: len(measured) // 2], measured[len(measured) // 2 :]


def resumed(capsys: pytest.CaptureFixture[str], types: str, *more: str) -> tuple[int, list[str]]:
    """A run, then --resume with these arguments, on one server: its requests, and its runs."""
    quick = ["-o", "out", *QUICK]
    with serving(model_server(obedient)) as server:
        bench.main(["-p", str(server.port), "-t", "throughput", *quick])
        before = len([r for r in server.requests if r.body])
        capsys.readouterr()
        bench.main(["-p", str(server.port), "-t", types, *quick, "--resume", *more])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    requests = len([r for r in server.requests if r.body]) - before
    return requests, [r["name"] for r in last["runs"]]


def test_resume_makes_only_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    requests, runs = resumed(capsys, "throughput,latency", "--input-len", "512")
    assert (requests, len(runs)) == (PROBES + 1 + 4, 2)


@pytest.mark.parametrize(
    "more",
    [
        ("--num-prompts", "5"), ("--goodput", "ttft:900"), ("--burstiness", "2"),
        ("--backend", "openai-chat"),
    ],
)  # fmt: skip
def test_resume_takes_no_result_of_something_else(
    capsys: pytest.CaptureFixture[str], more: tuple[str, str]
) -> None:
    requests, _ = resumed(capsys, "throughput", *more)
    assert requests > 1


def calls(capsys: pytest.CaptureFixture[str], *each: list[str]) -> str:
    """bench.py --resume, each time with these arguments, on one server; what it said at last."""
    with serving(model_server(obedient)) as server:
        for more in each:
            capsys.readouterr()
            code = bench.main(["-p", str(server.port), "-o", "out", "--resume", *more, *QUICK])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.err


@pytest.mark.parametrize(("second", "again"), [("alpha", False), ("omega", True)])
def test_resume_takes_no_result_of_another_data_set(
    capsys: pytest.CaptureFixture[str], second: str, again: bool
) -> None:
    for name in ("alpha", "omega"):
        turns = [conversation(f"{name} {i} is what I ask", "it is fine " * 6) for i in range(20)]
        Path(f"{name}.json").write_text(json.dumps(turns))
    sets = (["-t", "sharegpt", "--sharegpt", f"{name}.json"] for name in ("alpha", second))
    said = calls(capsys, *sets)
    record = json.loads(Path("out/sharegpt-c2.json").read_text())
    assert record["data_set"]["file"] == f"{second}.json"
    assert ("measured again: the result there is of another data set" in said) == again
    assert Path("out/sharegpt-c2.json.before").exists() == again


def test_resume_takes_no_result_of_another_version(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = iter(("1.1.0", "1.2.1"))
    monkeypatch.setattr(endpoint, "version", lambda _: next(versions))
    said = calls(capsys, *[["-t", "throughput"]] * 2)
    assert "measured again: the result there is of another server version" in said
    record = json.loads(Path("out/throughput-in512-out4-c2.json").read_text())
    assert record["metadata"]["server_version"] == "1.2.1"


@pytest.mark.parametrize("text", ["", "{half", "[]", '{"metadata": 7}', '{"case": null}'])
def test_resume_measures_again_what_it_cannot_read(
    capsys: pytest.CaptureFixture[str], text: str
) -> None:
    Path("out").mkdir()
    Path("out/throughput-in512-out4-c2.json").write_text(text)
    said = calls(capsys, ["-t", "throughput"])
    assert "throughput-in512-out4-c2: measured again: the file cannot be read" in said


def test_resume_measures_again_what_is_damaged(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("out/throughput-in512-out4-c2.json")
    with serving(model_server(obedient)) as server:
        words = ["-p", str(server.port), "-t", "throughput", "-o", "out", *QUICK, "--resume"]
        bench.main(words)
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "problems": None, "mean_ttft_ms": "x"}))
        assert bench.main(words) == 0
    assert "measured again: the file cannot be read" in capsys.readouterr().err


def is_coloured(request: Request) -> None:
    words = "\x1b[31mTraceback\x1b[0m \x1b]0;owned\x07 \x9b2J"
    request.document({"error": {"message": words}}, "500 Internal Server Error")


def test_what_a_server_says_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, is_coloured, "-t", "throughput", *QUICK)
    assert run.code == 1
    everything = run.stdout + run.stderr + Path("out/report.html").read_text()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", everything)
    assert r"\x1b]0;owned\x07" in run.stdout


def test_resume_loses_no_result_of_something_else(capsys: pytest.CaptureFixture[str]) -> None:
    resumed(capsys, "throughput", "--num-prompts", "5")
    now, before = (
        json.loads(Path("out", f"throughput-in512-out4-c2.json{end}").read_text())
        for end in ("", ".before")
    )
    assert (now["num_prompts"], before["num_prompts"]) == (5, 4)
    calls(capsys, ["-t", "throughput", "--num-prompts", "6"])
    again = json.loads(Path("out/throughput-in512-out4-c2.json.before2").read_text())
    assert again["num_prompts"] == 5


def test_resume_that_measures_nothing_leaves_the_reports(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Run(capsys, obedient, "-t", "throughput", *QUICK)
    report = Path("out/summary.json").read_text()

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(clients.Builtin, "__call__", stopped)
    with pytest.raises(KeyboardInterrupt):
        Run(capsys, obedient, "-t", "latency", *QUICK, "--resume")
    assert Path("out/summary.json").read_text() == report


def test_resume_takes_no_result_of_another_server(capsys: pytest.CaptureFixture[str]) -> None:
    Run(capsys, obedient, "-t", "throughput", *QUICK)
    again = Run(capsys, obedient, "-t", "throughput", *QUICK, "--resume")
    assert len([r for r in again.server.requests if r.body]) == PROBES + 1 + 4


def test_after_resume_the_reports_hold_the_whole_folder(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, runs = resumed(capsys, "latency", "--input-len", "512")
    assert runs == ["latency-in512-out4-c2"]
    for file in ("summary.json", "summary.csv", "report.html"):
        said = Path("out", file).read_text().replace("<wbr>", "")
        assert "throughput-in512-out4-c2" in said and runs[0] in said


def test_earlier_results_are_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Run(capsys, obedient, "-t", "throughput", *QUICK)
    again = Run(capsys, obedient, "-t", "throughput", *QUICK)
    assert again.code == 1
    assert "--resume" in again.stderr


def test_goodput(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, obedient, "-t", "throughput", *QUICK, "--goodput", "ttft:1", "e2el:5000")
    record = run.record("throughput-in512-out4-c2")
    assert (record["request_goodput"], record["goodput_share"]) == (0, 0)


def test_details_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, obedient, "-t", "throughput", *QUICK, "--save-detailed")
    record = run.record("throughput-in512-out4-c2")
    assert record["output_lens"] == [4] * 4
    assert [len(gaps) for gaps in record["itls"]] == [3] * 4
    assert all(0.03 <= ttft < run.seconds for ttft in record["ttfts"])


def test_resume_measures_again_what_lacks_the_details_that_are_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["-t", "throughput", *QUICK]
    said = calls(capsys, args, [*args, "--save-detailed"])
    assert "measured again: has no details of its requests" in said
    assert "measured again" not in calls(capsys, [*args, "--save-detailed"], args)


# --- what makes a run invalid ---------------------------------------------------------------------


class FailsOnce:
    """At the first that is measured, behind one of warm-up that is as long."""

    def __init__(self) -> None:
        self.long = itertools.count(1)

    def __call__(self, request: Request) -> None:
        if len(request.body["prompt"]) == 512 and next(self.long) == 2:
            request.document({"object": "error", "message": "no room"}, "400 Bad Request")
        else:
            obedient(request)


def is_short(request: Request) -> None:
    time.sleep(0.03)
    request.send(stream(3, prompt=512))


def is_empty(request: Request) -> None:
    time.sleep(0.03)
    request.send(stream(4, prompt=512, text=""))


def is_another(request: Request) -> None:
    """From the first measured request on; before, it was the one that was asked for."""
    time.sleep(0.03)
    said = stream(4, prompt=512)
    request.send(said.replace(MODEL.encode(), b"other-mode") if request.number > 5 else said)


def cuts_the_prompt(request: Request) -> None:
    time.sleep(0.03)
    request.send(stream(4, prompt=500))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (FailsOnce(), "1 of 4 requests failed: HTTP 400: no room"),
        (is_short, "4 outputs are not 4 tokens long (one has 3)"),
        (is_empty, "4 answers have no text"),
        (is_another, "answers came from other-mode"),
        (cuts_the_prompt, "4 prompts are not 512 tokens long (one has 500)"),
    ],
)
def test_an_invalid_run_is_marked_everywhere(
    capsys: pytest.CaptureFixture[str], answer: Answer, words: str
) -> None:
    run = Run(capsys, answer, "-t", "throughput", *QUICK)
    assert run.code == 1
    assert not run.last["valid"]
    assert run.last["invalid"] == ["throughput-in512-out4-c2"]
    assert words in run.record("throughput-in512-out4-c2")["problems"][0]
    assert words in run.stdout
    assert words in run.stderr
    for file in ("summary.json", "summary.csv", "report.html"):
        assert words in Path("out", file).read_text()


def test_the_other_runs_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(request: Request) -> None:
        wrong = len(request.body["prompt"]) == 128
        request.document({}, "500 Oops") if wrong else obedient(request)

    run = Run(capsys, answer, "-t", "latency", *QUICK)
    assert [r["valid"] for r in run.last["runs"]] == [False, True]


def test_a_server_that_is_gone_is_one_invalid_run_after_the_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def answer(request: Request) -> None:
        if len(request.body["prompt"]) == 512:
            raise OSError  # closes the connection
        obedient(request)

    run = Run(capsys, answer, "-t", "latency", *QUICK)
    assert [r["valid"] for r in run.last["runs"]] == [True, False]


def test_a_restart_between_two_requests_is_seen_though_none_fails(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The server is named by flags; the launcher's record is about the same one."""

    def write_record(started: str) -> None:
        record = {"url": f"http://127.0.0.1:{server.port}", "model": MODEL, "started": started}
        Path("logs/endpoint.json").write_text(json.dumps(record))

    def answer(request: Request) -> None:
        if len(request.body["prompt"]) == 9:
            write_record("9:05")
        obedient(request)

    Path("logs").mkdir()
    with serving(model_server(answer)) as server:
        write_record("9:00")
        named = ["-H", "localhost", "-p", str(server.port), "-o", "out"]
        assert bench.main([*named, "-t", "prefill", *QUICK, "--input-len", "8,9"]) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    restarted = ["the server was restarted during the run"]
    assert [r["problems"] for r in last["runs"]] == [[], restarted]


def posts(server: Server) -> int:
    return len([r for r in server.requests if r.body])


def test_an_idle_connection_that_the_server_closes_is_noted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def answer(request: Request) -> None:
        if posts(server) == PROBES + 1 + 4:  # the last one; all other connections have had one
            used = [r.socket for r in server.requests]
            (idle,) = (s for s in server.sockets if s not in used)
            with contextlib.suppress(OSError):  # the last but one may have found itself the last
                idle.shutdown(socket.SHUT_RDWR)
        obedient(request)

    with serving(model_server(answer)) as server:
        code = bench.main(["-p", str(server.port), "-o", "out", "-t", "throughput", *QUICK])
    assert "an idle connection was closed during the run" in capsys.readouterr().out
    assert code == 0


def test_a_server_that_only_lists_its_models_ends_the_matrix(
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = ("-t", "throughput,latency", "--num-prompts", "2")
    run = Run(capsys, lambda _: time.sleep(PATIENCE), "--timeout", "0.3", *load)
    assert run.code == 1
    assert [r["name"] for r in run.last["runs"]] == ["throughput-in512-out256-unlimited"]
    assert (run.last["stopped"], run.last["valid"]) == (True, False)
    assert "does not answer even one short request: no whole answer within 0.3 s" in run.stderr
    assert Path("out/report.html").exists()


def test_one_stream_after_the_other_does_not_wait_for_each(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Run(capsys, lambda _: time.sleep(PATIENCE), "-t", "latency", *QUICK, "--timeout", "0.3")
    assert run.last["runs"][0]["problems"] == [
        "no answer to a short request: no whole answer within 0.3 s"
    ]
    assert len([r for r in run.server.requests if r.body]) == 1 + 1  # and once more, to be sure


def test_a_server_that_answers_the_short_request_is_measured_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def answer(request: Request) -> None:
        if len(request.body["prompt"]) == 128:
            over.wait(PATIENCE)
        obedient(request)

    over = threading.Event()
    run = Run(capsys, answer, "-t", "latency", *QUICK, "--timeout", "2")
    over.set()
    assert [r["valid"] for r in run.last["runs"]] == [False, True]
    assert not run.last["stopped"]


def outcome(**facts: Any) -> Outcome:
    usual = {"first": 50 * MS, "last": 90 * MS, "output_tokens": 5, "prompt_tokens": 4, "events": 5,
             "has_text": True, "model": MODEL}  # fmt: skip
    return Outcome(**{"index": 0, "intended": 0, "sent": 0, **usual, **facts})


def problems(load: Load, result: Result) -> list[str]:
    return list(summarise(load, result, Wanted(MODEL, 5, 4), {})["problems"])


LOAD = Load(Target("h", 1), "/", lambda i: b"", 1)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (Result([outcome(sent=20 * MS)]), "held requests back"),
        (Result([outcome(gaps=[10.0, 0.0], merged=1)], lags=Counter({90: 1})), "read so late"),
        (Result([outcome(gaps=[20.0, 0.0], merged=1, blurred=1)], waited=50.0), "read so late"),
        (Result([outcome(first_blurred=True)]), "100% of first tokens got too late a time"),
        (Result([outcome()], kernel_stamps=False, cpu=0.99), "99% of a core"),
        (Result([outcome()], clock_step=-30.0), "the clock was set by -30.0 ms"),
        (Result([outcome(output_tokens=None)]), "without usage"),
        (Result([outcome(streamed=False)]), "not streamed"),
    ],
)
@pytest.mark.usefixtures("real_limits")
def test_a_client_that_distorts_is_seen(result: Result, words: str) -> None:
    assert words in "\n".join(problems(LOAD, result))


@pytest.mark.usefixtures("real_limits")
def test_a_good_run_has_no_problems() -> None:
    assert problems(LOAD, Result([outcome()])) == []


def test_a_client_that_was_held_up_measures_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []

    def held_up(load: Load, *more: Any) -> Result:
        result = measure(load, *more)
        seen.append(load.body(0))
        return replace(result, clock_step=100.0) if len(seen) == 2 else result  # 1: the warm-up

    monkeypatch.setattr(clients, "measure", held_up)
    run = Run(capsys, obedient, "-t", "throughput", *QUICK)
    assert run.code == 0, run.stdout
    assert "was measured 2 times" in run.stdout
    assert len(set(seen)) == 4  # with other prompts: the first ones are in the server's cache


def test_a_server_that_fails_is_not_measured_again(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, is_short, "-t", "throughput", *QUICK)
    assert len([r for r in run.server.requests if r.body]) == PROBES + 1 + 4


@pytest.mark.usefixtures("real_limits")
def test_packets_that_the_server_sent_together_are_not_the_clients_fault() -> None:
    result = Result([outcome(gaps=[10.0, 0.0], merged=1)], lags=Counter({1: 10}), waited=50.0)
    assert problems(LOAD, result) == []


@pytest.mark.usefixtures("real_limits")
def test_a_server_that_stalls_is_not_the_clients_fault() -> None:
    result = Result([outcome(gaps=[90.0, 0.0], merged=1, blurred=1)], lags=Counter({1: 10}))
    assert problems(LOAD, result) == []


# --- strict servers -------------------------------------------------------------------------------


def test_ignore_eos_is_dropped_only_when_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    def strict(request: Request) -> None:
        if "ignore_eos" in request.body:
            message = "extra_forbidden: ignore_eos"
            request.document({"error": {"message": message}}, "400 Bad Request")
        else:
            obedient(request)

    run = Run(capsys, strict, "-t", "throughput", *QUICK)
    assert run.code == 0, run.stdout
    assert "refuses ignore_eos" in run.stderr
    assert "refuses ignore_eos" in run.stdout
    assert "refuses ignore_eos" in Path("out/report.html").read_text()


def test_nothing_that_is_written_may_be_changed_by_everybody(
    capsys: pytest.CaptureFixture[str],
) -> None:
    mask = os.umask(0)
    try:
        assert Run(capsys, obedient, "-t", "throughput", *QUICK).code == 0
    finally:
        os.umask(mask)
    written = [Path("out"), *Path("out").iterdir()]
    assert len(written) > 4 and [p for p in written if p.stat().st_mode & 0o002] == []


def test_a_thread_that_cannot_start_is_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def work() -> int:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            threading.Thread(target=print).start()
        return 0

    assert bench_place.exit_code(work) == 1
    assert "ulimit -u" in capsys.readouterr().err


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["-t", "nonsense"], ["--concurrency", "0"], ["--goodput", "itl:3"], ["--resume"],
        ["--request-rate", "0"], ["--num-prompts", "x"], ["--client", "vllm"],
        ["-p", "99999"], ["--tokenizer", "t"], ["--goodput", "ttft:0"],
        ["--burstiness", "0"], ["--burstiness", "nan"], ["--timeout", "0"], ["--timeout", "-1"],
        ["--shards", "-1"], ["--warmup", "-1"], ["--timeout", "inf"], ["--request-rate", "1e-300"],
        ["--burstiness", "1e-320"], ["--goodput", "ttft:9", "--goodput", "tpot:9", "ttft:8"],
        ["-o", ""], ["--sharegpt="],
    ],
)  # fmt: skip
def test_usage_errors(args: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(args)
    assert stop.value.code == 2


def test_a_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell puts it in after `=`, nor into .env."""
    monkeypatch.setenv("HOME", "/h")
    args = bench.parse(["--client", "builtin", "--output=~/r"], {"SHAREGPT_PATH": "~/s.json"})
    assert (args.output, args.sharegpt) == (Path("/h/r"), Path("/h/s.json"))


def test_limits_add_up_however_they_are_given() -> None:
    args = bench.parse(["--client", "builtin", "--goodput", "ttft:9", "--goodput", "tpot:8"], {})
    assert args.goodput == [("ttft", 9), ("tpot", 8)]


@pytest.mark.parametrize(
    ("args", "refused"),
    [
        (("--output-len", "1,8"), True), (("-t", "sweep", "--output-len", "1"), True),
        (("-t", "prefill"), True), (("-t", "prefill", "--output-len", "8"), False),
        (("-t", "sweep"), False), ((), False),
    ],
)  # fmt: skip
def test_a_limit_of_tpot_needs_more_than_one_token(
    args: tuple[str, ...], refused: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--client", "builtin", "--goodput", "ttft:5", "tpot:30", *args]
    try:
        bench.parse(words, {})
    except SystemExit as stop:
        assert stop.code == 2
    said = "--goodput tpot: answers of one token have no TPOT" in capsys.readouterr().err
    assert said == refused


def test_flags_win_over_the_environment_which_wins_over_env_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path(".env").write_text("BENCH_TYPE=latency\nSHAREGPT_PATH=/data/s.json\n")
    args = bench.parse([], bench_place.environment())
    assert args.type == ("latency",)
    monkeypatch.setenv("BENCH_TYPE", "decode")
    assert bench.parse([], bench_place.environment()).type == ("decode",)
    assert (args.sharegpt, bench.parse([], {}).sharegpt) == (
        Path("/data/s.json"),
        Path("ShareGPT.json"),
    )
    assert bench.parse(["-t", "prefill"], bench_place.environment()).type == ("prefill",)


def test_a_host_of_the_environment_is_a_shells_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST", "x86_64-conda-linux-gnu")
    assert "HOST" not in bench_place.environment()
    Path(".env").write_text("HOST=from-file\nPORT=1\n")
    monkeypatch.setenv("HOST", "x86_64-conda-linux-gnu")
    monkeypatch.setenv("PORT", "2")
    environ = bench_place.environment()
    assert (environ["HOST"], environ["PORT"]) == ("from-file", "2")


def test_a_port_of_the_environment_that_is_none_is_a_usage_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        bench.parse([], {"PORT": "http"})
    assert "PORT=http: a port is 1 to 65535" in capsys.readouterr().err


def test_a_package_that_is_missing_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "dotenv", None)
    Path(".env").write_text("BENCH_TYPE=latency\n")
    assert bench.main(["-p", "1"]) == 1
    assert "package 'dotenv' is missing: run `make setup`" in capsys.readouterr().err


# --- stopping -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_is_finished_is_kept_when_it_is_stopped(number: int, code: int) -> None:
    def answer(request: Request) -> None:
        if len(request.body["prompt"]) == 512:
            process.send_signal(number)
            time.sleep(PATIENCE)
        else:
            obedient(request)

    with serving(model_server(answer)) as server:
        command = [sys.executable, str(ROOT / "bench.py"), "-p", str(server.port), "-o", "out"]
        process = subprocess.Popen(
            [*command, "-t", "latency", *QUICK],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    last = json.loads(stdout.splitlines()[-1])
    assert [r["name"] for r in last["runs"]] == ["latency-in128-out4-c2"]
    assert (last["stopped"], last["valid"]) == (True, False)
    assert Path("out/summary.json").exists()


def test_a_run_that_a_signal_ends_is_kept_as_far_as_it_came() -> None:
    def answer(request: Request) -> None:
        if posts(server) > PROBES + 2 + 6:
            if not sent:
                sent.append(signal.SIGTERM)
                process.send_signal(signal.SIGTERM)
            time.sleep(PATIENCE)
        obedient(request)

    sent: list[int] = []
    with serving(model_server(answer)) as server:
        command = [sys.executable, str(ROOT / "bench.py"), "-p", str(server.port), "-o", "out"]
        load = ["-t", "latency", "--num-prompts", "30", "--input-len", "16", "--output-len", "4"]
        process = subprocess.Popen([*command, *load, "--concurrency", "2"], stderr=subprocess.PIPE)
        _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143, stderr
    run = json.loads(Path("out/latency-in16-out4-c2.json").read_text())
    assert run["completed"] > 2
    assert run["mean_ttft_ms"] > 20
    assert not run["valid"]
    (problem,) = (p for p in run["problems"] if p not in run["client"]["problems"])
    assert problem == f"ended after {run['completed']} of 30 requests: stopped by SIGTERM"


# --- numbers --------------------------------------------------------------------------------------


def test_numbers_of_a_run() -> None:
    outcomes = [
        outcome(first=50 * MS, last=90 * MS, gaps=[10.0] * 4),
        outcome(sent=100 * MS, intended=100 * MS, first=160 * MS, last=200 * MS, gaps=[10.0] * 4),
    ]
    load = Load(Target("h", 1), "/", lambda i: b"", 2)
    found = summarise(load, Result(outcomes), Wanted(MODEL, 5, 4), {"ttft": 55})
    assert found["valid"]
    assert (found["duration"], found["total_input_tokens"], found["total_output_tokens"]) == (
        0.2,
        8,
        10,
    )
    assert (found["request_throughput"], found["output_throughput"]) == (10, 50)
    assert (found["mean_ttft_ms"], found["mean_tpot_ms"], found["mean_e2el_ms"]) == (55, 10, 95)
    assert found["p99_itl_ms"] == 10
    assert (found["request_goodput"], found["goodput_share"]) == (5, 0.5)


def test_an_open_loop_counts_from_the_intended_time() -> None:
    load = Load(Target("h", 1), "/", lambda i: b"", 1, rate=1.0)
    found = summarise(load, Result([outcome(sent=30 * MS)]), Wanted(MODEL, 5), {})
    assert found["mean_ttft_ms"] == 50


@pytest.mark.parametrize(("p", "value"), [(0, 1), (50, 2.5), (90, 3.7), (100, 4)])
def test_percentiles_are_numpys(p: float, value: float) -> None:
    assert Distribution([1, 2, 3, 4]).percentile(p) == pytest.approx(value)


def test_nothing_completed_has_no_numbers_and_no_crash() -> None:
    failed = Result([outcome(error="HTTP 500: no")])
    found = summarise(LOAD, failed, Wanted(MODEL, 5), {"ttft": 1})
    json.dumps(found, allow_nan=False)
    assert (found["valid"], found["completed"], found["mean_ttft_ms"]) == (False, 0, None)


def test_a_goodput_of_everything() -> None:
    timings = [metrics.Timing(10, 100, 10), metrics.Timing(30, 100, 1)]
    assert goodput_of(timings, {"ttft": 20}) == 1
    assert goodput_of(timings, {"tpot": 9.9, "e2el": 100}) == 1


# --- prompts --------------------------------------------------------------------------------------


def test_random_prompts_are_exact_repeatable_and_all_different() -> None:
    prompts = RandomPrompts(64, 8, "seed")
    found = [prompts(i) for i in range(20)]
    assert found == [RandomPrompts(64, 8, "seed")(i) for i in range(20)]
    assert len({tuple(p) for p, _ in found}) == 20
    assert {len(p) for p, _ in found} == {64}
    assert prompts(0) != RandomPrompts(64, 8, "other")(0)


def test_a_warm_up_writes_less() -> None:
    body = json.loads(Requests("m", RandomPrompts(1, 500, "s"), longest=32)(0))
    assert body["max_tokens"] == 32


def conversation(prompt: str, answer: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]}


def write_sharegpt(path: Path, *more: dict[str, Any]) -> None:
    usable = [conversation(f"question number {n} " * 3, "answer " * 10) for n in range(20)]
    unusable = [conversation("a", "answer " * 10), conversation("x" * 5000, "answer " * 10),
                conversation("question " * 10, "b"), {"conversations": []}]  # fmt: skip
    path.write_text(json.dumps([*unusable, *usable, *more]))


def test_sharegpt_is_filtered_and_picked_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharegpt, "PIECE", 100)  # objects cross the pieces
    path = Path("share.json")
    write_sharegpt(path)
    found = sharegpt.pick(path, 8, seed=1)
    assert len(set(found.turns)) == 8
    assert all(prompt.startswith("question number") for prompt, _ in found.turns)
    assert found == sharegpt.pick(path, 8, seed=1)
    assert found != sharegpt.pick(path, 8, seed=2)


def test_fewer_conversations_than_requests_are_used_again() -> None:
    write_sharegpt(Path("share.json"))
    found = sharegpt.pick(Path("share.json"), 100, 0)
    assert found(0) == found(20)


def test_a_sharegpt_file_that_was_cut_off_is_an_error() -> None:
    path = Path("share.json")
    write_sharegpt(path)
    path.write_text(path.read_text()[:-30])
    with pytest.raises(Failure, match="not whole"):
        sharegpt.pick(path, 5, 0)


def test_a_sharegpt_run_says_whose_lengths_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    write_sharegpt(Path("share.json"))
    run = Run(capsys, obedient, "-t", "sharegpt", *QUICK, "--sharegpt", "share.json")
    assert run.code == 0, run.stdout
    prompts = [r.body["prompt"] for r in run.server.requests if r.body][PROBES:]
    assert len(set(prompts)) == len(prompts) == 1 + 4  # the warm-up has its own
    assert "no tokenizer on the client" in run.stdout


def test_a_download_goes_on_where_it_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    whole = b"0123456789" * 10
    asked: list[str] = []

    def answer(request: Request) -> None:
        asked.append(request.fields.get("range", ""))
        rest = whole[int(asked[-1].removeprefix("bytes=").rstrip("-") or 0) :]
        request.send(
            b"HTTP/1.1 206 Partial Content\r\nContent-Length: %d\r\n\r\n" % len(rest) + rest
        )

    Path("data.json.part").write_bytes(whole[:37])
    with serving(answer) as server:
        sharegpt.download(f"http://127.0.0.1:{server.port}/data", Path("data.json"))
    assert asked == ["bytes=37-"]
    assert Path("data.json").read_bytes() == whole
    assert not Path("data.json.part").exists()


def test_a_download_that_fails_keeps_what_came() -> None:
    def answer(request: Request) -> None:
        request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n0123456789")
        raise OSError

    with serving(answer) as server, pytest.raises(Failure):
        sharegpt.download(f"http://127.0.0.1:{server.port}/data", Path("data.json"))
    assert not Path("data.json").exists()


# --- NVIDIA's client ------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-LLM is here: the stand-in that knows no flag which 1.1.0 does not have."""
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN))
    monkeypatch.setattr(bench_place, "is_installed", lambda: True)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "more",
    [
        (), ("--request-rate", "5", "--burstiness", "0.5"), ("--goodput", "ttft:200", "e2el:500"),
        ("--backend", "openai-chat"), ("--tokenizer", "a b;c"),
    ],
)  # fmt: skip
def test_benchmark_serving_takes_our_arguments(
    capfd: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    run = Run(capfd, obedient, "-t", "throughput,latency", *SHORT, *more)
    assert run.code == 0, run.stderr
    record = run.record(run.last["runs"][0]["name"])
    assert (record["metadata"]["client"], record["completed"]) == ("trtllm", 4)
    assert record["mean_e2el_ms"] == 10
    assert not {"generated_texts", "output_lens", "request_goodput:"} & set(record)


@pytest.mark.usefixtures("installed")
def test_benchmark_serving_on_sharegpt(capfd: pytest.CaptureFixture[str]) -> None:
    write_sharegpt(Path("share gpt.json"))
    run = Run(capfd, obedient, "-t", "sharegpt", *SHORT, "--sharegpt", "share gpt.json")
    assert run.code == 0, run.stderr


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("fail=1", "1 of 4 requests failed: ValueError: bad request"),
        ("fail=4", "4 of 4 requests failed"),
        ("empty=2", "2 outputs are empty"),
        ("blank=2", "2 outputs are empty"),
        ("short=1", "1 outputs are not 4 tokens long (one has 3)"),
        ("silent=1", "benchmark_serving wrote no result (exit code 0): ======"),
        ("half=1", "benchmark_serving wrote no result (exit code 0)"),
        ("odd=1", "it is kept as throughput-in512-out4-c2.benchmark_serving"),
        ("die=1", "benchmark_serving wrote no result (exit code 1): OSError: no such tokenizer"),
    ],
)
def test_its_exit_status_is_not_trusted(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fault: str, words: str
) -> None:
    monkeypatch.setenv("STAND_IN", fault)
    run = Run(capfd, obedient, "-t", "throughput", *SHORT)
    assert run.code == 1
    assert words in run.record("throughput-in512-out4-c2")["problems"][0]
    kept = list(Path("out").glob("*.benchmark_serving"))
    assert bool(kept) == (fault in ("half=1", "odd=1"))


@pytest.mark.usefixtures("installed")
def test_its_nan_is_no_figure_and_no_json(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "nan=1")
    run = Run(capfd, obedient, "-t", "throughput", *SHORT)
    assert run.code == 0, run.stderr
    record = run.record("throughput-in512-out4-c2")
    assert (record["mean_itl_ms"], record["p99_itl_ms"]) == (None, None)
    assert "NVIDIA's client has no figure for mean_itl_ms, p99_itl_ms" in record["notes"]
    files = (path.read_text() for path in Path("out").glob("*.*") if path.suffix != ".png")
    everything = run.stdout + "".join(files)
    assert not re.search(r"\b(NaN|Infinity)\b", everything)


@pytest.mark.usefixtures("installed")
def test_nobody_knows_whether_its_client_kept_up(capfd: pytest.CaptureFixture[str]) -> None:
    run = Run(capfd, obedient, "-t", "throughput", *SHORT)
    assert nvidia.UNKNOWN in run.record("throughput-in512-out4-c2")["notes"]
    assert nvidia.UNKNOWN in unescape(Path("out/report.html").read_text())


@pytest.mark.usefixtures("installed")
def test_a_proxy_stays_out_of_what_it_measures(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "example.com")
    monkeypatch.setenv("TRTLLM_STAND_IN", "measure")
    run = Run(capfd, obedient, "-H", "localhost", "-t", "throughput", *SHORT)
    assert run.code == 0, run.stderr
    assert nvidia.unproxied({"no_proxy": "a,b"}, "h") == {"no_proxy": "a,b,h", "NO_PROXY": "h"}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("flags", [["--warmup", "0"], ["--shards", "2"], ["--insecure"]])
def test_what_its_client_cannot_do_is_refused(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.parse(flags, {})
    assert stop.value.code == 2
    assert f"{flags[0]}: NVIDIA's client cannot, use --client builtin" in capsys.readouterr().err
    assert bench.parse([*flags, "--client", "builtin"], {"BENCH_IMAGE": "x"}).client == "builtin"


@pytest.mark.parametrize(("code", "there"), [(0, True), (1, False)])
def test_the_python_of_path_is_asked_whether_tensorrt_llm_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, there: bool
) -> None:
    python = tmp_path / "bin/python3"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\nexit {code}\n")
    python.chmod(0o755)
    monkeypatch.setenv("PATH", str(python.parent))
    assert bench_place.is_installed() is there
    monkeypatch.setenv("PATH", "/nowhere")
    assert not bench_place.is_installed()


def test_without_its_client_an_image_of_the_settings_is_nobodys(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BENCH_IMAGE", "image:1")
    run = Run(capsys, obedient, "--client", "builtin", "-t", "throughput", *QUICK)
    assert run.record("throughput-in512-out4-c2")["metadata"]["image"] is None


def test_gpus_are_named_only_where_they_are_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_place, "gpu_names", lambda environ: [environ.get("SLURM_JOB_ID", "")])
    job = {"SLURM_JOB_ID": "7"}
    record = Path("endpoint.json")
    record.write_text('{"job": "7"}')
    assert bench.gpus_of(Endpoint("http://192.0.2.1:1", "m", "m"), job) == []
    assert bench.gpus_of(Endpoint("http://127.0.0.1:1", "m", "m"), job) == [""]
    launched = Endpoint("http://192.0.2.1:1", "m", "m", record=record)
    assert (bench.gpus_of(launched, job), bench.gpus_of(launched, {})) == (["7"], [])


def test_a_model_in_a_directory_is_found_without_a_flag() -> None:
    """The launcher wrote down what the engine was given; its container sees it, too."""
    model = Path("models/Qwen").absolute()
    model.mkdir(parents=True)
    server = Endpoint("http://10.0.0.1:8000", "Qwen", str(model))
    client = nvidia.BenchmarkServing(server, clients.Options(Path("share.json")))
    assert client.mounts(Path("out")) == [Path("out").absolute(), model]
    command = nvidia.benchmark_serving(Case("x", 1, 1, 1), server, client.options, Path("/out/x"))
    assert command[command.index("--model") + 1] == str(model)
    assert command[command.index("--served-model-name") + 1] == "Qwen"


def test_it_asks_below_v1_only() -> None:
    server = Endpoint("https://api.z.ai/api/paas/v4/", "glm", "glm")
    with pytest.raises(Failure, match="only works below /v1"):
        nvidia.benchmark_serving(Case("x", 1, 1, 1), server, clients.Options(Path("s")), Path("x"))


def test_its_command_line() -> None:
    server = Endpoint("http://10.0.0.1:8000", "Qwen", "/models/Qwen")
    case = Case("decode", 128, 256, 100, 4, repeat=2)
    command = nvidia.benchmark_serving(
        case, server, clients.Options(Path("x"), seed=5), Path("/out/x.json")
    )
    assert command == [
        "python3", "-m", "tensorrt_llm.serve.scripts.benchmark_serving",
        "--backend", "openai",
        "--host", "10.0.0.1", "--port", "8000",
        "--model", "/models/Qwen",
        "--served-model-name", "Qwen",
        "--dataset-name", "random",
        "--random-ids", "--tokenize-on-client",
        "--random-input-len", "128",
        "--random-output-len", "256",
        "--random-range-ratio", "0.0",
        "--random-prefix-len", "0",
        "--num-prompts", "100",
        "--max-concurrency", "4",
        "--ignore-eos",
        "--seed", str(zlib.crc32(b"5/decode-in128-out256-c4-r2")),
        "--percentile-metrics", "ttft,tpot,itl,e2el",
        "--metric-percentiles", "90,95,99",
        "--save-result", "--save-detailed",
        "--result-dir", "/out",
        "--result-filename", "x.json",
    ]  # fmt: skip


@pytest.fixture
def allocation(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A job of four nodes, as Slurm tells it."""
    job = slurm.Allocation("7", nodes=("n1", "n2", "n3", "n4"))
    monkeypatch.setattr(nodes, "ask_slurm", {"7": job}.__getitem__)
    return {"SLURM_JOB_ID": "7"}


def test_in_a_container_here_and_on_the_first_node_of_an_allocation(
    allocation: dict[str, str],
) -> None:
    environ = {"HF_HOME": "/cache", "HF_TOKEN": "secret", "OPENAI_API_KEY": "key", "OTHER": "x"}
    here = bench_place.prefix("image:1", [Path("/a b")], environ)
    assert here == [
        "bash", "-c", bench_place.MAKE_FOLDER, "bench", "/cache",
        "docker", "run", "--rm", "--init", "--pull=never", f"--name=trtllm-bench-{os.getpid()}",
        "--net=host", "--ipc=host", "--userns=host", "--mount=type=bind,source=/a b,target=/a b",
        "--mount=type=bind,source=/cache,target=/cache",
        "--env=HF_HOME=/cache", "--env=HF_TOKEN", "--env=OPENAI_API_KEY", "image:1",
    ]  # fmt: skip
    there = bench_place.prefix("image:1", [Path("/a b")], {**environ, **allocation})
    assert "srun" in there and "--nodes=1" in there
    assert there[there.index("bash") :] == here


def test_the_image_is_brought_to_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, allocation: dict[str, str]
) -> None:
    brought: list[tuple[str, int]] = []
    monkeypatch.setattr(bench_place, "image_id", lambda *_: None)
    monkeypatch.setattr(bench_place, "find_tag", lambda *_: None)
    monkeypatch.setattr(provide, "provide", lambda i, place: brought.append((i.tag, place.size)))
    assert bench_place.provide_image("nvcr.io/x/y:1", allocation) == "nvcr.io/x/y:1"
    assert bench_place.provide_image("local:1", allocation) == "local:1"
    assert (
        bench_place.provide_image("", {**allocation, "IMAGE": "local:2"}) == "local:2"
    )  # the server's
    assert brought == [("nvcr.io/x/y:1", 1)]  # the first node alone


def test_a_squashfs_file_is_unpacked_for_a_step_of_the_first_node(
    monkeypatch: pytest.MonkeyPatch, allocation: dict[str, str], tmp_path: Path
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(pyxis, "is_known", lambda: True)
    monkeypatch.setattr(nodes, "run", lambda argv: asked.append(list(argv)))
    monkeypatch.setattr(provide, "provide", lambda i, place: asked.append([i.tag]))
    image = tmp_path / "x.sqsh"
    image.write_bytes(b"hsqs")
    environ = {**allocation, "HF_HOME": "/cache", "HF_TOKEN": "secret", "HOME": "/root"}
    assert bench_place.provide_image(str(image), environ) == str(image) == asked[0][0]
    words = bench_place.prefix(str(image), [Path("/out")], environ)
    assert asked[1][-4:] == ["mkdir", "-p", "--", "/cache"]
    assert words[:2] == ["env", "NVIDIA_VISIBLE_DEVICES=void"] and "HF_HOME=/cache" in words
    assert "--nodes=1" in words and f"--container-image={image}" in words
    assert f"--container-mounts=/out:/out,/cache:/cache,/out:{pyxis.PROOF}:ro" in words
    (names,) = (word for word in words if word.startswith("--container-env="))
    assert names.startswith("--container-env=HF_HOME,HF_TOKEN,") and "secret" not in str(words)
    assert words[-4:] == ["sh", "-c", pyxis.PROVEN, "bench"]
    with pytest.raises(Failure, match="is for pyxis, which runs in jobs of Slurm's"):
        bench_place.provide_image(str(image), {})


def test_where_tensorrt_llm_is_installed_there_is_no_container() -> None:
    assert bench_place.prefix("", [], {}) == []


@pytest.fixture
def docker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A docker that has one image and runs what follows it; it knows `run` and `image inspect`."""
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\n"
        'last() { shift $(($# - 1)); printf %s "$1"; }\n'
        'if [ "$1 $2" = "image inspect" ]; then\n'
        '    [ "$(last "$@")" = image:1 ] && echo sha256:1 && exit\n'
        '    echo "Error: No such image: $(last "$@")" >&2; exit 1\n'
        "fi\n"
        '[ "$1" = run ] || exit 64\n'
        'while [ "$1" != image:1 ]; do shift; done\n'
        'shift; exec "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home/cache"))


@pytest.mark.usefixtures("docker")
def test_through_docker(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = Run(capfd, obedient, "-t", "throughput", *SHORT, "-i", "image:1")
    assert run.code == 0, run.stderr
    assert run.last["client"] == "trtllm"
    assert " docker run --rm" in run.stderr
    assert (tmp_path / "home/cache").is_dir()
    metadata = run.record("throughput-in512-out4-c2")["metadata"]
    assert (metadata["image"], metadata["image_id"]) == ("image:1", "sha256:1")


@pytest.mark.usefixtures("docker")
def test_an_image_that_is_not_there_fails_once_and_before_anything_is_measured(
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = Run(capfd, obedient, "-i", "image:2", "-t", "throughput")
    assert (run.code, run.stdout) == (1, "")
    assert "Error: No such image: image:2" in run.stderr
    assert not Path("out").exists()


def test_a_container_that_cannot_be_removed_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def hangs(command: list[str], **_: Any) -> None:
        asked.append(command)
        raise subprocess.TimeoutExpired(command, 30)

    monkeypatch.setattr(subprocess, "run", hangs)
    with (
        pytest.raises(KeyboardInterrupt),
        bench_place.removed_afterwards(bench_place.prefix("image:1", [], {}), {}),
    ):
        raise KeyboardInterrupt
    assert asked == [["docker", "rm", "--force", bench_place.name()]]


def test_without_docker_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Failure, match="docker: not found"):
        bench_place.run(bench_place.prefix("image:1", [], {}), {})


@pytest.mark.parametrize(
    ("finish", "early"),
    [("stop", True), ("eos", True), ("eos_token", True), ("STOP", True), ("end_turn", True),
     ("length", False), ("MAX_TOKENS", False), ("content_filter", False), ("", False)],
)  # fmt: skip
def test_whether_an_output_ended_by_the_models_own_word(finish: str, early: bool) -> None:
    found = outcome(output_tokens=3, finish=finish)
    assert metrics.ended_early(found, Wanted(MODEL, 8)) is early


def test_one_token_without_text_is_none_that_is_missing() -> None:
    one = Result([outcome(has_text=False, output_tokens=1, last=50 * MS)])
    assert summarise(LOAD, one, Wanted(MODEL, 1, 4), {})["valid"]
    record = {"output_lens": [1], "errors": [""], "generated_texts": [""], "completed": 1,
              "total_input_tokens": 128}  # fmt: skip
    assert nvidia.judge(Case("prefill", 128, 1, 1), record, False)["valid"]


def test_what_the_other_client_calls_zero_is_nothing() -> None:
    record = {"output_lens": [1], "errors": [""], "completed": 1, "total_input_tokens": 128,
              "mean_tpot_ms": 0.0, "p99_itl_ms": 0.0, "mean_ttft_ms": 5.0}  # fmt: skip
    judged = nvidia.judge(Case("prefill", 128, 1, 1), record, False)
    assert (judged["mean_tpot_ms"], judged["p99_itl_ms"]) == (None, None)
    assert judged["mean_ttft_ms"] == 5.0


@pytest.mark.parametrize(
    ("gap", "problem", "wrong"),
    [
        (0.01, "", []),
        (0.00001, "in one piece", ["ttft", "itl", "tpot"]),
        ((0.00001,) * 7 + (0.08,), "in clumps, 8 tokens together", ["ttft", "itl"]),
    ],
)
def test_what_the_other_client_read_in_clumps_is_no_stream_either(
    gap: float | tuple[float, ...], problem: str, wrong: list[str]
) -> None:
    """A proxy that collects answers, or a client that read late: its TTFT and ITL say neither."""
    gaps = [gap] * 31 if isinstance(gap, float) else (list(gap) * 4)[:31]
    record = {"output_lens": [32], "errors": [""], "completed": 1, "total_input_tokens": 128,
              "ttfts": [0.1], "itls": [gaps]}  # fmt: skip
    judged = nvidia.judge(Case("latency", 128, 32, 1), record, False)
    assert (judged["valid"], judged["invalid_metrics"]) == (not problem, wrong)
    assert problem in " ".join(judged["problems"])


NAN = float("nan")


@pytest.mark.parametrize(
    ("odd", "note"),
    [
        ({"ttfts": [0.1, None]}, "1 of 66 times that NVIDIA's client wrote down are not numbers"),
        ({"ttfts": [NAN, NAN]}, "2 of 66 times"),
        ({"itls": [[0.01] * 30 + [NAN], [0.01] * 31]}, "1 of 66 times"),
        ({"e2els": ["x", 10**400]}, "2 of 66 times"),
        ({"mean_ttft_ms": [1, 2]}, "no figure for mean_ttft_ms"),
        ({"p99_itl_ms": 1e999}, "no figure for p99_itl_ms"),
        ({"duration": None, "request_goodput:": 3.0}, "no figure for duration"),
    ],
)
def test_what_the_other_client_wrote_that_is_no_number_is_left_out(
    odd: dict[str, Any], note: str
) -> None:
    record = {"output_lens": [32, 32], "errors": ["", ""], "completed": 2, "duration": 1.0,
              "total_input_tokens": 256, "ttfts": [0.1, 0.2], "e2els": [0.4, 0.5],
              "itls": [[0.01] * 31] * 2, "mean_ttft_ms": 150.0, "p99_itl_ms": 10.0}  # fmt: skip
    judged = nvidia.judge(Case("latency", 128, 32, 2), {**record, **odd}, False)
    assert judged["valid"], judged["problems"]
    assert note in " ".join(judged["notes"])
    assert is_sound({**judged, "case": {**Case("latency", 128, 32, 2).facts()}, "date": "",
                     "model_id": ""})  # fmt: skip
    assert any(name.endswith("percentiles_ms") for name in judged)


@pytest.mark.parametrize("name", ["request_goodput:", "request_goodput"])
def test_the_other_clients_goodput_is_read_by_either_name(name: str) -> None:
    record = {"output_lens": [32], "errors": [""], "completed": 1, "total_input_tokens": 128,
              "duration": 0.5, name: 2.0}  # fmt: skip
    judged = nvidia.judge(Case("latency", 128, 32, 1), record, False)
    assert (judged["request_goodput"], judged["goodput_share"]) == (2.0, 1.0)


def test_what_was_collected_on_its_way_to_the_other_client_is_noted() -> None:
    record = {"output_lens": [32], "errors": [""], "completed": 1, "total_input_tokens": 128,
              "ttfts": [0.7], "itls": [[0.0005] * 31]}  # fmt: skip
    judged = nvidia.judge(Case("latency", 128, 32, 1), record, False)
    assert judged["valid"] and "less than a tenth" in " ".join(judged["notes"])


def test_latencies_are_added_up_where_the_other_client_has_none() -> None:
    record = {"ttfts": [0.5, 1.0], "itls": [[0.1, 0.1], []]}
    assert nvidia.end_to_end(record) == pytest.approx([0.7, 1.0])
    assert nvidia.end_to_end({**record, "e2els": [9.0]}) == [9.0]


def test_a_data_set_that_is_too_small_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    write_sharegpt(Path("share.json"))
    more = ("--sharegpt", "share.json", "--num-prompts", "100")
    run = Run(capsys, obedient, "-t", "sharegpt", *more, "--concurrency", "50")
    assert "conversations for 100 requests" in run.stdout


def test_usage_without_the_prompts_length_is_none() -> None:
    odd = summarise(LOAD, Result([outcome(prompt_tokens=None)]), Wanted(MODEL, 4, 128), {})
    assert "1 answers came without usage" in odd["problems"]


def test_a_conversation_has_to_be_as_long_as_was_asked(capsys: pytest.CaptureFixture[str]) -> None:
    write_sharegpt(Path("share.json"))

    def answer(request: Request) -> None:
        time.sleep(0.03)
        request.send(stream(request.body["max_tokens"] - 1))

    run = Run(capsys, answer, "-t", "sharegpt", *QUICK, "--sharegpt", "share.json")
    problem, *_ = run.last["runs"][0]["problems"]
    assert problem.startswith("4 outputs are not as long as asked (one has ")


def test_without_ignore_eos_a_conversation_may_be_shorter() -> None:
    wanted = Wanted(MODEL, None, exact=False, output_lens=lambda _: 9)
    assert summarise(LOAD, Result([outcome()]), wanted, {})["valid"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("odd")])
def test_whatever_happens_what_is_finished_is_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real = talk.write_json

    def write(path: Path, data: Any) -> None:
        if "in512" in path.name:
            raise error
        real(path, data)

    monkeypatch.setattr("bench.write_json", write)
    try:
        Run(capsys, obedient, "-t", "latency", *QUICK)
    except RuntimeError as e:
        assert e is error
        captured = capsys.readouterr().out
        last = json.loads(captured.splitlines()[-1])
        assert [r["name"] for r in last["runs"]] == ["latency-in128-out4-c2"]
        assert last["stopped"]
    for file in ("summary.json", "summary.csv", "report.html"):
        assert "latency-in128-out4-c2" in Path("out", file).read_text()


def test_where_no_report_can_be_written_it_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("report.render.write", full)
    run = Run(capsys, obedient, "-t", "throughput", *QUICK)
    assert (run.code, len(run.last["runs"])) == (1, 1)
    assert "No space left" in run.stderr


@pytest.mark.usefixtures("installed")
def test_benchmark_serving_on_a_server_that_hangs_is_ended(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "slow=1000")
    run = Run(capfd, obedient, "-t", "throughput", *SHORT, "--timeout", "1")
    assert run.last["runs"][0]["problems"] == ["benchmark_serving did not end within 4 s"]


@pytest.mark.usefixtures("installed")
def test_before_benchmark_serving_waits_for_hours_a_short_request_is_made(
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = Run(capfd, lambda _: time.sleep(PATIENCE), "-t", "latency", *SHORT, "--timeout", "0.3")
    assert "does not answer even one short request" in run.last["runs"][0]["problems"][0]
    assert (len(run.last["runs"]), run.last["stopped"]) == (1, True)
    assert "benchmark_serving" not in run.stderr


def test_how_long_benchmark_serving_may_take() -> None:
    assert nvidia.longest(Case("x", 1, 1, 100, 4), 600) == 600 * 27
    assert nvidia.longest(Case("x", 1, 1, 100, None, 2.0), 600) == 600 * 3 + 50


def test_a_mean_keeps_no_list_of_millions() -> None:
    tracemalloc.start()
    assert metrics.mean(float(n) for n in range(100_000)) == 49_999.5
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * 100_000


def test_what_is_kept_of_millions_of_gaps_is_small() -> None:
    rng = random.Random(0)
    outcomes = [outcome(gaps=array("f", (rng.gauss(10, 0.1) for _ in range(1000))))
                for _ in range(200)]  # fmt: skip
    tracemalloc.start()
    found = summarise(LOAD, Result(outcomes), Wanted(MODEL, 5, 4), {})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found["std_itl_ms"] == pytest.approx(0.1, rel=0.02)
    assert peak < 1_000_000  # a list of them takes 6 MB


def test_a_download_has_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    line = LiveLine("data, MB", 9)
    monkeypatch.setattr(time, "monotonic", lambda: line.start + 1)
    line(3, 0, 0)
    assert screen.getvalue() == "\r\033[Kdata, MB: 3/9, 2 s left"
    line(3, 0, 60)
    assert ", 60 tokens/s, 2 s left" in screen.getvalue()


def test_a_line_fits_a_narrow_terminal_whatever_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that wraps cannot be taken back: four times a second there would be one more."""
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.delenv("NO_COLOR", raising=False)
    LiveLine("throughput-in512-out256-unlimited", 100)(9, 3, 12345)
    shown = re.sub("\x1b\\[[0-9]*[mK]|\r", "", terminal.getvalue())
    assert shown.startswith("throughput-in512") and len(shown) <= 39
