"""How a process learns its rank: the only reader of the launcher's environment variables.

torchrun (and whoever sets the same five variables), or alone. A half-set environment is refused by name.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatronish.comm import streams
from megatronish.errors import UserError

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ALONE = "none (one process)"


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

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"rank {self.rank} of {self.world_size} (local {self.local_rank} of {self.local_world_size}), launcher: {self.launcher}"
        )


def find_place(environment: Mapping[str, str] | None = None) -> Place:
    """Read the launcher's variables. UserError where only some are set, or they contradict each other."""
    environment = os.environ if environment is None else environment
    threads = environment.get("OMP_NUM_THREADS")
    if threads is not None and not all(part.strip().isdecimal() and int(part) > 0 for part in threads.split(",")):
        raise UserError(f"OMP_NUM_THREADS={threads!r} in the environment is not a number >= 1: unset it; train.cpu_threads decides")
    given = [name for name in VARIABLES if name in environment]
    if not given:
        return Place(ALONE)
    missing = [name for name in VARIABLES if name not in environment]
    if missing:
        raise UserError(
            f"the environment sets {', '.join(given)} but not {', '.join(missing)}: set all five, or none for one process"
        )
    numbers = {name: _number(environment, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise UserError(f"RANK={numbers['RANK']} must be below WORLD_SIZE={numbers['WORLD_SIZE']}: ranks count from 0")
    if not 0 < numbers["MASTER_PORT"] < 1 << 16:
        raise UserError(f"MASTER_PORT={numbers['MASTER_PORT']} in the environment must be from 1 to 65535")
    local_world_size = _number(environment, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environment else numbers["LOCAL_RANK"] + 1
    if numbers["LOCAL_RANK"] >= local_world_size:
        raise UserError(f"LOCAL_RANK={numbers['LOCAL_RANK']} must be below LOCAL_WORLD_SIZE={local_world_size}: ranks count from 0")
    return Place(
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in environment else "environment",
        rank=numbers["RANK"],
        local_rank=numbers["LOCAL_RANK"],
        world_size=numbers["WORLD_SIZE"],
        local_world_size=local_world_size,
        run_id=environment.get("TORCHELASTIC_RUN_ID", "none"),
        restart=int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")),
        master=(environment["MASTER_ADDR"], numbers["MASTER_PORT"]),
        # torchrun's agent already serves a store there; anyone else leaves that to rank 0.
        agent_serves=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    if not environment[name].strip().isdecimal():
        raise UserError(f"{name}={environment[name]!r} in the environment is not a number >= 0")
    return int(environment[name])


def connect(place: Place, *, timeout_seconds: float = 600.0, loopback_seconds: float = 30.0) -> torch.device:
    """Choose this rank's device and join the job. Blocks until every rank is here. UserError if rank 0 cannot be reached: after
    `timeout_seconds`; after `loopback_seconds` where a rank of another node than the first was sent to its own host."""
    device = streams.choose_device(place.local_rank, place.local_world_size)
    if place.world_size == 1:
        return device
    assert place.master is not None
    address, port = place.master
    serves = place.rank == 0 and not place.agent_serves
    _resolve(place)
    if not serves:
        _wait_for_server(place, timeout_seconds, loopback_seconds=loopback_seconds)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    try:
        store = dist.TCPStore(address, port, place.world_size, serves, timeout)
    except RuntimeError as error:  # all of torch.distributed's are
        verb = "serve" if serves else "reach"
        reason = str(error).splitlines()[0]
        raise UserError(f"rank {place.rank} cannot {verb} MASTER_ADDR={address} MASTER_PORT={port}: {reason}") from error
    dist.init_process_group(
        streams.backend_of(device.type),
        store=_own_part(place, store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
    )
    return device


def _own_part(place: Place, store: dist.Store) -> dist.Store:
    """A restarted generation must not read the addresses of the one before (gloo would connect to the dead)."""
    return dist.PrefixStore(f"megatronish/{place.run_id}/{place.restart}", store)


def _resolve(place: Place, *, attempts: int = 5) -> None:
    """UserError if MASTER_ADDR has no address. torch asks for minutes, with a stack trace for each answer."""
    assert place.master is not None
    address, port = place.master
    for attempt in range(attempts):
        try:
            socket.getaddrinfo(address, port)
            return
        except OSError as error:
            reason = error.strerror or "no reason given"
        except UnicodeError:
            reason = "not the name of a host"
        if attempt + 1 < attempts:
            time.sleep(0.5)  # a name may appear a moment after its host has started
    raise UserError(f"MASTER_ADDR={address} cannot be resolved ({reason}): give the name or address of the host of rank 0")


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost" or address.startswith("localhost.")


def _wait_for_server(place: Place, timeout_seconds: float, *, loopback_seconds: float = 30.0) -> None:
    """Wait until something listens at the master's address; UserError after the timeout.

    Several nodes on one host may well meet at 127.0.0.1: there rank 0 answers in a moment. Where nobody does, and this rank is not
    of the node of rank 0 (which has rank = local rank), the address is the mistake, and no longer wait helps."""
    assert place.master is not None
    address, port = place.master
    own_host = _is_loopback(address) and place.rank != place.local_rank
    timeout_seconds = min(timeout_seconds, loopback_seconds) if own_host else timeout_seconds
    stop = time.monotonic() + timeout_seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=5.0).close()
            return
        except OSError as error:
            if time.monotonic() > stop:
                if own_host:
                    raise UserError(
                        f"MASTER_ADDR={address} is each host itself; nothing answers there at MASTER_PORT={port} in "
                        f"{timeout_seconds:g} s, and rank {place.rank} (LOCAL_RANK={place.local_rank}) is not on the node of rank "
                        f"0: set MASTER_ADDR to the name or address of the host of rank 0"
                    ) from None
                raise UserError(
                    f"rank {place.rank} cannot reach MASTER_ADDR={address} MASTER_PORT={port} in {timeout_seconds:g} s: "
                    f"{error.strerror or error}; is rank 0 running there?"
                ) from None
        time.sleep(0.2)


def shared_store(place: Place, *, timeout: datetime.timedelta) -> dist.Store | None:
    """A new connection to the job's store, for words between ranks when collectives no longer work; None if nobody serves it."""
    if place.master is None:
        return None
    found: list[dist.Store] = []

    def look() -> None:
        assert place.master is not None
        with contextlib.suppress(OSError, RuntimeError, UnicodeError):
            socket.create_connection(place.master, timeout=timeout.total_seconds()).close()
            found.append(dist.TCPStore(*place.master, is_master=False, timeout=timeout, wait_for_workers=False))

    # Another program may hold the port and never answer: torch then waits on it without end, whatever its timeout.
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(2 * timeout.total_seconds())
    return _own_part(place, found[0]) if found else None


def disconnect() -> None:
    """Leave the job."""
    if dist.is_initialized():
        dist.destroy_process_group()
