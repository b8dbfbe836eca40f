"""Where a process learns its rank: what the environment may say, and what is refused by name."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from megatronish.errors import UserError
from megatronish.local_launch import must_launch
from megatronish.parallel.launchers import free_port
from megatronish.parallel.rendezvous import Place, connect, find_place, shared_store
from tests.parallel.test_launchers import ONE_TASK, SRUN_TASK

WHOLE = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "r", "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}


def test_no_variables_mean_one_process() -> None:
    place = find_place({"HOME": "/root"})
    assert (place.rank, place.world_size, place.launcher) == (0, 1, "none (one process)")


def test_a_whole_environment_is_taken_as_it_is() -> None:
    place = find_place(WHOLE)
    assert (place.rank, place.local_rank, place.world_size, place.local_world_size) == (3, 1, 4, 2)
    assert (place.launcher, place.master, place.agent_serves) == ("environment", ("10.0.0.1", 29500), False)


def test_torchrun_is_known_by_its_own_variables() -> None:
    place = find_place(WHOLE | TORCHRUN)
    assert (place.launcher, place.run_id, place.restart, place.agent_serves) == ("torchrun", "r", 2, True)
    assert "rank 3 of 4" in place.describe() and "torchrun" in place.describe()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"WORLD_SIZE": None}, ["sets", "RANK", "but not WORLD_SIZE"]),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, ["but not MASTER_ADDR, MASTER_PORT"]),
        ({"RANK": "4"}, ["RANK=4", "below WORLD_SIZE=4"]),
        ({"RANK": "-1"}, ["RANK='-1'", "not a number"]),
        ({"WORLD_SIZE": "four"}, ["WORLD_SIZE='four'", "not a number"]),
        ({"LOCAL_WORLD_SIZE": "x"}, ["LOCAL_WORLD_SIZE='x'"]),
        ({"LOCAL_RANK": "2"}, ["LOCAL_RANK=2", "below LOCAL_WORLD_SIZE=2"]),
        ({"MASTER_PORT": "70000"}, ["MASTER_PORT=70000", "65535"]),
        ({"OMP_NUM_THREADS": "0"}, ["OMP_NUM_THREADS='0'", "train.cpu_threads"]),
        ({"OMP_NUM_THREADS": "many"}, ["OMP_NUM_THREADS='many'"]),
    ],
)
def test_a_contradiction_is_refused_by_name(changes: dict[str, str | None], words: list[str]) -> None:
    environment = {name: value for name, value in {**WHOLE, **changes}.items() if value is not None}
    with pytest.raises(UserError) as caught:
        find_place(environment)
    assert len(str(caught.value).splitlines()) == 1
    for word in words:
        assert word in str(caught.value)


def test_nproc_starts_processes_only_where_no_launcher_did() -> None:
    alone, launched = find_place({}), find_place(WHOLE)
    assert must_launch(alone, 4) and not must_launch(alone, None) and not must_launch(alone, 1)
    assert not must_launch(launched, None) and not must_launch(launched, 4)
    with pytest.raises(UserError, match=r"--nproc 2.*WORLD_SIZE=4.*leave --nproc out"):
        must_launch(launched, 2)
    shell_of_srun = find_place({**SRUN_TASK, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", **ONE_TASK})
    assert must_launch(shell_of_srun, 4)


def test_an_address_that_does_not_resolve_is_refused_within_seconds() -> None:
    place = find_place(WHOLE | {"MASTER_ADDR": "no.such.host.invalid"})
    with pytest.raises(UserError, match=r"MASTER_ADDR=no\.such\.host\.invalid cannot be resolved"):
        connect(place)


def test_a_rank_0_that_never_comes_is_named_after_the_timeout() -> None:
    port = free_port()
    place = find_place(WHOLE | {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    with pytest.raises(UserError, match=rf"rank 1 cannot reach MASTER_ADDR=127\.0\.0\.1 MASTER_PORT={port} in 0\.5 s"):
        connect(place, timeout_seconds=0.5)


def test_a_busy_port_is_named_by_rank_0() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place = find_place(WHOLE | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        with pytest.raises(UserError, match=f"rank 0 cannot serve MASTER_ADDR=127.0.0.1 MASTER_PORT={port}"):
            connect(place, timeout_seconds=5)


def test_ranks_find_each_other_whoever_comes_first(tmp_path: object) -> None:
    # Rank 1 is there a second before rank 0 serves the store.
    from torch.distributed import TCPStore

    port, met = free_port(), threading.Event()
    place = Place("tests", rank=1, world_size=2, master=("127.0.0.1", port))

    def serve() -> None:
        time.sleep(1.0)
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        met.wait(30)
        del store

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        from datetime import timedelta

        from megatronish.parallel.rendezvous import _wait_for_server

        assert shared_store(place, timeout=timedelta(seconds=1)) is None
        _wait_for_server(place, timeout_seconds=30)
        first, second = (shared_store(place, timeout=timedelta(seconds=5)) for _ in range(2))
        assert first is not None and second is not None
        assert (first.add("key", 1), second.add("key", 1)) == (1, 2)
        other_life = shared_store(Place("tests", world_size=2, restart=1, master=("127.0.0.1", port)), timeout=timedelta(seconds=5))
        assert other_life is not None and other_life.add("key", 1) == 1
    finally:
        met.set()
        thread.join()
