"""Measure the launcher on a real two-node cluster: the figures of docs/figures.md.

    make bench-launch

Every line is a median of several launches; the bounds beside them are what the project wants.
"""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from launch import image
from tests.cluster.cluster import Cluster, wait_until, why_not
from tests.cluster.launches import (
    PYTHON,
    QUICK,
    REPO,
    TARBALL,
    WHOLE,
    Launch,
    forget_image,
    ours,
    prepare,
    serve_args,
    strangers,
)

REPEATS = 5
BALLAST_MB = 400  # a small image would only measure the start of a step
LOAD_SECONDS = 2.0  # what the simulated engine takes by itself


def main() -> int:
    if reason := why_not():
        raise SystemExit(f"bench-launch: {reason}")
    with Cluster(nodes=2) as cluster, tempfile.TemporaryDirectory(dir="/fsx") as workspace:
        prepare(cluster, BALLAST_MB)
        bench = Bench(cluster, Path(workspace))
        print(f"{'':58}{'measured':>10}{'wanted':>12}")
        bench.image_on_nodes()
        bench.tag()
        os.sync()  # the disk still writes the images that were loaded; a launch finds them there
        bench.ready()
        bench.crash()
        bench.stop()
        assert strangers(cluster) == bench.strangers, "a stranger's container was touched"
    return 0


def show(what: str, measured: str, wanted: str) -> None:
    print(f"{what:58}{measured:>10}{wanted:>12}", flush=True)


def timed(action: Callable[[], object]) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start


class Bench:
    def __init__(self, cluster: Cluster, workspace: Path) -> None:
        self.cluster, self.workspace = cluster, workspace
        self.strangers = strangers(cluster)

    def launch(self, *more: str, **environ: str) -> Launch:
        command = [PYTHON, str(REPO / "run_sbatch.py"), *more, *serve_args()]
        return Launch(self.cluster, self.workspace, ["salloc", *WHOLE.split(), *command], environ)

    def log(self, started: Launch) -> Path:
        return self.workspace / f"logs/trtllm_server_{started.job}.log"

    def image_on_nodes(self) -> None:
        """Cold image on all nodes at once, against the slowest node doing it by hand."""
        ratios, ours_s = [], []
        for _ in range(REPEATS):
            forget_image(self.cluster)
            floor = timed(self.load_by_hand)
            forget_image(self.cluster)
            took = self.load()
            ratios.append(took / floor)
            ours_s.append(took)
        size = TARBALL.stat().st_size / 1e6
        show(f"image on 2 nodes, cold, {size:.0f} MB tarball", seconds(ours_s), "")
        show("  against `pigz -dc | docker load` on both by hand",
             f"{statistics.median(ratios):.2f} x", "<= 1.10 x")  # fmt: skip

    def load_by_hand(self) -> None:
        command = f"pigz -dc {TARBALL} | docker load"
        nodes = self.cluster.nodes.values()
        for process in [node.popen("sh", "-c", command, stdout=-3) for node in nodes]:
            assert process.wait() == 0

    def load(self) -> float:
        started = self.launch("-v", "--pp_size", "2", **QUICK)  # only nodes that serve load
        start = started.until('"Load": {')
        end = started.until('"Hold": {')
        started.until("READY")
        started.stop()
        return end - start

    def tag(self) -> None:
        took = [timed(lambda: image.read_tarball(TARBALL)) for _ in range(REPEATS)]
        show(
            "tag and identity of a tarball, from its sidecar",
            f"{statistics.median(took) * 1e3:.2f} ms",
            "< 10 ms",
        )

    def ready(self) -> None:
        """From the command to READY, less the engine's own time; and the engine's word to ours."""
        overhead, said = [], []
        for _ in range(REPEATS):
            begin = time.monotonic()
            started = self.launch(TRTLLM_SIM_LOAD_SECONDS=str(LOAD_SECONDS))
            started.until("Granted")
            wait_until(partial(says_ready, self.log(started)), "the engine's own word")
            engine_ready = time.monotonic()
            wait_until((self.workspace / "logs/endpoint.json").exists, "endpoint")
            said.append(time.monotonic() - engine_ready)
            overhead.append(time.monotonic() - begin - LOAD_SECONDS)
            started.stop()
        show("own overhead from the command to ready, image loaded", seconds(overhead), "<= 0.6 s")
        show("engine ready -> said so", seconds(said), "<= 0.1 s")

    def crash(self) -> None:
        took = []
        for _ in range(REPEATS):
            started = self.launch(TRTLLM_SIM_LOAD_SECONDS="1", TRTLLM_SIM_FAULT="exit-loading:3")
            assert started.code() == 1
            took.append(time.time() - self.log(started).stat().st_mtime)
        show("engine crash while loading -> error, exit", seconds(took), "<= 0.25 s")

    def stop(self) -> None:
        took = []
        for _ in range(REPEATS):
            started = self.launch(**QUICK, TRTLLM_SIM_FAULT="ignore-term")
            started.until("READY")
            begin = time.monotonic()
            started.send(signal.SIGINT)
            wait_until(lambda: ours(self.cluster) == [], "no container left")
            took.append(time.monotonic() - begin)
            started.code()
        show("^C -> no container of ours on any node", seconds(took), "<= 0.25 s")


def says_ready(log: Path) -> bool:
    return log.exists() and b"Uvicorn running" in log.read_bytes()


def seconds(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} s"


if __name__ == "__main__":
    raise SystemExit(main())
