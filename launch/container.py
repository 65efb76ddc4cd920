"""What runs on a node: the engine in a container of its own, or bare; and how it ends."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping

from common.settings import PASSED_ON
from launch.nodes import HOLD_IN_JOB, TELL, launcher, script
from launch.plan import Plan
from launch.preflight import LABEL

# NCCL and Gloo: the interface that leads out of the node, unless the user names one.
INTERFACES = script(r"""
    interface=$(ip -o -4 route show to default 2>/dev/null | sed -n '1s/.* dev \([^ ]*\).*/\1/p');
    if [ -n "$interface" ]; then
        export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$interface}";
        export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}";
        export TP_SOCKET_IFNAME="${TP_SOCKET_IFNAME:-$interface}";
    fi;
""")

# Another launch of the job may have a container of the same name: ours has our label.
# Time is that since boot, which nobody sets.
REMOVE = script(r"""
    clock() { read -r clock _ </proc/uptime; clock=${clock%.*}; };
    remove() {
        ids=$(timeout 3 docker ps --all --quiet --filter "label=LABEL.launcher=$launcher" 2>&1) ||
        { said=${ids:-Docker does not answer}; return 1; };
        ids=$(printf '%s\n' "$ids" | grep -E '^[[:alnum:].-]+$');
        [ -z "$ids" ] || said=$(timeout 4 docker rm --force $ids 2>&1) ||
        { said=${said:-Docker does not answer}; return 1; };
    };
""").replace("LABEL", LABEL)

# A container's arguments come as "$@"; what only the node knows is put before them. Devices: EFA's
# verbs (uverbs*, RDMA between nodes) and gdrdrv (NCCL's copies of small messages, GDRCopy), where
# they are; GPUs come with --gpus. Each is that device alone.
CONTAINER = script(
    REMOVE,
    r"""
    name=trtllm-$1-$node; launcher=$2; gpus=$3; cache=$4; shift 4;
    [ -z "$cache" ] || mkdir -p "$cache";
    for device in /dev/infiniband/uverbs* /dev/gdrdrv; do
        [ ! -e "$device" ] || set -- --device "$device" "$@";
    done;
    if [ "$gpus" = auto ]; then
        gpus=all; present=(/dev/nvidia[0-9]*); given=(${SLURM_STEP_GPUS//,/ });
        [ -z "$given" ] || [ ${#given[@]} -ge ${#present[@]} ] ||
        gpus="\"device=$SLURM_STEP_GPUS\"";
    fi;
    [ "$gpus" = none ] || set -- --gpus "$gpus" "$@";
""",
)

# The container ends with its script, whoever asks: we, scancel, the death of the launcher.
# It is removed until the client has gone, too: before that a container may yet be created.
ATTACHED = script(r"""
    stop() {
        trap '' TERM INT HUP; clock; end=$((clock + 12));
        while [ -n "$client" ] && kill -0 $client 2>/dev/null && [ $clock -lt $end ]; do
            remove; sleep 0.1; clock;
        done;
        [ -z "$client" ] || kill -KILL $client 2>/dev/null;
        remove;
        exit 143;
    };
    trap '[ -n "$client" ] || [ "$!" = "$watch" ] || client=$!; stop' TERM INT HUP;
    docker run --name "$name" "$@" <&3 &
    client=$!;
""")

# In the container: it ends with its standard input, which is the script's. So it does, though the
# script and docker's client are killed, or nothing reaches the node or its daemon for a while.
# A `cat` that is killed is no end.
ATTENDED = script(r"""
    exec 3<&0 </dev/null;
    (
        { until cat; do sleep 1; done; kill -TERM $$; sleep 5; kill -KILL $$; }
        <&3 >/dev/null 2>&1 &
    );
    exec 3<&-; exec "$@"
""")

# 125 is the client's own failure: where the daemon went away, its container may live on.
FINISH = script(r"""
    wait $client; code=$?;
    trap '' TERM INT HUP;
""")
RELEASE = "[ $code != 125 ] || remove;"

DOCKER = script(TELL, HOLD_IN_JOB, INTERFACES, CONTAINER, ATTACHED, FINISH, RELEASE, "exit $code;")

# Without a container: the engine is a session of its own, to be signalled as one. MPI must not see
# Slurm's variables, or its spawning of workers inside a step fails.
BARE = script(
    TELL,
    HOLD_IN_JOB,
    INTERFACES,
    r"""
    unset $(compgen -e | grep -E '^(SLURM|SLURMD|SBATCH|SALLOC|PMI|PMI2|PMIX|OMPI)_');
    stop() {
        trap '' TERM INT HUP;
        [ -n "$engine" ] || exit 143;
        kill -TERM -- -$engine 2>/dev/null || kill -TERM $engine;
        for i in $(seq 30); do kill -0 -- -$engine 2>/dev/null || exit 143; sleep 0.1; done;
        kill -KILL -- -$engine;
        exit 143;
    };
    trap '[ -n "$engine" ] || [ "$!" = "$watch" ] || engine=$!; stop' TERM INT HUP;
    setsid "$@" 3<&- &
    engine=$!;
    wait $engine; code=$?;
    trap '' TERM INT HUP;
    kill -KILL -- -$engine 2>/dev/null;
    exit $code;
""",
)

# A daemon that is only restarted is back soon.
REMOVE_OURS = script(
    TELL,
    REMOVE,
    r"""
    launcher=$1;
    clock; end=$((clock + 3));
    until remove; do
        clock; [ $clock -lt $end ] || { tell left "$said"; exit 0; };
        sleep 0.3;
    done;
""",
)


# Whose is a port? A listening socket has a number that its owner's open files have, too.
OWNS = script(r"""
    listening=$(printf ':%04X [0-9A-F]+:0000 0A ' "$1");
    for inode in $(grep -Eh "$listening" /proc/net/tcp /proc/net/tcp6 | awk '{print $10}'); do
        ls -l /proc/[0-9]*/fd 2>/dev/null | grep -qF "socket:[$inode]" && echo own && exit;
    done;
    true;
""")

ASK_OWNER = script(TELL, r"""
    name=trtllm-$1-$node; runtime=$2; shift 2;
    if [ "$runtime" = bare ]; then inside=; else inside="docker exec $name"; fi;
    said=$(timeout 5 $inside sh -c "$2" listens "$1" 2>&1) || said=unknown;
    tell port "${said:-not own}";
""")  # fmt: skip


def mount_flag(path: str) -> str:
    """`--mount`'s value is a CSV row: a comma or quote in a path is written as CSV writes it."""
    row = io.StringIO()
    csv.writer(row, lineterminator="\n").writerow(["type=bind", f"source={path}", f"target={path}"])
    return f"--mount={row.getvalue()[:-1]}"


def passed_on(environ: Mapping[str, str]) -> list[str]:
    """Names of variables for the engine; a value in an argv would be there for all to read."""
    ours = {"HF_HOME", "NCCL_SOCKET_IFNAME", "TRTLLM_VERSION"}
    return sorted(n for n in environ if n.startswith(PASSED_ON) and n not in ours and environ[n])


def docker_options(plan: Plan, environ: Mapping[str, str]) -> list[str]:
    """What follows `docker run --name NAME` and the devices that the node itself finds."""
    names = ["NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", *passed_on(environ)]
    return [
        "--rm",
        "--pull=never",                             # a tag nobody has is an error, not a download
        "--interactive",                            # its standard input ends with its launcher
        "--init",                                   # forwards signals, whatever the engine ignores
        f"--label={LABEL}.job={plan.place.job}",
        f"--label={LABEL}.launcher={launcher()}",
        f"--label={LABEL}.user={plan.user}",
        # No capability beyond Docker's own, no device but those of CONTAINER. What else is shared:
        "--uts=host",                               # MPI and logs know a rank by its node's name
        "--ipc=host",                               # NCCL and MPI need more than 64 MB of shm
        "--net=host",                               # NCCL, EFA and MPI bind the node's interfaces
        "--ulimit=memlock=-1",                      # EFA and GPUDirect register (pin) memory
        "--ulimit=stack=67108864",                  # as NVIDIA's documentation starts its images
        *(["--privileged"] if plan.privileged else []),  # only where PRIVILEGED=1 asks for it
        *map(mount_flag, plan.mounts),
        *([f"--workdir={plan.cwd}"] if plan.cwd else []),
        *([f"--env=HF_HOME={plan.cache}"] if plan.cache else []),
        *(f"--env={name}" for name in names),
    ]  # fmt: skip


def container_words(plan: Plan, environ: Mapping[str, str], *command: str) -> list[str]:
    """The arguments of the scripts that run a container; `command` begins with the image."""
    options = docker_options(plan, environ)
    return [plan.place.job, launcher(), plan.gpus, plan.cache, *options, *command]


def launch_command(plan: Plan, environ: Mapping[str, str]) -> list[str]:
    """The one command that is the server, for as long as its standard input is open."""
    if plan.runtime == "bare":
        return [*plan.place.head, "bash", "-c", BARE, "launch", *plan.engine]
    attended = ["sh", "-c", ATTENDED, "container", *plan.engine]
    words = container_words(plan, environ, plan.tag, *attended)
    return [*plan.place.head, "bash", "-c", DOCKER, "launch", *words]


def remove_command(plan: Plan) -> list[str]:
    """Removes this launch's containers, and no others, should a node not have done so itself."""
    nodes = plan.place.on(plan.spread.nodes) if plan.spread else plan.place.head
    return [*nodes, "bash", "-c", REMOVE_OURS, "remove", launcher()]


def owner_command(plan: Plan, port: str) -> list[str]:
    """Tells whether the port of the first node is served from within this launch's container."""
    words = [plan.place.job, plan.runtime, port, OWNS]
    return [*plan.place.head, "bash", "-c", ASK_OWNER, "owner", *words]
