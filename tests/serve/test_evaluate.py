"""Suites: driven against servers of openpi's protocol, resumed, compared, and refused where it would mean nothing."""

import contextlib
import importlib
import io
import json
import math
import runpy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openpi_client import msgpack_numpy
from openpi_client.image_tools import resize_with_pad
from rich.console import Console
from websockets.sync.server import ServerConnection, serve

from openpi_like.robots.aloha import ALOHA
from openpi_like.robots.ego_vehicle import EGO_VEHICLE, EGO_VEHICLE_SCENE
from openpi_like.robots.pusht import PUSHT
from openpi_like.robots.sims import SIMS
from openpi_like.robots.sims.suites import SUITES, suite_of
from openpi_like.serve.closed_loop import Films, Layout, StoppedError
from openpi_like.serve.dialects import DIALECTS
from openpi_like.serve.evaluation import Episode, append_episode, mcnemar, paired_difference, read_episodes, wilson
from openpi_like.serve.pilot import GREY, SILENCE, Senses
from openpi_like.serve.results import held, read_results, suite_rows, write_about
from tests.conftest import REPOSITORY
from tests.serve.running import Stub, serving

EVALUATE = runpy.run_path(str(REPOSITORY / "serve" / "evaluate.py"), run_name="evaluate")
STATE = [[f.name, f.size, f.unit] for f in PUSHT.state]
ABOUT = {"renderer": "pygame", "execute_steps": PUSHT.execute_steps, "cameras": {"base": [96, 96]}, "state": STATE}
OURS = {"robots": {"pusht": ABOUT}, "contract": "abc", "step": 7}


def evaluate(tmp_path: Path, **changes: Any) -> str:
    """Runs the program; returns what it prints."""
    values = {"suite": "pusht", "policy": "held", "out": tmp_path, "episodes": 1, "workers": 1}
    console = Console(record=True, width=200, file=io.StringIO())
    EVALUATE["main"](EVALUATE["Args"](**{**values, **changes}), console)
    return console.export_text()


def hold(observation: Any) -> np.ndarray:
    """Answers: stay where you are."""
    return np.repeat(observation["state"][None], PUSHT.action_horizon, 0)


@contextlib.contextmanager
def as_openpi_serves(infer: Callable[[Any], np.ndarray]) -> Iterator[int]:
    """Answers on a port as openpi's WebsocketPolicyServer does: a handshake of what its config says, here nothing."""

    def talk(connection: ServerConnection) -> None:
        connection.send(msgpack_numpy.packb({}))
        for message in connection:
            reply = {"actions": infer(msgpack_numpy.unpackb(message)), "server_timing": {"infer_ms": 0.1}}
            connection.send(msgpack_numpy.packb(reply))

    with serve(talk, "127.0.0.1", 0, compression=None, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.socket.getsockname()[1]
        server.shutdown()
    thread.join()


# ---- Suites ----------------------------------------------------------------------------------------------------------


def test_suites_are_of_tasks_that_simulators_have() -> None:
    for name, suite in SUITES.items():
        assert set(suite.tasks) <= set(SIMS), name
        for robot, tasks in suite.tasks.items():
            if SIMS[robot].extra != "arms":  # which is not installed everywhere
                module = importlib.import_module(f"openpi_like.robots.sims.{SIMS[robot].module}")
                sim = getattr(module, SIMS[robot].name)
                assert set(tasks) <= {*sim.tasks, *sim.more_tasks}, name
            assert len(set(tasks)) == len(tasks)
    assert [sum(map(len, SUITES[f"metaworld_{n}"].tasks.values())) for n in ("mt10", "30", "mt50")] == [10, 30, 50]
    with pytest.raises(ValueError, match="no suite 'push-t'; did you mean 'pusht'"):
        suite_of("push-t")


def test_some_tasks_of_a_suite_are_chosen_by_name() -> None:
    layouts, suite = EVALUATE["layouts"], SUITES["robosuite_arms"]
    assert len(layouts(suite, (), None)) == 10 * 20
    some = layouts(suite, ("lift", "robosuite_ur5e/stack"), 2)
    assert len(some) == (5 + 1) * 2
    assert some[:2] == [Layout("robosuite_panda", "lift", 10_000), Layout("robosuite_panda", "lift", 10_001)]
    with pytest.raises(ValueError, match="no task 'lifts'; did you mean 'lift'"):
        layouts(suite, ("lifts",), None)


# ---- Driving ---------------------------------------------------------------------------------------------------------


def test_a_suite_is_driven_filmed_resumed_and_compared(tmp_path: Path) -> None:
    asked: list[Any] = []

    def infer(observation: Any) -> np.ndarray:
        asked.append(observation)
        return hold(observation)

    stub = Stub(infer, OURS)
    with serving(stub) as server:
        printed = evaluate(tmp_path, port=server.port)
        assert "0/1 [0.00, 0.79]" in printed
        assert f"{300 // PUSHT.execute_steps} requests" in printed
        first = read_episodes(tmp_path / "pusht" / "held.jsonl")
        before = len(asked)
        evaluate(tmp_path, port=server.port, episodes=2, films=0)
        assert read_episodes(tmp_path / "pusht" / "held.jsonl")[:1] == first
        assert len(asked) == 2 * before
        # The noise is that of the layout, whatever was driven before.
        assert stub.noise == [(seed, number) for seed in (10_000, 10_001) for number in range(before)]
        evaluate(tmp_path, port=server.port, policy="both", episodes=2, films=0)
        assert stub.noise[2 * before :] == stub.noise[: 2 * before]
        with pytest.raises(ValueError, match=r"driven otherwise: senses was .*'deaf': False.*another name"):
            evaluate(tmp_path, port=server.port, deaf=True)
    assert [f.name for f in (tmp_path / "pusht" / "films" / "held").iterdir()] == ["pusht_push-t_10000.gif"]
    about = json.loads((tmp_path / "pusht" / "held.json").read_text())
    assert {"policy": "default", "contract": "abc", "step": 7}.items() <= about["server"].items()
    assert "robots" not in about["server"]
    assert about["max_steps"] == {"pusht": 300}
    assert [sorted(run) for run in about["runs"]] == [
        ["changed", "command", "commit", "date", "episodes", "hardware", "versions"]
    ] * 2
    printed = evaluate(tmp_path, policy="expert", beside="held")
    assert "1/1 [0.21, 1.00]" in printed
    assert "held of 1 [" in printed
    assert "0/1 [0.00, 0.79]" in printed  # of the layout that both drove


def test_a_server_of_openpi_is_driven_in_its_own_words(tmp_path: Path) -> None:
    """Its handshake names no robots; its chunks are longer than what is executed of them."""
    asked: list[Any] = []

    def infer(observation: Any) -> np.ndarray:
        asked.append(observation)
        return np.repeat(observation["observation/state"][None], 50, 0)

    with as_openpi_serves(infer) as port:
        with pytest.raises(StoppedError, match="none of ours; say how it is asked, with --dialect openpi_libero"):
            evaluate(tmp_path, port=port)
        dialect: dict[str, Any] = {"port": port, "dialect": "openpi_libero"}
        with pytest.raises(StoppedError, match=r"does not say how many actions .* say --execute-steps"):
            evaluate(tmp_path, **dialect)
        evaluate(tmp_path, **dialect, execute_steps=30, films=0)
        for steps in (60, 51):  # of the first nothing is left that would stand in the way of the second
            with pytest.raises(
                StoppedError, match=rf"actions of shape \(50, 2\), expected a chunk of at least {steps}"
            ):
                evaluate(tmp_path, **dialect, execute_steps=steps, films=0, policy="longer")
    assert len(asked) == 300 / 30 + 2
    assert sorted(asked[0]) == ["observation/image", "observation/state", "prompt"]
    assert asked[0]["observation/image"].shape == (224, 224, 3)
    (episode,) = read_episodes(tmp_path / "pusht" / "held.jsonl")
    assert (episode.success, episode.steps) == (False, 300)


def test_what_cannot_be_evaluated_is_said_before_anything_is_driven(tmp_path: Path) -> None:
    wrong = {"dialect": "openpi", "policy": "a/b", "episodes": 0, "execute_steps": -3, "films": -1}
    message = r"--dialect openpi; did you mean .*; --policy 'a/b'.*; --episodes 0.*; --execute-steps -3.*; --films -1"
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path, **wrong)
    with pytest.raises(ValueError, match=r"--beside nobody: it was not driven in .*; there are \[\]"):
        evaluate(tmp_path, policy="expert", beside="nobody")
    with pytest.raises(ValueError, match="an expert is told and shown nothing"):
        evaluate(tmp_path, policy="expert", blind=True)
    words = tmp_path / "words.json"
    for text, message in (
        ("[", "not a JSON file"),
        ('["push"]', "not a JSON file"),
        ('{"push": ["now"]}', "no task 'push'; did you mean 'push-t'"),
        ('{"push-t": [1]}', "expected a list of texts"),
        ('{"push-t": "push it"}', "expected a list of texts"),
        ('{"push-t": [" "]}', "expected a list of texts"),
    ):
        words.write_text(text)
        with pytest.raises(ValueError, match=message):
            evaluate(tmp_path, words=words)
    took = tmp_path / "took.json"
    for text, message in (
        ("[]", "not a JSON file"),
        ('{"seconds": 0, "what": 1}', "seconds is 0, expected a number .*; cores is 'missing', .*; what is no text"),
        ('{"gpus": 8}', "gpus: expected seconds, cores"),
    ):
        took.write_text(text)
        with pytest.raises(ValueError, match=message):
            evaluate(tmp_path, training=took)
    other = Stub(hold, {"robots": {"sawyer": ABOUT}})
    with serving(other) as server, pytest.raises(StoppedError, match="does not serve robot 'pusht'"):
        evaluate(tmp_path, port=server.port)
    assert not (tmp_path / "pusht").exists()


def test_what_a_server_leaves_out_is_said(tmp_path: Path) -> None:
    nothing = as_openpi_serves(lambda observation: np.zeros(()))
    with nothing as port, pytest.raises(StoppedError, match=r"actions of shape \(\), expected a chunk"):
        evaluate(tmp_path, port=port, dialect="openpi_libero", execute_steps=4, films=0)


def test_a_file_of_results_has_one_way_and_one_process(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with held(path), pytest.raises(ValueError, match=r"x.jsonl is being driven by another process"), held(path):
        pass
    how = {"dialect": "own", "max_steps": {"a": 1}}
    write_about(path, how, 2, REPOSITORY)
    append_episode(path, Episode("a", "lift", "x", 1, True, 9, "egl"))
    write_about(path, {**how, "max_steps": {"b": 2}}, 1, REPOSITORY)
    assert json.loads((tmp_path / "x.json").read_text())["max_steps"] == {"a": 1, "b": 2}
    with pytest.raises(ValueError, match=r"max_steps of b was 2, is 3; .* or remove x.jsonl and x.json"):
        write_about(path, {**how, "max_steps": {"b": 3}}, 1, REPOSITORY)


# ---- What a policy is given ------------------------------------------------------------------------------------------


def test_senses_change_what_they_say_and_nothing_else() -> None:
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    seen: dict[str, Any] = {"images": {"base": picture}, "state": np.ones(3), "prompt": "push"}
    assert Senses().of(seen, "push-t", 3) == seen
    blind = Senses(blind=True).of(seen, "push-t", 3)
    assert (blind["images"]["base"] == GREY).all()
    assert (blind["prompt"], seen["images"]["base"] is picture) == ("push", True)
    assert Senses(deaf=True).of(seen, "push-t", 3)["prompt"] == SILENCE
    told = Senses(words={"push-t": ("a", "b")})
    assert [told.of(seen, task, seed)["prompt"] for task, seed in (("push-t", 4), ("push-t", 5), ("lift", 4))] == [
        *("a", "b", "push")
    ]
    with pytest.raises(ValueError, match="words of 'lift': none; deaf, and words"):
        Senses(deaf=True, words={"lift": ()})


def test_dialects_of_openpi_have_the_keys_of_its_examples() -> None:
    rng = np.random.default_rng(0)
    images = {c.name: rng.integers(0, 256, (48, 64, 3), np.uint8) for c in ALOHA.cameras}
    seen = {"images": images, "state": rng.random(14).astype(np.float32), "prompt": "hand over"}
    said = DIALECTS["openpi_aloha"].served({}, ALOHA, 25).message(seen)
    assert (sorted(said), sorted(said["images"])) == (
        ["images", "prompt", "state"],
        ["cam_high", "cam_right_wrist"],
    )
    base = resize_with_pad(images["base"], 224, 224)
    np.testing.assert_array_equal(said["images"]["cam_high"], np.transpose(base, (2, 0, 1)))
    np.testing.assert_array_equal(said["state"], seen["state"])
    with pytest.raises(ValueError, match=r"has 6 cameras, this dialect 2 keys.*has entities.*say --execute-steps"):
        DIALECTS["openpi_libero"].served({}, EGO_VEHICLE_SCENE, None)
    with pytest.raises(ValueError, match="it is one of ours; leave --dialect out"):
        DIALECTS["openpi_aloha"].served(OURS, PUSHT, 4)


def test_our_own_dialect_asks_what_the_handshake_asks_for() -> None:
    about = {**ABOUT, "cameras": {"front": [48, 80]}, "state": [["speed", 1, "m/s"]], "renderer": "egl"}
    metadata = {"robots": {"ego_vehicle": about}, "features": ["think"]}
    served = DIALECTS["own"].served(metadata, EGO_VEHICLE, None)
    assert (served.execute_steps, served.renderer) == (PUSHT.execute_steps, "egl")
    assert (served.thinks, served.begins_anew) == (True, False)
    assert DIALECTS["own"].served(metadata, EGO_VEHICLE, 2).execute_steps == 2
    seen = {"images": {"front": 1, "back": 2}, "state": np.arange(17.0), "prompt": "go"}
    assert served.message(seen) == {"robot": "ego_vehicle", "images": {"front": 1}, "state": [7.0], "prompt": "go"}


def test_films_are_of_failures_and_not_of_too_many(tmp_path: Path) -> None:
    films, layout = Films(tmp_path, most=2), Layout("arm", "lift", 3)
    assert films.path(layout, True) is None
    assert films.path(layout, False) == tmp_path / "arm_lift_3.gif"
    for seed in (1, 2):
        (tmp_path / f"arm_lift_{seed}.gif").touch()
    assert films.path(layout, False) is None
    assert films.path(Layout("arm", "lift", 2), False) == tmp_path / "arm_lift_2.gif"
    assert Films(tmp_path, seed=3).path(layout, True) == tmp_path / "arm_lift.gif"
    assert Films(tmp_path, seed=4).path(layout, True) is None


# ---- Comparing -------------------------------------------------------------------------------------------------------


def drove(folder: Path, policy: str, outcomes: dict[tuple[str, int], bool]) -> None:
    for (task, seed), success in outcomes.items():
        append_episode(folder / f"{policy}.jsonl", Episode("arm", task, policy, seed, success, 9, "egl"))


def test_policies_are_compared_in_the_layouts_that_both_drove(tmp_path: Path) -> None:
    drove(tmp_path, "expert", {("lift", s): True for s in range(10)} | {("stack", s): s < 5 for s in range(5)})
    drove(tmp_path, "a", {("lift", s): s < 4 for s in range(8)})
    rows = suite_rows(read_results(tmp_path), beside="a")
    assert [row["policy"] for row in rows] == ["a", "expert"]
    a, expert = rows
    assert (a["successes"], a["episodes"], a["mean_of_tasks"]) == (4, 8, 0.5)
    assert {t: r["successes"] for t, r in expert["tasks"].items()} == {"arm lift": 10, "arm stack": 5}
    assert (expert["common"], expert["p"]) == (8, pytest.approx(2 * 0.5**4))  # four only the expert did
    assert expert["difference"][0] < 0.5 < expert["difference"][1]
    with pytest.raises(ValueError, match="no policy 'b' to be compared with"):
        suite_rows(read_results(tmp_path), beside="b")
    drove(tmp_path, "a", {("lift", 3): True})
    with pytest.raises(ValueError, match=r"a.jsonl: 1 episodes are there twice"):
        read_results(tmp_path)


def test_differences_in_the_same_episodes() -> None:
    """As of two samples that have nothing to do with each other where outcomes have not, by the formula of Newcombe's
    other paper of that year, and narrower where they have."""
    a, b = [True, False] * 40, [True, True, False, False] * 20
    (low, high), (p, q) = paired_difference(a, b), wilson(40, 80)
    assert (low, high) == pytest.approx((-math.hypot(0.5 - p, q - 0.5), math.hypot(0.5 - p, q - 0.5)), abs=1e-9)
    same = [True] * 30 + [False] * 30
    more = [True] * 38 + [False] * 22  # eight more, none less
    low, high = paired_difference(same, more)
    assert 0 < low < 8 / 60 < high < 0.3
    assert paired_difference(more, same) == pytest.approx((-high, -low))
    assert paired_difference([False] * 10, [True] * 10) == pytest.approx((0.6075, 1.0), abs=5e-5)
    with pytest.raises(ValueError, match="got 0 and 0 episodes"):
        paired_difference([], [])


def test_the_interval_of_differences_covers_them() -> None:
    """In 95 % of 400 draws of 50 pairs whose outcomes go together, about."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        hard = rng.random(50)
        a, b = hard < 0.5, np.where(rng.random(50) < 0.2, rng.random(50) < 0.6, hard < 0.6)
        low, high = paired_difference(a.tolist(), b.tolist())
        covered += low <= 0.1 <= high
    assert covered > 0.92 * 400


def test_mcnemar_against_coins() -> None:
    # Discordant 2 and 9: twice the tail of 11 fair coins.
    ours, theirs = [True] * 9 + [False] * 2 + [True] * 5, [False] * 9 + [True] * 2 + [True] * 5
    assert mcnemar(theirs, ours) == pytest.approx(2 * (1 + 11 + 55) / 2**11)
    with pytest.raises(ValueError, match="got 1 and 2 episodes"):
        mcnemar([True], [True, False])
