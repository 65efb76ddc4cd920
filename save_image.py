#!/usr/bin/env python3
"""Save a Docker image as one file, with a sidecar (FILE.json) that describes it.

  save_image.py                            # -> tensorrt-llm-serve-latest.tar.gz
  save_image.py my/image:1.0 -o x.tar.zst  # zstd: far faster, both ways
  save_image.py -o x.sqsh                  # squashfs, for pyxis and enroot
stdout is the file's path, or the loaded tags; all else goes to stderr.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import IO, Any, BinaryIO, NoReturn, cast

IMAGE = "tensorrt-llm-serve:latest"
SUFFIX = {"gz": ".tar.gz", "zst": ".tar.zst", "none": ".tar", "sqsh": ".sqsh"}
SIDECAR: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("schema", "unpacked_bytes", "packed_bytes"), (int,)),
    **dict.fromkeys(("tags", "diff_ids"), (list,)),
    **dict.fromkeys(("sha256", "codec", "created"), (str,)),  # sha256: of the file
    **dict.fromkeys(("config_digest", "manifest_digest"), (str, type(None))),  # by Docker's store
}
ENGINES = ("tensorrt_llm", "sglang", "vllm")  # their packages; SGLang's image may have vLLM's, too
QUESTION = ("import sys, importlib.metadata as m; [print(n, d.version) for n in sys.argv[1:] "
            "for d in m.distributions(name=n)]")  # fmt: skip
# No GPU, no network. `void`: NVIDIA's runtime, if it is the default, would look for a driver.
ASK = "--rm --pull=never --net=none --env=NVIDIA_VISIBLE_DEVICES=void --entrypoint=python3".split()
SQUASH = "-comp zstd -Xcompression-level 3 -b 1M".split()  # enroot's own do not compress the data
OF_TAR = "-tar -no-progress -quiet -all-root -root-mode 755 -wildcards -e dev/* .dockerenv".split()
# As in enroot's images: pyxis puts into rc.local what runs in place of the entrypoint.
RC = 'cd "{}" && unset OLDPWD || exit; [ ! -s /etc/rc.local ] || . /etc/rc.local; exec {} "$@"\n'
CHUNK, SMALL = 1 << 20, 16 << 20  # bytes; a file larger than SMALL is no manifest or sidecar
Json = Any  # anything that a document may hold
Sink = Callable[[bytes], object]
Side = tuple[Callable[..., object], ...]  # a stream's reader, and the sinks that see its chunks
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def with_tag(image: str) -> str:
    """Complete a bare name: `docker save NAME` would export every tag NAME has."""
    return image if "@" in image or ":" in image.rpartition("/")[2] else f"{image}:latest"


def tarball_name(image: str, codec: str) -> str:
    return re.sub(r"[^\w.-]+", "-", image.rpartition("/")[2]) + SUFFIX[codec]


def codec_of_name(name: str) -> str | None:
    names = {"gz": ".gz .tgz", "zst": ".zst .tzst", "none": ".tar", "sqsh": ".sqsh .squashfs",
             "other": ".xz .txz .bz2 .tbz .tbz2 .lz .lz4 .lzma .br .zip .7z"}  # fmt: skip
    return next((c for c, each in names.items() if Path(name).suffix.lower() in each.split()), None)


def codec_of_bytes(head: bytes) -> str | None:
    marks = {"gz": b"\x1f\x8b", "zst": b"\x28\xb5\x2f\xfd", "sqsh": b"hsqs"}
    known = [codec for codec, mark in marks.items() if head.startswith(mark)]
    return "none" if head.startswith(b"ustar", 257) else next(iter(known), None)


def parse_sidecar(text: bytes) -> Json:
    """Return what the sidecar says, or raise ValueError with what is wrong with it."""
    try:
        sidecar = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if not isinstance(sidecar, dict) or sidecar.get("schema") != 1:
        raise ValueError("is not of schema 1")
    for key, types in SIDECAR.items():
        value = sidecar.get(key, ...)
        if type(value) not in types or (type(value) is list and {*map(type, value)} - {str}):
            raise ValueError(f"lacks a valid {key!r}")
    return sidecar


def tags_and_config(manifest: Json) -> tuple[list[str], str]:
    """Read manifest.json: Config is `<digest>.json`, since Docker 25 `blobs/sha256/<digest>`."""
    try:
        (entry,) = manifest
        return list(entry["RepoTags"] or []), f"sha256:{Path(entry['Config']).stem}"
    except (TypeError, ValueError, LookupError):
        raise ValueError("holds no manifest.json of one image") from None


def manifest_digest(index: Json, image_id: str, config: str) -> str | None:
    """The image's id in a containerd store, from index.json or such a store itself; else None."""
    with suppress(TypeError, ValueError, LookupError):
        (digest,) = {entry["digest"] for entry in index["manifests"]}
        return str(digest)
    return image_id if image_id != config else None


def say(text: str, end: str = "\n") -> None:
    line, end = (f"\r{text:<79}", end) if sys.stderr.isatty() else (text, "\n")  # over progress
    print(line, end=end, file=sys.stderr, flush=True)


def die(message: str, *, hint: str | None = None) -> NoReturn:
    say(f"ERROR {message}" + (f"\nnext: {hint}" if hint else ""))
    raise SystemExit(1)


class Progress:
    """A live line on a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self, verb: str, total: int) -> None:
        self.verb, self.total, self.done = verb, total, 0
        self.start = self.shown = time.monotonic()

    def add(self, chunk: bytes) -> None:
        self.done += len(chunk)
        if time.monotonic() - self.shown >= (0.2 if sys.stderr.isatty() else 10):
            self.shown = time.monotonic()
            left = max(self.total - self.done, 0) * (self.shown - self.start) / self.done
            say(f"{self} of {self.total / 1e6:.0f} MB, {left:.0f} s left", end="")

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self.start, 1e-3)
        return f"{self.verb} {self.done / 1e6:.0f} MB, {self.done / 1e6 / seconds:.0f} MB/s"


def stop(signum: int, frame: object) -> None:
    """End by an exception, so that every `finally` runs; further signals are ignored."""
    for each in STOPS:
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + signum)


class Child(subprocess.Popen[bytes]):
    """A running program, its pipes and its last words."""

    stdin: Any
    stdout: Any

    def __init__(self, *cmd: str, stdin: int | None = None, stdout: int = DEVNULL) -> None:
        say(f"$ {shlex.join(cmd)}")
        if not shutil.which(cmd[0]):
            die(f"{cmd[0]} is not in PATH")
        self.name = shlex.join(cmd).partition(" -")[0]
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 (a pipe could fill up and block)
        # A session of its own: ^C reaches only us, and we end the program.
        super().__init__(cmd, stdin=stdin, stdout=stdout, stderr=self.said, start_new_session=True)
        for pipe in filter(None, (self.stdin, self.stdout)):
            with suppress(OSError):  # the user may be at the limit of large pipes
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, CHUNK)

    def words(self) -> str:
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").splitlines()
        return " / ".join([line.strip() for line in lines if line.strip()][-3:])

    def finish(self) -> None:
        """Wait for the end; a failure is explained with the program's own words."""
        if status := self.wait():
            how = f"exit status {status}" if status > 0 else signal.Signals(-status).name
            die(f"{self.name} failed ({how}): {self.words() or 'it said nothing'}")

    def __exit__(self, *error: object) -> None:
        # End it before closing its pipes: a thread blocked in a pipe holds that pipe's lock.
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGTERM)  # enroot is several processes
        with suppress(subprocess.TimeoutExpired):
            self.wait(5)
        self.kill()
        with suppress(BrokenPipeError), self.said:
            super().__exit__(None, None, None)


class Tap:
    """A stream that shows each chunk to its sinks as it is read."""

    def __init__(self, source: Json, *sinks: Sink) -> None:
        self.source, self.sinks = source, sinks

    def read(self, size: int = CHUNK) -> bytes:
        chunk: bytes = self.source.read1(size)
        for sink in self.sinks:
            sink(chunk)
        return chunk

    def drain(self) -> None:
        while self.read():
            pass


def through(program: Sequence[str], source: Child | BinaryIO, left: Side, right: Side) -> None:
    """Pass a file or a child's output through a program; sinks see the bytes of both sides."""
    ends: list[OSError | None] = []

    def feed() -> None:
        reader, *sinks = left
        # If the program is gone (ValueError: and its pipe closed), its exit status says why.
        with suppress(BrokenPipeError, ValueError), middle.stdin:
            try:
                reader(Tap(getattr(source, "stdout", source), *sinks, middle.stdin.write))
                ends.append(None)
            except OSError as error:
                ends.append(error)

    # One thread per side, and blocking pipes: if one end dies, its neighbours notice, none hangs.
    with Child(*program, stdin=PIPE, stdout=PIPE) as middle:
        threading.Thread(target=feed, daemon=True).start()
        right[0](Tap(middle.stdout, *right[1:]))
        middle.wait()
        for end in ends:
            if isinstance(source, Child) and end is None:
                source.finish()  # if it was cut short, that is why the program failed
            if end and not isinstance(end, BrokenPipeError):
                raise end
        middle.finish()


def packer(codec: str) -> list[str]:
    gz = "pigz" if shutil.which("pigz") else "gzip"
    return {"gz": [gz, "-c"], "zst": ["zstd", "-q", "-c", "-T0", "-3"], "none": ["cat"]}[codec]


def unpack(tarball: Path, verb: str, left: Side, right: Side) -> str:
    """Pass a tarball through what unpacks it; returns how it was packed."""
    with tarball.open("rb") as file:
        codec = codec_of_bytes(file.read(512))  # the bytes decide: names lie
        file.seek(0)
        if codec is None or (codec, verb) == ("sqsh", "loaded"):
            die(f"{tarball} is not a tar, gzip or zstd file")
        progress = Progress(verb, tarball.stat().st_size)
        program = [packer(codec)[0], "-d", "-c"] if codec in ("gz", "zst") else ["cat"]
        through(program, file, (Tap.drain, progress.add, *left), right)
    say(str(progress))
    return codec


def inspect(image: str) -> Json:
    with Child("docker", "image", "inspect", "--", image, stdout=PIPE) as docker:
        answer = docker.stdout.read()
        if docker.wait() and re.search("(?i)no such image|image not known", docker.words()):
            die(f"image {image} is not in the local Docker", hint="build it with `make docker`")
        docker.finish()
    try:
        (found,) = json.loads(answer)
        layers, config = found["RootFS"]["Layers"], found.get("Config") or {}
        name = f"sha256:{found['Id'].removeprefix('sha256:')}"  # podman's lacks that
        return {"id": name, "layers": layers, "size": found["Size"], "config": config}
    except (TypeError, ValueError, LookupError, AttributeError):
        die(f"docker image inspect {image} gave an answer that cannot be read")


def engine_of(found: Json) -> dict[str, str]:
    """The engine that an image holds, and its version, by our label or by asking the image."""
    labels = found["config"].get("Labels") or {}
    title, version = (labels.get(f"org.opencontainers.image.{x}") for x in ("title", "version"))
    if version and title == IMAGE.partition(":")[0]:
        return {"engine": ENGINES[0], "version": version}
    with Child("docker", "run", *ASK, found["id"], "-c", QUESTION, *ENGINES, stdout=PIPE) as docker:
        words = docker.stdout.read().decode(errors="replace")
        if docker.wait() == 0 and (said := re.search(r"^(\w+) (\d\S*)$", words, re.M)):
            return {"engine": said[1], "version": said[2]}
        say(f"note: could not find out which engine the image holds: {docker.words()}")
    return {}


class Archive(dict[str, Json]):
    """The two small documents of a docker archive that name the image, caught as they pass."""

    def read(self, stream: Tap) -> None:
        # No error here: whoever cut an archive short reports it; what is none has no manifest.
        with suppress(tarfile.TarError, ValueError, RecursionError):
            tar = tarfile.TarFile.open(fileobj=stream, mode="r|", bufsize=CHUNK)  # type: ignore[call-overload]
            for member in filter(tarfile.TarInfo.isreg, tar):  # old Dockers store links, too
                self.look(tar, member)
        stream.drain()  # the tar's end mark comes before the end of the stream

    def look(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        file = cast(IO[bytes], tar.extractfile(member))
        if member.name in ("manifest.json", "index.json") and member.size < SMALL:
            self[member.name] = json.load(file)
        elif member.size > CHUNK and codec_of_bytes(file.read(512)) in ("gz", "zst"):
            if "packed" not in self:  # a containerd store keeps them as they were pulled
                say("note: this image's layers are compressed already; --compress none is faster")
            self["packed"] = True


def read_sidecar(tarball: Path) -> Json:
    """Return the sidecar or None; die if it is unsound or the tarball is not of its size."""
    size, path = tarball.stat().st_size, Path(f"{tarball}.json")
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            sidecar = parse_sidecar(file.read(SMALL))  # a larger one is cut off, and so no JSON
    except ValueError as error:
        die(f"the sidecar {path} {error}")
    if size != sidecar["packed_bytes"]:
        die(f"{tarball} has {size} bytes, its sidecar says {sidecar['packed_bytes']}")
    return sidecar


def is_ours(part: BinaryIO) -> bool:
    """Lock TARGET.part against a second save; False if it is locked, or was replaced."""
    try:
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(part.fileno()), Path(part.name).stat())
    except OSError as error:  # no locks is no failure: Lustre mounted without -o flock
        return not isinstance(error, BlockingIOError | FileNotFoundError)


@contextmanager
def part_of(target: Path) -> Iterator[BinaryIO]:
    """Open TARGET.part for writing; after a failure it is gone, and TARGET is as it was."""
    if target.exists() and not target.is_file():
        die(f"{target} is not a file")  # the rename would replace it, even if it is /dev/null
    path = Path(f"{target}.part")
    part = path.open("ab")  # not "wb": until it is locked it may be another save's
    if not is_ours(part):
        die(f"another save to {target} is running", hint="wait for it, or give another --output")
    try:
        part.truncate(0)  # a leftover of a crash is reused
        yield part
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            die(f"cannot write {path}: {error.strerror}")
        raise
    finally:
        with suppress(OSError):  # the disk is full, which has been reported
            part.close()


def commit(part: BinaryIO, target: Path, sidecar: dict[str, Any]) -> None:
    """Put tarball and sidecar in place: a crash in between leaves no sidecar, never a wrong one."""
    place, draft = Path(f"{target}.json"), Path(f"{target}.json.part")
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        with draft.open("w") as file:
            print(json.dumps(sidecar, indent=2), file=file, flush=True)
            os.fsync(file.fileno())
        os.fsync(part.fileno())
        for each in STOPS:
            signal.signal(each, signal.SIG_IGN)  # too late to stop: the rest takes milliseconds
        place.unlink(missing_ok=True)
        with suppress(OSError):  # FUSE and CIFS cannot
            os.fsync(folder)
        Path(part.name).replace(target)
        draft.replace(place)
        with suppress(OSError):
            os.fsync(folder)
    finally:
        draft.unlink(missing_ok=True)
        os.close(folder)


def save(image: str, target: Path, codec: str) -> str:
    found, digest = inspect(image), hashlib.sha256()
    progress = Progress("saved", found["size"])
    with part_of(target) as part:
        if codec == "sqsh":
            names = squash(image, found, part, progress.add, digest.update)
        else:
            names = pack(image, found, codec, progress, digest.update, part.write)
        say(str(progress))
        if inspect(image) != found:  # or it would be unclear whose layers were saved
            die(f"{image} became another image while it was being saved", hint="save it again")
        commit(part, target, {
            "schema": 1, **names, "diff_ids": found["layers"], "unpacked_bytes": found["size"],
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **engine_of(found),
            "packed_bytes": part.seek(0, 2), "sha256": digest.hexdigest(), "codec": codec,
        })  # fmt: skip
    return str(target)


def pack(image: str, found: Json, codec: str, progress: Progress, *sinks: Sink) -> Json:
    """Pack what `docker save` writes; returns the names in it."""
    archive = Archive()
    with Child("docker", "save", "--", image, stdout=PIPE) as docker:
        through(packer(codec), docker, (archive.read, progress.add), (Tap.drain, *sinks))
    tags, config = tags_and_config(archive.get("manifest.json"))
    if not tags:
        die("the image is saved without a tag", hint="name it as repository:tag")
    digest = manifest_digest(archive.get("index.json"), found["id"], config)
    return {"tags": tags, "config_digest": config, "manifest_digest": digest}


def squash(image: str, found: Json, part: BinaryIO, *sinks: Sink) -> Json:
    """Write a squashfs file in place of `part`; enroot is used if the image has a command."""
    fresh = Path(f"{part.name}.sqsh").absolute()
    fresh.unlink(missing_ok=True)  # enroot does not overwrite
    os.environ.setdefault("ENROOT_SQUASH_OPTIONS", " ".join(SQUASH))
    try:
        if shutil.which("enroot") and any(map(found["config"].get, ("Cmd", "Entrypoint"))):
            with Child("enroot", "import", "-o", str(fresh), f"dockerd://{found['id']}") as enroot:
                enroot.finish()
        else:
            export(found, str(fresh))
        with fresh.open("rb") as file:
            Tap(file, *sinks).drain()
            is_ours(file)
            fresh.replace(part.name)
            os.dup2(file.fileno(), part.fileno())
    finally:
        fresh.unlink(missing_ok=True)
    return {"tags": [image], "config_digest": found["id"], "manifest_digest": None}


def export(found: Json, target: str) -> None:
    """The same without enroot, from a container that is never started."""
    name, config = f"save-image-{os.urandom(8).hex()}", found["config"]
    rc = RC.format(config.get("WorkingDir") or "/", shlex.join(config.get("Entrypoint") or []))
    environment = "".join(f"{each}\n" for each in config.get("Env") or [])
    try:
        with Child("docker", "create", f"--name={name}", found["id"], "sh") as docker:
            docker.finish()
        with tempfile.TemporaryDirectory() as folder:
            for file, text in {"rc": rc, "environment": environment}.items():
                path = Path(folder, file)
                path.write_text(text)
                path.chmod(0o644)  # whatever our umask is
                with Child("docker", "cp", str(path), f"{name}:/etc/{file}") as docker:
                    docker.finish()
        with Child("docker", "export", name, stdout=PIPE) as docker:
            left = Tap.drain, Progress("exported", found["size"]).add
            through(["mksquashfs", "-", target, *SQUASH, *OF_TAR], docker, left, (Tap.drain,))
    finally:
        rm = Child("docker", "rm", "--force", "--volumes", name)
        rm.wait()  # not in a `with`: a signal now must not interrupt it


def verify(tarball: Path) -> str:
    if (sidecar := read_sidecar(tarball)) is None:
        die(f"{tarball} has no sidecar {tarball}.json to be checked against")
    digest, archive = hashlib.sha256(), Archive()
    codec = unpack(tarball, "checked", (digest.update,), (archive.read,))
    names = sidecar["tags"], sidecar["config_digest"]  # a squashfs file has none of its own
    tags, config = names if codec == "sqsh" else tags_and_config(archive.get("manifest.json"))
    inside = {"sha256": digest.hexdigest(), "codec": codec, "tags": tags, "config_digest": config}
    for key, value in inside.items():
        if sidecar[key] not in (value, None):
            die(f"{tarball}: {key} is {value}, its sidecar says {sidecar[key]}")
    return str(tarball)


def load(tarball: Path) -> str:
    sidecar = read_sidecar(tarball)
    with Child("docker", "load", "--quiet", stdin=PIPE, stdout=PIPE) as docker:

        def give(chunk: bytes) -> None:
            try:
                docker.stdin.write(chunk)
            except BrokenPipeError:
                docker.finish()  # no failure: it had all, the rest is padding after the tar

        # If the decompressor fails, `docker load` is ended before it sees an end that looks right.
        unpack(tarball, "loaded", (), (Tap.drain, give))
        with suppress(BrokenPipeError):
            docker.stdin.close()
        docker.finish()
        loaded = re.findall(r"Loaded image(?: ID)?: (.+)", docker.stdout.read().decode())
    if sidecar is None:
        say(f"note: no {tarball}.json, so what was loaded is not checked")
    # The Id depends on Docker's store; containerd's makes one up if an archive has none.
    for tag in sidecar["tags"] if sidecar else ():
        found, config, manifest = inspect(tag), sidecar["config_digest"], sidecar["manifest_digest"]
        same_layers = manifest is None and found["layers"] == sidecar["diff_ids"]
        if found["id"] not in (config, manifest) and not same_layers:
            die(f"{tag} is {found['id']} after loading, the sidecar says {config} or {manifest}")
    return "\n".join(loaded)


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
    args.compress = args.compress or (suffix if suffix in SUFFIX else "gz")
    if suffix not in (args.compress, None):
        parser.error(f"--compress {args.compress} does not fit --output {args.output}")
    return args


def load_env() -> None:
    """Read .env; die if others may have written it: its variables reach all that we start."""
    try:
        from dotenv import load_dotenv
    except ImportError:
        die("python-dotenv is not installed", hint="`make setup`, or `pip install python-dotenv`")
    ours = {os.geteuid(), 0, Path(__file__).stat().st_uid}
    for path in (Path.cwd() / ".env", Path(__file__).resolve().with_name(".env")):
        try:
            with suppress(FileNotFoundError):
                state = path.stat()
                if state.st_uid not in ours or state.st_mode & 0o002:
                    die(f"{path} belongs to another user, or everybody may write it")
                load_dotenv(path)
        except (OSError, ValueError) as error:
            die(f"cannot read {path}: {error}")


def main(argv: Sequence[str] | None = None) -> int:
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    args = parse(argv)
    os.umask(os.umask(0o077) | 0o002)  # nobody can trust an image that everybody may change
    load_env()
    for each in {each for each in STOPS if signal.getsignal(each) is not signal.SIG_IGN}:  # nohup
        signal.signal(each, stop)
    try:
        if given := args.verify or args.load:
            result = verify(given) if args.verify else load(given)
        else:  # the launcher takes a file by this variable, too
            is_path = codec_of_name(name := os.environ.get("IMAGE", "")) or name[:1] in "/.~"
            image = with_tag(args.image or (IMAGE if is_path else name))
            path = Path(args.output or tarball_name(image, args.compress))
            result = save(image, path, args.compress)
        if sys.stdout:
            os.write(1, os.fsencode(f"{result}\n"))
    except SystemExit as end:
        if end.code != 1:
            say(f"stopped by {signal.Signals(int(str(end.code)) - 128).name}")
        raise
    except ValueError as error:
        die(f"what was read {error}")
    except OSError as error:
        die(f"{error.filename or 'i/o'}: {error.strerror}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
