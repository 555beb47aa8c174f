"""Freed memory is used again without asking the system, in whatever thread, and where; programs that start anew."""

import os
import subprocess
import sys

import pytest

from openpi_like.train.allocation import runs_on_cpus

SIZE = 128 << 20  # bytes, more than glibc's threads have room for in heaps of their own
PROGRAM = f"""
import ctypes, resource, threading
from openpi_like.train.allocation import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def use():
    memory = ctypes.c_void_p(libc.malloc({SIZE}))
    assert memory
    libc.memset(memory, 1, ctypes.c_size_t({SIZE}))
    libc.free(memory)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = KEEP and keep_freed_memory()
faults()
print(int(kept), faults())
"""


def _faults(keep: bool) -> tuple[bool, int]:
    program = PROGRAM.replace("KEEP", str(keep))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    kept, faults = map(int, done.stdout.split())
    return bool(kept), faults


def test_freed_memory_is_used_again_without_page_faults():
    kept, faults = _faults(keep=True)
    if not kept:
        pytest.skip("not glibc's malloc, which is left as it is")
    assert faults < 32
    assert _faults(keep=False)[1] >= SIZE >> 21  # a fault for each page, of 2 MiB at most


@pytest.mark.parametrize(
    ("devices", "platforms", "cpus"),
    [
        ((), None, True),
        (("nvidiactl", "vfio/vfio", "accel"), None, True),
        (("nvidia0",), None, False),
        (("dxg",), None, False),
        (("kfd",), None, False),
        (("accel0",), None, False),
        (("vfio/0",), None, False),
        (("nvidia0",), "cpu", True),
        ((), "cuda,cpu", False),
    ],
)
def test_whether_a_machine_computes_on_its_cpus(tmp_path, monkeypatch, devices, platforms, cpus):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if platforms is not None:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    for name in devices:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert runs_on_cpus(tmp_path) == cpus


@pytest.mark.parametrize(
    ("seconds", "steps", "environment", "starts"),
    [(20.0, 1000, {}, 2), (2.0, 1000, {}, 1), (20.0, 10, {}, 1), (20.0, 1000, {"OPENPI_LIKE_RESTARTED": "1"}, 1)],
)
def test_a_program_that_compiled_for_long_starts_anew_once(tmp_path, seconds, steps, environment, starts):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from openpi_like.train.allocation import restart_after_compiling\n"
        "print('started with', sys.flags.optimize, *sys.argv[1:])\n"
        "class Open:\n"
        "    def close(self): print('closed')\n"
        f"restart_after_compiling({seconds}, {steps}, print, closing=[Open()])\n"
        "print('goes on')\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "OPENPI_LIKE_RESTARTED"} | environment
    done = subprocess.run([sys.executable, "-O", program, "a=1"], capture_output=True, text=True, check=True, env=env)
    lines = done.stdout.splitlines()
    assert lines.count("started with 1 a=1") == starts
    assert lines.count("closed") == starts - 1
    assert lines[-1] == "goes on"
