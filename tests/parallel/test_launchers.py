"""What each launcher says of a process: environments as real launchers set them (Slurm 22.05, Open MPI 4.1), and contradictions."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from megatronish.errors import UserError
from megatronish.parallel.launchers import FIRST_PORT, LAST_PORT, NUM_PORTS, ports_of
from megatronish.parallel.rendezvous import Place, find_place

# What sbatch sets in its script; srun's tasks inherit it.
BATCH = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "node[001-004]",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "4",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "2(x4)",
}
# The last of five tasks on three of those nodes.
SRUN_TASK = BATCH | {
    "SLURMD_NODENAME": "node004",
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "3",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "4",
    "SLURM_STEPID": "1",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NODELIST": "node[002-004]",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
}
ONE_TASK = {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
    "PMIX_NAMESPACE": "805109761",
    "PMIX_RANK": "3",
}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
FIVE = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = FIVE | {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "r", "TORCHELASTIC_USE_AGENT_STORE": "True"}
DEEPSPEED = FIVE | {"CROSS_RANK": "1", "CROSS_SIZE": "2", "LOCAL_SIZE": "2"}
TWO_HOSTS = {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}


def where(place: Place) -> tuple[int, int, int, int]:
    return place.rank, place.local_rank, place.world_size, place.local_world_size


def test_a_task_of_srun_knows_its_place_and_meets_at_the_first_host_of_its_step() -> None:
    place = find_place(SRUN_TASK)
    assert where(place) == (4, 0, 5, 1) and place.describe().endswith("launcher: srun (job 77, step 1)")
    assert place.master == ("node002", place.ports[0]) and (place.run_id, place.restart) == ("slurm-77.1", 0)
    first = find_place(SRUN_TASK | {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURMD_NODENAME": "node002"})
    assert where(first) == (0, 0, 5, 2) and first.ports == place.ports


def test_a_requeued_job_is_another_life() -> None:
    place = find_place(SRUN_TASK | {"SLURM_RESTART_COUNT": "2"})
    assert (place.run_id, place.restart) == ("slurm-77.1", 2)


@pytest.mark.parametrize(
    "shell",
    [BATCH, BATCH | {"SLURM_STEP_ID": "4294967291"}, BATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}],
    ids=["sbatch", "sbatch-with-step", "salloc-interactive-step"],
)
def test_a_shell_that_slurm_has_opened_is_no_rank(shell: dict[str, str]) -> None:
    assert find_place(shell) == Place("none (one process)")


def test_a_step_of_one_task_is_one_process() -> None:
    place = find_place(SRUN_TASK | ONE_TASK | {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURMD_NODENAME": "node002"})
    assert where(place) == (0, 0, 1, 1) and place.master is None and place.launcher.startswith("srun")


def test_the_scripts_own_master_and_port_are_taken() -> None:
    place = find_place(SRUN_TASK | {"MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "29501", "WORLD_SIZE": "5"})
    assert place.master == ("10.1.1.1", 29501) and place.ports == ()
    place = find_place(SRUN_TASK | {"MASTER_ADDR": "10.1.1.1"})
    assert place.master == ("10.1.1.1", place.ports[0])


@pytest.mark.parametrize("gpus", ["1", "h100:1"])
def test_a_gpu_of_its_own_is_known(gpus: str) -> None:
    assert find_place(SRUN_TASK | {"SLURM_GPUS_PER_TASK": gpus}).own_gpu
    assert not find_place(SRUN_TASK | {"SLURM_GPUS_PER_TASK": "8"}).own_gpu and not find_place(SRUN_TASK).own_gpu


@pytest.mark.parametrize(("five", "launcher"), [(TORCHRUN, "torchrun"), (DEEPSPEED, "deepspeed"), (FIVE, "environment")])
@pytest.mark.parametrize("around", [{}, BATCH, SRUN_TASK, OPEN_MPI], ids=["alone", "sbatch", "srun", "mpirun"])
def test_five_variables_win(five: dict[str, str], launcher: str, around: dict[str, str]) -> None:
    place = find_place(around | five)
    assert (place.launcher, place.rank, place.local_rank, place.world_size) == (launcher, 3, 1, 4)
    assert place.local_world_size == 2 and place.master == ("10.0.0.1", 29500)


def test_a_life_of_torchrun_within_a_slurm_job_is_later_than_those_of_the_lives_before() -> None:
    def life(**changes: str) -> tuple[str, int]:
        place = find_place(SRUN_TASK | TORCHRUN | changes)
        return place.run_id, place.restart

    first, again = life(), life(TORCHELASTIC_RESTART_COUNT="3")
    requeued = life(SLURM_RESTART_COUNT="1", TORCHELASTIC_RESTART_COUNT="0")
    assert first[0] == again[0] == requeued[0] and first[0].startswith("slurm-") and first[1] < again[1] < requeued[1]
    # Of `--nproc` the id says who its launcher is.
    assert life(TORCHELASTIC_RUN_ID="local-12-ab")[0] == "local-12-ab"


def test_mpirun_on_one_host_meets_at_loopback() -> None:
    place = find_place(OPEN_MPI)
    assert where(place) == (3, 3, 8, 8) and place.launcher == "mpirun (Open MPI)"
    assert place.master == ("127.0.0.1", place.ports[0]) and place.run_id == "mpi-805109761"


def test_mpirun_inside_a_slurm_job_wins_over_the_daemon_it_descends_from() -> None:
    daemon = SRUN_TASK | {
        "SLURM_PROCID": "2",
        "SLURM_NTASKS": "3",
        "SLURM_STEP_NUM_TASKS": "3",
        "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
    }
    place = find_place(daemon | OPEN_MPI | TWO_HOSTS)
    # The daemons' step leaves out the host of mpirun itself, the job's list has it.
    assert where(place) == (3, 1, 8, 2) and place.master == ("node001", place.ports[0])


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (SRUN_TASK | {"PMI_RANK": "4", "PMI_SIZE": "5", "PMI_JOBID": "77.1"}, "srun (job 77, step 1)"),
        (SRUN_TASK | PMI, "mpiexec (PMI)"),
    ],
    ids=["srun --mpi=pmi2", "hydra"],
)
def test_pmi_is_srun_where_both_say_the_same(environment: dict[str, str], expected: str) -> None:
    assert find_place(environment).launcher == expected


class FakeWorld:
    """mpi4py's COMM_WORLD of one process that hears what rank 0 has said."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def bcast(self, value: Any) -> Any:
        return ("host-a", 4321) if value is None else value


def test_mpirun_over_hosts_asks_mpi4py_where_rank_0_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", SimpleNamespace(COMM_WORLD=FakeWorld(3, 8)))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace())  # type: ignore[arg-type]
    place = find_place(OPEN_MPI | TWO_HOSTS)
    assert place.master == ("host-a", 4321) and place.launcher == "mpirun (Open MPI), mpi4py" and place.ports == ()
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", SimpleNamespace(COMM_WORLD=FakeWorld(0, 1)))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"mpi4py says rank 0 of 1, mpirun .* 3 of 8: mpi4py was built for another MPI"):
        find_place(OPEN_MPI | TWO_HOSTS)


def changed(environment: dict[str, str], **changes: str | None) -> dict[str, str]:
    return {name: value for name, value in {**environment, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (changed(SRUN_TASK, SLURM_PROCID=None), "sets SLURM_STEP_ID but not SLURM_PROCID"),
        (changed(SRUN_TASK, SLURM_JOB_ID=None, SLURM_NTASKS=None), "but not SLURM_NTASKS, SLURM_JOB_ID"),
        (changed(SRUN_TASK, SLURM_PROCID="5"), "SLURM_PROCID=5 must be below SLURM_NTASKS=5"),
        (changed(SRUN_TASK, SLURM_PROCID="-1"), "SLURM_PROCID='-1' in the environment is not a number"),
        (changed(SRUN_TASK, SLURM_NTASKS="8"), "SLURM_NTASKS=8, but srun has started SLURM_STEP_NUM_TASKS=5 tasks"),
        (
            changed(SRUN_TASK, SLURM_STEP_TASKS_PER_NODE="2(x4)"),
            "do not go with SLURM_STEP_TASKS_PER_NODE=2(x4) (8 tasks on 4 nodes)",
        ),
        (changed(SRUN_TASK, SLURM_STEP_TASKS_PER_NODE="two"), "SLURM_STEP_TASKS_PER_NODE='two' is not a list of counts"),
        (changed(SRUN_TASK, SLURM_LOCALID="1"), "SLURM_LOCALID=1 must be below the tasks of this node=1"),
        (changed(SRUN_TASK, SLURM_STEP_NODELIST="node[2"), "SLURM_STEP_NODELIST='node[2' is not a list of hosts"),
        (
            changed(SRUN_TASK, SLURM_PROCID="0", SLURM_NODEID="0"),
            "rank 0 runs on node004, but the first host of SLURM_STEP_NODELIST is",
        ),
        (
            changed(SRUN_TASK, WORLD_SIZE="16"),
            "WORLD_SIZE=16 in the environment, but srun (job 77, step 1) says 5: unset WORLD_SIZE",
        ),
        (changed(SRUN_TASK, RANK="0"), "RANK=0 in the environment, but srun (job 77, step 1) says 4"),
        (changed(SRUN_TASK, MASTER_PORT="0"), "MASTER_PORT=0 in the environment must be from 1 to 65535"),
        (changed(SRUN_TASK | FIVE, WORLD_SIZE="5"), "RANK=3 in the environment, but srun says SLURM_PROCID=4 of 5"),
        (changed(BATCH, RANK="0", WORLD_SIZE="8"), "sets RANK, WORLD_SIZE but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (
            changed(OPEN_MPI, OMPI_COMM_WORLD_SIZE=None),
            "sets OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_LOCAL_RANK, OMPI_COMM_WORLD_LOCAL",
        ),
        (changed(OPEN_MPI, OMPI_COMM_WORLD_RANK="8"), "OMPI_COMM_WORLD_RANK=8 must be below OMPI_COMM_WORLD_SIZE=8"),
        (changed(OPEN_MPI, WORLD_SIZE="4"), "WORLD_SIZE=4 in the environment, but mpirun (Open MPI) says 8"),
        (changed(OPEN_MPI, **TWO_HOSTS), "does not say where rank 0 of 8 is: install mpi4py, or set MASTER_ADDR"),
        (changed(PMI), "mpiexec (PMI) does not say where rank 0 of 4 is"),
        (changed(PMI, MPI_LOCALRANKID=None), "but not MPI_LOCALRANKID"),
    ],
)
def test_a_contradiction_is_one_line_that_names_it(
    environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # type: ignore[arg-type]
    with pytest.raises(UserError) as caught:
        find_place(environment)
    (line,) = str(caught.value).splitlines()
    assert words in line


def test_local_rank_of_the_command_line_must_be_the_environments() -> None:
    assert find_place(DEEPSPEED, local_rank=1) == find_place(DEEPSPEED)
    with pytest.raises(UserError, match=r"--local_rank 0, but the environment says 1 \(deepspeed\)"):
        find_place(DEEPSPEED, local_rank=0)
    with pytest.raises(UserError, match=r"--local_rank 3, but the environment says 0 \(none"):
        find_place({}, local_rank=3)


def test_ports_follow_from_the_job_and_lie_below_those_of_outgoing_connections() -> None:
    sequences = [ports_of(f"slurm-{job}.0") for job in range(1000)]
    assert sequences[5] == ports_of("slurm-5.0") and all(len(set(ports)) == NUM_PORTS for ports in sequences)
    assert all(FIRST_PORT <= port <= LAST_PORT < 32_768 for ports in sequences for port in ports)
    # Jobs in a row begin at different ports: 1,000 in 12,000 places, drawn, meet about 40 times.
    assert len({ports[0] for ports in sequences}) > 900
