"""Which engine and version an image holds: who says it, who is asked, and what follows from it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import save_image
from common.talk import Failure
from launch.engines import packages
from launch.image import Image, read_tarball
from launch.node import release
from launch.order import PARTS, needed
from launch.plan import release_known, settled
from tests.conftest import Fakes, plan

pytestmark = pytest.mark.usefixtures("clean_environment")

ID = "sha256:abc"
UBUNTU = {"org.opencontainers.image.version": "24.04"}
OURS = {release.TITLE_LABEL: release.OUR_TITLE, release.VERSION_LABEL: "1.2.1"}


@pytest.fixture
def node(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """This process on a node whose image has a label of its base only."""
    for name, value in fakes.environment().items():
        monkeypatch.setenv(name, value)
    fakes.hold_image(labels=UBUNTU)
    return fakes


def release_of(image: str) -> str:
    return release.release_of(image, packages())


def asked(node: Fakes) -> int:
    return len(node.calls("docker", "run"))


def test_our_label_tells_it(node: Fakes) -> None:
    node.hold_image(labels=OURS)
    assert release_of(ID) == "tensorrt_llm 1.2.1"
    assert asked(node) == 0


@pytest.mark.parametrize("labels", [None, {}, UBUNTU, {**OURS, release.TITLE_LABEL: "theirs"}])
def test_an_image_without_our_label_is_asked_once(node: Fakes, labels: Any) -> None:
    node.hold_image(labels=labels)
    node.set(asked="tensorrt_llm 1.1.0\nvllm 0.11.0")
    assert [release_of(ID) for _ in "12"] == ["tensorrt_llm 1.1.0"] * 2
    assert asked(node) == 1
    node.hold_image(identity="sha256:new", labels=labels)
    node.set(asked="tensorrt_llm 1.2.1")
    assert release_of("sha256:new") == "tensorrt_llm 1.2.1"


def test_that_an_image_has_none_is_remembered_too(node: Fakes) -> None:
    node.set(asked="")
    assert [release_of(ID) for _ in "12"] == ["", ""]
    assert asked(node) == 1


def test_a_question_that_fails_is_asked_again(node: Fakes) -> None:
    assert [release_of(ID) for _ in "12"] == ["", ""]
    assert asked(node) == 2


@pytest.mark.parametrize("text", [b"", b"\xff", b"tensorrt_llm", b"tensorrt_llm 1.1.0\nmore"])
def test_a_spoiled_memory_is_none(node: Fakes, text: bytes) -> None:
    node.set(asked="tensorrt_llm 1.1.0")
    release_of(ID)
    [path] = node.home.glob(".cache/tensorrt-llm-serve/releases/*")
    path.write_bytes(text)
    assert release_of(ID) == "tensorrt_llm 1.1.0"
    assert asked(node) == 2


def test_without_a_home_it_is_asked_all_the_same(
    node: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/x")
    node.set(asked="tensorrt_llm 1.1.0")
    assert release_of(ID) == "tensorrt_llm 1.1.0"


def test_an_image_that_does_not_answer_leaves_no_container(
    node: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "ASK_PATIENCE", 3)
    node.set(asked="hangs")
    assert release_of(ID) == ""
    assert node.calls("docker", "rm", "--force") and node.containers() == []


def installed(where: Path, **versions: str) -> Path:
    """A directory in which Python finds these packages."""
    for name, version in versions.items():
        (where / f"{name}-{version}.dist-info").mkdir(parents=True)
        text = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        (where / f"{name}-{version}.dist-info/METADATA").write_text(text)
    return where


def test_a_program_of_the_node_is_asked_through_its_own_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = installed(tmp_path / "p", vllm="0.11.0", tensorrt_llm="1.2.1")
    monkeypatch.setenv("PYTHONPATH", str(here))
    program = tmp_path / "trtllm-serve"
    for text, found in {
        f"#!{sys.executable}\n": "tensorrt_llm 1.2.1",
        "#!/usr/bin/env python3\n": "tensorrt_llm 1.2.1",
        f"#!{sys.executable}-gone\n": "",
        "#!/bin/sh\n": "",  # must not be given Python to run
        "\x7fELF": "",
        "": "",
    }.items():
        program.write_text(text)
        assert release.release_here(str(program), packages()) == found, text
    assert release.release_here(str(tmp_path / "none"), packages()) == ""


def test_save_image_asks_as_the_nodes_do() -> None:
    assert (save_image.QUESTION, list(save_image.ENGINES)) == (release.QUESTION, packages())
    assert save_image.ASK == release.ASK


def test_the_question_is_answered_in_a_line_a_package(tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(installed(tmp_path, sglang="0.5.3", vllm="0.11.0"))}
    command = [sys.executable, "-c", release.QUESTION, *packages()]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert release.first_release(done.stdout) == "sglang 0.5.3"


@pytest.mark.parametrize("part", [path.stem for path in PARTS.glob("*.py")])
def test_parts_that_are_sent_together_share_no_name(part: str) -> None:
    """On the node they are one module: the later one would take the name from the earlier."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    names: Counter[str] = Counter()
    for other in dict.fromkeys(needed(part)):
        for each in ast.parse((PARTS / f"{other}.py").read_text()).body:
            names.update([each.name] if isinstance(each, kinds) else [])
            targets = each.targets if isinstance(each, ast.Assign) else []
            names.update(n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))
    assert [name for name, count in names.items() if count > 1] == []


# What the launcher makes of it


def test_a_setting_wins_over_the_sidecar() -> None:
    found = Image("t", release="tensorrt_llm 1.1.0")
    assert release_known(found, "trtllm") == "tensorrt_llm 1.1.0"
    os.environ["TRTLLM_VERSION"] = "1.2.1"
    assert release_known(found, "trtllm") == "tensorrt_llm 1.2.1"
    assert release_known(Image("t"), "trtllm") == "tensorrt_llm 1.2.1"


@pytest.mark.parametrize(
    ("releases", "title", "config"),
    [
        ({"n1": "tensorrt_llm 1.1.0", "n2": "tensorrt_llm 1.1.0"}, "1.1.0", "--extra_llm_api_"),
        ({"n1": "tensorrt_llm 1.2.1", "n2": ""}, "1.2.1", "--config"),
        ({"n1": "", "n2": ""}, "", "--extra_llm_api_options"),
        ({}, "", "--extra_llm_api_options"),
    ],
)
def test_the_command_is_that_versions(releases: dict[str, str], title: str, config: str) -> None:
    Path("c.yaml").write_text("{}")
    found = settled(plan("trtllm-serve", "m", "--config", "c.yaml"), releases)
    assert found.title == f"TensorRT-LLM {title}".strip()
    [replica] = found.replicas
    assert found.command(replica)[:2] == ("trtllm-serve", "m")
    assert replica.args[0].startswith(config)


def test_nodes_that_hold_different_versions_are_told() -> None:
    with pytest.raises(Failure, match=r"different engines: n1 tensorrt_llm 1\.1\.0, n2 tensorrt_"):
        settled(plan(), {"n1": "tensorrt_llm 1.1.0", "n2": "tensorrt_llm 1.2.1"})


def test_the_image_of_another_engine_is_told() -> None:
    with pytest.raises(Failure, match=r"the image holds vllm 0\.11\.0, not TensorRT-LLM"):
        settled(plan(), {"n1": "vllm 0.11.0"})


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"engine": "tensorrt_llm", "version": "1.2.1"}, "tensorrt_llm 1.2.1"),
        ({}, ""),  # of an older save_image.py
        ({"engine": None, "version": None}, ""),
        ({"engine": "tensorrt_llm", "version": ["1"]}, ""),
        ({"engine": "a\nb", "version": "1"}, ""),
        ({"engine": "tensorrt_llm", "version": "1" * 500}, ""),
    ],
)
def test_a_sidecar_tells_it(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(b"\0" * 512)
    data = {"tags": ["t"], "config_digest": ID, "manifest_digest": None, "diff_ids": [],
            "unpacked_bytes": 1, "packed_bytes": 512, "sha256": ""}  # fmt: skip
    (tmp_path / "x.tar.json").write_text(json.dumps(data | changes))
    image = read_tarball(path)
    assert (image.ids, image.release) == ((ID,), found)
