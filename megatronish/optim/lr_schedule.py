"""The learning rate as a function of the step alone."""

from __future__ import annotations

import math

from megatronish.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """The rate of optimizer step `step` (the first is 1) of a run of `num_steps`.

    Linear warm-up from 0, reaching lr at step warmup_steps; then `cosine` (Loshchilov and Hutter 2017) or `linear` down to min_lr
    over decay_steps (default: all that is left) and min_lr after it; `wsd` (Hu et al. 2024): constant, then linear over the last
    decay_steps."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        assert config.decay_steps is not None, "constraints/ refuses wsd without decay_steps"
        start, length = num_steps - config.decay_steps, config.decay_steps
    else:
        start, length = config.warmup_steps, config.decay_steps or num_steps - config.warmup_steps
    progress = min(1.0, max(0.0, (step - start) / max(1, length)))
    weight = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
    return config.min_lr + (config.lr - config.min_lr) * weight
