"""Where nobody has chosen a port: ranks find rank 0's store past busy ports, silent programs, and ranks 0 of other jobs."""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from megatronish.errors import UserError
from megatronish.parallel.meeting import announce, look_up
from megatronish.parallel.rendezvous import Place, connect, disconnect
from tests.ranks import ranks


def free_ports(count: int) -> tuple[int, ...]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return tuple(taken.getsockname()[1] for taken in sockets)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_busy_port_is_passed_over_by_all(stack: ExitStack) -> None:
    ports = free_ports(3)
    silent = stack.enter_context(socket.create_server(("", ports[0])))  # accepts, by its backlog, and says nothing
    talker = stack.enter_context(socket.create_server(("", ports[1])))

    def talk() -> None:
        while True:
            try:
                with talker.accept()[0] as connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 100)
            except OSError:
                return

    threading.Thread(target=talk, daemon=True).start()
    stack.enter_context(announce(ports, "job/0", 1234))
    assert silent.fileno() >= 0 and look_up("127.0.0.1", ports, "job/0", timeout_seconds=0.2) == 1234


def test_another_job_and_another_life_are_passed_over(stack: ExitStack) -> None:
    ports = free_ports(4)
    for token, port in (("other/0", 1), ("job/0", 2), ("job/1", 3)):
        stack.enter_context(announce(ports, token, port))
    assert [look_up("127.0.0.1", ports, token) for token in ("job/1", "job/0", "other/0", "job", "job/2")] == [3, 2, 1, None, None]


def test_a_thousand_ranks_at_once_are_answered(stack: ExitStack) -> None:
    ports, found = free_ports(1), []
    stack.enter_context(announce(ports, "job/0", 1234))
    threads = [
        threading.Thread(target=lambda: found.append(look_up("127.0.0.1", ports, "job/0", timeout_seconds=30))) for _ in range(1000)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1234] * 1000


def test_when_every_port_is_busy_one_line_says_what_to_set(stack: ExitStack) -> None:
    ports = free_ports(2)
    for port in ports:
        stack.enter_context(socket.create_server(("", port)))
    with pytest.raises(UserError, match=rf"busy on this host \({ports[0]}, {ports[1]}\): set MASTER_PORT to a free one"):
        announce(ports, "job/0", 1)


def meet(rank: int, place: Place, late: int | None) -> int:
    """Join as this rank of the pool, from a group of its own; what the ranks sum up to."""
    import torch
    import torch.distributed as dist

    from megatronish.comm.groups import world_group

    dist.barrier()  # the pool's own group is whole
    disconnect()
    if rank == late:
        time.sleep(1.0)
    connect(dataclasses.replace(place, rank=rank, local_rank=rank))
    total = torch.tensor([rank])
    dist.all_reduce(total)
    assert world_group(device_kind="cpu").size == place.world_size
    disconnect()
    return int(total)


@pytest.mark.parametrize("late", [None, 0, 2])
def test_real_ranks_meet_whoever_is_late_and_though_the_first_port_is_busy(late: int | None, stack: ExitStack) -> None:
    ports = free_ports(3)
    stack.enter_context(socket.create_server(("", ports[0])))
    place = Place("tests", world_size=3, local_world_size=3, run_id=f"t{late}", master=("127.0.0.1", ports[0]), ports=ports)
    assert ranks(3).run(meet, place, late) == [3, 3, 3]


def test_a_rank_0_that_is_not_there_is_named_with_its_host_and_job() -> None:
    ports = free_ports(2)
    place = Place("tests", rank=3, world_size=8, run_id="slurm-7.0", restart=1, master=("127.0.0.1", ports[0]), ports=ports)
    with pytest.raises(UserError, match=rf"rank 3 finds no rank 0 of slurm-7\.0/1 at 127\.0\.0\.1, ports {ports[0]}, .* in 0\.3 s"):
        connect(place, timeout_seconds=0.3)


def test_rank_0_names_the_ranks_that_have_not_come() -> None:
    ports = free_ports(2)
    place = Place("tests", world_size=4, run_id="alone", master=("127.0.0.1", ports[0]), ports=ports)
    with pytest.raises(UserError, match=r"3 of 4 ranks have not come in 0\.3 s: 1, 2, 3"):
        connect(place, timeout_seconds=0.3)
