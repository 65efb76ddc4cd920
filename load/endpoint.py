"""The server under test: where it is and what it serves."""

from __future__ import annotations

import json
import re
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import SplitResult, urlsplit

from common.ask import BUNDLE, Answer, ask
from common.response import ERROR_LENGTH, Malformed, error_message
from common.settings import setting, trust
from common.talk import Failure, die, say
from load.target import Target

TIMEOUT = 10.0
OWN_END = re.compile("(/(?:chat/)?completions|/models)?/*$")  # URL endings that we add ourselves
OTHER_VERSION = re.compile(r"/v\d\w*$")  # Google's v1beta, Zhipu's v4
NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST")  # by version of OpenSSL


class Unanswered(Failure):
    """The server is there, but does not answer this request as it should."""


@dataclass(frozen=True)
class Endpoint:
    """A server and its model, under the name that the server uses."""

    url: str
    model: str  # the id in /v1/models
    asked: str  # names its tokenizer: -m, the launcher's MODEL, or the id
    api_key: str = ""
    verify: bool = True
    record: Path | None = None  # the launcher's endpoint.json, when it is about this server
    trtllm: bool = False  # as its list of models says
    unlisted: str = ""  # why -m is taken at its word: the server lists no such model
    name: str = ""  # of one replica of a fleet
    replicas: tuple[tuple[str, str], ...] = ()  # of a fleet, behind this address: name and URL

    @property
    def target(self) -> Target:
        parts = urlsplit(self.url)
        return Target(
            parts.hostname or "", port_of(self.url), parts.scheme == "https",
            self.api_key, self.verify,
        )  # fmt: skip

    @property
    def key_hint(self) -> str:
        return "set another OPENAI_API_KEY" if self.api_key else "set OPENAI_API_KEY"

    @property
    def prefix(self) -> str:
        return urlsplit(self.url).path

    @property
    def each(self) -> tuple[Endpoint, ...]:
        """Each replica by itself: behind one address we could not tell whose counters we read."""
        return tuple(
            replace(self, url=url, name=name, replicas=()) for name, url in self.replicas
        ) or (self,)


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
    key, replicas = api_key(environ, record), replicas_of(left) if record else ()
    endpoint = Endpoint(url, "", "", key, verify, record, replicas=replicas)
    # MODEL is what the launcher should serve; its record says what it does serve.
    model = model or ("" if left else environ.get("MODEL", ""))
    endpoint = with_model(endpoint, model)
    given = str(left.get("model_argument") or endpoint.model)
    asked = str(Path(model).absolute()) if model and Path(model).is_dir() else model
    return replace(endpoint, asked=given if asked in ("", endpoint.model) else asked)


def with_model(endpoint: Endpoint, model: str) -> Endpoint:
    """The endpoint with the server's name for the model, or -m's if it lists no models."""
    try:
        cards = model_cards(endpoint)
    except Unanswered as e:
        if not model:
            raise Failure(e.message, e.hint or "-m NAME works without the list of models") from None
        say(f"{e.message}: -m {model} is used without a check")
        return replace(endpoint, model=model, unlisted=f"no list of models ({e.message})")
    served = [card_id(card) for card in cards]
    name = choose(model, served, endpoint.url)
    unlisted = "" if name in served else f"{endpoint.url} lists no {name}, only what it is one of"
    trtllm = any("tensorrt_llm" in str(card.get("owned_by")) for card in cards)
    return replace(endpoint, model=name, trtllm=trtllm, unlisted=unlisted)


def left_url(record: Mapping[str, Any]) -> str:
    """The launcher's URL; '' if it is unusable."""
    try:
        return base_url(str(record.get("url") or ""), None, 80)
    except Failure:
        return ""


def api_key(environ: Mapping[str, str], record: Path | None) -> str:
    """OPENAI_API_KEY; Failure if it would go where somebody else's record says."""
    key = environ.get("OPENAI_API_KEY", "")
    if not re.fullmatch("[!-~]*", key):
        die("OPENAI_API_KEY has characters that no HTTP header can carry")
    if key and record and record.is_file():
        why = "OPENAI_API_KEY is not sent to the server in it; name the server with -H and -p"
        trust(record, record.stat(), why)
    return key


def find_record(environ: Mapping[str, str]) -> Path | None:
    places = (Path(environ.get("WORKSPACE") or "."), Path())
    return next(
        (p / "logs/endpoint.json" for p in places if (p / "logs/endpoint.json").is_file()), None
    )


def read_record(record: Path | None) -> dict[str, Any]:
    """What the launcher wrote; {} if the record is missing or unreadable."""
    try:
        found = json.loads(record.read_text()) if record else {}
    except (OSError, ValueError, RecursionError):
        found = {}
    return found if isinstance(found, dict) else {}


def fleet(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The launcher's record of each replica; [] for a single server."""
    found = record.get("replicas")
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def up(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The replicas of a fleet that answer."""
    return [each for each in fleet(record) if each.get("state", "ready") == "ready"]


def not_up(endpoint: Endpoint) -> list[str]:
    """A note if some replicas of a fleet do not answer."""
    record = read_record(endpoint.record)
    every, ready = fleet(record), up(record)
    rest = [f"{each.get('name')} ({each.get('state')})" for each in every if each not in ready]
    verb = "is" if len(rest) == 1 else "are"
    words = f"{len(rest)} of {len(every)} replicas {verb} not up: {', '.join(rest)}"
    return [words] if rest else []


def replicas_of(record: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((str(each.get("name")), url) for each in up(record) if (url := left_url(each)))


def base_url(host: str, port: int | None, default: int) -> str:
    """The base URL for a name, an address, HOST:PORT or a whole URL (which gets no default port).

    It ends with a slash if the API has another path in place of /v1: a version of its own, or what
    precedes a known ending, as in https://host/api/chat/completions.
    """
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
        # A login in the URL would be in every result.
        die(f"{host[:99]!r} is neither a host nor an http(s) URL (without login or query)")
    if own and port not in (None, own):
        die(f"{host!r} and -p {port} name two ports: which one?")
    tail = f":{port or default}" if own is None and (port or "://" not in host) else ""
    path, end, *_ = OWN_END.split(parts.path)
    if not path.endswith("/v1") and (end or OTHER_VERSION.search(path)):
        path += "/"
    return f"{parts.scheme}://{parts.netloc.rstrip(':')}{tail}{path.removesuffix('/v1')}"


def at(root: str, path: str) -> str:
    """The URL (or path) of an API route, below a URL (or path) made by `base_url`."""
    return root + path.removeprefix("/v1").lstrip("/") if root.endswith("/") else root + path


def port_of(url: str) -> int:
    parts = urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)


def same_server(one: str, other: str) -> bool:
    """Do two URLs lead to the same port of the same machine, by whatever names?"""
    hosts = [addresses(urlsplit(url).hostname or "") for url in (one, other)]
    return port_of(one) == port_of(other) and bool(hosts[0] & hosts[1])


def is_this_machine(host: str) -> bool:
    return "here" in addresses(host)


def addresses(host: str) -> set[str]:
    """A host's addresses; this machine's all become 'here'."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return {host}
    return {"here" if can_bind(family, at) else str(at[0]) for family, *_, at in found}


def can_bind(family: int, address: Any) -> bool:  # noqa: ANN401
    with suppress(OSError), socket.socket(family) as sock:  # a kernel may have no IPv6
        sock.bind(address)
        return True
    return False


def choose(model: str, served: list[str], url: str) -> str:
    """The server's name for the model. We check, as TensorRT-LLM answers to any name at all."""
    is_path = model.startswith(("/", ".", "~")) or Path(model).is_dir()
    # A directory is served under its last part; Ollama adds a tag, Google a folder.
    names = [model, PurePath(model).name] if is_path else [model, f"{model}:latest",
                                                           f"models/{model}"]  # fmt: skip
    patterns = [name for name in served if "*" in name]  # LiteLLM's openai/*
    for name in names if model else served:
        if name in served and (model or name not in patterns):
            return name
    there = ", ".join(served)[:ERROR_LENGTH]
    if not model:
        die(f"{url} lists only patterns of names: {there}", hint="-m names the model")
    listed = any(fnmatchcase(model, pattern) for pattern in patterns)
    if listed or model.rpartition(":")[0] in served:  # OpenRouter's MODEL:nitro
        return model
    die(f"{url} serves {there}, not {model}", hint="leave -m out to take what is there")


# --- what it says ---------------------------------------------------------------------------------


def models(endpoint: Endpoint) -> list[str]:
    return [card_id(card) for card in model_cards(endpoint)]


def model_cards(endpoint: Endpoint) -> list[dict[str, Any]]:
    """The list of models: under `data` (OpenAI), under `models`, as a bare array, or only names."""
    answer = get(endpoint, "/v1/models")
    if isinstance(answer, dict):
        answer = answer.get("data") or answer.get("models")
    listed = answer if isinstance(answer, list) else []
    cards = [{"id": card} if isinstance(card, str) else card for card in listed]
    found = [card for card in cards if isinstance(card, dict) and card_id(card)]
    if not found:
        raise Unanswered(f"{at(endpoint.url, '/v1/models')} names no model")
    return found


def card_id(card: Mapping[str, Any]) -> str:
    return str(card.get("id") or card.get("name") or card.get("model") or "")


def get(endpoint: Endpoint, path: str) -> Any:  # noqa: ANN401
    answer = fetch(endpoint, path)
    try:
        return answer.json()
    except ValueError as e:
        if answer.body.lstrip()[:1] == b"<":
            raise Unanswered(
                f"{at(endpoint.url, path)} is HTML, not JSON: a login page, or another service",
                "name the API itself with -H and -p",
            ) from None
        raise Unanswered(f"{at(endpoint.url, path)} is not JSON: {e}") from None


def fetch(endpoint: Endpoint, path: str) -> Answer:
    """A complete answer with status 200; Unanswered or Failure otherwise."""
    url = at(endpoint.url, path)
    try:
        answer = ask(url, TIMEOUT, key=endpoint.api_key, verify=endpoint.verify)
    except TimeoutError:
        raise Unanswered(f"{url}: no whole answer within {TIMEOUT:g} s", unused(url)) from None
    except ssl.SSLError as e:
        die(f"{endpoint.url}: TLS failed: {e}", hint=tls_hint(e))
    except OSError as e:
        why = "" if isinstance(e, ConnectionRefusedError) else f" ({e.strerror or e})"
        hint = "; ".join(filter(None, ("name it with -H and -p", unused(url))))
        die(f"no server answers at {endpoint.url}{why}", hint=hint)
    except Malformed as e:
        raise Unanswered(f"{url}: {e}") from None
    if answer.status != 200:
        words = endpoint.target.without_key(answer.moved or error_message(answer.body))
        hint = endpoint.key_hint if answer.status in (401, 403) else ""
        raise Unanswered(f"{url}: {answer.status}: {words}", hint)
    return answer


def unused(url: str) -> str:
    """A hint if the environment names a proxy, which measurements never go through."""
    from urllib.request import getproxies, proxy_bypass

    parts, known = urlsplit(url), getproxies()
    if not {parts.scheme, "all"} & set(known) or proxy_bypass(parts.hostname or ""):
        return ""
    return f"{parts.scheme.upper()}_PROXY is not used: measure from a machine that needs no proxy"


def tls_hint(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{BUNDLE} (or SSL_CERT_FILE) says whom to trust; --insecure takes any certificate"
    return "did you mean http://?" if error.reason in NO_TLS else ""


def version(endpoint: Endpoint) -> str | None:
    """The server's version; None if it does not tell."""
    try:
        return str(get(endpoint, "/version")["version"])[:ERROR_LENGTH]
    except (Failure, KeyError, TypeError):
        return None
