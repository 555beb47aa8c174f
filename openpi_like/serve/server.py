"""Policies behind websockets: the sockets around `openpi_like.serve.session`.

The event loop moves bytes and nothing else. What clients send is checked and made into rows of batches by a few
threads, one of which at a time has the device (`openpi_like.serve.answering`).
"""

import asyncio
import contextlib
import functools
import http
import logging
import signal
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.protocol import State

from openpi_like.serve.answering import Answered, Answering
from openpi_like.serve.batching import Batcher
from openpi_like.serve.keys import Key, Keys
from openpi_like.serve.listeners import Client, Listener, Listeners
from openpi_like.serve.live import HEADERS, PAGE, Live
from openpi_like.serve.metrics import Metrics
from openpi_like.serve.origins import LOCAL, foreign
from openpi_like.serve.policies import Policies, UnknownPolicyError
from openpi_like.serve.server_limits import RateLimit, ServerLimits
from openpi_like.serve.session import Reset, Session

log = logging.getLogger(__name__)

GOING_AWAY, POLICY_VIOLATION = 1001, 1008
_VIEWERS = 16  # pages that look at once


class PolicyServer:
    """Serves policies to any number of robots; each has one request at work, in a batch with those of others.

    A client connects to the path /NAME of a policy, or / for the first one. A request that cannot be answered is
    answered with a text, a code and a sentence, and the connection stays open. Tracebacks go to the log.
    """

    def __init__(
        self,
        policies: Policies,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        keys: Keys | None = None,
        limits: ServerLimits | None = None,
        tls: ssl.SSLContext | None = None,
        wait_s: float = 0.0,
        threads: int = 3,
        stuck_s: float = 60.0,
        listeners: Iterable[Listener] = (),
    ) -> None:
        """
        Args:
            port: 0 takes a free one, see `port` after `start`.
            keys: clients must send one of them as `Authorization: Api-Key KEY`; none by default.
            wait_s: see `Batcher`.
            threads: see `Answering`.
            stuck_s: a batch that takes longer is given up, and with it the server: /healthz says so from then on.
            listeners: what else learns of the sessions, besides the live page.
        """
        self._policies, self._host, self.port = policies, host, port
        self._keys, self._limits, self._tls = keys or Keys(), limits or ServerLimits(), tls
        self._stuck_s = stuck_s
        self._open: dict[ServerConnection, bool] = {}  # whether a request of it is at work
        self._by_key: Counter[str] = Counter()
        self._rates: dict[str, RateLimit] = {}
        self._batcher = Batcher(
            wait_s=wait_s, max_waiting=self._limits.waiting, watch=lambda batch: self.metrics.batch(len(batch))
        )
        self._answering = Answering(self._batcher, threads)
        self.metrics = Metrics(
            {
                "connections": ("Open connections", lambda: len(self._open)),
                "waiting": ("Requests in the queue", lambda: self._batcher.waiting),
                "ready": ("1 where it takes connections", lambda: float(self.ready)),
            }
        )
        self._began = time.monotonic()
        self._live = Live(self._state)
        self._listeners = Listeners([self._live, *listeners])
        self._server: Server | None = None
        self._draining = self._stuck = False
        self._watcher: asyncio.Task[None] | None = None
        self._sessions = 0

    @property
    def ready(self) -> bool:
        """Whether it takes connections."""
        return self._server is not None and not (self._draining or self._stuck)

    def _state(self) -> dict[str, float | bool]:
        return {
            "ready": self.ready,
            "connections": len(self._open),
            "requests wait": self._batcher.waiting,
            "sessions so far": self._sessions,
            "minutes up": (time.monotonic() - self._began) / 60,
        }

    async def start(self) -> None:
        """Listens."""
        self._server = await serve(
            self._handle,
            self._host,
            self.port,
            process_request=self._process_request,
            compression=None,
            max_size=self._limits.message_bytes,
            max_queue=2,
            ssl=self._tls,
        )
        self.port = next(iter(self._server.sockets)).getsockname()[1]
        self._watcher = asyncio.create_task(self._watch())

    async def close(self, grace_s: float = 30.0) -> None:
        """Takes no more connections, answers what was asked, closes all connections, and stops.

        grace_s: how long what was asked may take.
        """
        self._draining, hangs = True, self._stuck
        if self._server is not None:
            self._server.close(close_connections=False)
            idle = [connection for connection, at_work in self._open.items() if not at_work]
            await asyncio.gather(*(c.close(GOING_AWAY, "the server is closing") for c in idle))
            await self._until_all_left(grace_s)
            if self._open:
                hangs = True  # or is very slow: its thread is not waited for
                self._batcher.give_up("the server is closing; connect again later")
                await self._until_all_left(1.0)  # they are told
            await asyncio.gather(*(c.close(GOING_AWAY, "the server is closing") for c in list(self._open)))
            await asyncio.gather(*(c.close(GOING_AWAY, "the server is closing") for c in self._server.connections))
            await self._server.wait_closed()
        if self._watcher is not None:
            self._watcher.cancel()
        await asyncio.to_thread(self._answering.close, wait=not hangs)
        await asyncio.to_thread(self._listeners.close)
        await asyncio.to_thread(self.metrics.close)

    async def _until_all_left(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._open:
                    await asyncio.sleep(0.01)

    async def _watch(self) -> None:
        while not self._stuck:
            await asyncio.sleep(min(0.5, self._stuck_s / 4))
            since = self._batcher.busy_since
            if since is not None and time.monotonic() - since > self._stuck_s:
                self._stuck = True
                log.critical("a batch takes longer than %g s; nothing is answered any more, restart", self._stuck_s)
                self._batcher.give_up("the device does not answer; the server has to be restarted")

    # ---- HTTP --------------------------------------------------------------------------------------------------------

    def _process_request(self, connection: ServerConnection, request: Request) -> Response | None:
        path = unquote(request.path.partition("?")[0])
        if path == "/healthz":
            status = http.HTTPStatus.SERVICE_UNAVAILABLE if self._stuck else http.HTTPStatus.OK
            return connection.respond(status, "stuck\n" if self._stuck else "ok\n")
        if path == "/readyz":
            status = http.HTTPStatus.OK if self.ready else http.HTTPStatus.SERVICE_UNAVAILABLE
            said = "ready" if self.ready else "not ready"
            return connection.respond(status, f"{said}, {self._batcher.waiting} requests wait\n")
        key = None
        if self._keys:
            key = self._keys.find(request.headers.get("Authorization", ""))
            if key is None:
                self.metrics.refused("key")
                text = "wrong or missing header Authorization: Api-Key\n"
                response = connection.respond(http.HTTPStatus.UNAUTHORIZED, text)
                response.headers["WWW-Authenticate"] = 'Basic realm="policy server: any name, and a key as password"'
                return response
        origin, host = request.headers.get("Origin"), request.headers.get("Host", "")
        if why := foreign(origin, host, listens=self._host, keys=bool(self._keys)):
            self.metrics.refused(why[0])
            return connection.respond(http.HTTPStatus.FORBIDDEN, f"{why[1]}\n")
        page = path == "/" and "Upgrade" not in request.headers
        if page or path == "/live":
            return self._looking(connection, key, page)
        if path == "/metrics":
            response = connection.respond(http.HTTPStatus.OK, self.metrics.text().decode())
            return _with_headers(response, {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
        return self._refusal(connection, path, key)

    def _looking(self, connection: ServerConnection, key: Key | None, page: bool) -> Response | None:
        """Returns the live page, or why it is not shown; None where what it is told may begin.

        It shows what robots see: to keys that may look, or where there are none, to this machine alone.
        """
        if key is not None and not key.looks:
            return connection.respond(http.HTTPStatus.FORBIDDEN, "this key may not look; add one with --looks\n")
        if key is None and self._host not in LOCAL:
            text = "the live page is for this machine alone, unless the server has keys\n"
            return connection.respond(http.HTTPStatus.FORBIDDEN, text)
        if page:
            return _with_headers(connection.respond(http.HTTPStatus.OK, PAGE.decode()), HEADERS)
        if self._live.viewers >= _VIEWERS:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"{_VIEWERS} pages look already\n")
        connection.looks = True  # type: ignore[attr-defined]
        return None

    def _refusal(self, connection: ServerConnection, path: str, key: Key | None) -> Response | None:
        """Returns why a connection is not taken, or None."""
        if not self.ready or len(self._open) >= self._limits.connections:
            self.metrics.refused("full" if self.ready else "closing")
            text = f"{len(self._open)} clients are connected, as many as may; try again later\n"
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, text if self.ready else "closing\n")
        if key is not None and key.connections is not None and self._by_key[key.name] >= key.connections:
            self.metrics.refused("key_full")
            text = f"this key has {key.connections} connections already, as many as it may\n"
            return connection.respond(http.HTTPStatus.TOO_MANY_REQUESTS, text)
        try:
            served = self._policies[path.strip("/")]
        except UnknownPolicyError as e:
            self.metrics.refused("policy")
            return connection.respond(http.HTTPStatus.NOT_FOUND, f"{e}\n")
        connection.looks = False  # type: ignore[attr-defined]
        connection.served, connection.key = served, key  # type: ignore[attr-defined]
        return None

    # ---- Conversations -----------------------------------------------------------------------------------------------

    async def _handle(self, connection: ServerConnection) -> None:
        if connection.looks:  # type: ignore[attr-defined]
            await self._live.show(connection)
        else:
            await self._converse(connection)

    async def _converse(self, connection: ServerConnection) -> None:
        served, key = connection.served, connection.key  # type: ignore[attr-defined]
        self._open[connection] = False
        self._by_key[key.name if key else ""] += 1
        self._sessions += 1
        address = connection.remote_address
        peer = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else str(address)
        client = Client(self._sessions, peer, key.name if key else None, served.name)
        about = {"policy": served.name, "policies": [s.name for s in self._policies], "server": self._said_limits(key)}
        session = Session(served.begin(), about=about)
        rate = self._rate(connection, key)
        log.info("connected: %s", client)
        self._listeners.connected(client, session.metadata())
        try:
            await self._send(connection, session.hello())
            while not self._draining:
                async with asyncio.timeout(self._limits.idle_s):
                    message = await connection.recv()
                arrived = time.monotonic()
                self._open[connection] = True
                if limited := self._too_fast(rate):
                    answered = Answered(limited, limited, None, {"total": 0.0})
                else:
                    alive = functools.partial(_alive, connection)
                    answered = await self._answering.answer(
                        session, message, owner=connection, arrived=arrived, alive=alive
                    )
                sending = time.monotonic()
                try:
                    await self._send(connection, answered.reply)
                    self.metrics.sent(time.monotonic() - sending)
                finally:
                    self._tell(client, answered)
                self._open[connection] = False
                del message, answered  # and with them the policy, which may be replaced while this client is idle
            await connection.close(GOING_AWAY, "the server is closing")
        except ConnectionClosed as e:
            log.info("disconnected: %s: %s", client, e)
        except TimeoutError:
            log.info("too slow, closed: %s", client)
            await connection.close(POLICY_VIOLATION, "nothing was sent, or taken, for too long")
        finally:
            self._listeners.disconnected(client)
            del self._open[connection]
            self._by_key[key.name if key else ""] -= 1

    def _per_s(self, key: Key | None) -> float | None:
        return self._limits.requests_per_s if key is None or key.requests_per_s is None else key.requests_per_s

    def _said_limits(self, key: Key | None) -> dict[str, Any]:
        """Returns what a client is told of the limits that it may meet."""
        limits = {name: getattr(self._limits, name) for name in ("message_bytes", "idle_s")}
        return {**limits, "requests_per_s": self._per_s(key)}

    def _rate(self, connection: ServerConnection, key: Key | None) -> RateLimit | None:
        """Returns the limit of a client: of its key, which all of its connections share, or of this connection."""
        per_s = self._per_s(key)
        if per_s is None:
            return None
        return RateLimit(per_s) if key is None else self._rates.setdefault(key.name, RateLimit(per_s))

    def _too_fast(self, rate: RateLimit | None) -> str | None:
        wait = rate.take() if rate is not None else 0.0
        return f"limit: more requests than this client may send; wait {1e3 * wait:.0f} ms" if wait else None

    def _tell(self, client: Client, answered: Answered) -> None:
        begun, answer = answered.begun, answered.answer
        if isinstance(begun, Reset):
            self._listeners.began_anew(client, begun.success)
            return
        if isinstance(begun, str):
            self._listeners.refused(client, begun)
        elif answer is not None:
            self._listeners.answered(client, begun, answer, answered.seconds)
        self.metrics.replied(client.policy, answered.code, answered.seconds)

    async def _send(self, connection: ServerConnection, message: str | bytes) -> None:
        async with asyncio.timeout(self._limits.send_s):
            await connection.send(message)


def _with_headers(response: Response, headers: Mapping[str, str]) -> Response:
    for name, value in headers.items():
        if name in response.headers:  # or there would be two of them
            del response.headers[name]
        response.headers[name] = value
    return response


def _alive(connection: ServerConnection) -> bool:
    return connection.state is State.OPEN


def run(server: PolicyServer, *, port_file: Path | None = None, on_hangup: Callable[[], None] = lambda: None) -> None:
    """Serves until SIGTERM or SIGINT. port_file: written with the port once it listens.

    on_hangup: is called at SIGHUP, in a thread, one call after the other.
    """

    async def main() -> None:
        stop = asyncio.Event()
        for signum in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(signum, stop.set)
        hangup = ThreadPoolExecutor(1, thread_name_prefix="hangup")
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hangup.submit, on_hangup)
        await server.start()
        log.info("listening on port %d", server.port)
        if port_file is not None:
            temporary = port_file.with_suffix(".tmp")
            temporary.write_text(str(server.port))
            temporary.replace(port_file)
        await stop.wait()
        log.info("closing")
        hangup.shutdown(wait=False, cancel_futures=True)
        await server.close()

    asyncio.run(main())
