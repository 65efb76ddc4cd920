"""image_check.py against programs and libraries that are there, and that are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.engines import trtllm_image_check as image_check
from launch.engines.trtllm_image_check import Check


def program(directory: Path, name: str, text: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is the whole of PATH and of the library directories, but for sh."""
    program(tmp_path, "ldconfig", "echo '  libgdrapi.so.2 (libc6) => /lib/libgdrapi.so.2'")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr(image_check, "LIBRARIES", (str(tmp_path),))
    return tmp_path


def test_what_is_there_is_named(image: Path) -> None:
    program(image, "fi_info", "[ $1 = --version ] && echo 'libfabric: 2.3.1amzn1.0'")
    (image / "libnccl-net-ofi.so").touch()
    found = {c.name: image_check.find(c) for c in image_check.CHECKS}
    assert found["libfabric"] == "2.3.1amzn1.0"
    assert found["NCCL plug-in for EFA"] == f"{image}/libnccl-net-ofi.so"
    assert found["GDRCopy"] == "/lib/libgdrapi.so.2"
    assert found["EFA provider"] == ""  # this fi_info knows no -l


def test_only_what_serving_needs_makes_it_fail(
    image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, absent = Check("sh", ("sh", "-c", "echo yes"), required=True), Check("x", ("no-x",))
    assert image_check.main([there, absent]) == 0
    assert image_check.main([there, Check("y", ("no-y",), required=True)]) == 1
    assert "MISSING" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["exit 1", "echo words; exit 1", "true"])
def test_a_program_that_fails_or_says_nothing_is_missing(image: Path, text: str) -> None:
    program(image, "tool", text)
    assert image_check.find(Check("tool", ("tool",))) == ""
