"""A policy server that runs beside a test."""

import asyncio
import contextlib
import dataclasses
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from openpi_like.robots.robot import ActionField, Camera, Robot, StateField
from openpi_like.serve.observation import check_observation, check_previous, robot_of
from openpi_like.serve.policies import Policies
from openpi_like.serve.policy import Reply
from openpi_like.serve.ranges import Ranges
from openpi_like.serve.server import PolicyServer


@dataclasses.dataclass
class Row:
    """A request as it was sent."""

    observation: Any
    lane: None = None
    pictures: dict[str, Any] = dataclasses.field(default_factory=dict)
    robot: Any = None

    @property
    def state(self) -> Any:
        return self.observation["state"]


class Stub:
    """A policy that answers each observation with what a function returns.

    batches: sizes of those it was asked for. noise: seed of the session and number of each request.
    """

    def __init__(self, infer: Callable[[Any], Any], metadata: dict[str, Any] | None = None, max_batch: int = 4) -> None:
        self._infer, self._metadata = infer, {"robots": {"r": {}}} if metadata is None else metadata
        self.batches: list[int] = []
        self.noise: list[tuple[int | None, int]] = []
        self.most, self.ranges = max_batch, Ranges()
        self.thinks, self.think_every = False, 1

    def metadata(self) -> dict[str, Any]:
        return self._metadata

    def prepare(self, observation: Any, *, number: int, seed: int | None) -> Any:
        self.noise.append((seed, number))
        return Row(observation, robot=ARM)

    def sample(self, requests: Sequence[Any]) -> list[Any]:
        self.batches.append(len(requests))
        return [Reply(self._infer(request.observation)) for request in requests]


ARM = Robot(
    name="arm",
    cameras=(Camera("base", "image", 24, 32), Camera("wrist", "wrist", 24, 32)),
    state=(StateField("joints", "state", 2, unit="rad"), StateField("gripper", "state", 1, start=2)),
    action=(ActionField("joints", "action", 2, unit="rad"), ActionField("gripper", "action", 1, start=2)),
    control_hz=10.0,
    action_horizon=4,
    execute_steps=2,
)


def arm_observation(value: float, prompt: str = "push", **more: Any) -> dict[str, Any]:
    """Returns an observation of `ARM` whose state begins with a value."""
    colour = np.full((24, 32, 3), (200, 40, 40), np.uint8)
    state = np.array([value, 0.5, 1.0], np.float32)
    return {"images": {"base": colour, "wrist": colour[..., ::-1]}, "state": state, "prompt": prompt, **more}


class Arm(Stub):
    """A policy of `ARM` that checks observations as others do; its chunks count up from the state."""

    def __init__(self) -> None:
        fields = {name: [[f.name, f.size, f.unit] for f in getattr(ARM, name)] for name in ("state", "action")}
        about = {"cameras": {c.name: [c.height, c.width] for c in ARM.cameras}, **fields}
        super().__init__(lambda observation: None, {"robots": {"arm": about}})

    def prepare(self, observation: Any, *, number: int, seed: int | None) -> Any:
        robot = robot_of(observation, {ARM.name: ARM})
        pictures = check_observation(observation, robot, {c.name: c for c in robot.cameras})
        check_previous(observation, robot, 3)
        return Row(observation, pictures=pictures, robot=robot)

    def sample(self, requests: Sequence[Any]) -> list[Any]:
        rows = np.linspace(0, 1, 4, dtype=np.float32)[:, None]
        return [Reply(rows + r.state, ("actions were cut",)) for r in requests]


@contextlib.contextmanager
def serving(
    policy: Callable[[Any], Any] | Stub | Policies, *, grace_s: float = 5.0, **options: Any
) -> Iterator[PolicyServer]:
    """Runs a server on a free port, its event loop in a thread. grace_s: of its closing."""
    if not isinstance(policy, Stub | Policies):
        policy = Stub(policy)
    policies = policy if isinstance(policy, Policies) else Policies({"default": policy})
    server = PolicyServer(policies, port=0, **options)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.close(grace_s), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def get(server: PolicyServer, path: str, **headers: str) -> tuple[int, str]:
    """Returns status and text of what a server answers over HTTP."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()
