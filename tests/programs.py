"""The project's programs as users start them, for tests of whole chains."""

import os
import subprocess
import sys

from tests.conftest import REPOSITORY

# One device, as a user on a laptop has, and compiled programs shared between the runs: most of them are the same.
CACHE = {
    "JAX_COMPILATION_CACHE_DIR": os.path.join(os.environ["OPENPI_LIKE_CACHE"], "compiled_by_programs"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
ENVIRONMENT = {**os.environ, **CACHE, "XLA_FLAGS": "", "OPENPI_LIKE_RENDERER": "raycast"}
PULSE = ("--scale", "pulse", "--workers", "1")  # to start a process takes longer than to simulate an episode


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a program to its end. environment: variables beside `ENVIRONMENT`."""
    env = ENVIRONMENT | environment
    return subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, env=env, capture_output=True, text=True)
