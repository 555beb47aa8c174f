"""What all tests of golden vectors share: opening a file, and tolerances from the set's README."""

import functools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

# Vision, prefix, cache, logits of text.
assert_tokens = functools.partial(np.testing.assert_allclose, atol=3e-5, rtol=0)
# Behind the time embedding, whose float32 phase is only good to 1e-4.
assert_flow = functools.partial(np.testing.assert_allclose, atol=5e-4, rtol=0)
assert_bfloat16 = functools.partial(np.testing.assert_allclose, atol=5e-2, rtol=0)


def open_golden(path: Path) -> dict[str, Any]:
    """Returns the arrays of one file, on the device; text stays numpy."""
    if not path.is_file():
        pytest.skip(f"no golden vectors: {path} is absent; set OPENPI_LIKE_GOLDEN to a directory that has it")
    with np.load(path, allow_pickle=False) as archive:
        return {k: v if v.dtype.kind == "U" else jnp.asarray(v) for k, v in archive.items()}


def config_json(arrays: dict[str, Any]) -> dict[str, Any]:
    """Returns the configuration a file was computed with."""
    return json.loads(str(arrays["config_json"]))


def patch_size(siglip: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `SiglipConfig`: its patches are square."""
    patch, *other = set(siglip["patch_size"])
    assert not other, "square patches only"
    return {**siglip, "patch_size": patch}
