"""What follows a step: log, evaluate, save. Everything here is between steps, where the host may wait for the device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from megatronish import checkpointing, formulas
from megatronish.assemble import Assembly
from megatronish.comm import streams
from megatronish.comm.history import phase
from megatronish.comm.host import read_values
from megatronish.data.loader import evaluation_batches
from megatronish.early_stopping import EarlyStopping
from megatronish.errors import RunStopped, Superseded
from megatronish.kernels.dispatch import Decision
from megatronish.not_finite import require_sound_steps
from megatronish.observe.metrics import MetricsWriter
from megatronish.observe.profile import ProfileWindow
from megatronish.observe.progress import TrainingProgress
from megatronish.observe.requests import RequestFiles, Requests
from megatronish.surroundings import Datasets, Share, Surroundings
from megatronish.trainer import StepResult
from megatronish.training_samples import TrainingSamples, write_samples


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
    early_stopping: EarlyStopping
    kernels: Sequence[Decision] = ()
    """What the run's ops run as: saved with it."""

    def __post_init__(self) -> None:
        self._since = (0, time.perf_counter())
        config, mesh, folder = self.run.config, self.run.mesh, self.around.folder
        is_file_writer = self.around.keeps_files and mesh.rank == 0
        life = self.around.life
        current: Callable[[], bool] = life.is_current if life is not None else lambda: True
        self.requests = RequestFiles(folder.path, looks=is_file_writer, told=self.around.told, is_current=current)
        self.must_go_on = False
        """The run has ended for another life to go on."""
        for path in self.requests.remove_old(stop=not self.around.is_requeued):
            self.around.log.warning("removed %s: it was there before this start", path)
        self.profile = ProfileWindow(
            folder.path,
            rank=mesh.rank,
            steps=config.observe.profile_steps if self.around.keeps_files else None,
            device_kind=mesh.device_kind,
            wait=partial(streams.synchronize, mesh.device),
            log=self.around.log.info,
        )
        self.samples = None
        if config.observe.sample_interval:
            self.samples = TrainingSamples(self.run, config.observe.sample_prompts, self.datasets.tokenizer)
        self.saver = checkpointing.Saver(
            self.run,
            self.around.folder.checkpoints,
            data_fingerprint=self.datasets.train.fingerprint,
            token=self.around.token,
            storage=self.around.storage,
            log=self.around.log,
            require_current=life.require_current if life is not None else lambda: None,
            work="thread" if self.around.keeps_files else "inline",
        )

    def begin(self, first_step: int) -> None:
        """Called before the first step of this life. Collective over the job."""
        if first_step == 1:
            with phase("evaluate", 0):
                self.evaluate(0)
        if self.run.config.observe.memory_snapshot_step is not None and not streams.record_memory(self.run.mesh.device):
            self.around.log.info("observe.memory_snapshot_step: a CPU has no allocator history; nothing will be written")
        self.profile.before(first_step)

    def __call__(self, result: StepResult) -> bool:
        """Log, evaluate, sample and save as the config says, and as RUN/STOP, RUN/SAVE and signals ask. Collective
        over the job. Returns whether the run goes on: False after the last step, on request, and where early stopping ends it."""
        with phase("after", result.step):
            return self._follow(result)

    def _follow(self, result: StepResult) -> bool:
        config, step, asked = self.run.config, result.step, Requests()
        self.saver.between_steps()
        is_last = step == config.num_steps
        must_save = is_last or _is_due(step, config.checkpoint.interval)
        must_report = _is_due(step, config.observe.log_interval) or must_save or self._since[0] == 0
        if must_report or self.requests.is_due(step):
            asked = self.requests.ask(step, world=self.run.mesh.groups["world"], device=self.run.mesh.device)
            if asked.superseded:
                raise Superseded(f"{self.around.folder.path} is another life's by now: this one ends after step {step}, unsaved")
        if must_report or asked != Requests():
            self.report(result)
        if _is_due(step, config.train.eval_interval) or (is_last and config.train.eval_interval):
            with phase("evaluate", step):
                self.evaluate(step)
        if _is_due(step, config.observe.sample_interval) or (is_last and config.observe.sample_interval):
            with phase("sample", step):
                self.sample(step)
        ends = is_last or asked.stop or asked.requeue or self.is_out_of_patience(step)
        if must_save or asked.save or ends:
            with phase("save", step):
                self.save(step)
        if asked.stop and not is_last:
            self.around.log.info("stopped after step %d of %d, as RUN/STOP asked; the same command goes on", step, config.num_steps)
        if asked.stop or asked.requeue:  # a request that is gone with nothing saved would be forgotten
            self.saver.finish()
        if asked.requeue and not is_last and not asked.stop:
            self.must_go_on = True
            self.around.log.info("stopped after step %d of %d, as a signal asked; the same command goes on", step, config.num_steps)
        self.requests.answered(asked)
        if step == config.observe.memory_snapshot_step and self.around.keeps_files:
            self.write_memory_snapshot()
        self.profile.after(step)
        self.profile.before(step + 1)
        return not ends

    def close(self) -> None:
        """After the last step, or an error."""
        self.profile.close()

    def is_out_of_patience(self, step: int) -> bool:
        """Whether held-out loss has not fallen for train.patience evaluations: the same answer on every rank, since the loss is. A
        rehearsal, where every loss is 1, goes on."""
        exhausted = self.early_stopping.is_exhausted and self.around.keeps_files
        if exhausted:
            self.around.log.info("early stopping after step %d: %s", step, self.early_stopping.describe())
        return exhausted

    def sample(self, step: int) -> None:
        """Continue the prompts. Collective over the job."""
        assert self.samples is not None
        started = streams.wall_time(self.run.mesh.device)
        tokens = self.samples.draw()
        if self.progress is not None:
            texts, path = self.samples.texts(tokens), self.around.folder.path
            write_samples(path, step=step, prompts=self.samples.prompts, texts=texts, show=self.progress.print)
        self._skip(time.perf_counter() - started)

    def write_memory_snapshot(self) -> None:
        """The allocator's history so far, of a GPU."""
        path = self.around.folder.path / "profile" / f"memory-rank-{self.run.mesh.rank:05d}.pickle"
        path.parent.mkdir(parents=True, exist_ok=True)
        if streams.write_memory_history(self.run.mesh.device, path):
            self.around.log.info("wrote %s; open it in https://pytorch.org/memory_viz", path)

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
        if self.progress is not None:
            self.progress.print(f"step {step}: evaluating {config.train.eval_steps} batches of {size} held-out samples")
        batches = evaluation_batches(validation, num_batches=config.train.eval_steps, global_batch_size=size, **self.share)
        loss_sum, num_targets = read_values(torch.stack(self.run.trainer.evaluate(batches)), [1.0, 1.0])
        self.early_stopping.update(loss_sum / num_targets)
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
        self.saver.save(
            step,
            numbers={
                "early_stopping": self.early_stopping.state(),
                "kernels": [decision.saved() for decision in self.kernels],
            },
        )
        self._skip(time.perf_counter() - started)

    def _skip(self, seconds: float) -> None:
        """Leave time that was not training out of the next report's rate."""
        self._since = (self._since[0], self._since[1] + seconds)


def _is_due(step: int, interval: int | None) -> bool:
    """0 and None: never."""
    return bool(interval) and step % interval == 0  # type: ignore[operator]
