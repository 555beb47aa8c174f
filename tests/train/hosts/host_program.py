"""A run without a model, for test_process_group.py: it sums over all devices in a loop, as its argument says."""

import json
import os
import sys
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from openpi_like.train.hosts.places import Hosts, HostsError
from openpi_like.train.hosts.process_group import ProcessGroup, join


def run(group: ProcessGroup, *, seed: int, fail_at: int | None) -> None:
    group.check_clocks()
    group.check_agree("its config", {"steps": 9, "optimizer": {"seed": seed}})
    group.goes_on_from(lambda: "step 7")
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    ones = np.ones(jax.local_device_count(), np.float32)
    x = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("data")), ones)
    total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    stopping = group.stopping(0)
    step, stop = 0, False
    while not stop:
        assert float(total(x)) == jax.device_count()
        step += 1
        if step == 5:
            print("running", flush=True)
        if step == fail_at:
            raise OSError(f"no batch {step}\nin the second line")
        stop = stopping.at(step)
        time.sleep(0.005 * group.rank)  # so that the processes are not at the same step by chance
    assert stopping.signal is not None
    print(f"stopped at {step} by {stopping.signal.name} with {jax.device_count()} devices", flush=True)
    sys.exit(128 + stopping.signal)


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    print(os.getpid(), flush=True)
    try:
        with join(Hosts(**settings.pop("hosts")), print) as group:
            run(group, **settings)
    except HostsError as e:
        sys.exit(str(e))
