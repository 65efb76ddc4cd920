"""How the launch grows with the number of nodes: the same engine on 2, 4, 8 and 16 of them.

    make bench-nodes

All nodes share this machine's cores: a node's own work, done side by side on a real cluster, adds
up here. So the minimum is done by hand beside it, without the launcher: ask every node for the
image and start a container on the first; or start one on every node and an MPI rank in each. The
image is on every node; the engine takes 10 s by itself, which the growth by hand counts, too.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.cluster.cluster import Cluster, why_not
from tests.cluster.launches import PYTHON, REPO, TAG, TARBALL, Launch, prepare

SIZES = (2, 4, 8, 16)
REPEATS = 3
LOAD_SECONDS = 10
HEAD = "{:>8}" + "{:>16}{:>8}{:>10}" * 2
ROW = "{:8}" + "{:14.2f} s{:6.2f} x{:8.2f} x" * 2

# Arguments: the image, and on how many nodes. The containers print `up` once they run.
ALONE = """
image=$1 nodes=$2
step() {
    srun --overlap --relative=0 --mpi="$1" --ntasks-per-node=1 --nodes="$2" --ntasks="$2" "${@:3}"
}
step none "$SLURM_JOB_NUM_NODES" docker image inspect "$image" >/dev/null
step none "$nodes" docker run --rm --init --name by-hand --net=host --uts=host --ipc=host \\
    --mount "type=bind,source=/run/slurmd,target=/run/slurmd" --entrypoint=sh "$image" \\
    -c "echo up; exec sleep infinity" >talk &
until [ "$(grep -c up talk)" = "$nodes" ]; do sleep 0.05; done
"""
RANKS = """
step pmix "$nodes" bash -c 'docker exec --env-file <(env | grep -E "^(PMIX|SLURM)_[A-Z0-9_]*=") \\
    by-hand python3 -c "from mpi4py.MPI import COMM_WORLD; COMM_WORLD.Barrier()"'
"""
STOP = """
touch done
step none "$nodes" docker rm --force by-hand >/dev/null
wait
"""


def main() -> int:
    if reason := why_not():
        raise SystemExit(f"bench-nodes: {reason}")
    print(HEAD.format("", "a server on", "", "", "one model", "", ""))
    print(HEAD.format("nodes", "the first node", "", "by hand", "over all nodes", "", "by hand"))
    first: list[float] = []
    for size in SIZES:
        with Cluster(nodes=size, gpus=1) as cluster, tempfile.TemporaryDirectory(dir="/fsx") as tmp:
            prepare(cluster)
            work = Path(tmp)
            took = [
                median(launch, cluster, work, 1),
                median(by_hand, cluster, work, 1, ALONE),
                median(launch, cluster, work, size),
                median(by_hand, cluster, work, size, ALONE + RANKS),
            ]
        first = first or took
        engine = (0, LOAD_SECONDS, 0, LOAD_SECONDS)  # by hand there is none
        growth = [(t + e) / (f + e) for t, f, e in zip(took, first, engine, strict=True)]
        print(ROW.format(size, took[0], *growth[:2], took[2], *growth[2:]), flush=True)
    return 0


def median(seconds: Callable[..., float], *arguments: object) -> float:
    """The median of some runs; the first, which loads the image, is left out."""
    return statistics.median([seconds(*arguments) for _ in range(1 + REPEATS)][1:])


def allocation(cluster: Cluster) -> list[str]:
    return ["salloc", f"-N{len(cluster.names)}", "--gpus-per-node=1", "--exclusive"]


def launch(cluster: Cluster, workspace: Path, tp: int) -> float:
    """Seconds from the command to READY."""
    command = [PYTHON, str(REPO / "run_sbatch.py"), "--image", str(TARBALL), "m"]
    env = {"TRTLLM_SIM_LOAD_SECONDS": str(LOAD_SECONDS), "TRTLLM_SIM_GPUS": "1"}
    begin = time.monotonic()
    started = Launch(
        cluster, workspace, [*allocation(cluster), *command, "--tp_size", str(tp)], env
    )
    took = started.until("READY") - begin
    assert started.stop() == 130
    return took


def by_hand(cluster: Cluster, workspace: Path, nodes: int, script: str) -> float:
    """Seconds from the command until the containers, or the ranks in them, run."""
    begin = time.monotonic()
    command = [*allocation(cluster), "bash", "-ec", script + STOP, "by hand", TAG, str(nodes)]
    done = Launch(cluster, workspace, command)
    mark = workspace / "done"
    while not mark.exists():
        assert done.process.poll() is None, done.output
        time.sleep(0.01)
    took = time.monotonic() - begin
    done.process.wait(60)
    mark.unlink()
    return took


if __name__ == "__main__":
    raise SystemExit(main())
