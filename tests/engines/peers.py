"""Measure other benchmark clients as bench_client.py measures ours: against the same clock.

    make bench-peers                              # vLLM's two, in a folder that is removed
    make bench-peers ENGINE=vllm,vllm-rs,sglang FOLDER=/var/tmp/engines  # kept for the next time

The server has one core, the client the other. What a client reports is compared with what the
server sent in that very run. All clients are run in turn, a few rounds, and each point is the
better one of its runs, for ours as for theirs: on a machine with other work all have bad luck. Each
run is told on stderr; the table of the errors, on stdout, is that of docs/figures.md.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tests import bench_client
from tests.bench_client import ITL_MS, PROMPT, TOKENS, TTFT_MS, Point
from tests.engines import tiny_model
from tests.engines.engines import ENGINES, SGLANG, VLLM, Engine, run, site_packages


class Load(NamedTuple):
    """What a client is to send, and the server's timetable in ms."""

    streams: int
    requests: int
    ttft: float = TTFT_MS
    itl: float = ITL_MS


CEILING = Load(bench_client.CEILING_STREAMS, bench_client.CEILING_REQUESTS, 0, 0)


def finish_vllm_rs(venv: Path) -> None:
    (venv / "bin/vllm-rs").symlink_to(site_packages(venv) / "vllm/vllm-rs")


# The client in Rust is a program of its own, in the wheel for NVIDIA only.
VLLM_RS = replace(
    VLLM,
    name="vllm-rs",
    version="0.33.0",
    requirement="vllm",
    pip_options=("--no-deps",),
    finish=finish_vllm_rs,
    client=VLLM.client.replace("bin/vllm", "bin/vllm-rs"),
)
INSTALLS = {name: each for name, each in ENGINES.items() if each.client} | {"vllm-rs": VLLM_RS}


@dataclass(frozen=True)
class Peer:
    name: str
    engine: Engine
    more: str = ""  # flags besides the engine's: the load, and no request before it


PEERS = (
    Peer("vllm bench serve", VLLM),
    Peer("vllm-rs bench serve", VLLM_RS),
    Peer("sglang.bench_serving", SGLANG, "--warmup-requests 0"),
    Peer("sglang.bench_serving --rust-client", SGLANG, "--warmup-requests 0 --rust-client"),
)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="bench-peers-") as scratch:
        work = Path(scratch)
        venvs = {n: INSTALLS[n].install((args.folder or work).resolve()) for n in args.engine}
        tiny_model.write(work / "model")
        with bench_client.server() as (port, pid):
            bench_client.separate_cores(pid)  # the clients inherit this process' core
            clients = {"bench.py (loadgen)": lambda load: bench_client.once(port, *load)[0]}
            for peer in PEERS:
                if venv := venvs.get(peer.engine.name):
                    name = f"{peer.name} {peer.engine.version}"
                    clients[name] = partial(measure, peer, venv, work, port)
            show(clients, args.streams, args.repeat)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", default="vllm,vllm-rs", help=",".join(INSTALLS))
    parser.add_argument("--folder", type=Path, help="keep what is installed here")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--streams", default="1,16,64,256")
    args = parser.parse_args(argv)
    args.engine, args.streams = args.engine.split(","), [int(n) for n in args.streams.split(",")]
    if unknown := set(args.engine) - set(INSTALLS):
        parser.error(f"{', '.join(unknown)}: not one of {', '.join(INSTALLS)}")
    return args


def measure(peer: Peer, venv: Path, work: Path, port: int, load: Load) -> Point:
    """One run of a client; the point is what it and the server say of the same requests."""
    file, engine = work / "result.json", peer.engine
    file.unlink(missing_ok=True)  # SGLang appends
    bench_client.admin(port, f"config?ttft_ms={load.ttft}&itl_ms={load.itl}")
    words = engine.command(f"{engine.client} {peer.more}", venv=venv, model=work / "model",
                           url=f"http://127.0.0.1:{port}", file=file, prompt=PROMPT, tokens=TOKENS,
                           requests=load.requests, streams=load.streams)  # fmt: skip
    run(words, engine.environment(venv, work))
    truth = bench_client.admin(port, "stats")
    return compared(peer.name, load.requests, json.loads(file.read_text()), truth)


def compared(name: str, requests: int, said: Any, truth: Any) -> Point:
    """A client's own JSON and the server's statistics; both are of this load only, or worthless."""
    counts = {name: said["completed"], "the server": truth["requests"]}
    if wrong := [f"{who} {count}" for who, count in counts.items() if count != requests]:
        raise SystemExit(f"bench-peers: {name}: of {requests} requests {', '.join(wrong)} counted")
    ttft = truth["ttft_ms"]["mean"], said["mean_ttft_ms"]
    itl_p99 = truth["itl_ms"]["p99"], said["p99_itl_ms"]
    return Point(ttft, itl_p99, truth["requests_per_s"], 0, True)


def show(clients: dict[str, Callable[[Load], Point]], streams: list[int], repeat: int) -> None:
    """A line a client: the errors of TTFT and of ITL p99 at each number of streams."""
    loads = [*(Load(n, bench_client.requests(n)) for n in streams), CEILING]
    rounds = [
        {
            (name, load): told(name, client, load)
            for name, client in clients.items()
            for load in loads
        }
        for _ in range(repeat)
    ]
    print(f"Timetable: TTFT {TTFT_MS} ms, ITL {ITL_MS} ms, {TOKENS} tokens. Errors in ms: mean "
          "TTFT / ITL p99.\n")  # fmt: skip
    print(f"| client | {' | '.join(map(str, streams))} streams | most requests/s |")
    print(f"|---|{'--:|' * len(loads)}")
    for name in clients:
        better = [
            min((r[name, load] for r in rounds), key=lambda p: p.error) for load in loads[:-1]
        ]
        rate = max(r[name, CEILING].rate for r in rounds)
        print(f"| {name} | {' | '.join(map(errors, better))} | {rate:.0f} |")


def told(name: str, client: Callable[[Load], Point], load: Load) -> Point:
    point = client(load)
    print(name, bench_client.row(load.streams, point), file=sys.stderr, flush=True)
    return point


def errors(point: Point) -> str:
    return " / ".join(f"{said - sent:+.2f}" for sent, said in (point.ttft, point.itl_p99))


if __name__ == "__main__":
    raise SystemExit(main())
