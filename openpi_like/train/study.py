"""Studies: several configs, trained on the same data for the same steps, and driven in the same episodes; and matrices
of them, the same for several robots."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from openpi_like.config import near_names, to_json
from openpi_like.serve.evaluation import mcnemar, paired_difference, wilson
from openpi_like.train.config import TrainConfig

SAME = ("data", "batch_size", "steps", "seed")  # kept equal between the arms that are driven


@dataclasses.dataclass(frozen=True)
class Arm:
    """One row of a study.

    config: file of its run. set: dotted overrides of it. start: name of an arm above whose weights it begins with,
    besides those that `reinitialize` names. driven: False where it only prepares another one. own_statistics: it is
    normalised by what it is trained on, computed before it is. beside: name of the arm that it is compared with, whose
    run is equal to its own in all of `SAME`; None: the first that is driven. same_run: name of an arm above whose run
    is driven again, instead of one of its own. serve: further words for serve/policy_server.py.
    """

    config: str
    set: tuple[str, ...] = ()
    start: str | None = None
    reinitialize: tuple[str, ...] = ()
    driven: bool = True
    own_statistics: bool = False
    beside: str | None = None
    same_run: str | None = None
    serve: tuple[str, ...] = ()


def slug(name: str) -> str:
    """Returns the name of an arm as one of a file."""
    return name.replace(", ", "_").replace(" ", "_")


@dataclasses.dataclass(frozen=True)
class Study:
    """A table of runs, by name, in order. The first that is driven is what others are compared with.

    robot, tasks, episodes: what they are driven with, and how many episodes of each task. A run that ranks its steps
    (`TrainConfig.keep`) is driven at its best one, others at the last. varies: of what is otherwise kept equal
    (`SAME`), that which the study is about. also: words of a program that asks each server too, in which {folder} is
    that of the study and {arm} the file name of the arm; it is given the server's --port-file.
    """

    arms: Mapping[str, Arm]
    robot: str
    tasks: tuple[str, ...]
    episodes: int
    varies: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems, above = file_problems("arm", self.arms), set[str]()
        problems += [f"varies={v!r}; {near_names(v, SAME)}" for v in self.varies if v not in SAME]
        driven = [name for name, arm in self.arms.items() if arm.driven]
        for name, arm in self.arms.items():
            others = [other for other in driven if other != name]
            if arm.beside is not None and (arm.beside not in others or not arm.driven):
                expected = f"one of the driven arms {others}" if arm.driven else "None, as it is not driven"
                problems.append(f"arm {name!r}: beside={arm.beside!r}, expected {expected}")
            if arm.start is not None and arm.start not in above:
                problems.append(f"arm {name!r}: start={arm.start!r}, expected one of the arms above: {sorted(above)}")
            if arm.start is None and arm.reinitialize:
                problems.append(f"arm {name!r}: reinitialize={arm.reinitialize} without a start")
            again = [n for n in above if self.arms[n].same_run is None]
            more = arm.set or arm.start or arm.own_statistics
            if arm.same_run is not None and (
                arm.same_run not in again or more or self.arms[arm.same_run].config != arm.config
            ):
                problems.append(
                    f"arm {name!r}: same_run={arm.same_run!r}, expected one of {sorted(again)}, trained above, "
                    "with the same config and nothing else that is about training"
                )
            above.add(name)
        if not driven:
            problems.append("no arm is driven, expected one at least")
        if self.episodes < 1 or not self.tasks:
            problems.append(f"episodes={self.episodes}, tasks={self.tasks}, expected at least one of each")
        if problems:
            raise ValueError("Study: " + "; ".join(problems))

    @property
    def beside(self) -> dict[str, str]:
        """Arm -> the one that it names to be compared with."""
        return {name: arm.beside for name, arm in self.arms.items() if arm.beside is not None}

    def run_of(self, name: str) -> str:
        """Returns the arm whose run an arm is."""
        return self.arms[name].same_run or name

    def config_of(self, name: str) -> tuple[str, tuple[str, ...]]:
        """Returns the file of the run that an arm is, and overrides of it."""
        arm = self.arms[self.run_of(name)]
        return arm.config, arm.set

    @property
    def parts(self) -> dict[str, "Study"]:
        """The studies that it is made of, by name: itself. Files of a part without a name are not in a folder."""
        return {"": self}

    def place(self, part: str, task: str) -> str:
        """Returns the name of a column: where an arm was driven."""
        return task

    def lay_out(self, table: list[list[str]]) -> list[list[str]]:
        """Returns the table, a row per arm and a column per place, as it is shown: as it is."""
        return table


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Studies of the same arms, by name, each with data and a robot of its own: one after another, and one table.

    Its rows are the studies, then all of them together; its columns the arms. Arms are compared in the episodes of all
    studies.
    """

    studies: Mapping[str, Study]

    def __post_init__(self) -> None:
        problems = file_problems("study", self.studies)
        problems += [f"study {name!r}: no name" for name in self.studies if not name]
        if not self.studies:
            problems.append("no study, expected one at least")
        for name, study in self.studies.items():
            first = next(iter(self.studies.values()))
            for what, of in _COMMON.items():
                if of(study) != of(first):
                    problems.append(f"study {name!r}: {what} {of(study)}, expected those of the first, {of(first)}")
        if problems:
            raise ValueError("Matrix: " + "; ".join(problems))

    @property
    def parts(self) -> dict[str, Study]:
        """See `Study.parts`."""
        return dict(self.studies)

    @property
    def beside(self) -> dict[str, str]:
        """See `Study.beside`."""
        return next(iter(self.studies.values())).beside

    def place(self, part: str, task: str) -> str:
        """See `Study.place`."""
        return part if len(next(iter(self.studies.values())).tasks) == 1 else f"{part}, {task}"

    def lay_out(self, table: list[list[str]]) -> list[list[str]]:
        """See `Study.lay_out`: arms as columns."""
        return [list(row) for row in zip(*table, strict=True)]


# What the studies of a matrix have in common, in the words of an error.
_COMMON: dict[str, Callable[[Study], Any]] = {
    "arms that are driven are": lambda study: [name for name, arm in study.arms.items() if arm.driven],
    "its arms are compared with": lambda study: study.beside,
    "tasks are": lambda study: study.tasks,
    "episodes are": lambda study: study.episodes,
}


def file_problems(kind: str, names: Iterable[str]) -> list[str]:
    """Returns which names cannot be those of files beside each other."""
    problems, files = [], dict[str, str]()
    for name in names:
        if "/" in name or files.setdefault(slug(name), name) != name:
            other = "" if "/" in name else f", as {kind} {files[slug(name)]!r}"
            problems.append(f"{kind} {name!r}: its files would be {slug(name)!r}{other}; give it another name")
    return problems


def learning_curve(
    config: str,
    episodes: Sequence[int] = (5, 10, 25, 50),
    *,
    name: str = "{} episodes",
    start: str | None = None,
    reinitialize: tuple[str, ...] = (),
    set: tuple[str, ...] = (),
    beside: str | None = None,
) -> dict[str, Arm]:
    """Returns an arm for each number of episodes: the first so many of the first dataset of a run, and no more.

    Their statistics are of these episodes alone, as they would be if there were no others; the held-out ones of the
    config are the same for all. Give them to a `Study` whose `varies` is ("data",).
    config, start, reinitialize, set: see `Arm`. name, beside: of an arm and of the one that it is compared with, for
    its number of episodes.

    Raises:
        ValueError: a number of episodes is not above the one before it.
    """
    if not episodes or list(episodes) != sorted({*episodes}) or episodes[0] < 1:
        raise ValueError(f"episodes={tuple(episodes)}, expected numbers from 1 on, each greater than the one before")
    return {
        name.format(n): Arm(
            config,
            (*set, f"data.entries.0.split=train[:{n}]"),
            start,
            reinitialize,
            own_statistics=True,
            beside=None if beside is None else beside.format(n),
        )
        for n in episodes
    }


def unequal(
    configs: Mapping[str, TrainConfig], varies: Sequence[str] = (), beside: Mapping[str, str] | None = None
) -> list[str]:
    """Returns in what the runs of driven arms differ that a study keeps equal: `SAME` without what it varies.

    beside: arm -> the one that it is compared with, to which it is equal in what varies too. A run of no steps shows
    what another one has learned, whose equal it cannot be.
    """
    trained = {name: config for name, config in configs.items() if config.steps}
    first, problems = next(iter(trained), ""), []
    for name, config in trained.items():
        base = (beside or {}).get(name)
        equal_to = dict.fromkeys((f for f in SAME if f not in varies), first)
        equal_to |= dict.fromkeys(SAME, base) if base in trained else {}
        for field, other in equal_to.items():
            if to_json(getattr(config, field)) != to_json(getattr(trained[other], field)):
                problems.append(f"arm {name!r}: {field} is not that of {other!r}")
    return problems


def unequal_parts(study: Study | Matrix, configs: Mapping[str, Mapping[str, TrainConfig]]) -> list[str]:
    """Returns in what runs differ that a study, or a matrix of studies, keeps equal. configs: part -> arm -> run.

    In a matrix, an arm's runs are equal in all but their data.
    """
    problems = []
    for part, of in study.parts.items():
        problems += [f"{part}: {p}" if part else p for p in unequal(configs[part], of.varies, of.beside)]
    for name in next(iter(configs.values())):
        runs = {part: of[name] for part, of in configs.items()}
        problems += [f"arm {name!r} of {p.removeprefix('arm ')}" for p in unequal(runs, ("data",))]
    return problems


def study_rows(
    outcomes: Mapping[str, Mapping[tuple[str, int], bool]], beside: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Returns a row per arm: success per task and in all, with intervals, and beside another arm.

    outcomes: arm -> (task, seed) -> success; of a matrix of studies, places for tasks. beside: arm -> the one that it
    is compared with, if not the first.

    Raises:
        ValueError: the arms were not driven in the same episodes.
    """
    first = next(iter(outcomes))
    rows = []
    for name, found in outcomes.items():
        if found.keys() != outcomes[first].keys():
            raise ValueError(f"arm {name!r}: its episodes are not those of {first!r}; drive both again")
        base = (beside or {}).get(name, first)
        episodes = sorted(found)
        ours, theirs = [found[e] for e in episodes], [outcomes[base][e] for e in episodes]
        low, high = wilson(sum(ours), len(ours))
        tasks = {}
        for task in sorted({t for t, _ in episodes}):
            of = [found[e] for e in episodes if e[0] == task]
            tasks[task] = {"successes": sum(of), "episodes": len(of), "interval": wilson(sum(of), len(of))}
        row = {"arm": name, "successes": sum(ours), "episodes": len(ours), "interval": (low, high), "tasks": tasks}
        if name != base:
            row |= {"beside": base, "difference": paired_difference(theirs, ours), "p": mcnemar(theirs, ours)}
        rows.append(row)
    return rows
