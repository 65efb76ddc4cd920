"""Streams as servers, proxies and gateways really send them: what bench.py makes of each."""

from __future__ import annotations

import pytest

from tests.servers import Kind, bench, running, smoke

pytestmark = pytest.mark.usefixtures("clean_environment", "same_signals")


def test_a_well_behaved_server_is_valid_and_its_times_are_true() -> None:
    with running(Kind(ttft=0.05, itl=0.01)) as server:
        for backend in ("openai", "openai-chat"):
            run = bench(server, "--backend", backend, "-o", backend)
            assert run.code == 0, run.said
            assert run.run["mean_ttft_ms"] >= 50 and run.run["mean_itl_ms"] > 9
        assert smoke(server).code == 0
