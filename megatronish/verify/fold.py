"""A user's config, folded to a laptop: at most eight ranks and a small model, with everything that could go wrong kept.

Every axis above 1 stays above 1, and what a layout's sums depend on stays as it was: schedule, chunks, uneven stages, ZeRO stage,
recomputation, sequence parallelism, grouped heads, a vocabulary that tp divides or not, tied embeddings, dropout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

from megatronish.config import Config, ModelConfig, ParallelConfig, Recompute, TrainConfig
from megatronish.constraints import find_problems
from megatronish.errors import UserError

MAX_RANKS = 8
NUM_STEPS = 3
"""Two that follow each other, and one after saving and loading."""
SEQUENCE_LENGTH = 16
"""About: the tensor ranks divide it."""
HEAD_SIZE = 8


def fold(config: Config, *, max_ranks: int = MAX_RANKS, world_size: int | None = None) -> Config:
    """The small run that stands for `config`. `world_size` gives parallel.data where the config leaves it open, else 2 replicas.

    UserError if the axes above 1 need more than `max_ranks` ranks."""
    parallel = config.parallel
    dp = parallel.data or (config.data_parallel_size(world_size) if world_size else 2)
    tp, pp, dp = fold_axes((parallel.tensor, parallel.pipeline, dp), max_ranks=max_ranks)
    parts = _stage_layers(config, pp)
    sequence_length = SEQUENCE_LENGTH // tp * tp
    folded = config.model_copy(
        update={
            "name": "verify",
            "model": _model(config.model, tp=tp, full_tp=parallel.tensor, num_layers=sum(parts), positions=sequence_length),
            "parallel": _parallel(config, tp=tp, pp=pp, dp=dp, parts=parts),
            "data": config.data.model_copy(
                update={
                    "train": "verify",
                    "validation": None,
                    "validation_fraction": 0.0,
                    "tokenizer": None,
                    "order": "permutation",
                    "sequence_length": sequence_length,
                }
            ),
            # A rate so large that a wrong update shows, a norm so small that clipping decides it, buckets of which there are many.
            "optim": config.optim.model_copy(
                update={
                    "lr": 0.01,
                    # Not zero: the last step would change nothing.
                    "min_lr": 0.005,
                    "warmup_steps": 0,
                    "decay_steps": 1 if config.optim.schedule == "wsd" else None,
                    "clip_norm": 0.1 if config.optim.clip_norm else 0.0,
                    "bucket_mib": 0.02,
                }
            ),
            "train": _train(config, pp=pp, dp=dp, world_size=world_size),
            "checkpoint": type(config.checkpoint)(),
            "observe": type(config.observe)(),
        }
    )
    problems = find_problems(folded, tp * pp * dp)
    assert not problems, f"folding made an impossible run: {problems[0].message}"
    return folded


def fold_axes(sizes: Sequence[int], *, max_ranks: int) -> tuple[int, ...]:
    """Sizes whose product is at most `max_ranks`, none above the given one, 1 only where it was 1: as many unchanged as possible,
    then divisors, then the least shrinking; of equals the one with the larger last axes."""
    choices = [range(min(size, 2), min(size, max_ranks) + 1) for size in sizes]
    fitting = [folded for folded in product(*choices) if math.prod(folded) <= max_ranks]
    if not fitting:
        needed = math.prod(min(size, 2) for size in sizes)
        raise UserError(f"--max-ranks {max_ranks}: every axis above 1 must stay above 1, which takes {needed} ranks")

    def fidelity(folded: tuple[int, ...]) -> tuple[int, int, float, tuple[int, ...]]:
        pairs = list(zip(folded, sizes, strict=True))
        kept, divides = sum(f == s for f, s in pairs), sum(s % f == 0 for f, s in pairs)
        return kept, divides, sum(math.log(f) for f in folded), tuple(reversed(folded))

    return max(fitting, key=fidelity)


def _stage_layers(config: Config, pp: int) -> list[int]:
    """Layers of each part: one or two each, uneven where they were."""
    chunks, given = config.parallel.num_chunks, config.parallel.stage_layers
    num_parts, full_parts = pp * chunks, config.parallel.pipeline * chunks
    if given is not None:
        picked = [given[_spread(i, num_parts, full_parts)] for i in range(num_parts)]
        smallest, uneven = min(picked), len(set(given)) > 1
        parts = [1 + (layers > smallest) for layers in picked]
        return parts if len(set(parts)) > 1 or not uneven else [2, *parts[1:]]
    each = min(2, config.model.num_layers // full_parts) if num_parts <= 4 else 1
    parts = [each] * num_parts
    parts[0] += config.model.num_layers % full_parts > 0
    return parts


def _spread(index: int, count: int, full: int) -> int:
    """The place in a list of `full` that `index` of `count` stands for: first for first, last for last."""
    return 0 if count == 1 else round(index * (full - 1) / (count - 1))


def _model(model: ModelConfig, *, tp: int, full_tp: int, num_layers: int, positions: int) -> ModelConfig:
    groups = tp * min(2, max(1, model.kv_heads // full_tp))
    heads = groups * min(2, model.num_heads // model.kv_heads)
    # 105 rows, which neither 2 nor 4 ranks divide, or 104, which 2, 4 and 8 do; with padding, if there is some.
    multiple = 8 if model.padded_vocab_size % full_tp == 0 else 7
    padded = -(-101 // multiple) * multiple
    return model.model_copy(
        update={
            "num_layers": num_layers,
            "num_heads": heads,
            "num_kv_heads": None if model.num_kv_heads is None else groups,
            "hidden_size": heads * HEAD_SIZE,
            "mlp_size": tp * 20,
            # A share of the head, in pairs, where there was one.
            "partial_rotary_factor": max(1, int(HEAD_SIZE * model.partial_rotary_factor) // 2) * 2 / HEAD_SIZE,
            "vocab_size": 101 if model.padded_vocab_size > model.vocab_size else padded,
            "vocab_multiple": multiple,
            "max_positions": None if model.max_positions is None else positions + 3,
        }
    )


def _parallel(config: Config, *, tp: int, pp: int, dp: int, parts: list[int]) -> ParallelConfig:
    parallel, recompute = config.parallel, config.parallel.recompute
    folded_recompute: Recompute | tuple[Recompute, ...] = recompute
    if isinstance(recompute, tuple):
        folded_recompute = tuple(recompute[_spread(stage, pp, parallel.pipeline)] for stage in range(pp))
    update = {
        "tensor": tp,
        "pipeline": pp,
        "data": dp,
        "sequence": parallel.sequence and tp > 1,
        "recompute": folded_recompute,
        "stage_layers": tuple(parts) if len(set(parts)) > 1 or parallel.stage_layers is not None else None,
    }
    return parallel.model_copy(update=update)


def _train(config: Config, *, pp: int, dp: int, world_size: int | None) -> TrainConfig:
    train = config.train
    microbatches = 2 * pp + 1
    if world_size or config.parallel.data:
        full = config.num_microbatches(world_size or 0)
        # A number that the stages divide stays one: interleaving may need it.
        microbatches = min(full, 2 * pp if full % config.parallel.pipeline == 0 else microbatches)
    elif config.parallel.schedule == "interleaved":
        microbatches = 2 * pp
    microbatches = max(microbatches, pp)
    samples = min(2, train.micro_batch_size)
    return train.model_copy(
        update={
            "steps": NUM_STEPS,
            "tokens": None,
            "micro_batch_size": samples,
            "global_batch_size": samples * microbatches * dp,
            "batch_ramp": None,
            "eval_interval": 0,
            "patience": None,
            "cpu_threads": 1,
            # Below what overflows at once.
            "loss_scale": min(train.loss_scale, 1024.0),
        }
    )
