"""Tokens a second of a training step: a layout on local processes against plain PyTorch in one process, interleaved.

The peer is the Hugging Face model of the same shape (step_peer.py). Where there are GPUs each rank has one, and the peer the first
of them: its memory must hold both. All processes are started first and stay; in each round one variant runs while the others wait,
so that noise hits both alike. On a GPU a turn begins with a step that is not timed and ends with giving cached memory back, so
that the other's activations find room. The limit, a product of matrices, is measured in every round too, by the peer's process.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from megatronish import __version__, formulas
from megatronish.assemble import Assembly, assemble, draw_weights, mesh_shape
from megatronish.bench.step_peer import check_peer, make_peer, matrix_tflops
from megatronish.bench.workers import Workers, processor_name
from megatronish.comm import streams
from megatronish.config import Config
from megatronish.data.gpt_dataset import SyntheticDataset
from megatronish.data.loader import BatchLoader
from megatronish.kernel_choices import choose_kernels
from megatronish.parallel.launchers import free_port
from megatronish.parallel.mesh import build_mesh
from megatronish.parallel.rendezvous import Place, connect, disconnect


@dataclass(frozen=True)
class StepBench:
    """What is measured."""

    config: Config
    num_ranks: int
    rounds: int
    steps: int
    """Steps a round, for each variant."""
    peer_threads: int
    """On CPU."""
    compiled: bool = False
    """The peer goes through torch.compile."""
    seconds: float | None = None
    """No round begins after this time from the start, but for the first."""

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.global_batch_size * self.config.data.sequence_length


class Turn(NamedTuple):
    """What one process says of its steps."""

    seconds: float
    cpu_seconds: float
    phases: dict[str, float]
    """Seconds of a step."""
    peak_bytes: int | None = None
    """Most that tensors held on the GPU since the start; None on CPU."""
    matrix_tflops: float | None = None
    """Of the limit, where this process measures it."""


def make_loader(config: Config, data_rank: int, data_size: int, device: torch.device | None = None) -> BatchLoader:
    """Synthetic samples, on `device`."""
    S, V = config.data.sequence_length, config.model.vocab_size
    dataset = SyntheticDataset(vocab_size=V, sequence_length=S, length=1 << 20)
    return BatchLoader(
        dataset,
        seed=config.train.seed,
        data_rank=data_rank,
        data_size=data_size,
        schedule=config.batch_schedule,
        separate_documents=config.data.separate_documents,
        device_copy=partial(streams.copy_to_device, device=device or torch.device("cpu")),
    )


@contextmanager
def rank_of_a_layout(config: Config, rank: int, num_ranks: int, port: int) -> Iterator[Assembly]:
    """One local rank's trainer with its first weights; the ranks meet at `port`, and part when they leave."""
    streams.set_numerics(cpu_threads=config.train.cpu_threads, deterministic=False)
    device = connect(Place("bench", rank, rank, num_ranks, num_ranks, master=("127.0.0.1", port)))
    mesh = build_mesh(mesh_shape(config, num_ranks), rank, device=device)
    loader = make_loader(config, mesh.index("dp"), mesh.size("dp"), device)
    run = assemble(config, mesh, loader)
    draw_weights(config, run.cut)
    run.optimizer.reset_master()
    yield run
    loader.close()
    disconnect()


def _serve_rank(commands: Connection, config: Config, rank: int, num_ranks: int, port: int) -> None:
    """One rank of our layout: builds the trainer and chooses kernels as `train` does, then makes as many steps as it is told."""
    kernels: list[str] = []
    with rank_of_a_layout(config, rank, num_ranks, port) as run:
        choose_kernels(config, run.mesh, before=(), tell=kernels.append)
        device, steps_before = run.mesh.device, 0
        commands.send(kernels)

        def steps(count: int) -> dict[str, float]:
            nonlocal steps_before
            phases: dict[str, float] = {}
            for result in run.trainer.fit(steps_before + 1, steps_before + count):
                # Reading waits for the device: there only after the last step.
                if device.type == "cpu" or result.step == steps_before + count:
                    for phase, seconds in run.trainer.clock.read().items():
                        phases[phase] = phases.get(phase, 0.0) + seconds / (count if device.type == "cpu" else 1)
            run.optimizer.ensure_parameters()
            steps_before += count
            return phases

        _take_turns(commands, device, steps)


def _serve_peer(commands: Connection, bench: StepBench) -> None:
    """Plain PyTorch: the same model, batch and microbatches, in one process. Measures the limit in each of its turns too."""
    config = bench.config
    torch.set_num_threads(bench.peer_threads)
    device = streams.choose_device(0, 1)
    loader = make_loader(config, 0, 1, device)
    step, steps_before = make_peer(config, device, compiled=bench.compiled), 0
    commands.send([])

    def steps(count: int) -> dict[str, float]:
        nonlocal steps_before
        for _ in range(count):
            steps_before += 1
            step(loader.batch(steps_before))
        return {}

    _take_turns(commands, device, steps, limit=lambda: matrix_tflops(device, config.train.dtype, bench.peer_threads))
    loader.close()


def _take_turns(
    commands: Connection,
    device: torch.device,
    steps: Callable[[int], dict[str, float]],
    limit: Callable[[], float | None] = lambda: None,
) -> None:
    """Until told 0: make as many steps as told, and answer with a Turn."""
    while (count := commands.recv()) > 0:
        if device.type == "cuda":
            steps(1)  # takes memory anew
        started, cpu = streams.wall_time(device), time.process_time()
        phases = steps(count)
        seconds, cpu = streams.wall_time(device) - started, time.process_time() - cpu
        peak = streams.peak_memory_bytes(device)
        turn = Turn(seconds, cpu, phases, peak, limit())
        streams.release_cached_memory(device)
        commands.send(turn)


def measure(bench: StepBench, on_round: Any = lambda number: None) -> dict[str, Any]:
    """Run the bench; rates are medians over rounds, the ratio the median of each round's ratio. UserError where there is no
    such peer."""
    check_peer(bench.config)
    config, port, begun = bench.config, free_port(), time.monotonic()
    ours, peer = Workers("megatronish"), Workers(_peer_name(bench))
    turns: dict[str, list[Turn]] = {ours.name: [], peer.name: []}
    try:
        for rank in range(bench.num_ranks):
            ours.start(_serve_rank, config, rank, bench.num_ranks, port)
        peer.start(_serve_peer, bench)
        kernels = ours.answers()[0]
        peer.answers()
        for variant in (ours, peer):
            variant.run(1)  # warm-up
        for number in range(bench.rounds):
            if number and bench.seconds is not None and time.monotonic() - begun > bench.seconds:
                break
            for variant in (ours, peer):
                answers = variant.run(bench.steps)
                variant.rates.append(bench.steps * bench.tokens_per_step / max(turn.seconds for turn in answers))
                variant.cpu_seconds.append(sum(turn.cpu_seconds for turn in answers) / bench.steps)
                variant.phases += [turn.phases for turn in answers]
                turns[variant.name] += answers
            on_round(number)
    finally:
        ours.stop()
        peer.stop()
    return _summary(bench, ours, peer) | _against_limits(bench, ours, peer, turns) | {"kernels": kernels}


def _peer_name(bench: StepBench) -> str:
    name = {"llama": "Llama", "gpt2": "GPT-2"}[bench.config.model.architecture]
    return f"Hugging Face {name}, one process" + (", torch.compile" if bench.compiled else "")


def _against_limits(bench: StepBench, ours: Workers, peer: Workers, turns: dict[str, list[Turn]]) -> dict[str, Any]:
    """Model FLOPs a second against the matrix rate of the same run and the published peak, a device; and memory."""
    config = bench.config
    on_gpu = turns[peer.name][0].peak_bytes is not None
    matrix = statistics.median(turn.matrix_tflops or 0.0 for turn in turns[peer.name])
    name = streams.device_name(streams.choose_device(0, 1)) if on_gpu else processor_name()
    published = formulas.peak_tflops(name, config.train.dtype) if on_gpu else None
    tflops = {}
    for variant in (ours, peer):
        devices = bench.num_ranks if on_gpu and variant is ours else 1
        of_token = formulas.flops_per_token(config.model, config.data.sequence_length)
        tflops[variant.name] = statistics.median(variant.rates) * of_token / devices / 1e12
    return {
        "device": name,
        "parameters": formulas.num_parameters(config.model),
        "matrix_tflops": matrix,
        "published_peak_tflops": published,
        "model_tflops": tflops,
        "fraction_of_matrix_rate": {of: value / matrix for of, value in tflops.items()},
        "mfu": {of: value / published if published else None for of, value in tflops.items()},
        "peak_memory_bytes": {of: max(t.peak_bytes for t in its) if on_gpu else None for of, its in turns.items()},  # type: ignore[type-var]
    }


def _summary(bench: StepBench, ours: Workers, peer: Workers) -> dict[str, Any]:
    parallel = bench.config.parallel
    phases = sorted({phase for row in ours.phases for phase in row})
    return {
        "bench": "step",
        "layout": f"tp{parallel.tensor} pp{parallel.pipeline} dp{bench.config.data_parallel_size(bench.num_ranks)}"
        + (" sequence parallel" if parallel.sequence else "")
        + f" ZeRO {parallel.zero_stage}",
        "num_ranks": bench.num_ranks,
        "dtype": bench.config.train.dtype,
        "tokens_per_step": bench.tokens_per_step,
        "micro_batch_size": bench.config.train.micro_batch_size,
        "rounds": len(ours.rates),
        "steps_per_round": bench.steps,
        "tokens_per_second": {v.name: statistics.median(v.rates) for v in (ours, peer)},
        "all_tokens_per_second": {v.name: v.rates for v in (ours, peer)},
        "cpu_seconds_per_step": {v.name: statistics.median(v.cpu_seconds) for v in (ours, peer)},
        "ratio": statistics.median(a / b for a, b in zip(ours.rates, peer.rates, strict=True)),
        "phase_seconds": {phase: statistics.median(row[phase] for row in ours.phases) for phase in phases},
        "peer_threads": bench.peer_threads,
        "versions": {"megatronish": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "date": time.strftime("%Y-%m-%d"),
    }
