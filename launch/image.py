"""The image on every node: what it is, whether a node has the right one, and how it gets there."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from common.talk import die, read_json, say, write_json
from launch.engines import DEFAULT, engine
from launch.node import images
from launch.slurm import last_words

DEFAULT_TAG = "tensorrt-llm-serve:latest"
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.xz", ".tar.bz2")
MAGIC = {
    b"\x1f\x8b": "gz",
    b"\x28\xb5\x2f\xfd": "zst",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bz2",
}
GET_ONE = (
    "build one with `make docker`, load one with `make load`, or give NVIDIA's own: "
    f"--image {engine(DEFAULT).IMAGE}"
)
# More than Docker takes, but nothing that it would read as an option.
REFERENCE = re.compile(r"[\w\[][\w.:/@+\[\]-]{0,1000}", re.ASCII)
DIGEST = re.compile(r"\w+:[\w.-]{1,200}", re.ASCII)
RELEASE = re.compile(r"[a-z]\w* \d[\w.+!-]{0,98}", re.ASCII)
SLOWEST = 10e6  # bytes a second that any file system has to manage
SMALL = 16 << 20  # bytes; anything larger is no manifest or sidecar
ECR = re.compile(r"^\d+\.dkr\.ecr(?:-fips)?\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?$")


@dataclass(frozen=True)
class Image:
    """An image by the name `docker run` is given, and where it comes from if a node lacks it."""

    tag: str
    tarball: Path | None = None
    codec: str = "none"
    ids: tuple[str, ...] = ()  # what `docker image inspect` may show as .Id; (): whatever is there
    layers: str = ""  # diff ids as JSON, if its id in a containerd store is not known
    packed: int = 0  # bytes of the tarball
    unpacked: int = 0  # bytes on disk; 0: not known
    registry: str = ""
    sha256: str = ""  # of the tarball, as its sidecar says
    # As JSON; they, too, identify what a containerd store has just loaded.
    diff_ids: str = field(default="", compare=False)
    release: str = ""  # engine and version, `package 1.2.1`; '': not known
    squash: bool = False  # one file for all nodes, which pyxis unpacks; its path is the tag
    reference: str = ""  # where that file is imported from

    @property
    def room(self) -> int:
        """Free bytes a node needs: Docker unpacks the tar beside its store, and then the layers."""
        return 2 * (self.unpacked or self.packed)

    def is_held(self, identity: str, layers: str, store: str) -> bool:
        """Whether what a node has under our tag is this very image."""
        if not identity or not self.ids or identity in self.ids:
            return bool(identity)
        return bool(self.layers) and "containerd" in store and layers == self.layers


NONE = Image("")  # runtime bare needs none


def find_image(asked: str, workspace: Path) -> Image:
    """The image that --image names: a tarball, a registry reference or a local tag."""
    if not asked:
        tarball = newest_tarball(workspace)
        return read_tarball(tarball) if tarball else Image(DEFAULT_TAG)
    a_path = asked.endswith(SUFFIXES) or asked.startswith(("/", "./", "../", "~"))
    if a_path or os.path.isfile(asked):  # noqa: PTH113 (False for a name too long)
        return read_tarball(Path(asked))
    if not REFERENCE.fullmatch(asked):
        die(f"{asked[:99]!r} is neither a tarball nor the name of an image", hint=GET_ONE)
    return Image(asked, registry=registry_of(asked))


def registry_of(name: str) -> str:
    """The registry that a name begins with, by Docker's own rule; '' if it names none."""
    first, slash, _ = name.partition("/")
    named = slash and ("." in first or ":" in first or first == "localhost")
    return first if named else ""


def newest_tarball(workspace: Path) -> Path | None:
    """The workspace's default tarball; the one written last, if there are several."""
    there = [workspace / f"tensorrt-llm-serve-latest{suffix}" for suffix in SUFFIXES]
    return max((p for p in there if p.is_file()), key=lambda p: p.stat().st_mtime, default=None)


def read_tarball(path: Path) -> Image:
    """A tarball's tag and identity: from its sidecar, or else by reading it once."""
    try:
        path = path.expanduser().resolve()
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            die(f"the image tarball {path} {what}", hint=GET_ONE)
        codec, size = codec_of(path), path.stat().st_size
    except OSError as error:
        die(f"cannot read the image tarball {path}: {error.strerror}")
    except RuntimeError as error:  # ~nobody
        die(f"the image tarball {path} does not exist: {error}", hint=GET_ONE)
    return read_sidecar(path, codec, size) or recall(path, codec) or learn(path, codec)


def codec_of(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(6)
    return next((codec for magic, codec in MAGIC.items() if start.startswith(magic)), "none")


def read_sidecar(tarball: Path, codec: str, size: int) -> Image | None:
    """What save_image.py wrote beside the tarball; None if it is of another tarball or unusable."""
    sidecar = tarball.with_name(tarball.name + ".json")
    if not sidecar.exists():
        return None
    try:
        if sidecar.stat().st_size > SMALL:
            raise ValueError("far too large")
        image = from_sidecar(json.loads(sidecar.read_bytes()), tarball, codec)
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        why = repr(error)[:200]
        say(f"image: {sidecar} cannot be used ({why}): reading the tarball itself")
        return None
    if image.packed != size:
        say(f"image: {sidecar} describes another tarball (its size differs): reading this one")
        return None
    return image


def from_sidecar(data: Mapping[str, Any], tarball: Path, codec: str) -> Image:
    """An Image from a sidecar's fields. KeyError, TypeError or ValueError if they are wrong."""
    config, manifest = data["config_digest"], data["manifest_digest"]
    ids = tuple(digest for digest in (config, manifest) if digest)
    tag = data["tags"][0] if isinstance(data["tags"], list) else None
    diff_ids = json.dumps(data["diff_ids"], separators=(",", ":"))  # as docker's {{json}} prints it
    layers = diff_ids if data["diff_ids"] else ""
    if not (ids and isinstance(tag, str) and all(isinstance(i, str) for i in ids)):
        raise ValueError("no tag or no image id")
    if not REFERENCE.fullmatch(tag) or not all(map(DIGEST.fullmatch, ids)):
        raise ValueError("a tag or an image id that is not one")
    if int(data["unpacked_bytes"]) < 0:
        raise ValueError("a negative size")
    packed, unpacked = int(data["packed_bytes"]), int(data["unpacked_bytes"])
    sha256, strict = str(data.get("sha256", "")), "" if manifest else layers
    words = f"{data.get('engine')} {data.get('version')}"  # None in those of an older save_image.py
    release = words if RELEASE.fullmatch(words) else ""
    found = Image(tag, tarball, codec, ids, strict, packed, unpacked, sha256=sha256)
    return replace(found, diff_ids=layers, release=release)


def recall(tarball: Path, codec: str) -> Image | None:
    """What an earlier launch learnt of this file (by path, size and time); else None."""
    state = tarball.stat()
    for path in places(tarball):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            owner = path.stat().st_uid  # in a shared directory, others could lie about our file
            if owner in (os.geteuid(), 0, state.st_uid) and path.stat().st_size < SMALL:
                known = read_json(path)
                if known["file"] == [str(tarball), state.st_size, state.st_mtime_ns]:
                    return from_sidecar(known, tarball, codec)
    return None


def places(tarball: Path) -> tuple[Path, Path]:
    """Where we keep what we learnt: beside the tarball, or else in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111
    name = hashlib.sha256(os.fsencode(tarball)).hexdigest()[:32]
    return (
        tarball.with_name(f"{tarball.name}.learnt.json"),
        cache / f"tensorrt-llm-serve/{name}.json",
    )


def learn(tarball: Path, codec: str) -> Image:
    """Read the tarball, but only once: what it holds is kept for the next launch."""
    lacks = f"{tarball.name} has no sidecar (save_image.py writes one)"
    say(f"image: {lacks}: reading it to find its tag")
    state = tarball.stat()
    try:
        found = describe(*unpacked(tarball, codec))
        image = from_sidecar({**found, "packed_bytes": state.st_size}, tarball, codec)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        die(f"the image tarball {tarball} names no tag", hint="save it by tag with `make save`")
    about = [str(tarball), state.st_size, state.st_mtime_ns]
    remember(tarball, {"file": about, "packed_bytes": state.st_size, **found})
    return image


def remember(tarball: Path, known: Mapping[str, Any]) -> None:
    for path in places(tarball):
        with contextlib.suppress(OSError):
            if not path.exists() or path.stat().st_uid == os.geteuid():  # else a colleague's
                return write_json(path, known)


def unpacked(tarball: Path, codec: str) -> tuple[dict[str, bytes], int]:
    """The small files of a `docker save` tarball and its unpacked size; Failure if it is broken."""
    from tarfile import TarError  # late: it imports every kind of compression

    pipe = subprocess.PIPE
    with (
        tarball.open("rb") as file,
        subprocess.Popen(unpacker(codec), stdin=file, stdout=pipe, stderr=pipe) as proc,
    ):
        assert proc.stdout and proc.stderr
        try:
            return documents_in(proc.stdout)
        except (TarError, ValueError, EOFError, RecursionError) as error:
            proc.stdout.close()
            words = last_words(proc.stderr.read().decode(errors="replace")) or str(error)
            hint = "copy it again or write it again with `make save`"
            die(f"the image tarball {tarball} is truncated or corrupt: {words}", hint=hint)
        finally:
            proc.kill()


def documents_in(stream: IO[bytes]) -> tuple[dict[str, bytes], int]:
    """The small files of a tar, and the size of all its files. ValueError if it is not Docker's."""
    import tarfile

    found: dict[str, bytes] = {}
    size = kept = 0
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            size += member.size
            named = member.name in ("manifest.json", "index.json")
            if not member.isreg() or member.size > (SMALL if named else SMALL / 16):
                continue
            content = tar.extractfile(member).read()  # type: ignore[union-attr]
            if named:
                json.loads(content)  # is it whole?
            if named or (content.startswith(b"{") and kept + len(content) < SMALL):
                found[member.name] = content
                kept += len(content)
    if "manifest.json" not in found:
        raise ValueError("no manifest.json in it: not made by docker save?")
    return found, size


def describe(documents: Mapping[str, bytes], size: int) -> dict[str, Any]:
    """A sidecar's fields, from the documents of the tarball itself."""
    entry = json.loads(documents["manifest.json"])[0]
    index = json.loads(documents.get("index.json", b"{}")).get("manifests") or []
    digests = {each["digest"] for each in index}
    config = json.loads(documents.get(entry["Config"], b"{}"))
    return {
        "tags": entry["RepoTags"],
        "config_digest": f"sha256:{Path(entry['Config']).name.removesuffix('.json')}",
        "manifest_digest": digests.pop() if len(digests) == 1 else None,
        "diff_ids": config.get("rootfs", {}).get("diff_ids") or [],
        "unpacked_bytes": size,
    }


def unpacker(codec: str) -> list[str]:
    """The command that unpacks a codec from stdin to stdout on this machine."""
    if not (found := images.unpacker(codec)):
        program = images.UNPACKERS[codec][-1]
        die(f"{program}: not found in PATH, and the image tarball needs it")
    return found


def is_pulled_anew(image: Image, identities: set[str]) -> bool:
    """Whether a registry has to be asked although every node has the tag.

    `latest` moves, and nodes that hold different images under one tag cannot both be right.
    """
    moving = image.tag.endswith(":latest") or ":" not in image.tag.rpartition("/")[2]
    return bool(image.registry) and (moving or len(identities) > 1)
