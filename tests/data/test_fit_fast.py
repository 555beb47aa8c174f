"""Fitting FAST to a mixture: what the report says, and that it says the same of a tokenizer that exists."""

import io
import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.fast import FastError, FastTokenizer
from openpi_like.data.index import open_index
from openpi_like.data.stats import compute_normalization, save_normalization
from tests.data.toy import ARM, CART

CONFIG = """
from types import SimpleNamespace
from openpi_like.batch import ActionTokens
from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.data.prompts import FastPrompt
from openpi_like.train.statistics import Own, load_statistics
from tests.data.toy import ARM, CART
import dataclasses

@dataclasses.dataclass(frozen=True)
class Run:
    data: DataConfig
    stats: str
    model: object
    tokenizer: str | None = None

    def normalizations(self):
        return load_statistics(Own(), self.stats, {{e.robot.name: e.robot for e in self.data.entries}}, None)

entries = (MixtureEntry(ARM, {toy!r}), MixtureEntry(CART, {toy!r}, split="val", val_split=None))
tokens = ActionTokens(max_len=6, count=300, skip=0)
config = Run(DataConfig(entries), {stats!r}, SimpleNamespace(action_tokens=tokens, prompt_format=FastPrompt()))
"""


@pytest.fixture(scope="module")
def program() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).resolve().parents[2] / "data" / "fit_fast.py")))


@pytest.fixture(scope="module")
def config(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fit")
    for robot, split in ((ARM, "train"), (CART, "val")):
        dataset = EpisodeDataset(open_index(toy, split), robot)
        save_normalization(compute_normalization(dataset), directory / f"{robot.name}.json")
    (directory / "run.py").write_text(CONFIG.format(toy=str(toy), stats=str(directory)))
    return directory / "run.py"


def fit(program: SimpleNamespace, config: Path, out: Path, **options: Any) -> tuple[list[dict[str, Any]], str]:
    text = io.StringIO()
    program.main(program.Args(config, out, **options), Console(file=text, width=200))
    return json.loads((out / "report.json").read_text()), text.getvalue()


def test_finer_scales_are_nearer_and_longer(program: SimpleNamespace, config: Path, tmp_path: Path) -> None:
    coarse, text = fit(program, config, tmp_path / "coarse", scale=4.0, vocab_size=400)
    fine, _ = fit(program, config, tmp_path / "fine", scale=40.0, vocab_size=1000)
    assert [row["name"] for row in coarse] == ["arm (held out)", "cart (training)"]
    for few, many, robot in zip(coarse, fine, (ARM, CART), strict=True):
        assert few["tokens_of_bins"] == robot.action_horizon * robot.action_size
        assert list(few["rmse"]["fast"]) == list(robot.robot_action_names)
        assert few["tokens"]["50"] <= many["tokens"]["50"]
        assert few["tokens"]["50"] <= few["tokens"]["95"] <= few["tokens"]["100"] <= few["tokens_of_bins"]
        errors = [np.mean(list(row["rmse"]["fast"].values())) for row in (few, many)]
        assert errors[1] < errors[0] / 4
        assert 0 <= few["too_long"] <= many["too_long"] <= 1
    assert "of 6" in text
    assert "chunks/s there and back" in text


def test_a_tokenizer_that_exists_is_measured_and_not_changed(
    program: SimpleNamespace, config: Path, tmp_path: Path
) -> None:
    before, _ = fit(program, config, tmp_path / "fit", scale=4.0, vocab_size=400)
    after, _ = fit(program, config, tmp_path / "used", use=tmp_path / "fit")
    for a, b in zip(before, after, strict=True):
        assert min(a.pop("chunks_per_s"), b.pop("chunks_per_s")) > 0
        assert a == b
    assert not (tmp_path / "used" / "tokenizer.json").exists()
    assert FastTokenizer.load(tmp_path / "fit").scale == 4.0
    with pytest.raises(FastError, match=r"lacks processor_config.json"):
        fit(program, config, tmp_path / "none", use=tmp_path / "nowhere")
    with pytest.raises(FastError, match=r"vocab_size=10, expected more than the \d+ coefficients"):
        fit(program, config, tmp_path / "small", vocab_size=10)


def test_bins_round_to_their_centres(program: SimpleNamespace) -> None:
    x = np.array([-2.0, -1.0, 0.0, 0.9999, 3.0], np.float32)
    np.testing.assert_allclose(program.binned(x), np.array([-255, -255, 1, 255, 255]) / 256, atol=1e-6)
