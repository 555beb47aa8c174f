"""The bridge to LeRobot's policy server: what it makes of observations, its lockstep, and what it says is wrong."""

import dataclasses
import enum
import pickle
import runpy
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openpi_client.image_tools import resize_with_pad
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.sync.client import connect
from websockets.sync.server import serve

from openpi_like.serve.protocol import unpack
from tests.conftest import REPOSITORY

BRIDGE = runpy.run_path(str(REPOSITORY / "serve" / "lerobot_bridge.py"), run_name="lerobot_bridge")
Args, LeRobotServer, Observations = BRIDGE["Args"], BRIDGE["LeRobotServer"], BRIDGE["Observations"]
ServerError = BRIDGE["ServerError"]
PICTURE = np.arange(12 * 16 * 3, dtype=np.uint8).reshape(12, 16, 3)
MESSAGE = {"observation/image": PICTURE, "observation/state": np.array([1.5, -2], np.float32), "prompt": "push"}
ONE = Observations({"image": (12, 16)}, 2)


# ---- LeRobot, made up ------------------------------------------------------------------------------------------------


class Code(enum.Enum):
    UNAVAILABLE, UNKNOWN = 14, 2


class RpcError(Exception):
    """As a call of gRPC fails."""

    def code(self) -> Code:
        return self.args[0]

    def details(self) -> str:
        return self.args[1]


@dataclasses.dataclass
class Message:
    """Any of LeRobot's messages."""

    data: bytes = b""


@dataclasses.dataclass
class RemotePolicyConfig:
    """What LeRobot's server is told of a policy."""

    policy_type: str
    pretrained_name_or_path: str
    lerobot_features: dict[str, Any]
    actions_per_chunk: int
    device: str


@dataclasses.dataclass
class TimedObservation:
    """An observation as LeRobot's server takes it."""

    timestamp: float
    timestep: int
    observation: dict[str, Any]
    must_go: bool


@dataclasses.dataclass
class TimedAction:
    """An action as LeRobot's server answers."""

    timestep: int
    action: Any

    def get_timestep(self) -> int:
        return self.timestep

    def get_action(self) -> Any:
        return self.action


class Server:
    """Answers as LeRobot's: with five actions, the state and the observation's number, or as a test has it.

    said: observations. fails: method -> error. late: answers are for the observation before.
    """

    def __init__(self) -> None:
        self.said: list[TimedObservation] = []
        self.setup: Any = None
        self.fails: dict[str, Exception] = {}
        self.answer: Any = lambda o: [TimedAction(o.timestep + i, self.action(o)) for i in range(5)]
        self.at_once = 0

    def action(self, o: TimedObservation) -> Any:
        return np.array([o.observation["state_0"], o.observation["state_1"]], np.float32)

    def _call(self, name: str, timeout: float) -> None:
        assert timeout > 0
        if name in self.fails:
            raise self.fails[name]

    def Ready(self, _: Any, timeout: float, wait_for_ready: bool) -> None:
        self._call("Ready", timeout)

    def SendPolicyInstructions(self, setup: Message, timeout: float) -> None:
        self._call("SendPolicyInstructions", timeout)
        self.setup = pickle.loads(setup.data)

    def SendObservations(self, parts: Iterator[Message], timeout: float) -> None:
        self._call("SendObservations", timeout)
        self.at_once += 1
        assert self.at_once == 1  # it has one queue for all
        self.said.append(pickle.loads(b"".join(part.data for part in parts)))

    def GetActions(self, _: Any, timeout: float) -> Message:
        self._call("GetActions", timeout)
        self.at_once -= 1
        answer = self.answer(self.said[-1])
        return Message(b"" if answer is None else pickle.dumps(answer))


@dataclasses.dataclass
class Feature:
    """Of a policy's config."""

    shape: tuple[int, ...]


def config_of(**changes: Any) -> types.SimpleNamespace:
    """Returns the config of an ACT."""
    inputs = {"observation.images.image": Feature((3, 12, 16)), "observation.state": Feature((2,))}
    values = {"type": "act", "n_obs_steps": 1, "chunk_size": 5, "n_action_steps": 3, "input_features": inputs}
    return types.SimpleNamespace(**{**values, "output_features": {"action": Feature((2,))}, **changes})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """A made-up server of LeRobot, with modules of lerobot that lead to it."""
    server = Server()

    def module(name: str, **members: Any) -> None:
        made = types.ModuleType(name)
        made.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, made)

    def in_parts(data: bytes, message: Any) -> Iterator[Message]:
        yield from (message(data[i : i + 100]) for i in range(0, len(data), 100))

    config = types.SimpleNamespace(from_pretrained=lambda checkpoint: config_of())
    for name in ("lerobot", "lerobot.async_inference", "lerobot.configs", "lerobot.transport"):
        module(name, __path__=[])
    module("grpc", RpcError=RpcError, insecure_channel=lambda address, options: address)
    module("lerobot.async_inference.helpers", RemotePolicyConfig=RemotePolicyConfig, TimedObservation=TimedObservation)
    module("lerobot.configs.policies", PreTrainedConfig=config)
    module("lerobot.transport.services_pb2", Empty=Message, PolicySetup=Message, Observation=Message)
    module("lerobot.transport.services_pb2_grpc", AsyncInferenceStub=lambda channel: server)
    module("lerobot.transport.utils", grpc_channel_options=list, send_bytes_in_chunks=in_parts)
    return server


# ---- Observations ----------------------------------------------------------------------------------------------------


def test_observations_are_told_in_lerobots_words() -> None:
    raw = ONE.raw(MESSAGE)
    assert {k: v for k, v in raw.items() if k != "image"} == {"task": "push", "state_0": 1.5, "state_1": -2}
    np.testing.assert_array_equal(raw["image"], PICTURE)
    features = ONE.features()
    assert features["observation.state"] == {"dtype": "float32", "shape": (2,), "names": ["state_0", "state_1"]}
    assert features["observation.images.image"]["shape"] == (12, 16, 3)
    with pytest.raises(ValueError, match="prompt: got NoneType, expected a text"):
        ONE.raw({k: v for k, v in MESSAGE.items() if k != "prompt"})


def test_keys_may_be_nested_or_of_other_names_and_pictures_channels_first() -> None:
    first = PICTURE.transpose(2, 0, 1)
    nested = ONE.raw({"images": {"image": first}, "state": MESSAGE["observation/state"], "prompt": "push"})
    np.testing.assert_array_equal(nested["image"], PICTURE)
    named = Observations({"front": (12, 16)}, 2, {"observation.images.front": "observation/image"})
    np.testing.assert_array_equal(named.raw(MESSAGE)["front"], PICTURE)


def test_black_bars_are_cut_off() -> None:
    """What is left has the policy's proportions, to whose size LeRobot's server resizes."""
    white = np.full((480, 640, 3), 255, np.uint8)
    sent = {**MESSAGE, "observation/image": np.asarray(resize_with_pad(white, 224, 224))}
    picture = Observations({"image": (480, 640)}, 2).raw(sent)["image"]
    assert picture.shape == (168, 224, 3)
    assert picture.min() == 255
    with pytest.raises(
        ValueError, match=r"224 x 224 pixels without black bars, expected the proportions of .* 48 x 64"
    ):
        Observations({"image": (48, 64)}, 2).raw({**MESSAGE, "observation/image": white[:224, :224]})


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no picture": ({"observation/image": None}, r"object of shape \(\), expected uint8"),
    "grey": ({"observation/image": PICTURE[..., 0]}, r"uint8 of shape \(12, 16\), expected uint8 \(H, W, 3\)"),
    "floats": ({"observation/image": PICTURE / 255}, r"float64 of shape \(12, 16, 3\), expected uint8"),
    "too short": ({"observation/state": np.zeros(1)}, r"shape \(1,\), expected 2 finite numbers"),
    "NaN": ({"observation/state": np.array([0, np.nan])}, "expected 2 finite numbers"),
    "text": ({"observation/state": np.array(["a", "b"])}, "expected 2 finite numbers"),
    "two of a name": ({"wrist/image": PICTURE}, r"wrist/image, expected one that ends in 'image'; .* --keys"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_an_observation_is_said(name: str) -> None:
    changes, said = WRONG[name]
    with pytest.raises(ValueError, match=said):
        ONE.raw({**MESSAGE, **changes})


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ValueError, match=r"observation.state: the message has prompt, .*; observation.images.image: "):
        ONE.raw({"prompt": "push"})
    with pytest.raises(ValueError, match="a message that is a list, expected a dict"):
        ONE.raw([1])


def test_a_policy_that_the_server_cannot_serve_is_refused() -> None:
    inputs = {"observation.image": Feature((3, 12, 16)), "observation.environment_state": Feature((4,))}
    with pytest.raises(ValueError, match=r"environment_state, observation.image, which .*; .* no observation.state"):
        Observations.of(config_of(input_features=inputs), {})
    with pytest.raises(ValueError, match="looks at 2 observations, LeRobot's server gives it one"):
        Observations.of(config_of(n_obs_steps=2), {})
    with pytest.raises(ValueError, match=r"--keys names observation.images.front, the policy looks at observation.im"):
        Observations.of(config_of(), {"observation.images.front": "observation/image"})


# ---- LeRobot's server ------------------------------------------------------------------------------------------------


def test_each_request_gets_the_chunk_for_it(server: Server, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    asked = LeRobotServer(Args(str(tmp_path)))
    assert server.setup == RemotePolicyConfig("act", str(tmp_path), ONE.features(), 5, "cpu")
    for _ in range(2):  # the second is like the first, and is answered all the same
        np.testing.assert_array_equal(asked.infer(MESSAGE), np.array([[1.5, -2]] * 5, np.float32))
    assert [(o.timestep, o.must_go) for o in server.said] == [(0, True), (1, True)]


def test_clients_take_turns(server: Server) -> None:
    """LeRobot's server has one queue: two that ask at once would be given each other's chunks."""
    asked, answers = LeRobotServer(Args("act")), dict[int, Any]()

    def ask(i: int) -> None:
        message = {**MESSAGE, "observation/state": np.array([i, 0], np.float32)}
        answers[i] = [asked.infer(message)[0, 0] for _ in range(20)]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: [i] * 20 for i in range(4)}


def test_no_lerobot_no_checkpoint_and_no_server(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"no config.json in .*; lerobot-train writes RUN/checkpoints/last"):
        LeRobotServer(Args(str(tmp_path)))
    server.fails["Ready"] = RpcError(Code.UNAVAILABLE, "connection refused")
    with pytest.raises(ServerError, match=r"at h:1: UNAVAILABLE, connection refused; start python -m lerobot"):
        LeRobotServer(Args("act", server="h:1"))
    server.fails = {"SendPolicyInstructions": RpcError(Code.UNKNOWN, "Exception calling application: no such policy")}
    with pytest.raises(ServerError, match="no such policy; it did not load the policy; its log says more"):
        LeRobotServer(Args("act"))
    monkeypatch.setitem(sys.modules, "lerobot.async_inference", None)
    with pytest.raises(ValueError, match="this program runs where lerobot is; pip install"):
        LeRobotServer(Args("act"))


def test_answers_that_do_not_fit_are_errors(server: Server) -> None:
    asked = LeRobotServer(Args("act"))
    server.fails["GetActions"] = RpcError(Code.UNAVAILABLE, "socket closed")
    with pytest.raises(ServerError, match="UNAVAILABLE, socket closed; see its log; if it was started anew"):
        asked.infer(MESSAGE)
    server.fails, server.at_once, server.answer = {}, 0, lambda o: None  # what it says when its policy raised
    with pytest.raises(ServerError, match="gave no actions: it logs what goes wrong"):
        asked.infer(MESSAGE)
    server.answer = lambda o: [TimedAction(o.timestep - 1, np.zeros(2))]
    with pytest.raises(ServerError, match="answered observation 1, expected 2: another client asks it too"):
        asked.infer(MESSAGE)
    for action in (np.zeros(3), np.array([0, np.inf])):
        server.answer = lambda o, action=action: [TimedAction(o.timestep, action)]
        with pytest.raises(ServerError, match=r"shape \(1, .\), expected finite ones of 2 numbers"):
            asked.infer(MESSAGE)


# ---- openpi's protocol -----------------------------------------------------------------------------------------------


def test_clients_of_openpi_are_answered_and_go_on_after_an_error(server: Server) -> None:
    asked = LeRobotServer(Args("act"))
    with serve(lambda c: BRIDGE["talk"](c, asked.infer, {"policy": "act"}), "127.0.0.1", 0, compression=None) as bridge:
        thread = threading.Thread(target=bridge.serve_forever)
        thread.start()
        port = bridge.socket.getsockname()[1]
        client = WebsocketClientPolicy("127.0.0.1", port)
        assert client.get_server_metadata() == {"policy": "act"}
        with pytest.raises(RuntimeError, match="expected one that ends in 'state'"):
            client.infer({"observation/image": PICTURE, "prompt": "push"})
        reply = client.infer(MESSAGE)
        assert reply["actions"].shape == (5, 2)
        assert reply["server_timing"]["infer_ms"] > 0
        client._ws.close()
        with connect(f"ws://127.0.0.1:{port}") as other:
            assert unpack(other.recv(decode=False)) == {"policy": "act"}
            other.send("hello")
            assert "a message of text, expected msgpack" in other.recv()
            other.send(b"\xc1")
            assert "not a msgpack message" in other.recv()
        bridge.shutdown()
    thread.join()
