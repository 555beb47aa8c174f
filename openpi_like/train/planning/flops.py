"""FLOPs of one training step, counted on the jaxpr of the loss: what model FLOPs utilisation (MFU) is measured by.

Products of matrices count, two FLOPs for a multiplication and an addition; all else is left out. Going forward a
product is computed once; going backward once more for each of its two factors that a gradient passes through. So what
is only recomputed never counts, whatever is checkpointed or written as a custom gradient, and of frozen weights only
what trained ones need does. Attention counts as a whole, masked or not. Nothing is compiled or computed.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from openpi_like.models.perceiving import training_loss
from openpi_like.models.weights import flatten, unflatten


def model_flops(model: Any, sample: Any = None) -> float:
    """Returns the FLOPs of training a policy on one sample, forward and backward.

    model: a `ModelDef`: it says what is trained. sample: the shapes of a batch of one; None: as its config says.
    """

    def loss(params: Any, batch: Any) -> Any:
        return training_loss(model.bind(params), jax.random.key(0), batch)

    trained = unflatten({name: name in model.trained for name in flatten(model.shapes)})
    of = model.config.batch_shapes(1) if sample is None else sample
    return training_flops(loss, model.shapes, of, trained=trained)


def training_flops(loss: Callable[..., Any], params: Any, *args: Any, trained: Any = True) -> float:
    """Returns the FLOPs of `loss(params, *args)` and of its gradient.

    loss: returns a scalar, or a scalar and more. params, args: arrays or their shapes.
    trained: which of the params have a gradient: a bool, or a tree of them, which may be a prefix of that of params.
    """
    jaxpr = jax.make_jaxpr(loss)(params, *args).jaxpr
    flags = jax.tree.leaves(jax.tree.map(lambda t, below: jax.tree.map(lambda _: t, below), trained, params))
    graph = _Graph()
    inputs = [graph.node() for _ in jaxpr.invars]
    outputs = graph.add(jaxpr, inputs)
    moving = _reached([n for n, t in zip(inputs, flags, strict=False) if t], graph.following)
    wanted = _reached(outputs[:1], graph.leading)
    backward = lambda out, factors: sum(f in moving for f in factors) if out in wanted else 0  # noqa: E731
    return sum((flops * (1 + backward(out, factors)) for out, factors, flops in graph.products), 0.0)


def _reached(start: Sequence[int], edges: dict[int, list[int]]) -> set[int]:
    seen, left = set(start), list(start)
    while left:
        for node in edges.get(left.pop(), ()):
            if node not in seen:
                seen.add(node)
                left.append(node)
    return seen


_Product = tuple[int, list[int], float]  # the result, its factors, FLOPs


class _Graph:
    """Which value a derivative passes from to which, in a program with its calls and loops written out."""

    def __init__(self) -> None:
        self.following: dict[int, list[int]] = defaultdict(list)
        self.leading: dict[int, list[int]] = defaultdict(list)
        self.products: list[_Product] = []
        self._count = 0

    def node(self) -> int:
        self._count += 1
        return self._count

    def edge(self, source: int, target: int) -> None:
        self.following[source].append(target)
        self.leading[target].append(source)

    def add(self, jaxpr: Any, inputs: Sequence[int]) -> list[int]:
        """Adds a program; returns the nodes of its outputs."""
        at: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(variables: Sequence[Any]) -> list[int]:
            # Literals, and constants of the program, are values that nothing leads to.
            return [self.node() if isinstance(v, core.Literal) else at.setdefault(v, self.node()) for v in variables]

        for eqn in jaxpr.eqns:
            at.update(zip(eqn.outvars, self._equation(eqn, read(eqn.invars)), strict=True))
        return read(jaxpr.outvars)

    def _equation(self, eqn: Any, inputs: list[int]) -> list[int]:
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            return self._scan(eqn, inputs)
        if name == "cond":
            return self._branches([_open(b) for b in params["branches"]], inputs[1:])
        inner = [_open(v) for v in params.values() if isinstance(v, core.Jaxpr | core.ClosedJaxpr)]
        if len(inner) == 1 and len(inner[0].invars) == len(inputs) and name != "pallas_call":
            return self.add(inner[0], inputs)  # calls, under whatever name
        outputs = [self.node() for _ in eqn.outvars]
        if name == "stop_gradient":
            return outputs
        for v, out in zip(eqn.outvars, outputs, strict=True):
            if jnp.issubdtype(v.aval.dtype, jnp.inexact):
                for source in inputs:
                    self.edge(source, out)
        if name in _PRODUCTS:
            self.products.append((outputs[0], inputs[:2], _PRODUCTS[name](eqn)))
        elif name == "pallas_call":
            # As in attention, all factors of its products are taken to have a gradient if any has.
            self.products.append((outputs[0], outputs[:1] * 2, self._kernel(params)))
        elif name == "while":  # no gradient passes it, and how often it runs is not known: once
            skip = params["cond_nconsts"]
            self.add(_open(params["body_jaxpr"]), inputs[skip:])
        return outputs

    def _scan(self, eqn: Any, inputs: list[int]) -> list[int]:
        body, (consts, carried) = _open(eqn.params["jaxpr"]), _scanned(eqn.params)
        fixed, carry, each = inputs[:consts], inputs[consts : consts + carried], inputs[consts + carried :]
        stacked = [self.node() for _ in eqn.outvars[carried:]]
        # Written out, so that what only the carry of the last round would need has no gradient.
        for _ in range(eqn.params["length"]):
            outputs = self.add(body, [*fixed, *carry, *each])
            carry = outputs[:carried]
            for element, stack in zip(outputs[carried:], stacked, strict=True):
                self.edge(element, stack)
        return [*carry, *stacked]

    def _branches(self, branches: Sequence[Any], inputs: list[int]) -> list[int]:
        """Adds alternatives, of which the one with most FLOPs counts."""
        merged = [self.node() for _ in branches[0].outvars]
        before = self.products
        most: list[_Product] = []
        for branch in branches:
            self.products = []
            for source, out in zip(self.add(branch, inputs), merged, strict=True):
                self.edge(source, out)
            most = max(most, self.products, key=_total)
        self.products = before + most
        return merged

    @staticmethod
    def _kernel(params: dict[str, Any]) -> float:
        """Returns the FLOPs of a Pallas kernel: what it says itself, or its body's at every point of its grid."""
        if params.get("cost_estimate") is not None:
            return float(params["cost_estimate"].flops)
        body = _Graph()
        body.add(_open(params["jaxpr"]), [body.node() for _ in _open(params["jaxpr"]).invars])
        return math.prod(params["grid_mapping"].grid) * _total(body.products)


def _scanned(params: dict[str, Any]) -> tuple[int, int]:
    """Returns how many inputs of a scan are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    # Since jax 0.12: inputs by kind, each iterable over its leaves; as a whole it iterates over those of all kinds.
    consts, carry, _ = (sum(1 for _ in kind) for kind in params["ft_in"].elts)
    return consts, carry


def _total(products: Sequence[_Product]) -> float:
    return sum((flops for _, _, flops in products), 0.0)


def _open(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)


def _convolution(eqn: Any) -> float:
    kernel = eqn.invars[1].aval.shape
    features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / features


_PRODUCTS: dict[str, Callable[[Any], float]] = {"dot_general": _dot, "conv_general_dilated": _convolution}
