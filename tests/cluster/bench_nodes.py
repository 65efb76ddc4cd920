"""How the launch grows with the number of nodes: the same engine on 2, 4, 8 and 16 of them.

    make bench-nodes

All nodes share this machine's cores, where real ones each bring their own: what is shown is an
upper bound. The image is on every node; the engine takes 10 s by itself.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from tests.cluster.cluster import Cluster, why_not
from tests.cluster.launches import PYTHON, REPO, TARBALL, Launch, prepare

SIZES = (2, 4, 8, 16)
REPEATS = 3
LOAD_SECONDS = 10


def main() -> int:
    if reason := why_not():
        raise SystemExit(f"bench-nodes: {reason}")
    print("                 a server on the first node       one model over all nodes, a rank each")
    first: list[float] = []
    for size in SIZES:
        with Cluster(nodes=size, gpus=1) as cluster, tempfile.TemporaryDirectory(dir="/fsx") as tmp:
            prepare(cluster)
            alone = measure(cluster, Path(tmp), 1)
            spread = measure(cluster, Path(tmp), size)
        first = first or [alone, spread]
        print(
            f"{size:3} nodes        {alone:6.2f} s  {alone / first[0]:5.2f} x"
            f"               {spread:6.2f} s  {spread / first[1]:5.2f} x",
            flush=True,
        )
    return 0


def measure(cluster: Cluster, workspace: Path, tp: int) -> float:
    """Median seconds from the command to READY; the first, which loads the image, is left out."""
    took = []
    for _ in range(1 + REPEATS):
        begin = time.monotonic()
        started = start(cluster, workspace, tp)
        started.until("READY", 180)
        took.append(time.monotonic() - begin)
        assert started.stop() == 130
    return statistics.median(took[1:])


def start(cluster: Cluster, workspace: Path, tp: int) -> Launch:
    salloc = ["salloc", f"-N{len(cluster.names)}", "--gpus-per-node=1", "--exclusive"]
    command = [
        PYTHON,
        str(REPO / "run_sbatch.py"),
        "--image",
        str(TARBALL),
        "m",
        "--tp_size",
        str(tp),
    ]
    env = {"TRTLLM_SIM_LOAD_SECONDS": str(LOAD_SECONDS), "TRTLLM_SIM_GPUS": "1"}
    return Launch(cluster, workspace, [*salloc, *command, "--tp_size", str(tp)], env)


if __name__ == "__main__":
    raise SystemExit(main())
