"""Three cubes: nothing but the instruction says what to do, and success is doing that and nothing else."""

import importlib.util
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openpi_like.robots.sims import make_sim
from openpi_like.robots.sims.coloured_cubes import COLOURS, PARAPHRASES, PROMPTS, SEEN, UNSEEN
from openpi_like.robots.sims.suites import SUITES
from tests.conftest import REPOSITORY

SEED = 10_004
# Demonstrations of each deed. They have the same layout, and so the same first picture.
DEMONSTRATED = ("lift-red", "stack-red-on-green", "push-left-red", "push-right-green")


# ---- Words -----------------------------------------------------------------------------------------------------------


def test_every_instruction_means_one_task() -> None:
    said = [text for of in (PROMPTS, PARAPHRASES) for wordings in of.values() for text in wordings]
    assert len(set(said)) == len(said) == 15 * (3 + 3)
    assert list(PROMPTS) == list(PARAPHRASES)
    assert all(text.islower() for text in said)
    for task, wordings in PROMPTS.items():
        named = {colour for colour in COLOURS if colour in task.split("-")}
        for text in (*wordings, *PARAPHRASES[task]):
            assert {word for word in text.replace(",", "").split(" ") if word in COLOURS} == named, text


def test_what_demonstrations_have_covers_every_deed_and_role() -> None:
    """So that what they leave out is new as a combination only."""
    assert sorted([*SEEN, *UNSEEN]) == sorted(PROMPTS)
    roles = {"lift": set[str](), "push": set[str](), "stack": set[str](), "on": set[str]()}
    for task in SEEN:
        verb, *of = task.split("-")
        roles[verb].add(of[0] if verb != "push" else of[1])
        if verb == "stack":
            roles["on"].add(of[2])
    assert list(roles.values()) == [set(COLOURS)] * 4
    assert {task.split("-")[1] for task in SEEN if task.startswith("push")} == {"left", "right"}
    seen, unseen = SUITES["cubes_seen"], SUITES["cubes_unseen"]
    assert (seen.tasks, unseen.tasks) == ({"cubes_panda": SEEN}, {"cubes_panda": UNSEEN})
    assert seen.first_seed == unseen.first_seed  # the same layouts
    assert list(seen.paraphrases) == list(SEEN)


def test_a_suite_can_be_evaluated_with_its_paraphrases() -> None:
    program = runpy.run_path(str(REPOSITORY / "serve" / "evaluate.py"), run_name="evaluate")
    read, words = program["read_words"], Path("paraphrases")
    assert program["Args"]("cubes_unseen", "mine", words=words).words == words
    assert read(words, SUITES["cubes_unseen"]) == {task: PARAPHRASES[task] for task in UNSEEN}
    with pytest.raises(ValueError, match="this suite has none of its own, as cubes_seen, cubes_unseen have"):
        read(words, SUITES["pusht"])


# ---- The simulator ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sim() -> Any:
    if importlib.util.find_spec("robosuite") is None:
        pytest.skip("robosuite is not installed: make arms")
    return make_sim("cubes_panda")


@pytest.fixture(scope="module")
def demonstrations(sim: Any) -> dict[str, list[np.ndarray]]:
    """Task -> what its expert does, up to success."""
    made = {}
    for task in DEMONSTRATED:
        sim.reset(task, SEED)
        expert, actions, doing = sim.expert(np.random.default_rng(0), 0.0), list[np.ndarray](), set[str]()
        while not (sim.success or sim.failed) and len(actions) < sim.max_steps:
            actions.append(expert.act())
            doing.add(expert.doing)
            sim.step(actions[-1])
        assert sim.success, task
        assert sim.measures() == {"wrong_cube": 0.0, "wrong_deed": 0.0}
        assert len(doing) >= 3
        made[task] = actions
    return made


def replay(sim: Any, task: str, actions: list[np.ndarray]) -> None:
    sim.reset(task, SEED)
    for action in actions:
        sim.step(action)


def test_pictures_and_state_say_nothing_of_the_task(sim: Any) -> None:
    seen, prompts = [], set()
    for task in sim.known_tasks():
        sim.reset(task, 3)
        observation = sim.observe()
        seen.append([observation["images"]["base"], observation["images"]["wrist"], observation["state"]])
        prompts.add(observation["prompt"])
    assert len(prompts) == len(seen) == 15
    for other in seen[1:]:
        for a, b in zip(seen[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_every_cube_is_seen_and_has_room_around_it(sim: Any) -> None:
    layouts = set()
    for seed in (0, 1, 2, 3, 10_000, 10_001, 10_002, 10_003):
        sim.reset("lift-red", seed)
        places = np.array([position[:2] for position, _ in sim.cubes])
        layouts.add(tuple(places.ravel()))
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert np.any(np.abs(places[a] - places[b]) > [0.1, 0.15])
        image = sim.observe()["images"]["base"].astype(int)
        for channel in range(3):
            others = np.delete(image, channel, axis=-1).max(-1)
            assert (image[..., channel] - others > 40).sum() >= 30  # pixels
    assert len(layouts) == 8


@pytest.mark.parametrize(
    ("done", "told", "wrong"),
    [
        ("lift-red", "lift-blue", "wrong_cube"),
        ("lift-red", "push-left-red", "wrong_deed"),
        ("stack-red-on-green", "stack-red-on-blue", "wrong_cube"),
        ("stack-red-on-green", "lift-red", "wrong_deed"),
        ("lift-red", "stack-red-on-green", None),
        ("push-left-red", "push-right-red", "wrong_deed"),
        ("push-right-green", "push-right-red", "wrong_cube"),
    ],
)
def test_the_instruction_decides_what_is_success(
    sim: Any, demonstrations: dict[str, list[np.ndarray]], done: str, told: str, wrong: str | None
) -> None:
    """The very actions that succeed under one instruction do not under another one."""
    replay(sim, told, demonstrations[done])
    assert not sim.success
    assert sim.failed == (wrong is not None)
    assert sim.measures() == {name: float(name == wrong) for name in ("wrong_cube", "wrong_deed")}


def test_same_seed_same_episode_bit_for_bit(sim: Any, demonstrations: dict[str, list[np.ndarray]]) -> None:
    """Whatever was before, and whatever is told."""
    ends = []
    for task in ("push-left-red", "lift-blue"):
        replay(sim, task, demonstrations["push-left-red"][:25])
        ends.append((sim._data.qpos.copy(), sim.observe()["images"]["wrist"]))
        sim.reset(task, 5)
    np.testing.assert_array_equal(ends[0][0], ends[1][0])
    np.testing.assert_array_equal(ends[0][1], ends[1][1])


def test_left_is_that_of_the_picture(sim: Any, demonstrations: dict[str, list[np.ndarray]]) -> None:
    def column() -> float:
        image = sim.observe()["images"]["base"].astype(int)
        return float(np.nonzero(image[..., 0] - image[..., 1:].max(-1) > 40)[1].mean())

    sim.reset("push-left-red", SEED)
    before = column()
    replay(sim, "push-left-red", demonstrations["push-left-red"])
    assert column() < before - 3  # pixels


def test_unknown_tasks_are_refused(sim: Any) -> None:
    with pytest.raises(ValueError, match="robot 'cubes_panda' has no task 'lift-rde'; did you mean 'lift-red'"):
        sim.reset("lift-rde", 0)
    with pytest.raises(ValueError, match="robot 'cubes_panda' has no task 'stack-red-on-red'"):
        sim.reset("stack-red-on-red", 0)
