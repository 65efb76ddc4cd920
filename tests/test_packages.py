"""Debian's packages are there before the first test looks for them, whoever else installs some."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import packages
from tests.conftest import ROOT

# Says what it was asked; the first time somebody else has the lock.
APT_GET = """#!/bin/sh
sleep 0.2  # long enough for another to come in between
echo "$@" >>{home}/asked
[ -e {home}/{free} ] && exit
touch {home}/free
echo "E: {words}" >&2
exit 100
"""
LOCKED = "Could not get lock /var/lib/apt/lists/lock. It is held by process 7 (apt-get)"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def fake_apt_get(home: Path, words: str, free: str = "free") -> None:
    (home / "apt-get").write_text(APT_GET.format(home=home, words=words, free=free))
    (home / "apt-get").chmod(0o755)


def test_another_apt_is_waited_for(home: Path) -> None:
    fake_apt_get(home, LOCKED)
    packages.apt_get("update")
    asked = "-o DPkg::Lock::Timeout=600 update\n"
    assert (home / "asked").read_text() == asked * 2


@pytest.mark.parametrize("words", [LOCKED, "Unable to locate package nonsense"])
def test_what_does_not_get_better_is_told_in_its_words(
    home: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.setattr(packages, "PATIENCE", 0.0)
    fake_apt_get(home, words, free="never")
    with pytest.raises(RuntimeError, match=words.partition(".")[0]):
        packages.apt_get("install", "nonsense")


TWICE = """
from contextlib import nullcontext
from pathlib import Path
from tests import packages
packages.DPKG, packages.no_services = Path("{home}"), nullcontext
packages.install(["x"])
"""


def test_two_processes_install_once(home: Path) -> None:
    fake_apt_get(home, "", free="asked")  # it never fails
    (home / "dpkg-query").write_text(f"#!/bin/sh\n[ ! -e {home}/asked ] || echo x ok installed\n")
    (home / "dpkg-query").chmod(0o755)
    both = [
        subprocess.Popen([sys.executable, "-c", TWICE.format(home=home)], cwd=ROOT)
        for _ in range(2)
    ]
    assert [each.wait() for each in both] == [0, 0]
    asked = (home / "asked").read_text()
    assert (asked.count(" update "), asked.count(" install ")) == (1, 1)
