"""Faults of several servers behind one address, and what survives them: rows as in faults.py.

Four replicas, r0 and r1 on n1 with the front, r2 and r3 on n2; or a server of each kind and their
orchestrator, all on n1. While a fleet serves on, clients ask it without a pause, and none of their
requests may fail (`asking` in scene.py).
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import yaml

from tests.cluster.cluster import wait_until
from tests.cluster.launches import QUICK, WHOLE
from tests.cluster.scene import BACK, Expect, Fault, Scene, check_serves
from tests.cluster.strikes import (
    ALL,
    LOAD_3_S,
    UP,
    cancel,
    send,
    stop_dockerd,
    stop_slurmd,
    unplug,
    unplugged_interrupt,
)
from tests.test_disagg import CONTEXT, GENERATION

TWO, FOUR = ("--replicas", "2"), ("--replicas", "4")
ONCE = ("--restart", "1")
NO_KILL = f"--no-kill {WHOLE}"  # the job survives the loss of a node
PART = "-w n1 -N1 --gpus-per-node=4"
OLD_FRONT = {"TRTLLM_SIM_LOAD_SECONDS": "6"}  # by then the front is older than STEADY
PROBED = {"PROBE_SECONDS": "1", "PROBE_TIMEOUT": "5"}
POOLS = ("--prefill", "1", "--prefill-config", "prefill.yaml",
         "--decode", "1", "--decode-config", "decode.yaml")  # fmt: skip


def fleet(name: str, strike: Callable[[Scene], object], *expects: Expect, **more: Any) -> Fault:
    given = {"args": FOUR, "tp": 4, "spread": (), **more}
    return Fault(f"fleet: {name}", strike, expects, fleet=True, **given)


def pools(name: str, strike: Callable[[Scene], object], *expects: Expect, **more: Any) -> Fault:
    """A fault of a prefill and a decode server."""
    return fleet(name, strike, *expects, prepare=write_configs, ci=(),
                 **{**more, "args": (*POOLS, *more.get("args", ()))})  # fmt: skip


def write_configs(scene: Scene) -> None:
    for name, config in (("prefill", CONTEXT), ("decode", GENERATION)):
        text = yaml.safe_dump({**config, "tensor_parallel_size": 4})
        (scene.workspace / f"{name}.yaml").write_text(text)


def survived(*meanwhile: str, within: float = 10, phases: tuple[str, ...] = ("serving",),
             **more: Any) -> Expect:  # fmt: skip
    """A fault is survived: this is said of it, while the others serve on."""
    return Expect(phases, (), (130,), within, serves=True, meanwhile=meanwhile, **more)


def ended(*says: str, within: float = 10, phases: tuple[str, ...] = ("serving",)) -> Expect:
    return Expect(phases, says, (1,), within)


# --- faults --------------------------------------------------------------------------------------


def docker(*command: str, name: str, node: str = "n1") -> Callable[[Scene], object]:
    """A docker command to a server's container, once it is there."""

    def strike(scene: Scene) -> None:
        words = (*command, f"trtllm-{scene.launch.job}-{name}-{node}")
        done = lambda: not scene.cluster.nodes[node].run("docker", *words, check=False).returncode  # noqa: E731
        wait_until(done, f"docker {' '.join(words)}")

    return strike


def to_engine(name: str) -> Callable[[Scene], object]:
    """Send a signal to r3's engine. After STOP its HTTP server stands still, too, but the kernel
    still takes connections for it."""
    words = ("pkill", f"-{name}", "--full", r"^\S*python3 \S*/trtllm-serve .*--port 8002")
    return lambda scene: scene.n2.run(*words)


def kill_front(scene: Scene) -> None:
    # By its arguments, which a zombie of an earlier one does not have.
    seek = ("pkill", "-KILL", "--full", "haproxy -db")
    wait_until(lambda: not scene.n1.run(*seek, check=False).returncode, "a front")


def kill_front_twice(scene: Scene) -> None:
    """Kill the second one, too, when it has only just begun."""
    kill_front(scene)
    scene.launch.until("it was restarted", scene.said)
    kill_front(scene)


def squat(scene: Scene) -> None:
    """Have somebody else's server take r3's port."""
    scene.n2.start("squatter", "python3", "-m", "http.server", "8002")
    scene.undo.append(partial(scene.n2.stop, "squatter"))
    wait_until(lambda: ":8002" in scene.n2.run("ss", "-ltn").stdout, "the squatter")


def kill_and_squat(scene: Scene) -> None:
    docker("kill", name="r3", node="n2")(scene)
    scene.launch.until("r3: n2: trtllm-serve ended", scene.said)
    squat(scene)


def begin_two(scene: Scene, *ports: str) -> None:
    """Two jobs with half of n1's GPUs each, and a fleet in each."""
    for port in ports:
        scene.start_one(scene.words(*TWO, "--port", port, tp=2), PART, QUICK)


def share_a_node(scene: Scene) -> None:
    begin_two(scene, "9000", "8000")
    for launch in scene.launches:
        launch.until("stop it with")
    other = scene.launches.pop(0)
    other.send(signal.SIGINT)
    assert other.code() == 130, other.output


def share_ports(scene: Scene) -> None:
    """Both want the same ports: one of them has to serve, undisturbed."""
    begin_two(scene, "8000", "8000")
    wait_until(lambda: any(each.process.poll() is not None for each in scene.launches), "a loser")
    scene.launches.sort(key=lambda each: each.process.poll() is None)
    winner = scene.launches.pop()
    check_serves(scene, winner)
    winner.send(signal.SIGINT)
    assert winner.code() == 130, winner.output


REST = "3 of 4 replicas go on"
HALF = "2 of 4 replicas go on"
KILLED = "trtllm-serve ended with exit code 137 (killed)"
R3_BACK = ("r3: n2: trtllm-serve ended with exit code 137", "r3: ready after")
OTHERS_END = "the others are ended, too"

FLEET_FAULTS: tuple[Fault, ...] = (
    # The launcher is told to stop, or ended.
    fleet("SIGINT to the launcher", send(signal.SIGINT),
          Expect(ALL, ("stopped by SIGINT",), (130,), 20), ci=UP),
    fleet("SIGKILL to the launcher", send(signal.SIGKILL), Expect(ALL, (), (0, 137), 10), ci=UP),
    fleet("scancel", cancel, Expect(ALL[:-1], ("Slurm ended the ",), (1,), 20),
          Expect(ALL[-1:], ("stopped by SIGINT",), (1, 130), 20), ci=UP),
    # A replica.
    fleet("replica killed", docker("kill", name="r3", node="n2"),
          survived(f"LOST r3: n2: {KILLED}", REST, phases=UP), env=LOAD_3_S, ci=()),
    fleet("replica killed, --restart 1", docker("kill", name="r3", node="n2"),
          survived(*R3_BACK, within=15), args=(*FOUR, *ONCE), ci=()),
    fleet("engine of a replica hangs", to_engine("USR2"),
          survived("LOST r3: n2: the server is up but no longer serves: it is idle", REST,
                   within=40, asked=False), env={**PROBED, "TRTLLM_SIM_FAULT": "stuck-on-signal"}),
    fleet("replica stands still", to_engine("STOP"),
          survived("LOST r3: n2: the server is up but no longer serves: 6 health checks", REST,
                   within=130, fails=True), ci=()),
    fleet("replica out of memory",
          docker("update", "--memory=200m", "--memory-swap=200m", name="r1"),
          survived(f"LOST r1: n1: {KILLED}", "1 of 2 replicas go on", within=20), args=TWO,
          env={"TRTLLM_SIM_FAULT": "out-of-memory:10"}, ci=()),
    fleet("port of a replica taken", squat,
          ended("n2: port 8002, r3's, is taken by", phases=("before the launch",)), ci=()),
    fleet("port taken while its replica is restarted", kill_and_squat,
          survived("r3: n2: ", "LOST r3: n2: ", REST, within=40), args=(*FOUR, *ONCE), ci=()),
    # The front.
    fleet("front killed", kill_front,
          survived("n1: the front was ended by signal 9; it was restarted", fails=True),
          env=OLD_FRONT),
    fleet("front killed again at once", kill_front_twice,
          ended("n1: the front was ended by signal 9, within"), env=OLD_FRONT, ci=()),
    # Nodes.
    fleet("dockerd stopped on the 2nd node", stop_dockerd("n2"),
          survived("LOST r2: n2: ", "LOST r3: n2: ", HALF, within=30), ci=()),
    fleet("slurmd stopped on the 2nd node", stop_slurmd("n2"),
          Expect(("serving",), (), (130,), 30, serves=True), ci=()),
    fleet("2nd node unreachable, salloc --no-kill", unplug("n2"),
          survived("LOST r2: n2: ", "LOST r3: n2: ", HALF, within=90, left=BACK, heals=90),
          salloc=NO_KILL),
    fleet("2nd node unreachable", unplug("n2"),
          Expect(("serving",), ("Slurm ended the fleet",), (1,), 90, left=BACK, heals=90), ci=()),
    fleet("node of the front unreachable, salloc --no-kill", unplug("n1"),
          Expect(("serving",), ("n1: Slurm has lost this node",), (1,), 120, left=BACK, heals=90),
          salloc=NO_KILL, ci=()),
    fleet("^C while the 2nd node is unreachable", unplugged_interrupt("n2"),
          Expect(("serving",), ("stopped by SIGINT",), (130,), 30, left=BACK, heals=90), ci=()),
    # Prefill and decode.
    *(pools(f"{name} killed", docker("kill", name=name), ended(f"{name}: n1: ", OTHERS_END))
      for name in ("orchestrator", "prefill0", "decode0")),
    *(pools(f"{name} killed, --restart 1", docker("kill", name=name),
            survived(f"{name}: n1: ", f"{name}: ready after", within=20, fails=True), args=ONCE)
      for name in ("orchestrator", "prefill0", "decode0")),
    # Two fleets.
    fleet("two on one node", share_a_node,
          Expect(("before the launch",), (), (130,), 30, serves=True), ci=()),
    fleet("two on one node and one port", share_ports,
          ended("n1: ", within=60, phases=("before the launch",)), ci=()),
)  # fmt: skip
