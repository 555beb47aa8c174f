"""Advice for what does not fit, and the search for the fastest that does."""

import dataclasses

import pytest

from openpi_like.train.config import TrainConfig
from openpi_like.train.planning.plan import Memory, Plan, Roofline
from openpi_like.train.planning.search import candidates, search, suggestions
from openpi_like.train.planning.topology import Target

# Programs are compiled once, see `compile_once`.
pytestmark = pytest.mark.usefixtures("compile_once")


def plan_of(memory: Memory, *, problem: str | None, remat: str | None, mesh: tuple[int, int, int]) -> Plan:
    sizes = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
    return Plan("training step", "toy", "toy", sizes, 8, remat=remat, memory=memory, problem=problem)


def test_advice_is_for_what_takes_the_memory(config: TrainConfig, machine: Target) -> None:
    full = Memory(
        weights=200, frozen=0, optimizer=400, ema=200, batch=1, arguments=801, temporaries=400, peak=1201, limit=1000
    )
    plan = plan_of(full, problem="too large", remat=None, mesh=(4, 1, 1))
    advice = "\n".join(suggestions(config, plan, machine))
    for said in (
        "mesh.data=1 mesh.fsdp=4",
        "model.remat=nothing_saveable",
        "accumulate=2",
        "ema_decay=None",
        "8 chips",
    ):
        assert said in advice
    least = plan_of(full, problem="too large", remat="nothing_saveable", mesh=(1, 4, 1))
    advice = "\n".join(suggestions(config, least, machine))
    assert "mesh." not in advice
    assert "remat" not in advice
    roomy = Memory(
        weights=20, frozen=0, optimizer=40, ema=20, batch=1, arguments=81, temporaries=100, peak=181, limit=1000
    )
    (only,) = suggestions(config, plan_of(roomy, problem=None, remat="nothing_saveable", mesh=(1, 4, 1)), machine)
    assert only.startswith("model.remat=dots_saveable")


def test_candidates_divide_and_hold_the_state(config: TrainConfig, machine: Target, step: Plan) -> None:
    every = candidates(config, machine)
    meshes = {(c.config.mesh.data, c.config.mesh.fsdp, c.config.mesh.tensor) for c in every}
    assert meshes == {(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)}
    assert step.memory is not None
    tight = dataclasses.replace(machine, limit=int(4 * step.memory.weights / 0.94))  # the state in two parts
    assert {c.config.mesh.data for c in candidates(config, tight)} <= {1, 2}
    assert len(candidates(config, tight)) < len(every)


def test_search_compiles_few_and_puts_the_fastest_that_fits_first(
    config: TrainConfig, machine: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a compiler of our own: whatever has no remat does not fit, and tensor parallel steps are slowest."""

    def compiled(changed: TrainConfig, target: Target) -> Plan:
        memory = Memory(1, 0, 2, 1, 1, 5, 2**40 if changed.model.remat is None else 10, 20, 2**30)
        made = plan_of(
            memory,
            problem="needs more" if changed.model.remat is None else None,
            remat=changed.model.remat,
            mesh=(changed.mesh.data, changed.mesh.fsdp, changed.mesh.tensor),
        )
        return dataclasses.replace(made, roofline=Roofline(float(changed.mesh.tensor), 0.5, 1 / changed.mesh.data))

    monkeypatch.setattr("openpi_like.train.planning.search.plan_step", compiled)
    seen: list[Plan] = []
    found = search(config, machine, compiles=4, done=seen.append)
    assert len(seen) == len(found) == 4
    plans = [plan for _, plan in found]
    assert plans[0].fits
    assert plans[0].roofline is not None
    assert plans[0].roofline.bound == min(p.roofline.bound for p in plans if p.fits and p.roofline)
    assert [p.fits for p in plans] == sorted((p.fits for p in plans), reverse=True)
    # Once that did not fit without remat, no other mesh is tried so: temporaries alone are too many.
    assert [p.fits for p in seen] == [False, True, True, True]
    chosen, best = found[0]
    assert chosen.model.remat == best.remat
