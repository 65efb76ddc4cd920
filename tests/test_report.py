"""The report: tables, files, plots, the page in a real browser, two folders side by side."""

from __future__ import annotations

import builtins
import csv
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from load.matrix import Case
from report import __main__ as command
from report import charts, compare, results
from report import render as report
from tests.conftest import PATIENCE

pytestmark = pytest.mark.usefixtures("same_signals")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def record(case: Case, value: float = 10.0, **facts: Any) -> dict[str, Any]:
    names = (f"{kind}_{metric}_ms" for metric in ("ttft", "tpot", "itl", "e2el")
             for kind in ("mean", "median", "std", "p90", "p95", "p99"))  # fmt: skip
    return {
        "date": "20261124-101500", "model_id": "org/model", "valid": True, "problems": [],
        "notes": [], "request_throughput": 2.5, "output_throughput": 640.0, "duration": 4.0,
        **dict.fromkeys(names, value),
        "case": case.facts(),
        "metadata": {"url": "http://h:1", "command": "bench.py"},
        **facts,
    }  # fmt: skip


def everything() -> list[dict[str, Any]]:
    """A run of each kind that has a plot."""
    return [
        *(record(Case("prefill", n, 1, 10, 4), n / 10) for n in (128, 512, 4096)),
        *(record(Case("decode", 128, n, 10, 4), 11.0) for n in (128, 1024)),
        *(record(Case("concurrency", 512, 256, 10, c), 10.0 * c) for c in (1, 4, 16)),
        *(record(Case("sweep", 512, 256, 10, c), 10.0 * c) for c in (1, 2)),
    ]


def bad(case: Case) -> dict[str, Any]:
    return record(case, valid=False, problems=["1 of 10 requests failed: <b>HTTP 500</b>"])


def put(folder: Path, *records: dict[str, Any]) -> Path:
    folder.mkdir()
    for one in records:
        (folder / f"{one['case']['name']}.json").write_text(json.dumps(one))
    return folder


LATENCY = Case("latency", 128, 128, 100, 1)
SECOND = Case("latency", 128, 128, 100, 1, repeat=2)


def test_the_table() -> None:
    text = report.table([record(LATENCY), bad(Case("latency", 512, 256, 100, 1))])
    assert text.splitlines() == [
        "                         req/s  out tok/s  TTFT ms   p99  TPOT ms  ITL ms    p99  E2EL ms",
        "latency-in128-out128-c1   2.50        640     10.0  10.0    10.00   10.00  10.00       10",
        "latency-in512-out256-c1   2.50        640     10.0  10.0    10.00   10.00  10.00       10"
        "  INVALID",
        "INVALID latency-in512-out256-c1: 1 of 10 requests failed: <b>HTTP 500</b>",
    ]


def test_repeats_are_one_row_with_their_spread() -> None:
    text = report.table([record(LATENCY, 9.0), record(SECOND, 11.0)])
    assert text.count("latency-in128") == 1
    assert "10.0 ±14.1%" in text


def test_the_curve_goes_from_load_to_load_not_by_date() -> None:
    runs = [record(Case("concurrency", 512, 256, 10, c), 10.0 * c) for c in (4, 16, 1)]
    chart = charts.load_curve("n", "t", results.groups(runs), "concurrency")
    (points,) = chart.series.values()
    assert [x for x, _ in points] == [10.0, 40.0, 160.0]
    assert chart.labels == ("c=1", "c=4", "c=16")


def test_goodput_has_a_column_when_it_was_asked_for() -> None:
    assert "good req/s" not in report.table([record(LATENCY, request_goodput=None)])
    assert "good req/s" in report.table([record(LATENCY, request_goodput=1.25)])
    assert report.brief(record(LATENCY, request_goodput=1.25))["request_goodput"] == 1.25


def test_the_clients_own_delay_is_told(tmp_path: Path) -> None:
    facts = {"late_share": 0.012, "p99_read_lag_ms": 0.4, "stamps": "kernel"}
    report.write(tmp_path, [record(LATENCY, client=facts)])
    words = "held back for at most 1.2% of their time"
    assert words in report.table([record(LATENCY, client=facts)])
    assert words in (tmp_path / "report.html").read_text()


def test_only_the_kernels_stamps_undo_its_delay() -> None:
    facts = {"late_share": 0.012, "p99_read_lag_ms": 0.4}
    kernel = record(LATENCY, client={**facts, "stamps": "kernel"})
    own = record(SECOND, client={**facts, "stamps": "user space"})
    assert "kernel stamps undo that" in report.table([kernel])
    assert "kernel stamps" not in report.table([kernel, own])


def test_one_bad_repeat_makes_the_row_invalid() -> None:
    assert "INVALID" in report.table([record(LATENCY), bad(SECOND)])


def test_a_run_that_measured_nothing_has_no_numbers() -> None:
    empty = {k: v for k, v in bad(LATENCY).items() if not k.endswith(("_ms", "throughput"))}
    assert " - " in report.table([empty])
    assert report.brief(empty)["mean_ttft_ms"] is None


def test_the_csv_holds_every_run(tmp_path: Path) -> None:
    report.write(tmp_path, [record(LATENCY), bad(SECOND)])
    rows = list(csv.DictReader((tmp_path / "summary.csv").read_text().splitlines()))
    assert [(r["name"], r["valid"], r["repeat"]) for r in rows] == [
        ("latency-in128-out128-c1", "True", "1"),
        ("latency-in128-out128-c1-r2", "False", "2"),
    ]
    assert rows[1]["problems"] == "1 of 10 requests failed: <b>HTTP 500</b>"


def test_the_summary_leaves_single_requests_out(tmp_path: Path) -> None:
    folder = put(tmp_path / "a", record(LATENCY, ttfts=[0.1] * 10_000))
    assert command.main([str(folder)]) == 0
    (found,) = json.loads((folder / "summary.json").read_text())
    assert "ttfts" not in found
    assert found["mean_ttft_ms"] == 10


def test_every_plot_is_a_png_and_in_the_page(tmp_path: Path) -> None:
    report.write(tmp_path, everything())
    page = (tmp_path / "report.html").read_text()
    for name in ("ttft_input", "itl_output", "throughput_latency", "sweep"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f'<figure id="{name}"' in page


def test_invalid_runs_are_in_no_plot(tmp_path: Path) -> None:
    report.write(tmp_path, [bad(Case("prefill", 128, 1, 10, 4))])
    assert not list(tmp_path.glob("*.png"))


def test_without_matplotlib_there_are_no_plots_but_all_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    report.write(tmp_path, everything())
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert "prefill-in128-out1-c4" in (tmp_path / "report.html").read_text()


def test_the_page_needs_nothing_from_elsewhere_and_escapes_what_it_shows(tmp_path: Path) -> None:
    report.write(tmp_path, [*everything(), bad(LATENCY)])
    page = (tmp_path / "report.html").read_text()
    assert "<b>HTTP 500" not in page
    assert "&lt;b&gt;HTTP 500" in page
    sources = re.findall(r'(?:src|href)="([^"]{0,12})', page)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    HTMLParser().feed(page)


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        assert not os.environ.get("CI"), "a Chromium is needed in CI"
        pytest.skip("no Chromium is installed")
    return found


# What a reader would see: pictures that are there, nothing wider than the screen, no errors.
PROBE = """<script>
const errors = [];
addEventListener("error", e => errors.push(String(e.message || e.target.src)), true);
addEventListener("load", () => {
  const images = [...document.images].map(i => i.naturalWidth > 0 && i.width <= innerWidth);
  const facts = {errors, images, wide: document.documentElement.scrollWidth > innerWidth};
  document.body.setAttribute("data-facts", JSON.stringify(facts));
});
</script>"""


@pytest.mark.parametrize("width", [360, 1400])
def test_the_page_in_a_browser(tmp_path: Path, browser: str, width: int) -> None:
    report.write(tmp_path, [*everything(), bad(LATENCY)])
    page = (tmp_path / "report.html").read_text()
    probed = tmp_path / "probed.html"
    probed.write_text(page.replace("<title>", PROBE + "<title>"))
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}/profile", f"--window-size={width},900",
        "--virtual-time-budget=3000", "--dump-dom", probed.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE)
    match = re.search(r'data-facts="([^"]*)"', done.stdout)
    assert match, done.stderr[-2000:]
    facts = json.loads(match[1].replace("&quot;", '"'))
    assert facts == {"errors": [], "images": [True] * 4, "wide": False}
    assert "CONSOLE" not in done.stderr


# --- from the command line, and two folders -------------------------------------------------------


def test_a_report_can_be_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = put(tmp_path / "a", *everything())
    assert command.main([str(folder)]) == 0
    assert "prefill-in128-out1-c4" in capsys.readouterr().out
    assert (folder / "report.html").exists()
    assert command.main([str(folder)]) == 0  # its own summary is no run


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = put(tmp_path / "a", record(LATENCY, 10.0), record(Case("decode", 1, 2, 3, 4)))
    b = put(
        tmp_path / "b",
        record(LATENCY, 12.0, output_throughput=700.0),
        bad(Case("prefill", 1, 1, 1, 1)),
    )
    assert command.main(["compare", str(a), str(b)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "latency-in128-out128-c1 mean_ttft_ms 10.0 12.0 +20.0% - WORSE" in lines
    assert "latency-in128-out128-c1 output_throughput 640 700 +9.4% - better" in lines
    assert "latency-in128-out128-c1 request_throughput 2.50 2.50 +0.0% -" in lines
    assert "only before: decode-in1-out2-c4" in lines
    assert "INVALID after, not compared: prefill-in1-out1-c1" in lines


def words_of(folder: Path, capsys: pytest.CaptureFixture[str], *sides: dict[str, Any]) -> str:
    a, b = (put(folder / name, one) for name, one in zip("ab", sides, strict=True))
    assert command.main(["compare", str(a), str(b)]) == 0
    return capsys.readouterr().out


def test_goodput_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = (record(LATENCY, request_goodput=g) for g in (2.0, 1.0))
    text = " ".join(words_of(tmp_path, capsys, before, after).split())
    assert "request_goodput 2.00 1.00 -50.0% - WORSE" in text


def test_from_nothing_to_something_is_a_change() -> None:
    before, after = (record(LATENCY, request_goodput=g) for g in (0.0, 1.0))
    (change,) = (c for c in compare.compare([before], [after]) if c.column == results.GOODPUT)
    assert (change.verdict, change.row[4]) == ("better", "+inf%")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"metadata": {"client": "trtllm"}}, "client: builtin before, trtllm after"),
        ({"metadata": {"client": "builtin", "backend": "openai-chat"}}, "API: None before, openai"),
        ({"metadata": {"client": "builtin", "served_model": "b"}}, "model: org/model before, b"),
        ({"completed": 10, "total_input_tokens": 1300}, "input tokens a request: 128 before, 130"),
        ({"completed": 10, "total_output_tokens": 90}, "output tokens a request: 0 before, 9"),
    ],
)  # fmt: skip
def test_unlike_runs_are_not_compared_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: dict[str, Any], words: str
) -> None:
    like: dict[str, Any] = {"metadata": {"client": "builtin"}, "completed": 10}
    like["total_input_tokens"] = 1280
    before, after = record(LATENCY, **like), record(LATENCY, **{**like, **other})
    assert "UNLIKE" not in "\n".join(compare.differences([before], [before]))
    text = words_of(tmp_path, capsys, before, after)
    assert f"UNLIKE {words}" in text
    assert "(every load)" in text


def test_another_number_of_requests_is_told_with_its_load() -> None:
    more = Case("latency", 128, 128, 200, 1)
    same = record(Case("decode", 1, 2, 3, 4))
    lines = compare.differences([record(LATENCY), same], [record(more), same])
    assert lines == ["UNLIKE requests: 100 before, 200 after (latency-in128-out128-c1)"]


def test_what_another_client_left_is_no_repeat() -> None:
    ours = record(LATENCY, 10.0, metadata={"client": "builtin"})
    theirs = record(SECOND, 90.0, metadata={"client": "trtllm"})
    text = report.table([ours, theirs])
    assert "±" not in text
    assert "latency-in128-out128-c1 (trtllm, org/model, 100 requests)" in text


def test_a_change_within_the_spread_is_no_change() -> None:
    before = [record(LATENCY, 8.0), record(SECOND, 12.0)]
    after = [record(LATENCY, 9.0), record(SECOND, 13.0)]
    verdicts = {c.column.key: c.verdict for c in compare.compare(before, after)}
    assert verdicts["mean_ttft_ms"] == ""


@pytest.mark.parametrize("words", [["nowhere"], ["compare", "nowhere", "nowhere"]])
def test_a_folder_that_is_not_there(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(words) == 1
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["compare", "one"], ["one", "two"], []])
def test_usage(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(words)
    assert stop.value.code == 2


@pytest.mark.parametrize("text", ["{half", "[]", "7"])
def test_a_file_that_is_no_result(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (put(tmp_path / "a") / "x.json").write_text(text)
    assert command.main([str(tmp_path / "a")]) == 1
    assert "ERROR" in capsys.readouterr().err
