"""The clients of benchmarks, with fakes of the benchmarks' packages that have the shapes of their observations."""

import argparse
import ast
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import benchmark_results
import calvin_client
import libero_client
import numpy as np
import protocol
import pytest
import simpler_env_client
from benchmark_results import BenchmarkError, Films
from PIL import Image
from scipy.spatial.transform import Rotation

from openpi_like.provenance import provenance
from openpi_like.robots.oxe_franka import LIBERO
from openpi_like.robots.oxe_google import FRACTAL
from openpi_like.robots.robot import Robot
from openpi_like.serve.benchmark import collect
from openpi_like.serve.evaluation import Episode, read_episodes, success_rows, wilson
from openpi_like.serve.observation import check_observation, robot_of
from openpi_like.serve.policy import Reply
from tests.conftest import REPOSITORY
from tests.serve.running import Row, Stub, serving

FOLDER = Path(__file__).resolve().parents[2] / "serve" / "benchmarks"
FILES = sorted(FOLDER.glob("*.py"))


# ---- What they may use -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_they_are_python_3_8_and_need_little(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 8))
    found = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    benchmarks = {"libero", "simpler_env", "mani_skill2_real2sim", "calvin_agent", "calvin_env", "hydra", "omegaconf"}
    others = {p.stem for p in FILES} | {"numpy", "PIL", "openpi_client", "websockets"} | benchmarks
    assert found <= others | set(sys.stdlib_module_names)
    assert not {p.stem for p in FILES} & benchmarks  # else a program would import itself instead of its benchmark


def test_lines_of_results_are_episodes() -> None:
    assert tuple(f.name for f in dataclasses.fields(Episode)) == benchmark_results.FIELDS
    for k, n in ((45, 50), (0, 24), (20, 20)):
        assert benchmark_results.wilson(k, n) == wilson(k, n)


# ---- LIBERO ----------------------------------------------------------------------------------------------------------


class LiberoEnv:
    """Every pixel says where it is; succeeds after so many commands."""

    made: list["LiberoEnv"] = []  # noqa: RUF012
    commands_to_success = 10**6
    image_size = 256

    def __init__(self, bddl_file_name: str, camera_heights: int, camera_widths: int) -> None:
        self.file, self.size = bddl_file_name, (camera_heights, camera_widths)
        self.log: list[Any] = []
        self.made.append(self)

    def seed(self, seed: int) -> None:
        self.log.append(("seed", seed))

    def reset(self) -> None:
        self.log.append("reset")

    def set_init_state(self, state: Any) -> Any:
        self.log.append(("state", int(state[0])))
        self.steps = 0
        return self.look()

    def look(self) -> Any:
        n = self.image_size
        rows, columns = np.mgrid[:n, :n].astype(np.uint8)
        picture = np.stack([rows, columns, np.zeros_like(rows)], -1)
        return {
            "agentview_image": picture,
            "robot0_eye_in_hand_image": 255 - picture,
            "robot0_eef_pos": np.array([0.1, 0.2, 0.3]),
            "robot0_eef_quat": np.array([1.0, 0.0, 0.0, 0.0]),  # half a turn about x
            "robot0_gripper_qpos": np.array([0.04, -0.04]),
        }

    def step(self, action: list[float]) -> Any:
        self.log.append(action)
        self.steps += 1
        return self.look(), 0.0, self.steps >= self.commands_to_success, {}

    def close(self) -> None:
        self.log.append("close")


class LiberoSuite:
    n_tasks = 2

    def get_task(self, i: int) -> Any:
        name = ("lift_it", "drop_it")[i]
        files = {"problem_folder": "goal", "bddl_file": f"{name}.bddl"}
        return SimpleNamespace(name=name, language=name.replace("_", " "), **files)

    def get_task_init_states(self, i: int) -> Any:
        return np.arange(50)[:, None] + 100 * i


@pytest.fixture
def libero(monkeypatch: pytest.MonkeyPatch) -> type[LiberoEnv]:
    """LIBERO as far as it is used, in place of the package."""
    env = type("Env", (LiberoEnv,), {"made": []})
    package, inner, envs = ModuleType("libero"), ModuleType("libero.libero"), ModuleType("libero.libero.envs")
    suites = {suite: LiberoSuite for suite in libero_client.MAX_STEPS}
    benchmark = SimpleNamespace(get_benchmark_dict=lambda: suites)
    vars(inner).update(benchmark=benchmark, get_libero_path=lambda name: "/bddl")
    vars(envs).update(OffScreenRenderEnv=env)
    for name, module in (("libero", package), ("libero.libero", inner), ("libero.libero.envs", envs)):
        monkeypatch.setitem(sys.modules, name, module)
    return env


def _libero(suite: str = "libero_goal", gripper: str = "command") -> libero_client.Libero:
    return libero_client.Libero(suite, gripper, 7, libero_client.installed())


def test_libero_waits_turns_images_and_says_where_the_hand_is(libero: type[LiberoEnv]) -> None:
    sim = _libero()
    sim.reset("drop_it", 3)
    (env,) = libero.made
    assert (env.file, env.size) == ("/bddl/goal/drop_it.bddl", (256, 256))
    assert env.log == [("seed", 7), "reset", ("state", 103), *[[0, 0, 0, 0, 0, 0, -1]] * 10]
    seen = sim.observe()
    assert seen.images["base"][0, 0].tolist() == [255, 255, 0]  # was the last pixel
    assert seen.images["base"][10, 255].tolist() == [245, 0, 0]
    np.testing.assert_array_equal(seen.images["wrist"][::-1, ::-1], env.look()["robot0_eye_in_hand_image"])
    state = np.concatenate(list(seen.state.values()))
    np.testing.assert_allclose(state, [0.1, 0.2, 0.3, np.pi, 0, 0, 0.04, -0.04])
    assert list(seen.state) == [f.name for f in LIBERO.state]
    assert seen.prompt == "drop it"


def test_rotation_vectors_are_those_of_scipy_or_the_longer_way_round() -> None:
    random = np.random.RandomState(0)
    for quaternion in random.normal(size=(50, 4)):
        unit = quaternion / np.linalg.norm(quaternion)
        vector = protocol.axis_angle(unit)
        assert (Rotation.from_rotvec(vector).inv() * Rotation.from_quat(unit)).magnitude() < 1e-7
        if unit[3] > 0:
            np.testing.assert_allclose(vector, Rotation.from_quat(unit).as_rotvec(), atol=1e-9)
        else:
            assert np.pi < np.linalg.norm(vector) <= 2 * np.pi
    np.testing.assert_array_equal(protocol.axis_angle([0, 0, 0, 1]), np.zeros(3))
    np.testing.assert_array_equal(protocol.axis_angle([0, 0, 0, 1.0000001]), np.zeros(3))


@pytest.mark.parametrize(
    ("gripper", "said", "executed"),
    [("command", 0.3, 0.3), ("command", -1.0, -1.0), ("openness", 0.9, -1.0), ("openness", 0.1, 1.0)],
)
def test_libero_has_grippers_of_two_kinds(libero: type[LiberoEnv], gripper: str, said: float, executed: float) -> None:
    sim = _libero(gripper=gripper)
    sim.reset("lift_it", 0)
    sim.step(np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, said]))
    assert libero.made[0].log[-1] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, executed]


def test_libero_that_shows_something_else_is_refused(libero: type[LiberoEnv]) -> None:
    libero.image_size = 128
    with pytest.raises(BenchmarkError, match=r"(?s)agentview_image: got shape \(128, 128, 3\) .*another version"):
        _libero().reset("lift_it", 0)


def test_no_package_and_no_answer_to_its_question_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("libero", "simpler_env", "mani_skill2_real2sim", "calvin_agent"):
        monkeypatch.setitem(sys.modules, name, None)
    for install in (libero_client.installed, simpler_env_client.installed, lambda: calvin_client.installed(tmp_path)):
        with pytest.raises(BenchmarkError, match=r"is not installed here .*; see docs/evaluation.md, or try --dry-run"):
            install()


# ---- The server ------------------------------------------------------------------------------------------------------


class Policy(Stub):
    """Checks observations as the server does, and answers with the same chunk. seeds: that sessions were begun with."""

    def __init__(self, robot: Robot, chunk: np.ndarray, execute_steps: int = 4, **about: Any) -> None:
        fields = {name: [[f.name, f.size, f.unit] for f in getattr(robot, name)] for name in ("state", "action")}
        self.robot, self.chunk, self.seen, self.seeds = robot, chunk, list[Any](), list[Any]()
        cameras = {"cameras": {c.name: None for c in robot.cameras[:2]}, "execute_steps": execute_steps}
        super().__init__(lambda observation: None, {"robots": {robot.name: {**fields, **cameras, **about}}})

    def prepare(self, observation: Any, *, number: int, seed: int | None) -> Any:
        robot = robot_of(observation, {self.robot.name: self.robot})
        pictures = check_observation(observation, robot, {c.name: c for c in robot.cameras[:2]})
        self.seen.append(observation)
        self.seeds.append((seed, number))
        return Row(observation, pictures=pictures, robot=robot)

    def sample(self, requests: Any) -> list[Any]:
        return [Reply(self.chunk) for _ in requests]


CHUNK = np.linspace(-0.5, 0.5, 56, dtype=np.float32).reshape(8, 7)


def _args(tmp_path: Path, *more: str, parser: Any = libero_client.parser, **changes: Any) -> argparse.Namespace:
    needed = ["--suite", "libero_goal"] if parser is libero_client.parser else []
    args = protocol.parsed(parser(), [*needed, "--label", "mine", "--out", str(tmp_path / "out" / "r.jsonl"), *more])
    for name, value in changes.items():
        setattr(args, name, value)
    return args


def test_libero_is_driven_and_goes_on_where_it_was_stopped(libero: type[LiberoEnv], tmp_path: Path) -> None:
    libero.commands_to_success = 10 + 6
    policy, said = Policy(LIBERO, CHUNK), list[str]()
    with serving(policy) as server:
        args = _args(tmp_path, "--episodes", "2", port=server.port)
        protocol.run(_libero(), args, said.append)
        assert said[0] == "4 episodes as robot 'libero', 4 actions of each chunk"
        assert policy.seeds == [(7, 0), (7, 1), (8, 0), (8, 1)] * 2  # each episode has its own noise
        log = libero.made[0].log
        assert [x for x in log if x[0] == "state"] == [("state", 0), ("state", 1)]
        # Four actions of the first chunk, then two of the next one.
        np.testing.assert_allclose(log[13:19], np.concatenate([CHUNK[:4], CHUNK[:2]]), rtol=1e-6)
        whole = args.out.read_text()
        args.out.write_text(whole[: len(whole) - 30])  # the last line was cut off
        libero.made.clear()
        protocol.run(_libero(), args, said.append)
    assert [x for env in libero.made for x in env.log if x[0] == "state"] == [("state", 101)]
    episodes = read_episodes(args.out)
    assert [(e.robot, e.task, e.policy, e.seed, e.success, e.steps) for e in episodes] == [
        ("libero", task, "mine", seed, True, 6) for task in ("lift_it", "drop_it") for seed in (0, 1)
    ]
    assert [len(e.latency_ms) for e in episodes] == [2] * 4
    assert episodes[0].renderer == benchmark_results.versions(
        "libero", "hf-libero", "robosuite", "mujoco", "no-such-package"
    )
    assert benchmark_results.versions("numpy") == f"numpy {np.__version__}"
    assert [row["successes"] for row in success_rows(episodes)] == [2, 2]
    assert said[-4:-2] == [f"   2/2    100.0% [34.2%, 100.0%]  {task}" for task in ("lift_it", "drop_it")]
    assert said[-2] == "mean of the rates of 2 tasks: 100.0%"
    assert said[-1] == "   4/4    100.0% [51.0%, 100.0%]  all episodes together"
    sent = policy.seen[0]
    assert {name: x.shape for name, x in sent["images"].items()} == {"base": (256, 256, 3), "wrist": (256, 256, 3)}
    about = collect(tmp_path)["suites"]["out"]["policies"]["r"]["about"]  # as the benchmark page reads it
    assert [run["episodes"] for run in about["runs"]] == [4, 1]
    ours = provenance(REPOSITORY)
    same = ("command", "commit", "changed", "hardware", "date")
    assert {k: about["runs"][1][k] for k in same} == {k: ours[k] for k in same}
    assert about["max_steps"] == {"libero": libero_client.MAX_STEPS["libero_goal"]}
    with serving(policy) as server, pytest.raises(BenchmarkError, match=r"otherwise: seed was 7, is 8; give another"):
        protocol.run(_libero(), _args(tmp_path, "--seed", "8", port=server.port))
    args.out.with_suffix(".json").unlink()
    with serving(policy) as server, pytest.raises(BenchmarkError, match=r"no .*r.json says how the episodes of"):
        protocol.run(_libero(), _args(tmp_path, port=server.port))
    with pytest.raises(BenchmarkError, match=r"r.jsonl has results of mine; give another --out for 'other'"):
        protocol.run(_libero(), _args(tmp_path, "--label", "other"))


@pytest.mark.parametrize("given", [["--api-key", "secret"], ["--api-key=secret"]])
def test_a_key_is_not_written_beside_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["libero_client.py", *given, "--port", "1"])
    benchmark_results.write_about(tmp_path / "r.jsonl", {"seed": 7}, 1)
    text = (tmp_path / "r.json").read_text()
    assert "secret" not in text
    assert json.loads(text)["runs"][0]["command"].endswith(" --port 1")


@pytest.mark.parametrize(("suite", "most"), libero_client.MAX_STEPS.items())
def test_libero_stops_at_its_horizon(libero: type[LiberoEnv], suite: str, most: int) -> None:
    sim = _libero(suite)
    form = protocol.Flat(sim.keys, sim, None)
    pilot = protocol.Pilot(lambda message: {"actions": np.zeros((20, 7))}, form, 20)
    line = protocol.drive(sim, pilot, "lift_it", 0, "mine", Films(None, 0))
    assert (line["success"], line["steps"], len(line["latency_ms"])) == (False, most, most / 20)
    assert len([x for x in libero.made[0].log if isinstance(x, list)]) == 10 + most


def test_failures_are_filmed_and_no_more_than_were_asked_for(libero: type[LiberoEnv], tmp_path: Path) -> None:
    sim = _libero()
    sim.horizon = 20
    pilot = protocol.Pilot(lambda message: {"actions": np.zeros((20, 7))}, protocol.Flat(sim.keys, sim, None), 20)
    films = Films(tmp_path / "films", 1)
    for seed in (0, 1):
        protocol.drive(sim, pilot, "lift_it", seed, "mine", films)
    assert [path.name for path in (tmp_path / "films").iterdir()] == ["lift_it_0.gif"]
    with Image.open(tmp_path / "films" / "lift_it_0.gif") as film:
        assert film.size == (256, 256)


class OpenPi(Stub):
    """Says nothing of robots, and takes what it is given."""

    def __init__(self) -> None:
        super().__init__(lambda observation: CHUNK, {"some": "metadata"})
        self.seen: list[Any] = []

    def prepare(self, observation: Any, *, number: int, seed: int | None) -> Any:
        self.seen.append(observation)
        return super().prepare({"state": np.zeros(1, np.float32)}, number=number, seed=seed)


def test_openpi_gets_flat_keys(libero: type[LiberoEnv], tmp_path: Path) -> None:
    libero.commands_to_success = 10 + 7
    policy = OpenPi()
    with serving(policy) as server:

        def run(*more: str) -> None:
            protocol.run(_libero(), _args(tmp_path, "--episodes", "1", *more, port=server.port), lambda text: None)

        run("--tasks", "lift_it")
        run("--keys", "base=image", "hand+pad=state", "--image-size", "96", "--out", str(tmp_path / "other"))
        with pytest.raises(BenchmarkError, match="--keys: no wirst; the benchmark has the cameras base, wrist, the"):
            run("--keys", "wirst=x", "--out", str(tmp_path / "x"))
    assert len(policy.seen) == 2 + 2 * 2  # five actions of each chunk
    usual, own = policy.seen[0], policy.seen[2]
    assert {key: getattr(x, "shape", x) for key, x in usual.items()} == {
        "observation/image": (224, 224, 3),
        "observation/wrist_image": (224, 224, 3),
        "observation/state": (8,),
        "prompt": "lift it",
    }
    assert {key: x.shape for key, x in own.items()} == {"image": (96, 96, 3), "state": (4,)}
    (line,) = read_episodes(tmp_path / "out" / "r.jsonl")
    assert (line.robot, line.steps) == ("libero", 7)


def _refused(policy: Any, tmp_path: Path, *more: str) -> str:
    with serving(policy) as server, pytest.raises(BenchmarkError) as caught:
        protocol.run(_libero(), _args(tmp_path, "--episodes", "1", *more, port=server.port), lambda text: None)
    return str(caught.value)


def test_servers_that_do_not_fit_are_told_apart(libero: type[LiberoEnv], tmp_path: Path) -> None:
    text = _refused(Policy(FRACTAL, CHUNK), tmp_path)
    assert "the server serves the robots fractal, expected one of libero; serve a policy that was trained on" in text
    assert "expected 'my_arm'" in _refused(Policy(LIBERO, CHUNK), tmp_path, "--robot", "my_arm")
    text = _refused(Policy(FRACTAL, CHUNK), tmp_path, "--robot", "fractal")
    assert "asks for the state hand_rotation:4, gripper:1 of 'fractal', the benchmark has hand:3, hand_rot" in text
    text = _refused(Policy(LIBERO, CHUNK, cameras={"base": None, "side": None}), tmp_path)
    assert "asks for the cameras side of 'libero', the benchmark shows base, wrist; serve a policy that" in text
    assert "is one that drives" in _refused(Policy(LIBERO, CHUNK, plans=True), tmp_path)
    assert "with 3 actions, expected 4 or more; give --execute-steps 3" in _refused(Policy(LIBERO, CHUNK[:3]), tmp_path)
    assert "of shape (8, 6), expected (A, 7)" in _refused(Policy(LIBERO, CHUNK[:, :6]), tmp_path)
    assert "not finite" in _refused(Policy(LIBERO, CHUNK * np.nan), tmp_path)
    text = _refused(Policy(LIBERO, CHUNK, cameras={"base": None}), tmp_path)
    assert text.startswith("the policy server says invalid: observation does not fit robot 'libero'")
    with pytest.raises(BenchmarkError, match=r"no policy server at 127.0.0.1:1 .*; start it first"):
        protocol.run(_libero(), _args(tmp_path, port=1))


def test_tasks_and_episodes_that_there_are_not_are_said(libero: type[LiberoEnv], tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"no tasks lift; there are:\n  lift_it\n  drop_it"):
        protocol.todo(_libero(), _args(tmp_path, "--tasks", "lift"))
    with pytest.raises(BenchmarkError, match=r"--episodes 51: lift_it has 50 initial states; more would repeat them"):
        protocol.todo(_libero(), _args(tmp_path, "--episodes", "51"))
    every = protocol.todo(_libero(), _args(tmp_path))
    assert every == list(itertools.product(("lift_it", "drop_it"), range(50)))


def test_a_file_that_has_no_results_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("hello\n")
    with pytest.raises(BenchmarkError, match="line 1: not an episode; give another --out"):
        benchmark_results.read_lines(tmp_path / "notes")


def test_the_size_is_the_servers_wish_and_a_whole_state_may_be_one_field(libero: type[LiberoEnv]) -> None:
    sim = _libero()
    sim.reset("lift_it", 0)
    about = {"cameras": {"wrist": [64, 96]}, "state": [["all", 8, ""]]}
    message = protocol.Ours({"libero": about}, sim, None, None).message(sim.observe())
    assert {name: x.shape for name, x in message["images"].items()} == {"wrist": (64, 96, 3)}
    assert message["images"]["wrist"][:, :16].max() == 0  # padded
    assert message["state"].shape == (8,)


# ---- The programs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "more", "said"),
    [
        (libero_client, ("--suite", "libero_10"), ("observation/wrist_image: uint8 (224, 224, 3)", "of 40 commands")),
        (simpler_env_client, ("--setup", "widowx"), ("images > base: uint8 (256, 256, 3)", "of 60 commands")),
        (simpler_env_client, ("--setup", "google_robot"), ("images > base: uint8 (256, 320, 3)", "of 80 commands")),
        (calvin_client, (), ("state: float32 (15,)", "of 100 commands")),
    ],
)
def test_dry_runs_need_nothing(
    program: Any,
    more: tuple[str, ...],
    said: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "--dry-run", *more])
    program.main()
    printed = capsys.readouterr().out
    assert [text for text in said if text not in printed] == []
    (tmp_path / "line").write_text(printed.strip().split("\n")[-1].strip() + "\n")
    (episode,) = read_episodes(tmp_path / "line")
    assert (episode.policy, episode.seed, episode.success) == ("noise", 0, True)


def test_a_run_needs_a_name_and_a_file(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for words in ("--out x", "--label x", "--dry-run --execute-steps 0", "--dry-run --keys x"):
        with pytest.raises(SystemExit):
            protocol.parsed(calvin_client.parser(), words.split())
    assert "expected WHAT=KEY such as base=observation/image" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["program", "--label", "x", "--out", "x"])
    with pytest.raises(SystemExit):
        calvin_client.main()
    assert "--data is needed, or --dry-run" in capsys.readouterr().err
