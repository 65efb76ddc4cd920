"""What every node has and lacks, asked of all of them at once, before anything heavy is started."""

from __future__ import annotations

import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from common.talk import die, say
from launch.image import GET_ONE, Image, is_pulled_anew
from launch.nodes import LISTENS, TELL, Place, Told, by_node, is_alive, run, script, unfiltered

LABEL = "tensorrt-llm-serve"
PATIENCE = 60.0  # seconds for all nodes together

PREFLIGHT = script(
    TELL,
    LISTENS,
    r"""
    shopt -s nullglob;
    runtime=$1; port=$2; tag=$3; shift 3;
    tell rank "${SLURM_NODEID:-0}";
    tell addresses "$(hostname -I 2>/dev/null)";
    nvidia=(/dev/nvidia[0-9]*); gpus=${#nvidia[@]};
    [ "$gpus" != 0 ] || gpus=$(nvidia-smi -L 2>/dev/null | grep -c ^GPU);
    tell gpus "$gpus";
    tell allocated "$SLURM_STEP_GPUS";
    efa=(/dev/infiniband/uverbs*); tell efa "${#efa[@]}";
    gdrdrv=(/dev/gdrdr[v]); tell gdrdrv "${#gdrdrv[@]}";
    listens "$port" &&
    tell taken "$(ss -Hltnp "sport = :$port" 2>/dev/null | sed -n 's/.*users:((\([^)]*\)).*/\1/p')";
    for path; do [ -r "$path" ] || tell unseen "$path"; done;
    if [ "$runtime" = bare ]; then tell engine "$(command -v trtllm-serve)"; exit 0; fi;
    command -v docker >/dev/null || { tell no-docker "docker: not found in PATH"; exit 0; };
    info=$(timeout 10 docker info --format
        '{{println .ServerVersion}}{{println .DriverStatus}}{{.DockerRootDir}}' 2>/dev/null) ||
    {
        [ $? = 124 ] || why=$(timeout 10 docker version --format '{{.Server.Version}}' 2>&1);
        tell no-docker "${why:-it did not answer within 10 s}"; exit 0;
    };
    { read -r version; read -r store; read -r root; } < <(printf '%s\n' "$info");
    tell docker "$version";
    tell store "$store";
    tell image "$(docker image inspect --format
        '{{.Id}} {{json .RootFS.Layers}}' "$tag" 2>/dev/null)";
    tell free "$(df -B1 --output=avail "$root" 2>/dev/null | tail -n 1)";
    docker ps --all --filter "label=LABEL.job" --format
        '{{.ID}} {{.Names}} {{.Label "LABEL.job"}} {{.Label "LABEL.launcher"}}
         {{.Label "LABEL.user"}}' |
    while IFS= read -r line; do tell container "$line"; done;
""",
).replace("LABEL", LABEL)

REMOVE = script(
    TELL,
    r"""
    for id; do docker rm --force "$id" >/dev/null 2>&1 && tell removed "$id"; done; true;
""",
)


@dataclass
class Node:
    """What one node told. Sizes in bytes."""

    name: str
    facts: dict[str, str] = field(default_factory=dict)
    containers: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)

    def number(self, key: str) -> int:
        value = self.facts.get(key, "")
        return int(value) if value.isdigit() else 0

    @property
    def gpus(self) -> int:
        """GPUs that we may use: those of the allocation, else all there are."""
        allocated = [gpu for gpu in self.facts.get("allocated", "").split(",") if gpu]
        return len(allocated) or self.number("gpus")

    def holds(self, image: Image) -> bool:
        identity, _, layers = self.facts.get("image", "").partition(" ")
        return image.is_held(identity, layers, self.facts.get("store", ""))

    @property
    def identity(self) -> str:
        return self.facts.get("image", "").partition(" ")[0]


@dataclass(frozen=True)
class Wanted:
    """What the nodes have to offer."""

    runtime: str
    image: Image
    port: int
    gpus: str  # the GPUS setting: auto, none, or docker's own words
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """One cell of the report. `state` is ok, note or bad; a bad one stops the launch."""

    node: str
    check: str
    state: str
    text: str
    hint: str = ""


def preflight_command(wanted: Wanted, place: Place) -> list[str]:
    return [
        *place.every,
        "bash",
        "-c",
        PREFLIGHT,
        "preflight",
        wanted.runtime,
        str(wanted.port),
        wanted.image.tag,
        *wanted.paths,
    ]


def ask_nodes(wanted: Wanted, place: Place) -> list[Node]:
    """Ask every node; the head node comes first. Failure when one does not answer."""
    told = run(preflight_command(wanted, place), timeout=PATIENCE)
    nodes = gather(map(Told, told.splitlines()))
    if len(nodes) < place.size:
        die(
            f"{place.size - len(nodes)} of {place.size} nodes did not answer; "
            f"these did: {', '.join(n.name for n in nodes) or 'none'}",
            hint=f"look at the others with `scontrol show job {place.job}` and `sinfo -R`",
        )
    return nodes


def gather(lines: Iterable[Told]) -> list[Node]:
    nodes: dict[str, Node] = {}
    for told in lines:
        if not told.key:
            continue
        node = nodes.setdefault(told.node, Node(told.node))
        if told.key == "container":
            node.containers.append(told.value)
        elif told.key == "unseen":
            node.unseen.append(told.value)
        else:
            node.facts[told.key] = told.value
    return sorted(nodes.values(), key=lambda node: node.number("rank"))


def judge(nodes: Sequence[Node], wanted: Wanted) -> list[Finding]:
    """Every check of every node. The first node serves: its GPUs and its port matter."""
    findings = []
    for i, node in enumerate(nodes):
        findings += judge_engine(node, wanted)
        if wanted.runtime == "docker" and "no-docker" not in node.facts:
            findings += judge_image(node, wanted.image)
        findings += judge_gpus(node, wanted, is_head=i == 0)
        findings += judge_port(node, wanted.port, is_head=i == 0)
        findings += [
            Finding(
                node.name,
                "paths",
                "bad",
                f"{path} is not there, or not readable",
                "it has to be on a file system that the nodes share",
            )
            for path in node.unseen
        ]
        devices = f"{node.facts.get('efa', '0')} EFA" + ", gdrdrv" * node.number("gdrdrv")
        findings.append(Finding(node.name, "devices", "ok", devices))
    return findings


def judge_engine(node: Node, wanted: Wanted) -> list[Finding]:
    if wanted.runtime == "bare":
        if path := node.facts.get("engine"):
            return [Finding(node.name, "engine", "ok", path)]
        return [
            Finding(
                node.name,
                "engine",
                "bad",
                "trtllm-serve: not found in PATH",
                "install TensorRT-LLM there, or use --runtime docker",
            )
        ]
    if why := node.facts.get("no-docker"):
        return [
            Finding(
                node.name,
                "docker",
                "bad",
                f"Docker does not answer: {why}",
                "start it there (systemctl start docker), or leave the node out "
                "(salloc --exclude); a missing permission is the docker group's",
            )
        ]
    return [Finding(node.name, "docker", "ok", node.facts.get("docker", ""))]


def judge_image(node: Node, image: Image) -> list[Finding]:
    if node.holds(image):
        return [Finding(node.name, "image", "ok", "present")]
    if not image.tarball and not image.registry:
        return [Finding(node.name, "image", "bad", f"image {image.tag} is not there", GET_ONE)]
    free, how = node.number("free"), "pull" if image.registry else "load"
    image_row = Finding(
        node.name,
        "image",
        "note",
        f"{how} (another {image.tag} is there)" if node.identity else how,
    )
    if free < image.room:
        text = f"{giga(free)} free for Docker, {giga(image.room)} needed to load {image.tag}"
        return [
            image_row,
            Finding(
                node.name,
                "disk",
                "bad",
                f"disk too small: {text}",
                "docker image prune there, or move Docker's data-root",
            ),
        ]
    return [image_row, Finding(node.name, "disk", "ok", f"{giga(free)} free")]


def judge_gpus(node: Node, wanted: Wanted, *, is_head: bool) -> list[Finding]:
    if wanted.gpus == "none":
        return [Finding(node.name, "gpus", "ok", "not asked for")]
    if node.gpus or not is_head:
        return [Finding(node.name, "gpus", "ok", str(node.gpus))]
    hint = "GPUS=none starts an engine that needs none (the simulator)"
    return [Finding(node.name, "gpus", "bad", "no GPU found", hint)]


def judge_port(node: Node, port: int, *, is_head: bool) -> list[Finding]:
    if not is_head:
        return []
    if "taken" not in node.facts:
        return [Finding(node.name, "port", "ok", f"{port} free")]
    by = f" by {who}" if (who := node.facts["taken"]) else ""
    return [
        Finding(
            node.name,
            "port",
            "bad",
            f"port {port} is taken{by}",
            "give another one: --port, or PORT=",
        )
    ]


def giga(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def stop_if_bad(findings: Sequence[Finding]) -> None:
    """Failure with a sentence for every bad finding."""
    if bad := [finding for finding in findings if finding.state == "bad"]:
        hints = dict.fromkeys(finding.hint for finding in bad if finding.hint)
        die(by_node((f.node, f.text) for f in bad), hint="; ".join(hints))


def table(findings: Sequence[Finding]) -> str:
    """A row a node, a column a check."""
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for f in findings:
        mark = {"ok": "", "note": "* ", "bad": "! "}[f.state]
        cells[f.node][f.check] = " ".join([cells[f.node].get(f.check, ""), mark + f.text]).strip()
    columns = list(dict.fromkeys(f.check for f in findings))
    rows = [["node", *columns]]
    rows += [[node, *(row.get(c, "-") for c in columns)] for node, row in cells.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def must_provide(nodes: Sequence[Node], image: Image) -> bool:
    """Whether any node lacks the image, or the registry has to be asked for a newer one."""
    return not all(n.holds(image) for n in nodes) or is_pulled_anew(
        image, {n.identity for n in nodes}
    )


def orphans(nodes: Sequence[Node], user: str, jobs: set[str] | None) -> list[str]:
    """Ids of this user's containers whose launcher is gone: their job has ended, or it was killed.

    `jobs` are the user's jobs that Slurm knows; None where nobody can say.
    """
    found = []
    for line in (line for node in nodes for line in node.containers):
        identity, _, job, launcher, owner = (*line.split(" ", 4), "", "", "", "")[:5]
        job_ended = job.isdigit() and jobs is not None and job not in jobs
        alive = is_alive(launcher)
        if owner == user and alive is not True and (job_ended or alive is False):
            found.append(identity)
    return found


def ours_already(nodes: Sequence[Node], place: Place, gone: Sequence[str]) -> str:
    """The name of a container that this very job already runs, or ''."""
    for line in (line for node in nodes for line in node.containers):
        identity, name, job = (*line.split(" ", 4), "", "")[:3]
        if job == place.job and identity not in gone:
            return name
    return ""


def jobs_of(user: str) -> set[str] | None:
    """The user's jobs that Slurm still holds, by id; None without Slurm, or when it is silent."""
    if not shutil.which("squeue"):
        return None
    command = ["squeue", "--all", "--noheader", f"--user={user}", "--format=%A"]
    try:
        done = subprocess.run(command, env=unfiltered(), capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return None
    return set(done.stdout.split()) if done.returncode == 0 else None


def reap(nodes: Sequence[Node], place: Place, user: str) -> bool:
    """Remove what launchers that were killed left behind. True when something was."""
    if not any(node.containers for node in nodes):
        return False
    jobs = jobs_of(user)
    if place.job not in (jobs or ()):
        jobs = None  # an answer without our own job is of another cluster, or not whole
    gone = orphans(nodes, user, jobs)
    if name := ours_already(nodes, place, gone):
        die(
            f"this job already runs the container {name}",
            hint="stop that launch first (make stop), or use another allocation",
        )
    if gone:
        say(f"removing {len(gone)} container(s) that an earlier launch left behind")
        run([*place.every, "bash", "-c", REMOVE, "remove", *gone])
    return bool(gone)


def summary(nodes: Sequence[Node]) -> str:
    names, facts = ", ".join(node.name for node in nodes), nodes[0].facts
    what = f"Docker {facts['docker']}" if "docker" in facts else facts.get("engine", "")
    gpus = " and ".join(dict.fromkeys(str(node.gpus) for node in nodes))
    return f"preflight: {len(nodes)} node(s) ready ({names}): {what}, {gpus} GPU(s) each"
