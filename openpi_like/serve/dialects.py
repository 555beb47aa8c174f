"""How a server is asked for actions: in our own words, or as openpi's examples do.

openpi's server says nothing of robots, cameras or states in its handshake: what it takes depends on the config of its
policy. So its dialects name the keys, as its examples have them (openpi 2025, `examples/`), and how many actions of a
chunk are executed has to be said by who asks.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from openpi_client.image_tools import resize_with_pad

from openpi_like.config import near_names
from openpi_like.robots.robot import Robot
from openpi_like.serve.asked import asked_for, state_places


@dataclasses.dataclass(frozen=True)
class Served:
    """A robot as a server serves it.

    message: an observation (`Sim.observe`) -> what the server takes. execute_steps: of each chunk. renderer: of the
    pictures that the policy was trained on, None where it is not known. thinks: whether answers may hold what the
    policy wrote before it acted. begins_anew: whether a session can, see docs/wire.md.
    """

    message: Callable[[Mapping[str, Any]], dict[str, Any]]
    execute_steps: int
    renderer: str | None = None
    thinks: bool = False
    begins_anew: bool = False


class Dialect(Protocol):
    """One way to ask."""

    def served(self, metadata: Mapping[str, Any], robot: Robot, execute_steps: int | None) -> Served:
        """Returns how a server is asked for a robot. metadata: its handshake. execute_steps: None, as it says itself.

        Raises:
            ValueError: it does not serve this robot in this dialect, or does not say what is not given.
        """


class Own:
    """That of serve/policy_server.py: it is told nothing but what its handshake asks for."""

    def served(self, metadata: Mapping[str, Any], robot: Robot, execute_steps: int | None) -> Served:
        """See `Dialect.served`."""
        robots = metadata.get("robots")
        if not isinstance(robots, Mapping):
            others = " or ".join(name for name in DIALECTS if name != "own")
            raise ValueError(
                f"the server's handshake names no robots, it has {sorted(metadata)}: it is none of ours; say how it is "
                f"asked, with --dialect {others}"
            )
        if robot.name not in robots:
            raise ValueError(f"the server does not serve robot {robot.name!r}; {near_names(robot.name, list(robots))}")
        about = robots[robot.name]
        state_places(about["state"], robot)  # raises now what it would raise at the first request
        return Served(
            lambda observation: asked_for(observation, about, robot),
            execute_steps or about["execute_steps"],
            about["renderer"],
            thinks="think" in metadata.get("features", ()),
            begins_anew="reset" in metadata.get("features", ()),
        )


@dataclasses.dataclass(frozen=True)
class Flat:
    """Fixed keys.

    images: keys of the robot's cameras, in their order; it may have fewer. size: of a side of the pictures, which keep
    their proportions. channels_first: pictures are (3, size, size). nested: `/` in a key means a dict in a dict,
    otherwise it is a part of the key's name.
    """

    images: tuple[str, ...]
    state: str
    prompt: str
    size: int = 224
    channels_first: bool = False
    nested: bool = False

    def served(self, metadata: Mapping[str, Any], robot: Robot, execute_steps: int | None) -> Served:
        """See `Dialect.served`."""
        problems = []
        if "robots" in metadata:
            problems.append("the server's handshake names robots, so it is one of ours; leave --dialect out")
        if len(robot.cameras) > len(self.images):
            keys = ", ".join(self.images)
            problems.append(
                f"robot {robot.name!r} has {len(robot.cameras)} cameras, this dialect {len(self.images)} keys, {keys}"
            )
        if robot.entities:
            problems.append(f"robot {robot.name!r} has entities, for which this dialect has no key")
        if execute_steps is None:
            problems.append("this server does not say how many actions of a chunk are executed; say --execute-steps")
        if execute_steps is None or problems:
            raise ValueError("; ".join(problems))
        return Served(lambda observation: self._message(observation, robot), execute_steps)

    def _message(self, observation: Mapping[str, Any], robot: Robot) -> dict[str, Any]:
        said: dict[str, Any] = {}
        for camera, key in zip(robot.cameras, self.images, strict=False):
            picture = np.asarray(resize_with_pad(observation["images"][camera.name], self.size, self.size))
            self._put(said, key, np.ascontiguousarray(picture.transpose(2, 0, 1)) if self.channels_first else picture)
        self._put(said, self.state, observation["state"])
        self._put(said, self.prompt, observation["prompt"])
        return said

    def _put(self, said: dict[str, Any], key: str, value: Any) -> None:
        *folders, name = key.split("/") if self.nested else [key]
        for folder in folders:
            said = said.setdefault(folder, {})
        said[name] = value


DIALECTS: dict[str, Dialect] = {
    "own": Own(),
    "openpi_libero": Flat(
        images=("observation/image", "observation/wrist_image"), state="observation/state", prompt="prompt"
    ),
    "openpi_aloha": Flat(
        images=("images/cam_high", "images/cam_right_wrist", "images/cam_left_wrist", "images/cam_low"),
        state="state",
        prompt="prompt",
        channels_first=True,
        nested=True,
    ),
}
