"""What the history of calls costs a training step: the time of one record x the records of a step / the time of a step.

Steps with and without it differ by less than the noise of a busy machine, so its parts are measured where they can be: the records
by themselves, on a history whose ring is full, under as many frames as a call of the trainer has; their number in a real step. All
times are seconds of a processor that one rank used, so that other processes do not count.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from megatronish import __version__
from megatronish.bench.step import rank_of_a_layout
from megatronish.bench.workers import Workers, processor_name
from megatronish.comm.history import Call, History, recording
from megatronish.config import Config
from megatronish.parallel.launchers import free_port

DEPTH = 25
"""Frames above a call of the trainer; only those inside comm/ are walked."""


def microseconds_a_record(rounds: int, *, count: int = 20_000) -> float:
    """Median over rounds of a call, its wait and its end, by halves: a call and a wait are a record each."""
    history = History()
    call = Call("all_reduce", "tp", 65_536, "float32", "sum", what="layers.17.attention.out")
    seconds = []
    with recording(history):
        for _ in range(rounds + 1):
            started = time.process_time()
            _at_depth(DEPTH, history, call, count)
            seconds.append(time.process_time() - started)
    return statistics.median(seconds[1:]) / (2 * count) * 1e6  # the first round fills the ring


def _at_depth(depth: int, history: History, call: Call, count: int) -> None:
    if depth:
        return _at_depth(depth - 1, history, call, count)
    for _ in range(count):
        number = history.call(call)
        history.begin_wait("tp", number)
        history.end_wait()


def _serve_rank(commands: Any, config: Config, rank: int, num_ranks: int, port: int) -> None:
    """One rank: answers each number of steps with (CPU seconds, records) of one."""
    with rank_of_a_layout(config, rank, num_ranks, port) as run:
        step = 1
        commands.send(None)
        while (count := commands.recv()) > 0:
            started = time.process_time()
            with recording(History(most=None)) as history:
                for _ in run.trainer.fit(step, step + count - 1):
                    pass
                run.optimizer.ensure_parameters()
            commands.send(((time.process_time() - started) / count, len(history.entries) / count))
            step += count


def measure(config: Config, num_ranks: int, rounds: int) -> dict[str, Any]:
    """The cost as a share of a step: the most records of a rank, the shortest time of one."""
    ranks, port = Workers("ranks"), free_port()
    try:
        for rank in range(num_ranks):
            ranks.start(_serve_rank, config, rank, num_ranks, port)
        ranks.answers()
        ranks.run(1)  # the first step fills caches
        steps = [ranks.run(1) for _ in range(rounds)]
    finally:
        ranks.stop()
    seconds = statistics.median(min(row[0] for row in step) for step in steps)
    records = max(row[1] for row in steps[-1])
    each = microseconds_a_record(rounds)
    return {
        "bench": "history",
        "microseconds_a_record": each,
        "records_a_step": records,
        "cpu_seconds_a_step": seconds,
        "share_of_a_step": each * 1e-6 * records / seconds,
        "num_ranks": num_ranks,
        "device": processor_name(),
        "date": time.strftime("%Y-%m-%d"),
        "megatronish": __version__,
    }
