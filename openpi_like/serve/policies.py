"""The policies of one server, by name; each can be replaced, or tried on a share of the sessions, while it serves."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

from openpi_like.config import near_names


class UnknownPolicyError(ValueError):
    """A server has no policy of that name."""


class Served:
    """A policy with a name. A session has the policy of now, or the canary, for as long as there is one."""

    def __init__(self, name: str, policy: Any) -> None:
        self.name, self._policy = name, policy
        self._canary: Any = None
        self._share, self._sessions = 0.0, 0
        self._lock = threading.Lock()

    @property
    def policy(self) -> Any:
        return self._policy

    @property
    def canary(self) -> Any:
        return self._canary

    def replace(self, policy: Any) -> None:
        """Takes another policy from the next request on; the canary, if any, ends.

        Raises:
            ValueError: it does not serve the same robots, with the same fields; lists every difference.
        """
        _check_replaces(self.name, self._policy.metadata(), policy.metadata())
        with self._lock:
            self._policy, self._canary, self._share = policy, None, 0.0

    def try_out(self, canary: Any, share: float) -> None:
        """Gives a share of the sessions that begin from now on another policy, until `replace`, or None.

        Raises:
            ValueError: as `replace`, or `share` is not in [0, 1].
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share={share}, expected a number in [0, 1]")
        if canary is not None:
            _check_replaces(self.name, self._policy.metadata(), canary.metadata())
        with self._lock:
            self._canary, self._share, self._sessions = canary, share, 0

    def begin(self) -> Callable[[], Any]:
        """Begins a session; returns what tells its policy at any time. round(n share) of n sessions have the canary."""
        with self._lock:
            n = self._sessions
            tries = self._canary is not None and int((n + 1) * self._share + 0.5) > int(n * self._share + 0.5)
            self._sessions += 1

        def policy() -> Any:
            canary = self._canary
            return canary if tries and canary is not None else self._policy

        return policy


class Policies:
    """Served policies by name; the first is that of clients that name none."""

    def __init__(self, policies: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: there is none.
        """
        if not policies:
            raise ValueError("no policy to serve, expected at least one")
        self._served = {name: Served(name, policy) for name, policy in policies.items()}

    def __iter__(self) -> Any:
        return iter(self._served.values())

    def __getitem__(self, name: str) -> Served:
        """
        Raises:
            UnknownPolicyError: there is none of that name; "" is the first.
        """
        if not name:
            return next(iter(self._served.values()))
        if name not in self._served:
            raise UnknownPolicyError(f"no policy {name!r}; {near_names(name, list(self._served))}")
        return self._served[name]


def _check_replaces(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    robots, others = old["robots"], new["robots"]
    problems = [f"it does not serve robot {robot!r}" for robot in robots if robot not in others]
    for robot in robots.keys() & others.keys():
        problems += [
            f"{robot}.{field} is {others[robot].get(field)}, that of now {value}"
            for field, value in robots[robot].items()
            if others[robot].get(field) != value
        ]
    problems += [
        f"{field} is {new.get(field)}, that of now {old.get(field)}"
        for field in ("real_time_chunking", "max_delay")
        if new.get(field) != old.get(field)
    ]
    if problems:
        raise ValueError(
            f"cannot take the place of policy {name!r}: {'; '.join(problems)}; serve it under another name"
        )
