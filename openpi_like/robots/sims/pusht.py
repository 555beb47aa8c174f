"""PushT (gym-pusht, after Chi et al. 2023, Diffusion Policy): push the T onto its green outline with a disc."""

import itertools
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from openpi_like.robots.pusht import PUSHT
from openpi_like.robots.sims.sim import Sim, SlowNoise, check_action, prompt_of

PROMPTS = {"push-t": ("push the T onto the green outline",)}

_SIZE = 512.0  # px, of the world
_DISC = 15.0  # px, radius of the disc


class PushTSim(Sim):
    """See `Sim`. A seed is a position of the disc and a pose of the T; the outline never moves."""

    robot = PUSHT
    tasks = tuple(PROMPTS)
    max_steps = 300
    # px. Little: the later actions of a chunk answer to disturbances that nobody can foresee; to wander is learned too.
    noises: tuple[float, ...] = (0.0, 4.0)
    renderer = "pygame"

    def __init__(self) -> None:
        self.success = False
        self.env = _make_env()
        self._prompt = ""

    def reset(self, task: str, seed: int) -> None:
        """See `Sim.reset`."""
        self._prompt = prompt_of(PROMPTS, task, seed, self.robot)
        self.env.reset(seed=seed)
        self.success = False

    @property
    def disc(self) -> np.ndarray:
        """(2,) position of the disc, in px."""
        return np.array(self.env.agent.position)

    @property
    def block_pose(self) -> np.ndarray:
        """(3,) position in px and angle in rad of the T; privileged."""
        return np.array([*self.env.block.position, self.env.block.angle])

    def observe(self) -> dict[str, Any]:
        """See `Sim.observe`."""
        camera = self.robot.cameras[0]
        return {
            "images": {camera.name: self.frame(camera.height or 0)},
            "state": self.disc.astype(np.float32),
            "prompt": self._prompt,
        }

    def step(self, action: Float[np.ndarray, "2"]) -> None:
        """See `Sim.step`."""
        _, _, done, _, _ = self.env.step(np.clip(check_action(action, self.robot), 0.0, _SIZE))
        self.success = self.success or bool(done)

    def frame(self, size: int) -> UInt8[np.ndarray, "size size 3"]:
        """See `Sim.frame`."""
        import pygame

        screen = pygame.transform.smoothscale(self.env._draw(), (size, size))  # averages; the package's own aliases
        return np.ascontiguousarray(pygame.surfarray.array3d(screen).transpose(1, 0, 2))

    def expert(self, rng: np.random.Generator, noise: float) -> "PushTExpert":
        """See `Sim.expert`."""
        return PushTExpert(self, rng, noise)


# px on the way to a push that a target lies ahead; the disc moves half of that per control step. Quick, so that a chunk
# holds a whole way and its push: where every chunk chooses anew on the way, a policy wavers between pushes as good.
_AHEAD = 50.0
_ARRIVED = 5.0  # px from the start of a push
_LONGEST_WAY = 60  # control steps
_PUSHES = 14  # longest push, in control steps
_COARSE, _FINE = 16.0, 4.0  # px per control step while pushing
_FINE_COST = 12.0  # px; below it the T is nearly in place and pushes are short steps
# px per control step, on the way and while pushing: of equally good pushes the quickest, so that the one begun remains
# the best of all, and what to do can be told from where disc and T are.
_COARSE_STEP_COST, _FINE_STEP_COST = 1.0, 0.1
_LEAST_GAIN = 0.05  # px
_ANGLES = (0.0,)  # rad, of a push to the normal
_SPACING = 40.0  # px, of starts along the outline
_CLEARANCE = 6.0  # px between disc and T before a push
_MOVED = 3.0  # px; the T was bumped on the way, so plan again
_MEMORY = 0.8  # correlation of the noise from one control step to the next
_CALM, _WILD = 20.0, 100.0  # px from the start of a push, between which the noise grows
# The T in its own frame: a bar of 120 x 30 px and a stem of 30 x 90 px below it.
_OUTLINE = np.array([(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)], float)


class PushTExpert:
    """Greedy search over straight pushes, tried in a second copy of the simulator.

    Every push starts at the middle of one of twelve pieces of the T's outline, and goes straight in: so few that a
    policy can learn which is the best. Of those that bring the T's corners nearer to their goal, the one that brings
    them nearest in the fewest steps, the way to it included, is executed, after going there around the T.
    """

    def __init__(self, sim: PushTSim, rng: np.random.Generator, noise: float) -> None:
        self._sim, self._rng, self._noise = sim, rng, noise
        self._trial = _make_env()
        self._trial.reset(seed=0)
        for shape in self._trial.space.shapes:
            shape.collision_type = 1  # the package counts contacts of type 0, in Python, at every step
        self._goal = _to_world(_OUTLINE, sim.env.goal_pose)
        self.doing = ""
        self._targets = self._plan_and_move()
        self._drift, self._way_left = SlowNoise(2, _MEMORY), 0.0

    def act(self) -> Float[np.ndarray, "2"]:
        """See `Expert.act`."""
        return np.clip(next(self._targets), 0.0, _SIZE).astype(np.float32)

    def disturb(self, action: Float[np.ndarray, "2"]) -> Float[np.ndarray, "2"]:
        """Slowly varying noise on the way to a push; see `Expert.disturb`.

        So the disc is seen at many places around the T, where a policy that wavers finds itself too. A push is as it
        should be, since the T would be anywhere after it.
        """
        sigma = self._noise * float(np.interp(self._way_left, (_CALM, _WILD), (0.0, 1.0)))
        return np.clip(action + sigma * self._drift.next(self._rng), 0.0, _SIZE).astype(np.float32)

    def _plan_and_move(self) -> Iterator[np.ndarray]:
        sim = self._sim
        while True:
            pose = sim.block_pose
            push = None
            if not sim.success:
                push = self._best_push(pose, _ANGLES) or self._best_push(pose, self._rng.uniform(-0.6, 0.6, 3))
            if push is None:
                self.doing = "stay"
                yield sim.disc  # done, or no push helps: stay
                continue
            start, step, count = push
            self.doing = "go around the T"
            yield from self._go(start, pose)
            self._way_left = 0.0
            if self._moved(pose):
                continue
            self.doing = "push the T"
            for k in range(1, count + 1):
                yield start + k * step
            self.doing = "let go of the T"
            yield sim.disc - 12.0 * step / np.linalg.norm(step)  # let go

    def _moved(self, pose: np.ndarray) -> bool:
        return bool(np.linalg.norm(self._sim.block_pose[:2] - pose[:2]) > _MOVED)

    def _go(self, goal: np.ndarray, pose: np.ndarray) -> Iterator[np.ndarray]:
        """Targets on a way to `goal` that avoids the T; ends early if the T was bumped."""
        way, coarse = _Way([self._sim.disc, *self._route(self._sim.disc, goal, pose)]), self._cost(pose) >= _FINE_COST
        for _ in range(_LONGEST_WAY):
            left = float(np.linalg.norm(goal - self._sim.disc))
            if left < _ARRIVED:
                return
            self._way_left = left if coarse else 0.0
            yield way.ahead(self._sim.disc, _AHEAD)
            if self._moved(pose):
                return

    def _best_push(self, pose: np.ndarray, angles: Iterable[float]) -> tuple[np.ndarray, np.ndarray, int] | None:
        """Returns (start, step per control step, number of steps) of the best push, or None if none helps.

        angles: to the outline's normal, in rad.
        """
        now = self._cost(pose)
        fine = now < _FINE_COST
        best: float = np.inf
        push = None
        step_cost, speed = _FINE_STEP_COST if fine else _COARSE_STEP_COST, _AHEAD / 2  # px per control step
        outline = _to_world(_OUTLINE, pose)
        for point, normal in _perimeter(outline):
            for angle in angles:
                c, s = np.cos(angle), np.sin(angle)
                direction = -np.array([c * normal[0] - s * normal[1], s * normal[0] + c * normal[1]])
                start = point - direction * (_DISC + _CLEARANCE)
                if not np.all((start > 16) & (start < _SIZE - 16)):
                    continue
                step = direction * (_FINE if fine else _COARSE)
                self._place(pose, start)
                reached = []  # cost and steps, after each step of the push
                for k in range(1, _PUSHES + 1):
                    target = start + k * step
                    if not np.all((target > 10) & (target < _SIZE - 10)):
                        break
                    self._try(target)
                    block = self._trial.block
                    cost = self._cost(np.array([*block.position, block.angle]))
                    reached.append((cost + step_cost * (k - 1), k))
                    if cost > now + 25:
                        break
                least, count = min(reached, default=(np.inf, 0))
                straight = float(np.linalg.norm(start - self._sim.disc))  # the way there takes longer to compute
                if least < now - _LEAST_GAIN and least + step_cost * straight / speed < best:
                    least += step_cost * self._length(start, pose) / speed
                    if least < best:
                        best, push = least, (start, step, count)
        return push

    def _cost(self, pose: np.ndarray) -> float:
        """Mean distance of the T's corners from where they belong, in px."""
        off = _to_world(_OUTLINE, pose) - self._goal
        return float(np.sqrt((off * off).sum(axis=1)).sum() / len(off))

    def _place(self, pose: np.ndarray, disc: np.ndarray) -> None:
        block, agent, space = self._trial.block, self._trial.agent, self._trial.space
        block.velocity, block.angular_velocity = (0.0, 0.0), 0.0
        block.angle = float(pose[2])  # before the position: it turns about the centre of gravity
        block.position = (float(pose[0]), float(pose[1]))
        agent.position, agent.velocity = (float(disc[0]), float(disc[1])), (0.0, 0.0)
        space.reindex_shapes_for_body(block)
        space.reindex_shapes_for_body(agent)

    def _try(self, target: np.ndarray) -> None:
        """One control step of the copy, without the coverage that the package computes: that takes most of the time."""
        env, agent = self._trial, self._trial.agent
        (x, y), (px, py), (vx, vy), dt = target.tolist(), agent.position, agent.velocity, env.dt
        for _ in range(round(1 / (dt * env.control_hz))):
            vx, vy = vx + (env.k_p * (x - px) - env.k_v * vx) * dt, vy + (env.k_p * (y - py) - env.k_v * vy) * dt
            agent.velocity = (vx, vy)
            env.space.step(dt)
            px, py = px + vx * dt, py + vy * dt  # nothing pushes the disc back; to read it would take longer

    def _length(self, goal: np.ndarray, pose: np.ndarray) -> float:
        """Of the way from the disc to `goal`, in px."""
        way = [self._sim.disc, *self._route(self._sim.disc, goal, pose)]
        return float(sum(np.linalg.norm(b - a) for a, b in itertools.pairwise(way)))

    def _route(self, start: np.ndarray, goal: np.ndarray, pose: np.ndarray) -> list[np.ndarray]:
        """Points to pass on the way: straight if the T is not in between, else along a circle around it."""
        from shapely.geometry import LineString, Polygon

        block = Polygon(_to_world(_OUTLINE, pose))
        grown, touched = block.buffer(_DISC + 1.5), block.buffer(_DISC + 0.5)
        straight = LineString([start, goal])
        if not straight.crosses(grown) and not straight.within(grown):
            return [goal]
        centre = np.array(block.centroid.coords[0])
        angles = [np.arctan2(*(p - centre)[::-1]) for p in (start, goal)]
        turn = (angles[1] - angles[0] + np.pi) % (2 * np.pi) - np.pi
        routes = []
        for sweep in (turn, turn - np.sign(turn) * 2 * np.pi):
            count = max(1, int(abs(sweep) / 0.5))
            around = angles[0] + sweep * np.arange(count + 1) / count
            circle = centre + 115.0 * np.stack([np.cos(around), np.sin(around)], axis=1)
            points = [*np.clip(circle, 12.0, _SIZE - 12.0), goal]
            legs = [LineString(leg) for leg in itertools.pairwise([start, *points])]
            bumps = sum(leg.intersection(touched).length for leg in legs)
            routes.append((sum(leg.length for leg in legs) + 8.0 * bumps, points))
        return min(routes, key=lambda r: r[0])[1]


class _Way:
    """A polyline that is followed by aiming at the point of it that lies some way ahead."""

    def __init__(self, points: list[np.ndarray]) -> None:
        from shapely.geometry import LineString

        self._line, self._done = LineString(points), 0.0

    def ahead(self, disc: np.ndarray, distance: float) -> np.ndarray:
        """Returns the point that lies `distance` px further along the way than the disc, which never goes back."""
        from shapely.geometry import LineString, Point
        from shapely.ops import substring

        rest = substring(self._line, self._done, min(self._done + 2 * distance, self._line.length))
        if isinstance(rest, LineString):
            self._done += rest.project(Point(*disc))
        return np.array(self._line.interpolate(self._done + distance).coords[0])


def _to_world(points: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """(N, 2) points in the T's frame -> the world's, for a pose (x, y, angle)."""
    c, s = np.cos(pose[2]), np.sin(pose[2])
    return points @ np.array([[c, s], [-s, c]]) + pose[:2]


def _perimeter(outline: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The middles of pieces of about `_SPACING` along the outline, each with its outward unit normal."""
    for a, b in itertools.pairwise([*outline, outline[0]]):
        length = np.linalg.norm(b - a)
        along = (b - a) / length
        count = max(1, round(length / _SPACING))
        for i in range(count):
            yield a + (b - a) * (i + 0.5) / count, np.array([along[1], -along[0]])


def _make_env() -> Any:
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the packages
        from gym_pusht.envs.pusht import PushTEnv

        return PushTEnv(obs_type="state")
