"""What `make demo` makes of a busy laptop. That it runs as a whole is tested with the README."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

demo: Any = importlib.import_module("simulator.demo")  # by name: mypy knows it as a script
BUSY = ["the client held requests back for 9% of their time"]


@pytest.mark.parametrize(
    ("problems", "own", "forgiven"),
    [
        ([], [], True),
        (BUSY, BUSY, True),
        (["1 of 10 requests failed: HTTP 500", *BUSY], BUSY, False),
        (["1 of 10 requests failed: HTTP 500"], [], False),
        (["the first 7 tokens came together in 10 of 16 answers: ..."], [], True),
    ],
)
def test_only_a_busy_machine_is_forgiven(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    problems: list[str],
    own: list[str],
    forgiven: bool,
) -> None:
    monkeypatch.setattr(demo, "RESULTS", tmp_path)
    for name, wrong in (("prefill-c1", []), ("prefill-c4", problems)):
        record = {"problems": wrong, "client": {"problems": own if wrong else []}}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    (tmp_path / "summary.json").write_text("[]")
    assert demo.is_only_busy() is forgiven


def test_a_benchmark_without_a_run_is_not_forgiven(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "RESULTS", tmp_path)
    assert not demo.is_only_busy()
