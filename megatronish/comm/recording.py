"""A process group that writes down every call: alone, as a rank of a job of any size that does not exist, or around a gloo group.

It sits below torch.distributed, so it sees what a backend would see, whoever called; what did not come through `comm/` it adds to
the process's history. Without an inner group nothing is communicated and outputs keep what was in them: good for meta tensors,
which have no values.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatronish.comm.history import Call, History, recording

_counter = itertools.count()


@dataclass(frozen=True)
class Intercepted:
    """One call to a communicator, as a backend sees it."""

    operation: str
    """all_reduce, all_gather, reduce_scatter, send, receive or barrier."""
    axis: str
    """The group's description: a mesh axis, or `world`."""
    ranks: tuple[int, ...]
    """Global ranks of the group."""
    num_elements: int = 0
    """Of this rank's input (of the output for a receive)."""
    dtype: str = ""
    reduce_op: str = ""
    peer: int | None = None
    """Global rank, for send and receive."""
    tag: int = 0

    def __str__(self) -> str:
        peer = "" if self.peer is None else f" peer {self.peer} tag {self.tag}"
        return f"{self.operation} {self.reduce_op} {self.num_elements} x {self.dtype} on {self.axis}{list(self.ranks)[:4]}{peer}"


@dataclass
class Recorder:
    """The calls of one rank, in order."""

    calls: list[Intercepted] = field(default_factory=list)
    history: History = field(default_factory=lambda: History(most=None))
    """The same, as `comm/` says it, and what waits for what."""


class _Done(dist.Work):
    """The work of a call that was only written down."""

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


DONE = _Done()


class RecordingProcessGroup(dist.ProcessGroup):
    """Writes calls to `recorder` and passes them on to `inner`, where there is one."""

    # The ignores below: torch's stubs list what callers of a group may write; a subclass in Python is built from two arguments, and
    # its methods are called in one fixed way.
    def __init__(self, rank: int, ranks: tuple[int, ...], recorder: Recorder, inner: dist.ProcessGroupGloo | None) -> None:
        super().__init__(rank, len(ranks))  # type: ignore[call-arg]
        self.ranks = ranks
        self.recorder = recorder
        self.inner = inner
        self._name, self._description = "", "world"
        self._num_seen = 0

    def _pass_on(self, method: str, *arguments: Any) -> dist.Work:
        if self.inner is None:
            return DONE
        work: dist.Work = getattr(self.inner, method)(*arguments)
        return work

    def _all_gather(self, out: Tensor, x: Tensor, options: Any = None) -> dist.Work:
        self._record("all_gather", x)
        return self._pass_on("_allgather_base", out, x, options)

    def _reduce_scatter(self, out: Tensor, x: Tensor, options: Any = None) -> dist.Work:
        self._record("reduce_scatter", x, reduce_op=_op_name(options.reduceOp))
        return self._pass_on("_reduce_scatter_base", out, x, options)

    # torch.distributed calls the second name of each before 2.13; gloo's own groups have only that.
    all_gather_single = _allgather_base = _all_gather  # type: ignore[assignment]
    reduce_scatter_single = _reduce_scatter_base = _reduce_scatter  # type: ignore[assignment]

    def _record(self, operation: str, x: Tensor | None = None, **more: Any) -> None:
        size: dict[str, Any] = {} if x is None else {"num_elements": x.numel(), "dtype": str(x.dtype).removeprefix("torch.")}
        self.recorder.calls.append(Intercepted(operation, self._description, self.ranks, **size, **more))
        self._add_unannounced(self.recorder.calls[-1])

    def _add_unannounced(self, call: Intercepted) -> None:
        history, axis = self.recorder.history, self._description
        self._num_seen += 1
        if history.num_announced.get(axis, 0) < self._num_seen:
            place = None if call.peer is None else self.ranks.index(call.peer)
            size = (call.num_elements, call.dtype, call.reduce_op, place, call.tag)
            history.call(Call(call.operation, axis, *size, what="a call past megatronish/comm"))

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> dist.Work:  # type: ignore[override]
        self._record("all_reduce", tensors[0], reduce_op=_op_name(options.reduceOp))
        return self._pass_on("allreduce", tensors, options)

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> dist.Work:
        self._record("send", tensors[0], peer=self.ranks[peer], tag=tag)
        return self._pass_on("send", tensors, peer, tag)

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> dist.Work:
        self._record("receive", tensors[0], peer=self.ranks[peer], tag=tag)
        return self._pass_on("recv", tensors, peer, tag)

    def barrier(self, opts: Any = None) -> dist.Work:
        self._record("barrier")
        return self._pass_on("barrier", opts)

    # What torch.distributed asks of any group.
    def getBackendName(self) -> str:
        return "recording"

    @property
    def group_name(self) -> str:  # type: ignore[override]
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_desc(self) -> str:
        return self._description

    def _set_group_desc(self, description: str) -> None:
        self._description = "world" if description in ("", "default_pg", "undefined") else description


def _op_name(op: Any) -> str:
    kind = getattr(op, "op", op)  # options hold a ReduceOp around the plain RedOpType
    return str(kind).rsplit(".", 1)[-1].removesuffix(">").lower()


def register_recording_backend(recorder: Recorder, *, wrap_gloo: bool) -> str:
    """Register a backend whose groups record to `recorder`, around real gloo groups or around nothing; its name, for
    `init_process_group`. The process's history must be the recorder's (`history.recording`)."""

    def create(options: Any, _: Any) -> RecordingProcessGroup:
        ranks = tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
        inner = None
        if wrap_gloo:
            inner = dist.ProcessGroupGloo(options.store, options.group_rank, options.group_size, options.timeout)
        return RecordingProcessGroup(options.group_rank, ranks, recorder, inner)

    name = f"recording{next(_counter)}"
    register: Callable[..., None] = dist.Backend.register_backend
    register(name, create, extended_api=True, devices=["cpu", "meta"])
    return name


@contextmanager
def rehearsed_world(rank: int, world_size: int, recorder: Recorder | None = None) -> Iterator[Recorder]:
    """Be rank `rank` of a job of `world_size` ranks that does not exist: calls are recorded, nothing is sent. For meta tensors."""
    recorder = recorder or Recorder()
    with recording(recorder.history):
        if world_size > 1:
            backend = register_recording_backend(recorder, wrap_gloo=False)
            dist.init_process_group(backend, store=dist.HashStore(), rank=rank, world_size=world_size)
        try:
            yield recorder
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
