"""Joins the trainer and the checkpoint package: which pieces of which tensors a run saves and loads, and the numbers beside them.

Saved are the optimizer's states `master`, `exp_avg` and `exp_avg_sq` of every parameter, as boxes of the global tensors; the
parameters themselves are the master weights, rounded.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch

from megatronish import __version__
from megatronish.assemble import Assembly, CutModel, buckets_of, main_dtype
from megatronish.checkpoint.background import BackgroundSaver, Saved
from megatronish.checkpoint.load import Checkpoint, newest_loadable
from megatronish.checkpoint.manifest import TensorSpec, dtype_name
from megatronish.checkpoint.pieces import Piece
from megatronish.checkpoint.save import SaveJob, save_checkpoint
from megatronish.checkpoint.storage import Storage
from megatronish.comm import streams
from megatronish.config import Config
from megatronish.layout import ParamLayout
from megatronish.not_finite import require_sound_steps
from megatronish.optim.zero import STATES, saved_boxes
from megatronish.parallel.mesh import Mesh


def tensor_name(state: str, parameter: str) -> str:
    """How a state of a parameter is called in a checkpoint."""
    return f"{state}/{parameter}"


def tensor_specs(config: Config, layout: ParamLayout) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint of this run. Master weights kept in halves are saved whole."""
    wide, optim = dtype_name(main_dtype(config)), config.optim
    dtypes = dict.fromkeys(STATES, optim.moments_dtype or wide) | {"master": "bfloat16" if optim.master == "none" else wide}
    return {tensor_name(s, name): (p.global_shape, dtypes[s]) for name, p in layout.placements.items() for s in STATES}


def pieces_of_rank(config: Config, mesh: Mesh, layout: ParamLayout) -> Callable[[int], list[Piece]]:
    """What any rank saves, as a function of its number: a function of (layout, mesh) alone."""

    def pieces(rank: int) -> list[Piece]:
        at = mesh.shape.coordinates(rank)
        buckets = buckets_of(config, layout, stage=at["pp"], tp_rank=at["tp"], dp_size=mesh.shape.dp)
        boxes = saved_boxes(buckets, tp_rank=at["tp"], dp_rank=at["dp"], dp_size=mesh.shape.dp)
        return [Piece(tensor_name(state, name), box) for state, name, box in boxes]

    return pieces


class Saver:
    """Saves one run's checkpoints to `root`: within a step, or beside the steps that follow (checkpoint.asynchronous).

    `token` names this launch: what another launch left or still writes is kept apart. `require_current` as SaveJob's.
    Every method is collective over the job."""

    def __init__(
        self,
        run: Assembly,
        root: Path,
        *,
        data_fingerprint: int,
        token: str,
        storage: Storage,
        log: logging.Logger,
        require_current: Callable[[], object] = lambda: None,
        work: Literal["thread", "inline"] = "thread",
    ) -> None:
        self._run, self._root, self._storage, self._token = run, root, storage, token
        self._data_fingerprint = data_fingerprint
        self._log = log
        self._require_current = require_current
        self._is_first = run.mesh.rank == 0
        self._background = BackgroundSaver(work=work) if run.config.checkpoint.asynchronous else None

    def save(self, step: int, *, numbers: Mapping[str, Any] | None = None) -> None:
        """Save the run after `step`, and `numbers` (JSON) with it. Waits for the device, and for the disk; in the background only
        for a save still under way. RunStopped if steps are no longer applied: nothing is saved then."""
        started = streams.wall_time(self._run.mesh.device)
        if self._background is None:
            path = save_checkpoint(self._job(step, numbers or {}))
            self._say(f"saved {path} in {time.perf_counter() - started:.1f} s")
            return
        if (before := self._background.step_under_way) is not None:
            self._warn(f"the save of step {step} waits for that of step {before}: the disk is slower than checkpoint.interval")
            self.finish()
            started = time.perf_counter()
        self._background.start(self._job(step, numbers or {}))
        waited = time.perf_counter() - started
        self._say(f"saving step {step} beside the steps that follow, which waited {waited:.2f} s for a copy of the state")

    def between_steps(self) -> None:
        """Let a save under way go on, and raise, on every rank, what made it fail. Waits for no disk."""
        if self._background is not None and (saved := self._background.poll()) is not None:
            self._say_saved(saved)

    def finish(self) -> None:
        """Wait until no save is under way."""
        if self._background is not None and (saved := self._background.finish()) is not None:
            self._say_saved(saved)

    def _say_saved(self, saved: Saved) -> None:
        self._say(f"saved {saved.path} in {saved.seconds:.1f} s beside the training")

    def _say(self, text: str) -> None:
        if self._is_first:
            self._log.info("%s", text)

    def _warn(self, text: str) -> None:
        self._log.log(logging.WARNING if self._is_first else logging.DEBUG, "%s", text)

    def _job(self, step: int, numbers: Mapping[str, Any]) -> SaveJob:
        run = self._run
        run.optimizer.ensure_parameters()
        guard = require_sound_steps(run, log=self._warn)
        config, mesh, layout = run.config, run.mesh, run.cut.layout
        consumed_samples = config.batch_schedule.consumed_after(step)
        return SaveJob(
            self._root,
            step=step,
            local=[(Piece(tensor_name(state, name), box), values) for state, name, box, values in run.optimizer.owned_pieces()],
            pieces_of_rank=pieces_of_rank(config, mesh, layout),
            shapes=tensor_specs(config, layout),
            state={
                **numbers,
                "step": step,
                "consumed_samples": consumed_samples,
                "consumed_tokens": consumed_samples * config.data.sequence_length,
                "data_fingerprint": f"{self._data_fingerprint:016x}",
                "step_guard": run.trainer.guard.saved(guard),
                "config": config.model_dump(),
                "layout": {"tp": mesh.shape.tp, "pp": mesh.shape.pp, "dp": mesh.shape.dp},
                "versions": {"megatronish": __version__, "torch": torch.__version__},
            },
            world=mesh.groups["world"],
            keep=config.checkpoint.keep,
            storage=self._storage,
            token=self._token,
            log=self._warn,
            require_current=self._require_current,
            device=mesh.device,
        )


def load_newest(
    run: Assembly, root: Path, *, log: Callable[[str], None], check: Callable[[Checkpoint], object] | None = None
) -> Mapping[str, Any] | None:
    """Load the newest checkpoint that verifies into optimizer and parameters, whatever layout saved it; its numbers, or None.

    `check` sees the checkpoint before anything of it is used. Collective over the job. UserError if it does not fit the model, or
    none of several verifies."""
    checkpoint = newest_loadable(root, world=run.mesh.groups["world"], log=log, device=run.mesh.device)
    if checkpoint is None:
        return None
    with closing(checkpoint):
        if check is not None:
            check(checkpoint)
        needed = tensor_specs(run.config, run.cut.layout)
        checkpoint.check_tensors(needed, convertible=("float32", "bfloat16"))
        for text in _conversions(checkpoint, needed):
            log(text)
        for state, name, box, values in run.optimizer.needed_pieces():
            checkpoint.read(tensor_name(state, name), box, values, dtype="convert")
        run.optimizer.publish_master()
        run.trainer.guard.restore(checkpoint.state.get("step_guard"), step=int(checkpoint.state["step"]))
        return checkpoint.state


def _conversions(checkpoint: Checkpoint, needed: Mapping[str, TensorSpec]) -> list[str]:
    """A line for each state that this run keeps in another dtype than the checkpoint does."""
    found, kinds = checkpoint.tensors(), {}
    for name, (_, dtype) in needed.items():
        if found[name][1] != dtype:
            kinds[name.partition("/")[0], found[name][1], dtype] = name
    return [
        f"checkpoint {checkpoint.path}: {state} is {saved}, and is kept as {dtype} from here on" for state, saved, dtype in kinds
    ]


def load_weights(checkpoint: Checkpoint, cut: CutModel) -> None:
    """Fill the parameters of `cut` from the checkpoint's master weights, rounded to the parameters' dtype."""
    with torch.no_grad():
        for bucket in cut.buckets:
            for slot in bucket.slots:
                parameter = cut.parameters.by_name[slot.name]
                checkpoint.read(tensor_name("master", slot.name), slot.local_box, parameter.data, dtype="convert")


def count_parameters(layout: ParamLayout) -> int:
    """Elements of the whole model, padding included."""
    return sum(math.prod(p.global_shape) for p in layout.placements.values())
