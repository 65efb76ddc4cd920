#!/usr/bin/env python3
"""Save a Docker image as one compressed tarball, with a sidecar that says what
is inside.

The sidecar (FILE.json: tags, ids, sizes, sha256) is there so that a node need
not decompress gigabytes to know which image it is.

Examples:
  save_image.py                            # -> tensorrt-llm-serve-latest.tar.gz
  save_image.py my/image:1.0 -o x.tar.zst  # zstd: far faster, both ways
  save_image.py --verify /fsx/x.tar.zst    # is this copy whole?
  save_image.py --load /fsx/x.tar.zst      # into this Docker, checked

stdout is the tarball's path, or with --load the loaded tags; everything else
goes to stderr.
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
from contextlib import closing, contextmanager, suppress
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import FrameType
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


# ---- talk ----------------------------------------------------------------------------------------
def say(text: str, end: str = "\n") -> None:
    live = sys.stderr.isatty()  # there, write over the progress line that may stand here
    print(f"\r{text:<79}" if live else text, end=end, file=sys.stderr, flush=True)


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


def stop(signum: int, frame: FrameType | None) -> None:
    for each in STOPS:  # a second signal must not break the cleaning up
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(signum)


class Child:
    """A program at work, its pipes and its last words."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], stderr: BinaryIO) -> None:
        self.name, self.process, self.stderr = name, process, stderr
        self.stdin: Any = process.stdin
        self.stdout: Any = process.stdout
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

    def close(self) -> None:
        # First end it, then close its pipes: a thread blocked in one of them holds that one's lock.
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pipe in filter(None, (self.stdin, self.stdout)):
            with suppress(BrokenPipeError):
                pipe.close()


@contextmanager
def running(*cmd: str, stdin: int | None = None, stdout: int | None = None) -> Iterator[Child]:
    say(f"$ {shlex.join(cmd)}")
    if not shutil.which(cmd[0]):
        die(f"{cmd[0]} is not in PATH")
    with tempfile.TemporaryFile() as stderr:  # a pipe that nobody reads could fill up and block
        # A session of its own: ^C reaches us alone, and we end it.
        process = subprocess.Popen(
            cmd, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True
        )
        name = " ".join(takewhile(lambda word: not word.startswith("-"), cmd))
        with closing(Child(name, process, stderr)) as child:
            yield child


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

    One thread a side and blocking pipes: whoever dies, its neighbours see an end of file or a
    broken pipe, so nothing can wait for ever. Python only hands over whole chunks; hashing,
    compressing, reading and writing overlap.
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

    with running(*program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as middle:
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


def unpacker(tarball: Path) -> tuple[str, list[str]]:
    with tarball.open("rb") as file:
        codec = codec_of_bytes(file.read(512))  # the bytes decide: names lie
    if codec is None:
        die(f"{tarball} is not a tar, gzip or zstd file")
    return codec, ["cat"] if codec == "none" else [packer(codec)[0], "-d", "-c"]


# ---- Docker --------------------------------------------------------------------------------------
def inspect(image: str) -> dict[str, Any]:
    with running("docker", "image", "inspect", "--", image, stdout=subprocess.PIPE) as docker:
        answer = docker.stdout.read()
        if docker.process.wait() and "no such image" in docker.words().lower():
            hint = "build it with `make docker`, or `docker pull` it"
            die(f"image {image} is not in the local Docker", hint=hint)
        docker.finish()
    try:
        (found,) = json.loads(answer)
        return {"id": found["Id"], "layers": found["RootFS"]["Layers"], "size": found["Size"]}
    except (TypeError, ValueError, LookupError):
        die(f"docker image inspect {image} gave an answer that cannot be read")


class Archive:
    """The two small documents of a docker archive that name the image, caught as they pass."""

    def __init__(self) -> None:
        self.documents: dict[str, Any] = {}
        self.warned = False

    def read(self, stream: Tap) -> None:
        # Errors are not raised here: an archive cut short is explained by whoever cut it, and one
        # that is no archive by `identity`, which then finds nothing.
        with (
            suppress(tarfile.TarError, ValueError, RecursionError),
            tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK) as tar,  # type: ignore[call-overload]
        ):
            for member in tar:
                self.look(tar, member)
        stream.drain()  # a tar's end mark comes before the end

    def look(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        if not member.isreg():  # old Dockers store a layer that occurs twice as a link
            return
        file = cast(IO[bytes], tar.extractfile(member))
        if member.name in ("manifest.json", "index.json") and member.size < SMALL:
            self.documents[member.name] = json.load(file)
        elif member.size > CHUNK and not self.warned:
            self.warned = codec_of_bytes(file.read(512)) in ("gz", "zst")
            if self.warned:  # a containerd store keeps them as they were pulled
                say("note: this image's layers are compressed already; --compress none is faster")

    def identity(self) -> tuple[list[str], str]:
        return tags_and_config(self.documents.get("manifest.json"))


# ---- files ---------------------------------------------------------------------------------------
def sidecar_path(tarball: Path) -> Path:
    return tarball.with_name(f"{tarball.name}.json")


def read_sidecar(tarball: Path) -> dict[str, Any] | None:
    """Return the sidecar or None; die if it is unsound or the tarball is not of its size."""
    size, path = tarball.stat().st_size, sidecar_path(tarball)
    if not path.exists():
        return None
    try:
        if path.stat().st_size > SMALL:
            raise ValueError("is far too large")
        sidecar = parse_sidecar(path.read_bytes())
    except ValueError as error:
        die(f"the sidecar {path} {error}")
    if size != sidecar["packed_bytes"]:
        die(f"{tarball} has {size} bytes, its sidecar says {sidecar['packed_bytes']}")
    return sidecar


def sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(descriptor)
    os.close(descriptor)


def claim(part: BinaryIO, target: Path) -> None:
    """Lock TARGET.part, so that two saves cannot mix; a leftover of a crash is reused."""
    try:
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = os.path.samestat(os.fstat(part.fileno()), Path(part.name).stat())
    except (BlockingIOError, FileNotFoundError):
        alone = False
    except OSError:  # a file system without locks: Lustre mounted without -o flock
        alone = True
    if not alone:  # it is locked, or was renamed or removed between our open and our lock
        die(f"another save to {target} is at work", hint="wait for it, or give another --output")
    part.truncate(0)


@contextmanager
def part_of(target: Path) -> Iterator[BinaryIO]:
    """Open TARGET.part for writing; a failure leaves none of it, and TARGET as it was."""
    if target.exists() and not target.is_file():
        die(f"{target} is not a file")  # the rename would replace it, even if it is /dev/null
    path = target.with_name(f"{target.name}.part")
    part = path.open("ab")  # not "wb": until it is claimed it may be another save's
    try:
        claim(part, target)
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
        with running("docker", "save", "--", image, stdout=subprocess.PIPE) as docker:
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
    tags, config = archive.identity()
    if not tags:
        die("the image is saved without a tag", hint="name it as repository:tag")
    index = archive.documents.get("index.json")
    return {
        "schema": 1,
        "tags": tags,
        "config_digest": config,
        "manifest_digest": manifest_digest(index, found["id"], config),
        "diff_ids": found["layers"],
        "unpacked_bytes": found["size"],
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def verify(tarball: Path) -> str:
    if (sidecar := read_sidecar(tarball)) is None:
        die(f"{tarball} has no sidecar {sidecar_path(tarball)} to be checked against")
    codec, program = unpacker(tarball)
    digest, archive = hashlib.sha256(), Archive()
    progress = Progress("checked", sidecar["packed_bytes"])
    with tarball.open("rb") as file:
        through(program, file, (Tap.drain, digest.update, progress.add), (archive.read,))
    say(str(progress))
    tags, config = archive.identity()
    inside = {"sha256": digest.hexdigest(), "codec": codec, "tags": tags, "config_digest": config}
    for key, value in inside.items():
        if sidecar[key] not in (value, None):
            die(f"{tarball}: {key} is {value}, its sidecar says {sidecar[key]}")
    return str(tarball)


def load(tarball: Path) -> str:
    sidecar = read_sidecar(tarball)
    _, program = unpacker(tarball)
    progress, pipe = Progress("loaded", tarball.stat().st_size), subprocess.PIPE
    with (
        tarball.open("rb") as file,
        running("docker", "load", "--quiet", stdin=pipe, stdout=pipe) as docker,
    ):

        def give(chunk: bytes) -> None:
            try:
                docker.stdin.write(chunk)
            except BrokenPipeError:
                docker.finish()  # no failure: it had all, what is left is padding after the tar

        # A failing decompressor ends `docker load` before it sees an end of file it could believe.
        through(program, file, (Tap.drain, progress.add), (Tap.drain, give))
        with suppress(BrokenPipeError):
            docker.stdin.close()
        docker.finish()
        answer = docker.stdout.read().decode()
    say(str(progress))
    if sidecar is None:
        say(f"note: no {sidecar_path(tarball)}, so what was loaded is not checked")
        return "\n".join(re.findall(r"^Loaded image(?: ID)?: (.+)$", answer, re.MULTILINE))
    for tag in sidecar["tags"]:
        check_loaded(tag, sidecar)
    return "\n".join(sidecar["tags"])


def check_loaded(tag: str, sidecar: dict[str, Any]) -> None:
    """Compare with what Docker has now: the Id is one digest or the other, depending on its store.

    A containerd store makes up its own manifest for an archive that has none: then the layers tell.
    """
    found, known = inspect(tag), (sidecar["config_digest"], sidecar["manifest_digest"])
    same_layers = known[1] is None and found["layers"] == sidecar["diff_ids"]
    if found["id"] not in known and not same_layers:
        die(f"{tag} is {found['id']} after loading, the sidecar says {known[0]} or {known[1]}")


# ---- command line --------------------------------------------------------------------------------
def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    head, _, examples = (__doc__ or "").partition("Examples:")
    parser = argparse.ArgumentParser(
        description=head,
        epilog=f"Examples:{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [IMAGE] [-o FILE] [--compress CODEC]\n"
        "       %(prog)s --verify FILE | --load FILE",
        allow_abbrev=False,
    )
    option = parser.add_argument_group("save").add_argument
    option("image", metavar="IMAGE", nargs="?", help=f"default: $IMAGE, else {IMAGE}")
    option("-o", "--output", metavar="FILE", help="default: named after IMAGE, in this directory")
    option("--compress", choices=[*SUFFIX], help="default: by the suffix of --output, else gz")
    other = parser.add_argument_group("instead of saving").add_mutually_exclusive_group()
    option = partial(other.add_argument, metavar="FILE", type=Path)
    option("--verify", help="check FILE against its sidecar")
    option("--load", help="load FILE into Docker, and check")
    args = parser.parse_args(argv)
    if (args.verify or args.load) and (args.image or args.output or args.compress):
        parser.error("--verify and --load take a FILE and nothing else")
    suffix = codec_of_name(args.output or "")
    if args.compress and suffix and args.compress != suffix:
        parser.error(f"--compress {args.compress} does not fit --output {args.output}")
    args.compress = args.compress or suffix or "gz"
    return args


def load_env() -> None:
    try:
        from dotenv import load_dotenv
    except ImportError:
        die("python-dotenv is not installed", hint="`make setup`, or `pip install python-dotenv`")
    for path in (Path.cwd() / ".env", Path(__file__).resolve().with_name(".env")):
        try:
            with suppress(FileNotFoundError):
                check_env(path)
                load_dotenv(path)
        except (OSError, ValueError) as error:
            die(f"cannot read {path}: {error}")


def check_env(path: Path) -> None:
    """Die where others may have written it: its variables are those of every program we start."""
    state = path.stat()
    ours = {os.geteuid(), 0, Path(__file__).stat().st_uid}
    if state.st_uid not in ours or state.st_mode & stat.S_IWOTH:
        die(f"{path} belongs to another user, or everybody may write it", hint="make it your own")


def image_setting() -> str:
    """$IMAGE where it names an image; the launcher takes a tarball by that name, too."""
    name = os.environ.get("IMAGE", "")
    return "" if codec_of_name(name) or name.startswith(("/", "./", "../", "~")) else name


def work(args: argparse.Namespace) -> str:
    if given := args.verify or args.load:
        return verify(given) if args.verify else load(given)
    image = with_tag(args.image or image_setting() or IMAGE)
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
