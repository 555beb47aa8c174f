"""Messages that are nearly right."""

import random


def mutated(message: bytes, rng: random.Random, *, most: int = 8) -> bytes:
    """Returns a message with some bytes changed, cut, repeated, swapped or inserted."""
    data = bytearray(message)
    for _ in range(rng.randint(1, most)):
        if not data:
            return rng.randbytes(rng.randint(0, 16))
        at, to = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
        change = rng.randrange(6)
        if change == 0:
            data[at] = rng.randrange(256)
        elif change == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif change == 2:
            del data[at:to]
        elif change == 3:
            data[at:at] = data[at:to][:64]
        elif change == 4:
            data[at:at] = rng.randbytes(rng.randint(1, 8))
        else:  # lengths and types are in the bytes before what they are of
            data[at] = rng.choice((0x80, 0x90, 0xC4, 0xC5, 0xC6, 0xC7, 0xCA, 0xCF, 0xD9, 0xDC, 0xDD, 0xDE, 0xDF, 0xFF))
    return bytes(data)
