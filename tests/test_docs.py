"""The README and env.example say what is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from settings import PASSED_ON, SETTINGS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


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


def test_every_option_of_the_launcher_is_in_the_readme() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "run_sbatch.py"), "--help"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    for option in set(re.findall(r"--[a-z-]+", done.stdout)) - {"--help"}:
        if option.startswith(("--tp", "--gpus", "--exclusive")):
            continue
        assert f"`{option}" in README, option


# Words of Docker, of Slurm and of the engine in the table of symptoms; all others are ours.
OTHERS_WORDS = ["permission denied", "CUDA out of memory", "gated repo", "unhandled system error",
                "Access denied"]  # fmt: skip


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


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^\.PHONY: (\S+)", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", README)) - {"alone"} <= targets


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
