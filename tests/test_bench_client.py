"""The yardstick itself: what the timetable server says it sent is what the client saw."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext

import pytest

from tests import bench_client


@pytest.fixture(autouse=True)
def compiler() -> None:
    if not shutil.which("cc"):
        assert not os.environ.get("CI"), "a C compiler is needed in CI"
        pytest.skip("no C compiler is installed")


def test_server_and_client_agree() -> None:
    with bench_client.server() as (port, _):
        _, truth, result = bench_client.run(port, 4, 8, ttft=20, itl=1)
    counts = truth["requests"], truth["ttft_ms"]["count"], truth["itl_ms"]["count"]
    assert counts == (8, 8, 8 * 127)
    assert [o.output_tokens for o in result.outcomes] == [128] * 8
    assert [o.prompt_tokens for o in result.outcomes] == [16] * 8
    assert truth["ttft_ms"]["mean"] >= 20
    ttft = sum(o.first - o.sent for o in result.outcomes) / 8e6
    assert ttft == pytest.approx(truth["ttft_ms"]["mean"], abs=5)


@pytest.mark.parametrize(
    ("rate", "memory", "error", "code"),
    [(2000, 100, 0.1, 0), (1690, 100, 0.1, 1), (2000, 300, 0.1, 1), (2000, 100, 0.6, 1)],
)
def test_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, rate: float, memory: int, error: float, code: int
) -> None:
    point = bench_client.Point((50, 50 + error), (10, 10), 1, 0, True)
    monkeypatch.setattr(bench_client, "server", lambda: nullcontext((1, 1)))
    monkeypatch.setattr(bench_client, "separate_cores", lambda _: None)
    monkeypatch.setattr(bench_client, "point", lambda *_: point)
    monkeypatch.setattr(bench_client, "ceiling", lambda _: rate)
    monkeypatch.setattr(bench_client, "peak_memory", lambda _: memory)
    assert bench_client.main(["--repeat", "1", "--streams", "1"]) == code
