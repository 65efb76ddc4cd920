"""Fakes at the boundary: `docker`, `srun` and the like on a PATH that holds nothing unexpected.

Every fake records how it was called, and refuses what it does not know with exit code 64. The fake
docker has a state directory per node, and starts containers as real Docker does: not as children of
its client, so that a forgotten one lives on. Whatever is left when a test ends fails it.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import itertools
import json
import marshal
import math
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from launch.nodes import Place
from launch.order import Command, parse
from launch.plan import Plan, Replica
from tests import packages, warm
from tests.waiting import comes_true

CI = bool(os.environ.get("CI"))
ROOT = Path(__file__).resolve().parents[1]
TAG = "tensorrt-llm-serve:latest"
TOKEN = "hf_do_not_print_me"
# Seconds that anything may take on a machine that is busy with something else. What must not happen
# by itself in a test is set to take far longer.
PATIENCE = 60.0
# An srun that ignores its flags and has one node, this one.
ONE_NODE = ("bash", "-c", 'while [[ $1 = --* ]]; do shift; done; exec "$@"', "srun")
HOSTILE = ["a b", "it's", 'a"b', "$HOME $(id)", "a;b|c&d", "a,b", "*", "-x", "ünï", "a\\b", "a\nb"]


# A `make check` has time for a few examples, the same ones each time. Many more, and new ones:
#     HYPOTHESIS_PROFILE=long .venv/bin/pytest --timeout=0 tests/test_hostile_*.py
hypothesis.settings.register_profile(
    "short",
    max_examples=20,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.register_profile(
    "long", hypothesis.settings.get_profile("short"), max_examples=1000, derandomize=False
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


def pytest_configure(config: pytest.Config) -> None:
    """Prepare what all tests need; in CI, install it before the first one looks for it."""
    # If a script started us in the background, SIGINT is ignored, and every process inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    keep_bytecode()
    # As if .venv were activated: another `python3` may be a script that first looks for one.
    os.environ["PATH"] = f"{sys.prefix}/bin:{os.environ['PATH']}"
    if CI and os.geteuid() == 0:
        packages.install([*packages.OTHERS, *packages.CLUSTER])
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        for path in Path(__file__).parent.glob("test_*.py"):  # else each process compiles them all
            import_module(f"tests.{path.stem}")


def keep_bytecode() -> None:
    """Write bytecode even if Python is told not to: else every script that a test starts is
    compiled anew, which takes longer than many a test."""
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_collection_finish() -> None:
    """Keep the tests out of the garbage collection that the benchmark's client runs before each
    measurement."""
    gc.collect()
    gc.freeze()


def pytest_xdist_auto_num_workers() -> int:
    """Four more than there are cores, up to six: the three that have a cluster mostly wait."""
    return min((os.cpu_count() or 1) + 4, 6)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a skipped test counts as failed: no ring of tests may be missing there."""
    report = yield
    if CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"skipped in CI: {report.longrepr}"
    return report


# Real programs that the scripts may use. They must not need any other.
TOOLS = [
    "awk",
    "base64",
    "bash",
    "cat",
    "cut",
    "date",
    "df",
    "dirname",
    "env",
    "false",
    "flock",
    "grep",
    "gzip",
    "head",
    "id",
    "kill",
    "ls",
    "mkdir",
    "mktemp",
    "pigz",
    "printf",
    "ps",
    "python3",
    "readlink",
    "rm",
    "sed",
    "seq",
    "setsid",
    "sh",
    "sha256sum",
    "sleep",
    "sort",
    "ss",
    "tail",
    "tee",
    "timeout",
    "tr",
    "true",
    "uname",
    "wc",
    "zstd",
]

COMMON = r"""
import contextlib, fcntl, json, os, signal, sys, time
from pathlib import Path

home = Path(os.environ["FAKE_HOME"])
faults = json.loads((home / "faults.json").read_text())
me, args = Path(sys.argv[0]).name, sys.argv[1:]
with (home / "calls").open("a") as calls:
    print(json.dumps([me, *args]), file=calls)

def fail(text, code=1):
    print(text, file=sys.stderr, flush=True)
    raise SystemExit(code)

def unknown():
    fail(f"fake {me} does not know {args!r}", 64)
"""

DOCKER = r"""
node = home / os.environ.get("SLURMD_NODENAME", "local")
node.mkdir(exist_ok=True)
lock = (node / "lock").open("w")

@contextlib.contextmanager
def locked():
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield
    fcntl.flock(lock, fcntl.LOCK_UN)

OURS = {"org.opencontainers.image.title": "tensorrt-llm-serve",
        "org.opencontainers.image.version": "1.1.0"}

def images():
    path = node / "images.json"
    return json.loads(path.read_text()) if path.exists() else {}

def keep(known):
    part = node / f"images-{os.getpid()}"
    part.write_text(json.dumps(known))
    part.replace(node / "images.json")

def container(name):
    return node / f"container-{name}.json"

def note(name, known):
    # Whole or not at all: tests look at any moment.
    part = node / f"part-{os.getpid()}"
    part.write_text(json.dumps(known))
    part.replace(container(name))

def take_in(stream):
    import io, tarfile
    data = stream.read(faults.get("reads", -1))
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            [entry] = json.load(tar.extractfile("manifest.json"))
    except (tarfile.TarError, KeyError, EOFError):
        fail("Error processing tar file(exit status 1): unexpected EOF")
    digest = "sha256:" + Path(entry["Config"]).name.removesuffix(".json")
    known = images()
    for tag in entry["RepoTags"]:
        known[tag] = {"id": faults.get("loads", digest), "layers": faults.get("layers", []),
                      "labels": faults.get("labels", OURS)}
        print("Loaded image: " + tag)
    keep(known)

def run(name, rest):
    import subprocess
    words, flags = iter(rest), []
    for word in words:
        if not word.startswith("-"):
            break
        flags.append(word)
        if word in ("--device", "--gpus", "--mount"):
            flags.append(next(words))
        elif not word.startswith((
            "--label=", "--uts=host", "--ipc=host", "--net=host", "--ulimit=", "--mount=",
            "--workdir=", "--env=", "--entrypoint=", "--userns=host")) and word not in (
            "--rm", "--init", "--interactive", "--sig-proxy=false", "--privileged", "--pull=never"):
            fail("unknown flag: " + word, 125)
    else:
        fail('"docker run" requires at least 1 argument.', 125)
    entry = [flag.partition("=")[2] for flag in flags if flag.startswith("--entrypoint=")]
    engine = [*(entry or images().get(word, {}).get("entrypoint", [])), *words]
    seen = {n: os.environ[n] for n in os.environ if n == "PATH" or n.startswith("FAKE_")}
    for flag in flags:
        variable, equals, value = flag.removeprefix("--env=").partition("=")
        if flag.startswith("--env=") and (equals or variable in os.environ):
            seen[variable] = value if equals else os.environ[variable]
    if faults.get("remaps") and "--net=host" in flags and "--userns=host" not in flags:
        fail("docker: Error response from daemon: cannot share the host's network namespace when "
             "user namespaces are enabled.", 125)
    if node.name in faults.get("no_run", []):
        fail("docker: Error response from daemon: could not select device driver.", 125)
    if container(name).exists():
        fail(f"docker: Error response from daemon: Conflict. The container name \"/{name}\" is "
             "already in use.", 125)
    if word not in images():
        fail(f"docker: Error response from daemon: No such image: {word}.", 125)
    labels = dict(f[len("--label="):].split("=", 1) for f in flags if f.startswith("--label="))
    if "trtllm-serve" in engine[:5]:
        at = engine.index("trtllm-serve")
        engine[at:at + 1] = [sys.executable, os.environ["FAKE_SIMULATOR"]]
    create(name, labels)
    if "--sig-proxy=false" not in flags:  # then it asks for every signal, ignored or not
        for signum in (10, 12, 14):
            signal.signal(signum, signal.SIG_DFL)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    with locked():
        if faults.get("create_delay") and not container(name).exists():
            fail("docker: Error response from daemon: No such container: " + name, 125)
        process = subprocess.Popen(
            engine, stdin=standard_input("--interactive" in flags), start_new_session=True,
            env=seen, preexec_fn=as_the_daemon_would)
        note(name, {
            "pid": process.pid, "name": name, "labels": labels, "flags": flags,
            "environment": seen})
    code = process.wait()
    with locked():
        for leader in leaders(name):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(leader, signal.SIGKILL)
        container(name).unlink(missing_ok=True)
    raise SystemExit(code if code >= 0 else 128 - code)

def create(name, labels):
    # The daemon completes it though its client is gone; then nobody starts it.
    if delay := faults.get("create_delay"):
        if daemon := os.fork():
            os.waitpid(daemon, 0)
            return
        os.setsid()
        os.closerange(0, 3)
        time.sleep(delay)
        note(name, {"pid": None, "name": name, "labels": labels})
        os._exit(0)

def as_the_daemon_would():
    for signum in (1, 2, 10, 12, 15):
        signal.signal(signum, signal.SIG_DFL)

def standard_input(attached):
    # The daemon's: it gets what the client reads, and ends when the client does.
    import subprocess, threading
    if not attached:
        return subprocess.DEVNULL
    source, feed = os.pipe()
    def copy():
        while data := os.read(0, 4096):
            os.write(feed, data)
        os.close(feed)
    threading.Thread(target=copy, daemon=True).start()
    return source

def leaders(name):
    # The container's process and those that `docker exec` started: each leads a session.
    if not container(name).exists():
        return []
    known = json.loads(container(name).read_text())
    return [pid for pid in (known["pid"], *known.get("ranks", [])) if pid]

def execute(file, cwd, name, command):
    import subprocess
    env = {}
    for line in Path(file).read_text().splitlines():
        variable, equals, value = line.partition("=")
        if not equals or not variable or " " in variable:
            fail(f"invalid env file ({file}): variable '{variable}' contains whitespaces", 125)
        env[variable] = value
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    # Whatever becomes of the client, the daemon goes on.
    result, answer = os.pipe()
    if os.fork():
        os.close(answer)
        raise SystemExit(int(os.read(result, 9) or b"1"))
    os.setsid()
    with locked():
        if not container(name).exists():
            fail("Error response from daemon: No such container: " + name)
        known = json.loads(container(name).read_text())
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**known["environment"], **env}, preexec_fn=as_the_daemon_would)
        known["ranks"] = [*known.get("ranks", []), process.pid]
        known["variables"] = [*known.get("variables", []), env]
        note(name, known)
    code = process.wait()
    os.write(answer, str(code if code >= 0 else 128 - code).encode())
    raise SystemExit(0)

def top(name):
    # Every process of the container's sessions, as `ps` shows it.
    if not container(name).exists():
        fail("Error response from daemon: No such container: " + name)
    print("PID COMMAND")
    with locked():
        ours = leaders(name)
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(stat[3]) in ours and stat[0] != "Z":
                    words = (entry / "cmdline").read_bytes().decode().split("\0")
                    print(entry.name, *words)

def remove(name):
    time.sleep(faults.get("rm_delay", 0))
    with locked():
        found = [p for p in node.glob("container-*.json")
                 if name in (json.loads(p.read_text())["name"], p.stem[-12:])]
        for path in found:
            for leader in leaders(json.loads(path.read_text())["name"]):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(leader, signal.SIGKILL)
            path.unlink()
    if not found:
        fail("Error response from daemon: No such container: " + name)
    print(name)

if faults.get("warns"):
    print("WARNING: Error loading config file: open /root/.docker/config.json: permission denied",
          file=sys.stderr)
if down := faults.get("down"):
    if down is True or node.name in down:
        fail("Cannot connect to the Docker daemon at unix:///var/run/docker.sock.")

LABEL = "tensorrt-llm-serve."
match args:
    case ["version", "--format", "{{.Server.Version}}"]:
        print("27.0.1")
    case ["info", "--format", "{{.DriverStatus}}"]:
        print(faults.get("store", "[[Backing Filesystem extfs]]"))
    case ["info", "--format",
          "{{println .ServerVersion}}{{println .DriverStatus}}{{println .DockerRootDir}}"
          "{{json .Runtimes}}{{json .SecurityOptions}}"]:
        store = faults.get("store", "[[Backing Filesystem extfs]]")
        options = json.dumps(["name=seccomp,profile=builtin", *faults.get("security", [])])
        print("27.0.1", store, home, '{"nvidia":{},"runc":{}}' + options, sep="\n")
    case ["--version"]:
        print("Docker version 27.0.1, build 1")
    case ["image", "inspect", "--format", "{{json .Config.Labels}}", id]:
        found = [image for image in images().values() if image["id"] == id]
        print(json.dumps(found[0].get("labels", OURS)) if found else unknown())
    case ["image", "inspect", "--format", form, tag]:
        if not (image := images().get(tag)):
            fail("Error response from daemon: No such image: " + tag)
        layers = json.dumps(image["layers"], separators=(",", ":"))
        forms = {"{{.Id}}": image["id"],
                 "{{.Id}} {{json .RootFS.Layers}}": f"{image['id']} {layers}"}
        print(forms[form] if form in forms else unknown())
    case ["image", "inspect", tag]:
        if tag not in images():
            fail("Error response from daemon: No such image: " + tag)
        print("[]")
    case ["image", "rm", tag]:
        keep({name: image for name, image in images().items() if name != tag})
    case ["ps", "--all", "--filter", f, "--format", form] if f == f"label={LABEL}job":
        assert form == '{{.ID}} {{.Names}} ' + " ".join(
            '{{.Label "%s%s"}}' % (LABEL, x) for x in ("job", "launcher", "user")), form
        for path in sorted(node.glob("container-*.json")):
            c = json.loads(path.read_text())
            words = [c["labels"].get(LABEL + x, "") for x in ("job", "launcher", "user")]
            print(path.stem[-12:], c["name"], *words)
    case ["load"]:
        if faults.get("full"):
            fail("write /layer.tar: no space left on device")
        time.sleep(faults.get("load_delay", 0))
        take_in(sys.stdin.buffer)
    case ["pull", "--quiet", reference]:
        time.sleep(faults.get("pull_delay", 0))
        if faults.get("no_manifest"):
            fail("Error response from daemon: manifest unknown: manifest unknown")
        keep({**images(), reference: {"id": faults.get("pulls", "sha256:abc"), "layers": [],
                                      "labels": faults.get("labels", OURS)}})
        print(reference)
    case ["login", "--username", "AWS", "--password-stdin", host]:
        password = sys.stdin.read()
        time.sleep(faults.get("login_delay", 0))
        config = Path(os.environ["DOCKER_CONFIG"])
        (config / "config.json").write_text(password)
        (home / "login").write_text(f"{host} {password} {config}")
        if faults.get("denied"):
            fail("Error response from daemon: login attempt failed with status: 400 Bad Request")
        print("Login Succeeded")
    case ["run", "--name", name, "--rm", "--pull=never", "--net=none",
          "--env=NVIDIA_VISIBLE_DEVICES=void", "--entrypoint=python3", id, "-c", code, *names]:
        assert "importlib.metadata" in code and "tensorrt_llm" in names
        if faults.get("asked") == "hangs":
            note(name, {"pid": None, "name": name, "labels": {}})
            time.sleep(3600)
        print(faults.get("asked", ""))
        raise SystemExit("asked" not in faults)
    case ["run", "--name", name, *rest]:
        run(name, rest)
    case ["exec", "--env-file", file, "--workdir", cwd, name, *command] if command:
        execute(file, cwd, name, command)
    case ["exec", name, "sh", "-c", "ls -l /proc/[0-9]*/fd"]:
        if faults.get("listens") == "unknown":
            fail("Error response from daemon: container is not running")
        print("/proc/1/fd:\nlrwx------ 1 root root 64 Nov 28 10:00 0 -> /dev/null")
        for link in Path("/proc").glob("[0-9]*/fd/*") if faults.get("listens") != "" else ():
            with contextlib.suppress(OSError):
                print(link, "->", os.readlink(link))
    case ["top", name, "-eo", "pid,args"]:
        if faults.get("no_top"):
            fail("Error response from daemon: context deadline exceeded")
        top(name)
    case ["ps", "--all", "--quiet", "--filter", f, *more] if f.startswith(
            f"label={LABEL}launcher=") and (not more or (len(more) == 2 and more[0] == "--filter"
            and more[1].startswith(f"label={LABEL}replica="))):
        time.sleep(faults.get("inspect_delay", 0))
        wanted = dict(each.split("=", 2)[1:] for each in (f, *more[1:]))
        for path in sorted(node.glob("container-*.json")):
            if wanted.items() <= json.loads(path.read_text())["labels"].items():
                print(path.stem[-12:])
    case ["rm", "--force", *names] if names:
        for name in names:
            remove(name)
    case ["inspect", "--format", "{{.State.Running}}", name]:
        if not container(name).exists():
            fail("Error: No such object: " + name)
        print("true")
    case ["inspect", name]:
        time.sleep(faults.get("inspect_delay", 0))
        if not container(name).exists():
            fail("Error: No such object: " + name)
        print("[]")
    case _:
        unknown()
"""

# Runs its command as so many tasks on each node, as srun does, and copies its input to all of them.
# With --kill-on-bad-exit=1 the first task that fails ends the others.
SRUN = r"""
def flag(words, pattern):
    # The value of the flag that has to come next, before it is a value that may be any.
    word = next(words, "")
    name, _, value = word.partition("=")
    wanted, _, known = pattern.partition("=")
    if name != wanted or (known and value != known) or not value:
        unknown()
    return value

if args == ["--mpi=list"]:
    print(faults.get("mpi", "MPI plugin types are...\n\tpmix\n\tnone\n\tpmi2\n"
                            "specific pmix plugin versions available: pmix_v4"))
    raise SystemExit(0)
if args == ["--help"]:
    print("Usage: srun [OPTIONS...] executable [args...]\n" + faults.get("plug_in", ""))
    raise SystemExit(0)
import subprocess, threading

if args[:2] != ["--overlap", "--export=ALL"]:
    unknown()
if not os.environ.get("SLURM_JOB_ID"):
    fail("srun: error: Unable to allocate resources", 64)
for leak in ("SLURM_CPU_BIND", "SLURM_CPUS_PER_TASK", "SLURM_HINT", "SLURM_TRES_PER_TASK",
             "SLURM_GPUS_PER_NODE", "SRUN_CPUS_PER_TASK", "SRUN_CONTAINER"):
    if leak in os.environ:
        fail(f"srun: {leak} bends this step", 64)
words = iter(args[2:])
mpi = flag(words, "--mpi")
flag(words, "--cpu-bind=none")
flag(words, "--kill-on-bad-exit=0")
flag(words, "--wait=0")
per_node, count, total = (
    int(flag(words, name)) for name in ("--ntasks-per-node", "--nodes", "--ntasks"))
if total != per_node * count or count > len(faults["nodes"]):
    fail("srun: error: Unable to create step: More processors requested than permitted", 64)
words = list(words)
given = words.pop(0) if words[0].startswith(("--gres=none", "--gpus=")) else ""
words = iter(words)
if count < len(faults["nodes"]):
    flag(words, "--nodelist=" + ",".join(faults["nodes"][:count]))
output, command = "", list(words)
if mpi != "none" or command[:1] == ["--overcommit"]:  # processes of a server
    if next(words := iter(command), "") != "--overcommit":
        fail("srun: error: Unable to create step: More processors requested than permitted", 64)
    flag(words, "--distribution=block")
    flag(words, "--kill-on-bad-exit=1")
    flag(words, "--open-mode=append")
    output, command = flag(words, "--output"), list(words)
    if mpi not in ("pmix", "pmix_v4", "none"):
        fail(f"srun: error: Couldn't find the specified plugin name for mpi/{mpi}")
elif per_node != 1:
    unknown()
if not command or command[0].startswith("-"):
    unknown()
if faults.get("launch_failed"):
    fail("srun: error: Task launch for StepId=77.0 failed on node n2: "
         "Communication connection failure")
nodes = faults["nodes"][:count]
tasks = []
for rank in range(total):
    node = nodes[rank // per_node]
    if node not in faults.get("mute", []):
        there = {"SLURMD_NODENAME": node, "SLURM_NODEID": str(rank // per_node),
                 "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(total),
                 "SLURM_STEP_GPUS": "" if given == "--gres=none" else faults.get("gpus", "0")}
        if mpi != "none":
            there |= {"PMIX_RANK": str(rank), "PMIX_SERVER_URI4": "pmix-server;tcp4://x"}
        else:
            there |= {"PMI_RANK": str(rank)}
        sink = Path(output.replace("%t", str(rank))).open("ab") if output else None
        tasks.append((rank, node, subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=sink, stderr=sink and subprocess.STDOUT,
            env={**os.environ, **there}, start_new_session=bool(output))))

def feed():
    while data := os.read(0, 65536):
        for _, _, task in tasks:
            with contextlib.suppress(OSError):
                os.write(task.stdin.fileno(), data)
    for _, _, task in tasks:
        task.stdin.close()

def ended(rank, node, task):
    code = task.wait()
    if code:
        word = {-9: "Killed", -15: "Terminated"}.get(code, f"Exited with exit code {code}")
        print(f"srun: error: {node}: task {rank}: {word}", file=sys.stderr, flush=True)
    return code if code >= 0 else 128 - code

threading.Thread(target=feed, daemon=True).start()
codes, running = [], list(tasks)
while running:
    for each in [each for each in running if not output or each[2].poll() is not None]:
        running.remove(each)
        codes.append(ended(*each))
        if codes[-1] and output:
            print("srun: Terminating StepId=77.1", file=sys.stderr, flush=True)
            for _, _, task in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(task.pid, signal.SIGKILL)
    time.sleep(0.02)
raise SystemExit(max(codes, default=0))
"""

SCONTROL = r"""
if os.environ.get("SLURM_CLUSTERS") not in (None, faults.get("cluster")):
    fail("scontrol: error: Only one cluster can be used at a time with scontrol")
listed = ",".join(faults["nodes"])
match args:
    case ["show", "job", job] if job == os.environ.get("SLURM_JOB_ID"):
        print(faults["job"])
    case ["show", "job", "-d", "77"]:
        gpus = faults.get("gpus", "0-7")
        count = len(gpus.split(",")) if "-" not in gpus else 8
        gres = f"gpu:{count}(IDX:{gpus})" if gpus != "none" else ""
        print(f"JobId=77 JobName=x\n   JobState=RUNNING Reason=None\n   NodeList={listed}\n"
              f"   NumNodes={len(faults['nodes'])} NumCPUs=2\n"
              "   Requeue=1 Restarts=0 BatchFlag=0 Reboot=0\n"
              f"     Nodes={listed} CPU_IDs=0 Mem=0 GRES={gres}\n")
    case ["show", "job", "-d", job]:
        fail("slurm_load_jobs error: Invalid job id specified")
    case ["show", "node", *_] if faults.get("private"):  # PrivateData=nodes
        fail("slurm_load_node error: Access/permission denied")
    case ["show", "node", "-o", nodes] if nodes == listed:
        for name in faults["nodes"]:
            print(f"NodeName={name} Arch=x86_64 Gres=gpu:8(S:0-1) State=MIXED ")
    case ["show", "node", "-d", "-o", node]:
        fail(f"Node {node} not found")
    case ["show", "hostnames", nodes] if nodes == listed:
        print("\n".join(faults["nodes"]))
    case ["show", "config"]:
        print(faults.get("config", "SlurmdParameters        = (null)\n"
                                   "SlurmdPort              = 6818\n"
                                   "SlurmdSpoolDir          = /no/such/%n\n"))
    case _:
        unknown()
"""

SQUEUE = r"""
if filters := [name for name in os.environ if name.startswith("SQUEUE_")]:
    fail(f"squeue: {filters} hide jobs", 64)
match args:
    case ["--all", "--noheader", *user, "--format=%A"] if all("--user=" in each for each in user):
        if "jobs" not in faults:
            fail("slurm_load_jobs error: Unable to contact slurm controller")
        print("\n".join(faults["jobs"]))
    case ["--all", "--local", "--noheader", "--states=all", "--jobs=77", "--format=%A %T"]:
        if "SLURM_CLUSTERS" in os.environ:
            fail("squeue: a node asks its own cluster", 64)
        if faults.get("over") == "unknown":
            fail("slurm_load_jobs error: Invalid job id specified")
        if faults.get("over") == "silent":
            fail("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
        print("76 COMPLETED\n77", faults.get("over", "RUNNING"))
    case ["--all", "--noheader", "--states=all", "--jobs=77", "--format=%A %L"]:
        print("76 1:00\n77", faults.get("left", "UNLIMITED"))  # 76: of the same array
    case ["--all", "--noheader", "--states=all", "--jobs=77", "--format=%A %T %L"]:
        if faults.get("state") == "GONE":
            fail("slurm_load_jobs error: Invalid job id specified")
        state, left = faults.get("state", "RUNNING"), faults.get("left", "UNLIMITED")
        print("76 TIMEOUT 0:00\n77", state, left)
    case ["--all", "--noheader", "--states=all", "--jobs=77", "--format=%A %T %r"]:
        print("76 TIMEOUT TimeLimit\n77", faults.get("reason", "RUNNING None"))
    case _:
        unknown()
"""

SCANCEL = r"""
match args:
    case ["--batch", "--signal=TERM", job]:
        pass
    case _:
        unknown()
"""

AWS = r"""
match args:
    case ["ecr", "get-login-password", "--region", "us-west-2"]:
        if faults.get("no_credentials"):
            fail("Unable to locate credentials. You can run `aws configure`", 253)
        print("pass word$(id)'")
    case _:
        unknown()
"""

HOSTNAME = r"""
match args:
    case []:
        print("local")
    case ["-s"]:
        print("local")
    case ["-I"]:
        print("127.0.0.1 fe80::1 ")
    case _:
        unknown()
"""

PROGRAMS = {
    "docker": DOCKER,
    "srun": SRUN,
    "scontrol": SCONTROL,
    "squeue": SQUEUE,
    "scancel": SCANCEL,
    "aws": AWS,
    "hostname": HOSTNAME,
}


# The programs that are called most, and which of their commands take input, or last.
AT_ONCE = {"docker": "run|exec|load|pull|login", "scontrol": "", "squeue": "", "hostname": ""}


@cache
def compiled(name: str) -> bytes:
    return marshal.dumps(compile(COMMON + PROGRAMS[name], name, "exec"))


def wait_until(condition: Callable[[], Any], what: str = "") -> None:
    if not comes_true(condition, PATIENCE):
        pytest.fail(f"not within {PATIENCE:g} s: {what or condition}")


class Fakes:
    """The fake programs, what they were asked, and what they hold."""

    def __init__(self, home: Path) -> None:
        self.home, self.bin, tools = home, home / "bin", home / "tools"
        for path in (self.bin, tools):
            path.mkdir(parents=True)
        for name in TOOLS:
            if found := shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/bin"):
                (tools / name).symlink_to(found)
        self.set()
        for name, text in PROGRAMS.items():
            if name in AT_ONCE:
                self.install(name, warm.client(home / name, AT_ONCE[name], compiled(name)))
            else:
                self.program(name, COMMON + text)
        self.path = f"{self.bin}:{tools}"

    def program(self, name: str, text: str) -> None:
        self.install(name, f"#!{sys.executable} -SE\n{text}")

    def install(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def set(self, **faults: object) -> None:
        """Set what goes wrong, and what Slurm knows. A fake may start meanwhile, and reads it."""
        new = self.home / "faults.json.new"
        new.write_text(json.dumps({"nodes": ["localhost", "n2"], "jobs": ["77"], **faults}))
        new.replace(self.home / "faults.json")

    def without(self, *names: str) -> None:
        for name in names:
            (self.bin / name).unlink()

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "PATH": self.path,
            "HOME": str(self.home),
            "SLURMD_NODENAME": "local",
            "TMPDIR": str(self.temporary),
            "FAKE_HOME": str(self.home),
            "FAKE_SIMULATOR": str(ROOT / "simulator/trtllm-serve"),
            "TRTLLM_SIM_LOAD_SECONDS": "0.1",
            **more,
        }

    @property
    def temporary(self) -> Path:
        path = self.home / "tmp"
        path.mkdir(exist_ok=True)
        return path

    def calls(self, *words: str) -> list[list[str]]:
        """Calls that begin with these words."""
        path = self.home / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        found: list[list[str]] = list(map(json.loads, lines))
        return [call for call in found if call[: len(words)] == list(words)]

    def containers(self) -> list[str]:
        return sorted(
            f"{path.parent.name}/{path.stem.removeprefix('container-')}"
            for path in self.home.glob("*/container-*.json")
        )

    def container(self) -> dict[str, Any]:
        """The only container that runs."""
        [path] = self.home.glob("*/container-*.json")
        return dict(json.loads(path.read_text()))

    def hold_image(
        self, tag: str = TAG, identity: str = "sha256:abc", node: str = "local", **more: object
    ) -> None:
        path = self.home / node / "images.json"
        path.parent.mkdir(exist_ok=True)
        known = json.loads(path.read_text()) if path.exists() else {}
        known[tag] = {"id": identity, "layers": [], **more}
        path.write_text(json.dumps(known))

    def images(self, node: str = "local") -> dict[str, str]:
        path = self.home / node / "images.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        return {tag: image["id"] for tag, image in known.items()}

    def leave_container(
        self, name: str, node: str = "local", pid: int | None = None, **labels: str
    ) -> None:
        """A container that somebody started earlier."""
        path = self.home / node / f"container-{name}.json"
        path.parent.mkdir(exist_ok=True)
        full = {f"tensorrt-llm-serve.{key}": value for key, value in labels.items()}
        path.write_text(json.dumps({"pid": pid, "name": name, "labels": full, "flags": []}))

    def processes(self) -> dict[int, str]:
        """Everything alive that was started with our environment: pid, command."""
        mark, found = f"FAKE_HOME={self.home}\0".encode(), {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes() + b"\0":
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    found[int(entry.name)] = b" ".join(words).decode(errors="replace")[:300]
        return {pid: command for pid, command in found.items() if pid != os.getpid()}

    def nothing_is_left(self) -> None:
        wait_until(lambda: not self.processes(), f"processes left: {self.processes()}")
        assert self.containers() == []


@pytest.fixture
def fakes(tmp_path: Path) -> Iterator[Fakes]:
    """Fake programs; whatever was started with their environment has to end with the test."""
    fakes = Fakes(tmp_path / "fakes")
    yield fakes
    deadline = time.monotonic() + PATIENCE
    while (left := fakes.processes()) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert left == {}


@pytest.fixture
def ready(fakes: Fakes) -> Fakes:
    """The fakes, with the image on the node."""
    fakes.hold_image()
    return fakes


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No settings, no variables of Slurm's, no .env of a developer's; the cwd is empty."""
    from common import settings

    before = dict(os.environ)
    ours = {each.name for each in settings.SETTINGS}
    for name in before:
        if name in ours or name.startswith(("SLURM", *settings.PASSED_ON, "TENSORRT_LLM_SERVE")):
            del os.environ[name]
    monkeypatch.setattr(settings, "__file__", str(tmp_path / "scripts/common/settings.py"))
    (tmp_path / "scripts/common").mkdir(parents=True)
    (tmp_path / "scripts/common/settings.py").touch()
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    yield
    os.environ.clear()
    os.environ.update(before)


class Script:
    """A running order, whose standard input is in our hands."""

    def __init__(self, fakes: Fakes, command: Command, **env: str) -> None:
        self.fakes, self.output_path = fakes, fakes.home / f"output-{time.monotonic_ns()}"
        with self.output_path.open("wb") as sink:
            self.process = subprocess.Popen(
                command.argv,
                env=fakes.environment(**env),
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        self.type(command.text)

    @property
    def told(self) -> list[Any]:
        """The messages among what it printed."""
        found = (parse(line).message for line in self.output.splitlines())
        return [message for message in found if message]

    @property
    def output(self) -> str:
        return self.output_path.read_text(errors="replace")

    def type(self, text: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()

    def until(self, condition: Callable[[], Any]) -> None:
        with contextlib.suppress(pytest.fail.Exception):
            wait_until(lambda: condition() or self.process.poll() is not None)
        assert condition(), self.output

    def until_said(self, text: str) -> None:
        self.until(lambda: text in self.output)

    def code(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"did not end within {PATIENCE:g} s: {self.output}")


@pytest.fixture
def script(fakes: Fakes) -> Iterator[Callable[..., Script]]:
    """Start a command with the fakes on its PATH."""
    started: list[Script] = []

    def start(command: Command, **env: str) -> Script:
        started.append(Script(fakes, command, **env))
        return started[-1]

    yield start
    for each in started:
        with contextlib.suppress(OSError):
            each.close()
        if each.process.poll() is None:
            each.process.kill()
        each.process.wait()


class Watch(threading.Thread):
    """Looks for secrets in every process's arguments, which anybody may read."""

    def __init__(self, *secrets: str) -> None:
        super().__init__(daemon=True)
        self.secrets, self.looks, self.seen = secrets, 0, set[str]()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.005):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    words = path.read_bytes().decode(errors="replace")
                    self.seen |= {words for secret in self.secrets if secret in words}
            self.looks += 1

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()


class AnyEngine(Plan):
    """A plan whose engine is any program."""

    def command(self, replica: Replica) -> tuple[str, ...]:
        return (replica.model, *replica.args)


def plan(*engine: str, runtime: str = "docker", gpus: str = "none", cache: str = "") -> Plan:
    program, *words = engine or ("trtllm-serve", "m")
    known = program == "trtllm-serve"
    model, *args = words if known else engine
    return (Plan if known else AnyEngine)(
        Place("local1", 1, ()),
        runtime,
        "trtllm",
        TAG,
        ("/fsx", "/home/a b"),
        (("HF_HOME", cache),) if cache else (),
        "/fsx/work",
        False,
        "me",
        (Replica(model, tuple(args), 8000, gpus),),
    )


def shown_orders(output: str) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """The orders that --dry-run shows: what each is for, its command line and the order itself."""
    head = r"^# (.*)\n\(?\{ cat (?:.|\n)*?<<'ORDER'; .*\} \| \\\n"
    block = head + r"((?:.*\\\n)*.*\n)((?:.|\n)*?)\n\nORDER$"
    found = re.findall(block, output, re.M)
    return {why: (shlex.split(command), json.loads(order)) for why, command, order in found}


# Ports for this worker only, below those that Linux gives to clients: nobody else takes a port that
# a test has found free. They take turns, since one that was just used may still be busy.
BAND = 20_000 + 2_000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw5").removeprefix("gw")) % 6)
PORTS = itertools.cycle(range(BAND, BAND + 2_000))


def free_port() -> int:
    return free_ports(1)


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody listens on."""
    while True:
        ports = list(itertools.islice(PORTS, count))
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in ports:
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            if ports[-1] - ports[0] == count - 1:
                return ports[0]


def archive(
    tag: str | None = TAG, *, oci: bool = False, manifest: object = ..., index: object = None
) -> bytes:
    """A small tar as `docker save` writes it, the manifest near its end."""
    config = json.dumps({"rootfs": {"diff_ids": ["sha256:1"]}}).encode()
    digest = hashlib.sha256(config).hexdigest()
    name = f"blobs/sha256/{digest}" if oci else f"{digest}.json"
    if manifest is ...:
        manifest = [{"Config": name, "RepoTags": [tag] if tag else None, "Layers": ["layer.tar"]}]
    files = {"layer.tar": os.urandom(200_000), name: config}
    if index is not None:
        files["index.json"] = json.dumps(index).encode()
    if manifest is not None:
        files["manifest.json"] = json.dumps(manifest).encode()
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for path, data in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def packed(data: bytes, codec: str) -> bytes:
    """The data, packed by the real program."""
    command = {"gz": ["gzip", "-c"], "zst": ["zstd", "-qc"], "none": ["cat"]}[codec]
    return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout


def config_digest(data: bytes) -> str:
    """The image id that the tar's manifest names."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        content = tar.extractfile("manifest.json")
        assert content
        config = str(json.load(content)[0]["Config"])
    return "sha256:" + Path(config).name.removesuffix(".json")


@pytest.fixture
def any_machine(
    undrawn: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine makes no run of bench.py invalid, except in tests of just that."""
    from load import metrics

    if "real_limits" not in request.fixturenames:
        monkeypatch.setattr(metrics, "SLOW_CLIENT", math.inf)
        monkeypatch.setattr(metrics, "BLURRED", 1.0)


@pytest.fixture
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn, which takes longer than most runs, except where a test needs pictures."""
    from report import render, side_by_side

    for module in (render, side_by_side) if "pictures" not in request.fixturenames else ():
        monkeypatch.setattr(module, "draw", lambda charts, **files: [])


@pytest.fixture
def pictures() -> None:
    """Pictures are drawn in spite of `undrawn`."""


@pytest.fixture
def real_limits() -> None:
    """Keep the limits on what the client may add, which `any_machine` lifts."""


@pytest.fixture
def same_signals() -> Iterator[None]:
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def certificate(tmp_path: Path) -> ssl.SSLContext:
    """A server's certificate that nobody trusts."""
    if not shutil.which("openssl"):
        assert not CI, "openssl is needed in CI"
        pytest.skip("openssl is not installed")
    key, pem = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", key, "-out", pem], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, key)
    return context
