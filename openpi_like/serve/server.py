"""A websocket server around a policy. Inference runs in one worker thread, never in the event loop."""

import asyncio
import hmac
import http
import logging
import signal
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from openpi_like.serve.protocol import MAX_MESSAGE_BYTES, ProtocolError, pack, unpack

log = logging.getLogger(__name__)


class PolicyServer:
    """Serves `infer` to any number of robots, one request at a time, in order of arrival.

    A request that cannot be answered is answered with a text that says why, and the connection stays open. The
    traceback of anything unexpected goes to the log, not to the robot.
    """

    def __init__(
        self,
        infer: Callable[[Any], dict[str, Any]],
        metadata: dict[str, Any],
        *,
        client_errors: tuple[type[Exception], ...] = (),
        host: str = "127.0.0.1",
        port: int = 8000,
        api_key: str | None = None,
        max_pending: int = 64,
    ) -> None:
        """
        Args:
            metadata: sent to every client on connection.
            client_errors: exceptions of `infer` whose text is meant for the client.
            port: 0 takes a free one, see `port` after `start`.
            api_key: clients must send it as `Authorization: Api-Key KEY`; None asks for none.
            max_pending: requests that may wait; one more is answered with an error.
        """
        self._infer, self._handshake = infer, pack(metadata)
        self._client_errors: tuple[type[Exception], ...] = (ProtocolError, *client_errors)
        self._host, self.port, self._api_key, self._max_pending = host, port, api_key, max_pending
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._pending = 0
        self._server: Server | None = None

    async def start(self) -> None:
        """Listens. Requests for /healthz are answered at any time, also during inference."""
        self._server = await serve(
            self._handle,
            self._host,
            self.port,
            process_request=self._process_request,
            compression=None,
            max_size=MAX_MESSAGE_BYTES,
        )
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def close(self) -> None:
        """Stops listening, closes connections, and waits for the request being worked on."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
        await asyncio.to_thread(self._worker.shutdown)

    def _process_request(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path in ("/healthz", "/readyz"):  # it listens only after compilation, so alive is ready
            return connection.respond(http.HTTPStatus.OK, f"ok, {self._pending} requests pending\n")
        given = request.headers.get("Authorization", "")
        if self._api_key is not None and not hmac.compare_digest(given.encode(), f"Api-Key {self._api_key}".encode()):
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "wrong or missing header Authorization: Api-Key\n")
        return None

    async def _handle(self, connection: ServerConnection) -> None:
        log.info("connected: %s", connection.remote_address)
        try:
            await connection.send(self._handshake)
            async for message in connection:
                await connection.send(await self._answer(message))
        except ConnectionClosed as e:
            log.info("connection to %s lost: %s", connection.remote_address, e)

    async def _answer(self, message: str | bytes) -> str | bytes:
        if self._pending >= self._max_pending:
            return f"busy: {self._pending} requests are waiting, expected at most {self._max_pending}; ask again later"
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, self._work, message)
        except self._client_errors as e:
            return str(e)
        except Exception:
            incident = uuid.uuid4().hex[:8]
            log.exception("incident %s", incident)
            return f"internal error, incident {incident}; the server's log has the details"
        finally:
            self._pending -= 1

    def _work(self, message: str | bytes) -> bytes:
        if isinstance(message, str):
            raise ProtocolError("got a text message, expected a binary one with an observation as msgpack")
        return pack(self._infer(unpack(message)))


def run(server: PolicyServer, *, port_file: Path | None = None) -> None:
    """Serves until SIGTERM or SIGINT. port_file: written with the port once it listens."""

    async def main() -> None:
        stop = asyncio.Event()
        for signum in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(signum, stop.set)
        await server.start()
        log.info("listening on port %d", server.port)
        if port_file is not None:
            temporary = port_file.with_suffix(".tmp")
            temporary.write_text(str(server.port))
            temporary.replace(port_file)
        await stop.wait()
        log.info("closing")
        await server.close()

    asyncio.run(main())
