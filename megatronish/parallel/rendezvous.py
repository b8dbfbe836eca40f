"""How a process learns its rank: the only reader of the launcher's environment variables.

torchrun (and whoever sets the same five variables), or alone. A half-set environment is refused by name.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatronish.comm import streams
from megatronish.errors import UserError

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


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

    def describe(self) -> str:
        """One line for the log."""
        return f"rank {self.rank} of {self.world_size} (local {self.local_rank} of {self.local_world_size}), launcher: {self.launcher}"


def find_place(environment: Mapping[str, str] | None = None) -> Place:
    """Read the launcher's variables. UserError where only some are set, or they contradict each other."""
    environment = os.environ if environment is None else environment
    given = [name for name in VARIABLES if name in environment]
    if not given:
        return Place("none (one process)")
    missing = [name for name in VARIABLES if name not in environment]
    if missing:
        raise UserError(f"the environment sets {', '.join(given)} but not {', '.join(missing)}: set all five, or none for one process")
    numbers = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not environment[name].strip().isdigit():
            raise UserError(f"{name}={environment[name]!r} in the environment is not a number >= 0")
        numbers[name] = int(environment[name])
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise UserError(f"RANK={numbers['RANK']} must be below WORLD_SIZE={numbers['WORLD_SIZE']}")
    return Place(
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in environment else "environment",
        rank=numbers["RANK"],
        local_rank=numbers["LOCAL_RANK"],
        world_size=numbers["WORLD_SIZE"],
        local_world_size=int(environment.get("LOCAL_WORLD_SIZE", numbers["LOCAL_RANK"] + 1)),
        run_id=environment.get("TORCHELASTIC_RUN_ID", "none"),
        restart=int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )


def connect(place: Place, *, timeout_seconds: float = 600.0) -> torch.device:
    """Choose this rank's device and join the job. Blocks until every rank is here."""
    device = streams.choose_device(place.local_rank, place.local_world_size)
    if place.world_size == 1:
        return device
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's agent already serves a store there; anyone else leaves that to rank 0.
    agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    try:
        store = dist.TCPStore(address, port, place.world_size, place.rank == 0 and not agent_serves, timeout)
    except (dist.DistNetworkError, dist.DistStoreError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"rank {place.rank} cannot reach MASTER_ADDR={address} MASTER_PORT={port}: {reason}") from error
    # A restarted generation must not read the addresses of the one before (gloo would connect to the dead).
    prefixed = dist.PrefixStore(f"megatronish/{place.run_id}/{place.restart}", store)
    dist.init_process_group(
        streams.backend_of(device.type), store=prefixed, rank=place.rank, world_size=place.world_size, timeout=timeout
    )
    return device


def disconnect() -> None:
    """Leave the job."""
    if dist.is_initialized():
        dist.destroy_process_group()
