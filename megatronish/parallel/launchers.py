"""What each launcher says of a process, read from a mapping of environment variables: pure functions, one a launcher.

Who wins where several speak: the five variables of torchrun and deepspeed (their processes may well be children of an srun task);
then Open MPI's (mpirun inside a Slurm job starts its daemons with srun, and their children inherit the daemon's SLURM_PROCID); then
PMI's where it contradicts srun (the same of Hydra); then srun; then nobody: a shell that sbatch or salloc has opened is no rank,
though it has a SLURM_PROCID."""

from __future__ import annotations

import importlib
import socket
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from megatronish.errors import UserError
from megatronish.parallel.nodelist import expand_counts, expand_hosts

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ALONE = "none (one process)"
NUM_PORTS = 16
FIRST_PORT, LAST_PORT = 20_000, 31_999
"""Below 32,768, where Linux takes the ports of outgoing connections from."""
_NODELISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
LOCAL_RUN = "local-"
"""What the run id begins with where `--nproc` has started the ranks."""
_RESTARTS_OF_TORCHRUN = 1_000
_NO_STEP = 4_294_967_000
"""Slurm numbers what is not a step from here: the shell of sbatch, the interactive one of salloc."""

Environment = Mapping[str, str]


@dataclass(frozen=True)
class Place:
    """Where a process stands in its job, as the launcher says."""

    launcher: str
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    run_id: str = "none"
    restart: int = 0
    master: tuple[str, int] | None = None
    """Host and port where the ranks meet."""
    agent_serves: bool = False
    """The launcher itself answers there, and outlives every rank."""
    ports: tuple[int, ...] = ()
    """Where nobody has chosen a port: at the first of these that is free, rank 0 says where its store is (parallel/meeting.py)."""
    own_gpu: bool = False
    """The launcher shows each rank the one GPU that is its own."""

    @property
    def launch(self) -> str:
        """Names this start of the ranks, as well as the launcher does."""
        return f"{self.run_id}/{self.restart}"

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"rank {self.rank} of {self.world_size} (local {self.local_rank} of {self.local_world_size}), launcher: {self.launcher}"
        )


def place_of(environment: Environment) -> Place:
    """Read the launcher's variables. UserError where only some are set, or they contradict each other."""
    if all(name in environment for name in VARIABLES):
        return _from_five(environment)
    if "OMPI_COMM_WORLD_RANK" in environment or "OMPI_COMM_WORLD_SIZE" in environment:
        return _from_open_mpi(environment)
    in_step = _is_task_of_step(environment)
    if ("PMI_RANK" in environment or "PMI_SIZE" in environment) and not (in_step and _pmi_is_srun(environment)):
        return _from_pmi(environment)
    if in_step:
        return _from_srun(environment)
    given = [name for name in VARIABLES if name in environment]
    if not given:
        return Place(ALONE)
    missing = [name for name in VARIABLES if name not in environment]
    raise UserError(f"the environment sets {', '.join(given)} but not {', '.join(missing)}: set all five, or none for one process")


def ports_of(job: str) -> tuple[int, ...]:
    """Ports to try in turn, the same on every rank of a job, others for most other jobs."""
    count = LAST_PORT - FIRST_PORT + 1
    start = zlib.crc32(job.encode())
    # 7 apart: two jobs whose sequences touch at one port go different ways from there.
    return tuple(FIRST_PORT + (start + 7 * attempt) % count for attempt in range(NUM_PORTS))


def _from_five(environment: Environment) -> Place:
    """torchrun, deepspeed, or whoever sets the same variables."""
    numbers = {name: number(environment, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    _check_below("RANK", numbers["RANK"], "WORLD_SIZE", numbers["WORLD_SIZE"])
    # deepspeed's name for it is LOCAL_SIZE.
    size_name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environment else "LOCAL_SIZE"
    local_world_size = number(environment, size_name) if size_name in environment else numbers["LOCAL_RANK"] + 1
    _check_below("LOCAL_RANK", numbers["LOCAL_RANK"], size_name, local_world_size)
    launcher, run_id, restart = "environment", "none", 0
    if "TORCHELASTIC_RUN_ID" in environment:
        launcher, (run_id, restart) = "torchrun", _run_of_torchrun(environment)
    elif "CROSS_RANK" in environment and "LOCAL_SIZE" in environment:
        launcher = "deepspeed"
    elif _is_task_of_step(environment):
        _check_not_inherited(environment, numbers["RANK"], numbers["WORLD_SIZE"])
    return Place(
        launcher=launcher,
        rank=numbers["RANK"],
        local_rank=numbers["LOCAL_RANK"],
        world_size=numbers["WORLD_SIZE"],
        local_world_size=local_world_size,
        run_id=run_id,
        restart=restart,
        master=(environment["MASTER_ADDR"], _port(environment)),
        # torchrun's agent already serves a store there; anyone else leaves that to rank 0.
        agent_serves=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _run_of_torchrun(environment: Environment) -> tuple[str, int]:
    """(run id, number of the life). Within a Slurm job torchrun counts its own restarts anew in every life of the job."""
    restart = number(environment, "TORCHELASTIC_RESTART_COUNT", default=0)
    run_id = environment["TORCHELASTIC_RUN_ID"]
    if "SLURM_JOB_ID" not in environment or run_id.startswith(LOCAL_RUN):
        return run_id, restart
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", "0"))
    lives = number(environment, "SLURM_RESTART_COUNT", default=0)
    return f"slurm-{environment['SLURM_JOB_ID']}.{step}", lives * _RESTARTS_OF_TORCHRUN + restart


def _check_not_inherited(environment: Environment, rank: int, world_size: int) -> None:
    """What a batch script exports, every task of its srun gets: the same RANK for all."""
    tasks, task = (number(environment, name, default=0) for name in ("SLURM_NTASKS", "SLURM_PROCID"))
    if tasks == world_size > 1 and rank != task:
        raise UserError(
            f"RANK={rank} in the environment, but srun says SLURM_PROCID={task} of {tasks}: unset RANK and LOCAL_RANK before srun, "
            "which gives every task its own"
        )


def _from_srun(environment: Environment) -> Place:
    """A task of an srun step."""
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_JOB_ID")
    missing = [name for name in names if name not in environment]
    if missing:
        raise UserError(
            f"the environment sets SLURM_STEP_ID but not {', '.join(missing)}: start with srun, and pass all of SLURM_* on"
        )
    rank, local_rank, world_size = (number(environment, name) for name in names[:3])
    _check_below("SLURM_PROCID", rank, "SLURM_NTASKS", world_size)
    if number(environment, "SLURM_STEP_NUM_TASKS", default=world_size) != world_size:
        raise UserError(
            f"SLURM_NTASKS={world_size}, but srun has started SLURM_STEP_NUM_TASKS={environment['SLURM_STEP_NUM_TASKS']} tasks: "
            "do not set SLURM_NTASKS by hand"
        )
    local_world_size = _local_tasks(environment, world_size) or local_rank + 1
    _check_below("SLURM_LOCALID", local_rank, "the tasks of this node", local_world_size)
    job, step = environment["SLURM_JOB_ID"], environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", "0"))
    restart = number(environment, "SLURM_RESTART_COUNT", default=0)
    place = Place(
        launcher=f"srun (job {job}, step {step})",
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=local_world_size,
        run_id=f"slurm-{job}.{step}",
        restart=restart,
        # Tasks that share the node's GPUs are told apart by local rank; tasks that were given one each see only that.
        own_gpu=environment.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2] == "1",
    )
    return _with_meeting(place, environment, lambda: _first_host(environment, rank))


def _from_open_mpi(environment: Environment) -> Place:
    """Open MPI's mpirun."""
    names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    job = environment.get("PMIX_NAMESPACE", environment.get("OMPI_MCA_ess_base_jobid"))
    return _from_mpi(environment, names, "mpirun (Open MPI)", job)


def _from_pmi(environment: Environment) -> Place:
    """mpiexec of MPICH and its kin (Hydra)."""
    names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    job = environment.get("SLURM_JOB_ID")
    return _from_mpi(environment, names, "mpiexec (PMI)", None if job is None else f"slurm-{job}")


def _from_mpi(environment: Environment, names: tuple[str, str, str, str], launcher: str, job: str | None) -> Place:
    missing = [name for name in names if name not in environment]
    if missing:
        given = ", ".join(name for name in names if name in environment)
        raise UserError(f"the environment sets {given} but not {', '.join(missing)}: start with mpirun, and pass all it sets on")
    rank, world_size, local_rank, local_world_size = (number(environment, name) for name in names)
    _check_below(names[0], rank, names[1], world_size)
    _check_below(names[2], local_rank, names[3], local_world_size)
    place = Place(launcher, rank, local_rank, world_size, local_world_size, run_id=f"mpi-{job}" if job else "mpi")

    def first_host() -> str:
        if local_world_size == world_size and job is not None:
            return "127.0.0.1"
        if job is not None and "SLURM_JOB_NODELIST" in environment:  # mpirun fills the hosts of an allocation in its order
            return _first_host(environment, rank, ("SLURM_JOB_NODELIST",))
        raise UserError(
            f"{launcher} does not say where rank 0 of {world_size} is: install mpi4py, or set MASTER_ADDR (host of rank 0) and "
            f"MASTER_PORT (a free port there) for all ranks"
        )

    knows = job is not None and (local_world_size == world_size or "SLURM_JOB_NODELIST" in environment)
    if world_size > 1 and "MASTER_ADDR" not in environment and not knows:
        place = _ask_mpi4py(place) or place
    return _with_meeting(place, environment, first_host)


def _ask_mpi4py(place: Place) -> Place | None:
    """Let rank 0 tell its host through MPI itself; None where mpi4py is missing. Collective over the job."""
    try:
        communicator = importlib.import_module("mpi4py.MPI").COMM_WORLD
    except (ImportError, RuntimeError):  # RuntimeError: it finds no MPI library
        return None
    if (communicator.rank, communicator.size) != (place.rank, place.world_size):
        raise UserError(
            f"mpi4py says rank {communicator.rank} of {communicator.size}, {place.launcher} {place.rank} of {place.world_size}: "
            "mpi4py was built for another MPI than this mpirun"
        )
    host, port = communicator.bcast((socket.gethostname(), free_port()) if place.rank == 0 else None)
    run_id = f"{place.run_id}-{host}-{port}"
    return replace(place, launcher=f"{place.launcher}, mpi4py", master=(host, port), run_id=run_id)


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        port: int = listener.getsockname()[1]
    return port


def _with_meeting(place: Place, environment: Environment, first_host: Callable[[], str]) -> Place:
    """Add where the ranks meet: as MASTER_ADDR and MASTER_PORT say, else at rank 0's host, at a port that follows from the job."""
    said = {"RANK": place.rank, "LOCAL_RANK": place.local_rank, "WORLD_SIZE": place.world_size}
    for name, value in said.items():
        if name in environment and number(environment, name) != value:
            raise UserError(
                f"{name}={environment[name]} in the environment, but {place.launcher} says {value}: unset {name}, or set all of "
                f"{', '.join(VARIABLES)}"
            )
    if place.world_size == 1 or place.master is not None:
        return place
    host = environment["MASTER_ADDR"] if "MASTER_ADDR" in environment else first_host()
    if "MASTER_PORT" in environment:
        return replace(place, master=(host, _port(environment)))
    ports = ports_of(place.run_id)
    return replace(place, master=(host, ports[0]), ports=ports)


def _is_task_of_step(environment: Environment) -> bool:
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID"))
    return step is not None and step.isdecimal() and int(step) < _NO_STEP


def _pmi_is_srun(environment: Environment) -> bool:
    """`srun --mpi=pmi2` sets PMI's variables too, and they say the same."""
    pairs = (("PMI_RANK", "SLURM_PROCID"), ("PMI_SIZE", "SLURM_NTASKS"))
    return all(environment.get(pmi, environment.get(slurm)) == environment.get(slurm) for pmi, slurm in pairs)


def _local_tasks(environment: Environment, world_size: int) -> int | None:
    """How many tasks srun has started on this node; None if it does not say."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE")
    if text is None or "SLURM_NODEID" not in environment:
        return None
    counts, node = expand_counts(text), number(environment, "SLURM_NODEID")
    if sum(counts) != world_size or node >= len(counts):
        raise UserError(
            f"SLURM_NTASKS={world_size} and SLURM_NODEID={node} do not go with SLURM_STEP_TASKS_PER_NODE={text} "
            f"({sum(counts)} tasks on {len(counts)} nodes): do not set SLURM_* by hand"
        )
    return counts[node]


def _first_host(environment: Environment, rank: int, variables: tuple[str, ...] = _NODELISTS) -> str:
    """The first host of the step, which may leave out hosts of its job: rank 0 runs there, and UserError in rank 0 if not."""
    for variable in variables:
        if variable in environment:
            host = next(expand_hosts(environment[variable], variable=variable))
            own = environment.get("SLURMD_NODENAME", host)
            if rank == 0 and own != host:
                raise UserError(
                    f"rank 0 runs on {own}, but the first host of {variable} is {host}: set MASTER_ADDR={own} for all ranks"
                )
            return host
    raise UserError("the environment sets SLURM_STEP_ID but not SLURM_STEP_NODELIST: start with srun, and pass all of SLURM_* on")


def _check_below(name: str, value: int, limit_name: str, limit: int) -> None:
    if value >= limit:
        raise UserError(f"{name}={value} must be below {limit_name}={limit}: ranks count from 0")


def _port(environment: Environment) -> int:
    port = number(environment, "MASTER_PORT")
    if not 0 < port < 1 << 16:
        raise UserError(f"MASTER_PORT={port} in the environment must be from 1 to 65535")
    return port


def number(environment: Environment, name: str, *, default: int | None = None) -> int:
    """A variable that must hold a number >= 0. UserError by name."""
    if default is not None and name not in environment:
        return default
    text = environment[name].strip()
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"{name}={environment[name]!r} in the environment is not a number >= 0")
    return int(text)
