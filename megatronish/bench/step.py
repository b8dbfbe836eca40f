"""Tokens a second of a training step: a parallel layout on local CPU processes against plain PyTorch in one process, interleaved.

The peer is the Hugging Face Llama of the same shape with torch's fused AdamW and gradient clipping, on as many threads as the
machine has cores. All processes are started first and stay; in each round one variant runs while the others wait, so that noise
hits both alike.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from megatronish import __version__
from megatronish.assemble import DTYPES, Assembly, assemble, draw_weights, mesh_shape
from megatronish.bench.workers import Workers, processor_name
from megatronish.comm import streams
from megatronish.config import Config
from megatronish.data.gpt_dataset import SyntheticDataset
from megatronish.data.loader import BatchLoader
from megatronish.errors import UserError
from megatronish.interop.llama import write_config
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

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.global_batch_size * self.config.data.sequence_length


def make_loader(config: Config, data_rank: int, data_size: int) -> BatchLoader:
    """Synthetic samples."""
    S, V = config.data.sequence_length, config.model.vocab_size
    dataset = SyntheticDataset(vocab_size=V, sequence_length=S, length=1 << 20)
    return BatchLoader(
        dataset,
        seed=config.train.seed,
        data_rank=data_rank,
        data_size=data_size,
        schedule=config.batch_schedule,
        separate_documents=config.data.separate_documents,
    )


@contextmanager
def rank_of_a_layout(config: Config, rank: int, num_ranks: int, port: int) -> Iterator[Assembly]:
    """One local rank's trainer with its first weights; the ranks meet at `port`, and part when they leave."""
    streams.set_numerics(cpu_threads=config.train.cpu_threads, deterministic=False)
    device = connect(Place("bench", rank, rank, num_ranks, num_ranks, master=("127.0.0.1", port)))
    mesh = build_mesh(mesh_shape(config, num_ranks), rank, device=device)
    loader = make_loader(config, mesh.index("dp"), mesh.size("dp"))
    run = assemble(config, mesh, loader)
    draw_weights(config, run.cut)
    run.optimizer.reset_master()
    yield run
    loader.close()
    disconnect()


def _serve_rank(commands: Connection, config: Config, rank: int, num_ranks: int, port: int) -> None:
    """One rank of our layout: builds the trainer, then runs as many steps as it is told and answers with seconds by phase."""
    with rank_of_a_layout(config, rank, num_ranks, port) as run:
        step = 1
        commands.send(None)
        while (count := commands.recv()) > 0:
            phases: dict[str, float] = {}
            started, cpu = time.perf_counter(), time.process_time()
            for _ in run.trainer.fit(step, step + count - 1):
                for phase, seconds in run.trainer.clock.read().items():
                    phases[phase] = phases.get(phase, 0.0) + seconds / count
            run.optimizer.ensure_parameters()
            commands.send((time.perf_counter() - started, time.process_time() - cpu, phases))
            step += count


def _serve_peer(commands: Connection, config: Config, threads: int) -> None:
    """Plain PyTorch: the same model, batch and microbatches, in one process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    settings = write_config(config.model, config.data.sequence_length)
    model: torch.nn.Module = LlamaForCausalLM(LlamaConfig(**settings))
    model.to(DTYPES[config.train.dtype])
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, fused=True)
    loader = make_loader(config, 0, 1)
    step = 1
    commands.send(None)
    while (count := commands.recv()) > 0:
        started, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            microbatches = loader.batch(step).microbatches(config.train.micro_batch_size)
            for batch in microbatches:
                tokens, labels = batch.tokens_SB.t(), batch.labels_SB.t()
                logits = model(input_ids=tokens, use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
                (loss / len(microbatches)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        commands.send((time.perf_counter() - started, time.process_time() - cpu, {}))
    loader.close()


def measure(bench: StepBench, on_round: Any = lambda number: None) -> dict[str, Any]:
    """Run the bench on CPU; rates are medians over rounds, the ratio the median of each round's ratio."""
    config, port = bench.config, free_port()
    if config.model.architecture != "llama":
        raise UserError(f"model.architecture={config.model.architecture}: bench step compares with a Llama, so with llama")
    ours, peer = Workers("megatronish"), Workers("Hugging Face Llama, one process")
    try:
        for rank in range(bench.num_ranks):
            ours.start(_serve_rank, config, rank, bench.num_ranks, port)
        peer.start(_serve_peer, config, bench.peer_threads)
        for variant in (ours, peer):
            variant.answers()
            variant.run(1)  # warm-up
        for number in range(bench.rounds):
            for variant in (ours, peer):
                answers = variant.run(bench.steps)
                variant.rates.append(bench.steps * bench.tokens_per_step / max(seconds for seconds, _, _ in answers))
                variant.cpu_seconds.append(sum(cpu for _, cpu, _ in answers) / bench.steps)
                variant.phases += [phases for _, _, phases in answers]
            on_round(number)
    finally:
        ours.stop()
        peer.stop()
    return _summary(bench, ours, peer)


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
        "rounds": bench.rounds,
        "steps_per_round": bench.steps,
        "tokens_per_second": {v.name: statistics.median(v.rates) for v in (ours, peer)},
        "all_tokens_per_second": {v.name: v.rates for v in (ours, peer)},
        "cpu_seconds_per_step": {v.name: statistics.median(v.cpu_seconds) for v in (ours, peer)},
        "ratio": statistics.median(a / b for a, b in zip(ours.rates, peer.rates, strict=True)),
        "phase_seconds": {phase: statistics.median(row[phase] for row in ours.phases) for phase in phases},
        "peer_threads": bench.peer_threads,
        "versions": {"megatronish": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": processor_name(),
        "date": time.strftime("%Y-%m-%d"),
    }
