"""How an order reaches a node, and what comes back: its parts, its text, its messages."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from pkgutil import iter_modules
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.talk import Failure
from launch import node, nodes
from launch.node import base
from launch.node.bare import Run
from launch.node.clients import WatchClients
from launch.node.containers import AskOwner, Reap, Remove, Serve
from launch.node.enroot import SurveyEnroot
from launch.node.facts import Survey
from launch.node.front import Front
from launch.node.images import Forget, Load, Pull
from launch.node.messages import Facts, Piece
from launch.node.port import AwaitPort
from launch.node.pyxis import Attend, EndSteps, Inside, PartInside, RankInside
from launch.node.squash import Discard, Import
from launch.node.world import Hold, Part, Rank
from launch.nodes import Place
from launch.order import (
    BOOT,
    MESSAGES,
    TOO_OLD,
    Command,
    folded,
    parse,
    parts_of,
    read,
    source,
)
from launch.runtimes import bare, docker
from launch.spread import Spread
from tests.conftest import HOSTILE, ONE_NODE, PATIENCE, TAG, Fakes, Script, plan, wait_until
from tests.test_hostile_input import JSON, TOO_DEEP

pytestmark = pytest.mark.usefixtures("clean_environment")

PARTS = [module.name for module in iter_modules(node.__path__)]
CONTAINER = (
    "trtllm-1",
    "host/boot/1:5:6",
    "all",
    {"n1": "0,1"},
    ["/cache"],
    ["--rm"],
    TAG,
    ["trtllm-serve", "m"],
)
RANK = ("trtllm-1", "/fsx", ["leader", "trtllm-serve", "m"], "leader", "trtllm-serve")
ORDERS = [
    Survey("docker", [8000], TAG, "trtllm-serve", ["/fsx"]),
    Load("/x.tar", TAG, ["sha256:c"], "", "gz"),
    Pull("r.io/x:1", "r.io"),
    Forget(TAG),
    Serve(*CONTAINER),
    Hold(*CONTAINER),
    Rank(*RANK),
    Part("vllm-1", "/fsx", ["vllm", "serve", "m"], parts=[["--node-rank", "0"]]),
    PartInside("vllm-1", "", ["vllm", "serve", "m"], parts=[[]], proof="/proof"),
    Remove("host/boot/1:5:6"),
    Reap(["abc"]),
    AskOwner("0.0.0.0", 8000, "trtllm-1"),
    WatchClients(8000, 10),
    AwaitPort(8000),
    Run(["trtllm-serve", "m"]),
    Inside(["trtllm-serve", "m"], [], 0, "/proof", {"HF_HOME": "/cache"}),
    RankInside(*RANK, proof="/proof", environ={"HF_HOME": "/cache"}),
    Attend("trtllm-1-0", ["/cache"]),
    EndSteps(["trtllm-1-0"]),
    SurveyEnroot("pyxis", [8000], "/x.sqsh", "trtllm-serve", ["/fsx"]),
    Import("docker://r.io#x:1", "/x.sqsh"),
    Discard("/x.sqsh"),
    Front(["haproxy"], ["global"], 8000),
]
each_order = pytest.mark.parametrize("order", ORDERS, ids=lambda order: type(order).__name__)


def test_these_are_all_orders_that_there_are() -> None:
    modules = [importlib.import_module(f"launch.node.{part}") for part in PARTS]
    every = {kind for module in modules for kind in vars(module).values() if isinstance(kind, type)}
    kinds = {kind for kind in every if is_dataclass(kind)}
    orders = {kind for kind in kinds if any("__call__" in vars(c) for c in inspect.getmro(kind))}
    assert orders == {type(order) for order in ORDERS}


# The program that is sent


def imported(part: str) -> Iterator[tuple[str, str]]:
    """Module and name of everything that a part imports, wherever in it."""
    for statement in ast.walk(ast.parse(source(part))):
        if isinstance(statement, ast.Import):
            yield from ((alias.name, "") for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            assert statement.module and not statement.level
            yield from ((statement.module, alias.name) for alias in statement.names)


@pytest.mark.parametrize("part", PARTS)
def test_the_program_is_the_same_in_every_encoding(part: str) -> None:
    """It goes down a pipe of text, in whatever encoding the launcher's locale has."""
    assert source(part).isascii()


@each_order
def test_every_part_is_sent_once_and_after_those_that_it_needs(order: object) -> None:
    parts = parts_of(order)
    assert (parts[0], len(set(parts))) == ("base", len(parts))
    assert type(order).__module__ == f"launch.node.{parts[-1]}"
    for i, part in enumerate(parts):
        ours = {module for module, _ in imported(part) if module.startswith("launch")}
        assert ours <= {f"launch.node.{other}" for other in parts[:i]}


def bindings(part: str) -> Iterator[tuple[str, str]]:
    """Every name of a part's own level, and what it stands for."""
    for statement in ast.parse(source(part)).body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            yield statement.name, f"{part}.{statement.name}"
        elif isinstance(statement, ast.Assign):
            for name in (n for n in ast.walk(statement) if isinstance(n, ast.Name)):
                if isinstance(name.ctx, ast.Store):
                    yield name.id, f"{part}.{name.id}"
        elif isinstance(statement, ast.Import):
            yield from ((alias.asname or alias.name, alias.name) for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            module = str(statement.module).removeprefix("launch.node.")
            for alias in statement.names:
                yield alias.asname or alias.name, f"{module}.{alias.name}"


@each_order
def test_no_part_takes_another_ones_name(order: object) -> None:
    """Together they are one module on the node: a second function of a name would win."""
    found: dict[str, set[str]] = {}
    for part in parts_of(order):
        for name, meaning in bindings(part):
            found.setdefault(name, set()).add(meaning)
    assert {name: meanings for name, meanings in found.items() if len(meanings) > 1} == {}


@each_order
def test_an_order_arrives_as_it_was(order: Any) -> None:
    """Not what it keeps for itself: that is made on the node."""
    [(name, sent)] = Command([], order).fields.items()
    again = type(order)(**json.loads(json.dumps(sent)))
    assert name == type(order).__name__
    assert {**vars(again), "ends": None} == {**vars(order), "ends": None}


# A shell's view of it


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=200)


@given(words=st.lists(st.sampled_from([*HOSTILE, ""]) | WORDS, max_size=20))
@example(words=["x" * 300, "", "x" * 99, "y"])
def test_a_folded_command_is_the_same_command(words: list[str]) -> None:
    lines = folded(words).split(" \\\n")
    script = "tell() { printf '%s\\0' \"$@\"; }; tell end " + folded(words)
    said = subprocess.run(["bash", "-c", script], stdout=subprocess.PIPE, check=True).stdout
    assert said.decode().split("\0")[1:-1] == words
    longest = max((len(shlex.quote(word)) for word in words), default=0)
    assert all(len(line) <= max(102, longest + 2) for line in lines)


def commands() -> Iterator[Command]:
    """Every command of a launch, in a small and in a large allocation."""
    made = replace(plan(), place=Place("77", 16, ("srun", "--overlap", "--export=ALL")))
    environ = {f"NCCL_VARIABLE_{i}": "x" for i in range(30)}
    for place in (made.place, Place("local1", 1, ())):
        here = replace(made, place=place)
        one = here.replicas[0]
        spread = replace(one, spread=Spread(16, 8, "pmix"))
        yield docker.serve(here, one, environ)
        yield docker.hold(here, spread, environ)
        yield docker.ranks(here, spread, Path("/fsx/logs/trtllm_server_77_rank%t.log"))
        yield docker.ask_owner(here, one)
        yield bare.serve(here, one, environ)
        yield from (Command(place.every, order) for order in ORDERS)


@pytest.mark.parametrize("command", list(commands()), ids=lambda command: command.name)
def test_a_shown_command_has_no_line_that_nobody_reads(command: Command) -> None:
    assert max(map(len, command.shown("sleep infinity; ").splitlines())) <= 300


@pytest.mark.parametrize(
    "words",
    [["--api-key", "sk-1"], ["--api_key=sk-1"], ["--api-key", 'sk-1"\\', "sk-1 b"],
     ["--hf-token", "sk-1"], ["--ssl-keyfile-password=sk-1"]],
)  # fmt: skip
def test_a_secret_is_sent_and_not_shown(words: list[str]) -> None:
    command = Command([], Run(["vllm", "serve", "m", *words, "--seed", "1"]))
    shown, text = command.shown(), command.text
    assert "sk-1" not in shown and '***",\n   "--seed",\n   "1"' in shown
    assert text.count("sk-1") == len(words) - ("=" not in words[0])


def pasted(shown: str) -> SimpleNamespace:
    return SimpleNamespace(argv=["bash", "-c", shown], text="")


def paste(fakes: Fakes, shown: str) -> subprocess.CompletedProcess[str]:
    env = fakes.environment()
    return subprocess.run(pasted(shown).argv, env=env, input="", capture_output=True, text=True)


@pytest.mark.parametrize("prefix", [(), ONE_NODE], ids=["here", "srun"])
def test_a_shown_order_can_be_pasted(fakes: Fakes, tmp_path: Path, prefix: tuple[str, ...]) -> None:
    fakes.hold_image(identity="sha256:c")
    paths = [str(tmp_path / f"no {name}") for name in HOSTILE]
    command = Command(prefix, Survey("docker", [8000], TAG, "trtllm-serve", paths))
    done = paste(fakes, command.shown())
    assert (done.returncode, done.stderr) == (0, "")
    [told] = read(done.stdout.splitlines())
    assert (told.node, told.message.image, told.message.unseen) == ("local", "sha256:c", paths)


def end_sleep(fakes: Fakes) -> None:
    """What holds a pasted order's input open ends."""

    def sleeps() -> list[int]:
        return [pid for pid, words in fakes.processes().items() if words == "sleep 601 "]

    wait_until(sleeps)
    os.kill(sleeps()[0], signal.SIGTERM)


def test_a_shown_server_that_is_pasted_ends_with_its_sleep(
    ready: Fakes, script: Callable[..., Script]
) -> None:
    made = plan("bash", "-c", "echo 'it is up'; sleep 600")
    shown = docker.serve(made, made.replicas[0], {}).shown("sleep 601; ")
    served = script(pasted(shown))
    served.until_said("it is up")
    assert len(ready.containers()) == 1
    end_sleep(ready)
    assert served.code() == 143
    ready.nothing_is_left()


def test_a_shown_pull_that_is_pasted_logs_in(fakes: Fakes, script: Callable[..., Script]) -> None:
    host = "123456789012.dkr.ecr.us-west-2.amazonaws.com"
    login = "aws ecr get-login-password --region us-west-2; sleep 601; "
    pulled = script(pasted(Command([], Pull(f"{host}/x:1", host)).shown(login)))
    pulled.until_said("Present")
    assert (fakes.home / "login").read_text().startswith(f"{host} pass word$(id)' ")
    end_sleep(fakes)
    assert pulled.code() == 0
    assert "pass word" not in pulled.output


# The node's side


def give(command: Command, env: dict[str, str], **options: Any) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command.argv, stdin=pipe, stderr=pipe, env=env, text=True, stdout=pipe, **options
    )


SURVEY = Command([], Survey("bare", [1], "", "trtllm-serve"))


@pytest.mark.parametrize("kept", ["", "\n"])
def test_an_order_that_breaks_off_is_not_obeyed(fakes: Fakes, kept: str) -> None:
    """The launcher was killed while it wrote."""
    given_up = give(SURVEY, fakes.environment())
    out, err = given_up.communicate(SURVEY.text.rstrip("\n") + kept, timeout=PATIENCE)
    assert (given_up.returncode, out, err) == (143, "", "")


def test_a_launcher_that_hears_nothing_any_more_stops_no_order(fakes: Fakes) -> None:
    unheard = give(SURVEY, fakes.environment())
    assert unheard.stdout
    unheard.stdout.close()
    assert unheard.communicate(SURVEY.text)[1] == ""
    assert unheard.returncode == 0


def test_what_an_order_cannot_do_on_its_node_is_a_sentence(ready: Fakes) -> None:
    made = plan(cache="/dev/null/cache")
    serve = docker.serve(made, made.replicas[0], {})
    failed = give(serve, ready.environment())
    out, err = failed.communicate(serve.text)
    assert (failed.returncode, out) == (1, "")
    assert re.fullmatch(r"ERROR: local: .*Not a directory.*/dev/null/cache.*\n", err)


# What comes back

SRUN_KEEPS = 1024  # bytes: MAX_MSG_LEN of Slurm's src/common/io_hdr.h

ANY = {str: st.text(), int: st.integers(), bool: st.booleans(), list[str]: st.lists(st.text())}
ANY |= {dict[str, str]: st.dictionaries(st.text(), st.text())}


def messages() -> st.SearchStrategy[Any]:
    made = []
    for kind in (each for each in MESSAGES.values() if each is not Piece):
        hints = get_type_hints(kind)
        made.append(st.builds(kind, **{f.name: ANY[hints[f.name]] for f in fields(kind)}))
    return st.one_of(made)


@given(message=messages())
@example(message=Facts(unseen=[*HOSTILE, "\udcff"]))
@example(message=Facts(layers='"' * 5000))
def test_what_a_node_tells_arrives_whole(capfd: pytest.CaptureFixture[str], message: Any) -> None:
    base.tell(message)
    lines = capfd.readouterr().out.splitlines()
    [told] = read(lines)
    assert (told.node, told.message) == (base.NODE, message)
    assert len(lines) == 1 or all(len(line) < SRUN_KEEPS for line in lines)


def test_long_messages_of_nodes_that_tell_at_once_arrive_whole(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image of many layers, on all nodes: srun passes their lines on in turn."""
    said: dict[str, list[str]] = {}
    for name in ("n1", "n2"):
        monkeypatch.setattr(base, "NODE", name)
        base.tell(Facts(layers=f"{name} " * 2000))
        said[name] = as_srun_takes_it(capfd.readouterr().out)
    in_turn = "".join(map("".join, zip(*said.values(), strict=True)))
    found = {told.node: told.message.layers for told in read(in_turn.splitlines())}
    assert found == {name: f"{name} " * 2000 for name in said}


def as_srun_takes_it(text: str) -> list[str]:
    """A node's output in what reaches srun at a time: a line, or the beginning of a long one."""
    return re.findall(rf"[^\n]{{{SRUN_KEEPS}}}|[^\n]*\n", text)


NAMES = st.sampled_from([*MESSAGES, "Serve", "type", "__class__"])
LIKELY = st.builds(lambda node, name, what: {"node": node, name: what}, JSON, NAMES, JSON)


@given(line=st.text() | (JSON | LIKELY).map(json.dumps))
@example(line='{"node": "n1", "Up": {"self": 1}}')
@example(line='{"node": "n1", "Up": {}, "Left": {"why": ""}}')
@example(line='{"node": "n1"}')
@example(line='["node"]')
@example(line="9" * 5000)
@example(line=TOO_DEEP.decode())
@example(line='{"node": "n1", "Error": {"why": ' + TOO_DEEP.decode())
def test_any_line_is_a_message_or_talk(line: str) -> None:
    told = parse(line + "\n")
    assert told.line == line.rstrip("\n")
    assert told.message is None or type(told.message) in MESSAGES.values()
    assert isinstance(told.node, str)


# A node without a python3 that will do


def version_of(python: str) -> tuple[int, ...]:
    code = "import sys; print(*sys.version_info[:2])"
    return tuple(map(int, subprocess.check_output([python, "-ISc", code]).split()))


def pythons() -> list[str]:
    """Every Python 3 of this machine, of Debian's or pyenv's making; at least ours."""
    found = [str(path) for path in Path("/usr/bin").glob("python3.*") if path.name[8:].isdigit()]
    found += map(str, Path.home().glob(".pyenv/versions/3.*/bin/python3"))
    return [sys.executable, *found]


@pytest.mark.parametrize("python", pythons())
def test_every_python_from_3_9_on_takes_an_order_and_an_older_one_says_so(
    fakes: Fakes, python: str
) -> None:
    argv = [python, *SURVEY.argv[1:]]
    run = {"env": fakes.environment(), "capture_output": True, "text": True}
    done = subprocess.run(argv, input=SURVEY.text, **run)  # type: ignore[call-overload]
    if version_of(python) < (3, 9):
        assert (done.returncode, done.stdout, done.stderr) == (TOO_OLD, "", "")
    else:
        assert (done.returncode, done.stderr) == (0, "")
        assert isinstance(next(read(done.stdout.splitlines())).message, Facts)


def test_a_python_that_is_too_old_is_seen_before_it_reads_anything() -> None:
    code = f"import sys; sys.version_info = (3, 8, 18); exec({BOOT!r})"
    assert subprocess.run([sys.executable, "-c", code], input=b"").returncode == TOO_OLD


NO_PYTHON = "slurmstepd: error: execve(): python3: No such file or directory\n"


def exited(who: str, code: int) -> str:
    return f"srun: error: {who}: Exited with exit code {code}\n"


@pytest.mark.parametrize(
    ("said", "code", "why"),
    [
        (exited("n2: task 1", 39), 39, "n2: its python3 is older than 3.9"),
        (exited("n[1-2]: tasks 0-1", 39), 39, "n[1-2]: its python3 is older than 3.9"),
        (NO_PYTHON + exited("n1: task 0", 2), 2, "n1: there is no python3"),
        (
            NO_PYTHON + exited("n1: task 0", 2) + exited("n2: task 1", 39),
            39,
            "n1: there is no python3; n2: its python3 is older than 3.9",
        ),
        (exited("n1: task 0", 2), 2, "asking the nodes ended with exit code 2: .*"),
        (NO_PYTHON + exited("n1: task 0", 1), 1, "asking the nodes ended with exit code 1: .*"),
    ],
)  # fmt: skip
def test_a_node_whose_python_will_not_do_is_named_in_a_sentence(
    fakes: Fakes, said: str, code: int, why: str
) -> None:
    os.environ.update(fakes.environment())
    fakes.program("srun", f"import sys; sys.stderr.write({said!r}); sys.exit({code})")
    with pytest.raises(Failure) as failure:
        nodes.ask(Command(["srun"], SURVEY.order), "asking the nodes")
    if "python3" in why:
        assert failure.value.message == why
        assert "3.9 or newer" in failure.value.hint
    else:
        assert re.fullmatch(why, failure.value.message)
