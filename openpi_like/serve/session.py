"""A client's conversation without sockets: its messages in, replies or requests to be answered out.

Another transport than websockets needs no more than `hello`, `receive` and `answer`, called one at a time.
"""

import dataclasses
import logging
import reprlib
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from openpi_like.config import near_names
from openpi_like.serve.batching import Answer, BusyError, LateError, StuckError
from openpi_like.serve.observation import ObservationError
from openpi_like.serve.protocol import ProtocolError, pack, unpack
from openpi_like.serve.ranges import RangeError, Watched

log = logging.getLogger(__name__)

FEATURES = ("deadline_ms", "encoded_images", "id", "reset", "seed", "success", "think", "traceparent")
"""What a client may use beyond the protocol of openpi-client; "think" where the policy writes text before it acts."""
_CONTAINERS = 1000  # in a message of a client
_SHOWN = 80  # characters of what a client sent
# Errors to a client are one of these codes and a sentence.
INVALID, RANGE, LATE, BUSY, CLOSING, INTERNAL = "invalid", "range", "late", "busy", "closing", "internal"
_CODES: tuple[tuple[type[Exception], str], ...] = (
    (ObservationError, INVALID),
    (ProtocolError, INVALID),
    (RangeError, RANGE),
    (LateError, LATE),
    (BusyError, BUSY),
    (StuckError, CLOSING),
)


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request that a policy is to answer.

    observation: as it was sent. due: on `time.monotonic`, or None. id: the client's own, sent back. traceparent: of the
    client's span (W3C Trace Context), or None. warnings: of its pictures.
    """

    policy: Any
    request: Any
    observation: Mapping[str, Any]
    due: float | None
    id: Any
    traceparent: str | None
    prepared_s: float
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Reset:
    """The session has begun anew. success: of what came before, None where the client does not say."""

    reply: bytes
    success: bool | None


class Session:
    """The conversation with one client, about one policy."""

    def __init__(self, policy: Callable[[], Any], *, about: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            policy: returns the one of now, which has `metadata`, `prepare`, and what
                `openpi_like.serve.batching.Sampler` has.
            about: further entries of the handshake.
        """
        self._policy, self._about = policy, dict(about or {})
        self._seed: int | None = None
        self._number = 0
        self._watched: Watched | None = None
        # What was written last, how many chunks were acted by it, and what for: policy, robot and prompt.
        self._thought: Any = None
        self._acted, self._asked = 0, (None, None, None)

    def metadata(self) -> dict[str, Any]:
        """Returns what the handshake says."""
        policy = self._policy()
        features = [name for name in FEATURES if name != "think" or policy.thinks]
        return {**policy.metadata(), "features": features, **self._about}

    def hello(self) -> bytes:
        """Returns the handshake."""
        return pack(self.metadata())

    def receive(self, message: str | bytes, arrived: float | None = None) -> Ask | Reset | str:
        """Returns a request to be answered, or at once what needs no policy: a reset, or the error that is the reply.

        arrived: when, on `time.monotonic`; now by default.
        """
        since = time.monotonic() if arrived is None else arrived
        try:
            if isinstance(message, str):
                raise ProtocolError("got a text message, expected a binary one with an observation as msgpack")
            content = unpack(message, containers=_CONTAINERS)
            if not isinstance(content, dict):
                raise ProtocolError(f"got a {type(content).__name__}, expected a dict with images, state and prompt")
            if wrong := [k for k in content if not isinstance(k, str)]:
                raise ProtocolError(f"got a dict with the key {reprlib.repr(wrong[0])}, expected texts")
            if "reset" in content:
                return self._reset(content)
            asked = {k: content.pop(k, None) for k in ("id", "deadline_ms", "traceparent", "think")}
            due, parent = _due(asked["deadline_ms"], since), asked["traceparent"]
            if parent is not None and not isinstance(parent, str):
                raise ProtocolError(f"traceparent: got a {type(parent).__name__}, expected a text")
            policy = self._policy()
            kept = self._kept(policy, content, asked["think"])
            request = policy.prepare(content, number=self._number, seed=self._seed, **kept)
            self._number += 1
            self._watched = self._watched or Watched(policy.ranges.frozen)
            warnings = self._watched.look(request.pictures, request.state)
        except Exception as e:
            return failure(e)
        took = time.monotonic() - since
        return Ask(policy, request, content, due, asked["id"], parent, took, tuple(warnings))

    def answer(self, ask: Ask, answer: Answer) -> bytes | str:
        """Returns the reply to a request."""
        if isinstance(answer.reply, Exception):
            return failure(answer.reply)
        seconds = {"prepare": ask.prepared_s, "queue": answer.waited_s, "infer": answer.sampled_s}
        timing: dict[str, Any] = {k: 1e3 * s for k, s in seconds.items()} | {"batch": answer.batch}
        reply = {"actions": answer.reply.actions, "timing_ms": timing}
        if answer.reply.thought is not None:
            self._thought = answer.reply.thought
            reply["thought"] = self._thought.text
        if warnings := [*ask.warnings, *answer.reply.warnings]:
            reply["warnings"] = warnings
        return pack(reply if ask.id is None else {**reply, "id": ask.id})

    def _kept(self, policy: Any, content: Mapping[str, Any], think: Any) -> dict[str, Any]:
        """Returns the thought to act by, if there is one already. think: the client's wish, None: as is usual."""
        if not isinstance(think, bool | None):
            raise ProtocolError(f"think: got {reprlib.repr(think)}, expected true, false or nothing")
        if think is not None and not policy.thinks:
            raise ProtocolError(f"think: got {think}, but this policy writes no text before it acts; leave it out")
        if policy.think_every == 0 and not think:
            return {"thought": policy.no_thought}
        asked = (policy, content.get("robot"), content.get("prompt"))
        fits = self._thought is not None and asked[0] is self._asked[0] and asked[1:] == self._asked[1:]
        anew = self._acted >= policy.think_every if think is None else think
        self._asked = asked
        if not fits or anew:
            self._thought, self._acted = None, 1  # until it is answered
            return {}
        self._acted += 1
        return {"thought": self._thought}

    def _reset(self, content: dict[Any, Any]) -> Reset:
        """Begins anew: the same requests have the same answers again."""
        known = ["seed", "success"]
        unknown = [k for k in content if k not in ("reset", *known)]
        seed, success = (content.get(k) for k in known)
        if unknown:
            first = unknown[0][:_SHOWN]
            raise ProtocolError(f"reset: {first!r} is not part of it; {near_names(first, known)}")
        if not isinstance(success, bool | None):
            raise ProtocolError(f"success: got {reprlib.repr(success)}, expected true, false or nothing")
        if seed is not None and not (isinstance(seed, int | np.integer) and 0 <= seed < 2**32):
            raise ProtocolError(f"seed: got {reprlib.repr(seed)}, expected an integer in 0 .. 2^32 - 1")
        self._seed, self._number, self._watched = None if seed is None else int(seed), 0, None
        self._thought, self._acted = None, 0
        return Reset(pack({"reset": True}), success)


def failure(error: Exception) -> str:
    """Returns an error as clients are told it: a code and a sentence. What was not foreseen is in the log alone."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return f"{code}: {error}"
    incident = uuid.uuid4().hex[:8]
    log.error("incident %s", incident, exc_info=error)
    return f"{INTERNAL}: internal error, incident {incident}; the server's log has the details"


def _due(deadline_ms: Any, since: float) -> float | None:
    if deadline_ms is None:
        return None
    if not isinstance(deadline_ms, int | float | np.number) or not 0 < deadline_ms < 1e9:
        raise ProtocolError(f"deadline_ms: got {reprlib.repr(deadline_ms)}, expected milliseconds above 0")
    return since + float(deadline_ms) / 1e3
