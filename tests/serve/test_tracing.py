"""Spans of requests, as OpenTelemetry's own exporter gets them."""

import pytest

from openpi_like.serve.client import PolicyClient, ServerError
from tests.serve.running import Arm, Stub, arm_observation, serving

pytest.importorskip("opentelemetry.sdk")


class Failing(Arm):
    def sample(self, requests):
        if requests[0].observation["prompt"] == "crash":
            raise RuntimeError("secret")
        return super().sample(requests)


def test_every_request_is_a_span_with_its_phases():
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from opentelemetry.trace import StatusCode

    from openpi_like.serve.tracing import Tracing

    exporter = InMemorySpanExporter()
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    with serving(Failing(), listeners=[Tracing(exporter)]) as server:
        client = PolicyClient(port=server.port)
        client.infer({**arm_observation(1.0), "traceparent": parent})
        with pytest.raises(ServerError, match="internal"):
            client.infer(arm_observation(1.0, "crash"))
        with pytest.raises(ServerError, match="traceparent: got a int, expected a text"):
            client.infer({**arm_observation(1.0), "traceparent": 5})
        client.close()
    found = exporter.get_finished_spans()  # all were sent when the server closed
    requests = [s for s in found if s.name == "request"]
    assert [s.status.status_code for s in requests] == [StatusCode.UNSET, StatusCode.ERROR]
    assert requests[1].status.description == "RuntimeError"
    assert f"{requests[0].context.trace_id:032x}" == parent.split("-")[1]
    assert requests[0].attributes == {"session": 1, "policy": "default", "robot": "arm", "batch": 1}
    for request in requests:
        inside = [s for s in found if s.parent is not None and s.parent.span_id == request.context.span_id]
        assert [s.name for s in inside] == ["prepare", "queue", "infer"]
        ends = (t for s in inside for t in (s.start_time, s.end_time))
        times = [t for t in (request.start_time, *ends, request.end_time) if t is not None]
        assert len(times) == 8
        assert times == sorted(times)


def test_without_tracing_a_listener_that_fails_costs_no_reply(caplog):
    from openpi_like.serve.listeners import Listener

    class Broken(Listener):
        def answered(self, *_):
            raise RuntimeError("of a listener")

    with serving(Stub(lambda o: o["state"][None]), listeners=[Broken()]) as server:
        client = PolicyClient(port=server.port)
        assert client.infer(arm_observation(3.0))["actions"][0, 0] == 3.0
        client.close()
    assert "Broken failed at answered; the session goes on" in caplog.text
