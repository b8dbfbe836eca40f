"""What a config amounts to, in one line."""

from __future__ import annotations

from megatronish import formulas
from megatronish.config import Config
from megatronish.pipeline.timeline import idle_of


def _short(number: float) -> str:
    scale, letter = next(((s, x) for s, x in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if number >= s), (1.0, ""))
    return f"{number / scale:.4g}{letter}"


def summary(config: Config, world: int | None) -> str:
    """Ranks, parameters, steps and idle time. `world` None: as the config says."""
    parallel, tokens = config.parallel, config.train.global_batch_size * config.data.sequence_length
    ramp = "" if config.train.batch_ramp is None else f" after a ramp from {config.train.batch_ramp.start} samples"
    facts = [
        f"{_short(formulas.num_parameters(config.model))} parameters",
        f"{config.num_steps:,} steps of {tokens:,} tokens{ramp}",
    ]
    if world is None and parallel.data is not None:
        world = parallel.tensor * parallel.pipeline * parallel.data
    layout = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x data"
    if world is None:
        return ", ".join([f"{layout} any", *facts])
    microbatches = config.num_microbatches(world)
    idle = idle_of(parallel.schedule, parallel.pipeline, microbatches, num_chunks=parallel.num_chunks)
    facts.append(f"{microbatches} microbatches, {idle:.1%} idle in the pipeline")
    return ", ".join([f"{world:,} ranks = {layout} {config.data_parallel_size(world)}", *facts])
