"""Makes and lists the keys that a policy server asks for.

    python serve/api_keys.py keys.json --add robot7 --requests-per-s 20
    python serve/policy_server.py runs/my_robot --host 0.0.0.0 --keys keys.json

A key is printed once, when it is made; the file has its hash alone.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from openpi_like.config import near_names
from openpi_like.serve.keys import Key, hash_of, new_key, read_keys, write_keys


@dataclasses.dataclass(frozen=True)
class Args:
    """Makes and lists the keys that a policy server asks for.

    file: is made if it is not there. add: a client to make a key for. remove: one whose key is not to be taken any
    more, once the server has been started anew. requests_per_s, connections, looks: what the new key allows.
    """

    file: Annotated[Path, tyro.conf.Positional]
    add: str | None = None
    remove: str | None = None
    requests_per_s: float | None = None
    connections: int | None = None
    looks: bool = False


def main(args: Args) -> None:
    keys = {key.name: key for key in read_keys(args.file).keys} if args.file.exists() else {}
    if args.remove is not None:
        if args.remove not in keys:
            sys.exit(f"{args.file} has no key of {args.remove!r}; {near_names(args.remove, list(keys))}")
        del keys[args.remove]
    if args.add is not None:
        if args.add in keys:
            sys.exit(f"{args.file} has a key of {args.add!r} already; remove it first")
        key = new_key()
        keys[args.add] = Key(args.add, hash_of(key), args.requests_per_s, args.connections, args.looks)
        print(f"key of {args.add}: {key}")
    if args.add is not None or args.remove is not None:
        write_keys(args.file, keys.values())
    for each in keys.values():
        rate = "any rate" if each.requests_per_s is None else f"{each.requests_per_s:g} requests/s"
        looks = ", may look at the live page" if each.looks else ""
        print(f"{each.name}: {rate}, {each.connections or 'any number of'} connections{looks}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, OSError) as e:
        sys.exit(str(e))
