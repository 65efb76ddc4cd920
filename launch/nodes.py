"""Where commands run: on this machine, or on every node of a Slurm allocation.

The place is a prefix (`[]` or `srun ...`), never a branch. What a node has to decide for itself is
a constant shell script; values reach it as "$1", "$2", ..., so nothing is ever quoted twice. A
script that has to outlive one question is *held*: it stops when its standard input closes. However
this process ends, SIGKILL included, the kernel closes that pipe, and the node cleans up by itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from common.talk import die, say

# srun reads these from the environment of an allocation, and they bend a step that did not ask.
LEAKS = (
    "SLURM_CPU_BIND",
    "SLURM_CPUS_PER_TASK",
    "SLURM_DISTRIBUTION",
    "SLURM_HINT",
    "SLURM_TRES_PER_TASK",
    "SLURM_HOSTFILE",
    "SLURM_NTASKS_PER_GPU",
    "SLURM_NTASKS_PER_TRES",
    "SLURM_GPUS",
    "SLURM_GPUS_PER_TASK",
    "SLURM_GPUS_PER_SOCKET",
    "SLURM_GPU_BIND",
    "SLURM_LABELIO",
    "SLURM_STDINMODE",
    "SLURM_STDOUTMODE",
)


SEE_NODES = "see what Slurm thinks: `sinfo -R`, `squeue`; leave a node out: salloc --exclude"


# The end of a step by Slurm: *** STEP 5.1 ON n1 CANCELLED AT 2025-11-24T08:14:52 DUE TO ... ***
CANCELLED = re.compile(r"CANCELLED AT \S+( DUE TO ([A-Z ]+[A-Z]))?")
CANCEL_WORDS = {
    "TIME LIMIT": "has reached its time limit",
    "NODE FAILURE": "has lost a node",
    "PREEMPTION": "was preempted",
}


def script(*parts: str) -> str:
    """A shell script on one line, so that a command can be printed on one; no comments in it."""
    lines = (line.strip() for part in parts for line in part.splitlines())
    return " ".join(filter(None, lines))


def shown(argv: Sequence[str]) -> str:
    """A command for the eye: the constant script is named, not printed (--dry-run prints it)."""
    short = list(argv)
    for i, word in enumerate(argv[:-1]):
        if word == "-c" and len(argv[i + 1]) > 100:
            short[i + 1] = "..."
    return shlex.join(short)


def last_words(text: str, lines: int = 1) -> str:
    """The last lines that say something; Slurm's and Docker's own postscripts do not."""
    noise = ("srun: ", "slurmstepd: ", "See 'docker", "Run 'docker", "salloc: ")
    remark = "srun: cluster configuration lacks support for cpu binding"  # never why
    said = [s.strip() for s in text.splitlines() if s.strip() and not s.startswith(remark)]
    own = [s for s in said if not s.startswith(noise)]
    errors = [s for s in said if "error:" in s]
    return " / ".join((own or errors or said)[-lines:])


def lost_nodes(text: str) -> str:
    """Which nodes Slurm cannot reach, by what srun says; '' where it reaches all."""
    if failed := re.findall(r"Task launch for \S+ failed on node (\S+): (.+)", text):
        return by_node((node, f"Slurm cannot start anything there: {why}") for node, why in failed)
    return by_node(
        (node, "Slurm has lost this node") for node in re.findall(r"Node failure on (\S+)", text)
    )


def slurms_word(text: str) -> str:
    """What Slurm says of a step that it could not start, or ended; '' where it did neither."""
    if lost := lost_nodes(text):
        return lost
    if cancelled := CANCELLED.search(text):
        return f"Slurm ended the job: it {how_cancelled(cancelled)}"
    aborted = "Job step aborted" in text
    return "Slurm ended the job: it was cancelled, or is out of time" if aborted else ""


def how_cancelled(found: re.Match[str]) -> str:
    """What became of the job, by a match of CANCELLED."""
    return CANCEL_WORDS.get(found[2], "was cancelled")


def run(argv: Sequence[str], *, timeout: float = 60) -> str:
    """Run a short command, return its stdout; Failure with the command's own last words.

    Its process ends with ours: a signal that stops us stops it, too.
    """
    import sh  # late: it brings asyncio

    say(f"$ {shown(argv)}")
    try:
        process = sh.Command(argv[0])(
            *argv[1:],
            _bg=True,
            _bg_exc=False,
            _tty_out=False,
            _in="",
            _new_session=True,
            _timeout=timeout,
            _decode_errors="replace",
        )
    except sh.CommandNotFound:
        die(f"{argv[0]}: not found in PATH")
    except (ValueError, sh.ForkException) as error:  # a NUL; more than an argument may hold
        die(f"{argv[0]} cannot be run: {last_words(str(error))}")
    try:
        process.wait()
    except sh.TimeoutException:
        die(f"`{shown(argv)}` did not end within {timeout:g} s")
    except sh.ErrorReturnCode as error:
        said = error.stderr.decode(errors="replace")
        if word := slurms_word(said):
            die(f"{word}; `{shown(argv)}` has failed", hint=SEE_NODES)
        words = last_words(said, 3)
        die(f"`{shown(argv)}` ended with exit code {error.exit_code}: {words or 'no message'}")
    except BaseException:
        process.terminate()
        raise
    return str(process)


def by_node(what: Iterable[tuple[str, str]]) -> str:
    """`n1, n2: the same; n3: another`: one sentence for all nodes that say it."""
    nodes: dict[str, list[str]] = {}
    for node, text in what:
        nodes.setdefault(text, []).append(node)
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in nodes.items())


@dataclass(frozen=True)
class Place:
    """Where the nodes are: `job` and `size`, and how to run a command on them."""

    job: str
    size: int
    srun: tuple[str, ...]  # () without Slurm

    @property
    def slurm(self) -> bool:
        return bool(self.srun)

    def on(self, nodes: int, ranks: int = 1, mpi: str = "none") -> list[str]:
        """The prefix for the first `nodes` nodes, `ranks` tasks on each."""
        if not self.srun:
            return []
        return [
            *self.srun,
            f"--mpi={mpi}",
            "--cpu-bind=none",
            # However Slurm is configured: one node's failure does not end what the others do.
            "--kill-on-bad-exit=0",
            "--wait=0",
            f"--ntasks-per-node={ranks}",
            f"--nodes={nodes}",
            f"--ntasks={nodes * ranks}",
            *(["--relative=0"] if nodes < self.size else []),
        ]

    @property
    def every(self) -> list[str]:
        return self.on(self.size)

    @property
    def head(self) -> list[str]:
        return self.on(1)


def unfiltered() -> dict[str, str]:
    """Our environment for squeue: a filter in it must not make a job look ended."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}


def find_place(environ: Mapping[str, str]) -> Place:
    """This machine, or the allocation that SLURM_JOB_ID names."""
    if not (job := environ.get("SLURM_JOB_ID")):
        return Place(f"local{os.getpid()}", 1, ())
    if not re.fullmatch("[0-9]{1,20}", job):  # it becomes a part of file and container names
        die(f"SLURM_JOB_ID is {job[:99]!r}, not a job's number")
    nodes = environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES") or "1"
    size = int(nodes) if nodes.isdecimal() else 1
    leaks = [word for name in LEAKS if name in environ for word in ("-u", name)]
    # --overlap: a step without it waits for the other steps to end.
    srun = (*(["env", *leaks] if leaks else []), "srun", "--overlap", "--export=ALL")
    return Place(job, size, srun)


# Every script begins by knowing its node's name and how to tell something about it.
TELL = script(r"""
    node=${SLURMD_NODENAME:-$(hostname)};
    tell() { printf '%s\t%s\t%s\n' "$node" "$1" "${2//[$'\n\t']/ }"; };
""")

# Whether somebody listens on a port of the node, by what the kernel says.
LISTENS = script(r"""
    listens() {
        printf -v socket ':%04X [0-9A-F]+:0000 0A ' "$1";
        grep -Eqs "$socket" /proc/net/tcp /proc/net/tcp6;
    };
""")

# A held script: when standard input ends, it gets SIGTERM and does in its trap what has to be done.
# The input stays open as 3, for a container that is held by it, too.
# Should the shell be gone by then, its number may be another's: the watcher asks whose child it is.
HELD = r"""
    exec 3<&0 </dev/null;
    {
        WAIT;
        read -r _ _ _ parent _ </proc/$BASHPID/stat;
        [ "$parent" != $$ ] || kill -TERM $$;
    } <&3 >/dev/null 2>&1 &
    watch=$!;
    trap 'kill $watch 2>/dev/null' EXIT;
"""
HOLD = script(HELD.replace("WAIT", "while IFS= read -r _; do :; done"))

# A node that was out of reach may never hear of that end. What lasts asks Slurm, too, every minute:
# the job is over where Slurm says so, after it has said that it runs, and in no other case.
JOB_IS_OVER = script(r"""
    known=;
    over() {
        [ -n "$SLURM_JOB_ID" ] || return;
        said=$(
            unset ${!SQUEUE_*} SLURM_CLUSTERS;
            timeout 5 squeue --all --local --noheader --states=all --jobs="$SLURM_JOB_ID"
            --format="%A %T" 2>&1 </dev/null
        );
        if grep -qx "$SLURM_JOB_ID RUNNING" <<<"$said"; then known=1; return 1; fi;
        [ -n "$known" ] &&
        grep -Eqx "$SLURM_JOB_ID (FINAL)|.*Invalid job id specified" <<<"$said";
    };
""").replace(
    "FINAL",
    "BOOT_FAIL|CANCELLED|COMPLETED|DEADLINE|FAILED|NODE_FAIL|OUT_OF_MEMORY|PREEMPTED|TIMEOUT",
)
HOLD_IN_JOB = script(
    JOB_IS_OVER,
    HELD.replace(
        "WAIT",
        "over; while IFS= read -r -t 60 _ || { [ $? -gt 128 ] && ! over; }; do :; done",
    ),
)


class Told:
    """What a node told: (node, key, value). Anything else it printed is talk."""

    def __init__(self, line: str) -> None:
        self.line = line.rstrip("\n")
        parts = self.line.split("\t")
        self.node, self.key, self.value = map(str.strip, parts if len(parts) == 3 else ("",) * 3)


class Step:
    """A held command: a process of its own session whose node side ends when we do."""

    def __init__(
        self,
        argv: Sequence[str],
        output: int | IO[Any] = subprocess.PIPE,
        secret: str | None = None,
    ) -> None:
        say(f"$ {shown(argv)}")
        try:
            self.process: subprocess.Popen[str] = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            die(f"{argv[0]} cannot be run: {getattr(error, 'strerror', error)}")
        if secret is not None and self.process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(secret + "\n")
                self.process.stdin.flush()

    def told(self) -> Iterator[Told]:
        """What the nodes tell, until the command ends."""
        assert self.process.stdout is not None
        yield from map(Told, self.process.stdout)
        self.process.wait()

    def poll(self) -> int | None:
        return self.process.poll()

    def let_go(self) -> None:
        """Close its standard input: the node's side begins to stop."""
        if self.process.stdin:
            with contextlib.suppress(OSError):
                self.process.stdin.close()

    def stop(self, seconds: float = 15) -> bool:
        """Let go of the node's side and wait for it; False when it did not end in time."""
        self.let_go()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):  # its children, too: they hold the pipe
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return False
        finally:
            if self.process.stdout:
                self.process.stdout.close()
        return True


@contextlib.contextmanager
def held(argv: Sequence[str], secret: str | None = None) -> Iterator[Step]:
    """A step for as long as the block lasts."""
    step = Step(argv, secret=secret)
    try:
        yield step
    finally:
        step.stop()


def process_start(pid: int) -> str:
    """When a process began, in clock ticks since boot: its identity beside its pid; '' if gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]  # a zombie has ended
    except OSError:
        return ""


def here() -> str:
    """This host, this boot, this process table: where a process id means something."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}/{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"


def launcher() -> str:
    """Who we are: host, pid and start of this process, to tell later whether we still live."""
    return f"{here()}:{os.getpid()}:{process_start(os.getpid())}"


def is_alive(who: str) -> bool | None:
    """Whether the launcher of that name lives; None where only another host could tell."""
    where, _, rest = who.partition(":")
    pid, _, start = rest.partition(":")
    (host, boot, *_), (our_host, our_boot, *_) = f"{where}//".split("/"), here().split("/")
    if host == our_host and boot and boot != our_boot:
        return False  # it lived before this host was booted
    if where != here() or not pid.isdigit():
        return None
    return process_start(int(pid)) == start != ""
