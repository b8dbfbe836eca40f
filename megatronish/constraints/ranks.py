"""How a model and its batch are cut over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable

from megatronish.config import BatchRamp
from megatronish.constraints.row import Constraint, Layout, divisors_near, multiples_near


def _divides(divisor_key: str, size_key: str, divisor: Callable[[Layout], int], size: Callable[[Layout], int]) -> Constraint:
    """`size` must be a multiple of `divisor`, which is the key to change."""
    return Constraint(
        name=f"{size_key} % {divisor_key}",
        keys=(divisor_key, size_key),
        holds=lambda c: size(c) % divisor(c) == 0,
        message=lambda c: (
            f"{size_key}={size(c)} is not divisible by {divisor_key}={divisor(c)}; "
            f"set {divisor_key} to {divisors_near(size(c), divisor(c))}, or {size_key} to {multiples_near(divisor(c), size(c))}"
        ),
    )


def _heads_divide_hidden(c: Layout) -> bool:
    return c.model.hidden_size % c.model.num_heads == 0


def _cut_sizes(c: Layout) -> dict[str, int]:
    """What parallel.tensor cuts into equal parts. Vocabulary rows may be uneven; key/value heads are never replicated."""
    model = c.model
    sizes = {"model.num_heads": model.num_heads, "model.mlp_size": model.mlp_size}
    if model.num_kv_heads is not None:
        sizes["model.num_kv_heads"] = model.num_kv_heads
    if c.parallel.sequence:
        sizes["data.sequence_length"] = c.data.sequence_length
    return sizes


def _uncut(c: Layout) -> dict[str, int]:
    return {key: size for key, size in _cut_sizes(c).items() if size % c.parallel.tensor}


def _tensor_advice(c: Layout) -> str:
    if len(_uncut(c)) > 1:
        return ""
    ((key, size),) = _uncut(c).items()
    also = ", or parallel.sequence to false" if key == "data.sequence_length" else ""
    return f", or {key} to {multiples_near(c.parallel.tensor, size)}{also}"


def _num_parts(c: Layout) -> int:
    return c.parallel.pipeline * c.parallel.num_chunks


def _parts(c: Layout) -> str:
    """What the layers are cut into, in words."""
    if c.parallel.num_chunks == 1:
        return f"parallel.pipeline={c.parallel.pipeline}"
    return f"parallel.pipeline={c.parallel.pipeline} x parallel.num_chunks={c.parallel.num_chunks}"


def _layers_suffice(c: Layout) -> bool:
    return c.model.num_layers >= _num_parts(c)


def _batch_divides(c: Layout) -> bool:
    return c.samples_at_once is None or c.train.global_batch_size % c.samples_at_once == 0


def _microbatches(c: Layout) -> int:
    assert c.samples_at_once is not None
    return c.train.global_batch_size // c.samples_at_once


def _there_are(world: int | None) -> str:
    return "there is 1" if world == 1 else f"there are {world}"


def _data_advice(c: Layout) -> str:
    world, asked = c.given_world or 0, c.model_ranks * (c.parallel.data or 0)
    if world % c.model_ranks == 0 and world:
        return f"start {asked}, or set parallel.data to {world // c.model_ranks}, or leave it out"
    return f"start {asked} ranks (on this machine: --nproc {asked}), or change parallel.tensor, parallel.pipeline or parallel.data"


MODEL = (
    _divides("model.num_heads", "model.hidden_size", lambda c: c.model.num_heads, lambda c: c.model.hidden_size),
    Constraint(
        name="head size even",
        keys=("model.num_heads", "model.hidden_size"),
        applies=lambda c: _heads_divide_hidden(c) and c.model.architecture == "llama",
        holds=lambda c: c.model.head_size % 2 == 0,
        message=lambda c: (
            f"model.hidden_size={c.model.hidden_size} / model.num_heads={c.model.num_heads} is a head size of "
            f"{c.model.head_size}, which is odd; the rotary embedding turns pairs, so change model.num_heads"
        ),
    ),
    _divides("model.num_kv_heads", "model.num_heads", lambda c: c.model.kv_heads, lambda c: c.model.num_heads),
    Constraint(
        name="gpt2 needs model.max_positions",
        keys=("model.max_positions", "model.architecture"),
        applies=lambda c: c.model.architecture == "gpt2",
        holds=lambda c: c.model.max_positions is not None,
        message=lambda c: (
            f"model.max_positions is not given, and model.architecture=gpt2 learns a row for each position; set it to at least "
            f"data.sequence_length={c.data.sequence_length}"
        ),
    ),
    Constraint(
        name="llama has no model.max_positions",
        keys=("model.max_positions", "model.architecture"),
        applies=lambda c: c.model.architecture == "llama",
        holds=lambda c: c.model.max_positions is None,
        message=lambda c: (
            f"model.max_positions={c.model.max_positions}, but model.architecture=llama has rotary positions, without a table; "
            f"remove model.max_positions"
        ),
    ),
    Constraint(
        name="gpt2 has no gated activation",
        keys=("model.activation", "model.architecture"),
        applies=lambda c: c.model.architecture == "gpt2",
        holds=lambda c: c.model.activation == "swiglu",
        message=lambda c: (
            f"model.activation={c.model.activation}, but model.architecture=gpt2 has GELU without a gate; remove model.activation, "
            f"or set model.architecture to llama"
        ),
    ),
    Constraint(
        name="data.sequence_length <= model.max_positions",
        keys=("data.sequence_length", "model.max_positions"),
        applies=lambda c: c.model.architecture == "gpt2" and c.model.max_positions is not None,
        holds=lambda c: c.data.sequence_length <= (c.model.max_positions or 0),
        message=lambda c: (
            f"data.sequence_length={c.data.sequence_length} is longer than model.max_positions={c.model.max_positions}; set "
            f"data.sequence_length to at most {c.model.max_positions}"
        ),
    ),
)

TENSOR = (
    Constraint(
        name="parallel.tensor divides what it cuts",
        keys=("parallel.tensor",),
        holds=lambda c: not _uncut(c),
        message=lambda c: (
            f"parallel.tensor={c.parallel.tensor} does not divide "
            f"{', '.join(f'{key}={size}' for key, size in _uncut(c).items())}; "
            f"set parallel.tensor to {divisors_near(math.gcd(*_cut_sizes(c).values()), c.parallel.tensor)}{_tensor_advice(c)}"
        ),
    ),
)

RANKS = (
    Constraint(
        name="model.num_layers >= parallel.pipeline x parallel.num_chunks",
        keys=("parallel.pipeline", "parallel.num_chunks", "model.num_layers"),
        holds=_layers_suffice,
        message=lambda c: (
            f"parallel.pipeline={c.parallel.pipeline} stages for model.num_layers={c.model.num_layers}: a stage needs a "
            f"layer; set parallel.pipeline to at most {c.model.num_layers}"
            if c.parallel.num_chunks == 1
            else f"{_parts(c)} is {_num_parts(c)} parts for model.num_layers={c.model.num_layers}: a part needs a layer; set "
            f"parallel.pipeline x parallel.num_chunks to at most {c.model.num_layers}"
        ),
    ),
    Constraint(
        name="parallel.schedule=interleaved and parallel.num_chunks > 1",
        keys=("parallel.schedule", "parallel.num_chunks"),
        holds=lambda c: (c.parallel.schedule == "interleaved") == (c.parallel.num_chunks > 1),
        message=lambda c: (
            f"parallel.schedule=interleaved with parallel.num_chunks={c.parallel.num_chunks}: there is nothing to interleave; set "
            f"parallel.num_chunks to 2 or more, or parallel.schedule to 1f1b"
            if c.parallel.schedule == "interleaved"
            else f"parallel.num_chunks={c.parallel.num_chunks} with parallel.schedule={c.parallel.schedule}, which has one chunk a "
            f"stage; set parallel.schedule to interleaved, or parallel.num_chunks to 1"
        ),
    ),
    Constraint(
        name="parallel.stage_layers has a number for each part",
        keys=("parallel.stage_layers", "parallel.pipeline", "parallel.num_chunks"),
        applies=lambda c: c.parallel.stage_layers is not None,
        holds=lambda c: len(c.parallel.stage_layers or ()) == _num_parts(c),
        message=lambda c: (
            f"parallel.stage_layers has {len(c.parallel.stage_layers or ())} numbers for {_parts(c)}; give {_num_parts(c)}, "
            f"or leave it out"
        ),
    ),
    Constraint(
        name="parallel.stage_layers adds up to model.num_layers",
        keys=("parallel.stage_layers", "model.num_layers"),
        applies=lambda c: (
            _layers_suffice(c) and c.parallel.stage_layers is not None and len(c.parallel.stage_layers) == _num_parts(c)
        ),
        holds=lambda c: sum(c.parallel.stage_layers or ()) == c.model.num_layers,
        message=lambda c: (
            f"parallel.stage_layers adds up to {sum(c.parallel.stage_layers or ())}, but model.num_layers={c.model.num_layers}; "
            f"change one of its numbers by {abs(c.model.num_layers - sum(c.parallel.stage_layers or ()))}, or leave it out"
        ),
    ),
    Constraint(
        name="world = tensor x pipeline x data",
        keys=("parallel.data", "parallel.tensor", "parallel.pipeline"),
        applies=lambda c: c.given_world is not None and c.parallel.data is not None,
        holds=lambda c: c.given_world == c.model_ranks * (c.parallel.data or 0),
        message=lambda c: (
            f"parallel.tensor={c.parallel.tensor} x parallel.pipeline={c.parallel.pipeline} x parallel.data="
            f"{c.parallel.data} is {c.model_ranks * (c.parallel.data or 0)} ranks, but "
            f"{_there_are(c.given_world)}; {_data_advice(c)}"
        ),
    ),
    Constraint(
        name="world % (tensor x pipeline)",
        keys=("parallel.tensor", "parallel.pipeline"),
        applies=lambda c: c.given_world is not None and c.parallel.data is None,
        holds=lambda c: (c.given_world or 0) % c.model_ranks == 0,
        message=lambda c: (
            f"{c.given_world} ranks are not divisible by parallel.tensor={c.parallel.tensor} x parallel.pipeline="
            f"{c.parallel.pipeline} = {c.model_ranks}; start {multiples_near(c.model_ranks, c.given_world or 0)} ranks, or set "
            f"parallel.tensor x parallel.pipeline to {divisors_near(c.given_world or 0, c.model_ranks)}"
        ),
    ),
    Constraint(
        name="train.global_batch_size % (train.micro_batch_size x data)",
        keys=("train.global_batch_size", "train.micro_batch_size", "parallel.data"),
        holds=_batch_divides,
        message=lambda c: (
            f"train.global_batch_size={c.train.global_batch_size} is not divisible by train.micro_batch_size="
            f"{c.train.micro_batch_size} x {c.replicas} data ranks = {c.samples_at_once}; set train.global_batch_size to "
            f"{multiples_near(c.samples_at_once or 1, c.train.global_batch_size)}"
        ),
    ),
    Constraint(
        name="microbatches >= parallel.pipeline",
        keys=("train.global_batch_size", "train.micro_batch_size", "parallel.pipeline"),
        applies=lambda c: c.samples_at_once is not None and _batch_divides(c) and _layers_suffice(c),
        holds=lambda c: _microbatches(c) >= c.parallel.pipeline,
        message=lambda c: (
            f"train.global_batch_size={c.train.global_batch_size} makes {_microbatches(c)} microbatches on each of {c.replicas} "
            f"data ranks, fewer than parallel.pipeline={c.parallel.pipeline}: stages would never all work; set "
            f"train.global_batch_size to at least {(c.samples_at_once or 0) * c.parallel.pipeline}"
        ),
    ),
)


def _ramp(c: Layout) -> BatchRamp:
    assert c.train.batch_ramp is not None
    return c.train.batch_ramp


def _ramp_reaches(c: Layout) -> bool:
    rest = c.train.global_batch_size - _ramp(c).start
    return rest > 0 and rest % _ramp(c).increment == 0


def _ramp_uneven(c: Layout) -> dict[str, int]:
    """What of the ramp does not divide into microbatches on every data rank. The full batch has a row of its own."""
    sizes = {"train.batch_ramp.start": _ramp(c).start, "train.batch_ramp.increment": _ramp(c).increment}
    return {key: size for key, size in sizes.items() if size % (c.samples_at_once or 1)}


RAMP = (
    Constraint(
        name="train.batch_ramp reaches train.global_batch_size",
        keys=("train.batch_ramp", "train.global_batch_size"),
        applies=lambda c: c.train.batch_ramp is not None,
        holds=_ramp_reaches,
        message=lambda c: (
            f"train.batch_ramp.start={_ramp(c).start} does not reach train.global_batch_size={c.train.global_batch_size} in whole "
            f"steps of train.batch_ramp.increment={_ramp(c).increment}; change one of the three, for example "
            + (
                f"train.global_batch_size to {_ramp(c).start + _ramp(c).increment}"
                if _ramp(c).start >= c.train.global_batch_size
                else f"train.batch_ramp.increment to "
                f"{divisors_near(c.train.global_batch_size - _ramp(c).start, _ramp(c).increment)}"
            )
        ),
    ),
    Constraint(
        name="train.batch_ramp % (train.micro_batch_size x data)",
        keys=("train.batch_ramp", "train.micro_batch_size", "parallel.data"),
        applies=lambda c: c.train.batch_ramp is not None and _ramp_reaches(c) and _batch_divides(c),
        holds=lambda c: not _ramp_uneven(c),
        message=lambda c: (
            f"{', '.join(f'{key}={size}' for key, size in _ramp_uneven(c).items())}: not divisible by train.micro_batch_size="
            f"{c.train.micro_batch_size} x {c.replicas} data ranks = {c.samples_at_once}; set it to "
            f"{multiples_near(c.samples_at_once or 1, next(iter(_ramp_uneven(c).values())))}"
        ),
    ),
    Constraint(
        name="microbatches of train.batch_ramp.start >= parallel.pipeline",
        keys=("train.batch_ramp", "train.micro_batch_size", "parallel.pipeline"),
        applies=lambda c: (
            c.train.batch_ramp is not None and c.samples_at_once is not None and not _ramp_uneven(c) and _layers_suffice(c)
        ),
        holds=lambda c: _ramp(c).start // (c.samples_at_once or 1) >= c.parallel.pipeline,
        message=lambda c: (
            f"train.batch_ramp.start={_ramp(c).start} makes {_ramp(c).start // (c.samples_at_once or 1)} microbatches on each of "
            f"{c.replicas} data ranks, fewer than parallel.pipeline={c.parallel.pipeline}: stages would never all work; set "
            f"train.batch_ramp.start to at least {(c.samples_at_once or 0) * c.parallel.pipeline}"
        ),
    ),
)

RECOMPUTE = (
    Constraint(
        name="parallel.recompute has one for each stage",
        keys=("parallel.recompute", "parallel.pipeline"),
        applies=lambda c: not isinstance(c.parallel.recompute, str),
        holds=lambda c: len(c.parallel.recompute) == c.parallel.pipeline,
        message=lambda c: (
            f"parallel.recompute lists {len(c.parallel.recompute)} choices for parallel.pipeline={c.parallel.pipeline} stages; "
            f"list {c.parallel.pipeline}, or write one word for all"
        ),
    ),
)
