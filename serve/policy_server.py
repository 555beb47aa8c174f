"""Serves checkpoints to robots over websockets: `python serve/policy_server.py runs/demo/pretrain --port 8000`.

The checkpoint directory is all it needs. Robots connect with the PyPI package openpi-client, unmodified, or with
`openpi_like.serve.client.PolicyClient`. It listens once it has compiled; then `/readyz` answers.
"""

import dataclasses
import logging
import ssl
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from openpi_like.serve.keys import Keys, read_keys
from openpi_like.serve.limits import Limits
from openpi_like.serve.policies import Policies
from openpi_like.serve.policy import Policy
from openpi_like.serve.server import PolicyServer, run
from openpi_like.train.checkpoints.checkpoint import Step
from openpi_like.train.checkpoints.contract import CheckpointError


@dataclasses.dataclass(frozen=True)
class Args:
    """Serves checkpoints to robots over websockets.

    checkpoint: run or checkpoint directory. more: other ones, by the name that clients ask for: `--more old=runs/old`
    is at ws://HOST:PORT/old. robot: serve this one only. step: default the newest; or "best", by its
    held-out score. host: 0.0.0.0 to be reachable from other machines. port: 0 takes a free one. port_file: written with
    the port once it listens.
    keys: file of serve/api_keys.py; clients must send one of its keys. cert, cert_key: for TLS; client_ca: clients must
    have a certificate that this one signed.
    seed: of the sampling noise. dtype: of the weights in memory, default as stored;
    bfloat16 halves them, and is what a model of the released size is served with; int8, int4 and float8_e4m3fn hold the
    linear maps in fewer bits, at the cost of some accuracy. temperature: of the tokens that pi0-FAST writes, default
    the likeliest ones. max_batch: requests that are answered together at most. wait_ms: how long a request waits for
    others to share a batch with; by default it is begun as soon as the device is free.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    more: dict[str, Path] = dataclasses.field(default_factory=dict)
    robot: str | None = None
    step: Step = None
    host: str = "127.0.0.1"
    port: int = 8000
    port_file: Path | None = None
    keys: Path | None = None
    cert: Path | None = None
    cert_key: Path | None = None
    client_ca: Path | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "int8", "int4", "float8_e4m3fn"] | None = None
    temperature: float | None = None
    max_batch: int = 16
    wait_ms: float = 0.0
    limits: Limits = dataclasses.field(default_factory=Limits)


def log_to_stderr() -> None:
    # Importing Orbax has set up the root logger already, for warnings alone.
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    logging.getLogger("openpi_like").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every array it reads


def tls_of(args: Args) -> ssl.SSLContext | None:
    """Returns how connections are encrypted, None for not at all."""
    if args.cert is None:
        if args.client_ca is not None or args.cert_key is not None:
            raise ValueError("--client-ca and --cert-key need --cert, the certificate of this server")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(args.cert, args.cert_key)
    if args.client_ca is not None:
        context.load_verify_locations(args.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def load(args: Args) -> dict[str, Policy]:
    """Loads and compiles all policies."""
    policies = {}
    for name, checkpoint in {"default": args.checkpoint, **args.more}.items():
        options = {"step": args.step, "robot": args.robot, "seed": args.seed, "max_batch": args.max_batch}
        try:
            policies[name] = Policy.load(checkpoint, dtype=args.dtype, temperature=args.temperature, **options)
        except (CheckpointError, ValueError) as e:
            sys.exit(f"cannot serve {checkpoint}: {e}")
        policies[name].warm_up(say=print)
    return policies


def main(args: Args) -> None:
    log_to_stderr()
    try:
        tls = tls_of(args)
        keys = read_keys(args.keys) if args.keys is not None else Keys()
    except (ValueError, OSError) as e:
        sys.exit(f"cannot serve: {e}")
    if args.host not in ("127.0.0.1", "::1", "localhost") and not keys:
        logging.getLogger("openpi_like").warning("anybody who reaches %s can ask this server; see --keys", args.host)
    server = PolicyServer(
        Policies(load(args)),
        host=args.host,
        port=args.port,
        keys=keys,
        limits=args.limits,
        tls=tls,
        wait_s=args.wait_ms / 1e3,
    )
    run(server, port_file=args.port_file)


if __name__ == "__main__":
    main(tyro.cli(Args))
