"""Browsers bring requests of pages that somebody else wrote: which are taken."""

import contextlib
import ipaddress
from urllib.parse import urlsplit

LOCAL = ("127.0.0.1", "::1", "localhost")


def foreign(origin: str | None, host: str, *, listens: str, keys: bool) -> tuple[str, str] | None:
    """Returns why a request is refused, as a word and a sentence; None where it is taken.

    origin, host: its headers; programs that are no browser send no Origin. listens: what the server was told to listen
    on. keys: clients have to show one, which a page of somebody else does not have.
    """
    if origin is not None and urlsplit(origin).netloc != host:
        return "origin", f"a page of {origin} may not use this server"
    if not keys and listens in LOCAL and not _is_this_machine(host):
        return "host", f"this server is not {host}, ask for 127.0.0.1"
    return None


def _is_this_machine(host: str) -> bool:
    """Whether a header Host names this machine: not so where somebody's name was made to lead here (DNS rebinding)."""
    name = urlsplit(f"//{host}").hostname or ""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name in LOCAL
