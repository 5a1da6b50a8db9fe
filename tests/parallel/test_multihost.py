import json
import os
import subprocess
import sys

import jax
import pytest

from sa_jax.errors import UserError
from sa_jax.parallel import multihost
from sa_jax.parallel.multihost import several_processes
from tests.zygote import free_port

# What Slurm sets inside an allocation of two tasks (salloc, sbatch), and adds for a step (srun).
SLURM = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "2", "SLURM_NODELIST": "node[1-2]"}
STEP = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
COORDINATOR = {"JAX_COORDINATOR_ADDRESS": "node1:8476"}
TPU = "TPU_WORKER_HOSTNAMES"


@pytest.mark.parametrize(
    ("env", "several"),
    [
        ({}, False),
        (COORDINATOR, True),
        ({"JAX_COORDINATOR_ADDRESS": ""}, False),
        ({**COORDINATOR, "JAX_NUM_PROCESSES": "2"}, True),
        ({**COORDINATOR, "JAX_NUM_PROCESSES": ""}, True),
        ({**COORDINATOR, "JAX_NUM_PROCESSES": "1"}, False),
        ({"JAX_NUM_PROCESSES": "2"}, False),
        (SLURM, False),  # no srun: one process, whatever was allocated
        ({**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, False),  # an sbatch script
        ({**SLURM, **STEP}, True),
        ({**SLURM, **STEP, "SLURM_STEP_NUM_TASKS": "2"}, True),
        ({**SLURM, **STEP, "SLURM_STEP_NUM_TASKS": "1"}, False),  # the shell of an salloc
        ({**SLURM, **STEP, "SLURM_NTASKS": "1"}, False),
        ({**STEP, "SLURM_JOB_ID": "17"}, False),
        ({**SLURM, **COORDINATOR}, True),
        ({**SLURM, **STEP, "JAX_NUM_PROCESSES": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({TPU: "localhost"}, False),
        ({TPU: ""}, False),
        ({TPU: "worker-0,worker-1"}, True),
        ({TPU: "worker-0", "MEGASCALE_COORDINATOR_ADDRESS": "worker-0"}, True),
    ],
)
def test_only_a_launch_of_several_processes_is_joined(env, several):
    assert several_processes(env) is several


@pytest.mark.parametrize("name", ["JAX_NUM_PROCESSES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"])
def test_a_variable_that_is_no_number_is_named(name):
    with pytest.raises(UserError, match=f"{name}='two'"):
        several_processes({name: "two"})


@pytest.mark.parametrize("address", ["node1", "node1:abc", "node1:99999", "node1:"])
def test_an_address_without_a_port_is_named(monkeypatch, address):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
    with pytest.raises(UserError, match=f"JAX_COORDINATOR_ADDRESS='{address}' must be HOST:PORT"):
        multihost._join(1, 1)


ONE_A_NODE = {"SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
EIGHT_A_NODE = {**ONE_A_NODE, "SLURM_LOCALID": "3", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}
OPEN_MPI = {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}


@pytest.mark.parametrize(
    ("env", "gpus", "own"),
    [
        ({}, 8, []),  # all
        ({**STEP, **ONE_A_NODE}, 8, []),
        ({**STEP, **EIGHT_A_NODE}, 8, [3]),
        ({**STEP, **EIGHT_A_NODE, "SLURM_STEP_TASKS_PER_NODE": "2,8"}, 8, [3]),  # node 1 of 2
        ({**STEP, **EIGHT_A_NODE, "SLURM_GPUS_PER_TASK": "1"}, 1, []),  # it sees its own alone
        ({**STEP, **EIGHT_A_NODE}, 1, []),  # bound by --gpu-bind
        ({**STEP, "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2"}, 8, [4, 5, 6, 7]),
        ({**STEP, "SLURM_LOCALID": "1"}, 8, []),  # Slurm does not say how many
        ({**STEP, **EIGHT_A_NODE, "SLURM_GPUS_ON_NODE": "8"}, 8, [3]),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "8"}, 4, []),  # bound
        (OPEN_MPI, 4, [2, 3]),
        ({**OPEN_MPI, **STEP, **ONE_A_NODE}, 4, [2, 3]),  # its daemons were started by srun
        ({**STEP, **EIGHT_A_NODE, "JAX_LOCAL_DEVICE_IDS": "5"}, 8, None),  # jax reads it
    ],
)
def test_a_process_has_its_share_of_its_nodes_gpus(monkeypatch, env, gpus, own):
    seen = [str(number) for number in range(gpus)]
    monkeypatch.setattr(multihost, "visible_devices", lambda: ("GPU", seen))
    assert multihost._local_devices(env) == own


def test_a_task_of_slurm_takes_all_gpus_of_its_node(monkeypatch):
    """Jax itself would give it the one with the number of the task."""
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kwargs: given.update(kwargs))
    monkeypatch.setattr(multihost, "visible_devices", lambda: ("GPU", list("01234567")))
    for name, value in {**SLURM, **STEP, **ONE_A_NODE, "SLURM_JOB_NUM_NODES": "2"}.items():
        monkeypatch.setenv(name, value)
    multihost._join(1, 1)
    assert given["local_device_ids"] == []


def test_a_worker_on_a_tpu_vm_may_be_alone(monkeypatch):
    given = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kwargs: given.append(kwargs))
    monkeypatch.setattr(multihost, "visible_devices", lambda: ("TPU", ["0"]))
    multihost._join(1, 1)
    assert len(given) == 1  # a cluster of one, as the metadata says
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    multihost._join(1, 1)
    assert len(given) == 1


INITIALIZE = """
import json, jax
from sa_jax.parallel import multihost
with multihost.joined(60):
    print(json.dumps([jax.process_index(), jax.process_count(), multihost.is_primary(),
        jax.distributed.is_initialized(), multihost.agree(jax.process_index() == 0),
        multihost.exchange(""), multihost.exchange("second" * jax.process_index())]))
"""


def start(env: dict[str, str]) -> subprocess.Popen:
    prefixes = ("SLURM_", "OMPI_", "JAX_COORDINATOR", "JAX_NUM", "JAX_PROCESS", "TPU_", "MEGASCALE")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(prefixes)}
    return subprocess.Popen(
        [sys.executable, "-c", INITIALIZE],
        env={**kept, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **env},
        stdout=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen) -> list:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])  # Gloo, too, prints to stdout


def test_one_process_inside_an_allocation_starts_alone():
    assert answer(start(SLURM)) == [0, 1, True, False, True, [""], [""]]


def test_two_processes_join_exchange_texts_and_one_is_primary():
    address = f"localhost:{free_port()}"
    env = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = [start({**env, "JAX_PROCESS_ID": str(index)}) for index in range(2)]
    exchanged = [["", ""], ["", "second"]]
    assert list(map(answer, processes)) == [
        [0, 2, True, True, True, *exchanged],
        [1, 2, False, True, True, *exchanged],
    ]
