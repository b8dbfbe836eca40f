"""How a process learns its rank, and joins the others: the only reader of the launcher's environment variables.

Who says what is in launchers.py; where nobody says at which port the ranks meet, meeting.py finds one."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import random
import socket
import threading
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatronish.comm import streams
from megatronish.errors import Fault, UserError
from megatronish.parallel.launchers import ALONE, VARIABLES, Place, place_of
from megatronish.parallel.meeting import announce, look_up

__all__ = ["ALONE", "VARIABLES", "Place", "connect", "disconnect", "find_place", "shared_store"]


def find_place(environment: Mapping[str, str] | None = None, *, local_rank: int | None = None) -> Place:
    """Read the launcher's variables. UserError where only some are set, or they contradict each other, or `local_rank`, which
    deepspeed gives on the command line."""
    environment = os.environ if environment is None else environment
    threads = environment.get("OMP_NUM_THREADS")
    if threads is not None and not all(part.strip().isdecimal() and int(part) > 0 for part in threads.split(",")):
        raise UserError(f"OMP_NUM_THREADS={threads!r} in the environment is not a number >= 1: unset it; train.cpu_threads decides")
    place = place_of(environment)
    if local_rank is not None and local_rank != place.local_rank:
        raise UserError(
            f"--local_rank {local_rank}, but the environment says {place.local_rank} ({place.launcher}): leave --local_rank out; "
            "the launcher's variables decide"
        )
    return place


def connect(
    place: Place, *, timeout_seconds: float = 600.0, loopback_seconds: float = 30.0, collective_seconds: float = 600.0
) -> torch.device:
    """Choose this rank's device and join the job. Blocks until every rank is here. A collective of all ranks gives up after
    `collective_seconds`. UserError if rank 0 cannot be reached: after `timeout_seconds`; after `loopback_seconds` where a rank of
    another node than the first was sent to its own host."""
    local = (0, 1) if place.own_gpu and streams.num_gpus() == 1 else (place.local_rank, place.local_world_size)
    device = streams.choose_device(*local)
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "0") != "0" and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    if gpus and device.type == "cpu" and streams.is_gpu_build():
        # Else it would wait for the others with another backend than theirs.
        raise Fault(f"Slurm has given GPUs of {socket.gethostname()} to this job, but CUDA finds none: is its driver well?")
    if place.world_size == 1:
        return device
    _resolve(place)
    if place.ports:
        store = _meet(place, timeout_seconds)
    else:
        store = _meet_at_port(place, timeout_seconds, loopback_seconds=loopback_seconds)
    dist.init_process_group(
        streams.backend_of(device.type),
        store=_own_part(place, store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=datetime.timedelta(seconds=collective_seconds),
    )
    return device


def _meet_at_port(place: Place, timeout_seconds: float, *, loopback_seconds: float) -> dist.Store:
    """Join the store at MASTER_PORT; rank 0 serves it, unless the launcher does."""
    assert place.master is not None
    address, port = place.master
    serves = place.rank == 0 and not place.agent_serves
    if not serves:
        _wait_for_server(place, timeout_seconds, loopback_seconds=loopback_seconds)
    try:
        return dist.TCPStore(address, port, place.world_size, serves, datetime.timedelta(seconds=timeout_seconds))
    except RuntimeError as error:  # all of torch.distributed's are
        verb = "serve" if serves else "reach"
        reason = str(error).splitlines()[0]
        raise UserError(f"rank {place.rank} cannot {verb} MASTER_ADDR={address} MASTER_PORT={port}: {reason}") from error


def _meet(place: Place, timeout_seconds: float) -> dist.Store:
    """Join the store that rank 0 serves wherever there is a free port. Fault if rank 0 is not found, or ranks do not come."""
    assert place.master is not None
    host, timeout = place.master[0], datetime.timedelta(seconds=timeout_seconds)
    if place.rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        announce(place.ports, place.launch, store.port)
        _wait_for_all(place, store, timeout_seconds)
        return store
    stop = time.monotonic() + timeout_seconds
    while (port := look_up(host, place.ports, place.launch)) is None:
        if time.monotonic() > stop:
            raise Fault(
                f"rank {place.rank} finds no rank 0 of {place.launch} at {host}, ports {place.ports[0]}, {place.ports[1]}, ... in "
                f"{timeout_seconds:g} s: is it running there? Else set MASTER_ADDR to its host and MASTER_PORT to a free port there"
            )
        # Thousands of ranks ask one host, while it imports torch.
        time.sleep(random.uniform(0.5, 1.0) * min(2.0, 0.2 + place.world_size / 1000))
    try:
        store = dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
        _own_part(place, store).set(f"here/{place.rank}", "1")
    except RuntimeError as error:
        raise Fault(f"rank {place.rank} cannot reach rank 0 at {host}:{port}: {str(error).splitlines()[0]}") from error
    return store


def _wait_for_all(place: Place, store: dist.Store, timeout_seconds: float) -> None:
    own, stop, missing = _own_part(place, store), time.monotonic() + timeout_seconds, list(range(1, place.world_size))
    while missing := [rank for rank in missing if not own.check([f"here/{rank}"])]:
        if time.monotonic() > stop:
            named = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise Fault(
                f"{len(missing)} of {place.world_size} ranks have not come in {timeout_seconds:g} s: {named}; see what they say"
            )
        time.sleep(0.05)


def _own_part(place: Place, store: dist.Store) -> dist.Store:
    """A restarted generation must not read the addresses of the one before (gloo would connect to the dead)."""
    return dist.PrefixStore(f"megatronish/{place.launch}", store)


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
        host, port = place.master
        with contextlib.suppress(OSError, RuntimeError, UnicodeError):
            if place.ports:
                announced = look_up(host, place.ports, place.launch, timeout_seconds=0.5)
                if announced is None:
                    return
                port = announced
            socket.create_connection((host, port), timeout=timeout.total_seconds()).close()
            found.append(dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False))

    # Another program may hold the port and never answer: torch then waits on it without end, whatever its timeout.
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(2 * timeout.total_seconds())
    return _own_part(place, found[0]) if found else None


def disconnect() -> None:
    """Leave the job."""
    if dist.is_initialized():
        dist.destroy_process_group()
