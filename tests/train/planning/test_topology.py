"""Machines that are described by a name: those that do not exist, and how meshes lie on those that do."""

import importlib.util
import os
import subprocess
import sys

import pytest

from openpi_like.train.planning.topology import TopologyError, find_target
from tests.conftest import REPOSITORY

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[plan]'"
)


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ("v5f:4x4", "no chip 'v5f'; did you mean 'v5p', 'v5e'"),
        ("v5e:4x5", "there is no such slice; did you mean"),
        ("v5e:32x32", "there is no such slice"),
        ("v5e", "expected v5e:4x4 or the like"),
        ("v5p:4x4", "expected 3 axes and at most 6,144 chips, such as v5p:2x2x4"),
        ("v5p:64x64x64", "at most 6,144 chips"),
        ("h100:6", "expected 1, 2 or a multiple of 4 GPUs"),
        ("h100:4x4", "expected the number of GPUs, h100:8"),
        ("rtx4090:16", "expected at most 8"),
        ("cpu:8", "no chip 'cpu'"),
    ],
)
def test_machines_that_do_not_exist_are_refused(topology: str, said: str) -> None:
    with pytest.raises(TopologyError, match=said):
        find_target(topology)


def test_without_libtpu_nothing_is_planned_for_tpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TopologyError, match=r"needs libtpu to compile for; pip install -e '\.\[plan\]'"):
        find_target("v5e:4x4")


@needs_libtpu
def test_meshes_lie_on_tori_and_slices() -> None:
    """`fsdp` over 64 of 4 x 4 x 8 chips takes a part of an axis of the torus; `data` goes over slices."""
    program = (
        "import runpy; runpy.run_path('train/plan.py')['prepare_environment']()\n"
        "from openpi_like.train.planning.topology import find_target\n"
        "from openpi_like.train.sharding import MeshConfig\n"
        "print(dict(MeshConfig(fsdp=64).create(find_target('v5p:4x4x8').devices).shape))\n"
        "two = find_target('v5e:2x2', slices=2).devices\n"
        "mesh = MeshConfig(fsdp=2, tensor=2, slices=2).create(two)\n"
        "print([{d.slice_index for d in row.ravel()} for row in mesh.devices])\n"
        "try: MeshConfig(data=1, fsdp=8).create(two)\n"
        "except ValueError as e: print(e)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "{'data': 2, 'fsdp': 64, 'tensor': 1}",
        "[{0}, {1}]",
        "mesh: slices=1, expected 2: so many slices these devices are of",
    ]
