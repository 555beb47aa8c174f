"""Selections, and files of ranges to keep: what they keep, and what can be wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest

from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.selection import Selection
from tests.data.toy import ARM
from tests.data.toy_dataset import STEPS, TRAIN, by_step, kept_steps, problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"success_pattern": "("}, r"success_pattern '\(' is no regular expression: .*without success"),
        ({"min_length": 0, "skip_first": -1}, "min_length=0, .* skip_first=-1, skip_last=0, expected both >= 0"),
        ({"skip_last": -2}, "skip_first=0, skip_last=-2, expected both >= 0"),
        ({"idle_below": 0.0}, "idle_below=0.0, expected a number above 0"),
        ({"keep_ranges_key": ()}, "keep_ranges_key is empty"),
    ],
)
def test_selections_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Selection: .*{message}"):
        Selection(**changes)


def test_ranges_to_keep(dataset: EpisodeDataset, tmp_path: Path) -> None:
    """Ranges may overlap, be empty, or reach beyond the episode; episodes without an entry are left out."""
    ranges = {"é/0--ray": [[1, 3], [2, 5], [5, 5]], "é/6--ray": [[18, 99]], "é/9--ray": [], "of another": [[0, 1]]}
    (tmp_path / "ranges.json").write_text(json.dumps(ranges))
    selection = Selection(
        keep_ranges=str(tmp_path / "ranges.json"),
        keep_ranges_key=("episode_metadata/file_path", "episode_metadata/renderer"),
    )
    selected = EpisodeDataset(dataset.index, ARM, selection=selection)
    assert kept_steps(selected) == by_step(lambda e, t: (e == 0 and 1 <= t < 5) or (e == 6 and t >= 18))
    assert selected.removed == {
        "episode not in keep_ranges": STEPS - TRAIN[0] - TRAIN[6] - TRAIN[9],
        "not in keep_ranges": TRAIN[0] - 4 + 18 + TRAIN[9],
    }


def test_ranges_that_do_not_fit(dataset: EpisodeDataset, tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    where: dict[str, Any] = {"keep_ranges": str(path), "keep_ranges_key": ("episode_metadata/file_path",)}
    assert "No such file" in problem(dataset, **where)
    path.write_text("[1]")
    assert "expected JSON like {episode: [[start, end], ...]}" in problem(dataset, **where)
    path.write_text(json.dumps({"é/1": [[3, 1]], "é/2": [[0, 1]]}))
    assert "not 0 <= start <= end in ['é/1']" in problem(dataset, **where)
    path.write_text(json.dumps({"e/1": [[0, 1]]}))
    assert "it has names like 'e/1', the episodes have names like 'é/11'; correct keep_ranges_key" in problem(
        dataset, **where
    )
