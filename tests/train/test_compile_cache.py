"""Compiled programs on disk: found by the next process, where the user wants them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from openpi_like.train.compile_cache import VARIABLE

PROGRAM = """
import sys
import jax
from openpi_like.train.compile_cache import use_compile_cache

print(use_compile_cache(sys.argv[1] or None))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # this one compiles in no time
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
print(jax.jit(lambda x: x * 3 + 1)(jax.numpy.arange(4)).sum(), len(hits) > 0)
"""


def run(directory: str, **variables: str) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE} | variables
    done = subprocess.run([sys.executable, "-c", PROGRAM, directory], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("where", ["given", "variable", "default"])
def test_the_next_process_does_not_compile_again(tmp_path: Path, where: str) -> None:
    directory = str(tmp_path / "given") if where == "given" else ""
    variables = {"OPENPI_LIKE_CACHE": str(tmp_path / "default")}
    if where == "variable":
        variables[VARIABLE] = str(tmp_path / "variable")
    expected = tmp_path / where / ("compiled" if where == "default" else "")
    assert run(directory, **variables) == [str(expected), "22", "False"]
    assert any(expected.iterdir())
    assert run(directory, **variables) == [str(expected), "22", "True"]
