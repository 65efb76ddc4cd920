"""The simulator over many ranks: `trtllm-llmapi-launch` alone, and under a real mpirun.

Run alone: .venv/bin/pytest tests/test_simulator_mpi.py
The tests with several ranks need Open MPI and mpi4py for /usr/bin/python3:
apt-get install --no-install-recommends openmpi-bin python3-mpi4py
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import requests

from tests.conftest import PATIENCE, free_port
from tests.test_simulator import MODEL, SIMULATOR, Server, environment, eventually

LAUNCH = str(SIMULATOR / "trtllm-llmapi-launch")
# -S: without site-packages, so that a rank on its own is seen to need no mpi4py.
ALONE = [sys.executable, "-S", LAUNCH]
SYSTEM_PATH = f"{SIMULATOR}:/usr/local/bin:/usr/bin:/bin"
CLOCK = os.sysconf("SC_CLK_TCK")
READY = "Uvicorn running"
BROKEN = "the MPI world is broken: no answer for 5 s from rank 2"


def why_no_mpi() -> str:
    if not shutil.which("mpirun", path="/usr/bin"):
        return "no /usr/bin/mpirun (package openmpi-bin)"
    check = ["/usr/bin/python3", "-c", "import mpi4py"]
    if subprocess.run(check, capture_output=True).returncode:
        return "no mpi4py for /usr/bin/python3 (package python3-mpi4py)"
    return ""


NO_MPI = why_no_mpi()
needs_mpi = pytest.mark.skipif(bool(NO_MPI), reason=NO_MPI)


def launch(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run one rank to its end, by the newer script unless told otherwise."""
    return subprocess.run(
        [*ALONE, *command],
        env={**environment(LAUNCH="propagate"), "PATH": SYSTEM_PATH, **env},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@contextmanager
def started(command: list[str], log: Path, **settings: str) -> Iterator[Server]:
    """Start `command` and a server's flags in a session of its own, of which nothing survives."""
    port = free_port()
    env = environment(**settings)
    if command[0] == "mpirun":  # ranks find python3, and with it mpi4py, where mpirun is
        env["PATH"] = SYSTEM_PATH
    # An mpirun that is killed leaves its session directory; a short name: there are sockets in it.
    with tempfile.TemporaryDirectory(prefix="mpi", ignore_cleanup_errors=True) as env["TMPDIR"]:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port)],
                env=env,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            yield Server(process, port, log)
        finally:
            for pid in session(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def alone(log: Path, *flags: str, **settings: str) -> AbstractContextManager[Server]:
    command = [*ALONE, str(SIMULATOR / "trtllm-serve"), MODEL, *flags]
    return started(command, log, **settings)


def ranks(
    count: int, log: Path, *flags: str, mpirun: tuple[str, ...] = (), **settings: str
) -> AbstractContextManager[Server]:
    at_once = ["--mca", "odls_base_sigkill_timeout", "0"]  # when one fails, the others end
    options = ["--oversubscribe", "--allow-run-as-root", *at_once, "-n", str(count), *mpirun]
    command = ["mpirun", *options, "trtllm-llmapi-launch", "trtllm-serve", MODEL, *flags]
    return started(command, log, **{"GPUS": str(count), **settings})


def session(leader: int) -> dict[int, list[str]]:
    """Return the processes of a session with their command lines, zombies left out."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            stat = (directory / "stat").read_text().rpartition(")")[2].split()
            if int(stat[3]) == leader and stat[0] != "Z":
                command = (directory / "cmdline").read_bytes().decode().split("\0")
                found[int(directory.name)] = command
    return found


def processes(server: Server, word: str) -> list[int]:
    """Return those of its processes whose program, or script, has that name."""
    running = session(server.process.pid).items()
    return [pid for pid, line in running if any(part.endswith(word) for part in line[:2])]


def cpu_seconds(pids: list[int]) -> float:
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / CLOCK


def parents_of_nobody(server: Server) -> set[int]:
    pids = session(server.process.pid)
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return set(pids) - {int(stat[1]) for stat in stats}


def until_ready(server: Server) -> None:
    eventually(lambda: READY in server.log or server.process.poll() is not None)
    assert server.process.poll() is None, server.log


def health(server: Server) -> int:
    return server.get("/health").status_code


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


# -- the launch script --


def test_the_command_gets_the_leaders_address_and_no_trace_of_mpi() -> None:
    foreign = ["SLURM_PROCID", "SLURM_NTASKS", "PMIX_ID", "PMI_ID", "OMPI_X", "MPI_X", "UCX_TLS"]
    env = {**dict.fromkeys(foreign, "0"), "SLURM_NTASKS": "1", "NCCL_DEBUG": "1"}
    result = launch("env", **env)
    assert result.returncode == 0, result.stderr
    env = dict(line.split("=", 1) for line in result.stdout.splitlines() if "=" in line)
    assert not env.keys() & set(foreign)
    assert env["NCCL_DEBUG"] == env["TLLM_SPAWN_PROXY_PROCESS"] == env["tllm_mpi_size"] == "1"
    assert re.fullmatch(r"tcp://127\.0\.0\.1:\d+", env["TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR"])
    key = env["TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY"]
    assert re.fullmatch(r"[0-9a-f]{64}", key)
    assert key not in result.stderr


def test_the_address_is_the_first_free_one() -> None:
    with socket.socket() as holder:
        taken = 0  # ours; somebody else's may be free again by the time we look
        with suppress(OSError):
            holder.bind(("", 10012))
            taken = 10012
        result = launch("true")
    port = int(re.findall(r"127\.0\.0\.1:(\d+)", result.stderr)[0])
    assert 10012 <= port < 10112 and port != taken


def test_launches_of_the_same_moment_have_addresses_of_their_own() -> None:
    """And each leader gets the address that its rank 0 has told."""
    env = {**environment(LAUNCH="propagate"), "PATH": SYSTEM_PATH}
    command = [*ALONE, "sh", "-c", 'echo "$TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR"; read _; true']
    pipe = subprocess.PIPE
    together = [
        subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe) for _ in range(8)
    ]
    addresses = {each.stdout.readline() for each in together if each.stdout}
    said = [each.communicate(timeout=PATIENCE)[1] for each in together]
    assert [each.returncode for each in together] == [0] * 8, said
    assert len(addresses) == 8, said


@pytest.mark.parametrize(
    ("env", "rank", "size"),
    [
        ({"PMI_ID": "4"}, 4, 1),
        ({"PMI_ID": "4", "PMI_RANK": "3"}, 3, 1),
        ({"PMI_RANK": "3", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "8"}, 2, 8),
        ({"OMPI_COMM_WORLD_RANK": "2", "SLURM_PROCID": "1", "SLURM_NTASKS": "16"}, 1, 16),
        ({"OMPI_COMM_WORLD_RANK": "2", "SLURM_PROCID": "", "SLURM_NTASKS": ""}, 2, 1),
    ],
)
def test_rank_and_size_are_read_in_the_scripts_order(
    env: dict[str, str], rank: int, size: int
) -> None:
    result = launch("false", **env)
    assert f"mpi_rank: {rank}\033" in result.stderr
    assert f"rank{rank} run mgmn worker node with mpi_world_size: {size} ..." in result.stderr
    assert "SIMULATOR" in result.stdout
    if size > 1:
        assert result.returncode == 1
        assert "need the Python package mpi4py" in result.stderr


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["true"], 0),
        (["trtllm-serve", MODEL, "--foo"], 2),
        (["no-such-command"], 127),
        (["sh", "-c", "kill -9 $$"], 137),
    ],
)
def test_newer_script_ends_with_the_commands_exit_code(command: list[str], code: int) -> None:
    result = launch(*command)
    assert result.returncode == code
    assert f"Rank0 Task exit code: {code}" in result.stderr


@pytest.mark.parametrize(("kind", "seen"), [("stuck", "a,b,c,"), ("propagate", "a b,c,")])
def test_older_script_splits_arguments_at_spaces(kind: str, seen: str) -> None:
    result = launch("printf", "%s,", "a b", "c", TRTLLM_SIM_LAUNCH=kind)
    assert (result.stdout, result.returncode) == (seen, 0)


def test_bad_settings_and_a_missing_command_are_errors() -> None:
    assert launch().returncode == 2
    assert "must be one of stuck, propagate" in launch("true", TRTLLM_SIM_LAUNCH="x").stderr
    assert "SLURM_NTASKS=x is not a number" in launch("true", SLURM_NTASKS="x").stderr


# -- a world of one rank --


def test_single_rank_serves_without_mpi_and_only_who_has_the_key(log: Path) -> None:
    with alone(log) as server:
        server.wait_ready()
        assert server.complete()["usage"]["completion_tokens"] == 8
        port = int(re.findall(r"tcp://127\.0\.0\.1:(\d+)", server.log)[0])
        for line in (b"nonsense\n", b'0000 {"op": "stop"}\n', b"\n", b"x" * 100_000):
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
                client.sendall(line)
                with suppress(ConnectionResetError):
                    assert client.recv(1) == b"", line
            assert health(server) == 200, line
        time.sleep(1.5)  # longer than a heartbeat
        assert health(server) == 200
        assert server.log.count("SIMULATOR") == 1
        assert f"loading part 1 of 1 of {MODEL} on GPU 0" in server.log


def test_older_script_waits_for_ever_after_a_failure(log: Path) -> None:
    with alone(log, FAULT="exit-serving:9") as server:
        eventually(lambda: READY in server.log and not processes(server, "trtllm-serve"))
        time.sleep(0.5)
        assert server.process.poll() is None
        assert processes(server, "mgmn_leader.py")


def test_newer_script_ends_with_a_failure(log: Path) -> None:
    with alone(log, FAULT="exit-serving:9", LAUNCH="propagate") as server:
        assert server.process.wait(timeout=PATIENCE) == 9
        eventually(lambda: session(server.process.pid) == {})


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_rank_and_server(log: Path, signum: int) -> None:
    with alone(log) as server:
        server.wait_ready()
        server.process.send_signal(signum)
        assert server.process.wait(timeout=PATIENCE) == 128 + signum
        eventually(lambda: session(server.process.pid) == {})


def test_world_of_the_wrong_size_is_refused(log: Path) -> None:
    with alone(log, "--tp_size", "2", LAUNCH="propagate") as server:
        assert server.process.wait(timeout=PATIENCE) == 1
        assert "ValueError: n_workers must be equal to the number of processes" in server.log
        assert "got 2 vs 1" in server.log


def test_death_of_the_leader_leaves_a_server_that_is_unhealthy(log: Path) -> None:
    with alone(log, FAULT="kill-rank:0:2") as server:
        assert server.process.wait(timeout=PATIENCE) == 137
        eventually(lambda: health(server) == 503)
        with pytest.raises(requests.Timeout):
            server.post("/v1/completions", {"model": "m", "prompt": "Hi"}, timeout=0.2)


def test_newer_script_waits_for_a_server_whose_leader_has_died(log: Path) -> None:
    with alone(log, FAULT="exit-rank:0:3", LAUNCH="propagate") as server:
        eventually(lambda: "exiting with code 3" in server.log)
        time.sleep(0.5)
        assert server.process.poll() is None
        assert READY not in server.log


# -- the leader's checks --


def in_simulator(script: str) -> str:
    """Run a piece of Python among the simulator's modules; return what it prints."""
    command = [sys.executable, "-S", "-c", script]
    return subprocess.run(
        command, cwd=SIMULATOR, capture_output=True, text=True, check=True
    ).stdout.strip()


TWO_NODES = [("a", 8)] * 8 + [("b", 8)] * 8
CYCLIC = [("a", 8), ("b", 8)] * 8


@pytest.mark.parametrize(
    ("hosts", "wanted", "gpus_per_node", "message"),
    [
        (TWO_NODES, 16, 8, "None"),
        ([("a", 3)] * 3 + [("b", 3)] * 3, 6, 3, "None"),
        (TWO_NODES, 8, 8, "got 8 vs 16"),
        (TWO_NODES, 32, 8, "got 32 vs 16"),
        (CYCLIC, 16, 8, "rank 8 and rank 0 both on CUDA device 0 of a"),
        (TWO_NODES, 16, 4, "rank 4 and rank 0 both on CUDA device 0 of a"),
        ([("a", 4)] * 4 + [("b", 4)] * 4, 8, 8, "rank 4 wants GPU 4 of b, which has 4"),
        ([("a", 8)] * 5 + [("b", 8)] * 3, 8, 4, "rank 4 and rank 0 both on CUDA device 0 of a"),
    ],
)
def test_ranks_are_held_against_the_engine_and_its_gpus(
    hosts: list[tuple[str, int]], wanted: int, gpus_per_node: int, message: str
) -> None:
    reports = [[rank, host, gpus] for rank, (host, gpus) in enumerate(hosts)]
    printed = in_simulator(
        "from mgmn_leader import Fatal, Report, check_world\n"
        f"reports = [Report(*report) for report in {reports}]\n"
        f"try: print(check_world(reports, {wanted}, {gpus_per_node}))\n"
        "except Fatal as error: print(error)\n"
    )
    assert message in printed


def test_a_message_is_read_only_with_its_key() -> None:
    printed = in_simulator(
        "from leader_link import seal, unseal\n"
        "line = seal(b'k', {'op': 'stop', 'x': 'a b'})\n"
        "print(unseal(b'k', line))\n"
        "for key, bad in ((b'other', line), (b'k', line.replace(b'a b', b'a c'))):\n"
        "    try: print(unseal(key, bad))\n"
        "    except ValueError as error: print(error)\n"
    )
    refused = "HMAC verification failed"
    assert printed.splitlines() == ["{'op': 'stop', 'x': 'a b'}", refused, refused]


# -- many ranks --


# Worlds that only time breaks; they do so side by side, while other tests run.
SLOW_WORLDS: dict[str, tuple[int, bool, dict[str, str]]] = {  # ranks, --enable-recovery, settings
    "older": (3, False, {"FAULT": "exit-loading:4"}),
    "loading": (3, True, {"FAULT": "kill-rank:2"}),
    "unhealthy": (4, True, {"FAULT": "kill-rank:2:4"}),
    "newer": (3, True, {"FAULT": "kill-rank:2:0.2,exit-serving:6:7", "LAUNCH": "propagate"}),
}


def says(log: Path, words: str) -> bool:
    return words in log.read_text()


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    with ExitStack() as stack:
        servers = {}
        for name, (count, recovery, settings) in SLOW_WORLDS.items():
            path = tmp_path_factory.mktemp("world") / "log"
            # Open MPI goes on as if nothing had happened where it shall recover.
            flags = ("--enable-recovery",) if recovery else ()
            world = ranks(count, path, "--tp_size", str(count), mpirun=flags, **settings)
            servers[name] = stack.enter_context(world)
            # Two that look for a free port at the same moment find the same one.
            eventually(partial(says, path, "loading part"))
            if name == "unhealthy":  # not yet
                until_ready(servers[name])
                assert health(servers[name]) == 200
        yield servers


@needs_mpi
def test_sixteen_ranks_serve_idle_and_end_together(log: Path) -> None:
    with ranks(16, log, "--tp_size", "8", "--pp_size", "2", LAUNCH="propagate") as server:
        until_ready(server)
        assert server.complete()["usage"]["completion_tokens"] == 8
        pattern = r"rank (\d+) on \S+: loading part (\d+) of 16 of \S+ on GPU (\d+)"
        loaded = sorted(tuple(map(int, found)) for found in re.findall(pattern, server.log))
        assert loaded == [(rank, rank + 1, rank) for rank in range(16)]
        assert server.log.count("SIMULATOR") == 16
        pids = processes(server, "trtllm-llmapi-launch") + processes(server, "mgmn_leader.py")
        assert len(pids) == 17
        before = cpu_seconds(pids)
        time.sleep(1)
        assert cpu_seconds(pids) - before < 0.3  # all of them together
        assert health(server) == 200
        os.kill(processes(server, "trtllm-serve")[0], signal.SIGTERM)
        assert server.process.wait(timeout=PATIENCE) == 128 + signal.SIGTERM, server.log
        eventually(lambda: session(server.process.pid) == {})


@needs_mpi
@pytest.mark.usefixtures("slow")  # they have their time from here on
def test_wrong_number_of_ranks_is_an_error(log: Path) -> None:
    with ranks(3, log, "--tp_size", "4", LAUNCH="propagate", GPUS="4") as server:
        assert server.process.wait(timeout=PATIENCE) == 1
        assert "got 4 vs 3" in server.log


@needs_mpi
def test_ranks_that_share_a_gpu_are_an_error(log: Path) -> None:
    flags = ("--tp_size", "4", "--gpus_per_node", "2")
    with ranks(4, log, *flags, LAUNCH="propagate") as server:
        assert server.process.wait(timeout=PATIENCE) == 1
        assert "Duplicate GPU detected : rank 2 and rank 0" in server.log


@needs_mpi
@pytest.mark.parametrize("host", ["rank / 2", "rank % 2"], ids=["blocks", "cyclic"])
def test_ranks_on_two_hosts_must_lie_in_blocks(log: Path, host: str) -> None:
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("may not give processes a host name of their own")
    rename = f'rank=$OMPI_COMM_WORLD_RANK; hostname "node$(({host}))"; exec "$@"'
    wrapper = ("unshare", "--uts", "sh", "-c", rename, "sh")
    settings = {"GPUS": "2", "LAUNCH": "propagate"}
    with ranks(4, log, "--tp_size", "4", mpirun=wrapper, **settings) as server:
        if host == "rank / 2":
            until_ready(server)
            assert "rank 3 on node1: loading part 4 of 4 of org/some-model on GPU 1" in server.log
        else:
            assert server.process.wait(timeout=PATIENCE) == 1
            assert "rank 2 and rank 0 both on CUDA device 0 of node0" in server.log


@needs_mpi
@pytest.mark.parametrize(
    ("fault", "code"), [("exit-rank:2:7", 7), ("exit-rank:1:7:3", 7), ("kill-rank:2", 137)]
)
def test_death_of_a_rank_is_seen_by_whoever_started_it(log: Path, fault: str, code: int) -> None:
    with ranks(3, log, "--tp_size", "3", FAULT=fault) as server:
        assert server.process.wait(timeout=PATIENCE) == code
        assert (READY in server.log) == (fault.count(":") == 3)


@needs_mpi
def test_tasks_that_are_no_world_are_told_so(log: Path) -> None:
    env = {**environment(), "PATH": SYSTEM_PATH, "PMI_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    result = subprocess.run(
        [LAUNCH, "true"], env=env, capture_output=True, text=True, timeout=PATIENCE
    )
    assert result.returncode == 1
    assert "rank0 should not have executor" in result.stderr
    assert "task 1 of 2 is rank 0 in an MPI world of 1" in result.stderr


@needs_mpi
def test_death_of_a_rank_makes_the_server_unhealthy_for_ever(slow: dict[str, Server]) -> None:
    server = slow["unhealthy"]  # it was healthy
    eventually(lambda: health(server) == 503)
    assert BROKEN in server.log
    assert len(processes(server, "trtllm-llmapi-launch")) == 3
    assert server.process.poll() is None


@needs_mpi
def test_newer_script_ends_a_broken_world(slow: dict[str, Server]) -> None:
    server = slow["newer"]
    eventually(lambda: "Rank0 Task exit code: 6" in server.log)
    assert BROKEN in server.log
    eventually(lambda: not processes(server, "trtllm-llmapi-launch"))


def a_second_of_silence(server: Server) -> None:
    """Return when it has said nothing for a second."""
    while (left := server.log_file.stat().st_mtime + 1 - time.time()) > 0:
        time.sleep(left)


@needs_mpi
def test_older_script_keeps_all_ranks_waiting(slow: dict[str, Server]) -> None:
    server = slow["older"]
    eventually(lambda: "Executor worker died" in server.log)
    a_second_of_silence(server)
    assert server.process.poll() is None
    assert len(processes(server, "trtllm-llmapi-launch")) == 3


@needs_mpi
def test_death_of_a_rank_while_loading_keeps_the_others_waiting(slow: dict[str, Server]) -> None:
    server = slow["loading"]
    eventually(lambda: "100%" in server.log)
    a_second_of_silence(server)
    assert READY not in server.log
    assert processes(server, "trtllm-serve")


@needs_mpi
def test_sigterm_ends_a_rank_at_once(slow: dict[str, Server]) -> None:
    server = slow["unhealthy"]
    eventually(lambda: len(processes(server, "trtllm-llmapi-launch")) == 3)
    worker, _ = set(processes(server, "trtllm-llmapi-launch")) & parents_of_nobody(server)
    os.kill(worker, signal.SIGTERM)
    eventually(lambda: worker not in session(server.process.pid))
