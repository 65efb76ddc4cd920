"""Bring the image to every node that lacks it: loaded from a tarball, or pulled, all at once."""

import re
import shutil
import time

from common.talk import counted, die, say, speaking
from launch import slurm
from launch.engines import packages
from launch.image import ECR, SLOWEST, Image
from launch.node import messages
from launch.node.images import Forget, Load, Pull
from launch.node.messages import Kept
from launch.node.squash import Discard, Import
from launch.nodes import Place, ask, held, run
from launch.order import Command

LOADING = " while the image was being loaded"


def provide_command(
    image: Image, place: Place, nodes: int = 0, *, ask_release: bool = False, login: bool = True
) -> Command:
    """For the first `nodes` nodes, which serve (0: all). A file that they share needs only one."""
    where, asked = place.on(nodes or place.size), packages() if ask_release else []
    if image.squash:
        return Command(place.on(1), Import(image.reference, image.tag, asked))
    if image.registry:
        host = image.registry if login and ECR.match(image.registry) else ""
        return Command(where, Pull(image.tag, host, asked))
    what = str(image.tarball), image.tag, list(image.ids), image.layers, image.codec
    return Command(where, Load(*what, image.packed, image.diff_ids, asked))


def forget_command(image: Image, place: Place, nodes: int = 0) -> Command:
    if image.squash:
        return Command(place.on(1), Discard(image.tag))
    return Command(place.on(nodes or place.size), Forget(image.tag))


def forget(image: Image, place: Place, nodes: int = 0) -> None:
    for told in ask(forget_command(image, place, nodes), "removing the image"):
        if isinstance(told.message, Kept):
            say(f"image: {told.node}: not removed: {told.message.why}")


def password_command(image: Image) -> list[str]:
    """The command that prints the registry's password; [] if none is needed."""
    if not (region := ECR.match(image.registry)):
        return []
    return ["aws", "ecr", "get-login-password", "--region", region[1]]


def sum_command(image: Image) -> list[str]:
    """The command that prints the tarball's sha256.

    One reading, here, is enough: the nodes read the same file, and check what they have loaded by
    its id, which Docker computes from what it took in.
    """
    return ["sha256sum", "--", str(image.tarball)]


def check_verifiable(image: Image) -> None:
    if not re.fullmatch("[0-9a-f]{64}", image.sha256):
        named = "a registry's image is verified by its name: --image name@sha256:..."
        hint = f"the sidecar of a tarball that `make save` made has one; {named}"
        tarball = image.tarball or "a tarball"
        die(f"--verify: there is no sha256 to compare {tarball} with", hint=hint)


def verify(image: Image) -> None:
    """Failure unless the tarball is, byte for byte, the one that its sidecar describes."""
    say(f"image: computing the sha256 of {image.packed / 1e6:.0f} MB")
    # A backslash comes before the sum if the name has a newline or a backslash in it.
    found = run(sum_command(image), timeout=60 + image.packed / SLOWEST).lstrip("\\").split(" ")[0]
    if found != image.sha256:
        hint = "it is damaged or not the one that was saved: copy both again, or `make save`"
        said = f"but its sidecar says {image.sha256}"
        die(f"{image.tarball} has sha256 {found}, {said}", hint=hint)
    say(f"image: sha256 {found[:12]}... matches the sidecar")


def provide(
    image: Image, place: Place, nodes: int = 0, *, ask_release: bool = False
) -> dict[str, str]:
    """Bring the image to all nodes at once; the Failure names those where it did not work.

    With `ask_release` each node says which engine and version it holds.
    """
    nodes = 1 if image.squash else nodes or place.size
    if (login := password_command(image)) and not shutil.which(login[0]):
        say("image: no `aws` here to log in with: the nodes pull with their own Docker's login")
        login = []
    secret = run(login).strip() + "\n" if login else ""
    progress, words = Progress(image.packed), []
    errors: dict[str, str] = {}
    have: dict[str, str] = {}
    releases: dict[str, str] = {}
    order = provide_command(image, place, nodes, ask_release=ask_release, login=bool(login))

    def say_on(seconds: float) -> None:
        """Say how many nodes still fetch: pulls and imports are silent until their end."""
        if not image.tarball and (left := nodes - len({**have, **errors})):
            where = f"{left} of {counted(nodes, 'node')}"
            say(f"image: still being fetched by {where} after {seconds:.0f} s")

    with speaking(say_on), held(order, secret=secret) as step:
        for told in step.told():
            message = told.message
            if isinstance(message, messages.Present):
                have[told.node] = message.id
                progress.done(told.node)
            elif isinstance(message, messages.Holds):
                releases[told.node] = message.release
            elif isinstance(message, messages.Error):
                errors[told.node] = message.why
            elif message:
                progress.show(told.node, message)
            else:
                words.append(told.line)
    talk = "\n".join(words)
    if len(have) < nodes and (word := slurm.slurms_word(talk, LOADING)):
        # It kills the unpacker, too, and that looks like a broken tarball.
        die(word, hint=slurm.SEE_NODES)
    if errors:
        die(slurm.by_node(sorted(errors.items())), hint=advice(image, str(errors).lower()))
    if len(have) < nodes:
        reached = f"the image reached {len(have)} of {nodes} nodes"
        die(f"{reached}: {slurm.last_words(talk, 3)}")
    # The nodes have compared a tarball's ids: an image has two, depending on a node's store.
    if image.registry and len(set(have.values())) > 1:
        die(f"the nodes hold different images under {image.tag}: {have}", hint="use --force")
    return releases


def advice(image: Image, why: str) -> str:
    if "no space left" in why:
        return "make room there (`docker system df` shows what Docker holds), or leave the node out"
    if image.squash:
        login = "a private registry's password goes into ~/.config/enroot/.credentials"
        return f"check the name, and that enroot and squashfs-tools are there; {login}"
    if image.registry:
        return "check the name, and `docker login` for a private registry; or use a tarball"
    again = "copy the tarball again or write it again (`make save`)"
    return f"{again}; see the node's disk and Docker log"


class Progress:
    """How far each node is: bytes, MB/s, seconds; a line for each node every few seconds."""

    EVERY = 5.0

    def __init__(self, total: int) -> None:
        self.total = total
        self.start = time.monotonic()
        self.shown: dict[str, float] = {}

    def show(self, node: str, message: object) -> None:
        now = time.monotonic()
        if isinstance(message, messages.Waiting):
            say(f"image: {node}: waiting, another image is being loaded")
        if not isinstance(message, messages.Progress):
            return
        if now - self.shown.get(node, self.start) >= self.EVERY:
            self.shown[node] = now
            say(f"image: {node}: {rate(message.bytes, self.total, now - self.start)}")

    def done(self, node: str) -> None:
        say(f"image: {node}: there after {time.monotonic() - self.start:.1f} s")


def rate(done: int, total: int, seconds: float) -> str:
    """`120 of 181 MB, 40 MB/s, 3 s`"""
    done_mb, total_mb = done / 1e6, total / 1e6
    return f"{done_mb:.0f} of {total_mb:.0f} MB, {done_mb / seconds:.0f} MB/s, {seconds:.0f} s"
