"""Asks all nodes at once what they have and lack, before anything heavy is started."""

import contextlib
import os
import re
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from common.talk import Failure, aligned, counted, die, say, speaking
from launch import slurm
from launch.engines import packages
from launch.findings import Finding, Node, Wanted, gpus_of, named, usable
from launch.identity import is_alive
from launch.image import Image, is_pulled_anew
from launch.node.containers import Reap
from launch.node.enroot import SurveyEnroot
from launch.node.facts import Survey
from launch.node.messages import Container, Facts
from launch.nodes import Place, ask, run
from launch.order import Command, Told
from launch.placement import choose
from launch.plan import Plan
from launch.runtimes import runtime
from launch.slurm import Share, by_node, share_of, squeue
from launch.timelimit import LOOK_EVERY, TimeLimit, state_of

PATIENCE = 60.0  # seconds for all nodes together


def survey_command(wanted: Wanted, place: Place) -> Command:
    tag, tarball = wanted.image.tag, wanted.image.tarball
    paths = [*wanted.paths, *([str(tarball)] if tarball else [])]
    paths += [wanted.probe] if wanted.probe else []
    what = wanted.runtime, [wanted.port, *wanted.ports], tag, wanted.program, paths
    kind = SurveyEnroot if wanted.image.squash else Survey
    asked = packages() if wanted.ask_release else []
    return Command(place.every, kind(*what, asked, list(wanted.made)))


def ask_nodes(
    wanted: Wanted,
    place: Place,
    patience: float = 0,
    meanwhile: Callable[[], object] = lambda: None,
) -> list[Node]:
    """Ask every node; the head node comes first. Failure if one does not answer.

    A node that boots or runs a Prolog answers after minutes: Slurm's get `patience` seconds.
    `meanwhile` is called once they have been asked.
    """
    patience = max(PATIENCE, patience if place.slurm else 0)
    with speaking(partial(say_waiting, place, patience)):
        deadline = time.monotonic() + patience
        nodes = gather(ask_until(survey_command(wanted, place), place, deadline, meanwhile))
    for node in nodes:
        if share := place.allocation.shares.get(node.name):
            node.share = replace(share, of=share.of or max(share.count, node.facts.gpus))
    if len(nodes) < place.size:
        missing, names = place.size - len(nodes), ", ".join(node.name for node in nodes) or "none"
        hint = f"look at the others with `scontrol show job {place.job}` and `sinfo -R`"
        die(f"{missing} of {place.size} nodes did not answer; these did: {names}", hint=hint)
    return nodes


def ask_until(
    command: Command, place: Place, deadline: float, meanwhile: Callable[[], object]
) -> list[Told]:
    """Ask again if srun has given up on a node that Slurm still takes to be well.

    The job is watched meanwhile, since srun may notice its end only after minutes.
    """
    limit, how, kills = TimeLimit(place), list[str](), list[Callable[[], None]]()

    def look(_: float) -> None:
        if (ended := limit.how_it_ended()) and kills:
            how.append(ended)
            with contextlib.suppress(OSError):  # it has ended meanwhile
                kills.pop()()

    def begun(kill: Callable[[], None]) -> None:
        kills.append(kill)
        meanwhile()

    with speaking(look, LOOK_EVERY):
        while True:
            left = max(round(deadline - time.monotonic(), 1), 0.1)
            try:
                return ask(command, "asking the nodes", left, begun=begun)
            except Failure as failure:
                if how:
                    die(f"job {place.job} {how[0]} before its nodes answered", hint=slurm.SEE_NODES)
                if slurm.TIMED_OUT not in failure.message or time.monotonic() > deadline:
                    raise
            kills.clear()
            time.sleep(2)


def say_waiting(place: Place, patience: float, seconds: float) -> None:
    nodes = place.allocation.nodes
    names = ", ".join(nodes[:4]) + (f" and {len(nodes) - 4} more" if nodes[4:] else "")
    waited = f"after {seconds:.0f} s of at most {patience:.0f}"
    why = "booting, in a Prolog, or kept by another step (`squeue --steps`)?"
    state = state_of(place.job) if place.slurm else ""
    if state not in ("", "RUNNING", "CONFIGURING"):  # srun does not say that, and tries again
        why = f"Slurm calls job {place.job} {state}"
    say(f"no answer yet from {names or 'the nodes'} {waited} (--ready-timeout): {why}")


def gather(told: Iterable[Told]) -> list[Node]:
    nodes: dict[str, Node] = {}
    for each in told:
        if isinstance(each.message, Facts):
            nodes.setdefault(each.node, Node(each.node)).facts = each.message
        elif isinstance(each.message, Container):
            nodes.setdefault(each.node, Node(each.node)).containers.append(each.message)
    return sorted(nodes.values(), key=lambda node: node.facts.rank)


def judge(nodes: Sequence[Node], wanted: Wanted) -> list[Finding]:
    """Every check of every node. The first node serves: its GPUs and its port matter.

    Nodes that will not serve may lack what only servers need, such as the model or the image. The
    ports of a fleet's replicas are judged later, when it is known where they go.
    """
    findings: list[Finding] = []
    needed = how_many_serve(nodes, wanted)
    for index, node in enumerate(nodes):
        its = runtime(wanted.runtime).judge(node, wanted)
        findings += its if index < needed else map(not_needed, its)
        findings.append(judge_gpus(node, wanted, is_head=node is nodes[0]))
        findings += [judge_port(node, wanted.port)] if wanted.port and node is nodes[0] else []
        findings += judge_paths(node, wanted, several=needed > 1) if index < needed else []
        devices = f"{node.facts.efa} EFA" + ", gdrdrv" * node.facts.gdrdrv
        findings.append(node.ok("devices", devices))
    return findings


def not_needed(finding: Finding) -> Finding:
    """A finding about a node that will not serve: it only has to have a Docker that answers."""
    if finding.state == "ok" or finding.check not in ("image", "disk", "toolkit", "engine"):
        return finding
    return replace(finding, state="ok", text="not needed", hint="")


def how_many_serve(nodes: Sequence[Node], wanted: Wanted) -> int:
    """How many nodes, from the first on, the servers need; all of them, if those are not enough."""
    if not wanted.world or not nodes:
        return len(nodes)
    if wanted.replicas != "1":
        return needed_by_fleet(nodes, wanted) or len(nodes)
    each = usable(wanted.gpus, nodes[0].gpus)
    one = wanted.gpus == "none" or wanted.world <= each
    return 1 if one else min(-(-wanted.world // (each or 1)), len(nodes))


def needed_by_fleet(nodes: Sequence[Node], wanted: Wanted) -> int:
    if wanted.gpus == "none":
        return min(int(wanted.replicas), len(nodes))
    with contextlib.suppress(Failure):  # the launch says so later
        taken = choose(wanted.replicas, wanted.world, [gpus_of(n, wanted.gpus) for n in nodes])
        return max(seat.first + seat.nodes for seat in taken)
    return 0


def judge_paths(node: Node, wanted: Wanted, *, several: bool) -> Iterator[Finding]:
    shared = "it has to be on a file system that the nodes share"
    for path in node.facts.unseen:
        if path == wanted.probe:
            here, workspace = socket.gethostname().partition(".")[0], Path(path).parent
            text = f"the workspace {workspace} is not the one of {here}"
            yield from [node.bad("paths", text, f"{shared}: see --workspace")] if several else []
        elif path != str(wanted.image.tarball):
            hint = f"{shared}, or at the same path on every node that serves"
            yield node.bad("paths", f"{path} is not there, or not readable", hint)
    for path in node.facts.unmade:
        hint = "set HF_HOME, or the variable that names it, to a directory of yours"
        yield node.bad("paths", f"{path} is not a directory, and you cannot make it one", hint)


@contextlib.contextmanager
def probe(workspace: Path, place: Place) -> Iterator[str]:
    """A file that shows whether the nodes' workspace is ours; '' if there can be none."""
    with contextlib.ExitStack() as stack:
        name = ""
        with contextlib.suppress(OSError):
            if place.slurm:
                made = partial(tempfile.NamedTemporaryFile, prefix=".tensorrt-llm-serve-")
                name = stack.enter_context(made(dir=workspace)).name
        yield name


def judge_gpus(node: Node, wanted: Wanted, *, is_head: bool) -> Finding:
    if wanted.gpus == "none":
        return node.ok("gpus", "not asked for")
    none, there = "GPUS=none is for an engine without GPUs", node.facts.gpus
    absent = [gpu for gpu in named(wanted.gpus) if gpu.isdecimal() and int(gpu) >= there > 0]
    if absent and is_head:
        text = f"GPUS={wanted.gpus} names GPU {absent[0]}, and there are {there} devices"
        return Finding(node.name, "gpus", "note", text, "see nvidia-smi -L there")
    if node.gpus and node.share:
        return judge_share(node, node.share, wanted.gpus)
    if node.gpus or not is_head:
        return node.ok("gpus", str(node.gpus))
    if node.share:
        hint = f"ask for them, as in salloc --gpus-per-node={node.share.of}; {none}"
        return node.bad("gpus", "the job has no GPU there", hint)
    return node.bad("gpus", "no GPU found", f"see nvidia-smi there; {none}")


def refuse_gpus_of_jobs(place: Place, asked: str) -> None:
    """Failure if we are in no job, on a machine whose GPUs Slurm has given to jobs."""
    if place.slurm or asked == "none" or "device=" in asked:
        return
    name, said = os.uname().nodename.partition(".")[0], ""
    show = partial(run, timeout=10)
    with contextlib.suppress(Failure):  # it is no node of Slurm's
        try:
            said = show(["scontrol", "show", "node", "-d", "-o", name])
        except Failure as failure:  # or Slurm calls it otherwise
            if "did not end" in failure.message:
                raise
            if alias := show(["scontrol", "show", "aliases", name]).strip():
                said = show(["scontrol", "show", "node", "-d", "-o", alias])
    used = re.search(r" GresUsed=(\S+)", said)
    if used and share_of(used[1], "").count:
        what = f"Slurm has given GPUs of {name} to jobs ({used[1]}), and you are not in a job"
        die(what, hint="ask for one: salloc -N 1 --gpus-per-node=8, or sbatch run_sbatch.py")


def judge_share(node: Node, share: Share, asked: str) -> Finding:
    """Slurm's GPU numbers are Docker's only if Slurm hands out exactly the devices that there are.

    With slices of GPUs (MIG) it hands out more; if its configuration lacks GPUs, fewer.
    """
    ours, agree = share.each, node.facts.gpus in (0, share.of)
    hint = "name the job's as docker does, as in GPUS='\"device=0,1\"'; see nvidia-smi -L there"
    if asked != "auto":
        given = named(asked)
        theirs = [gpu for gpu in given if agree and gpu.isdecimal() and gpu not in ours]
        if not share.is_whole and (theirs or not given):
            text = f"GPUS={asked} takes GPUs that the job does not have: it has {share.ids}"
            return node.bad("gpus", text, "GPUS=auto takes the job's")
    elif not agree:
        text = f"Slurm hands out {share.of} GPUs, but there are {node.facts.gpus} devices"
        return node.bad("gpus", f"{text}: it is not clear which ones are the job's", hint)
    elif len(ours) != share.count:
        return node.bad("gpus", "Slurm does not say which GPUs are the job's", hint)
    return node.ok("gpus", str(share.count))


def judge_port(node: Node, port: int, whose: str = "") -> Finding:
    taken = node.facts.taken.get(str(port))
    if taken is None:
        return node.ok("port", f"{port} free")
    what = f"port {port}{whose} is taken" + (f" by {taken}" if taken else "")
    return node.bad("port", what, "choose another with --port or PORT=")


def judge_replicas(nodes: Sequence[Node], plan: Plan) -> list[Finding]:
    """The port of every replica of a fleet, on its node."""
    fleet = plan.replicas if plan.is_fleet else ()
    return [judge_port(nodes[each.first], each.port, f", {each.label}'s,") for each in fleet]


def stop_if_bad(findings: Sequence[Finding]) -> None:
    """Failure with a sentence for every bad finding."""
    if bad := [finding for finding in findings if finding.state == "bad"]:
        hints = dict.fromkeys(finding.hint for finding in bad if finding.hint)
        die(by_node((f.node, f.text) for f in bad), hint="; ".join(hints))


def say_notes(findings: Sequence[Finding]) -> None:
    """Say what stops no launch, but what somebody may want to change."""
    if notes := [f for f in findings if f.state == "note" and f.hint]:
        say(by_node((f.node, f"{f.text} ({f.hint})") for f in notes))


def table(findings: Sequence[Finding]) -> str:
    """A row for each node, a column for each check."""
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for f in findings:
        mark = {"ok": "", "note": "* ", "bad": "! "}[f.state]
        cells[f.node][f.check] = " ".join([cells[f.node].get(f.check, ""), mark + f.text]).strip()
    columns = list(dict.fromkeys(f.check for f in findings))
    rows = [["node", *columns]]
    rows += [[node, *(row.get(c, "-") for c in columns)] for node, row in cells.items()]
    return "\n".join(aligned(rows))


def must_provide(nodes: Sequence[Node], image: Image) -> bool:
    """Whether any node lacks the image, or the registry has to be asked for a newer one."""
    there = {node.facts.image for node in nodes}
    return not all(node.holds(image) for node in nodes) or is_pulled_anew(image, there)


def orphans(nodes: Sequence[Node], user: str, jobs: set[str] | None) -> list[str]:
    """Ids of this user's containers whose launcher is gone: their job has ended, or it was killed.

    `jobs` are the user's jobs that Slurm knows; None if nobody can say.
    """
    found = []
    for each in (each for node in nodes for each in node.containers):
        job_ended = each.job.isdigit() and jobs is not None and each.job not in jobs
        alive = is_alive(each.launcher, each.job)
        if each.user == user and alive is not True and (job_ended or alive is False):
            found.append(each.id)
    return found


def ours_already(nodes: Sequence[Node], place: Place, gone: Sequence[str]) -> str:
    """The name of a container that this very job already runs, or ''."""
    ours = (each for node in nodes for each in node.containers if each.job == place.job)
    return next((each.name for each in ours if each.id not in gone), "")


def jobs_of(user: str) -> set[str] | None:
    """The jobs that Slurm still holds, by id: the user's, or everybody's ('').

    None without Slurm, or when it is silent.
    """
    done = squeue(*([f"--user={user}"] if user else []), "--format=%A")
    return set(done.stdout.split()) if done and done.returncode == 0 else None


def reap(nodes: Sequence[Node], place: Place, user: str) -> bool:
    """Remove what killed launchers left behind; whether there was anything."""
    if not any(node.containers for node in nodes):
        return False
    jobs = jobs_of(user)
    if place.job not in (jobs or ()):
        jobs = None  # an answer without our own job is another cluster's, or incomplete
    gone = orphans(nodes, user, jobs)
    if name := ours_already(nodes, place, gone):
        hint = f"stop that launch first (make stop JOB={place.job}), or use another allocation"
        die(f"container {name} is already running in this job", hint=hint)
    if gone:
        say(f"removing {counted(len(gone), 'container')} that an earlier launch left behind")
        ask(Command(place.every, Reap(list(gone))), "removing them")
    return bool(gone)


def summary(nodes: Sequence[Node]) -> str:
    names, facts = ", ".join(node.name for node in nodes), nodes[0].facts
    enroot = f"pyxis, enroot {facts.enroot}".removesuffix(", enroot ")
    what = f"Docker {facts.docker}" if facts.docker else facts.engine or enroot
    *some, last = dict.fromkeys(node.gpus for node in nodes)
    gpus = " and ".join([*map(str, some), counted(last, "GPU")]) + " each" * (len(nodes) > 1)
    return f"preflight: {counted(len(nodes), 'node')} ready ({names}): {what}, {gpus}"
