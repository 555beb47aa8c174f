"""Who acts in an episode: a server's policy, the simulator's expert, or now the one and now the other."""

import dataclasses
import textwrap
import time
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.base_policy import BasePolicy
from PIL import Image, ImageDraw

from openpi_like.robots.sims.sim import Expert, Sim
from openpi_like.serve.dialects import Served
from openpi_like.serve.takeover import TakeOver

Who = Literal["server", "expert", "corrected"]
GREY = 128  # of the pictures that a blind policy is given
SILENCE = "do it"


@dataclasses.dataclass(frozen=True)
class Senses:
    """What of an observation a policy is not given, or otherwise: baselines, and tests of what it listens to.

    blind: pictures are grey. deaf: whatever the task, it is told `SILENCE`. words: task -> instructions instead of the
    simulator's own; seeds take turns.
    """

    blind: bool = False
    deaf: bool = False
    words: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = [f"words of {task!r}: none" for task, of in self.words.items() if not of]
        if self.deaf and self.words:
            problems.append("deaf, and words; expected one of them")
        if problems:
            raise ValueError("Senses: " + "; ".join(problems))

    def of(self, observation: Mapping[str, Any], task: str, seed: int) -> dict[str, Any]:
        """Returns an observation (`Sim.observe`) as the policy is given it."""
        seen = dict(observation)
        if self.blind:
            seen["images"] = {name: np.full_like(picture, GREY) for name, picture in seen["images"].items()}
        if self.deaf:
            seen["prompt"] = SILENCE
        if task in self.words:
            seen["prompt"] = self.words[task][seed % len(self.words[task])]
        return seen


class Camera(BasePolicy):
    """Looks only when the server is really asked: an `ActionChunkBroker` asks once per chunk, and drawing is slow.

    seen: the observation of this step, where something else has already looked. step: of the episode, as the pilot
    counts. thoughts: see `openpi_like.serve.evaluation.Episode`.
    """

    def __init__(self, policy: BasePolicy, sim: Sim, served: Served, senses: Senses, task: str, seed: int) -> None:
        """served: how the server is asked."""
        self._policy, self._sim, self.served = policy, sim, served
        self._senses, self._task, self._seed = senses, task, seed
        self.latency_ms: list[float] = []
        self.seen: dict[str, Any] | None = None
        self.step, self.thoughts = 0, list[tuple[int, str]]()

    def infer(self, obs: dict) -> dict:
        seen = self._senses.of(self.seen or self._sim.observe(), self._task, self._seed)
        message = self.served.message(seen)
        started = time.perf_counter()
        reply = self._policy.infer(message)
        self.latency_ms.append(1e3 * (time.perf_counter() - started))
        if "actions" not in reply:
            raise ValueError(f"the server's answer has no actions, it has {sorted(reply)}")
        actions = np.asarray(reply["actions"])
        if actions.ndim != 2 or len(actions) < self.served.execute_steps:
            raise ValueError(
                f"the server answered with actions of shape {actions.shape}, expected a chunk of at least "
                f"{self.served.execute_steps}, of which so many are executed"
            )
        if (thought := reply.get("thought")) is not None and [thought] != [text for _, text in self.thoughts[-1:]]:
            self.thoughts.append((self.step, thought))
        return {"actions": actions}


class Pilot:
    """Chooses the actions of one episode: the policy's, the expert's, or, corrected, now the ones, now the others."""

    def __init__(self, who: Who, sim: Sim, seed: int, camera: Camera | None, takeover: TakeOver):
        """camera: of the policy, None where the expert acts alone."""
        self._who, self._sim, self._seed, self._takeover, self.camera = who, sim, seed, takeover, camera
        self._expert: Expert | None = None
        if camera is not None:
            self._broker = ActionChunkBroker(camera, action_horizon=camera.served.execute_steps)

    def act(self, step: int, seen: dict[str, Any] | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns an action, and what the policy proposed where it acts. seen: the observation, where there is one."""
        helps = self._who == "corrected" and self._takeover.expert_acts(step, self._sim.max_steps, self._seed)
        if self.camera is None or helps:
            if self._expert is None:  # it plans from where the robot is now
                self._expert = self._sim.expert(np.random.default_rng(self._seed), 0.0)
            return self._sim.robot.executed(self._expert.act()), None
        if self._expert is not None:
            self._expert = None
            self._broker.reset()  # what is left of its chunk was for where the robot was before
        self.camera.seen, self.camera.step = seen, step
        action = self._broker.infer({})["actions"]
        return action, action

    def shown(self, frame: np.ndarray) -> np.ndarray:
        """Returns a frame of the film: where the policy thinks, with what it acts by, if it is the one that acts."""
        if self.camera is None or not self.camera.served.thinks:
            return frame
        acts = self._expert is None and self.camera.thoughts
        return _captioned(frame, self.camera.thoughts[-1][1] if acts else "")


def _captioned(frame: np.ndarray, text: str) -> np.ndarray:
    """Returns a frame with a text below it, as much of it as there is room for."""
    lines = textwrap.wrap(text, frame.shape[1] // 6, max_lines=3, placeholder=" ...")
    picture = Image.new("RGB", (frame.shape[1], frame.shape[0] + 36))
    picture.paste(Image.fromarray(frame))
    ImageDraw.Draw(picture).multiline_text((3, frame.shape[0]), "\n".join(lines), spacing=1)
    return np.asarray(picture)
