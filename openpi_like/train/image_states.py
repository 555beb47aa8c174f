"""What a run's frozen backbone makes of images: which weights do it, and whether those that were kept are of these."""

from typing import Any

from flax import nnx

from openpi_like.data.config import DataConfig
from openpi_like.data.image_states import ImageStates
from openpi_like.models.weights import abstract_model, flatten, named_weights, unflatten
from openpi_like.train.checkpoints.base import digest
from openpi_like.train.checkpoints.contract import CheckpointError
from openpi_like.train.state import Trainer, TrainState


def backbone_weights(trainer: Trainer, state: TrainState) -> dict[str, int]:
    """Returns the sum of the bits of each weight of the backbone.

    Raises:
        CheckpointError: some are trained, so that what they make of images changes; or the policy reads images.
    """
    config = trainer.model.config
    try:
        config.with_image_states(config.batch_shapes(1))
    except ValueError as e:
        raise CheckpointError(str(e)) from e
    model: Any = abstract_model(config, trainer.model.trainable.lora)
    names = set(flatten(named_weights(nnx.state(model.backbone, nnx.Param))))
    trained = sorted(names.intersection(flatten(state.params)))
    if trained:
        raise CheckpointError(
            f"image_states of a backbone of which {len(trained)} weights are trained, such as {trained[0]!r}; freeze "
            "it, Trainable(frozen=...), or train with images"
        )
    return digest(unflatten({name: x for name, x in flatten(state.frozen).items() if name in names}))


def check_image_states(data: DataConfig, trainer: Trainer, state: TrainState) -> None:
    """Compares the weights of a run's backbone with those that what was kept of images was made with.

    Raises:
        CheckpointError: as `backbone_weights`; or they are others. DatasetError: as `ImageStates`.
    """
    if not data.has_image_states:
        return
    weights = backbone_weights(trainer, state)
    for entry in data.entries:
        assert entry.image_states is not None  # DataConfig has checked it
        made = ImageStates(entry.image_states).of.weights
        other = sorted(name for name in weights.keys() | made.keys() if weights.get(name) != made.get(name))
        if other:
            raise CheckpointError(
                f"image_states {entry.image_states} are of other weights ({len(other)} differ, such as {other[0]!r}); "
                "make them again with train/image_states.py, from the checkpoint that this run starts from"
            )
