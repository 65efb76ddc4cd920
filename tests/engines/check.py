"""test.py and bench.py against real engines on the CPU, from nothing: no GPU, no model to download.

    make check-engines                              # vLLM, in a folder that is removed afterwards
    make check-engines ENGINE=vllm,sglang FOLDER=/var/tmp/engines      # kept for the next time

The engines come through pip (vLLM 3.5 GB, SGLang 11 GB); the model is made on the spot, its weights
are made up by the engine. One load is also measured by the engine's own client, and both clients
are compared with what the server says of itself (/metrics).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engines import tiny_model
from tests.engines.engines import ENGINES, PROMPT, REQUESTS, STREAMS, TOKENS, Engine, run

ROOT = Path(__file__).resolve().parents[2]
READY_SECONDS = 300
SHORT = "--num-prompts 20 --input-len 128".split()
LOADS = (
    ["-t", "throughput,latency", "--output-len", "32", *SHORT],
    ["-t", "prefill", *SHORT],
    ["-t", "throughput", "--output-len", "32", "--request-rate", "2", *SHORT],
    ["-t", "latency", "--output-len", "32", "--backend", "openai-chat", *SHORT],
)
ALLOWED = 0.10  # how far bench.py may be from the server's own TPOT


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", default="vllm", help=",".join(ENGINES))
    parser.add_argument("--folder", type=Path, help="keep what is installed here")
    args = parser.parse_args(argv)
    if unknown := set(args.engine.split(",")) - set(ENGINES):
        parser.error(f"{', '.join(unknown)}: not one of {', '.join(ENGINES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    good = [check(ENGINES[name], args.folder) for name in args.engine.split(",")]
    return 0 if all(good) else 1


def check(engine: Engine, folder: Path | None) -> bool:
    """Install, serve, test, measure, tell; nothing but `folder` is left."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="check-engines-") as scratch:
        work = Path(scratch)
        step(f"{engine.requirement} {engine.version} below {folder or work}")
        venv = engine.install((folder or work).resolve())
        tiny_model.write(work / "model")
        with serving(engine, venv, work) as url:
            return examine(Server(engine, venv, work, url))


@dataclass(frozen=True)
class Server:
    engine: Engine
    venv: Path
    work: Path
    url: str


@contextmanager
def serving(engine: Engine, venv: Path, work: Path) -> Iterator[str]:
    """A server on a free port; its whole process group is gone afterwards."""
    port, log = free_port(), work / "server.log"
    command = engine.command(engine.serve, venv=venv, model=work / "model", port=port)
    with log.open("wb") as sink:
        server = subprocess.Popen(
            command,
            env=engine.environment(venv, work),
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(server, url, log)
        yield url
    finally:
        end(server)


def wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    begin = time.monotonic()
    while not answers(f"{url}/health"):
        late = time.monotonic() - begin > READY_SECONDS
        if late or server.poll() is not None:
            why = f"not ready within {READY_SECONDS} s" if late else f"exit code {server.poll()}"
            raise SystemExit(f"check-engines: the server: {why}:\n{log.read_text()[-3000:]}")
        time.sleep(0.5)
    step(f"ready after {time.monotonic() - begin:.0f} s at {url}")


def answers(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def end(server: subprocess.Popen[bytes]) -> None:
    """An engine is several processes: ask the group, then make sure of it."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            server.wait(20)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- what has to hold -----------------------------------------------------------------------------


def examine(server: Server) -> bool:
    passed = smoke(server)
    runs = [run for load in LOADS for run in bench(server, *load)]
    ours = compared(server, by_bench)
    theirs = compared(server, by_its_own)
    show(server.engine, passed, runs, ours, theirs)
    return passed == 8 and all(run["valid"] for run in runs) and agrees(*ours)


def smoke(server: Server) -> int:
    """How many of the eight checks passed; their lines are on stderr."""
    step("test.py")
    command = [sys.executable, str(ROOT / "test.py"), "-H", server.url, "--json"]
    done = subprocess.run(command, cwd=server.work, stdout=subprocess.PIPE, text=True)
    return int(json.loads(done.stdout)["passed"])


def bench(server: Server, *load: str) -> list[Any]:
    """The runs of bench.py, as its last line has them."""
    step(f"bench.py {' '.join(load)}")
    folder = tempfile.mkdtemp(dir=server.work)
    command = [sys.executable, str(ROOT / "bench.py"), "-H", server.url, "-o", folder, *load]
    done = subprocess.run(command, cwd=server.work, stdout=subprocess.PIPE, text=True)
    runs: list[Any] = json.loads(done.stdout.splitlines()[-1])["runs"]
    return runs


def by_bench(server: Server) -> Any:
    load = {"--concurrency": STREAMS, "--input-len": PROMPT, "--output-len": TOKENS,
            "--num-prompts": REQUESTS, "--warmup": 1}  # fmt: skip
    words = [str(word) for pair in load.items() for word in pair]
    (run,) = bench(server, "-t", "concurrency", *words)
    return run


def by_its_own(server: Server) -> Any:
    """The same load by the engine's client, which also sends a request before."""
    engine, file = server.engine, server.work / "own.json"
    step(f"{engine.name}'s own client")
    run(engine.command(engine.client, venv=server.venv, url=server.url, model=server.work / "model",
                       file=file, prompt=PROMPT, tokens=TOKENS, requests=REQUESTS, streams=STREAMS),
        engine.environment(server.venv, server.work))  # fmt: skip
    return json.loads(file.read_text())


def compared(server: Server, measure: Callable[[Server], Any]) -> tuple[Any, dict[str, float]]:
    """What a client measured, and what the server says of the same requests."""
    before = counters(server.url)
    found = measure(server)
    now = counters(server.url)
    now.subtract(before)

    def mean(name: str) -> float:
        return 1000 * now[f"{name}_sum"] / now[f"{name}_count"]

    return found, {
        "mean_ttft_ms": mean("time_to_first_token_seconds"),
        "mean_tpot_ms": mean("request_time_per_output_token_seconds"),
    }


def counters(url: str) -> Counter[str]:
    """Sums and counts of its histograms; what differs in a label only is added up."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    found: Counter[str] = Counter()
    for name, value in re.findall(r"^\w+:(\w+_(?:sum|count))\{.*\} (\S+)$", text, re.MULTILINE):
        found[name] += float(value)  # type: ignore[assignment]
    return found


def agrees(ours: Any, server: dict[str, float]) -> bool:
    return bool(abs(ours["mean_tpot_ms"] / server["mean_tpot_ms"] - 1) <= ALLOWED)


# --- telling --------------------------------------------------------------------------------------


def step(text: str) -> None:
    print(f"check-engines: {text}", file=sys.stderr, flush=True)


def show(engine: Engine, passed: int, runs: list[Any],
         *clients: tuple[Any, dict[str, float]]) -> None:  # fmt: skip
    print(f"\n{engine.name} {engine.version} on the CPU: test.py {passed}/8")
    for each in runs:
        print(f"  {each['name']:40}", "valid" if each["valid"] else f"INVALID {each['problems']}")
    what = f"{STREAMS} streams, {PROMPT}/{TOKENS} tokens, {REQUESTS} requests"
    print(f"\n{what:40}     TTFT   server     TPOT   server   tokens/s")
    for name, (figures, server) in zip(("bench.py", "its own client"), clients, strict=True):
        pairs = [n for key, said in server.items() for n in (figures[key], said)]
        print(f"{name:40}", *(f"{n:8.2f}" for n in pairs), f"{figures['output_throughput']:10.0f}")


if __name__ == "__main__":
    raise SystemExit(main())
