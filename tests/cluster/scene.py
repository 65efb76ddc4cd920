"""Plays one fault: a launch on the cluster is brought to a phase, struck, and checked.

A fault is a row of data (`Fault`): how it is brought about, how it is undone, and for each phase
what must come of it (`Expect`). The rows are in faults.py and fleet_faults.py.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.cluster import Cluster, ClusterError, Machine, wait_until
from tests.cluster.launches import (
    PYTHON,
    QUICK,
    REPO,
    TARBALL,
    WHOLE,
    Launch,
    TerminalLaunch,
    serve_args,
    smoke,
    strangers,
    traces,
)

UNTIL = "its container, until {{:.0f}} s after {}"  # what may be left behind
BACK = UNTIL.format("the node was back")
RECORDS = "its records in logs/, until {:.0f} s after they could be removed"
NODE_SIDE = 15.0  # seconds in which a node whose launcher was killed has cleaned up by itself


@dataclass(frozen=True)
class Runtime:
    """What differs between the ways to contain a server."""

    image: Path = TARBALL
    unpacker: str = "pigz"  # stands still while an image is being unpacked
    process: str = "docker-init"  # runs for as long as its container


@dataclass
class Scene:
    """One cell while it is played: the cluster, the launch and whatever else was started."""

    cluster: Cluster
    workspace: Path
    launches: list[Launch] = field(default_factory=list)
    undo: list[Callable[[], object]] = field(default_factory=list)
    said: int = 0  # how much the launch had said when it was struck
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
        words = self.words(*args, *fault.args, tp=fault.tp)
        self.start_one(words, fault.salloc, {**env, **fault.env}, kind)

    def words(self, *args: str, tp: int = 8) -> list[str]:
        """The launcher's command line."""
        script, model = str(REPO / "run_sbatch.py"), serve_args()[2]
        image = ["--image", str(self.runtime.image)]
        return [PYTHON, script, "-v", *image, model, *args, "--tp_size", str(tp)]

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


def interrupt(scene: Scene) -> None:
    scene.launch.send(signal.SIGINT)


@dataclass(frozen=True)
class Expect:
    """What must come of a fault in these phases."""

    phases: tuple[str, ...]
    says: tuple[str, ...]  # words of the error, or of the whole output if there is no error
    codes: tuple[int, ...]
    within: float  # seconds from the fault to the end
    left: str = ""  # what stays behind until the fault has ended, and {} seconds longer
    heals: float = NODE_SIDE  # seconds after that, in which nothing of ours is left
    serves: bool = False  # it is survived: the server answers, and is stopped by ^C afterwards
    meanwhile: tuple[str, ...] = ()  # what is said of a survived fault; `within` is until then
    asked: bool = True  # of a fleet: clients go on asking
    fails: bool = False  # some of their requests fail
    stop: Callable[[Scene], object] = interrupt  # how a launch that survived is ended


@dataclass(frozen=True)
class Fault:
    name: str
    strike: Callable[[Scene], object]
    expects: tuple[Expect, ...]
    terminal: bool = False
    env: dict[str, str] = field(default_factory=dict)
    args: tuple[str, ...] = ()
    holds: bool = False  # it lasts; else a daemon that delays the end goes on after it
    prepare: Callable[[Scene], object] = lambda scene: None
    ci: tuple[str, ...] | None = None  # the phases that `make check` plays; None: one of them
    fleet: bool = False  # several servers, of which the others go on
    tp: int = 8
    spread: tuple[str, ...] = ("--pp_size", "2")  # what takes a launch to both nodes
    salloc: str = WHOLE


@dataclass(frozen=True)
class Cell:
    fault: Fault
    phase: str
    expect: Expect
    reach: Callable[[Scene, Fault], None]  # brings the launch to the phase
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


# --- how it is played ----------------------------------------------------------------------------


def play(cell: Cell, cluster: Cluster, slack: float = 1) -> Outcome:
    """Bring a launch to the phase, strike, and check all that must come of it.

    With `slack`, everything may take so many times as long, as on a busy machine.
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
        said = seen(cell, scene)
    assert strangers(cluster) == before, "what is others' was touched"
    return Outcome(said, code, took, left)


def strike(cell: Cell, scene: Scene) -> tuple[int, float]:
    """Strike; returns the exit code and the seconds from the fault to the launcher's end.

    If something has to be said of a fault that is survived, they end when that is said.
    """
    cell.reach(scene, cell.fault)
    pid = scene.launches and scene.launch.pid
    scene.said = len(scene.launch.output) if scene.launches else 0
    with asking(cell, scene):
        struck = time.monotonic()
        cell.fault.strike(scene)
        if cell.phase == "stopping" and not cell.fault.holds:
            scene.mend()
        if not scene.launches:
            struck = time.monotonic()
            scene.start(cell.fault, QUICK)
        took = survive(cell, scene, struck)
    if cell.expect.serves:
        struck = time.monotonic()
        cell.expect.stop(scene)
    code = scene.launch.code()
    if pid:  # salloc may end before what it has started
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the end")
    return code, took or time.monotonic() - struck


def survive(cell: Cell, scene: Scene, struck: float) -> float:
    """Check that a survived fault is reported, and that all serves on; returns the seconds."""
    if not cell.expect.serves:
        return 0
    thaw(scene.n2, scene.runtime.unpacker)
    for word in cell.expect.meanwhile:
        scene.launch.until(word, scene.said)
    took = time.monotonic() - struck
    check_serves(scene, scene.launch)
    if cell.fault.fleet:
        check_each(scene)
    return took if cell.expect.meanwhile else 0


@contextlib.contextmanager
def asking(cell: Cell, scene: Scene) -> Iterator[None]:
    """Clients go on asking a fleet that serves on, and their requests have to succeed."""
    asked = cell.fault.fleet and cell.expect.serves and cell.expect.asked
    if not (asked and cell.phase == "serving"):
        yield
        return
    command = (PYTHON, "-m", "tests.cluster.client", url_of(scene.launch))
    client = scene.cluster.ctl.popen(*command, cwd=str(REPO), stdout=subprocess.PIPE, text=True)
    try:
        yield
    finally:
        client.terminate()
        failed, _ = client.communicate()
    assert cell.expect.fails or not failed, f"requests failed:\n{failed}\n{scene.launch.output}"


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
    """End a launch, whatever has become of it.

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
    """Have Slurm take nodes back that it has given up for a while."""
    if not cluster.idle():
        names = ",".join(cluster.names)
        cluster.ctl.run("scontrol", "update", f"NodeName={names}", "State=RESUME", check=False)


def check_serves(scene: Scene, launch: Launch) -> None:
    launch.until("READY")
    check_server(scene, url_of(launch))


def check_each(scene: Scene) -> None:
    """All servers that logs/endpoint.json names have to serve."""
    for replica in json.loads((scene.workspace / "logs/endpoint.json").read_text())["replicas"]:
        check_server(scene, replica["url"])


def check_server(scene: Scene, url: str) -> None:
    said = smoke(scene.cluster, url)
    assert "8/8" in said, f"{url}: {said}\n{scene.launch.output}"


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
    """What the fault is expected to leave behind has to be there."""
    if cell.expect.left == RECORDS:
        assert list(scene.workspace.rglob("run_*.json"))
    elif cell.expect.left:  # seen by its first process, as Docker may be mute
        seek = ("pgrep", "--exact", scene.runtime.process)
        found = [n.run(*seek, check=False).stdout for n in scene.cluster.nodes.values()]
        assert any(found), "no container is left, though one was expected"


def what_is_left(cell: Cell, scene: Scene, slack: float) -> str:
    """Nothing may be left, or not for long after a fault that kept a node from cleaning up."""
    ended = time.monotonic()
    with contextlib.suppress(ClusterError):
        heals = cell.expect.heals * slack
        wait_until(lambda: not traces(scene.cluster, scene.workspace), "nothing", heals)
    took = time.monotonic() - ended
    assert not (found := traces(scene.cluster, scene.workspace)), found
    return cell.expect.left.format(took) if cell.expect.left else "nothing"


def seen(cell: Cell, scene: Scene) -> str:
    """The sentence the user reads, without what differs from launch to launch."""
    output, meanwhile = scene.launch.output.replace("\r", ""), cell.expect.meanwhile
    if cell.expect.serves and not meanwhile:
        return "nothing: it serves on"
    if meanwhile:
        lines = re.findall(r"^\[[\d:]+\] (.*\S)", output[scene.said :], re.M)
        told = [next(line for line in lines if word in line) for word in meanwhile]
        text = "; ".join(dict.fromkeys(told))
    else:
        told = re.findall(r"\[[\d:]+\] (stopped by .*\S)", output)
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
    (r"pid=\d+", "pid=PID"),
)
