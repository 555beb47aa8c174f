"""The policy server's core on Ray Serve: replicas on many machines behind one address, more of them under load.

    make ray
    python serve/deploy/ray_serve.py runs/my_robot --replicas 2 --port 8000

On a cluster, from the root of the repository:

    serve run serve.deploy.ray_serve:build checkpoint=/data/my_robot replicas=2 most=8 host=0.0.0.0

A connection stays with its replica, and so does its session. The wire is that of docs/wire.md, except that messages
have at most 16 MiB, and a connection that is not taken is answered with 403 whatever the reason. Rates and connections
of keys are counted by each replica for itself; /metrics are Ray's.
"""

import asyncio
import os
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import pydantic
import tyro
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from ray import serve
from ray.serve import Application

from openpi_like.serve.answering import Answering
from openpi_like.serve.batching import Batcher
from openpi_like.serve.keys import Key, Keys, read_keys
from openpi_like.serve.options import PolicyOptions
from openpi_like.serve.origins import foreign
from openpi_like.serve.policy import Policy
from openpi_like.serve.server_limits import RateLimit
from openpi_like.serve.session import Session
from openpi_like.train.compile_cache import use_compile_cache

api = FastAPI()


class Args(pydantic.BaseModel):
    """Serves a checkpoint on Ray.

    checkpoint: must be readable on every machine. replicas: at least; most: under load, one per `waiting` open
    connections. gpus: of each replica. keys: as for serve/policy_server.py, to be readable on every machine too.
    stuck_s: a replica whose device is at one batch for longer is replaced. host: that Ray's proxies listen on; without
    keys, 127.0.0.1 takes no request that a browser believes to be for another machine.
    """

    model_config = pydantic.ConfigDict(frozen=True)

    checkpoint: Annotated[Path, tyro.conf.Positional]
    replicas: int = 1
    most: int | None = None
    waiting: float = 16.0
    gpus: float = 0.0
    cpus: float = 1.0
    max_batch: int = 16
    keys: Path | None = None
    stuck_s: float = 60.0
    host: str = "127.0.0.1"
    port: int = 8000


@serve.deployment
@serve.ingress(api)
class Replica:
    """One policy in one process, with its batches."""

    def __init__(self, checkpoint: Path, keys: Path | None, max_batch: int, stuck_s: float, host: str) -> None:
        use_compile_cache(None)
        self._policy = Policy.load(checkpoint, PolicyOptions(max_batch=max_batch))
        self._policy.warm_up()
        self._keys = read_keys(keys) if keys is not None else Keys()
        self._answering = Answering(Batcher())
        self._stuck_s, self._host = stuck_s, host
        self._name = serve.get_replica_context().replica_tag
        self._by_key, self._rates = Counter[str](), dict[str, RateLimit]()

    @api.websocket("/")
    async def converse(self, socket: WebSocket) -> None:
        key = self._keys.find(socket.headers.get("Authorization", "")) if self._keys else None
        origin, host = socket.headers.get("Origin"), socket.headers.get("Host", "")
        refused = foreign(origin, host, listens=self._host, keys=bool(self._keys))
        full = key is not None and key.connections is not None and self._by_key[key.name] >= key.connections
        if (self._keys and key is None) or refused or full:
            await socket.close()
            return
        await socket.accept()
        name = key.name if key is not None else ""
        self._by_key[name] += 1
        try:
            await self._answer_all(socket, self._rate(key))
        finally:
            self._by_key[name] -= 1

    def _rate(self, key: Key | None) -> RateLimit | None:
        if key is None or key.requests_per_s is None:
            return None
        return self._rates.setdefault(key.name, RateLimit(key.requests_per_s))

    async def _answer_all(self, socket: WebSocket, rate: RateLimit | None) -> None:
        session = Session(lambda: self._policy, about={"replica": self._name, "pid": os.getpid()})
        try:
            await socket.send_bytes(session.hello())
            while True:
                received = await socket.receive()
                if received["type"] == "websocket.disconnect":
                    return
                if rate is not None and (wait := rate.take()):
                    await socket.send_text(f"limit: more requests than this key may send; wait {1e3 * wait:.0f} ms")
                    continue
                message = received.get("bytes") or received.get("text") or b""
                answered = await self._answering.answer(session, message, owner=socket)
                if isinstance(answered.reply, str):
                    await socket.send_text(answered.reply)
                else:
                    await socket.send_bytes(answered.reply)
        except WebSocketDisconnect:
            pass

    @api.get("/healthz")
    async def healthz(self) -> str:
        return "ok"

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        since = self._answering.batcher.busy_since
        if since is not None and time.monotonic() - since > self._stuck_s:
            raise RuntimeError(f"a batch takes longer than {self._stuck_s:g} s")

    async def __del__(self) -> None:
        await asyncio.to_thread(self._answering.close)


def build(args: Args) -> Application:
    """Returns the application that `serve run` and `main` deploy."""
    most = args.most or args.replicas
    deployment: Any = Replica  # what the decorators make of it
    deployment = deployment.options(
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
        max_ongoing_requests=max(100, int(4 * args.waiting)),  # a connection is one, for as long as it is open
        autoscaling_config={
            "min_replicas": args.replicas,
            "max_replicas": max(most, args.replicas),
            "initial_replicas": args.replicas,
            "target_ongoing_requests": args.waiting,
        },
        graceful_shutdown_timeout_s=30,
    )
    return deployment.bind(args.checkpoint, args.keys, args.max_batch, args.stuck_s, args.host)


def main(args: Args) -> None:
    serve.start(http_options={"host": args.host, "port": args.port})
    serve.run(build(args), blocking=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
