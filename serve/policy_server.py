"""Serves checkpoints to robots over websockets: `python serve/policy_server.py runs/demo/pretrain --port 8000`.

The checkpoint directory is all it needs. Robots connect with the PyPI package openpi-client, unmodified, or with
`openpi_like.serve.client.PolicyClient`. It listens once it has compiled; then `/readyz` answers.
"""

import dataclasses
import logging
import ssl
import sys
from pathlib import Path
from typing import Annotated

import jax
import tyro

from openpi_like.serve.keys import Keys, read_keys
from openpi_like.serve.listeners import Listener
from openpi_like.serve.options import PolicyOptions
from openpi_like.serve.origins import LOCAL
from openpi_like.serve.policies import Policies
from openpi_like.serve.policy import Policy
from openpi_like.serve.server import PolicyServer, run
from openpi_like.serve.server_limits import ServerLimits
from openpi_like.serve.session_recording import SessionRecorder
from openpi_like.train.checkpoints.checkpoint import Step
from openpi_like.train.checkpoints.contract import CheckpointError
from openpi_like.train.compile_cache import use_compile_cache

log = logging.getLogger("openpi_like.policy_server")


@dataclasses.dataclass(frozen=True)
class Args:
    """Serves checkpoints to robots over websockets.

    checkpoint: run or checkpoint directory. more: others, by the name that clients ask for: `--more old runs/old` is at
    ws://HOST:PORT/old. canary: a checkpoint that a share of the sessions gets instead of the first one. step:
    default the newest; or "best", by its held-out score. SIGHUP looks for newer ones and serves them without dropping a
    connection. host: 0.0.0.0 to be reachable from other machines. port: 0 takes a free one. port_file: written with the
    port once it listens. keys: file of serve/api_keys.py; clients must send one of its keys. cert, cert_key: for TLS.
    client_ca: clients must have a certificate that this one signed. wait_ms: how long a request waits for others to
    share a batch with; by default it is begun as soon as the device is free. metrics_port: for /metrics alone, without
    keys, where Prometheus has none; not by default. record: directory of a spool, where
    sessions are kept for serve/record.py. tracing: sends spans of OpenTelemetry to where its variables say.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    more: dict[str, Path] = dataclasses.field(default_factory=dict)
    canary: Path | None = None
    canary_share: float = 0.05
    step: Step = None
    host: str = "127.0.0.1"
    port: int = 8000
    port_file: Path | None = None
    keys: Path | None = None
    cert: Path | None = None
    cert_key: Path | None = None
    client_ca: Path | None = None
    wait_ms: float = 0.0
    metrics_port: int | None = None
    record: Path | None = None
    tracing: bool = False
    options: Annotated[PolicyOptions, tyro.conf.arg(name="")] = PolicyOptions(max_batch=16)
    limits: ServerLimits = ServerLimits()


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


def listeners_of(args: Args) -> list[Listener]:
    """Returns what else learns of the sessions."""
    listeners: list[Listener] = []
    if args.record is not None:
        listeners.append(SessionRecorder(args.record, sessions=args.limits.connections))
    if args.tracing:
        try:
            from openpi_like.serve.tracing import Tracing
        except ImportError as e:
            raise ValueError(f"--tracing needs the extra `tracing`, pip install 'openpi-like[tracing]' ({e})") from e
        listeners.append(Tracing())
    return listeners


def load(args: Args) -> Policies:
    """Loads and compiles all policies."""
    loaded = {}
    for name, checkpoint in {"default": args.checkpoint, **args.more}.items():
        try:
            loaded[name] = Policy.load(checkpoint, args.options, step=args.step)
        except (CheckpointError, ValueError) as e:
            sys.exit(f"cannot serve {checkpoint}: {e}")
        loaded[name].warm_up(say=print)
    policies = Policies(loaded)
    if args.canary is not None:
        try:
            policies[""].try_out(loaded["default"].renewed(args.canary), args.canary_share)
        except (CheckpointError, ValueError) as e:
            sys.exit(f"cannot serve {args.canary} beside {args.checkpoint}: {e}")
    return policies


def renew(policies: Policies, args: Args) -> None:
    """Serves newer steps where there are any. What cannot be served is said, and what was served before stays.

    Whatever fails is said: nobody waits for what this returns.
    """
    for name, checkpoint in {"default": args.checkpoint, **args.more}.items():
        served = policies[name]
        try:
            if served.policy.is_step(checkpoint, args.step):
                log.info("policy %r: %s has no other step", name, checkpoint)
                continue
            served.replace(served.policy.renewed(checkpoint, step=args.step))
            log.info("policy %r: now step %d of %s", name, served.policy.metadata()["step"], checkpoint)
        except (CheckpointError, ValueError) as e:
            log.error("policy %r stays as it is: %s", name, e)
            continue
        except Exception:  # memory is out, a disk is gone
            log.exception("policy %r stays as it is", name)
            continue
        if args.canary is not None and name == "default":
            try:
                served.try_out(served.policy.renewed(args.canary), args.canary_share)
            except Exception:
                log.exception("policy %r is new, and has no canary any more", name)


def main(args: Args) -> None:
    log_to_stderr()
    if args.options.devices > 1:  # of processors there is one otherwise; accelerators are as many as there are
        jax.config.update("jax_num_cpu_devices", args.options.devices)
    use_compile_cache(None)
    try:
        tls, listeners = tls_of(args), listeners_of(args)
        keys = read_keys(args.keys) if args.keys is not None else Keys()
    except (ValueError, OSError) as e:
        sys.exit(f"cannot serve: {e}")
    if args.host not in LOCAL and not keys:
        log.warning("anybody who reaches %s can ask this server; see --keys", args.host)
    policies = load(args)
    server = PolicyServer(
        policies,
        host=args.host,
        port=args.port,
        keys=keys,
        limits=args.limits,
        tls=tls,
        wait_s=args.wait_ms / 1e3,
        listeners=listeners,
    )
    if args.metrics_port is not None:
        server.metrics.serve(args.metrics_port, args.host)
    run(server, port_file=args.port_file, on_hangup=lambda: renew(policies, args))


if __name__ == "__main__":
    main(tyro.cli(Args))
