"""VLA-Adapter's head on a frozen model: that of M2-VLA with one softmax for all it looks at, and without a memory."""

import dataclasses
from typing import ClassVar

from openpi_like.models.layer_mixture import JointBlock, LayerBlock
from openpi_like.models.m2vla import M2VlaConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class VlaAdapterConfig(M2VlaConfig):
    """See `M2VlaConfig`. It has no memory; with `skills`, the two are compared with one each."""

    block: ClassVar[type[LayerBlock]] = JointBlock
