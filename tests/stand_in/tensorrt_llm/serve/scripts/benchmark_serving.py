"""Stands in for TensorRT-LLM 1.1.0's benchmark_serving: its flags and no others, its result file.

It sends nothing. STAND_IN says what goes wrong: fail=N requests fail, short=N outputs are a token
short, empty=N are empty, silent=1 writes no result, slow=SECONDS takes its time. Like the real one
it exits with 0 even when every request failed.
"""

import argparse
import json
import os
import sys
import time
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
        "generated_texts": ["text"] * count,
        "errors": [""] * good + ["Traceback\nValueError: bad request"] * failed,
        **numbers,
        "request_rate": float(args.request_rate) if args.request_rate else "inf",
        "burstiness": float(args.burstiness or 1.0),
        "max_concurrency": args.max_concurrency and int(args.max_concurrency),
    }


def main() -> None:
    args = parse()
    words = os.environ.get("STAND_IN", "").split()
    wrong = {k: float(v) for k, _, v in (word.partition("=") for word in words)}
    print("============ Serving Benchmark Result ============")
    time.sleep(wrong.get("slow", 0))
    if args.save_result and not wrong.get("silent"):
        data = result(args, wrong)
        if not args.save_detailed:
            for key in ("input_lens", "output_lens", "ttfts", "itls", "e2els", "errors"):
                del data[key]
            del data["generated_texts"]
        with open(os.path.join(args.result_dir or ".", args.result_filename), "w") as file:  # noqa: PTH123, PTH118
            json.dump(data, file)


main()
