"""A policy server that runs beside a test."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from openpi_like.serve.server import PolicyServer


class WrongObservationError(ValueError):
    """An error whose text is meant for the client."""


@contextlib.contextmanager
def serving(infer: Callable[[Any], dict], metadata: dict | None = None, **options: Any) -> Iterator[PolicyServer]:
    """Runs a server on a free port, its event loop in a thread."""
    handshake = {"robots": ["r"]} if metadata is None else metadata
    server = PolicyServer(infer, handshake, port=0, client_errors=(WrongObservationError,), **options)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
