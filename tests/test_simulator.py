"""The simulator, tested as its users meet it: a process with flags, a log, a port and an exit code.

Run alone: .venv/bin/pytest tests/test_simulator.py
"""

from __future__ import annotations

import json
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.conftest import PATIENCE, free_port
from tests.waiting import comes_true

SIMULATOR = Path(__file__).resolve().parent.parent / "simulator"
COMMAND = [sys.executable, str(SIMULATOR / "trtllm-serve")]
MODEL = "org/some-model"
FOREIGN = re.compile(r"SLURM_|PMI|OMPI_|TRTLLM_SIM_|(?i:TLLM)_")
QUICK = {"LOAD_SECONDS": "0.05", "TTFT_MS": "1", "PREFILL_US_PER_TOKEN": "0", "ITL_MS": "1"}
ACCEPTED = 77  # the exit code of a simulator that was told to stop once its arguments are accepted

Json = dict[str, Any]


def environment(**settings: str) -> dict[str, str]:
    """Return the environment without what belongs to a job we may be running in."""
    inherited = {name: value for name, value in os.environ.items() if not FOREIGN.match(name)}
    chosen = {f"TRTLLM_SIM_{name}": value for name, value in {**QUICK, **settings}.items()}
    return {**inherited, **chosen}


def run(*argv: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run to the end: the simulator stops by itself as soon as it has accepted its arguments."""
    stop = environment(FAULT=f"exit-loading:{ACCEPTED}", LOAD_SECONDS="0")
    return subprocess.run(
        [*COMMAND, *argv],
        env={**stop, **(env or {})},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def eventually(holds: Callable[[], object]) -> None:
    assert comes_true(holds, PATIENCE), "it did not come true in time"


class Server:
    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.log_file = log

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def wait_ready(self) -> None:
        eventually(lambda: "Uvicorn running" in self.log or self.process.poll() is not None)
        assert self.process.poll() is None, self.log

    def get(self, path: str, timeout: float = PATIENCE) -> requests.Response:
        return requests.get(f"http://127.0.0.1:{self.port}{path}", timeout=timeout)

    def post(self, path: str, body: object, timeout: float = PATIENCE) -> requests.Response:
        return requests.post(f"http://127.0.0.1:{self.port}{path}", json=body, timeout=timeout)

    def complete(self, prompt: object = "The capital of France is", **fields: object) -> Json:
        body = {"model": "m", "prompt": prompt, "temperature": 0, "max_tokens": 8, **fields}
        return ok(self.post("/v1/completions", body))

    def chat(self, text: str = "Hello there", **fields: object) -> Json:
        messages = [{"role": "user", "content": text}]
        body = {"model": "m", "messages": messages, "temperature": 0, "max_tokens": 8, **fields}
        return ok(self.post("/v1/chat/completions", body))

    def events(self, path: str, **fields: object) -> list[Json]:
        """Return the chunks of a streamed answer after checking how they are framed."""
        response = self.post(path, {"model": "m", "temperature": 0, "stream": True, **fields})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["transfer-encoding"] == "chunked"
        *events, done, rest = response.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def exchange(self, data: bytes) -> bytes:
        """Send raw bytes, return everything up to the server's close."""
        with self.connect() as client:
            client.sendall(data)
            return b"".join(iter(lambda: client.recv(65536), b""))


def ok(response: requests.Response) -> Json:
    assert response.status_code == 200, response.text
    return dict(response.json())


@contextmanager
def serving(
    log: Path, *argv: str, ready: bool = True, port: int = 0, **settings: str
) -> Iterator[Server]:
    port = port or free_port()
    flags = ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*COMMAND, *(argv or (MODEL,)), *flags],
            env=environment(**settings),
            stdout=output,
            stderr=output,
        )
    server = Server(process, port, log)
    try:
        if ready:
            server.wait_ready()
        yield server
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(log, MODEL, "--max_seq_len", "200") as shared:
        yield shared


def idle_until_closed(server: Server) -> float:
    with server.connect() as client:
        began = time.monotonic()
        client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        client.settimeout(PATIENCE)
        assert client.recv(4096) == b""
        return time.monotonic() - began


@pytest.fixture(scope="module", autouse=True)
def idle_seconds(server: Server) -> Iterator[Future[float]]:
    """How long an idle connection lives; measured beside the other tests, it takes long."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(idle_until_closed, server)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


# -- command line --


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([MODEL, "--foo"], "No such option: --foo"),
        ([MODEL, "--config", "x.yaml"], "No such option: --config"),
        ([MODEL, "--tp-size", "2"], "No such option: --tp-size (Possible options: --ep_size,"),
        ([MODEL, "--tp", "2"], "No such option: --tp"),
        ([MODEL, "--tokeniser=x"], "No such option: --tokeniser Did you mean --tokenizer?"),
        ([MODEL, "--hosts=x"], "No such option: --hosts (Possible options: --host, --port)"),
        ([MODEL, "-p", "1"], "No such option: -p"),
        (["--port", "1", MODEL], "No such option: --port"),
        (["serve"], "Missing argument 'MODEL'."),
        (["serve", "--port", "1"], "Missing argument 'MODEL'."),
        ([MODEL, "other"], "Got unexpected extra argument (other)"),
        ([MODEL, "--", "a", "b"], "Got unexpected extra arguments (a b)"),
        ([MODEL, "--port", "x"], "Invalid value for '--port': 'x' is not a valid integer."),
        ([MODEL, "--port", "--tp_size"], "'--tp_size' is not a valid integer."),
        ([MODEL, "--tp_size=1.5"], "'1.5' is not a valid integer."),
        ([MODEL, "--kv_cache_free_gpu_memory_fraction", "x"], "'x' is not a valid float."),
        (
            [MODEL, "--backend", "vllm"],
            "'vllm' is not one of 'pytorch', 'tensorrt', '_autodeploy'.",
        ),
        ([MODEL, "--log_level", "loud"], "Invalid value for '--log_level': 'loud'"),
        ([MODEL, "--reasoning_parser", "qwen3"], "'qwen3' is not 'deepseek-r1'."),
        (["mm_embedding_serve", "x"], "the simulator has no 'mm_embedding_serve'"),
    ],
)
def test_usage_error_exits_2_with_clicks_words(argv: list[str], message: str) -> None:
    result = run(*argv)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Usage: trtllm-serve ")
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert message in result.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--port", "Error: Option '--port' requires an argument."),
        ("--trust_remote_code=1", "Error: Option '--trust_remote_code' does not take a value."),
    ],
)
def test_a_value_too_few_or_too_many_is_told_without_the_usage(argv: str, message: str) -> None:
    result = run(MODEL, argv)
    assert (result.returncode, result.stderr.strip()) == (2, message)


@pytest.mark.parametrize("argv", [["--help"], ["serve", "--help"], [MODEL, "--help"]])
def test_help_exits_0(argv: list[str]) -> None:
    result = run(*argv)
    assert result.returncode == 0
    assert result.stdout.startswith("Usage: trtllm-serve")


@pytest.mark.parametrize(
    "argv",
    [
        ["serve", MODEL],
        [MODEL, "--backend", "trt", "--max_beam_width", "1", "--max_num_tokens", "4096"],
        ["serve", "--tp_size=8", "--trust_remote_code", MODEL],
        [MODEL, "--tp_size", "4", "--ep_size=2", "--pp_size", "2"],
        [MODEL, "--kv_cache_free_gpu_memory_fraction=0.8", "--num_postprocess_workers", "2"],
        [MODEL, "--tp_size", "99", "--tp_size", "2"],  # the last one counts
    ],
)
def test_documented_options_are_accepted(argv: list[str]) -> None:
    assert run(*argv).returncode == ACCEPTED


def test_a_copy_behind_a_symlink_on_path_works(tmp_path: Path) -> None:
    copy = tmp_path / "opt"
    shutil.copytree(SIMULATOR, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/trtllm-serve").symlink_to(copy / "trtllm-serve")
    env = environment(FAULT="exit-loading:77", LOAD_SECONDS="0")
    with_libraries, without = Path(sys.executable).parent, Path("/usr/bin")
    for python, code in ((with_libraries, ACCEPTED), (without, 1)):
        env["PATH"] = f"{tmp_path / 'bin'}:{python}:{os.environ['PATH']}"
        result = subprocess.run(["trtllm-serve", MODEL], env=env, cwd=tmp_path, capture_output=True)
        assert result.returncode == code, result.stderr
    assert b"/usr/bin/python3 lacks " in result.stderr
    assert b"pip install '.[simulator]'" in result.stderr


# -- model, YAML, parallelism, environment --


@pytest.mark.parametrize("model", ["/no/such/model", "./model", "../model", "a/b/c", "a b", ""])
def test_model_that_is_neither_directory_nor_repo_id_is_refused(model: str) -> None:
    result = run("serve", model)
    assert result.returncode == 1
    assert "Repo id must be in the form" in result.stderr


@pytest.mark.parametrize(
    ("text", "flags", "code", "message"),
    [
        ("# nothing", [], 1, "not a mapping"),
        ("kv_cache_config:\n  enable_block_reuse: false\nprint_iter_log: true", [], ACCEPTED, ""),
        ("tensor_parallel_size: 2", ["--tp_size", "99"], ACCEPTED, ""),
        ("tensor_parallel_size: 16", ["--tp_size", "1"], 1, "Only 8 GPUs are available, but 16"),
        ("context_parallel_size: 2\ntensor_parallel_size: 4", [], ACCEPTED, ""),
        ("context_parallel_size: 4\npipeline_parallel_size: 4", [], 1, "but 16 are required"),
        ("tensor_parallel_size: 4\nmoe_tensor_parallel_size: 2", [], ACCEPTED, ""),
        ("moe_expert_parallel_size: 3", ["--tp_size=4"], 1, "moe_world_size"),
        ("moe_tensor_parallel_size: 4", ["--tp_size=4", "--ep_size=4"], 1, "moe_world_size"),
        ("context_parallel_size: 2", ["--tp_size=2", "--ep_size=2"], 1, "CP don't support"),
        (
            "context_parallel_size: 2\ncp_config:\n  cp_type: HELIX",
            ["--tp_size=2", "--ep_size=4"],
            ACCEPTED,
            "",
        ),
        ("cp_config: {cp_type: SPIRAL}", [], 1, "Invalid cp_type"),
        ("enable_attention_dp: true", ["--tp_size=8", "--ep_size=8"], ACCEPTED, ""),
        ('tensor_parallel_size: "2"\nenable_attention_dp: "yes"', [], ACCEPTED, ""),
        ("gpus_per_node: 4", ["--tp_size=8"], 1, "slots for the 8 ranks"),
        ("tensor_parallel_size: 0", [], 1, "tensor_parallel_size must be greater than 0"),
        ("tensor_paralel_size: 8", [], 1, "tensor_paralel_size\n  Extra inputs are not permitted"),
        ("pytorch_backend_config:\n  x: 1", [], 1, "Extra inputs are not permitted"),
        ("moe_config:\n  backnd: TRTLLM", [], 1, "moe_config.backnd\n  Extra inputs"),
        ("tensor_parallel_size: eight", [], 1, "Input should be a valid integer"),
        ("enable_attention_dp: 3", [], 1, "Input should be a valid boolean"),
        ("a: 1\na: 2", [], 1, "1 validation error for TorchLlmArgs\na\n  Extra inputs"),
        ("a:\n\t- 1", [], 1, "cannot start any token"),
        ('dtype: ["a, b"]', [], 1, "Input should be a valid string"),
        ("dtype: |\n  text", [], ACCEPTED, ""),
        ("dtype: a\n  b", [], ACCEPTED, ""),
        ("quant_config: {}", [], 1, "quant_config\n  Extra inputs are not permitted"),
        ("[" * 5, [], 1, "yaml.parser.ParserError: while parsing a flow"),
        ("just text", [], 1, "not a mapping"),
    ],
)
def test_yaml_overrides_flags_and_is_checked(
    tmp_path: Path, text: str, flags: list[str], code: int, message: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(text)
    result = run(MODEL, *flags, "--extra_llm_api_options", str(config))
    assert result.returncode == code, result.stderr
    assert message in result.stderr


def test_missing_yaml_file_is_a_file_not_found_error() -> None:
    result = run(MODEL, "--extra_llm_api_options=/no/such/file.yaml")
    assert result.returncode == 1
    assert "FileNotFoundError: [Errno 2] No such file or directory" in result.stderr


@pytest.mark.parametrize(
    ("gpus", "argv", "message"),
    [
        ("4", ["--tp_size", "8"], "Only 4 GPUs are available, but 8 are required."),
        ("4", ["--tp_size", "8", "--gpus_per_node", "8"], "Only 4 GPUs are available, but 8"),
        ("8", ["--tp_size", "16", "--gpus_per_node", "8"], "slots for the 16 ranks"),
        ("4", ["--tp_size", "4"], ""),
        ("0", [], "No GPU devices found on the node"),
    ],
)
def test_world_size_is_held_against_the_gpus(gpus: str, argv: list[str], message: str) -> None:
    result = run(MODEL, *argv, env={"TRTLLM_SIM_GPUS": gpus})
    assert result.returncode == (1 if message else ACCEPTED)
    assert message in result.stderr


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE"])
def test_ranks_cannot_be_spawned_inside_another_launcher(name: str) -> None:
    failed = run(MODEL, "--tp_size=2", env={name: "1"})
    assert failed.returncode == 1
    assert "MPI_Comm_spawn" in failed.stderr
    assert name in failed.stderr


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({}, "AssertionError: TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY is not set."),
        ({"HMAC_KEY": "00"}, "AssertionError: TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR is not set."),
        ({"HMAC_KEY": "x"}, "TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY must be hexadecimal"),
        ({"HMAC_KEY": "00", "ADDR": "ipc://x"}, "must be tcp://HOST:PORT"),
    ],
)
def test_ranks_that_exist_already_are_asked_for_where_the_launcher_says(
    env: dict[str, str], message: str
) -> None:
    names = {f"TLLM_SPAWN_PROXY_PROCESS_IPC_{name}": value for name, value in env.items()}
    # 16 ranks are more than this node has GPUs, which is as it should be.
    result = run(MODEL, "--tp_size=16", env={"TLLM_SPAWN_PROXY_PROCESS": "1", **names})
    assert result.returncode == 1
    assert message in result.stderr


def test_a_nodes_share_of_existing_ranks_must_fit_its_gpus() -> None:
    env = {"TLLM_SPAWN_PROXY_PROCESS": "1", "TRTLLM_SIM_GPUS": "4"}
    result = run(MODEL, "--tp_size=16", "--gpus_per_node=8", env=env)
    assert "Only 4 GPUs are available, but 16 are required." in result.stderr


def test_a_single_rank_does_not_mind_another_launcher() -> None:
    assert run(MODEL, env={"SLURM_JOB_ID": "1"}).returncode == ACCEPTED


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FAULT", "explode", "unknown fault 'explode'"),
        ("FAULT", "exit-loading", "wrong number of arguments"),
        ("FAULT", "exit-rank:1", "wrong number of arguments"),
        ("FAULT", "kill-rank:1:2:3", "wrong number of arguments"),
        ("LAUNCH", "loose", "must be one of stuck, propagate"),
        ("FAULT", "ignore-term,log-flood:x", "TRTLLM_SIM_FAULT"),
        ("GPUS", "many", "TRTLLM_SIM_GPUS"),
        ("ITL_MS", "-1", "TRTLLM_SIM_ITL_MS"),
        ("OUTPUT_TOKENS", "9-3", "TRTLLM_SIM_OUTPUT_TOKENS"),
    ],
)
def test_bad_setting_is_an_error(name: str, value: str, message: str) -> None:
    result = run(MODEL, env={f"TRTLLM_SIM_{name}": value})
    assert result.returncode == 1
    assert message in result.stderr


# -- start and stop --


def test_port_opens_only_after_the_load(log: Path) -> None:
    with serving(log, ready=False, LOAD_SECONDS="0.4") as server:
        eventually(lambda: not is_refused(server))
        assert "100%" in server.log  # had it been open before, we had found it so
    with serving(log, ready=False, LOAD_SECONDS="1000") as server:
        eventually(lambda: "start MpiSession" in server.log)
        assert is_refused(server)


WHEN_THE_LOAD_BEGAN = """
import os, runpy, sys, time

imported = []  # when `serve` was, which imports the libraries
def note(event, args):
    if event == "import" and args[0] == "serve":
        imported.append(time.monotonic())
ends = []  # of the parts of the load, a second each
def sleep(seconds):
    ends.append(time.monotonic() + seconds)
    if len(ends) == 100:
        print(ends[-1] - 100 < imported[0], flush=True)
        os._exit(0)
sys.addaudithook(note)
time.sleep = sleep
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_what_the_libraries_take_is_part_of_the_load() -> None:
    """So that a launch of 2 s takes 2 s: what is measured of a launcher is then its own."""
    command = [sys.executable, "-c", WHEN_THE_LOAD_BEGAN, COMMAND[1], "serve", MODEL]
    env = {**environment(LOAD_SECONDS="1000"), "PYTHONPATH": str(SIMULATOR)}
    said = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert said.stdout.splitlines()[-1] == "True", said


def test_log_tells_what_it_is_and_when_it_is_ready(server: Server) -> None:
    lines = server.log.splitlines()
    assert "SIMULATOR" in lines[0]
    assert re.match(r"\[\d\d/\d\d/\d{4}-\d\d:\d\d:\d\d\] \[TRT-LLM\] \[I\] ", lines[0])
    started = lines.index(f"INFO:     Started server process [{server.process.pid}]")
    url = f"http://127.0.0.1:{server.port}"
    assert lines.index(f"INFO:     Uvicorn running on {url} (Press CTRL+C to quit)") > started
    assert any("100%" in line for line in lines[:started])


def test_taken_port_is_noticed_after_the_load(log: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder, log.open("wb") as output:
        port = str(holder.getsockname()[1])
        code = subprocess.call(
            [*COMMAND, MODEL, "--host", "127.0.0.1", "--port", port],
            env=environment(),
            stdout=output,
            stderr=output,
        )
    text = log.read_text()
    assert code == 1
    assert re.search(r"\[Errno 98\] error while attempting to bind on address", text)
    assert text.index("100%") < text.index("address already in use")


def is_refused(server: Server) -> bool:
    try:
        server.connect().close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_the_open_stream_finish_and_is_then_died_of(log: Path, signum: int) -> None:
    with serving(log, ITL_MS="50") as server, server.connect() as client:
        client.sendall(http_post({"max_tokens": 30, "ignore_eos": True, "stream": True}))
        answer = client.recv(4096)
        server.process.send_signal(signum)
        eventually(lambda: "Shutting down" in server.log)
        eventually(lambda: is_refused(server))
        if signum == signal.SIGTERM:  # a second one changes nothing
            server.process.send_signal(signum)
        answer += b"".join(iter(lambda: client.recv(65536), b""))
        assert answer.count(b"data: {") == 30
        assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert server.process.wait(timeout=PATIENCE) == -signum


def test_a_second_sigint_cuts_what_the_first_lets_finish(log: Path) -> None:
    with serving(log, ITL_MS="1000") as server, server.connect() as client:
        client.sendall(http_post({"max_tokens": 1000, "ignore_eos": True, "stream": True}))
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        for _ in range(2):
            server.process.send_signal(signal.SIGINT)
            eventually(lambda: "Shutting down" in server.log)
        assert server.process.wait(timeout=PATIENCE) == -signal.SIGINT


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)]
)
def test_signal_ends_the_load(log: Path, signum: int, code: int) -> None:
    with serving(log, ready=False, LOAD_SECONDS="1000") as server:
        eventually(lambda: "start MpiSession" in server.log)
        server.process.send_signal(signum)
        assert server.process.wait(timeout=PATIENCE) == code
        assert "Traceback" not in server.log


@pytest.mark.parametrize("port", ["-1", "99999"])
def test_impossible_port_fails_after_the_load(port: str) -> None:
    argv = [MODEL, "--host", "127.0.0.1", "--port", port]
    result = run(*argv, env=environment(LOAD_SECONDS="0", FAULT=""))
    assert result.returncode == 1
    assert "100%" in result.stdout
    assert "port must be 0-65535" in result.stderr


# -- the small routes --


@pytest.mark.parametrize(
    ("method", "path", "status", "body"),
    [
        ("GET", "/health", 200, ""),
        ("GET", "/health?x=1", 200, ""),
        ("GET", "/health_generate", 200, "Generation health check OK"),
        ("GET", "/version", 200, '{"version":"1.1.0"}'),
        ("GET", "/metrics", 200, "[]"),
        ("GET", "/perf_metrics", 200, "[]"),
        ("POST", "/kv_cache_events", 200, "[]"),
        ("GET", "/", 404, '{"detail":"Not Found"}'),
        ("POST", "/v1/embeddings", 404, '{"detail":"Not Found"}'),
        ("GET", "/v1/completions", 405, '{"detail":"Method Not Allowed"}'),
        ("POST", "/health", 405, '{"detail":"Method Not Allowed"}'),
    ],
)
def test_route_answers(server: Server, method: str, path: str, status: int, body: str) -> None:
    url = f"http://127.0.0.1:{server.port}{path}"
    response = requests.request(method, url, timeout=PATIENCE)
    assert (response.status_code, response.text) == (status, body)


def test_model_list_names_the_repo_id(server: Server) -> None:
    (card,) = ok(server.get("/v1/models"))["data"]
    assert (card["id"], card["object"]) == (MODEL, "model")
    assert card["owned_by"] == "tensorrt_llm_simulator"


def test_model_directory_is_served_under_its_own_name(tmp_path: Path, log: Path) -> None:
    (tmp_path / "llama").mkdir()
    with serving(log, "serve", f"{tmp_path}/llama/") as server:
        assert ok(server.get("/v1/models"))["data"][0]["id"] == "llama"


# -- completions --


@pytest.mark.parametrize(
    ("prompt", "choices", "prompt_tokens"),
    [
        ("The capital of France is", 1, 5),
        (["one two", "three, four"], 2, 5),
        ([5, 6, 7], 1, 3),
        ([[5, 6, 7], [8]], 2, 4),
    ],
)
def test_every_form_of_prompt_is_answered(
    server: Server, prompt: object, choices: int, prompt_tokens: int
) -> None:
    answer = server.complete(prompt)
    assert [choice["index"] for choice in answer["choices"]] == list(range(choices))
    assert all(choice["text"].strip() for choice in answer["choices"])
    assert answer["object"] == "text_completion"
    assert answer["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 8 * choices,
        "total_tokens": prompt_tokens + 8 * choices,
    }


def test_greedy_answers_repeat_and_depend_on_the_prompt(server: Server) -> None:
    first, again = (server.complete("A prompt")["choices"] for _ in range(2))
    assert first == again
    assert server.complete("Another prompt")["choices"] != first


def test_sampled_answers_differ_unless_seeded(server: Server) -> None:
    def text(**fields: object) -> str:
        return str(server.complete(temperature=1, **fields)["choices"][0]["text"])

    assert text() != text()
    assert text(seed=3) == text(seed=3)


def test_model_name_is_echoed_not_checked(server: Server) -> None:
    assert server.complete(model="no-such-model")["model"] == "no-such-model"


def test_without_ignore_eos_the_answer_ends_by_itself(server: Server) -> None:
    answer = server.complete("Tell me", max_tokens=None)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["stop_reason"] is None
    assert 32 <= answer["usage"]["completion_tokens"] <= 256


def test_ignore_eos_gives_exactly_max_tokens(server: Server) -> None:
    answer = server.complete([1, 2], max_tokens=150, ignore_eos=True)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 150


def test_min_tokens_delays_the_end(server: Server) -> None:
    answer = server.complete("Tell me", min_tokens=180, max_tokens=190)
    assert answer["usage"]["completion_tokens"] >= 180


def test_max_seq_len_ends_the_answer(server: Server) -> None:
    answer = server.complete([1] * 190, max_tokens=100, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == 200


@pytest.mark.parametrize(
    ("prompt", "stop", "text"),
    [
        ("1, 2, 3, 4,", "7", " 5, 6, "),
        ("2, 4, 6", ["x", " 12"], ", 8, 10,"),
        ("1, 2, 3,", "5, 6", " 4, "),  # spans several tokens
        ("10, 9, 8,", "7", " "),
    ],
)
def test_text_is_cut_before_the_stop_string(
    server: Server, prompt: str, stop: object, text: str
) -> None:
    fields = {"prompt": prompt, "stop": stop, "max_tokens": 60}
    (choice,) = server.complete(**fields)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    assert choice["stop_reason"] == (stop[-1] if isinstance(stop, list) else stop)
    chunks = server.events("/v1/completions", **fields)
    streamed = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert streamed == (" 4, 5," if stop == "5, 6" else text)  # what is sent is not taken back


@pytest.mark.parametrize("stop", [".", "\n", "the", " and", "\n\n"])
def test_common_stop_strings_are_met(server: Server, stop: str) -> None:
    (choice,) = server.complete("Once upon a time", stop=stop, max_tokens=40)["choices"]
    assert choice["finish_reason"] == "stop"
    assert stop not in choice["text"]


def test_stop_string_is_shown_when_asked_for(server: Server) -> None:
    answer = server.complete("1, 2, 3,", stop="5", include_stop_str_in_output=True)
    assert answer["choices"][0]["text"] == " 4, 5"


def test_half_a_stop_string_at_the_end_is_not_lost(server: Server) -> None:
    answer = server.complete("1, 2, 3,", stop=" 5!", max_tokens=3)
    assert answer["choices"][0]["text"] == " 4, 5"


def test_undetokenized_answers_carry_ids_only(server: Server) -> None:
    (choice,) = server.complete(detokenize=False)["choices"]
    assert choice["text"] == ""
    assert len(choice["token_ids"]) == 8
    chunks = server.events("/v1/completions", prompt="Hi", detokenize=False, max_tokens=5)
    assert sum(len(chunk["choices"][0]["token_ids"]) for chunk in chunks) == 5


def test_echo_repeats_the_prompt(server: Server) -> None:
    assert server.complete("Once", echo=True)["choices"][0]["text"].startswith("Once The")


def test_stop_token_id_ends_the_answer(server: Server) -> None:
    (choice,) = server.complete("Some text", detokenize=False)["choices"]
    wanted = choice["token_ids"][4]
    (choice,) = server.complete("Some text", stop_token_ids=[wanted])["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", wanted)


# -- chat --


def test_chat_answers_as_the_assistant(server: Server) -> None:
    answer = server.chat("Hello there")
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion"
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"][:1].strip()
    usage = answer["usage"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]
    assert usage["prompt_tokens"] > 2  # the template counts


def test_chat_counts_when_asked_to(server: Server) -> None:
    answer = server.chat("Count from 1 to 10.", stop=["5"], max_tokens=50)
    assert answer["choices"][0]["message"]["content"] == "1, 2, 3, 4, "


def test_chat_takes_token_ids_instead_of_messages(server: Server) -> None:
    body = {"model": "m", "messages": [], "prompt_token_ids": [1, 2, 3], "max_completion_tokens": 4}
    usage = ok(server.post("/v1/chat/completions", body))["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 4)


def test_chat_takes_text_parts_and_tools(server: Server) -> None:
    parts = [{"type": "text", "text": "Hello"}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    body = {"model": "m", "messages": [{"role": "user", "content": parts}], "max_tokens": 4}
    ok(server.post("/v1/chat/completions", {**body, "tools": [tool], "tool_choice": "auto"}))


# -- what is refused --

COMPLETION_ERRORS: list[tuple[Json, str]] = [
    ({"guided_json": {}}, "Extra inputs are not permitted"),
    ({"model": None}, "valid string"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": []}, "list index out of range"),
    ({"prompt": [1] * 201}, "exceeds the maximum sequence length (200)"),
    ({"max_tokens": "many"}, "valid integer"),
    ({"max_tokens": 1.5}, "fractional part"),
    ({"max_tokens": -1}, "max_tokens >= 0"),
    ({"stream": "perhaps"}, "valid boolean"),
    ({"temperature": [1]}, "valid number"),
    ({"temperature": -1}, "temperature >= 0"),
    ({"top_p": 2}, "top_p"),
    ({"n": None}, "valid integer"),
    ({"n": 0}, "n >= 1"),
    ({"n": 2}, "Multiple response is not supported in PyTorch workflow"),
    ({"stop": [1]}, "valid string"),
    ({"logprobs": 1}, "logprobs is not supported"),
    ({"suffix": "x"}, "suffix is not supported"),
    ({"stream_options": {"include_usage": True}}, "stream is true"),
    ({"stream": True, "stream_options": {"x": 1}}, "Extra inputs"),
    ({"response_format": {"type": "xml"}}, "Input should be 'text'"),
    ({"response_format": {"type": "json"}}, "The 'schema' field is required"),
    ({"response_format": {"type": "json_schema", "schema": {}}}, "Input should be 'text'"),
]
IMAGE = {"url": "http://127.0.0.1:1/x.png"}
CHAT_ERRORS: list[tuple[Json, str]] = [
    ({"messages": []}, "messages must not be empty"),
    ({"messages": "hi"}, "valid list"),
    ({"messages": [{"content": "hi"}]}, "Field required"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": IMAGE}]}]},
        "text parts",
    ),
    ({"tool_choice": "auto"}, "`tools` must be set"),
    ({"tools": [{"type": "function"}]}, "Field required"),
    ({"top_logprobs": 2}, "logprobs must be true"),
    ({"logprobs": 7}, "valid boolean"),
    ({"stream_options": {}}, "stream is true"),
    ({"min_p": None}, "valid number"),
    ({"prompt": "x"}, "Extra inputs are not permitted"),
]


def is_flat_400(response: requests.Response, message: str) -> bool:
    assert response.status_code == 400, response.text
    body = response.json()
    assert set(body) == {"object", "message", "type", "param", "code"}
    assert (body["object"], body["type"], body["code"]) == ("error", "BadRequestError", 400)
    return message in body["message"]


@pytest.mark.parametrize(("fields", "message"), COMPLETION_ERRORS)
def test_bad_completion_request_gets_the_flat_400(
    server: Server, fields: Json, message: str
) -> None:
    body = {"model": "m", "prompt": "Hi", "max_tokens": 4, **fields}
    assert is_flat_400(server.post("/v1/completions", body), message)


@pytest.mark.parametrize(("fields", "message"), CHAT_ERRORS)
def test_bad_chat_request_gets_the_flat_400(server: Server, fields: Json, message: str) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    body = {"model": "m", "messages": messages, "max_tokens": 4, **fields}
    assert is_flat_400(server.post("/v1/chat/completions", body), message)


@pytest.mark.parametrize(
    ("data", "content_type"),
    [
        (b"{", "application/json"),
        (b"", "application/json"),
        (b"null", "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"{}", "application/json"),
    ],
)
def test_body_that_is_no_json_object_gets_the_flat_400(
    server: Server, data: bytes, content_type: str
) -> None:
    assert is_flat_400(post_bytes(server, data, content_type), "")


def post_bytes(server: Server, data: bytes, content_type: str | None) -> requests.Response:
    url = f"http://127.0.0.1:{server.port}/v1/completions"
    headers = {"content-type": content_type} if content_type is not None else {}
    return requests.post(url, data=data, headers=headers, timeout=PATIENCE)


def test_values_are_converted_as_leniently_as_pydantic_does(server: Server) -> None:
    assert server.complete(max_tokens="3", stream="no", n=1.0)["usage"]["completion_tokens"] == 3


def test_second_request_for_no_tokens_kills_the_server(log: Path) -> None:
    body = {"model": "m", "prompt": "Hi", "max_tokens": 0}
    with serving(log) as server:
        assert is_flat_400(server.post("/v1/completions", body), "max_tokens")
        assert server.get("/health").status_code == 200
        with pytest.raises(requests.ConnectionError):
            server.post("/v1/completions", body)
        server.process.wait(timeout=PATIENCE)


# -- streaming --


@pytest.mark.parametrize("asked", [False, True])
def test_usage_is_streamed_only_when_asked_for(server: Server, asked: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if asked else {}
    events = server.events("/v1/completions", prompt=[1, 2, 3], max_tokens=5, **options)
    assert len(events) == 5 + asked
    counts = [event["usage"] and event["usage"]["completion_tokens"] for event in events]
    assert counts == ([1, 2, 3, 4, 5, 5] if asked else [None] * 5)
    if asked:
        assert events[-1]["choices"] == []
        expected = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
        assert events[-1]["usage"] == expected


def test_continuous_usage_counts_up(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = server.events("/v1/completions", prompt="Hi", max_tokens=3, stream_options=options)
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 3]


@pytest.mark.parametrize("prompt", ["Once upon a time", [3, 4, 5]])
def test_streamed_text_is_the_whole_text(server: Server, prompt: object) -> None:
    fields: Json = {"prompt": prompt, "max_tokens": 60}
    (whole,) = server.complete(**fields)["choices"]
    choices = [event["choices"][0] for event in server.events("/v1/completions", **fields)]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert choices[-1]["finish_reason"] == whole["finish_reason"]
    assert {choice["finish_reason"] for choice in choices[:-1]} == {None}


def test_chat_stream_begins_with_the_role(server: Server) -> None:
    messages = [{"role": "user", "content": "Hello there"}]
    events = server.events("/v1/chat/completions", messages=messages, max_tokens=8)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant"}
    whole = server.chat("Hello there")["choices"][0]["message"]["content"]
    assert "".join(delta["content"] for delta in deltas[1:]) == whole
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert len({event["id"] for event in events}) == len(events)


def test_streamed_choices_are_told_apart_by_index(server: Server) -> None:
    events = server.events("/v1/completions", prompt=["a", "b"], max_tokens=3)
    indexes = [event["choices"][0]["index"] for event in events]
    assert sorted(indexes) == sorted([0, 1] * 3)


def test_stream_interval_puts_several_tokens_into_a_chunk(log: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("stream_interval: 4\n")
    with serving(log, MODEL, "--extra_llm_api_options", str(tmp_path / "c.yaml")) as server:
        fields: Json = {"prompt": "Hi", "max_tokens": 10}
        events = server.events("/v1/completions", **fields)
        assert len(events) == 4  # tokens 1, 4, 8 and 10
        text = "".join(event["choices"][0]["text"] for event in events)
        assert text == server.complete(**fields)["choices"][0]["text"]


# -- HTTP --


def http_post(fields: Json, *headers: str, path: str = "/v1/completions") -> bytes:
    body = json.dumps({"model": "m", "prompt": "Hi", **fields}).encode()
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01", b"400"),  # the first bytes of TLS
        (b"GET / HTTP/2.0\r\n\r\n", b"404"),  # read as the only version that it knows
        (b"GET /health HTTP/1.1\r\nno colon\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\n\r\n", b"400"),  # no Host
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000, b"400"),
    ],
)
def test_malformed_http_is_refused_and_the_connection_closed(
    server: Server, data: bytes, status: bytes
) -> None:
    assert server.exchange(data).startswith(b"HTTP/1.1 " + status)


def test_chunked_request_body_in_single_bytes_is_understood(server: Server) -> None:
    body = json.dumps({"model": "m", "prompt": "Hi", "max_tokens": 2}).encode()
    parts = [b"%x;ext=1\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:])]
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    data = head + b"transfer-encoding: chunked\r\n\r\n" + b"".join(parts) + b"0\r\nt: 1\r\n\r\n"
    with server.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for position in range(len(data)):
            client.sendall(data[position : position + 1])
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200") and b'"completion_tokens":2' in answer


def test_expect_continue_is_granted(server: Server) -> None:
    data = http_post({"max_tokens": 1}, "expect: 100-continue", "connection: close")
    head, _, body = data.partition(b"\r\n\r\n")
    with server.connect() as client:
        client.sendall(head + b"\r\n\r\n")
        assert client.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert client.recv(65536).startswith(b"HTTP/1.1 200")


def test_connection_serves_several_requests(server: Server) -> None:
    with requests.Session() as session:
        for _ in range(3):
            session.get(f"http://127.0.0.1:{server.port}/version", timeout=PATIENCE)
    assert len(set(re.findall(r'(127\S+) - "GET /version', server.log)[-3:])) == 1


def test_two_requests_in_one_packet_are_answered_in_turn(server: Server) -> None:
    first = http_post({"max_tokens": 5, "stream": True})
    answer = server.exchange(first + http_post({"max_tokens": 1}, "connection: close"))
    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.index(b"[DONE]") < answer.index(b"content-length")


def test_http_1_0_stream_is_unframed_and_ends_with_the_connection(server: Server) -> None:
    data = http_post({"max_tokens": 2, "stream": True}).replace(b"HTTP/1.1", b"HTTP/1.0")
    answer = server.exchange(data)
    assert b"transfer-encoding" not in answer
    assert answer.endswith(b"data: [DONE]\n\n")


def test_idle_connection_is_closed_after_five_seconds(idle_seconds: Future[float]) -> None:
    assert 4.5 < idle_seconds.result() < PATIENCE


def test_no_request_has_left_a_traceback_but_those_that_do_so_in_the_real_one(
    server: Server,
) -> None:
    raised = set(re.findall(r"^(\w+(?:\.\w+)*(?:Error|Exception))\b", server.log, re.MULTILINE))
    ours = {"AttributeError", "TypeError", "limits.RequestError"}
    assert raised <= {*ours, "h11._util.LocalProtocolError"}


# -- speed and batching --


def is_on_time(seconds: float, complete: Callable[[], object]) -> bool:
    """Never too early, whatever the machine does; the caller tries until it does nothing else."""
    began = time.monotonic()
    complete()
    took = time.monotonic() - began
    assert took >= seconds
    return took < 2 * seconds


def test_timetable_is_kept(log: Path) -> None:
    with serving(log, TTFT_MS="50", PREFILL_US_PER_TOKEN="1000", ITL_MS="5") as server:
        ask = partial(server.complete, [1] * 50, max_tokens=41, ignore_eos=True)
        eventually(lambda: is_on_time(0.3, ask))  # 50 + 50 x 1 + 40 x 5 ms


def test_running_requests_slow_each_other_down_when_asked_to(log: Path) -> None:
    with serving(log, ITL_MS="0", ITL_US_PER_RUNNING="1000") as server:
        ask = partial(server.complete, ["Hi"] * 10, max_tokens=21, ignore_eos=True)
        eventually(lambda: is_on_time(0.2, ask))


def test_requests_beyond_the_batch_wait_their_turn(log: Path) -> None:
    with serving(log, MODEL, "--max_batch_size", "2", ITL_MS="10") as server:
        ask = partial(server.complete, ["a", "b", "c", "d"], max_tokens=11, ignore_eos=True)
        eventually(lambda: is_on_time(0.2, ask))


def test_a_client_that_leaves_frees_its_slot(log: Path) -> None:
    with serving(log, MODEL, "--max_batch_size", "1", ITL_MS="1000") as server:
        for stream in (True, False):
            with server.connect() as client:
                client.sendall(http_post({"max_tokens": 500, "ignore_eos": True, "stream": stream}))
                time.sleep(0.05)
            assert server.complete(max_tokens=1)["usage"]["completion_tokens"] == 1


def test_256_streams_at_once_are_correct(log: Path) -> None:
    count, tokens = 256, 60
    fields = {"max_tokens": tokens, "ignore_eos": True, "stream": True, "temperature": 0}
    with serving(log, ITL_MS="10") as server:
        answers = read_all(
            [
                (server.connect(), http_post({**fields, "prompt": f"p {i}"}, "connection: close"))
                for i in range(count)
            ]
        )
        assert {answer.count(b"data: {") for answer in answers} == {tokens}
        assert all(answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") for answer in answers)
        assert len({text_of(answer) for answer in answers}) > count / 2
        whole = server.complete("p 17", max_tokens=tokens, ignore_eos=True)
        assert text_of(answers[17]) == whole["choices"][0]["text"]


def text_of(answer: bytes) -> str:
    chunks = re.findall(rb"^data: (\{.*\})$", answer, re.MULTILINE)
    return "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)


def read_all(clients: list[tuple[socket.socket, bytes]]) -> list[bytes]:
    """Send all requests, and return all answers, read to their ends."""
    answers = [bytearray() for _ in clients]
    with selectors.DefaultSelector() as selector:
        for index, (client, data) in enumerate(clients):
            client.sendall(data)
            selector.register(client, selectors.EVENT_READ, index)
        while selector.get_map():
            for key, _ in selector.select(timeout=PATIENCE):
                assert isinstance(key.fileobj, socket.socket)
                received = key.fileobj.recv(65536)
                answers[key.data] += received
                if not received:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
    return [bytes(answer) for answer in answers]


# -- faults --


def test_exit_while_loading(log: Path) -> None:
    with serving(log, ready=False, FAULT="exit-loading:3") as server:
        assert server.process.wait(timeout=PATIENCE) == 3
        assert "Executor worker died during initialization" in server.log
        assert "Uvicorn" not in server.log


@pytest.mark.parametrize(
    ("fault", "code"),
    [("exit-serving:9", 9), ("exit-serving:9:0.1", 9), ("kill-serving:0.1", -signal.SIGKILL)],
)
def test_death_while_serving(log: Path, fault: str, code: int) -> None:
    with serving(log, ready=False, FAULT=fault) as server:
        assert server.process.wait(timeout=PATIENCE) == code
        assert "Uvicorn running" in server.log


def test_hang_while_loading(log: Path) -> None:
    with serving(log, ready=False, FAULT="hang-loading", LOAD_SECONDS="0") as server:
        eventually(lambda: "50%" in server.log)
        time.sleep(0.2)
        assert server.process.poll() is None
        assert "Uvicorn" not in server.log


def test_503_health_with_a_dead_engine(log: Path) -> None:
    with serving(log, FAULT="503:2") as server:
        assert server.get("/health").status_code == 200
        eventually(lambda: server.get("/health").status_code == 503)
        assert server.get("/health_generate").status_code == 500
        assert server.get("/v1/models").status_code == 200
        with pytest.raises(requests.Timeout):
            server.post("/v1/completions", {"model": "m", "prompt": "Hi"}, timeout=0.2)


def test_slow_health(log: Path) -> None:
    with serving(log, FAULT="slow-health:0.3") as server:
        assert server.get("/health").elapsed.total_seconds() >= 0.3


def test_hang_accepts_but_never_answers_and_still_obeys_signals(log: Path) -> None:
    with serving(log, FAULT="hang") as server:
        time.sleep(0.05)
        with pytest.raises(requests.ReadTimeout):
            server.get("/health", timeout=0.2)
        server.process.terminate()
        assert server.process.wait(timeout=PATIENCE) == -signal.SIGTERM


def test_ignored_signals(log: Path) -> None:
    with serving(log, FAULT="ignore-term") as server:
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        assert server.get("/health").status_code == 200


def test_log_flood_does_not_stop_the_answers(log: Path) -> None:
    with serving(log, FAULT="log-flood:5") as server:
        eventually(lambda: server.log_file.stat().st_size > 500_000)
        server.complete()
        server.process.terminate()
        assert server.process.wait(timeout=PATIENCE) == -signal.SIGTERM


def test_binary_log_and_several_faults_at_once(log: Path) -> None:
    with serving(log, FAULT="binary-log, slow-health:0.1") as server:
        text = server.log_file.read_bytes()
        assert max(map(len, text.split(b"\n"))) > 1 << 20
        with pytest.raises(UnicodeDecodeError):
            text.decode()
        assert server.get("/health").elapsed.total_seconds() >= 0.1
