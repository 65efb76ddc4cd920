"""The server under test: where it is, what it serves, and whether it is still the same one."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from loadgen import Target
from nodes import Failure, die
from settings import setting

if TYPE_CHECKING:
    from requests import Response

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
    url = str(left.get("url") or "").rstrip("/")
    if record and not url and not (host or port):
        die(f"{record} does not name a server", hint="remove it, or name the server with -H and -p")
    if not url or host or port not in (None, port_of(url)):
        asked = base_url(host or "localhost", port, int(setting("PORT", environ)))
        if not (url and same_server(asked, url)):
            record, left = None, {}
        url = asked
    endpoint = Endpoint(url, "", "", environ.get("OPENAI_API_KEY", ""), verify, record)
    name = choose(model, models(endpoint), url)
    given = str(left.get("model_argument") or name)
    return replace(endpoint, model=name, asked=given if model in ("", name) else model)


def find_record(environ: Mapping[str, str]) -> Path | None:
    places = (Path(environ.get("WORKSPACE") or "."), Path())
    return next(
        (p / "logs/endpoint.json" for p in places if (p / "logs/endpoint.json").is_file()), None
    )


def read_record(record: Path | None) -> dict[str, Any]:
    """What the launcher wrote; nothing where it did not, or has removed it."""
    try:
        found = json.loads(record.read_text()) if record else {}
    except (OSError, ValueError):
        found = {}
    return found if isinstance(found, dict) else {}


def base_url(host: str, port: int | None, default: int) -> str:
    """From a name, an address, HOST:PORT or a whole URL, to which no default port is added."""
    bare_ipv6 = host.count(":") > 1 and "[" not in host and "://" not in host
    parts: SplitResult = urlsplit(
        host if "://" in host else f"http://[{host}]" if bare_ipv6 else f"http://{host}"
    )
    try:
        own = parts.port
    except ValueError:
        die(f"{host!r} is neither a host nor a URL")
    if not parts.hostname or parts.scheme not in ("http", "https"):
        die(f"{host!r} is neither a host nor an http(s) URL")
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
    die(f"{url} serves {', '.join(served)}, not {model}", hint="leave -m out to take what is there")


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


def fetch(endpoint: Endpoint, path: str) -> Response:
    """Never through a proxy, which would be measured, too."""
    import requests
    import urllib3

    if not endpoint.verify:
        urllib3.disable_warnings()  # it was asked for
    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    with requests.Session() as session:
        session.trust_env = False
        try:
            answer = session.get(
                endpoint.url + path, headers=headers, timeout=TIMEOUT, verify=endpoint.verify
            )
            answer.raise_for_status()
            return answer
        except requests.exceptions.SSLError as e:
            die(f"{endpoint.url}: TLS failed: {innermost(e)}",
                hint="--insecure takes any certificate")  # fmt: skip
        except requests.ConnectionError:
            die(f"no server answers at {endpoint.url}", hint="name it with -H and -p")
        except requests.HTTPError:
            refused = answer.status_code in (401, 403)
            die(f"{endpoint.url}{path}: {answer.status_code} {answer.reason}",
                hint="set OPENAI_API_KEY" if refused else "")  # fmt: skip
        except requests.RequestException as e:
            die(f"{endpoint.url}{path}: {e}")


def innermost(error: BaseException) -> str:
    """requests and urllib3 wrap an error in two or three of their own."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return str(error)


def version(endpoint: Endpoint) -> str | None:
    """Not every server tells."""
    try:
        return str(get(endpoint, "/version")["version"])
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
    return {"model": [str(card["id"]) for card in cards], "started": launched or started}


def process_start(endpoint: Endpoint) -> str | None:
    """By its Prometheus metrics, which vLLM has. `created` in a list of models is no start."""
    try:
        page = fetch(endpoint, "/metrics").text
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
    return [] if now == before else ["the server was restarted during the run"]


class Witness:
    """A connection on which nothing is said, for as long as a run lasts.

    uvicorn (TensorRT-LLM, vLLM, SGLang) keeps it while it lives; but a proxy may close it, too.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        target, self.sock = endpoint.target, None
        if not target.tls:  # a server waits for a handshake for so long only
            with suppress(OSError):
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
