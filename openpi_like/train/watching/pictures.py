"""A batch as one picture: what the policy sees and is to do, after augmentation, with everything that is masked."""

import dataclasses
import functools
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from openpi_like.batch import Batch
from openpi_like.data.augment import Augment, augment_batch
from openpi_like.data.text import TextTokenizer
from openpi_like.draws import named_key
from openpi_like.train.state import Trainer

SAMPLES = 16  # of a batch
_DPI, _TEXT, _PLOT = 100, 62, 0.6  # pixels an inch, pixels of text above a row, width of the plot to its height
_LEAST_HEIGHT = 112  # of a row's pictures: smaller ones are drawn larger
_MASKED, _COLOURS = "#c44e52", ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")


@dataclasses.dataclass(frozen=True)
class Look:
    """One sample as it is drawn.

    cameras: slot -> picture, (H, W, 3). masked: slots that the policy does not see. state: (Ds,), of dims that are
    there. actions: (A, J), NaN where masked.
    """

    title: str
    text: str
    cameras: dict[str, UInt8[np.ndarray, "H W 3"]]
    masked: frozenset[str]
    state: Float[np.ndarray, "Ds"]
    actions: Float[np.ndarray, "A J"]


def choose_samples(dataset_id: Int[np.ndarray, "B"], count: int) -> Int[np.ndarray, "_"]:
    """Returns at most `count` rows of a batch: of every dataset in turn, so that rare ones are seen too; in order."""
    turn = np.zeros(len(dataset_id), np.int64)  # the how manieth of its dataset a row is
    for i in np.unique(dataset_id):
        rows = np.flatnonzero(dataset_id == i)
        turn[rows] = np.arange(len(rows))
    return np.sort(np.argsort(turn, kind="stable")[:count])


def look_at(
    batch: Batch,
    rows: Int[np.ndarray, "_"],
    *,
    seed: int,
    augment: Augment | None,
    names: Sequence[str],
    tokenizer: TextTokenizer,
) -> list[Look]:
    """Returns rows of a batch as the step of a run with this seed sees them.

    batch: of one host. names: of the datasets. Images that augmentation changes are the step's own up to rounding.
    """
    part: Any = jax.tree.map(lambda x: np.asarray(x)[rows], batch)
    if augment is not None:
        changed = jax.jit(functools.partial(augment_batch, config=augment))
        changed_images = changed(named_key(jax.random.key(seed), "augment"), part)["images"]
        # From [-1, 1], which 0 to 255 stand for.
        part["images"] = {
            slot: np.round((np.asarray(x) + 1) * 127.5).astype(np.uint8) for slot, x in changed_images.items()
        }
    looks = []
    for i, row in enumerate(rows):
        high, low = (int(x) for x in part["position"][i])
        looks.append(
            Look(
                title=f"{names[part['dataset_id'][i]]}, sample {(high << 32) + low}, row {row}",
                text=_text(part, i, tokenizer),
                cameras={slot: image[i] for slot, image in part["images"].items()},
                masked=frozenset(slot for slot, mask in part["image_mask"].items() if not mask[i]),
                state=part["state"][i][part["state_mask"][i]],
                actions=np.where(part["action_mask"][i], part["actions"][i], np.nan),
            )
        )
    return looks


def _text(batch: Any, row: int, tokenizer: TextTokenizer) -> str:
    """Returns the prompt, and its answer where the policy writes one; action tokens are counted, not spelled out."""
    ids, real = batch["prompt"][row], batch["prompt_mask"][row]
    answer = real & batch["prompt_causal"][row] if "prompt_causal" in batch else np.zeros_like(real)
    action = real & batch["prompt_action"][row] if "prompt_action" in batch else np.zeros_like(real)
    said = [tokenizer.decode(ids[part].tolist()) for part in (real & ~answer, answer & ~action)]
    texts = [repr(said[0]), *([f"answer {said[1]!r}"] if said[1] else [])]
    if action.any():
        texts.append(f"{int(action.sum())} action tokens")
    return "; ".join(texts)


_Place = int | float


class _Sheet:
    """A white picture to draw on; x, y are pixels from its upper left corner."""

    def __init__(self, height: int, width: int) -> None:
        self.pixels = np.full((height, width, 3), 255, np.uint8)
        self._figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
        self._agg = FigureCanvasAgg(self._figure)
        self._axes = self._figure.add_axes((0, 0, 1, 1))
        self._segments: list[np.ndarray] = []
        self._colours: list[str] = []

    def write(self, x: _Place, y: _Place, text: str, size: int, **options: Any) -> None:
        self._axes.text(x, y, text, fontsize=size, parse_math=False, **options)  # a prompt's $ is a $

    def line(self, points: Sequence[tuple[_Place, _Place]], colour: str) -> None:
        self._segments.append(np.asarray(points))
        self._colours.append(colour)

    def drawn(self) -> UInt8[np.ndarray, "H W 3"]:
        height, width, _ = self.pixels.shape
        self._axes.imshow(self.pixels, interpolation="nearest", aspect="auto", extent=(0, width, height, 0))
        # All lines at once, which is much faster than one by one.
        self._axes.add_collection(LineCollection(self._segments, colors=self._colours, linewidths=1), autolim=False)
        self._axes.set_axis_off()
        self._agg.draw()
        return np.asarray(self._agg.buffer_rgba())[..., :3].copy()


def draw(looks: Sequence[Look], *, columns: int = 2) -> UInt8[np.ndarray, "H W 3"]:
    """Returns samples as one picture: per sample its cameras side by side, then state and action chunk.

    The plots have the normalised state as bars and each action dim as a line over the chunk, both between -3 and 3;
    entries that are masked are missing. A masked camera is crossed out.
    """
    pictures = list(looks[0].cameras.values())  # none where what a backbone makes of them is read in their place
    height, width = pictures[0].shape[:2] if pictures else (_LEAST_HEIGHT, _LEAST_HEIGHT)
    scale = max(1, -(-_LEAST_HEIGHT // height))
    plot = int(_PLOT * scale * max(height, width))
    across, down = len(looks[0].cameras) * width * scale + 2 * plot + 12, height * scale + _TEXT
    sheet = _Sheet(-(-len(looks) // columns) * down, columns * across)
    for i, look in enumerate(looks):
        x, y = i % columns * across, i // columns * down
        letters = max(20, int(across / 5.2))  # of a line of text
        text = textwrap.shorten(look.text, 3 * letters, placeholder=" ...")
        sheet.write(x + 2, y + 12, look.title, 7, weight="bold")
        sheet.write(x + 2, y + 15, textwrap.fill(text, letters), 6, va="top")
        _draw_look(sheet, look, x, y + _TEXT - 4, scale, plot)
    return sheet.drawn()


def _draw_look(sheet: _Sheet, look: Look, x: int, y: int, scale: int, plot: int) -> None:
    """x, y: of its upper left corner. scale: pixels to each side for one. plot: width of each plot."""
    for slot, image in look.cameras.items():
        height, width = (scale * n for n in image.shape[:2])
        right, bottom = x + width, y + height
        if slot in look.masked:
            crossed = [
                (x, y),
                (right, y),
                (right, bottom),
                (x, bottom),
                (x, y),
                (right, bottom),
                (right, y),
                (x, bottom),
            ]
            sheet.line(crossed, _MASKED)
            sheet.write(x + 4, y + height / 2, f"{slot}: masked", 6, color=_MASKED)
        else:
            sheet.pixels[y:bottom, x:right] = image.repeat(scale, 0).repeat(scale, 1)
            sheet.write(x + 2, y + 8, slot, 5, color="white", backgroundcolor="#00000080")
        x = right
    level = lambda value: y + height / 2 - float(np.clip(value, -3, 3)) / 6 * height  # noqa: E731
    state, actions = x + 4, x + plot + 8
    for left, title in ((state, "state"), (actions, "actions")):
        sheet.line([(left, level(0)), (left + plot, level(0))], "#cccccc")
        sheet.write(left, bottom - 2, title, 5)
    for j, value in enumerate(look.state):
        at = state + (j + 0.5) / len(look.state) * plot
        sheet.line([(at, level(0)), (at, level(value))], _COLOURS[j % len(_COLOURS)])
    wide = plot / len(look.actions)  # of a step
    for j, values in enumerate(look.actions.T):
        there = np.flatnonzero(np.isfinite(values))
        points = [(actions + a * wide, level(values[a])) for a in there]
        # A value holds for a step: else a chunk of one step would not be seen.
        points += [(at + wide, value) for at, value in points[-1:]]
        if points:
            sheet.line(points, _COLOURS[j % len(_COLOURS)])


def picture_batch(
    batch: Batch,
    trainer: Trainer,
    tokenizer: TextTokenizer,
    path: Path,
    *,
    count: int = SAMPLES,
    say: Callable[[str], None] = print,
) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
    """Draws some samples of a batch into a PNG file, see `look_at`; returns the picture by the file's name.

    What goes wrong is said, and nothing is returned: a run does not end because of its pictures.
    """
    try:
        rows = choose_samples(batch["dataset_id"], count)
        seed, augment, names = trainer.seed, trainer.augment, trainer.dataset_names
        picture = draw(look_at(batch, rows, seed=seed, augment=augment, names=names, tokenizer=tokenizer))
        Image.fromarray(picture).save(path)
    except Exception as e:
        say(f"{path} was not drawn: {type(e).__name__}: {e}")
        return {}
    say(f"{len(rows)} samples of the first batch are drawn in {path}")
    return {path.stem: picture}
