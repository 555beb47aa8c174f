"""Studies: tables that cannot be run are refused, and what is kept equal is compared."""

import dataclasses
import runpy

import pytest

from openpi_like.config import load_run, override, to_json
from openpi_like.data.augment import Augment
from openpi_like.robots.policy_fit import policy_problems
from openpi_like.train.study import Arm, Matrix, Study, learning_curve, study_rows, unequal, unequal_parts


def test_arms_do_not_share_files() -> None:
    arms = {name: Arm("configs/studies/pi0.py") for name in ("a, b", "a b", "c/d")}
    message = r"arm 'a b': its files would be 'a_b', as arm 'a, b'; .*; arm 'c/d': its files would be 'c/d'; give"
    with pytest.raises(ValueError, match=message):
        Study(arms, "sawyer", ("button-press",), 1)


def test_what_a_study_keeps_equal() -> None:
    one = load_run("configs/studies/pi0.py")
    assert unequal({}) == []
    two = dataclasses.replace(one, seed=one.seed + 1, steps=one.steps + 1)
    assert unequal({"one": one, "two": two, "three": one}) == [
        "arm 'two': steps is not that of 'one'",
        "arm 'two': seed is not that of 'one'",
    ]


def test_what_helps_compares_what_can_be_compared() -> None:
    """One change at a time: what a run of the study differs in from pi0.py, or from the policy that it is of."""
    variables = runpy.run_path("configs/studies/what_helps.py")
    study = variables["study"]
    files = {name: study.config_of(name) for name in study.arms}
    configs = {name: override(load_run(path), changes) for name, (path, changes) in files.items()}
    assert unequal_parts(study, {"": {n: c for n, c in configs.items() if study.arms[n].driven}}) == []
    assert {f"configs/studies/what_helps.py:{name}" for name in variables["configs"]} < {p for p, _ in files.values()}
    for name, arm in study.arms.items():
        assert (configs[name].warm_start is None) == (arm.start is None)
        for entry in configs[name].data.entries:
            assert policy_problems(entry.robot, configs[name].model) == []
    base = configs["pi0"]

    def changed(name: str) -> list[str]:
        a, b = to_json(base), to_json(configs[name])
        return [key for key in a if a[key] != b[key]]

    assert changed("four draws of noise and time") == ["model"]
    assert changed("augmented images") == changed("noise on the state") == ["data"]
    assert changed("chunks of 16") == ["model", "data"]
    assert changed("no average of weights") == ["ema_decay"]


def test_noise_on_a_state_that_stands_in_the_prompt_is_refused() -> None:
    insulated = load_run("configs/studies/insulated.py")
    with pytest.raises(ValueError, match="a policy whose state is in its prompt, where neither changes it; leave them"):
        dataclasses.replace(insulated, data=dataclasses.replace(insulated.data, augment=Augment(state_noise=0.1)))


def test_a_learning_curve_differs_in_its_data_alone() -> None:
    """The first so many episodes, each part of the next, and all validated on the same ones."""
    arms = learning_curve("configs/studies/new_task.py", (5, 10, 50), start="before", set=("seed=3",))
    assert list(arms) == ["5 episodes", "10 episodes", "50 episodes"]
    configs = {name: override(load_run(arm.config), arm.set) for name, arm in arms.items()}
    assert [c.data.entries[0].split for c in configs.values()] == ["train[:5]", "train[:10]", "train[:50]"]
    assert {(c.data.entries[0].val_split, c.seed) for c in configs.values()} == {("val", 3)}
    assert all(arm.own_statistics and arm.start == "before" for arm in arms.values())
    assert unequal(configs, ("data",)) == []
    assert len(unequal(configs)) == 2
    arms["one"] = Arm("configs/studies/new_task.py", ("seed=4",))
    configs["one"] = override(load_run(arms["one"].config), arms["one"].set)
    assert unequal(configs, ("data",)) == ["arm 'one': seed is not that of '5 episodes'"]


@pytest.mark.parametrize("episodes", [(), (0, 5), (10, 5), (5, 5)])
def test_a_learning_curve_grows(episodes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected numbers from 1 on, each greater than the one before"):
        learning_curve("configs/studies/new_task.py", episodes)


def test_what_a_study_cannot_vary() -> None:
    arms = {"a": Arm("configs/studies/pi0.py")}
    with pytest.raises(ValueError, match="varies='date'; did you mean 'data'"):
        Study(arms, "sawyer", ("button-press",), 1, varies=("date",))


def test_what_a_run_that_is_driven_again_is() -> None:
    arms = {"a": Arm("x.py", ("seed=1",)), "b": Arm("x.py", same_run="a", serve=("--think-every", "4"))}
    study = Study(arms, "sawyer", ("button-press",), 1)
    assert [study.run_of(n) for n in arms] == ["a", "a"]
    assert study.config_of("b") == ("x.py", ("seed=1",))
    for wrong in (
        Arm("y.py", same_run="a"),
        Arm("x.py", same_run="c"),
        Arm("x.py", ("seed=2",), same_run="a"),
        Arm("x.py", same_run="b"),
    ):
        with pytest.raises(ValueError, match=r"arm 'd': same_run='.', expected one of \['a'\], trained above"):
            Study({**arms, "d": wrong}, "sawyer", ("button-press",), 1)


def test_what_arms_are_compared_with() -> None:
    arms = {"a": Arm("x.py", beside="b"), "b": Arm("x.py", driven=False, beside="a"), "c": Arm("x.py", beside="c")}
    message = (
        r"arm 'a': beside='b', expected one of the driven arms \['c'\]; arm 'b': beside='a', expected None, as it is "
        r"not driven; arm 'c': beside='c', expected one of the driven arms \['a'\]"
    )
    with pytest.raises(ValueError, match=message):
        Study(arms, "sawyer", ("button-press",), 1)


def test_arms_beside_each_other_are_equal_in_what_varies_too() -> None:
    """A run of no steps is not compared: it shows what another one has learned."""
    one = load_run("configs/studies/new_task.py")
    five, ten = (override(one, (f"data.entries.0.split=train[:{n}]",)) for n in (5, 10))
    runs = {"seen": dataclasses.replace(one, steps=0), "5": five, "10": ten, "10 again": ten, "5 more": five}
    assert unequal(runs, ("data",), {"10 again": "10"}) == []
    assert unequal(runs, ("data",), {"10 again": "10", "5 more": "10"}) == ["arm '5 more': data is not that of '10'"]
    assert unequal(runs, ("data",), {"10": "seen"}) == []
    longer = {**runs, "10 again": dataclasses.replace(ten, steps=ten.steps + 1)}
    assert unequal(longer, ("data",), {"10 again": "10"}) == ["arm '10 again': steps is not that of '10'"]


# ---- Several studies in one table ------------------------------------------------------------------------------------

ARMS = {"before": Arm("x.py", driven=False), "a": Arm("x.py"), "b": Arm("x.py"), "c": Arm("x.py", beside="b")}


def test_studies_that_make_no_table() -> None:
    with pytest.raises(ValueError, match="no study, expected one at least"):
        Matrix({})
    one = Study(ARMS, "sawyer", ("lift",), 2)
    other = Study({"a": Arm("x.py"), "b": Arm("x.py")}, "fetch", ("lift", "push"), 3)
    message = (
        r"study 'x y': its files would be 'x_y', as study 'x, y'; .*study '': no name; .*study 'x y': arms that are "
        r"driven are \['a', 'b'\], expected those of the first, \['a', 'b', 'c'\]; study 'x y': its arms are compared "
        r"with \{\}, .*tasks are \('lift', 'push'\), .*episodes are 3, expected those of the first, 2"
    )
    with pytest.raises(ValueError, match=message):
        Matrix({"x, y": one, "x y": other, "": one})


def test_an_arm_is_the_same_in_all_studies_but_for_its_data() -> None:
    run = load_run("configs/studies/new_task.py")
    elsewhere = override(run, ("data.entries.0.path=elsewhere",))
    matrix = Matrix({name: Study(ARMS, "sawyer", ("lift",), 2) for name in ("one", "two")})
    equal = {"one": dict.fromkeys("abc", run), "two": dict.fromkeys("abc", elsewhere)}
    assert unequal_parts(matrix, equal) == []
    later = dataclasses.replace(elsewhere, seed=run.seed + 1)
    assert unequal_parts(matrix, {**equal, "two": dict.fromkeys("abc", later)}) == [
        f"arm {arm!r} of 'two': seed is not that of 'one'" for arm in "abc"
    ]
    assert unequal_parts(matrix, {**equal, "two": {**equal["two"], "c": run}}) == [
        "two: arm 'c': data is not that of 'b'",
    ]
    assert unequal_parts(Study(ARMS, "sawyer", ("lift",), 2), {"": {**equal["one"], "b": elsewhere}}) == [
        "arm 'b': data is not that of 'a'",
        "arm 'c': data is not that of 'b'",
    ]


def test_rows_beside_the_arms_that_they_name() -> None:
    """Paired by place and seed, p by hand: 2 episodes more, 0 fewer: 2/4; 4 and 0: 2/16; 3 and 2: 2 * 16/32."""
    places = [(place, seed) for place in ("two", "one") for seed in (7, 8, 9)]
    won = {"a": "000000", "b": "001100", "c": "111111", "d": "110010"}
    outcomes = {arm: {e: s == "1" for e, s in zip(places, of, strict=True)} for arm, of in won.items()}
    rows = {row["arm"]: row for row in study_rows(outcomes, {"c": "b", "d": "b"})}
    assert {arm: (row["successes"], row["episodes"]) for arm, row in rows.items()} == {
        "a": (0, 6),
        "b": (2, 6),
        "c": (6, 6),
        "d": (3, 6),
    }
    assert [(place, of["successes"]) for place, of in rows["d"]["tasks"].items()] == [("one", 1), ("two", 2)]
    assert {arm: (row["beside"], row["p"]) for arm, row in rows.items() if "p" in row} == {
        "b": ("a", 0.5),
        "c": ("b", 0.125),
        "d": ("b", 1.0),
    }
    # Wilson's interval of 6 of 6, z = 1.96: 1 / (1 + z^2 / 6).
    assert rows["c"]["interval"] == pytest.approx((1 / (1 + 1.959964**2 / 6), 1.0))
    with pytest.raises(ValueError, match="arm 'c': its episodes are not those of 'a'"):
        study_rows({**outcomes, "c": {("one", 7): True}})
