"""The faults of faults.py under pyxis, without those that are only about Docker.

make faults RUNTIME=pyxis      # all cells; the table of docs/faults-pyxis.md at the end
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

from tests.cluster import faults
from tests.cluster.cluster import Cluster, Machine, wait_until
from tests.cluster.faults import DIED
from tests.cluster.launches import SLOW, SQUASH, prepare, save_squash
from tests.cluster.scene import Cell, Expect, Fault, Runtime, Scene, thaw
from tests.cluster.strikes import PHASES, in_serving
from tests.cluster.test_multinode import kill_a_rank

PYXIS = Runtime(SQUASH, "unsquashfs", "python3")
# Words in the names of faults that are only about Docker, and of those that no runtime's code
# meets. "one port": it does not tell apart a user's jobs on one node (docs/pyxis.md).
OF_DOCKER = ("container", "docker", "tarball", "one image", "one port")
OF_NONE = ("clock", "file system", "USR1", "log ", "binary", "queue", "engine ")
UNSQUASHFS = Path("/usr/bin/unsquashfs")
STANDS_STILL = '#!/bin/sh\nkill -STOP $$\nexec {real} "$@"\n'


# --- phases that are not Docker's -----------------------------------------------------------------


def in_preflight(scene: Scene, fault: Fault) -> None:
    """A preflight that takes long, because a node's enroot does not answer."""
    folder = "/usr/local/sbin"
    scene.n2.run("mount", "-t", "tmpfs", "tmpfs", folder)
    scene.undo.append(lambda: scene.n2.run("umount", "--lazy", folder))
    write_program(scene.n2, f"{folder}/enroot", "#!/bin/sh\nexec sleep 60\n")
    scene.start(fault, SLOW)
    scene.launch.until('"SurveyEnroot": {')
    time.sleep(0.3)


def write_program(node: Machine, path: str, text: str) -> None:
    node.run("sh", "-c", 'printf %s "$2" >"$1" && chmod +x "$1"', "write", path, text)


def in_unpacking(scene: Scene, fault: Fault) -> None:
    """An unpacking on n2 that would not end, for a model over both nodes."""
    unpacks_slowly(scene)
    scene.start(fault, SLOW, "--pp_size", "2")
    unpacking = ("pgrep", "--exact", PYXIS.unpacker)
    wait_until(lambda: not scene.n2.run(*unpacking, check=False).returncode, "unpacking on n2")


def unpacks_slowly(scene: Scene) -> None:
    """Have n2's unsquashfs stand still until it is told to go on."""
    real, ours = (str(scene.n2.state / name) for name in ("unsquashfs", "stands-still"))
    shutil.copy2(UNSQUASHFS, real)
    write_program(scene.n2, ours, STANDS_STILL.format(real=real))
    scene.n2.run("mount", "--bind", ours, str(UNSQUASHFS))
    scene.undo.append(lambda: scene.n2.run("umount", "--lazy", str(UNSQUASHFS)))
    scene.undo.append(lambda: thaw(scene.n2, PYXIS.unpacker))


def in_stopping(scene: Scene, fault: Fault) -> None:
    """A launch that was told to stop, and is not done because the engine takes its time."""
    in_serving(scene, fault)
    scene.launch.send(signal.SIGINT)
    time.sleep(0.5)


BEGIN = {**PHASES, "preflight": in_preflight, "image load": in_unpacking, "stopping": in_stopping}
NAMES = {"image load": "unpacking"}
SAYS = {  # Docker's words, and pyxis's in their place
    "could not confirm that the container is gone": "may still be there",
    "n2: the container trtllm-": "n2: the step trtllm-",
    "n2: Slurm has lost this node": "n2 (ranks 8-15): no sign of life for ",
}

# --- faults that are not Docker's -----------------------------------------------------------------


def kill_rank(scene: Scene) -> None:
    kill_a_rank(scene.cluster, "n2", 11)


def kill_engine(node: Machine) -> None:
    node.run("pkill", "--signal=KILL", "--full", "^[^ ]*python3 [^ ]*trtllm-serve")


def cancel_step(scene: Scene) -> None:
    """Somebody cancels the server's own step."""
    steps = scene.cluster.ctl.run("squeue", "--steps", "-h", "-o", "%i %j").stdout.splitlines()
    (step,) = (line.split()[0] for line in steps if f" trtllm-{scene.launch.job}" in line)
    scene.cluster.ctl.run("scancel", step)


def without_plug_in(scene: Scene) -> None:
    """n2 runs steps on the bare node, and tells nobody."""
    there = "/etc/slurm/plugstack.conf"
    scene.n2.run("mount", "--bind", "/dev/null", there)
    scene.undo.append(lambda: scene.n2.run("umount", "--lazy", there))


def cut_image(scene: Scene) -> None:
    kept = SQUASH.with_suffix(".kept")
    shutil.copy2(SQUASH, kept)
    scene.undo.append(lambda: kept.replace(SQUASH))
    os.truncate(SQUASH, 1_000_000)


OWN = (
    Fault("engine killed", lambda scene: kill_engine(scene.n1), (
        Expect(("serving",), (*DIED, "exit code 137 (killed"), (1,), 5),)),
    Fault("rank killed on the 2nd node", kill_rank, (
        Expect(("serving on 2 nodes",), ("n2: rank 11 ended with exit code 137",), (1,), 15),)),
    Fault("step cancelled", cancel_step, (
        Expect(("serving",), ("Slurm ended the ",), (1,), 15),
        Expect(("serving on 2 nodes",), ("exit code 137", "CANCELLED AT"), (1,), 15))),
    Fault("node does not load the plug-in", without_plug_in, (
        # n1 may be unpacking when Slurm ends the step: it then takes KillWait, 30 s.
        Expect(("before the launch",), ("n2 does not load the plug-in",), (1,), 60),),
        args=("--pp_size", "2")),
    Fault("image cut off", cut_image, (
        Expect(("before the launch",), ("The image is damaged or cut off",), (1,), 30),)),
)  # fmt: skip


def cells_of(fault: Fault) -> list[Cell]:
    phases = [(e, phase) for e in fault.expects for phase in e.phases]
    return [Cell(fault, NAMES.get(p, p), of_pyxis(e, p), BEGIN[p], PYXIS) for e, p in phases]


def of_pyxis(expect: Expect, phase: str) -> Expect:
    """Other words, and more time for an unpacker that hears late that it has to end."""
    says = tuple(SAYS.get(words, words) for words in expect.says)
    return replace(expect, says=says, within=max(expect.within, 30 * (phase == "image load")))


def is_left_out(fault: Fault) -> bool:
    return any(word in fault.name for word in (*OF_DOCKER, *OF_NONE))


ALL = [*(fault for fault in faults.FAULTS if not is_left_out(fault)), *OWN]
CELLS = [cell for fault in ALL for cell in cells_of(fault)]


def prepare_both(cluster: Cluster) -> None:
    prepare(cluster)
    save_squash(cluster)


if __name__ == "__main__":
    raise SystemExit(faults.main(every=CELLS, prepared=prepare_both))
