"""The conversation without sockets: whatever a client sends, there is a reply, and nothing else happens."""

import asyncio
import logging
import random
import zlib
from typing import Any

import cv2
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_like.serve.answering import Answered, Answering
from openpi_like.serve.batching import Answer, Batcher, BusyError, LateError, StuckError
from openpi_like.serve.observation import MAX_PIXELS, ObservationError
from openpi_like.serve.policy import Reply, Thought
from openpi_like.serve.protocol import MAX_DEPTH, ProtocolError, pack, unpack
from openpi_like.serve.ranges import RangeError
from openpi_like.serve.session import FEATURES, Ask, Reset, Session, failure
from tests.serve.fuzzing import mutated
from tests.serve.running import Arm, Stub, arm_observation

OBSERVATION = {
    "images": {"base": np.zeros((4, 4, 3), np.uint8)},
    "state": np.array([1.0, 2.0], np.float32),
    "prompt": "go",
    "id": 7,
    "deadline_ms": 50,
}
SOUND = [
    pack(arm_observation(1.0, id=7, deadline_ms=50)),
    pack(arm_observation(1.0, previous=np.zeros((3, 3), np.float32), delay=2)),
    pack({"reset": True, "seed": 3, "success": False}),
    pack({"x": np.float32(1.5)}),
]
CODES = ("invalid", "range", "late", "busy", "closing", "internal")


@pytest.fixture
def session():
    return Session(lambda: Stub(lambda observation: observation["state"][None]), about={"policy": "p"})


def test_the_handshake_says_what_there_is(session):
    hello = unpack(session.hello())
    assert hello["features"] == [name for name in FEATURES if name != "think"]  # it writes nothing
    assert Session(Thinker).metadata()["features"] == list(FEATURES)
    assert (hello["policy"], hello["robots"]) == ("p", {"r": {}})


def test_a_request_is_asked_and_answered(session):
    ask = session.receive(pack(OBSERVATION), arrived=100.0)
    assert isinstance(ask, Ask)
    assert (ask.due, ask.id) == (100.05, 7)
    assert "id" not in ask.request.observation  # what is of the conversation does not reach the policy
    actions = np.ones((3, 2), np.float32)
    reply = unpack(session.answer(ask, Answer(Reply(actions, ("far",)), 0.25, 0.5, 3)))
    np.testing.assert_array_equal(reply["actions"], actions)
    assert (reply["id"], reply["warnings"]) == (7, ["far"])
    assert (reply["timing_ms"]["queue"], reply["timing_ms"]["infer"], reply["timing_ms"]["batch"]) == (250, 500, 3)
    assert session.answer(ask, Answer(LateError("waited 60 ms"), 0.06, 0.0, 0)) == "late: waited 60 ms"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ObservationError("a"), "invalid"),
        (ProtocolError("a"), "invalid"),
        (RangeError("a"), "range"),
        (LateError("a"), "late"),
        (BusyError("a"), "busy"),
        (StuckError("a"), "closing"),
    ],
)
def test_errors_are_a_code_and_a_sentence(error, code):
    assert failure(error) == f"{code}: a"


def test_errors_that_nobody_foresaw_are_in_the_log_alone(caplog):
    said = failure(KeyError("secret"))
    assert said.startswith("internal: internal error, incident ")
    assert "secret" not in said
    assert said.split()[4].rstrip(";") in caplog.text
    assert "secret" in caplog.text


def _has_a_reply(message):
    session = Session(Arm)
    reply = session.receive(message)
    assert isinstance(reply, str | Ask | Reset)
    assert not isinstance(reply, str) or reply.partition(":")[0] in CODES[:-1]
    assert isinstance(session.receive(SOUND[0]), Ask)  # whatever came before


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200) | st.text(max_size=50))
def test_any_message_has_a_reply(message):
    _has_a_reply(message)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(SOUND), st.integers(0, 2**32 - 1))
def test_any_message_that_is_nearly_right_has_a_reply(message, seed):
    """Bytes changed, cut, repeated and inserted; tests/bench/fuzz_server.py tries 100,000 of them."""
    _has_a_reply(mutated(message, random.Random(seed)))


def test_messages_that_say_they_are_large_cost_nothing(session, caplog):
    """Headers of maps, lists and bytes of gigabytes; and depth."""
    caplog.set_level(logging.ERROR)
    for data in (b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"):
        assert session.receive(data).startswith("invalid: not a msgpack message")
    deep: dict[str, Any] = {"x": []}
    for _ in range(MAX_DEPTH):
        deep = {"x": deep}
    assert session.receive(msgpack.packb(deep)) == f"invalid: lists and dicts nested deeper than {MAX_DEPTH}"
    for data in (b"x", b""):
        assert session.receive(msgpack.packb(msgpack.ExtType(4, data))).startswith("invalid: ")
    # A byte each, which would become objects of a hundred: 20 MB of them take no longer than the first thousand.
    for byte in (b"\x80", b"\x90"):
        many = b"".join(b"\xdc\x03\xe8" + byte * 1000 for _ in range(1000))
        assert session.receive(b"\xdc\x03\xe8" + many) == "invalid: more than 1000 lists and dicts in one message"
        assert session.receive(b"\xdd\x01\x00\x00\x00" + byte * 2**24).startswith("invalid: not a msgpack message")
    unknown = session.receive(pack({f"key{i}" + "x" * 1000: 1 for i in range(900)} | OBSERVATION))
    assert isinstance(unknown, Ask)  # this policy takes anything
    said = Session(Arm).receive(pack({f"key{i}" + "x" * 1000: 1 for i in range(900)} | OBSERVATION))
    assert isinstance(said, str)
    assert "and 895 more that are unknown" in said
    assert len(said) < 3000
    assert not caplog.records  # none of it is a fault of the server


def test_a_png_allocates_no_more_than_it_holds(session):
    """A part that says it has gigabytes, a second header, an animation: found by tests/bench/fuzz_decoder.py."""

    def part(kind, content, length=None):
        size = (len(content) if length is None else length).to_bytes(4)
        return size + kind + content + zlib.crc32(kind + content).to_bytes(4)

    def answered(data):
        o = arm_observation(1.0)
        return Session(Arm).receive(pack({**o, "images": {**o["images"], "wrist": data}}))

    whole = cv2.imencode(".png", np.zeros((24, 32, 3), np.uint8))[1].tobytes()
    assert isinstance(answered(whole), Ask)
    header, rest = whole[:33], whole[33:]
    huge = part(b"IHDR", (60_000).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0]))
    for data in (
        header + part(b"tEXt", b"x", 2**31 - 1) + rest,
        header + huge + rest,
        whole[:8] + huge + rest,
        header + part(b"acTL", (2).to_bytes(4) + bytes(4)) + rest,
        whole[:-1],
        whole[:40] + b"x" + whole[41:],
        whole[:20],
    ):
        said = answered(data)
        assert isinstance(said, str)
        assert "images['wrist']: not a picture, expected JPEG or PNG: png" in said
    assert f"png of 60000 x 60000, expected at most {MAX_PIXELS} pixels" in answered(whole[:8] + huge + rest)


def test_what_came_before_the_end_is_answered_and_what_comes_after_is_told() -> None:
    answering, arm = Answering(Batcher()), Arm()

    def ask(value: float) -> Any:
        return answering.answer(Session(lambda: arm), pack(arm_observation(value)), owner=value)

    async def converse() -> tuple[list[Answered], Answered]:
        under_way = [asyncio.create_task(ask(float(i))) for i in range(3)]
        await asyncio.sleep(0)  # each has handed in its message
        await asyncio.to_thread(answering.close)
        return await asyncio.gather(*under_way), await asyncio.wait_for(ask(3.0), timeout=10)

    before, after = asyncio.run(converse())
    assert [answered.code for answered in before] == ["ok"] * 3
    assert after.reply == "closing: the server is closing; connect again later"


class Thinker(Stub):
    """Answers, and counts what it wrote; a thought that it is given it acts by."""

    def __init__(self) -> None:
        super().__init__(lambda observation: observation["state"][None])
        self.thinks, self.think_every, self.written = True, 3, 0
        self.no_thought = Thought(np.zeros(2, np.int32), np.zeros(2, bool), "")

    def prepare(self, observation: Any, *, thought: Thought | None = None, **of: Any) -> Any:
        if thought is None:
            self.written += 1
        kept = thought or Thought(np.arange(2), np.ones(2, bool), f"thought {self.written}")
        row = super().prepare(observation, **of)
        row.thought = kept
        return row


def test_a_thought_is_kept_for_some_chunks_of_one_prompt() -> None:
    policies = [Thinker()]
    session = Session(lambda: policies[-1])

    def say(**more: Any) -> str:
        ask = session.receive(pack({**OBSERVATION, **more}))
        assert isinstance(ask, Ask)
        reply = Reply(np.ones((1, 2), np.float32), thought=ask.request.thought)
        return unpack(session.answer(ask, Answer(reply, 0.0, 0.0, 1)))["thought"]  # type: ignore[arg-type]

    assert [say() for _ in range(7)] == ["thought 1"] * 3 + ["thought 2"] * 3 + ["thought 3"]
    assert [say(prompt="stop"), say(prompt="stop"), say()] == ["thought 4", "thought 4", "thought 5"]
    assert [say(think=True), say(think=False), say(), say(think=False), say()] == ["thought 6"] * 4 + ["thought 7"]
    # What was asked for in vain is not acted by; nor is what was written for another robot, or by another policy.
    asked = session.receive(pack({**OBSERVATION, "prompt": "stop"}))
    assert isinstance(asked, Ask)
    assert session.answer(asked, Answer(LateError("late"), 0.0, 0.0, 1)).startswith("late")  # type: ignore[arg-type]
    assert [say(prompt="stop"), say(prompt="stop", robot="r")] == ["thought 9", "thought 10"]
    policies.append(Thinker())
    assert [say(prompt="stop", robot="r"), say(prompt="stop", robot="r")] == ["thought 1"] * 2
    policies.pop()
    assert say() == "thought 11"
    assert unpack(session.receive(pack({"reset": True})).reply) == {"reset": True}  # type: ignore[union-attr]
    assert say() == "thought 12"
    assert "think: got 3, expected true, false or nothing" in str(session.receive(pack({**OBSERVATION, "think": 3})))


def test_a_server_that_does_not_think_does_so_when_asked_to() -> None:
    policy = Thinker()
    policy.think_every = 0
    session = Session(lambda: policy)

    def say(**more: Any) -> str:
        ask = session.receive(pack({**OBSERVATION, **more}))
        assert isinstance(ask, Ask)
        reply = Reply(np.ones((1, 2), np.float32), thought=ask.request.thought)
        return unpack(session.answer(ask, Answer(reply, 0.0, 0.0, 1)))["thought"]  # type: ignore[arg-type]

    assert [say(), say(think=True), say(), say(think=False), say(think=True)] == ["", "thought 1", "", "", "thought 2"]


def test_policies_that_do_not_write_cannot_be_asked_to(session) -> None:
    said = session.receive(pack({**OBSERVATION, "think": True}))
    assert said.startswith("invalid: think: got True, but this policy writes no text before it acts")
