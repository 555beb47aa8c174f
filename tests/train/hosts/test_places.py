"""The place of a process in a run: given, or found from the environment, which the recipes set."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from jax._src.clusters import cloud_tpu_cluster

from openpi_like.config import load_run, override
from openpi_like.train.hosts.places import Hosts, HostsError, Place, find_place

REPOSITORY = Path(__file__).resolve().parents[3]
TORCHRUN = {"MASTER_ADDR": "node7", "MASTER_PORT": "29500", "WORLD_SIZE": "8", "RANK": "5"}
JAX = {"JAX_COORDINATOR_ADDRESS": "run-0-0.run:1234", "JAX_NUM_PROCESSES": "16", "JAX_PROCESS_ID": "15"}
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[03-06,9]",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
}
MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
TPU = {"TPU_WORKER_HOSTNAMES": "127.0.0.1,10.0.0.2", "TPU_WORKER_ID": "1"}
SLICES = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2", "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1:8080"}


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which nothing says that there are other processes."""
    known = {**TORCHRUN, **JAX, **SLURM, **MPI, **TPU, **SLICES}
    for name in (*known, "KUBERNETES_SERVICE_HOST", "JAX_COORDINATOR_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", False)
    return monkeypatch


# ---- Finding the place of a process ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (TORCHRUN, ("torchrun variables", "node7:29500", 8, 5)),
        # torchrun's own store listens on the port that it names.
        (TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, ("torchrun variables", "node7:29501", 8, 5)),
        (JAX, ("JAX variables", "run-0-0.run:1234", 16, 15)),
        (SLURM, ("Slurm", "gpu03:61441", 5, 4)),  # the port is in the range of the job's number
        (SLURM | {"JAX_COORDINATOR_PORT": "7"}, ("Slurm", "gpu03:7", 5, 4)),
        (MPI, ("Ompi", "10.96.0.1:62624", 3, 0)),
        (TPU, ("GkeTpu", "127.0.0.1:8482", 2, 1)),
        (TPU | SLICES, ("GkeTpu", "127.0.0.1:8482", 6, 5)),
        # The innermost starter is asked: Slurm has started mpirun.
        (SLURM | MPI, ("Ompi", "10.96.0.1:62624", 3, 0)),
        (SLURM | TORCHRUN, ("torchrun variables", "node7:29500", 8, 5)),
    ],
)
def test_a_place_is_found_from_the_environment(environ, variables, expected):
    environ.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", "TPU_WORKER_ID" in variables)
    environ.setattr(cloud_tpu_cluster, "get_metadata", lambda key: ("ACCELERATOR_TYPE: 'v5litepod-8'", 404))
    for name, value in variables.items():
        environ.setenv(name, value)
    place = find_place(Hosts())
    assert place is not None
    assert (place.found_by, place.coordinator, place.count, place.rank) == expected
    assert place.others == (("Slurm",) if "SLURM_JOB_ID" in variables and place.found_by != "Slurm" else ())
    # What is given wins over what is found, and one source over the others.
    assert find_place(Hosts("10.0.0.1:1", 2, 1)) == Place("hosts.coordinator, count and rank", "10.0.0.1:1", 2, 1)
    assert find_place(Hosts(count=1)) is None
    if "SLURM_JOB_ID" in variables:
        slurm = find_place(Hosts(source="Slurm"))
        assert slurm is not None
        assert (slurm.count, slurm.rank) == (5, 4)


def test_a_tpu_vm_asks_its_metadata(environ):
    metadata = {
        "agent-worker-number": "3",
        "worker-network-endpoints": "a:b:127.0.0.1,c:d:10.0.0.2,e:f:10.0.0.3,g:h:10.0.0.4",
        "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'",
    }
    environ.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    environ.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    environ.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (metadata[key], 200))
    place = find_place(Hosts())
    assert place == Place("GceTpu", "127.0.0.1:8482", 4, 3)

    def unreachable(key: str) -> Any:
        raise ConnectionError("metadata.google.internal: no route")

    environ.setattr(cloud_tpu_cluster, "get_metadata", unreachable)
    with pytest.raises(HostsError, match=r"GceTpu should say who takes part, but: metadata.*no route.*hosts\.count=1"):
        find_place(Hosts())


@pytest.mark.parametrize(
    "variables",
    [{}, TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}, SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}],
)
def test_a_process_by_itself_has_no_place(environ, variables):
    for name, value in variables.items():
        environ.setenv(name, value)
    assert find_place(Hosts()) is None


@pytest.mark.parametrize(
    ("hosts", "variables", "message"),
    [
        ({"count": 2}, {}, "got hosts.count=2, but no hosts.coordinator, hosts.rank; give all three, or none"),
        ({"coordinator": "a:1", "rank": 0}, {}, "got hosts.coordinator=a:1, hosts.rank=0, but no hosts.count"),
        (
            {},
            {"RANK": "1", "WORLD_SIZE": "2"},
            "variables: WORLD_SIZE=2, RANK=1, but no MASTER_ADDR, MASTER_PORT; set all",
        ),
        ({}, JAX | {"JAX_PROCESS_ID": ""}, "but no JAX_PROCESS_ID;"),
        ({}, TORCHRUN | {"RANK": "8"}, "hosts, by torchrun variables: rank 8 of 8 processes, expected 0 to 7"),
        ({}, TORCHRUN | {"RANK": "first"}, "'first', expected whole numbers"),
        ({}, TORCHRUN | {"MASTER_PORT": "99999"}, "coordinator='node7:99999', expected address:port"),
        ({"source": "slurm"}, SLURM, "hosts.source='slurm': no such source; did you mean 'Slurm'?"),
        ({"source": "Ompi"}, SLURM, "hosts.source='Ompi': this process was not started by it"),
    ],
)
def test_a_place_that_is_given_in_part_or_wrongly_is_refused(environ, hosts, variables, message):
    for name, value in variables.items():
        environ.setenv(name, value)
    with pytest.raises(HostsError, match=re.escape(message)):
        find_place(Hosts(**hosts))


def test_settings_that_cannot_be_are_refused_all_at_once():
    with pytest.raises(ValueError, match="Hosts: ") as e:
        Hosts(coordinator="10.0.0.1", count=0, rank=-1, start_timeout_s=0.0, peer_timeout_s=0.5)
    for part in ("coordinator='10.0.0.1', expected address:port", "count=0", "rank=-1", "start_timeout_s=0", "0.5"):
        assert part in str(e.value)
    with pytest.raises(ValueError, match="rank=4 of count=4, expected 0 to 3"):
        override(Hosts(), ["coordinator=[::1]:1234", "rank=4", "count=4"])
    assert override(Hosts(), ["coordinator=[::1]:1234", "count=4", "rank=3"]) == Hosts("[::1]:1234", 4, 3)


# ---- Recipes ---------------------------------------------------------------------------------------------------------

LAUNCH = REPOSITORY / "train" / "launch"


def check_mesh(command: str, slices: int) -> None:
    """Checks that a recipe splits its run over all devices, whatever their number, weights within a slice."""
    config = override(
        load_run(REPOSITORY / "configs" / "finetune_pi0_widowx.py"), re.findall(r"\bmesh\.\S+=-?\d+", command)
    )
    assert config.mesh.slices == slices
    for devices in (4, 8, 24, 32):
        assert config.mesh.shape(devices * slices) == (slices, devices, 1)


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda p: p.name)
def test_shell_recipes_parse_and_are_short(path):
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert len(path.read_text().splitlines()) <= 40
    assert "train/train.py" in path.read_text()
    check_mesh(path.read_text(), 1)
    assert path.name in (LAUNCH / "README.md").read_text()


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda p: p.name)
def test_kubernetes_recipes_parse_and_say_what_a_process_needs(environ, path):
    yaml = pytest.importorskip("yaml")
    text = path.read_text()
    assert path.name in (LAUNCH / "README.md").read_text()
    assert len(text.splitlines()) <= 60
    # As `envsubst` fills it in: with all the variables that its head names, and no others.
    names = set(re.findall(r"\$\{(\w+)\}", text))
    exported = re.findall(r"^#   export (.*)$", text, re.MULTILINE)
    assert names == set(re.findall(r"(\w+)=", " ".join(exported)))
    values = {name: "4" if name in {"HOSTS", "SLICES"} else name.lower() for name in names}
    spec = yaml.safe_load(re.sub(r"\$\{(\w+)\}", lambda m: values[m[1]], text))
    (job,) = spec["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == 4
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command = " ".join(container["command"])
    assert "train/train.py" in command
    assert "run_dir=/bucket/" in command
    check_mesh(command, 1 if "gpu" in path.name else 4)
    assert container["volumeMounts"][0]["mountPath"] == "/bucket"
    if "gpu" not in path.name:
        assert "google.com/tpu" in container["resources"]["limits"]  # GKE tells TPU hosts who they are
        return
    for variable in container["env"]:
        environ.setenv(variable["name"], variable.get("value", "3"))
    place = find_place(Hosts())
    assert place is not None
    assert (place.found_by, place.count, place.rank) == ("JAX variables", 4, 3)
    assert place.coordinator == "run-workers-0-0.run:1234"
