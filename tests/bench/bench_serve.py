"""Our policy server beside openpi's, around the same policy, with the unmodified openpi-client; clients are processes.

    git clone https://github.com/Physical-Intelligence/openpi
    python tests/bench/bench_serve.py runs/demo/pretrain --openpi openpi

For each server and number of clients: requests per second, latency of a request (median, 95 and 99 %), what a request
costs of processor time on both sides (where they share the cores, that bounds the rate), the server's memory along the
way, and beside them what sampling alone takes in the same process. Servers take turns, so that what else the machine
does hits both. An error of the server ends the bench.

    python tests/bench/bench_serve.py RUN --clients 64 --hz 10 --seconds 300  # robots that ask ten times a second
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro


@dataclasses.dataclass(frozen=True)
class Args:
    """checkpoint: run to serve. openpi: checkout of openpi; without it, ours alone is measured. clients: at a time.

    seconds: of each measurement. hz: requests per second of each client; None asks again at once. max_batch: of ours.
    devices: that share a batch of ours. rounds: how often servers take turns.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    openpi: Path | None = None
    clients: tuple[int, ...] = (1, 4, 16, 64)
    seconds: float = 10.0
    hz: float | None = None
    max_batch: int = 16
    devices: int = 1
    rounds: int = 1
    serve: str | None = None  # of this program itself: it is the server


def observation_of(robots: dict[str, Any]) -> dict[str, Any]:
    name, robot = next(iter(robots.items()))
    rng = np.random.default_rng(0)
    images = {c: rng.integers(0, 256, (*(size or (224, 224)), 3), np.uint8) for c, size in robot["cameras"].items()}
    state = np.zeros(sum(size for _, size, _ in robot["state"]), np.float32)
    return {"images": images, "state": state, "prompt": "press the button", "robot": name}


def serve(args: Args) -> None:
    """Serves on the port it prints."""
    import jax

    from openpi_like.serve.options import PolicyOptions
    from openpi_like.serve.policy import Policy

    if args.serve == "ours":
        from openpi_like.serve.policies import Policies
        from openpi_like.serve.server import PolicyServer, run

        jax.config.update("jax_num_cpu_devices", args.devices)
        policy = Policy.load(args.checkpoint, PolicyOptions(max_batch=args.max_batch, devices=args.devices))
        policy.warm_up()
        tell(policy)
        run(PolicyServer(Policies({"default": policy}), port=0), port_file=Path(os.environ["PORT_FILE"]))
        return
    assert args.openpi is not None
    from tests.bench.openpi_server import websocket_policy_server

    module = websocket_policy_server(args.openpi)
    policy = Policy.load(args.checkpoint)
    policy.warm_up()
    tell(policy)
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary = Path(os.environ["PORT_FILE"] + ".tmp")
    temporary.write_text(str(port))
    temporary.rename(os.environ["PORT_FILE"])
    module.WebsocketPolicyServer(policy, host="127.0.0.1", port=port, metadata=policy.metadata()).serve_forever()


def tell(policy: Any) -> None:
    """Says what sampling alone takes, for each size of batch."""
    request = policy.prepare(observation_of(policy.metadata()["robots"]))
    for size in policy.sizes:
        times = []
        for _ in range(50):
            started = time.perf_counter()
            policy.sample([request] * size)
            times.append(1e3 * (time.perf_counter() - started))
        print(f"sampling alone, {size} at a time: {np.median(times):.2f} ms", flush=True)


def ask(port: int, seconds: float, hz: float | None, start: Any, results: Any) -> None:
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    client = WebsocketClientPolicy("127.0.0.1", port)
    observation = observation_of(client.get_server_metadata()["robots"])
    for _ in range(3):
        client.infer(observation)
    start.wait()
    latencies, begun, used = [], time.perf_counter(), time.process_time()
    next_at = begun
    while time.perf_counter() < begun + seconds:
        if hz is not None:
            time.sleep(max(0.0, next_at - time.perf_counter()))
            next_at += 1 / hz
        asked = time.perf_counter()
        client.infer(observation)
        latencies.append(1e3 * (time.perf_counter() - asked))
    results.put((latencies, time.perf_counter() - begun, time.process_time() - used))


def resident_mb(process: subprocess.Popen) -> float:
    """Memory that a process has in RAM, in MiB."""
    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) / 1024


def processor_s(process: subprocess.Popen) -> float:
    """Processor time that a process has taken, in all of its threads."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _check(clients: list[Any]) -> None:
    """Ends the bench, and what is left of the clients, if one of them met an error."""
    failed = [client.exitcode for client in clients if client.exitcode]
    if failed:
        for client in clients:
            client.terminate()
        sys.exit(f"{len(failed)} of {len(clients)} clients ended with an error, see above")


def measure(server: subprocess.Popen, port: int, clients: int, args: Args) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(clients + 1), context.Queue()
    processes = [
        context.Process(target=ask, args=(port, args.seconds, args.hz, start, results)) for _ in range(clients)
    ]
    for process in processes:
        process.start()
    while start.n_waiting < clients:  # until all have connected
        _check(processes)
        time.sleep(0.02)
    start.wait()
    used, memory, every = processor_s(server), list[int](), list[tuple[list[float], float, float]]()
    while len(every) < clients:
        with contextlib.suppress(queue.Empty):
            every.append(results.get(timeout=args.seconds / 10))
            continue
        memory.append(round(resident_mb(server)))
        _check(processes)
    used = processor_s(server) - used
    for process in processes:
        process.join()
    latencies = np.concatenate([latency for latency, *_ in every])
    rate = sum(len(latency) / seconds for latency, seconds, _ in every)
    p50, p95, p99 = np.percentile(latencies, (50, 95, 99))
    numbers = {"requests_per_s": rate, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "longest_ms": latencies.max()}
    numbers |= {"server_cpu_ms": 1e3 * used / len(latencies)}
    numbers |= {"client_cpu_ms": 1e3 * sum(cpu for *_, cpu in every) / len(latencies)}
    requests = {"requests": len(latencies), "rss_mb": [*memory, round(resident_mb(server))]}
    return {k: round(float(v), 2) for k, v in numbers.items()} | requests


def main(args: Args) -> None:
    if args.serve is not None:
        serve(args)
        return
    servers = ["ours"] if args.openpi is None else ["ours", "openpi"]
    with tempfile.TemporaryDirectory() as directory:
        running, ports = {}, {}
        for name in servers:
            port_file = Path(directory) / name
            environment = {**os.environ, "PORT_FILE": str(port_file)}
            command = [sys.executable, __file__, str(args.checkpoint), "--serve", name]
            command += ["--max-batch", str(args.max_batch), "--devices", str(args.devices)]
            command += [] if args.openpi is None else ["--openpi", str(args.openpi)]
            print(name, flush=True)
            running[name] = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
            while not port_file.exists():
                assert running[name].poll() is None, f"{name} ended"
                time.sleep(0.1)
            ports[name] = int(port_file.read_text())
        try:
            for clients in args.clients:
                for _ in range(args.rounds):
                    for name in servers:
                        row = measure(running[name], ports[name], clients, args)
                        print(json.dumps({"server": name, "clients": clients, **row}), flush=True)
        finally:
            for process in running.values():
                process.send_signal(signal.SIGTERM)
            for process in running.values():
                process.wait()


if __name__ == "__main__":
    main(tyro.cli(Args))
