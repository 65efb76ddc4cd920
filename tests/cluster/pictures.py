"""Takes the pictures of the pages: launches on the test cluster, a search, and a report.

`make pictures` (as root) writes launch.svg, fleet.svg, tune.svg and report.png into docs/.
"""

from __future__ import annotations

import html
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from tests.cluster.cluster import Cluster, wait_until
from tests.cluster.launches import PYTHON, QUICK, REPO, WHOLE, Launch, prepare, serve_args

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
COLUMNS, CHARACTER, LINE, MARGIN = 108, 7.2, 18, 16  # a character's and a line's size in pixels
COLOURS = (
    ("$ ", "#79c0ff"),
    ("[TRT-LLM]", "#8b949e"),
    ("INFO:", "#8b949e"),
    ("READY", "#7ee787"),
    ("restarting", "#f0c674"),
    ("ERROR", "#ff7b72"),
)


def main() -> int:
    with Cluster(nodes=2) as cluster:
        prepare(cluster)
        for name, take in (("launch", launch), ("fleet", fleet)):
            (DOCS / f"{name}.svg").write_text(picture(take(cluster)))
    (DOCS / "tune.svg").write_text(picture(search()))
    demo = subprocess.run([PYTHON, str(ROOT / "simulator/demo.py")], cwd=ROOT, check=True,
                          stdout=subprocess.PIPE, text=True)  # fmt: skip
    (report,) = re.findall(r"The report: (\S+)", demo.stdout)
    photograph(ROOT / report, DOCS / "report.png")
    return 0


def launch(cluster: Cluster) -> str:
    """What `salloc run_sbatch.py` says from its start to ^C, if the image is not there yet."""
    workspace = Path("/fsx/work/picture")
    workspace.mkdir(parents=True)
    command = ["salloc", *WHOLE.split(), PYTHON, str(REPO / "run_sbatch.py"), *serve_args()]
    started = Launch(cluster, workspace, command)
    started.until("stop it with")
    started.stop()
    typed = "$ salloc -N 2 --gpus-per-node=8 --exclusive .venv/bin/python run_sbatch.py \\\n"
    typed += "      --image /fsx/images/tensorrt-llm-serve-latest.tar.gz org/model --tp_size 8\n"
    return typed + started.output


def fleet(cluster: Cluster) -> str:
    """Four replicas, of which one is killed; and what --status says of them."""
    workspace = Path("/fsx/work/fleet")
    workspace.mkdir(parents=True)
    script = [PYTHON, str(REPO / "run_sbatch.py")]
    words = [*serve_args()[:-1], "4", "--replicas", "auto", "--restart", "3"]
    started = Launch(cluster, workspace, ["salloc", *WHOLE.split(), *script, *words], QUICK)
    started.until("stop it with")
    cluster.nodes["n2"].docker("kill", f"trtllm-{started.job}-r2-n2")
    started.until("restarting")
    status = cluster.ctl.run(*script, "--status", cwd=str(workspace)).stdout
    wait_until(lambda: started.output.count("r2: ready after") == 2, "r2 again")
    said = started.output
    started.stop()
    typed = "$ salloc -N 2 --gpus-per-node=8 --exclusive .venv/bin/python run_sbatch.py \\\n"
    typed += "      --image /fsx/images/tensorrt-llm-serve-latest.tar.gz org/model --tp_size 4 \\\n"
    typed += "      --replicas auto --restart 3\n"
    return f"{typed}{said}\n$ make status        # meanwhile, in another terminal\n{status}"


def search() -> str:
    """What `make tune` says without a GPU; the simulator costs as much as a 70B model."""
    typed = "$ make tune MODEL=org/model TP=1,2,4 GOODPUT='ttft:1000 tpot:30' \\\n"
    typed += "      EXTRA_ARGS='--loads 1,4,16 --output-len 32'\n"
    env = {"PATH": f"{ROOT}/simulator:{os.environ['PATH']}", "RUNTIME": "bare", "GPUS": "none",
           "TRTLLM_SIM_COST": "70b"}  # fmt: skip
    words = shlex.split(typed.replace("\\\n", ""))[3:]
    done = subprocess.run(["make", "--silent", "tune", *words], cwd=ROOT, env={**os.environ, **env},
                          check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True)  # fmt: skip
    return typed + done.stdout.replace(f"{ROOT}/", "")


def picture(text: str) -> str:
    """Lines of text as an SVG picture of a terminal; of long ones the middle is left out."""
    lines = [short(line) for line in text.splitlines()]
    width, height = COLUMNS * CHARACTER + 2 * MARGIN, len(lines) * LINE + 2 * MARGIN
    rows = "\n".join(
        f'<text x="{MARGIN}" y="{MARGIN + LINE * (i + 0.75)}" fill="{colour(line)}">'
        f"{html.escape(line)}</text>"
        for i, line in enumerate(lines)
    )
    font = 'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="12"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'{font} style="white-space: pre">'
        f'\n<rect width="100%" height="100%" rx="8" fill="#0d1117"/>\n{rows}\n</svg>\n'
    )


def short(line: str, end: int = 60) -> str:
    return line if len(line) <= COLUMNS else f"{line[: COLUMNS - end - 5]} ... {line[-end:]}"


def colour(line: str) -> str:
    return next((c for word, c in COLOURS if word in line[:40]), "#e6edf3")


def photograph(page: Path, target: Path) -> None:
    """A report as a browser shows it."""
    browser = shutil.which("chromium") or "chromium-browser"
    subprocess.run([browser, "--headless", "--no-sandbox", "--hide-scrollbars",
                    "--window-size=1100,1250", f"--screenshot={target}", page.as_uri()],
                   check=True, capture_output=True)  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
