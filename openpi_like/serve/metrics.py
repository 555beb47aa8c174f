"""What a server tells Prometheus."""

import functools
import threading
from collections.abc import Callable, Iterable
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

PHASES = ("prepare", "queue", "infer", "send", "total")
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self, gauges: dict[str, tuple[str, Callable[[], float]]] | None = None) -> None:
        """gauges: name -> (help, what tells its value), read when Prometheus asks."""
        self._registry = CollectorRegistry()
        self._http: WSGIServer | None = None
        self._thread: threading.Thread | None = None
        histogram = functools.partial(Histogram, registry=self._registry, namespace="policy_server")
        counter = functools.partial(Counter, registry=self._registry, namespace="policy_server")
        self._replies = counter("replies", "Replies, by policy, and ok or the code of the error", ["policy", "code"])
        self._refused = counter("refused_connections", "Connections that were refused, by reason", ["reason"])
        self._phases = histogram("seconds", "Time of a request, by phase", ["phase"], buckets=_SECONDS)
        self._batch = histogram("batch_size", "Requests answered together", buckets=(1, 2, 4, 8, 16, 32, 64))
        self._of_phase = {phase: self._phases.labels(phase) for phase in PHASES}
        self._registry.register(_Gauges(gauges or {}))

    def replied(self, policy: str, code: str, seconds: dict[str, float]) -> None:
        """Counts a reply. seconds: by phase."""
        self._replies.labels(policy, code).inc()
        for phase, value in seconds.items():
            self._of_phase[phase].observe(value)

    def sent(self, seconds: float) -> None:
        """Notes how long a client took to take a reply, where that is longer than the system's buffers hide."""
        self._of_phase["send"].observe(seconds)

    def refused(self, reason: str) -> None:
        """Counts a connection that was refused."""
        self._refused.labels(reason).inc()

    def batch(self, size: int) -> None:
        """Counts a batch."""
        self._batch.observe(size)

    def serve(self, port: int, host: str) -> int:
        """Answers /metrics on a port of its own (0: a free one), from a thread of its own, and returns the port."""
        self._http, self._thread = start_http_server(port, host, self._registry)
        return self._http.server_port

    def close(self) -> None:
        """Ends what `serve` has begun."""
        if self._http is not None and self._thread is not None:
            self._http.shutdown()
            self._http.server_close()
            self._thread.join()

    def text(self) -> bytes:
        """Returns everything in the text format of Prometheus."""
        return generate_latest(self._registry)


class _Gauges(Collector):
    def __init__(self, gauges: dict[str, tuple[str, Callable[[], float]]]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[GaugeMetricFamily]:
        for name, (about, value) in self._gauges.items():
            yield GaugeMetricFamily(f"policy_server_{name}", about, value())

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return ()
