#!/usr/bin/env python3
"""Measure a running server: throughput, TTFT, ITL and latency under many loads.

A run with failed requests, empty or short outputs, or a client that could not
keep up is marked INVALID in every output, and the exit code is 1. The last line
on stdout is one JSON document. Defaults are in brackets.
  bench.py -H 10.0.128.193 -t throughput,prefill
  bench.py -t sweep --goodput ttft:500           where is the knee?
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until all is imported, a ^C just ends us

import argparse
import itertools
import json
import math
import random
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from common.settings import setting
from common.signals import Stopped
from common.talk import Failure, clean, counted, read_json, say, write_json
from load import bench_place, check, endpoint, same, sharegpt
from load.arguments import (
    count,
    limit,
    numbers,
    path,
    port,
    positive,
    rates,
    streams,
    types,
    unfit,
    whole,
)
from load.clients import Builtin, Client, Options, Record, die_if_silent, nothing
from load.endpoint import Endpoint
from load.matrix import MATRIX, SWEEP, Case, Overrides, cases, surprises
from load.nvidia import BenchmarkServing
from load.sweep import conflicts, sweep, verdict
from report import render as report
from report.results import Found, load, sound, without_details

SAME = (
    "client", "image_id", "backend", "url", "replicas", "server_version", "goodput", "burstiness",
)  # fmt: skip


class Bench:
    """Runs cases one after the other, and saves each result at once."""

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
            if path.exists():  # another client's or load's result must not be lost
                ends = (f".before{n if n > 1 else ''}" for n in itertools.count(1))
                names = (path.with_name(path.name + end) for end in ends)
                path.replace(next(name for name in names if not name.exists()))
            write_json(path, record)
        record = without_details(record)
        self.records.append(record)
        say(report.one_line(record), "" if record["valid"] else "31")
        if record.get("stopped"):  # now that what it measured is safe
            raise Stopped(record["stopped"])
        if not record.get("completed"):
            die_if_silent(self.server, self.client.options)
        return record

    def earlier(self, case: Case, path: Path) -> Record | None:
        """An earlier valid result of the same thing; an invalid one is measured again."""
        if not path.exists():
            return None
        try:
            record = sound(read_json(path))
            why = self.unlike(record, case) or ("" if record["valid"] is True else "was invalid")
            if self.client.options.detailed and "ttfts" not in record:
                why = why or "has no details of its requests"
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            why = "the file cannot be read"
        if why:
            say(f"{case.name}: measured again: {why}")
        return None if why else record

    def unlike(self, record: Record, case: Case) -> str:
        """How an earlier result differs from what would be measured now; '' if it does not."""
        before = {"model": record["model_id"], "load": record["case"],
                  "data set": record.get("data_set"),
                  **{key: record["metadata"].get(key) for key in SAME}}  # fmt: skip
        now = {"model": self.server.asked, "load": case.facts(), "data set": self.data_set(case),
               **{key: self.metadata[key] for key in SAME}}  # fmt: skip
        other = [key.replace("_", " ") for key in now if now[key] != before[key]]
        return f"the result there is of another {', '.join(other)}" if other else ""

    def data_set(self, case: Case) -> Record | None:
        """Which file the prompts come from; None for random ones."""
        return None if case.input_len else sharegpt.identity(self.client.options.sharegpt)

    def in_folder(self) -> Found:
        """The results so far; with --resume also those of earlier calls."""
        return load(self.folder) if self.resume and self.records else Found(self.records, [])

    def measure(self, case: Case) -> Record:
        try:
            found = self.watched(case)
        except Failure as e:  # only this run has failed: the others go on
            found = nothing(case, e.message)
        rate = case.rate if math.isfinite(case.rate) else "inf"
        record: Record = clean({
            "date": time.strftime("%Y%m%d-%H%M%S"),
            "model_id": self.server.asked,
            "tokenizer_id": None,
            "backend": self.metadata["backend"],
            "request_rate": rate,
            "burstiness": self.metadata["burstiness"],
            "max_concurrency": case.concurrency,
            **found,
            "valid": not found["problems"],
            "case": case.facts(),
            "data_set": self.data_set(case),
            "metadata": self.metadata,
        })  # fmt: skip
        return record

    def watched(self, case: Case) -> Record:
        """The client's record, with problems and notes about the server during the run."""
        before = same.identity(self.server)
        down = endpoint.not_up(self.server)
        witnesses = list(map(same.Witness, self.server.each))
        try:
            found = self.client(case, self.folder)
        finally:
            closed = {witness.name: witness.notes() for witness in witnesses}
        notes = closed.get("", [])
        ended = [name for name, said in closed.items() if name and said]
        stopped = bool(found.get("stopped"))
        changed, seen = ([], []) if stopped else same.changes(self.server, before, ended)
        problems = [*found["problems"], *changed]
        # What the launcher or the server reports counts more than a closed connection.
        notes = [] if problems or before["launched"] or before["started"] else notes
        return {**found, "problems": problems, "notes": [*found["notes"], *down, *seen, *notes]}


def run_all(bench: Bench, types: Sequence[str], change: Overrides, by_rate: bool) -> Record | None:
    """Run every case of the matrix, then the sweep; returns its knee."""
    planned = list(cases(types, change))
    requests = sum(case.num_prompts for case in planned)
    all_of_them = f"{requests:,} request{'s' * (requests != 1)} in all"
    ahead = [f"{counted(len(planned), 'run')} of {all_of_them}"] if planned else []
    say(", then ".join([*ahead, *(["a sweep"] if SWEEP.type in types else [])]))
    for words in surprises(planned, change):
        say(words)
    for case in planned:
        bench.run(case)
    if SWEEP.type not in types:
        return None
    found, knee = sweep(change, bench.run, by_rate)
    say(verdict(found, knee, by_rate))
    return knee


def finish(bench: Bench, knee: Record | None, stopped: bool) -> int:
    """Write and show what there is; returns the exit code."""
    try:
        found = bench.in_folder()
        if found.records:
            report.write(bench.folder, *found)
    finally:  # even on a full disk
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
    add_options(parser, environ)
    args = parser.parse_args(argv)
    if not args.client:
        args.client = "trtllm" if args.image or bench_place.is_installed() else "builtin"
    for conflict in (*contradictions(args), *conflicts(args.type, overrides(args), args.sweep_by)):
        parser.error(conflict)
    try:
        port(setting("PORT", environ))
    except argparse.ArgumentTypeError as e:
        parser.error(f"PORT={e}")
    return args


def add_options(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    kind, sharegpt = setting("BENCH_TYPE", environ), path(setting("SHAREGPT_PATH", environ))
    group = parser.add_argument_group("the server").add_argument
    group("-H", "--host", default=environ.get("HOST", ""), help="name, address or URL")
    group("-p", "--port", type=port, metavar="PORT", help="(of logs/endpoint.json, else 8000)")
    group("-m", "--model", default="", help="(the one that the server serves)")
    group("--gpus", type=count, metavar="N", help="GPUs of the server, for tokens/s per GPU")
    group("--insecure", action="store_true", help="do not verify the https certificate")
    group = parser.add_argument_group("what to measure").add_argument
    group("-t", "--type", type=types, default=kind, help="comma-separated (all but sweep)")
    group("--check", action="store_true", help="say what would be sent, and send no load")
    group("-o", "--output", type=path, metavar="DIR", help=f"({bench_place.RESULTS}/DATE-TIME)")
    group("--resume", action="store_true", help="skip the valid results in -o")
    group("--repeat", type=count, default=1, metavar="N", help="runs of each load (1)")
    group("--goodput", type=limit, nargs="+", action="extend", default=[], metavar="SLO",
          help="limits in ms: ttft:200 tpot:30 e2el:5000")  # fmt: skip
    group = parser.add_argument_group("the load, instead of the type's own").add_argument
    group("--num-prompts", type=count, metavar="N", help="requests a run")
    group("--concurrency", type=streams, default=(), metavar="N,N", help="or unlimited")
    group("--input-len", type=numbers, default=(), metavar="N,N", help="tokens")
    group("--output-len", type=numbers, default=(), metavar="N,N", help="tokens")
    group("--request-rate", type=rates, default=(math.inf,), metavar="R,R", help="per second (inf)")
    group("--burstiness", type=positive, default=1.0, metavar="B", help="below 1: in bursts (1)")
    group("--sweep-by", choices=("concurrency", "rate"), metavar="WHAT", help="rate (concurrency)")
    group("--backend", choices=("openai", "openai-chat"), default="openai", metavar="API",
          help="openai-chat (openai)")  # fmt: skip
    group("--sharegpt", type=path, default=sharegpt, metavar="FILE", help=f"({sharegpt})")
    group = parser.add_argument_group("the client").add_argument
    group("--client", choices=("builtin", "trtllm"), metavar="NAME",
          help="builtin; trtllm with -i, or where it is installed")  # fmt: skip
    group("-i", "--image", default=environ.get("BENCH_IMAGE", ""),
          help="for trtllm: tarball, tag or reference")  # fmt: skip
    group("--tokenizer", default="", metavar="T", help="for trtllm (the model's)")
    group("--warmup", type=whole, metavar="N", help="unmeasured requests before (up to 16)")
    # A new one each time: earlier prompts may still be in the server's prefix cache.
    group("--seed", type=int, default=random.randrange(1 << 31), metavar="N", help="(a new one)")
    group("--timeout", type=positive, default=600.0, metavar="S", help="seconds a request (600)")
    group("--shards", type=whole, default=0, metavar="N", help="client processes (as needed)")
    group("--save-detailed", action="store_true", help="every request's numbers")


def contradictions(args: argparse.Namespace) -> Iterator[str]:
    if args.resume and not args.output:
        yield "--resume needs -o, the folder to go on in"
    planned = {case.output_len for case in cases(args.type, overrides(args))}
    for what, hint in unfit(args.goodput, one_token=1 in args.output_len or planned == {1}):
        yield f"{what}; {hint}" if hint else what
    if args.client == "trtllm":
        given = {"--warmup": args.warmup is not None, "--shards": args.shards,
                 "--insecure": args.insecure}  # fmt: skip
        yield from (f"{flag}: NVIDIA's client cannot, use --client builtin"
                    for flag in given if given[flag])  # fmt: skip
    elif args.tokenizer:
        yield "--tokenizer is for --client trtllm"


def overrides(args: argparse.Namespace) -> Overrides:
    return Overrides(
        num_prompts=args.num_prompts,
        concurrency=args.concurrency,
        input_len=args.input_len,
        output_len=args.output_len,
        rates=args.request_rate,
        repeat=args.repeat,
    )


def options(args: argparse.Namespace, environ: Mapping[str, str]) -> Options:
    return Options(
        sharegpt=args.sharegpt,
        backend=args.backend,
        seed=args.seed,
        warmup=args.warmup,
        burstiness=args.burstiness,
        timeout=args.timeout,
        goodput=dict(args.goodput),
        shards=args.shards,
        detailed=args.save_detailed,
        image=args.image,
        tokenizer=args.tokenizer,
        environ=environ,
    )


def make_client(args: argparse.Namespace, server: Endpoint, environ: Mapping[str, str]) -> Client:
    if args.client == "builtin":
        args.image = ""  # it may be the setting's
        return Builtin(server, options(args, environ))
    if args.image or not bench_place.is_installed():
        args.image = bench_place.provide_image(args.image, environ)
    return BenchmarkServing(server, options(args, environ))


def facts(args: argparse.Namespace, server: Endpoint, client: Client, environ: Mapping[str, str],
          argv: Iterable[str]) -> Record:  # fmt: skip
    return {
        "url": server.url,
        "replicas": len(server.replicas) or None,
        "served_model": server.model,
        "server_version": endpoint.version(server),
        "client": client.name,
        "backend": args.backend,
        "image": args.image or None,
        "image_id": bench_place.image_id(args.image, environ),
        "gpus": (gpus := gpus_of(server, environ)),
        "world_size": args.gpus or world_size(server, gpus),
        "burstiness": args.burstiness,
        "seed": args.seed,
        "goodput": dict(args.goodput),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(["bench.py", *argv]),
    }


def gpus_of(server: Endpoint, environ: Mapping[str, str]) -> list[str]:
    """The server's GPUs, if it is in our allocation or on this machine; else []."""
    job = endpoint.read_record(server.record).get("job")
    if job and job == environ.get("SLURM_JOB_ID"):
        return bench_place.gpu_names(environ)
    return bench_place.gpu_names({}) if endpoint.is_this_machine(server.target.host) else []


def world_size(server: Endpoint, gpus: list[str]) -> int | None:
    """How many GPUs the server uses, by the launcher's record; else 1 on a machine with one."""
    record = endpoint.read_record(server.record)
    fleet = [each.get("gpus") for each in endpoint.up(record)]
    counts = [len(ids) for ids in fleet if isinstance(ids, list)]
    if counts and len(counts) == len(fleet) and all(counts):
        return sum(counts)
    said = record.get("world_size")
    return said if type(said) is int and said > 0 else 1 if len(gpus) == 1 else None


def bench(argv: Sequence[str] | None = None) -> int:
    environ = bench_place.environment()
    args = parse(argv, environ)
    server = endpoint.find_endpoint(
        args.host, args.port, args.model, environ, verify=not args.insecure
    )
    if args.check:
        return check.check(server, args.client, options(args, environ), args.type, overrides(args))
    if any(case.input_len is None for case in cases(args.type, overrides(args))):
        sharegpt.provide(args.sharegpt)  # now, and not after an hour of runs
    client = make_client(args, server, environ)
    folder = bench_place.result_folder(args.output, args.resume, "*.json")
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
    return bench_place.exit_code(lambda: bench(argv))


if __name__ == "__main__":
    raise SystemExit(main())
