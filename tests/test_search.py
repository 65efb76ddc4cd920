"""The search of tune.py: what is tried, what is measured next, what is the answer."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import tune
from common.talk import Failure, write_json
from launch.engines import engine
from launch.nodes import Place
from load import bench_place
from report.results import Group
from search import estimate, race
from search.answer import Outcome, answers, document, html, text
from search.candidates import (
    Candidate,
    LeftOut,
    Space,
    expand,
    model_config,
    name_of,
    refuse_by_model,
)
from search.nodes import Nodes
from search.race import LOADS, Point
from search.serving import Serving
from search.tuner import ASKED, Tuner
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "simulator"))
from cost import LINK, MODELS, NETWORK, Cost

CONTEXT = 640  # tokens


# --- what is tried --------------------------------------------------------------------------------


def tried(
    space: Space, tmp_path: Path, gpus: int = 8, model: Mapping[str, Any] | None = None
) -> Any:
    return expand(space, engine("trtllm"), [], model or {}, gpus, tmp_path)


def test_every_mix_of_the_lists_is_a_candidate(tmp_path: Path) -> None:
    space = Space((), {"tp": (1, 2), "pp": (1, 2)}, (), {"max_batch_size": ("8", "16")})
    found, left_out = tried(space, tmp_path)
    assert len(found) == 8 and not left_out
    one = next(c for c in found if c.name == "tp2-pp2-max_batch_size16")
    assert (one.gpus, one.shape) == (4, "TP 2 x PP 2")
    assert one.args[:4] == ("--tp_size", "2", "--pp_size", "2")
    config = one.args[one.args.index("--config") + 1]
    assert Path(config).read_text() == "max_batch_size: 16\n"


def test_a_config_is_a_candidate_beside_the_sizes_and_gets_the_settings(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("tensor_parallel_size: 4\nkv_cache_config:\n  enable_block_reuse: true\n")
    settings = {"kv_cache_config.free_gpu_memory_fraction": ("0.8",)}
    found, _ = tried(Space((str(config),), {"tp": (2,)}, (), settings), tmp_path)
    assert [(c.name.partition("-")[0], c.gpus) for c in found] == [("mine", 4), ("tp2", 2)]
    written = Path(found[0].args[-1]).read_text()
    assert "enable_block_reuse: true" in written and "free_gpu_memory_fraction: 0.8" in written
    assert "0.8" not in config.read_text()


@pytest.mark.parametrize(
    ("space", "model", "why"),
    [
        (Space((), {"tp": (8, 16)}), {}, "it needs 16 GPUs, and there are 8"),
        (Space((), {"tp": (2,)}, ("1", "5")), {}, "it needs 10 GPUs, and there are 8"),
        (Space((), {"tp": (4,)}, ("2", "auto")), {}, "the same as tp4-x2"),
        (Space((), {"tp": (1,), "pp": (1, 4)}), {"num_hidden_layers": 2}, "2 layers"),
        (Space((), {"tp": (2, 3)}), {"num_attention_heads": 32}, "32 attention heads do not"),
        (Space((), {"tp": (2, 4), "ep": (4,)}), {}, "has to divide the tensor parallel size"),
        (
            Space((), {"tp": (8, 3)}),
            {"text_config": {"num_attention_heads": 64}},
            "64 attention heads do not divide by TP 3",
        ),
    ],
)
def test_what_cannot_be_is_left_out_with_its_reason(
    space: Space, model: dict[str, Any], why: str, tmp_path: Path
) -> None:
    found, [left] = tried(space, tmp_path, model=model)
    assert len(found) == 1 and why in left.why


def test_attention_dp_does_not_split_the_heads(tmp_path: Path) -> None:
    sizes = {"tp": (3,)}
    space = Space((), sizes, (), {"enable_attention_dp": ("true", "false")})
    [found], [left] = tried(space, tmp_path, model={"num_attention_heads": 32})
    assert "attention DP" in found.shape and "32 attention heads" in left.why


@pytest.mark.parametrize(
    ("setting", "asked", "gpus"),
    [
        ("2", None, 2),
        ("count=2", None, 2),
        ('"device=0,1,5"', None, 3),
        ("2", 4, 4),
        ("none", None, 0),
        ("all", None, 7),
        ("auto", None, 7),
    ],
)
def test_gpus_that_the_setting_names_are_those_there_are(
    setting: str, asked: int | None, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUS", setting)
    monkeypatch.setattr(tune, "count_gpus", lambda: 7)
    assert tune.gpus_there(asked, Place("x", 1, ())) == gpus


def test_auto_is_as_many_as_there_is_room_for(tmp_path: Path) -> None:
    found, _ = tried(Space((), {"tp": (1, 2, 8)}, ("auto",)), tmp_path)
    assert [(c.replicas, c.gpus) for c in found] == [(8, 8), (4, 8), (1, 8)]
    assert found[0].words(["m"])[:3] == ["m", "--replicas", "8"]
    assert "give --gpus" in tried(Space((), {}, ("auto",)), tmp_path, gpus=0)[1][0].why


def test_two_candidates_never_have_one_name_between_them(tmp_path: Path) -> None:
    for folder, size in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tp.yaml").write_text(f"tensor_parallel_size: {size}\n")
    configs = tuple(str(tmp_path / folder / "tp.yaml") for folder in "ab")
    found, _ = tried(Space(configs, {}, (), {"max_batch_size": ("8",)}), tmp_path)
    assert [c.name for c in found] == ["tp-max_batch_size8", "tp-max_batch_size8-2"]
    assert [Path(c.args[-1]).read_text()[-2:] for c in found] == ["1\n", "2\n"]
    long = Space((), {}, (), {"x" * 120: ("1", "2")})
    assert len({c.name for c in tried(long, tmp_path)[0]}) == 2


def test_the_size_of_the_setting_does_not_come_back_in_a_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TP", "8")  # the launcher adds it where the arguments do not say it
    (tmp_path / "tp.yaml").write_text("max_batch_size: 8\n")
    [one], _ = tried(Space((str(tmp_path / "tp.yaml"),)), tmp_path)
    assert one.gpus == 1 and one.args[-2:] == ("--tp_size", "1")
    [two], _ = tried(Space((), {"tp": (2,)}), tmp_path)
    assert two.args == ("--tp_size", "2")


def test_the_launchers_options_come_before_what_is_the_engines() -> None:
    one = Candidate("x", ("--tp_size", "2"), "TP 2", 2)
    words = one.words(["m", "-v", "--", "--a", "1"], "--workspace", "w")
    assert words[:6] == ["m", "-v", "--workspace", "w", "--replicas", "1"]
    assert words[6:] == ["--", "--a", "1", "--tp_size", "2"]


def test_the_command_says_what_the_environment_did(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tune.FLAGS:
        monkeypatch.delenv(name, raising=False)
    own = ["org/m", "--engine", "vllm", "--tokenizer", "org/m", "--", "--x", "1"]
    assert tune.command_of(own, []) == own
    monkeypatch.setenv("ENGINE", "sglang")
    monkeypatch.setenv("CONTAINER_MOUNT", "/data")
    assert tune.command_of(own, []) == [*own[:5], "--container-mount", "/data", *own[5:]]
    assert tune.command_of([], ["m"])[:3] == ["m", "--engine", "sglang"]


def space(monkeypatch: pytest.MonkeyPatch, *words: str, **settings: str) -> Space:
    for name in ("TP", "REPLICAS"):
        monkeypatch.setenv(name, settings.get(name, ""))
    return tune.space_of(tune.parse(["m", *words])[0])


def test_what_is_spanned_is_read_from_words_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert space(monkeypatch, "--set", "k=1", "--set", "k=8").settings == {"k": ("1", "8")}
    assert space(monkeypatch).replicas == () == space(monkeypatch, "--replicas", "1").replicas
    assert space(monkeypatch, REPLICAS="2").replicas == ("2",)
    assert space(monkeypatch, "--replicas", "1,auto", REPLICAS="2").replicas == ("1", "auto")
    with pytest.raises(Failure, match="--replicas 0: neither"):
        space(monkeypatch, "--replicas", "0")
    for wrong in ("abc", "0", "1,,2"):
        with pytest.raises(Failure, match=f"TP is '{wrong}'"):
            space(monkeypatch, TP=wrong)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tp", "abc"), "--tp: 'abc' is not a whole number"),
        (("--tp", "1,"), "--tp: '' is not a whole number"),
        (("--repeat", "1.5"), "--repeat: '1.5' is not a whole number"),
        (("--minutes", "x"), "--minutes: 'x' is not a number"),
        (("--goodput", "ttft:x"), "--goodput: 'x' is not a number"),
    ],
)
def test_what_is_no_number_is_said(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tune.parse(["m", *words])
    assert said in capsys.readouterr().err


def test_a_value_may_be_a_list() -> None:
    assert tune.split("1,8") == ["1", "8"]
    assert tune.split("[1,2],[[3],{a: 4,b: 5}]") == ["[1,2]", "[[3],{a: 4,b: 5}]"]
    assert tune.split("'a,b',\"it's,\"") == ["'a,b'", '"it\'s,"']


def test_a_value_that_is_not_yaml_is_left_out(tmp_path: Path) -> None:
    space = Space((), {}, (), {"a.b": ("[1,2]", "[1")})
    [found], [left] = tried(space, tmp_path)
    assert Path(found.args[-1]).read_text() == "a:\n  b:\n  - 1\n  - 2\n"
    assert left.why.startswith("a.b=[1 is not YAML: while parsing")


def test_names_are_folders() -> None:
    assert name_of("a/b c.yaml", {"tp": 2}, "auto", {"x.y": "[1]"}) == "b_c-tp2-xauto-x.y_1_"
    assert name_of("", {}, "", {}) == "default"


def test_the_models_numbers_are_read_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    there = tmp_path / "hub/models--org--m/snapshots/1"
    there.mkdir(parents=True)
    (there / "config.json").write_text('{"num_attention_heads": 7}')
    assert model_config("org/m") == {"num_attention_heads": 7}
    assert model_config(str(there)) == {"num_attention_heads": 7}
    assert model_config("org/other") == {}
    with pytest.raises(Failure):
        refuse_by_model(model_config("org/m"), 2, 1)


# --- what is measured next ------------------------------------------------------------------------


def cost(name: str, tp: int, pp: int = 1, attention_dp: bool = False) -> Cost:
    return Cost(MODELS[name], tp, pp, attention_dp, NETWORK if tp > 8 else LINK)


def shown(model: Cost, streams: int, batch: int) -> Point:
    """What a load would show of a server with such costs that runs `batch` at once."""
    running = min(streams, batch)
    step = model.step(running, CONTEXT)
    waits = model.prefill(512) * running + (streams / running - 1) * 256 * step
    user = 256 / (256 * step + waits)
    gpus = model.tp * model.pp
    p99 = {"ttft": 1e3 * waits, "tpot": 1e3 * step, "e2el": 1e3 * (waits + 256 * step)}
    return Point(user, user * streams / gpus, p99)


SERVERS = {
    f"{kind}-{batch}": (each, batch)
    for batch in (16, 64, 256)
    for kind, each in {
        "tp8": cost("671b", 8),
        "dp8": cost("671b", 8, 1, True),
        "tp4pp2": cost("671b", 4, 2),
        "tp16": cost("671b", 16),
    }.items()
}
TRUTH = {
    name: {load: shown(each, load, batch) for load in LOADS}
    for name, (each, batch) in SERVERS.items()
}


def searched(truth: race.Measured, limits: Mapping[str, float]) -> dict[str, dict[int, Point]]:
    """What the search measures where the truth is known."""
    measured: dict[str, dict[int, Point]] = {name: {} for name in truth}
    for name, found in truth.items():
        for load in race.coarse(LOADS):
            measured[name][load] = found[load]
            if race.is_over(measured[name]):
                break
    while ahead := race.order(measured, LOADS, limits):
        for load in race.next_loads(measured, ahead[0], LOADS, limits):
            measured[ahead[0]][load] = truth[ahead[0]][load]
    return measured


@pytest.mark.parametrize(
    "limits", [{"ttft": 500.0, "tpot": 38.0}, {"tpot": 36.5}, {"ttft": 2000.0}, {"e2el": 10_000.0}]
)
def test_the_best_one_is_found_in_less_than_half_of_the_runs(limits: dict[str, float]) -> None:
    measured = searched(TRUTH, limits)
    for these in race.objectives(limits):
        known = race.best(TRUTH, these)
        found = race.best(measured, these)
        assert known and found
        best = TRUTH[known[0]][known[1]].gpu
        assert TRUTH[found[0]][found[1]].gpu * race.WORTH >= best
    runs = sum(map(len, measured.values()))
    assert runs < sum(map(len, TRUTH.values())) / 2


def test_without_limits_no_point_is_far_from_the_front() -> None:
    measured = searched(TRUTH, {})
    found = [measured[name][load] for name, load in race.front(measured)]
    for name, load in race.front(TRUTH):
        point = TRUTH[name][load]
        near = race.WORTH**2  # a point that is skipped, beside one that was skipped for it
        assert any(p.user * near >= point.user and p.gpu * near >= point.gpu for p in found)
    assert sum(map(len, measured.values())) < sum(map(len, TRUTH.values())) * 0.6


def point(user: float, gpu: float, ttft: float = 1.0, valid: bool = True) -> Point:
    return Point(user, gpu, {"ttft": ttft, "tpot": 1.0, "e2el": 1.0}, valid)


def test_more_load_is_of_no_use_after_a_failure_or_a_knee() -> None:
    assert not race.is_over({}) and not race.is_over({1: point(1, 1)})
    assert race.is_over({1: point(9, 1), 16: point(1, 9, valid=False)})
    assert race.is_over({1: point(9, 10), 16: point(1, 10.4)})
    assert not race.is_over({1: point(9, 10), 16: point(1, 20)})


def test_what_is_invalid_is_neither_best_nor_on_the_front() -> None:
    measured = {"a": {1: point(5, 1), 2: point(9, 9, valid=False)}, "b": {1: point(4, 3)}}
    assert race.best(measured, {}) == ("b", 1)
    assert race.front(measured) == [("a", 1), ("b", 1)]
    assert race.best(measured, {"ttft": 0.5}) is None


def test_the_loads_at_first_are_far_apart_with_both_ends() -> None:
    assert race.coarse(LOADS) == [1, 16, 256]
    assert race.coarse([1, 2, 4, 8, 16, 32]) == [1, 16, 32]
    assert race.coarse([3]) == [3]


def test_no_server_is_started_that_nothing_could_be_measured_of(tmp_path: Path) -> None:
    made = outcome({"a": {}})
    made.starts = [60.0, 80.0]
    tuner = Tuner(made, tmp_path, [1], 1, time.monotonic() + 65, Nodes([""], 1))
    assert not tuner.is_late()
    tuner.round({made.candidates[0]: [1]})
    assert "--minutes" in made.unfinished and not list(tmp_path.iterdir())


def kept(folder: Path, *streams: int, repeats: int = 2) -> None:
    """Results of bench.py in a candidate's folder."""
    for load in streams:
        for repeat, record in enumerate(group(*[100.0] * repeats).records):
            case = record["case"] | {"concurrency": load, "label": f"c{load}", "name": "c"}
            whole = record | {"case": case, "date": f"20260101-00000{repeat}", "model_id": "m"}
            write_json(folder / f"c{load}-{repeat}.json", whole)


def resumed(folder: Path, **changed: Any) -> Tuner:
    made = outcome({"a": {}})
    made.groups.clear()
    made.candidates = [Candidate("a", (), "TP", 1, settings=changed.pop("settings", "{}"))]
    made.bench = ["--input-len", "8", "--repeat", "2"]
    for name, value in changed.items():
        setattr(made, name, value)
    return Tuner(made, folder, [1, 4], 1, math.inf, Nodes([""], 1))


def test_to_go_on_takes_what_was_measured_of_the_same(tmp_path: Path) -> None:
    kept(tmp_path / "a", 1)
    kept(tmp_path / "a", 4, repeats=1)
    first = resumed(tmp_path)
    (tmp_path / "a" / ASKED).write_bytes(first.asked(first.outcome.candidates[0]))
    first.read_earlier()
    assert list(first.found("a")) == [1]  # bench.py adds what is missing of the other
    first.read("a", [4])
    assert list(first.found("a")) == [1, 4]
    less = resumed(tmp_path, bench=["--input-len", "8", "--repeat", "1"])
    less.read_earlier()
    assert list(less.found("a")) == [1, 4]
    patient = resumed(tmp_path, command=[*first.outcome.command, "--ready-timeout", "7200"])
    patient.read_earlier()
    assert list(patient.found("a")) == [1]


@pytest.mark.parametrize("words", [["--api-key", "sk-1"], ["--api_key=sk-1"]])
def test_a_key_is_neither_printed_nor_kept(words: list[str], tmp_path: Path) -> None:
    made = resumed(tmp_path, command=["org/m", *words, "--seed", "1"])
    assert made.outcome.command_of("a").count("***") == 1
    kept = made.outcome.command_of("a").encode() + made.asked(made.outcome.candidates[0])
    assert b"sk-1" not in kept


@pytest.mark.parametrize(
    "changed",
    [
        {"bench": ["--input-len", "64", "--repeat", "2"]},
        {"command": ["org/other"]},
        {"command": ["org/\udcff"]},
        {"command": ["org/it's", "--max_seq_len", "4096"]},
        {"settings": '{"max_batch_size": "8"}'},
    ],
)
def test_to_go_on_takes_nothing_that_was_measured_of_something_else(
    changed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept(tmp_path / "a", 1)
    before = resumed(tmp_path)
    (tmp_path / "a" / ASKED).write_bytes(before.asked(before.outcome.candidates[0]))
    now = resumed(tmp_path, **changed)
    now.read_earlier()
    assert not now.found("a") and list((tmp_path / "a.before1").glob("c1-*"))
    assert "a: its folder holds results of other arguments" in capsys.readouterr().err


# --- how long it takes ----------------------------------------------------------------------------


def test_the_time_is_estimated_from_an_earlier_search_of_the_same(tmp_path: Path) -> None:
    made = outcome({"a": {1: group(100)}})
    made.bench, made.starts, made.runs = ["--repeat", "2"], [60.0, 80.0], [10.0, 20.0]
    (tmp_path / "night").mkdir()
    write_json(tmp_path / "night/tune.json", document(made))
    pace = estimate.earlier(tmp_path, made.model, made.bench)
    assert pace and (pace.start, pace.run) == (70, 15) and "night" in pace.known_from
    assert estimate.earlier(tmp_path, made.model, ["--repeat", "1"]) is None
    assert estimate.earlier(tmp_path, "org/other", made.bench) is None
    for unusable in ("", "[]", '{"model": 1}', json.dumps(document(outcome({})))):
        (tmp_path / "night/tune.json").write_text(unusable)
        assert estimate.earlier(tmp_path, made.model, made.bench) is None


def test_what_is_served_at_the_same_time_takes_no_longer() -> None:
    four = [Candidate(str(n), (), "TP 8", 8) for n in range(4)]
    pace = estimate.Pace(60, 10, "known")

    def told(candidates: list[Candidate], nodes: int) -> str:
        names = [f"n{i}" for i in range(nodes)]
        return estimate.estimate(candidates, LOADS, 2, Nodes(names, 8), pace)

    assert told(four, 1) == (
        "4 servers to start, 24 to 72 runs: 8 to 20 minutes at 60 s a start and 10 s a run (known)"
    )
    assert "4 to 10 minutes" in told(four, 2)
    assert "2 to 5 minutes" in told(four, 8)  # no sooner than one of them


def test_without_one_the_guess_says_what_it_assumes() -> None:
    pace = estimate.guess([1, 4], None, 100)
    assert pace.run == pytest.approx(5 * 100 * estimate.TOKEN) and "guess" in pace.known_from
    assert estimate.guess([4], 8, 100).run == pytest.approx(2 * 100 * estimate.TOKEN)


# --- the answer -----------------------------------------------------------------------------------


def group(gpu: float, *more: float, ttft: float = 100.0, valid: bool = True) -> Group:
    """A load's repeats, of a server with one GPU."""
    case = {"label": "c", "concurrency": 1, "num_prompts": 1, "type": "concurrency", "rate": "inf",
            "input_len": 1, "output_len": 1}  # fmt: skip
    records = tuple(
        {"case": case, "valid": valid, "problems": [] if valid else ["it broke"],
         "user_throughput": 1000 / each, "output_throughput": each, "p99_ttft_ms": ttft,
         "p99_tpot_ms": 10.0, "p99_e2el_ms": 500.0, "metadata": {"world_size": 1}}
        for each in (gpu, *more)
    )  # fmt: skip
    return Group("c", records)


def outcome(groups: dict[str, dict[int, Group]], **limits: float) -> Outcome:
    names = [*groups, "dead"]
    candidates = [
        Candidate(name, ("--tp_size", str(n)), "TP", n) for n, name in enumerate(names, 1)
    ]
    found = Outcome("org/it's", ["org/it's"], limits, candidates, [LeftOut("tp3", "too odd")])
    found.groups = {**groups, "dead": {}}
    found.failed = {"dead": "n1: out of memory"}
    return found


def test_the_best_is_told_with_its_command_and_what_is_left_of_the_limits() -> None:
    made = outcome({"a": {1: group(100)}, "b": {1: group(50), 4: group(300, ttft=400)}},
                   ttft=200.0, e2el=1000.0)  # fmt: skip
    said = text(made)
    assert "within TTFT <= 200 ms: a, 100 tokens/s per GPU at 1 stream, 50% of TTFT left" in said
    assert "within E2EL <= 1000 ms: b, 300 tokens/s per GPU at 4 streams" in said
    assert "within TTFT <= 200 ms, E2EL <= 1000 ms: a" in said
    serve = """.venv/bin/python run_sbatch.py 'org/it'"'"'s' --replicas 1 --tp_size 1"""
    assert f"  serve it: {serve}" in said
    assert "dead: n1: out of memory" in said and "left out: tp3: too odd" in said
    assert document(made)["best"][0]["margin"] == {"ttft": 0.5}
    json.dumps(document(made))
    assert "out of memory" in html(made)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({1: group(100)}, "no candidate stays within that"),
        ({1: group(100, valid=False)}, "every load was invalid"),
        ({}, "nothing was measured"),
    ],
)
def test_why_there_is_no_best_one_is_said(found: dict[int, Group], words: str) -> None:
    [best] = answers(made := outcome({"a": found}, ttft=1.0))
    assert best.name == "" and f"within TTFT <= 1 ms: {words}" in text(made)


def test_what_was_not_measured_keeps_no_limit() -> None:
    """TPOT of answers of one token."""
    records = ({**group(100).records[0], "p99_tpot_ms": None},)
    [best] = answers(made := outcome({"a": {1: Group("c", records)}}, tpot=30.0))
    assert best.name == "" and "100.0         -" in text(made)
    assert document(made)["candidates"][0]["loads"][0]["p99_tpot_ms"] is None
    html(made)


def test_one_run_says_nothing_of_the_spread() -> None:
    assert "measured once" in text(outcome({"a": {1: group(100)}}))
    assert "measured once" not in text(outcome({"a": {1: group(100, 101)}}))


def test_what_ended_a_launcher_is_told_with_what_to_do_next(tmp_path: Path) -> None:
    said = "[10:00:00] ERROR no room\n           next: lower --tp\n[10:00:01] bye\n"
    (tmp_path / "launcher.txt").write_text(said)
    launcher = subprocess.Popen(["false"])
    assert Serving(launcher, tmp_path).cause() == "no room; next: lower --tp"
    launcher.wait()
    (tmp_path / "launcher.txt").write_text("[10:00:00] bye\n")
    assert Serving(launcher, tmp_path).cause() == "exit code 1: [10:00:00] bye"


def test_two_searches_of_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    names = [bench_place.new_folder(tmp_path / "results/tune-1").name for _ in range(3)]
    assert names == ["tune-1", "tune-1-2", "tune-1-3"]


def test_what_cannot_be_measured_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    def check(*words: str, port: int = 8000) -> None:
        tune.check_load(tune.parse(["m", *words])[0], port)

    with pytest.raises(Failure, match="one token have no TPOT"):
        check("--output-len", "1", "--goodput", "ttft:5", "--goodput", "tpot:30")
    with pytest.raises(Failure, match="a limit is named twice"):
        check("--goodput", "ttft:5", "ttft:6")
    with pytest.raises(Failure, match="the port is 65530"):
        check(port=65530)
    check("--loads", "1,16", "--num-prompts", "16", port=65536 - 320)
    assert not capsys.readouterr().err
    check("--loads", "1,16", "--num-prompts", "8")
    assert "no more than 8 of 16 streams are in flight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "ties"), [((99.0, 103.0), ("b",)), ((60.0, 61.0), ()), ((99.0,), ("b",))]
)
def test_candidates_within_the_spread_of_the_repeats_are_a_tie(
    other: tuple[float, ...], ties: tuple[str, ...]
) -> None:
    [best] = answers(made := outcome({"a": {1: group(98, 106)}, "b": {1: group(*other)}}))
    assert (best.name, best.ties) == ("a", ties)
    assert ("a tie with b" in text(made)) == bool(ties)


# --- the costs that the simulator plays -----------------------------------------------------------


def test_costs_are_as_in_life() -> None:
    dense, latent = cost("70b", 8), cost("671b", 8)
    assert cost("70b", 4).step(1, CONTEXT) > dense.step(1, CONTEXT)  # TP: faster for one
    assert 4 / cost("70b", 4).step(64, CONTEXT) > 4 / cost("70b", 4).step(128, CONTEXT)
    apart = cost("70b", 16)
    assert apart.step(1, CONTEXT) > dense.step(1, CONTEXT)  # the network
    spread = cost("671b", 8, 1, True)
    assert spread.room > latent.room  # attention DP: keys and values once
    assert spread.step(256, 8000) < latent.step(256, 8000)
    assert cost("70b", 8, 1, True).step(1, CONTEXT) > dense.step(1, CONTEXT)  # attention is whole
    assert cost("70b", 1).room < 1024 < cost("70b", 2).room  # it does not fit one GPU
    assert math.isclose(dense.prefill(1024) / dense.prefill(512), 2, rel_tol=0.5)


@pytest.mark.parametrize(
    ("name", "sizes", "args"),
    [
        (
            "vllm",
            {"tp": 2, "pp": 2},
            "--tensor-parallel-size 2 --pipeline-parallel-size 2 --max-num-seqs 64 --no-x",
        ),
        ("sglang", {"tp": 4, "ep": 2}, "--tp-size 4 --ep-size 2 --max-num-seqs 64"),
    ],
)
def test_other_engines_take_a_candidate_in_flags(
    name: str, sizes: dict[str, int], args: str, tmp_path: Path
) -> None:
    served, settings = engine(name), {"max_num_seqs": "64", "x": "false"}
    assert served.tuned("", sizes, settings, tmp_path / "x") == args.split()
    assert served.check(args.split())[1].size == 4
    assert not list(tmp_path.iterdir())
    with pytest.raises(Failure, match="no flag for a size cp"):
        served.tuned("", {"cp": 2}, {}, tmp_path / "x")
