#!/usr/bin/env python3
"""Save a Docker image as one compressed tarball, with a sidecar that says what
is inside.

The sidecar (FILE.json: tags, ids, sizes, sha256, the engine and its version) is
there so that a node need not decompress gigabytes to know which image it is.

Examples:
  save_image.py                            # -> tensorrt-llm-serve-latest.tar.gz
  save_image.py my/image:1.0 -o x.tar.zst  # zstd: far faster, both ways
  save_image.py --verify /fsx/x.tar.zst    # is this copy whole?
  save_image.py --load /fsx/x.tar.zst      # into this Docker, checked

stdout is the tarball's path, or the loaded tags; all else goes to stderr.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn, cast

IMAGE = "tensorrt-llm-serve:latest"
SUFFIX = {"gz": ".tar.gz", "zst": ".tar.zst", "none": ".tar"}
SIDECAR: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("schema", "unpacked_bytes", "packed_bytes"), (int,)),
    **dict.fromkeys(("tags", "diff_ids"), (list,)),
    "config_digest": (str, type(None)),  # the Id of the image in Docker's classic store
    "manifest_digest": (str, type(None)),  # its Id in a containerd store
    **dict.fromkeys(("sha256", "codec", "created"), (str,)),  # sha256: of the tarball
}
ENGINES = ("tensorrt_llm", "sglang", "vllm")  # their packages; SGLang's image may have vLLM's, too
QUESTION = "import sys, importlib.metadata as m; " + (
    "[print(n, d.version) for n in sys.argv[1:] for d in m.distributions(name=n)]"
)
# No GPU, no network. `void`: where NVIDIA's runtime is Docker's default, it looks for a driver.
ASK = "--rm --pull=never --net=none --env=NVIDIA_VISIBLE_DEVICES=void --entrypoint=python3".split()
CHUNK = 1 << 20
SMALL = 16 << 20  # a larger manifest or sidecar is none
Json = Any  # whatever a document may turn out to hold
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


# ---- names and documents: pure functions ---------------------------------------------------------
def with_tag(image: str) -> str:
    """Complete a bare name: `docker save NAME` would export every tag NAME has."""
    return image if "@" in image or ":" in image.rpartition("/")[2] else f"{image}:latest"


def tarball_name(image: str, codec: str) -> str:
    return re.sub(r"[^\w.-]+", "-", image.rpartition("/")[2]) + SUFFIX[codec]


def codec_of_name(name: str) -> str | None:
    suffixes = {".gz": "gz", ".tgz": "gz", ".zst": "zst", ".tzst": "zst", ".tar": "none"}
    return suffixes.get(Path(name).suffix)


def codec_of_bytes(head: bytes) -> str | None:
    marks = {"gz": (0, b"\x1f\x8b"), "zst": (0, b"\x28\xb5\x2f\xfd"), "none": (257, b"ustar")}
    return next((codec for codec, (at, mark) in marks.items() if head.startswith(mark, at)), None)


def parse_sidecar(text: bytes) -> dict[str, Any]:
    """Return what the sidecar says, or raise ValueError with what is wrong with it."""
    try:
        sidecar = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if not isinstance(sidecar, dict) or sidecar.get("schema") != 1:
        raise ValueError("is not of schema 1")
    for key, types in SIDECAR.items():
        if type(sidecar.get(key, ...)) not in types:
            raise ValueError(f"lacks a sound {key!r}")
    if not all(isinstance(text, str) for text in sidecar["tags"] + sidecar["diff_ids"]):
        raise ValueError("has tags or diff_ids that are not strings")
    return sidecar


def tags_and_config(manifest: Json) -> tuple[list[str], str]:
    """Read manifest.json: Config is `<digest>.json`, since Docker 25 `blobs/sha256/<digest>`."""
    try:
        (entry,) = manifest
        return list(entry["RepoTags"] or []), f"sha256:{Path(entry['Config']).stem}"
    except (TypeError, ValueError, LookupError):
        raise ValueError("holds no manifest.json of one image") from None


def manifest_digest(index: Json, image_id: str, config: str) -> str | None:
    """What a containerd store will call the image: index.json knows, or such a store itself."""
    with suppress(TypeError, ValueError, LookupError):
        (digest,) = {entry["digest"] for entry in index["manifests"]}
        return str(digest)
    return image_id if image_id != config else None


def say(text: str, end: str = "\n") -> None:
    line = f"\r{text:<79}" if sys.stderr.isatty() else text  # over a progress line
    print(line, end=end, file=sys.stderr, flush=True)


def die(message: str, *, hint: str | None = None) -> NoReturn:
    say(f"ERROR {message}" + (f"\nnext: {hint}" if hint else ""))
    raise SystemExit(1)


class Progress:
    """A live line on a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self, verb: str, total: int) -> None:
        self.verb, self.total, self.done = verb, total, 0
        self.start = self.shown = time.monotonic()
        self.pause, self.end = (0.2, "") if sys.stderr.isatty() else (10.0, "\n")

    def add(self, chunk: bytes) -> None:
        self.done += len(chunk)
        if time.monotonic() - self.shown >= self.pause:
            self.shown = time.monotonic()
            left = max(self.total - self.done, 0) * (self.shown - self.start) / self.done
            say(f"{self} of {self.total / 1e6:.0f} MB, {left:.0f} s left", end=self.end)

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self.start, 1e-3)
        return f"{self.verb} {self.done / 1e6:.0f} MB, {self.done / 1e6 / seconds:.0f} MB/s"


# ---- programs and pipes --------------------------------------------------------------------------
class Stopped(Exception):
    """INT, TERM or HUP as an exception, so that every `finally` runs."""


def stop(signum: int, frame: object) -> None:
    for each in STOPS:  # a second signal must not break the cleaning up
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(signum)


class Child:
    """A program at work, its pipes and its last words."""

    def __init__(self, *cmd: str, stdin: int | None = None, stdout: int | None = None) -> None:
        say(f"$ {shlex.join(cmd)}")
        if not shutil.which(cmd[0]):
            die(f"{cmd[0]} is not in PATH")
        self.name = shlex.join(cmd).partition(" -")[0]
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 (a pipe could fill up and block)
        # A session of its own: ^C reaches us alone, and we end it.
        self.process = subprocess.Popen(
            cmd, stdin=stdin, stdout=stdout, stderr=self.stderr, start_new_session=True
        )
        self.stdin: Any = self.process.stdin
        self.stdout: Any = self.process.stdout
        for pipe in filter(None, (self.stdin, self.stdout)):
            with suppress(OSError):  # the user may have his fill of large pipes
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, CHUNK)

    def words(self) -> str:
        self.stderr.seek(0)
        lines = self.stderr.read().decode(errors="replace").splitlines()
        return " / ".join([line.strip() for line in lines if line.strip()][-3:])

    def finish(self) -> None:
        """Wait for the end; a failure is explained with the program's own words."""
        if status := self.process.wait():
            how = f"exit status {status}" if status > 0 else signal.Signals(-status).name
            die(f"{self.name} failed ({how}): {self.words() or 'it said nothing'}")

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        # First end it, then close its pipes: a thread blocked in one of them holds that one's lock.
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.process.kill()
        with suppress(BrokenPipeError), self.process:
            self.stderr.close()


class Tap:
    """A stream that shows each chunk to its sinks as it is read."""

    def __init__(self, source: io.BufferedReader, *sinks: Callable[[bytes], object]) -> None:
        self.source, self.sinks = source, sinks

    def read(self, size: int = CHUNK) -> bytes:
        chunk = self.source.read1(size)
        for sink in self.sinks:
            sink(chunk)
        return chunk

    def drain(self) -> None:
        while self.read():
            pass


Side = tuple[Callable[..., object], ...]  # who reads the stream there, and who is shown its chunks


def through(program: Sequence[str], source: io.BufferedReader, left: Side, right: Side) -> None:
    """Pass `source` through a program, looking at the bytes on both sides of it.

    One thread a side and blocking pipes: whoever dies, its neighbours notice, and none waits on.
    """
    failures: list[OSError] = []

    def feed() -> None:
        reader, *sinks = left
        try:
            reader(Tap(source, *sinks, middle.stdin.write))
        except (BrokenPipeError, ValueError):
            pass  # the program is gone (ValueError: and its pipe closed); its exit status says why
        except OSError as error:
            failures.append(error)
        finally:
            with suppress(BrokenPipeError):
                middle.stdin.close()

    with Child(*program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as middle:
        feeder = threading.Thread(target=feed, daemon=True)
        feeder.start()
        reader, *sinks = right
        reader(Tap(middle.stdout, *sinks))
        middle.process.wait()
        for error in failures:
            raise error
        middle.finish()
        feeder.join()


def packer(codec: str) -> list[str]:
    gz = "pigz" if shutil.which("pigz") else "gzip"
    return {"gz": [gz, "-c"], "zst": ["zstd", "-q", "-c", "-T0", "-3"], "none": ["cat"]}[codec]


def unpack(tarball: Path, verb: str, left: Side, right: Side) -> str:
    """Pass a tarball through what unpacks it; how it was packed."""
    with tarball.open("rb") as file:
        codec = codec_of_bytes(file.read(512))  # the bytes decide: names lie
        file.seek(0)
        if codec is None:
            die(f"{tarball} is not a tar, gzip or zstd file")
        progress = Progress(verb, tarball.stat().st_size)
        program = ["cat"] if codec == "none" else [packer(codec)[0], "-d", "-c"]
        through(program, file, (Tap.drain, progress.add, *left), right)
    say(str(progress))
    return codec


# ---- Docker --------------------------------------------------------------------------------------
def inspect(image: str) -> dict[str, Any]:
    with Child("docker", "image", "inspect", "--", image, stdout=subprocess.PIPE) as docker:
        answer = docker.stdout.read()
        if docker.process.wait() and "no such image" in docker.words().lower():
            hint = "build it with `make docker`, or `docker pull` it"
            die(f"image {image} is not in the local Docker", hint=hint)
        docker.finish()
    try:
        (found,) = json.loads(answer)
        labels = (found.get("Config") or {}).get("Labels") or {}
        title, version = (labels.get(f"org.opencontainers.image.{x}") for x in ("title", "version"))
        known = {"id": found["Id"], "layers": found["RootFS"]["Layers"], "size": found["Size"]}
        return {**known, "version": version if title == IMAGE.partition(":")[0] else None}
    except (TypeError, ValueError, LookupError, AttributeError):
        die(f"docker image inspect {image} gave an answer that cannot be read")


def engine_of(found: dict[str, Any]) -> dict[str, str]:
    """The engine that an image holds, and its version: our label says so, else it is asked."""
    if found["version"]:
        return {"engine": ENGINES[0], "version": found["version"]}
    command = ("docker", "run", *ASK, found["id"], "-c", QUESTION, *ENGINES)
    with Child(*command, stdout=subprocess.PIPE) as docker:
        words = docker.stdout.read().decode(errors="replace")
        if docker.process.wait() == 0 and (said := re.search(r"^(\w+) (\d\S*)$", words, re.M)):
            return {"engine": said[1], "version": said[2]}
        say(f"note: which engine the image holds could not be found out: {docker.words()}")
    return {}


class Archive:
    """The two small documents of a docker archive that name the image, caught as they pass."""

    def __init__(self) -> None:
        self.documents: dict[str, Any] = {}
        self.warned = False

    def read(self, stream: Tap) -> None:
        # No error here: who cut an archive short explains it; what is none has no manifest.
        with (
            suppress(tarfile.TarError, ValueError, RecursionError),
            tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK) as tar,  # type: ignore[call-overload]
        ):
            for member in filter(tarfile.TarInfo.isreg, tar):  # old Dockers store links, too
                self.look(tar, member)
        stream.drain()  # a tar's end mark comes before the end

    def look(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        file = cast(IO[bytes], tar.extractfile(member))
        if member.name in ("manifest.json", "index.json") and member.size < SMALL:
            self.documents[member.name] = json.load(file)
        elif member.size > CHUNK and not self.warned:
            self.warned = codec_of_bytes(file.read(512)) in ("gz", "zst")
            if self.warned:  # a containerd store keeps them as they were pulled
                say("note: this image's layers are compressed already; --compress none is faster")


# ---- files ---------------------------------------------------------------------------------------
def sidecar_path(tarball: Path) -> Path:
    return tarball.with_name(f"{tarball.name}.json")


def read_sidecar(tarball: Path) -> dict[str, Any] | None:
    """Return the sidecar or None; die if it is unsound or the tarball is not of its size."""
    size, path = tarball.stat().st_size, sidecar_path(tarball)
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            sidecar = parse_sidecar(file.read(SMALL))  # what is larger is no JSON then
    except ValueError as error:
        die(f"the sidecar {path} {error}")
    if size != sidecar["packed_bytes"]:
        die(f"{tarball} has {size} bytes, its sidecar says {sidecar['packed_bytes']}")
    return sidecar


def sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(descriptor)
    os.close(descriptor)


def is_ours(part: BinaryIO) -> bool:
    """Lock TARGET.part, so that two saves cannot mix."""
    try:
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Else it was renamed or removed between our open and our lock.
        return os.path.samestat(os.fstat(part.fileno()), Path(part.name).stat())
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:  # a file system without locks: Lustre mounted without -o flock
        return True


@contextmanager
def part_of(target: Path) -> Iterator[BinaryIO]:
    """Open TARGET.part for writing; a failure leaves none of it, and TARGET as it was."""
    if target.exists() and not target.is_file():
        die(f"{target} is not a file")  # the rename would replace it, even if it is /dev/null
    path = target.with_name(f"{target.name}.part")
    part = path.open("ab")  # not "wb": until it is locked it may be another save's
    try:
        if not is_ours(part):
            die(f"another save to {target} is at work", hint="or give another --output")
        part.truncate(0)  # a leftover of a crash is reused
        try:
            yield part
        except BaseException as error:
            path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                die(f"cannot write {path}: {error.strerror}")
            raise
    finally:
        with suppress(OSError):  # the disk is full: said already
            part.close()


def commit(part: BinaryIO, target: Path, sidecar: dict[str, Any]) -> None:
    """Put tarball and sidecar in place: a crash in between leaves no sidecar, never a wrong one."""
    place = sidecar_path(target)
    draft = place.with_name(f"{place.name}.part")
    try:
        with draft.open("w") as file:
            print(json.dumps(sidecar, indent=2), file=file, flush=True)
            os.fsync(file.fileno())
        os.fsync(part.fileno())
        for each in STOPS:
            signal.signal(each, signal.SIG_IGN)  # too late to stop: the rest takes milliseconds
        place.unlink(missing_ok=True)
        sync(target.parent)
        Path(part.name).replace(target)
        draft.replace(place)
        sync(target.parent)
    finally:
        draft.unlink(missing_ok=True)


# ---- the three things to do ----------------------------------------------------------------------
def save(image: str, target: Path, codec: str) -> str:
    found = inspect(image)
    archive, digest, progress = Archive(), hashlib.sha256(), Progress("saved", found["size"])
    with part_of(target) as part:
        with Child("docker", "save", "--", image, stdout=subprocess.PIPE) as docker:
            left, right = (archive.read, progress.add), (Tap.drain, digest.update, part.write)
            through(packer(codec), docker.stdout, left, right)
            docker.finish()
        say(str(progress))
        if inspect(image) != found:  # whose layers, the old one's or the new one's?
            die(f"{image} became another image while it was being saved", hint="save it again")
        part.flush()
        packed = {"packed_bytes": part.tell(), "sha256": digest.hexdigest(), "codec": codec}
        commit(part, target, describe(archive, found) | packed)
    return str(target)


def describe(archive: Archive, found: dict[str, Any]) -> dict[str, Any]:
    tags, config = tags_and_config(archive.documents.get("manifest.json"))
    if not tags:
        die("the image is saved without a tag", hint="name it as repository:tag")
    digest = manifest_digest(archive.documents.get("index.json"), found["id"], config)
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"schema": 1, "tags": tags, "config_digest": config, "manifest_digest": digest,
            "diff_ids": found["layers"], "unpacked_bytes": found["size"], "created": created,
            **engine_of(found)}  # fmt: skip


def verify(tarball: Path) -> str:
    if (sidecar := read_sidecar(tarball)) is None:
        die(f"{tarball} has no sidecar {sidecar_path(tarball)} to be checked against")
    digest, archive = hashlib.sha256(), Archive()
    codec = unpack(tarball, "checked", (digest.update,), (archive.read,))
    tags, config = tags_and_config(archive.documents.get("manifest.json"))
    inside = {"sha256": digest.hexdigest(), "codec": codec, "tags": tags, "config_digest": config}
    for key, value in inside.items():
        if sidecar[key] not in (value, None):
            die(f"{tarball}: {key} is {value}, its sidecar says {sidecar[key]}")
    return str(tarball)


def load(tarball: Path) -> str:
    sidecar = read_sidecar(tarball)
    pipe = subprocess.PIPE
    with Child("docker", "load", "--quiet", stdin=pipe, stdout=pipe) as docker:

        def give(chunk: bytes) -> None:
            try:
                docker.stdin.write(chunk)
            except BrokenPipeError:
                docker.finish()  # no failure: it had all, what is left is padding after the tar

        # A failing decompressor ends `docker load` before it sees an end of file it could believe.
        unpack(tarball, "loaded", (), (Tap.drain, give))
        with suppress(BrokenPipeError):
            docker.stdin.close()
        docker.finish()
        answer = docker.stdout.read().decode()
    if sidecar is None:
        say(f"note: no {sidecar_path(tarball)}, so what was loaded is not checked")
        return "\n".join(re.findall(r"^Loaded image(?: ID)?: (.+)$", answer, re.MULTILINE))
    # The Id is one digest or the other, depending on Docker's store. A containerd store makes up a
    # manifest for an archive that has none: then the layers tell.
    config, manifest = sidecar["config_digest"], sidecar["manifest_digest"]
    for tag in sidecar["tags"]:
        found = inspect(tag)
        same_layers = manifest is None and found["layers"] == sidecar["diff_ids"]
        if found["id"] not in (config, manifest) and not same_layers:
            die(f"{tag} is {found['id']} after loading, the sidecar says {config} or {manifest}")
    return "\n".join(sidecar["tags"])


# ---- command line --------------------------------------------------------------------------------
def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain, allow_abbrev=False)
    option, one = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    option("image", metavar="IMAGE", nargs="?", help=f"default: $IMAGE, else {IMAGE}")
    option("-o", "--output", metavar="FILE", help="default: named after IMAGE, in this directory")
    option("--compress", choices=[*SUFFIX], help="default: by the suffix of --output, else gz")
    one("--verify", metavar="FILE", type=Path, help="instead: check FILE against its sidecar")
    one("--load", metavar="FILE", type=Path, help="instead: load FILE into Docker, and check")
    args = parser.parse_args(argv)
    if (args.verify or args.load) and (args.image or args.output or args.compress):
        parser.error("--verify and --load take a FILE and nothing else")
    suffix = codec_of_name(args.output or "")
    if args.compress and suffix and args.compress != suffix:
        parser.error(f"--compress {args.compress} does not fit --output {args.output}")
    args.compress = args.compress or suffix or "gz"
    return args


def load_env() -> None:
    """Read .env, unless others may have written it: all that we start gets its variables."""
    try:
        from dotenv import load_dotenv
    except ImportError:
        die("python-dotenv is not installed", hint="`make setup`, or `pip install python-dotenv`")
    ours = {os.geteuid(), 0, Path(__file__).stat().st_uid}
    for path in (Path.cwd() / ".env", Path(__file__).resolve().with_name(".env")):
        try:
            with suppress(FileNotFoundError):
                state = path.stat()
                if state.st_uid not in ours or state.st_mode & stat.S_IWOTH:
                    die(f"{path} belongs to another user, or everybody may write it")
                load_dotenv(path)
        except (OSError, ValueError) as error:
            die(f"cannot read {path}: {error}")


def work(args: argparse.Namespace) -> str:
    if given := args.verify or args.load:
        return verify(given) if args.verify else load(given)
    name = os.environ.get("IMAGE", "")
    if codec_of_name(name) or name.startswith(("/", "./", "../", "~")):
        name = ""  # the launcher takes a tarball by that variable, too
    image = with_tag(args.image or name or IMAGE)
    return save(image, Path(args.output or tarball_name(image, args.compress)), args.compress)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    os.umask(os.umask(0o077) | 0o002)  # a tarball that everybody may change is nobody's image
    load_env()
    for each in STOPS:
        if signal.getsignal(each) is not signal.SIG_IGN:  # nohup
            signal.signal(each, stop)
    try:
        result = work(args)
    except Stopped as stopped:
        say(f"stopped by {signal.Signals(stopped.args[0]).name}")
        return 128 + int(stopped.args[0])
    except ValueError as error:
        die(f"what was read {error}")
    except OSError as error:
        die(f"{error.filename or 'i/o'}: {error.strerror}")
    sys.stdout.buffer.write(os.fsencode(f"{result}\n"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
