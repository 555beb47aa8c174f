"""What one client may take of a server."""

import dataclasses
import time
from collections.abc import Callable

from openpi_like.serve.protocol import MAX_MESSAGE_BYTES


@dataclasses.dataclass(frozen=True)
class ServerLimits:
    """ServerLimits of a server. None: no limit.

    message_bytes: of one message. connections: at a time, of all clients. waiting: requests in the queue. idle_s: a
    connection that sends nothing for so long is closed. send_s: one that does not take a reply for so long is closed.
    requests_per_s: of one client, on average, with bursts of a second's worth; a key can have its own.
    """

    message_bytes: int = MAX_MESSAGE_BYTES
    connections: int = 256
    waiting: int = 256
    idle_s: float | None = 3600.0
    send_s: float = 30.0
    requests_per_s: float | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)}, expected at least 1"
            for name in ("connections", "waiting")
            if getattr(self, name) < 1
        ]
        if not 0 < self.message_bytes <= MAX_MESSAGE_BYTES:
            problems.append(f"message_bytes={self.message_bytes}, expected 1 to {MAX_MESSAGE_BYTES}")
        for name in ("idle_s", "send_s", "requests_per_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                problems.append(f"{name}={value}, expected a number above 0")
        if problems:
            raise ValueError("ServerLimits: " + "; ".join(problems))


class RateLimit:
    """A bucket that holds a second's worth of requests, at least one, and fills up steadily."""

    def __init__(self, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s, self._most, self._clock = per_s, max(1.0, per_s), clock
        self._left, self._at = self._most, clock()

    def take(self) -> float:
        """Takes one; returns 0, or the seconds until there is one again."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._per_s)
        self._at = now
        if self._left < 1:
            return (1 - self._left) / self._per_s
        self._left -= 1
        return 0.0
