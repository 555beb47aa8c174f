"""The first batch as pictures: what is drawn is what is trained on, and drawing never ends a run."""

import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from openpi_like.data.augment import Augment, augment_batch
from openpi_like.data.sentencepiece_model import fit_text_tokenizer
from openpi_like.data.text import TextTokenizer
from openpi_like.draws import named_key
from openpi_like.models.siglip import LayerNorm
from openpi_like.partition import ShardingRules
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.sharding import MeshConfig
from openpi_like.train.state import ModelDef, Trainer
from openpi_like.train.watching.pictures import Look, choose_samples, draw, look_at, picture_batch

PROMPTS = ("push it", "open the door")


@pytest.fixture(scope="module")
def reader() -> TextTokenizer:
    return TextTokenizer(fit_text_tokenizer(PROMPTS, 290), 8)


@pytest.fixture(scope="module")
def batch(tiny_batch: Any, reader: TextTokenizer) -> Any:
    """`tiny_batch` with instructions of words."""
    prompt, mask = reader.batch([PROMPTS[i % 2] for i in range(8)], [np.zeros(0, np.float32)] * 8)
    return tiny_batch | {"prompt": prompt, "prompt_mask": mask}


def look(batch: Any, reader: TextTokenizer, rows: list[int], **options: Any) -> list[Look]:
    how = {"seed": 3, "augment": None, "names": ("one", "two")} | options
    return look_at(batch, np.array(rows), tokenizer=reader, **how)


def test_a_look_is_the_sample_with_all_that_is_masked(batch: Any, reader: TextTokenizer) -> None:
    first, second = look(batch, reader, [3, 4])
    assert first.title == f"two, sample {2**32}, row 3"
    assert second.title == f"one, sample {2**32 + 1}, row 4"
    assert (first.text, second.text) == (repr("open the door\n"), repr("push it\n"))
    assert (first.masked, second.masked) == ({"wrist_right"}, set())
    np.testing.assert_array_equal(second.cameras["wrist_right"], batch["images"]["wrist_right"][4])
    # Row 3 has two steps, of three dims.
    assert np.isfinite(first.actions).sum() == 2 * 3
    np.testing.assert_array_equal(first.actions[:2, :3], batch["actions"][3, :2, :3])
    np.testing.assert_array_equal(first.state, batch["state"][3])


def test_images_are_those_that_the_step_makes_of_the_whole_batch(batch: Any, reader: TextTokenizer) -> None:
    """Whatever rows are looked at: what is drawn for a sample is a function of the seed and its position."""
    config = Augment.octo()
    whole = jax.jit(lambda key, b: augment_batch(key, b, config))(named_key(jax.random.key(3), "augment"), batch)
    for row, seen in zip([5, 2], look(batch, reader, [5, 2], augment=config), strict=True):
        for slot, image in seen.cameras.items():
            exact = (np.asarray(whole["images"][slot][row]) + 1) * 127.5
            assert np.abs(image - exact).max() <= 0.5 + 1e-3
            if slot not in seen.masked:
                assert np.abs(image.astype(int) - batch["images"][slot][row]).mean() > 3


def test_action_tokens_are_counted_and_answers_told_from_prompts(batch: Any, reader: TextTokenizer) -> None:
    ids = [reader.tokenizer.encode(text) for text in ("go", "left")]
    row = [reader.tokenizer.bos_id, *ids[0], *ids[1], 299, 298, 297]  # ids that no text has
    where = np.arange(len(row))
    fields = {
        "prompt": np.array([row], np.int32),
        "prompt_mask": np.ones((1, len(row)), bool),
        "prompt_causal": where[None] > len(ids[0]),
        "prompt_action": where[None] >= len(row) - 3,
    }
    one = jax.tree.map(lambda x: x[:1], batch) | fields
    (seen,) = look(one, reader, [0])
    assert seen.text == "'go'; answer 'left'; 3 action tokens"


def test_every_dataset_is_among_the_samples() -> None:
    ids = np.array([0, 0, 0, 0, 1, 0, 2, 1])
    assert choose_samples(ids, 3).tolist() == [0, 4, 6]
    assert choose_samples(ids, 5).tolist() == [0, 1, 4, 6, 7]
    assert choose_samples(ids, 100).tolist() == list(range(8))


def test_pictures_are_where_they_belong_and_masked_ones_are_not_there() -> None:
    red, blue = (np.full((56, 40, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    actions = np.full((4, 2), np.nan)
    actions[:3, 0] = 1.0
    shown = Look("arm", "'go $x$'", {"a": red, "b": blue}, frozenset(), np.array([2.0]), actions)
    hidden = Look("cart", "'go'", {"a": red, "b": blue}, frozenset({"b"}), np.array([2.0]), actions)
    picture = draw([shown, hidden])
    of_colour = lambda colour: np.abs(picture.astype(int) - colour).max(-1) < 8  # noqa: E731
    assert of_colour((255, 0, 0)).sum() == pytest.approx(
        2 * 4 * 56 * 40, rel=0.2
    )  # twice as large each way, but for names
    left, right = np.split(of_colour((0, 0, 255)), 2, axis=1)
    assert left.sum() == pytest.approx(4 * 56 * 40, rel=0.2)
    assert right.sum() < 100
    # Nearest neighbours: inside of a picture there are no other colours.
    rows, columns = np.nonzero(of_colour((255, 0, 0))[:, : picture.shape[1] // 2])
    inner = picture[rows.max() - 40 : rows.max() - 5, columns.min() + 5 : columns.max() - 5]
    assert set(map(tuple, inner.reshape(-1, 3))) == {(255, 0, 0)}


def test_a_batch_is_drawn_into_a_file_in_time_and_what_goes_wrong_is_said(
    batch: Any, reader: TextTokenizer, tmp_path: Path
) -> None:
    trainer = Trainer(
        ModelDef(types.SimpleNamespace(create=lambda key: LayerNorm(key, 2))),
        OptimizerConfig().create(),
        ema_decay=None,
        seed=3,
        mesh=MeshConfig().create(),
        rules=ShardingRules(),
        dataset_names=("one", "two"),
    )
    said: list[str] = []
    path = tmp_path / "first_batch.png"
    pictures = picture_batch(batch, trainer, reader, path, say=said.append)
    assert list(pictures) == ["first_batch"], said
    np.testing.assert_array_equal(np.asarray(Image.open(path)), pictures["first_batch"])
    assert said == [f"8 samples of the first batch are drawn in {path}"]
    broken = batch | {"dataset_id": np.full(8, 7, np.int32)}  # of no dataset
    assert picture_batch(broken, trainer, reader, tmp_path / "other.png", say=said.append) == {}
    assert said[1] == f"{tmp_path / 'other.png'} was not drawn: IndexError: tuple index out of range"
    assert not (tmp_path / "other.png").exists()
