"""The image on every node: what it is, whether a node has the right one, and how it gets there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from common.talk import die, say
from launch.nodes import (
    HOLD,
    SEE_NODES,
    TELL,
    Place,
    Told,
    by_node,
    held,
    last_words,
    run,
    script,
    slurms_word,
)

DEFAULT_TAG = "tensorrt-llm-serve:latest"
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst")
MAGIC = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst"}
GET_ONE = (
    "build one with `make docker`, load one with `make load`, or give NVIDIA's own: "
    "--image nvcr.io/nvidia/tensorrt-llm/release:1.1.0"
)
# More than Docker takes, but nothing that it would read as an option.
REFERENCE = re.compile(r"[\w\[][\w.:/@+\[\]-]{0,1000}", re.ASCII)
DIGEST = re.compile(r"\w+:[\w.-]{1,200}", re.ASCII)
SLOWEST = 10e6  # bytes a second that a file system has to give
SMALL = 16 << 20  # bytes; a larger manifest or sidecar is none
ECR = re.compile(r"^\d+\.dkr\.ecr(?:-fips)?\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?$")


@dataclass(frozen=True)
class Image:
    """An image by the name `docker run` is given, and where it comes from if a node lacks it."""

    tag: str
    tarball: Path | None = None
    codec: str = "none"
    ids: tuple[str, ...] = ()  # what `docker image inspect` may show as .Id; (): whatever is there
    layers: str = (
        ""  # diff ids as JSON, where the id that a containerd store would show is not known
    )
    packed: int = 0  # bytes of the tarball
    unpacked: int = 0  # bytes on disk; 0: not known
    registry: str = ""
    sha256: str = ""  # of the tarball, as its sidecar says

    @property
    def room(self) -> int:
        """Free bytes a node needs: the daemon unpacks the tar beside its store, then the layers."""
        return 2 * (self.unpacked or self.packed)

    def is_held(self, identity: str, layers: str, store: str) -> bool:
        """Whether what a node calls by our tag is this very image."""
        if not identity or not self.ids or identity in self.ids:
            return bool(identity)
        return bool(self.layers) and "containerd" in store and layers == self.layers


NONE = Image("")  # runtime bare needs none


def find_image(asked: str, workspace: Path) -> Image:
    """The image that --image names: a tarball, a registry reference or a local tag."""
    if not asked:
        tarball = newest_tarball(workspace)
        return read_tarball(tarball) if tarball else Image(DEFAULT_TAG)
    if asked.endswith(SUFFIXES) or asked.startswith(("/", "./", "../", "~")):
        return read_tarball(Path(asked))
    registry, slash, _ = asked.partition("/")
    if not REFERENCE.fullmatch(asked):
        die(f"{asked[:99]!r} is neither a tarball nor the name of an image", hint=GET_ONE)
    if slash and ("." in registry or ":" in registry or registry == "localhost"):
        return Image(asked, registry=registry)
    return Image(asked)


def newest_tarball(workspace: Path) -> Path | None:
    """The default tarball of the workspace; of several codecs the one written last."""
    there = [workspace / f"tensorrt-llm-serve-latest{suffix}" for suffix in SUFFIXES]
    return max((p for p in there if p.is_file()), key=lambda p: p.stat().st_mtime, default=None)


def read_tarball(path: Path) -> Image:
    """A tarball's tag and identity: from its sidecar, or else by reading it once."""
    try:
        path = path.expanduser().resolve()
        if not path.is_file():
            die(f"there is no image tarball {path}", hint=GET_ONE)
        codec, size = codec_of(path), path.stat().st_size
    except OSError as error:
        die(f"cannot read the image tarball {path}: {error.strerror}")
    except RuntimeError as error:  # ~nobody
        die(f"there is no image tarball {path}: {error}", hint=GET_ONE)
    return read_sidecar(path, codec, size) or read_manifest(path, codec, size)


def codec_of(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    return next((codec for magic, codec in MAGIC.items() if start.startswith(magic)), "none")


def read_sidecar(tarball: Path, codec: str, size: int) -> Image | None:
    """What save_image.py wrote beside the tarball; None where it does not belong to it."""
    sidecar = tarball.with_name(tarball.name + ".json")
    if not sidecar.exists():
        return None
    try:
        if sidecar.stat().st_size > SMALL:
            raise ValueError("far too large")
        image = from_sidecar(json.loads(sidecar.read_bytes()), tarball, codec, size)
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        why = repr(error)[:200]
        say(f"image: {sidecar} cannot be used ({why}): reading the tarball itself")
        return None
    if image.packed != size:
        say(f"image: {sidecar} describes another tarball (its size differs): reading this one")
        return None
    return image


def from_sidecar(data: Mapping[str, Any], tarball: Path, codec: str, size: int) -> Image:
    """An Image from a sidecar's fields. KeyError, TypeError or ValueError where they are wrong."""
    config, manifest = data["config_digest"], data["manifest_digest"]
    ids = tuple(digest for digest in (config, manifest) if digest)
    tag = data["tags"][0] if isinstance(data["tags"], list) else None
    layers = json.dumps(data["diff_ids"], separators=(",", ":"))  # as docker's {{json}} prints it
    if not (ids and isinstance(tag, str) and all(isinstance(i, str) for i in ids)):
        raise ValueError("no tag or no image id")
    if not REFERENCE.fullmatch(tag) or not all(map(DIGEST.fullmatch, ids)):
        raise ValueError("a tag or an image id that is none")
    if int(data["unpacked_bytes"]) < 0:
        raise ValueError("a negative size")
    return Image(
        tag,
        tarball,
        codec,
        ids,
        "" if manifest else layers,
        int(data["packed_bytes"]),
        int(data["unpacked_bytes"]),
        sha256=str(data.get("sha256", "")),
    )


def read_manifest(tarball: Path, codec: str, size: int) -> Image:
    """Read the tarball until its manifest, which Docker puts near the end: one pass."""
    say(f"image: {tarball.name} has no sidecar (save_image.py makes one): reading it for its tag")
    unpack = unpacker(codec)
    with (
        tarball.open("rb") as file,
        subprocess.Popen(
            unpack, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as proc,
    ):
        assert proc.stdout and proc.stderr
        try:
            manifest = manifest_in(proc.stdout)
        except (tarfile.TarError, ValueError, TypeError, EOFError, RecursionError) as error:
            proc.stdout.close()
            words = last_words(proc.stderr.read().decode(errors="replace")) or str(error)
            die(
                f"the image tarball {tarball} is truncated or corrupt: {words}",
                hint="copy it again or make it anew with `make save`",
            )
        finally:
            proc.kill()
    try:
        tag, config = manifest[0]["RepoTags"][0], manifest[0]["Config"]
        digest = f"sha256:{Path(config).name.removesuffix('.json')}"
        if not (REFERENCE.fullmatch(tag) and DIGEST.fullmatch(digest)):
            raise TypeError
    except (LookupError, TypeError):
        die(f"the image tarball {tarball} names no tag", hint="save it by tag with `make save`")
    return Image(tag, tarball, codec, (digest,), packed=size)


def manifest_in(stream: IO[bytes]) -> list[dict[str, Any]]:
    """manifest.json of a `docker save` stream. ValueError where the stream has none."""
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            if member.name == "manifest.json" and (content := tar.extractfile(member)):
                return list(json.loads(content.read(SMALL)))
    raise ValueError("no manifest.json in it: not made by docker save?")


def unpacker(codec: str) -> list[str]:
    """The command that unpacks a codec from stdin to stdout on this machine."""
    choices = {"gz": ["pigz", "gzip"], "zst": ["zstd"], "none": ["cat"]}[codec]
    found = next((name for name in choices if shutil.which(name)), None)
    if not found:
        die(f"{choices[-1]}: not found in PATH, and the image tarball needs it")
    return [found] if found == "cat" else [found, "-dc"]


# One load at a time on a node: /run is a directory that every user may lock and nobody has to make.
# The shell shares its open tarball with the unpacker: the offset of that file is the progress.
LOAD = script(
    TELL,
    HOLD,
    r"""
    tarball=$1; tag=$2; ids=$3; layers=$4; codec=$5; exec 2>/dev/null;
    known() {
        set -- $(docker image inspect --format '{{.Id}} {{json .RootFS.Layers}}' "$tag");
        id=$1;
        case " $ids " in *" $id "*) [ -n "$id" ]; return ;; esac;
        [ -n "$layers" ] && [ "$2" = "$layers" ] &&
        docker info --format '{{.DriverStatus}}' | grep -q containerd;
    };
    exec 9</run;
    flock --nonblock 9 || tell waiting "another image is being loaded";
    trap '[ -z "$waiter" ] || kill $waiter; exit 143' TERM INT HUP;
    flock 9 & waiter=$!; wait $waiter; waiter=;
    if known; then tell image "$id"; exit 0; fi;
    exec 4<"$tarball" || { tell error "cannot read $tarball"; exit 1; };
    case $codec in
        zst) unpack="zstd -dc" ;;
        gz) unpack="gzip -dc"; command -v pigz >/dev/null && unpack="pigz -dc" ;;
        *) unpack=cat ;;
    esac;
    command -v ${unpack%% *} >/dev/null ||
    { tell error "${unpack%% *}: not found in PATH, and $tarball needs it"; exit 1; };
    set -m;
    {
        words=$(exec 2>&1; $unpack <&4 | docker load;
            case "${PIPESTATUS[*]}" in
                "0 0"|"141 0") ;;
                "0 "*|"141 "*) exit 1 ;;
                *) exit 2 ;;
            esac);
        case $? in
            0) ;;
            1) tell error "docker load: $words"; exit 1 ;;
            *) tell error "$tarball is truncated or corrupt: $words"; exit 1 ;;
        esac;
    } &
    load=$!;
    {
        while sleep 1; do
            tell progress "$(sed -n 's/^pos:[[:space:]]*//p' /proc/$$/fdinfo/4)";
        done;
    } &
    ticker=$!;
    trap 'kill -KILL -- -$load -$ticker; exit 143' TERM INT HUP;
    wait $load; code=$?;
    trap - TERM INT HUP;
    kill -KILL -- -$ticker;
    [ $code = 0 ] || exit $code;
    if known; then tell image "$id"; exit 0; fi;
    tell error "the tarball was loaded, but $tag is not the image that it should hold";
    exit 1;
""",
)

# Set before the first secret: whatever ends the script, the directory with the password goes.
FORGETFUL = script(r"""
    forget() { [ -z "$DOCKER_CONFIG_OURS" ] || rm -rf "$DOCKER_CONFIG_OURS"; };
    trap '[ -z "$pull" ] || kill -KILL -- -$pull; forget; exit 143' TERM INT HUP;
""")

PULL = script(
    TELL,
    HOLD,
    r"""
    ref=$1; exec 2>/dev/null; set -m;
    {
        words=$(docker pull --quiet "$ref" 2>&1) ||
        { tell error "docker pull $ref: $words"; exit 1; };
    } &
    pull=$!;
    wait $pull; code=$?;
    forget;
    [ $code = 0 ] || exit 1;
    tell image "$(docker image inspect --format '{{.Id}}' "$ref")";
""",
)

# ECR: the password comes as the first line of standard input, and is forgotten with the directory.
ECR_LOGIN = script(
    TELL,
    r"""
    IFS= read -r password;
    DOCKER_CONFIG_OURS=$(mktemp -d) && export DOCKER_CONFIG=$DOCKER_CONFIG_OURS;
    words=$(printf %s "$password" | docker login --username AWS --password-stdin "$2" 2>&1) ||
    { tell error "docker login $2: $words"; rm -rf "$DOCKER_CONFIG_OURS"; exit 1; };
    unset password;
""",
)

FORGET = script(
    TELL,
    r"""
    docker image inspect "$1" >/dev/null 2>&1 || exit 0;
    words=$(docker image rm "$1" 2>&1) || tell kept "$words";
""",
)


def provide_command(image: Image, place: Place) -> list[str]:
    """The one command that brings the image to every node."""
    if image.registry:
        login = ECR_LOGIN if ECR.match(image.registry) else ""
        return [
            *place.every,
            "bash",
            "-c",
            script(FORGETFUL, login, PULL),
            "pull",
            image.tag,
            image.registry,
        ]
    return [
        *place.every,
        "bash",
        "-c",
        LOAD,
        "load",
        str(image.tarball),
        image.tag,
        " ".join(image.ids),
        image.layers,
        image.codec,
    ]


def forget_command(image: Image, place: Place) -> list[str]:
    """The command that takes the tag off every node, so that it is loaded afresh."""
    return [*place.every, "bash", "-c", FORGET, "forget", image.tag]


def password_command(image: Image) -> list[str]:
    """The command whose output is the registry's password; [] where none is needed."""
    if not (region := ECR.match(image.registry)):
        return []
    return ["aws", "ecr", "get-login-password", "--region", region[1]]


def sum_command(image: Image) -> list[str]:
    """The command that prints the tarball's sha256.

    One reading, here, is enough: the nodes read the same file, and what each has loaded is known by
    its id, which Docker computes from what it took in.
    """
    return ["sha256sum", "--", str(image.tarball)]


def check_verifiable(image: Image) -> None:
    if not re.fullmatch("[0-9a-f]{64}", image.sha256):
        die(
            f"--verify: there is no sha256 to compare {image.tarball or 'a tarball'} with",
            hint="the sidecar of a tarball that `make save` made has one; a registry's image is "
            "verified by its name: --image name@sha256:...",
        )


def verify(image: Image) -> None:
    """Failure unless the tarball is, byte for byte, the one that its sidecar describes."""
    say(f"image: reading {image.packed / 1e6:.0f} MB for their sha256")
    # A name with a newline or backslash in it is marked by a backslash before the sum.
    found = run(sum_command(image), timeout=60 + image.packed / SLOWEST).lstrip("\\").split(" ")[0]
    if found != image.sha256:
        die(
            f"the sha256 of {image.tarball} is {found}, its sidecar says {image.sha256}",
            hint="it is damaged or not the one that was saved: copy both again, or `make save`",
        )
    say(f"image: sha256 {found[:12]}... is the sidecar's")


def is_pulled_anew(image: Image, identities: set[str]) -> bool:
    """Whether a registry has to be asked although every node has the tag.

    `latest` moves, and nodes that hold different images under one tag cannot both be right.
    """
    moving = image.tag.endswith(":latest") or ":" not in image.tag.rpartition("/")[2]
    return bool(image.registry) and (moving or len(identities) > 1)


def provide(image: Image, place: Place) -> None:
    """Bring the image to every node at once; Failure naming the nodes where it did not work."""
    command = provide_command(image, place)
    secret = run(password_command(image)).strip() if password_command(image) else None
    progress, errors, have, words = Progress(image.packed), {}, {}, []
    with held(command, secret=secret) as step:
        for told in step.told():
            if told.key == "image":
                have[told.node] = told.value
                progress.done(told.node)
            elif told.key == "error":
                errors[told.node] = told.value
            elif told.key:
                progress.show(told)
            else:
                words.append(told.line)
    if len(have) < place.size and (word := slurms_word("\n".join(words))):
        # It kills what is unpacking, too, and that looks like a broken tarball.
        die(f"{word}; the image was being loaded", hint=SEE_NODES)
    if errors:
        die(by_node(sorted(errors.items())), hint=advice(image))
    if len(have) < place.size:
        die(
            f"the image reached {len(have)} of {place.size} nodes: "
            f"{last_words(chr(10).join(words), 3)}"
        )
    # A tarball's ids were compared on the nodes: one image has two, by the store of the node.
    if image.registry and len(set(have.values())) > 1:
        die(f"the nodes hold different images under {image.tag}: {have}", hint="use --force")


def advice(image: Image) -> str:
    if image.registry:
        return "check the name, and `docker login` for a private registry; or use a tarball"
    return (
        "copy the tarball again or make it anew (`make save`); see the node's disk and Docker log"
    )


class Progress:
    """How far each node is: bytes, MB/s, seconds; a line a node every few seconds."""

    EVERY = 5.0

    def __init__(self, total: int) -> None:
        self.total = total
        self.start = time.monotonic()
        self.shown: dict[str, float] = {}

    def show(self, told: Told) -> None:
        now = time.monotonic()
        if told.key == "progress" and now - self.shown.get(told.node, self.start) < self.EVERY:
            return
        self.shown[told.node] = now
        if told.key == "progress" and told.value.isdigit():
            say(f"image: {told.node}: {rate(int(told.value), self.total, now - self.start)}")
        else:
            say(f"image: {told.node}: {told.key} {told.value}")

    def done(self, node: str) -> None:
        say(f"image: {node}: there after {time.monotonic() - self.start:.1f} s")


def rate(done: int, total: int, seconds: float) -> str:
    """`120 of 181 MB, 40 MB/s, 3 s`"""
    done_mb, total_mb = done / 1e6, total / 1e6
    return f"{done_mb:.0f} of {total_mb:.0f} MB, {done_mb / seconds:.0f} MB/s, {seconds:.0f} s"
