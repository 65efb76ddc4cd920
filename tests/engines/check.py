"""test.py and bench.py against real engines on the CPU, from nothing: no GPU, no model to download.

    make check-engines                              # vLLM, in a folder that is removed afterwards
    make check-engines ENGINE=vllm,sglang FOLDER=/var/tmp/engines      # kept for the next time
    make check-engines ENGINE=vllm CLUSTER=1        # as root: two nodes, and a container, too
    make check-engines ENGINE=llamacpp,transformers

vLLM and SGLang are served by run_sbatch.py, without a container, and ended in three ways: by ^C,
and by what may happen to the process that does the work. The engines come through pip (vLLM 3.5 GB,
SGLang 11 GB, llama.cpp 0.2 GB, transformers 1 GB); the model is made on the spot, its weights by
chance. One load is also measured by the engine's own
client, where it has one, and compared with what the server says of itself (/metrics).
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
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engines import on_cluster, tiny_model
from tests.engines.ends import ENDS, End, play
from tests.engines.engines import (
    ENGINES,
    PROMPT,
    READY_SECONDS,
    REQUESTS,
    STREAMS,
    TOKENS,
    VLLM,
    Engine,
    run,
)

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("--client", "builtin", "--input-len", "128", "--num-prompts")
LOADS = (
    ["-t", "throughput,latency", "--output-len", "32"],
    ["-t", "prefill"],
    ["-t", "throughput", "--output-len", "32", "--request-rate", "2"],
    ["-t", "latency", "--output-len", "32", "--backend", "openai-chat"],
)
ALLOWED = 0.10  # how far bench.py may be from the server's own TPOT


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", default="vllm", help=",".join(ENGINES))
    parser.add_argument("--folder", type=Path, help="keep what is installed here")
    parser.add_argument("--cluster", action="store_true", help="vLLM on the tests' cluster, too")
    args = parser.parse_args(argv)
    if unknown := set(args.engine.split(",")) - set(ENGINES):
        parser.error(f"{', '.join(unknown)}: not one of {', '.join(ENGINES)}")
    if args.cluster and "vllm" not in args.engine.split(","):
        parser.error("--cluster serves vLLM only")
    # Started in the background of a script, we would hand an ignored SIGINT on to every launch.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    good = [check(ENGINES[name], args) for name in args.engine.split(",")]
    return 0 if all(good) else 1


def check(engine: Engine, args: argparse.Namespace) -> bool:
    """Install, serve, test, measure, tell; nothing but the folder is left."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="check-engines-") as scratch:
        work = Path(scratch)
        step(f"{engine.requirement} {engine.version} below {args.folder or work}")
        venv = engine.install((args.folder or work).resolve())
        if args.cluster and engine is VLLM and not on_cluster.check(engine, venv):
            return False
        tiny_model.write(work / "model")
        engine.prepare(venv, work / "model")
        with serving(engine, venv, work) as (_, url):
            good = examine(Server(engine, venv, work, url))
            if not good:
                step(f"the server's last words:\n{(work / 'server.log').read_text()[-3000:]}")
        ends = [ends_well(end, engine, venv, work) for end in ENDS if engine.inner]
        return good and all(ends)


@dataclass(frozen=True)
class Server:
    engine: Engine
    venv: Path
    work: Path
    url: str


@contextmanager
def serving(
    engine: Engine, venv: Path, work: Path, **more: str
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server on a free port, and its URL; its whole process group is gone afterwards."""
    port, log = free_port(), work / "server.log"
    with log.open("wb") as sink:
        server = subprocess.Popen(
            engine.serving(venv, work / "model", port),
            env={**engine.environment(venv, work), **more},
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(server, url, log)
        yield server, url
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


def ends_well(end: End, engine: Engine, venv: Path, work: Path) -> bool:
    """Whether a launch ends as it should, and nothing is left of it."""
    step(f"launched again: {end.name}")
    with serving(engine, venv, work, **end.environ) as (server, url):
        port = int(url.rpartition(":")[2])
        wrong = play(end, server, engine.inner, port, work / "server.log")
    print(f"  {end.name}: {wrong or f'exit code {end.code}, and nothing is left'}", flush=True)
    return not wrong


# --- what has to hold -----------------------------------------------------------------------------


def examine(server: Server) -> bool:
    passed = smoke(server)
    short = (*SHORT, str(server.engine.prompts))
    runs = [run for load in LOADS for run in bench(server, *load, *short)]
    if not all(run["valid"] for run in runs):
        show(server.engine, passed, runs)
        return False
    clients = [by_bench] * bool(counters(server.url)) + [by_its_own] * bool(server.engine.client)
    figures = [compared(server, client) for client in clients]
    show(server.engine, passed, runs, *figures)
    return passed and all(agrees(*f) for f in figures[:1])


def smoke(server: Server) -> bool:
    """Did all checks pass of what it serves? Their lines are on stderr."""
    step("test.py")
    command = [sys.executable, str(ROOT / "test.py"), "-H", server.url, "--json"]
    return subprocess.run(command, cwd=server.work, stdout=subprocess.DEVNULL).returncode == 0


def bench(server: Server, *load: str) -> list[Any]:
    """The runs of bench.py, as its last line has them."""
    step(f"bench.py {' '.join(load)}")
    folder = tempfile.mkdtemp(dir=server.work)
    command = [sys.executable, str(ROOT / "bench.py"), "-H", server.url, "-o", folder, *load]
    done = subprocess.run(command, cwd=server.work, stdout=subprocess.PIPE, text=True)
    if not done.stdout:  # it has said why
        return [{"name": " ".join(load), "valid": False, "problems": ["no figures"]}]
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

    means = {
        "mean_ttft_ms": ratio(now, "time_to_first_token_seconds_sum",
                              "time_to_first_token_seconds_count"),
        "mean_tpot_ms": ratio(now, "request_time_per_output_token_seconds_sum",
                              "request_time_per_output_token_seconds_count")
        or ratio(now, "tokens_predicted_seconds_total", "tokens_predicted_total"),
    }  # fmt: skip
    return found, means


def ratio(counts: Counter[str], seconds: str, count: str) -> float:
    """A mean in ms; 0 where the server does not count that."""
    return 1000 * counts[seconds] / counts[count] if counts[count] else 0.0


def counters(url: str) -> Counter[str]:
    """Sums and counts of its histograms; what differs in a label only is added up."""
    found: Counter[str] = Counter()
    try:
        with urllib.request.urlopen(f"{url}/metrics") as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError:  # transformers has none
        return found
    line = r"^\w+:(\w+_(?:sum|count|total))(?:\{.*\})? (\S+)$"
    for name, value in re.findall(line, text, re.MULTILINE):
        found[name] += float(value)  # type: ignore[assignment]
    return found


def agrees(ours: Any, server: dict[str, float]) -> bool:
    return bool(abs(ours["mean_tpot_ms"] / server["mean_tpot_ms"] - 1) <= ALLOWED)


# --- telling --------------------------------------------------------------------------------------


def step(text: str) -> None:
    print(f"check-engines: {text}", file=sys.stderr, flush=True)


def show(engine: Engine, passed: bool, runs: list[Any],
         *clients: tuple[Any, dict[str, float]]) -> None:  # fmt: skip
    print(f"\n{engine.name} {engine.version} on the CPU: test.py {'ok' if passed else 'FAILED'}")
    for each in runs:
        print(f"  {each['name']:40}", "valid" if each["valid"] else f"INVALID {each['problems']}")
    if not clients:  # it counts nothing that they could be compared with
        return
    what = f"{STREAMS} streams, {PROMPT}/{TOKENS} tokens, {REQUESTS} requests"
    print(f"\n{what:40}     TTFT   server     TPOT   server   tokens/s")
    for name, (figures, server) in zip(("bench.py", "its own client"), clients, strict=False):
        pairs = [n for key, said in server.items() for n in (figures[key], said)]
        print(f"{name:40}", *(f"{n:8.2f}" for n in pairs), f"{figures['output_throughput']:10.0f}")


if __name__ == "__main__":
    raise SystemExit(main())
