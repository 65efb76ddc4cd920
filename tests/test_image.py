"""Which image is meant, what a tarball holds, and how it gets onto a node."""

from __future__ import annotations

import bz2
import fcntl
import json
import lzma
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from common.talk import Failure
from launch import provide
from launch.image import Image, find_image, is_pulled_anew, read_tarball
from launch.node import messages
from launch.node.messages import Error, Present, Progress, Waiting
from launch.nodes import Place
from launch.provide import password_command
from tests.conftest import HOSTILE, TAG, Fakes, Script, archive, config_digest, packed, wait_until

pytestmark = pytest.mark.usefixtures("clean_environment")

HERE = Place("local1", 1, ())
DIGEST = "@sha256:" + "0" * 64
ECR = "123456789012.dkr.ecr.us-west-2.amazonaws.com"
SUFFIX = {"none": ".tar", "gz": ".tar.gz", "zst": ".tar.zst"}


@pytest.mark.parametrize(
    ("asked", "registry"),
    [
        ("nvcr.io/nvidia/tensorrt-llm/release:1.1.0", "nvcr.io"),
        ("nvcr.io/x" + DIGEST, "nvcr.io"),
        ("localhost/x", "localhost"),
        ("localhost:5000/x:1", "localhost:5000"),
        ("registry:5000/x", "registry:5000"),
        ("10.0.0.1:5000/a/b:c", "10.0.0.1:5000"),
        ("[::1]:5000/a", "[::1]:5000"),
        (f"{ECR}/a/b:c", ECR),
        ("tensorrt-llm-serve:latest", ""),
        ("tensorrt-llm-serve:1.1.0", ""),
        ("mine:1.0" + DIGEST, ""),
        ("team/mine", ""),
        ("team/mine:1.0", ""),
        ("tar", ""),
        ("mine.tar:1", ""),
        ("sha256:" + "0" * 64, ""),
    ],
)
def test_what_is_no_path_is_a_registry_reference_or_a_tag(
    tmp_path: Path, asked: str, registry: str
) -> None:
    assert find_image(asked, tmp_path) == Image(asked, registry=registry)


@pytest.mark.parametrize(
    "asked",
    [
        "x.tar",
        "x.tar.gz",
        "x.tgz",
        "x.tar.zst",
        "x.tar.xz",
        "nvcr.io/x.tar",
        "/x",
        "./x",
        "../x",
        "~/x",
        "/",
        *(f"./{name}" for name in HOSTILE),
        "./" + "n" * 300,
        "~no-such-user/x",
    ],
)
def test_what_is_a_path_has_to_be_a_file(tmp_path: Path, asked: str) -> None:
    with pytest.raises(Failure, match=r"image tarball") as failure:
        find_image(asked, tmp_path)
    assert failure.value.hint == "" or "make" in failure.value.hint


PIN = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize("name", [f"a/b@{PIN}", f"a:1@{PIN}", PIN, f"r.io:5000/a@{PIN}"])
def test_an_image_can_be_pinned_by_its_digest(tmp_path: Path, name: str) -> None:
    """And is not pulled anew where it is: a digest does not move."""
    found = find_image(name, tmp_path)
    assert (found.tag, found.tarball) == (name, None)
    assert not is_pulled_anew(found, {"sha256:x"})


@pytest.mark.parametrize("name", HOSTILE)
def test_what_docker_might_take_for_something_else_is_no_reference(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(Failure, match="neither a tarball nor the name of an image"):
        find_image(name, tmp_path)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_tarball_of_any_name_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.tar"
    path.write_bytes(archive())
    assert find_image(str(path), tmp_path).tarball == path
    assert find_image(os.path.relpath(path), tmp_path).tag == TAG


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.tar").write_bytes(archive())
    assert find_image("~/x.tar", tmp_path).tarball == tmp_path / "x.tar"


def test_without_a_word_the_newest_tarball_of_the_workspace_is_meant(tmp_path: Path) -> None:
    assert find_image("", tmp_path) == Image(TAG)
    for age, codec in enumerate(["zst", "gz", "none"]):
        path = tmp_path / f"tensorrt-llm-serve-latest{SUFFIX[codec]}"
        path.write_bytes(packed(archive(), codec))
        os.utime(path, (1e9 - age, 1e9 - age))
    assert find_image("", tmp_path).codec == "zst"
    os.utime(tmp_path / "tensorrt-llm-serve-latest.tar.gz", (2e9, 2e9))
    assert find_image("", tmp_path).codec == "gz"
    (tmp_path / "tensorrt-llm-serve-latest.tgz").mkdir()
    assert find_image("", tmp_path).codec == "gz"


@pytest.mark.parametrize(
    ("host", "region"),
    [
        (ECR, "us-west-2"),
        ("1.dkr.ecr-fips.us-gov-west-1.amazonaws.com", "us-gov-west-1"),
        ("1.dkr.ecr.cn-north-1.amazonaws.com.cn", "cn-north-1"),
        ("public.ecr.aws", ""),
        ("1.dkr.ecr.us-west-2.amazonaws.com.evil.org", ""),
        ("x.dkr.ecr.us-west-2.amazonaws.com", ""),
        ("1.dkr.ecr.us-west-2;id.amazonaws.com", ""),
        ("1xdkr.ecr.us-west-2.amazonaws.com", ""),
        ("", ""),
    ],
)
def test_only_an_ecr_host_needs_its_password(host: str, region: str) -> None:
    command = ["aws", "ecr", "get-login-password", "--region", region] if region else []
    assert password_command(Image("x", registry=host)) == command


# Whether a node has it


IDS = ("sha256:config", "sha256:manifest")


@pytest.mark.parametrize(
    ("ids", "layers", "identity", "shown", "store", "held"),
    [
        ((), "", "", "", "", False),
        ((), "", "sha256:any", "", "", True),
        (IDS, "", "sha256:config", "", "overlay2", True),
        (IDS, "", "sha256:manifest", "", "io.containerd", True),
        (IDS, "", "sha256:other", '["a"]', "io.containerd", False),
        (IDS, "", "", "", "", False),
        (IDS[:1], '["a"]', "sha256:other", '["a"]', "driver-type io.containerd", True),
        (IDS[:1], '["a"]', "sha256:other", '["b"]', "driver-type io.containerd", False),
        (IDS[:1], '["a"]', "sha256:other", '["a"]', "overlay2", False),
        (IDS[:1], '["a"]', "sha256:config", "", "overlay2", True),
        (IDS[:1], "", "sha256:other", "", "driver-type io.containerd", False),
        (IDS[:1], '["a"]', "", '["a"]', "driver-type io.containerd", False),
    ],
)
def test_an_image_is_held_by_id_or_where_the_id_is_unknown_by_layers(
    ids: tuple[str, ...], layers: str, identity: str, shown: str, store: str, held: bool
) -> None:
    assert Image("t", ids=ids, layers=layers).is_held(identity, shown, store) is held


@pytest.mark.parametrize(
    ("tag", "registry", "identities", "anew"),
    [
        ("r.io/x:latest", "r.io", {"a"}, True),
        ("r.io/x", "r.io", {"a"}, True),
        ("r.io:5000/x", "r.io:5000", {"a"}, True),
        ("r.io/x:1.0", "r.io", {"a"}, False),
        ("r.io/x:1.0", "r.io", {"a", "b"}, True),
        ("r.io:5000/x:1", "r.io:5000", {"a"}, False),
        ("r.io/x" + DIGEST, "r.io", {"a"}, False),
        ("r.io/x:latest" + DIGEST, "r.io", {"a"}, False),
        ("x:latest", "", {"a"}, False),
        ("x:latest", "", {"a", "b"}, False),
    ],
)
def test_a_moving_tag_is_asked_for_again(
    tag: str, registry: str, identities: set[str], anew: bool
) -> None:
    assert is_pulled_anew(Image(tag, registry=registry), identities) is anew


@pytest.mark.parametrize(("packed_size", "unpacked", "room"), [(0, 0, 0), (5, 0, 10), (5, 20, 40)])
def test_a_node_needs_room_for_the_tar_and_the_layers(
    packed_size: int, unpacked: int, room: int
) -> None:
    assert Image("t", packed=packed_size, unpacked=unpacked).room == room


# What a tarball holds


@pytest.fixture
def tarball(tmp_path: Path) -> Path:
    path = tmp_path / "x.tar"
    path.write_bytes(archive("inside:1"))
    return path


def sidecar(tarball: Path, **changes: Any) -> Path:
    data = {
        "tags": ["beside:1", "beside:2"],
        "config_digest": "sha256:c",
        "manifest_digest": "sha256:m",
        "diff_ids": ["sha256:a", "sha256:b"],
        "packed_bytes": tarball.stat().st_size,
        "unpacked_bytes": 1000,
        **changes,
    }
    path = Path(f"{tarball}.json")
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
    return path


def test_a_sidecar_spares_reading_the_tarball(tarball: Path) -> None:
    size = tarball.stat().st_size
    sidecar(tarball)
    full = Image("beside:1", tarball, "none", ("sha256:c", "sha256:m"), "", size, 1000)
    assert read_tarball(tarball) == full
    sidecar(tarball, manifest_digest=None)
    layers = '["sha256:a","sha256:b"]'
    assert read_tarball(tarball) == Image(
        "beside:1", tarball, "none", ("sha256:c",), layers, size, 1000
    )


WRONG: list[Any] = [..., None, 5, -5, 1.5, True, "text", "", [], [None], {}, {"a": 1}, [[]]]


@pytest.mark.parametrize("key", ["tags", "packed_bytes", "unpacked_bytes", "diff_ids"])
@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_a_wrong_field_means_reading_the_tarball(tarball: Path, key: str, wrong: Any) -> None:
    """Or it means as much as before; never another image, nor a crash."""
    sidecar(tarball, **{key: wrong})
    found = read_tarball(tarball)
    assert found.tag in ("inside:1", "beside:1")
    assert found.packed == tarball.stat().st_size
    assert isinstance(found.unpacked, int) and found.unpacked >= 0


@pytest.mark.parametrize("wrong", [5, True, {}, {"a": 1}, [1], ["sha256:x"]], ids=repr)
@pytest.mark.parametrize("key", ["config_digest", "manifest_digest"])
def test_a_wrong_digest_means_reading_the_tarball(tarball: Path, key: str, wrong: Any) -> None:
    sidecar(tarball, **{key: wrong})
    found = read_tarball(tarball)
    assert all(isinstance(each, str) for each in found.ids)
    if wrong:
        assert found.tag == "inside:1"


def test_a_sidecar_without_any_digest_is_not_believed(tarball: Path) -> None:
    sidecar(tarball, config_digest=None, manifest_digest="")
    assert read_tarball(tarball).tag == "inside:1"


@pytest.mark.parametrize("size", [1, 1e400, float("nan")])
def test_a_sidecar_of_another_tarball_is_not_believed(
    tarball: Path, size: float, capfd: pytest.CaptureFixture[str]
) -> None:
    sidecar(tarball, packed_bytes=size)
    assert read_tarball(tarball).tag == "inside:1"
    assert "x.tar.json" in capfd.readouterr().err


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"5", b'"text"', b"\xff\xfe"])
def test_a_garbage_sidecar_means_reading_the_tarball(tarball: Path, text: bytes) -> None:
    Path(f"{tarball}.json").write_bytes(text)
    assert read_tarball(tarball).tag == "inside:1"


def test_a_directory_in_the_sidecars_place_means_reading_the_tarball(tarball: Path) -> None:
    Path(f"{tarball}.json").mkdir()
    assert read_tarball(tarball).tag == "inside:1"


@pytest.mark.parametrize("codec", SUFFIX)
@pytest.mark.parametrize("oci", [False, True])
def test_a_bare_tarball_tells_its_tag_and_id(tmp_path: Path, codec: str, oci: bool) -> None:
    data = archive("team/x:1", oci=oci)
    path = tmp_path / "misnamed.tar"
    path.write_bytes(packed(data, codec))
    found, size = read_tarball(path), path.stat().st_size
    ids, layers = (config_digest(data),), '["sha256:1"]'
    assert found == Image("team/x:1", path, codec, ids, layers, size, found.unpacked)
    assert 200_000 < found.unpacked < len(data)


def test_what_a_containerd_store_calls_it_is_read_too(tmp_path: Path) -> None:
    """Docker 25 and newer write an index.json; its manifest's digest is the id in such a store."""
    index = {"manifests": [{"digest": "sha256:m", "mediaType": "x"}]}
    data = archive(oci=True, index=index)
    (tmp_path / "x.tar").write_bytes(data)
    found = read_tarball(tmp_path / "x.tar")
    assert found.ids == (config_digest(data), "sha256:m")
    assert (found.layers, found.diff_ids) == ("", '["sha256:1"]')


READING = "reading it to find its tag"


@pytest.mark.parametrize("beside", [True, False])
def test_a_tarball_without_a_sidecar_is_read_once(
    tmp_path: Path,
    beside: bool,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was learnt is kept beside it, or in the user's cache, and only for this very file."""
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}/cache")
    folder = tmp_path / "images"
    folder.mkdir()
    path = folder / "x.tar"
    path.write_bytes(archive("a:1"))
    note = folder / "x.tar.learnt.json"
    if not beside:
        note.mkdir()  # as good as a directory that is not ours to write to, also for root
    first = read_tarball(path)
    assert READING in capfd.readouterr().err
    assert note.is_file() == beside
    assert len(list(tmp_path.glob("cache/*/*"))) == (not beside)
    assert read_tarball(path) == first and read_tarball(path).diff_ids == first.diff_ids
    assert capfd.readouterr().err == ""
    path.write_bytes(archive("b:1"))
    os.utime(path, ns=(1, 1))
    assert read_tarball(path).tag == "b:1"
    assert READING in capfd.readouterr().err
    assert read_tarball(path).tag == "b:1"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("spoil", ["garbage", "another file", "somebody else's"])
def test_what_was_learnt_is_believed_only_of_this_file_and_from_us(
    tmp_path: Path, spoil: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}/cache")
    path, note = tmp_path / "x.tar", tmp_path / "x.tar.learnt.json"
    path.write_bytes(archive("a:1"))
    read_tarball(path)
    text = note.read_text().replace("a:1", "evil:1")
    note.write_text(
        {"garbage": "[", "another file": text.replace("x.tar", "y.tar")}.get(spoil, text)
    )
    if spoil == "somebody else's":
        if os.geteuid():
            pytest.skip("only root can give a file away")
        os.chown(note, 12345, -1)
    assert read_tarball(path).tag == "a:1"


def test_every_suffix_that_save_image_writes_names_a_tarball(tmp_path: Path) -> None:
    for suffix in (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst"):
        with pytest.raises(Failure, match=r"the image tarball .* does not exist"):
            find_image(f"x{suffix}", tmp_path)
    with pytest.raises(Failure, match=f"the image tarball {tmp_path} is not a file"):
        find_image(str(tmp_path), tmp_path)


@pytest.mark.parametrize("codec", SUFFIX)
@pytest.mark.parametrize("spoil", ["half", "few", "garbage", "empty"])
def test_a_spoiled_tarball_is_told_in_a_sentence(tmp_path: Path, codec: str, spoil: str) -> None:
    data = packed(archive(), codec)
    path = tmp_path / f"x{SUFFIX[codec]}"
    spoiled = {
        "half": data[: len(data) // 2],
        "few": data[:20],
        "garbage": data[:4] + os.urandom(5000),
        "empty": b"",
    }
    path.write_bytes(spoiled[spoil])
    with pytest.raises(Failure, match=r"is truncated or corrupt: .") as failure:
        read_tarball(path)
    assert "\n" not in failure.value.message
    assert "make save" in failure.value.hint


@pytest.mark.parametrize(
    "manifest", [None, 5, "x", {"a": 1}, [], [5], [None], [{}], [[]]], ids=repr
)
def test_a_tar_that_no_docker_made_is_told(tmp_path: Path, manifest: object) -> None:
    (tmp_path / "x.tar").write_bytes(archive(manifest=manifest))
    with pytest.raises(Failure, match=r"names no tag|truncated or corrupt"):
        read_tarball(tmp_path / "x.tar")


@pytest.mark.parametrize(
    "entry",
    [
        {"Config": "a.json", "RepoTags": None},
        {"Config": "a.json", "RepoTags": []},
        {"Config": "a.json"},
        {"RepoTags": ["a:1"]},
        {"Config": 5, "RepoTags": ["a:1"]},
        {"Config": None, "RepoTags": ["a:1"]},
        {"Config": "a.json", "RepoTags": [5]},
        {"Config": "a.json", "RepoTags": [None]},
    ],
    ids=repr,
)
def test_an_image_saved_without_its_tag_is_told(tmp_path: Path, entry: Mapping[str, Any]) -> None:
    (tmp_path / "x.tar").write_bytes(archive(manifest=[entry]))
    with pytest.raises(Failure, match="names no tag"):
        read_tarball(tmp_path / "x.tar")


def test_a_codec_that_this_machine_cannot_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for codec in ("gz", "zst"):
        (tmp_path / f"x{SUFFIX[codec]}").write_bytes(packed(archive(), codec))
    monkeypatch.setenv("PATH", str(tmp_path))
    for codec, program in (("gz", "gzip"), ("zst", "zstd")):
        with pytest.raises(Failure, match=f"{program}: not found in PATH"):
            read_tarball(tmp_path / f"x{SUFFIX[codec]}")


@pytest.mark.parametrize(("program", "module"), [("xz", lzma), ("bzip2", bz2)])
def test_what_docker_itself_can_unpack_is_a_tarball_too(
    tmp_path: Path, program: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its bytes, whatever it is called: a file that is there is no tag."""
    monkeypatch.chdir(tmp_path)
    Path("mine").write_bytes(module.compress(archive()))
    fake = f"import {module.__name__} as m, sys; assert sys.argv[1:] == ['-dc']"
    unpack = "sys.stdout.buffer.write(m.open(sys.stdin.buffer).read())"
    Path(program).write_text(f"#!{sys.executable} -S\n{fake}\n{unpack}\n")
    Path(program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = find_image("mine", tmp_path)
    assert (found.tarball, found.tag) == (tmp_path / "mine", TAG)


def test_reading_leaves_no_process(fakes: Fakes, tmp_path: Path) -> None:
    os.environ.update(fakes.environment())
    path = tmp_path / "x.tar.gz"
    path.write_bytes(packed(archive(), "gz"))
    read_tarball(path)
    wait_until(lambda: not fakes.processes(), "the end of what unpacked it")


# The orders that a node is given


@pytest.fixture(params=SUFFIX)
def codec(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def image_file(path: Path, codec: str = "gz", data: bytes | None = None) -> Image:
    data = archive() if data is None else data
    path.write_bytes(packed(data, codec))
    return Image(TAG, path, codec, (config_digest(data),), packed=path.stat().st_size)


def load(script: Callable[..., Script], found: Image, **env: str) -> Script:
    return script(provide.provide_command(found, HERE), **env)


def told(script: Script, kind: type) -> list[Any]:
    """The fields of the messages of that kind; of one with a single field its value."""
    values = [tuple(vars(each).values()) for each in script.told if isinstance(each, kind)]
    return [value[0] if len(value) == 1 else value for value in values]


def test_a_tarball_is_loaded(
    fakes: Fakes, script: Callable[..., Script], tmp_path: Path, codec: str
) -> None:
    found = image_file(tmp_path / "a b's $x", codec)
    loading = load(script, found)
    assert loading.code() == 0
    assert told(loading, Present) == list(found.ids)
    assert fakes.images() == {TAG: found.ids[0]}
    fakes.nothing_is_left()


def test_a_warning_of_dockers_client_is_no_part_of_its_answer(
    fakes: Fakes, script: Callable[..., Script], tmp_path: Path
) -> None:
    """Where sudo has left a ~/.docker/config.json that is root's, each command prints one."""
    fakes.set(warns=True)
    found = image_file(tmp_path / "x")
    loading = load(script, found)
    assert (loading.code(), told(loading, Present)) == (0, list(found.ids)), loading.output
    pulling = load(script, PUBLIC)
    assert (pulling.code(), told(pulling, Present)) == (0, ["sha256:abc"])


def test_gzip_does_where_there_is_no_pigz(
    fakes: Fakes, script: Callable[..., Script], tmp_path: Path
) -> None:
    (fakes.home / "tools/pigz").unlink(missing_ok=True)
    loading = load(script, image_file(tmp_path / "x"))
    assert (loading.code(), len(fakes.images())) == (0, 1)


def test_an_image_that_is_known_is_not_loaded(
    fakes: Fakes, script: Callable[..., Script], tmp_path: Path
) -> None:
    found = image_file(tmp_path / "x")
    fakes.hold_image(identity=found.ids[0])
    loading = load(script, found)
    assert loading.code() == 0
    assert told(loading, Present) == list(found.ids)
    assert fakes.calls("docker", "load") == []


@pytest.mark.parametrize(("store", "loads"), [("io.containerd", 0), ("overlay2", 1)])
def test_layers_tell_an_image_only_in_a_containerd_store(
    fakes: Fakes, script: Callable[..., Script], tmp_path: Path, store: str, loads: int
) -> None:
    data = archive()
    (tmp_path / "x").write_bytes(data)
    found = Image(TAG, tmp_path / "x", "none", (config_digest(data),), '["sha256:1"]')
    fakes.set(store=f"[[driver-type {store}]]")
    fakes.hold_image(identity="sha256:other", layers=["sha256:1"])
    assert load(script, found).code() == 0
    assert len(fakes.calls("docker", "load")) == loads


def test_another_image_of_that_tag_is_replaced(
    fakes: Fakes, script: Callable[..., Script], tmp_path: Path
) -> None:
    found = image_file(tmp_path / "x")
    fakes.hold_image(identity="sha256:old")
    assert load(script, found).code() == 0
    assert fakes.images() == {TAG: found.ids[0]}


def test_a_docker_that_needs_no_more_of_the_tarball_has_loaded_it(
    fakes: Fakes, script: Callable[..., Script], tmp_path: Path
) -> None:
    data = archive()
    fakes.set(reads=len(data))
    loading = load(script, image_file(tmp_path / "x", "none", data + bytes(4_000_000)))
    assert (loading.code(), told(loading, Error)) == (0, [])


def test_what_turns_out_to_be_another_image_is_an_error(
    fakes: Fakes, script: Callable[..., Script], tmp_path: Path
) -> None:
    fakes.set(loads="sha256:other")
    loading = load(script, image_file(tmp_path / "x"))
    assert loading.code() == 1
    assert "is not the image that it should hold" in told(loading, Error)[0]


@pytest.mark.parametrize(("store", "code"), [("io.containerd", 0), ("overlay2", 1)])
def test_a_containerd_store_may_call_it_by_an_id_that_nobody_told_us(
    fakes: Fakes, script: Callable[..., Script], tmp_path: Path, store: str, code: int
) -> None:
    """What has just been loaded is known by its layers; before, an id that is known decides."""
    found = replace(image_file(tmp_path / "x"), diff_ids='["sha256:1"]')
    fakes.set(loads="sha256:other", layers=["sha256:1"], store=f"[[driver-type {store}]]")
    fakes.hold_image(identity="sha256:old", layers=["sha256:1"])
    loading = load(script, found)
    assert loading.code() == code
    assert len(fakes.calls("docker", "load")) == 1
    assert told(loading, Present) == ["sha256:other"] * (not code)


def test_another_file_by_that_path_on_a_node_is_told(
    fakes: Fakes, script: Callable[..., Script], tmp_path: Path
) -> None:
    found = image_file(tmp_path / "x")
    loading = load(script, replace(found, packed=found.packed + 1))
    assert loading.code() == 1
    assert (
        f"{tmp_path}/x is another file on this node: the launcher's has" in told(loading, Error)[0]
    )
    assert fakes.calls("docker", "load") == []


def test_a_load_that_fails_is_told_in_dockers_words(
    fakes: Fakes, script: Callable[..., Script], tmp_path: Path, codec: str
) -> None:
    fakes.set(full=True)
    big = archive(manifest=[{"Config": "x.json", "RepoTags": [TAG], "Layers": []}])
    loading = load(script, image_file(tmp_path / "x", codec, big * 3))
    assert loading.code() == 1
    assert told(loading, Error) == ["docker load: write /layer.tar: no space left on device"]
    fakes.nothing_is_left()


@pytest.mark.parametrize("codec", ["gz", "zst"])
@pytest.mark.parametrize("spoil", ["end", "most", "start", "middle"])
def test_a_tarball_that_does_not_unpack_is_blamed(
    fakes: Fakes, script: Callable[..., Script], tmp_path: Path, codec: str, spoil: str
) -> None:
    found = image_file(tmp_path / "x", codec)
    assert found.tarball
    data = found.tarball.read_bytes()
    middle = data[:100_000] + os.urandom(2000) + data[102_000:]  # only the checksum tells
    spoiled = {"end": data[:-3000], "most": data[:10], "start": data[5:], "middle": middle}
    found.tarball.write_bytes(spoiled[spoil])
    loading = load(script, replace(found, packed=0))
    assert loading.code() == 1
    assert f"{tmp_path}/x is truncated or corrupt: " in told(loading, Error)[0]
    if spoil != "middle":
        assert fakes.images() == {}
    fakes.nothing_is_left()


def test_a_truncated_plain_tar_is_an_error_of_docker(
    fakes: Fakes, script: Callable[..., Script], tmp_path: Path
) -> None:
    found = image_file(tmp_path / "x", "none")
    assert found.tarball
    found.tarball.write_bytes(found.tarball.read_bytes()[:100_000])
    loading = load(script, replace(found, packed=0))
    assert loading.code() == 1
    assert "unexpected EOF" in told(loading, Error)[0]


def test_a_tarball_that_the_node_does_not_see_is_told(
    fakes: Fakes, script: Callable[..., Script], tmp_path: Path
) -> None:
    loading = load(script, Image(TAG, tmp_path / "it's not", "gz", ("sha256:x",)))
    assert loading.code() == 1
    why = f"cannot read {tmp_path}/it's not: No such file or directory"
    assert told(loading, Error) == [why]
    fakes.nothing_is_left()


def test_progress_is_told_and_the_end_of_input_kills_the_load(
    fakes: Fakes, script: Callable[..., Script], tmp_path: Path
) -> None:
    fakes.set(load_delay=600)
    loading = load(script, image_file(tmp_path / "x"))
    loading.until(lambda: told(loading, Progress))
    assert 0 < told(loading, Progress)[0] <= (tmp_path / "x").stat().st_size
    loading.close()
    assert loading.code() == 143
    assert fakes.images() == {}
    fakes.nothing_is_left()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_kills_the_load(
    fakes: Fakes, script: Callable[..., Script], tmp_path: Path, signum: int
) -> None:
    fakes.set(load_delay=600)
    loading = load(script, image_file(tmp_path / "x"))
    loading.until(lambda: fakes.calls("docker", "load"))
    loading.process.send_signal(signum)
    assert loading.code() == 143
    loading.close()
    fakes.nothing_is_left()


@pytest.mark.parametrize("proceed", [True, False])
def test_loads_on_a_node_wait_for_each_other(
    fakes: Fakes, script: Callable[..., Script], tmp_path: Path, proceed: bool
) -> None:
    found = image_file(tmp_path / "x")
    lock = os.open("/run", os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        loading = load(script, found)
        loading.until(lambda: told(loading, Waiting))
        assert fakes.calls("docker", "load") == []
        if not proceed:
            loading.close()
            assert loading.code() == 143
            fakes.nothing_is_left()
            return
    finally:
        os.close(lock)
    assert loading.code() == 0
    assert fakes.images() == {TAG: found.ids[0]}


PUBLIC = Image("nvcr.io/x:1", registry="nvcr.io")
PRIVATE = Image(f"{ECR}/x:1", registry=ECR)
PASSWORD = "pass word$(id)'"


def test_an_image_is_pulled(fakes: Fakes, script: Callable[..., Script]) -> None:
    pulling = load(script, PUBLIC)
    assert pulling.code() == 0
    assert told(pulling, Present) == ["sha256:abc"]
    assert fakes.calls("docker", "login") == []
    fakes.nothing_is_left()


def test_a_pull_that_fails_is_told(fakes: Fakes, script: Callable[..., Script]) -> None:
    fakes.set(no_manifest=True)
    pulling = load(script, PUBLIC)
    assert pulling.code() == 1
    assert "docker pull nvcr.io/x:1: Error response" in told(pulling, Error)[0]
    assert "manifest unknown" in told(pulling, Error)[0]
    fakes.nothing_is_left()


def test_the_end_of_input_kills_a_pull(fakes: Fakes, script: Callable[..., Script]) -> None:
    fakes.set(pull_delay=600)
    pulling = load(script, PUBLIC)
    pulling.until(lambda: fakes.calls("docker", "pull"))
    pulling.close()
    assert pulling.code() == 143
    fakes.nothing_is_left()


def log_in(fakes: Fakes, script: Callable[..., Script], **faults: Any) -> Script:
    fakes.set(**faults)
    pulling = load(script, PRIVATE)
    pulling.type(PASSWORD + "\n")
    return pulling


@pytest.mark.parametrize("faults", [{}, {"no_manifest": True}, {"denied": True}], ids=repr)
def test_a_password_is_in_no_argument_and_in_no_file_that_stays(
    fakes: Fakes, script: Callable[..., Script], faults: dict[str, Any]
) -> None:
    pulling = log_in(fakes, script, **faults)
    assert pulling.code() == (1 if faults else 0), pulling.output
    login = (fakes.home / "login").read_text()
    assert login.startswith(f"{ECR} {PASSWORD} {fakes.temporary}/")
    assert list(fakes.temporary.iterdir()) == []
    assert "pass word" not in json.dumps(fakes.calls()) + pulling.output
    assert (fakes.calls("docker", "pull") == []) is ("denied" in faults)
    fakes.nothing_is_left()


SEES = """
import json, os, sys
config = os.environ["DOCKER_CONFIG"]
with open(f"{config}/config.json") as mine, open(f"{config}/contexts/meta") as metas:
    seen = json.load(mine), metas.read(), os.path.realpath(f"{config}/ca.pem")
with open(os.environ["FAKE_HOME"] + "/seen", "a") as file:
    print(json.dumps([sys.argv[1], *seen]), file=file)
"""


@pytest.mark.parametrize("named", [True, False])
def test_a_pull_with_a_password_goes_to_the_daemon_of_the_users_context(
    fakes: Fakes, script: Callable[..., Script], tmp_path: Path, named: bool
) -> None:
    """It has no use for the passwords that are in the user's file."""
    theirs = tmp_path / "other" if named else fakes.home / ".docker"
    (theirs / "contexts").mkdir(parents=True)
    (theirs / "contexts/meta").write_text("m")
    (theirs / "ca.pem").touch()
    (theirs / "config.json").write_text('{"currentContext": "rootless", "auths": {"x": {}}}')
    fakes.program("docker", SEES)
    pulling = load(script, PRIVATE, **({"DOCKER_CONFIG": str(theirs)} if named else {}))
    pulling.type(PASSWORD + "\n")
    assert pulling.code() == 0, pulling.output
    lines = (fakes.home / "seen").read_text().splitlines()
    seen = [{"currentContext": "rootless"}, "m", str(theirs / "ca.pem")]
    assert list(map(json.loads, lines)) == [[w, *seen] for w in ("login", "pull", "image")]
    assert sorted(each.name for each in theirs.iterdir()) == ["ca.pem", "config.json", "contexts"]


def test_a_denied_login_is_told(fakes: Fakes, script: Callable[..., Script]) -> None:
    pulling = log_in(fakes, script, denied=True)
    assert pulling.code() == 1
    assert told(pulling, Error)[0].startswith(f"docker login {ECR}: Error response from daemon")


@pytest.mark.parametrize("moment", ["login", "pull"])
def test_the_end_of_input_leaves_no_password(
    fakes: Fakes, script: Callable[..., Script], moment: str
) -> None:
    pulling = log_in(fakes, script, login_delay=0.2, pull_delay=600)
    pulling.until(lambda: fakes.calls("docker", moment))
    pulling.close()
    assert pulling.code() in (1, 143, -signal.SIGTERM)
    fakes.nothing_is_left()
    assert list(fakes.temporary.iterdir()) == []


@pytest.mark.parametrize("tag", [TAG, "a/b:c", "it's"])
def test_forgetting_takes_only_that_tag(fakes: Fakes, tag: str) -> None:
    fakes.hold_image(tag)
    fakes.hold_image("strangers:1")
    for _ in range(2):
        command = provide.forget_command(Image(tag), HERE)
        done = subprocess.run(
            command.argv,
            input=command.text,
            env=fakes.environment(),
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(fakes.images()) == ["strangers:1"]


# The launcher's side


@pytest.fixture
def on_path(fakes: Fakes) -> Fakes:
    os.environ.update(fakes.environment())
    return fakes


def test_providing_says_when_it_is_there(
    on_path: Fakes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    provide.provide(image_file(tmp_path / "x"), HERE)
    assert re.search(r"image: local: there after \d+\.\d s\n", capfd.readouterr().err)


def test_providing_names_the_node_where_it_failed(on_path: Fakes, tmp_path: Path) -> None:
    on_path.set(full=True)
    with pytest.raises(Failure, match=r"^local: docker load: .*no space left") as failure:
        provide.provide(image_file(tmp_path / "x"), HERE)
    assert failure.value.hint.startswith("make room there")


def test_a_tarball_that_is_none_is_to_be_written_again(on_path: Fakes, tmp_path: Path) -> None:
    tarball = image_file(tmp_path / "x")
    error = json.dumps({"node": "n1", "Error": {"why": "docker load: unexpected EOF"}})
    on_path.program("broken", f"print({error!r})")
    with pytest.raises(Failure, match="unexpected EOF") as failure:
        provide.provide(tarball, Place("1", 1, ("broken",)))
    assert "make save" in failure.value.hint


def test_a_long_pull_says_so_now_and_then(
    on_path: Fakes, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.talk.HEARTBEAT", 0.05)
    there = json.dumps({"node": "n1", "Present": {"id": "a"}})
    wait = "import time; time.sleep(0.5)"  # before it is there, and for the version after that
    on_path.program("slow", f"{wait}; print({there!r}, flush=True); {wait}")
    provide.provide(Image("x:1", registry="r.io"), Place("1", 1, ("slow",)))
    err = capfd.readouterr().err
    assert "image: still being fetched by 1 of 1 node after " in err and "by 0 of" not in err


def test_a_node_that_says_nothing_has_no_image(on_path: Fakes, tmp_path: Path) -> None:
    on_path.program("silent", "print('out of memory'); raise SystemExit(1)")
    with pytest.raises(Failure, match="reached 0 of 1 nodes: out of memory"):
        provide.provide(image_file(tmp_path / "x"), Place("1", 1, ("silent",)))


def test_a_password_that_aws_does_not_give_is_told_in_its_words(on_path: Fakes) -> None:
    on_path.set(no_credentials=True)
    with pytest.raises(Failure, match=r"aws ecr .* exit code 253: Unable to locate credentials"):
        provide.provide(PRIVATE, HERE)


def test_a_private_image_is_pulled(on_path: Fakes, capfd: pytest.CaptureFixture[str]) -> None:
    provide.provide(PRIVATE, HERE)
    assert f"{ECR} {PASSWORD} " in (on_path.home / "login").read_text()
    out, err = capfd.readouterr()
    assert "pass word" not in out + err
    assert on_path.images() == {PRIVATE.tag: "sha256:abc"}


def test_without_aws_the_nodes_pull_by_what_their_own_docker_knows(
    on_path: Fakes, capfd: pytest.CaptureFixture[str]
) -> None:
    """A credential helper, as clusters on AWS have it."""
    on_path.without("aws")
    provide.provide(PRIVATE, HERE)
    assert on_path.calls("docker", "login") == []
    assert on_path.images() == {PRIVATE.tag: "sha256:abc"}
    assert "no `aws` here" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("ids", "registry", "fails"),
    [(("a", "a"), "r.io", False), (("a", "b"), "r.io", True), (("a", "b"), "", False)],
)
def test_nodes_with_different_images_cannot_both_be_right(
    on_path: Fakes, ids: tuple[str, str], registry: str, fails: bool
) -> None:
    nodes = [json.dumps({"node": f"n{i}", "Present": {"id": x}}) for i, x in enumerate(ids)]
    on_path.program("two-nodes", f"print(*{nodes!r}, sep=chr(10))")
    try:
        provide.provide(Image("x:1", registry=registry), Place("1", 2, ("two-nodes",)))
    except Failure as failure:
        assert fails and "the nodes hold different images under x:1" in failure.message
    else:
        assert not fails


def test_progress_is_a_line_a_node_now_and_then(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("launch.provide.time.monotonic", lambda: clock[0])
    progress = provide.Progress(181_000_000)
    for second in range(1, 13):
        clock[0] = second
        progress.show("n1", messages.Progress(second * 10_000_000))
    progress.show("n1", messages.Waiting())
    progress.done("n1")
    lines = [line.partition("] ")[2] for line in capfd.readouterr().err.splitlines()]
    assert lines == [
        "image: n1: 50 of 181 MB, 10 MB/s, 5 s",
        "image: n1: 100 of 181 MB, 10 MB/s, 10 s",
        "image: n1: waiting, another image is being loaded",
        "image: n1: there after 12.0 s",
    ]
