"""Recording on the robot's side: what was given is on disk, whatever ends the program; nothing is dropped unsaid."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openpi_like.data.images import decode
from openpi_like.serve.png import encode_png
from openpi_like.serve.recorder import Recorder
from openpi_like.serve.spool import EpisodeWriter, RecordingError, conclude, drop, open_recording, open_spool

SIZES = {"base": (6, 8), "wrist": (3, 5)}


def observation(t: int, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(t)
    images = {k: rng.integers(0, 256, (*size, 3), np.uint8) for k, size in SIZES.items()}
    return {"images": images, "state": rng.normal(size=3), **changes}


def action(t: int) -> np.ndarray:
    return np.random.default_rng((1, t)).normal(size=2)


def record(recorder: Recorder, steps: range) -> None:
    for t in steps:
        recorder.step(observation(t), action(t), proposed=-action(t) if t % 2 else None, intervened=t % 3 == 0)


def check(path: Path, steps: int) -> None:
    """The file has just these steps of `record`."""
    found = list(open_recording(path).read())
    assert len(found) == steps
    for t, step in enumerate(found):
        for name, image in observation(t)["images"].items():
            np.testing.assert_array_equal(decode(step["images"][name]), image)
        np.testing.assert_array_equal(step["state"], observation(t)["state"].astype(np.float32))
        np.testing.assert_array_equal(step["action"], action(t).astype(np.float32))
        assert ("proposed" in step) == bool(t % 2)
        if t % 2:
            np.testing.assert_array_equal(step["proposed"], -action(t).astype(np.float32))
        assert step["intervened"] == (t % 3 == 0)
        assert step["prompt"] == "go"


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (7, 1), (1, 9), (48, 64)])
def test_png_is_read_by_others_bit_for_bit(size: tuple[int, int], compress: bool) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    data = encode_png(image[:, ::-1], compress=compress)  # strides that run backwards, too
    np.testing.assert_array_equal(decode(data), image[:, ::-1])


def test_png_of_a_smooth_picture_is_small() -> None:
    ramp = np.repeat(np.add.outer(np.arange(120), np.arange(160)).astype(np.uint8)[..., None], 3, axis=2)
    assert len(encode_png(ramp)) < 0.05 * ramp.nbytes < ramp.nbytes < len(encode_png(ramp, compress=False))
    for wrong in (ramp[..., 0], ramp.astype(np.float32), ramp[:0]):
        with pytest.raises(ValueError, match=r"expected uint8 \(H, W, 3\)"):
            encode_png(wrong)


def test_what_is_recorded_is_on_disk(tmp_path: Path) -> None:
    with Recorder(tmp_path, "arm", metadata={"operator": "Ada"}) as recorder:
        names = [recorder.begin("go", {"scene": 3})]
        seen, reused = observation(0), observation(0)
        recorder.step(reused, action(0), intervened=True)
        for name, image in reused["images"].items():
            image[:] = 0  # a camera's buffer, written to again
            assert seen["images"][name].any()
        record(recorder, range(1, 7))
        recorder.end(success=True, notes="first")
        for success in (False, None):
            names.append(recorder.begin("go"))
            record(recorder, range(2))
            recorder.end(success)
    found = open_spool(tmp_path)
    assert [r.name for r in found] == sorted(names) == names
    assert [(r.steps, r.success, r.finished, r.notes) for r in found] == [
        (7, True, True, "first"),
        (2, False, True, ""),
        (2, None, True, ""),
    ]
    assert found[0].head["metadata"] == {"operator": "Ada", "scene": 3}
    assert found[0].head["robot"] == "arm"
    check(found[0].path, 7)
    times = [s["time_s"] for s in found[0].read()]
    assert times == sorted(times)


CHILD = """
import sys
from openpi_like.serve.recorder import Recorder
from tests.serve.test_recorder import record
recorder = Recorder(sys.argv[1], "arm")
recorder.begin("go")
for t in range(10**6):
    record(recorder, range(t, t + 1))
    print(t, flush=True)
"""


def test_a_kill_loses_nothing_but_what_is_in_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while (step := int(process.stdout.readline())) < 20 or step % 50 or open_spool(tmp_path)[0].steps < 20:
            pass  # the disk may be behind
        process.kill()
    (unfinished,) = open_spool(tmp_path)
    assert not unfinished.finished
    assert unfinished.steps >= 20
    check(unfinished.path, unfinished.steps)
    kept = conclude(unfinished, None, "killed")
    assert (kept.finished, kept.success, kept.steps, kept.cut_bytes) == (True, None, unfinished.steps, 0)
    check(kept.path, kept.steps)


def test_a_step_cut_anywhere_is_known_to_be(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "arm")
    recorder.begin("go")
    record(recorder, range(3))
    recorder.close()
    (whole,) = open_spool(tmp_path)
    data, path = whole.path.read_bytes(), tmp_path / "cut.episode"
    two = open_recording(whole.path)
    path.write_bytes(data[:-1])
    start = open_recording(path).end  # where the last step begins
    for end in range(start, len(data)):
        path.write_bytes(data[:end])
        cut = open_recording(path)
        assert (cut.steps, cut.finished, cut.cut_bytes) == (2, False, end - start)
    path.write_bytes(data[:-40] + bytes(40))  # a file longer than what reached the disk, after a loss of power
    assert (open_recording(path).steps, open_recording(path).cut_bytes) == (2, len(data) - start)
    path.write_bytes(data + bytes(100))
    assert (open_recording(path).steps, open_recording(path).cut_bytes) == (3, 100)
    kept = conclude(open_recording(path), False, "")
    assert (kept.steps, kept.success, two.finished) == (3, False, False)
    check(path, 3)


def test_damage_is_located(tmp_path: Path) -> None:
    with Recorder(tmp_path, "arm") as recorder:
        recorder.begin("go")
        record(recorder, range(4))
        recorder.end(True)
    (recording,) = open_spool(tmp_path)
    data = bytearray(recording.path.read_bytes())
    data[len(data) // 2] ^= 1
    recording.path.write_bytes(data)
    with pytest.raises(RecordingError, match=r"step [12] is damaged"):
        list(open_recording(recording.path).read())
    recording.path.write_bytes(b"something else")
    (tmp_path / "empty.episode").write_bytes(b"")
    with pytest.raises(RecordingError, match=r"(?s)does not begin as a recording.*does not begin.*move these files"):
        open_spool(tmp_path)
    with pytest.raises(RecordingError, match="no directory"):
        open_spool(tmp_path / "no")


def test_an_episode_that_goes_on_is_neither_kept_nor_dropped(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "arm")
    recorder.begin("go")
    record(recorder, range(2))
    (path,) = tmp_path.iterdir()
    while open_recording(path).steps < 2:
        pass
    with pytest.raises(RecordingError, match="is being recorded right now"):
        conclude(open_recording(path), None, "")
    with pytest.raises(RecordingError, match="is being recorded right now"):
        drop(path)
    recorder.drop()
    assert [p.name for p in tmp_path.iterdir()] == [path.name.replace(".episode", ".dropped")]
    with pytest.raises(RecordingError, match="no recordings"):
        open_spool(tmp_path)
    recorder.close()


def test_an_exception_leaves_the_episode_unfinished(tmp_path: Path) -> None:
    def stopped() -> None:
        with Recorder(tmp_path, "arm") as recorder:
            recorder.begin("go")
            record(recorder, range(3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    (recording,) = open_spool(tmp_path)
    assert (recording.steps, recording.finished) == (3, False)
    check(recording.path, 3)


def test_a_disk_that_is_full_is_said(tmp_path: Path, monkeypatch: Any) -> None:
    append = EpisodeWriter.append

    def full(self: EpisodeWriter, message: bytes) -> None:
        if self.steps == 2:
            raise OSError(28, "No space left on device")
        append(self, message)

    with Recorder(tmp_path, "arm") as recorder:
        recorder.begin("go")
        monkeypatch.setattr(EpisodeWriter, "append", full)
        with pytest.raises(RecordingError, match="No space left on device; what came before is kept"):
            record(recorder, range(1000))
        with pytest.raises(RecordingError, match="No space left"):
            recorder.end(True)
        monkeypatch.setattr(EpisodeWriter, "append", append)
        recorder.leave()
        recorder.begin("go")
        record(recorder, range(4))
        recorder.end(True)
    full_one, other = open_spool(tmp_path)
    assert (full_one.finished, full_one.steps, other.finished) == (False, 2, True)
    check(full_one.path, 2)
    check(other.path, 4)


def test_a_disk_that_is_too_slow_is_said_and_nothing_is_dropped(tmp_path: Path, monkeypatch: Any) -> None:
    append, go_on = EpisodeWriter.append, threading.Event()

    def slow(self: EpisodeWriter, message: bytes) -> None:
        assert go_on.wait(10)
        append(self, message)

    monkeypatch.setattr(EpisodeWriter, "append", slow)
    recorder = Recorder(tmp_path, "arm", buffer_mib=1, longest_wait_s=0.05)
    recorder.begin("go")
    pixels = np.zeros((300, 400, 3), np.uint8)  # 0.34 MiB
    for _ in range(2):
        recorder.step({"images": {"base": pixels}, "state": [0.0]}, [0.0])
    # A third would be over 1 MiB.
    with pytest.raises(RecordingError, match=r"0 MiB of frames were waiting for longer than 0\.05 s; record smaller"):
        recorder.step({"images": {"base": pixels}, "state": [0.0]}, [0.0])
    assert recorder.waited_s >= 0.05
    go_on.set()
    recorder.leave()
    (recording,) = open_spool(tmp_path)
    assert (recording.steps, recording.finished) == (2, False)
    recorder.close()


def test_steps_that_make_no_sense_are_refused_whole(tmp_path: Path) -> None:
    with Recorder(tmp_path, "arm") as recorder:
        with pytest.raises(RecordingError, match="no episode is open"):
            record(recorder, range(1))
        recorder.begin("go")
        with pytest.raises(RecordingError, match="is open; call"):
            recorder.begin("go")
        record(recorder, range(1))
        bad = {"images": {"base": np.zeros((6, 8), np.uint8), "wrist": b"GIF89a"}, "state": None, "robot": "leg"}
        with pytest.raises(ValueError, match="not recorded") as e:
            recorder.step(bad, [[0.0]])
        for part in (r"'base'].*shape (6, 8)", "'wrist'].*GIF", "robot: got 'leg'", "state: missing", "one axis"):
            assert all(word in str(e.value) for word in part.split(".*"))
        seen = observation(1)
        seen["images"]["base"], seen["images"]["third"] = np.zeros((5, 8, 3), np.uint8), b"\xff\xd8\xff"
        with pytest.raises(ValueError, match="in the steps before") as e:
            recorder.step(seen, [0.0, 0.0, 0.0])
        assert "action: got (3,), in the steps before it was (2,)" in str(e.value)
        assert "images['base']: got (5, 8, 3), in the steps before it was (6, 8, 3)" in str(e.value)
        assert "images['third']: got encoded, in the steps before it was none" in str(e.value)
        with pytest.raises(ValueError, match=r"proposed: got shape \(1,\)"):
            recorder.step(observation(1), action(1), proposed=[0.0])
        unfit = {**observation(1), "state": [0.0, np.nan, np.inf], "prompt": b"go"}
        with pytest.raises(ValueError, match=r"prompt: got b'go'.*\n.*state: not finite in dims \[1, 2\]"):
            recorder.step(unfit, action(1))
        record(recorder, range(1, 2))
        recorder.end()
        with pytest.raises(ValueError, match=r"'success' is reserved.*'x' is of type list"):
            recorder.begin("go", {"success": True, "x": [1]})  # type: ignore[dict-item]
    (recording,) = open_spool(tmp_path)
    check(recording.path, 2)
    with pytest.raises(RecordingError, match="is closed; make another one"):
        recorder.begin("go")


def test_a_step_without_a_prompt_has_that_of_its_episode(tmp_path: Path) -> None:
    with Recorder(tmp_path, "arm") as recorder:
        recorder.begin("go")
        for prompt in ("stop", None):
            recorder.step({**observation(0), "prompt": prompt}, action(0))
        recorder.end(True)
    assert [step["prompt"] for step in open_spool(tmp_path)[0].read()] == ["stop", "go"]


ABOUT = {
    "cameras": {"base": [6, 8], "wrist": None, "top": [4, 4]},
    "state": [["hand", 2, "m"], ["gripper", 1, "1"]],
    "action": [["hand", 3, "m"]],
}


def test_what_does_not_fit_the_server_is_said_at_the_first_step(tmp_path: Path) -> None:
    served = {"contract": "abc", "step": 7, "robots": {"arm": ABOUT}}
    with pytest.raises(ValueError, match="'arms': the server does not serve it; did you mean 'arm'"):
        Recorder(tmp_path, "arms", policy=served)
    with Recorder(tmp_path, "arm", policy=served) as recorder:
        recorder.begin("go")
        with pytest.raises(
            ValueError, match=r"images\['top'\]: missing.*\n.*action: got shape \(2,\), expected \(3,\): hand:3"
        ):
            record(recorder, range(1))
        seen = observation(0)
        seen["images"]["top"] = np.zeros((4, 5, 3), np.uint8)
        with pytest.raises(ValueError, match=r"'top'\]: got 4 x 5, expected 4 x 4"):
            recorder.step(seen, np.zeros(3))
        seen["images"]["top"] = np.zeros((4, 4, 3), np.uint8)
        recorder.step(seen, np.zeros(3))
        recorder.end(True)
    assert open_spool(tmp_path)[0].head["policy"] == {"contract": "abc", "step": 7}


def test_recording_needs_neither_jax_nor_an_image_library() -> None:
    code = (
        "import sys, openpi_like.serve.recorder\n"
        "loaded = {m.split('.')[0] for m in sys.modules}\n"
        "wrong = loaded & {'jax', 'scipy', 'cv2', 'PIL', 'simplejpeg', 'jaxtyping', 'tensorflow', 'websockets'}\n"
        "assert not wrong, wrong\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
