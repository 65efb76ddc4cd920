"""save_image.py against a fake `docker` on PATH, with the real pigz, gzip and zstd."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pty
import random
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import save_image
from tests.conftest import PATIENCE
from tests.waiting import comes_true

SCRIPT = Path(save_image.__file__)
TAG = "tensorrt-llm-serve:latest"
SUFFIX = {"gz": ".tar.gz", "zst": ".tar.zst", "none": ".tar"}

FAKE_DOCKER = r"""
import io, json, os, sys, tarfile, time
from pathlib import Path

home = Path(__file__).parent.parent
state = json.loads((home / "state.json").read_text())
with (home / "calls").open("a") as calls:
    print(json.dumps(sys.argv[1:]), file=calls)

def fail(text, status=1):
    print(text, file=sys.stderr)
    raise SystemExit(status)

match sys.argv[1:]:
    case _ if state.get("down"):
        fail("Cannot connect to the Docker daemon at unix:///var/run/docker.sock.")
    case ["image", "inspect", "--", name]:
        if name not in state["images"]:
            fail("Error: No such image: " + name)
        print(json.dumps([state["images"][name]]))
    case ["save", "--", name]:
        (home / "save.pid").write_text(str(os.getpid()))
        data = Path(state["archive"]).read_bytes()
        for at in range(0, state.get("cut", len(data)), 1 << 16):
            sys.stdout.buffer.write(data[at : at + (1 << 16)])
            time.sleep(state.get("delay", 0))
            for _ in range(10_000 * state.get("held", 0)):
                if (home / "go on").exists():
                    break
                time.sleep(0.01)
        sys.stdout.flush()
        if state.get("rebuilt"):
            state["images"][name] = state.pop("rebuilt")
            (home / "state.json").write_text(json.dumps(state))
        if "cut" in state:
            fail("write unix @->docker.sock: broken layer")
    case ["run", "--rm", "--pull=never", "--net=none", "--env=NVIDIA_VISIBLE_DEVICES=void",
          "--entrypoint=python3", name, "-c", code, *engines] if "importlib.metadata" in code:
        assert name.startswith("sha256:")
        print(state["asked"]) if "asked" in state else fail("exec: python3: not found", 127)
    case ["create", name, image, "sh"] if name.startswith("--name=save-image-"):
        assert image.startswith("sha256:")
        (home / "container").mkdir()
        print("0123abcd")
    case ["cp", source, target]:
        path = home / "container" / target.partition(":/")[2].replace("/", "+")
        path.write_bytes(Path(source).read_bytes())
    case ["export", name]:
        (home / "save.pid").write_text(str(os.getpid()))
        copied = (home / "container").iterdir()
        files = {path.name.replace("+", "/"): path.read_bytes() for path in copied}
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            for path, text in {**files, "opt/model": bytes(300_000), "dev/console": b""}.items():
                member = tarfile.TarInfo(path)
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text))
        whole = data.getvalue()[: state.get("cut")]
        sys.stdout.buffer.write(whole[:1000])  # mksquashfs ends with the archive, not with us
        sys.stdout.flush()
        time.sleep(state.get("delay", 0))
        sys.stdout.buffer.write(whole[1000:])
        sys.stdout.flush()
        if "cut" in state:
            fail("write unix @->docker.sock: broken layer")
    case ["rm", "--force", "--volumes", name]:
        (home / "rm.pid").write_text(str(os.getpid()))
        time.sleep(state.get("slow rm", 0))
        for path in (home / "container").iterdir():
            path.unlink()
        (home / "container").rmdir()
    case ["load", "--quiet"]:
        if not state.get("full"):
            sys.stdin.buffer.peek(1)  # by then whoever started it holds it, and would end it
        (home / "load.pid").write_text(str(os.getpid()))
        time.sleep(state.get("delay", 0))
        if state.get("full"):
            fail("no space left on device")
        data = sys.stdin.buffer.read()
        try:
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                for tag in json.load(tar.extractfile("manifest.json"))[0]["RepoTags"]:
                    state["images"][tag] = state["loads"]
                    print("Loaded image: " + tag)
        except (tarfile.TarError, KeyError):
            fail("Error processing tar file(exit status 1): unexpected EOF")
        (home / "state.json").write_text(json.dumps(state))
    case call:
        fail("fake docker does not know " + repr(call), 64)
"""


class Image(NamedTuple):
    tar: bytes
    config: str
    manifest: str | None
    layers: list[str]

    def inspected(self, image_id: str) -> dict[str, Any]:
        config = {"Labels": {"org.opencontainers.image.version": "24.04"}}  # the base's
        layers = {"Layers": self.layers}
        return {"Id": image_id, "RootFS": layers, "Size": 3_000_000, "Config": config}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tar_of(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            if name.endswith("layer.tar"):  # the same layer once more, as old Dockers store it
                link = tarfile.TarInfo("3c4d/layer.tar")
                link.type, link.linkname = tarfile.SYMTYPE, f"../{name}"
                tar.addfile(link)
    return out.getvalue()


def build_image(layout: str, tag: str = TAG, layer: bytes = b"") -> Image:
    """Build what `docker save` writes: the classic layout, or OCI as since Docker 25."""
    layer = layer or tar_of({"model": random.Random(layout).randbytes(2_000_000)})
    config = json.dumps({"rootfs": {"diff_ids": [f"sha256:{sha256(layer)}"]}, "tag": tag}).encode()
    digest, layers = sha256(config), [f"sha256:{sha256(layer)}"]
    if layout == "classic":
        entry = {"Config": f"{digest}.json", "RepoTags": [tag], "Layers": ["1a2b/layer.tar"]}
        manifest = json.dumps([entry]).encode()
        files = {"1a2b/layer.tar": layer, f"{digest}.json": config, "manifest.json": manifest}
        return Image(tar_of(files), f"sha256:{digest}", None, layers)
    blob = json.dumps({"config": {"digest": f"sha256:{digest}"}}).encode()
    index = {"manifests": [{"digest": f"sha256:{sha256(blob)}"}]}
    entry = {"Config": f"blobs/sha256/{digest}", "RepoTags": [tag], "Layers": []}
    blobs = {f"blobs/sha256/{sha256(data)}": data for data in (layer, config, blob)}
    documents = {
        "index.json": json.dumps(index).encode(),
        "manifest.json": json.dumps([entry]).encode(),
    }
    return Image(tar_of(blobs | documents), f"sha256:{digest}", f"sha256:{sha256(blob)}", layers)


class Box:
    """A directory to work in, a PATH of few programs, and a docker that does as `state` says."""

    def __init__(self, home: Path, without: tuple[str, ...] = ()) -> None:
        self.home, self.cwd, self.bin = home, home / "cwd", home / "bin"
        self.cwd.mkdir()
        self.bin.mkdir()
        for name in {"pigz", "gzip", "zstd", "cat", "mksquashfs"} - set(without):
            if program := shutil.which(name):
                (self.bin / name).symlink_to(program)
        self.program("docker", FAKE_DOCKER)
        self.state: dict[str, Any] = {"images": {}}

    def program(self, name: str, text: str) -> None:
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(f"#!{sys.executable} -SE\n{text}")
        (self.bin / name).chmod(0o755)

    def hold(self, image: Image, tag: str = TAG, image_id: str | None = None) -> None:
        (self.home / "archive").write_bytes(image.tar)
        self.state["archive"] = str(self.home / "archive")
        self.state["images"][tag] = image.inspected(image_id or image.config)

    def start(
        self, *args: str, env: dict[str, str] | None = None, stderr: int = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        (self.home / "state.json").write_text(json.dumps(self.state))
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *args],
            cwd=self.cwd,
            env={"PATH": str(self.bin), "HOME": str(self.home), **(env or {})},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    def run(
        self, *args: str, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        with self.start(*args, env=env) as process:
            out, err = process.communicate(timeout=PATIENCE)
        assert "Traceback" not in err
        assert "\r" not in err and "\x1b" not in err  # no terminal, no tricks
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def fails(self, *args: str, env: dict[str, str] | None = None) -> str:
        result = self.run(*args, env=env)
        assert (result.returncode, result.stdout) == (1, ""), result.stderr
        return result.stderr.partition("ERROR ")[2]

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.home / "calls").read_text().splitlines()]

    def files(self) -> list[str]:
        return sorted(path.name for path in self.cwd.iterdir())

    def sidecar(self, name: str) -> dict[str, Any]:
        sidecar: dict[str, Any] = json.loads((self.cwd / f"{name}.json").read_text())
        return sidecar

    def edit(self, name: str, **values: object) -> None:
        (self.cwd / f"{name}.json").write_text(json.dumps(self.sidecar(name) | values))


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


@pytest.fixture(scope="module", params=["classic", "oci"])
def image(request: pytest.FixtureRequest) -> Image:
    return build_image(request.param)


@pytest.fixture(scope="module")
def classic() -> Image:
    return build_image("classic")


@pytest.fixture(scope="module", params=["gz", "zst", "none"])
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, classic: Image
) -> Path:
    box = Box(tmp_path_factory.mktemp("saved"))
    box.hold(classic)
    assert box.run("-o", f"image{SUFFIX[request.param]}").returncode == 0
    return box.cwd / f"image{SUFFIX[request.param]}"


@pytest.fixture
def copy(saved: Path, box: Box, classic: Image) -> str:
    """A tarball with its sidecar in the working directory, ready to be spoiled."""
    for path in saved.parent.iterdir():
        shutil.copy(path, box.cwd)
    box.state["loads"] = classic.inspected(classic.config)
    return saved.name


def spoil(box: Box, name: str, edit: Callable[[bytearray], object]) -> None:
    data = bytearray((box.cwd / name).read_bytes())
    edit(data)
    (box.cwd / name).write_bytes(data)


def cut_short(data: bytearray) -> None:
    del data[len(data) * 2 // 3 :]


def flip_a_bit(data: bytearray) -> None:
    data[len(data) // 2] ^= 4


# ---- pure functions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "full"),
    [
        ("a", "a:latest"),
        ("a:1", "a:1"),
        ("host:5000/a", "host:5000/a:latest"),
        ("host:5000/a/b:2", "host:5000/a/b:2"),
        ("a@sha256:12", "a@sha256:12"),
    ],
)
def test_bare_name_means_latest(image: str, full: str) -> None:
    assert save_image.with_tag(image) == full


@pytest.mark.parametrize(
    ("image", "codec", "name"),
    [
        (TAG, "gz", "tensorrt-llm-serve-latest.tar.gz"),
        ("nvcr.io/nvidia/x:1.0_a", "zst", "x-1.0_a.tar.zst"),
        ("host:5000/x@sha256:12", "none", "x-sha256-12.tar"),
    ],
)
def test_tarball_is_named_after_the_image(image: str, codec: str, name: str) -> None:
    assert save_image.tarball_name(image, codec) == name
    assert save_image.codec_of_name(name) == codec


def test_codec_is_read_from_the_bytes() -> None:
    heads = [b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", tar_of({"a": b"b"}), b"", b"PK\x03\x04" * 99]
    assert [save_image.codec_of_bytes(head) for head in heads] == ["gz", "zst", "none", None, None]


@pytest.mark.parametrize("manifest", [None, [], {}, [1], [{}], [{"Config": "a"}], [{}, {}], "x"])
def test_manifest_of_no_image_is_refused(manifest: object) -> None:
    with pytest.raises(ValueError, match="one image"):
        save_image.tags_and_config(manifest)


@pytest.mark.parametrize("config", ["ab12.json", "blobs/sha256/ab12"])
def test_config_digest_of_both_layouts(config: str) -> None:
    manifest = [{"Config": config, "RepoTags": None}]
    assert save_image.tags_and_config(manifest) == ([], "sha256:ab12")


@pytest.mark.parametrize(
    ("index", "image_id", "digest"),
    [
        (None, "config", None),  # classic store, classic layout
        (None, "other", "other"),  # a containerd store knows it
        ({"manifests": [{"digest": "m"}, {"digest": "m"}]}, "config", "m"),  # one image, two names
        ({"manifests": [{"digest": "m"}, {"digest": "n"}]}, "config", None),
        ({"manifests": 3}, "m", "m"),
    ],
)
def test_manifest_digest(index: object, image_id: str, digest: str | None) -> None:
    assert save_image.manifest_digest(index, image_id, "config") == digest


# ---- save ----------------------------------------------------------------------------------------

UNPACK = {"gz": ["gzip", "-dc"], "zst": ["zstd", "-dqc"], "none": ["cat"]}


@pytest.mark.parametrize("codec", SUFFIX)
def test_save_writes_tarball_and_sidecar(box: Box, image: Image, codec: str) -> None:
    box.hold(image)
    box.state["asked"] = "tensorrt_llm 1.2.1"
    result = box.run("--compress", codec)
    name = f"tensorrt-llm-serve-latest{SUFFIX[codec]}"
    assert (result.returncode, result.stdout) == (0, f"{name}\n"), result.stderr
    assert box.files() == [name, f"{name}.json"]
    packed = (box.cwd / name).read_bytes()
    assert subprocess.run(UNPACK[codec], input=packed, capture_output=True).stdout == image.tar
    sidecar = box.sidecar(name)
    time.strptime(sidecar.pop("created"), "%Y-%m-%dT%H:%M:%SZ")
    assert sidecar == {
        "schema": 1,
        "tags": [TAG],
        "config_digest": image.config,
        "manifest_digest": image.manifest,
        "diff_ids": image.layers,
        "unpacked_bytes": 3_000_000,
        "packed_bytes": len(packed),
        "sha256": sha256(packed),
        "codec": codec,
        "engine": "tensorrt_llm",
        "version": "1.2.1",
    }


def test_save_shows_and_makes_exactly_these_calls(box: Box, classic: Image) -> None:
    box.hold(classic)
    shown = [line for line in box.run("-o", "x.tar.zst").stderr.splitlines() if line[0] == "$"]
    inspect = ["image", "inspect", "--", TAG]
    ask = ["run", *save_image.ASK, classic.config, "-c", save_image.QUESTION, *save_image.ENGINES]
    assert box.calls() == [inspect, ["save", "--", TAG], inspect, ask]
    assert shown == [
        f"$ docker image inspect -- {TAG}",
        f"$ docker save -- {TAG}",
        "$ zstd -q -c -T0 -3",
        f"$ docker image inspect -- {TAG}",
        f"$ docker {shlex.join(ask)}",
    ]


@pytest.mark.parametrize(
    ("labels", "asked", "found"),
    [
        ({"title": "tensorrt-llm-serve", "version": "1.1.0"}, None, ("tensorrt_llm", "1.1.0")),
        ({"title": "theirs", "version": "7"}, "vllm 0.11.0+cu128", ("vllm", "0.11.0+cu128")),
        (None, "tensorrt_llm 1.2.1\nvllm 0.11.0", ("tensorrt_llm", "1.2.1")),
        ({}, "", (None, None)),
        ({}, None, (None, None)),
    ],
)
def test_the_sidecar_says_which_engine_it_is(
    box: Box, classic: Image, labels: Any, asked: str | None, found: tuple[str | None, ...]
) -> None:
    """By our Dockerfile's labels, or asked; an image that does not say is saved all the same."""
    box.hold(classic)
    named = labels and {f"org.opencontainers.image.{name}": v for name, v in labels.items()}
    box.state["images"][TAG]["Config"]["Labels"] = named
    box.state |= {} if asked is None else {"asked": asked}
    result = box.run("-o", "x.tar")
    assert result.returncode == 0, result.stderr
    sidecar = box.sidecar("x.tar")
    assert (sidecar.get("engine"), sidecar.get("version")) == found
    assert ("could not find out" in result.stderr) is (found[0] is None)


def test_gzip_serves_where_pigz_is_missing(tmp_path: Path, classic: Image) -> None:
    box = Box(tmp_path, without=("pigz",))
    box.hold(classic)
    assert "$ gzip -c" in box.run("-o", "x.tar.gz").stderr
    assert "$ gzip -d -c" in box.run("--verify", "x.tar.gz").stderr


def test_missing_zstd_is_named(tmp_path: Path, classic: Image) -> None:
    box = Box(tmp_path, without=("zstd",))
    box.hold(classic)
    assert box.fails("-o", "x.tar.zst").startswith("zstd is not in PATH")
    assert box.files() == []


def test_flag_beats_environment_beats_dotenv(box: Box, classic: Image) -> None:
    for tag in ("flag:1", "environment:1", "dotenv:1"):
        box.hold(classic, tag)
    (box.cwd / ".env").write_text("IMAGE=dotenv:1\n")
    runs = [
        box.run("flag:1", env={"IMAGE": "environment:1"}),
        box.run(env={"IMAGE": "environment:1"}),
    ]
    names = [run.stdout for run in [*runs, box.run()]]
    assert names == ["flag-1.tar.gz\n", "environment-1.tar.gz\n", "dotenv-1.tar.gz\n"]


@pytest.mark.parametrize("name", ["old.tar.gz", "/fsx/x.tzst", "./x"])
def test_the_launchers_tarball_is_not_what_is_saved(box: Box, classic: Image, name: str) -> None:
    box.hold(classic)
    assert box.run(env={"IMAGE": name}).stdout == "tensorrt-llm-serve-latest.tar.gz\n"


def test_containerd_id_is_recorded_and_packed_layers_noted(box: Box) -> None:
    noise = random.Random(1).randbytes(2_000_000)
    image = build_image("oci", layer=b"\x1f\x8b\x08" + noise)
    box.hold(image, image_id=image.manifest)
    result = box.run("-o", "x.tar.gz")
    assert "compressed already" in result.stderr
    assert box.sidecar("x.tar.gz")["manifest_digest"] == image.manifest


def test_podman_in_dockers_place_is_understood(box: Box, classic: Image) -> None:
    """Its ids lack what Docker's begin with, and it has words of its own for an unknown image."""
    box.hold(classic, image_id=classic.config.removeprefix("sha256:"))
    box.state |= {"asked": "tensorrt_llm 1.1.0\n", "loads": box.state["images"][TAG]}
    done = box.run()
    assert done.returncode == 0, done.stderr
    sidecar = box.sidecar(done.stdout.strip())
    assert (sidecar["config_digest"], sidecar["manifest_digest"]) == (classic.config, None)
    done = box.run("--load", done.stdout.strip())
    assert (done.returncode, done.stdout) == (0, f"{TAG}\n"), done.stderr
    text = FAKE_DOCKER.replace('"Error: No such image: " + name', "name + ': image not known'")
    box.program("docker", text)
    assert "image no:latest is not in the local Docker\nnext: " in box.run("no").stderr


def test_nothing_that_is_written_may_be_changed_by_everybody(box: Box, classic: Image) -> None:
    box.hold(classic)
    mask = os.umask(0)
    try:
        assert box.run("-o", "x.tar").returncode == 0
    finally:
        os.umask(mask)
    assert [path.stat().st_mode & 0o002 for path in box.cwd.iterdir()] == [0, 0]


HOSTILE = ["a b'c$HOME;e\nf\"", "-a", "ä"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_name_is_only_a_name(box: Box, classic: Image, name: str) -> None:
    box.hold(classic)
    file = f"{name}.tar.zst"
    assert box.run(f"--output={file}").stdout == f"{file}\n"
    assert box.run(f"--verify={file}").stdout == f"{file}\n"
    assert box.files() == sorted([file, f"{file}.json"])


def test_hostile_image_name_is_only_a_name(box: Box) -> None:
    for name in ("--help", "a b:$HOME", "'"):
        assert "is not in the local Docker" in box.fails("--", name)
    assert [call[-1] for call in box.calls()] == ["--help:latest", "a b:$HOME", "':latest"]


def test_unknown_image_is_refused_before_anything_is_written(box: Box) -> None:
    message = box.fails("no/such")
    assert message.startswith(
        "image no/such:latest is not in the local Docker\nnext: build it with"
    )
    assert box.files() == []


def test_dead_daemon_speaks_for_itself(box: Box) -> None:
    box.state["down"] = True
    assert "Cannot connect to the Docker daemon" in box.fails()


def test_missing_docker_is_one_sentence(box: Box) -> None:
    (box.bin / "docker").unlink()
    assert box.fails() == "docker is not in PATH\n"


def test_missing_dependency_is_one_sentence(box: Box) -> None:
    (box.home / "dotenv.py").write_text("raise ImportError")
    message = box.fails(env={"PYTHONPATH": str(box.home)})
    assert message.startswith("python-dotenv is not installed\nnext: `make setup`")


def with_old_tarball(box: Box) -> None:
    (box.cwd / "x.tar.gz").write_bytes(b"old")
    (box.cwd / "x.tar.gz.json").write_text("{}")


def assert_only_old_tarball(box: Box) -> None:
    assert box.files() == ["x.tar.gz", "x.tar.gz.json"]
    assert (box.cwd / "x.tar.gz").read_bytes() == b"old"


def test_failing_docker_save_is_blamed_and_leaves_the_old_tarball(box: Box, image: Image) -> None:
    box.hold(image)
    box.state["cut"] = 1_000_000
    with_old_tarball(box)
    message = box.fails("-o", "x.tar.gz")
    assert message.startswith(
        "docker save failed (exit status 1): write unix @->docker.sock: broken"
    )
    assert_only_old_tarball(box)


@pytest.mark.parametrize("delay", [0, 0.01])
def test_failing_compressor_is_blamed(box: Box, classic: Image, delay: float) -> None:
    box.hold(classic)
    box.state["delay"] = delay
    box.program("pigz", "import os, sys; os.read(0, 9); sys.exit('pigz: abort: boom')")
    with_old_tarball(box)
    message = box.fails("-o", "x.tar.gz")
    assert message == "pigz failed (exit status 1): pigz: abort: boom\n"
    assert_only_old_tarball(box)


def test_killed_compressor_is_blamed(box: Box, classic: Image) -> None:
    box.hold(classic)
    box.program("pigz", "import os; os.read(0, 9); os.kill(os.getpid(), 9)")
    assert box.fails("-o", "x.tar.gz") == "pigz failed (SIGKILL): it said nothing\n"
    assert box.files() == []


def test_full_disk_is_blamed(box: Box, classic: Image) -> None:
    box.hold(classic)
    with_old_tarball(box)
    (box.home / "state.json").write_text(json.dumps(box.state))
    result = subprocess.run(
        ["bash", "-c", 'ulimit -f 500; exec "$@"', "_", sys.executable, SCRIPT, "-o", "x.tar.gz"],
        cwd=box.cwd,
        env={"PATH": f"{box.bin}"},
        executable=shutil.which("bash"),
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert "ERROR cannot write x.tar.gz.part: File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert_only_old_tarball(box)


@pytest.mark.parametrize("target", ["/dev/full", "/dev/null", "."])
def test_only_a_file_is_replaced(box: Box, classic: Image, target: str) -> None:
    box.hold(classic)
    assert box.fails("-o", target) == f"{target} is not a file\n"
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("closed", ["reader", "stdout", "all"])
def test_a_closed_stdout_costs_neither_file_nor_a_traceback(
    box: Box, classic: Image, closed: str
) -> None:
    box.hold(classic)
    (box.home / "state.json").write_text(json.dumps(box.state))
    shell = {"reader": '"$0" "$@" | true; exit ${PIPESTATUS[0]}', "stdout": '"$0" "$@" >&-',
             "all": '"$0" "$@" <&- >&- 2>&-'}  # fmt: skip
    done = subprocess.run(
        ["/bin/bash", "-c", shell[closed], sys.executable, str(SCRIPT)],
        cwd=box.cwd, env={"PATH": f"{box.bin}:/bin:/usr/bin", "HOME": str(box.home)},
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert done.returncode in ((0, 1) if closed == "reader" else (0,)), done.stderr
    assert box.run("--verify", "tensorrt-llm-serve-latest.tar.gz").returncode == 0


def test_a_folder_that_cannot_be_synced_is_no_failure(
    box: Box, classic: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FUSE and CIFS say EINVAL."""
    whole = os.fsync

    def fsync(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        whole(file)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    target = box.cwd / "x.tar"
    with save_image.part_of(target) as part:
        save_image.commit(part, target, {"schema": 1})
    assert box.files() == ["x.tar", "x.tar.json"]


def test_missing_directory_is_named(box: Box, classic: Image) -> None:
    box.hold(classic)
    assert box.fails("-o", "no/x.tar").startswith("no/x.tar.part: No such file or directory")


def test_image_without_a_tag_is_not_kept(box: Box) -> None:
    image = build_image("classic")
    untagged = image.tar.replace(f'["{TAG}"]'.encode(), b"null".ljust(len(TAG) + 4))
    box.hold(image._replace(tar=untagged))
    assert box.fails().startswith("the image is saved without a tag")
    assert box.files() == []


def test_what_is_no_archive_is_not_kept(box: Box, classic: Image) -> None:
    box.hold(classic._replace(tar=b"surprise" * 99999))
    assert "no manifest.json of one image" in box.fails()
    assert box.files() == []


def test_image_rebuilt_meanwhile_is_not_mixed(box: Box, image: Image) -> None:
    box.hold(image)
    box.state["rebuilt"] = image.inspected("sha256:new")
    assert "became another image" in box.fails()
    assert box.files() == []


def test_leftover_of_a_crash_is_reused(box: Box, classic: Image) -> None:
    box.hold(classic)
    (box.cwd / "x.tar.gz.part").write_bytes(b"half")
    assert box.run("-o", "x.tar.gz").returncode == 0
    assert box.run("--verify", "x.tar.gz").returncode == 0
    assert box.files() == ["x.tar.gz", "x.tar.gz.json"]


# ---- squashfs ------------------------------------------------------------------------------------

CONFIG = {"Env": ["PATH=/opt/bin:/bin", "GREETING=it's $HOME"], "WorkingDir": "/opt/my app",
          "Entrypoint": ["/opt/entry", "a b"]}  # fmt: skip
FAKE_ENROOT = """
import json, os, sys
from pathlib import Path
match sys.argv[1:]:
    case ["import", "-o", path, uri] if uri.startswith("dockerd://sha256:"):
        assert not Path(path).exists() and "zstd" in os.environ["ENROOT_SQUASH_OPTIONS"]
        Path(path).write_bytes(b"hsqs, not whole" + bytes(1000))
        if (Path(__file__).parent.parent / "full").exists():
            sys.exit("[INFO] Fetching image\\n[ERROR] No space left on device")
    case call:
        sys.exit(f"fake enroot does not know {call}")
"""


def inside(path: Path, name: str) -> bytes:
    return subprocess.run(["unsquashfs", "-cat", path, name], stdout=subprocess.PIPE).stdout


@pytest.fixture
def configured(box: Box, classic: Image) -> Box:
    box.hold(classic)
    box.state["images"][TAG]["Config"] = {**CONFIG}
    return box


@pytest.mark.parametrize("name", ["x.sqsh", "-x.sqsh"])
def test_squashfs_keeps_files_environment_and_directory(
    configured: Box, classic: Image, name: str
) -> None:
    result = configured.run(f"--output={name}")
    assert (result.returncode, result.stdout) == (0, f"{name}\n"), result.stderr
    assert configured.files() == sorted([name, f"{name}.json"])
    path = configured.cwd / name
    assert inside(path, "etc/environment") == b"PATH=/opt/bin:/bin\nGREETING=it's $HOME\n"
    assert inside(path, "opt/model") == bytes(300_000) and inside(path, "dev/console") == b""
    rc = inside(path, "etc/rc").decode()
    assert rc.startswith('cd "/opt/my app" && ') and rc.endswith("exec /opt/entry 'a b' \"$@\"\n")
    listed = subprocess.run(["unsquashfs", "-ll", path], capture_output=True, text=True).stdout
    assert "\ndrwxr-xr-x root/root" in f"\n{listed}" and "drwxrwxrwx" not in listed
    sidecar = configured.sidecar(name)
    assert sidecar["sha256"] == sha256(path.read_bytes()) and sidecar["codec"] == "sqsh"
    assert (sidecar["tags"], sidecar["config_digest"]) == ([TAG], classic.config)
    assert configured.run(f"--verify=./{name}").returncode == 0
    assert not (configured.home / "container").exists()


def test_verify_finds_a_damaged_squashfs(configured: Box) -> None:
    assert configured.run("-o", "x.sqsh").returncode == 0
    spoil(configured, "x.sqsh", flip_a_bit)
    assert configured.fails("--verify", "x.sqsh").startswith("x.sqsh: sha256 is ")
    assert configured.fails("--load", "x.sqsh").startswith("x.sqsh is not a tar, gzip or zstd file")


def test_failing_docker_export_is_blamed_and_leaves_the_old_file(configured: Box) -> None:
    (configured.cwd / "x.sqsh").write_text("old")
    configured.state["cut"] = 100_000
    error = configured.fails("-o", "x.sqsh")
    assert error.startswith("docker export save-image-") and "broken layer" in error
    assert configured.files() == ["x.sqsh"] and (configured.cwd / "x.sqsh").read_text() == "old"
    assert not (configured.home / "container").exists()


def test_missing_mksquashfs_is_named(tmp_path: Path, classic: Image) -> None:
    box = Box(tmp_path, without=("mksquashfs",))
    box.hold(classic)
    assert box.fails("--compress", "sqsh").startswith("mksquashfs is not in PATH")
    assert box.files() == [] and not (box.home / "container").exists()


def test_a_stopped_export_leaves_neither_file_nor_container(configured: Box) -> None:
    configured.state |= {"delay": PATIENCE}
    process = configured.start("-o", "x.sqsh")
    wait_for(lambda: written(configured.home / "save.pid"))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143 and "stopped by SIGTERM" in err
    assert configured.files() == [] and not (configured.home / "container").exists()


def test_a_stop_while_the_container_is_removed_lets_that_end(configured: Box) -> None:
    configured.state |= {"slow rm": 0.5}
    process = configured.start("-o", "x.sqsh")
    wait_for(lambda: written(configured.home / "rm.pid"))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143 and "stopped by SIGTERM" in err
    assert configured.files() == []
    wait_for(lambda: not (configured.home / "container").exists())


def test_enroot_writes_it_where_it_is_there(configured: Box) -> None:
    configured.program("enroot", FAKE_ENROOT)
    (configured.cwd / "x.sqsh.part.sqsh").write_text("of a save that was killed")
    assert configured.run("-o", "x.sqsh").stdout == "x.sqsh\n"
    assert configured.files() == ["x.sqsh", "x.sqsh.json"]
    assert configured.run("--verify", "x.sqsh").returncode == 0
    (configured.home / "full").touch()
    assert configured.fails("-o", "y.sqsh").startswith(
        "enroot import failed (exit status 1): [INFO]"
    )
    assert configured.files() == ["x.sqsh", "x.sqsh.json"]


def test_enroot_is_not_asked_for_an_image_without_a_command(configured: Box) -> None:
    """`docker create IMAGE`, as it calls it, fails: No command specified."""
    configured.program("enroot", "raise SystemExit('No command specified')")
    del configured.state["images"][TAG]["Config"]["Entrypoint"]
    assert configured.run("-o", "x.sqsh").returncode == 0


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def written(path: Path) -> bool:
    """A file is there before it holds anything."""
    return path.exists() and path.stat().st_size > 0


def assert_gone(pid_file: Path) -> None:
    """It is killed; on a busy machine the kernel takes a moment to be done with it."""
    process = Path("/proc", pid_file.read_text())
    assert comes_true(lambda: not process.exists(), PATIENCE)


@pytest.fixture
def slow(box: Box, classic: Image) -> Iterator[subprocess.Popen[str]]:
    """A save in the middle of its work, until it may go on."""
    box.hold(classic)
    box.state["held"] = True
    with_old_tarball(box)
    with box.start("-o", "x.tar.gz") as process:
        wait_for(lambda: written(box.home / "save.pid"))
        wait_for((box.cwd / "x.tar.gz.part").exists)
        yield process
        process.kill()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_save_leaves_nothing(
    box: Box, slow: subprocess.Popen[str], signum: signal.Signals
) -> None:
    slow.send_signal(signum)
    _, err = slow.communicate(timeout=PATIENCE)
    assert slow.returncode == 128 + signum
    assert err.endswith(f"stopped by {signum.name}\n") and "Traceback" not in err
    assert_only_old_tarball(box)
    assert_gone(box.home / "save.pid")


def test_two_saves_to_one_file_do_not_mix(box: Box, slow: subprocess.Popen[str]) -> None:
    assert box.fails("-o", "x.tar.gz").startswith("another save to x.tar.gz is running")
    (box.home / "go on").touch()
    assert slow.communicate(timeout=PATIENCE)[0] == "x.tar.gz\n"
    assert box.run("--verify", "x.tar.gz").returncode == 0
    assert box.files() == ["x.tar.gz", "x.tar.gz.json"]


def test_progress_is_live_on_a_terminal(box: Box, classic: Image) -> None:
    box.hold(classic)
    box.state["delay"] = 0.02
    terminal, end = pty.openpty()
    with box.start("-o", "x.tar.zst", stderr=end) as process:
        assert process.stdout and process.stdout.read() == "x.tar.zst\n"
    os.close(end)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert "\rsaved " in shown and " s left" in shown and "\x1b" not in shown


# ---- verify --------------------------------------------------------------------------------------


def test_verify_accepts_what_save_wrote(box: Box, copy: str) -> None:
    result = box.run("--verify", copy)
    assert (result.returncode, result.stdout) == (0, f"{copy}\n")


@pytest.mark.parametrize("edit", [cut_short, flip_a_bit])
def test_verify_finds_damage(box: Box, copy: str, edit: Callable[[bytearray], object]) -> None:
    spoil(box, copy, edit)
    assert box.fails("--verify", copy).count("\n") == 1


@pytest.mark.parametrize("saved", ["zst"], indirect=True)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sha256": "0" * 64}, "sha256 is"),
        ({"tags": ["other:1"]}, "tags is"),
        ({"config_digest": "sha256:0"}, "config_digest is"),
        ({"codec": "br"}, "codec is"),
        ({"packed_bytes": 12}, "its sidecar says 12"),
    ],
)
def test_verify_finds_a_lying_sidecar(
    box: Box, copy: str, values: dict[str, object], message: str
) -> None:
    box.edit(copy, **values)
    assert message in box.fails("--verify", copy)


GARBAGE = [
    b"",
    b"\xff\xfe",
    b"[]",
    b"3",
    b"{}",
    b'{"schema": 2}',
    b"[" * 100_000,
    b" " * (17 << 20),
]


@pytest.mark.parametrize("text", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_no_sidecar(box: Box, text: bytes) -> None:
    (box.cwd / "x.tar").write_bytes(tar_of({}))
    (box.cwd / "x.tar.json").write_bytes(text)
    assert box.fails("--verify", "x.tar").startswith("the sidecar x.tar.json ")


@pytest.mark.parametrize("value", [None, True, "1", 1.5, [1], {}])
@pytest.mark.parametrize("key", save_image.SIDECAR)
def test_sidecar_of_wrong_types_is_refused(key: str, value: object) -> None:
    good: dict[str, object] = dict.fromkeys(save_image.SIDECAR, "text")
    good |= {"schema": 1, "tags": [], "diff_ids": [], "unpacked_bytes": 1, "packed_bytes": 1}
    assert save_image.parse_sidecar(json.dumps(good).encode()) == good
    if type(value) in save_image.SIDECAR[key] and value != [1]:
        return
    with pytest.raises(ValueError):
        save_image.parse_sidecar(json.dumps(good | {key: value}).encode())


def test_verify_needs_a_sidecar_and_a_tarball(box: Box, classic: Image) -> None:
    assert box.fails("--verify", "x.tar").startswith("x.tar: No such file or directory")
    (box.cwd / "x.tar").write_bytes(classic.tar)
    assert box.fails("--verify", "x.tar").startswith("x.tar has no sidecar x.tar.json")


# ---- load ----------------------------------------------------------------------------------------


def test_load_prints_the_tag(box: Box, copy: str) -> None:
    result = box.run("--load", copy)
    assert (result.returncode, result.stdout) == (0, f"{TAG}\n"), result.stderr
    assert box.calls() == [["load", "--quiet"], ["image", "inspect", "--", TAG]]


@pytest.mark.parametrize("saved", ["zst"], indirect=True)
def test_load_without_sidecar_says_so(box: Box, copy: str) -> None:
    (box.cwd / f"{copy}.json").unlink()
    result = box.run("--load", copy)
    assert (result.returncode, result.stdout) == (0, f"{TAG}\n")
    assert "is not checked" in result.stderr


LAST_WORDS = {
    "image.tar.gz": f"{'pigz' if shutil.which('pigz') else 'gzip'} failed (exit status 1): ",
    "image.tar.zst": "zstd failed (exit status 1): ",
    "image.tar": "docker load failed (exit status 1): Error processing tar file",
}


def test_load_of_a_truncated_file_names_the_cause(box: Box, copy: str) -> None:
    spoil(box, copy, cut_short)
    assert "its sidecar says" in box.fails("--load", copy)
    (box.cwd / f"{copy}.json").unlink()
    assert box.fails("--load", copy).startswith(LAST_WORDS[copy])
    assert json.loads((box.home / "state.json").read_text())["images"] == {}


@pytest.mark.parametrize("saved", ["zst"], indirect=True)
def test_load_that_docker_refuses_says_why(box: Box, copy: str) -> None:
    box.state["full"] = True
    expected = "docker load failed (exit status 1): no space left on device\n"
    assert box.fails("--load", copy) == expected


@pytest.mark.parametrize("store", ["classic", "containerd"])
def test_load_accepts_the_id_of_either_store(box: Box, store: str) -> None:
    image = build_image("oci")
    box.hold(image)
    box.run("-o", "x.tar.gz")
    assert image.manifest
    box.state["loads"] = image.inspected(image.config if store == "classic" else image.manifest)
    assert box.run("--load", "x.tar.gz").returncode == 0


@pytest.mark.parametrize("saved", ["zst"], indirect=True)
def test_load_into_containerd_of_a_classic_archive_is_known_by_its_layers(
    box: Box, copy: str, classic: Image
) -> None:
    box.state["loads"] = classic.inspected("sha256:made-up")
    assert box.run("--load", copy).returncode == 0
    box.state["loads"] = classic._replace(layers=["sha256:other"]).inspected("sha256:made-up")
    assert "is sha256:made-up after loading" in box.fails("--load", copy)


@pytest.mark.parametrize("saved", ["zst"], indirect=True)
def test_stopped_load_ends_docker_load(box: Box, copy: str) -> None:
    box.state["delay"] = 600
    with box.start("--load", copy) as process:
        wait_for(lambda: written(box.home / "load.pid"))
        process.terminate()
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert_gone(box.home / "load.pid")


def test_load_refuses_what_is_no_tarball(box: Box) -> None:
    (box.cwd / "x.tar.gz").write_bytes(b"PK\x03\x04")
    assert box.fails("--load", "x.tar.gz") == "x.tar.gz is not a tar, gzip or zstd file\n"


# ---- command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["--load", "a", "--verify", "b"],
        ["image", "--load", "a"],
        ["--compress", "zst", "-o", "a.tar.gz"],
        ["--compress", "bz2"],
        ["-o", "a.tar.xz"],  # and not gzip under that name
        ["--compress", "gz", "-o", "a.tbz2"],
        ["a", "b"],
        ["--comp", "gz"],
    ],
)
def test_usage_errors_exit_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        save_image.main(args)
    assert stopped.value.code == 2
    assert "usage: " in capsys.readouterr().err


def test_help_needs_nothing(box: Box) -> None:
    (box.bin / "docker").unlink()
    result = box.run("--help")
    assert result.returncode == 0 and "--verify FILE" in result.stdout and result.stderr == ""
