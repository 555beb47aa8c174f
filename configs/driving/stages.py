"""OpenDriveVLA's staged training (Zhou et al. 2025, arXiv 2503.23463, table 1) at tiny size: one table, and the runs
that are derived from it, `stages.py:stage1_alignment` and so on. Each has a file of its own, too.

    python data/stats.py --config configs/driving/text.py
    python train/train.py configs/driving/stage1_alignment.py
    python train/train.py configs/driving/stage2_questions.py
    python train/train.py configs/driving/stage2b_forecasting.py
    python train/train.py configs/driving/stage3_planning.py

A language model that reads six cameras, and the vehicles and lines of a perception, here the simulator's: it learns to
say what these are, to answer questions, to say where others will be, and then to plan. `single_stage.py` has learned
nothing before it plans, and does it for as many steps as all stages together.

What is trained is the published table, with one exception: there, language model and 2D backbone were pretrained. At
tiny size nothing was, and what is frozen as it was drawn can teach nothing. So each stage names what is trained as
published, and what is trained here besides: the language model in stage 1, and the 2D backbone up to stage 3, where it
is frozen as published. The same holds for rates. Published are 1e-4, then a tenth of it, for weights that were trained
for long; here it is half.

The same stages with a perception of their own, which sees vehicles and lines in the images and is all that acting
needs. It learns alone before them, with the image tower, from the simulator's annotations:

    python train/train.py configs/driving/stages.py:perception
    python train/train.py configs/driving/stages.py:perceived_stage1_alignment
    python train/train.py configs/driving/stages.py:perceived_stage2_questions
    python train/train.py configs/driving/stages.py:perceived_stage2b_forecasting
    python train/train.py configs/driving/stages.py:perceived_stage3_planning

As published it is pretrained, and trained again in the last stage, where the loss of the plan reaches it. In the stages
between it is frozen there, and here trained besides: it stands behind the projector of the scene, which these train.
"""

import dataclasses
from pathlib import Path

from openpi_like.batch import EntityTokens
from openpi_like.config import load_run
from openpi_like.data.config import MixtureEntry
from openpi_like.data.selection import Selection
from openpi_like.driving.scene_texts import CAPTION_PROMPT
from openpi_like.models.scene_decoder import SceneDecoderConfig
from openpi_like.models.scene_perception import PerceptionConfig
from openpi_like.robots.ego_vehicle import ENTITIES
from openpi_like.train.checkpoints.warm_start import WarmStart
from openpi_like.train.config import TrainConfig
from openpi_like.train.state import Trainable

PARTS = {
    "2D backbone": r"^vision/(?!head/)",
    "projectors": r"^(entities|vision/head)/",
    "language model": r"^vlm/",
    "perception": r"^perception/",
}
"""All weights of the policy, as patterns of names. The map behind the image tower is the projector of the scene; there
is a perception where a stage says how it learns."""


@dataclasses.dataclass(frozen=True)
class Text:
    """A question that is answered in words. question, answer: fields of the steps; None asks for a caption.

    weight: beside the other texts of its stage.
    """

    question: str | None
    answer: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """One row of the table.

    trained: parts that are trained as published. besides: those that are trained here too, as nothing was before.
    rate: of learning, beside that of flow.py. texts: what is asked, () where it plans. start: the stage before, None
    for weights as they are drawn. perception: None where the simulator says what is around the car.
    """

    trained: tuple[str, ...]
    besides: tuple[str, ...]
    rate: float
    texts: tuple[Text, ...]
    start: str | None
    steps: int
    perception: PerceptionConfig | None = None

    @property
    def frozen(self) -> tuple[str, ...]:
        """Patterns of the weights that are not trained."""
        moved = {*self.trained, *self.besides} | ({"perception"} if self.perception is None else set())
        return tuple(pattern for part, pattern in PARTS.items() if part not in moved)


CAPTION = Text(None, "caption")
AGENT = Text("agent_question", "agent_caption")
QUESTION = Text("question", "answer", weight=2.0)
FORECAST = Text("forecast_question", "forecast")
TAUGHT = ("projectors", "language model")

STAGES = {
    "stage1_alignment": Stage(("projectors",), ("language model", "2D backbone"), 1.0, (CAPTION, AGENT), None, 1_000),
    "stage2_questions": Stage(TAUGHT, ("2D backbone",), 0.5, (QUESTION, CAPTION), "stage1_alignment", 1_000),
    "stage2b_forecasting": Stage(TAUGHT, ("2D backbone",), 0.5, (FORECAST,), "stage2_questions", 1_000),
    "stage3_planning": Stage(TAUGHT, (), 0.5, (), "stage2b_forecasting", 1_500),
}
ALL_AT_ONCE = Stage((*TAUGHT, "2D backbone"), (), 1.0, (), None, sum(stage.steps for stage in STAGES.values()))

SEES = PerceptionConfig(decoder=SceneDecoderConfig.tiny())
PRETRAINED = ("perception", "2D backbone")


def perceived(stage: Stage) -> Stage:
    """Returns a stage with the perception; in that which plans, it is among what is trained as published."""
    plans, also = not stage.texts, ("perception",)
    return dataclasses.replace(
        stage,
        trained=stage.trained + also * plans,
        besides=stage.besides + also * (not plans),
        start="perception" if stage.start is None else f"perceived_{stage.start}",
        perception=dataclasses.replace(SEES, detached=not plans),
    )


PERCEIVED = {
    "perception": Stage(PRETRAINED, (), 1.0, (), None, 1_000, dataclasses.replace(SEES, alone=True)),
    **{f"perceived_{name}": perceived(stage) for name, stage in STAGES.items()},
}

base = load_run(Path(__file__).with_name("text.py"))
(plain,) = base.data.entries
plans = dataclasses.replace(plain, robot=dataclasses.replace(plain.robot, entities=ENTITIES))


def entry(text: Text) -> MixtureEntry:
    """Returns the steps that have a question, each with its answer and no plan."""
    robot = dataclasses.replace(plans.robot, language_key=text.question, default_prompt=CAPTION_PROMPT)
    return dataclasses.replace(
        plans,
        robot=robot,
        text_key=text.answer,
        actions=False,
        weight=text.weight,
        label=text.answer,
        selection=Selection(labelled=text.question is not None),
    )


def run(name: str, stage: Stage) -> TrainConfig:
    """Returns the run of a stage. Its policy has room for the longest of its texts; weights do not depend on that."""
    start = None if stage.start is None else WarmStart(f"runs/driving/{stage.start}")
    rate = base.optimizer.peak_lr * stage.rate
    return dataclasses.replace(
        base,
        run_dir=f"runs/driving/{name}",
        model=dataclasses.replace(
            base.model,
            entities=tuple(EntityTokens(e.name, e.count, e.size) for e in ENTITIES),
            perception=stage.perception,
            prompt_len=32 if stage.texts else base.model.prompt_len,  # questions have no state in them
            thought_len=112 if stage.texts else 0,
        ),
        data=dataclasses.replace(base.data, entries=tuple(map(entry, stage.texts)) or (plans,)),
        warm_start=start,
        trainable=Trainable(frozen=stage.frozen),
        steps=stage.steps,
        optimizer=dataclasses.replace(base.optimizer, peak_lr=rate, end_lr=rate / 100, decay_steps=stage.steps),
        validate_every=stage.steps // 2,
        save_every=stage.steps // 2,
    )


configs = {name: run(name, stage) for name, stage in {**STAGES, "single_stage": ALL_AT_ONCE, **PERCEIVED}.items()}
