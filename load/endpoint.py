"""The server under test: where it is, what it serves, and whether it is still the same one."""

from __future__ import annotations

import json
import re
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import SplitResult, urlsplit

from common.ask import Answer, ask
from common.response import ERROR_LENGTH, Malformed
from common.settings import setting, trust
from common.talk import Failure, die
from load.target import Target

TIMEOUT = 10.0


@dataclass(frozen=True)
class Endpoint:
    """A server, and the model it serves under the name it gives it."""

    url: str
    model: str  # the id in /v1/models
    asked: str  # what names its tokenizer: -m, the launcher's MODEL, or the id
    api_key: str = ""
    verify: bool = True
    record: Path | None = None  # the launcher's endpoint.json, when it is about this server

    @property
    def target(self) -> Target:
        parts = urlsplit(self.url)
        return Target(
            parts.hostname or "", port_of(self.url), parts.scheme == "https",
            self.api_key, self.verify,
        )  # fmt: skip

    @property
    def prefix(self) -> str:
        return urlsplit(self.url).path


# --- which server ---------------------------------------------------------------------------------


def find_endpoint(
    host: str, port: int | None, model: str, environ: Mapping[str, str], *, verify: bool = True
) -> Endpoint:
    """-H and -p, else what the launcher wrote into logs/endpoint.json, else localhost and PORT."""
    record = find_record(environ)
    left = read_record(record)
    url = left_url(left)
    if record and not url and not (host or port):
        die(f"{record} does not name a server", hint="remove it, or name the server with -H and -p")
    if not url or host or port not in (None, port_of(url)):
        asked = base_url(host or "localhost", port, int(setting("PORT", environ)))
        if not (url and same_server(asked, url)):
            record, left = None, {}
        url = asked
    endpoint = Endpoint(url, "", "", api_key(environ, record), verify, record)
    # MODEL is what the launcher is to serve: the record of what it does serve is better.
    model = model or ("" if left else environ.get("MODEL", ""))
    name = choose(model, models(endpoint), url)
    given = str(left.get("model_argument") or name)
    asked = str(Path(model).absolute()) if model and Path(model).is_dir() else model
    return replace(endpoint, model=name, asked=given if asked in ("", name) else asked)


def left_url(record: Mapping[str, Any]) -> str:
    """The launcher's own URL, or none that can be used."""
    try:
        return base_url(str(record.get("url") or ""), None, 80)
    except Failure:
        return ""


def api_key(environ: Mapping[str, str], record: Path | None) -> str:
    """OPENAI_API_KEY, but not for a server that somebody else's record names."""
    key = environ.get("OPENAI_API_KEY", "")
    if not re.fullmatch("[!-~]*", key):
        die("OPENAI_API_KEY has characters that no HTTP header can carry")
    if key and record and record.is_file():
        why = "OPENAI_API_KEY is not sent where it says; name the server with -H and -p"
        trust(record, record.stat(), why)
    return key


def find_record(environ: Mapping[str, str]) -> Path | None:
    places = (Path(environ.get("WORKSPACE") or "."), Path())
    return next(
        (p / "logs/endpoint.json" for p in places if (p / "logs/endpoint.json").is_file()), None
    )


def read_record(record: Path | None) -> dict[str, Any]:
    """What the launcher wrote; nothing where it did not, or has removed it."""
    try:
        found = json.loads(record.read_text()) if record else {}
    except (OSError, ValueError, RecursionError):
        found = {}
    return found if isinstance(found, dict) else {}


def base_url(host: str, port: int | None, default: int) -> str:
    """From a name, an address, HOST:PORT or a whole URL, to which no default port is added."""
    bare_ipv6 = host.count(":") > 1 and "[" not in host and "://" not in host
    try:
        parts: SplitResult = urlsplit(
            host if "://" in host else f"http://[{host}]" if bare_ipv6 else f"http://{host}"
        )
        own = parts.port
        (parts.hostname or "").encode("idna")
    except ValueError:
        die(f"{host[:99]!r} is neither a host nor a URL")
    odd = own == 0 or not re.fullmatch(r"[^\s@?#\\]+", host) or not host.isprintable()
    if odd or not parts.hostname or parts.scheme not in ("http", "https"):
        # With a login in it, it would be in every result.
        die(f"{host[:99]!r} is neither a host nor an http(s) URL (without login or query)")
    if own and port not in (None, own):
        die(f"{host!r} and -p {port} name two ports: which one?")
    tail = f":{port or default}" if own is None and (port or "://" not in host) else ""
    return f"{parts.scheme}://{parts.netloc}{tail}{parts.path.rstrip('/').removesuffix('/v1')}"


def port_of(url: str) -> int:
    parts = urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)


def same_server(one: str, other: str) -> bool:
    """Do two URLs, by whatever names, lead to one port of one machine?"""
    hosts = [addresses(urlsplit(url).hostname or "") for url in (one, other)]
    return port_of(one) == port_of(other) and bool(hosts[0] & hosts[1])


def is_this_machine(host: str) -> bool:
    return "here" in addresses(host)


def addresses(host: str) -> set[str]:
    """A host's addresses; all that are this machine's count as one."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return {host}
    return {"here" if can_bind(family, at) else str(at[0]) for family, *_, at in found}


def can_bind(family: int, address: Any) -> bool:  # noqa: ANN401
    with socket.socket(family) as sock, suppress(OSError):
        sock.bind(address)
        return True
    return False


def choose(model: str, served: list[str], url: str) -> str:
    """TensorRT-LLM serves a directory under its last part, and answers to any name at all."""
    is_path = model.startswith(("/", ".", "~")) or Path(model).is_dir()
    names = [model, PurePath(model).name] if is_path else [model]
    for name in names if model else served:
        if name in served:
            return name
    there = ", ".join(served)[:ERROR_LENGTH]
    die(f"{url} serves {there}, not {model}", hint="leave -m out to take what is there")


# --- what it says ---------------------------------------------------------------------------------


def models(endpoint: Endpoint) -> list[str]:
    return [str(card["id"]) for card in model_cards(endpoint)]


def model_cards(endpoint: Endpoint) -> list[dict[str, Any]]:
    answer = get(endpoint, "/v1/models")
    data = answer.get("data") if isinstance(answer, dict) else None
    listed = data if isinstance(data, list) else []
    found = [card for card in listed if isinstance(card, dict) and card.get("id")]
    return found or die(f"{endpoint.url}/v1/models names no model")


def get(endpoint: Endpoint, path: str) -> Any:  # noqa: ANN401
    try:
        return fetch(endpoint, path).json()
    except ValueError as e:
        die(f"{endpoint.url}{path}: {e}")


def fetch(endpoint: Endpoint, path: str) -> Answer:
    """A whole answer of status 200."""
    url = endpoint.url + path
    try:
        answer = ask(url, TIMEOUT, key=endpoint.api_key, verify=endpoint.verify)
    except TimeoutError:
        die(f"{url}: no whole answer within {TIMEOUT:g} s")
    except ssl.SSLError as e:
        die(f"{endpoint.url}: TLS failed: {e}", hint="--insecure takes any certificate")
    except OSError as e:
        why = "" if isinstance(e, ConnectionRefusedError) else f" ({e.strerror or e})"
        die(f"no server answers at {endpoint.url}{why}", hint="name it with -H and -p")
    except Malformed as e:
        die(f"{url}: {e}")
    if answer.status != 200:
        moved = f": {endpoint.target.without_key(answer.moved)}" if answer.moved else ""
        hint = "set OPENAI_API_KEY" if answer.status in (401, 403) else ""
        die(f"{url}: {answer.status}{moved}", hint=hint)
    return answer


def version(endpoint: Endpoint) -> str | None:
    """Not every server tells."""
    try:
        return str(get(endpoint, "/version")["version"])[:ERROR_LENGTH]
    except (Failure, KeyError, TypeError):
        return None


# --- is it still the same one? --------------------------------------------------------------------


def identity(endpoint: Endpoint) -> dict[str, Any]:
    """What must not change while it is measured."""
    cards = model_cards(endpoint)
    ours = any("tensorrt_llm" in str(card.get("owned_by")) for card in cards)
    launched = read_record(endpoint.record).get("started")
    # TensorRT-LLM's /metrics is no Prometheus page, and to read it empties it.
    started = None if ours or launched else process_start(endpoint)
    return {
        "model": [str(card["id"]) for card in cards],
        "launched": launched,
        "started": started,
    }


def process_start(endpoint: Endpoint) -> str | None:
    """By its Prometheus metrics, which vLLM has. `created` in a list of models is no start."""
    try:
        page = fetch(endpoint, "/metrics").body.decode(errors="replace")
    except Failure:
        return None
    found = re.search(r"^process_start_time_seconds (\S+)$", page, re.M)
    return found[1] if found else None


def changes(endpoint: Endpoint, before: Mapping[str, Any]) -> list[str]:
    """Why a run that began with this server did not end with it."""
    try:
        now = identity(endpoint)
    except Failure as e:
        return [f"the server is gone: {e.message}"]
    if endpoint.model not in now["model"]:
        return [f"the server now serves {', '.join(now['model'])}, not {endpoint.model}"]
    # A page that could not be read once is no restart.
    read = None not in (before.get("started"), now["started"])
    keys = ("model", "launched", "started") if read else ("model", "launched")
    same = all(now[key] == before.get(key) for key in keys)
    return [] if same else ["the server was restarted during the run"]


class Witness:
    """A connection on which nothing is said, for as long as a run lasts.

    Only at uvicorn (TensorRT-LLM, vLLM, SGLang), which keeps it while it lives, and which it costs
    nothing: a server with a worker for each connection would have one less for the load.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        target, self.sock = endpoint.target, None
        if not target.tls:  # a server waits for a handshake for so long only
            with suppress(OSError, Failure):
                if fetch(endpoint, "/v1/models").server == "uvicorn":
                    self.sock = socket.create_connection((target.host, target.port), TIMEOUT)

    def notes(self) -> list[str]:
        """To be asked once, at the end."""
        if self.sock is None:
            return []
        with self.sock:
            self.sock.setblocking(False)
            try:
                self.sock.recv(1)
            except BlockingIOError:
                return []
            except OSError:
                pass
        return ["an idle connection was closed during the run: by a proxy, or because the server "
                "was restarted"]  # fmt: skip
