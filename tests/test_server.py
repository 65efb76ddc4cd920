"""The server's command, its log and health, and the scripts that hold it on a node."""

from __future__ import annotations

import contextlib
import csv
import http.server
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import server
from nodes import Failure, Place, launcher
from server import Log, Plan, docker_arguments, launch_command, mount_flag, passed_on
from tests.conftest import HOSTILE, TAG, TOKEN, Fakes, Script, wait_until

pytestmark = pytest.mark.usefixtures("clean_environment")

NAME = "trtllm-local1-local"
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def plan(*engine: str, runtime: str = "docker", gpus: str = "none", cache: str = "") -> Plan:
    return Plan(
        Place("local1", 1, (), ()),
        runtime,
        TAG,
        gpus,
        ("/fsx", "/home/a b"),
        cache,
        "/fsx/work",
        False,
        "me",
        engine or ("trtllm-serve", "m"),
    )


def go_csv(text: str) -> list[str]:
    """The first record as Go's encoding/csv reads it, without lazy quotes: Docker's --mount."""
    fields, i = [], 0
    while True:
        field = ""
        if text[i : i + 1] == '"':
            i += 1
            while True:
                end = text.index('"', i)
                field, i = field + text[i:end], end + 1
                if text[i : i + 1] != '"':
                    break
                field, i = field + '"', i + 1
        else:
            while i < len(text) and text[i] not in ",\n":
                assert text[i] != '"', 'bare " in non-quoted field'
                field, i = field + text[i], i + 1
        fields.append(field)
        if i == len(text) or text[i] == "\n":
            return fields
        assert text[i] == ",", "extraneous or missing quote"
        i += 1


@pytest.mark.parametrize("name", [*HOSTILE, "a=b", '"', '",target=/etc', " a "])
def test_docker_reads_a_mount_of_any_name_as_it_is_meant(name: str) -> None:
    path = f"/x/{name}"
    flag = mount_flag(path)
    assert flag.startswith("--mount=")
    row = ["type=bind", f"source={path}", f"target={path}"]
    assert go_csv(flag.removeprefix("--mount=")) == row
    assert next(csv.reader(io.StringIO(flag.removeprefix("--mount="), newline=""))) == row


def test_a_plain_mount_looks_as_people_write_it() -> None:
    assert mount_flag("/fsx") == "--mount=type=bind,source=/fsx,target=/fsx"


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({}, []),
        ({"HF_TOKEN": "x", "NCCL_DEBUG": "INFO", "PATH": "/"}, ["HF_TOKEN", "NCCL_DEBUG"]),
        (
            {"FI_PROVIDER": "efa", "UCX_TLS": "x", "TLLM_A": "1", "TRTLLM_B": "1"},
            ["FI_PROVIDER", "TLLM_A", "TRTLLM_B", "UCX_TLS"],
        ),
        ({"HF_TOKEN": "", "NCCL_DEBUG": ""}, []),
        ({"HF_HOME": "/x", "NCCL_SOCKET_IFNAME": "eth0"}, []),
        ({"SLURM_JOB_ID": "1", "PMI_RANK": "0", "MY_NCCL_X": "1", "NCCL": "1", "hf_x": "1"}, []),
    ],
)
def test_only_the_engines_variables_are_passed_on(
    environ: dict[str, str], names: list[str]
) -> None:
    assert passed_on(environ) == names


def test_the_docker_arguments_are_these() -> None:
    environ = {"HF_TOKEN": TOKEN, "NCCL_DEBUG": "WARN", "HOME": "/root"}
    full = plan("trtllm-serve", "m", "--tp_size", "8", cache="/home/a b")
    assert docker_arguments(full, environ) == [
        "--rm",
        "--pull=never",
        "--init",
        "--label=tensorrt-llm-serve.job=local1",
        f"--label=tensorrt-llm-serve.launcher={launcher()}",
        "--label=tensorrt-llm-serve.user=me",
        "--uts=host",
        "--ipc=host",
        "--net=host",
        "--ulimit=memlock=-1",
        "--ulimit=stack=67108864",
        "--mount=type=bind,source=/fsx,target=/fsx",
        "--mount=type=bind,source=/home/a b,target=/home/a b",
        "--workdir=/fsx/work",
        "--env=HF_HOME=/home/a b",
        "--env=NCCL_SOCKET_IFNAME",
        "--env=GLOO_SOCKET_IFNAME",
        "--env=TP_SOCKET_IFNAME",
        "--env=HF_TOKEN",
        "--env=NCCL_DEBUG",
        TAG,
        "trtllm-serve",
        "m",
        "--tp_size",
        "8",
    ]
    assert TOKEN not in " ".join(launch_command(full, environ))


def test_privileges_are_given_only_when_asked_for() -> None:
    asked = Plan(**{**vars(plan()), "privileged": True})
    assert "--privileged" in docker_arguments(asked, {})
    assert "--privileged" not in docker_arguments(plan(), {})


def test_what_is_empty_is_left_out() -> None:
    bare = Plan(**{**vars(plan()), "mounts": (), "cwd": "", "cache": ""})
    assert not [w for w in docker_arguments(bare, {}) if w.startswith(("--mount", "--workdir"))]
    assert not [w for w in docker_arguments(bare, {}) if w.startswith("--env=HF_HOME")]


@pytest.mark.parametrize("code", [1, 2, 125, 126, 127, 137, 139, 143])
def test_the_codes_that_people_meet_have_a_meaning(code: int) -> None:
    assert server.MEANINGS[code]


# The log


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/x.log").write_text("an earlier launch\n")
    log = Log(tmp_path / "logs/x.log")
    yield log
    log.close()


def write(log: Log, data: bytes) -> None:
    log.sink.write(data)
    log.sink.flush()


def test_the_log_is_copied_to_stdout_byte_by_byte(
    log: Log, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(os.dup(1), "w") as out:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", out)
        for piece in (b"one\ntw", b"o\n", b"\xff\x00\xfe\n", "ü".encode()[:1], "ü".encode()[1:]):
            write(log, piece)
            assert log.pump() == piece
        assert log.pump() == b""
    assert capfdbinary.readouterr().out == b"one\ntwo\n\xff\x00\xfe\n\xc3\xbc"


@pytest.mark.parametrize(
    ("data", "last"),
    [
        (b"one\ntwo\n", "two"),
        (b"one\ntwo", "two"),
        (b"one\n\n", "one"),
        (b"one\n  \n", "one"),
        (b"", ""),
        (b"\n", ""),
        (b"\xff\n", "\ufffd"),
    ],
)
def test_the_last_line_is_known(log: Log, data: bytes, last: str) -> None:
    write(log, data)
    log.pump()
    assert log.last_line == last


def test_a_silent_moment_keeps_the_last_line(log: Log) -> None:
    write(log, b"one\n")
    log.pump()
    write(log, b"\n")
    log.pump()
    assert log.last_line == "one"


def test_an_earlier_log_is_kept_and_not_told_again(log: Log) -> None:
    write(log, b"new\n")
    assert log.pump() == b"new\n"
    assert log.tail() == "new"
    assert log.path.read_text() == "an earlier launch\nnew\n"


def test_the_tail_is_the_last_lines_of_this_launch(log: Log) -> None:
    assert log.tail() == ""
    write(log, "".join(f"{i}\n" for i in range(100)).encode())
    assert log.tail().splitlines() == [str(i) for i in range(50, 100)]
    write(log, b"x" * 1_000_000 + b"\xff\nend")
    assert log.tail(2).endswith("\ufffd\nend")
    assert len(log.tail()) < 70_000


def test_a_flood_is_skipped_on_screen_but_kept_in_the_file(
    log: Log, capfd: pytest.CaptureFixture[str]
) -> None:
    write(log, b"0123456789" * 1000)
    assert log.pump(100) == b"0123456789" * 10
    assert log.pump(100) == b""
    assert "skipped on screen" in capfd.readouterr().err
    assert log.path.stat().st_size == 10_000 + len("an earlier launch\n")


def test_less_than_a_flood_is_told_in_full(log: Log) -> None:
    data = os.urandom(750)
    write(log, data)
    assert b"".join(iter(lambda: log.pump(100), b"")) == data


def test_a_reader_that_is_gone_stops_nothing(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write_end = os.pipe()
    os.close(read)
    gone = open(write_end, "w")  # noqa: PTH123, SIM115
    monkeypatch.setattr(sys, "stdout", gone)
    for piece in (b"one\n", b"two\n"):
        write(log, piece)
        assert log.pump() == piece
    opened = sys.stdout
    if opened is not gone:
        opened.close()
    with contextlib.suppress(BrokenPipeError):
        gone.close()


def test_a_log_without_stdout_stops_nothing(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """`>&-`: Python has no sys.stdout then."""
    monkeypatch.setattr(sys, "stdout", None)
    write(log, b"one\n")
    assert log.pump() == b"one\n"
    if sys.stdout:
        sys.stdout.close()


def test_a_log_that_somebody_removes_stops_nothing(log: Log) -> None:
    log.path.unlink()
    write(log, b"one\n")
    assert log.pump() == b"one\n"
    assert log.tail() == "one"


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new/x.json"
    server.write_json(path, {"a": "ü\n"})
    assert json.loads(path.read_text()) == {"a": "ü\n"}
    server.write_json(path, {"b": 1})
    assert json.loads(path.read_text()) == {"b": 1}
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(TypeError):
        server.write_json(path, {"b": object()})
    assert json.loads(path.read_text()) == {"b": 1}


# Health


class Engine(http.server.BaseHTTPRequestHandler):
    replies: dict[str, tuple[int, bytes]] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        code, body = self.replies[self.path]
        self.send_response(code)
        if code == 302:
            self.send_header("Location", "http://127.0.0.1:1/")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    engine = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    thread = threading.Thread(target=engine.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{engine.server_port}"
    engine.shutdown()
    engine.server_close()
    thread.join()


GOOD_MODELS = b'{"data": [{"id": "org/m"}]}'


@pytest.mark.parametrize(
    ("health", "models", "good", "answer"),
    [
        ((200, b""), (200, GOOD_MODELS), True, "/health answered 200"),
        ((200, b"x" * 100_000), (200, GOOD_MODELS), True, "/health answered 200"),
        ((503, b""), (200, GOOD_MODELS), False, "/health answered 503"),
        ((302, b""), (200, GOOD_MODELS), False, "/health answered 302"),
        ((404, b""), (200, GOOD_MODELS), False, "/health answered 404"),
        ((200, b""), (404, b"<html>"), False, "/v1/models gave no list of models"),
        ((200, b""), (200, b"{}"), False, "/v1/models gave no list of models"),
        ((200, b""), (200, b'{"data": []}'), False, "/v1/models gave no list of models"),
        ((200, b""), (200, b"[1]"), False, "/v1/models gave no list of models"),
        ((200, b""), (200, b'{"data": null}'), False, "/v1/models gave no list of models"),
    ],
)
def test_ready_means_healthy_and_a_known_model(
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    health: tuple[int, bytes],
    models: tuple[int, bytes],
    good: bool,
    answer: str,
) -> None:
    Engine.replies = {"/health": health, "/v1/models": models}
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    asked = server.Health(url)
    asked.start()
    wait_until(lambda: asked.ready.is_set() or asked.misses)
    asked.end()
    asked.join()
    assert asked.ready.is_set() is good
    assert asked.answer.startswith(answer)
    assert (asked.model, asked.misses > 0) == ("org/m" if good else "", not good)


def test_no_answer_is_told_as_that() -> None:
    asked = server.Health("http://127.0.0.1:1")
    asked.start()
    wait_until(lambda: asked.misses)
    asked.end()
    asked.join()
    assert asked.answer == "/health did not answer (ConnectionError)"


def test_misses_count_in_a_row(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEALTH_EVERY", 0.01)
    Engine.replies = {"/health": (200, b""), "/v1/models": (200, GOOD_MODELS)}
    asked = server.Health(url)
    asked.start()
    wait_until(asked.ready.is_set)
    Engine.replies["/health"] = (503, b"")
    wait_until(lambda: asked.misses > 2)
    Engine.replies["/health"] = (200, b"")
    wait_until(lambda: asked.misses == 0)
    asked.end()
    asked.join()


# The scripts that hold it


def hold(script: Callable[..., Script], made: Plan, **env: str) -> Script:
    return script(launch_command(made, env), **env)


@pytest.fixture
def ready(fakes: Fakes) -> Fakes:
    fakes.hold_image()
    return fakes


SLEEPER = ("bash", "-c", "trap '' TERM INT HUP; echo up; sleep 100 & wait")


def test_the_end_of_input_removes_the_container(
    ready: Fakes, script: Callable[..., Script]
) -> None:
    held = hold(script, plan(*SLEEPER))
    held.until_said("up")
    assert ready.containers() == [f"local/{NAME}"]
    held.type("more\n")
    assert held.process.poll() is None
    begun = time.monotonic()
    held.close()
    assert held.code() == 143
    assert time.monotonic() - begun < 3
    ready.nothing_is_left()
    assert {call[3] for call in ready.calls("docker", "rm", "--force")} == {NAME}


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_removes_the_container(
    ready: Fakes, script: Callable[..., Script], signum: int
) -> None:
    held = hold(script, plan(*SLEEPER))
    held.until_said("up")
    held.process.send_signal(signum)
    held.process.send_signal(signum)  # impatience changes nothing
    assert held.code() == 143
    ready.nothing_is_left()


def test_a_signal_to_the_whole_group_removes_the_container(
    ready: Fakes, script: Callable[..., Script]
) -> None:
    """As scancel does it: everything on the node gets SIGTERM at once."""
    held = hold(script, plan(*SLEEPER))
    held.until_said("up")
    os.killpg(held.process.pid, signal.SIGTERM)
    assert held.code() == 143
    ready.nothing_is_left()


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_a_container_that_is_created_late_is_removed_too(
    ready: Fakes, script: Callable[..., Script], delay: float
) -> None:
    ready.set(create_delay=delay)
    held = hold(script, plan(*SLEEPER))
    if delay:
        held.until(lambda: ready.calls("docker", "run"))
    held.close()
    assert held.code() in (143, -signal.SIGTERM)  # the latter before anything was started
    ready.nothing_is_left()
    assert bool(ready.calls("docker", "rm")) is bool(ready.calls("docker", "run"))


@pytest.mark.parametrize("code", [0, 1, 2, 42, 139, 143, 255])
def test_the_engines_exit_code_is_handed_through(
    ready: Fakes, script: Callable[..., Script], code: int
) -> None:
    held = hold(script, plan("bash", "-c", f"exit {code}"))
    assert held.code() == code
    ready.nothing_is_left()


def test_an_engine_that_is_killed_is_told_as_137(
    ready: Fakes, script: Callable[..., Script]
) -> None:
    assert hold(script, plan("bash", "-c", "kill -KILL $$")).code() == 137


def test_dockers_own_failure_is_handed_through(fakes: Fakes, script: Callable[..., Script]) -> None:
    held = hold(script, plan("true"))
    assert held.code() == 125
    assert "No such image" in held.output
    fakes.nothing_is_left()


def test_the_cache_is_made_and_arguments_of_any_name_arrive(
    ready: Fakes, script: Callable[..., Script], tmp_path: Path
) -> None:
    cache = tmp_path / "a b's $x/c"
    held = hold(script, plan("printf", "<%s>", *HOSTILE, cache=str(cache)))
    assert held.code() == 0
    assert held.output == "".join(f"<{name}>" for name in HOSTILE)
    assert cache.is_dir()


@pytest.mark.parametrize(
    ("gpus", "given", "flag"),
    [
        ("none", "0,1", None),
        ("auto", "", "all"),
        ("all", "0", "all"),
        ('"device=1,2"', "", '"device=1,2"'),
        ("2", "", "2"),
    ],
)
def test_gpus_are_docker_words(
    ready: Fakes, script: Callable[..., Script], gpus: str, given: str, flag: str | None
) -> None:
    assert hold(script, plan("true", gpus=gpus), SLURM_STEP_GPUS=given).code() == 0
    [call] = ready.calls("docker", "run")
    assert (call[call.index("--gpus") + 1] if "--gpus" in call else None) == flag


def test_secrets_reach_the_engine_by_name_only(ready: Fakes, script: Callable[..., Script]) -> None:
    held = hold(script, plan("bash", "-c", 'echo "$HF_TOKEN"'), HF_TOKEN=TOKEN)
    assert held.code() == 0
    assert held.output == TOKEN + "\n"
    assert TOKEN not in json.dumps(ready.calls())
    assert "--env=HF_TOKEN" in ready.calls("docker", "run")[0]


def test_the_interface_is_the_one_that_leads_out_unless_named(
    ready: Fakes, script: Callable[..., Script]
) -> None:
    ready.program("ip", "print('default via 10.0.0.1 dev ens5 proto dhcp src 10.0.0.2')")
    shown = ("bash", "-c", "echo $NCCL_SOCKET_IFNAME $GLOO_SOCKET_IFNAME $TP_SOCKET_IFNAME")
    held = hold(script, plan(*shown), GLOO_SOCKET_IFNAME="lo")
    assert (held.code(), held.output) == (0, "ens5 lo ens5\n")


def bare(*engine: str) -> Plan:
    return plan(*engine, runtime="bare")


def test_a_bare_engine_sees_nothing_of_slurm(fakes: Fakes, script: Callable[..., Script]) -> None:
    prefixes = ("SLURM", "SLURMD", "SBATCH", "SALLOC", "PMI", "PMI2", "PMIX", "OMPI")
    theirs = [f"{prefix}_X" for prefix in prefixes]
    env = {**dict.fromkeys(theirs, "x"), "NCCL_DEBUG": "INFO", "MY_SLURM_X": "1"}
    held = hold(script, bare("env"), **env)
    assert held.code() == 0
    names = {line.partition("=")[0] for line in held.output.splitlines()}
    assert not names & set(theirs)
    assert {"NCCL_DEBUG", "MY_SLURM_X", "PATH"} <= names


@pytest.mark.parametrize("code", [0, 1, 42, 137])
def test_a_bare_engines_exit_code_is_handed_through(
    fakes: Fakes, script: Callable[..., Script], code: int
) -> None:
    """And what it leaves behind goes with it."""
    held = hold(script, bare("bash", "-c", f"trap '' TERM; sleep 100 & exit {code}"))
    assert held.code() == code
    fakes.nothing_is_left()


def test_a_bare_engine_that_is_missing_is_127(fakes: Fakes, script: Callable[..., Script]) -> None:
    held = hold(script, bare("no-such-engine"))
    assert held.code() == 127
    fakes.nothing_is_left()


@pytest.mark.parametrize("signum", [None, *SIGNALS])
def test_a_bare_engine_gets_the_chance_to_end_by_itself(
    fakes: Fakes, script: Callable[..., Script], signum: int | None
) -> None:
    engine = "trap 'echo bye; kill %%; wait; exit 0' TERM; sleep 100 & echo up; wait"
    held = hold(script, bare("bash", "-c", engine))
    held.until_said("up")
    if signum is None:
        held.close()
    else:
        held.process.send_signal(signum)
    assert held.code(2) == 143
    assert held.output == "up\nbye\n"
    held.close()
    fakes.nothing_is_left()


def test_a_bare_engine_whose_children_ignore_the_end_is_killed_with_them(
    fakes: Fakes, script: Callable[..., Script]
) -> None:
    held = hold(script, bare(*SLEEPER))
    held.until_said("up")
    begun = time.monotonic()
    held.close()
    assert held.code() == 143
    assert time.monotonic() - begun < 4.5
    fakes.nothing_is_left()


def test_removing_by_name_takes_this_jobs_container_only(
    fakes: Fakes, script: Callable[..., Script]
) -> None:
    for name in (NAME, "trtllm", "trtllm-local10-local"):
        fakes.leave_container(name)
    for _ in range(2):
        assert script(server.remove_command(plan())).code() == 0
    assert fakes.containers() == ["local/trtllm", "local/trtllm-local10-local"]
    assert len(fakes.calls("docker", "rm")) == 1


# What its end means


@pytest.fixture
def run_plan(ready: Fakes, tmp_path: Path) -> Iterator[Callable[..., server.Server]]:
    os.environ.update(ready.environment())
    launched: list[server.Server] = []

    def run(*engine: str, place: Place | None = None) -> server.Server:
        made = Plan(**{**vars(plan(*engine)), **({"place": place} if place else {})})
        launched.append(server.launch(made, "n1", "http://127.0.0.1:1", tmp_path / "x.log"))
        return launched[-1]

    yield run
    for each in launched:
        each.health.end()
        each.health.join()
        each.step.stop()
        each.log.close()


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("echo why; exit 137", r"exit code 137 \(killed, .*\) before it was ready, .* s: why$"),
        ("echo why; exit 3", r"exit code 3 before it was ready, .* s: why$"),
        ("exit 2", r"exit code 2 \(it refused its arguments\) .*: it said nothing$"),
        ("exit 0", r"exit code 0 before it was ready"),
    ],
)
def test_an_engine_that_ends_is_told_with_its_code_meaning_and_words(
    run_plan: Callable[..., server.Server], engine: str, words: str
) -> None:
    running = run_plan("bash", "-c", engine)
    with pytest.raises(Failure, match="^n1: trtllm-serve ended with " + words):
        server.await_ready(running, 60)


def test_the_end_of_a_job_is_not_blamed_on_the_engine(
    run_plan: Callable[..., server.Server],
) -> None:
    text = "echo 'slurmstepd: error: *** STEP 77.1 ON n1 CANCELLED AT 2025 ***'; exit 1"
    running = run_plan("bash", "-c", text, place=Place("77", 1, ("env",), ("env",)))
    with pytest.raises(Failure, match=r"Slurm ended the server .*job 77 was cancelled"):
        server.await_ready(running, 60)


def test_loading_is_told_now_and_then_and_has_a_deadline(
    run_plan: Callable[..., server.Server],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(server, "HEARTBEAT", 0.2)
    running = run_plan("bash", "-c", "echo Loading weights; sleep 100")
    with pytest.raises(Failure, match=r"not ready within 0\.6 s: .*last line: Loading weights"):
        server.await_ready(running, 0.6)
    assert "loading for 0 s; log: Loading weights" in capfd.readouterr().err
