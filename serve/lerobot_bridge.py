"""Lets serve/evaluate.py drive a policy of LeRobot's policy server: openpi's protocol in front, LeRobot's behind.

Runs where lerobot is installed, an environment of its own (made with lerobot 0.4.4; in this repository's folder):

    python -m venv ~/lerobot
    ~/lerobot/bin/pip install 'lerobot[async]==0.4.4' tyro -e .

With that environment's python, LeRobot's server, and beside it this program, with a folder that lerobot-train wrote:

    python -m lerobot.async_inference.policy_server --host=127.0.0.1 --port=8080 --inference_latency=0
    python serve/lerobot_bridge.py outputs/act/checkpoints/last/pretrained_model --port 8000

Then, with the trainer's:

    python serve/evaluate.py pusht --policy lerobot_act --dialect openpi_libero --execute-steps 8 --port 8000

A picture or state of the policy is the part of a message that ends in the same name: `observation.images.image` is
`observation/image`, `observation.state` is `observation/state`; --keys says otherwise. `prompt` is LeRobot's task.

Every request gets a new chunk, whole. LeRobot's server drops observations that are like the last one unless they "must
go", so all must. It has one policy and one queue for everybody, so requests take turns, and an answer to another
observation than the one just sent is an error. It looks at one observation, so policies that look at more cannot be
served. It unpickles whatever it is sent: keep it where nobody else can reach it.
"""

import contextlib
import dataclasses
import itertools
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from openpi_like.serve.protocol import MAX_MESSAGE_BYTES, pack, unpack

STATE, IMAGES = "observation.state", "observation.images."
PROMPT = "prompt"
START_S, LOAD_S = 20, 600  # until LeRobot's server is there; until it has loaded a policy


@dataclasses.dataclass(frozen=True)
class Args:
    """Answers in openpi's protocol with what LeRobot's policy server says.

    checkpoint: folder that lerobot-train wrote, or a name on the hub; LeRobot's server loads it. server: address of
    LeRobot's server. host, port: where this one listens; port 0 takes a free one. port_file: written with the port once
    it listens. keys: feature of the policy and the key it has in messages, where these do not end in the same name.
    device: where LeRobot's server computes. chunk: actions of an answer; default as many as the policy gives.
    timeout_s: longest wait for an answer.
    """

    checkpoint: Annotated[str, tyro.conf.Positional]
    server: str = "127.0.0.1:8080"
    host: str = "127.0.0.1"
    port: int = 8000
    port_file: Path | None = None
    keys: dict[str, str] = dataclasses.field(default_factory=dict)
    device: str = "cpu"
    chunk: int | None = None
    timeout_s: float = 60.0


class ServerError(RuntimeError):
    """LeRobot's server is not there, refused, or answered what does not fit."""


# ---- Observations ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Observations:
    """What a policy of LeRobot looks at, and where a message has it.

    cameras: name -> height and width. state: its size. keys: feature -> key of a message, where that is not the one
    that ends in the same name.
    """

    cameras: Mapping[str, tuple[int, int]]
    state: int
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, config: Any, keys: Mapping[str, str]) -> "Observations":
        """Returns those of a policy. config: LeRobot's.

        Raises:
            ValueError: LeRobot's server cannot give the policy what it looks at, or `keys` names something else.
        """
        shapes = {name: tuple(feature.shape) for name, feature in config.input_features.items()}
        cameras = {n.removeprefix(IMAGES): s[1:] for n, s in shapes.items() if n.startswith(IMAGES)}
        others = sorted(n for n in shapes if n != STATE and not n.startswith(IMAGES))
        problems = []
        if others:
            problems.append(f"the policy looks at {', '.join(others)}, which LeRobot's server does not give it")
        if STATE not in shapes:
            problems.append(f"the policy looks at no {STATE}, without which LeRobot's server does not work")
        if config.n_obs_steps > 1:
            problems.append(f"the policy looks at {config.n_obs_steps} observations, LeRobot's server gives it one")
        if unknown := sorted(set(keys) - set(shapes)):
            problems.append(f"--keys names {', '.join(unknown)}, the policy looks at {', '.join(sorted(shapes))}")
        if problems:
            raise ValueError("; ".join(problems))
        return cls(cameras, shapes[STATE][0], keys)

    def features(self) -> dict[str, dict[str, Any]]:
        """Returns what LeRobot's server takes an observation apart by, in LeRobot's words."""
        axes = ["height", "width", "channels"]
        features = {
            IMAGES + name: {"dtype": "image", "shape": (*size, 3), "names": axes} for name, size in self.cameras.items()
        }
        return {STATE: {"dtype": "float32", "shape": (self.state,), "names": self._joints()}, **features}

    def raw(self, message: Any) -> dict[str, Any]:
        """Returns an observation as robots of LeRobot give it, where every number of the state has a name.

        Raises:
            ValueError: the message lacks something, or it has another shape.
        """
        if not isinstance(message, dict):
            raise ValueError(f"a message that is a {type(message).__name__}, expected a dict of an observation")
        said, problems = _flat(message), []
        task = said.get(PROMPT)
        if not isinstance(task, str):
            problems.append(f"{PROMPT}: got {type(task).__name__}, expected a text")
        raw: dict[str, Any] = {"task": task}
        for feature in (STATE, *(IMAGES + name for name in self.cameras)):
            try:
                value = np.asarray(said[self._key(feature, said)])
                if feature == STATE:
                    raw |= zip(self._joints(), self._numbers(value), strict=True)
                else:
                    name = feature.removeprefix(IMAGES)
                    raw[name] = _picture(value, *self.cameras[name])
            except ValueError as e:
                problems.append(f"{feature}: {e}")
        if problems:
            raise ValueError("; ".join(problems))
        return raw

    def _joints(self) -> list[str]:
        return [f"state_{i}" for i in range(self.state)]

    def _key(self, feature: str, said: Mapping[str, Any]) -> str:
        ending = feature.rpartition(".")[2]
        if feature in self.keys:
            found, wanted = [key for key in said if key == self.keys[feature]], repr(self.keys[feature])
        else:
            found, wanted = [key for key in said if key.rpartition("/")[2] == ending], f"one that ends in {ending!r}"
        if len(found) != 1:
            raise ValueError(
                f"the message has {', '.join(sorted(said))}, expected {wanted}; say which it is, --keys {feature} KEY"
            )
        return found[0]

    def _numbers(self, state: np.ndarray) -> list[float]:
        if state.shape != (self.state,) or state.dtype.kind not in "fiu" or not np.isfinite(state).all():
            raise ValueError(
                f"{state.dtype} of shape {state.shape}, expected {self.state} finite numbers, as the policy was trained"
            )
        return [float(x) for x in state]


def _flat(message: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in message.items():
        flat |= _flat(value, f"{before}{key}/") if isinstance(value, dict) else {f"{before}{key}": value}
    return flat


def _picture(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns a picture (H, W, 3) with the proportions of the policy's, to whose size LeRobot's server resizes it.

    Clients of openpi keep the proportions and add black bars, which no picture of LeRobot's datasets has.
    """
    if picture.ndim == 3 and picture.shape[0] == 3 and picture.shape[2] != 3:
        picture = picture.transpose(1, 2, 0)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"{picture.dtype} of shape {picture.shape}, expected uint8 (H, W, 3) or (3, H, W), RGB")
    H, W = picture.shape[:2]
    shrunk = max(height / H, width / W)
    h, w = int(height / shrunk), int(width / shrunk)
    top, left = (H - h) // 2, (W - w) // 2
    bars = picture.copy()
    bars[max(top - 1, 0) : top + h + 1, max(left - 1, 0) : left + w + 1] = 0  # to a pixel, for rounding
    if bars.any():
        raise ValueError(
            f"{H} x {W} pixels without black bars, expected the proportions of the policy's {height} x {width}; "
            "a policy is asked with the pictures it was trained on"
        )
    return np.ascontiguousarray(picture[top : top + h, left : left + w])


# ---- LeRobot's server ------------------------------------------------------------------------------------------------


class LeRobotServer:
    """One policy of LeRobot's server, asked in lockstep: an observation, then the chunk for it."""

    def __init__(self, args: Args) -> None:
        """Connects, and has it load the policy.

        Raises:
            ServerError: it is not there, or could not load the policy.
            ValueError: lerobot is not installed here, there is no such checkpoint, or it cannot be asked.
        """
        try:
            import grpc
            from lerobot.async_inference import helpers
            from lerobot.configs.policies import PreTrainedConfig
            from lerobot.transport import services_pb2, services_pb2_grpc
            from lerobot.transport.utils import grpc_channel_options, send_bytes_in_chunks
        except ImportError as e:
            raise ValueError(
                f"{e}: this program runs where lerobot is; pip install 'lerobot[async]==0.4.4' tyro -e . in an "
                "environment of its own, and run it with that one's python"
            ) from e
        folder = Path(args.checkpoint).absolute()
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise ValueError(
                f"no config.json in {folder}; lerobot-train writes RUN/checkpoints/last/pretrained_model, give that"
            )
        checkpoint = str(folder) if folder.is_dir() else args.checkpoint
        config = PreTrainedConfig.from_pretrained(checkpoint)
        self.observations = Observations.of(config, args.keys)
        self._actions = config.output_features["action"].shape[0]
        self._lost, self._helpers, self._messages = grpc.RpcError, helpers, services_pb2
        self._in_parts, self._timeout_s, self._server = send_bytes_in_chunks, args.timeout_s, args.server
        self._stub = services_pb2_grpc.AsyncInferenceStub(grpc.insecure_channel(args.server, grpc_channel_options()))
        self._turn, self._numbers = threading.Lock(), itertools.count()
        chunk = args.chunk or getattr(config, "chunk_size", None) or config.n_action_steps
        setup = helpers.RemotePolicyConfig(
            policy_type=config.type,
            pretrained_name_or_path=checkpoint,
            lerobot_features=self.observations.features(),
            actions_per_chunk=chunk,
            device=args.device,
        )
        with self._asking("start python -m lerobot.async_inference.policy_server first, or say where with --server"):
            self._stub.Ready(self._messages.Empty(), timeout=START_S, wait_for_ready=True)
        with self._asking("it did not load the policy; its log says more"):
            self._stub.SendPolicyInstructions(services_pb2.PolicySetup(data=pickle.dumps(setup)), timeout=LOAD_S)

    def infer(self, message: Any) -> np.ndarray:
        """Returns a chunk of actions (A, J) for an observation of openpi's protocol.

        Raises:
            ValueError: the observation is not as the policy needs it.
            ServerError: the server is gone, or gave no chunk for it.
        """
        raw = self.observations.raw(message)
        with self._turn:
            number = next(self._numbers)
            observation = self._helpers.TimedObservation(
                timestamp=time.time(), timestep=number, observation=raw, must_go=True
            )
            parts = self._in_parts(pickle.dumps(observation), self._messages.Observation)
            with self._asking("see its log; if it was started anew, start this program anew too"):
                self._stub.SendObservations(parts, timeout=self._timeout_s)
                answer = self._stub.GetActions(self._messages.Empty(), timeout=self._timeout_s)
        if not answer.data:
            raise ServerError(
                f"LeRobot's server at {self._server} gave no actions: it logs what goes wrong in its policy and says "
                "nothing of it here; see its log, and if it was started anew, start this program anew too"
            )
        timed = pickle.loads(answer.data)
        if timed[0].get_timestep() != number:
            raise ServerError(
                f"LeRobot's server answered observation {timed[0].get_timestep()}, expected {number}: another client "
                "asks it too; give this program a server of its own"
            )
        actions = np.stack([np.asarray(action.get_action(), np.float32) for action in timed])
        if actions.shape[1:] != (self._actions,) or not np.isfinite(actions).all():
            raise ServerError(
                f"LeRobot's server answered with actions of shape {actions.shape}, expected finite ones of "
                f"{self._actions} numbers; is the checkpoint damaged?"
            )
        return actions

    @contextlib.contextmanager
    def _asking(self, advice: str) -> Iterator[None]:
        try:
            yield
        except self._lost as e:
            raise ServerError(f"LeRobot's server at {self._server}: {e.code().name}, {e.details()}; {advice}") from e


# ---- openpi's protocol -----------------------------------------------------------------------------------------------


def talk(connection: ServerConnection, infer: Callable[[Any], np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Answers a client until it leaves. What is wrong is answered with a text, after which it may go on."""
    with contextlib.suppress(ConnectionClosed):
        connection.send(pack(metadata))
        for message in connection:
            started = time.perf_counter()
            try:
                if isinstance(message, str):
                    raise ValueError("a message of text, expected msgpack, as openpi-client sends it")
                actions = infer(unpack(message))
            except (ValueError, ServerError) as e:
                connection.send(str(e))
                continue
            took = {"infer_ms": 1e3 * (time.perf_counter() - started)}
            connection.send(pack({"actions": actions, "server_timing": took}))


def main(args: Args) -> None:
    """Answers until it is ended."""
    server = LeRobotServer(args)
    metadata = {"policy": args.checkpoint}

    def handle(connection: ServerConnection) -> None:
        talk(connection, server.infer, metadata)

    with serve(handle, args.host, args.port, compression=None, max_size=MAX_MESSAGE_BYTES) as listening:
        port = listening.socket.getsockname()[1]
        print(f"{args.checkpoint} of LeRobot's server at {args.server} answers at {args.host}:{port}", flush=True)
        if args.port_file is not None:
            temporary = args.port_file.with_suffix(".tmp")
            temporary.write_text(str(port))
            temporary.replace(args.port_file)
        listening.serve_forever()


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, ServerError) as e:
        sys.exit(str(e))
    except KeyboardInterrupt:
        pass
