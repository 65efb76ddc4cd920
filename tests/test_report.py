"""The report: tables, files, plots, the page in a real browser, two folders side by side."""

from __future__ import annotations

import builtins
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from load.matrix import Case
from report import __main__ as command
from report import charts, compare, draw, results
from report import render as report
from tests.conftest import PATIENCE

pytestmark = pytest.mark.usefixtures("same_signals", "undrawn")
ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def spread(value: float) -> dict[str, float]:
    shares = {"5": 0.5, "25": 0.9, "50": 1.0, "75": 1.1, "95": 2.0, "99": 3.0}
    return {p: value * share for p, share in shares.items()}


def record(case: Case, value: float = 10.0, **facts: Any) -> dict[str, Any]:
    names = (f"{kind}_{metric}_ms" for metric in ("ttft", "tpot", "itl", "e2el")
             for kind in ("mean", "median", "std", "p90", "p95", "p99"))  # fmt: skip
    return {
        "date": "20261124-101500", "model_id": "org/model", "valid": True, "problems": [],
        "notes": [], "request_throughput": 2.5, "output_throughput": 640.0, "duration": 4.0,
        "completed": case.num_prompts, "user_throughput": 50.0, "e2el_growth": None,
        **dict.fromkeys(names, value),
        **{f"{metric}_percentiles_ms": spread(value) for metric in ("ttft", "itl", "e2el")},
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


PICTURES = ("ttft_input", "itl_output", "throughput_latency", "sweep", "per_user",
            "ttft_spread", "itl_spread", "e2el_spread")  # fmt: skip
LATENCY = Case("latency", 128, 128, 100, 1)
SECOND = Case("latency", 128, 128, 100, 1, repeat=2)


def test_the_table() -> None:
    text = report.table([record(LATENCY), bad(Case("latency", 512, 256, 100, 1))])
    assert text.splitlines() == [
        "                         req/s  out tok/s  TTFT ms  TTFT p99  TPOT ms  ITL ms  ITL p99"
        "  E2EL ms",
        "latency-in128-out128-c1   2.50        640     10.0      10.0    10.00   10.00    10.00"
        "       10",
        "latency-in512-out256-c1   2.50        640     10.0      10.0    10.00   10.00    10.00"
        "       10  INVALID",
        "INVALID latency-in512-out256-c1: 1 of 10 requests failed: <b>HTTP 500</b>",
    ]


def test_repeats_are_one_row_with_their_spread() -> None:
    text = report.table([record(LATENCY, 9.0), record(SECOND, 11.0)])
    assert text.count("latency-in128") == 1
    assert "10.0 ±14.1%" in text


def test_the_curve_goes_from_load_to_load_not_by_date() -> None:
    runs = [record(Case("concurrency", 512, 256, 10, c), 10.0 * c) for c in (4, 16, 1)]
    chart = charts.load_curve("n", "t", [("", results.groups(runs))], "concurrency")
    (points,) = chart.series.values()
    assert [p.x for p in points] == [10.0, 40.0, 160.0]
    assert [p.label for p in points] == ["c=1", "c=4", "c=16"]


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


@pytest.mark.usefixtures("pictures")
def test_every_plot_is_a_png_and_in_the_page(tmp_path: Path) -> None:
    report.write(tmp_path, everything())
    page = (tmp_path / "report.html").read_text()
    for name in PICTURES:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f'<figure id="{name}"' in page


def test_invalid_runs_are_in_no_plot(tmp_path: Path) -> None:
    report.write(tmp_path, [bad(Case("prefill", 128, 1, 10, 4))])
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.usefixtures("pictures")
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


@pytest.mark.usefixtures("pictures")
def test_the_page_needs_nothing_from_elsewhere_and_escapes_what_it_shows(tmp_path: Path) -> None:
    report.write(tmp_path, [*everything(), bad(LATENCY)])
    page = (tmp_path / "report.html").read_text()
    assert "<b>HTTP 500" not in page
    assert "&lt;b&gt;HTTP 500" in page
    sources = re.findall(r'(?:src|href)="([^"]{0,12})', page)
    sources += re.findall(r"url\((.)", page)
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    HTMLParser().feed(page)


class Heads(HTMLParser):
    """The words of the header cells, a list a table."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[str]] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.inside = tag == "th"
        if tag == "thead":
            self.tables.append([])
        elif tag == "th":
            self.tables[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.tables[-1][-1] += data


def page_of(folder: Path, *records: dict[str, Any]) -> str:
    report.write(folder, list(records))
    return (folder / "report.html").read_text()


def test_one_load_is_no_loads(tmp_path: Path) -> None:
    assert "<p>1 load, every run valid." in page_of(tmp_path / "a", record(LATENCY))


def test_no_two_columns_have_one_name(tmp_path: Path) -> None:
    server = {column.key: 1.0 for column in results.SERVER}
    more = {"request_goodput": 1.0, "goodput_share": 1.0, "cached_share": 0.5}
    heads = Heads()
    heads.feed(page_of(tmp_path, *everything(), record(LATENCY, **server, **more)))
    assert len(heads.tables) >= 2
    for titles in heads.tables:
        assert len(set(titles)) == len(titles)
    head = report.table(everything()).splitlines()[0]
    assert head.count("TTFT p99") == head.count("ITL p99") == head.count("p99") / 2 == 1


def test_how_many_requests_were_asked_completed_and_failed(tmp_path: Path) -> None:
    wrong = bad(SECOND) | {"completed": 97}
    text = re.sub("<[^>]*>", " ", page_of(tmp_path, record(LATENCY), wrong).replace("<wbr>", ""))
    assert re.search(r"latency-in128-out128-c1\s+invalid\s+200\s+197\s+3\s", text)


def sweep_of(*throughputs: float, **facts: Any) -> list[dict[str, Any]]:
    return [
        record(Case("sweep", 512, 256, 10, 2**n), output_throughput=t, **facts)
        for n, t in enumerate(throughputs)
    ]


def test_the_knee_in_words(tmp_path: Path) -> None:
    page = page_of(tmp_path, *sweep_of(100.0, 190.0, 195.0))
    assert "The knee of the sweep: sweep-in512-out256-c2, with 190 output tokens/s" in page
    assert "At the next step twice the streams brought +3% throughput." in page


def test_a_sweep_that_ended_before_its_knee(tmp_path: Path) -> None:
    assert "More load than that was not tried" in page_of(tmp_path / "a", *sweep_of(100.0, 190.0))
    first = bad(Case("sweep", 512, 256, 10, 1))
    assert "has no knee: at its first step" in page_of(tmp_path / "b", first)


def test_the_goodput_in_words(tmp_path: Path) -> None:
    limits = {"goodput": {"ttft": 200.0}}
    good = record(LATENCY, request_goodput=2.0, goodput_share=1.0, metadata=limits)
    many = Case("throughput", 512, 256, 100)
    less = record(many, request_goodput=9.0, goodput_share=0.4, metadata=limits)
    page = page_of(tmp_path, good, less)
    assert "Goodput (TTFT up to 200 ms): 1 of 2 loads keep the limits for 99%" in page
    assert "9.00 at throughput-in512-out256-unlimited (40% keep them)" in page


def test_tokens_a_second_of_each_gpu(tmp_path: Path) -> None:
    page = page_of(tmp_path, record(LATENCY, metadata={"world_size": 4}))
    assert "<th>tok/s per user" in page
    assert re.search(r"<th>tok/s per GPU(.|\n)*<td>160\n", page)
    assert "per GPU" not in page_of(tmp_path, record(LATENCY))


@pytest.mark.usefixtures("pictures")
def test_the_exact_values_are_there_to_be_pointed_at(tmp_path: Path) -> None:
    page = page_of(tmp_path, *everything())
    titles = re.findall(r"<title>([^<]*)</title>", page)[1:]
    assert "prefill-in128-out1-c4: mean TTFT 12.80 ms" in titles
    assert any(t.startswith("sweep-in512-out256-c2: 640 output tokens/s") for t in titles)
    assert any(t.startswith("decode-in128-out128-c4: p5 5.50, p25 9.90, p50 11.00") for t in titles)


@pytest.mark.parametrize("points", [3, 8, 14])
def test_labels_do_not_lie_on_each_other_at_saturation(points: int) -> None:
    from matplotlib.figure import Figure

    runs = [record(Case("sweep", 512, 256, 10, 2**n), 100.0 + 2 * n) for n in range(points)]
    chart = charts.load_curve("n", "t", [("", results.groups(runs))], "sweep")
    figure = Figure(layout="constrained")
    draw.draw_lines(chart, figure)
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert boxes
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(axes.bbox.y0 <= box.y0 for box in boxes)


def test_how_each_run_was_measured_where_they_differ(tmp_path: Path) -> None:
    facts = {"url": "http://h:1", "client": "builtin"}
    client = {"late_share": 0.0, "p99_read_lag_ms": 0.0, "stamps": "kernel"}
    one = record(LATENCY, metadata=facts, client=client)
    other = record(Case("decode", 1, 2, 3, 4), metadata={**facts, "backend": "openai-chat"},
                   client={**client, "stamps": "user space"})  # fmt: skip
    page = page_of(tmp_path, one, other)
    assert "<dt>url<dd>http://h:1" in page
    heads = Heads()
    heads.feed(page)
    assert heads.tables[-1] == ["loads", "time stamps", "backend"]
    assert re.search(r"decode-<wbr>in1.*user space.*openai-chat", page)


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        assert not os.environ.get("CI"), "a Chromium is needed in CI"
        pytest.skip("no Chromium is installed")
    return found


WIDTHS = (420, 1300)  # pixels: a telephone, a screen

# What a reader would see: charts that have a size, nothing wider than the screen, no errors, and
# what is pointed at tells its values.
PROBE = """<script>
const errors = [];
addEventListener("error", e => errors.push(String(e.message || e.target.src)), true);
addEventListener("load", () => {
  const charts = [...document.querySelectorAll("figure svg")].map(chart => {
    const box = chart.getBoundingClientRect();
    return box.width > 200 && box.height > 100 && box.right <= innerWidth;
  });
  const point = document.querySelector(".tip"), box = point.getBoundingClientRect();
  point.scrollIntoView();
  const at = point.getBoundingClientRect();
  const hit = document.elementFromPoint(at.x + at.width / 2, at.y + at.height / 2);
  const tip = hit?.closest(".tip")?.querySelector("title")?.textContent || "";
  const wide = document.documentElement.scrollWidth > innerWidth;
  document.body.setAttribute("data-facts", JSON.stringify({errors, charts, tip, wide}));
});
</script>"""


def seen_by(browser: str, page: Path, width: int) -> dict[str, Any]:
    text = page.read_text()
    probed = page.with_name("probed.html")
    probed.write_text(text.replace("<title>", PROBE + "<title>", 1))
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--enable-logging=stderr", f"--user-data-dir={page.parent}/profile",
        f"--window-size={width},900", "--virtual-time-budget=3000", "--dump-dom", probed.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE)
    match = re.search(r'data-facts="([^"]*)"', done.stdout)
    assert match, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr
    found: dict[str, Any] = json.loads(match[1].replace("&quot;", '"'))
    return found


@pytest.mark.usefixtures("pictures")
def test_the_page_in_a_browser(tmp_path: Path, browser: str) -> None:
    report.write(tmp_path, [*everything(), bad(LATENCY)])
    for width in WIDTHS:
        seen = seen_by(browser, tmp_path / "report.html", width)
        assert seen["tip"].endswith("ms")
        assert seen == {"errors": [], "charts": [True] * 8, "tip": seen["tip"], "wide": False}


@pytest.mark.usefixtures("pictures")
def test_two_folders_on_one_page(tmp_path: Path, browser: str) -> None:
    a = put(tmp_path / "a", *everything(), *twice(10.0, 10.02))
    b = put(tmp_path / "b", *everything(), *twice(12.0, 12.0))
    assert command.main(["compare", str(a), str(b)]) == 0
    page = b / "compare-a.html"
    text = page.read_text()
    told = r'class="bad" title="10.0 before, 12.0 after; by chance[^"]*">\+19.9% WORSE'
    assert re.search(told, text)
    assert "no verdict on " in text
    assert {"mean, before", "mean, after"} <= set(re.findall(r"mean, \w+", text))
    for width in WIDTHS:
        seen = seen_by(browser, page, width)
        assert (seen["errors"], seen["wide"], set(seen["charts"])) == ([], False, {True})
    assert command.main([str(b)]) == 0  # the page is no result


# --- from the command line, and two folders -------------------------------------------------------


def test_a_report_can_be_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = put(tmp_path / "a", *everything())
    assert command.main([str(folder)]) == 0
    assert "prefill-in128-out1-c4" in capsys.readouterr().out
    assert (folder / "report.html").exists()
    assert command.main([str(folder)]) == 0  # its own summary is no run


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = put(tmp_path / "a", *twice(10.0, 10.02), record(Case("decode", 1, 2, 3, 4)))
    b = put(
        tmp_path / "b",
        *twice(12.0, 12.0, output_throughput=700.0),
        bad(Case("prefill", 1, 1, 1, 1)),
    )
    assert command.main(["compare", str(a), str(b)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "latency-in128-out128-c1 TTFT ms 10.0 12.0 +19.9% ±1.0% WORSE" in lines
    assert "latency-in128-out128-c1 out tok/s 640 700 +9.4% - better" in lines
    assert "latency-in128-out128-c1 req/s 2.50 2.50 +0.0% -" in lines
    assert lines[9].startswith("of 8 figures 1 are better and 6 WORSE")
    assert "only before: decode-in1-out2-c4" in lines
    assert "INVALID after, not compared: prefill-in1-out1-c1" in lines


@pytest.mark.usefixtures("pictures")
def test_more_than_two_are_each_compared_with_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = put(tmp_path / "a", *twice(10.0, 10.02), *everything())
    b = put(tmp_path / "b", *twice(12.0, 12.0), *everything())
    c = put(tmp_path / "c", *twice(8.0, 8.0), *everything(), bad(Case("prefill", 1, 1, 1, 1)))
    assert command.main(["compare", str(a), str(b), str(c)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "load a b c"
    assert "latency-in128-out128-c1 TTFT ms 10.0 12.0 +19.9% WORSE 8.0 -20.1% better" in lines
    assert lines.index("a before, b after:") < lines.index("a before, c after:")
    assert "INVALID after, not compared: prefill-in1-out1-c1" in lines
    text = (c / "compare-a-b.html").read_text()
    assert "b against a" in text
    assert "c against a" in text
    assert {"mean, a", "mean, b", "mean, c"} <= set(re.findall(r"mean, \w", text))


def test_folders_of_one_name_are_told_apart_by_their_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    names = [rf"{name}/$\x$" for name in "abc"]  # no formula
    folders = [str(put(tmp_path / name, *everything())) for name in names]
    assert command.main(["compare", *folders]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["load", *names]


def test_two_folders_of_one_name_are_told_apart_on_their_page(tmp_path: Path) -> None:
    folders = [tmp_path / side / "run" for side in ("old", "new")]
    for folder in folders:
        folder.parent.mkdir()
        put(folder, *everything())
    assert command.main(["compare", *map(str, folders)]) == 0
    page = (folders[1] / "compare-run.html").read_text()
    assert "Before: old/run. After: new/run." in page


def twice(first: float, second: float, **facts: Any) -> list[dict[str, Any]]:
    return [record(LATENCY, first, **facts), record(SECOND, second, **facts)]


def verdicts(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, str]:
    return {c.column.key: c.verdict for c in compare.compare(before, after)}


def test_one_run_a_side_is_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody knows by how much two such runs differ by chance."""
    text = words_of(tmp_path, capsys, record(LATENCY, 10.0), record(LATENCY, 20.0))
    assert "+100.0%" in text
    assert not re.search("better|WORSE", text)
    assert "with one run a side" in text
    assert "--repeat" in text
    mixed = verdicts(twice(10.0, 10.0), [record(LATENCY, 20.0)])
    assert mixed["mean_ttft_ms"] == "one run"


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ((8.0, 12.0), (9.0, 13.0), ""),  # within the spread
        ((9.0, 11.0), (12.0, 14.0), ""),  # apart, but two runs a side are few
        ((10.0, 10.1), (10.2, 10.3), ""),  # certain, perhaps, and of no matter
        ((10.0, 10.1), (13.0, 13.1), "WORSE"),
        ((13.0, 13.1), (10.0, 10.1), "better"),
        ((0.0, 0.0), (1.0, 1.0), "WORSE"),
        ((0.0, 0.0), (0.0, 0.0), ""),
    ],
)
def test_a_verdict_is_beyond_what_repeats_differ_by(
    before: tuple[float, float], after: tuple[float, float], verdict: str
) -> None:
    assert verdicts(twice(*before), twice(*after))["mean_ttft_ms"] == verdict


def words_of(folder: Path, capsys: pytest.CaptureFixture[str], *sides: dict[str, Any]) -> str:
    a, b = (put(folder / name, one) for name, one in zip("ab", sides, strict=True))
    assert command.main(["compare", str(a), str(b)]) == 0
    return capsys.readouterr().out


def test_goodput_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = (record(LATENCY, request_goodput=g) for g in (2.0, 1.0))
    text = " ".join(words_of(tmp_path, capsys, before, after).split())
    assert "good req/s 2.00 1.00 -50.0% - one run" in text


def test_from_nothing_to_something_is_a_change_but_no_number() -> None:
    before, after = (twice(9.0, 9.0, request_goodput=g) for g in (0.0, 1.0))
    (change,) = (c for c in compare.compare(before, after) if c.column == results.GOODPUT)
    assert (change.verdict, change.row[4]) == ("better", "-")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"metadata": {"client": "trtllm"}}, "client: builtin before, trtllm after"),
        ({"metadata": {"client": "builtin", "backend": "openai-chat"}}, "API: None before, openai"),
        ({"metadata": {"client": "builtin", "served_model": "b"}}, "model: org/model before, b"),
        ({"completed": 10, "total_input_tokens": 1300}, "input tokens a request: 128 before, 130"),
        ({"completed": 10, "total_output_tokens": 90}, "output tokens a request: 0 before, 9"),
        ({"data_set": {"file": "b", "sha256": "b1"}}, "data set: None before, b1 after"),
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


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"metadata": {"client": "builtin", "backend": "openai-chat"}}, "API openai-chat)"),
        ({"metadata": {"client": "builtin", "world_size": 4}}, "GPUs 4)"),
        ({"data_set": {"file": "b.json", "sha256": "b1"}}, "data set b1)"),
    ],
)  # fmt: skip
def test_what_was_measured_in_another_way_is_no_repeat(facts: dict[str, Any], words: str) -> None:
    """Such as two folders whose files were put into one."""
    like: dict[str, Any] = {"metadata": {"client": "builtin"}}
    text = report.table([record(LATENCY, 10.0, **like), record(LATENCY, 90.0, **{**like, **facts})])
    assert "±" not in text
    assert f"(builtin, org/model, 100 requests, {words}" in text


def test_a_copy_of_a_result_is_no_repeat(tmp_path: Path) -> None:
    folder = put(tmp_path / "a", record(LATENCY), record(SECOND, 11.0))
    copy = folder / f"{LATENCY.name} (1).json"
    copy.write_bytes((folder / f"{LATENCY.name}.json").read_bytes())
    found = results.load(folder)
    assert len(found.records) == 2
    (said,) = found.left_out
    assert said.startswith(f"{copy.name} is left out: a copy of another file here")


@pytest.mark.parametrize("words", [["nowhere"], ["compare", "nowhere", "nowhere"]])
def test_a_folder_that_is_not_there(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(words) == 1
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "length"), [(20, 15), (2, 240)])
def test_the_page_of_many_folders_has_a_name_that_a_disk_takes(
    count: int, length: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = (f"{i}".rjust(length, "0") for i in range(count))
    folders = [put(tmp_path / name, *twice(10.0, 10.02)) for name in names]
    assert command.main(["compare", *map(str, folders)]) == 0
    (page,) = folders[-1].glob("compare-*.html")
    assert page.name.startswith("compare-00") and str(page) in capsys.readouterr().err


@pytest.mark.parametrize("words", [["compare", "one"], ["one", "two"], []])
def test_usage(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(words)
    assert stop.value.code == 2


BROKEN = {
    b"": "not JSON",
    b"{half": "not JSON",
    b"[]": "not a result of bench.py",
    b"7": "not a result of bench.py",
    b'{"mean_ttft_ms": 7}': "not a result of bench.py",  # another tool's
    b'{"case": {"name": "a"}}': "damaged",
    b"\xff\xfe\x00": "not JSON",
    b"[" * 100_000: "nested too deeply",
}


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: repr(text[:30]))
def test_a_file_that_is_no_result(
    tmp_path: Path, text: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (put(tmp_path / "a") / "x.json").write_bytes(text)
    assert command.main([str(tmp_path / "a")]) == 1
    err = capsys.readouterr().err
    assert "no results in it; x.json is left out: " in err
    assert BROKEN[text] in err


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: repr(text[:30]))
def test_a_broken_file_costs_no_other_run_its_report(
    tmp_path: Path, text: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = put(tmp_path / "a", record(LATENCY))
    (folder / "x.json").write_bytes(text)
    assert command.main([str(folder)]) == 0
    assert re.search(f"note: x.json is left out: .*{BROKEN[text]}", capsys.readouterr().out)
    assert "x.json is left out" in (folder / "report.html").read_text()
    assert command.main(["compare", str(folder), str(folder)]) == 0
    assert "x.json is left out" in capsys.readouterr().err


def test_a_byte_order_mark_costs_no_run_its_report(tmp_path: Path) -> None:
    """Editors on Windows write one."""
    folder = put(tmp_path / "a", record(LATENCY))
    path = folder / f"{LATENCY.name}.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    found = results.load(folder)
    assert len(found.records) == 1 and not found.left_out


@pytest.mark.usefixtures("pictures")
def test_a_picture_of_little_and_of_letters_that_its_font_lacks(tmp_path: Path) -> None:
    case = {**LATENCY.facts(), "label": "測定"}  # matplotlib would warn of them, line by line
    one = record(LATENCY, ttft_percentiles_ms={"0": 1.0, "100": 2.0}) | {"case": case}
    assert command.main([str(put(tmp_path / "a", one))]) == 0
    assert "ttft_spread" not in (tmp_path / "a/report.html").read_text()


def test_a_folder_that_takes_no_report_is_read_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody else's, say."""
    folder = put(tmp_path / "a", record(LATENCY))
    (folder / "summary.json/x").mkdir(parents=True)
    assert command.main([str(folder)]) == 1
    out, err = capsys.readouterr()
    assert "latency-in128-out128-c1" in out and "ERROR Is a directory" in err


def test_what_is_no_file_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = put(tmp_path / "a", record(LATENCY))
    (folder / "folder.json").mkdir()
    os.mkfifo(folder / "pipe.json")
    (folder / "link.json").symlink_to("nowhere")
    assert command.main([str(folder)]) == 0
    assert capsys.readouterr().out.count("is left out: ") == 3


def test_a_nan_of_another_program_is_no_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = put(tmp_path / "a", record(LATENCY, mean_itl_ms=float("nan")))
    assert "NaN" in (folder / "latency-in128-out128-c1.json").read_text()
    assert command.main([str(folder)]) == 0
    assert re.search(r"10\.00 +- +10\.00", capsys.readouterr().out)
    assert "NaN" not in (folder / "summary.json").read_text()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_of_any_kind(tmp_path: Path, encoding: str) -> None:
    """A job's log may be ASCII; what was measured for hours is shown all the same."""
    note = record(SECOND, notes=["a model named 模型 \udcff"])
    folder = put(tmp_path / "a", record(LATENCY, 9.0), note)
    env = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "report", str(folder)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
    sign = "+-" if encoding == "ascii" else "±"
    assert f"{sign}7.4%" in done.stdout.decode(encoding)
    model = "模型" if encoding == "utf-8" else r"\u6a21\u578b"
    assert f"{model} \\udcff" in done.stdout.decode(encoding)


def test_whoever_captures_what_we_print_reads_it_as_before(tmp_path: Path) -> None:
    """Where stdout loses nothing anyway it stays as it is: a test runner reads it, too."""
    before = sys.stdout.errors
    assert command.main([str(put(tmp_path / "a", record(LATENCY)))]) == 0
    assert (before, sys.stdout.errors) == ("replace", "replace")


def test_a_result_cannot_drive_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = bad(LATENCY) | {"problems": ["\x1b]0;owned\x07 \x9b31m \u202e"]}
    folder = put(tmp_path / "a", wrong)
    assert command.main([str(folder)]) == 0
    out, err = capsys.readouterr()
    files = "".join(path.read_text() for path in folder.glob("summary.*"))
    files += (folder / "report.html").read_text()
    for text in (out, err, files):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert r"\x1b]0;owned\x07 \x9b31m \u202e" in out
