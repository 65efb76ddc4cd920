"""The shape of the code: rooms with arrows one way, short functions, no shell in Python strings.

python -m tests.test_layout            # files, lines and functions, room by room
python -m tests.test_layout --write    # the list of all files in docs/layout.md
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (".", "search", "report", "load", "launch", "common")  # each may import those after it
LONGEST = {"test.py": 550, "save_image.py": 550}  # they stand alone; all others: 400
SHELL_INSIDE = "launch/node/inside.py"  # runs in containers whose image may have no Python

# What runs where nothing of ours is, and may therefore import nothing but Python's own library.
STANDALONE: dict[str, set[str]] = {
    "test.py": {"requests", "dotenv"},
    "save_image.py": {"dotenv"},
    "launch/engines/trtllm_image_check.py": set(),  # inside an image
    **{str(p.relative_to(ROOT)): {"launch.node"} for p in (ROOT / "launch/node").glob("*.py")},
}
INNER = {
    "launch/engines": {
        "common",
        "launch.arguments",
        "launch.config_file",
        "launch.engines",
        "launch.options",
    }
}


def room(path: str) -> str:
    return path.partition("/")[0] if "/" in path else "."


def files(*rooms: str) -> list[str]:
    found = [p for name in rooms for p in (ROOT / name).glob("*.py" if name == "." else "**/*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


PRODUCT = files(*ROOMS)
SIMULATOR = files("simulator")
MODULES = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
           for path in PRODUCT}  # fmt: skip


@cache
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def imports(path: str) -> Iterator[str]:
    """The modules it names, wherever: at the top, in a function, below TYPE_CHECKING."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in names)


def ours(path: str) -> set[str]:
    return {MODULES[name] for name in imports(path) if name in MODULES}


def parts(name: str) -> set[str]:
    """a.b.c is in a, a.b and a.b.c."""
    words = name.split(".")
    return {".".join(words[: n + 1]) for n in range(len(words))}


@pytest.mark.parametrize("path", PRODUCT)
def test_arrows_go_one_way(path: str) -> None:
    below = ROOMS[ROOMS.index(room(path)) + (room(path) == ".") :]
    assert [other for other in ours(path) if room(other) not in below] == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    try:
        TopologicalSorter({path: ours(path) for path in PRODUCT}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("path", STANDALONE)
def test_what_stands_alone_imports_nothing_of_ours(path: str) -> None:
    allowed = STANDALONE[path] | sys.stdlib_module_names
    assert [name for name in imports(path) if not parts(name) & allowed] == []


@pytest.mark.parametrize("folder", INNER)
def test_a_folder_imports_what_it_may(folder: str) -> None:
    allowed = INNER[folder] | sys.stdlib_module_names
    found = {name for path in files(folder) for name in imports(path)}
    assert [name for name in found if not parts(name) & allowed] == []


def test_the_simulator_and_the_product_know_nothing_of_each_other() -> None:
    known = {Path(path).stem for path in files(".")} | set(ROOMS)
    mine = {Path(path).stem for path in SIMULATOR}
    for path in SIMULATOR:
        assert [n for n in imports(path) if n.partition(".")[0] in known - mine] == [], path
    for path in PRODUCT:
        assert "simulator" not in {name.partition(".")[0] for name in imports(path)}, path


def folders() -> list[str]:
    return sorted({str(Path(path).parent) for path in PRODUCT} - {"."})


@pytest.mark.parametrize("folder", folders())
def test_a_folder_says_what_it_is_for_and_what_it_imports(folder: str) -> None:
    said = ast.get_docstring(tree(f"{folder}/__init__.py")) or ""
    assert "import" in said.lower() and len(said.splitlines()) <= 5, said


@pytest.mark.parametrize("path", PRODUCT + SIMULATOR)
def test_a_file_is_what_a_reader_can_hold(path: str) -> None:
    lines = len((ROOT / path).read_text().splitlines())
    assert lines <= LONGEST.get(path, 400)


SHELL = re.compile(
    r"""(?:^|[;&|]\ *|\n\s*)(?:if|for|while|until|case|trap|exec|export|set\ -\w+)\ [^\n]*[;$"'&|]
    | \b(?:then|do|esac|fi|done)\b\ *(?:[;&|\n]|$) | \$\( | "\$[@\w] | \$\{\w""",
    re.X,
)


def shell_texts(path: str) -> Iterator[int]:
    """Lines at which a string begins that is longer than a line and reads like a shell script."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    words = [n.body[0].value for n in ast.walk(tree(path)) if isinstance(n, owners)
             and n.body and isinstance(n.body[0], ast.Expr)]  # fmt: skip
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in words:
            long = node.end_lineno != node.lineno or "\n" in node.value.strip()
            if long and SHELL.search(node.value):
                yield node.lineno


@pytest.mark.parametrize("path", [path for path in PRODUCT if path != SHELL_INSIDE])
def test_no_shell_script_hides_in_a_string(path: str) -> None:
    assert list(shell_texts(path)) == []


def test_a_shell_script_in_a_string_would_be_found() -> None:
    assert len(list(shell_texts(SHELL_INSIDE))) >= 2
    assert len((ROOT / SHELL_INSIDE).read_text().splitlines()) < 40


def function_lengths(paths: list[str]) -> list[int]:
    """Lines of every function, from its `def` to its end."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = (n for path in paths for n in ast.walk(tree(path)) if isinstance(n, kinds))
    return [(node.end_lineno or 0) - node.lineno + 1 for node in found]


def percentile(lengths: list[int], share: float) -> int:
    return sorted(lengths)[int(share * (len(lengths) - 1))]


def test_functions_are_short() -> None:
    lengths = function_lengths(PRODUCT)
    assert statistics.median(lengths) <= 7
    assert percentile(lengths, 0.9) <= 20


PAGE = ROOT / "docs/layout.md"
BEGIN, END = "<!-- tree: begin -->\n", "<!-- tree: end -->\n"


def first_sentence(path: str) -> str:
    paragraph = (ast.get_docstring(tree(path)) or "").partition("\n\n")[0]
    return " ".join(paragraph.split()).partition(". ")[0].rstrip(".")


def listing() -> str:
    """A line a file, below its folder: a name and the first sentence of its docstring."""
    lines = [f"{path:20}{first_sentence(path)}" for path in files(".")]
    for folder in sorted(folders(), key=lambda name: ROOMS.index(room(f"{name}/"))):
        inner = "  " * folder.count("/")
        lines += ["", f"{inner + folder + '/':20}{first_sentence(f'{folder}/__init__.py')}"]
        named = [p for p in PRODUCT if str(Path(p).parent) == folder and "__init__" not in p]
        lines += [f"{inner + '  ' + Path(path).name:20}{first_sentence(path)}" for path in named]
    return "```text\n" + "\n".join(lines) + "\n```\n"


def written(page: str) -> str:
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + listing() + END + rest.partition(END)[2]


def test_the_layout_page_lists_every_file() -> None:
    page = PAGE.read_text()
    assert page == written(page), "python -m tests.test_layout --write"


def row(name: str, paths: list[str]) -> str:
    lines = sum(len((ROOT / path).read_text().splitlines()) for path in paths)
    lengths = function_lengths(paths)
    middle, high = statistics.median(lengths), percentile(lengths, 0.9)
    return f"{name:10}{len(paths):6}{lines:7}{len(lengths):11}{middle:8g}{high:5}{max(lengths):9}"


def main() -> None:
    if "--write" in sys.argv[1:]:
        PAGE.write_text(written(PAGE.read_text()))
        return
    print(f"{'':10} files  lines  functions  median  p90  longest")
    for name in (*ROOMS, "simulator"):
        print(row(name, files(name)))
    print(row("product", PRODUCT))


if __name__ == "__main__":
    main()
