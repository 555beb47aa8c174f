"""One run is the same run on every mesh, and on several processes: losses of the first 20 steps of some policies.

The suite runs pi0 on those that split weights in two ways or more, and on the one that splits everything two others,
whose parts are those of all; OPENPI_LIKE_ALL_MESHES=1 runs all on all, which takes some minutes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compile_flags import IN_A_HURRY

ROOT = Path(__file__).resolve().parents[2]
MESHES = ("1x1x1", "8x1x1", "1x8x1", "2x2x2", "1x2x4")
EVERYTHING = bool(os.environ.get("OPENPI_LIKE_ALL_MESHES"))
SOME = ("pi0", "insulated", "smolvla")
POLICIES = (*SOME, "pi0_entities", "pi0_perception", "fast", "text_waypoints") if EVERYTHING else SOME
STEPS = 20
# A perception says what is there and what is not: a query near the border is turned by rounding sooner or later.
EQUAL_STEPS = {"pi0_perception": 12}
TOLERANCE = 2e-6  # of a loss, or of 1 where it is less: sums are taken in another order


def _start(devices: int, *arguments: str) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={devices} {IN_A_HURRY}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    program = [sys.executable, str(ROOT / "tests" / "train" / "mesh_losses.py"), str(STEPS), *arguments]
    return subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _lines(process: subprocess.Popen[str]) -> list[dict]:
    out, err = process.communicate()
    assert process.returncode == 0, out[-2000:] + err[-4000:]
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_losses_are_equal_on_every_mesh_and_on_two_processes(address):
    """Eight devices; and two processes with four each, which gather weights from one another, or are a slice each."""
    most, others = (MESHES, MESHES) if EVERYTHING else (("1x1x1", "2x2x2", "1x2x4"), ("1x1x1", "2x2x2"))
    lines = _lines(_start(8, "pi0", *most)) + _lines(_start(8, ",".join(POLICIES[1:]), *others))
    shared = ",".join(POLICIES) if EVERYTHING else "pi0"
    split, nothing = map(_lines, [_start(4, shared, "1x8x1", "2x4x1:2", address, "2", str(rank)) for rank in range(2)])
    assert not nothing  # the first process speaks for both
    alone = {line["policy"]: line["losses"] for line in lines if line["mesh"] == "1x1x1"}
    assert set(alone) == set(POLICIES)
    expected_pairs = {(p, m) for p in POLICIES for m in (most if p == "pi0" else others)}
    assert {(line["policy"], line["mesh"]) for line in lines} == expected_pairs
    assert {(line["policy"], line["mesh"]) for line in split} == {
        (p, m) for p in shared.split(",") for m in ("1x8x1", "2x4x1:2")
    }
    assert {line["processes"] for line in split} == {2}
    for line in lines + split:
        expected = alone[line["policy"]]
        assert len(line["losses"]) == STEPS
        # It learns: equal losses are no constants. Characters of a plan are learned more slowly.
        assert expected[-1] < (0.7 if line["policy"] == "text_waypoints" else 0.6) * expected[0]
        n = EQUAL_STEPS.get(line["policy"], STEPS)
        near = pytest.approx(expected[:n], rel=TOLERANCE, abs=TOLERANCE)
        assert line["losses"][:n] == near, (line["policy"], line["mesh"])
