"""The two measuring clients: ours, and NVIDIA's benchmark_serving.

A case goes in, a record comes out: the names of benchmark_serving's result files, `valid` and
`problems`.
"""

from __future__ import annotations

import math
import subprocess
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from common.live import LiveLine
from common.talk import die, read_json, say
from load import bench_place, sharegpt
from load.connection import TOO_LATE
from load.endpoint import Endpoint
from load.loadgen import measure
from load.matrix import Case, too_few
from load.metrics import (
    DETAILS,
    KINDS,
    METRICS,
    PERCENTILES,
    Wanted,
    ended_early,
    growth,
    mean,
    summarise,
)
from load.payload import Conversations, Dialect, Prompts, RandomPrompts, Requests
from load.probe import Found, explore
from load.target import CutShort, Load, LoadError, Result

WAITED = 0.05  # share of its time that a request waited for a stream: worth a note
ATTEMPTS = 3  # when the client could not keep up, for no fault of the server's
WARM_UP_TOKENS = 32
WARM_UP_STREAMS = 16
LONGEST = 2048  # tokens of a conversation's answer
ROOM, ROOM_A_TOKEN = 1 << 18, 1 << 12  # bytes of an answer; an event takes a few hundred

UNKNOWN = "NVIDIA's client does not say whether it kept up with the server"

Record = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What holds for every run."""

    sharegpt: Path
    backend: str = "openai"  # or openai-chat, as in benchmark_serving
    seed: int = 0
    warmup: int | None = None
    burstiness: float = 1.0
    timeout: float = 600.0
    goodput: Mapping[str, float] = field(default_factory=dict)
    shards: int = 0
    detailed: bool = False
    image: str = ""
    tokenizer: str = ""
    environ: Mapping[str, str] = field(default_factory=dict)

    @property
    def chat(self) -> bool:
        return self.backend == "openai-chat"


class Client(Protocol):
    name: str
    options: Options

    def __call__(self, case: Case, folder: Path) -> Record: ...


def die_if_silent(endpoint: Endpoint, options: Options) -> None:
    """Failure when not even the shortest request is answered: no other run would be, either."""
    found = explore(endpoint, options.chat, options.timeout)
    if found.error:
        die(
            f"{endpoint.url} does not answer even one short request: {found.error}; "
            "the rest is left out",
            hint=found.hint or "its log says why; --resume goes on from here",
        )


# --- ours -----------------------------------------------------------------------------------------


class Builtin:
    """loadgen.py: no container, no tokenizer, no GPU on the client."""

    name = "builtin"

    def __init__(self, endpoint: Endpoint, options: Options) -> None:
        self.endpoint, self.options = endpoint, options
        self.server = Found(Dialect(options.chat), endpoint.model, 0, error="not asked yet")

    def __call__(self, case: Case, folder: Path) -> Record:
        for attempt in range(1, ATTEMPTS + 1):
            record = self.measure(case, attempt)
            own = record["client"].get("problems")
            spoilt_by_us_alone = own and record["problems"] == own
            if not spoilt_by_us_alone or attempt == ATTEMPTS:
                break
            say(f"{case.name}: again, for {own[0]}")
        if attempt > 1:
            record["notes"].append(f"{case.name} was measured {attempt} times: others kept the "
                                   "client's machine busy")  # fmt: skip
        return record

    def measure(self, case: Case, attempt: int) -> Record:
        probes = self.acquaint()
        if self.server.error:
            return nothing(case, f"no answer to a short request: {self.server.error}")
        load = self.load_for(case, attempt)
        try:
            warmed = self.warm_up(case, load)
            result = watched(load, case)
        except LoadError as e:
            return nothing(case, str(e))
        assert isinstance(load.body, Requests)
        wanted = self.wanted(case, load.body.prompts)
        record = summarise(load, result, wanted, self.options.goodput)
        record["notes"] += [
            *self.server.notes,
            *unmeasured(probes, warmed),
            *notes_for(case, record, load.body.dialect),
            *early_ends(load.body.dialect, result, wanted),
            *unlike_its_name(load, case, record),
            *repeats(load.body.prompts, case.num_prompts),
        ]
        return record | (details(load, result) if self.options.detailed else {})

    def acquaint(self) -> int:
        """Once, or until the server answers; the number of requests that it took."""
        if not self.server.error:
            return 0
        self.server = explore(self.endpoint, self.options.chat, self.options.timeout)
        for note in self.server.notes:
            say(note)
        return self.server.probes

    def load_for(self, case: Case, attempt: int) -> Load:
        options, dialect = self.options, self.server.dialect
        return Load(
            self.endpoint.target,
            self.endpoint.prefix + dialect.path,
            Requests(self.endpoint.model, self.prompts(case, attempt), dialect),
            case.num_prompts,
            case.concurrency,
            rate=case.rate,
            burstiness=options.burstiness,
            timeout=options.timeout,
            seed=options.seed,
            chat=dialect.chat,
            shards=options.shards,
            largest=ROOM + ROOM_A_TOKEN * (case.output_len or LONGEST),
        )

    def prompts(self, case: Case, attempt: int) -> Prompts:
        options = self.options
        # No run may find the prefix cache of another, a repeat or an attempt before it.
        seed = f"{options.seed}/{case.name}/{attempt}"
        if case.input_len is None or case.output_len is None:
            count = case.num_prompts + WARM_UP_STREAMS
            return sharegpt.pick(options.sharegpt, count, seed)
        return RandomPrompts(case.input_len, case.output_len, seed, self.server.dialect.text)

    def wanted(self, case: Case, prompts: Prompts) -> Wanted:
        """What the answers have to be like, now that it is known what the server understands."""
        dialect = self.server.dialect
        input_len = None if dialect.text else case.input_len
        wanted = Wanted(self.server.model, case.output_len, input_len, exact=dialect.ignore_eos)
        if case.output_len is None:
            wanted = replace(wanted, output_lens=lambda index: prompts(index)[1])
        return wanted

    def warm_up(self, case: Case, load: Load) -> int:
        """Unmeasured requests with prompts of their own, and how many they were."""
        count = warm_up_count(case, self.options)
        done = measure(self.warm_up_load(load, count)).outcomes if count else []
        if count and all(o.error.startswith(TOO_LATE) for o in done):
            raise LoadError(f"no warm-up request had its answer within {load.timeout:g} s")
        return count

    def warm_up_load(self, load: Load, count: int) -> Load:
        assert isinstance(load.body, Requests)
        prompts = load.body.prompts
        if isinstance(prompts, RandomPrompts):
            prompts = replace(prompts, seed=f"warm-up {prompts.seed}")
        if isinstance(prompts, Conversations):
            prompts = Conversations(prompts.turns[load.count :] or prompts.turns)
        body = replace(load.body, prompts=prompts, longest=WARM_UP_TOKENS)
        streams = min(count, load.width, WARM_UP_STREAMS)
        return replace(load, body=body, count=count, streams=streams, rate=math.inf, shards=1)


def warm_up_count(case: Case, options: Options) -> int:
    """Unmeasured requests before a run of ours."""
    if options.warmup is not None:
        return options.warmup
    return min(case.concurrency or case.num_prompts, case.num_prompts, WARM_UP_STREAMS)


def watched(load: Load, case: Case) -> Result:
    """Measure it; a terminal shows how far it is."""
    line = LiveLine(case.name, case.num_prompts)
    try:
        return measure(load, line)
    except CutShort as cut:
        return cut.result
    finally:
        line.clear()


def unmeasured(probes: int, warmed: int) -> list[str]:
    parts = [f"{probes} to find out what the server understands"] * bool(probes)
    parts += [f"{warmed} of warm-up"] * bool(warmed)
    return [f"unmeasured requests before a run: {', '.join(parts)}"] if parts else []


def early_ends(dialect: Dialect, result: Result, wanted: Wanted) -> list[str]:
    """Whether ignore_eos is taken and ignored."""
    early = [o for o in result.outcomes if not o.error and ended_early(o, wanted)]
    if not early or not dialect.ignore_eos:
        return []
    return [f"the server ignores ignore_eos: {len(early)} of {len(result.outcomes)} outputs ended "
            f"early, after {mean(o.output_tokens or 0 for o in early):.0f} tokens on average"
            ]  # fmt: skip


def unlike_its_name(load: Load, case: Case, record: Record) -> list[str]:
    """Whether the load was as much as the run's name says."""
    streams, client = case.concurrency, record["client"]
    if load.open_loop:  # a stream can be busy when the next request is due
        waited = client["mean_late_ms"]
        if not streams or client["late_share"] < WAITED:
            return []
        return [f"requests waited {waited:,.0f} ms on average for one of the {streams} streams: "
                f"the server did not get {case.rate:g} requests/s"]  # fmt: skip
    return [words] if (words := too_few(case)) else []


def repeats(prompts: Prompts, count: int) -> list[str]:
    """Whether a data set was too small for so many requests."""
    if not isinstance(prompts, Conversations) or len(prompts.turns) >= count:
        return []
    return [f"the data set has only {len(prompts.turns)} conversations for {count} requests: a "
            "prefix cache knows the repeated ones"]  # fmt: skip


def notes_for(case: Case, record: Record, dialect: Dialect) -> list[str]:
    notes, client = [], record["client"]
    if dialect.chat and case.input_len is not None:
        notes.append("a chat's prompt is as many words as tokens were asked for: its exact length "
                     "is the server's to say")  # fmt: skip
    if case.input_len is None:
        notes.append("conversations were picked by estimated lengths (no tokenizer on the client); "
                     "token counts are the server's")  # fmt: skip
    if client["tokens_per_event"] > 1.05:
        notes.append(f"an event carried {client['tokens_per_event']:.1f} tokens on average: "
                     "ITL is the time between events")  # fmt: skip
    if client["stamps"] != "kernel":
        notes.append("times were taken by the client, not by the kernel: https, or a kernel "
                     "without SO_TIMESTAMPING")  # fmt: skip
    if client["retried"]:
        notes.append(f"{client['retried']} requests were sent again: the server had closed the "
                     "idle connection")  # fmt: skip
    return notes


def details(load: Load, result: Result) -> Record:
    """One value a request, as --save-detailed of benchmark_serving; seconds."""
    outcomes = result.outcomes
    start = [o.intended if load.open_loop else o.sent for o in outcomes]
    return {
        "input_lens": [o.prompt_tokens or 0 for o in outcomes],
        "output_lens": [o.output_tokens or 0 for o in outcomes],
        "ttfts": [
            (o.first - t) / 1e9 if o.first else 0.0 for o, t in zip(outcomes, start, strict=True)
        ],
        "e2els": [
            (o.last - t) / 1e9 if o.last else 0.0 for o, t in zip(outcomes, start, strict=True)
        ],
        "itls": [[round(g / 1e3, 7) for g in o.gaps] for o in outcomes],
        "errors": [o.error for o in outcomes],
    }


# --- NVIDIA's -------------------------------------------------------------------------------------


class BenchmarkServing:
    """TensorRT-LLM's own client, in its container or where it is installed."""

    name = "trtllm"

    def __init__(self, endpoint: Endpoint, options: Options) -> None:
        self.endpoint, self.options = endpoint, options

    def __call__(self, case: Case, folder: Path) -> Record:
        options = self.options
        die_if_silent(self.endpoint, options)  # this client would wait for hours
        file = folder.resolve() / f".{case.name}.benchmark_serving.json"
        file.unlink(missing_ok=True)
        environ = unproxied(options.environ, self.endpoint.target.host)
        command = [
            *bench_place.prefix(options.image, self.mounts(folder), environ),
            *benchmark_serving(case, self.endpoint, options, file),
        ]
        limit = longest(case, options.timeout)
        hint = "--client builtin needs no container"
        try:
            status, words = bench_place.run(command, environ, hint, limit)
        except subprocess.TimeoutExpired:
            return nothing(case, f"benchmark_serving did not end within {limit:g} s")
        try:
            record: Record = read_json(file)
        except (OSError, ValueError):
            return nothing(case, "benchmark_serving wrote no result (exit code "
                           f"{status}): {words or 'it said nothing'}")  # fmt: skip
        finally:
            file.unlink(missing_ok=True)
        try:
            return judge(case, record, options.detailed)
        except (LookupError, TypeError, ValueError, AttributeError) as e:
            return nothing(case, f"benchmark_serving's result cannot be read: {e!r}")

    def mounts(self, folder: Path) -> list[Path]:
        model = Path(self.options.tokenizer or self.endpoint.asked)
        paths = [folder.resolve()]
        paths += [self.options.sharegpt.resolve().parent] if self.options.sharegpt.exists() else []
        return paths + ([model.resolve()] if model.is_dir() else [])


def unproxied(environ: Mapping[str, str], host: str) -> dict[str, str]:
    """Its HTTP library would send the measured requests through HTTP_PROXY."""
    names = ("NO_PROXY", "no_proxy")
    return {**environ, **{n: ",".join(filter(None, (environ.get(n), host))) for n in names}}


def longest(case: Case, timeout: float) -> float:
    """Seconds a run may take: every request its timeout, and time to start and to read."""
    rounds = case.num_prompts / (case.concurrency or case.num_prompts)
    return timeout * (rounds + 2) + case.num_prompts / case.rate


def benchmark_serving(case: Case, endpoint: Endpoint, options: Options, file: Path) -> list[str]:
    """Its arguments, all of which 1.1.0 has."""
    served = endpoint.model if endpoint.model != endpoint.asked else ""
    target = endpoint.target
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
        # The same seed means the same prompts: they would meet an earlier run's prefix cache.
        "--seed", str(zlib.crc32(f"{options.seed}/{case.name}".encode())),
        "--percentile-metrics", "ttft,tpot,itl,e2el",  # e2el is not among its defaults
        "--metric-percentiles", ",".join(map(str, PERCENTILES)),
        *(["--goodput", *limits] if limits else []),
        "--save-result", "--save-detailed",
        "--result-dir", str(file.parent),
        "--result-filename", file.name,
    ]  # fmt: skip


def data_set(case: Case, options: Options) -> list[str]:
    """Without --random-ids it takes its texts from ShareGPT; as text, lengths would drift."""
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
    """Its exit status says nothing: it ends well when every request failed."""
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
    latencies = end_to_end(record) if math.isfinite(case.rate) else []
    record["e2el_growth"] = growth((i / case.rate for i in range(len(latencies))), latencies)
    if case.output_len == 1:  # there is nothing between tokens, and it calls that 0 ms
        record |= {f"{kind}_{name}_ms": None for name in ("tpot", "itl") for kind in KINDS}
    if not detailed:
        for key in DETAILS:
            record.pop(key, None)
    record.pop("generated_texts", None)
    record["request_goodput"] = record.pop("request_goodput:", None)  # its spelling
    share = (record["request_goodput"] or 0) * record.get("duration", 0) / case.num_prompts
    record["goodput_share"] = share if record["request_goodput"] is not None else None
    notes = [UNKNOWN, *without_figures(case, record)]
    return record | {"valid": not problems, "problems": problems, "notes": notes, "client": {}}


def without_figures(case: Case, record: Record) -> list[str]:
    """It writes NaN for the mean of nothing."""
    expected = METRICS if case.output_len != 1 else ("ttft", "e2el")
    names = [f"{kind}_{name}_ms" for name in expected for kind in KINDS]
    missing = [name for name in names if name in record and record[name] is None]
    return [f"NVIDIA's client has no figure for {', '.join(missing)}"] if missing else []


def end_to_end(record: Record) -> list[float]:
    """Seconds of each request; not every version of the script writes them down."""
    parts = zip(record.get("ttfts", []), record.get("itls", []), strict=False)
    return record.get("e2els") or [ttft + sum(gaps) for ttft, gaps in parts]


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


def nothing(case: Case, why: str) -> Record:
    """The record of a run that measured nothing."""
    return {"num_prompts": case.num_prompts, "completed": 0, "valid": False, "problems": [why],
            "notes": [], "client": {}}  # fmt: skip
