"""Measure the engine alone, without a server: the real `trtllm-bench throughput`.

The requests are synthetic: TensorRT-LLM's own prepare_dataset.py writes them,
as trtllm-bench 1.1.0 has no data set of its own (`--dataset-type synthetic`
does not exist). Needs a GPU.

Examples:
    python -m load.static_bench -m Qwen/Qwen2.5-7B-Instruct
    python -m load.static_bench -m Qwen/Qwen2.5-72B-Instruct --tp 8 --concurrency 64

What is not an option here goes to `trtllm-bench ... throughput` untouched.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from common.settings import setting
from common.talk import die, say
from load import bench_place

PREPARE = "/app/tensorrt_llm/benchmarks/cpp/prepare_dataset.py"  # in NVIDIA's image
DATASET, REPORT = "dataset.jsonl", "report.json"


def prepare_command(args: argparse.Namespace) -> list[str]:
    """The command that prints the data set, of requests that are all of one length."""
    return [
        "python3", args.prepare_dataset, "--tokenizer", args.model, "--stdout", "token-norm-dist",
        f"--num-requests={args.num_requests}",
        f"--input-mean={args.input_len}", f"--output-mean={args.output_len}",
        "--input-stdev=0", "--output-stdev=0",
    ]  # fmt: skip


def bench_command(args: argparse.Namespace, more: Sequence[str], folder: Path) -> list[str]:
    return [
        "trtllm-bench", "--model", args.model, "throughput",
        "--dataset", str(folder / DATASET), "--backend", "pytorch",
        "--tp", str(args.tp), "--num_requests", str(args.num_requests),
        "--report_json", str(folder / REPORT), *more,
    ]  # fmt: skip


def parse(
    argv: Sequence[str] | None, environ: dict[str, str]
) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m load.static_bench",
        usage="%(prog)s [options] [TRTLLM_BENCH_ARGS...]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-m", "--model", default=setting("MODEL", environ), help="Hugging Face id or path; "
        "default: %(default)s")  # fmt: skip
    add("--tp", type=int, default=1, help="GPUs; default: %(default)s")
    add("--num-requests", type=int, default=100, help="default: %(default)s")
    add("--input-len", type=int, default=128, help="tokens; default: %(default)s")
    add("--output-len", type=int, default=128, help="tokens; default: %(default)s")
    add("-i", "--image", default=environ.get("BENCH_IMAGE", ""), help="tarball, tag or registry "
        "reference; default: none if tensorrt_llm is installed, else run_sbatch.py's")  # fmt: skip
    add("-o", "--output", type=Path, help="folder of the report; default: results/static-DATE-TIME")
    add("--prepare-dataset", default=PREPARE, help="where that script is; default: %(default)s")
    return parser.parse_known_args(argv)


def static_bench(argv: Sequence[str] | None) -> int:
    environ = bench_place.environment()
    args, more = parse(argv, environ)
    folder = (args.output or Path("results") / time.strftime("static-%Y%m%d-%H%M%S")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model = Path(args.model).resolve()
    if model.is_dir():  # the container has another current directory
        args.model = str(model)
    mounts = [folder, *([model] if model.is_dir() else [])]
    tag = args.image
    if tag or not bench_place.is_installed():
        tag = bench_place.provide_image(tag, environ)
    asked = setting("GPUS", environ)
    gpus = {"auto": "all", "none": ""}.get(asked, asked)
    prefix = bench_place.prefix(tag, mounts, environ, gpus=gpus)
    report = folder / REPORT
    report.unlink(missing_ok=True)  # an earlier run's
    with (folder / DATASET).open("wb") as data:
        status, words = bench_place.run([*prefix, *prepare_command(args)], environ, stdout=data)
    if status:
        die_of(args.prepare_dataset, f"exit code {status}", words)
    status, words = bench_place.run([*prefix, *bench_command(args, more, folder)], environ)
    if status or not report.exists():
        die_of("trtllm-bench", f"exit code {status}" + ("" if status else " and no report"), words)
    print(report.read_text())
    say(f"report and data set: {folder}")
    return 0


def die_of(program: str, ended: str, words: str) -> NoReturn:
    die(f"{program} ended with {ended}: {words or 'it said nothing'}")


def main(argv: Sequence[str] | None = None) -> int:
    return bench_place.exit_code(lambda: static_bench(argv))


if __name__ == "__main__":
    sys.exit(main())
