"""What is common to engines that take flags and check them themselves."""

from collections.abc import Mapping, Sequence

from common.talk import die
from launch.arguments import given
from launch.config_file import merged


def binds_first(version: str) -> bool:
    """False: these engines ask to reuse the port, so that one still in use does not end them."""
    return False


def names_of(model: str, args: Sequence[str]) -> tuple[str, ...]:
    return tuple(filter(None, (given(args, "--served-model-name"), model)))


def config_of(args: Sequence[str]) -> str | None:
    return given(args, "--config")


def key_of(args: Sequence[str], environ: Mapping[str, str]) -> str:
    return given(merged(args), "--api-key") or ""


def words_of(args: Sequence[str]) -> list[str]:
    """All arguments, also those of the config file. Failure for TLS: we ask over plain HTTP."""
    words = merged(args)
    for flag in ("--ssl-certfile", "--ssl-keyfile"):
        if given(words, flag):
            hint = "leave it out, and put a proxy that speaks TLS before the server"
            die(f"{flag}: the launcher asks its server over plain HTTP", hint=hint)
    return words


def effective(args: Sequence[str]) -> object:
    return merged(args)


def settle(args: Sequence[str], version: str) -> list[str]:
    """The arguments as they are: the engine itself checks what it is given."""
    return list(args)
