"""NVIDIA's own measuring client, benchmark_serving: its command line, and a check of its result."""

from __future__ import annotations

import math
import subprocess
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.talk import die, read_json
from load import bench_place
from load.clients import Options, Record, die_if_silent, nothing
from load.counters import Counters
from load.endpoint import Endpoint
from load.matrix import Case
from load.metrics import DETAILS, KINDS, METRICS, PERCENTILES, Distribution, growth, percentiles
from load.streams import Shape, judge_shapes, shape

TOO_MUCH = 1e15  # more than any real figure
TOTALS = (
    "duration", "total_input_tokens", "total_output_tokens", "request_throughput",
    "output_throughput", "total_token_throughput", "user_throughput",
)  # fmt: skip
GOODPUT = ("request_goodput", "request_goodput:")  # the names in newer and in older versions
FIGURES = (*TOTALS, *(f"{k}_{name}_ms" for k in KINDS for name in METRICS), *GOODPUT)
UNKNOWN = "NVIDIA's client does not say whether it kept up with the server"


class BenchmarkServing:
    """TensorRT-LLM's own client, in its container or where it is installed."""

    name = "trtllm"

    def __init__(self, endpoint: Endpoint, options: Options) -> None:
        self.endpoint, self.options = endpoint, options
        self.counters = Counters(endpoint, extra=1)  # it tries one request first

    def __call__(self, case: Case, folder: Path) -> Record:
        options = self.options
        die_if_silent(self.endpoint, options)  # this client would wait for hours
        file = folder.resolve() / f"{case.name}.benchmark_serving"  # no .json: it is no result yet
        file.unlink(missing_ok=True)
        environ = unproxied(options.environ, self.endpoint.target.host)
        command = [
            *bench_place.prefix(options.image, self.mounts(folder), environ),
            *benchmark_serving(case, self.endpoint, options, file),
        ]
        limit = longest(case, options.timeout)
        hint = "--client builtin needs no container"
        try:
            with self.counters.watching():
                status, words = bench_place.run(command, environ, hint, limit)
        except subprocess.TimeoutExpired:
            return nothing(case, f"benchmark_serving did not end within {limit:g} s")
        try:
            record: Record = read_json(file)
        except (OSError, ValueError):
            return nothing(case, "benchmark_serving wrote no result (exit code "
                           f"{status}): {words or 'it said nothing'}")  # fmt: skip
        try:
            record = judge(case, record, options.detailed)
        except (LookupError, TypeError, ValueError, AttributeError) as e:
            return nothing(case, f"benchmark_serving's result cannot be read: {e!r}; it is kept as "
                           f"{file.name}")  # fmt: skip
        file.unlink()
        self.counters.add_to(record, case.name)
        return record

    def mounts(self, folder: Path) -> list[Path]:
        model = Path(self.options.tokenizer or self.endpoint.asked)
        paths = [folder.resolve()]
        paths += [self.options.sharegpt.resolve().parent] if self.options.sharegpt.exists() else []
        return paths + ([model.resolve()] if model.is_dir() else [])


def unproxied(environ: Mapping[str, str], host: str) -> dict[str, str]:
    """The environment without a proxy for this host: the client's library would use HTTP_PROXY."""
    names = ("NO_PROXY", "no_proxy")
    return {**environ, **{n: ",".join(filter(None, (environ.get(n), host))) for n in names}}


def longest(case: Case, timeout: float) -> float:
    """Seconds a run may take: the timeout for every round, and time to start and to read."""
    rounds = case.num_prompts / (case.concurrency or case.num_prompts)
    return timeout * (rounds + 2) + case.num_prompts / case.rate


def benchmark_serving(case: Case, endpoint: Endpoint, options: Options, file: Path) -> list[str]:
    """The command line of the client; 1.1.0 has all of these options."""
    served = endpoint.model if endpoint.model != endpoint.asked else ""
    target = endpoint.target
    if endpoint.prefix.endswith("/"):
        die(f"{endpoint.url}: NVIDIA's client only works below /v1", hint="use --client builtin")
    plain = not target.tls and not endpoint.prefix and ":" not in target.host
    limits = [f"{name}:{ms:g}" for name, ms in options.goodput.items()]
    return [
        bench_place.PYTHON, "-m", "tensorrt_llm.serve.scripts.benchmark_serving",
        "--backend", options.backend,
        *(["--host", target.host, "--port", str(target.port)] if plain
          else ["--base-url", endpoint.url]),
        "--model", endpoint.asked,
        *(["--served-model-name", served] if served else []),
        *(["--tokenizer", options.tokenizer] if options.tokenizer else []),
        *data_set(case, options),
        "--num-prompts", str(case.num_prompts),
        *(["--max-concurrency", str(case.concurrency)] if case.concurrency else []),
        *(["--request-rate", f"{case.rate:g}", "--burstiness", f"{options.burstiness:g}"]
          if math.isfinite(case.rate) else []),
        "--ignore-eos",
        # The same seed means the same prompts, which would meet an earlier run's prefix cache.
        "--seed", str(zlib.crc32(f"{options.seed}/{case.name}".encode())),
        "--percentile-metrics", "ttft,tpot,itl,e2el",  # e2el is not among its defaults
        "--metric-percentiles", ",".join(map(str, PERCENTILES)),
        *(["--goodput", *limits] if limits else []),
        "--save-result", "--save-detailed",
        "--result-dir", str(file.parent),
        "--result-filename", file.name,
    ]  # fmt: skip


def data_set(case: Case, options: Options) -> list[str]:
    """Flags for the prompts: without --random-ids they are ShareGPT's text, of other lengths."""
    if case.input_len is None:
        return ["--dataset-name", "sharegpt", "--dataset-path", str(options.sharegpt.resolve())]
    return [
        "--dataset-name", "random",
        "--random-ids", "--tokenize-on-client",
        "--random-input-len", str(case.input_len),
        "--random-output-len", str(case.output_len),
        "--random-range-ratio", "0.0",
        "--random-prefix-len", "0",
    ]  # fmt: skip


def judge(case: Case, record: Record, detailed: bool) -> Record:
    """Judge the client's record: its exit code is 0 even if every request failed."""
    lost, record = without_times(record), sound(record)
    errors = [e for e in record.get("errors", []) if e]
    outputs = [n for n, e in zip_lists(record, "output_lens", "errors") if not e]
    missing = case.num_prompts - record.get("completed", 0)
    problems = []
    if missing:
        cause = f": {errors[0].strip().splitlines()[-1]}" if errors else ""
        problems.append(f"{missing} of {case.num_prompts} requests failed{cause}")
    texts = record.get("generated_texts") or ["?"] * len(record.get("output_lens", []))
    empty = sum(
        not error and (not n or (not text and n != 1))  # one token may decode to nothing
        for (n, error), text in zip(zip_lists(record, "output_lens", "errors"), texts, strict=False)
    )
    if empty:
        problems.append(f"{empty} outputs are empty")
    problems += wrong_lengths(case, record, outputs)
    streams = judge_shapes(list(shapes(record)))
    latencies = end_to_end(record) if math.isfinite(case.rate) else []
    record["e2el_growth"] = growth((i / case.rate for i in range(len(latencies))), latencies)
    if case.output_len == 1:  # there are no gaps between tokens, which the client reports as 0 ms
        record |= {f"{kind}_{name}_ms": None for name in ("tpot", "itl") for kind in KINDS}
    record |= distributions(record)
    if not detailed:
        for key in DETAILS:
            record.pop(key, None)
    record.pop("generated_texts", None)
    record["request_goodput"] = record.pop(GOODPUT[1], record.get(GOODPUT[0]))
    share = (record["request_goodput"] or 0) * (record.get("duration") or 0) / case.num_prompts
    record["goodput_share"] = share if record["request_goodput"] is not None else None
    notes = [UNKNOWN, *without_figures(case, record), *lost, *streams.notes]
    problems += streams.problems
    found = {"valid": not problems, "problems": problems, "notes": notes, "client": {}}
    return record | found | {"invalid_metrics": streams.wrong}


def sound(record: Record) -> Record:
    """The record, with None for every mean or time that is no usable number."""
    figures = {name: figure(record[name]) for name in FIGURES if name in record}
    times = {name: [*map(figure, record[name])] for name in ("ttfts", "e2els") if name in record}
    gaps = [numbers(gaps or ()) for gaps in record.get("itls", ())]
    return {**record, **figures, **times, "itls": gaps}


def figure(value: Any) -> float | None:  # noqa: ANN401
    return value if type(value) in (int, float) and abs(value) < TOO_MUCH else None


def numbers(values: Iterable[Any]) -> list[float]:
    return [value for value in map(figure, values) if value is not None]


def without_times(record: Record) -> list[str]:
    lists = [*(record.get(name, ()) for name in ("ttfts", "e2els")), *record.get("itls", ())]
    values = [value for found in lists for value in found or ()]
    lost = len(values) - len(numbers(values))
    words = f"{lost} of {len(values)} times that NVIDIA's client wrote down are not numbers"
    return [f"{words}: they are left out"] if lost else []


def shapes(record: Record) -> Iterator[Shape]:
    """How the answers came, if the client recorded the gaps."""
    counted, gaps_of = zip_lists(record, "output_lens", "errors"), record.get("itls", [])
    ttfts = record.get("ttfts") or [0.0] * len(gaps_of)
    for (tokens, error), gaps, ttft in zip(counted, gaps_of, ttfts, strict=False):
        if not error:
            yield shape([gap * 1e3 for gap in gaps], tokens, waited=(ttft or 0.0) * 1e3)


def without_figures(case: Case, record: Record) -> list[str]:
    """A problem if figures are missing: the client writes NaN for the mean of nothing."""
    expected = METRICS if case.output_len != 1 else ("ttft", "e2el")
    names = [*TOTALS, *(f"{kind}_{name}_ms" for name in expected for kind in KINDS)]
    missing = [name for name in names if name in record and record[name] is None]
    return [f"NVIDIA's client has no figure for {', '.join(missing)}"] if missing else []


def distributions(record: Record) -> Record:
    """Percentiles in ms of what the client recorded for each request in seconds."""
    gaps = [gap for gaps in record.get("itls", []) for gap in gaps]
    ttfts = numbers(record.get("ttfts", ()))
    values = {"ttft": ttfts, "itl": gaps, "e2el": end_to_end(record)}
    return {f"{name}_percentiles_ms": percentiles(Distribution(s * 1e3 for s in found))
            for name, found in values.items() if found}  # fmt: skip


def end_to_end(record: Record) -> list[float]:
    """Each request's seconds, added up if this version of the client does not record them."""
    parts = zip(record.get("ttfts", []), record.get("itls", []), strict=False)
    added_up = [ttft + sum(gaps) for ttft, gaps in parts if ttft is not None]
    return numbers(record.get("e2els", ())) or added_up


def zip_lists(record: Record, first: str, second: str) -> list[tuple[int, str]]:
    left = record.get(first, [])
    return list(zip(left, record.get(second) or [""] * len(left), strict=False))


def wrong_lengths(case: Case, record: Record, outputs: list[int]) -> list[str]:
    if case.output_len is None or not record.get("completed"):
        return []
    found = []
    if wrong := [n for n in outputs if n and n != case.output_len]:
        found.append(
            f"{len(wrong)} outputs are not {case.output_len} tokens long (one has {wrong[0]})"
        )
    asked = record["completed"] * (case.input_len or 0)
    if record["total_input_tokens"] != asked:
        found.append(f"the prompts had {record['total_input_tokens']} tokens, not {asked}")
    return found
