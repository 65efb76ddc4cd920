"""How a fleet grows on the cluster: throughput and start of 8 replicas, next to 1.

Part of `make bench-fleet`. All nodes share this machine's cores. So the engines are slow: they
sleep, and answer only so many requests at a time. They are made faster until the cores are the
limit, as the last rows show.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from tests.cluster.cluster import Cluster, processes_in_network_of
from tests.cluster.launches import PYTHON, QUICK, REPO, TARBALL, Launch, prepare

SIZES = (1, 2, 4, 8)
# Requests at a time, tokens of each, batches of each replica: many, as the last one is not full.
BATCH, TOKENS, ROUNDS = 8, 8, 32
ITLS = (100, 50, 25, 12)  # ms
LOAD_SECONDS, REPEATS = 15, 3
MANY, WATCHED = 16, 30.0  # replicas; seconds
LINEAR = 0.95
TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    with Cluster(nodes=4) as cluster, tempfile.TemporaryDirectory(dir="/fsx") as folder:
        prepare(cluster)
        bench = Bench(cluster, Path(folder))
        with bench.serving(8, nodes=4):  # from now on the image is on every node
            pass
        bench.start()
        bench.launcher()
        bench.throughput()


class Bench:
    def __init__(self, cluster: Cluster, workspace: Path) -> None:
        self.cluster, self.workspace = cluster, workspace

    @contextmanager
    def serving(self, replicas: int, nodes: int, *args: str, **env: str) -> Iterator[Launch]:
        each = -(-replicas // nodes)
        job = ["salloc", f"-N{nodes}", f"--gpus-per-node={each}"]
        words = [PYTHON, str(REPO / "run_sbatch.py"), "--image", str(TARBALL), "org/model",
                 "--tp_size", "1", "--replicas", str(replicas), *args]  # fmt: skip
        started = Launch(self.cluster, self.workspace, [*job, *words], {**QUICK, **env})
        started.until("stop it with")
        yield started
        assert started.stop() == 130, started.output

    # --- throughput -------------------------------------------------------------------------------

    def throughput(self) -> None:
        print(f"\nOutput tokens/s; a replica answers {BATCH} requests at a time:\n")
        print("| ITL | " + " | ".join(f"{n} on {nodes_of(n)}" for n in SIZES) + " | of linear |")
        print("|--:" * (len(SIZES) + 2) + "|")
        for itl in ITLS:
            found = [self.rate(count, itl) for count in SIZES]
            shares = [rate / (found[0] * n) for rate, n in zip(found, SIZES, strict=True)]
            cells = " | ".join(f"{rate:,.0f}" for rate in found)
            said = ", ".join(f"{share:.2f}" for share in shares[1:])
            print(f"| {itl} ms | {cells} | {said} |", flush=True)
            if min(shares) < LINEAR:
                break

    def rate(self, count: int, itl: float) -> float:
        """Half as many requests again are in flight as are answered at a time: no replica idles."""
        args = ("--max_batch_size", str(BATCH))
        with self.serving(count, nodes_of(count), *args, TRTLLM_SIM_ITL_MS=str(itl)):
            load = f"-t throughput --input-len 16 --output-len {TOKENS} --client builtin"
            prompts, streams = count * BATCH * ROUNDS, count * BATCH * 3 // 2
            folder = self.workspace / f"results/{count}-{itl:g}"
            words = (PYTHON, str(REPO / "bench.py"), *load.split(), "-o", str(folder),
                     "--num-prompts", str(prompts),
                     "--concurrency", str(streams))  # fmt: skip
            said = self.cluster.ctl.run(*words, cwd=str(self.workspace), check=False)
        results = list(folder.rglob("throughput*.json"))
        assert len(results) == 1, said.stdout + said.stderr
        found = json.loads(results[0].read_text())
        assert found["completed"] == found["num_prompts"], found["problems"]
        return float(found["output_throughput"])

    # --- start ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Wall-clock seconds, and CPU seconds of the launcher and of all programs."""
        print(f"\nFrom the command to READY, without the {LOAD_SECONDS} s that an engine loads:\n")
        print("| replicas | nodes | s | of 1 | CPU-s of the launcher | of all programs |")
        print("|--:" * 6 + "|")
        first = 0.0
        for count, nodes in ((1, 1), (8, 1), (8, 4)):
            tries = zip(*[self.ready(count, nodes) for _ in range(REPEATS)], strict=True)
            took, own, everybodys = map(median, tries)
            first = first or took
            print(f"| {count} | {nodes} | {took:.2f} | {took / first:.2f} x | {own:.2f} "
                  f"| {everybodys:.1f} |", flush=True)  # fmt: skip

    def ready(self, count: int, nodes: int) -> tuple[float, float, float]:
        begun, busy = time.monotonic(), all_cpu()
        with self.serving(count, nodes, TRTLLM_SIM_LOAD_SECONDS=str(LOAD_SECONDS)) as started:
            took = started.until("READY") - begun - LOAD_SECONDS
            return took, cpu(started.pid), all_cpu() - busy

    # --- what the launcher takes ------------------------------------------------------------------

    def launcher(self) -> None:
        with self.serving(MANY, 4) as started:
            helpers = [pid for pid in self.programs() if pid != started.pid]
            before = {pid: cpu(pid) for pid in (started.pid, *helpers)}
            time.sleep(WATCHED)
            used = {pid: (cpu(pid) - was) / WATCHED for pid, was in before.items()}
            print(f"\nWith {MANY} replicas that serve on 4 nodes:\n")
            print("| | MB | of a core |\n|---|--:|--:|")
            for name, pids in (("the launcher", [started.pid]), ("its srun", helpers)):
                share = sum(used[pid] for pid in pids)
                print(f"| {name} | {sum(map(memory, pids)):.0f} | {share:.1%} |", flush=True)

    def programs(self) -> list[int]:
        """The launcher and what it has started, on the login node."""
        found = processes_in_network_of([self.cluster.ctl.holder.pid])
        return [pid for pid in found if program(pid) in ("srun", "python", "python3")]


def nodes_of(count: int) -> int:
    return max(1, count // 2)


def program(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def cpu(pid: int) -> float:
    """CPU seconds so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / TICKS


def all_cpu() -> float:
    """Seconds so far in which a core was not idle."""
    user, nice, system, *_ = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:])
    return (user + nice + system) / TICKS


def memory(pid: int) -> float:
    """MB of private memory."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024
