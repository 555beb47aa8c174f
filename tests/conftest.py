"""Strict numerics and several devices for every test; shared facts where they are there."""

import os
from pathlib import Path

# Before jax is imported anywhere: four devices, so that shardings are real.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of facts and real data beside the repository; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED.name} beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def bridge(shared: Path) -> Path:
    """Real Bridge V2 episodes as a TFDS directory."""
    return shared / "data" / "bridge_dataset" / "1.0.0"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Directory of golden vectors: `OPENPI_LIKE_GOLDEN`, or the set beside the repository."""
    directory = Path(os.environ.get("OPENPI_LIKE_GOLDEN", SHARED / "golden"))
    if not directory.is_dir():
        pytest.skip(f"no golden vectors: {directory} is absent; set OPENPI_LIKE_GOLDEN")
    return directory
