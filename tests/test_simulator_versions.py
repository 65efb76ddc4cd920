"""What the simulator does otherwise when it plays 1.2.1."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.test_simulator import ACCEPTED, MODEL, eventually, run, serving

NEW = {"TRTLLM_SIM_VERSION": "1.2.1"}
OLD = {"TRTLLM_SIM_VERSION": "1.1.0"}


def can_bind(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def can_connect(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_it_has_the_port_before_it_has_the_model(tmp_path: Path) -> None:
    """It answers nobody yet, but nobody else can take the port."""
    with serving(tmp_path / "log", VERSION="1.2.1", LOAD_SECONDS="600", ready=False) as server:
        eventually(lambda: "Loading weights" in server.log)
        assert not can_bind(server.port)
        assert not can_connect(server.port)
        assert "SIMULATOR of TensorRT-LLM 1.2.1" in server.log
    with serving(tmp_path / "log", VERSION="1.1.0", LOAD_SECONDS="600", ready=False) as server:
        eventually(lambda: "Loading weights" in server.log)
        assert can_bind(server.port)


def test_a_taken_port_ends_it_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = [MODEL, "--host", "127.0.0.1", "--port", port]
        slow = {"TRTLLM_SIM_LOAD_SECONDS": "600", "TRTLLM_SIM_FAULT": ""}
        done = run(*words, env={**NEW, **slow})
    assert done.returncode == 1
    assert f"RuntimeError: Failed to bind socket to 127.0.0.1:{port}: [Errno 98]" in done.stderr


def test_it_serves_and_says_its_version(tmp_path: Path) -> None:
    words = (MODEL, "--tensor_parallel_size", "2")
    with serving(tmp_path / "log", *words, ready=False, VERSION="1.2.1") as server:
        eventually(lambda: can_connect(server.port))
        assert "Application startup complete" in server.log and "running on" not in server.log
        assert server.get("/version").json() == {"version": "1.2.1"}
        assert server.complete("one two")["choices"]


@pytest.mark.parametrize(
    ("env", "words", "code", "said"),
    [
        (OLD, ["--cluster_size", "3"], ACCEPTED, ""),  # parsed, and forgotten
        (NEW, ["--moe_cluster_parallel_size", "3"], ACCEPTED, ""),
        (NEW, ["--tp_size", "2", "--cp_size", "4"], ACCEPTED, "with 8 workers"),
        (OLD, ["--cp_size", "4"], 2, "No such option"),
        (NEW, ["--tool_parser", "qwen3", "--enable_chunked_prefill"], ACCEPTED, ""),
        (NEW, ["--tool_parser", "hermes"], 2, "is not one of"),
        ({"TRTLLM_SIM_VERSION": "1.3"}, [], 1, "must be one of 1.1.0, 1.2.1"),
    ],
)
def test_flags(env: dict[str, str], words: list[str], code: int, said: str) -> None:
    done = run(MODEL, "--port", "0", *words, env=env)
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout + done.stderr


@pytest.mark.parametrize("env", [OLD, NEW])
@pytest.mark.parametrize("key", ["tensor", "pipeline", "context"])
def test_a_size_is_never_null(tmp_path: Path, env: dict[str, str], key: str) -> None:
    (tmp_path / "c.yaml").write_text(f"{key}_parallel_size:\n")
    done = run(MODEL, "--extra_llm_api_options", str(tmp_path / "c.yaml"), "--port=0", env=env)
    assert done.returncode == 1 and "Input should be a valid integer" in done.stderr
