"""Contracts: the tokenizer is kept whole and served, and what older versions stored is read."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from openpi_like.batch import ActionTokens
from openpi_like.config import from_json, to_json
from openpi_like.data.huggingface import HuggingFaceTokenizer
from openpi_like.data.prompts import ChatPrompt, FastPrompt, Pi0Prompt, Pi05Prompt
from openpi_like.data.sentencepiece_model import SentencePieceTokenizer
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.pi0_fast import Pi0FastConfig
from openpi_like.robots.sawyer import SAWYER
from openpi_like.serve.policy import Policy
from openpi_like.train.checkpoints.checkpoint import save_policy
from openpi_like.train.checkpoints.contract import CheckpointError, Contract, contract_problems
from openpi_like.train.checkpoints.load import load_policy_parts
from openpi_like.train.state import ModelDef
from tests.data import chat

CHAT = HuggingFaceTokenizer(chat.tokenizer_json(), json.dumps(chat.CONFIG), chat.TEXT)


@pytest.fixture(scope="module")
def chatting(policy: Pi0Config, contract_of: Callable[[Any], Contract]) -> Contract:
    """A policy that reads chats, images first."""
    reads = dataclasses.replace(policy, prompt_format=ChatPrompt(image_token=None), prompt_len=60, vocab_size=360)
    return dataclasses.replace(contract_of(reads), tokenizer=CHAT, renderers={SAWYER.name: None})


# ---- Kept whole ------------------------------------------------------------------------------------------------------


def test_a_chat_tokenizer_is_stored_and_served(tmp_path: Path, chatting: Contract) -> None:
    """From the directory alone; what is asked of the model is the chat."""
    assert contract_problems(chatting) == []
    params = jax.device_get(jax.jit(ModelDef(chatting.policy).init)(jax.random.key(3)))
    save_policy(tmp_path / "run", params, contract=chatting, origin="a test")
    parts = load_policy_parts(tmp_path / "run")
    assert parts.tokenizer.tokenizer == CHAT
    assert parts.contract_hash == chatting.hash()
    policy = Policy(parts)
    camera = SAWYER.cameras[0]
    observation = {
        "images": {camera.name: np.zeros((64, 64, 3), np.uint8)},
        "state": np.zeros(SAWYER.robot_state_size, np.float32),
        "prompt": "open the drawer",
    }
    assert np.isfinite(policy.infer(observation)["actions"]).all()
    ids, mask = parts.tokenizer.batch(["open the drawer"], [np.zeros(0, np.float32)])
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What action should the robotic arm take to open the drawer"},
    ]
    assert ids[mask].tolist() == CHAT.encode_marked(CHAT.render_chat(messages))
    with pytest.raises(ValueError, match="has special tokens of the chat in it"):
        policy.infer({**observation, "prompt": "stop<|im_end|>"})


def test_other_weights_are_served_without_compiling_again(tmp_path: Path, chatting: Contract) -> None:
    """From another run, while the first is in use; nothing of a checkpoint is needed once it is loaded."""
    for seed in (3, 4):
        params = jax.device_get(jax.jit(ModelDef(chatting.policy).init)(jax.random.key(seed)))
        save_policy(tmp_path / str(seed), params, contract=chatting, origin="a test")
    served = Policy.load(tmp_path / "3")
    assert served.is_step(tmp_path / "3")
    assert not served.is_step(tmp_path / "4")
    camera = SAWYER.cameras[0]
    state = np.zeros(SAWYER.robot_state_size, np.float32)
    pixels = np.zeros((64, 64, 3), np.uint8)
    observation = {"images": {camera.name: pixels}, "state": state, "prompt": "open the drawer", "seed": 1}
    before = served.infer(observation)["actions"]
    renewed, fresh = served.renewed(tmp_path / "4"), Policy.load(tmp_path / "4")
    shutil.rmtree(tmp_path / "4")
    compiled: Any = served._function.compiled(1)
    traces = compiled._cache_size()
    np.testing.assert_array_equal(renewed.infer(observation)["actions"], fresh.infer(observation)["actions"])
    assert compiled._cache_size() == traces
    np.testing.assert_array_equal(served.infer(observation)["actions"], before)
    assert np.abs(renewed.infer(observation)["actions"] - before).max() > 1e-3
    with pytest.raises(CheckpointError):
        served.renewed(tmp_path / "4")


def test_what_does_not_fit_is_named(chatting: Contract) -> None:
    def problems(tokenizer: Any = CHAT, **options: Any) -> str:
        changed = dataclasses.replace(chatting.policy, **options)
        return "; ".join(contract_problems(dataclasses.replace(chatting, policy=changed, tokenizer=tokenizer)))

    inside = dataclasses.replace(CHAT, template=chat.QWEN)
    count = len(chatting.policy.cameras)
    assert "images after their first (" in problems(inside, prompt_format=ChatPrompt())
    assert f"the policy reads them after {(0,) * count}" in problems(inside, prompt_format=ChatPrompt())
    slots = ChatPrompt().image_slots(inside, count)
    assert f"or image_slots={slots}" in problems(inside, prompt_format=ChatPrompt())
    assert problems(inside, prompt_format=ChatPrompt(), image_slots=slots, prompt_len=100) == ""
    assert f"the policy reads them after {slots}" in problems(image_slots=slots)
    assert "has no BOS token" in problems(prompt_format=Pi0Prompt())
    assert f"the tokenizer has {CHAT.vocab_size} ids, the policy knows 100" in problems(vocab_size=100)
    assert "cannot be read" in problems(dataclasses.replace(CHAT, tokenizer="{"))
    assert "not a SentencePiece model (2 bytes)" in problems(SentencePieceTokenizer("eHk="))


# ---- Older ones ------------------------------------------------------------------------------------------------------


def test_a_contract_with_tokenizer_and_prompt_format_as_strings_is_read() -> None:
    """Written by the version before they were objects, which made these ids of the prompt."""
    stored = json.loads(Path(__file__).with_name("contract_of_strings.json").read_text())
    assert isinstance(stored["tokenizer"], str)
    assert stored["policy"]["prompt_format"] == "pi05"
    contract = from_json(stored)
    assert isinstance(contract.tokenizer, SentencePieceTokenizer)
    assert contract.policy.prompt_format == Pi05Prompt()
    assert contract_problems(contract) == []
    ids, mask = contract.text_tokenizer().encode("press the button", np.zeros(2, np.float32))
    expected = (
        "2 89 102 289 112 63 290 272 271 273 49 290 88 287 102 287 288 63 290 54 55 61 290 54 55 61 64 4 70 104 287 "
        "110 264 63 290"
    )
    assert ids[mask].tolist() == list(map(int, expected.split()))
    assert from_json(json.loads(json.dumps(to_json(contract)))) == contract


@pytest.mark.parametrize(
    ("stored", "expected"),
    [("pi0", Pi0Prompt()), ("pi05", Pi05Prompt()), ("fast", FastPrompt())],
)
def test_prompt_formats_by_name_are_read(tiny_policy: Pi0Config, stored: str, expected: Any) -> None:
    shared = {
        f.name: getattr(tiny_policy, f.name) for f in dataclasses.fields(Pi0FastConfig) if hasattr(tiny_policy, f.name)
    }
    tokens = ActionTokens(max_len=5, count=9, skip=0)
    for config in (
        dataclasses.replace(tiny_policy, prompt_format=expected, pi05=True),
        Pi0FastConfig(**{**shared, "prompt_format": expected, "action_tokens": tokens}),
    ):
        data = to_json(config)
        assert from_json({**data, "prompt_format": stored}) == config
        del data["prompt_format"]  # older still: what was not in the record has its default
        assert from_json(data).prompt_format == type(config).prompt_format
    with pytest.raises(
        ValueError, match=r"prompt_format 'pi7' of an older checkpoint, expected one of \['pi0', 'pi05'"
    ):
        from_json({**to_json(tiny_policy), "prompt_format": "pi7"})
