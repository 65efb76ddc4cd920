"""--why: what the logs of a launch say of its end, afterwards."""

import glob
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from common.talk import die
from launch import causes
from launch.log import end_of

READ = 1 << 19  # bytes of all the logs of a launch together; each gives its end
LEAST = 1 << 15


def why(logs: Path, name: str) -> int:
    """Say the cause on stdout and what to do next; exit code 1 where the logs name none."""
    # Of a launch's own log and its ranks', the launch's.
    log = Path(name or re.sub(r"_rank\d+(?=\.log$)", "", str(newest(logs))))
    if not log.is_file():
        die(f"{log}: there is no such log", hint=f"`ls {logs}` shows those of this workspace")
    found = cause_in([log, *ranks_of(log)], lambda path, size: end_of(path, 0, size))
    print(f"cause: {found.line}\nnext: {found.advice}" if found else "no cause in the log")
    return 0 if found else 1


def newest(logs: Path) -> Path:
    """The log written last, of those in a workspace."""
    log = max(logs.glob("trtllm_server_*.log"), key=lambda p: p.stat().st_mtime, default=None)
    return log or die(f"there is no log in {logs}")


def ranks_of(log: Path) -> list[Path]:
    return sorted(log.parent.glob(f"{glob.escape(log.stem)}_rank*.log"))


def cause_in(logs: Iterable[Path], end: Callable[[Path, int], str]) -> causes.Cause | None:
    """The cause that these files name; `end` reads so many bytes of the end of one."""
    paths = list(dict.fromkeys(logs))
    size = max(READ // len(paths), LEAST)
    return causes.of(*(end(path, size) for path in paths))
