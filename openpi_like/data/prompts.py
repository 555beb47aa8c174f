"""Prompts the way published policies were trained: what text and state become, and how an answer is written.

One frozen dataclass for each; a config holds one, and a new one is a new class. Where a model reads its images: see
`PromptFormat.image_slots`.
"""

import abc
import dataclasses
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int64

from openpi_like.data.tokenizer import Message, Tokenizer

THOUGHT_END = "Next action:"
"""What a thought ends with, before its end of text: how DexVLA's reasoning goes over to actions."""


def state_bins(state: Float[np.ndarray, "*batch De"]) -> Int64[np.ndarray, "*batch De"]:
    """Returns which of 256 equal bins of [-1, 1] each value of a normalised state is in: floor((x + 1) * 128).

    As in the released pi0.5: 255 for everything above, and -1 (not 0) below, so that leaving the range can be told
    from its edge. De: state dims.
    """
    return np.digitize(state, np.linspace(-1, 1, 257)[:-1]) - 1


class PromptFormat(abc.ABC):
    """How prompts and answers are written. Implementations are frozen dataclasses.

    state_in_prompt: a prompt needs the state, so no two are alike.
    indicator: text that announces actions in an answer. ends_with_indicator: the prompt ends with it instead.
    close: text after action tokens, before EOS.
    """

    state_in_prompt: ClassVar[bool] = False
    indicator: ClassVar[str] = ""
    ends_with_indicator: ClassVar[bool] = False
    close: ClassVar[str] = ""

    # ---- Prompts -----------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def prompt(self, tokenizer: Tokenizer, text: str, state: Float[np.ndarray, "De"] | None, cameras: int) -> list[int]:
        """Returns the ids that ask for actions, without those of images.

        text: the instruction. state: normalised, without padding, given where `state_in_prompt`. cameras: how many
        images there are.

        Raises:
            ValueError: the tokenizer lacks what the format needs, or the text has special tokens in it.
        """

    @abc.abstractmethod
    def question(self, tokenizer: Tokenizer, text: str, cameras: int) -> list[int]:
        """Returns the ids that ask for a text answer, without those of images."""

    @abc.abstractmethod
    def leading(self, tokenizer: Tokenizer, cameras: int) -> list[int]:
        """Returns the ids that every prompt and question begins with, at least up to the last of `image_slots`."""

    def image_slots(self, tokenizer: Tokenizer, cameras: int) -> tuple[int, ...]:
        """Returns after how many of a prompt's ids each camera's image tokens go, in order.

        All zeros: images come first. A model reads these as constants, so all that is before the last one is the same
        in every prompt.

        Raises:
            ValueError: it is not; or the tokenizer lacks what the format needs.
        """
        return (0,) * cameras

    # ---- Answers -----------------------------------------------------------------------------------------------------

    def text_answer(self, tokenizer: Tokenizer, answer: str) -> list[int]:
        """Returns the ids of a text answer."""
        return [*tokenizer.encode(answer), tokenizer.required("eos")]

    def subtask(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Returns the ids of what is said before actions."""
        return tokenizer.encode(f"Subtask: {text};\n")

    def thought(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Returns the ids of text that is written before acting, to its end; of "" the end alone."""
        said = tokenizer.encode(f"{text}{THOUGHT_END}") if text else []
        return [*said, tokenizer.required("eos")]

    def thought_said(self, written: str) -> str:
        """Returns what a written thought says, without what announces the action."""
        return written.removesuffix(THOUGHT_END).rstrip()

    def action_indicator(self, tokenizer: Tokenizer) -> list[int]:
        """Returns the ids that announce actions in an answer; none where the prompt ends with them."""
        return [] if self.ends_with_indicator or not self.indicator else tokenizer.encode(self.indicator)

    def action_answer(self, tokenizer: Tokenizer, action_ids: Iterable[int]) -> list[int]:
        """Returns the ids of an answer with actions, to its end. action_ids: as ids of the text vocabulary."""
        begin = self.action_indicator(tokenizer)
        close = tokenizer.encode(self.close) if self.close else []
        return [*begin, *map(int, action_ids), *close, tokenizer.required("eos")]

    def structure_ids(self, tokenizer: Tokenizer) -> set[int]:
        """Returns the ids that give an answer its form: padding, BOS, EOS, unknown, and what is around actions."""
        t = tokenizer
        special = {token for token in (t.pad_id, t.bos_id, t.eos_id, t.unk_id) if token is not None}
        return special.union(*(t.encode(text) for text in (self.indicator, self.close) if text))


# ---- PaliGemma's family: images, BOS, text ---------------------------------------------------------------------------


class _PaliGemmaFormat(PromptFormat):
    """What the pi0 family shares: images first, questions of "pi0", "Action: " ... "|" around action tokens."""

    indicator: ClassVar[str] = "Action: "
    close: ClassVar[str] = "|"

    def question(self, tokenizer: Tokenizer, text: str, cameras: int) -> list[int]:
        """As PaliGemma is trained: BOS, the text, and a newline that is encoded separately."""
        pieces = [_line(text), "\n"]
        return [*self.leading(tokenizer, cameras), *(i for piece in pieces for i in tokenizer.encode(piece))]

    def leading(self, tokenizer: Tokenizer, cameras: int) -> list[int]:
        return [tokenizer.required("bos")]


@dataclasses.dataclass(frozen=True)
class Pi0Prompt(_PaliGemmaFormat):
    """pi0: BOS, the text on one line, and a newline that is encoded separately (openpi `models/tokenizer.py`)."""

    def prompt(self, tokenizer: Tokenizer, text: str, state: Float[np.ndarray, "De"] | None, cameras: int) -> list[int]:
        return self.question(tokenizer, text, cameras)


@dataclasses.dataclass(frozen=True)
class Pi05Prompt(_PaliGemmaFormat):
    """pi0.5: BOS, and `Task: {text}, State: {bins};\\nAction: ` as one piece (openpi `models/tokenizer.py`)."""

    state_in_prompt: ClassVar[bool] = True
    ends_with_indicator: ClassVar[bool] = True

    def prompt(self, tokenizer: Tokenizer, text: str, state: Float[np.ndarray, "De"] | None, cameras: int) -> list[int]:
        piece = f"Task: {_line(text)}, State: {_bins(state)};\nAction: "
        return [*self.leading(tokenizer, cameras), *tokenizer.encode(piece)]


@dataclasses.dataclass(frozen=True)
class FastPrompt(_PaliGemmaFormat):
    """pi0-FAST: BOS, and `Task: {text in lower case}, State: {bins};\\n` as one piece; "Action: " begins the answer.

    As released (openpi `models/tokenizer.py`): in lower case before it is stripped, and newlines stay.
    """

    state_in_prompt: ClassVar[bool] = True

    def prompt(self, tokenizer: Tokenizer, text: str, state: Float[np.ndarray, "De"] | None, cameras: int) -> list[int]:
        piece = f"Task: {text.lower().strip().replace('_', ' ')}, State: {_bins(state)};\n"
        return [*self.leading(tokenizer, cameras), *tokenizer.encode(piece)]


@dataclasses.dataclass(frozen=True)
class PlainPrompt(PromptFormat):
    """Images, then BOS where the tokenizer has one, and the text on one line with its newline, as one piece.

    VLM4VLA's form for PaliGemma, and its short form for other models; action tokens have nothing around them but EOS.
    """

    def prompt(self, tokenizer: Tokenizer, text: str, state: Float[np.ndarray, "De"] | None, cameras: int) -> list[int]:
        return self.question(tokenizer, text, cameras)

    def question(self, tokenizer: Tokenizer, text: str, cameras: int) -> list[int]:
        return [*self.leading(tokenizer, cameras), *tokenizer.encode(_line(text) + "\n")]

    def leading(self, tokenizer: Tokenizer, cameras: int) -> list[int]:
        return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


@dataclasses.dataclass(frozen=True)
class SmolVlaPrompt(PromptFormat):
    """SmolVLA: images, then the text as it is, with a newline at its end; no BOS, though SmolLM2's tokenizer has one
    (LeRobot `policies/smolvla/processor_smolvla.py`).
    """

    def prompt(self, tokenizer: Tokenizer, text: str, state: Float[np.ndarray, "De"] | None, cameras: int) -> list[int]:
        return self.question(tokenizer, text, cameras)

    def question(self, tokenizer: Tokenizer, text: str, cameras: int) -> list[int]:
        return tokenizer.encode(text if text.endswith("\n") else f"{text}\n")

    def leading(self, tokenizer: Tokenizer, cameras: int) -> list[int]:
        return []


def _line(text: str) -> str:
    return text.strip().replace("_", " ").replace("\n", " ")


def _bins(state: np.ndarray | None) -> str:
    assert state is not None  # TextTokenizer has checked it
    return " ".join(map(str, state_bins(state)))


# ---- OpenVLA: BOS, images, text --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OpenVlaPrompt(PromptFormat):
    """OpenVLA: BOS, images, and `In: What action should the robot take to {text in lower case}?\\nOut: ` as one piece.

    Its answer is action tokens and EOS. The space at the end is a token of its own with Llama's model (29871), which
    the released code appends where its prompt lacks it (openvla `extern/hf/modeling_prismatic.py`); here it is text.
    """

    def prompt(self, tokenizer: Tokenizer, text: str, state: Float[np.ndarray, "De"] | None, cameras: int) -> list[int]:
        return self.question(tokenizer, f"What action should the robot take to {text.lower()}?", cameras)

    def question(self, tokenizer: Tokenizer, text: str, cameras: int) -> list[int]:
        return [*self.leading(tokenizer, cameras), *tokenizer.encode(f"In: {text}\nOut: ")]

    def leading(self, tokenizer: Tokenizer, cameras: int) -> list[int]:
        return [tokenizer.required("bos")]

    def image_slots(self, tokenizer: Tokenizer, cameras: int) -> tuple[int, ...]:
        return (len(self.leading(tokenizer, cameras)),) * cameras


# ---- BERT: text alone ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BertPrompt(PromptFormat):
    """BERT and its kin: [CLS], the text, [SEP]."""

    def prompt(self, tokenizer: Tokenizer, text: str, state: Float[np.ndarray, "De"] | None, cameras: int) -> list[int]:
        return self.question(tokenizer, text, cameras)

    def question(self, tokenizer: Tokenizer, text: str, cameras: int) -> list[int]:
        return [*self.leading(tokenizer, cameras), *tokenizer.encode(text.strip()), tokenizer.token_id("[SEP]")]

    def leading(self, tokenizer: Tokenizer, cameras: int) -> list[int]:
        return [tokenizer.token_id("[CLS]")]


# ---- Chats: images inside the text -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ChatPrompt(PromptFormat):
    """A conversation in the form of the tokenizer's own chat template (Qwen, SmolVLM): the system's text, a user's turn
    of one image for each camera and the question, and the header of the assistant's turn.

    The defaults are VLM4VLA's for Qwen (`data/data_utils.py` there). Action tokens have nothing around them but EOS.

    system: "" for no turn of the system. ask: the question, with "{text}" for the instruction.
    image_token: what the template writes for an image, "<|image_pad|>" or "<image>"; its place is the camera's slot,
        and it is no part of the prompt's ids. None for templates of text alone: images come first.
    """

    system: str = "You are a helpful assistant."
    ask: str = "What action should the robotic arm take to {text}"
    image_token: str | None = "<|image_pad|>"

    def __post_init__(self) -> None:
        if "{text}" not in self.ask:
            raise ValueError(f"ChatPrompt: ask={self.ask!r}, expected {{text}} in it, where the instruction goes")

    def prompt(self, tokenizer: Tokenizer, text: str, state: Float[np.ndarray, "De"] | None, cameras: int) -> list[int]:
        return self._chat(tokenizer, text, self.ask, cameras)[0]

    def question(self, tokenizer: Tokenizer, text: str, cameras: int) -> list[int]:
        return self._chat(tokenizer, text, "{text}", cameras)[0]

    def leading(self, tokenizer: Tokenizer, cameras: int) -> list[int]:
        ids, slots = self._chat(tokenizer, "", self.ask, cameras)
        return ids[: max(slots, default=0)]

    def image_slots(self, tokenizer: Tokenizer, cameras: int) -> tuple[int, ...]:
        tried = [self._chat(tokenizer, text, self.ask, cameras) for text in ("a", "0 b\n c")]
        starts = [(slots, ids[: max(slots, default=0)]) for ids, slots in tried]
        if starts[0] != starts[1]:
            raise ValueError(
                f"prompts of {self} differ before their last image: {tokenizer.decode(starts[0][1])!r} and "
                f"{tokenizer.decode(starts[1][1])!r} for two texts; images have fixed places, so choose a chat "
                "template that puts them before the text"
            )
        return starts[0][0]

    def _chat(self, tokenizer: Tokenizer, text: str, ask: str, cameras: int) -> tuple[list[int], tuple[int, ...]]:
        """Returns ids without images, and the slots of these."""
        text = text.strip()
        marks = tokenizer.marks(text)
        if marks:
            raise ValueError(f"prompt {text!r} has special tokens of the chat in it: {', '.join(marks)}; take them out")
        asked = ask.replace("{text}", text)
        said: list[tuple[str, str, int]] = [("user", asked, cameras)]
        if self.system:
            said.insert(0, ("system", self.system, 0))
        ids = tokenizer.encode_marked(tokenizer.render_chat([self._message(*turn) for turn in said]))
        if self.image_token is None:
            return ids, (0,) * cameras
        image = tokenizer.token_id(self.image_token)
        places = [at for at, token in enumerate(ids) if token == image]
        if len(places) != cameras:
            raise ValueError(
                f"the chat template writes {self.image_token!r} {len(places)} times, expected once for each of "
                f"{cameras} cameras; set image_token to what it writes for an image, None if it knows text alone"
            )
        slots = tuple(place - earlier for earlier, place in enumerate(places))
        return [token for token in ids if token != image], slots

    def _message(self, role: str, text: str, cameras: int) -> Message:
        if self.image_token is None:
            return {"role": role, "content": text}
        return {"role": role, "content": [{"type": "image"}] * cameras + [{"type": "text", "text": text}]}


@dataclasses.dataclass(frozen=True)
class PrismaticChatPrompt(ChatPrompt):
    """Prismatic on Qwen2.5, as in VLA-Adapter and M2-VLA: a chat of text alone, and all images behind its first token.

    That is "<|im_start|>": the released code takes it for BOS (VLA-Adapter `experiments/robot/openvla_utils.py`).
    """

    system: str = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    ask: str = "What action should the robot take to {text}?"
    image_token: None = None

    def prompt(self, tokenizer: Tokenizer, text: str, state: Float[np.ndarray, "De"] | None, cameras: int) -> list[int]:
        return super().prompt(tokenizer, text.lower(), state, cameras)

    def leading(self, tokenizer: Tokenizer, cameras: int) -> list[int]:
        return super().prompt(tokenizer, "", None, cameras)[:1]

    def image_slots(self, tokenizer: Tokenizer, cameras: int) -> tuple[int, ...]:
        return (1,) * cameras
