"""What a node tells its launcher: JSON, each message the fields of a dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Facts:
    """What a node has. Sizes in bytes; `taken`: who listens on which of our ports."""

    rank: int = 0
    addresses: list[str] = field(default_factory=list)  # first the one on the way to the launcher
    network: str = ""  # our loopback is reached only from within it
    gpus: int = 0
    visible: list[str] = field(default_factory=list)  # for runtime bare: CUDA_VISIBLE_DEVICES
    efa: int = 0
    gdrdrv: bool = False
    taken: dict[str, str] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)
    unmade: list[str] = field(default_factory=list)  # directories that cannot be made
    engine: str = ""  # where the program is, for runtime bare
    docker: str = ""  # its version
    no_docker: str = ""  # why it does not answer
    rootless: bool = False
    podman: str = ""  # what `docker` says it is, if it is podman
    toolkit: bool = True  # NVIDIA's container toolkit; True if nobody can say
    enroot: str = ""  # its version; '' if it is not in PATH
    no_image: str = ""  # why the squashfs file cannot be used
    data: str = ""  # where enroot unpacks; '' if it does not say
    data_shared: bool = False  # other nodes have that, too
    memlock: int = -1  # bytes that a process may lock; -1: any number
    store: str = ""  # how Docker stores images, which decides what an image's id is
    image: str = ""  # the id of what our tag names; for runtime pyxis the path of the file
    layers: str = ""  # its diff ids, as Docker prints them
    release: str = ""  # engine and version that it holds; for runtime bare the program's
    free: int = 0


@dataclass
class Piece:
    """A piece of a message whose line is too long for srun to keep together."""

    text: str
    last: bool


@dataclass
class Container:
    """A container with our label, whoever started it."""

    id: str
    name: str
    job: str
    launcher: str
    user: str


@dataclass
class Waiting:
    """Another image is being loaded; ours is next."""


@dataclass
class Progress:
    """So many bytes of the tarball have been read."""

    bytes: int


@dataclass
class Present:
    """The image is there, by this id."""

    id: str


@dataclass
class Holds:
    """Engine and version that the image holds, `package 1.2.1`; '' if it does not say."""

    release: str


@dataclass
class Error:
    """What was asked for could not be done."""

    why: str


class Kept(Error):
    """The image could not be removed."""


@dataclass
class Up:
    """The container in which ranks will run is up."""


@dataclass
class Beat:
    """A sign of life; `slurmd`: the node's slurmd listens."""

    slurmd: bool


@dataclass
class Ended:
    """The node's container has ended by itself."""

    code: int


class Left(Error):
    """The farewell: why the node's container may still be there; '': it is gone."""


@dataclass
class Owner:
    """Whether our own engine listens on the port; `why` says why that is not known.

    `answer`: what its /health says on the node itself, `200` if all is well.
    """

    own: bool
    why: str = ""
    answer: str = ""


@dataclass
class Clients:
    """The other ends of the open connections to a port."""

    connections: list[str]


@dataclass
class Lingers:
    """Connections of a server that has ended still hold our port."""


@dataclass
class Listens:
    """The front of a fleet listens, and can hold so many streams at once."""

    streams: int
