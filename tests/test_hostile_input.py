"""Words, files and records of any kind: they arrive as they are, or one sentence refuses them.

Nothing that they say is executed, nothing is written elsewhere, and no script ends in a traceback:
an exception that its main() lets out fails the test here.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import bench
import save_image
from common import settings
from common.signals import SIGNALS
from common.talk import Failure
from launch import image, nodes, order
from launch import main as run_sbatch
from launch.identity import launcher
from launch.nodes import Step
from launch.runtimes import runtime as find_runtime
from load import endpoint, sharegpt
from load.matrix import Case
from report import __main__ as report
from tests.conftest import PATIENCE, archive, plan
from tests.test_report import record as result
from tests.test_smoke import smoke

NASTY = [
    "", " ", "a b", "it's", '"', "$(touch x)", "`touch x`", "'; touch x; '", "a\nb", "\r", "\t",
    "../../x", "/", "-", "--", "-x", "--image", "~", "*", "#", "!", "\\", "{a,b}", "a\x1b[2Jb",
    "\u202e", "\udcff", "ünï", "x" * 4096, "x" * (1 << 17), "x" * 1_000_000,
]  # fmt: skip
RAW = st.binary(max_size=12).filter(lambda b: b"\0" not in b).map(os.fsdecode)
WORDS = st.sampled_from(NASTY) | RAW
TEXTS = st.sampled_from([n for n in NASTY if "\udcff" not in n]) | st.text(max_size=12)
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**4000, -1, 1 << 63, 1e308])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.sampled_from(["a\0b", "-x", "sha256:abc"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
TOO_DEEP = b"[" * 100_000


@contextlib.contextmanager
def fresh() -> Iterator[Path]:
    """An empty directory to be in; afterwards the process is as it was."""
    before, handlers = dict(os.environ), {n: signal.getsignal(n) for n in SIGNALS}
    mask, home = os.umask(0o022), Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(home)
            os.umask(mask)
            os.environ.clear()
            os.environ.update(before)
            for number, handler in handlers.items():
                signal.signal(number, handler)


def written(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def call(main: Callable[[list[str]], int], *argv: str) -> tuple[int, bytes, str]:
    """Exit code, stdout and stderr of a main(); it may only return or exit."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(argv))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    return code, out.buffer.getvalue(), err.getvalue()


def says_why(code: int, text: str) -> bool:
    """A failure has a sentence, and is no essay."""
    said = re.search(r"(ERROR|error:|^test\.py:|/\d passed).*", text, re.M)
    return code in (1, 2) and bool(said) and "Traceback" not in text


@pytest.fixture(autouse=True)
def nobody_elsewhere(
    clean_environment: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Names do not resolve, no program is found, and nobody's .env is beside the scripts."""
    real = socket.getaddrinfo

    def lookup(host: Any, *rest: Any, **more: Any) -> Any:
        if host in ("127.0.0.1", "localhost", "::1"):
            return real(host, *rest, **more)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setenv("PATH", str(tmp_path / "no-programs"))
    for module in (endpoint, save_image, smoke):
        here = tmp_path / "scripts" / f"{module.__name__.rpartition('.')[2]}.py"
        here.touch()
        monkeypatch.setattr(module, "__file__", str(here))


# --- words ----------------------------------------------------------------------------------------

RECORD = r"""#!/bin/sh
{ printf '%s\0' "$#" "${0##*/}" "$@"; /bin/cat; printf '\0'; } >>"$RECORD"
"""


@pytest.fixture(scope="module")
def recorders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs that write down what they are called with and their input, and do nothing."""
    folder = tmp_path_factory.mktemp("recorders")
    for name in ("python3", "srun", "env", "aws", "sha256sum"):
        (folder / name).write_text(RECORD)
        (folder / name).chmod(0o755)
    (folder / "cat").symlink_to("/bin/cat")
    (folder / "sleep").symlink_to("/bin/true")
    return folder


def as_bash_reads_it(
    text: bytes, recorders: Path, folder: Path
) -> list[tuple[list[str], dict[str, Any]]]:
    """The commands of a dry run, as a shell takes them, and the orders that they send."""
    (folder / "pasted").write_bytes(text.replace(os.fsencode(sys.executable), b"python3"))
    env = {"PATH": str(recorders), "RECORD": str(folder / "record")}
    done = subprocess.run(
        ["/bin/bash", "pasted"], env=env, stdin=subprocess.DEVNULL, capture_output=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    words = [os.fsdecode(w) for w in (folder / "record").read_bytes().split(b"\0")[:-1]]
    commands = []
    while words:
        end = int(words[0]) + 2
        commands.append((words[1:end], sent_order(words[1:end], words[end])))
        del words[: end + 1]
    return commands


def sent_order(argv: list[str], text: str) -> dict[str, Any]:
    """What follows the parts of the program, each of them as long as was said."""
    sizes = argv[argv.index(order.BOOT) + 1 :]
    parts = ["base", *(size.partition(":")[0] for size in sizes[1:])]
    program = "".join(map(order.source, parts))
    assert text.startswith(program)
    assert sum(int(size.rpartition(":")[2]) for size in sizes) == len(os.fsencode(program))
    return dict(json.loads(text[len(program) :]))


@given(
    model=WORDS.filter(lambda w: not w.startswith("-")),
    values=st.lists(WORDS, max_size=3),
    slurm=st.booleans(),
)
@example(model="\udcff\n$(touch x)", values=["'", "x" * 131_000], slurm=True)
def test_a_dry_run_read_by_bash_has_the_very_arguments(
    recorders: Path, model: str, values: list[str], slurm: bool
) -> None:
    serve = [word for value in values for word in ("--any", value)] + [f"--o={v}" for v in values]
    with fresh() as folder:
        os.environ.update(TRTLLM_VERSION="9", PRIVILEGED="0", HOME="/root")
        if slurm:
            os.environ.update(SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="2", SLURM_HINT="x")
        code, out, err = call(run_sbatch.main, "--dry-run", "--", model, *serve)
        assert written(folder) == set()
        if code:
            assert says_why(code, err)
            return
        commands, orders = zip(*as_bash_reads_it(out, recorders, folder), strict=True)
        engine = ["trtllm-serve", model, *serve, "--host", "0.0.0.0", "--port", "8000"]
        assert [list(order) for order in orders] == [["Survey"], ["Serve"], ["Remove"]]
        assert orders[1]["Serve"]["engine"] == engine
        assert {command[0] for command in commands} == {"env" if slurm else "python3"}
        assert orders[2]["Remove"] == {"launcher": launcher(), "replica": ""}
        assert written(folder) == {"pasted", "record"}


ENGINE = '#!/bin/sh\nprintf \'%s\\0\' "$@" >"$RECORD"\n'


@pytest.mark.parametrize("runtime", ["bare", "docker"])
@given(words=st.lists(WORDS, min_size=1, max_size=4))
@example(words=["$(touch x)", "'", "\n", "\udcff"])
def test_the_engine_gets_the_very_arguments(runtime: str, words: list[str]) -> None:
    with fresh() as folder:
        os.environ.update(PATH="/usr/bin:/bin", RECORD=str(folder / "record"))
        for name in ("trtllm-serve", "docker"):
            program = folder / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(ENGINE)
            program.chmod(0o755)
        os.environ["PATH"] = f"{folder}/bin:/usr/bin:/bin"
        made = plan("trtllm-serve", *words, runtime=runtime)
        command = find_runtime(runtime).serve(made, made.replicas[0], os.environ)
        with (folder / "log").open("wb") as log:
            step = Step(command, output=log)
        code = step.process.wait(PATIENCE)
        step.stop()
        said = (folder / "log").read_text()
        if max(len(os.fsencode(word)) for word in words) > 100_000:
            assert code in (126, 127) and "Argument list too long" in said
            return
        assert (code, said) == (0, "")
        found = [os.fsdecode(w) for w in (folder / "record").read_bytes().split(b"\0")[:-1]]
        assert found[-len(words) :] == words
        assert written(folder) == {"bin", "bin/trtllm-serve", "bin/docker", "record", "log"}


@given(words=st.lists(WORDS | st.sampled_from(["--dry-run", "-w", "--image", "-f"]), max_size=5))
@example(words=["--image=-x"])
@example(words=["--image", "--privileged"])
@example(words=["-w", "a\udcff"])
def test_any_words_for_the_launcher(words: list[str]) -> None:
    with fresh() as folder:
        code, _, err = call(run_sbatch.main, "--check", *words)
        assert code == 0 or says_why(code, err)
        assert written(folder) == set()


OPTIONS = ["-H", "-p", "-m", "-t", "-o", "-i", "--type", "--concurrency", "--input-len", "--json"]
OPTIONS += ["--goodput", "--num-prompts", "--seed", "--output", "--verify", "--load", "--resume"]


@pytest.mark.parametrize("script", [bench, smoke, save_image, report], ids=lambda m: m.__name__)
@given(words=st.lists(WORDS | st.sampled_from(OPTIONS), max_size=4))
@example(words=["-H", "http://["])
@example(words=["-H", "a..b"])
@example(words=["-H", "http://me:secret@127.0.0.1:1"])
@example(words=["--load", "x" * 1000])
def test_any_words_for_the_other_scripts(script: Any, words: list[str]) -> None:
    with fresh() as folder:
        os.environ["PORT"] = "1"
        code, _, err = call(script.main, *words)
        assert says_why(code, err) or script is smoke, err
        assert "me:secret" not in err.partition("neither")[2]
        assert written(folder) <= {"results"}


@given(host=WORDS | st.text(max_size=20), port=st.none() | st.integers(1, 65535))
def test_a_host_is_a_clean_url_or_none(host: str, port: int | None) -> None:
    with contextlib.suppress(Failure):
        url = endpoint.base_url(host, port, 8000)
        assert re.fullmatch(r"https?://[^\s@?#\\/][^\s@?#\\]*", url) and url.isprintable()


@given(job=WORDS.filter(lambda w: not re.fullmatch("[0-9]{1,20}|", w, re.ASCII)))
def test_a_job_that_is_no_number_names_no_file(job: str) -> None:
    with pytest.raises(Failure, match="SLURM_JOB_ID is"):
        nodes.find_place({"SLURM_JOB_ID": job})


# --- .env -----------------------------------------------------------------------------------------

LINES = st.builds(
    lambda name, quote, value: f"{name}={quote}{value}{quote}".encode(errors="surrogateescape"),
    st.sampled_from(["IMAGE", "MODEL", "PORT", "HF_X", "WORKSPACE", "export HOST", "'a=b'"]),
    st.sampled_from(["", "'", '"']),
    WORDS | st.sampled_from(["a\0b", "${HOME}", "$(touch x)"]),
)  # fmt: skip


@pytest.mark.parametrize("script", [run_sbatch, bench, smoke, save_image], ids=lambda m: m.__name__)
@given(text=st.binary(max_size=60) | st.lists(LINES, max_size=3).map(b"\n".join))
@example(text=b'IMAGE="a\0b"')
@example(text=b"\xff\xfe=1")
@example(text=b"'a=b'=c")
@example(text=b"HF_X=" + b"x" * 1_000_000)
@example(text=b"OPENAI_API_KEY=a\xc3\xbcb")
def test_any_env_file(script: Any, text: bytes) -> None:
    with fresh() as folder:
        Path(".env").write_bytes(text)
        os.environ.update(HOST="127.0.0.1", PATH=str(folder))
        args = {run_sbatch: ["--dry-run", "m"], bench: ["-p", "1"], smoke: ["-p", "1"]}
        code, _, err = call(script.main, *args.get(script, []))
        assert "Traceback" not in err
        assert code == 0 or says_why(code, err) or script is smoke
        assert written(folder) <= {".env"}


@pytest.mark.parametrize("script", [run_sbatch, bench, smoke, save_image], ids=lambda m: m.__name__)
@pytest.mark.parametrize("foreign", [True, False])
def test_an_env_file_that_others_wrote_is_not_read(script: Any, foreign: bool) -> None:
    """It would say which image runs, which program is started (PATH), and who gets the key."""
    with fresh():
        Path(".env").write_text("IMAGE=evil\nHOST=evil\n")
        if foreign and os.geteuid():
            pytest.skip("only root can give a file away")
        os.chown(".env", 12345, -1) if foreign else Path(".env").chmod(0o646)
        code, _, err = call(script.main, *(["--dry-run", "m"] if script is run_sbatch else []))
    assert code == 1 and ".env" in err and ("belongs to" in err or "everybody" in err), err


def test_an_env_file_of_the_owner_of_the_scripts_is_read() -> None:
    """A colleague's checkout, run as it is: its code is trusted, so are its settings."""
    if os.geteuid():
        pytest.skip("only root can give a file away")
    with fresh():
        Path(".env").write_text("MODEL=theirs\n")
        os.chown(".env", 12345, -1)
        os.chown(settings.__file__, 12345, -1)
        settings.load_env_files()
        assert os.environ["MODEL"] == "theirs"


@pytest.mark.parametrize(
    ("mode", "text", "warned"),
    [
        (0o644, "HF_TOKEN=x", True),
        (0o640, "OPENAI_API_KEY=x", True),
        (0o600, "HF_TOKEN=x", False),
        (0o644, "MODEL=x", False),
        (0o644, "HF_TOKEN=", False),
    ],
)
def test_a_secret_that_others_can_read_gets_one_warning(mode: int, text: str, warned: bool) -> None:
    with fresh():
        Path(".env").write_text(text)
        Path(".env").chmod(mode)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            settings.load_env_files()
    err = said.getvalue()
    assert err.count("holds a secret and others may read it: chmod 600") == warned
    assert "=x" not in err


# --- sidecars and manifests -----------------------------------------------------------------------

TAR = archive("a/b:1")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A sidecar that says the truth about TAR."""
    found = image.read_tarball(put(tmp_path_factory.mktemp("sound"), None))
    sidecar = dict.fromkeys(save_image.SIDECAR, "x") | {"schema": 1, "tags": ["a/b:1"]}
    sidecar |= {"config_digest": found.ids[0], "manifest_digest": None, "diff_ids": ["sha256:1"]}
    return sidecar | {"unpacked_bytes": 7, "packed_bytes": len(TAR)}


def put(folder: Path, sidecar: bytes | None) -> Path:
    (folder / "x.tar").write_bytes(TAR)
    if sidecar is not None:
        (folder / "x.tar.json").write_bytes(sidecar)
    return folder / "x.tar"


TAGS = st.lists(TEXTS | st.sampled_from(["--privileged", "-x", "a\0b", "a/b:1"]), max_size=2)


@given(
    changes=st.dictionaries(st.sampled_from([*save_image.SIDECAR, "?"]), JSON, max_size=3),
    tags=st.none() | TAGS,
)
@example(changes={}, tags=["--privileged"])
@example(changes={}, tags=["a\0b"])
@example(changes={"config_digest": "a b\nc"}, tags=None)
@example(changes={"unpacked_bytes": 1e999}, tags=None)
@example(changes={"packed_bytes": -1}, tags=None)
@example(changes={"packed_bytes": 10**4000}, tags=None)
def test_a_sidecar_that_lies(
    recorders: Path, sound: dict[str, Any], changes: dict[str, Any], tags: list[str] | None
) -> None:
    document = sound | changes | ({} if tags is None else {"tags": tags})
    with fresh() as folder:
        put(folder, json.dumps(document).encode())
        code, out, err = call(run_sbatch.main, "--dry-run", "--image", "./x.tar", "m")
        assert code == 0 or says_why(code, err)
        if not code:
            launched = as_bash_reads_it(out, recorders, folder)[2][1]["Serve"]
            assert re.fullmatch(r"[\w\[].*", launched["image"])
        os.environ["PATH"] = "/usr/bin:/bin"
        code, _, err = call(save_image.main, "--verify", "x.tar")
        assert says_why(code, err)  # its sha256 is none
        os.environ["PATH"] = str(folder)
        assert says_why(1, call(save_image.main, "--load", "x.tar")[2])
        assert written(folder) <= {"x.tar", "x.tar.json", "pasted", "record"}


@given(text=st.binary(max_size=40) | JSON.map(lambda d: json.dumps(d).encode()))
@example(text=TOO_DEEP)
@example(text=b"")
def test_a_sidecar_of_any_bytes(text: bytes) -> None:
    with fresh() as folder:
        os.environ["PATH"] = "/usr/bin:/bin"
        found = image.read_tarball(put(folder, text))
        assert found.tag == "a/b:1"  # the tarball itself was read
        assert says_why(*call(save_image.main, "--verify", "x.tar")[::2])


@given(manifest=JSON | st.fixed_dictionaries({"RepoTags": JSON, "Config": JSON}).map(lambda m: [m]))
@example(manifest=[{"RepoTags": ["--privileged"], "Config": "x.json"}])
@example(manifest=[{"RepoTags": ["a\0b"], "Config": "x.json"}])
@example(manifest=[{"RepoTags": [["a"]], "Config": 3}])
def test_a_tarball_whose_manifest_lies(manifest: Any) -> None:
    with fresh() as folder:
        os.environ["PATH"] = "/usr/bin:/bin"
        (folder / "x.tar").write_bytes(archive(manifest=manifest))
        with contextlib.suppress(Failure):
            assert image.REFERENCE.fullmatch(image.read_tarball(folder / "x.tar").tag)


def member(content: bytes, size: int | None = None) -> bytes:
    """The beginning of a tar that holds a manifest."""
    info = tarfile.TarInfo("manifest.json")
    info.size = len(content) if size is None else size
    return info.tobuf() + content


def test_a_manifest_of_any_depth() -> None:
    with fresh() as folder:
        os.environ["PATH"] = "/usr/bin:/bin"
        (folder / "x.tar").write_bytes(member(TOO_DEEP) + bytes(2048))
        with pytest.raises(Failure, match="truncated or corrupt"):
            image.read_tarball(folder / "x.tar")


PEAK = """
import atexit, runpy, sys
from pathlib import Path
def peak():
    sys.stdout.flush()
    status = Path("/proc/self/status").read_text()
    print("peak", status.split("VmHWM:")[1].split()[0], file=sys.stderr)
atexit.register(peak)
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_bomb_is_not_unpacked_into_memory(tmp_path: Path) -> None:
    """A manifest of 200 MB of zeros, 200 kB as it lies there, and a sidecar that is too long."""
    command = "cat header; head -c 200M /dev/zero"
    (tmp_path / "header").write_bytes(member(b"", 200 << 20))
    subprocess.run(["bash", "-c", f"{{ {command}; }} | gzip -1c >x.tar.gz"], cwd=tmp_path,
                   env={"PATH": "/usr/bin:/bin"}, check=True)  # fmt: skip
    (tmp_path / "x.tar.gz.json").write_bytes(b" " * (image.SMALL + 1))
    script = str(Path(image.__file__).parents[1] / "run_sbatch.py")
    argv = [sys.executable, "-c", PEAK, script, "--dry-run", "--image", "./x.tar.gz", "m"]
    done = subprocess.run(argv, env={"PATH": "/usr/bin:/bin"}, cwd=tmp_path, capture_output=True)
    words = done.stderr.decode()
    assert done.returncode == 1 and "far too large" in words and "truncated or corrupt" in words
    assert int(words.partition("peak ")[2]) < 120_000, words  # kB; 40,000 of them are Python's


# --- the engine's config, the data set ------------------------------------------------------------

YAML = JSON.map(json.dumps) | st.text(max_size=30) | st.sampled_from(
    ["[" * 5000, "&a [*a]", "!!python/object/apply:os.system ['touch x']", "a: 0o9", "? [1]\n: 2",
     "tensor_parallel_size: " + "9" * 5000, "moe_config: [1]", "cp_config: {cp_type: 3}"]
)  # fmt: skip
SIZES = st.sampled_from(["tensor_parallel_size", "moe_expert_parallel_size", "cp_config", "gpus"])


@given(
    text=(YAML | st.tuples(SIZES, YAML).map(": ".join)).map(lambda t: t.encode())
    | RAW.map(os.fsencode)
)
@example(text=b"[" * 5000)
@example(text=b"a: &a [b]\nb: &b " + b"[*a,*a]" * 3)
@example(text=b"\xff\xfe")
def test_any_config_file(text: bytes) -> None:
    with fresh() as folder:
        Path("c.yaml").write_bytes(text)
        code, _, err = call(run_sbatch.main, "--dry-run", "m", "--config", "c.yaml")
        assert code == 0 or says_why(code, err)
        assert written(folder) == {"c.yaml"}


TURNS = st.fixed_dictionaries(
    {"conversations": JSON | st.lists(st.fixed_dictionaries({"value": JSON}))}
)


@given(
    text=(JSON | st.lists(TURNS | JSON)).map(lambda d: json.dumps(d).encode())
    | st.binary(max_size=40)
)
@example(text=b'[{"a": ' + TOO_DEEP)
@example(text=b'[{"conversations": "ab"}]')
@example(text=b"[{\xff}]")
def test_any_file_of_conversations(text: bytes) -> None:
    with fresh():
        Path("s.json").write_bytes(text)
        with contextlib.suppress(Failure):
            sharegpt.pick(Path("s.json"), 2, 1)


# --- records --------------------------------------------------------------------------------------

URLS = TEXTS | st.sampled_from(
    ["http://127.0.0.1:1", "file:///etc/passwd", "http://", "http://[", "//x", "http://a b/", "http://u:p@x/"]
)  # fmt: skip
RECORDS = st.fixed_dictionaries(
    {}, optional={"url": URLS | JSON, "model": JSON, "job": JSON | st.just("7"), "log": JSON,
                  "launcher": TEXTS | JSON | st.sampled_from(["::", "a:1:2", "a/b/c:²:3"])}
)  # fmt: skip


@given(document=RECORDS | JSON)
@example(document={"url": ["x"]})
@example(document={"job": "7", "launcher": "x", "url": "http://127.0.0.1:1", "model": "m"})
@example(document={"job": "../7", "launcher": "::", "url": "http://a..b", "model": "m"})
def test_records_that_lie(document: Any) -> None:
    text = json.dumps(document)
    with fresh() as folder:
        (folder / "logs").mkdir()
        for name in ("endpoint.json", "run_7.json"):
            (folder / "logs" / name).write_text(text)
        assert says_why(*call(bench.main)[::2])
        assert call(smoke.main, "--timeout", "0.1")[0] in (1, 2)
        assert call(run_sbatch.main, "--status")[0] in (0, 1)
        with contextlib.ExitStack() as patience:
            patience.enter_context(pytest.MonkeyPatch.context()).setattr(
                "launch.manage.PATIENCE", 0.0
            )
            code, _, err = call(run_sbatch.main, "--stop")
        assert code == 0 or says_why(code, err)


def test_records_of_any_depth() -> None:
    with fresh() as folder:
        (folder / "logs").mkdir()
        for name in ("endpoint.json", "run_7.json"):
            (folder / "logs" / name).write_bytes(TOO_DEEP)
        assert says_why(*call(bench.main)[::2])
        assert says_why(*call(smoke.main)[::2])
        assert call(run_sbatch.main, "--status")[0] == 1


@pytest.mark.parametrize("script", [bench, smoke], ids=lambda m: m.__name__)
def test_a_key_is_not_sent_where_somebody_elses_record_says(script: Any) -> None:
    with fresh() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        (folder / "logs").mkdir()
        path = folder / "logs/endpoint.json"
        path.write_text(json.dumps({"url": f"http://127.0.0.1:{listener.getsockname()[1]}"}))
        path.chmod(0o666)
        os.environ["OPENAI_API_KEY"] = "sk-secret"
        code, _, err = call(script.main)
        listener.settimeout(0.05)
        with pytest.raises(TimeoutError):
            listener.accept()
    assert code == 1 and "OPENAI_API_KEY is" in err and "sk-secret" not in err


PLACES = st.sampled_from(["case", "client", "metadata", ""])
KEYS = st.sampled_from(
    [*result(Case("prefill", 1, 1, 1, 1)), *Case("x", 1, 1, 1, 1).facts(), "late_share"]
)


@given(changes=st.lists(st.tuples(PLACES, KEYS, JSON), min_size=1, max_size=3))
@example(changes=[("", "case", 1)])
@example(changes=[("", "date", None)])
@example(changes=[("", "problems", ["a", 3])])
@example(changes=[("", "mean_ttft_ms", float("nan"))])
@example(changes=[("", "mean_ttft_ms", 10**4000)])
@example(changes=[("case", "name", "../../x")])
@example(changes=[("client", "late_share", "x")])
def test_results_that_lie(changes: list[tuple[str, str, Any]]) -> None:
    lie = copy.deepcopy(result(Case("prefill", 128, 1, 10, 4), client={}))
    for place, key, value in changes:
        part = lie.get(place) if place else lie
        if isinstance(part, dict):
            part[key] = value
    with fresh() as folder, pytest.MonkeyPatch.context() as patch:
        for module in ("render", "side_by_side"):
            patch.setattr(f"report.{module}.draw", lambda charts, **files: [])
        (folder / "r").mkdir()
        for i, one in enumerate((lie, result(Case("prefill", 512, 1, 10, 4)))):
            (folder / f"r/{i}.json").write_text(json.dumps(one))
        for words in (["r"], ["compare", "r", "r"]):
            code, _, err = call(report.main, *words)
            assert code == 0 or says_why(code, err)
        reports = {"r/summary.json", "r/summary.csv", "r/report.html", "r/compare-r.html"}
        assert written(folder) <= {"r", "r/0.json", "r/1.json", *reports}


def test_a_result_of_any_depth() -> None:
    with fresh() as folder:
        (folder / "r").mkdir()
        (folder / "r/a.json").write_bytes(TOO_DEEP)
        assert says_why(*call(report.main, "r")[::2])
