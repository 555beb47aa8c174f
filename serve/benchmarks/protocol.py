"""What the clients beside this file have in common: the server, chunks of actions, episodes, the command line.

They run in the environments of their benchmarks: Python 3.8 or newer, numpy, the benchmark, and the PyPI packages
openpi-client and typing_extensions (which openpi-client imports without asking for it). Nothing else of this repository
is needed; copy the folder. Any server of openpi's protocol will do, in one of two forms:

- ours, whose handshake has "robots": a dict with robot, images, state and prompt, as the handshake asks for them;
- openpi's own, whose handshake says nothing of it: flat keys such as "observation/image", see `Flat`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from benchmark_results import FIELDS, FRAMES, BenchmarkError, Films, append_line, read_lines, success_rates, write_about

FLAT_SIZE = (224, 224)
"""Height and width that openpi's examples send (openpi, examples/libero/main.py, `resize_size`)."""


@dataclasses.dataclass
class Observation:
    """What a simulator shows. images: by camera, uint8 (H, W, 3), RGB. state: by field, floats (n,), in the order in
    which they stand in a state that is one array. prompt: the instruction."""

    images: dict[str, np.ndarray]
    state: dict[str, np.ndarray]
    prompt: str


class Simulator:
    """A benchmark: its tasks, its conventions, and the episode that runs.

    robots: names of robots of ours that have these cameras, state and actions. keys: of the flat form, see `Flat`.
    sizes: height and width by camera of what a server of ours gets that asks for none. squash: whether images change
    their aspect ratio where they are resized; else they are padded, as in openpi. renderer: what simulates and draws.
    execute_steps: actions of a chunk that are executed, as published. horizon: control steps of an episode at most.
    stage: changes where the rest of a chunk is for something that is over, such as the instruction before. success: of
    the episode as it stands. ended: nothing more will be executed. ours: whether a server of ours is asked.
    """

    robots: tuple[str, ...] = ()
    keys: dict[str, str] = {}  # noqa: RUF012
    sizes: dict[str, tuple[int, int]] = {}  # noqa: RUF012
    squash = False
    renderer = ""
    execute_steps = 1
    horizon = 0
    stage: Any = None
    success = False
    ended = False
    ours = False

    def tasks(self) -> dict[str, int]:
        """Returns how many initial states each task has, in the order in which they are run."""
        raise NotImplementedError

    def reset(self, task: str, seed: int) -> None:
        """Begins an episode from the initial state of this number."""
        raise NotImplementedError

    def observe(self) -> Observation:
        """Returns what the policy is shown."""
        raise NotImplementedError

    def step(self, action: np.ndarray) -> None:
        """Executes one action of the policy, (7,)."""
        raise NotImplementedError

    def frame(self) -> np.ndarray:
        """Returns a picture for the film, uint8 (H, W, 3)."""
        raise NotImplementedError

    def measures(self) -> dict[str, float]:
        """Returns what is measured beside success."""
        return {}

    def summary(self, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        """Returns the results as texts. lines: of the file of results, those of this run."""
        return success_rates(lines)


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def axis_angle(quaternion: Sequence[float] | np.ndarray) -> np.ndarray:
    """Returns the rotation vector, rad (3,), of a unit quaternion x, y, z, w, as robosuite has it.

    The angle is 2 acos(w), from 0 to 2 pi, and not the shorter way round: what LIBERO's policies were trained on.
    Source: `_quat2axisangle` of openpi, examples/libero/main.py; `quat2axisangle` of openvla-oft, libero_utils.py.
    """
    x, y, z, w = (float(v) for v in quaternion)
    w = min(1.0, max(-1.0, w))
    sine = math.sqrt(1.0 - w * w)
    if math.isclose(sine, 0.0):
        return np.zeros(3)
    return np.array([x, y, z]) * 2.0 * math.acos(w) / sine


def resized(image: np.ndarray, size: tuple[int, int], squash: bool) -> np.ndarray:
    """Returns an image, uint8 (H, W, 3), in another size (height, width).

    squash: the aspect ratio may change, with a Lanczos filter as octo's client of SimplerEnv has it; else black bars
    are added, as openpi does.
    """
    if image.shape[:2] == tuple(size):
        return np.ascontiguousarray(image)
    if squash:
        from PIL import Image

        height, width = size
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
    from openpi_client import image_tools

    return image_tools.resize_with_pad(np.ascontiguousarray(image), *size)


def check_shapes(observation: Mapping[str, Any], table: Mapping[str, tuple[tuple[int, ...], str]], what: str) -> None:
    """Compares an observation with what this benchmark gives. table: by path, shape and the first letter of the dtype.

    Raises:
        BenchmarkError: lists everything that is missing or different.
    """
    problems = []
    for path, (shape, kind) in table.items():
        value: Any = observation
        for part in path.split("/"):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            problems.append(f"{path}: missing, expected shape {shape}")
        elif np.shape(value) != shape or np.asarray(value).dtype.kind != kind:
            x = np.asarray(value)
            problems.append(f"{path}: got shape {x.shape} of {x.dtype}, expected {shape} of kind {kind!r}")
    if problems:
        raise BenchmarkError(
            f"an observation of {what} is not as it was when this client was written:\n  "
            + "\n  ".join(problems)
            + "\n  look for another version of the package, or for options that it was made with; a policy that is "
            "shown something else is not evaluated"
        )


def recorded(table: Mapping[str, tuple[tuple[int, ...], str]], random: np.random.RandomState) -> dict[str, Any]:
    """Returns an observation of noise with the shapes of a table, see `check_shapes`."""
    made: dict[str, Any] = {}
    for path, (shape, kind) in table.items():
        *above, last = path.split("/")
        at = made
        for part in above:
            at = at.setdefault(part, {})
        at[last] = random.randint(0, 256, shape).astype(np.uint8) if kind == "u" else random.uniform(0, 1, shape)
    return made


# ---- The server ------------------------------------------------------------------------------------------------------


class Ours:
    """The form of a server of this repository: what its handshake asks for of a robot, under the robot's name."""

    def __init__(self, robots: Mapping[str, Any], sim: Simulator, robot: str | None, size: int | None) -> None:
        """robots: of the handshake. robot: which of them, by default one that the benchmark names. size: overrides.

        Raises:
            BenchmarkError: it serves none that fits, or one that asks for more than the benchmark shows.
        """
        found = [robot] if robot is not None else [name for name in sim.robots if name in robots]
        if not found or found[0] not in robots:
            wanted = f"{robot!r}" if robot is not None else f"one of {', '.join(sim.robots)}"
            raise BenchmarkError(
                f"the server serves the robots {', '.join(robots)}, expected {wanted}; serve a policy that was trained "
                "on data of this benchmark, or name its robot with --robot if its fields are as docs/evaluation.md says"
            )
        self.robot, self._about, self._sim, self._size = found[0], robots[found[0]], sim, size
        self.execute_steps = int(self._about.get("execute_steps") or sim.execute_steps)
        if self._about.get("plans") or self._about.get("entities"):
            raise BenchmarkError(f"robot {self.robot!r} is one that drives (plans, entities); serve a policy of an arm")

    def message(self, observation: Observation) -> dict[str, Any]:
        """Returns a request.

        Raises:
            BenchmarkError: the server asks for a camera or a field that there is not.
        """
        cameras, fields = self._about["cameras"], [(str(name), int(size)) for name, size, *_ in self._about["state"]]
        if unknown := [name for name in cameras if name not in observation.images]:
            raise BenchmarkError(
                f"the server asks for the cameras {', '.join(unknown)} of {self.robot!r}, the benchmark shows "
                f"{', '.join(observation.images)}; serve a policy that was trained with these alone"
            )
        images = {}
        for name, asked in cameras.items():
            size = (self._size, self._size) if self._size else tuple(asked or self._sim.sizes[name])
            images[name] = resized(observation.images[name], (int(size[0]), int(size[1])), self._sim.squash)
        state = self._state(fields, observation.state)
        return {"robot": self.robot, "images": images, "state": state, "prompt": observation.prompt}

    def _state(self, fields: list[tuple[str, int]], state: Mapping[str, np.ndarray]) -> np.ndarray:
        whole = np.concatenate([*state.values(), np.zeros(0)])
        if len(fields) == 1 and fields[0][1] == len(whole):  # one field with all of them
            return whole.astype(np.float32)
        if wrong := [f"{name}:{size}" for name, size in fields if len(state.get(name, ())) != size]:
            raise BenchmarkError(
                f"the server asks for the state {', '.join(wrong)} of {self.robot!r}, the benchmark has "
                f"{', '.join(f'{name}:{len(x)}' for name, x in state.items())}; name the fields of the robot so"
            )
        return np.concatenate([*(state[name] for name, _ in fields), np.zeros(0)]).astype(np.float32)


class Flat:
    """The form of openpi's own server: flat keys.

    keys: from what it is to where it goes: a camera, "state" (all fields one behind the other), a field of the state or
    several as "hand+gripper", where "pad" is a zero, "prompt".
    """

    def __init__(self, keys: Mapping[str, str], sim: Simulator, size: int | None) -> None:
        self._keys, self._sim, self._size = keys, sim, (size, size) if size else FLAT_SIZE
        self.robot, self.execute_steps = (sim.robots or ("flat",))[0], sim.execute_steps

    def message(self, observation: Observation) -> dict[str, Any]:
        """Returns a request.

        Raises:
            BenchmarkError: a key says of a camera or field that there is not.
        """
        sent: dict[str, Any] = {}
        for what, key in self._keys.items():
            if what == "prompt":
                sent[key] = observation.prompt
            elif what in observation.images:
                sent[key] = resized(observation.images[what], self._size, self._sim.squash)
            else:
                fields = {**observation.state, "pad": np.zeros(1)}
                names = list(observation.state) if what == "state" else what.split("+")
                if unknown := [name for name in names if name not in fields]:
                    raise BenchmarkError(
                        f"--keys: no {', '.join(unknown)}; the benchmark has the cameras "
                        f"{', '.join(observation.images)}, the state {', '.join(observation.state)}, and prompt"
                    )
                sent[key] = np.concatenate([fields[name] for name in names]).astype(np.float32)
        return sent


class Pilot:
    """Asks a policy for chunks and hands out their actions. latency_ms, thoughts: of the episode so far."""

    def __init__(self, infer: Callable[[dict[str, Any]], Any], form: Ours | Flat, execute_steps: int | None) -> None:
        """execute_steps: actions of a chunk that are executed before the next is asked for; the server's by default."""
        self._infer, self._form = infer, form
        self.execute_steps = form.execute_steps if execute_steps is None else execute_steps
        self.robot = form.robot
        self.begin()

    def begin(self) -> None:
        """Begins an episode."""
        self._left: list[np.ndarray] = []
        self._stage: Any = None
        self.latency_ms: list[float] = []
        self.thoughts: list[tuple[int, str]] = []

    def act(self, step: int, sim: Simulator) -> np.ndarray:
        """Returns the next action, (7,); looks only where a new chunk is asked for.

        Raises:
            BenchmarkError: the chunk is too short, or its actions have another size or are not finite.
        """
        if not self._left or sim.stage != self._stage:
            message = self._form.message(sim.observe())
            started = time.perf_counter()
            reply = self._infer(message)
            self.latency_ms.append(round(1e3 * (time.perf_counter() - started), 3))
            self._left, self._stage = self._chunk(reply), sim.stage
            thought = reply.get("thought")
            if thought is not None and [thought] != [text for _, text in self.thoughts[-1:]]:
                self.thoughts.append((step, str(thought)))
        return self._left.pop(0)

    def _chunk(self, reply: Mapping[str, Any]) -> list[np.ndarray]:
        actions = np.asarray(reply.get("actions"), dtype=np.float64)
        if actions.ndim != 2 or actions.shape[1] != 7:
            raise BenchmarkError(
                f"the server answered with actions of shape {actions.shape}, expected (A, 7): hand (3), its rotation "
                "(3), gripper; serve a policy of this benchmark"
            )
        if len(actions) < self.execute_steps:
            raise BenchmarkError(
                f"the server answered with {len(actions)} actions, expected {self.execute_steps} or more; "
                f"give --execute-steps {len(actions)}"
            )
        if not np.isfinite(actions).all():
            raise BenchmarkError("the server answered with actions that are not finite; look at its checkpoint")
        return list(actions[: self.execute_steps])


@contextlib.contextmanager
def connected(args: argparse.Namespace) -> Iterator[tuple[Callable[[dict[str, Any]], Any], dict[str, Any]]]:
    """Yields what asks the server, and its handshake.

    Raises:
        BenchmarkError: there is no openpi-client, or no server.
    """
    try:
        from openpi_client.websocket_client_policy import WebsocketClientPolicy
        from websockets.exceptions import ConnectionClosed, WebSocketException
    except ImportError as e:
        raise BenchmarkError(f"{e}; run: pip install openpi-client typing_extensions") from e
    where = args.host if args.host.startswith("ws") else f"{args.host}:{args.port}"
    try:
        client = WebsocketClientPolicy(args.host, None if args.host.startswith("ws") else args.port, args.api_key)
    except (OSError, WebSocketException) as e:
        raise BenchmarkError(f"no policy server at {where} ({e}); start it first, see docs/serving.md") from e

    def infer(message: dict[str, Any]) -> Any:
        try:
            return client.infer(message)
        except ConnectionClosed as e:
            raise BenchmarkError(f"the policy server at {where} is gone ({e}); start it and run this again") from e
        except RuntimeError as e:  # as openpi-client hands on what the server says
            raise BenchmarkError(str(e).replace("Error in inference server:\n", "the policy server says ")) from e

    try:
        yield infer, client.get_server_metadata()
    finally:
        client._ws.close()


# ---- Episodes --------------------------------------------------------------------------------------------------------


def drive(sim: Simulator, pilot: Pilot, task: str, seed: int, label: str, films: Films) -> dict[str, Any]:
    """Runs one episode and returns its line of results. label: what the policy is called there."""
    sim.reset(task, seed)
    pilot.begin()
    frames: list[np.ndarray] = []
    filmed, steps = films.wants(task), 0
    for step in range(sim.horizon):
        if sim.ended:
            break
        steps += not sim.success
        action = pilot.act(step, sim)
        if filmed and step % max(1, sim.horizon // FRAMES) == 0:
            frames.append(sim.frame())
        sim.step(action)
    success = bool(sim.success)
    if frames and not success:
        films.keep(task, seed, [*frames, sim.frame()])
    about = (pilot.robot, task, label, seed, success, int(steps), sim.renderer)
    return dict(zip(FIELDS, (*about, pilot.latency_ms, 0, pilot.thoughts, sim.measures())))


def todo(sim: Simulator, args: argparse.Namespace) -> list[tuple[str, int]]:
    """Returns the episodes that are asked for, task after task, each with initial states from 0 on.

    Raises:
        BenchmarkError: there is no such task, or more episodes are asked for than it has initial states.
    """
    tasks = sim.tasks()
    if unknown := [task for task in args.tasks or () if task not in tasks]:
        raise BenchmarkError(f"no tasks {', '.join(unknown)}; there are:\n  " + "\n  ".join(tasks))
    wanted = []
    for task in args.tasks or tasks:
        n = tasks[task] if args.episodes is None else args.episodes
        if n > tasks[task]:
            raise BenchmarkError(
                f"--episodes {n}: {task} has {tasks[task]} initial states; more would repeat them, and count them twice"
            )
        wanted += [(task, seed) for seed in range(n)]
    return wanted


def run(sim: Simulator, args: argparse.Namespace, say: Callable[[str], None] = print) -> None:
    """Runs all episodes that the file of results does not have yet, and says the success rates of all.

    Raises:
        BenchmarkError: see there; what has been run is in the file.
    """
    wanted, films = todo(sim, args), Films(args.films, args.films_per_task)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = {(line["task"], line["seed"]): line for line in read_lines(args.out)}
    if others := sorted({line["policy"] for line in lines.values()} - {args.label}):
        raise BenchmarkError(f"{args.out} has results of {', '.join(others)}; give another --out for {args.label!r}")
    with connected(args) as (infer, handshake):
        pilot = Pilot(infer, form_of(handshake, sim, args), args.execute_steps)
        how = {
            "dialect": "own" if sim.ours else "flat",
            "execute_steps": pilot.execute_steps,
            "seed": args.seed,
            "keys": args.keys,
            "image_size": args.image_size,
            "max_steps": {pilot.robot: sim.horizon},
            "renderers": {pilot.robot: sim.renderer},
            "server": {name: value for name, value in handshake.items() if name != "robots"},
        }
        write_about(args.out, how, sum(job not in lines for job in wanted))
        say(f"{len(wanted)} episodes as robot {pilot.robot!r}, {pilot.execute_steps} actions of each chunk")
        for i, (task, seed) in enumerate(wanted):
            if (task, seed) in lines:
                continue
            if "reset" in (
                handshake.get("features") or ()
            ):  # the same noise for an episode, whatever was run before it
                infer({"reset": True, "seed": (args.seed + seed) % 2**32})
            line = drive(sim, pilot, task, seed, args.label, films)
            append_line(args.out, line)
            lines[task, seed] = line
            ended = f"{'success' if line['success'] else 'failure'} in {line['steps']} steps"
            say(f"{i + 1}/{len(wanted)} {task} {seed}: {ended}")
    for text in sim.summary([lines[job] for job in wanted]):
        say(text)


def form_of(handshake: Mapping[str, Any], sim: Simulator, args: argparse.Namespace) -> Ours | Flat:
    """Returns the form in which a server is asked, and tells the simulator, whose actions may differ by it."""
    sim.ours = bool(handshake.get("robots"))
    if sim.ours:
        return Ours(handshake["robots"], sim, args.robot, args.image_size)
    return Flat(args.keys or sim.keys, sim, args.image_size)


def dry_run(sim: Simulator, executed: Sequence[Any], args: argparse.Namespace) -> None:
    """Runs one episode of a simulator of noise with a policy of noise, and prints what is sent and what is executed.

    executed: to which the simulator appends the commands that it is given.
    """
    task, random = next(iter(args.tasks or sim.tasks())), np.random.RandomState(0)
    flat = form_of({}, sim, args)
    sim.reset(task, 0)
    seen = sim.observe()
    about = {
        "cameras": {name: None for name in seen.images},
        "state": [[name, len(x), ""] for name, x in seen.state.items()],
    }
    name = args.robot or (sim.robots or ("my_robot",))[0]
    ours = Ours({name: about}, sim, name, args.image_size)
    for whose, form in (("openpi's own server", flat), ("a server of ours that asks for everything", ours)):
        print(f"sent to {whose}:")
        for path, value in _paths(form.message(seen)):
            print(f"  {path}: " + (f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else repr(value)))
    pilot = Pilot(lambda message: {"actions": random.uniform(-1, 1, (16, 7))}, flat, args.execute_steps)
    before = len(executed)
    line = drive(sim, pilot, task, 0, args.label or "noise", Films(None, 0))
    commands = executed[before:]
    print(f"executed, of {len(commands)} commands after {pilot.execute_steps} actions of each chunk:")
    for i in sorted({0, 1, len(commands) - 2, len(commands) - 1}):
        print(f"  {i}: {np.array2string(np.asarray(commands[i]), precision=3, suppress_small=True)}")
    print(f"line of results:\n  {json.dumps({**line, 'latency_ms': line['latency_ms'][:1]})}")


def _paths(message: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    nested = [
        _paths(value, f"{above}{name} > ") if isinstance(value, dict) else [(above + name, value)]
        for name, value in message.items()
    ]
    return [pair for pairs in nested for pair in pairs]


# ---- The command line ------------------------------------------------------------------------------------------------


def base_parser(description: str) -> argparse.ArgumentParser:
    """Returns the options that all clients have."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--host", default="127.0.0.1", help="of the policy server, or ws://HOST:PORT/POLICY")
    p.add_argument("--port", type=int, default=8000)
    p.add_argument("--api-key", default=None)
    p.add_argument("--label", default=None, help="what the policy is called in the results")
    p.add_argument(
        "--out", type=Path, default=None, help="file of results, one line per episode; run again, it goes on"
    )
    p.add_argument("--tasks", nargs="+", default=None, help="default: all")
    p.add_argument("--episodes", type=int, default=None, help="per task; default: as published")
    p.add_argument("--seed", type=int, default=7, help="of the simulator and of the policy's noise")
    p.add_argument("--execute-steps", type=int, default=None, help="of a chunk; default: the server's, or as published")
    p.add_argument("--robot", default=None, help="of the server, where its name is not the usual one")
    p.add_argument("--keys", type=key, nargs="+", default={}, metavar="WHAT=KEY", action=_Keys, help="of the flat form")
    p.add_argument("--image-size", type=int, default=None, help="side of what is sent; default: the server's wish")
    p.add_argument("--films", type=Path, default=None, help="folder for films of failures")
    p.add_argument("--films-per-task", type=int, default=3)
    p.add_argument("--dry-run", action="store_true", help="one episode of noise, with no server and no simulator")
    return p


def key(text: str) -> tuple[str, str]:
    """Parses WHAT=KEY."""
    what, sign, name = text.partition("=")
    if not (what and sign and name):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected WHAT=KEY such as base=observation/image")
    return what, name


class _Keys(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, dict(values))


def parsed(parser: argparse.ArgumentParser, words: Iterable[str] | None = None) -> argparse.Namespace:
    """Returns the options of a run; those that only a real run needs are demanded of it."""
    args = parser.parse_args(None if words is None else list(words))
    if not args.dry_run and (args.out is None or args.label is None):
        parser.error("--label and --out are needed, or --dry-run")
    if args.execute_steps is not None and args.execute_steps < 1:
        parser.error(f"--execute-steps {args.execute_steps}: expected 1 or more")
    return args
