"""Hours of load on the real two-node cluster: does anything of ours grow, fail or stay behind?

    make soak HOURS=1              # 0.0833 are five minutes

run_sbatch.py serves with the simulator; one bench.py keeps 256 streams busy, run after run. Their
memory, open files, threads and child processes are sampled all the time. At the end both get a ^C.
Exit code 1 if a request failed, if something grew by more than its bound, or if anything is left.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from tests.cluster.cluster import Cluster, why_not
from tests.cluster.launches import (
    PYTHON,
    QUICK,
    REPO,
    WHOLE,
    Launch,
    prepare,
    serve_args,
    strangers,
    traces,
)

SPEEDS = {"TRTLLM_SIM_TTFT_MS": "50", "TRTLLM_SIM_ITL_MS": "20"}
LOAD = "-t concurrency --concurrency 256 --input-len 128 --output-len 64 --num-prompts 2560"
SAMPLES = 100  # or one every ten seconds, if that is more
SHARE = 0.1  # of the time: the first and the last part, whose peaks are compared
LOG_BYTES = 1000  # that a request may write to the server's log


@dataclass(frozen=True)
class Use:
    """What a process holds. As a bound: how much it may grow between first and last tenth."""

    rss_mb: float
    files: float
    threads: float
    children: float


BOUND = Use(rss_mb=8, files=4, threads=2, children=2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hours", type=float, default=1.0)
    args = parser.parse_args(argv)
    if args.hours <= 0:
        parser.error("--hours has to be more than 0")
    if reason := why_not():
        raise SystemExit(f"soak: {reason}")
    with Cluster(nodes=2) as cluster, tempfile.TemporaryDirectory(dir="/fsx") as folder:
        prepare(cluster)
        return soak(cluster, Path(folder), args.hours * 3600)


def soak(cluster: Cluster, workspace: Path, seconds: float) -> int:
    before = strangers(cluster)
    command = ["salloc", *WHOLE.split(), PYTHON, str(REPO / "run_sbatch.py"), *serve_args()]
    served = Launch(cluster, workspace, command, {**QUICK, **SPEEDS})
    served.until("READY")
    (log,) = workspace.glob("logs/trtllm_server_*.log")
    bench = start_bench(cluster, workspace, runs=math.ceil(seconds))  # more than there is time for
    used = watch({"launcher": served.pid, "bench.py": bench.pid}, seconds)
    bench.send_signal(signal.SIGINT)
    ended = {"bench.py": bench.wait(120)}
    ended["launcher"] = served.stop() if served.process.poll() is None else served.code()
    grown = show_use(used)
    failed = show_load(workspace / "results", log)
    left = traces(cluster, workspace) + (["a stranger's container was touched"] if
                                         strangers(cluster) != before else [])  # fmt: skip
    print(f"exit codes {ended}; left behind: {left or 'nothing'}")
    good = set(ended.values()) == {130}  # ^C, and not before
    if not good:
        print((workspace / "bench.out").read_text()[-2000:], served.output[-2000:], sep="\n")
    return 0 if good and not (grown or failed or left) else 1


def start_bench(cluster: Cluster, workspace: Path, runs: int) -> subprocess.Popen[Any]:
    command = [PYTHON, str(REPO / "bench.py"), *LOAD.split(), "--client", "builtin",
               "--repeat", str(runs), "-o", "results"]  # fmt: skip
    with (workspace / "bench.out").open("wb") as sink:
        return cluster.ctl.popen(*command, cwd=str(workspace), stdout=sink, stderr=sink)


# --- what they hold -------------------------------------------------------------------------------


def watch(pids: dict[str, int], seconds: float) -> dict[str, list[Use]]:
    """Samples of each process, until the time is up or one of them has ended."""
    used: dict[str, list[Use]] = {name: [] for name in pids}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(10.0, seconds / SAMPLES))
        try:
            now = {name: use(pid) for name, pid in pids.items()}
        except (OSError, KeyError):  # a process that has ended has no memory
            break
        for name, found in now.items():
            used[name].append(found)
    return used


def use(pid: int) -> Use:
    process = Path(f"/proc/{pid}")
    status = dict(
        line.split(":\t", 1)
        for line in (process / "status").read_text().splitlines()
        if ":\t" in line
    )
    return Use(
        rss_mb=int(status["VmRSS"].split()[0]) / 1024,
        files=len(list((process / "fd").iterdir())),
        threads=int(status["Threads"]),
        children=sum(len(t.read_text().split()) for t in process.glob("task/*/children")),
    )


def show_use(used: dict[str, list[Use]]) -> list[str]:
    """A table; the names of what grew too much."""
    print(f"\n{'':22}{'start':>10}{'first 10%':>10}{'last 10%':>10}{'growth':>10}{'bound':>10}")
    grown = []
    for name, samples in ((name, samples) for name, samples in used.items() if samples):
        part = max(1, round(len(samples) * SHARE))
        first, last = peak(samples[:part]), peak(samples[-part:])
        rows = zip(fields(Use), *map(astuple, (samples[0], first, last, BOUND)), strict=True)
        for field, start, early, late, bound in rows:
            growth = late - early
            what = f"{name} {field.name}"
            print(f"{what:22}{start:10.1f}{early:10.1f}{late:10.1f}{growth:+10.1f}{bound:10.1f}"
                  + (" LEAK" if growth > bound else ""))  # fmt: skip
            grown += [what] if growth > bound else []
    return grown


def peak(samples: Sequence[Use]) -> Use:
    return Use(*map(max, zip(*map(astuple, samples), strict=True)))


# --- what they did --------------------------------------------------------------------------------


def show_load(results: Path, log: Path) -> list[str]:
    """Sums over all whole runs; what went wrong in them."""
    paths = [path for path in results.glob("*.json") if path.name != "summary.json"]
    runs = [json.loads(path.read_text()) for path in paths]
    asked, done, tokens = (sum(run[key] for run in runs) for key in
                           ("num_prompts", "completed", "total_output_tokens"))  # fmt: skip
    # The client knows when the machine kept it waiting; that is no failure.
    wrong = [p for run in runs for p in run["problems"] if p not in run["client"]["problems"]]
    busy = sum(bool(run["client"]["problems"]) for run in runs)
    a_request = log.stat().st_size / max(asked, 1)
    if a_request > LOG_BYTES:
        wrong.append(f"the log has {a_request:.0f} bytes a request")
    print(f"{len(runs)} runs ({busy} on a machine too busy to measure): {done} requests, "
          f"{asked - done} failed, {tokens} tokens; log {log.stat().st_size / 1e6:.1f} MB, "
          f"{a_request:.0f} bytes a request")  # fmt: skip
    for problem in wrong:
        print(f"  {problem}")
    return wrong if runs else ["no run"]


if __name__ == "__main__":
    raise SystemExit(main())
