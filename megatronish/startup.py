"""What is checked before step 1: that all ranks run the same thing, and that one batch goes through."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
from collections.abc import Mapping

import torch

from megatronish import __version__
from megatronish.assemble import Assembly
from megatronish.comm import Group, all_gather
from megatronish.comm.host import read_scalar, read_values
from megatronish.config import Config
from megatronish.errors import RunStopped, UserError


def config_facts(config: Config) -> dict[str, str]:
    """Every leaf of the config as `section.key` -> text."""
    facts: dict[str, str] = {}
    for name, value in config.model_dump().items():
        if isinstance(value, dict):
            facts |= {f"{name}.{key}": repr(leaf) for key, leaf in value.items()}
        else:
            facts[name] = repr(value)
    return facts


def version_facts() -> dict[str, str]:
    """Versions that decide what a rank computes."""
    return {
        "version of python": platform.python_version(),
        "version of torch": torch.__version__,
        "version of megatronish": __version__,
        "version of triton": _version_of("triton"),
    }


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def require_agreement(facts: Mapping[str, str], *, world: Group, device: torch.device) -> None:
    """UserError on every rank, naming the facts and the ranks, unless all ranks have the same facts.

    Two all-gathers of fixed size: first of the versions and of the facts' names (another version has other keys), then of all facts
    by hash. Needs only the world's group: ranks that disagree about the layout could not build any other."""
    versions = version_facts() | {name: text for name, text in facts.items() if name.startswith("version of ")}
    _require_equal_rows(versions | {"the keys of a config": " ".join(facts)}, world=world, device=device)
    _require_equal_rows(facts, world=world, device=device)


def _require_equal_rows(facts: Mapping[str, str], *, world: Group, device: torch.device) -> None:
    hashes = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little") for text in facts.values()]
    rows = all_gather(torch.tensor(hashes, dtype=torch.int64, device=device), world, what="facts of the run").view(world.size, -1)
    same = rows == rows[0]
    if read_scalar(same.all(), 1.0):
        return
    ranks = [i for i, row in enumerate(same) if not read_scalar(row.all(), 1.0)]
    differing = [name for name, column in zip(facts, same.T, strict=True) if not read_scalar(column.all(), 1.0)]
    own = ", ".join(f"{name}={facts[name]}" for name in differing)
    some = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    raise UserError(
        f"ranks do not run the same: ranks {some} differ from rank 0 in {', '.join(differing)}; rank {world.index} has {own}"
    )


def dry_batch(run: Assembly, step: int) -> float:
    """Forward and backward of step `step`'s batch, no update; the loss. RunStopped, the same on every rank, if a weight, the loss
    or a gradient is not finite.

    Finds in the first seconds what would otherwise end the run at step 1. Collective over the job; waits for the device."""
    trainer = run.trainer
    run.optimizer.ensure_parameters()
    config, pp = run.config, run.mesh.size("pp")
    # As many microbatches as fill the pipeline are enough: a step may have hundreds.
    count = min(config.num_microbatches(run.mesh.shape.num_ranks), pp)
    batch = trainer.batches.batch(step).microbatches(count * config.train.micro_batch_size)[0]
    num_targets = trainer.count_targets(batch)
    loss_sum = trainer.accumulate_gradients(batch, num_targets)
    trainer.grads.finish()
    loss, norm = trainer.join_scalars(loss_sum / num_targets)
    _require_finite_parameters(run)
    loss_value, norm_value = read_values(torch.stack((loss, norm)), [1.0, 1.0])
    # In float16 the first loss scale may be too large: the steps find the right one.
    norm_matters = config.train.dtype != "float16"
    if not (math.isfinite(loss_value) and (math.isfinite(norm_value) or not norm_matters)):
        raise RunStopped(f"the first batch gives loss {loss_value} and gradient norm {norm_value}; expected finite numbers")
    return loss_value


def _require_finite_parameters(run: Assembly) -> None:
    """RunStopped, the same on every rank, that names a parameter which is not finite. Collective over the job."""
    world, parameters = run.mesh.groups["world"], run.cut.parameters
    finite = all_gather(parameters.all_finite().to(torch.int64).view(1), world, what="finite parameters")
    if read_scalar(finite.all(), 1.0):
        return
    # By its number in the table that all ranks share; -1: this rank's are finite.
    names = list(run.cut.layout.placements)
    own = parameters.first_not_finite()
    number = torch.tensor([-1 if own is None else names.index(own)], device=run.mesh.device)
    numbers = [
        int(value) for value in read_values(all_gather(number, world, what="parameters that are not finite"), [0] * world.size)
    ]
    rank = next(rank for rank, number in enumerate(numbers) if number >= 0)
    where = f"on rank {rank} [{run.mesh.shape.describe(rank)}]"
    raise RunStopped(
        f"parameter {names[numbers[rank]]} {where} is not finite: it was neither drawn nor loaded, or the checkpoint holds a NaN"
    )
