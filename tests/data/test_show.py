"""The program that shows a dataset: what it prints and writes is what is in it."""

import base64
import dataclasses
import io
import itertools
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from openpi_like.data.episode_sample import Sample
from openpi_like.data.index import open_index
from openpi_like.data.schema import DatasetError
from tests.conftest import REPOSITORY

PROGRAM = REPOSITORY / "data" / "show.py"


@pytest.fixture(scope="module")
def program() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(PROGRAM)))


def run(program: SimpleNamespace, data: Path, **options: Any) -> str:
    text = io.StringIO()
    program.main(program.Args(str(data), **options), Console(file=text, width=300))
    return text.getvalue()


def test_report_is_one_file_with_everything(program: SimpleNamespace, toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    text = run(program, toy, out=out, episodes=3, frames=2)
    page = out.read_text()
    assert "12 episodes, 110 steps; an episode has 1 to 20 steps, 8.5 in the median" in text
    for shown in (text, page):
        for part in ("step: observation/grid", "episode: episode_metadata/success", "Suspected traps: 1", "(empty)"):
            assert part in shown
        for dim in ("action[2]", "observation/joints[0]", "observation/present/x[0]"):
            assert dim in shown
    assert "http:" not in page  # it needs nothing else; "http" alone may stand in base64
    assert "https:" not in page
    # two cameras, three episodes, two frames
    pictures = re.findall(r"data:image/(\w+);base64,([^\"]*)", page)
    assert [kind for kind, _ in pictures] == ["png", "png", "jpeg"]
    sheet = Image.open(io.BytesIO(base64.b64decode(pictures[2][1])))
    assert sheet.size == (2 * 2 * 128, 3 * 128)


def test_contact_sheet_has_the_frames(program: SimpleNamespace, toy: Path, tmp_path: Path, tfds: Any) -> None:
    run(program, toy, out=tmp_path / "sheet.png", episodes=2, frames=1)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (256, 256, 3)
    builder = tfds.builder_from_directory(toy)
    episodes = list(builder.as_dataset(split="train"))
    for row, episode in enumerate((episodes[0], episodes[-1])):
        wrist = next(iter(episode["steps"]))["observation"]["wrist"].numpy()  # one colour, 24 x 16
        tile = sheet[row * 128 : (row + 1) * 128, 128:]
        np.testing.assert_allclose(tile[64, 64], wrist[12, 8], atol=3)
        assert not tile[:, :20].any()  # kept in proportion


def test_control_rate_by_time_stamps(program: SimpleNamespace, toy: Path) -> None:
    toy_index, time = open_index(toy, "train"), np.array([0.0, 0.2, 0.4, 0.6, 5.0, 5.2])

    def rate(**columns: np.ndarray) -> str:
        index = dataclasses.replace(toy_index, columns=columns, episode_start=np.array([0, 4, 6]))
        return program.control_rate(Sample.take(dataclasses.replace(index, episode_shard=np.zeros(2))))

    assert rate(timestamp=time).startswith("0.2 of timestamp between steps in the median (5 Hz")
    assert rate(timestamp=time[::-1], state=time).startswith("not in the data")


def test_a_large_dataset_is_sampled_and_says_so(program: SimpleNamespace, toy: Path, tmp_path: Path) -> None:
    """Least and greatest values are those of all steps, whatever is sampled."""
    text = run(program, toy, steps=40, out=tmp_path / "report.html")
    sampled = "40 of 110 steps, those of 4 of 12 episodes, evenly spaced"
    for shown in (text, (tmp_path / "report.html").read_text()):
        for title in ("Suspected traps in ", "Numbers: min and max of all steps, the others of "):
            assert f"{title}{sampled}" in " ".join(shown.split())  # titles are wrapped
    index = open_index(toy, "train")
    episodes = [np.asarray(index.columns["action"])[a:b] for a, b in itertools.pairwise(index.episode_start)]
    all_, some = np.concatenate(episodes)[:, 1], np.concatenate(episodes[::3])[:, 1]
    (line,) = [line for line in text.splitlines() if "action[1]" in line and "│" in line]
    _, _, low, _, middle, _, high, mean, _, _ = (cell.strip() for cell in line.split("│"))
    assert [low, high] == [f"{all_.min():.4g}", f"{all_.max():.4g}"]
    assert [middle, mean] == [f"{np.median(some):.4g}", f"{some.astype(np.float64).mean():.4g}"]
    whole = run(program, toy)
    assert "evenly spaced" not in whole
    assert whole.splitlines()[-1] == f"next: python data/draft_robot.py {toy} --out my_robot.py"


def test_bridge_traps_are_named(program: SimpleNamespace, bridge: Path, tmp_path: Path) -> None:
    text = run(program, bridge, index_dir=tmp_path)
    assert "Suspected traps: 3" in text
    assert "next: --robot bridge_dataset describes it (openpi_like/robots/oxe.py), or python data/draft_ro" in text
    assert re.search(r"black camera +│ observation/image_3 +│ 32 of 32 sampled images are black; 100% of all", text)
    assert "zero first action" in text
    assert "False at the end of 25 of 25 episodes" in text


def test_nothing_suspicious(program: SimpleNamespace, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(program.main.__globals__, "find_traps", lambda sample, images: [])
    assert "nothing suspicious found" in run(program, toy, split="val")


def test_refusals(program: SimpleNamespace, toy: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"--frames 0, expected at least 1; --out .*x.gif, expected a name that ends in"
    ):
        program.Args(str(toy), frames=0, out=tmp_path / "x.gif")
    with pytest.raises(ValueError, match=r"there is no directory .*nowhere; make it first"):
        program.Args(str(toy), out=tmp_path / "nowhere" / "x.html")
    with pytest.raises(DatasetError, match="no dataset directory"):
        run(program, tmp_path / "nowhere")
    (copy / "features.json").write_text(json.dumps({"featuresDict": {"features": {}}}))
    with pytest.raises(DatasetError, match="no sequence 'steps', so this is not RLDS"):
        run(program, copy)


def test_from_a_shell(toy: Path, tmp_path: Path) -> None:
    def start(*options: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, str(PROGRAM), *options], capture_output=True, text=True, check=False)

    done = start(str(toy), "--out", str(tmp_path / "r.html"))
    assert (done.returncode, done.stderr) == (0, "")
    failed = start(str(toy), "--split", "tset")
    assert failed.returncode == 1
    assert "no split 'tset'; known: 'train', 'val'" in failed.stderr
    assert "Traceback" not in failed.stderr
