"""The launcher: its pure decisions, and all of it as a process among fakes."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common import settings
from common.talk import Failure
from launch import address, allocation, announce, cli, disagg
from launch import main as run_sbatch
from launch.findings import Node
from launch.node import facts
from launch.node.facts import network
from launch.node.messages import Facts
from launch.nodes import Place
from launch.plan import find_model, user_name
from tests.conftest import (
    COMMON,
    HOSTILE,
    PATIENCE,
    ROOT,
    TAG,
    TOKEN,
    Fakes,
    Watch,
    archive,
    config_digest,
    free_port,
    packed,
    shown_orders,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("clean_environment")

HERE = Place("local1", 1, ())
SLURM = Place("77", 1, ("srun",))


# The command line


@pytest.mark.parametrize(
    ("argv", "rest"),
    [
        ([], []),
        (["m"], ["m"]),
        (["m", "--tp_size", "8"], ["m", "--tp_size", "8"]),
        (["--tp_size", "8", "m", "--port=1"], ["--tp_size", "8", "m", "--port=1"]),
        (["--image", "x", "m", "--tp_size", "8", "-f"], ["m", "--tp_size", "8"]),
        (["m", "--im", "x"], ["m", "--im", "x"]),
        (["m", "--work=x"], ["m", "--work=x"]),
        (["--force", "--", "m", "--check"], ["m", "--check"]),
        (["m", "--a", "--", "--b", "--", "--c"], ["m", "--a", "--b", "--", "--c"]),
        (["--z", "1", "--a", "2", "m", "--z", "3"], ["--z", "1", "--a", "2", "m", "--z", "3"]),
        (["m", "--config", "a b.yaml"], ["m", "--config", "a b.yaml"]),
        (["m", "--x", "-1"], ["m", "--x", "-1"]),
    ],
)
def test_what_is_not_ours_goes_on_in_its_order(argv: list[str], rest: list[str]) -> None:
    assert cli.parse(argv)[1] == rest


@pytest.mark.parametrize("name", [n for n in HOSTILE if not n.startswith("-")])
def test_words_of_any_kind_go_on_as_they_are(name: str) -> None:
    words = [name, "--x", name, f"--y={name}"]
    assert cli.parse(words)[1] == words


def test_flags_win_over_settings() -> None:
    os.environ.update(IMAGE="e", RUNTIME="bare", READY_TIMEOUT="5", CONTAINER_MOUNT="/e")
    args, _ = cli.parse([])
    assert (args.image, args.runtime, args.ready_timeout) == ("e", "bare", 5.0)
    assert args.container_mount == args.asked_mount == "/e"
    flags = ["--image=f", "--runtime=docker", "--ready-timeout=6", "--container-mount=/f"]
    args, _ = cli.parse(flags)
    assert (args.image, args.runtime, args.ready_timeout) == ("f", "docker", 6.0)
    assert args.container_mount == args.asked_mount == "/f"


def test_all_of_a_workspace_is_stopped_only_where_no_job_is_named() -> None:
    assert cli.parse(["--stop"])[0].stop == ""
    assert cli.parse(["--stop", "41_3"])[0].stop == "41_3"


def test_a_server_is_probed_but_not_restarted_unless_asked() -> None:
    args, _ = cli.parse([])
    assert (args.probe_seconds, args.probe_timeout, args.restart) == (60, 60, 0)
    os.environ.update(PROBE_SECONDS="0", PROBE_TIMEOUT="90", RESTART="2")
    args, _ = cli.parse(["--restart", "3"])
    assert (args.probe_seconds, args.probe_timeout, args.restart) == (0, 90, 3)


def test_the_default_mount_was_not_asked_for() -> None:
    args, _ = cli.parse([])
    assert (args.container_mount, args.asked_mount) == ("/fsx", None)
    assert args.workspace == Path.cwd().resolve()


@pytest.mark.parametrize(
    ("argv", "env", "said"),
    [
        (["--affinity=prefix", "--no-front"], {}, "with one server, --no-front, --affinity"),
        (["--all-or-nothing"], {"LOAD_AT_ONCE": "2"}, "server, --all-or-nothing does nothing"),
        (["--no-front", "--load-at-once=1"], {}, "--load-at-once, --no-front do nothing"),
        (["--all-or-nothing", "--replicas=2"], {"LOAD_AT_ONCE": "2"}, ""),
        (["--load-at-once=1", "--prefill=1", "--decode=1"], {}, ""),
        ([], {"NODELIST": "n1"}, "without Slurm, NODELIST does nothing"),
        (
            [],
            {"CUDA_VISIBLE_DEVICES": "2,3"},
            "without GPUS=device=2,3, CUDA_VISIBLE_DEVICES does nothing",
        ),
        ([], {"CUDA_VISIBLE_DEVICES": "2,3", "GPUS": "none"}, ""),
        (["--runtime=bare"], {"CUDA_VISIBLE_DEVICES": "2,3"}, ""),
        ([], {"NODELIST": "n1", "SLURM_JOB_ID": "7"}, ""),
        (["--status"], {"NODELIST": "n1"}, ""),
        (["--engine=vllm"], {"TRTLLM_VERSION": "1.1.0"}, "with vLLM, TRTLLM_VERSION does nothing"),
        ([], {"TRTLLM_VERSION": "1.1.0"}, ""),
    ],
)
def test_what_does_nothing_in_a_launch_is_told(
    argv: list[str], env: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ.update(env)
    cli.parse(argv)
    told = capsys.readouterr().err
    assert said in told and bool(said) == bool(told)


def test_a_wait_without_end_is_a_time_that_every_timer_takes() -> None:
    os.environ["PROBE_TIMEOUT"] = "inf"
    args, _ = cli.parse(["--ready-timeout", "inf"])
    for seconds in (args.ready_timeout, args.probe_timeout):
        assert 1e8 < seconds < threading.TIMEOUT_MAX and int(seconds) == seconds


def test_arguments_of_a_pool_may_be_one_flag() -> None:
    pools = ["--prefill", "1", "--decode", "1"]
    words = [*pools, "--prefill-args", "--tp_size=2", "--decode-args", "-x", "--", "--prefill-args"]
    args, rest = cli.parse(words)
    assert (args.prefill_args, args.decode_args) == ("--tp_size=2", "-x")
    assert rest == ["--prefill-args"]
    assert cli.parse([*pools, "--prefill-args=--a 1", "m"])[0].prefill_args == "--a 1"


def test_a_file_may_be_named_from_home_behind_an_equals_sign() -> None:
    args, _ = cli.parse(["--prefill=1", "--decode=1", "--prefill-config=~/p.yaml", "--why=~/x"])
    assert (args.prefill_config, args.why) == tuple(
        str(Path.home() / name) for name in ("p.yaml", "x")
    )
    assert disagg.words_of("", "--config ~/p.yaml")[1] == args.prefill_config


@pytest.mark.parametrize(
    ("argv", "env", "words"),
    [
        (["--ready-timeout", "soon"], {}, "not a number of seconds"),
        (["--ready-timeout", "nan"], {}, "not a number of seconds"),
        ([], {"READY_TIMEOUT": "soon"}, "not a number of seconds"),
        (["--ready-timeout", "-1"], {}, "not a number of seconds"),
        ([], {"PROBE_SECONDS": "never"}, "PROBE_SECONDS: 'never' is not a number of seconds"),
        ([], {"PROBE_TIMEOUT": "1m"}, "PROBE_TIMEOUT: '1m' is not a number of seconds"),
        (["--restart", "-1"], {}, "--restart: '-1' is not a number of times"),
        ([], {"RESTART": "yes"}, "'yes' is not a number of times"),
        (["--restart", "9" * 5000], {}, "is not a number of times"),
        (["--runtime", "podman"], {}, "invalid choice"),
        ([], {"RUNTIME": "podman"}, "RUNTIME is 'podman'"),
        ([], {"PRIVILEGED": "true"}, "PRIVILEGED is 'true', neither 0 nor 1"),
        ([], {"GPUS": "yes"}, "GPUS is 'yes', not auto, none, or what docker's --gpus takes"),
        (
            [],
            {"GPUS": "0,1"},
            "GPUS is '0,1', not auto, none, or what docker's --gpus takes, such as",
        ),
        ([], {"GPUS": "all,4"}, "GPUS is 'all,4', not auto"),
        ([], {"GPUS": "0"}, "GPUS is '0', not auto"),  # which GPU, not how many
        (["--image", ""], {}, "--image is empty"),
        (["--container-mount="], {}, "--container-mount is empty"),
        (["--restart", ""], {"RESTART": "1"}, "--restart is empty"),
        (["--stop", ""], {}, "--stop is empty"),
        (["--stop="], {}, "--stop is empty"),
        (["-w", "/no/such"], {}, "/no/such is not a directory"),
        (["-w", "~no-such-user/x"], {}, "is not a directory"),
        (["-w", "n" * 300], {}, "is not a directory"),
        (["--image"], {}, "expected one argument"),
        (["--check", "--dry-run"], {}, "not allowed with"),
    ],
)
def test_a_mistake_in_the_usage_is_exit_code_2(
    argv: list[str], env: dict[str, str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    os.environ.update(env)
    with pytest.raises(SystemExit) as stop:
        cli.parse(argv)
    assert stop.value.code == 2
    assert words in capfd.readouterr().err


@pytest.mark.parametrize(
    "gpus", ["auto", "none", "all", "2", "device=0,2", '"device=0,2"', "all,capabilities=utility"]
)
def test_gpus_are_what_docker_takes(gpus: str) -> None:
    os.environ["GPUS"] = gpus
    cli.parse([])


def test_a_model_of_the_settings_is_not_called_the_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert find_model(None) in capsys.readouterr().err.partition("serving the default, ")[2]
    os.environ["MODEL"] = "org/m"
    assert find_model(None) == "org/m"
    assert "serving the setting's, org/m" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "env", "said"),
    [
        ([""], {}, "MODEL is empty"),
        ([" "], {}, "MODEL is empty"),
        (["org/a", "org/b"], {}, "one MODEL, not two: org/b"),
        (["org/a", "--tp_size", "8", "b", "c"], {}, "one MODEL, not 3: b, c"),
        ([], {"MODEL": "--check"}, "MODEL is --check, which is not a model"),
        (["m", "--port"], {}, "--port needs a value"),
        (["m", "--tp_size", "-x"], {}, "--tp_size needs a value"),
        (["m", "--tp_size", ""], {}, "--tp_size needs a value"),
        (["m", "--tp_size="], {}, "--tp_size needs a value"),
        (["m"], {"PORT": "x"}, "the port is 'x', not a number from 1 to 65535"),
        (["m"], {"TP": "0"}, "tensor_parallel_size is '0', not a number of GPUs"),
    ],
)
def test_words_that_cannot_be_meant_are_exit_code_2_before_anything_is_done(
    words: list[str], env: dict[str, str], said: str, launch: Launcher, fakes: Fakes
) -> None:
    started = launch(*words, **env)
    assert started.code() == 2
    assert f"ERROR {said}\n" in started.output
    assert fakes.calls() == []


@pytest.mark.parametrize(
    ("place", "args", "url"),
    [
        (HERE, ["--host", "0.0.0.0", "--port", "1"], "http://127.0.0.1:1"),
        (HERE, ["--host", "::", "--port", "1"], "http://[::1]:1"),
        (SLURM, ["--host", "::", "--port", "1"], "http://10.0.0.5:1"),
        (HERE, ["--host", "10.0.0.9", "--port=1"], "http://10.0.0.9:1"),
        (HERE, ["--host", "fe80::1", "--port", "1"], "http://[fe80::1]:1"),
        (SLURM, ["--host", "0.0.0.0", "--port", "1"], "http://10.0.0.5:1"),
        (SLURM, ["--host", "gpu7", "--port", "1"], "http://gpu7:1"),
    ],
)
def test_the_url_is_the_address_that_was_asked_for(place: Place, args: list[str], url: str) -> None:
    addresses = ["fe80::9", "127.0.1.1", "10.0.0.5", "10.0.0.6"]
    head = Node("localhost", Facts(addresses=addresses, network=network()))
    assert address.url_of(head, place, args) == url


def test_a_node_that_tells_no_address_goes_by_its_name() -> None:
    args = ["--host", "0.0.0.0", "--port", "1"]
    assert address.url_of(Node("n1", Facts(addresses=["fe80::1"])), SLURM, args) == "http://n1:1"


@pytest.mark.parametrize(
    ("addresses", "url"),
    [
        (["10.0.0.5", "fe80::9", "fd00::5", "fd00::6"], "http://[fd00::5]:1"),
        (["::1", "fd00::5"], "http://[fd00::5]:1"),
        (["10.0.0.5", "fe80::9"], "http://10.0.0.5:1"),
        (["fe80::9"], "http://n1:1"),
    ],
)
def test_who_listens_by_ipv6_is_asked_by_ipv6(addresses: list[str], url: str) -> None:
    """Some engines take nothing else then."""
    head = Node("n1", Facts(addresses=addresses))
    args = ["--host", "::", "--port", "1"]
    assert address.url_of(head, SLURM, args) == url
    # An orchestrator splits its servers' addresses at the colon.
    assert "[" not in address.url_of(head, SLURM, args, colons=False)


def test_a_node_that_has_only_ipv6_is_told_before_the_engine_listens_elsewhere() -> None:
    head = Node("n1", Facts(addresses=["127.0.0.1", "fe80::1", "fd00::5"]))
    with pytest.raises(Failure, match=r"n1 has no IPv4 address, .* 0\.0\.0\.0") as failure:
        address.url_of(head, SLURM, ["--host", "0.0.0.0", "--port", "1"])
    assert failure.value.hint == "add --host ::"


def test_the_way_out_by_ipv6_is_known() -> None:
    """The loopback has one everywhere but where the kernel has no IPv6."""
    assert facts.source_towards("::1") in ("::1", "")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_loopback_is_reached_from_its_own_network_whatever_the_hosts_are_called(
    host: str,
) -> None:
    args = ["--host", host, "--port", "1"]
    address.url_of(Node("another-name", Facts(network=network())), SLURM, args)
    with pytest.raises(Failure, match="cannot be reached from here: the server runs on "):
        address.url_of(Node(socket.gethostname(), Facts(network="boot/1")), SLURM, args)


def test_a_nodes_first_address_is_that_of_the_way_to_the_launcher(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.environ.update(fakes.environment(SLURM_LAUNCH_NODE_IPADDR="127.7.7.7"))
    assert facts.addresses()[0] == facts.source_towards("127.7.7.7") == "127.0.0.1"
    monkeypatch.setattr(facts, "source_towards", {"127.7.7.7": "10.0.0.5", facts.ELSEWHERE: ""}.get)
    assert facts.addresses() == ["10.0.0.5", "127.0.0.1", "fe80::1"]


def test_the_curl_line_passes_by_a_proxy(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:1")
    announce.say_how_to_use({"url": "http://h:1", "model": "m"}, "^C")
    assert "  curl --noproxy '*' http://h:1/v1/completions " in capfd.readouterr().err


@pytest.mark.parametrize("model", ["org/m", *HOSTILE])
def test_the_curl_line_can_be_pasted(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    for name in announce.PROXIES:
        monkeypatch.delenv(name, raising=False)
    announce.say_how_to_use({"url": "http://h:1", "model": model}, "^C")
    line = next(s for s in capfd.readouterr().err.split("\n[") if " curl " in s)
    words = shlex.split(line.partition("] ")[2].replace("\\\n", " "))
    assert words[:2] == ["curl", "http://h:1/v1/completions"]
    assert json.loads(words[-1])["model"] == model


def test_slurm_reads_the_header() -> None:
    """It is read up to the first line that is no comment, and with no space after the #."""
    lines = (ROOT / "run_sbatch.py").read_text().splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    flags = [line.removeprefix("#SBATCH ") for line in header if line.startswith("#SBATCH ")]
    assert {"--nodes=1", "--gpus-per-node=8", "--exclusive"} <= set(flags)


PACKAGES = ("common", "launch", "load", "report")
SCRIPTS = [p for p in sorted(ROOT.glob("*.py")) if p.read_text().startswith("#!")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.name))
def test_help_fits_a_terminal(path: Path) -> None:
    env = {"PATH": "/usr/bin:/bin", "COLUMNS": "80", "HOME": "/"}
    done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) <= (60 if path.name == "run_sbatch.py" else 50)
    assert [line for line in lines if len(line) > 80] == []


def test_the_start_does_not_wait_for_what_is_needed_later() -> None:
    """requests alone takes as long to import as all the rest."""
    look = "import launch.main, sys; print({'requests', 'matplotlib', 'dotenv'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


# The whole, among fakes


@pytest.fixture(scope="session")
def toolset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts in a directory with an awkward name, without a developer's .env and .venv."""
    home = tmp_path_factory.mktemp("tools") / "a b's $x"
    home.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy2(path, home)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, home / package)
    return home


class Launch:
    """One run of run_sbatch.py, its output in a file."""

    def __init__(self, fakes: Fakes, command: list[str], env: dict[str, str], out: Any) -> None:
        self.fakes, self.path = fakes, fakes.home / f"launch-{time.monotonic_ns()}"
        with self.path.open("wb") as sink:
            self.process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=sink if out is None else out,
                stderr=sink,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.path.read_text(errors="replace")

    def until(self, text: str) -> None:
        wait_until(lambda: text in self.output or self.process.poll() is not None, text)
        assert text in self.output, self.output

    def until_logged(self, text: str) -> None:
        """In the server's log: on the screen it is from the moment on that the server is ready."""
        wait_until(lambda: any(text in p.read_text() for p in Path("logs").glob("trtllm_*")), text)

    def code(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"did not end within {PATIENCE:g} s:\n{self.output}")

    def stop(self, signum: int = signal.SIGINT) -> int:
        self.process.send_signal(signum)
        return self.code()


Launcher = Callable[..., Launch]


@pytest.fixture
def launch(fakes: Fakes, toolset: Path) -> Iterator[Launcher]:
    """Start run_sbatch.py in the empty working directory; nothing of it may be left."""
    started: list[Launch] = []
    fakes.hold_image()

    def start(
        *args: str, slurm: bool = False, script: Path | None = None, out: Any = None, **env: str
    ) -> Launch:
        gpus = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2"} if slurm else {"GPUS": "none"}
        port = {"PORT": str(free_port())}
        full = fakes.environment(HF_TOKEN=TOKEN, **{**port, **gpus, **env})
        command = [sys.executable, str(script or toolset / "run_sbatch.py"), *args]
        started.append(Launch(fakes, command, full, out))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
        each.process.wait()
    for each in started:
        assert "Traceback" not in each.output, each.output
        assert TOKEN not in each.output
    fakes.nothing_is_left()
    assert TOKEN not in json.dumps(fakes.calls())
    for path in Path.cwd().rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path


@pytest.fixture
def tarball() -> str:
    """The default image of the workspace; returns its id."""
    data = archive()
    Path("tensorrt-llm-serve-latest.tar.gz").write_bytes(packed(data, "gz"))
    return config_digest(data)


def left() -> set[str]:
    logs = ("trtllm_server_", "launch_")
    return {p.name for p in Path("logs").iterdir() if not p.name.startswith(logs)}


def commands() -> str:
    """The launches' own log, which has every command in full."""
    return "".join(path.read_text() for path in Path("logs").glob("launch_*.log"))


def error(launched: Launch) -> str:
    """The sentence that a failed launch ends with."""
    assert launched.code() == 1, launched.output
    return launched.output.partition("ERROR ")[2]


def test_a_cold_start_on_two_nodes_serves_until_interrupted(
    fakes: Fakes, launch: Launcher, tarball: str
) -> None:
    started = launch("org/m", "--tp_size", "8", slurm=True, SLURM_HINT="x", SLURM_CPU_BIND="x")
    started.until("stop it with ^C or make stop JOB=77\n")
    assert fakes.images("localhost")[TAG] == tarball
    assert fakes.images("n2") == {}  # the server has no use for it
    endpoint = json.loads(Path("logs/endpoint.json").read_text())
    assert endpoint["nodes"] == ["localhost", "n2"]
    assert (endpoint["job"], endpoint["model"]) == ("77", "org/m")
    assert endpoint["model_argument"] == "org/m"
    assert re.search(rf"READY after \d+\.\d s: {endpoint['url']} serves org/m", started.output)
    before = started.output.partition("READY")[0].splitlines()
    assert len(before) <= 10 and max(map(len, before)) <= 120, before
    assert fakes.containers() == [f"localhost/{endpoint['container']}"]
    assert fakes.container()["environment"]["HF_TOKEN"] == TOKEN
    assert started.stop() == 130
    assert left() == set()
    log = Path(endpoint["log"]).read_text()
    assert "Uvicorn running" in log and "Uvicorn running" in started.output
    # That srun tells how a step has ended that we have ended is for the log alone.
    assert "task 0: Exited" in log and "task 0: Exited" not in started.output
    assert len(fakes.calls("docker", "load")) == 1


def test_a_signal_that_only_warns_is_told_and_ends_nothing(launch: Launcher) -> None:
    started = launch("m")
    started.until("stop it with")
    for name in ("USR1", "USR2", "ALRM", "XCPU"):
        started.process.send_signal(signal.Signals[f"SIG{name}"])
        started.until(f"SIG{name} is taken as Slurm's warning before the time limit (--signal)")
    assert started.stop() == 130


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_it_with_its_own_code(
    fakes: Fakes, launch: Launcher, signum: int, code: int
) -> None:
    started = launch("m")
    started.until("stop it with")
    assert started.stop(signum) == code
    assert left() == set()
    assert fakes.calls("docker", "load") == fakes.calls("srun") == []


def test_a_second_signal_does_not_break_the_clean_up(fakes: Fakes, launch: Launcher) -> None:
    started = launch("m", TRTLLM_SIM_FAULT="ignore-term")
    started.until("stop it with")
    fakes.set(rm_delay=0.3)
    started.process.send_signal(signal.SIGINT)
    wait_until(lambda: fakes.calls("docker", "rm"))
    started.process.send_signal(signal.SIGTERM)
    assert started.stop(signal.SIGINT) == 130
    assert left() == set()
    assert "stopped; the log is" in started.output


def test_a_signal_during_the_clean_up_of_a_failure_does_not_break_it(
    fakes: Fakes, launch: Launcher
) -> None:
    started = launch("m", TRTLLM_SIM_FAULT="exit-loading:3")
    fakes.set(inspect_delay=0.5)
    wait_until(lambda: fakes.calls("docker", "ps", "--all", "--quiet"))
    assert started.stop() in (1, 130)
    assert left() == set()
    assert "stopped; the log is" in started.output


def test_a_signal_while_the_image_is_loaded_stops_the_load(
    fakes: Fakes, launch: Launcher, tarball: str
) -> None:
    fakes.set(load_delay=600)
    started = launch("m", slurm=True)
    wait_until(lambda: fakes.calls("docker", "load"))
    assert started.stop() == 130
    assert fakes.calls("docker", "run") == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("exit-loading:137", "exit code 137 (killed) before it was"),
        ("exit-serving:139:3", "exit code 139 (segmentation fault) while serving"),
        ("kill-serving:3", "exit code 137 (killed) while"),
    ],
)
def test_the_end_of_the_engine_is_told_and_fails(
    fakes: Fakes, launch: Launcher, fault: str, words: str
) -> None:
    started = launch("m", TRTLLM_SIM_FAULT=fault)
    assert words in error(started)
    assert "the last lines of" in started.output
    assert "; the whole log: " in started.output or "next: the whole log: " in started.output
    assert left() == set()


def labelled(version: str) -> dict[str, str]:
    name = "org.opencontainers.image"
    return {f"{name}.title": "tensorrt-llm-serve", f"{name}.version": version}


def test_the_version_is_the_images(fakes: Fakes, launch: Launcher) -> None:
    fakes.hold_image(labels=labelled("1.2.1"))
    Path("c.yaml").write_text("{}")
    args = ("m", "--tensor_parallel_size", "2", "--config", "c.yaml", "--container-mount", ".")
    checked = launch("--check", *args)
    assert checked.code() == 0 and "TensorRT-LLM 1.2.1, TP 2: " in checked.output, checked.output
    served = launch(*args, TRTLLM_SIM_VERSION="1.2.1")
    served.until("stop it with")
    assert re.search(r"READY after .* serves m, TensorRT-LLM 1\.2\.1\n", served.output)
    [run] = fakes.calls("docker", "run")
    assert run[run.index("--config") + 1] == "c.yaml"
    assert served.stop() == 130
    refused = launch(*args, TRTLLM_VERSION="1.1.0")
    assert "1.1.0 has no option --tensor_parallel_size (1.2.1 has" in error(refused)
    assert "did you mean --tp_size?" in refused.output
    assert len(fakes.calls("docker", "run")) == 1


def test_a_port_that_is_taken_after_all_ends_1_2_1_at_once(fakes: Fakes, launch: Launcher) -> None:
    """It was free when the node was asked. 1.2.1 takes it before it loads the model."""
    fakes.hold_image(labels=labelled("1.2.1"))
    fakes.set(create_delay=2)
    port = free_port()
    slow = {"TRTLLM_SIM_VERSION": "1.2.1", "TRTLLM_SIM_LOAD_SECONDS": "600"}
    started = launch("m", "--port", str(port), **slow)
    wait_until(lambda: fakes.calls("docker", "run"))
    with socket.create_server(("0.0.0.0", port)):
        said = error(started)
    assert f"Failed to bind socket to 0.0.0.0:{port}" in said
    assert "had it" in said and "another --port" in said
    assert left() == set()
    started.path.write_text(started.output.replace("Traceback", ""))  # the engine's, not ours


def test_1_2_1_waits_for_the_port_of_a_server_that_has_just_ended(
    fakes: Fakes, launch: Launcher
) -> None:
    """Its connections hold the port for a minute, and 1.2.1 does not ask to reuse it."""
    fakes.hold_image(labels=labelled("1.2.1"))
    with socket.create_server(("127.0.0.1", 0)) as last:
        port = last.getsockname()[1]
        with socket.create_connection(last.getsockname()), last.accept()[0] as connection:
            connection.shutdown(socket.SHUT_RDWR)  # we close first: TIME-WAIT is ours
    started = launch("m", "--port", str(port), TRTLLM_SIM_VERSION="1.2.1")
    started.until(f"local: connections of a server that has ended still hold port {port}")
    assert fakes.calls("docker", "run") == []
    assert started.stop() == 130
    assert left() == set()


def test_an_image_that_does_not_say_its_version_is_served_unchecked(
    fakes: Fakes, launch: Launcher
) -> None:
    fakes.hold_image(labels={})
    served = launch("m")
    served.until("stop it with")
    assert served.output.count("version of TensorRT-LLM is not known here") == 1
    assert "serves m, TensorRT-LLM\n" in served.output
    assert served.stop() == 130


@pytest.mark.parametrize("asked", ["1.1.0", ""])
def test_a_tarball_without_a_sidecar_says_its_version_when_it_is_loaded(
    fakes: Fakes, launch: Launcher, tarball: str, asked: str
) -> None:
    fakes.set(labels={}, asked=f"tensorrt_llm {asked}" if asked else "")
    words = ("m", "--tool_parser", "qwen3")
    checked = launch("--check", *words, slurm=True)
    assert checked.code() == 0 and "and options are checked once the nodes" in checked.output
    started = launch(*words, slurm=True)
    assert started.code() == 1
    said = started.output.partition("ERROR ")[2]
    if asked:
        assert said.startswith("trtllm-serve 1.1.0 has no option --tool_parser (1.2.1 has")
    else:  # nothing is refused but by the engine
        assert "No such option" in said
    assert fakes.images("localhost")[TAG] == tarball
    assert len(fakes.calls("docker", "load")) == 1
    assert left() == set()


def test_a_sidecar_tells_the_version_before_any_node_is_asked(
    fakes: Fakes, launch: Launcher, tarball: str
) -> None:
    path = Path("tensorrt-llm-serve-latest.tar.gz")
    sidecar = {"tags": [TAG], "config_digest": tarball, "manifest_digest": None, "diff_ids": [],
               "unpacked_bytes": 9, "packed_bytes": path.stat().st_size, "sha256": "",
               "engine": "tensorrt_llm", "version": "1.2.1"}  # fmt: skip
    path.with_name(f"{path.name}.json").write_text(json.dumps(sidecar))
    assert "1.2.1 has no option --no_such" in error(launch("m", "--no_such", "1", slurm=True))
    assert fakes.calls("docker") == []
    shown = launch("--dry-run", "m", "--tensor_parallel_size", "8")
    assert shown.code() == 0 and "not known here" not in shown.output


def test_a_program_without_a_container_is_asked_too(
    fakes: Fakes, launch: Launcher, tmp_path: Path
) -> None:
    home = tmp_path / "p/tensorrt_llm-1.2.1.dist-info"
    home.mkdir(parents=True)
    (home / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt-llm\nVersion: 1.2.1\n")
    (fakes.bin / "trtllm-serve").write_text(f"#!{sys.executable}\n")
    (fakes.bin / "trtllm-serve").chmod(0o755)
    words = ("--check", "--runtime", "bare", "m", "--cp_size", "1")
    started = launch(*words, PYTHONPATH=str(home.parent))
    assert started.code() == 0 and "TensorRT-LLM 1.2.1, one GPU: " in started.output, started.output


def test_an_engine_that_refuses_its_arguments_says_so(launch: Launcher) -> None:
    started = launch("m", "--tp_sice", "8", TRTLLM_VERSION="9.9")
    assert "No such option" in error(started) and "exit code 2" in error(started)


def test_a_server_that_is_never_ready_fails_at_the_deadline(launch: Launcher) -> None:
    started = launch("m", "--ready-timeout", "0.8", TRTLLM_SIM_FAULT="hang-loading")
    assert "was not ready within 0.8 s: /health did not answer" in error(started)
    assert "--ready-timeout" in started.output
    assert left() == set()


@pytest.mark.parametrize("listens", ["own", ""])
def test_another_server_on_the_port_is_not_ours(
    fakes: Fakes, launch: Launcher, listens: str
) -> None:
    """Somebody else's answers while ours still loads."""
    fakes.set(listens=listens)
    port = free_port()
    started = launch("m", "--port", str(port), TRTLLM_SIM_LOAD_SECONDS="30")
    started.until_logged("SIMULATOR")
    simulator = [sys.executable, str(ROOT / "simulator/trtllm-serve"), "m"]
    theirs = subprocess.Popen([*simulator, "--port", str(port)], env=fakes.environment(),
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        if listens:  # an engine that serves and does not say so, as other versions may
            started.until("READY")
            assert started.stop() == 130
        else:
            words = f"another server took http://127.0.0.1:{port} in the meantime; it serves m"
            assert words in error(started)
            assert "READY" not in started.output
    finally:
        theirs.kill()
        theirs.wait()


def test_a_server_that_is_503_for_ever_fails(fakes: Fakes, launch: Launcher, toolset: Path) -> None:
    script = fakes.home / "impatient.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(toolset)!r})\n"
        "from launch import health, main\n"
        "health.HEALTH_EVERY, health.HEALTH_MISSES = 0.05, 3\n"
        "raise SystemExit(main.main(['m']))\n"
    )
    started = launch(script=script, TRTLLM_SIM_FAULT="503:3")
    assert "no longer serves: 3 health checks in a row failed" in error(started)
    assert "the last: /health answered 503" in started.output
    assert left() == set()


# Supervised


@pytest.fixture
def impatient(fakes: Fakes, toolset: Path, launch: Launcher) -> Launcher:
    """Start run_sbatch.py with its pauses and its patience cut short, or as given."""

    def start(*args: str, patience: float = 100, pause: float = 0.3, **options: Any) -> Launch:
        script = fakes.home / "impatient.py"
        script.write_text(
            f"import sys; sys.path.insert(0, {str(toolset)!r})\n"
            "from launch import life, main, timelimit\n"
            f"life.LONGEST_PAUSE = {pause}\n"
            "life.min = lambda shorter, longest: longest\n"  # from the first one on
            "timelimit.COMPLETES_WITHIN = 0.5\n"
            "raise SystemExit(main.main())\n"
        )
        probing = {"PROBE_SECONDS": f"{patience / 10}", "PROBE_TIMEOUT": f"{patience}"}
        return launch(*args, script=script, **{**probing, **options})

    return start


def test_an_engine_that_hangs_behind_a_good_health_is_found(impatient: Launcher) -> None:
    started = impatient("m", patience=1, TRTLLM_SIM_FAULT="stuck-engine:2")
    words = r"local: the server is up but no longer serves: it is idle, and in \d+ s has not "
    assert re.match(words, error(started))
    assert "200 OK" in started.output and "READY" in started.output
    assert left() == set()


def test_an_engine_that_fails_behind_a_good_health_is_found(impatient: Launcher) -> None:
    started = impatient("m", PROBE_SECONDS="0.1", TRTLLM_SIM_FAULT="broken-engine:2")
    words = error(started)
    assert "no longer serves: 3 requests for one token in a row failed, the last: 400 " in words
    assert "illegal memory access" in words
    assert left() == set()


def test_a_server_with_a_long_queue_is_left_alone(impatient: Launcher) -> None:
    """Two dozen requests of 0.2 s each, one at a time: the probe waits far longer than 2 s."""
    started = impatient(
        "m", "--max_batch_size", "1", patience=2, TRTLLM_SIM_ITL_MS="0", TRTLLM_SIM_TTFT_MS="200"
    )
    started.until("stop it with")
    url = json.loads(Path("logs/endpoint.json").read_text())["url"]
    body = json.dumps({"model": "m", "prompt": "x", "max_tokens": 2}).encode()

    def ask() -> None:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/completions", body, headers)
        urllib.request.urlopen(request, timeout=PATIENCE).close()

    clients = [threading.Thread(target=ask) for _ in range(24)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    time.sleep(0.7)
    assert started.process.poll() is None, started.output
    assert started.stop() == 130


@pytest.mark.minute
def test_a_hung_engine_is_found_in_a_minute_and_a_busy_one_is_not_taken_for_one(
    launch: Launcher,
) -> None:
    """With the patience that users have: only the first probe is not waited for.

    Both at once. The busy one is at work on one answer for longer than that, behind which the
    probe waits, and shows nothing of it meanwhile.
    """
    options = {"PROBE_SECONDS": "1", "TRTLLM_SIM_ITL_MS": "1000"}
    hung = launch("m", **options, TRTLLM_SIM_FAULT="stuck-engine:2")
    port = free_port()
    busy = launch("m", "--port", f"{port}", "--max_batch_size", "1", **options)
    busy.until("stop it with")
    hung.until("stop it with")
    body = {"model": "m", "prompt": "x", "max_tokens": 1000, "ignore_eos": True}
    with client_of(port, body):
        begun = time.monotonic()
        assert hung.process.wait(2.5 * PATIENCE) == 1
        words = r"local: the server is up but no longer serves: it is idle, and in \d\d+ s has not "
        assert re.match(words, error(hung))
        time.sleep(max(0.0, begun + 70 - time.monotonic()))
        assert busy.process.poll() is None, busy.output
        log = Path(f"logs/launch_local{busy.process.pid}.log").read_text()
        assert '"WatchClients"' in log  # it was under suspicion
    assert busy.stop() == 130


def client_of(port: int, body: dict[str, Any]) -> socket.socket:
    """A client that has asked and waits."""
    client, text = socket.create_connection(("127.0.0.1", port)), json.dumps(body)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode())
    return client


def test_a_probe_that_hangs_does_not_delay_the_end(impatient: Launcher) -> None:
    started = impatient("m", patience=100, TRTLLM_SIM_FAULT="stuck-engine")
    started.until("stop it with")
    time.sleep(0.5)
    assert started.stop() == 130


def test_a_server_that_fails_is_started_anew(fakes: Fakes, impatient: Launcher) -> None:
    started = impatient("m", "--restart", "2", TRTLLM_SIM_FAULT="exit-serving:139:3")
    started.until("restarting (1 of 2)")
    assert left() == {f"run_{fakes_job(started)}.json"}
    words = error(started)
    assert words.startswith("local: trtllm-serve ended with exit code 139 (segmentation fault)")
    assert "(given up after 2 restarts)" in words
    assert started.output.count("] READY after") == 3
    assert (
        "illegal memory access was encountered, exiting; restarting (2 of 2) in" in started.output
    )
    [log] = Path("logs").glob("trtllm_server_*.log")
    marks = re.findall(
        r"^===== run_sbatch.py: restart (\d) of 2, \S+Z =====$", log.read_text(), re.M
    )
    assert marks == ["1", "2"]
    assert log.read_text().count("Uvicorn running on") == 3
    assert left() == set()
    assert len(fakes.calls("docker", "run")) == 3


def fakes_job(started: Launch) -> str:
    return f"local{started.process.pid}"


def test_a_server_that_does_not_get_ready_is_started_anew(impatient: Launcher) -> None:
    started = impatient("m", RESTART="1", TRTLLM_SIM_FAULT="exit-loading:1")
    assert "before it was ready" in error(started)
    assert started.output.count("restarting (1 of 1)") == 1


def test_a_server_that_was_restarted_is_served_and_stopped_as_any(
    fakes: Fakes, impatient: Launcher
) -> None:
    started = impatient("m", "--restart", "1")
    started.until("stop it with")
    first = json.loads(Path("logs/endpoint.json").read_text())
    os.kill(fakes.container()["pid"], signal.SIGKILL)
    started.until("restarting (1 of 1)")
    wait_until(Path("logs/endpoint.json").exists)
    again = json.loads(Path("logs/endpoint.json").read_text())
    assert {**again, "ready_seconds": 0, "started": 0, "ready": 0} == {
        **first,
        "ready_seconds": 0,
        "started": 0,
        "ready": 0,
    }
    assert started.stop() == 130
    assert left() == set()


def test_refused_arguments_are_not_tried_again(fakes: Fakes, impatient: Launcher) -> None:
    started = impatient("m", "--tp_sice", "8", "--restart", "3", TRTLLM_VERSION="9.9")
    assert "exit code 2 (it refused its arguments)" in error(started)
    assert "restart" not in started.output
    assert len(fakes.calls("docker", "run")) == 1


@pytest.mark.parametrize("when", ["the pause", "the clean-up"])
def test_a_signal_between_two_tries_is_obeyed_at_once(
    fakes: Fakes, impatient: Launcher, when: str
) -> None:
    started = impatient("m", "--restart", "3", pause=600, TRTLLM_SIM_FAULT="exit-loading:3")
    if when == "the clean-up":
        fakes.set(inspect_delay=0.5)
        wait_until(lambda: fakes.calls("docker", "ps", "--all", "--quiet"))
    else:
        started.until("restarting (1 of 3) in 600 s")
    assert started.stop(signal.SIGTERM) == 143
    assert "(2 of 3)" not in started.output
    assert left() == set()


def test_another_server_that_takes_the_port_is_named(fakes: Fakes, launch: Launcher) -> None:
    port = free_port()
    started = launch("m", "--restart", "3", "--port", str(port), TRTLLM_SIM_LOAD_SECONDS="30")
    started.until_logged("SIMULATOR")
    other = subprocess.Popen(
        [str(ROOT / "simulator/trtllm-serve"), "other/model", "--port", str(port)],
        env={**os.environ, "TRTLLM_SIM_LOAD_SECONDS": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        words = error(started)
    finally:
        other.kill()
        other.wait()
    assert words.startswith(f"local: another server took http://127.0.0.1:{port} in the meantime; ")
    assert "it serves other/model, not m" in words and "restarting" not in started.output
    assert left() == set()


def hold_on_both(fakes: Fakes) -> None:
    for node in ("localhost", "n2"):
        fakes.hold_image(node=node)


@pytest.mark.parametrize("restart", ["0", "3"])
def test_the_end_of_the_job_is_no_fault_of_the_server(
    fakes: Fakes, impatient: Launcher, restart: str
) -> None:
    hold_on_both(fakes)
    started = impatient("m", "--restart", restart, slurm=True)
    started.until("stop it with")
    fakes.set(state="COMPLETING")
    os.kill(fakes.container()["pid"], signal.SIGTERM)
    words = error(started)
    assert words.startswith("localhost: Slurm ended the server: job 77 has ended")
    assert "restarting" not in started.output


def test_the_end_of_the_job_is_told_before_it_comes(fakes: Fakes, launch: Launcher) -> None:
    hold_on_both(fakes)
    fakes.set(left="7:30")
    started = launch("m", slurm=True)
    started.until("stop it with")
    started.until("the job reaches its time limit in 8 min (")
    assert started.stop() == 130
    assert "has reached its time limit" not in started.output


def test_a_signal_at_the_end_of_the_job_is_told_as_that(fakes: Fakes, launch: Launcher) -> None:
    hold_on_both(fakes)
    fakes.set(left="0:01")
    started = launch("m", slurm=True)
    started.until("stop it with")
    assert started.stop(signal.SIGTERM) == 143
    assert "Slurm ended the server: job 77 has reached its time limit" in started.output


def test_check_reports_every_node_and_starts_nothing(
    fakes: Fakes, launch: Launcher, tarball: str
) -> None:
    fakes.hold_image(node="n2", identity=tarball)
    done = launch("m", "--check", slurm=True)
    assert done.code() == 0, done.output
    rows = [line.split() for line in done.output.splitlines()]
    [head] = [row for row in rows if row[:1] == ["localhost"]]
    [other] = [row for row in rows if row[:1] == ["n2"]]
    assert head[1:4] == ["27.0.1", "*", "load"]
    assert other[1:3] == ["27.0.1", "present"]
    assert not Path("logs").exists()
    assert not fakes.calls("docker", "run") + fakes.calls("docker", "load")


def test_dry_run_prints_every_command_and_runs_none(
    fakes: Fakes, launch: Launcher, tarball: str
) -> None:
    Path("a b.yaml").write_text("tensor_parallel_size: 2\n")
    done = launch("it's", "--config", "a b.yaml", "--dry-run", "--force", slurm=True)
    assert done.code() == 0, done.output
    assert fakes.calls() == fakes.calls("scontrol", "show")
    assert not Path("logs").exists()
    assert max(map(len, done.output.splitlines())) <= 300
    shown = shown_orders(done.output)
    prefix = ["env", "-u", "SLURM_JOB_NUM_NODES", "srun"]
    assert all(words[:4] == prefix for words, _ in shown.values()) and len(shown) == 5
    engine = shown["the server, until its standard input ends"][1]["Serve"]["engine"]
    assert engine[:4] == ["trtllm-serve", "it's", "--extra_llm_api_options", "a b.yaml"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_name_is_shown_on_a_terminal_of_any_encoding(launch: Launcher, encoding: str) -> None:
    """What the terminal does not have is replaced; a byte of no character is what it was."""
    model = os.fsdecode("org/é日本".encode() + b"\xff")
    started = launch("--dry-run", model, PYTHONIOENCODING=encoding)
    assert started.code() == 0, started.output
    shown = {"ascii": b"\\xe9\\u65e5\\u672c", "latin-1": b"\xe9\\u65e5\\u672c"}
    assert b"org/" + shown.get(encoding, "é日本".encode()) + b"\xff" in started.path.read_bytes()


def test_dry_run_of_an_ecr_image_feeds_the_password_to_standard_input(
    fakes: Fakes, launch: Launcher
) -> None:
    done = launch("m", "--image", f"{ECR}/x:1", "--dry-run", slurm=True)
    assert done.code() == 0
    login = "cat <<'ORDER'; aws ecr get-login-password --region us-west-2; cat; } | "
    assert login in done.output
    assert fakes.calls() == fakes.calls("scontrol", "show")


ECR = "123456789012.dkr.ecr.us-west-2.amazonaws.com"


def test_an_ecr_image_is_pulled_and_served(fakes: Fakes, launch: Launcher) -> None:
    started = launch("m", "--image", f"{ECR}/x:1", slurm=True)
    started.until("stop it with")
    assert "pass word" not in started.output + json.dumps(fakes.calls())
    assert (fakes.home / "login").read_text().startswith(f"{ECR} pass word$(id)' ")
    assert list(fakes.temporary.iterdir()) == []
    assert len(fakes.calls("docker", "login")) == len(fakes.calls("docker", "pull")) == 1
    assert started.stop() == 130


def test_no_secret_is_in_any_argument_while_it_is_used(fakes: Fakes, launch: Launcher) -> None:
    """The registry's password, the model's token, the API key: all the time."""
    fakes.set(login_delay=0.3, pull_delay=0.1, create_delay=0.1)
    with Watch("pass word$(id)", TOKEN, "sk-do-not-show") as watch:
        env = {"OPENAI_API_KEY": "sk-do-not-show"}
        started = launch("m", "--image", f"{ECR}/x:1", slurm=True, **env)
        started.until("stop it with")
        assert started.stop() == 130
    assert watch.looks > 3 and watch.seen == set()  # hundreds, where nothing else runs
    assert (fakes.home / "login").read_text().startswith(f"{ECR} pass word$(id)' ")
    for path in [started.path, *Path("logs").iterdir()]:
        assert b"sk-do-not" not in path.read_bytes() and b"pass word" not in path.read_bytes()


def test_a_watch_sees_what_is_there() -> None:
    with Watch("a-secret-of-a-sleeper") as watch:
        sleeper = subprocess.Popen(["sh", "-c", "read x", "a-secret-of-a-sleeper"], stdin=-1)
        wait_until(lambda: watch.seen, what="the sleeper")
        sleeper.communicate(b"")


def test_nothing_that_is_written_may_be_changed_by_everybody(
    fakes: Fakes, launch: Launcher
) -> None:
    mask = os.umask(0)
    try:
        started = launch("m")
        started.until("stop it with")
        written = [*Path().rglob("*"), *(fakes.home / ".cache").rglob("*")]
    finally:
        os.umask(mask)
    names = {path.name for path in written}
    assert {"logs", "endpoint.json", "huggingface"} <= names and len(names) >= 5
    assert [path for path in written if path.stat().st_mode & 0o002] == []
    assert started.stop() == 130


def sidecar_of(tarball: str, **changes: object) -> str:
    """The sidecar of the default tarball; returns the tarball's sha256."""
    path = Path("tensorrt-llm-serve-latest.tar.gz")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    data: dict[str, object] = {
        "tags": [TAG],
        "config_digest": tarball,
        "manifest_digest": None,
        "diff_ids": [],
    }
    data |= {"packed_bytes": path.stat().st_size, "unpacked_bytes": 9, "sha256": digest}
    Path(f"{path}.json").write_text(json.dumps(data | changes))
    return digest


def test_verify_reads_the_tarball_once_before_a_load(
    fakes: Fakes, launch: Launcher, tarball: str
) -> None:
    digest = sidecar_of(tarball)
    started = launch("m", "--verify", slurm=True)
    started.until("stop it with")
    assert f"sha256 {digest[:12]}... matches the sidecar" in started.output
    assert commands().count("$ sha256sum") == 1 and len(fakes.calls("docker", "load")) == 1
    assert started.stop() == 130
    again = launch("m", "--verify", slurm=True)
    again.until("stop it with")
    assert "sha256" not in again.output  # nothing is loaded, so nothing is read
    assert again.stop() == 130


def test_verify_loads_nothing_that_is_not_what_was_saved(
    fakes: Fakes, launch: Launcher, tarball: str
) -> None:
    path = Path("tensorrt-llm-serve-latest.tar.gz")
    digest = sidecar_of(tarball)
    damaged = bytearray(path.read_bytes())
    damaged[1000] ^= 1
    path.write_bytes(damaged)
    words = error(launch("m", "--verify"))
    found = hashlib.sha256(damaged).hexdigest()
    assert words.startswith(f"{path.resolve()} has sha256 {found}, but its sidecar says {digest}")
    assert fakes.calls("docker", "load") == fakes.calls("docker", "run") == []


@pytest.mark.parametrize("image", ["", "a/b:1", "reg.example.com/a@sha256:" + "0" * 64])
def test_verify_needs_a_sum_to_compare_with(
    fakes: Fakes, launch: Launcher, tarball: str, image: str
) -> None:
    if not image:
        sidecar_of(tarball, sha256="no")
    words = error(launch("m", "--verify", *(["--image", image] if image else [])))
    assert words.startswith("--verify: there is no sha256 to compare ")
    assert fakes.calls() == []


def test_a_dry_run_shows_the_comparison(launch: Launcher, tarball: str) -> None:
    sidecar_of(tarball)
    done = launch("m", "--verify", "--dry-run")
    assert done.code() == 0
    assert f"\nsha256sum -- {Path('tensorrt-llm-serve-latest.tar.gz').resolve()}\n" in done.output


def test_force_loads_afresh(fakes: Fakes, launch: Launcher, tarball: str) -> None:
    fakes.hold_image(identity=tarball)
    started = launch("m", "--force")
    started.until("stop it with")
    assert len(fakes.calls("docker", "load")) == len(fakes.calls("docker", "image", "rm")) == 1
    assert started.stop() == 130


def test_without_docker_a_sentence_names_node_and_cause(fakes: Fakes, launch: Launcher) -> None:
    fakes.without("docker")
    failed = launch("m")
    assert "local: Docker does not answer: docker: not found in PATH" in error(failed)
    assert "--exclude" in failed.output


def test_a_node_whose_docker_is_down_is_named(fakes: Fakes, launch: Launcher) -> None:
    fakes.set(down=["n2"])
    fakes.hold_image(node="localhost")
    assert error(launch("m", slurm=True)).startswith("n2: Docker does not answer: Cannot connect")
    assert fakes.calls("docker", "run") == []


def test_a_node_that_does_not_answer_is_a_failure(fakes: Fakes, launch: Launcher) -> None:
    fakes.set(mute=["n2"])
    words = error(launch("m", slurm=True))
    assert words.startswith("1 of 2 nodes did not answer; these did: localhost")
    fakes.set(launch_failed=True)
    assert "Communication connection failure" in error(launch("m", slurm=True))
    fakes.without("srun")
    assert "srun: not found in PATH" in error(launch("m", slurm=True))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("m", "--image", "mine:1"), "local: image mine:1 is not on this node"),
        (("m", "--image", "./x.tar.gz"), "the image tarball "),
        (("/no/such/model",), "/no/such/model is not mounted into the container"),
        (("./no-model",), "no-model is not there, or not readable"),
        (("m", "--config", "none.yaml"), "cannot read the config file none.yaml"),
        (("m", "--container-mount", "/no/such"), "container mount /no/such is not a directory"),
        (("m", "--runtime", "bare"), "trtllm-serve: not found in PATH"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_started(
    fakes: Fakes, launch: Launcher, args: tuple[str, ...], words: str
) -> None:
    assert words in error(launch(*args))
    assert fakes.calls("docker", "run") == []


def test_of_several_launchers_that_srun_starts_the_first_alone_goes_on(
    fakes: Fakes, launch: Launcher
) -> None:
    """`salloc -N2 srun run_sbatch.py`: both would serve, and each would blame the other."""
    second = launch("m", "--check", slurm=True, SLURM_PROCID="1")
    assert second.code() == 0, second.output
    assert "as task 1 of a step" in second.output and "leave srun out" in second.output
    assert fakes.calls() == []
    for here in ({"slurm": True, "SLURM_PROCID": "0"}, {"SLURM_PROCID": "1"}):  # or a leftover
        first = launch("m", "--dry-run", **here)
        assert first.code() == 0 and "trtllm-serve" in first.output


def test_a_world_that_the_allocation_has_no_gpus_for_is_refused(
    fakes: Fakes, launch: Launcher
) -> None:
    hold_on_both(fakes)
    words = error(launch("m", "--tp_size", "17", slurm=True))
    assert words.startswith(
        "the world size is 17 (tp 17 x pp 1 x cp 1), but the 2 nodes of the job have only 16"
    )


SINFO = """if args != ["--noheader", "--format=%P %G"]:
    unknown()
print("debug* gpu:h100:8(S:0-1)\\ncpu (null)")"""
COMMANDS = r"get nodes and serve on them, or submit a job:\n {13}(.*)\n {13}(.*)\n"


@pytest.mark.parametrize(("flag", "nodes"), [([], 2), (["--check", "--replicas", "3"], 6)])
def test_on_a_login_node_the_error_is_the_command_to_paste(
    fakes: Fakes, launch: Launcher, toolset: Path, flag: list[str], nodes: int
) -> None:
    fakes.program("sinfo", COMMON + SINFO)
    fakes.program("nvidia-smi", "raise SystemExit('no driver')")
    started = launch("org/a b", "--tp_size", "16", *flag, GPUS="auto")
    if not Path("/dev/nvidia0").exists():
        assert "is not in a Slurm allocation, and has no GPU of its own" in error(started)
        script = [str(toolset / "run_sbatch.py"), "org/a b", "--tp_size", "16", *flag]
        found = re.search(COMMANDS, started.output)
        assert found
        asked = f"-N {nodes} --gpus-per-node=8 --exclusive".split()
        assert shlex.split(found[1]) == ["salloc", *asked, sys.executable, *script]
        assert shlex.split(found[2]) == ["sbatch", *asked, *script]
    assert fakes.calls("docker") == []


def test_a_machine_that_no_slurm_knows_is_asked_itself(fakes: Fakes, launch: Launcher) -> None:
    fakes.without("squeue")
    assert "no GPU found" in error(launch("m", GPUS="auto"))


@pytest.mark.parametrize(
    ("world", "sinfo", "words"),
    [
        (1, "", "-N 1 --gpus-per-node=8 --exclusive"),
        (1, "debug* gpu:4\n", "-N 1 --gpus-per-node=4 --exclusive"),
        (8, "debug* gpu:4\nbig gpu:8\n", "-N 2 --gpus-per-node=4 --exclusive"),
        (
            16,
            "cpu* (null)\na gpu:4(S:0)\nb gpu:h100:8(S:0-1)\n",
            "-p b -N 2 --gpus-per-node=8 --exclusive",
        ),
        (8, "debug* gpu:a100:4,gpu:h100:4,mps:100\n", "-N 1 --gpus-per-node=8 --exclusive"),
        (8, "debug* (null)\n", "-N 1 --exclusive"),
    ],
)
def test_what_is_asked_of_slurm_is_what_it_has(world: int, sinfo: str, words: str) -> None:
    kind = allocation.kind_of_node(sinfo)
    assert list(allocation.flags([(1, world)], *kind)) == words.split()


@pytest.mark.parametrize(
    ("servers", "count", "nodes", "uneven"),
    [
        ([(4, 8)], 8, 4, ""),
        ([(3, 3)], 8, 2, ""),  # two on a node
        ([(5, 16)], 8, 10, ""),
        ([(1, 12)], 8, 2, "; 12 GPUs do not fill nodes of 8 GPUs evenly"),
        ([(2, 4), (1, 16)], 8, 3, ""),
        ([(1, 4), (1, 4)], 8, 1, ""),
        ([(1, 8), (2, 4)], 0, 1, ""),
    ],
)
def test_as_many_nodes_are_asked_for_as_the_servers_need(
    servers: list[tuple[int, int]], count: int, nodes: int, uneven: str
) -> None:
    assert allocation.nodes(servers, count) == nodes
    assert allocation.uneven(servers, count) == uneven


def test_what_make_alone_knows_is_in_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run_sbatch.py", "org/m"])
    env = {"MODEL": "org/m", "IMAGE": "/x.tar", "HF_TOKEN": TOKEN, "HOME": "/h"}
    assert allocation.given(env) == []
    assert allocation.given({**env, "MAKELEVEL": "1"}) == ["env", "IMAGE=/x.tar"]


def test_runtime_bare_serves_without_docker(fakes: Fakes, launch: Launcher) -> None:
    fakes.without("docker")
    simulator = ROOT / "simulator/trtllm-serve"
    fakes.program(
        "trtllm-serve",
        f"import os, sys; os.execv(sys.executable, ['x', {str(simulator)!r}, *sys.argv[1:]])",
    )
    started = launch("m", "--runtime", "bare", slurm=True, PRIVILEGED="1", IMAGE="x:1")
    started.until("stop it with")
    assert "without a container, IMAGE, PRIVILEGED does nothing" in started.output
    assert json.loads(Path("logs/endpoint.json").read_text())["container"] is None
    assert started.stop() == 130


# A small stand-in for other engines: what it was told is kept, and the simulator serves.
OTHER_ENGINE = """
import json, os, sys, time
rank, words = os.environ.get("SLURM_PROCID", ""), sys.argv[1:]
with open(os.path.join(os.environ["FAKE_HOME"], f"told{rank}.json"), "w") as file:
    json.dump(words, file)
if "--headless" in words:
    time.sleep(600)
port = words[words.index("--port") + 1]
serve = [os.environ["FAKE_SIMULATOR"], "org/m", "--host", "0.0.0.0", "--port", port]
os.execv(sys.executable, ["python3", *serve])
"""


def told(fakes: Fakes, rank: str = "") -> list[str]:
    return list(json.loads((fakes.home / f"told{rank}.json").read_text()))


@pytest.mark.parametrize(
    ("engine", "program", "words"),
    [
        ("vllm", "vllm", "serve org/m --tensor-parallel-size 2 --x y"),
        ("sglang", "python3", "-m sglang.launch_server --model-path org/m --tp-size 2 --x y"),
    ],
)
def test_another_engine_without_docker(
    fakes: Fakes, launch: Launcher, engine: str, program: str, words: str
) -> None:
    fakes.without("docker")
    fakes.program(program, OTHER_ENGINE)
    started = launch("org/m", "--x", "y", ENGINE=engine, RUNTIME="bare", TP="2")
    started.until("stop it with")
    assert " ".join(told(fakes)).startswith(f"{words} --host 0.0.0.0 --port ")
    title = {"vllm": "vLLM", "sglang": "SGLang"}[engine]
    assert f"serves org/m, {title}\n" in started.output
    assert f"{title}, TP 2: world size 2 (tp 2 x pp 1 x cp 1): all ranks on" in started.output
    assert "not known here" not in started.output
    assert started.stop() == 130


def test_another_engines_own_image_is_what_is_served_from(fakes: Fakes, launch: Launcher) -> None:
    fakes.program("vllm", OTHER_ENGINE)
    image = "docker.io/vllm/vllm-openai:latest"
    fakes.set(asked="vllm 0.32.0+cpu", labels=None, pulls="sha256:vllm")
    started = launch("org/m", "--engine", "vllm", VLLM_LOGGING_LEVEL="DEBUG")
    started.until("stop it with")
    [run] = (each for each in fakes.calls("docker", "run") if "--label" in str(each))
    assert image in run and "--env=VLLM_LOGGING_LEVEL" in run
    assert f"--env=VLLM_CACHE_ROOT={fakes.home}/.cache/vllm" in run
    assert "serves org/m, vLLM 0.32.0+cpu\n" in started.output
    assert started.stop() == 130


def test_an_image_of_another_engine_says_how_it_is_served(fakes: Fakes, launch: Launcher) -> None:
    fakes.hold_image(labels=None)
    fakes.set(asked="vllm 0.32.0")
    words = error(launch("m"))
    assert words.startswith("the image holds vllm 0.32.0, not TensorRT-LLM\n")
    assert "next: --engine vllm, or give another --image" in words


def test_status_shows_and_stop_stops_what_runs(fakes: Fakes, launch: Launcher) -> None:
    none = launch("--status")
    assert none.code() == 1 and "nothing runs from" in none.output
    started = launch("m")
    started.until("stop it with")
    endpoint = json.loads(Path("logs/endpoint.json").read_text())
    shown = launch("--status")
    assert shown.code() == 0
    assert shown.output == f"{endpoint['job']}\tready\t{endpoint['url']}\tm\n"
    assert launch("--stop").code() == 0
    assert started.code() == 143
    assert fakes.containers() == []


def test_a_killed_launcher_leaves_no_container_and_no_record(
    fakes: Fakes, launch: Launcher
) -> None:
    started = launch("m")
    started.until("stop it with")
    assert len(left()) == 2
    started.process.kill()
    started.process.wait()
    fakes.nothing_is_left()
    assert left() == set()


def test_a_launcher_killed_with_its_guard_leaves_a_record_that_is_swept(
    fakes: Fakes, launch: Launcher
) -> None:
    started = launch("m")
    started.until("stop it with")
    [guard] = [pid for pid, command in fakes.processes().items() if "/guard.py " in command]
    os.kill(guard, signal.SIGKILL)
    started.process.kill()
    started.process.wait()
    fakes.nothing_is_left()
    assert left() != set()
    assert launch("--status").code() == 1
    assert left() == set()


def test_what_an_earlier_launch_left_behind_is_removed_and_nothing_else(
    fakes: Fakes, launch: Launcher
) -> None:
    user = user_name()
    fakes.leave_container("old", "n2", job="66", launcher="x", user=user)
    fakes.leave_container("theirs", "n2", job="66", launcher="x", user="them")
    fakes.leave_container("other", "n2", job="78", launcher="x", user=user)
    fakes.set(jobs=["77", "78"])
    for node in ("localhost", "n2"):
        fakes.hold_image(node=node)
    started = launch("m", slurm=True)
    started.until("stop it with")
    assert "removing 1 container that" in started.output
    assert started.stop() == 130
    assert fakes.containers() == ["n2/other", "n2/theirs"]
    fakes.leave_container("trtllm-77-n2", "n2", job="77", launcher="x", user=user)
    again = launch("m", slurm=True)
    assert "container trtllm-77-n2 is already running in this job" in error(again)
    for path in fakes.home.glob("*/container-*.json"):
        path.unlink()


def test_a_reader_that_leaves_does_not_stop_the_server(fakes: Fakes, launch: Launcher) -> None:
    """`run_sbatch.py ... | head`"""
    read, write = os.pipe()
    started = launch("m", out=write)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    started.until("stop it with")
    assert started.process.poll() is None
    assert started.stop() == 130
    assert "BrokenPipe" not in started.output
    assert left() == set()


def test_a_reader_that_has_seen_enough_hears_no_complaint(fakes: Fakes, launch: Launcher) -> None:
    """`run_sbatch.py --dry-run ... | head -1`"""
    read, write = os.pipe()
    os.close(read)
    started = launch("m", "--dry-run", "--image", "x:1", out=write)
    os.close(write)
    assert started.code() == 1
    assert "ERROR" not in started.output and "BrokenPipe" not in started.output


def test_a_directory_that_is_gone_is_told(
    fakes: Fakes, launch: Launcher, toolset: Path, tmp_path: Path
) -> None:
    wrapper, gone = fakes.home / "gone.py", tmp_path / "gone"
    words = [sys.executable, str(toolset / "run_sbatch.py"), "m"]
    left = f"os.mkdir({str(gone)!r}); os.chdir({str(gone)!r}); os.rmdir({str(gone)!r})"
    wrapper.write_text(f"import os; {left}; os.execv({sys.executable!r}, {words!r})")
    assert error(launch(script=wrapper)).startswith("the current directory is gone\n")


def test_a_terminal_that_is_gone_does_not_stop_the_clean_up(
    fakes: Fakes, launch: Launcher, toolset: Path
) -> None:
    """`run_sbatch.py ... 2>&1 | head`, then SIGTERM."""
    read, write = os.pipe()
    env = fakes.environment(GPUS="none", PORT=str(free_port()))
    command = [sys.executable, str(toolset / "run_sbatch.py"), "m"]
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=write, stderr=write
    )
    os.close(write)
    os.read(read, 1)
    os.close(read)
    try:
        wait_until(Path("logs/endpoint.json").exists)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 143
    finally:
        process.kill()
        process.wait()
    assert left() == set()


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_closed_stream_does_not_stop_the_server(
    fakes: Fakes, launch: Launcher, toolset: Path, closed: tuple[int, ...]
) -> None:
    """`run_sbatch.py ... >&-`"""
    wrapper = fakes.home / "closed.py"
    words = [sys.executable, str(toolset / "run_sbatch.py"), "m"]
    close = f"[os.close(each) for each in {closed}]"
    wrapper.write_text(f"import os; {close}; os.execv({sys.executable!r}, {words!r})")
    started = launch(script=wrapper)
    wait_until(Path("logs/endpoint.json").exists)
    [log] = Path("logs").glob("launch_*.log")
    wait_until(lambda: "READY" in log.read_text(), "READY")
    assert started.stop() == 130
    assert left() == set()


def test_a_cache_that_a_node_cannot_make_is_the_cause(fakes: Fakes, launch: Launcher) -> None:
    """Of who has a full home there; that one is not theirs to write to is known before."""
    name = "x" * 300
    failed = error(launch("m", HF_HOME=f"{Path.cwd()}/{name}"))
    sentence, _, rest = failed.partition("\n")
    assert "File name too long: '/" in sentence and "next: " in rest


def test_a_parent_that_ignores_the_end_of_children_does_not_matter(
    fakes: Fakes, launch: Launcher, toolset: Path
) -> None:
    wrapper = fakes.home / "deaf.py"
    words = [sys.executable, str(toolset / "run_sbatch.py"), "m"]
    ignore = "import os, signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
    wrapper.write_text(f"{ignore}; os.execv({sys.executable!r}, {words!r})")
    started = launch(script=wrapper)
    started.until("stop it with")
    assert started.stop() == 130


def test_logs_that_cannot_be_written_are_told(fakes: Fakes, launch: Launcher) -> None:
    Path("logs").write_text("a file in its place")
    assert "logs" in error(launch("m"))


def test_an_env_file_that_is_not_text_is_told(fakes: Fakes, launch: Launcher) -> None:
    Path(".env").write_bytes(b"MODEL=\xff\xfe\n")
    failed = launch("--dry-run")
    assert failed.code() != 0
    assert ".env" in failed.output


@pytest.mark.parametrize("name", [b"./m\xff", "./ünï".encode()])
def test_names_that_are_not_utf8_reach_the_engine(
    fakes: Fakes, launch: Launcher, name: bytes
) -> None:
    Path(os.fsdecode(name)).mkdir()
    done = launch(os.fsdecode(name), "--dry-run", LC_ALL="C.UTF-8")
    assert done.code() == 0, done.output
    assert name in done.path.read_bytes()


# Over several nodes


ENGINE = """
import os, subprocess, sys, time
from itertools import pairwise
from pathlib import Path
home, rank = Path(os.environ["FAKE_HOME"]), os.environ["SLURM_PROCID"]
(home / f"rank-{rank}").write_text(str(os.getpid()))
print(f"rank {rank} of {os.environ['SLURM_NTASKS']} on {os.environ['SLURMD_NODENAME']}", flush=True)
if rank == "0":
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM", "PMI"))}
    subprocess.call([sys.executable, os.environ["FAKE_SIMULATOR"], *sys.argv[2:]], env=clean)
time.sleep(600)
"""
WORLD = ("org/m", "--tp_size", "2", "--pp_size", "2")


@pytest.fixture
def spread(fakes: Fakes, launch: Launcher) -> Iterator[Launcher]:
    """Start a world of four ranks on two nodes, which are this machine."""
    fakes.program("trtllm-llmapi-launch", ENGINE)
    for node in ("localhost", "127.0.0.2"):
        fakes.hold_image(node=node)

    def start(*args: str, **faults: Any) -> Launch:
        known = {"nodes": ["localhost", "127.0.0.2"], "gpus": "0,1"}
        port = f"SlurmdPort = {slurmd.getsockname()[1]}\n"
        fakes.set(**{**known, "config": port, **faults})
        return launch(*(args or WORLD), slurm=True)

    with socket.create_server(("0.0.0.0", 0)) as slurmd:
        yield start
    assert list(fakes.temporary.iterdir()) == []


def test_an_engine_that_spreads_by_itself_gets_a_process_a_node(
    fakes: Fakes, spread: Launcher
) -> None:
    fakes.program("vllm", OTHER_ENGINE)
    for node in ("localhost", "127.0.0.2"):
        fakes.hold_image(node=node, labels=None)
    words = ("org/m", "-tp", "4", "--engine", "vllm", "--image", TAG)
    started = spread(*words, asked="vllm 0.32.0")
    started.until("stop it with ^C or make stop JOB=77\n")
    said = "world size 4 (tp 4 x pp 1 x cp 1): a process on each of localhost, 127.0.0.2; localhost"
    assert said in started.output
    common, head = "--nnodes 2 --node-rank", "--master-addr"
    assert f"{common} 0 {head}" in " ".join(told(fakes, "0"))
    assert f"{common} 1 {head}" in " ".join(told(fakes, "1"))
    assert told(fakes, "1")[-1] == "--headless" != told(fakes, "0")[-1]
    assert fakes.calls("srun", "--mpi=list") == []
    assert started.stop() == 130


def test_a_world_of_two_nodes_serves_until_interrupted(fakes: Fakes, spread: Launcher) -> None:
    started = spread()
    started.until("stop it with ^C or make stop JOB=77\n")
    assert (
        "world size 4 (tp 2 x pp 2 x cp 1): 2 ranks on each of localhost, 127.0.0.2 (--mpi=pmix); "
        "localhost serves" in started.output
    )
    assert fakes.containers() == ["127.0.0.2/trtllm-77-127.0.0.2", "localhost/trtllm-77-localhost"]
    endpoint = json.loads(Path("logs/endpoint.json").read_text())
    assert endpoint["nodes"] == ["localhost", "127.0.0.2"]
    assert endpoint["container"] == "trtllm-77-localhost"
    assert endpoint["log"].endswith("logs/trtllm_server_77_rank0.log")
    where = ["localhost", "localhost", "127.0.0.2", "127.0.0.2"]
    for rank, node in enumerate(where):
        log = Path(f"logs/trtllm_server_77_rank{rank}.log").read_text()
        assert log.startswith(f"rank {rank} of 4 on {node}\n")
    started.until("Uvicorn running")  # rank 0's log is shown
    assert "rank 3 of 4" not in started.output
    assert launch_status(started) == f"77\tready\t{endpoint['url']}\torg/m\n"
    assert started.stop() == 130
    assert left() == set()
    assert "removing" not in started.output and fakes.calls("docker", "inspect", "trtllm") == []


def launch_status(started: Launch) -> str:
    """What --status prints, beside a launch."""
    words = [str(started.process.args[0]), str(started.process.args[1]), "--status"]  # type: ignore[index]
    env = started.fakes.environment()
    return subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_however_a_world_ends_nothing_of_it_is_left(
    fakes: Fakes, spread: Launcher, signum: int, code: int
) -> None:
    started = spread()
    started.until("stop it with")
    assert started.stop(signum) == code
    fakes.nothing_is_left()
    assert left() == set()


def test_a_world_may_be_stopped_while_it_starts(fakes: Fakes, spread: Launcher) -> None:
    started = spread(create_delay=0.3)
    wait_until(lambda: fakes.calls("docker", "run"))
    assert started.stop() == 130
    fakes.nothing_is_left()
    assert left() == set()


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (0, "localhost: rank 0 ended with exit code 137 (killed)"),
        (3, "127.0.0.2: rank 3 ended with exit code 137 (killed)"),
    ],
)
def test_the_death_of_a_rank_ends_all_and_names_it(
    fakes: Fakes, spread: Launcher, rank: int, words: str
) -> None:
    started = spread()
    started.until("stop it with")
    os.kill(int((fakes.home / f"rank-{rank}").read_text()), signal.SIGKILL)
    assert error(started).startswith(f"{words} while serving")
    assert f"the whole log: {Path.cwd()}/logs/trtllm_server_77_rank{rank}.log" in started.output
    assert left() == set()


def test_a_world_is_started_anew_as_a_whole(fakes: Fakes, spread: Launcher, toolset: Path) -> None:
    started = spread(*WORLD, "--restart", "1")
    started.until("stop it with")
    before = {rank: (fakes.home / f"rank-{rank}").read_text() for rank in range(4)}
    os.kill(int(before[3]), signal.SIGKILL)
    started.until("restarting (1 of 1) in 2 s")
    assert fakes.containers() == [] and not Path("logs/endpoint.json").exists()
    wait_until(Path("logs/endpoint.json").exists)
    wait_until(lambda: started.output.count("] READY after") == 2, "the second READY")
    assert all((fakes.home / f"rank-{rank}").read_text() != before[rank] for rank in range(4))
    for rank in range(4):
        log = Path(f"logs/trtllm_server_77_rank{rank}.log").read_text()
        assert "===== run_sbatch.py: restart 1 of 1, " in log
        assert log.count(f"rank {rank} of 4 on ") == 2
    assert started.stop() == 130
    fakes.nothing_is_left()
    assert left() == set()


def test_the_death_of_a_container_is_told_as_that(fakes: Fakes, spread: Launcher) -> None:
    started = spread()
    started.until("stop it with")
    [path] = fakes.home.glob("127.0.0.2/container-*.json")
    os.kill(json.loads(path.read_text())["pid"], signal.SIGKILL)
    words = "127.0.0.2 (ranks 2-3): its container ended with exit code 137, while serving"
    assert error(started).startswith(words)
    assert left() == set()


def test_what_a_node_cannot_remove_is_said_and_does_not_hold_up_the_end(
    fakes: Fakes, spread: Launcher
) -> None:
    started = spread()
    started.until("stop it with")
    [path] = fakes.home.glob("127.0.0.2/container-*.json")
    known = json.loads((fakes.home / "faults.json").read_text())
    fakes.set(**{**known, "down": ["127.0.0.2"]})
    for pid, command in fakes.processes().items():
        if "docker run --name trtllm-77-127.0.0.2" in command:
            os.kill(pid, signal.SIGKILL)
    container = json.loads(path.read_text())
    for pid in (container["pid"], *container["ranks"]):
        with contextlib.suppress(ProcessLookupError):  # its input has ended with its client
            os.killpg(pid, signal.SIGKILL)
    words = "127.0.0.2 (ranks 2-3): its container ended with exit code 137"
    assert error(started).startswith(words)
    assert (
        "127.0.0.2: the container trtllm-77-127.0.0.2 may still be there "
        "(Cannot connect to the Docker daemon at unix:///var/run/docker.sock.). It should end"
    ) in started.output
    assert fakes.containers() == ["127.0.0.2/trtllm-77-127.0.0.2"]
    path.unlink()
    assert left() == set()


def test_a_node_that_cannot_start_its_container_is_named(fakes: Fakes, spread: Launcher) -> None:
    words = error(spread(no_run=["127.0.0.2"]))
    assert words.startswith(
        "127.0.0.2 (ranks 2-3): its container ended with exit code 125: docker: Error response "
        "from daemon: could not select device driver."
    )
    assert fakes.calls("docker", "exec") == []
    assert left() == set()


@pytest.mark.parametrize(
    ("args", "faults", "words"),
    [
        (("m", "--tp_size", "3"), {}, "world size is 3 (tp 3 x pp 1 x cp 1), which does not fill"),
        (("m", "--tp_size", "8"), {}, "the 2 nodes of the job have only 4 GPUs"),
        (WORLD, {"mpi": "MPI plugin types are...\n\tnone\n\tpmi2"}, "has no PMIx plug-in"),
        ((*WORLD, "--runtime", "bare"), {}, "trtllm-serve: not found in PATH"),
    ],
)
def test_a_world_that_cannot_be_is_told_before_anything_is_started(
    fakes: Fakes, spread: Launcher, args: tuple[str, ...], faults: dict[str, Any], words: str
) -> None:
    assert words in error(spread(*args, **faults))
    assert fakes.calls("docker", "run") == []


def test_a_type_of_mpi_that_srun_does_not_have_is_told_in_its_words(
    spread: Launcher,
) -> None:
    Path(".env").write_text("MPI=pmix_v9\n")
    started = spread()
    assert error(started).startswith("this Slurm has no MPI type pmix_v9 (srun --mpi=list says: ")
    assert not Path("logs").exists()


def test_check_tells_how_the_world_would_lie(fakes: Fakes, spread: Launcher) -> None:
    done = spread(*WORLD, "--check")
    assert done.code() == 0, done.output
    assert "2 ranks on each of localhost, 127.0.0.2 (--mpi=pmix); localhost" in done.output
    assert fakes.calls("docker", "run") == []


def test_a_dry_run_shows_the_containers_and_the_ranks(fakes: Fakes, launch: Launcher) -> None:
    fakes.set(gpus="0,1")
    done = launch(*WORLD, "--dry-run", slurm=True, MPI="pmix_v4")
    assert done.code() == 0, done.output
    assert fakes.calls() == fakes.calls("scontrol", "show")  # what the job is, Slurm knows
    shown = shown_orders(done.output)
    assert f"mkdir --parents {Path.cwd()}/logs\n" in done.output
    holder, hold = shown["a container on every node, until its `sleep` is killed"]
    ranks, rank = shown["when every node has said `Up`: the ranks; rank 0 serves"]
    assert "the server, until its standard input ends" not in shown
    prefix = ["env", "-u", "SLURM_JOB_NUM_NODES", "srun", "--overlap", "--export=ALL"]
    assert holder[:6] == ranks[:6] == prefix
    assert {"--mpi=none", "--nodes=2", "--ntasks=2"} <= set(holder)
    assert hold["Hold"]["image"] == TAG
    assert {"--mpi=pmix_v4", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2"} <= set(ranks)
    assert f"--output={Path.cwd()}/logs/trtllm_server_77_rank%t.log" in ranks
    assert rank["Rank"]["command"][1:7] == ["trtllm-serve", *WORLD]
    remove, _ = shown["in case a node has not cleaned up by itself"]
    assert {"--nodes=2", "--ntasks=2"} <= set(remove)
    assert hold["Hold"]["options"][-1].startswith("--env=")


def test_a_dry_run_of_vllm_in_steps_of_pyxis(fakes: Fakes, launch: Launcher) -> None:
    fakes.set(gpus="0,1", plug_in="  --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH")
    Path("x.sqsh").write_bytes(b"hsqs")
    words = ["m", "--engine", "vllm", "--tensor-parallel-size", "2", "--image", "x.sqsh"]
    done = launch(*words, "--pipeline-parallel-size", "2", "--dry-run", slurm=True)
    assert done.code() == 0, done.output
    assert fakes.calls("docker") == []
    shown = shown_orders(done.output)
    parts, part = shown["when every node has said `Up`: the ranks; rank 0 serves"]
    assert {"--nodes=2", "--ntasks=2", f"--container-image={Path.cwd()}/x.sqsh"} <= set(parts)
    first, second = part["PartInside"]["parts"]
    assert "--headless" in second and "--headless" not in first
    assert part["PartInside"]["command"][:2] == ["vllm", "serve"]


# Under sbatch


JOB = """\
JobId=77 JobName=run_sbatch.py
   UserId=me(0) GroupId=me(0) MCS_label=N/A
   Command={command}
   WorkDir={workdir}
   StdErr={workdir}/slurm-77.out
"""


@pytest.fixture
def spooled(tmp_path: Path) -> Path:
    """The lonely copy that Slurm runs."""
    path = tmp_path / "spool/job00077/slurm_script"
    path.parent.mkdir(parents=True)
    shutil.copy2(ROOT / "run_sbatch.py", path)
    return path


@pytest.mark.parametrize(
    ("arguments", "relative"),
    [("", False), (" m --image a/b.tar", True), (" run_sbatch.py /etc/passwd", False)],
)
def test_a_spooled_copy_goes_on_as_the_original(
    fakes: Fakes, launch: Launcher, toolset: Path, spooled: Path, arguments: str, relative: bool
) -> None:
    command = f"../{toolset.name}/run_sbatch.py" if relative else str(toolset / "run_sbatch.py")
    workdir = toolset.parent / "elsewhere"
    workdir.mkdir(exist_ok=True)
    fakes.set(job=JOB.format(command=command + arguments, workdir=workdir))
    done = launch("it's", "--dry-run", script=spooled, slurm=True)
    assert done.code() == 0, done.output
    [(_, order)] = [o for o in shown_orders(done.output).values() if "Serve" in o[1]]
    assert order["Serve"]["engine"][:2] == ["trtllm-serve", "it's"]
    assert len(fakes.calls("scontrol", "show", "job", "77")) == 1


def test_a_spooled_copy_of_a_link_finds_the_original(
    fakes: Fakes, launch: Launcher, toolset: Path, spooled: Path, tmp_path: Path
) -> None:
    (tmp_path / "serve").symlink_to(toolset / "run_sbatch.py")
    fakes.set(job=JOB.format(command=tmp_path / "serve", workdir=tmp_path), cluster="b")
    clusters = {"SLURM_CLUSTERS": "all", "SLURM_CLUSTER_NAME": "b"}  # the job is this one's
    done = launch("m", "--dry-run", script=spooled, slurm=True, **clusters)
    assert done.code() == 0, done.output


def test_a_copy_that_sbatch_has_read_from_its_input_goes_on_in_its_folder(
    fakes: Fakes, launch: Launcher, toolset: Path, spooled: Path
) -> None:
    """`sbatch < run_sbatch.py`: Slurm knows no name, only where it was said."""
    fakes.set(job=JOB.format(command="(null)", workdir=toolset))
    done = launch("m", "--dry-run", script=spooled, slurm=True)
    assert done.code() == 0, done.output
    fakes.set(job=JOB.format(command="(null)", workdir="/elsewhere"))
    failed = launch("m", "--dry-run", script=spooled, slurm=True)
    assert failed.code() == 1
    assert failed.output.endswith("submit it by its path, which the node has to see\n")


@pytest.mark.parametrize("known", [True, False])
def test_a_copy_whose_original_is_gone_says_so(
    fakes: Fakes, launch: Launcher, spooled: Path, known: bool
) -> None:
    fakes.set(job=JOB.format(command="/gone/run_sbatch.py", workdir="/gone"))
    failed = launch("m", script=spooled, slurm=known)
    assert failed.code() == 1
    assert failed.output.startswith(
        "run_sbatch.py: the folder launch/ is not beside it, nor beside "
    )
    assert len(failed.output.splitlines()) == 1


def test_a_copy_on_a_machine_without_slurm_says_so(
    fakes: Fakes, launch: Launcher, spooled: Path
) -> None:
    fakes.without("scontrol")
    failed = launch("m", script=spooled)
    assert failed.code() == 1
    assert "the folder launch/ is not beside it" in failed.output


@pytest.mark.parametrize("there", [(), ("sh",), ("sh", "dotenv")])
def test_missing_packages_are_one_sentence(
    fakes: Fakes, toolset: Path, tmp_path: Path, there: tuple[str, ...]
) -> None:
    import yaml

    packages = tmp_path / "packages"
    packages.mkdir()
    for name in there:
        (packages / name).symlink_to(Path(yaml.__file__).parents[1] / name)
    env = fakes.environment(GPUS="none", PYTHONPATH=str(packages), PORT=str(free_port()))
    command = [
        sys.executable,
        "-S",
        str(toolset / "run_sbatch.py"),
        "--dry-run",
        "m",
        "--config",
        "none.yaml",
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "is missing: run `make setup`" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def with_venv(toolset: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """Where a copy of ours looks for a .venv's python, and a command that lacks its packages."""
    home = tmp_path / "with venv"
    shutil.copytree(toolset, home)
    python = home / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    return python, [sys.executable, "-S", str(home / "run_sbatch.py"), "m", "--dry-run"]


def test_a_venv_beside_the_script_is_used_where_packages_are_missing(
    fakes: Fakes, toolset: Path, tmp_path: Path
) -> None:
    python, command = with_venv(toolset, tmp_path)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    env = fakes.environment(GPUS="none")
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, fakes.calls()) == (0, []), done.stderr
    python.write_text('#!/bin/sh\nexec false "$@"\n')
    assert subprocess.run(command, env=env, capture_output=True).returncode == 1


def test_a_venv_whose_python_is_only_elsewhere_is_told(
    fakes: Fakes, toolset: Path, tmp_path: Path
) -> None:
    """On the login node it was there; the batch job runs on another."""
    python, command = with_venv(toolset, tmp_path)
    python.symlink_to("/none/python3.12")
    done = subprocess.run(command, env=fakes.environment(), capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    words = f"'sh' is missing: {python} leads to /none/python3.12, which this machine does not have"
    assert words in done.stderr


def test_an_old_python_can_read_the_script() -> None:
    """Its first line names the machine's own: it has to come as far as .venv's."""
    text = (ROOT / "run_sbatch.py").read_text()
    ast.parse(text, feature_version=(3, 6))
    assert "from __future__ import annotations" not in text  # 3.7


# In process, where only the order of things matters


def test_settings_come_from_env_files_too(
    fakes: Fakes, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    os.environ.update(fakes.environment())
    Path(".env").write_text("PORT=8123\nMODEL=from/cwd\n")
    (tmp_path / "scripts/.env").write_text("PORT=1\nGPUS=none\n")
    handlers = [signal.getsignal(each) for each in (1, 2, 15)]
    try:
        assert run_sbatch.main(["--dry-run", "--image", "x:1"]) == 0
    finally:
        for each, handler in zip((1, 2, 15), handlers, strict=True):
            signal.signal(each, handler)
    out = capfd.readouterr().out
    serve = shown_orders(out)["the server, until its standard input ends"][1]["Serve"]
    assert serve["engine"] == ["trtllm-serve", "from/cwd", *"--host 0.0.0.0 --port 8123".split()]
    assert serve["gpus"] == "none" and serve["name"].startswith("trtllm-local")
    assert settings.setting("GPUS") == "none"


def test_the_tests_fakes_refuse_what_they_do_not_know(fakes: Fakes) -> None:
    for name in ("docker", "srun", "scontrol", "scancel", "aws", "squeue", "hostname"):
        done = subprocess.run(
            [name, "no-such-command"], env=fakes.environment(), capture_output=True, text=True
        )
        assert done.returncode == 64
        assert f"fake {name} does not know" in done.stderr
