"""Measure other benchmark clients as bench_client.py measures ours: against the same clock.

    make bench-peers                                # vLLM's client, in a folder that is removed
    make bench-peers ENGINE=vllm,sglang FOLDER=/var/tmp/engines        # kept for the next time

The server has one core, the client the other. What a client reports is compared with what the
server sent in that very run. Each point is the better one of a few runs, for every client alike:
on a machine with other work all of them have bad luck. Each run is told on stderr, the table of the
errors is for the README.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tests import bench_client
from tests.bench_client import ITL_MS, PROMPT, TOKENS, TTFT_MS, Point
from tests.engines import tiny_model
from tests.engines.engines import ENGINES, SGLANG, VLLM, Engine, run


class Load(NamedTuple):
    """What a client is to send, and the server's timetable in ms."""

    streams: int
    requests: int
    ttft: float = TTFT_MS
    itl: float = ITL_MS


CEILING = Load(bench_client.CEILING_STREAMS, bench_client.CEILING_REQUESTS, 0, 0)


@dataclass(frozen=True)
class Peer:
    name: str
    engine: Engine
    more: str = ""  # flags besides the engine's: the load, and no request before it


PEERS = (
    Peer("vllm bench serve", VLLM),
    Peer("sglang.bench_serving", SGLANG, "--warmup-requests 0"),
    Peer("sglang.bench_serving --rust-client", SGLANG, "--warmup-requests 0 --rust-client"),
)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="bench-peers-") as scratch:
        work = Path(scratch)
        venvs = {n: ENGINES[n].install((args.folder or work).resolve()) for n in args.engine}
        tiny_model.write(work / "model")
        with bench_client.server() as (port, pid):
            bench_client.separate_cores(pid)  # the clients inherit this process' core
            clients = {"bench.py (loadgen)": ours(port)} | {
                f"{peer.name} {peer.engine.version}": theirs(
                    peer, venvs[peer.engine.name], work, port
                )
                for peer in PEERS
                if peer.engine.name in venvs
            }
            show(clients, args.streams, args.repeat)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", type=names, default=["vllm"], help=",".join(ENGINES))
    parser.add_argument("--folder", type=Path, help="keep what is installed here")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--streams", type=numbers, default=[1, 16, 64, 256])
    return parser.parse_args(argv)


def names(text: str) -> list[str]:
    if unknown := set(text.split(",")) - set(ENGINES):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(ENGINES)}")
    return text.split(",")


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


# --- one run of a client: the load, measured by it and by the server ------------------------------


def ours(port: int) -> Callable[[Load], Point]:
    def measure(load: Load) -> Point:
        return bench_client.once(port, *load)[0]

    return measure


def theirs(peer: Peer, venv: Path, work: Path, port: int) -> Callable[[Load], Point]:
    file, engine = work / "result.json", peer.engine
    fixed = {"venv": venv, "model": work / "model", "file": file, "prompt": PROMPT,
             "tokens": TOKENS, "url": f"http://127.0.0.1:{port}"}  # fmt: skip

    def measure(load: Load) -> Point:
        file.unlink(missing_ok=True)  # SGLang appends
        bench_client.admin(port, f"config?ttft_ms={load.ttft}&itl_ms={load.itl}")
        counts = {"streams": load.streams, "requests": load.requests}
        words = engine.command(f"{engine.client} {peer.more}", **fixed, **counts)
        run(words, engine.environment(venv, work))
        truth = bench_client.admin(port, "stats")
        return compared(peer.name, load.requests, json.loads(file.read_text()), truth)

    return measure


def compared(name: str, requests: int, said: Any, truth: Any) -> Point:
    """A client's own JSON and the server's statistics; both are of this load only, or worthless."""
    counts = {name: said["completed"], "the server": truth["requests"]}
    if wrong := [f"{who} {count}" for who, count in counts.items() if count != requests]:
        raise SystemExit(f"bench-peers: {name}: of {requests} requests {', '.join(wrong)} counted")
    ttft = truth["ttft_ms"]["mean"], said["mean_ttft_ms"]
    itl_p99 = truth["itl_ms"]["p99"], said["p99_itl_ms"]
    return Point(ttft, itl_p99, truth["requests_per_s"], 0, True)


# --- all of them ----------------------------------------------------------------------------------


def show(clients: dict[str, Callable[[Load], Point]], streams: list[int], repeat: int) -> None:
    """The README's table: a line a client, TTFT's and ITL p99's error at each number of streams."""
    print(f"Timetable: TTFT {TTFT_MS} ms, ITL {ITL_MS} ms, {TOKENS} tokens. Errors in ms: mean "
          "TTFT / ITL p99.\n")  # fmt: skip
    print(f"| client | {' | '.join(f'{n} streams' for n in streams)} | most requests/s |")
    print(f"|---|{'--:|' * (len(streams) + 1)}")
    for name, measure in clients.items():
        points = [better(name, measure, Load(n, bench_client.requests(n)), repeat) for n in streams]
        rate = max(measure(CEILING).rate for _ in range(repeat))
        print(f"| {name} | {' | '.join(map(errors, points))} | {rate:.0f} |", flush=True)


def better(name: str, measure: Callable[[Load], Point], load: Load, repeat: int) -> Point:
    points = [measure(load) for _ in range(repeat)]
    for point in points:
        print(name, bench_client.row(load.streams, point), file=sys.stderr)
    return min(points, key=lambda point: point.error)


def errors(point: Point) -> str:
    return " / ".join(f"{said - sent:+.2f}" for sent, said in (point.ttft, point.itl_p99))


if __name__ == "__main__":
    raise SystemExit(main())
