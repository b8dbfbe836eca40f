"""Resume a run from its newest checkpoint that verifies, or draw its first weights; say which settings are other ones now."""

from __future__ import annotations

import io
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatronish import checkpointing
from megatronish.assemble import Assembly, draw_weights
from megatronish.checkpoint.load import Checkpoint
from megatronish.config import Config
from megatronish.config_loader import config_of
from megatronish.data.gpt_dataset import TokenDataset
from megatronish.data.open import describe_train
from megatronish.errors import UserError
from megatronish.run_folder import RunFolder


@dataclass(frozen=True)
class Resumed:
    """Where a life begins."""

    step: int = 0
    """Steps that are done."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """What the checkpoint holds beside tensors; nothing for a new run."""


@dataclass(frozen=True)
class Difference:
    """A setting that is not what the checkpoint was saved under; values as text."""

    setting: str
    checkpoint: str
    config: str
    used: str
    """What `config` comes to."""


def resume_or_draw(run: Assembly, folder: RunFolder, dataset: TokenDataset, log: logging.Logger) -> Resumed:
    """Load the newest checkpoint that verifies, or draw first weights. Collective over the job."""
    # A refused checkpoint must be seen, but once: every rank learns the same verdict.
    tell: Callable[[str], None] = log.warning if run.mesh.rank == 0 else log.debug
    started = time.perf_counter()

    def check(checkpoint: Checkpoint) -> None:
        check_state(checkpoint, run.config, folder, data_fingerprint=dataset.fingerprint)

    state = checkpointing.load_newest(run, folder.checkpoints, log=tell, check=check)
    if state is None:
        draw_weights(run.config, run.cut)
        run.optimizer.reset_master()
        return Resumed()
    step, saved = int(state["step"]), state["layout"]
    before = config_of(state["config"], "the checkpoint")
    layout = " ".join(f"{axis}{saved[axis]}" for axis in ("pp", "dp", "tp"))
    log.info("resumed after step %d, saved by layout %s, in %.1f s", step, layout, time.perf_counter() - started)
    differences = list(differing_settings(before, run.config, data_ranks=(int(saved["dp"]), run.mesh.shape.dp)))
    if differences:
        log.info("settings that differ from the checkpoint's:\n%s", as_table(differences))
    return Resumed(step, state)


def check_state(checkpoint: Checkpoint, config: Config, folder: RunFolder, *, data_fingerprint: int) -> None:
    """UserError unless the numbers beside the tensors are whole and the run of `config` can go on from them."""
    state, where = checkpoint.state, f"checkpoint {checkpoint.path}"
    before = config_of(state.get("config"), where)
    folder.check_same_run(before, config, step=checkpoint.step)
    if problems := list(_wrong_numbers(state, step=checkpoint.step, config=config)):
        raise UserError("\n".join(f"{where}: {problem}; remove it to go on from the one before" for problem in problems))
    # An imported model has seen none of it.
    if checkpoint.step and state.get("data_fingerprint") != f"{data_fingerprint:016x}":
        raise UserError(
            f"data.train: {describe_train(config.data)} is not the data that {folder.path} was trained on (fingerprint "
            f"{data_fingerprint:016x}, checkpoint {state.get('data_fingerprint')}): give that data, or another name"
        )


def _wrong_numbers(state: Mapping[str, Any], *, step: int, config: Config) -> Iterator[str]:
    """What a program that did not make this run may have written: given, needed."""
    if state.get("step") != step:
        yield f"step={state.get('step')!r} in its state, {step} in its name"
    # The order of samples goes on over the end of the data, epoch after epoch: no number is too large but for its step.
    expected = config.batch_schedule.consumed_after(step)
    if state.get("consumed_samples") != expected:
        batch = f"train.global_batch_size={config.train.global_batch_size}"
        if config.train.batch_ramp is not None:
            batch += " and train.batch_ramp"
        yield f"consumed_samples={state.get('consumed_samples')!r}, but {step} steps of {batch} take {expected}"
    layout = state.get("layout")
    if not isinstance(layout, dict) or not all(_is_count(layout.get(axis)) and layout[axis] for axis in ("pp", "dp", "tp")):
        yield f"layout={layout!r} must give the numbers of ranks pp, dp and tp"
    guard = state.get("step_guard")
    counts = ("good_steps", "updates", "skipped", "bad_in_a_row")
    if guard is not None and not (isinstance(guard, dict) and all(_is_count(guard.get(name)) for name in counts)):
        yield f"step_guard={guard!r} must give {', '.join(counts)} as whole numbers >= 0"
    elif guard is not None and not _is_scale(guard.get("loss_scale", 1.0)):
        yield f"step_guard.loss_scale={guard['loss_scale']!r} must be finite and > 0"


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_scale(value: object) -> bool:
    return isinstance(value, float | int) and 0 < value < math.inf


def differing_settings(before: Config, now: Config, *, data_ranks: tuple[int, int]) -> Iterator[Difference]:
    """Every leaf of the config that is another one, in the config's order. `data_ranks`: how many there were, and are."""
    old, new = dict(_leaves(before.model_dump(mode="json"))), dict(_leaves(now.model_dump(mode="json")))
    used = {**new, "parallel.data": data_ranks[1], "train.steps": now.num_steps}
    for setting in dict.fromkeys((*new, *old)):
        replicas_changed = setting == "parallel.data" and data_ranks[0] != data_ranks[1]
        if old.get(setting) != new.get(setting) or replicas_changed:
            checkpoint = data_ranks[0] if setting == "parallel.data" else old.get(setting)
            yield Difference(setting, *map(json.dumps, (checkpoint, new.get(setting), used.get(setting))))


def as_table(differences: Sequence[Difference]) -> str:
    """setting | checkpoint | config | used, for a log."""
    table = Table("setting", "checkpoint", "config", "used", box=SIMPLE_HEAD)
    for row in differences:
        table.add_row(row.setting, row.checkpoint, row.config, row.used)
    text = io.StringIO()
    # As wide as it needs to be: a path that is cut in two cannot be copied.
    Console(file=text, width=10_000, color_system=None, markup=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip())


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
