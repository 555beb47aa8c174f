"""Which processes a run has, and how this one finds its place among them.

By default the environment says so: each kind of cluster is an object with a name in `SOURCES`, and a new one is a new
object. What a process then does with its place is in `openpi_like.train.hosts.process_group`.
"""

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from jax._src import clusters  # JAX's own list of clusters has no public name

from openpi_like.config import near_names


class HostsError(RuntimeError):
    """What went wrong between the processes of a run; its text is meant to be read without a traceback."""

    exit_code = 1


def boot_id() -> str:
    """Returns what the system of this host has called itself since it was started; two hosts may have one name."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes of a run, usually one per host. What is not given is found from the environment.

    coordinator: "address:port" of process 0, a free port there that the others can reach. count: processes of the run;
        `count=1` alone asks no cluster and runs this process by itself. rank: of this process, from 0.
    local_device_ids: GPUs that this process uses; None is all of the host's, or one where a host has several processes.
    source: the name in `SOURCES` to ask, where several answer.
    start_timeout_s: how long to wait until all processes are there. peer_timeout_s: after how long a process that is
        not heard of is taken for dead, and the others stop.
    """

    coordinator: str | None = None
    count: int | None = None
    rank: int | None = None
    local_device_ids: tuple[int, ...] | None = None
    source: str | None = None
    start_timeout_s: float = 300.0
    peer_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        problems = []
        if self.coordinator is not None:
            problems += _address_problems(self.coordinator)
        for name, least in (("count", 1), ("rank", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                problems.append(f"{name}={value!r}, expected a whole number from {least}")
        if not problems and self.count is not None and self.rank is not None and self.rank >= self.count:
            problems.append(f"rank={self.rank} of count={self.count}, expected 0 to {self.count - 1}")
        for name in ("start_timeout_s", "peer_timeout_s"):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)}, expected at least 1 second")
        if problems:
            raise ValueError("Hosts: " + "; ".join(problems))


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of this process in a run of several. found_by: the source that named it. others: sources not asked."""

    found_by: str
    coordinator: str
    count: int
    rank: int
    others: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = _address_problems(self.coordinator)
        if not 0 <= self.rank < self.count:
            problems.append(f"rank {self.rank} of {self.count} processes, expected 0 to {self.count - 1}")
        if problems:
            raise HostsError(f"hosts, by {self.found_by}: " + "; ".join(problems))

    def __str__(self) -> str:
        also = f" ({', '.join(self.others)} would answer too: hosts.source=...)" if self.others else ""
        return f"{self.count} processes, found by {self.found_by}{also}, coordinator {self.coordinator}"


def split_address(address: str) -> tuple[str, int]:
    """Returns host and port of "host:port" or "[IPv6]:port"."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _address_problems(address: object) -> list[str]:
    host, _, port = str(address).rpartition(":")
    if host and port.isdecimal() and 0 < int(port) < 2**16:
        return []
    return [f"coordinator={address!r}, expected address:port, such as 10.0.0.1:1234"]


# ---- Sources ---------------------------------------------------------------------------------------------------------


@runtime_checkable
class Source(Protocol):
    """One way in which processes are told their places. name: as printed, and as `Hosts.source` takes it."""

    name: str

    def present(self, environ: Mapping[str, str]) -> bool:
        """Says whether this process was started in this way."""
        ...

    def place(self, environ: Mapping[str, str], timeout_s: float) -> Place:
        """Returns the place of this process, within `timeout_s` seconds.

        Raises:
            HostsError: it is told only in part, or wrongly.
        """
        ...


class Variables:
    """Four facts in environment variables, of which a process needs all once it has any."""

    def __init__(self, name: str, *, coordinator: tuple[str, ...], count: str, rank: str) -> None:
        """coordinator: the variable with address and port, or one for each."""
        self.name = name
        self._names = (*coordinator, count, rank)

    def present(self, environ: Mapping[str, str]) -> bool:
        return any(name in environ for name in self._names)

    def place(self, environ: Mapping[str, str], timeout_s: float) -> Place:
        missing = [name for name in self._names if not environ.get(name)]
        if missing:
            given = [f"{name}={environ[name]}" for name in self._names if environ.get(name)]
            raise HostsError(
                f"hosts, by {self.name}: {', '.join(given) or 'empty values'}, but no {', '.join(missing)}; "
                "set all of them, unset all of them, or run this process by itself with hosts.count=1"
            )
        *coordinator, count, rank = (environ[name] for name in self._names)
        try:
            return Place(self.name, self._address(coordinator, environ), int(count), int(rank))
        except ValueError as e:
            raise HostsError(f"hosts, by {self.name}: {e}, expected whole numbers") from None

    def _address(self, parts: list[str], environ: Mapping[str, str]) -> str:
        return ":".join(parts)


class Torchrun(Variables):
    """What torchrun sets, and what starters of PyTorch jobs set like it (Kubeflow, SageMaker, scripts)."""

    def __init__(self) -> None:
        super().__init__(
            "torchrun variables", coordinator=("MASTER_ADDR", "MASTER_PORT"), count="WORLD_SIZE", rank="RANK"
        )

    def _address(self, parts: list[str], environ: Mapping[str, str]) -> str:
        host, port = parts
        # torchrun's agent listens on that port itself, so ours is the next one.
        held = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return f"{host}:{int(port) + held}"


class JaxCluster:
    """A cluster that JAX detects: TPU VM, GKE with TPUs, Slurm, Open MPI, Kubernetes, and those of newer versions."""

    def __init__(self, cluster: type[clusters.ClusterEnv]) -> None:
        self.name = cluster.__name__.removesuffix("Cluster")
        self._cluster = cluster

    def present(self, environ: Mapping[str, str]) -> bool:
        return self._cluster.is_env_present()

    def place(self, environ: Mapping[str, str], timeout_s: float) -> Place:
        address = self._cluster.get_coordinator_address(
            timeout_secs=int(timeout_s), override_coordinator_port=environ.get("JAX_COORDINATOR_PORT")
        )
        return Place(self.name, address, self._cluster.get_process_count(), self._cluster.get_process_id())


# The innermost starter knows best: mpirun or torchrun may themselves have been started by Slurm.
SOURCES: tuple[Source, ...] = (
    Variables(
        "JAX variables", coordinator=("JAX_COORDINATOR_ADDRESS",), count="JAX_NUM_PROCESSES", rank="JAX_PROCESS_ID"
    ),
    Torchrun(),
    *(JaxCluster(c) for c in clusters.ClusterEnv._cluster_types if not c.opt_in_only_method),
)


def find_place(
    hosts: Hosts, *, environ: Mapping[str, str] = os.environ, sources: tuple[Source, ...] = SOURCES
) -> Place | None:
    """Returns the place of this process in the run; None for a process by itself.

    Raises:
        HostsError: the place is given only in part, contradicts itself, or `hosts.source` does not know it.
    """
    given = {name: getattr(hosts, name) for name in ("coordinator", "count", "rank")}
    if any(value is not None for value in given.values()):
        if hosts.count == 1:
            return None
        missing = [f"hosts.{name}" for name, value in given.items() if value is None]
        if missing:
            known = ", ".join(f"hosts.{name}={value}" for name, value in given.items() if value is not None)
            raise HostsError(f"hosts: got {known}, but no {', '.join(missing)}; give all three, or none")
        return Place("hosts.coordinator, count and rank", **given)
    names = [source.name for source in sources]
    if hosts.source is not None and hosts.source not in names:
        raise HostsError(f"hosts.source={hosts.source!r}: no such source; {near_names(hosts.source, names)}")
    asked = [source for source in sources if hosts.source in (None, source.name)]
    for i, source in enumerate(asked):
        try:
            if not source.present(environ):
                continue
            place = source.place(environ, hosts.start_timeout_s)
        except HostsError:
            raise
        except Exception as e:  # metadata servers and Kubernetes raise errors of their own
            raise HostsError(
                f"hosts: {source.name} should say who takes part, but: {e}; run this process by itself with "
                "hosts.count=1, or give hosts.coordinator, hosts.count and hosts.rank"
            ) from e
        others = tuple(other.name for other in asked[i + 1 :] if _answers(other, environ))
        return None if place.count == 1 else dataclasses.replace(place, others=others)
    if hosts.source is not None:
        raise HostsError(f"hosts.source={hosts.source!r}: this process was not started by it")
    return None


def _answers(source: Source, environ: Mapping[str, str]) -> bool:
    """Says whether a source that is not needed is present; one that fails or complains is not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return source.present(environ)
        except Exception:
            return False
