"""What else learns of a server's sessions: recording, tracing, the live page."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from openpi_like.serve.batching import Answer
from openpi_like.serve.session import Ask

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Client:
    """A connection. number: of the session, counted from 1. key: name of its key. policy: name of the one it asks."""

    number: int
    peer: str
    key: str | None
    policy: str


class Listener:
    """Is told what happens, in the event loop: every method returns at once. A new listener overrides what it needs."""

    def connected(self, client: Client, about: Mapping[str, Any]) -> None:
        """about: the handshake's metadata of the policy."""

    def answered(self, client: Client, ask: Ask, answer: Answer, seconds: Mapping[str, float]) -> None:
        """A request was answered, with a reply or an error. seconds: by phase, see `openpi_like.serve.metrics`."""

    def refused(self, client: Client, said: str) -> None:
        """A message was answered with an error before it became a request."""

    def began_anew(self, client: Client, success: bool | None) -> None:
        """The client has begun anew, and said, or not, whether it succeeded before."""

    def disconnected(self, client: Client) -> None:
        """The connection is gone."""

    def close(self) -> None:
        """The server is closed. May take its time."""


class Listeners(Listener):
    """Several, each told in turn; a fault of one is in the log, and nothing else."""

    def __init__(self, listeners: Iterable[Listener]) -> None:
        self._listeners = tuple(listeners)

    def _tell(self, method: str, *args: Any) -> None:
        for listener in self._listeners:
            try:
                getattr(listener, method)(*args)
            except Exception:
                log.exception("%s failed at %s; the session goes on", type(listener).__name__, method)

    def connected(self, client: Client, about: Mapping[str, Any]) -> None:
        self._tell("connected", client, about)

    def answered(self, client: Client, ask: Ask, answer: Answer, seconds: Mapping[str, float]) -> None:
        self._tell("answered", client, ask, answer, seconds)

    def refused(self, client: Client, said: str) -> None:
        self._tell("refused", client, said)

    def began_anew(self, client: Client, success: bool | None) -> None:
        self._tell("began_anew", client, success)

    def disconnected(self, client: Client) -> None:
        self._tell("disconnected", client)

    def close(self) -> None:
        self._tell("close")
