"""Serves a checkpoint to robots over websockets: `python serve/policy_server.py runs/demo/pretrain --port 8000`.

The checkpoint directory is all it needs. Robots connect with the PyPI package openpi-client, unmodified, or with
`openpi_like.serve.client.PolicyClient`. It listens once it has compiled; then `/healthz` answers.
"""

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from openpi_like.serve.policy import ObservationError, Policy
from openpi_like.serve.server import PolicyServer, run
from openpi_like.train.checkpoints.checkpoint import Step
from openpi_like.train.checkpoints.contract import CheckpointError


@dataclasses.dataclass(frozen=True)
class Args:
    """Serves a checkpoint to robots over websockets.

    checkpoint: run or checkpoint directory. robot: serve this one only. step: default the newest; or "best", by its
    held-out score. host: 0.0.0.0 to be reachable from other machines. port: 0 takes a free one. port_file: written with
    the port once it listens.
    api_key: clients must send it. seed: of the sampling noise. dtype: of the weights in memory, default as stored;
    bfloat16 halves them, and is what a model of the released size is served with; int8, int4 and float8_e4m3fn hold the
    linear maps in fewer bits, at the cost of some accuracy. temperature: of the tokens that pi0-FAST writes, default
    the likeliest ones.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    robot: str | None = None
    step: Step = None
    host: str = "127.0.0.1"
    port: int = 8000
    port_file: Path | None = None
    api_key: str | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "int8", "int4", "float8_e4m3fn"] | None = None
    temperature: float | None = None


def log_to_stderr() -> None:
    # Importing Orbax has set up the root logger already, for warnings alone.
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    logging.getLogger("openpi_like").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every array it reads


def main(args: Args) -> None:
    log_to_stderr()
    try:
        policy = Policy.load(
            args.checkpoint,
            step=args.step,
            robot=args.robot,
            seed=args.seed,
            dtype=args.dtype,
            temperature=args.temperature,
        )
    except (CheckpointError, ValueError) as e:
        sys.exit(f"cannot serve {args.checkpoint}: {e}")
    policy.warm_up(say=print)
    server = PolicyServer(
        policy.infer,
        policy.metadata(),
        client_errors=(ObservationError,),
        host=args.host,
        port=args.port,
        api_key=args.api_key,
    )
    run(server, port_file=args.port_file)


if __name__ == "__main__":
    main(tyro.cli(Args))
