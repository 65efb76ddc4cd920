"""The pages and env.example say what is so."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import bench
import save_image
from common.settings import PASSED_ON, SETTINGS
from launch.cli import parse as parse_launch
from tests.cluster.faults import CELLS
from tests.cluster.pyxis_faults import CELLS as OF_PYXIS
from tests.cluster.scene import Cell

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md",
         *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]  # fmt: skip
TEXT = {page: (ROOT / page).read_text() for page in PAGES}
README, CONTRIBUTING = TEXT["README.md"], TEXT["CONTRIBUTING.md"]
USED = "\n".join(text for page, text in TEXT.items() if page != "CHANGELOG.md")
ROOMS = ("common", "launch", "load", "report")
CODE = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in ROOT.glob(f"{room}/**/*.py"))]


def test_the_readme_can_be_read_in_one_go() -> None:
    assert len(README.splitlines()) <= 220
    assert [page for page in PAGES if page.startswith("docs/") and f"({page})" not in README] == []


@pytest.mark.parametrize("page", PAGES)
def test_no_figure_is_left_out(page: str) -> None:
    assert "@@" not in TEXT[page]


def test_env_example_is_the_list_of_settings() -> None:
    text = (ROOT / "env.example").read_text()
    lines = [line for s in SETTINGS for line in (f"# {s.help}", f"#{s.name}={s.default}")]
    assert text.split("\n\n", 1)[1].splitlines() == lines
    assert " ".join(PASSED_ON) in text


def test_the_settings_page_has_every_setting() -> None:
    page = TEXT["docs/settings.md"]
    rows = [
        f"| `{s.name}` | {f'`{s.default}`' if s.default else ''} | {s.help} |" for s in SETTINGS
    ]
    assert "\n".join(rows) in page
    for text in (page, TEXT["docs/pyxis.md"]):
        assert [name for name in PASSED_ON if f"`{name}`" not in text] == []


@pytest.mark.parametrize(("page", "cells"), [("faults", CELLS), ("faults-pyxis", OF_PYXIS)])
def test_the_table_of_faults_shows_every_cell_of_the_matrix(page: str, cells: list[Cell]) -> None:
    page = TEXT[f"docs/{page}.md"]
    rows = re.findall(r"^\| (.+?) \| (.+?) \| .+ \| -?\d+ \| [\d.]+ \| .+ \|$", page, re.M)
    shown = [f"{fault}:{phase}" for fault, phases in rows for phase in phases.split(", ")]
    assert sorted(shown) == sorted(cell.name for cell in cells)


def test_every_option_of_the_launcher_is_in_the_readme() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "run_sbatch.py"), "--help"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    for option in set(re.findall(r"--[a-z-]+", done.stdout)) - {"--help"}:
        if option.startswith(("--tp", "--gpus", "--exclusive")):
            continue
        assert f"`{option}" in README, option


# Words of Docker, of Slurm and of the engine in the table of symptoms; all others are ours.
OTHERS_WORDS = ["permission denied", "CUDA out of memory", "gated repo", "unhandled system error",
                "Access denied", "certificate verify failed"]  # fmt: skip


def test_the_symptoms_are_what_the_tool_says() -> None:
    """Each message of the tables of symptoms stands in the code, apart from its variable parts."""
    table = TEXT["docs/troubleshooting.md"]
    table = re.sub("<!-- causes: begin -->.*<!-- causes: end -->", "", table, flags=re.S)
    code = "".join(path.read_text() for path in CODE)
    code = re.sub(r'"\n\s+f?"|\{[^}]*\}', "", code) + (ROOT / "Makefile").read_text()
    said = re.findall(r"^\| `([^`]+)`", table, re.M)
    assert len(said) > 10
    for message in set(said) - set(OTHERS_WORDS):
        for part in re.split(r"\.\.\.|\bn2:|\d[\d.]*|\(.*\)", message):
            assert part.strip(" ,:") in code, message


COUNTED = r"\d+ (?:node|GPU)s?\b"
VARIABLE = (
    rf"{COUNTED}|\.\.\.|https?:\S+|[\w-]+/\S+|\([^)]*\)|\b[nx]\d+\b|\d[\w.+]*|[A-Z]+ (?=\d)|: |,"
)


def test_what_the_launcher_says_in_the_pages_is_what_it_says() -> None:
    """Each line of an output with a time in front, apart from its variable parts."""
    code = re.sub(r'"\n\s+f?"|\{[^}]*\}', "", "".join(path.read_text() for path in CODE))
    said = re.findall(r"^\[\d\d:\d\d:\d\d\] +(.*)$", USED, re.M)
    assert len(said) > 8
    for line in said:
        for part in re.split(VARIABLE, line):
            assert part.strip(" :;") in code, line


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^\.PHONY: (\S+)", (ROOT / "Makefile").read_text(), re.M))
    named = re.findall(r"(?:`|^|&& )make ([a-z][a-z-]*\b)(?!\S*=)", USED, re.M)
    assert len(named) > 20 and set(named) == targets - {"help"}


def script_named(name: str) -> ModuleType:
    """A script whose name is also a module's of Python's own (test)."""
    spec = importlib.util.spec_from_file_location("script", ROOT / name)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["script"] = module  # where its dataclasses look for themselves
    spec.loader.exec_module(module)
    return module


def commands(script: str) -> list[list[str]]:
    """The arguments of every call of a script in the blocks and tables of all pages."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", USED, re.S)).replace("\\\n", " ")
    calls = blocks.splitlines() + re.findall(r"`([^`\n]+)`", USED)
    words = [shlex.split(line, comments=True) for line in calls if f"{script} " in f"{line} "]
    return [w[w.index(name) + 1 :] for w in words for name in w if Path(name).name == script]


PARSERS: dict[str, Callable[[list[str]], object]] = {
    "run_sbatch.py": parse_launch,
    "bench.py": lambda words: bench.parse(words, {}),
    "save_image.py": save_image.parse,
    "test.py": lambda words: script_named("test.py").parse_arguments(words),
}


@pytest.mark.parametrize("script", PARSERS)
def test_the_commands_of_the_pages_are_taken(script: str) -> None:
    found = [words for words in commands(script) if "..." not in words]
    assert found
    for words in found:
        PARSERS[script](words)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXT[page]):
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            assert anchor in map(slug, headings), link


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    rooms = "common|launch|load|report|simulator|tests|configs|docs"
    files = re.findall(rf"`((?:{rooms})/[\w./-]*|\w+\.(?:py|md|example))`", TEXT[page])
    assert [name for name in files if not (ROOT / name).exists() and name not in THEIRS] == []


THEIRS = ["prepare_dataset.py", "__init__.py"]  # in NVIDIA's image; in every folder


# `this` in `a/file.py`, also `this` and `that` in it
NAMED = [(name, file) for names, file in
         re.findall(r"((?:`\w+` and )*`\w+`) in\s`([\w/]+\.py)`", CONTRIBUTING)
         for name in re.findall(r"\w+", names) if name != "and"]  # fmt: skip


@pytest.mark.parametrize(("name", "file"), NAMED)
def test_what_the_maintainers_page_names_is_there(name: str, file: str) -> None:
    assert re.search(rf"^\s*(def |class |)_?{name}\b", (ROOT / file).read_text(), re.M)


def test_the_demo_serves_checks_measures_and_ends_by_itself(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    done = subprocess.run([sys.executable, str(ROOT / "simulator/demo.py")], cwd=tmp_path, env=env,
                          capture_output=True, text=True, timeout=280)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8/8 passed" in done.stdout and "READY" in done.stderr
    assert len(done.stdout.splitlines()) + len(done.stderr.splitlines()) < 50  # one screen
    report = tmp_path / re.findall(r"The report: (\S+)", done.stdout)[0]
    assert report.stat().st_size > 10_000
    assert not (report.parent / "logs/endpoint.json").exists()
