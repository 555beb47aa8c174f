"""The robot's side: asks a remote policy for actions. Needs numpy, msgpack and websockets; no jax, no simulator.

An unmodified `openpi_client.websocket_client_policy.WebsocketClientPolicy` works too; this client adds deadlines and
reconnects.
"""

import contextlib
import socket
import ssl
import struct
import sys
import time
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from openpi_like.serve.protocol import MAX_MESSAGE_BYTES, pack, unpack

_TRANSIENT = (429, 500, 502, 503, 504)  # a server that is full or starts, or a proxy before one


class ServerError(RuntimeError):
    """The server answered with an error; its text says what to change. The connection stays usable."""


class DeadlineError(TimeoutError):
    """No answer in time. The connection is dropped, lest a late answer be taken for that of a later request."""


class PolicyClient:
    """Asks a policy server for action chunks.

    metadata: what the server sent on connection: its robots with cameras, state, actions, rate and chunk length.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8000,
        *,
        policy: str = "",
        api_key: str | None = None,
        tls: ssl.SSLContext | None = None,
        timeout_s: float = 10.0,
        reconnect_s: float = 30.0,
    ) -> None:
        """Connects.

        policy: name of one that the server has; its first by default. tls: encrypts, with a certificate of this client
        where it has one (`ssl.create_default_context(cafile=...)` and its `load_cert_chain`). timeout_s: longest wait
        for an answer. reconnect_s: longest time spent on (re)connecting.

        Raises:
            ConnectionError: no server could be reached in `reconnect_s`, or it is full, or does not know the key or the
                policy; says which.
        """
        self._uri, self._api_key = f"{'ws' if tls is None else 'wss'}://{host}:{port}/{policy}", api_key
        self._tls = tls
        self._timeout_s, self._reconnect_s = timeout_s, reconnect_s
        self._connection: ClientConnection | None = None
        self._open = contextlib.ExitStack()  # holds the connection's context
        self.metadata: dict[str, Any] = {}
        self._connect()

    def _connect(self) -> ClientConnection:
        headers = {"Authorization": f"Api-Key {self._api_key}"} if self._api_key else None
        give_up, pause = time.monotonic() + self._reconnect_s, 0.05
        while True:
            try:
                context = connect(
                    self._uri,
                    additional_headers=headers,
                    compression=None,  # images do not compress, and it costs milliseconds
                    max_size=MAX_MESSAGE_BYTES,
                    open_timeout=self._timeout_s,
                    close_timeout=1.0,  # a network that is gone does not answer
                    ssl=self._tls,
                )
                connection = self._open.enter_context(context)
                _limit_sends(connection.socket, self._timeout_s)
                metadata = connection.recv(timeout=self._timeout_s)
                break
            except InvalidStatus as e:
                status, why = e.response.status_code, (e.response.body or b"").decode(errors="replace").strip()
                if status not in _TRANSIENT or time.monotonic() + pause > give_up:
                    raise ConnectionError(f"{self._uri} refused the connection: HTTP {status} {why}") from e
                time.sleep(pause)
                pause = min(2 * pause, 2.0)
            except ssl.SSLError as e:
                raise ConnectionError(f"{self._uri}: {e}; is the server's certificate, or this client's, wrong?") from e
            except (OSError, TimeoutError, InvalidMessage, ConnectionClosed) as e:
                self.close()
                if time.monotonic() + pause > give_up:
                    raise ConnectionError(f"no policy server at {self._uri} within {self._reconnect_s} s: {e}") from e
                time.sleep(pause)
                pause = min(2 * pause, 2.0)
        if isinstance(metadata, str):
            self.close()
            raise ServerError(metadata)
        self.metadata, self._connection = unpack(metadata), connection
        return connection

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Returns the server's reply, with "actions" float32 (A, J) in the robot's own units.

        A connection that was lost is made anew, once, and the observation is sent again.

        Raises:
            ServerError: the server refused the observation; its text says why.
            DeadlineError: no answer within `timeout_s`.
            ConnectionError: the server is gone.
        """
        request, deadline = pack(observation), time.monotonic() + self._timeout_s
        for attempt in (0, 1):
            connection = self._connection or self._connect()
            try:
                connection.send(request)
                reply = connection.recv(timeout=max(0.0, deadline - time.monotonic()))
            except TimeoutError as e:
                self.close()
                raise DeadlineError(f"no answer from {self._uri} within {self._timeout_s} s") from e
            except ConnectionClosed as e:
                self.close()
                if attempt or time.monotonic() > deadline:
                    raise ConnectionError(f"{self._uri} closed the connection: {e}") from e
                continue
            if isinstance(reply, str):
                raise ServerError(reply)
            return unpack(reply)
        raise AssertionError("both attempts end in a reply or an exception")

    def close(self) -> None:
        """Closes the connection; the next request makes a new one."""
        self._connection = None
        self._open.close()


def _limit_sends(s: socket.socket, seconds: float) -> None:
    """Ends a send after so long: into a network that is gone it would block for a quarter of an hour."""
    if sys.platform != "win32":
        time_val = struct.pack("@ll", int(seconds), int(1e6 * (seconds % 1)))
        s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, time_val)
