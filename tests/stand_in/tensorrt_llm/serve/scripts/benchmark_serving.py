"""Stands in for TensorRT-LLM 1.1.0's benchmark_serving: its flags and no others, its result file.

It sends nothing, unless TRTLLM_STAND_IN says measure. STAND_IN says what goes wrong: fail=N
requests fail, short=N outputs are a token short, empty=N are empty, blank=N have no text,
silent=1 writes no result, half=1 half of one, nan=1 NaN for two means, odd=1 something else,
die=1 ends at once, slow=SECONDS takes its time. Like the real one it exits with 0 even when every
request failed.
"""

import argparse
import json
import os
import statistics
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

PARSER = argparse.ArgumentParser(allow_abbrev=False)
FLAGS = """
    --backend --base-url --host --port --endpoint --dataset-name --dataset-path --download-path
    --download-timeout --max-concurrency --num-prompts --request-rate --burstiness --model
    --tokenizer --tokenizer-mode --served-model-name --logprobs --seed --result-dir
    --result-filename --percentile-metrics --metric-percentiles --random-input-len
    --random-output-len --random-range-ratio --random-prefix-len --sharegpt-output-len
    --top-p --top-k --min-p --temperature
"""
SWITCHES = """
    --trust-remote-code --use-beam-search --non-streaming --disable-tqdm --profile --save-result
    --save-detailed --ignore-eos --random-ids --tokenize-on-client
"""


def parse() -> argparse.Namespace:
    for flag in FLAGS.split():
        PARSER.add_argument(flag)
    for flag in SWITCHES.split():
        PARSER.add_argument(flag, action="store_true")
    PARSER.add_argument("--goodput", nargs="+")
    PARSER.add_argument("--metadata", nargs="*")
    args = PARSER.parse_args()
    if not args.model:
        PARSER.error("--model is required")
    if args.backend not in ("openai", "openai-chat"):
        PARSER.error("--backend: openai or openai-chat")
    if args.dataset_name == "random" and not (args.random_ids or args.dataset_path):
        sys.exit("AssertionError: Please provide a download path with --download-path")
    if args.dataset_name == "sharegpt" and not Path(args.dataset_path).is_file():
        sys.exit("FileNotFoundError: dataset")
    for limit in args.goodput or []:
        if limit.split(":")[0] not in ("ttft", "tpot", "e2el"):
            sys.exit("ValueError: Invalid metric name found")
    return args


def result(args: argparse.Namespace, wrong: dict[str, float]) -> dict[str, object]:
    count = int(args.num_prompts)
    failed, short, empty = (int(wrong.get(k, 0)) for k in ("fail", "short", "empty"))
    inputs, wanted = int(args.random_input_len or 20), int(args.random_output_len or 30)
    good = count - failed
    outputs = [wanted] * good
    outputs[:short] = [wanted - 1] * short
    outputs[:empty] = [0] * empty
    percentiles = [p for p in (args.metric_percentiles or "99").split(",")]
    numbers = {
        f"{kind}_{metric}_ms": 10.0
        for metric in (args.percentile_metrics or "ttft,tpot,itl").split(",")
        for kind in ("mean", "median", "std", *(f"p{p}" for p in percentiles))
    }
    return {
        "date": "20260101-000000",
        "backend": args.backend,
        "model_id": args.model,
        "tokenizer_id": args.tokenizer or args.model,
        "num_prompts": count,
        "duration": 2.0,
        "completed": good,
        "total_input_tokens": good * inputs,
        "total_output_tokens": sum(outputs),
        "request_throughput": good / 2,
        "request_goodput:": good / 4 if args.goodput else None,
        "output_throughput": sum(outputs) / 2,
        "total_token_throughput": (sum(outputs) + good * inputs) / 2,
        "user_throughput": 100.0,
        "input_lens": [inputs] * count,
        "output_lens": outputs + [0] * failed,
        "ttfts": [0.01] * count,
        "itls": [[0.01]] * count,
        "e2els": [0.1] * count,
        "generated_texts": [""] * int(wrong.get("blank", 0))
        + ["text"] * (count - int(wrong.get("blank", 0))),
        "errors": [""] * good + ["Traceback\nValueError: bad request"] * failed,
        **numbers,
        "request_rate": float(args.request_rate) if args.request_rate else "inf",
        "burstiness": float(args.burstiness or 1.0),
        "max_concurrency": args.max_concurrency and int(args.max_concurrency),
    }


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Stream the requests for real, one thread each, and time the events as they are read."""
    count, limit = int(args.num_prompts), int(args.max_concurrency or args.num_prompts)
    began = time.perf_counter()
    with ThreadPoolExecutor(limit) as pool:
        timed = list(pool.map(lambda i: stream(args, i), range(count)))
    ttfts, itls = [t[0] for t in timed], [t[1] for t in timed]
    numbers: dict[str, object] = {"duration": time.perf_counter() - began, "ttfts": ttfts}
    numbers |= {"itls": itls, "output_lens": [t[2] for t in timed]}
    for metric, values in {"ttft": ttfts, "itl": [gap for gaps in itls for gap in gaps]}.items():
        numbers[f"mean_{metric}_ms"] = statistics.mean(values or [0]) * 1e3
        numbers[f"median_{metric}_ms"] = statistics.median(values or [0]) * 1e3
    return numbers


def stream(args: argparse.Namespace, i: int) -> tuple[float, list[float], int]:
    """TTFT, the gaps between tokens, and their number, of one request."""
    body = {"model": args.model, "prompt": [i + 3] * int(args.random_input_len), "stream": True,
            "max_tokens": int(args.random_output_len), "ignore_eos": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    url = args.base_url or f"http://{args.host}:{args.port}"
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    sent, times, tokens = time.perf_counter(), [], 0
    with urllib.request.urlopen(request, timeout=60) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                times += [time.perf_counter()] if event["choices"] else []
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return times[0] - sent, [b - a for a, b in pairwise(times)], tokens


def main() -> None:
    args = parse()
    words = os.environ.get("STAND_IN", "").split()
    wrong = {k: float(v) for k, _, v in (word.partition("=") for word in words)}
    print("============ Serving Benchmark Result ============")
    time.sleep(wrong.get("slow", 0))
    if wrong.get("die"):
        sys.exit("OSError: no such tokenizer")
    if args.save_result and not wrong.get("silent"):
        data = result(args, wrong)
        if os.environ.get("TRTLLM_STAND_IN") == "measure":
            data |= measure(args)
        if not args.save_detailed:
            for key in ("input_lens", "output_lens", "ttfts", "itls", "e2els", "errors"):
                del data[key]
            del data["generated_texts"]
        with open(os.path.join(args.result_dir or ".", args.result_filename), "w") as file:  # noqa: PTH123, PTH118
            if wrong.get("nan"):  # numpy's mean of nothing
                data |= {"mean_itl_ms": float("nan"), "p99_itl_ms": float("inf")}
            if wrong.get("odd"):
                data = {"completed": None, "ttfts": "none"}
            file.write(json.dumps(data)[: 9 if wrong.get("half") else None])


main()
