"""Where a step's time goes: a trace of this machine against another reader, and those of a TPU and a GPU by hand."""

import dataclasses
import os
import runpy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

from openpi_like.train.watching.profiling import DATA_WAIT, STEP, Profiler
from openpi_like.train.watching.step_time import (
    ATTENTION,
    COLLECTIVE,
    COPY,
    ELEMENTWISE,
    MATMUL,
    OTHER,
    SEVERAL,
    TRANSFER,
    Part,
    StepTime,
    find_traces,
    kind_of,
    parse_path,
    step_time,
    table,
)
from openpi_like.train.watching.xplane import Instruction, TraceError, read_planes

REPOSITORY = Path(__file__).resolve().parents[3]


# ---- A trace of this machine -----------------------------------------------------------------------------------------


def model(x: jax.Array, w: jax.Array) -> jax.Array:
    """Two parts, the second of which is a loop of layers that are computed again in the backward pass."""
    with jax.named_scope("siglip"):
        x = jnp.tanh(x @ w)

    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        with jax.named_scope("mlp"):
            x = jnp.sin(x @ w)
        with jax.named_scope("attention"):
            return jax.nn.softmax(x @ w), None

    with jax.named_scope("vlm"):
        x, _ = jax.lax.scan(jax.checkpoint(layer), x, jnp.stack([w, w + 1, w + 2]))
    return (x**2).mean()


@dataclasses.dataclass
class Traced:
    directory: Path
    seconds: float
    found: StepTime


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """Steps 3 to 5 of 6, on four devices that split the batch."""
    directory = tmp_path_factory.mktemp("run")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (jax.NamedSharding(mesh, jax.P(*of)) for of in (("data",), ()))
    step = jax.jit(jax.value_and_grad(model, argnums=1), in_shardings=(split, whole), out_shardings=whole)
    x, w = jnp.ones((64, 96)), jnp.ones((96, 96))
    profiler = Profiler((3, 5), directory / "profile", say=lambda text: None)
    seconds = 0.0
    for number in range(1, 7):
        began = time.perf_counter()
        with profiler.step(number):
            with jax.profiler.TraceAnnotation(DATA_WAIT):
                time.sleep(0.002)
            jax.block_until_ready(step(x, w))
        seconds += (time.perf_counter() - began) * (3 < number < 5)  # without starting and ending the trace
    return Traced(directory, seconds, step_time(find_traces(directory)))


def test_the_parts_add_up_to_the_whole(traced: Traced) -> None:
    found = traced.found
    assert (found.steps, found.devices) == (3, 4)
    assert sum(found.parts.values()) + found.idle == pytest.approx(found.total, rel=1e-9)
    assert sum(found.host.values()) <= found.total * (1 + 1e-9)
    assert found.host[DATA_WAIT] >= 0.002
    assert 0.002 <= found.idle_for_data <= found.idle  # nothing else is under way while the host sleeps
    assert 0.1 * traced.seconds < found.total < 10 * traced.seconds  # a step of its own


@pytest.mark.skipif(jax.__version_info__ >= (0, 12), reason="the reader of jax 0.12 ends the process on these traces")
def test_the_time_of_the_devices_is_that_of_another_reader(traced: Traced) -> None:
    """JAX's own reader of traces, and the union of the operations of each device, on a grid of nanoseconds."""
    (path,) = find_traces(traced.directory)
    spans: dict[int, list[tuple[int, int]]] = {}
    steps = []
    for plane in ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                span = (int(event.start_ns), int(event.start_ns + event.duration_ns))
                if "step_num" in stats:
                    steps.append(span)
                if "hlo_op" in stats and not str(stats["hlo_op"]).startswith("while"):
                    spans.setdefault(int(stats["device_ordinal"]), []).append(span)
    first, last = min(s for s, _ in steps), max(e for _, e in steps)
    busy = []
    for of in spans.values():
        grid = np.zeros(last - first, bool)
        for start, end in of:
            grid[max(start - first, 0) : max(end - first, 0)] = True
        busy.append(grid.sum())
    assert len(steps) == 3
    found = traced.found
    assert found.total * 3 == pytest.approx((last - first) / 1e9, rel=1e-3)
    assert (found.total - found.idle) * 3 == pytest.approx(np.mean(busy) / 1e9, rel=0.01)


def test_operations_are_known_by_the_scopes_of_the_code(traced: Traced) -> None:
    parts = traced.found.parts
    assert Part(("siglip",), "forward", MATMUL) in parts
    assert Part(("vlm", "mlp"), "forward", MATMUL) in parts
    assert Part(("vlm", "mlp"), "recomputed", MATMUL) in parts
    assert Part(("vlm", "mlp"), "backward", MATMUL) in parts
    assert {p.kind for p in parts if p.scope == ("vlm", "attention")} <= {ATTENTION, COLLECTIVE}
    assert sum(s for p, s in parts.items() if p.kind == COLLECTIVE) > 0  # gradients over the batch
    assert {p.scope[0] for p in parts if p.scope} - {SEVERAL} == {"siglip", "vlm"}
    named = sum(s for p, s in parts.items() if p.scope)
    assert named > 0.5 * (traced.found.total - traced.found.idle)


def test_the_program_prints_it(traced: Traced, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(REPOSITORY / "train" / "step_time.py"))["main"](traced.directory)
    text = capsys.readouterr().out
    assert "3 steps on 4 devices" in text
    rows = {line[:40].strip(): line[40:].split() for line in text.splitlines() if len(line) > 40}
    inner = [float(rows[name][0]) for name in ("mlp", "attention")]
    assert float(rows["vlm"][0]) >= sum(inner) - 0.002
    assert float(rows["vlm"][0]) == pytest.approx(sum(map(float, rows["vlm"][2:])), abs=0.003)
    for name in (MATMUL, COLLECTIVE, "idle", DATA_WAIT):
        assert float(rows[name][0]) > 0


# ---- Traces made by hand ---------------------------------------------------------------------------------------------


class Plane:
    """Writes one plane of a trace as text. Times are in microseconds."""

    def __init__(self, name: str) -> None:
        self._name, self._kinds, self._stats, self._lines = name, {}, {}, {}  # type: ignore[var-annotated]

    def add(self, line: str, name: str, start: float, length: float, *, shared: Any = None, **stats: Any) -> None:
        """shared: stats of all events of this name."""
        kind = self._kinds.setdefault(name, (len(self._kinds) + 1, self._said(shared or {})))[0]
        event = f"metadata_id: {kind} offset_ps: {int(start * 1e6)} duration_ps: {int(length * 1e6)}"
        self._lines.setdefault(line, []).append(f"events {{ {event} {self._said(stats)} }}")

    def _said(self, stats: dict[str, Any]) -> str:
        said = []
        for name, value in stats.items():
            key = self._stats.setdefault(name, len(self._stats) + 1)
            if isinstance(value, int):
                said.append(f"stats {{ metadata_id: {key} int64_value: {value} }}")
            else:  # as names are stored that come again and again
                said.append(
                    f"stats {{ metadata_id: {key} ref_value: {self._stats.setdefault(value, len(self._stats) + 1)} }}"
                )
        return " ".join(said)

    def text(self) -> str:
        lines = [f'lines {{ name: "{name}" timestamp_ns: 5000 {" ".join(of)} }}' for name, of in self._lines.items()]
        kinds = [
            f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" {said} }} }}'
            for name, (i, said) in self._kinds.items()
        ]
        names = [f'stat_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}' for name, i in self._stats.items()]
        return f'planes {{ name: "{self._name}" {" ".join(lines + kinds + names)} }}'


def write(directory: Path, *planes: Plane) -> Path:
    path = directory / "host.xplane.pb"
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace("\n".join(plane.text() for plane in planes)))
    return path


@pytest.fixture
def host() -> Plane:
    """Two steps of 100 us, with a wait for data at the beginning of the second."""
    plane = Plane("/host:CPU")
    for number, start in ((7, 0), (8, 100)):
        plane.add("main", STEP, start, 100, step_num=number)
    plane.add("main", DATA_WAIT, 100, 20)
    plane.add("main", "PjitFunction(step)", 130, 40)
    plane.add("main", "inside of it", 140, 10)
    plane.add("other thread", "something else", 0, 200)
    return plane


def test_a_tpu_says_what_its_core_does_on_one_line_of_nested_operations(tmp_path: Path, host: Plane) -> None:
    tpu = Plane("/device:TPU:0")
    named = lambda path, category: {"tf_op": f"jit(step)/{path}:", "hlo_category": category}  # noqa: E731
    # 10 before the window; a loop of 80 with 50 in it; 30 of idle time; a collective of 60; idle until the end.
    tpu.add("XLA Ops", "%fusion.1 = f32[] fusion()", -10, 20, shared=named("jvp(siglip)/mlp/dot", "convolution fusion"))
    tpu.add("XLA Ops", "%while.2 = () while()", 10, 80, shared=named("transpose(jvp(vlm))/while", "while"))
    tpu.add(
        "XLA Ops",
        "%fusion.3 = f32[] fusion()",
        15,
        30,
        shared=named("transpose(jvp(vlm))/while/body/mlp/mul", "loop fusion"),
    )
    tpu.add(
        "XLA Ops",
        "%custom-call.4 = f32[] custom-call()",
        50,
        20,
        shared=named("jvp(vlm)/attention/splash", "custom-call"),
    )
    tpu.add("XLA Ops", "%all-gather.5 = f32[] all-gather()", 120, 60, shared=named("jvp(vlm)/mlp/gather", "all-gather"))
    tpu.add("XLA Modules", "jit_step", -10, 190)
    tpu.add("Steps", "7", 0, 100)
    sparse = Plane("/device:TPU:0 SparseCore 1")
    sparse.add("XLA Ops", "not the core", 0, 200)
    found = step_time([write(tmp_path, tpu, sparse, host)])
    assert (found.steps, found.devices) == (2, 1)
    us = {part: 2e6 * seconds for part, seconds in found.parts.items()}
    assert us == pytest.approx(
        {
            Part(("siglip", "mlp"), "forward", MATMUL): 10,
            Part(("vlm", "mlp"), "backward", ELEMENTWISE): 30,
            Part(("vlm", "attention"), "forward", ATTENTION): 20,
            Part(("vlm", "mlp"), "forward", COLLECTIVE): 60,
        }
    )
    assert 2e6 * found.total == pytest.approx(200)
    assert 2e6 * found.idle == pytest.approx(80)
    assert 2e6 * found.idle_for_data == pytest.approx(20)  # 100 to 120
    assert {name: 2e6 * s for name, s in found.host.items()} == pytest.approx(
        {"": 140, DATA_WAIT: 20, "PjitFunction(step)": 40}
    )


def test_what_a_gpu_does_behind_its_computation_takes_no_time(tmp_path: Path, host: Plane) -> None:
    gpu, other = Plane("/device:GPU:0"), Plane("/device:GPU:1")
    gpu.add(
        "Stream #1(Compute)",
        "gemm_fusion_dot_7",
        0,
        100,
        hlo_op="gemm_fusion_dot.7",
        tf_op="jit(step)/jvp(vlm)/mlp/dot_general",
    )
    gpu.add("Stream #2(Compute)", "loop_add_fusion", 60, 20)  # beside it, on a second stream
    gpu.add("Stream #3(NCCL)", "ncclDevKernel_AllGather", 50, 70)
    gpu.add("Stream #4(MemcpyD2H)", "MemcpyD2H", 110, 30)
    gpu.add("Stream #1(Compute)", "mystery", 190, 50)  # past the window
    gpu.add("XLA Modules", "jit_step", 0, 200)
    other.add("Stream #1(Compute)", "input_transpose", 0, 200)
    found = step_time([write(tmp_path, gpu, other, host)])
    assert found.devices == 2
    us = {(part.scope, part.kind): 4e6 * seconds for part, seconds in found.parts.items()}  # 2 steps, 2 devices
    assert us == pytest.approx(
        {
            (("vlm", "mlp"), MATMUL): 80 + 20 / 2,
            ((), ELEMENTWISE): 20 / 2,
            ((), COLLECTIVE): 20,
            ((), TRANSFER): 20,
            ((), OTHER): 10,
            ((), COPY): 200,
        }
    )
    assert 4e6 * found.idle == pytest.approx(50)
    assert {kind: 4e6 * s for kind, s in found.hidden.items()} == pytest.approx({COLLECTIVE: 50, TRANSFER: 10})
    text = "\n".join(table(found))
    assert f"{COLLECTIVE}, hidden behind these" in text


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [  # of traces of an H200 with jax 0.11.2
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NTN", MATMUL),
        ("sm90_xmma_gemm_f32f32_tf32f32_f32_nt_n_tilesize128x128x32_warpgroupsize1x1x1_execute_segment_k_off", MATMUL),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", MATMUL),
        ("gemm_fusion_dot_46", MATMUL),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x4x1", ATTENTION),
        ("loop_add_multiply_fusion_1", ELEMENTWISE),
        ("input_reduce_fusion_158", ELEMENTWISE),
        ("fusion_1645", ELEMENTWISE),
        ("memcpy128", COPY),
        ("MemcpyD2D", COPY),
        ("MemcpyH2D", TRANSFER),
        ("ncclDevKernel_AllGather_RING_LL", COLLECTIVE),
    ],
)
def test_kernels_of_a_gpu_are_known_by_name(kernel: str, kind: str) -> None:
    assert kind_of(None, kernel, ()) == kind


def test_in_a_graph_a_kernel_has_the_name_of_its_instruction(
    tmp_path: Path, host: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    dot = Instruction("dot", "jit(step)/vlm/attention/dot_general", "", ())
    program = {
        "gemm_fusion_dot.46": Instruction("fusion", "", "", (dot,)),
        "wrapped_add": Instruction("fusion", "jit(step)/ema/add", "", (Instruction("add", "", "", ()),)),
    }
    monkeypatch.setattr("openpi_like.train.watching.step_time.read_programs", lambda planes: {"7": program})
    gpu = Plane("/device:GPU:0")
    for i, kernel in enumerate(("gemm_fusion_dot_46", "wrapped_add", "nvjet_sm90_tst_128x160_64x5_2x1_v_bz_NNT")):
        gpu.add("Stream #1(Compute)", kernel, 60 * i, 60, hlo_op="command_buffer_334", program_id=7)
    found = step_time([write(tmp_path, gpu, host)])
    us = {(part.scope, part.kind): 2e6 * seconds for part, seconds in found.parts.items()}
    expected = {(("vlm", "attention"), ATTENTION): 60, (("ema",), ELEMENTWISE): 60, ((), MATMUL): 60}
    assert us == pytest.approx(expected)


def test_hosts_of_one_session_are_read_together_and_older_sessions_left_alone(tmp_path: Path, host: Plane) -> None:
    tpu = Plane("/device:TPU:0")
    tpu.add("XLA Ops", "%copy.1 = f32[] copy()", 0, 50)
    sessions = [tmp_path / "profile" / "plugins" / "profile" / name for name in ("older", "newer")]
    for i, session in enumerate(sessions):
        session.mkdir(parents=True)
        for name in ("a", "b"):
            path = write(session, tpu, host).rename(session / f"{name}.xplane.pb")
            stamp = path.stat().st_mtime + 10 * i
            os.utime(path, (stamp, stamp))
    traces = find_traces(tmp_path)
    assert traces == [sessions[1] / "a.xplane.pb", sessions[1] / "b.xplane.pb"]
    assert find_traces(traces[0]) == traces[:1]
    one, both = step_time(traces[:1]), step_time(traces)
    assert (one.devices, both.devices) == (1, 2)
    assert both.parts == pytest.approx(one.parts)
    assert both.host == pytest.approx(one.host)


@pytest.mark.parametrize(
    ("path", "scope", "phase"),
    [
        ("jit(step)/jvp(vlm)/while/body/closed_call/mlp/dot_general", ("vlm", "mlp"), "forward"),
        ("jit(step)/transpose(jvp(vlm))/while/body/closed_call/checkpoint/mlp/dot", ("vlm", "mlp"), "backward"),
        ("jit(step)/transpose(jvp(vlm))/checkpoint/rematted_computation/mlp/dot", ("vlm", "mlp"), "recomputed"),
        ("jit(step)/jvp(vmap(expert))/BSD,DF->BSF/dot_general:", ("expert",), "forward"),
        ("jit(step)/optimizer/jit(_where)/select_n", ("optimizer",), "forward"),
        ("jit(step)/jvp()/mul", (), "forward"),
        ("jit(step)/(jvp(vlm)/mlp/dot:transpose(jvp(vlm))/attention/dot)", ("vlm",), "backward"),
        ("jit(step)/(jvp(vlm)/mlp/dot:jvp(siglip)/mlp/dot)", ("(several parts)",), "forward"),
        ("jit(step)/jvp(siglip)/reshape;jit(step)", ("siglip",), "forward"),
        ("add.3", (), "forward"),
    ],
)  # fmt: skip
def test_scopes_are_what_is_left_of_a_path_without_what_jax_adds(path: str, scope: tuple[str, ...], phase: str) -> None:
    assert parse_path(path) == (scope, phase)


def scopes_of(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield str(equation.source_info.name_stack)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                yield from scopes_of(inner.jaxpr)


def test_a_policy_names_its_parts(tiny_policy: Any, tiny_batch: Any) -> None:
    policy, key = tiny_policy.create(jax.random.key(0)), jax.random.key(1)
    batch = jax.tree.map(jnp.asarray, tiny_batch)
    jaxpr = jax.make_jaxpr(lambda b: policy.loss(key, b)[0])(batch).jaxpr
    found = {scope for name in scopes_of(jaxpr) for scope in parse_path(f"{name}/primitive")[0]}
    assert {"siglip", "vlm", "expert", "embed", "attention", "projections", "mlp", "flow_loss"} <= found


# ---- What goes wrong -------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_said(tmp_path: Path, host: Plane, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TraceError, match=r"nowhere does not exist; set profile=\(20, 24\)"):
        find_traces(tmp_path / "nowhere")
    with pytest.raises(TraceError, match=r"holds no trace \(\*\.xplane\.pb\)"):
        find_traces(tmp_path)
    tpu = Plane("/device:TPU:0")
    tpu.add("XLA Ops", "%copy.1 = f32[] copy()", 0, 50)
    with pytest.raises(TraceError, match=r"holds no steps .*StepTraceAnnotation 'train'.*'/device:TPU:0'"):
        step_time([write(tmp_path, tpu)])
    with pytest.raises(TraceError, match=r"holds no operations of a device, in none of its planes \('/host:CPU'\)"):
        step_time([write(tmp_path, host)])
    path = write(tmp_path, tpu, host)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(TraceError, match="is not a trace, or was cut short"):
        step_time([path])
    program = runpy.run_path(str(REPOSITORY / "train" / "step_time.py"))
    with pytest.raises(TraceError):
        program["main"](tmp_path)


# ---- The window ------------------------------------------------------------------------------------------------------


def steps_in(directory: Path) -> list[int]:
    planes = [plane for path in directory.rglob("*.xplane.pb") for plane in read_planes(path)]
    events = [event for plane in planes for line in range(len(plane.lines)) for event in plane.events(line)]
    return sorted(event.stats["step_num"] for event in events if event.name == STEP and "step_num" in event.stats)


@pytest.mark.parametrize(
    ("window", "first", "last", "expected"),
    [
        ((2, 3), 1, 5, [2, 3]),
        ((2, 4), 4, 6, [4]),  # resumed in the middle of it
        ((4, 9), 1, 5, [4, 5]),  # ended in the middle of it
        ((1, 2), 3, 5, []),  # resumed after it
        (None, 1, 3, []),
    ],
)  # fmt: skip
def test_a_profile_holds_the_steps_of_its_window(
    tmp_path: Path, window: tuple[int, int] | None, first: int, last: int, expected: list[int]
) -> None:
    said: list[str] = []
    profiler = Profiler(window, tmp_path / "profile", say=said.append)
    for number in range(first, last + 1):
        with profiler.step(number):
            pass
    profiler.close()
    assert steps_in(tmp_path) == expected
    assert len(said) == bool(expected)
    if expected:
        assert said[0] == f"profiled from step {expected[0]} on: python train/step_time.py {tmp_path / 'profile'}"
    else:
        assert not (tmp_path / "profile").exists()
