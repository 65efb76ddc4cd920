#!/usr/bin/env python3
"""The whole way on any machine: the real launcher with the simulator, the API checks, a benchmark.

It needs no GPU, Docker or cluster: `run_sbatch.py --runtime bare` finds the simulator in PATH,
where on a GPU node it finds TensorRT-LLM. It ends by itself, with exit code 0 if all went well. The
benchmark's report and the server's log stay in a folder of results/.

    make demo
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = "demo/model"
RESULTS = Path(time.strftime("results/demo-%Y%m%d-%H%M%S"))
ENDPOINT = RESULTS / "logs/endpoint.json"
LOADS = (
    "--type prefill --num-prompts 10",
    "--type concurrency --concurrency 1,4,16 --num-prompts 16 --output-len 32 --resume",
)
PATIENCE = 60.0  # seconds until the server has to be ready, and until it has to be gone
SPEED = {  # slow enough for a laptop that has other things to do
    "TRTLLM_SIM_LOAD_SECONDS": "1",
    "TRTLLM_SIM_TTFT_MS": "80",
    "TRTLLM_SIM_ITL_MS": "10",
    "TRTLLM_SIM_ITL_US_PER_RUNNING": "400",
}
BUSY = ("demo: this machine was busy with something else, so some of these figures are marked "
        "invalid: they say more about it than about the server")  # fmt: skip


def main() -> int:
    RESULTS.mkdir(parents=True)
    port = str(free_port())
    server = start(port)
    try:
        await_endpoint(server)
        at = ["-H", "127.0.0.1", "-p", port, "-m", MODEL]
        checked = show([sys.executable, str(ROOT / "test.py"), *at]).wait()
        measured = max(measure([*at, *load.split()]) for load in LOADS)
    finally:
        stopped = stop(server)
    if (checked, measured, stopped) == (0, 0, 130):
        print(f"demo: served, checked, measured, stopped. The report: {RESULTS}/report.html")
        print("demo: with an image and GPUs it is `make serve`, `make test`, `make bench`")
        return 0
    print(f"demo: failed (checks: exit code {checked}, benchmark: {measured}, server: {stopped})",
          file=sys.stderr)  # fmt: skip
    return 1


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def start(port: str) -> subprocess.Popen[bytes]:
    """The launcher, in a session of its own: ^C reaches it through us, once.

    Its stdout is the engine's log, which would fill the screen with a line a request.
    """
    command = [sys.executable, str(ROOT / "run_sbatch.py"), "--runtime", "bare",
               "--workspace", str(RESULTS), MODEL, "--port", port]  # fmt: skip
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TRTLLM_SIM"))}
    environ |= SPEED | {"PATH": f"{ROOT}/simulator:{environ['PATH']}", "GPUS": "none"}
    return show(command, env=environ, stdout=subprocess.DEVNULL, start_new_session=True)


def show(command: list[str], **options: Any) -> subprocess.Popen[Any]:  # noqa: ANN401
    print(f"demo: $ {shlex.join(command)}", flush=True)
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)


def await_endpoint(server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ENDPOINT.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("demo: the server did not get ready; it says why above")
        time.sleep(0.05)


def measure(words: list[str]) -> int:
    """Run a part of the benchmark: print its table, and the rest only if it fails."""
    command = [sys.executable, str(ROOT / "bench.py"), "--client", "builtin", *words,
               "--output", str(RESULTS)]  # fmt: skip
    with (RESULTS / "logs/bench.log").open("a+") as talk:
        bench = show(command, stdout=subprocess.PIPE, stderr=talk, text=True)
        table = bench.communicate()[0].splitlines()[:-1]  # without the result for programs
        talk.seek(0)
        failed = bench.returncode and not is_only_busy()
        print("\n".join([talk.read(), *table] if failed else table), flush=True)
    if bench.returncode and not failed:
        print(BUSY, flush=True)
    return failed


def is_only_busy() -> bool:
    """Whether only times are wrong with the runs, as client and server share a busy machine.

    That is what the client says about itself, and tokens that came together from a late server.
    """
    runs = [json.loads(path.read_text()) for path in RESULTS.glob("*-*.json")]
    own = [problem for run in runs for problem in run["client"].get("problems", [])]
    told = [problem for run in runs for problem in run["problems"]]
    return bool(runs) and all(problem in own or " came " in problem for problem in told)


def stop(server: subprocess.Popen[bytes]) -> int:
    if server.poll() is None:
        server.send_signal(signal.SIGINT)
    return server.wait(PATIENCE)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
