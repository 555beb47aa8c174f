"""Fixtures of the data tests: the toy dataset, its tokenizer and loaders, and TFDS to check against."""

import dataclasses
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from openpi_like.data import files, tfrecord
from openpi_like.data.augment import Augment
from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.files import Location
from openpi_like.data.index import FrameIndex, open_index
from openpi_like.data.loader import Loader, make_loader
from openpi_like.data.normalize import Normalization
from openpi_like.data.sentencepiece_model import fit_text_tokenizer
from openpi_like.data.stats import compute_normalization
from openpi_like.data.storage import RecordError
from openpi_like.data.text import TextTokenizer
from tests.data.odd import copied, write_odd
from tests.data.robot_check.arm import write_arm
from tests.data.toy import ARM, CART, PROMPTS, SOME, TOLD, Shapes, write_toy


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


@pytest.fixture(scope="session")
def dataset(toy: Path) -> EpisodeDataset:
    """All training episodes of the toy dataset, as its arm sees them."""
    return EpisodeDataset(open_index(toy, "train"), ARM)


@pytest.fixture
def copy(toy: Path, tmp_path: Path) -> Path:
    """A copy of the toy dataset that a test may damage."""
    return Path(shutil.copytree(toy, tmp_path / "toy_arm" / "1.0.0", ignore=shutil.ignore_patterns(".openpi*")))


@pytest.fixture
def odd_copy(odd: Path, tmp_path: Path) -> Path:
    """A copy of the dataset of odd fields that a test may damage."""
    return copied(odd, tmp_path)


@pytest.fixture
def shards_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of TFRecord files that are read in this process, in order."""
    names: list[str] = []
    read = tfrecord.read_records

    def noted(path: Location) -> Iterator[tuple[int, bytes | RecordError]]:
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(tfrecord, "read_records", noted)
    return names


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty store in memory, and a cache directory of this test."""
    monkeypatch.setenv(files.CACHE_VARIABLE, str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.fixture(scope="session")
def odd(tfds: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of odd fields as a TFDS directory of TFRecord files."""
    return _odd(tfds, tmp_path_factory, "tfrecord")


@pytest.fixture(scope="session")
def odd_arrays(tfds: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same dataset in ArrayRecord files."""
    return _odd(tfds, tmp_path_factory, "array_record")


def _odd(tfds: Any, tmp_path_factory: pytest.TempPathFactory, file_format: str) -> Path:
    directory = tmp_path_factory.mktemp(file_format) / "odd" / "1.0.0"
    directory.mkdir(parents=True)
    write_odd(tfds, directory, file_format)
    return directory


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(fit_text_tokenizer([*PROMPTS, "roll"], 400), Shapes().prompt_len)


@pytest.fixture(scope="session")
def normalizations(toy: Path) -> dict[str, Normalization]:
    """Of both robots of the toy dataset."""
    return {r.name: compute_normalization(EpisodeDataset(open_index(toy, "train"), r)) for r in (ARM, CART)}


@pytest.fixture(scope="session")
def config(toy: Path) -> DataConfig:
    """Three of four samples from one robot, one of four from the other, whose "training" data is the small split."""
    return DataConfig(
        entries=(
            MixtureEntry(ARM, str(toy), weight=3.0),
            MixtureEntry(CART, str(toy), weight=1.0, split="val", val_split=None),
        ),
        seed=5,
        augment=Augment.octo(),
        camera_dropout=0.3,
    )


@pytest.fixture
def load(config: DataConfig, tokenizer: TextTokenizer, normalizations: dict[str, Normalization]) -> Iterator[Any]:
    """Makes loaders of the config and closes them."""
    made: list[Loader] = []

    def make(**options: Any) -> Loader:
        defaults: dict[str, Any] = dict(
            batch_size=8, policy=Shapes(), tokenizer=tokenizer, normalizations=normalizations
        )
        changes = {k: options.pop(k) for k in list(options) if k in {f.name for f in dataclasses.fields(DataConfig)}}
        made.append(make_loader(dataclasses.replace(config, **changes), **(defaults | options)))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


@pytest.fixture
def everything(config: DataConfig) -> dict[str, Any]:
    """Options of a loader that draws all there is to draw: order in groups, instructions, cameras; of some steps."""
    told = dataclasses.replace(config.entries[0], robot=TOLD, selection=SOME)
    return {"entries": (told, config.entries[1]), "group_episodes": 4}


@pytest.fixture(scope="session")
def arm_directory(tfds: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The arm's dataset as a TFDS directory."""
    return write_arm(tmp_path_factory.mktemp("arm"))


@pytest.fixture(scope="session")
def arm_index(arm_directory: Path) -> FrameIndex:
    """Its index."""
    return open_index(arm_directory, "train")


@pytest.fixture(scope="session")
def lerobots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LeRobot dataset of each version: one camera as video, one as pictures."""
    from tests.data.toy_lerobot import MIXED, WRITERS  # needs pyarrow and PyAV, other tests do not

    return {version: write(tmp_path_factory.mktemp(version) / "toy", MIXED) for version, write in WRITERS.items()}


@pytest.fixture
def lerobot(lerobots: dict[str, Path], tmp_path: Path, version: str) -> Path:
    """One of them, of the version that a test names, which the test may damage."""
    return Path(shutil.copytree(lerobots[version], tmp_path / "toy", ignore=shutil.ignore_patterns(".openpi*")))
