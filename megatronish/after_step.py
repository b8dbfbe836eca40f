"""What follows a step: log, evaluate, save. Everything here is between steps, where the host may wait for the device."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from megatronish import checkpointing, formulas
from megatronish.assemble import Assembly
from megatronish.comm import streams
from megatronish.comm.host import read_values
from megatronish.data.loader import evaluation_batches
from megatronish.errors import RunStopped
from megatronish.not_finite import require_sound_steps
from megatronish.observe.metrics import MetricsWriter
from megatronish.observe.progress import TrainingProgress
from megatronish.surroundings import Datasets, Share, Surroundings
from megatronish.trainer import StepResult


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
        self.saver = checkpointing.Saver(
            self.run,
            self.around.folder.checkpoints,
            data_fingerprint=self.datasets.train.fingerprint,
            token=self.around.token,
            storage=self.around.storage,
            log=self.around.log,
            work="thread" if self.around.keeps_files else "inline",
        )

    def __call__(self, result: StepResult) -> None:
        """Log, evaluate and save as the config says. Collective over the job."""
        config, step = self.run.config, result.step
        self.saver.between_steps()
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
        """Write the step's numbers: the only place of a step where the host waits for the device. RunStopped, on every rank,
        if steps are no longer applied."""
        config = self.run.config
        guard = self.run.trainer.guard
        numbers = torch.cat((torch.stack((result.loss, result.grad_norm)).double(), guard.numbers))
        loss, grad_norm, *rest = read_values(numbers, [1.0, 1.0, *guard.assumed])
        log = self.around.log.warning if self.run.mesh.rank == 0 else self.around.log.debug
        try:
            state = require_sound_steps(self.run, log=log, state=guard.state_of(rest))
        except RunStopped:
            self.saver.finish()  # on all ranks, since the numbers are the job's: one under way is of a sound step
            raise
        before, started = self._since
        now = streams.wall_time(self.run.mesh.device)
        self._since = (result.step, now)
        seconds = now - started if before else sum(self.run.trainer.clock.read().values())
        before, consumed = before or result.step - 1, config.batch_schedule.consumed_after
        tokens_per_second = (consumed(result.step) - consumed(before)) * config.data.sequence_length / seconds
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
            "step_seconds": seconds / (result.step - before),
            "consumed_samples": consumed(result.step),
            "consumed_tokens": consumed(result.step) * config.data.sequence_length,
        }
        values["skipped_steps"] = state.skipped
        if guard.scales:
            values["loss_scale"] = state.loss_scale
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
        size = config.train.global_batch_size
        batches = evaluation_batches(validation, num_batches=config.train.eval_steps, global_batch_size=size, **self.share)
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
        """Save a checkpoint after `step`, or begin to. Collective over the job."""
        started = streams.wall_time(self.run.mesh.device)
        self.saver.save(step)
        self._skip(time.perf_counter() - started)

    def _skip(self, seconds: float) -> None:
        """Leave time that was not training out of the next report's rate."""
        self._since = (self._since[0], self._since[1] + seconds)
