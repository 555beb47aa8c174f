"""Strict numerics and several devices for every test; shared facts where they are there."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from tests.compile_flags import IN_A_HURRY

# Before jax is imported anywhere: four devices, so that shardings are real.
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=4 {IN_A_HURRY} {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# The renderer that every machine has; OpenGL and TensorFlow in one process crash each other.
os.environ.setdefault("OPENPI_LIKE_RENDERER", "raycast")

# The processes of the tests, and programs that they start, compile many functions alike: each is compiled once. Nothing
# is kept in the home directory. The process that starts the others makes the directory, and removes it.
if "OPENPI_LIKE_CACHE" not in os.environ:
    os.environ["OPENPI_LIKE_CACHE"] = _cache = tempfile.mkdtemp(prefix="openpi_like_tests_")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(_cache, "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)

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
    chosen = os.environ.get("OPENPI_LIKE_GOLDEN")
    directory = Path(chosen or SHARED / "golden")
    if chosen and not any(directory.glob("item*.npz")):
        pytest.fail(f"OPENPI_LIKE_GOLDEN={chosen} holds no item*.npz")
    if not directory.is_dir():
        pytest.skip(f"no golden vectors: {directory} is absent; set OPENPI_LIKE_GOLDEN")
    return directory


@pytest.fixture(scope="session")
def tiny_policy():
    """Smallest pi0 that has every part: two cameras, state, padded dims."""
    from openpi_like.models.gemma import GemmaConfig
    from openpi_like.models.paligemma import PaliGemmaConfig
    from openpi_like.models.pi0 import Pi0Config
    from openpi_like.models.siglip import SiglipConfig

    gemma = GemmaConfig(width=16, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8)
    return Pi0Config(
        backbone=PaliGemmaConfig(SiglipConfig(width=16, depth=1, mlp_dim=32, num_heads=2, patch_size=8), gemma),
        expert=gemma,
        cameras=("base", "wrist_right"),
        image_size=(16, 16),
        state_dim=4,
        action_dim=4,
        action_horizon=4,
        prompt_len=8,
        vocab_size=300,
    )


@pytest.fixture(scope="session")
def tiny_batch(tiny_policy):
    """Eight random samples of two datasets for `tiny_policy`; the second has neither a wrist camera nor all dims."""
    import numpy as np

    rng = np.random.default_rng(0)
    p, B = tiny_policy, 8
    dataset = np.arange(B, dtype=np.int32) % 2
    position = 2**32 - 3 + np.arange(B)  # across the border of the words
    action_mask = np.ones((B, p.action_horizon, p.action_dim), bool)
    action_mask[dataset == 1, :, 3:] = False
    action_mask[3, 2:] = False
    state_mask = np.ones((B, p.state_dim), bool)
    prompt_mask = np.arange(p.prompt_len) < rng.integers(2, p.prompt_len, (B, 1))
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    return {
        "images": {c: rng.integers(0, 256, (B, *p.image_size, 3), dtype=np.uint8) for c in p.cameras},
        "image_mask": {"base": np.ones(B, bool), "wrist_right": dataset == 0},
        "state": draw(B, p.state_dim),
        "state_mask": state_mask,
        "prompt": np.where(prompt_mask, rng.integers(4, p.vocab_size, prompt_mask.shape), 0).astype(np.int32),
        "prompt_mask": prompt_mask,
        "actions": np.where(action_mask, draw(*action_mask.shape), 0).astype(np.float32),
        "action_mask": action_mask,
        "dataset_id": dataset,
        "position": np.stack([position >> 32, position & 0xFFFFFFFF], axis=1).astype(np.uint32),
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take longest first, so that the processes of the suite end together."""
    longest = ("test_pulse.py", "test_meshes.py", "test_pulse_driving.py")
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))
