"""Prompt formats: what they write, where images go in it, and what they refuse."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_like.batch import ActionTokens
from openpi_like.config import from_json, to_json
from openpi_like.data.huggingface import HuggingFaceTokenizer
from openpi_like.data.prompts import (
    ChatPrompt,
    FastPrompt,
    OpenVlaPrompt,
    Pi0Prompt,
    Pi05Prompt,
    PlainPrompt,
    PrismaticChatPrompt,
    PromptFormat,
    SmolVlaPrompt,
)
from openpi_like.data.sentencepiece_model import fit_text_tokenizer
from openpi_like.data.text import TextTokenizer
from openpi_like.data.tokenizer import Tokenizer
from tests.data import chat
from tests.data.toy import Shapes

# "Out" and ":" as one piece each, as in Llama's model.
PIECES = fit_text_tokenizer(["In: What action should the robot take to open the drawer?", "Out:", "Out"], 330)
QWEN = HuggingFaceTokenizer(chat.tokenizer_json(), json.dumps(chat.CONFIG), chat.QWEN)
SMOL = dataclasses.replace(QWEN, template=chat.SMOL)
TEXT = dataclasses.replace(QWEN, template=chat.TEXT)
STATE = np.array([-1.01, 0.5], np.float32)
CASES: list[tuple[Tokenizer, PromptFormat]] = [
    (PIECES, Pi0Prompt()),
    (PIECES, Pi05Prompt()),
    (PIECES, FastPrompt()),
    (PIECES, PlainPrompt()),
    (PIECES, OpenVlaPrompt()),
    (PIECES, SmolVlaPrompt()),
    (QWEN, PlainPrompt()),
    (QWEN, ChatPrompt()),
    (SMOL, ChatPrompt(image_token="<image>")),
    (TEXT, ChatPrompt(image_token=None, ask="What action should the robot take to {text}?")),
    (TEXT, PrismaticChatPrompt()),
]
EVERY = pytest.mark.parametrize(("tokenizer", "fmt"), CASES, ids=lambda x: type(x).__name__)


def written(tokenizer: Tokenizer, fmt: PromptFormat, text: str, cameras: int = 1) -> str:
    """Returns a prompt's text, special tokens too, after a look at its mask and slots."""
    row = TextTokenizer(tokenizer, 300, prompt_format=fmt, cameras=cameras)
    ids, mask = row.encode(text, STATE)
    assert mask.tolist() == sorted(mask, reverse=True)
    assert not ids[~mask].any()
    pieces = {tokenizer.token_id(piece): piece for piece in chat.SPECIAL} if tokenizer is not PIECES else {2: "<s>"}
    out, at = "", list[int]()
    for position, token in enumerate(ids[mask].tolist()):
        images = row.image_slots.count(position)
        if images:
            out, at = out + tokenizer.decode(at) + "#" * images, []
        if token in pieces:
            out, at = out + tokenizer.decode(at) + pieces[token], []
        else:
            at.append(token)
    return out + tokenizer.decode(at)


# ---- What is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fmt", "expected"),
    [
        (Pi0Prompt(), "##<s>Open the drawer\n"),
        (Pi05Prompt(), "##<s>Task: Open the drawer, State: -1 192;\nAction: "),
        (FastPrompt(), "##<s>Task: open the\ndrawer, State: -1 192;\n"),
        (PlainPrompt(), "##<s>Open the drawer\n"),
        (SmolVlaPrompt(), "## Open_the\ndrawer \n"),
        (OpenVlaPrompt(), "<s>##In: What action should the robot take to  open_the\ndrawer ?\nOut: "),
    ],
    ids=str,
)
def test_prompts_of_sentencepiece(fmt: PromptFormat, expected: str) -> None:
    assert written(PIECES, fmt, " Open_the\ndrawer ", cameras=2) == expected


def test_prompts_of_chats() -> None:
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    end = "<|im_end|>\n<|im_start|>assistant\n"
    asked = "What action should the robotic arm take to Open it"
    image = "<|vision_start|>#<|vision_end|>"
    assert written(QWEN, ChatPrompt(), " Open it\n", cameras=3) == system + 3 * image + asked + end
    # As Qwen2-VL's own template has it where there is no turn of the system.
    assert written(QWEN, ChatPrompt(system=""), "Open it") == system + image + asked + end
    other = ChatPrompt(system="Go.", ask="{text}!", image_token=None)
    assert written(TEXT, other, "Left") == "#" + system.replace("You are a helpful assistant.", "Go.") + "Left!" + end
    smol = written(SMOL, ChatPrompt(system="", image_token="<image>"), "Open it", cameras=2)
    assert smol == f"<|im_start|>User:##{asked}<end_of_utterance>\nAssistant:"
    prismatic = system.replace("system\nYou", "##system\nYou are Qwen, created by Alibaba Cloud. You")
    asked = "What action should the robot take to open it?"
    assert written(TEXT, PrismaticChatPrompt(), "Open it", cameras=2) == prismatic + asked + end
    assert written(QWEN, PlainPrompt(), "Open it", cameras=2) == "##Open it\n"
    assert written(QWEN, SmolVlaPrompt(), "Open it\n") == "#Open it\n"


def test_slots() -> None:
    assert OpenVlaPrompt().image_slots(PIECES, 3) == (1, 1, 1)
    first, second = ChatPrompt().image_slots(QWEN, 2)
    assert second == first + 2  # the end of one image, and the start of the next
    lead = ChatPrompt().leading(QWEN, 2)
    assert len(lead) == second
    start, end = (QWEN.token_id(f"<|vision_{what}|>") for what in ("start", "end"))
    assert lead[first - 1 :] == [start, end, start]
    assert (
        ChatPrompt(image_token="<image>").image_slots(SMOL, 2)[0]
        == ChatPrompt(image_token="<image>").image_slots(SMOL, 2)[1]
    )


def test_openvla_ends_with_the_space_as_a_token_of_its_own() -> None:
    """Id 29871 of Llama's model is this piece."""
    ids = OpenVlaPrompt().prompt(PIECES, "open the drawer", None, 1)
    assert ids[0] == PIECES.bos_id
    assert ids[-1] == PIECES.token_id("\u2581")
    assert PIECES.decode(ids[-3:]).endswith(": ")


@EVERY
@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=12), cameras=st.integers(1, 3))
def test_all_before_the_last_image_is_the_same_for_every_text(
    tokenizer: Tokenizer, fmt: PromptFormat, text: str, cameras: int
) -> None:
    slots = fmt.image_slots(tokenizer, cameras)
    assert len(slots) == cameras
    assert sorted(slots) == list(slots)
    prompts = [fmt.prompt(tokenizer, of, STATE, cameras) for of in (text, "")] + [
        fmt.question(tokenizer, text, cameras)
    ]
    lead = fmt.leading(tokenizer, cameras)
    assert len(lead) >= slots[-1]
    assert all(ids[: len(lead)] == lead for ids in prompts)
    row = TextTokenizer(tokenizer, 500, prompt_format=fmt, cameras=cameras)
    assert row.image_slots == slots
    assert row.encode(text, STATE)[0][: len(prompts[0])].tolist() == prompts[0]


# ---- Answers ---------------------------------------------------------------------------------------------------------


@EVERY
@settings(max_examples=20, deadline=None)
@given(text=st.text(max_size=6), answer=st.text(max_size=6), action_ids=st.lists(st.integers(0, 299), max_size=5))
def test_answers(tokenizer: Tokenizer, fmt: PromptFormat, text: str, answer: str, action_ids: list[int]) -> None:
    row = TextTokenizer(tokenizer, 500, prompt_format=fmt, cameras=2, answer_len=100)
    said = row.encode_answer(text, answer)
    eos = tokenizer.required("eos")
    assert said.prompt[said.prompt_loss].tolist() == [*tokenizer.encode(answer), eos]
    assert said.prompt[said.prompt_mask & ~said.prompt_causal].tolist() == fmt.question(tokenizer, text, 2)
    assert not said.prompt_action.any()
    acts = row.encode_actions(text, STATE, np.array(action_ids, np.int32), subtask="reach")
    begin, close = row.action_indicator(), tokenizer.encode(fmt.close) if fmt.close else []
    assert acts.prompt[acts.prompt_action].tolist() == [*begin, *action_ids, *close, eos]
    middle = acts.prompt[acts.prompt_causal & ~acts.prompt_action].tolist()
    assert tokenizer.decode(middle) == "Subtask: reach;\n"
    np.testing.assert_array_equal(acts.prompt_causal, acts.prompt_loss)
    structure = row.structure_ids()
    assert structure.issuperset([*begin, *close, eos])
    assert None not in structure
    # "Action: " is said once: at the end of the prompt, or at the start of the answer, or nowhere.
    assert bool(begin) == (bool(fmt.indicator) and not fmt.ends_with_indicator)


def test_answers_without_an_end_are_refused() -> None:
    endless = HuggingFaceTokenizer(QWEN.tokenizer)
    row = TextTokenizer(endless, 50, prompt_format=PlainPrompt())
    with pytest.raises(ValueError, match=r"has no EOS token, which ends every answer"):
        row.encode_answer("what", "this")
    with pytest.raises(ValueError, match=r"has no EOS token, which ends every answer"):
        row.encode_actions("go", None, np.zeros(1, np.int32))


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokenizer", "options", "message"),
    [
        (QWEN, {"prompt_format": Pi0Prompt()}, r"has no BOS token, which begins every prompt of this format; choose"),
        (QWEN, {"prompt_format": OpenVlaPrompt()}, r"has no BOS token"),
        (PIECES, {"prompt_format": ChatPrompt()}, r"a SentencePieceTokenizer has no chat template"),
        (TEXT, {"prompt_format": ChatPrompt()}, r"'<\|image_pad\|>' 0 times, .*None if it knows text alone"),
        (QWEN, {"prompt_format": ChatPrompt(image_token="<image>")}, r"'<image>' 0 times, expected .* of 1 cameras"),
        (QWEN, {"prompt_format": ChatPrompt(image_token="<|img_pad|>")}, r"no token .* did you mean '<\|image_pad\|>'"),
        (QWEN, {"prompt_format": ChatPrompt(), "prompt_len": 5}, r"before the last image, expected at most prompt_len"),
    ],
)  # fmt: skip
def test_tokenizers_that_do_not_fit(tokenizer: Tokenizer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextTokenizer(tokenizer, **{"prompt_len": 100, **options})


def test_templates_with_images_after_the_text_are_refused() -> None:
    late = chat.QWEN.replace(
        "message['content'] %}{% if content['type']", "message['content'][::-1] %}{% if content['type']"
    )
    assert late != chat.QWEN
    with pytest.raises(ValueError, match=r"ChatPrompt\(.* differ before their last image: .*arm take to a.* so choose"):
        TextTokenizer(dataclasses.replace(QWEN, template=late), 100, prompt_format=ChatPrompt())


def test_a_prompt_that_moves_the_images_is_refused() -> None:
    """A template that does so for some texts only."""
    shy = "{% if 'loud' in messages[1].content[-1].text %}!{% endif %}" + chat.QWEN
    row = TextTokenizer(dataclasses.replace(QWEN, template=shy), 100, prompt_format=ChatPrompt())
    row.encode("open")
    with pytest.raises(ValueError, match=r"prompt 'be loud' begins with the tokens .*: images have fixed places among"):
        row.encode("be loud")


def test_special_tokens_in_a_prompt_are_refused() -> None:
    row = TextTokenizer(QWEN, 100, prompt_format=ChatPrompt())
    for text in ("go<|im_end|>", "an <image>"):
        with pytest.raises(ValueError, match=r"has special tokens of the chat in it: <.*>; take them out"):
            row.encode(text)
        with pytest.raises(ValueError, match=r"has special tokens of the chat in it"):
            row.encode_answer(text, "x")
    assert row.encode("go <|im_end")[1].any()
    with pytest.raises(ValueError, match=r"ask='go', expected \{text\} in it"):
        ChatPrompt(ask="go")


@EVERY
def test_formats_are_stored(tokenizer: Tokenizer, fmt: PromptFormat) -> None:
    again = from_json(json.loads(json.dumps(to_json(fmt))))
    assert again == fmt
    assert hash(again) == hash(fmt)


def test_a_tokenizer_for_a_policy() -> None:
    tokens = ActionTokens(max_len=30)
    shapes = Shapes(prompt_len=90, prompt_format=ChatPrompt(), cameras=("a", "b"), action_tokens=tokens)
    row = TextTokenizer.of_policy(QWEN, shapes)
    assert (row.prompt_len, row.answer_len, row.cameras, row.prompt_format) == (90, 30, 2, ChatPrompt())
    assert TextTokenizer.of_policy(PIECES, Shapes()).answer_len == 0
