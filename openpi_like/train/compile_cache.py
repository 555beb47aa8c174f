"""Compiled programs on disk, so that a run that is started again does not compile again."""

import os
from pathlib import Path

import jax

from openpi_like.data.files import cache_directory

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def use_compile_cache(directory: str | None) -> Path:
    """Keeps compiled programs in a directory, shared by all runs of this machine; returns it. Call it before compiling.

    directory: None takes `compiled` in `openpi_like.data.files.cache_directory`. jax's own variable comes before both.
    """
    path = Path(os.environ.get(VARIABLE) or directory or cache_directory() / "compiled").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(path))
    return path
