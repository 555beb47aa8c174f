"""Spans of OpenTelemetry: one for each request, with those of its phases. Needs the extra `tracing`.

Where they are sent is told by the variables of OpenTelemetry, OTEL_EXPORTER_OTLP_ENDPOINT first of all.
"""

import time
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from openpi_like.serve.batching import Answer
from openpi_like.serve.listeners import Client, Listener
from openpi_like.serve.session import Ask

_PHASES = ("prepare", "queue", "infer")  # one after the other


class Tracing(Listener):
    """Makes a span of each request, below the client's own where that sends its `traceparent`."""

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        """exporter: by default over HTTP, to where the variables say."""
        self._provider = TracerProvider(resource=Resource.create({SERVICE_NAME: "policy_server"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("openpi_like")

    def answered(self, client: Client, ask: Ask, answer: Answer, seconds: Mapping[str, float]) -> None:
        ended = time.time_ns()
        at = began = ended - round(1e9 * seconds["total"])
        parent = None
        if ask.traceparent is not None:
            parent = TraceContextTextMapPropagator().extract({"traceparent": ask.traceparent})
        attributes: dict[str, str | int] = {
            "session": client.number,
            "policy": client.policy,
            "robot": ask.request.robot.name,
            "batch": answer.batch,
        }
        if client.key is not None:
            attributes["key"] = client.key
        span = self._tracer.start_span("request", parent, trace.SpanKind.SERVER, attributes, start_time=began)
        if isinstance(answer.reply, Exception):
            span.set_status(Status(StatusCode.ERROR, type(answer.reply).__name__))
        inside = trace.set_span_in_context(span)
        for phase in _PHASES:
            child = self._tracer.start_span(phase, inside, start_time=at)
            at += round(1e9 * seconds[phase])
            child.end(min(at, ended))
        span.end(ended)

    def close(self) -> None:
        self._provider.shutdown()
