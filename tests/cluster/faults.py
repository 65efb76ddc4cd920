"""What goes wrong, and what the user sees of it: every fault in every phase, on a real cluster.

    make faults                    # all cells; the table of docs/faults.md at the end
    make faults FAULTS=slurmd      # those whose name has this word (several: a,b)
    make faults FAULTS=scancel:serving
    make faults RUNTIME=pyxis      # the same under pyxis (pyxis_faults.py): docs/faults-pyxis.md

A fault is a row of `FAULTS`: how it is brought about, how it is undone, and for each phase what
must come of it. The same rows are tests (test_matrix.py: a phase of each) and docs/faults.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from common.talk import whole_file
from tests.cluster.cluster import Cluster, ClusterError, Machine, wait_until, why_not
from tests.cluster.launches import (
    PYTHON,
    QUICK,
    REPO,
    SLOW,
    TAG,
    TARBALL,
    WHOLE,
    Launch,
    TerminalLaunch,
    forget_image,
    prepare,
    serve_args,
    strangers,
    traces,
)

NODE_SIDE = 15.0  # seconds in which a node whose launcher was killed has cleaned up by itself


@dataclass(frozen=True)
class Runtime:
    """What is different where servers are contained in another way."""

    image: Path = TARBALL
    unpacker: str = "pigz"  # stands still while an image is being unpacked
    process: str = "docker-init"  # is there for as long as a container is


@dataclass
class Scene:
    """One cell while it is played: the cluster, the launch and whatever else was started."""

    cluster: Cluster
    workspace: Path
    launches: list[Launch] = field(default_factory=list)
    undo: list[Callable[[], object]] = field(default_factory=list)
    runtime: Runtime = Runtime()

    @property
    def n1(self) -> Machine:
        return self.cluster.nodes["n1"]

    @property
    def n2(self) -> Machine:
        return self.cluster.nodes["n2"]

    @property
    def launch(self) -> Launch:
        return self.launches[0]

    def start(self, fault: Fault, env: dict[str, str], *args: str) -> None:
        kind = TerminalLaunch if fault.terminal else Launch
        fault.prepare(self)
        self.start_one(self.words(*args, *fault.args), WHOLE, {**env, **fault.env}, kind)

    def words(self, *args: str) -> list[str]:
        """The launcher's command line; its last two are --tp_size 8."""
        script, model = [PYTHON, str(REPO / "run_sbatch.py")], serve_args()[2:]
        return [*script, "-v", "--image", str(self.runtime.image), model[0], *args, *model[1:]]

    def start_one(
        self, words: list[str], salloc: str, env: dict[str, str], kind: type[Launch] = Launch
    ) -> None:
        command = [*(["salloc", *salloc.split()] if salloc else []), *words]
        self.launches.append(kind(self.cluster, self.workspace, command, env))

    def mend(self) -> None:
        """Undo what the fault did; every daemon runs again."""
        while self.undo:
            self.undo.pop()()
        for node in self.cluster.nodes.values():
            if "dockerd" not in node.daemons:
                node.start_dockerd()
            if "slurmd" not in node.daemons:
                node.start_slurmd()

    def freeze(self, node: Machine, program: str) -> None:
        """Stop a program in its tracks until the scene is over."""
        node.run("pkill", "-STOP", "--exact", program)
        self.undo.append(lambda: thaw(node, program))


def thaw(node: Machine, program: str) -> None:
    node.run("pkill", "-CONT", "--exact", program, check=False)


# --- phases: how far the launch has come when it is struck ---------------------------------------


def before(scene: Scene, fault: Fault) -> None:
    """The fault is there when the launch is started."""


def in_preflight(scene: Scene, fault: Fault) -> None:
    """One that takes long, because a Docker daemon does not answer."""
    scene.freeze(scene.n2, "dockerd")
    scene.start(fault, SLOW)
    scene.launch.until('"Survey": {')
    time.sleep(0.3)


def in_image_load(scene: Scene, fault: Fault) -> None:
    """One that would not end: its unpacker on n2 stands still, for a model over both nodes."""
    forget_image(scene.cluster)
    scene.start(fault, SLOW, "--pp_size", "2")
    wait_until(lambda: is_unpacking(scene.n2), f"a load on n2\n{scene.launch.output}")
    scene.freeze(scene.n2, "pigz")
    wait_until(lambda: is_unpacking(scene.n1) or has_image(scene.n1), "n1's load, begun or over")


def has_image(node: Machine) -> bool:
    return node.run("docker", "image", "inspect", TAG, check=False).returncode == 0


def is_unpacking(node: Machine) -> bool:
    # By its arguments, which the remains of an earlier one, waiting for nobody, do not have.
    return node.run("pgrep", "--full", "--exact", "pigz -dc", check=False).returncode == 0


def in_engine_loading(scene: Scene, fault: Fault) -> None:
    scene.start(fault, SLOW)
    scene.launch.until("SIMULATOR")


def in_serving(scene: Scene, fault: Fault) -> None:
    """With an engine that takes no notice of SIGTERM, as real ones do when they hang."""
    scene.start(fault, {**QUICK, "TRTLLM_SIM_FAULT": "ignore-term"})
    scene.launch.until("READY")


def in_stopping(scene: Scene, fault: Fault) -> None:
    """Told to stop, and not done with it, because the head's Docker daemon takes its time."""
    in_serving(scene, fault)
    scene.freeze(scene.n1, "dockerd")
    scene.launch.send(signal.SIGINT)
    removing = ("pgrep", "--full", "docker ps --all --quiet")  # what is ours, before it is removed
    wait_until(lambda: not scene.n1.run(*removing, check=False).returncode, "docker ps")


def in_two_nodes(scene: Scene, fault: Fault) -> None:
    """Serving, one model spread over both nodes."""
    scene.start(fault, QUICK, "--pp_size", "2")
    scene.launch.until("READY")


PHASES: dict[str, Callable[[Scene, Fault], None]] = {
    "before the launch": before,
    "preflight": in_preflight,
    "image load": in_image_load,
    "engine loading": in_engine_loading,
    "serving": in_serving,
    "serving on 2 nodes": in_two_nodes,
    "stopping": in_stopping,
}
ALL = ("preflight", "image load", "engine loading", "serving", "stopping")
UP = ("engine loading", "serving")


# --- faults --------------------------------------------------------------------------------------


def interrupt(scene: Scene) -> None:
    scene.launch.send(signal.SIGINT)


def send(signum: int) -> Callable[[Scene], None]:
    return lambda scene: scene.launch.send(signum)


@dataclass(frozen=True)
class Expect:
    """What must come of a fault in these phases."""

    phases: tuple[str, ...]
    says: tuple[str, ...]  # words of the error, or of the whole output where there is no error
    codes: tuple[int, ...]
    within: float  # seconds from the fault to the end
    left: str = ""  # what stays behind until the fault has ended, and {} seconds longer
    heals: float = NODE_SIDE  # seconds after that, in which nothing of ours is left
    serves: bool = False  # it is survived: the server answers, and is stopped by ^C afterwards
    stop: Callable[[Scene], object] = interrupt  # how what is survived is ended


@dataclass(frozen=True)
class Fault:
    name: str
    strike: Callable[[Scene], object]
    expects: tuple[Expect, ...]
    terminal: bool = False
    env: dict[str, str] = field(default_factory=dict)
    args: tuple[str, ...] = ()
    holds: bool = False  # it lasts; else a daemon that takes its time to stop goes on after it
    prepare: Callable[[Scene], object] = lambda scene: None
    ci: tuple[str, ...] | None = None  # the phases that `make check` plays; None: one of them


@dataclass(frozen=True)
class Cell:
    fault: Fault
    phase: str
    expect: Expect
    begin: Callable[[Scene, Fault], None]
    runtime: Runtime = Runtime()

    @property
    def name(self) -> str:
        return f"{self.fault.name}:{self.phase}"

    @property
    def ci(self) -> bool:
        if self.fault.ci is not None:
            return self.phase in self.fault.ci
        phases = [phase for expect in self.fault.expects for phase in expect.phases]
        return self.phase == ("serving" if "serving" in phases else phases[0])


@dataclass(frozen=True)
class Outcome:
    says: str
    code: int
    seconds: float
    left: str


def interrupt_twice(scene: Scene) -> None:
    scene.launch.send(signal.SIGINT)
    time.sleep(0.05)
    scene.launch.send(signal.SIGINT)


def interrupt_group(scene: Scene) -> None:
    """^C at a terminal whose foreground job is `salloc python run_sbatch.py`."""
    os.killpg(scene.launch.process.pid, signal.SIGINT)


def type_interrupt(scene: Scene) -> None:
    assert isinstance(scene.launch, TerminalLaunch)
    scene.launch.type(b"\x03")


def close_terminal(scene: Scene) -> None:
    assert isinstance(scene.launch, TerminalLaunch)
    scene.launch.hang_up()


def warn(scene: Scene) -> None:
    """What Slurm sends some time before the limit where the job has --signal=USR1@120."""
    scene.cluster.ctl.run("scancel", "--signal=USR1", scene.launch.job)


def suspend(scene: Scene) -> None:
    """For longer than a node's silence is borne."""
    scene.cluster.ctl.run("scontrol", "suspend", scene.launch.job)
    time.sleep(12)
    scene.cluster.ctl.run("scontrol", "resume", scene.launch.job)
    scene.launch.until("is resumed")


def truncate_log(scene: Scene) -> None:
    """As logrotate's copytruncate does it."""
    os.truncate(scene.workspace / f"logs/trtllm_server_{scene.launch.job}.log", 0)


def cancel(scene: Scene) -> None:
    scene.cluster.ctl.run("scancel", scene.launch.job)


def end_time(scene: Scene) -> None:
    scene.cluster.ctl.run("scontrol", "update", f"JobId={scene.launch.job}", "EndTime=now")


def signal_salloc(signum: int) -> Callable[[Scene], None]:
    return lambda scene: os.kill(scene.launch.process.pid, signum)


def stop_dockerd(name: str) -> Callable[[Scene], None]:
    """As `systemctl stop docker`; the containers live on, as live-restore wants it."""

    def strike(scene: Scene) -> None:
        node = scene.cluster.nodes[name]
        node.stop("dockerd")
        thaw(node, scene.runtime.unpacker)  # a load goes on as far as it can

    return strike


def restart_dockerd(scene: Scene) -> None:
    scene.n1.stop("dockerd")
    scene.n1.start_dockerd()


def stop_slurmd(name: str) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        node = scene.cluster.nodes[name]
        node.stop("slurmd", signal.SIGKILL)
        thaw(node, scene.runtime.unpacker)

    return strike


def unplug(name: str) -> Callable[[Scene], None]:
    """The node's link goes down: it lives, and nobody reaches it."""

    def strike(scene: Scene) -> None:
        link = ("ip", "link", "set", f"to-{name}")
        scene.undo.append(lambda: scene.cluster.ctl.run(*link, "up"))
        scene.cluster.ctl.run(*link, "down")

    return strike


def unplugged_interrupt(name: str) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        unplug(name)(scene)
        interrupt(scene)

    return strike


def container_of(scene: Scene, node: str = "n1") -> str:
    return f"trtllm-{scene.launch.job}-{node}"


def docker(*command: str, node: str = "n1") -> Callable[[Scene], str]:
    """A docker command to the launch's container on a node."""
    return lambda scene: scene.cluster.nodes[node].docker(*command, container_of(scene, node))


def read_only(scene: Scene) -> None:
    """On every machine the workspace can be written to no more, but by files that are open."""
    folder = str(scene.workspace)
    for machine in (scene.cluster.ctl, *scene.cluster.nodes.values()):
        machine.run("mount", "--bind", folder, folder)
        scene.undo.append(partial(machine.run, "umount", "--lazy", folder, cwd="/"))
        machine.run("mount", "-o", "remount,bind,ro", folder)


def small_file_system(scene: Scene) -> None:
    """The workspace as the login node sees it is a file system of its own."""
    mount = ("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(scene.workspace))
    scene.undo.append(lambda: scene.cluster.ctl.run("umount", "--lazy", str(scene.workspace)))
    scene.cluster.ctl.run(*mount)


def fill(scene: Scene) -> None:
    command = ("sh", "-c", "cat /dev/zero >fill; true")
    scene.cluster.ctl.run(*command, cwd=str(scene.workspace))


def replaced_tarball(how: Callable[[Path], object]) -> Callable[[Scene], None]:
    """The tarball changes under the nodes that load it; afterwards it is what it was."""

    def strike(scene: Scene) -> None:
        kept = TARBALL.with_suffix(".kept")
        shutil.copy2(TARBALL, kept)
        scene.undo.append(lambda: kept.replace(TARBALL))
        how(TARBALL)
        thaw(scene.n2, scene.runtime.unpacker)

    return strike


def rename_over(tarball: Path) -> None:
    with whole_file(tarball) as file:
        file.write("another one")


def race_in_one_job(scene: Scene) -> None:
    """Two launches in one allocation, at the same moment."""
    scene.start_one(["sleep", "1000"], WHOLE, {})
    scene.launch.until("Granted")
    wait_until(lambda: "SLURM_JOB_ID" in scene.launch.allocation, "salloc's child")
    slurm = scene.launch.allocation
    for port in ("8000", "8001"):
        scene.start_one(scene.words("--port", port), "", {**slurm, **LOAD_3_S})
    await_loser(scene, scene.launches[1:])


def race_for_a_port(scene: Scene) -> None:
    """Two jobs that share the nodes and ask for the same port, the one a little later."""
    words = [*scene.words()[:-1], "4"]
    scene.start_one(words, HALF, LOAD_3_S)
    scene.start_one(words, HALF, {"TRTLLM_SIM_LOAD_SECONDS": "8"})
    await_loser(scene, scene.launches)


def race_for_the_image(scene: Scene) -> None:
    """Two jobs that share the nodes load the same image, at the same moment."""
    forget_image(scene.cluster)
    for port in ("8001", "8000"):
        scene.start_one([*scene.words()[:-1], "4", "--port", port], HALF, QUICK)
    for launch in scene.launches:
        launch.until("READY")
    other = scene.launches.pop()
    other.send(signal.SIGINT)
    assert other.code() == 130, other.output


def await_loser(scene: Scene, launches: Sequence[Launch]) -> None:
    """One of two launches has to serve, undisturbed; the other, now `scene.launch`, may not."""
    wait_until(lambda: any(each.process.poll() is not None for each in launches), "a loser")
    loser, winner = sorted(launches, key=lambda each: each.process.poll() is None)
    assert "READY" not in loser.output, loser.output
    winner.until("READY")
    time.sleep(1)  # the loser has cleaned up by now, and the winner is still there
    check_serves(scene, winner)
    winner.send(signal.SIGINT)
    assert winner.code() == 130, winner.output
    scene.launches.insert(0, loser)


def keep_busy(scene: Scene) -> None:
    """A client whose answer takes far longer than the probe behind it may in an idle server."""
    body = {"model": "org/model", "prompt": "x", "max_tokens": 10_000, "ignore_eos": True}
    url = f"{url_of(scene.launch)}/v1/completions"
    script = f"from common.ask import ask; ask({url!r}, 1000, body={body})"
    client = scene.cluster.ctl.popen(PYTHON, "-c", script, cwd=str(REPO))
    wait_until(lambda: '"WatchClients": {' in scene.launch.output, "a probe that has to wait")
    time.sleep(6)
    client.kill()
    client.wait()


def set_clock(seconds: int) -> Callable[[Scene], None]:
    """The clock of the launcher and of its scripts on the nodes jumps; the kernel's does not."""

    def strike(scene: Scene) -> None:
        write_clock(seconds)
        scene.undo.append(lambda: write_clock(0))

    return strike


def write_clock(seconds: int) -> None:
    with whole_file(CLOCK) as file:
        file.write(f"{seconds:+d}")


def stepped_clock(_: Scene) -> None:
    """The library that lies about the wall clock, and nothing to lie about yet."""
    if not STEPPED_CLOCK.exists():
        source = str(REPO / "tests/cluster/stepped_clock.c")
        subprocess.run(["gcc", "-shared", "-fPIC", "-O", "-o", STEPPED_CLOCK, source], check=True)
    write_clock(0)


CLOCK, STEPPED_CLOCK = Path("/fsx/clock"), Path("/fsx/stepped_clock.so")
STEPPED = {"LD_PRELOAD": str(STEPPED_CLOCK), "STEPPED_CLOCK": str(CLOCK)}
HALF = "-N2 --gpus-per-node=4 --ntasks-per-node=1"
LOAD_3_S = {"TRTLLM_SIM_LOAD_SECONDS": "3"}
UNTIL = "its container, until {{:.0f}} s after {}"
RECORDS = "its records in logs/, until {:.0f} s after they could be removed"
BACK = UNTIL.format("the node was back")
DIED = ("n1: trtllm-serve ended with ",)

FAULTS: tuple[Fault, ...] = (
    # The launcher is told to stop, or ended.
    Fault("SIGINT to the launcher", send(signal.SIGINT), (
        Expect(ALL, ("stopped by SIGINT",), (130,), 20),)),
    Fault("SIGINT twice", interrupt_twice, (Expect(ALL, ("stopped by SIGINT",), (130,), 20),)),
    Fault("SIGTERM to the launcher", send(signal.SIGTERM), (
        Expect(ALL[:-1], ("stopped by SIGTERM",), (143,), 10),
        Expect(ALL[-1:], ("stopped by SIGINT",), (130,), 20)), ci=ALL),
    Fault("SIGHUP to the launcher", send(signal.SIGHUP), (
        Expect(ALL[:-1], ("stopped by SIGHUP",), (129,), 10),
        Expect(ALL[-1:], ("stopped by SIGINT",), (130,), 20))),
    Fault("SIGKILL to the launcher", send(signal.SIGKILL), (
        Expect(ALL, (), (0, 137), 10),), ci=ALL),
    Fault("^C of salloc", interrupt_group, (Expect(ALL, (), (1, 130), 20),)),
    Fault("^C at a terminal", type_interrupt, (
        Expect(ALL, ("stopped by SIGINT",), (130,), 20),), terminal=True),
    Fault("terminal closed", close_terminal, (Expect(ALL, (), (1, 129, -1), 20),), terminal=True),
    # Slurm ends the job.
    Fault("scancel", cancel, (
        Expect(ALL[:-1], ("Slurm ended the ",), (1,), 20),
        Expect(ALL[-1:], ("stopped by SIGINT",), (1, 130), 20)), ci=ALL),
    Fault("time limit", end_time, (Expect(("image load", "serving"), (), (1, 129, 137, 143), 70),),
        ci=()),
    Fault("salloc terminated", signal_salloc(signal.SIGTERM), (
        Expect(("image load", "serving"), ("Slurm ended the ",), (1,), 10),)),
    Fault("salloc killed", signal_salloc(signal.SIGKILL), (
        Expect(("serving",), (), (-9,), 10, serves=True, stop=cancel),)),
    # The container.
    Fault("container killed", docker("kill"), (
        Expect(UP, (*DIED, "exit code 137 (killed"), (1,), 3),)),
    Fault("container killed on the 2nd node", docker("kill", node="n2"), (
        Expect(("serving on 2 nodes",), ("n2 (ranks 8-15): its container ended",), (1,), 10),)),
    Fault("container out of memory", docker("update", "--memory=200m", "--memory-swap=200m"), (
        Expect(("serving",), (*DIED, "exit code 137 (killed"),
               (1,), 15),), env={"TRTLLM_SIM_FAULT": "out-of-memory:6"}),
    Fault("docker stop", docker("stop", "--time=2"), (
        Expect(("engine loading",), (*DIED, "terminated"), (1,), 5),
        Expect(("serving",), (*DIED, "exit code 137"), (1,), 5)), ci=("engine loading",)),
    # Docker.
    Fault("dockerd stopped on the 2nd node", stop_dockerd("n2"), (
        Expect(("before the launch",), ("n2: Docker does not answer: Cannot connect",), (1,), 15),
        Expect(("image load",), ("n2: docker load: ",), (1,), 20),
        Expect(("serving on 2 nodes",), ("n2 (ranks 8-15)",), (1,), 20)), ci=()),
    Fault("dockerd stopped", stop_dockerd("n1"), (
        Expect(UP, ("n1: ",), (1,), 20),), ci=()),
    Fault("dockerd hangs", lambda scene: scene.freeze(scene.n1, "dockerd"), (
        Expect(("before the launch",), ("n1: Docker does not answer: no answer within",), (1,), 25),
        Expect(("stopping",), ("may be there still (Docker does not answer)",),
               (130,), 20, left=UNTIL.format("Docker answered"))),
        holds=True, ci=()),
    Fault("dockerd restarted", restart_dockerd, (Expect(UP, ("n1: ",), (1,), 20),), ci=()),
    # Slurm's daemon of a node.
    Fault("slurmd stopped on the 2nd node", stop_slurmd("n2"), (
        Expect(("before the launch",), ("n2",), (1,), 30),
        Expect(("image load",), ("n2",), (1,), 70),
        Expect(("serving",), (), (130,), 30, serves=True),
        Expect(("serving on 2 nodes",), ("n2 (ranks 8-15): its slurmd",), (1,), 30)),
        env=QUICK, ci=("before the launch", "serving")),
    Fault("slurmd stopped", stop_slurmd("n1"), (
        Expect(("serving",), (), (130,), 30, serves=True),)),
    Fault("Slurm's warning signal (USR1)", warn, (
        Expect((*UP, "serving on 2 nodes"), (), (130,), 10, serves=True),), env=LOAD_3_S),
    Fault("job suspended for 12 s", suspend, (
        Expect(("serving on 2 nodes",), ("is suspended", "is resumed"), (130,), 10,
               serves=True),), ci=()),
    # The network.
    Fault("2nd node unreachable", unplug("n2"), (
        Expect(("before the launch",), ("n2: Slurm cannot start anything there",), (1,), 20),
        Expect(("image load",), ("n2: Slurm has lost this node",), (1,), 70, heals=90),
        Expect(("serving on 2 nodes",), ("n2 (ranks 8-15)",), (1,), 40, left=BACK, heals=90)),
        ci=()),
    Fault("node unreachable", unplug("n1"), (
        Expect(UP, ("n1: ",), (1,), 90, left=BACK, heals=90),), ci=()),
    Fault("^C while a node is unreachable", unplugged_interrupt("n1"), (
        Expect(UP, ("could not confirm that the container is gone", "stopped by SIGINT"),
               (130,), 20, left=BACK, heals=90),), ci=()),
    Fault("^C while the 2nd node is unreachable", unplugged_interrupt("n2"), (
        Expect(("image load",), ("stopped by SIGINT",), (130,), 20, heals=90),
        Expect(("serving on 2 nodes",), ("n2: the container trtllm-", "may be there still"),
               (130,), 20, left=BACK, heals=90)), ci=()),
    # The shared file system.
    Fault("file system read-only", read_only, (
        Expect(("before the launch",), ("logs cannot be written to: Read-only",), (1,), 5),
        Expect(UP, ("run_",), (130,), 10, serves=True, left=RECORDS)),
        env=LOAD_3_S, ci=("before the launch", "serving")),
    Fault("file system full", fill, (
        Expect(UP, (), (130,), 10, serves=True),), prepare=small_file_system, env=LOAD_3_S),
    # The image.
    Fault("tarball replaced by rename", replaced_tarball(rename_over), (
        Expect(("image load",), (), (130,), 30, serves=True),), env=QUICK),
    Fault("tarball removed", replaced_tarball(Path.unlink), (
        Expect(("image load",), (), (130,), 30, serves=True),), env=QUICK),
    Fault("tarball written over", replaced_tarball(lambda p: p.write_bytes(b"another")), (
        Expect(("image load",), ("n2: ", "is truncated or corrupt"), (1,), 30),)),
    # Two launches at the same moment.
    Fault("two launches in one job", race_in_one_job, (
        Expect(("before the launch",), ("another launch of job",), (1,), 60),)),
    Fault("two jobs, one port", race_for_a_port, (
        Expect(("before the launch",), ("n1: another server took",), (1,), 60),)),
    Fault("two jobs, one image", race_for_the_image, (
        Expect(("before the launch",), (), (130,), 60, serves=True),)),
    # The clock.
    Fault("clock set an hour ahead", set_clock(3600), (
        Expect(("image load", "engine loading", "serving"), (), (130,), 30, serves=True),
        Expect(("stopping",), ("stopped by SIGINT",), (130,), 20),),
        env={**STEPPED, **LOAD_3_S}, prepare=stepped_clock),
    Fault("clock set an hour back", set_clock(-3600), (
        Expect(("image load", "engine loading", "serving"), (), (130,), 30, serves=True),
        Expect(("stopping",), ("stopped by SIGINT",), (130,), 20),),
        env={**STEPPED, **LOAD_3_S}, prepare=stepped_clock),
    # The engine.
    Fault("engine exits", lambda _: None, (
        Expect(("engine loading",), (*DIED, "exit code 3", "before it was ready"), (1,), 5),),
        env={"TRTLLM_SIM_FAULT": "exit-loading:3", "TRTLLM_SIM_LOAD_SECONDS": "2"}),
    Fault("engine exits while serving", lambda _: None, (
        Expect(("serving",), (*DIED, "exit code 7", "while serving"), (1,), 5),),
        env={"TRTLLM_SIM_FAULT": "exit-serving:7:3"}),
    Fault("engine hangs", lambda _: None, (
        Expect(("engine loading",), ("n1: the server was not ready within 2 s",), (1,), 10),),
        env={"TRTLLM_SIM_FAULT": "hang-loading"}, args=("--ready-timeout", "2")),
    Fault("engine accepts and never answers", lambda _: None, (
        Expect(("engine loading",), ("n1: the server was not ready within 4 s",), (1,), 10),),
        env={**QUICK, "TRTLLM_SIM_FAULT": "hang"}, args=("--ready-timeout", "4")),
    Fault("engine answers 503 for ever", lambda _: None, (
        Expect(("serving",), ("n1: the server is up but no longer serves",
                              "/health answered 503"), (1,), 45),),
        env={"TRTLLM_SIM_FAULT": "503:1"}, ci=()),
    Fault("engine stops answering", lambda _: None, (
        Expect(("serving",), ("n1: the server is up but no longer serves",
                              "/health did not answer"), (1,), 110),),
        env={"TRTLLM_SIM_FAULT": "hang:1"}, ci=()),
    Fault("engine fails behind a good /health", lambda _: None, (
        Expect(("serving",), ("n1: the server is up but no longer serves: 3 requests for one token "
                              "in a row failed",), (1,), 15),),
        env={"TRTLLM_SIM_FAULT": "broken-engine:3", "PROBE_SECONDS": "1"}),
    Fault("hung engine core", lambda _: None, (
        Expect(("serving", "serving on 2 nodes"), ("n1: the server is up but no longer serves: it "
               "is idle, and in ",), (1,), 20),),
        env={"TRTLLM_SIM_FAULT": "stuck-engine:2", "PROBE_SECONDS": "1", "PROBE_TIMEOUT": "5"}),
    Fault("queue longer than PROBE_TIMEOUT", keep_busy, (
        Expect(("serving", "serving on 2 nodes"), ('"WatchClients": {',), (130,), 10,
               serves=True),),
        env={"TRTLLM_SIM_ITL_MS": "100", "PROBE_SECONDS": "1", "PROBE_TIMEOUT": "2"},
        args=("--max_batch_size", "1"), ci=()),
    # What it writes.
    Fault("log truncated in place", truncate_log, (
        Expect(("serving",), (), (130,), 10, serves=True),)),
    Fault("log flood of 100 MB/s", lambda _: time.sleep(3), (
        Expect(("engine loading", "serving"), (), (130,), 10, serves=True),),
        env={"TRTLLM_SIM_FAULT": "log-flood:100", "TRTLLM_SIM_LOAD_SECONDS": "3"}),
    Fault("binary and megabyte-long log lines", lambda _: None, (
        Expect(("engine loading", "serving"), (), (130,), 10, serves=True),),
        env={"TRTLLM_SIM_FAULT": "binary-log", "TRTLLM_SIM_LOAD_SECONDS": "2"}),
)  # fmt: skip

CELLS = [Cell(f, p, e, PHASES[p]) for f in FAULTS for e in f.expects for p in e.phases]


# --- the runner ----------------------------------------------------------------------------------


def play(cell: Cell, cluster: Cluster, slack: float = 1) -> Outcome:
    """Bring a launch to the phase, strike, and check all that must come of it.

    With `slack`, everything may take so many times as long: the machine is busy with more.
    """
    before = strangers(cluster)
    with scene_of(cluster, cell) as scene:
        code, took = strike(cell, scene)
        output = scene.launch.output
        check_words(cell, output)
        assert code in cell.expect.codes, f"exit code {code}\n{output}"
        assert took <= cell.expect.within * slack, f"{took:.1f} s\n{output}"
        check_left(cell, scene)
        scene.mend()
        left = what_is_left(cell, scene, slack)
    assert strangers(cluster) == before, "what is others' was touched"
    return Outcome(seen(cell, output), code, took, left)


def strike(cell: Cell, scene: Scene) -> tuple[int, float]:
    """The exit code, and the seconds from the fault until the launcher has ended."""
    cell.begin(scene, cell.fault)
    struck, pid = time.monotonic(), scene.launches and scene.launch.pid
    cell.fault.strike(scene)
    if cell.phase == "stopping" and not cell.fault.holds:
        scene.mend()
    if not scene.launches:
        struck = time.monotonic()
        scene.start(cell.fault, QUICK)
    if cell.expect.serves:
        thaw(scene.n2, scene.runtime.unpacker)
        check_serves(scene, scene.launch)
        struck = time.monotonic()
        cell.expect.stop(scene)
    code = scene.launch.code()
    if pid:  # salloc may end before what it has started
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the end")
    return code, time.monotonic() - struck


@contextlib.contextmanager
def scene_of(cluster: Cluster, cell: Cell) -> Iterator[Scene]:
    """A scene; afterwards what it broke is whole again, and every launch has ended."""
    workspace = Path("/fsx/work") / re.sub(r"\W+", "-", cell.name)
    workspace.mkdir(parents=True)
    scene = Scene(cluster, workspace, runtime=cell.runtime)
    try:
        yield scene
    finally:
        try:
            scene.mend()
            for launch in scene.launches:
                end(launch)
        finally:
            shutil.rmtree(workspace, ignore_errors=True)
        resume(cluster)
        wait_until(cluster.idle, "all nodes idle")


def end(launch: Launch) -> None:
    """Whatever has become of it, it ends.

    One thing at a time: salloc 22.05 can wait for ever for a command that ended meanwhile.
    """
    if launch.process.poll() is None:
        with contextlib.suppress(ClusterError, OSError):
            launch.send(signal.SIGTERM)
            launch.code()
    if launch.job:
        launch.cluster.ctl.run("scancel", "--quiet", launch.job, check=False)
    launch.code()


def resume(cluster: Cluster) -> None:
    """Nodes that Slurm has given up for a while are there again."""
    if not cluster.idle():
        names = ",".join(cluster.names)
        cluster.ctl.run("scontrol", "update", f"NodeName={names}", "State=RESUME", check=False)


def check_serves(scene: Scene, launch: Launch) -> None:
    launch.until("READY")
    host, _, port = url_of(launch).removeprefix("http://").rpartition(":")
    smoke = (PYTHON, str(REPO / "test.py"), "-H", host, "-p", port)
    assert "8/8" in scene.cluster.ctl.run(*smoke, check=False).stdout, launch.output


def url_of(launch: Launch) -> str:
    return launch.output.partition("READY after ")[2].split()[2]


def check_words(cell: Cell, output: str) -> None:
    error = error_of(output)
    for word in cell.expect.says:
        assert word in (error or output), f"{word!r} is not said\n{output}"
    assert "Traceback" not in output, output


def error_of(output: str) -> str:
    return output.partition("] ERROR ")[2]


def check_left(cell: Cell, scene: Scene) -> None:
    """What the fault is expected to keep is there."""
    if cell.expect.left == RECORDS:
        assert list(scene.workspace.rglob("run_*.json"))
    elif cell.expect.left:  # seen by its first process, as Docker may be mute
        seek = ("pgrep", "--exact", scene.runtime.process)
        found = [n.run(*seek, check=False).stdout for n in scene.cluster.nodes.values()]
        assert any(found), "no container is left, though one was expected"


def what_is_left(cell: Cell, scene: Scene, slack: float) -> str:
    """Nothing may be; where the fault kept a node from cleaning up, nothing soon after its end."""
    ended = time.monotonic()
    with contextlib.suppress(ClusterError):
        heals = cell.expect.heals * slack
        wait_until(lambda: not traces(scene.cluster, scene.workspace), "nothing", heals)
    took = time.monotonic() - ended
    assert not (found := traces(scene.cluster, scene.workspace)), found
    return cell.expect.left.format(took) if cell.expect.left else "nothing"


def seen(cell: Cell, output: str) -> str:
    """The sentence the user reads, without what differs from launch to launch."""
    if cell.expect.serves:
        return "nothing: it serves on"
    told = re.findall(r"\[[\d:]+\] (stopped by .*\S)", output.replace("\r", ""))
    text = error_of(output).partition("\n")[0].strip() or (told or ["nothing"])[-1]
    for pattern, word in VOLATILE:
        text = re.sub(pattern, word, text)
    return text


VOLATILE = (
    (r"/fsx/work/[^/ ]+/", ""),
    (r"(allocation|job|trtllm|server)([ _-])\d+", r"\1\2JOB"),
    (r"\b\d+\.\d s\b", "N s"),
    (r"`srun [^`]*`", "`srun ...`"),
    (r"\[\d\d/[-\d/:]+\] ", ""),
    (r'time="[^"]*" ', ""),
    (r":\d{5} ", ":PORT "),
)


# --- the command ---------------------------------------------------------------------------------


def chosen(words: str, cells: Sequence[Cell]) -> list[Cell]:
    """The cells whose name has one of the words; all of them where none is given."""
    wanted = [word.strip().lower() for word in words.split(",") if word.strip()]
    return [c for c in cells if not wanted or any(word in c.name.lower() for word in wanted)]


def table(outcomes: Sequence[tuple[Cell, Outcome]]) -> str:
    """Markdown: a row a fault and outcome, its phases together."""
    rows: dict[tuple[str, ...], list[tuple[str, float]]] = {}
    for cell, outcome in outcomes:
        key = (cell.fault.name, outcome.says, str(outcome.code), outcome.left)
        rows.setdefault(key, []).append((cell.phase, outcome.seconds))
    head = ["| fault | phase | what the user sees | exit | seconds | left behind |",
            "|---|---|---|--:|--:|---|"]  # fmt: skip
    return "\n".join([*head, *(row(key, phases) for key, phases in rows.items())])


def row(key: Sequence[str], phases: Sequence[tuple[str, float]]) -> str:
    name, says, code, left = (word.replace("|", r"\|") for word in key)
    where = ", ".join(phase for phase, _ in phases)
    seconds = max(seconds for _, seconds in phases)
    return f"| {name} | {where} | {says} | {code} | {seconds:.1f} | {left} |"


def main(
    argv: Sequence[str] | None = None,
    every: Sequence[Cell] = CELLS,
    prepared: Callable[[Cluster], object] = prepare,
) -> int:
    parser = argparse.ArgumentParser(description="Play the faults on a cluster; print the table.")
    parser.add_argument("words", nargs="?", default=os.environ.get("FAULTS", ""))
    cells = chosen(parser.parse_args(argv).words, every)
    if not cells:
        parser.error("no fault has that in its name")
    if reason := why_not():
        raise SystemExit(f"faults: {reason}")
    outcomes = []
    try:
        with Cluster(nodes=2) as cluster:
            prepared(cluster)
            for cell in cells:
                if outcome := attempt(cell, cluster):
                    outcomes.append((cell, outcome))
    finally:
        print(table(outcomes))
    return 0 if len(outcomes) == len(cells) else 1


def attempt(cell: Cell, cluster: Cluster) -> Outcome | None:
    """Play a cell and say at once how it went; None when it did not go as it must."""
    begun = time.monotonic()
    try:
        outcome = play(cell, cluster)
    except Exception as error:  # the others are played all the same
        print(f"FAILED {cell.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return None
    took = time.monotonic() - begun
    print(f"{cell.name:45} {outcome.code:4} {outcome.seconds:6.1f} s ({took:.1f} s in all)  "
          f"{outcome.says}; left: {outcome.left}", file=sys.stderr, flush=True)  # fmt: skip
    return outcome


if __name__ == "__main__":
    raise SystemExit(main())
