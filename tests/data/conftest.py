"""Fixtures of the data tests: the toy dataset, its tokenizer, and TFDS to check against."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from openpi_like.data.text import TextTokenizer, fit_text_tokenizer
from tests.data.toy import PROMPTS, Shapes, write_toy


@pytest.fixture(scope="session")
def tfds() -> Any:
    """TFDS and TensorFlow, whose imports warn about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("tensorflow", reason="the cross-check needs the rlds extra")
        return pytest.importorskip("tensorflow_datasets")


@pytest.fixture(scope="session")
def toy(tfds: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy dataset as a TFDS directory. Tests that change it take `copy`."""
    directory = tmp_path_factory.mktemp("toy") / "toy_arm" / "1.0.0"
    directory.mkdir(parents=True)
    write_toy(tfds, directory)
    return directory


@pytest.fixture
def copy(toy: Path, tmp_path: Path) -> Path:
    """A copy of the toy dataset that a test may damage."""
    return Path(shutil.copytree(toy, tmp_path / "toy_arm" / "1.0.0", ignore=shutil.ignore_patterns(".openpi*")))


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(fit_text_tokenizer([*PROMPTS, "roll"], 400), Shapes().prompt_len)
