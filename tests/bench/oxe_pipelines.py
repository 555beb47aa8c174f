"""One pipeline of bench_oxe.py in a process of its own: `python tests/bench/oxe_pipelines.py SPEC`, SPEC as JSON.

It prints a line of JSON at every moment that bench_oxe.py measures from outside, and then waits to be ended. Imports
are inside the functions: a pipeline is to pay, and to hold, what it needs itself.
"""

import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SIZE = 224
# Standard augmentation as octo's pretraining config has it.
OCTO_AUGMENTATION = {
    "random_resized_crop": {"scale": [0.8, 1.0], "ratio": [0.9, 1.1]},
    "random_brightness": [0.1],
    "random_contrast": [0.9, 1.1],
    "random_saturation": [0.9, 1.1],
    "random_hue": [0.05],
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """What to run.

    pipeline: a function of this file. data: directories of datasets, each `name/1.0.0`. work: where `prepare` puts what
    it makes. cameras: how many. horizon: of action chunks. threads, workers: of ours. buffer: frames in tf.data's
    shuffle buffers. seconds: of the timed window, after `warm_up` batches; or samples: draw so many. states: instead of
    measuring, skip this many samples and write the states of the next ones to `out`; (skip, count). sources:
    directories to import peers from.
    """

    pipeline: str
    data: tuple[str, ...]
    work: str
    cameras: int = 1
    batch_size: int = 32
    horizon: int = 4
    augment: bool = False
    resize: bool = True
    threads: int = 2
    workers: int = 0
    buffer: int = 10_000
    seconds: float = 15.0
    samples: int = 0
    warm_up: int = 20
    states: tuple[int, int] | None = None
    out: str = ""
    sources: tuple[str, ...] = ()


def say(moment: str, **more: Any) -> None:
    print(json.dumps({"moment": moment, "time": time.perf_counter(), **more}), flush=True)


def run(
    spec: Spec, batches: Iterator[Any], state: Callable[[Any], Any], released: Callable[[], float] = lambda: 0.0
) -> None:
    """Draws batches for the timed window, or states; `state` returns those of a batch, (B, Ds) in the dataset's units.

    released: returns the CPU seconds so far in calls that had given the GIL back.
    """
    import numpy as np

    batch = next(batches)
    say("first")
    if spec.states is not None:
        skip, count = spec.states
        rows = [state(batch)]
        while sum(map(len, rows)) < skip + count:
            rows.append(state(next(batches)))
        np.save(spec.out, np.concatenate(rows)[skip : skip + count])
        say("end")
        return
    for _ in range(spec.warm_up):
        next(batches)
    say("start", released=released())
    frames, until = 0, time.perf_counter() + spec.seconds
    while frames < spec.samples or (not spec.samples and time.perf_counter() < until):
        next(batches)
        frames += spec.batch_size
        if spec.samples and frames % (spec.samples // 20) < spec.batch_size:
            say("part", frames=frames)
    say("end", frames=frames, released=released())


# ---- Ours ------------------------------------------------------------------------------------------------------------


def robots(spec: Spec) -> list[Any]:
    """WidowX once per dataset, each under a name and with statistics of its own."""
    from openpi_like.robots.widowx import WIDOWX

    cameras = WIDOWX.cameras[: spec.cameras]
    robot = dataclasses.replace(WIDOWX, cameras=cameras, action_horizon=spec.horizon, execute_steps=1)
    return [dataclasses.replace(robot, name=Path(directory).parent.name) for directory in spec.data]


def prepare(spec: Spec) -> None:
    """Builds the indexes, the statistics and a tokenizer, each timed."""
    from openpi_like.data.dataset import EpisodeDataset
    from openpi_like.data.index import open_index
    from openpi_like.data.sentencepiece_model import fit_text_tokenizer
    from openpi_like.data.stats import compute_normalization, save_normalization

    index_s = stats_s = 0.0
    steps = 0
    texts: set[str] = set()
    for robot, directory in zip(robots(spec), spec.data, strict=True):
        started = time.perf_counter()
        index = open_index(directory, "train")
        index_s += time.perf_counter() - started
        steps += index.steps
        texts.update(index.texts["language_instruction"].table)
        started = time.perf_counter()
        save_normalization(compute_normalization(EpisodeDataset(index, robot)), stats_file(spec, robot))
        stats_s += time.perf_counter() - started
    Path(spec.work, "text.model").write_bytes(fit_text_tokenizer(sorted(texts), 500).content())
    say("end", index_s=index_s, stats_s=stats_s, steps=steps)


def stats_file(spec: Spec, robot: Any) -> Path:
    return Path(spec.work, f"{robot.name}-{spec.horizon}.json")


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The part of a policy's config that a loader needs."""

    cameras: tuple[str, ...]
    action_horizon: int
    image_size: tuple[int, int] = (SIZE, SIZE)
    state_dim: int = 7
    action_dim: int = 7
    prompt_len: int = 64
    vocab_size: int = 1000
    resize: str = "cubic"
    prompt_format: Any = None
    image_slots: tuple[int, ...] = ()
    action_tokens: None = None
    reads_episodes: bool = False
    answer_len: int = 0
    robots: tuple[str, ...] = ()
    entities: tuple[Any, ...] = ()
    perception: None = None


def ours(spec: Spec, released: Callable[[], float] = lambda: 0.0, *, one_batch: bool = False) -> None:
    """The loader; with `augment`, and the augmentation of the training step, compiled for the CPU.

    one_batch: draw a single batch and go on with it, so that the augmentation is all there is to do.
    """
    from openpi_like.data.config import DataConfig, MixtureEntry
    from openpi_like.data.loader import make_loader
    from openpi_like.data.prompts import Pi0Prompt
    from openpi_like.data.stats import load_normalization
    from openpi_like.data.text import TextTokenizer, read_tokenizer

    entries = tuple(MixtureEntry(r, directory) for r, directory in zip(robots(spec), spec.data, strict=True))
    config = DataConfig(entries, num_threads=spec.threads, num_workers=spec.workers)
    shapes = Shapes(tuple(c.name for c in entries[0].robot.cameras), spec.horizon, prompt_format=Pi0Prompt())
    normalizations = {e.robot.name: load_normalization(stats_file(spec, e.robot), e.robot) for e in entries}
    loader = make_loader(
        config,
        batch_size=spec.batch_size,
        policy=shapes,
        tokenizer=TextTokenizer(read_tokenizer(Path(spec.work, "text.model")), shapes.prompt_len),
        normalizations=normalizations,
    )

    def state(batch: Any) -> Any:
        stats = normalizations[entries[0].robot.name].state
        offset, scale, _ = stats.affine("zscore")
        return batch["state"] * scale + offset

    batches: Iterator[Any] = loader
    if one_batch:
        batches = itertools.repeat(next(loader))
        loader.close()
    if spec.augment:
        import jax

        from openpi_like.data.augment import Augment, augment_batch

        change = jax.jit(lambda batch: augment_batch(jax.random.key(0), batch, Augment.octo())["images"])
        keys = ("images", "image_mask", "position")
        batches = (b | {"images": jax.block_until_ready(change({k: b[k] for k in keys}))} for b in batches)
    run(spec, batches, state, released)


def augmentation(spec: Spec) -> None:
    ours(spec, one_batch=True)


def gil(spec: Spec) -> None:
    """`ours`, and how much of its CPU time is spent in calls that let other threads run meanwhile."""
    import cv2
    import simplejpeg

    spent = [0.0, 0.0, 0.0]

    def timed(at: int, module: Any, name: str) -> None:
        call = getattr(module, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            result = call(*args, **kwargs)
            spent[at] += time.thread_time() - started
            return result

        setattr(module, name, wrapper)

    for at, (module, name) in enumerate(((simplejpeg, "decode_jpeg"), (cv2, "resize"), (os, "pread"))):
        timed(at, module, name)
    ours(spec, lambda: sum(spent))


def limit(spec: Spec) -> None:
    """Decodes and resizes images that are in memory already, in `threads` threads, with nothing around it."""
    import concurrent.futures

    import numpy as np

    from openpi_like.data.images import decode, fit
    from openpi_like.data.index import open_index

    index = open_index(spec.data[0], "train")
    encoded = []
    for step in np.linspace(0, index.episode_start[10] - 1, 256).astype(int):
        encoded.append(index.read_image(step, "observation/image_0"))

    def work(until: float) -> int:
        out, frames = np.empty((SIZE, SIZE, 3), np.uint8), 0
        while time.perf_counter() < until:
            for data in encoded:
                fit(decode(data), out)
            frames += len(encoded)
        return frames

    say("first")
    with concurrent.futures.ThreadPoolExecutor(spec.threads) as pool:
        say("start")
        until = time.perf_counter() + spec.seconds
        frames = sum(pool.map(work, [until] * spec.threads))
        say("end", frames=frames)


# ---- Peers -----------------------------------------------------------------------------------------------------------


def octo(spec: Spec) -> None:
    """octo's make_interleaved_dataset, as its pretraining calls it, on one camera of each dataset."""
    import tensorflow as tf
    from octo.data.dataset import make_interleaved_dataset

    tf.config.set_visible_devices([], "GPU")
    datasets = [
        {
            "name": Path(directory).parent.name,
            "data_dir": str(Path(directory).parents[1]),
            "image_obs_keys": {"primary": "image_0"} if spec.states is None else {},  # shuffled before it is decoded
            "proprio_obs_key": "state",
            "language_key": "language_instruction",
            "skip_norm": spec.states is not None,
        }
        for directory in spec.data
    ]
    augmentation = {"primary": {"augment_order": list(OCTO_AUGMENTATION), **OCTO_AUGMENTATION}}
    threads = len(datasets) if len(datasets) > 1 else None
    dataset = make_interleaved_dataset(
        datasets,
        train=True,
        shuffle_buffer_size=spec.buffer,
        traj_transform_kwargs={"window_size": 1, "action_horizon": spec.horizon},
        frame_transform_kwargs={
            "resize_size": {"primary": (SIZE, SIZE)},
            "image_augment_kwargs": augmentation if spec.augment else {},
        },
        batch_size=spec.batch_size,
        traj_transform_threads=threads,
        traj_read_threads=threads,
    )
    run(spec, dataset.iterator(prefetch=0), lambda batch: batch["observation"]["proprio"][:, 0])


def openpi(spec: Spec) -> None:
    """openpi's DROID loader on Bridge: fields are renamed to DROID's as they come in, the rest is openpi's."""
    import dlimp
    import numpy as np
    import tensorflow as tf

    read = dlimp.DLataset.from_rlds

    def rename(episode: dict[str, Any]) -> dict[str, Any]:
        seen, path = episode["observation"], episode["traj_metadata"]["episode_metadata"]["file_path"]
        text = episode["language_instruction"]
        return {
            "action": episode["action"],
            "action_dict": {"joint_position": episode["action"][:, :6], "gripper_position": episode["action"][:, 6:]},
            "observation": {
                "exterior_image_1_left": seen["image_0"],
                "exterior_image_2_left": seen["image_0"],
                "wrist_image_left": seen["image_1"],
                "joint_position": seen["state"][:, :6],
                "gripper_position": seen["state"][:, 6:],
            },
            "language_instruction": text,
            "language_instruction_2": text,
            "language_instruction_3": text,
            "traj_metadata": {
                "episode_metadata": {"recording_folderpath": path, "file_path": tf.strings.join(["success ", path])}
            },
        }

    def read_renamed(*args: Any, **kwargs: Any) -> Any:
        return read(*args, **kwargs).traj_map(rename)

    dlimp.DLataset.from_rlds = staticmethod(read_renamed)
    from openpi.training.droid_rlds_dataset import DroidRldsDataset, RLDSDataset
    from openpi_client.image_tools import resize_with_pad

    directory = Path(spec.data[0])
    dataset = DroidRldsDataset(
        str(directory.parents[1]),
        spec.batch_size,
        [RLDSDataset(directory.parent.name, directory.name, 1.0)],
        action_chunk_size=spec.horizon,
        shuffle_buffer_size=spec.buffer,
    )

    def batches() -> Iterator[Any]:
        for batch in dataset:
            if spec.resize:
                for key in ("image", "wrist_image"):
                    batch["observation"][key] = resize_with_pad(batch["observation"][key], SIZE, SIZE)
            yield batch

    def state(batch: Any) -> Any:
        seen = batch["observation"]
        return np.concatenate([seen["joint_position"], seen["gripper_position"]], axis=1)

    run(spec, batches(), state)


def octo_pixels(spec: Spec) -> None:
    """Writes what octo makes of the JPEG files in `work`: decoded, and decoded and resized."""
    import numpy as np
    import tensorflow as tf
    from octo.data.obs_transforms import decode_and_resize

    out = {}
    for path in sorted(Path(spec.work).glob("*.jpg")):
        data = path.read_bytes()
        out[f"{path.stem} decoded"] = tf.io.decode_image(data, expand_animations=False).numpy()
        image = decode_and_resize({"image_primary": tf.constant(data)}, {"primary": (SIZE, SIZE)}, {})["image_primary"]
        out[f"{path.stem} resized"] = image.numpy()
    np.savez(spec.out, **out)
    say("end")


PIPELINES = {f.__name__: f for f in (prepare, ours, augmentation, gil, limit, octo, openpi, octo_pixels)}


if __name__ == "__main__":
    given = Spec(**json.loads(sys.argv[1]))
    sys.path[1:1] = given.sources
    PIPELINES[given.pipeline](given)
    sys.stdin.read()  # the parent looks at the memory, then lets go
