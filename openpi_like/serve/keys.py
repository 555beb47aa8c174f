"""API keys. A file holds their hashes, never the keys: `python serve/api_keys.py keys.json --add robot7` prints one."""

import base64
import contextlib
import dataclasses
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterable
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Key:
    """Who has a key, and what it allows.

    name: of the client, in logs and metrics. sha256: of the key, which is random and long, so that no slow hash is
    needed. requests_per_s: on average, with bursts of a second's worth; None for any. connections: at a time. looks:
    whether it may see the live page, and there what all robots see.
    """

    name: str
    sha256: str
    requests_per_s: float | None = None
    connections: int | None = None
    looks: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not self.name or not self.name.isprintable():
            problems.append(f"name={self.name!r}, expected a text")
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            problems.append("sha256 is not 64 hexadecimal digits")
        if self.requests_per_s is not None and not self.requests_per_s > 0:
            problems.append(f"requests_per_s={self.requests_per_s}, expected a number above 0")
        if self.connections is not None and self.connections < 1:
            problems.append(f"connections={self.connections}, expected at least 1")
        if problems:
            raise ValueError(f"key {self.name!r}: " + "; ".join(problems))


class Keys:
    """The keys that a server knows. With none at all, everybody may connect."""

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        """
        Raises:
            ValueError: two keys have the same name.
        """
        self.keys = tuple(keys)
        names = [key.name for key in self.keys]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"there is more than one key of {', '.join(twice)}; remove all but one")

    def __bool__(self) -> bool:
        return bool(self.keys)

    def find(self, authorization: str) -> Key | None:
        """Returns the key that a header `Authorization: Api-Key KEY` has, or None. `Bearer KEY` is as good, and `Basic`
        with any name and the key as the password, which is what browsers send.

        All hashes are compared, each in constant time, so that the time taken tells nothing.
        """
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() == "basic":
            with contextlib.suppress(ValueError):
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
        digest = hash_of(given.strip())
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found if scheme.lower() in ("api-key", "bearer", "basic") else None


def hash_of(key: str) -> str:
    """Returns what is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def new_key() -> str:
    """Returns a key of 256 random bits."""
    return secrets.token_urlsafe(32)


def read_keys(path: Path) -> Keys:
    """Reads a file of keys.

    Raises:
        ValueError: it is no such file, or a key in it is wrong; lists all that are.
        OSError: it cannot be read.
    """
    try:
        entries = json.loads(path.read_text())["keys"]
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is not a file of keys ({e}); make one with serve/api_keys.py") from e
    keys, problems = [], []
    for entry in entries:
        try:
            keys.append(Key(**entry))
        except (TypeError, ValueError) as e:
            problems.append(str(e))
    if problems:
        raise ValueError(f"{path}: " + "; ".join(problems))
    return Keys(keys)


def write_keys(path: Path, keys: Iterable[Key]) -> None:
    """Writes a file of keys, which its owner alone can read; it is there in whole or not at all."""
    temporary = path.with_suffix(".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as f:
        json.dump({"keys": [dataclasses.asdict(key) for key in keys]}, f, indent=2)
    temporary.replace(path)
