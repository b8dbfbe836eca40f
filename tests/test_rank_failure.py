"""Of many ranks that fail, one speaks; the exit code says why; a rank that only lost a peer says that in one line."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatronish import failures, rank_failure
from megatronish.errors import UserError
from megatronish.parallel.rendezvous import Place
from megatronish.rank_failure import RankGuard, lost_peer
from tests.ranks import ranks

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:31388. GLHF!"


class FakeBoard:
    """A store that lives."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}

    def add(self, key: str, amount: int) -> int:
        self.values[key] = self.values.get(key, 0) + amount
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def set(self, key: str, value: str) -> None:
        self.values[key] = 1


def fail_one_after_another(errors: dict[int, Exception], *, world_size: int = 4, folder: Path | None = None) -> dict[int, int]:
    """Ranks fail with these errors, in this order; their exit codes."""
    codes = {}
    for rank, error in errors.items():
        guard = RankGuard(Place("tests", rank=rank, world_size=world_size), linger_seconds=0.0)
        with pytest.raises(SystemExit) as end, guard:
            guard.run_folder = folder
            raise error
        assert isinstance(end.value.code, int)
        codes[rank] = end.value.code
    return codes


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> FakeBoard:
    """All ranks reach this store."""
    board = FakeBoard()
    monkeypatch.setattr(rank_failure, "shared_store", lambda place, timeout: board)
    return board


def test_bad_input_of_all_ranks_is_said_once(board: FakeBoard, capsys: pytest.CaptureFixture[str]) -> None:
    codes = fail_one_after_another({rank: UserError("a is wrong\nb is wrong") for rank in (2, 0, 3, 1)})
    assert set(codes.values()) == {2}
    assert capsys.readouterr().err == "error: a is wrong\nerror: b is wrong\n"


def test_different_bad_input_is_all_said(board: FakeBoard, capsys: pytest.CaptureFixture[str]) -> None:
    fail_one_after_another({0: UserError("a"), 1: UserError("b"), 2: UserError("a")})
    assert capsys.readouterr().err == "error: a\nerror: b\n"


def test_the_rank_that_serves_the_store_stays_until_the_others_have_asked(board: FakeBoard) -> None:
    begun, failed = time.monotonic(), []

    def wait(seconds: float) -> None:
        # Another rank fails while this one waits.
        failed.append(board.add("failed", 1) if len(failed) < 3 else 0)

    with pytest.raises(SystemExit), RankGuard(Place("tests", rank=0, world_size=4), linger_seconds=100.0, wait=wait):
        raise UserError("a")
    assert board.values["failed"] == 4 and time.monotonic() < begun + 50
    launcher_serves = Place("tests", rank=0, world_size=9, agent_serves=True)
    with pytest.raises(SystemExit), RankGuard(launcher_serves, wait=lambda _: pytest.fail("waited")):
        raise UserError("b")


def test_the_rank_that_fails_first_has_the_only_traceback(
    board: FakeBoard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").mkdir()
    codes = fail_one_after_another({3: KeyError("first"), 1: KeyError("second"), 0: RuntimeError(GLOO)}, folder=tmp_path)
    assert set(codes.values()) == {76}
    text = capsys.readouterr().err
    assert text.startswith("rank 3 of 4 failed:\nTraceback") and text.count("Traceback") == 1
    assert "first" in text and "second" not in text and "lost a peer" not in text
    logs = {rank: (tmp_path / f"logs/rank-{rank:05d}.log").read_text() for rank in (0, 1, 3)}
    assert "Traceback" in logs[3] and "second" in logs[1]
    assert "Connection closed by peer" in logs[0] and "Traceback" not in logs[0]


def test_of_many_that_lost_a_peer_that_nobody_explains_three_say_so_in_a_line_each(
    board: FakeBoard, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = fail_one_after_another({rank: RuntimeError(GLOO) for rank in range(1, 1024)}, world_size=1024)
    assert set(codes.values()) == {76} and len(codes) == 1023
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith("rank 1 of 1024 lost a peer: ") and second.startswith("rank 2 of 1024 lost a peer: ")
    assert third.startswith("rank 3 of 1024, and maybe others, lost a peer: ")


def test_without_a_store_every_rank_speaks_with_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rank_failure, "shared_store", lambda place, timeout: None)
    fail_one_after_another({0: UserError("a"), 1: UserError("b")})
    assert capsys.readouterr().err == "error: rank 0 of 4: a\nerror: rank 1 of 4: b\n"


@pytest.mark.parametrize("error", [UserError("bad"), KeyError("ours")])
def test_a_process_alone_lets_the_exception_pass(error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    with pytest.raises(type(error)), RankGuard(Place("none")) as guard:
        guard.run_folder = tmp_path
        raise error
    assert capsys.readouterr().err == ""
    assert str(error) in (tmp_path / "logs/rank-00000.log").read_text()


@pytest.mark.parametrize(
    ("text", "is_loss"),
    [
        (GLOO, True),
        ("[pair.cc:547] Connection reset by peer [10.0.0.7]:3", True),
        ("writev [10.0.0.7]:3: Broken pipe", True),
        ("NCCL error in: x.cpp:1, remote process exited or there was a network error, ncclRemoteError", True),
        ("recvValue failed on SocketImpl(fd=3): failed to recv, got 0 bytes. Connection was likely closed.", True),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
        ("the first batch gives loss nan and gradient norm nan", False),
    ],
)
def test_what_counts_as_a_lost_peer(text: str, is_loss: bool) -> None:
    assert (lost_peer(RuntimeError(text)) is not None) == is_loss
    assert lost_peer(UserError(text)) is None


def lose(rank: int, operation: Callable[[torch.Tensor], None]) -> str | None:
    """Rank 1 leaves; what `lost_peer` makes of what rank 0 gets then."""
    x = torch.ones(1 << 20)
    torch.distributed.all_reduce(x)  # both are connected
    if rank == 1:
        torch.distributed.destroy_process_group()
        return None
    try:
        operation(x)
    except RuntimeError as error:
        return lost_peer(error) or f"not recognised: {error}"
    return "nothing happened"


def reduce(x: torch.Tensor) -> None:
    torch.distributed.all_reduce(x)


def receive(x: torch.Tensor) -> None:
    torch.distributed.recv(x, 1)


def send(x: torch.Tensor) -> None:
    for _ in range(100):
        torch.distributed.send(x, 1)


def wait_for_all(x: torch.Tensor) -> None:
    torch.distributed.barrier()


@pytest.mark.parametrize("operation", [reduce, receive, send, wait_for_all])
def test_a_real_peer_that_vanishes_is_recognised(operation: Callable[[torch.Tensor], None]) -> None:
    seen = ranks(2).run(lose, operation, timeout=60)[0]
    assert "gloo" in seen and not seen.startswith("not recognised"), seen


def test_what_a_batch_script_found_in_order_is_the_nodes_fault_until_all_have_agreed(
    board: FakeBoard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def code(*, has_agreed: bool) -> object:
        guard = RankGuard(Place("tests", rank=1, world_size=4), linger_seconds=0.0)
        with pytest.raises(SystemExit) as end, guard:
            guard.run_folder, guard.has_agreed = tmp_path, has_agreed
            raise UserError("no such set")
        failure = failures.latest(tmp_path)
        assert failure is not None and failure.code == end.value.code
        return end.value.code

    assert code(has_agreed=False) == 2
    monkeypatch.setenv("MEGATRONISH_CHECKED", "1")
    assert code(has_agreed=False) == 76 and code(has_agreed=True) == 2
