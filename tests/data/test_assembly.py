"""Batches against one sample at a time: draws, cameras, action tokens; and what does not fit the policy."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_like.batch import ActionTokens
from openpi_like.data.assembly import keep_cameras, uniform_draws
from openpi_like.data.augment import Augment
from openpi_like.data.config import DataConfig
from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.fast import FastTokenizer, dct_coefficients, fit_fast
from openpi_like.data.images import fit
from openpi_like.data.index import open_index
from openpi_like.data.loader import validation_batches
from openpi_like.data.normalize import Normalization
from openpi_like.data.order import sample_order
from openpi_like.data.prompts import FastPrompt, Pi05Prompt
from openpi_like.data.schema import DatasetError
from openpi_like.data.text import TextTokenizer
from openpi_like.robots import Camera
from tests.data.samples import flatten
from tests.data.toy import ARM, WRITES, Shapes, change_record, shard


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**63), stream=st.integers(0, 9), first=st.integers(0, 2**40), step=st.integers(1, 8),
    count=st.integers(1, 20),
)  # fmt: skip
def test_draws_are_a_function_of_the_position(seed: int, stream: int, first: int, step: int, count: int) -> None:
    positions = first + step * np.arange(count)
    together = uniform_draws(seed, stream, positions)
    alone = [float(uniform_draws(seed, stream, positions[i : i + 1])[0]) for i in range(count)]
    assert together.tolist() == alone
    assert uniform_draws(seed, stream, positions[::-1]).tolist() == alone[::-1]
    assert not set(alone) & set(uniform_draws(seed, stream + 1, positions).tolist())


def test_draws_are_uniform_and_streams_independent() -> None:
    a, b = (uniform_draws(5, stream, np.arange(40_000)) for stream in (0, 1))
    counts = np.histogram(a, 10, (0, 1))[0]
    assert ((counts - 4000) ** 2 / 4000).sum() < 27.9  # chi-square with 9 degrees of freedom, 0.1 %
    for x, y in ((a, b), (a[:-1], a[1:])):
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.017
    assert len(uniform_draws(5, 0, np.arange(0))) == 0


@pytest.mark.parametrize(("cameras", "dropout"), [(1, 0.5), (2, 0.3), (3, 0.6)])
def test_cameras_are_dropped_as_often_as_asked_and_never_all(cameras: int, dropout: float) -> None:
    """C cameras are each dropped with probability p, less p^C / C, for one of them stays where all would go."""
    draws = np.stack([uniform_draws(0, c, np.arange(30_000)) for c in range(cameras)])
    kept = keep_cameras(np.ones_like(draws, bool), draws, dropout)
    assert kept.any(axis=0).all()
    np.testing.assert_allclose(1 - kept.mean(axis=1), dropout - dropout**cameras / cameras, atol=0.012)
    # One that is not there neither comes back nor counts as the one that stays.
    present = np.ones_like(draws, bool)
    present[0] = False
    kept = keep_cameras(present, draws, dropout)
    assert not kept[0].any()
    assert kept.any(axis=0).all() == (cameras > 1)


def test_dropped_cameras_are_masked_and_black_and_the_others_as_they_were(load: Any) -> None:
    plain, dropped = next(load(batch_size=96, camera_dropout=0.0)), next(load(batch_size=96, camera_dropout=0.5))
    arm = plain["dataset_id"] == 0
    masks = {name: dropped["image_mask"][name] for name in ("base", "wrist")}
    assert (masks["base"] | masks["wrist"])[arm].all()
    assert masks["base"][~arm].all()  # its only camera
    for name, mask in masks.items():
        assert 0.2 < 1 - mask[arm].mean() < 0.6
        np.testing.assert_array_equal(dropped["images"][name][mask], plain["images"][name][mask])
        assert not dropped["images"][name][~mask].any()
    for name in ("state", "actions", "prompt"):
        np.testing.assert_array_equal(dropped[name], plain[name])


def test_cameras_without_an_image_are_masked(load: Any, config: DataConfig) -> None:
    """One that shows two steps before has none at the first two of each episode."""
    late = dataclasses.replace(ARM, cameras=(ARM.cameras[0], Camera("third", "observation/image", steps_back=2)))
    entry = dataclasses.replace(config.entries[0], robot=late)
    loader = load(entries=(entry,), batch_size=110, camera_dropout=0.0)
    batch = next(loader)
    assert int((~batch["image_mask"]["third"]).sum()) == 23  # 2 of each of 12 episodes, of which one has one step
    assert not batch["images"]["third"][~batch["image_mask"]["third"]].any()
    assert batch["image_mask"]["base"].all()


@pytest.mark.parametrize(
    "shapes",
    [Shapes(), Shapes(prompt_len=80, image_size=(20, 20), resize="pillow", prompt_format=Pi05Prompt())],
    ids=["pi0", "pi05"],
)
def test_a_batch_is_its_samples_one_by_one(
    load: Any, config: DataConfig, toy: Path, tokenizer: TextTokenizer, normalizations: dict[str, Normalization],
    shapes: Shapes,
) -> None:  # fmt: skip
    """Every leaf of a batch, rebuilt from the columns and images sample by sample."""
    tokenizer = TextTokenizer(tokenizer.tokenizer, shapes.prompt_len, prompt_format=shapes.prompt_format)
    batch = next(load(camera_dropout=0.0, batch_size=64, frame_stride=2, policy=shapes, tokenizer=tokenizer))
    datasets = [EpisodeDataset(open_index(toy, e.split), e.robot, frame_stride=2) for e in config.entries]
    order = sample_order([len(d) for d in datasets], [3.0, 1.0], config.seed)
    assert Counter(batch["dataset_id"].tolist()) == {0: 48, 1: 16}
    for row in range(64):
        _, i, frame = order[row]
        dataset, robot = datasets[i], config.entries[i].robot
        assert batch["dataset_id"][row] == i
        state, chunk, inside = (x[0] for x in dataset.encoded(np.array([frame])))
        norm = normalizations[robot.name]
        expected = np.zeros(shapes.state_dim, np.float32)
        expected[: len(state)] = norm.apply_state(state)
        np.testing.assert_array_equal(batch["state"][row], expected)
        assert batch["state_mask"][row].tolist() == [d < len(state) for d in range(shapes.state_dim)]
        for a in range(shapes.action_horizon):
            valid = a < robot.action_horizon and inside[a]
            for d in range(shapes.action_dim):
                mask = bool(valid and d < robot.action_size)
                assert batch["action_mask"][row, a, d] == mask
                value = norm.apply_actions(chunk[a])[d] if mask else 0.0
                assert batch["actions"][row, a, d] == value
        ids, real = tokenizer.encode(dataset.prompts(np.array([frame]))[0], norm.apply_state(state))  # without padding
        np.testing.assert_array_equal(batch["prompt"][row], ids)
        np.testing.assert_array_equal(batch["prompt_mask"][row], real)
        cameras = {c.name: c for c in robot.cameras}
        for name in shapes.cameras:
            assert batch["image_mask"][name][row] == (name in cameras)
            image = np.zeros((*shapes.image_size, 3), np.uint8)
            if name in cameras:
                fit(dataset.image(frame, cameras[name]), image, resize=shapes.resize)
            np.testing.assert_array_equal(batch["images"][name][row], image)


@pytest.fixture(scope="module")
def fast(config: DataConfig, toy: Path, normalizations: dict[str, Normalization]) -> FastTokenizer:
    coefficients = []
    for entry in config.entries:
        dataset = EpisodeDataset(open_index(toy, entry.split), entry.robot)
        chunks = dataset.encoded(np.arange(len(dataset)))[1]
        coefficients.append(dct_coefficients(normalizations[entry.robot.name].apply_actions(chunks), 5.0))
    return fit_fast(coefficients, scale=5.0, vocab_size=200)


def test_action_tokens_are_those_of_the_chunk(
    load: Any, config: DataConfig, toy: Path, tokenizer: TextTokenizer, normalizations: dict[str, Normalization],
    fast: FastTokenizer,
) -> None:  # fmt: skip
    """Sample by sample, in a mixture of two robots: the prompt, what is said, and which part of it is what."""
    text = TextTokenizer(tokenizer.tokenizer, 80, prompt_format=FastPrompt(), answer_len=60)
    said = dataclasses.replace(config.entries[1], text_key="language_instruction")
    asked = dataclasses.replace(config.entries[0], text_key="language_instruction", actions=False)
    entries = (config.entries[0], said, asked)
    options = {"policy": WRITES, "tokenizer": text, "action_tokenizer": fast, "entries": entries}
    batch = next(load(batch_size=64, **options))
    datasets = [EpisodeDataset(open_index(toy, e.split), e.robot) for e in entries]
    order = sample_order([len(d) for d in datasets], [e.weight for e in entries], config.seed)
    seen = Counter(batch["dataset_id"].tolist())
    assert min(seen[i] for i in range(3)) > 5
    for row in range(64):
        _, i, frame = order[row]
        dataset, entry = datasets[i], entries[i]
        norm, frames = normalizations[entry.robot.name], np.array([frame])
        state, chunk, _ = dataset.encoded(frames)
        prompt, answer = dataset.prompts(frames)[0], dataset.texts("language_instruction", frames)[0]
        if entry.actions:
            ids = WRITES.vocab_size - 1 - fast.encode(norm.apply_actions(chunk)).ids[0]
            expected = text.encode_actions(
                prompt, norm.apply_state(state)[0], ids, subtask=None if entry.text_key is None else answer
            )
        else:
            expected = text.encode_answer(prompt, answer)
            assert not batch["action_mask"][row].any()
            assert not batch["actions"][row].any()
        assert batch["action_mask"][row].any() == entry.actions
        for name, value in expected._asdict().items():
            np.testing.assert_array_equal(batch[name][row], value, err_msg=name)
        if entry.actions:
            again = WRITES.vocab_size - 1 - batch["prompt"][row][batch["prompt_action"][row]]
            again = again[len(text.action_indicator()) :]
            horizon, dims = entry.robot.action_horizon, entry.robot.action_size
            back = fast.decode([again[: len(ids)]], horizon=horizon, dims=dims).actions[0]
            assert np.abs(back - norm.apply_actions(chunk)[0]).max() < 0.5 / fast.scale * np.sqrt(horizon)


def test_thoughts_stand_behind_prompts_and_robots_are_numbered(
    load: Any, config: DataConfig, toy: Path, tokenizer: TextTokenizer, normalizations: dict[str, Normalization]
) -> None:
    """Text before acting where a dataset has it, the end alone where it has none, and answers without actions."""
    policy = Shapes(prompt_len=80, thought_len=60, robots=("cart", "arm"))
    text = TextTokenizer(tokenizer.tokenizer, 80, answer_len=60)
    thinking = dataclasses.replace(config.entries[0], text_key="language_instruction")
    asked = dataclasses.replace(thinking, actions=False)
    entries = (thinking, config.entries[1], asked)
    batch = next(load(batch_size=64, policy=policy, tokenizer=text, entries=entries))
    datasets = [EpisodeDataset(open_index(toy, e.split), e.robot) for e in entries]
    order = sample_order([len(d) for d in datasets], [e.weight for e in entries], config.seed)
    eos = text.tokenizer.required("eos")
    for row in range(64):
        _, i, frame = order[row]
        frames = np.array([frame])
        prompt = datasets[i].prompts(frames)[0]
        asked_ids = text.prompt_format.prompt(text.tokenizer, prompt, None, 1)
        said = datasets[i].texts("language_instruction", frames)[0] if i != 1 else ""
        if i == 2:
            answer = text.encode_answer(prompt, said)
            row_ids = answer.prompt[answer.prompt_mask].tolist()
        else:
            thought = [*text.tokenizer.encode(f"{said}Next action:"), eos] if said else [eos]
            row_ids = [*asked_ids, *thought]
            assert batch["prompt_causal"][row].sum() == len(thought)
            assert text.prompt_format.thought_said(text.tokenizer.decode(thought).strip()) == said
            np.testing.assert_array_equal(batch["prompt_causal"][row], batch["prompt_loss"][row])
        assert batch["prompt"][row][: len(row_ids)].tolist() == row_ids
        assert batch["action_mask"][row].any() == (i != 2)
        assert batch["robot"][row] == (entries[i].robot.name == "arm")
    with pytest.raises(ValueError, match=r"robot 'arm': the policy has no parts for it; .*cart"):
        load(policy=dataclasses.replace(policy, robots=("cart",)), tokenizer=text, entries=entries)
    with pytest.raises(ValueError, match="pads answers to 60 tokens, the policy to 50"):
        load(policy=dataclasses.replace(policy, thought_len=50), tokenizer=text, entries=entries)


def test_chunks_out_of_range_stop_the_run_or_are_counted(
    load: Any, config: DataConfig, toy: Path, tokenizer: TextTokenizer, normalizations: dict[str, Normalization]
) -> None:
    narrow = fit_fast([np.zeros((4, 6, 3), np.int64)], scale=5.0, vocab_size=100, span=(-3, 3))
    text = TextTokenizer(tokenizer.tokenizer, 80, prompt_format=FastPrompt(), answer_len=60)
    options = {"policy": WRITES, "tokenizer": text, "action_tokenizer": narrow}
    with pytest.raises(
        DatasetError, match=r"record \d+.*: action tokens: .*cannot be encoded, expected -3 to 3.*saturate"
    ):
        next(load(**options))
    loader = load(saturate_actions=True, **options)
    next(loader)
    assert loader.saturated > 0
    held_out = dataclasses.replace(config, entries=config.entries[:1])
    item = next(
        validation_batches(
            held_out, batch_size=8, count=1, policy=WRITES, tokenizer=text, normalizations=normalizations,
            action_tokenizer=narrow,
        )
    )  # fmt: skip
    assert item.saturated > 0
    assert item.acts


def test_tokenizers_that_do_not_fit_the_policy_are_listed(
    load: Any, tokenizer: TextTokenizer, fast: FastTokenizer
) -> None:
    with pytest.raises(ValueError, match=r"there is an action tokenizer, but the policy has no action tokens"):
        load(action_tokenizer=fast)
    with pytest.raises(ValueError, match=r"has action tokens and there is no action tokenizer; fit one"):
        load(policy=WRITES)
    few = dataclasses.replace(WRITES, action_tokens=ActionTokens(max_len=50, count=100, skip=0))
    with pytest.raises(
        ValueError, match=r"(?s)\d+ tokens, the policy 100.*answers to 0 tokens, the policy to 50.*Pi0Prompt\(\)"
    ):
        load(policy=few, action_tokenizer=fast)


def test_action_tokens_never_take_the_ids_of_text(load: Any, tokenizer: TextTokenizer, fast: FastTokenizer) -> None:
    text = TextTokenizer(tokenizer.tokenizer, 80, prompt_format=FastPrompt(), answer_len=60)
    for vocab_size, message in (
        (
            557,
            r"ids 357 to 556, of which the text tokenizer uses those below 358; enlarge the policy's vocab_size by 1",
        ),
        (200, r"action tokens take ids 0 to 199, and with them \[0, 1, 2, 3, .*which give answers their form"),
    ):
        with pytest.raises(ValueError, match=message):
            load(
                policy=dataclasses.replace(WRITES, vocab_size=vocab_size),
                tokenizer=text,
                action_tokenizer=fast,
            )


def test_answers_that_are_too_long_are_located(load: Any, tokenizer: TextTokenizer, fast: FastTokenizer) -> None:
    short = dataclasses.replace(WRITES, action_tokens=ActionTokens(max_len=12, count=200, skip=0))
    text = TextTokenizer(tokenizer.tokenizer, 80, prompt_format=FastPrompt(), answer_len=12)
    with pytest.raises(DatasetError, match=r"record \d+.*: prompt .* with its answer has .*answer_len=12; enlarge one"):
        next(load(policy=short, tokenizer=text, action_tokenizer=fast))


def test_entries_without_anything_to_predict_are_refused(load: Any, config: DataConfig) -> None:
    entry = config.entries[0]
    with pytest.raises(ValueError, match=r"has actions=False and no text_key; then there is nothing to predict"):
        load(entries=(dataclasses.replace(entry, actions=False),))
    with pytest.raises(ValueError, match=r"has text_key='language_instruction', but the policy writes no answers"):
        load(entries=(dataclasses.replace(entry, text_key="language_instruction"),))
    with pytest.raises(DatasetError, match=r"text_key: the dataset has no 'subtask'"):
        load(entries=(dataclasses.replace(entry, text_key="subtask"),))


def test_leaves_have_the_types_of_the_contract(load: Any) -> None:
    flat = flatten(next(load()))
    assert {k.partition("/")[0]: v.dtype.name for k, v in flat.items()} == {
        "images": "uint8", "image_mask": "bool", "state": "float32", "state_mask": "bool", "prompt": "int32",
        "prompt_mask": "bool", "actions": "float32", "action_mask": "bool", "dataset_id": "int32",
        "position": "uint32",
    }  # fmt: skip
    assert {v.shape[0] for v in flat.values()} == {8}


def test_everything_that_does_not_fit_the_policy_is_listed(
    load: Any, normalizations: dict[str, Normalization], tokenizer: TextTokenizer
) -> None:
    small = Shapes(cameras=("base", "wrists"), state_dim=5, action_dim=2, action_horizon=4, prompt_len=9, vocab_size=10)
    with pytest.raises(ValueError, match="do not fit each other") as e:
        load(policy=small, normalizations={"arm": dataclasses.replace(normalizations["cart"], robot="car")})
    for expected in (
        "the tokenizer pads to 40 tokens, the policy to 9",
        f"the tokenizer has {tokenizer.vocab_size} ids, the policy knows 10",
        "robot 'arm': camera 'wrist' is not a slot of the policy (did you mean 'wrists'?)",
        "robot 'arm': state size 6, the policy has room for 5",
        "robot 'arm': action size 3, the policy has room for 2",
        "robot 'arm': action_horizon 5, the policy has room for 4",
        "robot 'arm': normalisation does not fit robot 'arm': robot car, expected arm; mode quantile",
        "robot 'cart': no normalisation; did you mean 'arm'",
    ):
        assert expected in str(e.value)


def test_a_camera_may_be_dropped_when_asked_for(load: Any) -> None:
    batch = next(load(policy=Shapes(cameras=("base",)), drop_cameras=("wrist",)))
    assert list(batch["images"]) == ["base"]
    with pytest.raises(ValueError, match="none of its cameras is a slot of the policy: third"):
        load(policy=Shapes(cameras=("third",)), drop_cameras=("wrist",))
    # With all of them, to compare with: a policy that sees nothing.
    blind = next(load(policy=Shapes(cameras=("third",)), drop_cameras=("wrist", "base")))
    assert not blind["image_mask"]["third"].any()
    assert not blind["images"]["third"].any()


def test_wrist_cameras_are_slots_of_the_policy(load: Any) -> None:
    with pytest.raises(
        ValueError, match=r"augment.wrist_cameras: 'wirst' is not a slot of the policy \(did you mean 'w"
    ):
        load(augment=Augment.octo(wrist_cameras=("wirst",)))


def test_a_damaged_image_stops_the_run_and_is_located(load: Any, copy: Path, config: DataConfig) -> None:
    """The checksums are right: it was written like this."""
    path = shard(copy, 1)
    index = open_index(copy, "train")
    offset, length = (int(x) for x in index.images["observation/image"][index.episode_start[7] + 2])
    image = path.read_bytes()[offset : offset + length]
    change_record(path, 2, lambda data: data.replace(image, bytes(length)))
    entry = dataclasses.replace(config.entries[0], path=str(copy))
    loader = load(entries=(entry,), batch_size=110, camera_dropout=0.0)
    with pytest.raises(DatasetError, match=r"episode 7, step 2 \(.*, record 2\): cannot decode observation/image"):
        next(loader)
