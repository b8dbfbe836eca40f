"""`megatronish eval RUN --data PREFIX`: perplexity, bits per byte and per token of a run's newest checkpoint, on any layout."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from megatronish import checkpointing
from megatronish.assemble import CutModel, build_pipeline, cut_model, evaluation_steps, mesh_shape
from megatronish.checkpoint.load import Checkpoint, find_checkpoints, newest_loadable
from megatronish.comm import all_reduce, streams
from megatronish.comm.groups import world_group
from megatronish.comm.host import read_values
from megatronish.config import Config
from megatronish.config_loader import load_config
from megatronish.data.gpt_dataset import GPTDataset, TokenDataset
from megatronish.data.loader import evaluation_batches
from megatronish.errors import UserError
from megatronish.json_file import writable, write_json
from megatronish.kernel_choices import use_saved
from megatronish.local_launch import end_with_launcher, must_launch, run_local
from megatronish.parallel.mesh import Mesh, build_mesh
from megatronish.parallel.rendezvous import connect, disconnect, find_place
from megatronish.rank_failure import RankGuard
from megatronish.run_folder import RunFolder
from megatronish.startup import config_facts, require_agreement, version_facts
from megatronish.text_measure import TextMeasure
from megatronish.trainer import evaluate_batch

_MICROBATCHES = 4
_MAX_EXPONENT = 700.0

Progressed = Callable[[int, int], None]
"""Called with (batches done, batches in all)."""


@dataclass(frozen=True)
class Request:
    """What is to be evaluated, on what."""

    run: Path
    data: str
    overrides: tuple[str, ...] = ()
    num_batches: int | None = None
    """Global batches of the run; None: the whole set."""
    json_file: Path | None = None


@dataclass(frozen=True)
class Evaluation:
    """A model's measures on a set. All but the last digits are the same for every layout."""

    run: str
    step: int
    data: str
    samples: int
    tokens: int
    """Targets: each sample's sequence_length."""
    nats_per_token: float
    bits_per_token: float
    perplexity: float
    bits_per_byte: float | None
    """None where the run's config has no data.tokenizer."""


class FirstSamples:
    """The first `length` samples of a dataset."""

    def __init__(self, dataset: TokenDataset, length: int) -> None:
        self.dataset, self.sequence_length = dataset, dataset.sequence_length
        self._length = min(length, len(dataset))

    @property
    def fingerprint(self) -> int:
        """Of the whole set."""
        return self.dataset.fingerprint

    def __len__(self) -> int:
        return self._length

    def tokens(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [len(ids), S+1]."""
        return self.dataset.tokens(ids)

    def document_numbers(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [len(ids), S]."""
        return self.dataset.document_numbers(ids)


def main(
    run: str,
    data: str,
    nproc: int | None,
    overrides: list[str] | None = None,
    num_batches: int | None = None,
    json_file: str | None = None,
) -> int:
    """Evaluate, in this process or in `nproc` new ones; the exit code. UserError for bad input, before anything is started."""
    place = find_place()
    request = Request(Path(run), data, tuple(overrides or ()), num_batches, Path(json_file) if json_file else None)
    if must_launch(place, nproc):
        prepare(request, nproc or 1)
        options = [] if num_batches is None else ["--batches", str(num_batches)]
        options += [] if json_file is None else ["--json", json_file]
        return run_local(["eval", run, "--data", data, *options, *request.overrides], nproc or 1)
    end_with_launcher(place)
    with RankGuard(place) as guard:
        config, dataset, measure = prepare(request, place.world_size)
        guard.run_folder = request.run
        streams.set_numerics(cpu_threads=config.train.cpu_threads, deterministic=config.train.deterministic)
        timeout = config.parallel.timeout_seconds
        device = connect(place, collective_seconds=timeout)
        facts = config_facts(config) | version_facts() | {"data": f"{dataset.fingerprint:016x}"}
        require_agreement(facts, world=world_group(device_kind=device.type), device=device)
        mesh = build_mesh(mesh_shape(config, place.world_size), place.rank, device=device, timeout_seconds=timeout)
        use_saved(config, request.run, device)
        result = evaluate_run(request, config, mesh, dataset, measure)
        if mesh.rank == 0:
            report(result, request.json_file)
        disconnect()
    return 0


def prepare(request: Request, world_size: int) -> tuple[Config, GPTDataset, TextMeasure | None]:
    """Open all that is needed. UserError for a run without a checkpoint, a bad override, or a set that is damaged or too small."""
    folder = RunFolder(request.run)
    if not folder.config_file.is_file():
        raise UserError(f"{request.run} is not the folder of a run: there is no {folder.config_file}; give RUN_ROOT/NAME of a run")
    if not find_checkpoints(folder.checkpoints):
        raise UserError(
            f"{request.run} has no checkpoint yet: {folder.checkpoints} is empty; a run saves every checkpoint.interval steps"
        )
    if request.json_file is not None:
        writable(request.json_file)
    config = evaluation_config(folder.config_file, request.overrides, world_size)
    dataset = GPTDataset(request.data, sequence_length=config.data.sequence_length, vocab_size=config.model.vocab_size)
    tokenizer = config.data.tokenizer
    measure = None if tokenizer is None else TextMeasure.load(tokenizer, vocab_size=config.model.vocab_size)
    if measure is not None:
        measure.check_made(request.data)
    return config, dataset, measure


def evaluation_config(config_file: Path, overrides: tuple[str, ...], world_size: int) -> Config:
    """The run's config on this job's ranks: all of them replicas, unless `overrides` say otherwise."""
    given = {key.strip(): value.strip() for key, _, value in (override.partition("=") for override in overrides)}
    layout = {"tensor": "1", "pipeline": "1", "data": "null", "sequence": "false", "recompute": "none"}
    layout |= {"schedule": "1f1b", "num_chunks": "1", "stage_layers": "null"}
    merged = [f"parallel.{key}={value}" for key, value in layout.items()]
    merged.append("train.batch_ramp=null")
    if "train.global_batch_size" not in given:
        micro = given.get("train.micro_batch_size", "")
        samples = int(micro) if micro.isdigit() else load_config(config_file).train.micro_batch_size
        # Whatever the layout, this is a whole number of microbatches, and enough of them to fill a pipeline.
        merged.append(f"train.global_batch_size={max(1, samples) * world_size * _MICROBATCHES}")
    return load_config(config_file, [*merged, *overrides], world_size=world_size)


def evaluate_run(request: Request, config: Config, mesh: Mesh, dataset: GPTDataset, measure: TextMeasure | None) -> Evaluation:
    """Load the newest checkpoint that verifies and measure it. Collective over the job; every rank gets the result."""
    is_first = mesh.rank == 0
    root = RunFolder(request.run).checkpoints
    checkpoint = newest_loadable(root, world=mesh.groups["world"], log=_tell if is_first else _keep_quiet, device=mesh.device)
    if checkpoint is None:
        raise UserError(f"there is no checkpoint in {root} any more")
    samples = len(dataset)
    if request.num_batches is not None:
        # Batches of the run's own size: the samples must not depend on this job's layout.
        samples = min(samples, request.num_batches * int(checkpoint.state["config"]["train"]["global_batch_size"]))
    with Progress(console=Console(stderr=True), disable=not (is_first and sys.stderr.isatty()), transient=True) as progress:
        task = progress.add_task("evaluating")
        loss_sum, num_targets = evaluate(
            config,
            mesh,
            FirstSamples(dataset, samples),
            load=partial(fill_weights, checkpoint, config),
            on_batch=lambda done, total: progress.update(task, completed=done, total=total),
        )
    checkpoint.close()
    nats = loss_sum / num_targets
    return Evaluation(
        run=str(request.run),
        step=checkpoint.step,
        data=request.data,
        samples=samples,
        tokens=int(num_targets),
        nats_per_token=nats,
        bits_per_token=nats / math.log(2.0),
        perplexity=math.exp(nats) if nats < _MAX_EXPONENT else math.inf,
        # Rank 0 alone reads the whole set for it.
        bits_per_byte=measure.bits_per_byte(dataset, loss_sum, samples) if measure is not None and is_first else None,
    )


def evaluate(
    config: Config, mesh: Mesh, dataset: TokenDataset, *, load: Callable[[CutModel], None], on_batch: Progressed | None = None
) -> tuple[float, float]:
    """(sum of token losses in nats, number of target tokens) of a model over every sample of `dataset`.

    `load` fills the weights of this rank's part. No gradients, no optimizer. Collective over the job; the host waits once."""
    cut = cut_model(config, mesh)
    load(cut)
    cut.model.eval()
    pipeline, steps = build_pipeline(config, mesh, cut.model), evaluation_steps(config, mesh)
    totals = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    num_batches = -(-len(dataset) // config.train.global_batch_size)
    batches = evaluation_batches(
        dataset,
        data_rank=mesh.index("dp"),
        data_size=mesh.size("dp"),
        global_batch_size=config.train.global_batch_size,
        separate_documents=config.data.separate_documents,
        device_copy=partial(streams.copy_to_device, device=mesh.device),
    )
    for number, batch in enumerate(batches, start=1):
        totals += evaluate_batch(pipeline, steps, batch, config.train.micro_batch_size, mesh)
        if on_batch is not None:
            on_batch(number, num_batches)
    loss_sum, num_targets = read_values(all_reduce(totals, mesh.groups["world"], what="held-out loss"), [1.0, 1.0])
    return loss_sum, num_targets


def fill_weights(checkpoint: Checkpoint, config: Config, cut: CutModel) -> None:
    """This rank's part of the weights. A run of another train.dtype will do: names and shapes count. UserError if they differ."""
    saved = checkpoint.tensors()
    specs = checkpointing.tensor_specs(config, cut.layout)
    checkpoint.check_tensors({name: (shape, saved[name][1] if name in saved else dtype) for name, (shape, dtype) in specs.items()})
    checkpointing.load_weights(checkpoint, cut)


def report(result: Evaluation, json_file: Path | None) -> None:
    """A table on standard output, and the same numbers as JSON."""
    table = Table("measure", "value")
    table.columns[1].justify = "right"
    for name, text in _rows(result):
        table.add_row(name, text)
    console = Console(width=None if sys.stdout.isatty() else 120)
    # A path that is cut in two cannot be copied.
    console.print(f"{result.run}, step {result.step}, on {result.data}", soft_wrap=True, markup=False, highlight=False)
    console.print(table)
    if json_file is not None:
        write_json(json_file, asdict(result))


def _rows(result: Evaluation) -> Iterator[tuple[str, str]]:
    yield "perplexity", f"{result.perplexity:.4f}"
    unknown = "not known: the run has no data.tokenizer"
    yield "bits per byte", unknown if result.bits_per_byte is None else f"{result.bits_per_byte:.5f}"
    yield "nats per token", f"{result.nats_per_token:.5f}"
    yield "bits per token", f"{result.bits_per_token:.5f}"
    yield "target tokens", f"{result.tokens:,}"
    yield "samples", f"{result.samples:,}"


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _keep_quiet(line: str) -> None:
    """Every rank learns the same verdict; one says it."""
