"""Coverage-guided fuzzing of all that reads what a client sends: msgpack, arrays, pictures, observations, resets.

    pip install atheris
    python tests/bench/fuzz_decoder.py -runs=100000 -max_len=4096 corpus

`corpus` is a directory to which inputs that reach new code are added; it is filled with sound ones first. Ends with an
error, and the input in a file, where a message is answered with "internal", or not at all.
"""

import logging
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["openpi_like.serve", "openpi_like.data.images", "msgpack"]):
    import cv2
    import numpy as np

    from openpi_like.serve.protocol import pack
    from openpi_like.serve.session import Ask, Reset, Session
    from tests.serve.running import Arm, arm_observation


POLICY = Arm()


def one(data: bytes) -> None:
    """Reads one message, and a sound one after it, which must not be refused for it."""
    session = Session(lambda: POLICY)
    reply = session.receive(data)
    assert isinstance(reply, Ask | Reset | str), reply
    assert not (isinstance(reply, str) and reply.startswith("internal")), reply
    assert isinstance(session.receive(SOUND[0]), Ask)


def encoded(extension: str) -> dict:
    o = arm_observation(1.0)
    return {**o, "images": {k: cv2.imencode(extension, x)[1].tobytes() for k, x in o["images"].items()}}


SOUND = [
    pack({**arm_observation(1.0), "id": 3, "deadline_ms": 5.0, "seed": 1}),
    pack(encoded(".jpg")),
    pack(encoded(".png")),
    pack({**arm_observation(1.0), "previous": np.zeros((3, 3), np.float32), "delay": 2}),
    pack({"reset": True, "seed": 3, "success": False}),
]


def main() -> None:
    logging.disable()
    for name in sys.argv[1:]:
        if not name.startswith("-"):
            Path(name).mkdir(exist_ok=True)
            for i, message in enumerate(SOUND):
                (Path(name) / f"sound{i}").write_bytes(message)
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
