"""SimplerEnv and CALVIN as clients of a policy, with fakes of their environments."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import calvin_client
import numpy as np
import protocol
import pytest
import simpler_env_client
from benchmark_results import BenchmarkError, Films
from scipy.spatial.transform import Rotation
from simpler_scenes import SCENES

from openpi_like.robots.oxe_arms import BRIDGE
from openpi_like.robots.oxe_google import FRACTAL
from openpi_like.serve.observation import check_observation

# ---- SimplerEnv ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("watch", ["last", "moved"])
def test_a_gripper_that_was_told_to_move_does_for_fifteen_steps(watch: str) -> None:
    gripper = simpler_env_client.StickyGripper(watch)
    # Open; closes at the third step. What is said while it closes is not heard: it is open again at the end of it.
    said = [1.0, 0.9, 0.2] + [1.0] * 13 + [0.3, 0.3, 1.0, 1.0]
    commands = [gripper(x) for x in said]
    np.testing.assert_allclose(commands[:17], [0.0, 0.1] + [0.7 if watch == "last" else 0.8] * 15, atol=1e-9)
    # The step at which it closes is the first of fifteen, the wish of the last one (0.3) is what "last" sees.
    if watch == "last":
        np.testing.assert_allclose(commands[17:], [0.0] + [-0.7] * 2, atol=1e-9)
    else:
        np.testing.assert_allclose(commands[17:], [-0.1] + [-0.8] * 2, atol=1e-9)


def test_only_one_of_the_two_grippers_closes_little_by_little() -> None:
    slow = np.linspace(1, 0, 11)
    last, moved = (simpler_env_client.StickyGripper(watch) for watch in ("last", "moved"))
    assert max(last(x) for x in slow) < 0.11
    assert max(moved(x) for x in slow) == pytest.approx(0.6)


def test_turns_are_sent_as_rotation_vectors() -> None:
    for rpy in np.random.RandomState(0).uniform(-1, 1, (20, 3)):
        expected = Rotation.from_euler("xyz", rpy).as_rotvec()
        np.testing.assert_allclose(simpler_env_client.rotation_vector(rpy), expected, atol=1e-9)


def test_simpler_env_has_the_published_episodes() -> None:
    counts = {name: len(scene.starts) for name, scene in SCENES.items()}
    assert [counts[name] for name in counts if name.startswith("widowx")] == [24] * 4
    assert counts["google_robot_pick_coke_can"] == 4 * 75
    assert counts["google_robot_move_near_v0"] == 4 * 60
    assert counts["google_robot_open_drawer"] == counts["google_robot_close_drawer"] == 4 * 27
    assert counts["google_robot_place_apple_in_closed_top_drawer"] == 4 * 27
    assert {name: scene.steps for name, scene in SCENES.items() if scene.robot == "widowx"} == {
        "widowx_spoon_on_towel": 60,
        "widowx_carrot_on_plate": 60,
        "widowx_stack_cube": 60,
        "widowx_put_eggplant_in_basket": 120,
    }
    assert sorted({scene.steps for scene in SCENES.values() if scene.robot == "google_robot"}) == [80, 113, 200]
    for scene in SCENES.values():
        assert len({repr(start) for start in scene.starts}) == len(scene.starts)
        assert all(start.build["max_episode_steps"] == scene.steps for start in scene.starts)
    turned = SCENES["google_robot_move_near_v0"].starts[0].options["robot_init_options"]["init_rot_quat"]
    expected = Rotation.from_euler("z", -0.09) * Rotation.from_quat([0, 0, 1, 0])
    np.testing.assert_allclose(np.roll(turned, -1), expected.as_quat(), atol=1e-12)


FOOT = np.array([1.0, 2.0, 0.87])


class SimplerSim:
    """An environment with a robot in a known pose; its instruction changes at a step, and it succeeds at some."""

    def __init__(self, changes: int = 10**6, successes: range = range(0), **build: Any) -> None:
        self.build, self.changes, self.successes, self.unwrapped = build, changes, successes, self
        google = build["robot"].startswith("google")
        self.image = ("overhead_camera", 512) if google else ("3rd_view_camera", 480)
        self.qpos = np.zeros(11 if google else 8, np.float32)
        self.qpos[slice(-4, -2) if google else slice(-2, None)] = 1.3 * 0.25 if google else 0.015 + 0.75 * 0.022
        self.base, self.hand = Rotation.from_euler("z", 2.0), Rotation.from_euler("xyz", [0.1, 1.5, 0.2])
        self.commands: list[Any] = []

    def reset(self, seed: int, options: Any) -> Any:
        self.seed, self.options, self.steps = seed, options, 0
        self.commands.clear()
        return self.look(), {}

    @property
    def tcp(self) -> Any:
        """The hand, which is 30 cm in front of the robot and 10 cm above its foot."""
        position, turn = FOOT + self.base.apply([0.3, 0.0, 0.1]), self.base * self.hand
        return SimpleNamespace(pose=SimpleNamespace(p=position, q=np.roll(turn.as_quat(), 1)))

    def look(self) -> Any:
        camera, height = self.image
        base = np.concatenate([FOOT, np.roll(self.base.as_quat(), 1)]).astype(np.float32)
        return {
            "image": {camera: {"rgb": np.full((height, 640, 3), 9, np.uint8)}},
            "agent": {"qpos": self.qpos, "base_pose": base},
        }

    def get_language_instruction(self) -> str:
        return "open it" if self.steps < self.changes else "put it in"

    def step(self, command: np.ndarray) -> Any:
        self.commands.append(command)
        self.steps += 1
        done = self.steps in self.successes
        stats = {"grasped": np.True_, "contacts": 2, "qpos": "0.153"}
        return self.look(), 0.0, done, self.steps == self.build["max_episode_steps"], {"episode_stats": stats}

    def close(self) -> None:
        pass


def _simpler(setup: str, watch: str = "last", **how: Any) -> tuple[simpler_env_client.SimplerEnv, list[SimplerSim]]:
    made: list[SimplerSim] = []

    def build(**options: Any) -> SimplerSim:
        made.append(SimplerSim(**how, **options))
        return made[-1]

    return simpler_env_client.SimplerEnv(
        setup, watch, 0, SimpleNamespace(build=build, assets="/assets", renderer="")
    ), made


def test_widowx_says_its_pose_as_bridge_does() -> None:
    sim, (env,) = _reset("widowx", "widowx_put_eggplant_in_basket", 5)
    assert env.build["rgb_overlay_path"] == "/assets/real_inpainting/bridge_sink.png"
    assert env.options["obj_init_options"] == {"episode_id": 5}
    seen = sim.observe()
    np.testing.assert_allclose(seen.state["hand"], [0.3, 0.0, 0.1], atol=1e-6)
    down = Rotation.from_matrix(simpler_env_client.TOP_DOWN)  # the hand as Bridge counts from it
    expected = (env.hand * down.inv()).as_euler("xyz")
    np.testing.assert_allclose(seen.state["hand_rotation"], expected, atol=1e-6)
    np.testing.assert_allclose(seen.state["gripper"], [0.75], atol=1e-6)
    message = protocol.Flat(sim.keys, sim, None).message(seen)
    assert {key: getattr(x, "shape", x) for key, x in message.items()} == {
        "observation/primary_image": (224, 224, 3),
        "observation/state": (8,),
        "prompt": "open it",
    }
    assert message["observation/state"][6] == 0
    assert message["observation/primary_image"].min() == 9  # squashed, without bars
    asked = {"cameras": {"base": None}, "state": [[f.name, f.size, f.unit] for f in BRIDGE.state]}
    ours = protocol.Ours({"bridge": asked}, sim, None, None).message(seen)
    check_observation(ours, BRIDGE, {"base": BRIDGE.cameras[0]})
    assert ours["images"]["base"].shape == (256, 256, 3)


def _reset(setup: str, task: str, seed: int, **how: Any) -> tuple[simpler_env_client.SimplerEnv, list[SimplerSim]]:
    sim, made = _simpler(setup, **how)
    sim.reset(task, seed)
    return sim, made


def test_the_google_robot_says_its_pose_as_its_dataset_does() -> None:
    sim, (env,) = _reset("google_robot", "google_robot_open_drawer", 0)
    assert env.build["shader_dir"] == "rt"
    seen = sim.observe()
    np.testing.assert_allclose(seen.state["hand"], [0.3, 0.0, 0.1], atol=1e-6)
    np.testing.assert_allclose(seen.state["hand_rotation"], env.hand.as_quat(canonical=True), atol=1e-6)
    np.testing.assert_allclose(seen.state["gripper"], [0.25], atol=1e-6)  # closed by a quarter
    asked = {"cameras": {"base": None}, "state": [[f.name, f.size, f.unit] for f in FRACTAL.state]}
    ours = protocol.Ours({"fractal": asked}, sim, None, None).message(seen)
    check_observation(ours, FRACTAL, {"base": FRACTAL.cameras[0]})
    assert ours["images"]["base"].shape == (256, 320, 3)


def test_grippers_of_widowx_and_of_our_google_robot() -> None:
    sim, (env,) = _reset("widowx", "widowx_stack_cube", 0)
    for openness in (0.51, 0.49):
        sim.step(np.array([0.01, 0.02, 0.03, 0.0, 0.0, 0.1, openness]))
    np.testing.assert_allclose(env.commands, [[0.01, 0.02, 0.03, 0, 0, 0.1, g] for g in (1, -1)], atol=1e-12)
    for ours, wishes in ((False, (1.0, 0.0)), (True, (-1.0, 1.0))):  # open, then closed
        sim, (env,) = _reset("google_robot", "google_robot_pick_coke_can", 0)
        sim.ours = ours
        for wish in wishes:
            sim.step(np.array([0.0] * 6 + [wish]))
        assert [command[6] for command in env.commands] == [0.0, 1.0]


def test_the_rest_of_a_chunk_is_not_for_the_next_instruction() -> None:
    sim, made = _simpler("google_robot", changes=10, successes=range(196, 201))
    prompts: list[str] = []

    def infer(message: Any) -> Any:
        prompts.append(message["prompt"])
        return {"actions": np.zeros((4, 7))}

    pilot = protocol.Pilot(infer, protocol.Flat(sim.keys, sim, None), None)
    task = "google_robot_place_apple_in_closed_top_drawer"
    line = protocol.drive(sim, pilot, task, 0, "mine", Films(None, 0))
    # Ten steps are three chunks of four, of which two actions are dropped.
    assert prompts == ["open it"] * 3 + ["put it in"] * 48
    assert (line["success"], line["steps"], len(made[0].commands)) == (True, 196, 200)
    assert line["measures"] == {"success_at_any_step": 1.0, "grasped": 1.0, "contacts": 2.0}


def test_success_is_that_of_the_last_step_and_environments_are_made_where_they_differ() -> None:
    sim, made = _simpler("widowx", successes=range(20, 30))
    pilot = protocol.Pilot(lambda message: {"actions": np.zeros((4, 7))}, protocol.Flat(sim.keys, sim, None), None)
    lines = [protocol.drive(sim, pilot, "widowx_stack_cube", seed, "mine", Films(None, 0)) for seed in range(3)]
    lines.append(protocol.drive(sim, pilot, "widowx_carrot_on_plate", 0, "mine", Films(None, 0)))
    assert [(line["success"], line["measures"]["success_at_any_step"]) for line in lines] == [(False, 1.0)] * 4
    assert len(made) == 2
    assert (made[0].seed, made[0].options["obj_init_options"]["episode_id"]) == (2, 2)


# ---- CALVIN ----------------------------------------------------------------------------------------------------------


class CalvinEnv:
    """Counts its steps; what it is given has to be as the real one asserts."""

    def __init__(self) -> None:
        self.commands: list[np.ndarray] = []
        self.resets: list[Any] = []

    def get_obs(self) -> Any:
        images = {"rgb_static": np.zeros((200, 200, 3), np.uint8), "rgb_gripper": np.ones((84, 84, 3), np.uint8)}
        return {"rgb_obs": images, "robot_obs": np.arange(15.0)}

    def reset(self, robot_obs: Any, scene_obs: Any) -> None:
        self.resets.append((robot_obs, scene_obs))

    def get_info(self) -> int:
        return len(self.commands)

    def step(self, action: np.ndarray) -> Any:
        assert len(action) == 7
        assert action[6] in (-1, 1)
        self.commands.append(action)
        return self.get_obs(), 0, False, self.get_info()


CHAIN = ("open_drawer", "close_drawer", "turn_on_led", "turn_off_led", "push_into_drawer")


class Oracle:
    """Subtasks take so many steps each."""

    def __init__(self, **steps: int) -> None:
        self.steps = steps

    def get_task_info_for_set(self, start: int, now: int, subtasks: set[str]) -> set[str]:
        return {name for name in subtasks if now - start >= self.steps[name]}


def _calvin(*steps: int) -> tuple[calvin_client.Calvin, CalvinEnv]:
    env = CalvinEnv()
    package = SimpleNamespace(
        env=env,
        oracle=Oracle(**dict(zip(CHAIN, steps, strict=True))),
        instructions={name: [f"please {name}", "unused"] for name in CHAIN},
        sequences=[({"led": i}, CHAIN) for i in range(3)],
        initial_condition=lambda initial: (f"robot {initial['led']}", "scene"),
        renderer="some 1.2",
    )
    return calvin_client.Calvin(package), env


@pytest.mark.parametrize(
    ("steps", "completed", "executed"),
    [((7, 3, 5, 5, 5), 5, 25), ((360, 361, 1, 1, 1), 1, 720), ((361, 1, 1, 1, 1), 0, 360)],
)
def test_calvin_goes_through_a_chain(steps: tuple[int, ...], completed: int, executed: int) -> None:
    sim, env = _calvin(*steps)
    asked: list[Any] = []

    def infer(message: Any) -> Any:
        asked.append(message)
        return {"actions": np.full((10, 7), 0.3)}

    pilot = protocol.Pilot(infer, protocol.Flat(sim.keys, sim, None), None)
    line = protocol.drive(sim, pilot, "calvin", 2, "mine", Films(None, 0))
    assert env.resets == [("robot 2", "scene")]
    assert (line["seed"], line["success"], line["steps"]) == (2, completed == 5, executed)
    assert line["measures"] == {"completed": completed}
    assert line["renderer"] == "some 1.2"
    assert len(env.commands) == executed
    prompts = [message["prompt"] for message in asked]
    if completed == 5:  # seven steps are two chunks of five
        assert prompts == [f"please {name}" for name, n in zip(CHAIN, (2, 1, 1, 1, 1), strict=True) for _ in range(n)]
    np.testing.assert_array_equal(asked[0]["observation/state"], np.arange(15.0))
    assert {key: x.shape for key, x in asked[0].items() if key.startswith("observation/rgb")} == {
        "observation/rgb_static": (224, 224, 3),
        "observation/rgb_gripper": (224, 224, 3),
    }


def test_calvin_has_a_gripper_that_is_open_or_closed() -> None:
    sim, env = _calvin(9, 9, 9, 9, 9)
    sim.reset("calvin", 0)
    for gripper in (0.1, 0.0, -0.1):
        sim.step(np.array([0.5] * 6 + [gripper]))
    assert [command[6] for command in env.commands] == [1, -1, -1]
    assert env.commands[0][:6].tolist() == [0.5] * 6


def test_calvin_says_how_far_chains_got() -> None:
    sim, _ = _calvin(1, 1, 1, 1, 1)
    lines = [{"measures": {"completed": n}} for n in (5, 5, 2, 0)]
    texts = sim.summary(lines)
    rates = [text.split()[1] for text in texts[:5]]
    assert rates == ["75.0%", "75.0%", "50.0%", "50.0%", "50.0%"]
    assert texts[-1] == "mean length of 4 chains: 3.000"
    assert sim.tasks() == {"calvin": 1000}


def test_what_is_used_of_calvin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Where it looks for the texts and the oracle, and that it says where the chains are others."""
    agent = tmp_path / "calvin_models" / "calvin_agent" / "__init__.py"
    sequences = [({"led": 0}, CHAIN)]
    parts: dict[str, dict[str, Any]] = {
        "calvin_agent": {"__file__": str(agent)},
        "calvin_agent.evaluation": {},
        "calvin_agent.evaluation.multistep_sequences": {"get_sequences": lambda n: sequences * (n == 1000)},
        "calvin_agent.evaluation.utils": {"get_env_state_for_initial_condition": lambda initial: initial},
        "calvin_env": {},
        "calvin_env.envs": {},
        "calvin_env.envs.play_table_env": {"get_env": lambda folder, show_gui: ("env of", folder)},
        "hydra": {"utils": SimpleNamespace(instantiate=lambda conf: ("oracle of", conf))},
        "omegaconf": {"OmegaConf": SimpleNamespace(load=lambda path: path.relative_to(tmp_path))},
    }
    for name, values in parts.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(BenchmarkError, match=r"merged_config.yaml; give --data a split of CALVIN's dataset"):
        calvin_client.installed(tmp_path)
    (tmp_path / "validation" / ".hydra").mkdir(parents=True)
    (tmp_path / "validation" / ".hydra" / "merged_config.yaml").touch()
    package = calvin_client.installed(tmp_path)
    assert package.env == ("env of", tmp_path / "validation")
    conf = Path("calvin_models/conf")
    assert package.oracle == ("oracle of", conf / "callbacks/rollout/tasks/new_playtable_tasks.yaml")
    assert package.instructions == conf / "annotations/new_playtable_validation.yaml"
    assert package.sequences == sequences
    assert f"fingerprint {calvin_client.fingerprint(sequences)}, those of CALVIN fa03f01" in capsys.readouterr().err


def test_chains_have_a_fingerprint() -> None:
    one: Any = [({"led": np.int64(0), "drawer": "open"}, CHAIN)]
    assert calvin_client.fingerprint(one) == calvin_client.fingerprint([({"drawer": "open", "led": 0}, list(CHAIN))])
    assert calvin_client.fingerprint(one) != calvin_client.fingerprint([({"drawer": "open", "led": 1}, CHAIN)])
