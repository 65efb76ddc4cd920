"""How to break a launch, and how to bring it to each phase before that."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from common.talk import whole_file
from tests.cluster.cluster import Machine, wait_until
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
)
from tests.cluster.scene import (
    Cell,
    Fault,
    Scene,
    check_serves,
    interrupt,
    thaw,
    url_of,
)

CLOCK, STEPPED_CLOCK = Path("/fsx/clock"), Path("/fsx/stepped_clock.so")
STEPPED = {"LD_PRELOAD": str(STEPPED_CLOCK), "STEPPED_CLOCK": str(CLOCK)}
HALF = "-N2 --gpus-per-node=4 --ntasks-per-node=1"
LOAD_3_S = {"TRTLLM_SIM_LOAD_SECONDS": "3"}


# --- phases: how far the launch has come when it is struck ---------------------------------------


def before(scene: Scene, fault: Fault) -> None:
    """The fault is there when the launch is started."""


def in_preflight(scene: Scene, fault: Fault) -> None:
    """A preflight that takes long, because a Docker daemon does not answer."""
    scene.freeze(scene.n2, "dockerd")
    scene.start(fault, SLOW)
    scene.launch.until('"Survey": {')
    time.sleep(0.3)


def in_image_load(scene: Scene, fault: Fault) -> None:
    """An image load that would not end, for a model over both nodes: n2's unpacker stands still."""
    forget_image(scene.cluster)
    scene.start(fault, SLOW, *fault.spread)
    wait_until(lambda: is_unpacking(scene.n2), f"a load on n2\n{scene.launch.output}")
    scene.freeze(scene.n2, "pigz")
    wait_until(lambda: is_unpacking(scene.n1) or has_image(scene.n1), "n1's load, begun or over")


def has_image(node: Machine) -> bool:
    return node.run("docker", "image", "inspect", TAG, check=False).returncode == 0


def is_unpacking(node: Machine) -> bool:
    # By its arguments, which a zombie of an earlier one does not have.
    return node.run("pgrep", "--full", "--exact", "pigz -dc", check=False).returncode == 0


def in_engine_loading(scene: Scene, fault: Fault) -> None:
    scene.start(fault, SLOW)
    scene.launch.until("SIMULATOR")


def in_serving(scene: Scene, fault: Fault) -> None:
    """With an engine that takes no notice of SIGTERM, as real ones do when they hang."""
    scene.start(fault, {**QUICK, "TRTLLM_SIM_FAULT": "ignore-term"})
    scene.launch.until("READY")


def in_stopping(scene: Scene, fault: Fault) -> None:
    """A launch that was told to stop, and is not done because the head's Docker daemon is slow."""
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


def cells_of(faults: Sequence[Fault]) -> list[Cell]:
    """A cell for each phase of each fault."""
    return [
        Cell(fault, phase, expect, PHASES[phase])
        for fault in faults
        for expect in fault.expects
        for phase in expect.phases
    ]


ALL = ("preflight", "image load", "engine loading", "serving", "stopping")
UP = ("engine loading", "serving")


# --- faults --------------------------------------------------------------------------------------


def send(signum: int) -> Callable[[Scene], None]:
    return lambda scene: scene.launch.send(signum)


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
    """Send what Slurm sends before the time limit if the job has --signal=USR1@120."""
    scene.cluster.ctl.run("scancel", "--signal=USR1", scene.launch.job)


def suspend(scene: Scene) -> None:
    """Suspend the job for longer than a node may be silent."""
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
    scene.cluster.ends_now(scene.launch.job)


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
    """Make the workspace read-only on every machine, except through files that are open already."""
    folder = str(scene.workspace)
    for machine in (scene.cluster.ctl, *scene.cluster.nodes.values()):
        machine.run("mount", "--bind", folder, folder)
        scene.undo.append(partial(machine.run, "umount", "--lazy", folder, cwd="/"))
        machine.run("mount", "-o", "remount,bind,ro", folder)


def small_file_system(scene: Scene) -> None:
    """Give the workspace a small file system of its own on the login node."""
    mount = ("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(scene.workspace))
    scene.undo.append(lambda: scene.cluster.ctl.run("umount", "--lazy", str(scene.workspace)))
    scene.cluster.ctl.run(*mount)


def fill(scene: Scene) -> None:
    command = ("sh", "-c", "cat /dev/zero >fill; true")
    scene.cluster.ctl.run(*command, cwd=str(scene.workspace))


def replaced_tarball(how: Callable[[Path], object]) -> Callable[[Scene], None]:
    """Change the tarball under the nodes that load it; afterwards it is put back."""

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
    """Two jobs that share the nodes ask for the same port, one a little later than the other."""
    words = scene.words(tp=4)
    scene.start_one(words, HALF, LOAD_3_S)
    scene.start_one(words, HALF, {"TRTLLM_SIM_LOAD_SECONDS": "8"})
    await_loser(scene, scene.launches)


def race_for_the_image(scene: Scene) -> None:
    """Two jobs that share the nodes load the same image, at the same moment."""
    forget_image(scene.cluster)
    for port in ("8001", "8000"):
        scene.start_one(scene.words("--port", port, tp=4), HALF, QUICK)
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
    """A client whose answer takes far longer than a probe may take in an idle server."""
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
    """Build the library that lies about the wall clock, with nothing to lie about yet."""
    if not STEPPED_CLOCK.exists():
        source = str(REPO / "tests/cluster/stepped_clock.c")
        subprocess.run(["gcc", "-shared", "-fPIC", "-O", "-o", STEPPED_CLOCK, source], check=True)
    write_clock(0)
