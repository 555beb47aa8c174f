"""Muon (Jordan 2024): updates of linear maps are made orthogonal, all of their directions the same size.

Sizes as in Liu et al. 2025 (arXiv:2502.16982, section 2.2): the root mean square of an update is about that of AdamW's,
so that rates and decay of weights carry over.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from openpi_like.models.param import MapDims
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

    def scale(self, maps: Mapping[str, MapDims]) -> optax.GradientTransformation:
        """Returns what makes an update of rate 1 of gradients.

        Raises:
            ValueError: there are no maps.
        """
        if not maps:
            raise ValueError(
                "MuonConfig: no linear map is trained, but for those to and from actions; use OptimizerConfig (AdamW)"
            )

        def dims(updates: Any) -> Any:
            of = lambda path, _: MuonDimensionNumbers(maps[_name(path)].inputs, maps[_name(path)].outputs)  # noqa: E731
            return jax.tree_util.tree_map_with_path(of, updates)

        def resized(path: Any, update: jax.Array) -> jax.Array:
            """An orthogonal (m, n) has a root mean square of 1 / sqrt(max(m, n))."""
            of = maps[_name(path)]
            sides = (math.prod(update.shape[i] for i in side) for side in (of.inputs, of.outputs))
            return self.update_rms * math.sqrt(max(sides)) * update

        muon = optax.chain(
            scale_by_muon(beta=self.beta, weight_dimension_numbers=dims),
            optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(resized, updates)),
        )
        label = lambda path, _: "maps" if _name(path) in maps else "rest"  # noqa: E731
        return optax.partition(
            {"maps": muon, "rest": super().scale(maps)},
            lambda params: jax.tree_util.tree_map_with_path(label, params),
        )


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(key.key for key in path)
