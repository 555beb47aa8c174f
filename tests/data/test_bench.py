"""data/bench.py: what it measures of one dataset and of a run. No time is asserted."""

import io
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.data.damage import check_images
from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.index import open_index
from openpi_like.data.loader import make_loader
from openpi_like.data.schema import DatasetError
from openpi_like.data.stats import compute_normalization, save_normalization
from openpi_like.data.text import TextTokenizer
from tests.data.toy import ARM, CART, Shapes, change_record, model_of, shard

CONFIG = """
from types import SimpleNamespace
from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.train.statistics import Own, load_statistics
from tests.data.toy import ARM, CART, Shapes
import dataclasses

@dataclasses.dataclass(frozen=True)
class Model(Shapes):
    answer_len: int = 0

@dataclasses.dataclass(frozen=True)
class Run:
    data: DataConfig
    stats: str
    tokenizer: str | None
    model: Model = Model()
    batch_size: int = 6
    action_tokenizer: None = None

    def normalizations(self):
        return load_statistics(Own(), self.stats, {{e.robot.name: e.robot for e in self.data.entries}}, None)

entries = (MixtureEntry(ARM, {toy!r}), MixtureEntry(CART, {toy!r}, split="val", val_split=None))
config = Run(DataConfig(entries), {directory!r}, {directory!r} + "/text.model")
"""


@pytest.fixture(scope="module")
def program() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).resolve().parents[2] / "data" / "bench.py")))


@pytest.fixture(scope="module")
def config(toy: Path, tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench")
    for robot, split in ((ARM, "train"), (CART, "val")):
        dataset = EpisodeDataset(open_index(toy, split), robot)
        save_normalization(compute_normalization(dataset), directory / f"{robot.name}.json")
        dataset.close()
    (directory / "text.model").write_bytes(model_of(tokenizer))
    (directory / "run.py").write_text(CONFIG.format(toy=str(toy), directory=str(directory)))
    return directory / "run.py"


def bench(program: SimpleNamespace, **options: Any) -> str:
    text = io.StringIO()
    program.main(program.Args(seconds=0.05, warm_up=1, **options), Console(file=text, width=200))
    return text.getvalue()


def test_a_dataset_is_read_with_statistics_of_its_own(program, toy):
    out = bench(program, data=toy, robot="tests.data.toy:ARM", batch_size=4, size=32)
    assert "index: 110 steps of 12 episodes" in out
    for row in ("first batch", "samples/s", "CPU per sample", "waited for data", "resident"):
        assert row in out


def test_damaged_images_are_tolerated_when_asked(program, copy):
    whole = open_index(copy, "train").read_image(5, "observation/image")
    change_record(shard(copy), 0, lambda data: data.replace(whole, b"x" * len(whole)))
    check_images(open_index(copy, "train"))
    options = dict(data=copy, robot="tests.data.toy:ARM", batch_size=110, size=32)
    with pytest.raises(DatasetError, match="at 1 of 110 steps an image of its cameras is damaged"):
        bench(program, **options)
    assert "samples/s" in bench(program, **options, max_corrupt_fraction=0.01)  # every frame is drawn


def test_a_robot_without_language_can_be_read(program, toy):
    assert "samples/s" in bench(program, data=toy, robot="tests.data.toy:CART", batch_size=4, size=32)


def test_a_run_is_read_as_it_would_train(program, config, capsys):
    assert "samples/s" in bench(program, config=config, set=("data.num_threads=1",))
    assert "in 2 datasets" in capsys.readouterr().out  # the loader's own line


@pytest.mark.parametrize("step_ms", [0.0, 20.0])
def test_measures_are_consistent(program, toy, tokenizer, step_ms):
    dataset = EpisodeDataset(open_index(toy, "train"), ARM)
    loader = make_loader(
        DataConfig((MixtureEntry(ARM, str(toy)),)),
        batch_size=8,
        policy=Shapes(),
        tokenizer=tokenizer,
        normalizations={ARM.name: compute_normalization(dataset)},
    )
    args = program.Args(data=toy, robot="arm", seconds=0.2, warm_up=3, step_ms=step_ms)
    found = program.measure(loader, args)
    loader.close()
    dataset.close()
    assert found["samples"] % 8 == 0
    assert loader.position == found["samples"] + 3 * 8
    assert found["images"] == len(ARM.cameras)
    assert 0 <= found["wait"] <= 1
    seconds = found["samples"] / found["samples_per_s"]
    assert found["cores"] * seconds == pytest.approx(found["cpu_ms"] * found["samples"] / 1e3)
    assert seconds >= 0.2
    if step_ms:  # so many steps at most
        assert found["samples"] / 8 <= seconds / (step_ms / 1e3) + 1
        assert found["wait"] <= 1 - found["samples"] / 8 * step_ms / 1e3 / seconds


@pytest.mark.parametrize(
    "options",
    [{}, {"data": Path("x")}, {"robot": "arm"}, {"data": Path("x"), "robot": "arm", "config": Path("y")}],
)
def test_a_dataset_with_its_robot_or_a_run_is_asked_for(program, options):
    with pytest.raises(ValueError, match=r"TFDS directory with --robot, or a run with --config"):
        program.Args(**options)


def test_an_unknown_robot_is_named(program, toy):
    with pytest.raises(ValueError, match=r"no robot 'widowy'.*did you mean 'widowx'"):
        bench(program, data=toy, robot="widowy")


def test_a_run_without_a_tokenizer_says_how_to_give_one(program, config):
    with pytest.raises(ValueError, match=r"--set tokenizer="):
        bench(program, config=config, set=("tokenizer=None",))


def test_a_run_without_statistics_says_how_to_make_them(program, config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no statistics .*arm.json.*data/stats.py"):
        bench(program, config=config, set=(f"stats={tmp_path}",))
