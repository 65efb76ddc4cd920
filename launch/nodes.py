"""Where commands run: on this machine, or on every node of a Slurm allocation.

The place is a prefix (`[]` or `srun ...`), never a branch. What a node has to decide for itself is
an order (order.py). An order that lasts longer than a question is *held*: it ends when its standard
input does. However this process ends, SIGKILL included, the kernel closes that pipe.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any, NoReturn

from common.settings import setting
from common.talk import Failure, die, note, say
from launch import slurm
from launch.node.base import NOT_FOUND, OVER
from launch.order import Command, Told, read

# srun reads most of Slurm's variables, those of the allocation and leftovers of another job, and
# they change steps that did not ask for it. Only these can be trusted.
KEPT = re.compile("SLURM_(CONF|JOB_?ID|JOB_NAME|SUBMIT_.*|.*CLUSTER.*|DEBUG.*|NETWORK|PMIX.*)$")
# Its plug-ins do, too: each step would be in the container that pyxis has been told of.
BENDS = re.compile("SLURM_|SRUN_|_SLURM_SPANK_OPTION_pyxis|PYXIS_")
APART: Any = {
    "_bg": True,
    "_bg_exc": False,
    "_tty_out": False,
    "_new_session": True,
}  # sh's options


@dataclass(frozen=True)
class Place:
    """Where the nodes are: `job` and `size`, and how to run a command on them."""

    job: str
    size: int
    srun: tuple[str, ...]  # () without Slurm
    allocation: slurm.Allocation = slurm.NONE
    part: bool = False  # the job has more nodes: NODELIST names these

    @property
    def slurm(self) -> bool:
        return bool(self.srun)

    @property
    def clean(self) -> Sequence[str]:
        """What comes before srun, to keep Slurm's variables from it."""
        return self.srun[: self.srun.index("srun")] if self.srun else ()

    def on(
        self, nodes: int, ranks: int = 1, mpi: str = "none", first: int = 0, gpus: int = 0
    ) -> list[str]:
        """The prefix for `nodes` nodes from the `first` on, `ranks` tasks on each.

        Left to itself, a step is given GPUs as its job asked for them (one of eight with
        --gpus-per-task), or is refused. Containers need none: their order names the job's GPUs.
        Nodes go by name, since Slurm renumbers those of a job that has lost one (--no-kill).
        """
        if not self.srun:
            return []
        names = ",".join(self.allocation.nodes[first : first + nodes])
        some = nodes < self.size or self.part
        return [
            *self.srun,
            f"--mpi={mpi}",
            "--cpu-bind=none",
            # However Slurm is configured: one node's failure must not end what the others do.
            "--kill-on-bad-exit=0",
            "--wait=0",
            f"--ntasks-per-node={ranks}",
            f"--nodes={nodes}",
            f"--ntasks={nodes * ranks}",
            *([f"--gpus={gpus}" if gpus else "--gres=none"] if self.allocation.shares else []),
            *([f"--nodelist={names}"] if names and some else []),
        ]

    @property
    def every(self) -> list[str]:
        return self.on(self.size)

    def gpus(self, index: int) -> int:
        """How many GPUs Slurm says the job has on that node."""
        share = self.allocation.shares.get("".join(self.allocation.nodes[index : index + 1]))
        return share.count if share else 0

    @property
    def head(self) -> list[str]:
        return self.on(1)


def find_place(environ: Mapping[str, str]) -> Place:
    """This machine, or the allocation that SLURM_JOB_ID names; Slurm is asked what that is."""
    if not (job := environ.get("SLURM_JOB_ID")):
        return Place(f"local{os.getpid()}", 1, ())
    if not re.fullmatch("[0-9]{1,20}", job):  # it becomes a part of file and container names
        die(f"SLURM_JOB_ID is {job[:99]!r}, not a job's number")
    if environ.get("SLURM_CLUSTERS") and (own := environ.get("SLURM_CLUSTER_NAME")):
        os.environ["SLURM_CLUSTERS"] = own  # each cluster may have a job of that number
    allocation = ask_slurm(job)
    bend = (name for name in environ if BENDS.match(name) and not KEPT.match(name))
    leaks = [word for name in sorted(bend) for word in ("-u", name)]
    # Steps of a heterogeneous job go by its first job's number, and the component that they name.
    first, which = allocation.component or ("", "")
    component = [f"--jobid={first}", f"--het-group={which}"] if first else []
    # --overlap: a step without it waits for the other steps to end.
    srun = (*(["env", *leaks] if leaks else []), "srun", *component, "--overlap", "--export=ALL")
    return part_of(
        Place(job, len(allocation.nodes), srun, allocation), setting("NODELIST", environ)
    )


def part_of(place: Place, asked: str) -> Place:
    """The place, cut down to the nodes that NODELIST names; all of it if it names none.

    Failure if it names others, or nodes that are not next to each other in the job.
    """
    if not asked:
        return place
    there, wanted = place.allocation.nodes, set(expand(asked))
    names = [name for name in there if name in wanted]
    begin = there.index(names[0]) if names else 0
    end = begin + len(names)
    if len(names) != len(wanted) or list(there[begin:end]) != names:
        has = f"job {place.job} has {', '.join(there)}"
        die(f"NODELIST={asked}: {has}", hint="name consecutive ones of these")
    shares = {name: share for name, share in place.allocation.shares.items() if name in wanted}
    part = replace(place.allocation, nodes=there[begin:end], shares=shares)
    whole = len(names) == len(there)
    return replace(place, size=len(names), allocation=part, part=not whole)


def ask_slurm(job: str) -> slurm.Allocation:
    """The job's nodes and its GPUs on them. Failure if Slurm says that it does not run."""
    hint = "SLURM_JOB_ID has to name a running job (squeue), or to be unset"
    try:
        said = run(["scontrol", "show", "job", "-d", job], what=f"asking Slurm about job {job}")
    except Failure as failure:
        silent = re.search(f"Unable to contact|did not end|{slurm.TIMED_OUT}", failure.message)
        again = "Slurm's controller does not answer (`scontrol ping`): try again when it does"
        die(failure.message, hint=again if silent else hint)
    record = slurm.record_of(job, said)
    state, nodes = slurm.value_in(record, "JobState"), slurm.value_in(record, "NodeList")
    if state in (*OVER, "PENDING") or nodes in ("", "(null)"):
        die(f"job {job} does not run: Slurm calls it {state or 'nothing'}", hint=hint)
    known = why = ""
    try:
        known = run(["scontrol", "show", "node", "-o", nodes])
    except Failure as failure:  # PrivateData=nodes; the job's own GPUs are shown nevertheless
        why = failure.message
    listed = re.findall(r"^NodeName=(\S+)", known, re.M)  # in the order of the job's list
    whole = str(len(listed)) == slurm.value_in(record, "NumNodes")
    names = functools.cache(lambda some: listed if whole and some == nodes else expand(some))
    found = slurm.allocation_of(record, known, names)
    if why and not found.shares:
        say(f"Slurm does not show which GPUs of its nodes are the job's, if any: {why}")
    return found


def expand(nodes: str) -> list[str]:
    """Expand n[1-2] to n1, n2."""
    if not re.search(r"[\[,]", nodes):
        return [nodes]
    return run(["scontrol", "show", "hostnames", nodes]).split()


def run(
    argv: Sequence[str],
    *,
    timeout: float = 60,
    text: str = "",
    what: str = "",
    begun: Callable[[Callable[[], None]], object] = id,
) -> str:
    """Run a short command, return its stdout; Failure with the command's own last words.

    `text` is its input, `what` says what it does, `begun` is told how to kill it. Its process ends
    with ours: a signal that stops us stops it, too.
    """
    import sh  # late: it imports asyncio

    if not text:  # an order has been noted already
        note(f"$ {shlex.join(argv)}")
    what = what or f"`{shlex.join(argv)}`"
    try:
        program = sh.Command(argv[0])
        process = program(*argv[1:], _in=text, _decode_errors="replace", **APART)
    except sh.CommandNotFound:
        die(f"{argv[0]}: not found in PATH")
    except (ValueError, sh.ForkException) as error:  # a NUL; or longer than an argument may be
        die(f"{argv[0]} cannot be run: {slurm.last_words(str(error))}")
    clock = threading.Timer(timeout, process.kill)  # sh's own timeout costs up to 0.1 s each time
    clock.daemon = True
    clock.start()
    try:
        begun(process.kill)
        process.wait()
    except sh.ErrorReturnCode as error:
        if clock.finished.is_set():
            hint = slurm.SEE_NODES if "srun" in argv else ""
            die(f"{what} did not end within {timeout:g} s", hint=hint)
        die_of_exit(what, error.exit_code, error.stderr.decode(errors="replace"))
    except BaseException:
        process.terminate()
        raise
    finally:
        clock.cancel()
    return str(process)


def die_of_exit(what: str, code: int, said: str) -> NoReturn:
    """Failure for a command that failed, with what it said."""
    if nodes := slurm.without_python(said):
        die(nodes, hint="the nodes need python3, 3.9 or newer, in PATH (apt-get install python3)")
    if code == NOT_FOUND and (missing := re.search(r"env: .(srun).: No such file", said)):
        die(f"{missing[1]}: not found in PATH")
    if word := slurm.slurms_word(said):
        die(f"{word}; {what} has failed", hint=slurm.SEE_NODES)
    words = slurm.last_words(said, 3)
    die(f"{what} ended with exit code {code}: {words or 'no message'}")


def ask(command: Command, what: str, timeout: float = 60, **more: Any) -> list[Told]:  # noqa: ANN401
    """Give nodes a short order, and return what they told. Failure if one could not do it."""
    note(command.shown())
    said = run(command.argv, timeout=timeout, text=command.text, what=what, **more)
    return list(read(said.splitlines()))


class Step:
    """A command whose input is held open: its side on the nodes ends when we do."""

    def __init__(
        self, command: Command, output: int | IO[Any] = subprocess.PIPE, secret: str = ""
    ) -> None:
        """Start it and send its order; `secret` is a line that follows the order."""
        note(command.shown(more="cat; "))
        argv = command.argv
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
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(command.text + secret)
            self.process.stdin.flush()

    def told(self) -> Iterator[Told]:
        """What the nodes tell, until the command ends."""
        assert self.process.stdout is not None
        yield from read(self.process.stdout)
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
            with contextlib.suppress(ProcessLookupError):  # its children hold the pipe, too
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return False
        finally:
            if self.process.stdout:
                self.process.stdout.close()
        return True


@contextlib.contextmanager
def held(command: Command, secret: str = "") -> Iterator[Step]:
    """A step for as long as the block lasts."""
    step = Step(command, secret=secret)
    try:
        yield step
    finally:
        step.stop()
