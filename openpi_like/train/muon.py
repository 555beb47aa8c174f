"""Muon (Jordan 2024): updates of linear maps are made orthogonal, all of their directions the same size.

Sizes as in Liu et al. 2025 (arXiv:2502.16982, section 2.2): the root mean square of an update is about that of AdamW's,
so a rate that AdamW has learned well with is one to begin with; maps take higher ones.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import optax
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from openpi_like.models.arrays import leaf_name
from openpi_like.models.param import MapDims
from openpi_like.partition import by_element
from openpi_like.train.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class MuonConfig(OptimizerConfig):
    """Muon for linear maps; AdamW, as its fields say, for all else: maps to and from actions, states and tokens too.

    A map's weight is one matrix from all of its inputs to all of its outputs, those of all heads; layers, keys and
    values, gates and what they gate are matrices of their own. Muon holds one moment, 4 bytes a weight.

    beta: how much of its moment stays at a step; Nesterov's form. update_rms: root mean square of an update at rate 1.
    """

    beta: float = 0.95
    update_rms: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.beta < 1 and self.update_rms > 0):
            raise ValueError(
                f"MuonConfig: got beta={self.beta}, update_rms={self.update_rms}; "
                "expected 0 <= beta < 1, update_rms > 0"
            )

    def scale(self, maps: Mapping[str, MapDims]) -> optax.GradientTransformation:
        """Returns what makes an update of rate 1 of gradients. maps: by name, as in `create`.

        Raises:
            ValueError: there are no maps.
        """
        if not maps:
            raise ValueError(
                "MuonConfig: none of the model's inner linear maps is trained, or none was given; "
                "use OptimizerConfig (AdamW)"
            )

        def update(updates: Any, _: Any) -> Any:
            of = lambda path, update: self._orthogonal(update, maps[leaf_name(path)])  # noqa: E731
            return jax.tree_util.tree_map_with_path(of, updates)

        muon = optax.chain(optax.trace(self.beta, nesterov=True), optax.stateless(update))
        label = lambda path, _: "maps" if leaf_name(path) in maps else "rest"  # noqa: E731
        return optax.partition(
            {"maps": muon, "rest": super().scale(maps)},
            lambda params: jax.tree_util.tree_map_with_path(label, params),
        )

    def _orthogonal(self, update: Float[Array, "..."], of: MapDims) -> Float[Array, "..."]:
        """Returns orthogonal matrices near to a map's gradient, shaped like it, of the size that is asked for."""
        element = [i for i in range(update.ndim) if i not in of.stacks]
        # Dimensions of some elements of the stack: their number is the first.
        dims = MuonDimensionNumbers(*(tuple(element.index(i) + 1 for i in side) for side in (of.inputs, of.outputs)))
        # optax's iteration alone: without a momentum of its own its state is not used.
        iteration = scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=dims)

        def orthogonal(elements: jax.Array) -> jax.Array:
            """One after the other: each takes several times its memory, and on CPUs it is faster than all at once."""
            return jax.lax.map(lambda x: iteration.update(x[None], iteration.init(x[None]))[0][0], elements)

        m, n = (math.prod(update.shape[i] for i in side) for side in (of.inputs, of.outputs))
        # The root mean square of an orthogonal (m, n) is 1 / sqrt(max(m, n)).
        return self.update_rms * math.sqrt(max(m, n)) * by_element(orthogonal, update, of.axes)
