#!/usr/bin/env python3
"""Measure a running server: throughput, TTFT, ITL and latency under many loads.

A run with failed requests, empty or short outputs, another model, or a client
that could not keep up is INVALID: in every output, and exit code 1.

  bench.py                                         the server of run_sbatch.py
  bench.py -H 10.0.128.193 -t throughput,prefill
  bench.py -H 10.0.128.193 -i IMAGE                by NVIDIA's own client
  bench.py -t sweep --goodput ttft:500             where is the knee?

The last line on stdout is one JSON document; report.py compares two results.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import bench_place
import endpoint
import report
from clients import BenchmarkServing, Builtin, Client, Options, Record, nothing
from endpoint import Endpoint
from matrix import MATRIX, SWEEP, TYPES, Case, Overrides, cases
from nodes import Failure, complain, say
from sweep import stop_reason, sweep

GOODPUT_NAMES = ("ttft", "tpot", "e2el")
RESULTS = "results"
SAME = ("client", "backend", "url", "goodput", "burstiness")  # or --resume measures again


class Bench:
    """Runs cases one after the other, keeps each result the moment it is there."""

    def __init__(
        self, server: Endpoint, client: Client, folder: Path, metadata: Record, resume: bool
    ) -> None:
        self.server, self.client, self.folder = server, client, folder
        self.metadata, self.resume = metadata, resume
        self.records: list[Record] = []

    def run(self, case: Case) -> Record:
        path = self.folder / f"{case.name}.json"
        record = self.earlier(case, path) if self.resume else None
        if record is None:
            record = self.measure(case)
            write_json(path, record)
        self.records.append(record)
        say(report.one_line(record))
        return record

    def earlier(self, case: Case, path: Path) -> Record | None:
        """A valid result of the same thing; an invalid one is worth another try."""
        try:
            record: Record = json.loads(path.read_text())
            same = (
                record["model_id"] == self.server.asked
                and record["case"] == case.facts()
                and all(record["metadata"][key] == self.metadata[key] for key in SAME)
            )
            return record if record["valid"] and same else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def in_folder(self) -> list[Record]:
        """With --resume also what earlier calls measured."""
        return report.load(self.folder) if self.resume and self.records else self.records

    def measure(self, case: Case) -> Record:
        try:
            before = endpoint.identity(self.server)
            found = self.client(case, self.folder)
            problems = [*found["problems"], *endpoint.changes(self.server, before)]
        except Failure as e:  # this run's own; the others are worth having
            found = nothing(case, e.message)
            problems = found["problems"]
        rate = case.rate if math.isfinite(case.rate) else "inf"
        return {
            "date": time.strftime("%Y%m%d-%H%M%S"),
            "model_id": self.server.asked,
            "tokenizer_id": None,
            "backend": self.metadata["backend"],
            "request_rate": rate,
            "burstiness": self.metadata["burstiness"],
            "max_concurrency": case.concurrency,
            **found,
            "valid": not problems,
            "problems": problems,
            "case": case.facts(),
            "metadata": self.metadata,
        }


def write_json(path: Path, data: Any) -> None:  # noqa: ANN401
    """All of it or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=2, default=str) + "\n")
    part.replace(path)


def run_all(bench: Bench, types: Sequence[str], change: Overrides, by_rate: bool) -> Record | None:
    """Every case of the matrix, then the sweep; its knee."""
    for case in cases(types, change):
        bench.run(case)
    if SWEEP.type not in types:
        return None
    found, knee = sweep(change, bench.run, by_rate)
    say(f"sweep: {stop_reason(found, by_rate) or 'the end of the range'}; the knee: "
        + (report.one_line(knee) if knee else "none, the first step was too much"))  # fmt: skip
    return knee


def finish(bench: Bench, knee: Record | None, stopped: bool) -> int:
    """Write what there is, show it, and say how it went."""
    try:
        report.write(bench.folder, bench.in_folder())
    finally:  # on a full disk, too
        invalid = show(bench, knee, stopped)
    return 1 if invalid or not bench.records else 0


def show(bench: Bench, knee: Record | None, stopped: bool) -> list[str]:
    print(report.table(bench.records))
    invalid = [r["case"]["name"] for r in bench.records if not r["valid"]]
    print(json.dumps(
        {
            "valid": not invalid and not stopped and bool(bench.records),
            "stopped": stopped,
            "folder": str(bench.folder),
            "model": bench.server.asked,
            "client": bench.client.name,
            "invalid": invalid,
            "knee": knee and knee["case"]["name"],
            "runs": [report.brief(r) for r in bench.records],
        }
    ))  # fmt: skip
    return invalid


# --- the command line -----------------------------------------------------------------------------


def numbers(text: str) -> tuple[int, ...]:
    found = tuple(int(word) for word in text.split(","))
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text}: all have to be 1 or more")
    return found


def streams(text: str) -> tuple[int | None, ...]:
    return tuple(None if w in ("unlimited", "inf") else numbers(w)[0] for w in text.split(","))


def rates(text: str) -> tuple[float, ...]:
    found = tuple(float(word) for word in text.split(","))
    if not all(rate > 0 for rate in found):
        raise argparse.ArgumentTypeError(
            f"{text}: a rate is requests a second, more than 0, or inf"
        )
    return found


def positive(text: str) -> float:
    found = float(text)
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: has to be more than 0")
    return found


def types(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    if wrong := [t for t in found if t not in (*TYPES, SWEEP.type, "all")]:
        known = ", ".join((*TYPES, SWEEP.type))
        raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: not one of {known}")
    return tuple(t for word in found for t in (TYPES if word == "all" else (word,)))


def limit(text: str) -> tuple[str, float]:
    name, _, ms = text.partition(":")
    if name not in GOODPUT_NAMES:
        raise argparse.ArgumentTypeError(
            f"{text}: write one of {', '.join(GOODPUT_NAMES)}, :, and ms"
        )
    return name, float(ms)


def count(text: str) -> int:
    return numbers(text)[0]


def parse(argv: Sequence[str] | None, environ: Mapping[str, str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=(__doc__ or "").strip(),
        epilog=f"types: {', '.join(row.type for row in (*MATRIX, SWEEP))}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=28
        ),
        allow_abbrev=False,
    )
    default_port, sharegpt = environ.get("PORT"), environ.get("SHAREGPT_PATH") or "ShareGPT.json"
    add = parser.add_argument
    add("-H", "--host", default=environ.get("HOST", ""), help="name, address or URL")
    add("-p", "--port", type=count, default=default_port, metavar="PORT", help="(8000)")
    add("--insecure", action="store_true", help="do not check https certificates")
    add("-m", "--model", default=environ.get("MODEL", ""), help="(what the server serves)")
    add(
        "-t",
        "--type",
        type=types,
        default=environ.get("BENCH_TYPE") or "all",
        help="comma-separated (all but sweep)",
    )
    add("-o", "--output", type=Path, metavar="DIR", help=f"({RESULTS}/DATE-TIME)")
    add(
        "-i",
        "--image",
        default=environ.get("BENCH_IMAGE", ""),
        help="tarball, tag, reference for --client trtllm",
    )
    add("--client", choices=("builtin", "trtllm"), metavar="NAME", help="builtin, trtllm (with -i)")
    group = parser.add_argument_group("the load, instead of the type's own").add_argument
    group("--num-prompts", type=count, metavar="N", help="requests a run")
    group("--concurrency", type=streams, default=(), metavar="N,N", help="or unlimited")
    group("--input-len", type=numbers, default=(), metavar="N,N", help="tokens")
    group("--output-len", type=numbers, default=(), metavar="N,N", help="tokens")
    group("--request-rate", type=rates, default=(math.inf,), metavar="R,R", help="per second")
    group("--burstiness", type=positive, default=1.0, metavar="B", help="1: Poisson, less: bursts")
    group("--sweep-by", choices=("concurrency", "rate"), default="concurrency")
    group("--backend", choices=("openai", "openai-chat"), default="openai")
    group(
        "--sharegpt",
        type=Path,
        default=Path(sharegpt),
        metavar="FILE",
        help="the data set; downloaded if missing",
    )
    group("--tokenizer", default="", metavar="T", help="for --client trtllm")
    group = parser.add_argument_group("the measurement").add_argument
    group("--repeat", type=count, default=1, metavar="N", help="runs of each load (1)")
    group("--warmup", type=int, metavar="N", help="unmeasured requests before (up to 16)")
    # A new one each time: earlier prompts may still be in the server's prefix cache.
    group("--seed", type=int, default=random.randrange(1 << 31), metavar="N", help="(a new one)")
    group(
        "--goodput",
        type=limit,
        nargs="+",
        default=[],
        metavar="SLO",
        help="ttft:200 tpot:30 e2el:5000, in ms",
    )
    group("--timeout", type=positive, default=600.0, metavar="S", help="of a request (600)")
    group("--shards", type=int, default=0, metavar="N", help="client processes (as needed)")
    group("--save-detailed", action="store_true", help="every request's numbers")
    group("--resume", action="store_true", help="skip the valid results in -o")
    args = parser.parse_args(argv)
    if args.resume and not args.output:
        parser.error("--resume needs -o, the folder to go on in")
    return args


def overrides(args: argparse.Namespace) -> Overrides:
    return Overrides(
        args.num_prompts,
        args.concurrency,
        args.input_len,
        args.output_len,
        args.request_rate,
        args.repeat,
    )


def options(args: argparse.Namespace, environ: Mapping[str, str]) -> Options:
    return Options(
        args.backend, args.seed, args.warmup, args.burstiness, args.timeout, dict(args.goodput),
        args.shards, args.save_detailed, args.sharegpt, args.image, args.tokenizer, environ,
    )  # fmt: skip


def choose_client(args: argparse.Namespace, server: Endpoint, environ: Mapping[str, str]) -> Client:
    installed = bench_place.is_installed()
    if args.client == "builtin" or not (args.client or args.image or installed):
        return Builtin(server, options(args, environ))
    if args.image or not installed:
        args.image = bench_place.provide_image(args.image, environ)
    return BenchmarkServing(server, options(args, environ))


def result_folder(args: argparse.Namespace) -> Path:
    folder: Path = args.output or Path(RESULTS) / time.strftime("%Y%m%d-%H%M%S")
    if not args.resume and any(folder.glob("*.json")):
        raise Failure(
            f"{folder} holds results already", "--resume goes on; or name another with -o"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def facts(args: argparse.Namespace, server: Endpoint, client: Client, environ: Mapping[str, str],
          argv: Iterable[str]) -> Record:  # fmt: skip
    return {
        "url": server.url,
        "served_model": server.model,
        "server_version": endpoint.version(server),
        "client": client.name,
        "backend": args.backend,
        "image": args.image or None,
        "image_id": bench_place.image_id(args.image, environ),
        "gpus": bench_place.gpu_names(environ),
        "burstiness": args.burstiness,
        "seed": args.seed,
        "goodput": dict(args.goodput),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(["bench.py", *argv]),
    }


def bench(argv: Sequence[str] | None = None) -> int:
    environ = endpoint.environment()
    args = parse(argv, environ)
    server = endpoint.find_endpoint(
        args.host, args.port, args.model, environ, verify=not args.insecure
    )
    client = choose_client(args, server, environ)
    folder = result_folder(args)
    metadata = facts(args, server, client, environ, sys.argv[1:] if argv is None else argv)
    say(f"{server.url} serves {server.model}; measured by {client.name}, results in {folder}")
    work = Bench(server, client, folder, metadata, args.resume)
    try:
        knee = run_all(work, args.type, overrides(args), args.sweep_by == "rate")
    except BaseException:
        say("stopped: what is finished is kept")
        finish(work, None, stopped=True)
        raise
    return finish(work, knee, stopped=False)


def main(argv: Sequence[str] | None = None) -> int:
    bench_place.end_on_signals()
    try:
        return bench(argv)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Failure, OSError) as error:
        return complain(error)


if __name__ == "__main__":
    raise SystemExit(main())
