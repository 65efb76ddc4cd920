"""The README and env.example say what is so."""

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
from launch import main as run_sbatch
from tests.cluster.faults import CELLS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def test_no_figure_is_left_out() -> None:
    assert "@@" not in README


def test_env_example_is_the_list_of_settings() -> None:
    text = (ROOT / "env.example").read_text()
    lines = [line for s in SETTINGS for line in (f"# {s.help}", f"#{s.name}={s.default}")]
    assert text.split("\n\n", 1)[1].splitlines() == lines
    assert " ".join(PASSED_ON) in text


def test_the_readme_has_the_table_of_settings() -> None:
    rows = [
        f"| `{s.name}` | {f'`{s.default}`' if s.default else ''} | {s.help} |" for s in SETTINGS
    ]
    assert "\n".join(rows) in README


def test_the_readme_shows_every_cell_of_the_fault_matrix() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+?) \| .+ \| -?\d+ \| [\d.]+ \| .+ \|$", README, re.M)
    shown = [f"{fault}:{phase}" for fault, phases in rows for phase in phases.split(", ")]
    assert sorted(shown) == sorted(cell.name for cell in CELLS)


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
    """Each message of the table of symptoms stands in the code, apart from its variable parts."""
    table = README.split("## When it does not come up")[1].split("\n## ")[0]
    code = "".join(path.read_text() for path in ROOT.glob("*.py"))
    code = re.sub(r'"\n\s+f?"|\{[^}]*\}', "", code) + (ROOT / "Makefile").read_text()
    said = re.findall(r"^\| `([^`]+)`", table, re.M)
    assert len(said) > 10
    for message in set(said) - set(OTHERS_WORDS):
        for part in re.split(r"\.\.\.|\bn2:|\d[\d.]*|\(.*\)", message):
            assert part.strip(" ,:") in code, message


@pytest.mark.parametrize("name", re.findall(r"^  ?([\w./]+?)/? {2,}\S", README, re.M))
def test_what_the_tree_names_is_there(name: str) -> None:
    if "/" in name or "." in name:
        assert (ROOT / name).exists()


def test_the_tree_names_every_script_and_module() -> None:
    tree = README.split("## What is where")[1]
    assert [path.name for path in ROOT.glob("*.py") if path.name not in tree] == []


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^\.PHONY: (\S+)", (ROOT / "Makefile").read_text(), re.M))
    named = re.findall(r"(?:`|^|&& )make ([a-z][a-z-]*\b)(?!\S*=)", README + CONTRIBUTING, re.M)
    assert len(named) > 20 and set(named) <= targets


def script_named(name: str) -> ModuleType:
    """A script whose name is also a module's of Python's own (test)."""
    spec = importlib.util.spec_from_file_location("script", ROOT / name)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["script"] = module  # where its dataclasses look for themselves
    spec.loader.exec_module(module)
    return module


def commands(script: str) -> list[list[str]]:
    """The arguments of every call of a script in the README's blocks and tables."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ")
    calls = blocks.splitlines() + re.findall(r"`([^`\n]+)`", README)
    words = [shlex.split(line, comments=True) for line in calls if f"{script} " in f"{line} "]
    return [w[w.index(name) + 1 :] for w in words for name in w if Path(name).name == script]


PARSERS: dict[str, Callable[[list[str]], object]] = {
    "run_sbatch.py": run_sbatch.parse,
    "bench.py": lambda words: bench.parse(words, {}),
    "save_image.py": save_image.parse,
    "test.py": lambda words: script_named("test.py").parse_arguments(words),
}


@pytest.mark.parametrize("script", PARSERS)
def test_the_commands_of_the_readme_are_taken(script: str) -> None:
    found = [words for words in commands(script) if "..." not in words]
    assert found
    for words in found:
        PARSERS[script](words)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_and_file_names_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    files = re.findall(
        r"`((?:tests/|simulator/|configs/|docs/)[\w./]+|\w+\.(?:py|md|example))`", text
    )
    assert [name for name in links + files if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name, file", re.findall(r"`(\w+)(?:\(\))?` in `(\w+\.py)`", CONTRIBUTING))
def test_what_the_maintainers_page_names_is_there(name: str, file: str) -> None:
    assert re.search(rf"^\s*(def |class |)_?{name}\b", (ROOT / file).read_text(), re.M)


def test_the_demo_serves_checks_measures_and_ends_by_itself(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    done = subprocess.run([sys.executable, str(ROOT / "simulator/demo.py")], cwd=tmp_path, env=env,
                          capture_output=True, text=True, timeout=150)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8/8 passed" in done.stdout and "READY" in done.stderr
    assert len(done.stdout.splitlines()) + len(done.stderr.splitlines()) < 50  # one screen
    report = tmp_path / re.findall(r"The report: (\S+)", done.stdout)[0]
    assert report.stat().st_size > 10_000
    assert not (report.parent / "logs/endpoint.json").exists()
