"""The names of M2-VLA's head, memory, queries and map of the state, as its code writes them.

They are files of their own there; as safetensors beside those of the backbone, their names begin with "action_head."
and "proprio_projector.". VLA-Adapter's head has the same names, without gates and memory.
"""

import dataclasses

import numpy as np

from openpi_like.models.formats import Row, Table, torch_linear
from openpi_like.models.skill_memory import SkillMemoryConfig

_SOURCES = {"self": "self", "asked": "adapter", "seen": "task"}


@dataclasses.dataclass(frozen=True)
class CountRow(Row):
    """Counts of rows, of which there are `most`; ours goes on, see `SkillMemory`."""

    most: int = 1

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        return np.asarray(np.minimum(ours, self.most), np.int64)


def released_table(layers: int, width: int, heads: int, skills: SkillMemoryConfig | None, *, gated: bool) -> Table:
    """Returns the rows of what M2-VLA adds to a backbone of so many layers.

    width, heads: of the head's blocks. gated: its blocks have gates for heads.
    """

    def norm(mine: str, theirs: str, at: tuple[int, ...] = ()) -> list[Row]:
        return [Row(f"{mine}/scale", f"{theirs}.weight", at=at), Row(f"{mine}/bias", f"{theirs}.bias", at=at)]

    head = "action_head.model"
    rows = [Row("queries", "action_queries.weight"), *norm("norm_in", f"{head}.layer_norm1")]
    rows += [*norm("head/norm_out", f"{head}.layer_norm2"), *torch_linear("map_in", f"{head}.fc1", "E D -> D E", "")]
    rows += torch_linear("head/map_out", f"{head}.fc2", "E D -> D E", "")
    for mine, theirs in (("state_in", "fc1"), ("state_out", "fc2")):
        rows += torch_linear(mine, f"proprio_projector.{theirs}", "E D -> D E", "")
    for i in range(layers):
        rows += _block_rows(f"{head}.mlp_resnet_blocks.{i}", i, width, heads if gated else 0)
    unused = {
        r"\.(k|v)_memory\.(weight|bias)$": "keys and values that nobody computes with",
        r"\.film_gen\.": "a FiLM that nobody computes with",
        r"\.rope\.inv_freq$": "rotations, which are no weights",
    }
    if skills is not None:
        rows += torch_linear("skill_in", "action_head.memory_value_proj", "(A D) E -> E A D", "(A D) -> A D")
        bank = "action_head.memory_bank"
        rows += [Row("skills/keys", f"{bank}.keys"), Row("skills/values", f"{bank}.values")]
        rows.append(CountRow("skills/count", f"{bank}.size", counts=True, most=skills.size))
    return Table(tuple(rows), unused=unused)


def _block_rows(theirs: str, i: int, width: int, gates: int) -> list[Row]:
    """gates: outputs behind the keys of what was asked, one for each head."""
    ours, order, heads = "head/blocks", "(N H) D -> N D H", "(N H) -> N H"
    rows = [
        Row(f"{ours}/q", f"{theirs}.q_proj.weight", order, at=(i,)),
        Row(f"{ours}/q_bias", f"{theirs}.q_proj.bias", heads, at=(i,)),
        Row(f"{ours}/out", f"{theirs}.o_proj.weight", "D (N H) -> N H D", at=(i,)),
        Row(f"{ours}/out_bias", f"{theirs}.o_proj.bias", at=(i,)),
        Row(f"{ours}/gate", f"{theirs}.gating_factor", at=(i,), take=(0,)),
        Row(f"{ours}/norm/scale", f"{theirs}.ffn.0.weight", at=(i,)),
        Row(f"{ours}/norm/bias", f"{theirs}.ffn.0.bias", at=(i,)),
        *torch_linear(f"{ours}/map", f"{theirs}.ffn.1", "E D -> D E", "", at=(i,)),
    ]
    for mine, name in _SOURCES.items():
        for j, part in enumerate("kv"):
            take = (slice(0, width),) if (mine, part) == ("asked", "k") and gates else ()
            rows.append(Row(f"{ours}/kv_{mine}", f"{theirs}.{part}_{name}.weight", order, at=(i, j), take=take))
            rows.append(Row(f"{ours}/kv_{mine}_bias", f"{theirs}.{part}_{name}.bias", heads, at=(i, j), take=take))
    if gates:
        take = (slice(width, width + gates),)
        rows.append(Row(f"{ours}/head_gate", f"{theirs}.k_adapter.weight", at=(i,), take=take))
        rows.append(Row(f"{ours}/head_gate_bias", f"{theirs}.k_adapter.bias", at=(i,), take=take))
    return rows
