"""Which variant of attention is fastest, measured on this device at the sizes of this run."""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from openpi_like.models.attention import VARIANTS, Sizes, attention, computed_by

AUTO = "auto"
REPEATS, TOLERANCE = 20, 0.03  # of the largest output: bfloat16 results differ by their rounding


@dataclasses.dataclass(frozen=True)
class Choice:
    """The variant for some sizes, and the milliseconds of all that were tried; NaN where one gave other numbers.

    failed: what went wrong with those that could not be measured.
    """

    sizes: Sizes
    name: str
    ms: dict[str, float]
    failed: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name} {ms:.2f} ms" for name, ms in self.ms.items()]
        lines += [f"{name} failed: {why}" for name, why in self.failed.items()]
        tried = ", ".join(lines) or "not measured"
        s = self.sizes
        return f"attention of {s.T} queries to {s.S} keys (B {s.B}, N {s.N}, K {s.K}, H {s.H}): {self.name} ({tried})"


def on_one_device(sizes: Sizes, mesh: Mesh) -> Sizes:
    """Returns the part of one device; the batch is split over data and fsdp, heads over tensor where that divides."""
    rows, tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    N = sizes.N // tensor if sizes.N % tensor == 0 else sizes.N
    K = N if sizes.K == sizes.N else sizes.K
    return dataclasses.replace(sizes, B=max(sizes.B // rows, 1), N=N, K=K)


def fastest_attention(every: Iterable[Sizes], mesh: Mesh, *, gradient: bool = True) -> list[Choice]:
    """Returns the fastest variant for each of these sizes, as seen by all devices together.

    gradient: measure forward and backward passes, as in training. Where only one variant can run, nothing is measured.
    """
    device = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    platform = _platform(device)
    return [_choose(sizes, on_one_device(sizes, mesh), device, platform, gradient) for sizes in sorted(every, key=str)]


def encode_choices(choices: Iterable[Choice]) -> str:
    """Returns choices as a text for other processes."""
    return json.dumps([[dataclasses.asdict(choice.sizes), choice.name] for choice in choices])


def decode_choices(text: str) -> dict[Sizes, str]:
    """Returns what `Trainer.attention` takes, of a text of `encode_choices`."""
    return {Sizes(**sizes): name for sizes, name in json.loads(text)}


def attention_of_run(path: Path, every: Collection[Sizes], mesh: Mesh) -> list[Choice]:
    """Returns the variants that a run computes attention by: those it has had before, else the fastest ones.

    path: where they are kept. Another variant would round otherwise, so a run that goes on would not compute the same.
    They are measured anew where the sizes or the kind of device are others.
    """
    kind = mesh.devices.flat[0].device_kind
    if path.is_file():
        stored = json.loads(path.read_text())
        before = decode_choices(stored["choices"])
        if stored["kind"] == kind and set(every) <= set(before):
            return [Choice(sizes, before[sizes], {}) for sizes in sorted(every, key=str)]
    choices = fastest_attention(every, mesh)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"kind": kind, "choices": encode_choices(choices)}))
    os.replace(temporary, path)
    return choices


def check_attention(name: str, every: Collection[Sizes], mesh: Mesh) -> None:
    """Checks that a variant can compute attention of these sizes on the devices of a mesh.

    Raises:
        ValueError: it cannot; lists the sizes, and what can.
    """
    platform = _platform(mesh.devices.flat[0])
    local = {str(sizes): on_one_device(sizes, mesh) for sizes in every}
    lost = [sizes for sizes, part in local.items() if not VARIANTS[name].takes(part, platform)]
    if lost:
        able = [n for n, v in VARIANTS.items() if all(v.takes(part, platform) for part in local.values())]
        raise ValueError(f"attention={name!r} cannot compute {', '.join(lost)} on {platform}; {', '.join(able)} can")


def _platform(device: jax.Device) -> str:
    return "gpu" if device.platform in ("cuda", "rocm") else device.platform


def _choose(sizes: Sizes, local: Sizes, device: jax.Device, platform: str, gradient: bool) -> Choice:
    if platform == "cpu":  # where einsum is known to be faster
        return Choice(sizes, "einsum", {})
    able = [name for name, variant in VARIANTS.items() if variant.takes(local, platform)]
    inputs = jax.device_put(_inputs(local), device)
    ms: dict[str, float] = {}
    failed: dict[str, str] = {}
    expected = None
    for name in able:
        function = _function(name, gradient, local.soft_cap)
        try:
            got, ms[name] = _measure(function, inputs)
        except Exception as e:  # sizes or hardware that a kernel does not take; each has errors of its own
            failed[name] = str(e).strip().split("\n")[0][:200]
            continue
        expected = got if expected is None else expected
        if not _close(got, expected):
            ms[name] = float("nan")
    sound = {name: value for name, value in ms.items() if np.isfinite(value)}
    if not sound:  # as where memory is short: the run is to say so itself
        return Choice(sizes, able[0], ms, failed)
    return Choice(sizes, min(sound, key=lambda name: sound[name]), ms, failed)


def _inputs(s: Sizes) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), s.dtype)  # noqa: E731
    mask = jnp.asarray(np.arange(s.S)[None, None] < rng.integers(1, s.S + 1, (s.B, 1, 1))) & jnp.ones((1, s.T, 1), bool)
    return draw(s.B, s.N, s.T, s.H), draw(s.B, s.S, s.K, s.H), draw(s.B, s.S, s.K, s.H), mask if s.masked else None


def _function(name: str, gradient: bool, soft_cap: float | None) -> Callable[..., Any]:
    def forward(q: Any, k: Any, v: Any, mask: Any) -> Any:
        with computed_by(name):
            return attention(q, k, v, mask, soft_cap=soft_cap)

    def both(q: Any, k: Any, v: Any, mask: Any) -> Any:
        total = lambda q, k, v: jnp.square(forward(q, k, v, mask).astype(jnp.float32)).sum()  # noqa: E731
        return jax.grad(total, argnums=(0, 1, 2))(q, k, v)

    return jax.jit(both if gradient else forward)


def _measure(function: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[Any, float]:
    out = jax.block_until_ready(function(*inputs))
    times = []
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(REPEATS):
            out = function(*inputs)  # the one before is let go
        jax.block_until_ready(out)
        times.append((time.perf_counter() - started) / REPEATS)
    return jax.device_get(out), 1e3 * min(times)


def _close(got: Any, expected: Any) -> bool:
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    floats = [(np.asarray(a, np.float32), np.asarray(b, np.float32)) for a, b in pairs]
    return all(np.abs(a - b).max() <= TOLERANCE * np.abs(b).max() for a, b in floats)
