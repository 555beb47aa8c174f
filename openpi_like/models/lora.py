"""LoRA as an overlay on any linear map, chosen by name (Hu et al. 2021): y = W x + scale * B (A x).

`add_lora` gives a model these weights beside those that it has, so that it is the base at first: B starts at zero. What
is trained follows from it, see `openpi_like.train.state.trained_names`. `Overlay.merge` makes one weight of W, A and B.

Letters of a kernel: those it sums over are its inputs, the others its outputs; r is the rank. Layers and stacks (q/k/v,
gate/up) are maps of their own.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, Shaped

from openpi_like.config import near_names
from openpi_like.draws import named_key
from openpi_like.models.param import MapDims, map_weight, use, weight_name
from openpi_like.partition import Axes

SUFFIX = "_lora"


@dataclasses.dataclass(frozen=True)
class LoraRule:
    """An overlay on all linear maps whose name matches.

    pattern: a regular expression, searched in names such as "vlm/layers/gate_up".
    rank, alpha: the scale is alpha / rank, or alpha / sqrt(rank) with `rank_stabilized` (Kalajdzievski 2023).
    per_head: where heads are outputs, each has an A and a B of its own, of this rank, as openpi has it; otherwise all
        share A.
    """

    pattern: str
    rank: int = 16
    alpha: float = 16.0
    rank_stabilized: bool = False
    per_head: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.rank < 1:
            problems.append(f"rank={self.rank}, expected at least 1")
        if not 0 < self.alpha < math.inf:
            problems.append(f"alpha={self.alpha}, expected a number above 0")
        try:
            re.compile(self.pattern)
        except re.error as e:
            problems.append(f"pattern={self.pattern!r} is no regular expression: {e}")
        if problems:
            raise ValueError("LoraRule: " + "; ".join(problems))

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which maps get an overlay, and which weights of the base are trained in full beside it.

    rules: the first that matches a map is taken. also_train: regular expressions of names; by default the projections
    of states, actions and times, which belong to the robot; those of entities, where a policy has such, are
    `^entities/`.
    """

    rules: tuple[LoraRule, ...] = (LoraRule(r"^(vlm|expert)/layers/(\w+/)?(q|kv|out|gate_up|down)$"),)
    also_train: tuple[str, ...] = (r"^(action|state|time)_",)

    def __post_init__(self) -> None:
        if not self.rules:
            raise ValueError("Lora: no rules, expected at least one LoraRule")

    @classmethod
    def openpi(cls) -> "Lora":
        """Returns openpi's choice for pi0: ranks 16 (language model) and 32 (expert); the vision tower is trained."""
        maps = "/layers/(q|kv|out|gate_up|down)$"
        return cls(
            rules=(
                LoraRule(f"^vlm{maps}", rank=16, alpha=16.0, per_head=True),
                LoraRule(f"^expert{maps}", rank=32, alpha=32.0, per_head=True),
            ),
            also_train=(r"^(action|state|time)_", "^vision/"),
        )


class LoraPair(nnx.Module):
    """A: (stacks, heads, inputs, r). B: (stacks, heads, r, outputs). Heads only with `LoraRule.per_head`."""

    def __init__(self, key: Key[Array, ""], base: nnx.Param, rule: LoraRule) -> None:
        metadata = base.get_metadata()
        axes, shape, inputs = metadata["axes"], base.shape, metadata["inputs"]
        self.scale, self.per_head = rule.scale, rule.per_head
        dims = MapDims.of(axes, inputs, per_head=rule.per_head)
        lead = (*dims.stacks, *dims.heads)

        def take(of: tuple[Any, ...], *indices: int) -> tuple[Any, ...]:
            return tuple(of[i] for i in indices)

        a = (*lead, *dims.inputs)
        self.a = map_weight(
            key,
            "a",
            (*take(shape, *a), rule.rank),
            (*take(axes, *a), "rank"),
            inputs=tuple(range(len(lead), len(a))),
            per_head=rule.per_head,
        )
        self.b = map_weight(
            key,
            "b",
            (*take(shape, *lead), rule.rank, *take(shape, *dims.outputs)),
            (*take(axes, *lead), "rank", *take(axes, *dims.outputs)),
            inputs=(len(lead),),
            per_head=rule.per_head,
            zero=True,
        )

    def __call__(self, equation: str, x: Float[Array, "..."], *, part: int | None = None) -> Float[Array, "..."]:
        """Returns what is added to einsum(equation, x, kernel) of one layer; part: of a stack, see `linear_parts`."""
        a, b = (use(w, x.dtype) for w in (self.a, self.b))
        if part is not None:
            a, b = a[part], b[part]
        first, second = lora_equations(equation, a.ndim, b.ndim)
        return self.scale * jnp.einsum(second, jnp.einsum(first, x, a), b)


def lora_equations(equation: str, a_ndim: int, b_ndim: int) -> tuple[str, str]:
    """Returns the einsums of A and of B for that of their kernel, "BSD,NDH->BNSH" for example.

    a_ndim, b_ndim: of one layer's A and B, from which it is seen whether heads (then the first outputs of the kernel)
    have maps of their own.
    """
    terms, out = equation.split("->")
    x, kernel = terms.split(",")
    inputs = [c for c in kernel if c not in out]
    outputs = [c for c in kernel if c in out]
    own = a_ndim - 1 - len(inputs)
    heads, outputs = outputs[:own], outputs[own:]
    assert b_ndim == len(heads) + 1 + len(outputs), (equation, a_ndim, b_ndim)
    middle = [*(c for c in x if c not in inputs), *heads, "r"]
    join = "".join
    a, b = [*heads, *inputs, "r"], [*heads, "r", *outputs]
    return f"{x},{join(a)}->{join(middle)}", f"{join(middle)},{join(b)}->{out}"


def linear_maps(model: nnx.Module) -> Iterator[tuple[str, nnx.Module, str, nnx.Param]]:
    """Yields (name, module, attribute, weight) of every linear map that can have an overlay, by name."""
    found = []
    for path, module in nnx.iter_modules(model):
        for attribute, value in vars(module).items():
            if isinstance(value, nnx.Param) and "inputs" in value.get_metadata():
                found.append((weight_name((*path, attribute)), module, attribute, value))
    yield from sorted(found, key=lambda row: row[0])


def add_lora(model: nnx.Module, config: Lora, key: Key[Array, ""]) -> nnx.Module:
    """Gives a model its overlays, in place, and returns it. A's draw depends on `key` and the map's name only.

    Raises:
        ValueError: a rule is for no map, as its pattern matches none, or only such as earlier rules take; lists all.
    """
    maps = list(linear_maps(model))
    names = [name for name, *_ in maps]
    chosen = {name: next((r for r in config.rules if re.search(r.pattern, name)), None) for name in names}
    problems = []
    for rule in config.rules:
        matched = [name for name in names if re.search(rule.pattern, name)]
        if not matched:
            problems.append(f"{rule.pattern!r} matches no linear map; {near_names(rule.pattern, names)}")
        elif rule not in chosen.values():
            problems.append(
                f"{rule.pattern!r}: earlier rules take all that it matches ({matched[0]} ...); put it first"
            )
    if problems:
        raise ValueError("LoRA patterns:\n  " + "\n  ".join(problems))
    for name, module, attribute, weight in maps:
        rule_of = chosen[name]
        if rule_of is not None:
            setattr(module, f"{attribute}{SUFFIX}", LoraPair(named_key(key, name), weight, rule_of))
    return model


def is_lora(name: str) -> bool:
    """Says whether a weight belongs to an overlay, by its name."""
    return f"{SUFFIX}/" in name


def base_name(name: str) -> str:
    """Returns the name of the map that a weight of an overlay lies on; of others, their own."""
    return name.split(f"{SUFFIX}/")[0]


@dataclasses.dataclass(frozen=True)
class Overlay:
    """How the overlay of one map is added to it. shape, axes, inputs: of the kernel, see `openpi_like.models.param`."""

    shape: tuple[int, ...]
    axes: Axes
    inputs: tuple[int, ...]
    scale: float
    per_head: bool

    def delta(self, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns scale * A B with the dimensions of the kernel, in float32."""
        dims = MapDims.of(self.axes, self.inputs, per_head=self.per_head)
        letters = "abcdefgh"[: len(self.axes)]
        name = lambda indices: "".join(letters[i] for i in indices)  # noqa: E731
        lead = name((*dims.stacks, *dims.heads))
        equation = f"{lead}{name(dims.inputs)}r,{lead}r{name(dims.outputs)}->{letters}"
        return self.scale * jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")

    def merge(self, base: Shaped[Array, "..."], a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the kernel that computes the same without an overlay, in float32: bfloat16 would lose most of it."""
        return base.astype(jnp.float32) + self.delta(a, b)


def overlays(model: nnx.Module) -> dict[str, Overlay]:
    """Returns the overlays of a model by the names of their kernels; their weights are <name>_lora/a and /b."""
    found = {}
    for name, module, attribute, base in linear_maps(model):
        pair: LoraPair | None = getattr(module, f"{attribute}{SUFFIX}", None)
        if pair is not None:
            metadata = base.get_metadata()
            axes, inputs = metadata["axes"], tuple(metadata["inputs"])
            found[name] = Overlay(tuple(base.shape), axes, inputs, pair.scale, pair.per_head)
    return found
