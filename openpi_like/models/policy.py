"""What every model is built from and what a policy is: a backbone, and what the policy adds to it.

A model's config has the sizes of a batch and a `backbone`, itself a config. A policy is a module with

    loss(key, batch, counts=None) -> (scalar, per-sample metrics)        loss_counts(batch) -> what it divides by
    validation_losses(key, batch) -> {name: scalar}                      packed() -> itself, for many small calls
    sample_actions(key, observation, action_mask=None, **options) -> normalised actions; key: one, or one of each row
    think(observation, **options) -> text that is written before acting, for the observation of the next chunks
    remember(key, batch) -> {name: what it keeps}, of weights that are not trained but written (`param.memory`)

which is all that the trainer, the validator and the server know of it. What is learned beside, where a policy sees for
itself what is around the robot, is the same for all (`perceiving`). A new policy is one file with its config and its
module, and a config of a run that names it.

Letters: B batch, S text tokens, T tokens of an answer, A action horizon, J action dims.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from openpi_like.batch import ActionTokens, Batch, EntityTokens, Observation
from openpi_like.config import near_names
from openpi_like.data.prompts import Pi0Prompt, PromptFormat
from openpi_like.draws import RowKeys, named_key
from openpi_like.models.backbone import Backbone
from openpi_like.models.backbone_config import BackboneConfig
from openpi_like.models.entities import EntityProjectors
from openpi_like.models.formats import Format
from openpi_like.models.scene_perception import PerceptionConfig, ScenePerception
from openpi_like.models.stack import remat_problem
from openpi_like.robots import Robot

RESIZE = ("cubic", "pillow")


# ---- Configs ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionLanguageConfig:
    """Sizes and options that all models share.

    backbone: what sees and reads, such as `PaliGemmaConfig`. vocab_size: V, rows of its table of tokens.
    cameras: slot names, in prefix order; any number. image_size: (height, width) pixels.
    resize: how frames of other sizes become this one, see `openpi_like.data.images.fit`.
    image_slots: of each camera, how many text tokens stand before its own; () puts all images before the text.
    entities: slots of things that it reads beside images, as tokens behind those of the last camera.
    perception: sees these in the images: observations need not have any then, and training needs those of all robots.
        None: they are given.
    prompt_len: S, padded text tokens. dtype: of activations, "float32" or "bfloat16"; weights are float32.
    remat: what the backward pass recomputes, see `stack.remat_problem`; None recomputes nothing.
    unroll: compile layers one by one instead of as a loop: faster for a few layers, see `stack.run_layers`.
    """

    backbone: BackboneConfig
    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    prompt_len: int
    vocab_size: int
    resize: str = "cubic"
    dtype: str = "float32"
    remat: str | None = None
    unroll: bool = False
    image_slots: tuple[int, ...] = ()
    entities: tuple[EntityTokens, ...] = ()
    perception: PerceptionConfig | None = None

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise ValueError(f"{type(self).__name__}: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        problems = self.backbone.problems(self.image_size)
        if len(set(self.cameras)) != len(self.cameras) or not self.cameras:
            problems.append(f"cameras={self.cameras}, expected at least one, each named once")
        problems += [
            f"{name}={getattr(self, name)}, expected at least 1"
            for name in ("prompt_len", "vocab_size")
            if getattr(self, name) < 1
        ]
        if self.resize not in RESIZE:
            problems.append(f"resize={self.resize!r}, expected one of {RESIZE}")
        if self.dtype not in ("float32", "bfloat16"):
            problems.append(f"dtype={self.dtype!r}, expected 'float32' or 'bfloat16'")
        slots, places = self.image_slots, range(self.prompt_len)
        if slots and (
            len(slots) != len(self.cameras) or list(slots) != sorted(slots) or not all(slot in places for slot in slots)
        ):
            problems.append(
                f"image_slots={slots}, expected one for each of {len(self.cameras)} cameras, in order, each from 0 and "
                f"less than prompt_len={self.prompt_len}"
            )
        names = [slot.name for slot in self.entities]
        if len(set(names)) != len(names):
            problems.append(f"entities {names}, expected each named once")
        if self.perception is not None and not names:
            problems.append("perception without entities, expected slots for what it sees")
        wrong = remat_problem(self.remat)
        if wrong is not None:
            problems.append(wrong)
        return problems

    @property
    def answer_len(self) -> int:
        """T, text tokens of a training batch beyond `prompt_len`; 0 where prompt and answer share that."""
        return 0

    def formats(self) -> Mapping[str, Format]:
        """Returns the published layouts that hold this model's weights, by name: here those of its backbone."""
        return {name: fmt for name, fmt in self.backbone.formats(self.vocab_size).items() if not fmt.partial}

    def released_normalization(self) -> str:
        """Returns by which statistics the released weights of such a policy see a robot: "zscore" or "quantile"."""
        return "zscore"

    def lerobot_config(self, dtype: str) -> dict[str, Any] | None:
        """Returns LeRobot's `config.json` for these weights in `dtype`; None where it has no such policy."""
        return None

    @property
    def entities_asked(self) -> tuple[EntityTokens, ...]:
        """Slots that an observation fills: all; none where the policy sees them for itself."""
        return self.entities if self.perception is None else ()

    # ---- Shapes of inputs --------------------------------------------------------------------------------------------

    def text_shapes(self, B: int, *, answers: bool = False) -> dict[str, Any]:
        """Returns the shapes of B rows of images and text, each a `jax.ShapeDtypeStruct`.

        answers: the text has answers, as in training.
        """
        row = lambda dtype, *shape: jax.ShapeDtypeStruct((B, *shape), dtype)  # noqa: E731
        S = self.prompt_len + self.answer_len * answers
        masks = ("prompt_mask", *(("prompt_causal", "prompt_loss") if answers else ()))
        return {
            "prompt": row("int32", S),
            **{name: row("bool", S) for name in masks},
            "images": {camera: row("uint8", *self.image_size, 3) for camera in self.cameras},
            "image_mask": {camera: row("bool") for camera in self.cameras},
            **_entity_shapes(B, self.entities_asked),
        }

    def batch_shapes(self, B: int) -> dict[str, Any]:
        """Returns the shapes of a training batch, see `openpi_like.batch.TextBatch`."""
        return self.text_shapes(B, answers=True) | self._of_training(B)

    def _of_training(self, B: int) -> dict[str, Any]:
        """Returns the shapes of what no observation has, and all batches do: what a perception learns is among it."""
        return {"dataset_id": jax.ShapeDtypeStruct((B,), "int32"), **_entity_shapes(B, self.entities)}

    def check_batch(self, batch: Any) -> None:
        """Checks names, shapes and dtypes of a whole training batch, see `batch_shapes`.

        Raises:
            ValueError: lists everything that does not fit.
        """
        _compare(batch, self.batch_shapes(_rows(batch)))

    def check(self, inputs: Any, *, answers: bool = False) -> None:
        """Checks names, shapes and dtypes of images and text; costs nothing when compiled. answers: see `text_shapes`.

        Raises:
            ValueError: lists everything that does not fit.
        """
        _compare(inputs, self.text_shapes(_rows(inputs), answers=answers))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig(VisionLanguageConfig):
    """What all policies share; see `VisionLanguageConfig` for images and text.

    state_dim, action_dim: padded sizes. action_horizon: A, steps in a chunk.
    prompt_format: how its prompts and answers are written, see `openpi_like.data.prompts`.
    action_tokens: how actions are written as tokens, None where they are not.
    robots: names of those that have parts of their own in the policy; () where all share all of it.
    thought_len: tokens of text that it can write before it acts (a subtask, reasoning), see `Model.think`; 0: it does
        not.
    """

    state_dim: int
    action_dim: int
    action_horizon: int
    prompt_format: PromptFormat = Pi0Prompt()
    action_tokens: ActionTokens | None = None
    robots: tuple[str, ...] = ()
    thought_len: int = 0
    writes_tokens: ClassVar[bool] = False  # whether a policy of this kind can have action tokens
    has_robot_parts: ClassVar[bool] = False  # whether it can have parts for each robot
    can_think: ClassVar[bool] = False  # whether it can write text before it acts

    @property
    def answer_len(self) -> int:
        """T, see `ActionTokens.max_len`."""
        return 0 if self.action_tokens is None else self.action_tokens.max_len

    def _problems(self) -> list[str]:
        problems = super()._problems()
        problems += [
            f"{name}={getattr(self, name)}, expected at least 1"
            for name in ("state_dim", "action_dim", "action_horizon")
            if getattr(self, name) < 1
        ]
        if not isinstance(self.prompt_format, PromptFormat):
            problems.append(f"prompt_format={self.prompt_format!r}, expected a PromptFormat such as {Pi0Prompt()}")
        tokens = self.action_tokens
        if tokens is not None and not self.writes_tokens:
            problems.append(f"action_tokens={tokens}, expected None: actions are not written as text")
        if self.robots and not self.has_robot_parts:
            problems.append(f"robots={self.robots}, expected (): all robots share all of it")
        if self.thought_len < 0 or (self.thought_len and not self.can_think):
            problems.append(f"thought_len={self.thought_len}, expected {'0 or more' if self.can_think else '0'}")
        if len(set(self.robots)) != len(self.robots):
            problems.append(f"robots={self.robots}, expected each named once")
        if tokens is not None and tokens.count + tokens.skip > self.vocab_size:
            least = tokens.count + tokens.skip
            problems.append(f"vocab_size={self.vocab_size}, expected at least {least} for the ids of action tokens")
        return problems

    def check_inputs(self, inputs: Observation | Batch, *, actions: bool) -> None:
        """Checks an observation, or a batch with `actions`, as `check` does.

        Raises:
            ValueError: lists everything that does not fit.
        """
        shapes = self.input_shapes(_rows(inputs), actions=actions)
        _compare(inputs, self.with_image_states(shapes) if "image_states" in inputs else shapes)

    def with_image_states(self, shapes: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the shapes of inputs, of those that have what a frozen backbone makes of images in their place.

        Raises:
            ValueError: this policy reads images.
        """
        raise ValueError(f"{type(self).__name__} reads images, not image_states; leave them out of its data")

    def input_shapes(self, B: int, *, actions: bool) -> dict[str, Any]:
        """Returns the shapes of B observations, or of B samples with `actions`, each a `jax.ShapeDtypeStruct`."""
        row = lambda dtype, *shape: jax.ShapeDtypeStruct((B, *shape), dtype)  # noqa: E731
        answers = actions and self.answer_len > 0
        chunk = (self.action_horizon, self.action_dim)
        shapes: dict[str, Any] = {"state": row("float32", self.state_dim), "state_mask": row("bool", self.state_dim)}
        shapes |= self.text_shapes(B, answers=answers)
        if self.robots:
            shapes["robot"] = row("int32")
        if actions:
            shapes |= {
                "actions": row("float32", *chunk),
                "action_mask": row("bool", *chunk),
                "position": row("uint32", 2),
                **({"episode": row("int32")} if self.reads_episodes else {}),
            }
        if answers and self.action_tokens is not None:
            shapes["prompt_action"] = row("bool", *shapes["prompt"].shape[1:])
        return shapes

    def batch_shapes(self, B: int) -> dict[str, Any]:
        """Returns the shapes of a training batch, see `openpi_like.batch.Batch`."""
        return self.input_shapes(B, actions=True) | self._of_training(B)

    @property
    def reads_episodes(self) -> bool:
        """Whether its loss wants to know which samples are of one episode, see `Batch.episode`."""
        return False

    def sampling_shapes(self) -> dict[str, Any]:
        """Returns the shapes of what `sample_actions` takes besides an observation, by name: here nothing."""
        return {}

    @property
    def takes_previous(self) -> bool:
        """Whether `sample_actions` takes what is left of the chunk before, see `openpi_like.models.chunking`."""
        return False

    def sampling_options(self, text: Any, fast: Any) -> dict[str, Any]:
        """Returns what `sample_actions` takes besides an observation, by name, made of a checkpoint's tokenizers.

        text: `TextTokenizer`. fast: `FastTokenizer`, or None. A model does not import the reading of data.
        """
        return {}

    def tokenizer_problems(self, text: Any) -> list[str]:
        """Returns why this policy cannot be told or say anything with a `TextTokenizer`, beyond what its sizes say."""
        return []

    def robot_problems(self, robot: Robot, fast: Any) -> list[str]:
        """Returns why this policy cannot act for a robot, beyond what its sizes say."""
        return []

    def chunk_mask(self, horizon: int, dims: int) -> Bool[np.ndarray, "A J"]:
        """Returns which entries of a chunk a robot has: its first `horizon` steps, and of these its first `dims`."""
        return (np.arange(self.action_horizon)[:, None] < horizon) & (np.arange(self.action_dim) < dims)

    def observation(self, batch: Batch) -> Observation:
        """Returns what a robot would have asked with: the batch without actions, and without answers to the prompt."""
        seen: dict[str, Any] = {k: batch[k] for k in Observation.__annotations__ if k in batch}  # type: ignore[literal-required]
        if self.answer_len:
            asked = batch["prompt_mask"] & ~batch["prompt_causal"]
            seen["prompt"] = jnp.where(asked, batch["prompt"], 0)[:, : self.prompt_len]
            seen["prompt_mask"] = asked[:, : self.prompt_len]
        return Observation(**seen)  # type: ignore[typeddict-item]


# ---- Modules ---------------------------------------------------------------------------------------------------------


class Model(nnx.Module):
    """A backbone, and what a subclass adds. A weight's name is its path here without "backbone/", see `weights`."""

    config: VisionLanguageConfig

    def __init__(self, config: VisionLanguageConfig, key: Key[Array, ""]) -> None:
        """Use the config's `create`. Every weight's draw depends on `key` and its own name only."""
        self.config = config
        self.backbone: Backbone = config.backbone.create(config, key)
        if config.entities:
            width = config.backbone.language.width
            self.backbone.entities = EntityProjectors(named_key(key, "entities"), config.entities, width)
        if config.perception is not None:
            self.backbone.perception = ScenePerception(
                named_key(key, "perception"),
                config.perception,
                config.entities,
                cameras=len(config.cameras),
                token_width=config.backbone.language.width,
                unroll=config.unroll,
                remat=config.remat,
            )

    def with_parts(self, **parts: nnx.Module) -> Any:
        """Returns the same model with other modules in the place of its own; itself where they are its own."""
        if all(getattr(self, name) is part for name, part in parts.items()):
            return self
        model = nnx.merge(*nnx.split(self))
        for name, part in parts.items():
            setattr(model, name, part)
        return model

    def outputs(self, key: Key[Array, ""], batch: Any) -> Float[Array, "B ..."]:
        """Returns what shows that two sets of weights are the same model: here the logits of text."""
        return self.backbone.text_logits(batch)

    def remember(self, key: Key[Array, ""], batch: Any) -> dict[str, Float[Array, "..."]]:
        """Returns what the model's memory is after a batch that it was trained on, by weight name: here nothing.

        Called once a step, with the weights before it; `key` is that of the loss. Validation and sampling only read.
        """
        return {}

    def think(self, observation: Any, **options: Any) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
        """Returns the ids of text that is written before acting, 0 where padded, and which are there; T: `thought_len`.

        For `Observation.thought`: a thought can be kept for several chunks. options: as of `sample_actions`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not write text before it acts")

    def packed(self) -> Any:
        """Returns the same model with its weights as repeated calls want them, see `Gemma.packed`.

        A server does this once, when it loads; where it was not done, sampling does it in every call.
        """
        return self


class OnePassPolicy(Model):
    """A policy that says a whole chunk in one pass and draws nothing."""

    config: "PolicyConfig"

    def predict(self, observation: Observation) -> Float[Array, "B A J"]:
        """Returns what the network says of an observation."""
        raise NotImplementedError

    def chosen(self, said_BAJ: Float[Array, "B A J"]) -> Float[Array, "B A J"]:
        """Returns the normalised actions that are done for what `predict` says."""
        return said_BAJ

    def loss_counts(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns what `loss` divides by. A part of a batch, with the counts of all of it, has its part of the loss."""
        return {"actions": batch["action_mask"].any((1, 2)).sum().astype(jnp.float32)}

    def outputs(self, key: Key[Array, ""], batch: Batch) -> Float[Array, "B A J"]:
        """Returns what the network says."""
        return self.predict(self.config.observation(batch))

    def sample_actions(
        self,
        key: RowKeys,
        observation: Observation,
        *,
        action_mask: Bool[Array, "B A J"] | None = None,
    ) -> Float[Array, "B A J"]:
        """Returns normalised actions; `key` is not used.

        action_mask: which entries of the chunk this robot has (None: all); the others are 0.

        Raises:
            ValueError: the observation does not fit the config; lists everything that does not.
        """
        self.config.check_inputs(observation, actions=False)
        actions = self.chosen(self.predict(observation))
        return actions if action_mask is None else jnp.where(action_mask, actions, 0.0)


# ---- Checks ----------------------------------------------------------------------------------------------------------


def _entity_shapes(B: int, slots: Sequence[EntityTokens]) -> dict[str, Any]:
    """Returns the shapes of "entities" and "entity_mask" of B rows, where there are slots."""
    if not slots:
        return {}
    shape = jax.ShapeDtypeStruct
    return {
        "entities": {e.name: shape((B, e.count, e.size), "float32") for e in slots},
        "entity_mask": {e.name: shape((B, e.count), "bool") for e in slots},
    }


def _rows(inputs: Any) -> int:
    """Returns the number of rows, by the prompt."""
    return inputs["prompt"].shape[0] if "prompt" in inputs and inputs["prompt"].ndim else 0


def _compare(inputs: Any, shapes: dict[str, Any]) -> None:
    """Compares inputs with the shapes that a policy takes; further leaves are let through, further cameras are not.

    Raises:
        ValueError: lists everything that does not fit.
    """
    problems: list[str] = []

    def expect(name: str, value: Any, shape: Any, *dtypes: str) -> None:
        if tuple(value.shape) != shape.shape or str(value.dtype) not in dtypes:
            got = f"{value.dtype} {tuple(value.shape)}"
            problems.append(f"{name}: got {got}, expected {' or '.join(dtypes)} {shape.shape}")

    for name, shape in shapes.items():
        if name not in inputs:
            problems.append(f"{name}: missing; got {sorted(inputs)}")
        elif not isinstance(shape, dict):
            expect(name, inputs[name], shape, str(shape.dtype))
        else:  # by camera, or slot of entities
            what, got = "camera" if name.startswith("image") else "slot", inputs[name]
            for camera in shape:
                if camera in got:
                    # Images that were changed in the step are float already.
                    dtypes = ("uint8", "float32") if name == "images" else (str(shape[camera].dtype),)
                    expect(f"{name}[{camera!r}]", got[camera], shape[camera], *dtypes)
                else:
                    problems.append(f"{name}[{camera!r}]: missing; {near_names(camera, list(got))}")
            for camera in sorted(set(got) - set(shape)):
                near = near_names(camera, list(shape))
                problems.append(f"{name}[{camera!r}]: the policy has no such {what}; {near}; leave it out")
    if problems:
        raise ValueError("inputs do not fit the policy's config:\n  " + "\n  ".join(problems))
