"""The server under test: where it is, what it serves, and whether it is still the same one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import SplitResult, urlsplit

import requests

from loadgen import Target
from nodes import Failure, die

TIMEOUT = 10.0
DEFAULT_PORT = 8000


@dataclass(frozen=True)
class Endpoint:
    """A server, and the model it serves under the name it gives it."""

    url: str
    model: str  # the id in /v1/models
    asked: str  # what -m said, or the id: benchmark_serving finds the tokenizer by it
    api_key: str = ""
    verify: bool = True
    record: Path | None = None  # the launcher's endpoint.json, when the server was found by it

    @property
    def target(self) -> Target:
        parts = urlsplit(self.url)
        tls = parts.scheme == "https"
        port = parts.port or (443 if tls else 80)
        return Target(parts.hostname or "", port, tls, self.api_key, self.verify)

    @property
    def prefix(self) -> str:
        return urlsplit(self.url).path


def find_endpoint(
    host: str, port: int | None, model: str, environ: Mapping[str, str], *, verify: bool = True
) -> Endpoint:
    """-H and -p, else what the launcher wrote into logs/endpoint.json, else localhost:8000."""
    record = None if host or port else find_record(environ)
    url = str(read_record(record).get("url") or base_url(host or "localhost", port)).rstrip("/")
    key = environ.get("OPENAI_API_KEY", "")
    endpoint = Endpoint(url, "", model, key, verify, record)
    served = models(endpoint)
    return Endpoint(url, choose(model, served, url), model or served[0], key, verify, record)


def find_record(environ: Mapping[str, str]) -> Path | None:
    places = (Path(environ.get("WORKSPACE") or "."), Path())
    return next(
        (p / "logs/endpoint.json" for p in places if (p / "logs/endpoint.json").is_file()), None
    )


def read_record(record: Path | None) -> dict[str, Any]:
    """What the launcher wrote; nothing when it has been removed since."""
    if not record or not record.is_file():
        return {}
    try:
        found = json.loads(record.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        die(f"{record} does not name a server", hint="remove it, or name the server with -H and -p")
    return found


def base_url(host: str, port: int | None) -> str:
    """From a name, an address, HOST:PORT or a whole URL."""
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
    tail = f":{port or DEFAULT_PORT}" if own is None and (port or "://" not in host) else ""
    return f"{parts.scheme}://{parts.netloc}{tail}{parts.path.rstrip('/').removesuffix('/v1')}"


def choose(model: str, served: list[str], url: str) -> str:
    """TensorRT-LLM serves a directory under its last part, and answers to any name at all."""
    is_path = model.startswith(("/", ".", "~")) or Path(model).is_dir()
    names = [model, PurePath(model).name] if is_path else [model]
    for name in names if model else served:
        if name in served:
            return name
    die(f"{url} serves {', '.join(served)}, not {model}", hint="leave -m out to take what is there")


def models(endpoint: Endpoint) -> list[str]:
    answer = get(endpoint, "/v1/models")
    data = answer.get("data") if isinstance(answer, dict) else None
    listed = data if isinstance(data, list) else []
    found = [str(m["id"]) for m in listed if isinstance(m, dict) and m.get("id")]
    return found or die(f"{endpoint.url}/v1/models names no model")


def get(endpoint: Endpoint, path: str) -> Any:  # noqa: ANN401
    """A JSON answer; never through a proxy, which would be measured, too."""
    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    with requests.Session() as session:
        session.trust_env = False
        try:
            answer = session.get(
                endpoint.url + path, headers=headers, timeout=TIMEOUT, verify=endpoint.verify
            )
            answer.raise_for_status()
            return answer.json()
        except requests.ConnectionError:
            die(f"no server answers at {endpoint.url}", hint="name it with -H and -p")
        except requests.HTTPError:
            refused = answer.status_code in (401, 403)
            die(f"{endpoint.url}{path}: {answer.status_code} {answer.reason}",
                hint="set OPENAI_API_KEY" if refused else "")  # fmt: skip
        except (requests.RequestException, ValueError) as e:
            die(f"{endpoint.url}{path}: {e}")


def version(endpoint: Endpoint) -> str | None:
    """Not every server tells."""
    try:
        return str(get(endpoint, "/version")["version"])
    except (Failure, KeyError, TypeError):
        return None


def identity(endpoint: Endpoint) -> dict[str, Any]:
    """What must not change while it is measured."""
    return {"model": models(endpoint), "started": read_record(endpoint.record).get("started")}


def changes(endpoint: Endpoint, before: Mapping[str, Any]) -> list[str]:
    """Why a run that began with this server did not end with it."""
    try:
        now = identity(endpoint)
    except Failure as e:
        return [f"the server is gone: {e.message}"]
    if endpoint.model not in now["model"]:
        return [f"the server now serves {', '.join(now['model'])}, not {endpoint.model}"]
    return [] if now == before else ["the server was restarted during the run"]


def environment() -> dict[str, str]:
    """The environment over .env here over .env beside the scripts.

    Not HOST from the environment: conda's compilers and tcsh set it to other things.
    """
    found: dict[str, str | None] = {}
    try:
        from dotenv import dotenv_values
    except ImportError:
        pass
    else:
        for path in (Path(__file__).resolve().with_name(".env"), Path(".env")):
            found |= dotenv_values(path)
    found |= {name: value for name, value in os.environ.items() if name != "HOST" and value}
    return {name: value for name, value in found.items() if value}
