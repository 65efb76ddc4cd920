#!/usr/bin/env python3
"""The whole way on any machine: the real launcher with the simulator, then the real API checks.

No GPU, no Docker, no cluster: `run_sbatch.py --runtime bare` finds the simulator in PATH, where on
a GPU node it finds TensorRT-LLM. Ends by itself, exit code 0 when all checks passed.

    make demo
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = "demo/model"
PATIENCE = 60.0  # seconds until the server has to be ready, and until it has to be gone


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="trtllm-demo-") as workspace:
        port = str(free_port())
        server = start(Path(workspace), port)
        try:
            await_endpoint(server, Path(workspace, "logs/endpoint.json"))
            checks = show(
                [sys.executable, str(ROOT / "test.py"), "-H", "127.0.0.1", "-p", port, "-m", MODEL]
            ).wait()
        finally:
            stopped = stop(server)
    if checks == 0 and stopped == 130:
        print("demo: served, checked, stopped; with an image and GPUs it is `make serve`")
        return 0
    print(f"demo: failed (checks: exit code {checks}, server: {stopped})", file=sys.stderr)
    return 1


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def start(workspace: Path, port: str) -> subprocess.Popen[bytes]:
    """The launcher, in a session of its own: ^C reaches it through us, once."""
    command = [sys.executable, str(ROOT / "run_sbatch.py"), "--runtime", "bare",
               "--workspace", str(workspace), MODEL, "--port", port]  # fmt: skip
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TRTLLM_SIM"))}
    environ |= {"PATH": f"{ROOT}/simulator:{environ['PATH']}", "GPUS": "none",
                "TRTLLM_SIM_LOAD_SECONDS": "1"}  # fmt: skip
    return show(command, env=environ, start_new_session=True)


def show(command: list[str], **options: object) -> subprocess.Popen[bytes]:
    print(f"demo: $ {shlex.join(command)}", flush=True)
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)  # type: ignore[call-overload, no-any-return]


def await_endpoint(server: subprocess.Popen[bytes], endpoint: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not endpoint.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("demo: the server did not get ready; it says why above")
        time.sleep(0.05)


def stop(server: subprocess.Popen[bytes]) -> int:
    if server.poll() is None:
        server.send_signal(signal.SIGINT)
    return server.wait(PATIENCE)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
