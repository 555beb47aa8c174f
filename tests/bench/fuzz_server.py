"""Sends a running server messages that are nearly right, and looks whether it still answers those that are.

    python serve/policy_server.py runs/demo/pretrain --port 8000 &
    python tests/bench/fuzz_server.py --port 8000 --messages 100000

Prints how many were answered with what, and how often the server had to be connected to again.
"""

import collections
import dataclasses
import random
import time

import numpy as np
import tyro
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from openpi_like.serve.protocol import pack, unpack
from tests.serve.fuzzing import mutated


@dataclasses.dataclass(frozen=True)
class Args:
    """port: of the server. messages: how many. check_every: between so many a sound one, which has the same answer."""

    port: int = 8000
    messages: int = 100_000
    check_every: int = 500
    seed: int = 0


def main(args: Args) -> None:
    rng, answers, again = random.Random(args.seed), collections.Counter[str](), 0
    connection = connect(f"ws://127.0.0.1:{args.port}", compression=None, max_size=None)
    robots = unpack(connection.recv(decode=False))["robots"]
    name, about = next(iter(robots.items()))
    images = {c: np.full((*(size or (64, 64)), 3), 100, np.uint8) for c, size in about["cameras"].items()}
    state = np.zeros(sum(size for _, size, _ in about["state"]), np.float32)
    sound = pack({"images": images, "state": state, "prompt": "go", "robot": name, "seed": 1})
    connection.send(sound)
    expected = unpack(connection.recv(decode=False))["actions"]
    small = pack({"images": {}, "state": state, "prompt": "go", "robot": name, "id": 1, "deadline_ms": 100})
    started = time.monotonic()
    for i in range(args.messages):
        try:
            connection.send(mutated(small if rng.random() < 0.9 else sound, rng))
            reply = connection.recv()
            answers[reply.partition(":")[0] if isinstance(reply, str) else "actions"] += 1
        except ConnectionClosed:
            again += 1
            connection = connect(f"ws://127.0.0.1:{args.port}", compression=None, max_size=None)
            connection.recv()
        if i % args.check_every == 0:
            connection.send(sound)
            np.testing.assert_array_equal(unpack(connection.recv(decode=False))["actions"], expected)
    print(f"{args.messages} messages in {time.monotonic() - started:.0f} s: {dict(answers)}, {again} connections lost")


if __name__ == "__main__":
    main(tyro.cli(Args))
