"""`megatronish train CONFIG`: builds a run from its config, resumes it, and does what follows a step: log, evaluate, save."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from megatronish import checkpointing, failures, formulas
from megatronish.after_step import AfterStep
from megatronish.assemble import DTYPES, Assembly, assemble, mesh_shape
from megatronish.comm import all_reduce, barrier, streams
from megatronish.comm.groups import world_group
from megatronish.comm.history import phase
from megatronish.comm.host import read_scalar
from megatronish.config import Config
from megatronish.config_loader import load_config
from megatronish.constraints import warnings
from megatronish.data.loader import BatchLoader
from megatronish.deepspeed_settings import check_engine, write_settings
from megatronish.early_stopping import EarlyStopping
from megatronish.end_signals import EndSignals
from megatronish.errors import SAVED, UserError
from megatronish.kernel_choices import choose_kernels, decisions_before, write_decisions
from megatronish.life import Life, ended_by_later_life, token_of
from megatronish.local_launch import end_with_launcher, must_launch, run_local
from megatronish.observe.flops import measure_matmul_tflops
from megatronish.observe.log import setup_logging
from megatronish.observe.metrics import MetricsWriter, cut_rows
from megatronish.observe.post_mortem import PostMortem, Who
from megatronish.observe.progress import TrainingProgress
from megatronish.observe.start_clock import START_UP, StartClock
from megatronish.observe.wandb_run import WandbRun
from megatronish.parallel.mesh import Mesh, build_mesh
from megatronish.parallel.rendezvous import Place, connect, disconnect, find_place
from megatronish.rank_failure import RankGuard
from megatronish.resume import resume_or_draw
from megatronish.run_folder import RunFolder
from megatronish.startup import config_facts, dry_batch, require_agreement, version_facts
from megatronish.surroundings import Datasets, Share, Surroundings, open_datasets
from megatronish.training_samples import FILE_NAME as SAMPLES_FILE


def main(config_path: str, overrides: list[str], nproc: int | None, signals: EndSignals | None = None) -> int:
    """Train, in this process or in `nproc` new ones; the exit code. UserError for bad input, before anything is started."""
    clock = StartClock()
    clock.end("import")
    place = find_place()
    signals = signals or EndSignals()
    if must_launch(place, nproc):
        config = load_config(config_path, overrides, world_size=nproc)
        check_engine(config, nproc or 1)
        open_datasets(config)
        folder = RunFolder.of(config)
        folder.prepare(config)
        signals.pass_on()
        return run_local(["train", config_path, *overrides], nproc or 1, run_folder=folder.path, signals=signals)
    end_with_launcher(place)
    with RankGuard(place, wait=signals.wait) as guard:
        config = load_config(config_path, overrides, world_size=place.world_size)
        check_engine(config, place.world_size)
        folder = RunFolder.of(config)
        guard.run_folder = folder.path
        streams.set_numerics(cpu_threads=config.train.cpu_threads, deterministic=config.train.deterministic)
        datasets = open_datasets(config)
        clock.end("config and data")
        with listening_post(config, folder, place):
            timeout = config.parallel.timeout_seconds
            device = connect(place, collective_seconds=timeout)
            clock.end("rendezvous")
            world = world_group(device_kind=device.type)
            require_agreement(run_facts(config, datasets), world=world, device=device)
            clock.end("agreement")
            guard.has_agreed = True
            mesh = build_mesh(mesh_shape(config, place.world_size), place.rank, device=device, timeout_seconds=timeout)
            clock.end("groups")
            must_go_on = train_in_folder(config, mesh, datasets, place, clock, signals)
            disconnect()
    return SAVED if must_go_on else 0


def listening_post(config: Config, folder: RunFolder, place: Place) -> PostMortem:
    """Context manager: a rank that hangs or fails leaves what `megatronish why-hung` reads."""
    shape = mesh_shape(config, place.world_size)
    who = Who(place.rank, place.world_size, asdict(shape), shape.describe(place.rank), launch=place.launch)
    return PostMortem(folder.path, who, hang_seconds=config.observe.hang_seconds)


def train_in_folder(
    config: Config, mesh: Mesh, datasets: Datasets, place: Place, clock: StartClock, signals: EndSignals | None = None
) -> bool:
    """One rank's life in its run folder; whether it ended for another life to go on. Collective over the job."""
    folder, signals = RunFolder.of(config), signals or EndSignals()
    with ExitStack() as stack:
        life = None
        if mesh.rank == 0:
            folder.prepare(config)
            life = stack.enter_context(Life(folder.path, place.run_id, place.restart))
            failures.forget(folder.path, place.launch)
        token = token_of(place.launch, agreed_number(mesh, life))
        log = setup_logging(folder.path, rank=mesh.rank, coordinates=mesh.describe())
        log.info("%s", place.describe())
        stack.enter_context(ended_by_later_life(folder.path, place.run_id, place.restart))
        around = Surroundings(
            folder,
            log,
            token=token,
            ranks_per_host=place.local_world_size,
            clock=clock,
            told=signals.told,
            life=life,
            is_requeued=place.restart > 0 or (life is not None and life.continues_job),
        )
        signals.begin(failures.folder_of(folder.path, place.launch).exists)
        return run_training(config, mesh, datasets, around)


def agreed_number(mesh: Mesh, life: Life | None) -> int:
    """The number of the life, which one rank knows, on every rank. Collective over the job: none goes on before it has begun."""
    own = float(0 if life is None else life.number)  # a float64 holds its 48 bits
    drawn = torch.tensor(own, dtype=torch.float64, device=mesh.device)
    drawn = all_reduce(drawn, mesh.groups["world"], "max", what="name of the launch")
    return int(read_scalar(drawn, own))


def run_facts(config: Config, datasets: Datasets) -> dict[str, str]:
    """All that every rank must have alike: config, versions, contents of the data."""
    fingerprints = {"training data": datasets.train.fingerprint}
    if datasets.validation is not None:
        fingerprints["held-out data"] = datasets.validation.fingerprint
    if datasets.measure is not None:
        fingerprints["tokenizer"] = datasets.measure.fingerprint
    return config_facts(config) | version_facts() | {name: f"{value:016x}" for name, value in fingerprints.items()}


def run_training(config: Config, mesh: Mesh, datasets: Datasets, around: Surroundings) -> bool:
    """One rank's whole run: build, resume or draw, check, train; whether it ended for another life to go on. Collective over the
    job."""
    log, is_writer = around.log, mesh.rank == 0 and around.keeps_files
    with ExitStack() as stack:
        copy: Callable[[Tensor], Tensor] = around.device_copy or partial(streams.copy_to_device, device=mesh.device)
        share: Share = {
            "data_rank": mesh.index("dp"),
            "data_size": mesh.size("dp"),
            "separate_documents": config.data.separate_documents,
            "device_copy": copy,
        }
        # Which samples a step takes follows from the config alone, resumed or not.
        schedule, seed = config.batch_schedule, config.train.seed
        loader = BatchLoader(datasets.train, seed=seed, schedule=schedule, prefetch=around.prefetch, **share)
        with phase("build"):
            run = assemble(config, mesh, stack.enter_context(loader))
            if around.adapt is not None:
                around.adapt(run)
        around.clock.end("build")
        with phase("resume"):
            resumed = resume_or_draw(run, around.folder, datasets.train, log)
        around.clock.end("resume")
        with phase("kernels"):
            before = decisions_before(around.folder.path, resumed.numbers.get("kernels"))
            kernels = choose_kernels(config, mesh, before=before, tell=partial(log.info, "%s"))
        around.clock.end("kernels")
        done, early_stopping = resumed.step, EarlyStopping(config.train.patience)
        early_stopping.restore(resumed.numbers.get("early_stopping", {}))
        if is_writer:
            around.folder.record(config)
            write_settings(config, mesh.shape.num_ranks, around.folder.path)
            write_decisions(around.folder.path, kernels)
        log_facts(run, datasets, log)
        if done >= config.num_steps:
            log.info("step %d of %d: this run is complete; raise train.steps to go on", done, config.num_steps)
            return False
        if early_stopping.is_exhausted:
            log.info("step %d of %d: this run has stopped early: %s", done, config.num_steps, early_stopping.describe())
            return False
        peak = peak_tflops(config, mesh, around.ranks_per_host)
        with phase("dry batch"):
            loss = dry_batch(run, done + 1)
        around.clock.end("dry batch")
        log.info("dry batch: loss %.4f; every parameter, the loss and the gradients are finite", loss)
        metrics = progress = None
        if is_writer:
            metrics = stack.enter_context(open_metrics(config, around, first_step=done + 1 if done else 0))
            progress = stack.enter_context(TrainingProgress(total_steps=config.num_steps, first_step=done + 1, enabled=True))
        after = AfterStep(run, datasets, around, share, metrics, progress, peak, early_stopping, kernels)
        stack.callback(after.close)
        after.begin(done + 1)
        around.clock.end("evaluation")
        for result in run.trainer.fit(done + 1, config.num_steps):
            if result.step == done + 1:
                around.clock.end("first step")
                log.info("%s%s", START_UP, around.clock.describe())
            if not after(result):
                break
        after.saver.finish()
    if after.must_go_on:
        # The first rank to end makes a launcher stop the others: none may, before rank 0 has closed all that it writes.
        barrier(mesh.groups["world"], what="end of a life")
    return after.must_go_on


def open_metrics(config: Config, around: Surroundings, *, first_step: int) -> MetricsWriter:
    """Where the numbers of this life go. Drops what a life that was killed wrote past its checkpoint, of samples too."""
    wandb, project, path = None, config.observe.wandb_project, around.folder.path
    if project is not None:
        try:
            wandb = WandbRun(project, name=config.name, run_dir=path, config=config.model_dump(mode="json"))
        except UserError as error:
            if first_step == 0:
                raise
            around.log.warning("%s. This life goes on without it", error)  # it could log in when the run began
    cut_rows(path / SAMPLES_FILE, first_step)
    return MetricsWriter(path, tensorboard=config.observe.tensorboard, first_step=first_step, wandb=wandb)


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
    for line in warnings(config, shape.num_ranks) if mesh.rank == 0 else []:
        log.warning("%s", line)
    log.info("optimizer state of this rank: %.2f MiB in %d buckets", run.optimizer.state_bytes() / 2**20, len(run.cut.buckets))
    samples = config.batch_schedule.consumed_after(config.num_steps)
    for line in datasets.train.describe_epochs(samples).splitlines():
        log.info("data: %s", line)


def peak_tflops(config: Config, mesh: Mesh, ranks_per_host: int) -> float:
    """One device's peak for MFU. On CPU: a measured matrix product on all cores, shared by the ranks of a host."""
    if config.observe.peak_tflops is not None:
        return config.observe.peak_tflops
    if mesh.device_kind == "cuda":
        return formulas.peak_tflops(streams.device_name(mesh.device), config.train.dtype) or math.nan
    barrier(mesh.groups["world"], what="measured peak")  # while one measures, the others wait
    measured = measure_matmul_tflops(DTYPES[config.train.dtype]) if mesh.rank == 0 else math.nan
    barrier(mesh.groups["world"], what="measured peak")
    return measured / ranks_per_host
