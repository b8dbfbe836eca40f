"""`megatronish train CONFIG`: builds a run from its config, resumes it, and does what follows a step: log, evaluate, save."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from megatronish import checkpointing, formulas
from megatronish.assemble import DTYPES, Assembly, assemble, draw_weights, mesh_shape
from megatronish.checkpoint.storage import FileStorage, Storage
from megatronish.comm import barrier, streams
from megatronish.comm.groups import world_group
from megatronish.comm.host import read_values
from megatronish.config import Config
from megatronish.config_loader import load_config
from megatronish.data.gpt_dataset import GPTDataset, TokenDataset
from megatronish.data.loader import BatchLoader, evaluation_batches
from megatronish.errors import UserError
from megatronish.local_launch import end_with_launcher, must_launch, run_local
from megatronish.observe.flops import measure_matmul_tflops
from megatronish.observe.log import setup_logging
from megatronish.observe.metrics import MetricsWriter
from megatronish.observe.progress import TrainingProgress
from megatronish.parallel.mesh import Mesh, build_mesh
from megatronish.parallel.rendezvous import Place, connect, disconnect, find_place
from megatronish.rank_failure import RankGuard
from megatronish.run_folder import RunFolder
from megatronish.startup import config_facts, dry_batch, require_agreement, version_facts
from megatronish.text_measure import TextMeasure
from megatronish.trainer import StepResult


@dataclass(frozen=True)
class Datasets:
    """What a run reads."""

    train: TokenDataset
    validation: TokenDataset | None
    measure: TextMeasure | None
    """Counts the bytes of the validation text, where a tokenizer is given."""


def open_datasets(config: Config) -> Datasets:
    """Open both sets in O(1) reads; UserError if they do not fit the config."""
    data, open_set = (
        config.data,
        partial(GPTDataset, sequence_length=config.data.sequence_length, vocab_size=config.model.vocab_size),
    )
    if data.validation is not None:
        train, validation = open_set(data.train), open_set(data.validation)
    elif data.validation_fraction > 0:
        split = partial(open_set, data.train, validation_fraction=data.validation_fraction)
        train, validation = split(split="train"), split(split="validation")
    else:
        train, validation = open_set(data.train), None
    measure = None
    if data.tokenizer is not None:
        measure = TextMeasure.load(data.tokenizer, vocab_size=config.model.vocab_size)
    return Datasets(train, validation, measure)


def main(config_path: str, overrides: list[str], nproc: int | None) -> int:
    """Train, in this process or in `nproc` new ones; the exit code. UserError for bad input, before anything is started."""
    place = find_place()
    if must_launch(place, nproc):
        config = load_config(config_path, overrides, world_size=nproc)
        open_datasets(config)
        RunFolder.of(config).prepare(config)
        return run_local(["train", config_path, *overrides], nproc or 1)
    end_with_launcher(place)
    with RankGuard(place) as guard:
        config = load_config(config_path, overrides, world_size=place.world_size)
        folder = RunFolder.of(config)
        guard.run_folder = folder.path
        streams.set_numerics(cpu_threads=config.train.cpu_threads, deterministic=config.train.deterministic)
        datasets = open_datasets(config)
        device = connect(place)
        world = world_group(device_kind=device.type)
        require_agreement(run_facts(config, datasets), world=world, device=device)
        mesh = build_mesh(mesh_shape(config, place.world_size), place.rank, device=device)
        train_in_folder(config, mesh, datasets, place)
        disconnect()
    return 0


def train_in_folder(config: Config, mesh: Mesh, datasets: Datasets, place: Place) -> None:
    """One rank's whole run in its run folder. Collective over the job."""
    folder = RunFolder.of(config)
    if mesh.rank == 0:
        folder.prepare(config)
    barrier(mesh.groups["world"])
    log = setup_logging(folder.path, rank=mesh.rank, coordinates=mesh.describe())
    log.info("%s", place.describe())
    token = f"{place.run_id}/{place.restart}"
    around = Surroundings(folder, log, token=token, ranks_per_host=place.local_world_size)
    run_training(config, mesh, datasets, around)


def run_facts(config: Config, datasets: Datasets) -> dict[str, str]:
    """All that every rank must have alike: config, versions, contents of the data."""
    fingerprints = {"training data": datasets.train.fingerprint}
    if datasets.validation is not None:
        fingerprints["held-out data"] = datasets.validation.fingerprint
    if datasets.measure is not None:
        fingerprints["tokenizer"] = datasets.measure.fingerprint
    return config_facts(config) | version_facts() | {name: f"{value:016x}" for name, value in fingerprints.items()}


@dataclass(frozen=True)
class Surroundings:
    """What a run touches beside its ranks. A rehearsal gives a disk that keeps nothing, and no thread."""

    folder: RunFolder
    log: logging.Logger
    token: str
    """Names this launch of the run."""
    storage: Storage = field(default_factory=FileStorage)
    prefetch: Literal["thread", "none"] = "thread"
    device_copy: Callable[[Tensor], Tensor] | None = None
    """None: to the mesh's device."""
    ranks_per_host: int = 1

    @property
    def keeps_files(self) -> bool:
        """False in a rehearsal."""
        return isinstance(self.storage, FileStorage)


def run_training(config: Config, mesh: Mesh, datasets: Datasets, around: Surroundings) -> None:
    """One rank's whole run: build, resume or draw, check, train. Collective over the job."""
    log, is_writer = around.log, mesh.rank == 0 and around.keeps_files
    with ExitStack() as stack:
        copy: Callable[[Tensor], Tensor] = around.device_copy or partial(streams.copy_to_device, device=mesh.device)
        share: Share = {
            "data_rank": mesh.index("dp"),
            "data_size": mesh.size("dp"),
            "global_batch_size": config.train.global_batch_size,
            "device_copy": copy,
        }
        # Step n of a run begins at sample (n - 1) x global batch, resumed or not: the batch size of a run is fixed.
        loader = BatchLoader(datasets.train, seed=config.train.seed, first_step=1, prefetch=around.prefetch, **share)
        run = assemble(config, mesh, stack.enter_context(loader))
        done = resume_or_draw(run, around.folder, datasets.train, log)
        if is_writer:
            around.folder.record(config)
        log_facts(run, datasets, log)
        if done >= config.num_steps:
            log.info("step %d of %d: this run is complete; raise train.steps to go on", done, config.num_steps)
            return
        peak = peak_tflops(config, mesh, around.ranks_per_host)
        loss = dry_batch(run, done + 1)
        log.info("dry batch: loss %.4f; every parameter, the loss and the gradients are finite", loss)
        metrics = progress = None
        if is_writer:
            metrics = MetricsWriter(around.folder.path, tensorboard=config.observe.tensorboard, first_step=done + 1 if done else 0)
            stack.callback(metrics.close)
            progress = stack.enter_context(TrainingProgress(total_steps=config.num_steps, first_step=done + 1, enabled=True))
        after = AfterStep(run, datasets, around, share, metrics, progress, peak)
        if done == 0:
            after.evaluate(0)
        for result in run.trainer.fit(done + 1, config.num_steps):
            after(result)


class Share(TypedDict):
    """Which samples of each global batch are this rank's, and how they get to its device."""

    data_rank: int
    data_size: int
    global_batch_size: int
    device_copy: Callable[[Tensor], Tensor]


def resume_or_draw(run: Assembly, folder: RunFolder, dataset: TokenDataset, log: logging.Logger) -> int:
    """Load the newest checkpoint that verifies, or draw first weights; the number of steps done."""
    # A refused checkpoint must be seen, but once: every rank learns the same verdict.
    tell: Callable[[str], None] = log.warning if run.mesh.rank == 0 else log.debug
    started = time.perf_counter()
    state = checkpointing.load_newest(run, folder.checkpoints, log=tell)
    if state is None:
        draw_weights(run.config, run.cut)
        run.optimizer.reset_master()
        return 0
    if state["data_fingerprint"] != f"{dataset.fingerprint:016x}":
        raise UserError(
            f"data.train={run.config.data.train} is not the data that {folder.path} was trained on (fingerprint "
            f"{dataset.fingerprint:016x}, checkpoint {state['data_fingerprint']}): give that data, or another name"
        )
    folder.check_same_run(config_of(state), run.config)
    step, saved = int(state["step"]), state["layout"]
    assert int(state["consumed_samples"]) == step * run.config.train.global_batch_size, "the batch size of a run is fixed"
    layout = " ".join(f"{axis}{saved[axis]}" for axis in ("pp", "dp", "tp"))
    log.info("resumed after step %d, saved by layout %s, in %.1f s", step, layout, time.perf_counter() - started)
    return step


def log_facts(run: Assembly, datasets: Datasets, log: logging.Logger) -> None:
    """What this run is, in a few lines."""
    config, mesh = run.config, run.mesh
    shape = mesh.shape
    log.info(
        "model: %s, %.2f M parameters; layout pp%d x dp%d x tp%d%s, ZeRO %d; %d microbatches of %d",
        config.model.architecture,
        checkpointing.count_parameters(run.cut.layout) / 1e6,
        shape.pp,
        shape.dp,
        shape.tp,
        ", sequence parallel" if config.parallel.sequence else "",
        config.parallel.zero_stage,
        config.num_microbatches(shape.num_ranks),
        config.train.micro_batch_size,
    )
    log.info("optimizer state of this rank: %.2f MiB in %d buckets", run.optimizer.state_bytes() / 2**20, len(run.cut.buckets))
    samples = config.num_steps * config.train.global_batch_size
    log.info(
        "data: %d samples of %d tokens; %d steps read %.2f epochs",
        len(datasets.train),
        config.data.sequence_length,
        config.num_steps,
        samples / len(datasets.train),
    )


def config_of(state: Mapping[str, Any]) -> Config:
    """The config that a checkpoint was saved under."""
    return Config.model_validate(state["config"])


def peak_tflops(config: Config, mesh: Mesh, ranks_per_host: int) -> float:
    """One device's peak for MFU. On CPU: a measured matrix product on all cores, shared by the ranks of a host."""
    if config.observe.peak_tflops is not None:
        return config.observe.peak_tflops
    if mesh.device_kind == "cuda":
        return formulas.peak_tflops(streams.device_name(mesh.device), config.train.dtype) or math.nan
    barrier(mesh.groups["world"])  # while one measures, the others wait
    measured = measure_matmul_tflops(DTYPES[config.train.dtype]) if mesh.rank == 0 else math.nan
    barrier(mesh.groups["world"])
    return measured / ranks_per_host


@dataclass
class AfterStep:
    """What follows a step. Everything here is between steps: waiting for the device costs nothing that was not due."""

    run: Assembly
    datasets: Datasets
    around: Surroundings
    share: Share
    metrics: MetricsWriter | None
    progress: TrainingProgress | None
    peak_tflops: float

    def __post_init__(self) -> None:
        self._since = (0, time.perf_counter())

    def __call__(self, result: StepResult) -> None:
        """Log, evaluate and save as the config says. Collective over the job."""
        config, step = self.run.config, result.step
        is_last = step == config.num_steps
        must_save = is_last or (config.checkpoint.interval is not None and step % config.checkpoint.interval == 0)
        if step % config.observe.log_interval == 0 or must_save or self._since[0] == 0:
            self.report(result)
        interval = config.train.eval_interval
        if interval and (step % interval == 0 or is_last):
            self.evaluate(step)
        if must_save:
            self.save(step)

    def report(self, result: StepResult) -> None:
        """Write the step's numbers: the only place of a step where the host waits for the device. Stops the run, on every rank, if
        they are not finite: such weights must not push sound checkpoints out."""
        config = self.run.config
        loss, grad_norm = read_values(torch.stack((result.loss, result.grad_norm)), [1.0, 1.0])
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise RuntimeError(
                f"step {result.step}: loss {loss}, gradient norm {grad_norm}; the run stops, its last checkpoint is sound; a lower "
                f"optim.lr={config.optim.lr} or a longer optim.warmup_steps={config.optim.warmup_steps} may help"
            )
        before, started = self._since
        now = streams.wall_time(self.run.mesh.device)
        self._since = (result.step, now)
        seconds = (now - started) / (result.step - before) if before else sum(self.run.trainer.clock.read().values())
        tokens_per_second = config.train.global_batch_size * config.data.sequence_length / seconds
        mfu = formulas.mfu(
            tokens_per_second,
            flops_per_token=formulas.flops_per_token(config.model, config.data.sequence_length),
            num_devices=self.run.mesh.shape.num_ranks,
            peak_tflops=self.peak_tflops,
        )
        values = {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": result.lr,
            "tokens_per_second": tokens_per_second,
            "mfu": mfu,
            "step_seconds": seconds,
            "consumed_samples": result.step * config.train.global_batch_size,
            "consumed_tokens": result.step * config.train.global_batch_size * config.data.sequence_length,
        }
        values |= {f"seconds/{phase}": spent for phase, spent in self.run.trainer.clock.read().items()}
        if self.metrics is not None:
            self.metrics.write(result.step, values)
        if self.progress is not None:
            self.progress.update(result.step, loss=loss, tokens_per_second=tokens_per_second, mfu=mfu)

    def evaluate(self, step: int) -> None:
        """Held-out loss, perplexity and bits per byte after `step`. Collective over the job."""
        config, mesh, validation = self.run.config, self.run.mesh, self.datasets.validation
        if validation is None or not config.train.eval_interval:
            return
        started = streams.wall_time(mesh.device)
        batches = evaluation_batches(validation, num_batches=config.train.eval_steps, **self.share)
        loss_sum, num_targets = read_values(torch.stack(self.run.trainer.evaluate(batches)), [1.0, 1.0])
        values = {"eval_loss": loss_sum / num_targets, "eval_perplexity": math.exp(min(loss_sum / num_targets, 700.0))}
        # One rank reads the text for it.
        if self.metrics is not None and self.datasets.measure is not None:
            num_samples = config.train.eval_steps * config.train.global_batch_size
            values["eval_bits_per_byte"] = self.datasets.measure.bits_per_byte(validation, loss_sum, num_samples)
        if self.metrics is not None:
            self.metrics.write(step, values)
        if self.progress is not None:
            text = ", ".join(f"{name.removeprefix('eval_').replace('_', ' ')} {value:.4f}" for name, value in values.items())
            self.progress.print(f"step {step}: held-out {text}")
        self._skip(time.perf_counter() - started)

    def save(self, step: int) -> None:
        """Save a checkpoint after `step`. Collective over the job."""
        started = streams.wall_time(self.run.mesh.device)
        is_first = self.run.mesh.rank == 0
        path = checkpointing.save(
            self.run,
            self.around.folder.checkpoints,
            step=step,
            data_fingerprint=self.datasets.train.fingerprint,
            token=self.around.token,
            storage=self.around.storage,
            log=self.around.log.warning if is_first else self.around.log.debug,
        )
        if is_first:  # which alone knows that the rename was done
            self.around.log.info("saved %s in %.1f s", path, time.perf_counter() - started)
        self._skip(time.perf_counter() - started)

    def _skip(self, seconds: float) -> None:
        """Leave time that was not training out of the next report's rate."""
        self._since = (self._since[0], self._since[1] + seconds)
