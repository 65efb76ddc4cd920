"""Serves a candidate with a launcher of its own, and ends all that it started."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.talk import Failure, read_json, say
from launch.node.base import ending_with_us

ROOT = Path(__file__).resolve().parents[1]
TICK = 0.1  # seconds between two looks for the endpoint
ERROR = re.compile(r"^\[\d\d:\d\d:\d\d\] ERROR (.*(?:\n +next: .*)?)$", re.M)
Process = subprocess.Popen[bytes]


@dataclass
class Serving:
    """The launcher of a candidate, and where its server is."""

    launcher: Process
    folder: Path  # its workspace
    url: str = ""

    @property
    def words(self) -> Path:
        """The file with what it says."""
        return self.folder / "launcher.txt"

    def cause(self) -> str:
        """Why it ended, in its own words."""
        said = self.words.read_text(errors="replace")
        if found := ERROR.findall(said):
            return re.sub(r"\n +", "; ", found[-1])
        last = said.strip().splitlines()[-1:] or ["it said nothing"]
        return f"exit code {self.launcher.returncode}: {last[0]}"


@contextlib.contextmanager
def serving(
    words: Sequence[str], nodes: Sequence[str], folder: Path, started: Callable[[Process], None]
) -> Iterator[Serving]:
    """Serve a candidate on these nodes during the block. Failure if it does not get ready.

    `words` are the launcher's; `folder` is the workspace that they name. Each candidate has its
    own: otherwise all candidates of a job would share one record. `started` is called with the
    launcher before it is ready.
    """
    program = [sys.executable, str(ROOT / "run_sbatch.py"), *words]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "launcher.txt").open("wb") as talk:
        launcher = subprocess.Popen(
            program,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the engine's log, which is in logs/, too
            stderr=talk,
            env={**os.environ, "NODELIST": ",".join(nodes)},
            start_new_session=True,  # ^C reaches only us: we end it once it is safe
            preexec_fn=ending_with_us(signal.SIGTERM),  # at which it ends what it started
        )
    started(launcher)
    served = Serving(launcher, folder)
    try:
        served.url = await_endpoint(served, folder / "logs/endpoint.json")
        yield served
    finally:
        end(launcher)


def await_endpoint(served: Serving, record: Path) -> str:
    """The URL, once the launcher has announced it."""
    while served.launcher.poll() is None:
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
            found = read_json(record)
            if found["launcher"].split(":")[1] == str(served.launcher.pid):
                return str(found["url"])
        time.sleep(TICK)
    raise Failure(served.cause())


def end(launcher: Process) -> None:
    """End the launcher. It has 60 s to clean up."""
    if launcher.poll() is None:
        launcher.send_signal(signal.SIGTERM)  # SIGINT is ignored in the background of a shell
    try:
        launcher.wait(60)
    except subprocess.TimeoutExpired:
        say(f"the launcher, process {launcher.pid}, did not end within 60 s: killing it")
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
