"""What the fields of a config owe each other and the number of ranks: one table, read by `config check`, `plan` and `preflight`.

A row says when it applies, what must hold, and, when it does not, both numbers, the key to change and values near by that would do.
A row applies only where the rows it builds on hold, so that one mistake gives one line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatronish.config import BatchRamp, Config, DataConfig, ModelConfig, OptimConfig, ParallelConfig, TrainConfig


@dataclass(frozen=True)
class Layout:
    """A config and, when it is known, the number of ranks: what a row reads."""

    config: Config
    given_world: int | None

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def parallel(self) -> ParallelConfig:
        return self.config.parallel

    @property
    def data(self) -> DataConfig:
        return self.config.data

    @property
    def optim(self) -> OptimConfig:
        return self.config.optim

    @property
    def train(self) -> TrainConfig:
        return self.config.train

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.parallel.tensor * self.parallel.pipeline

    @property
    def replicas(self) -> int | None:
        """Data ranks, when they are known and the world divides into them."""
        if self.parallel.data is not None or self.given_world is None:
            return self.parallel.data
        return None if self.given_world % self.model_ranks else self.given_world // self.model_ranks

    @property
    def samples_at_once(self) -> int | None:
        """Samples of one microbatch on every data rank."""
        return None if self.replicas is None else self.train.micro_batch_size * self.replicas


@dataclass(frozen=True)
class Constraint:
    """One row. `keys[0]` is the key to change first; the message names them all."""

    name: str
    keys: tuple[str, ...]
    holds: Callable[[Layout], bool]
    message: Callable[[Layout], str]
    applies: Callable[[Layout], bool] = lambda layout: True


@dataclass(frozen=True)
class Problem:
    """A constraint that does not hold."""

    name: str
    keys: tuple[str, ...]
    message: str


def find_problems(config: Config, world_size: int | None, *, partial: bool = False) -> list[Problem]:
    """Every row that does not hold, in the table's order. `world_size` None: what can be said without it.

    `partial`: the config may lack fields; rows that read a missing one are left out.
    """
    layout = Layout(config, world_size)
    problems = []
    for row in CONSTRAINTS:
        try:
            if row.applies(layout) and not row.holds(layout):
                problems.append(Problem(row.name, row.keys, row.message(layout)))
        except AttributeError:
            if not partial:
                raise
    return problems


def check(config: Config, world_size: int | None = None) -> list[str]:
    """One line a problem; nothing when the config is sound."""
    return [problem.message for problem in find_problems(config, world_size)]


def warnings(config: Config, world_size: int | None = None) -> list[str]:
    """One line for each choice that is sound but costs more than it seems."""
    layout = Layout(config, world_size)
    if layout.samples_at_once is None or config.parallel.zero_stage != 2 or layout.replicas == 1:
        return []
    microbatches = config.train.global_batch_size // layout.samples_at_once
    if microbatches == 1:
        return []
    return [
        f"parallel.zero_stage=2 reduces gradients once a microbatch: {microbatches} microbatches send {microbatches} times the "
        f"volume of parallel.zero_stage=1"
        + (f", and parallel.pipeline={config.parallel.pipeline} needs them" if config.parallel.pipeline > 1 else "")
    ]


def divisors_near(number: int, target: int, *, count: int = 4) -> str:
    """The divisors of `number` nearest to `target`, rising, in words: `1, 2 or 4`."""
    # Small ones and their partners: a mistyped size of 10^18 must not hold up its own error message.
    divisors = {d for low in range(1, min(math.isqrt(number), 10_000) + 1) if number % low == 0 for d in (low, number // low)}
    return _either(sorted(sorted(divisors, key=lambda d: (abs(d - target), d))[:count]))


def multiples_near(step: int, target: int) -> str:
    """The multiples of `step` on both sides of `target`, in words."""
    below = target // step * step
    return _either([m for m in (below, below + step) if m > 0])


def _either(values: list[int]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


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


def _steps_known(c: Layout) -> bool:
    return (c.train.steps is None) != (c.train.tokens is None)


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


def _refused_by_deepspeed(key: str, holds: Callable[[Layout], bool], given: Callable[[Layout], object], advice: str) -> Constraint:
    """A setting that parallel.zero_engine=deepspeed cannot do."""
    return Constraint(
        name=f"parallel.zero_engine=deepspeed and {key}",
        keys=(key, "parallel.zero_engine"),
        applies=lambda c: c.parallel.zero_engine == "deepspeed",
        holds=holds,
        message=lambda c: f"{key}={given(c)} with parallel.zero_engine=deepspeed; {advice}, or parallel.zero_engine to native",
    )


def _needs_deepspeed(key: str, holds: Callable[[Layout], bool], given: Callable[[Layout], object], advice: str) -> Constraint:
    """A setting that only parallel.zero_engine=deepspeed has."""
    return Constraint(
        name=f"{key} needs parallel.zero_engine=deepspeed",
        keys=(key, "parallel.zero_engine"),
        applies=lambda c: c.parallel.zero_engine == "native",
        holds=holds,
        message=lambda c: f"{key}={given(c)} needs parallel.zero_engine=deepspeed; set it, or {advice}",
    )


ENGINE = (
    _needs_deepspeed("parallel.zero_stage", lambda c: c.parallel.zero_stage != 3, lambda c: 3, "parallel.zero_stage to 0, 1 or 2"),
    _needs_deepspeed(
        "parallel.offload", lambda c: c.parallel.offload == "none", lambda c: c.parallel.offload, "parallel.offload to none"
    ),
    _needs_deepspeed(
        "parallel.deepspeed_config",
        lambda c: c.parallel.deepspeed_config is None,
        lambda c: c.parallel.deepspeed_config,
        "remove parallel.deepspeed_config",
    ),
    _refused_by_deepspeed(
        "parallel.zero_stage", lambda c: c.parallel.zero_stage > 0, lambda c: 0, "set parallel.zero_stage to 1, 2 or 3"
    ),
    _refused_by_deepspeed(
        "parallel.pipeline", lambda c: c.parallel.pipeline == 1, lambda c: c.parallel.pipeline, "set parallel.pipeline to 1"
    ),
    _refused_by_deepspeed(
        "parallel.num_chunks", lambda c: c.parallel.num_chunks == 1, lambda c: c.parallel.num_chunks, "set parallel.num_chunks to 1"
    ),
    _refused_by_deepspeed(
        "parallel.sequence", lambda c: not c.parallel.sequence, lambda c: "true", "set parallel.sequence to false"
    ),
    _refused_by_deepspeed(
        "train.dtype",
        lambda c: c.train.dtype == "float32",
        lambda c: c.train.dtype,
        "set train.dtype to float32",
    ),
    _refused_by_deepspeed(
        "optim.grad_reduce_dtype",
        lambda c: c.optim.grad_reduce_dtype in (None, "float32"),
        lambda c: c.optim.grad_reduce_dtype,
        "remove optim.grad_reduce_dtype",
    ),
    Constraint(
        name="parallel.offload=nvme needs parallel.zero_stage=3",
        keys=("parallel.offload", "parallel.zero_stage"),
        applies=lambda c: c.parallel.offload == "nvme",
        holds=lambda c: c.parallel.zero_stage == 3,
        message=lambda c: (
            f"parallel.offload=nvme with parallel.zero_stage={c.parallel.zero_stage}; set parallel.zero_stage to 3, or "
            f"parallel.offload to cpu"
        ),
    ),
    Constraint(
        name="parallel.offload_path goes with parallel.offload=nvme",
        keys=("parallel.offload_path", "parallel.offload"),
        holds=lambda c: (c.parallel.offload_path is not None) == (c.parallel.offload == "nvme"),
        message=lambda c: (
            "parallel.offload=nvme needs parallel.offload_path; give a folder on a local disk of each node"
            if c.parallel.offload == "nvme"
            else f"parallel.offload_path={c.parallel.offload_path} with parallel.offload={c.parallel.offload}; "
            f"set parallel.offload to nvme, or remove parallel.offload_path"
        ),
    ),
    Constraint(
        name="parallel.zero_stage=3 and parallel.recompute",
        keys=("parallel.recompute", "parallel.zero_stage"),
        applies=lambda c: c.parallel.zero_engine == "deepspeed" and c.parallel.zero_stage == 3,
        holds=lambda c: "selective" not in (c.parallel.recompute, *c.parallel.recompute),
        message=lambda c: (
            "parallel.recompute=selective with parallel.zero_engine=deepspeed and parallel.zero_stage=3, whose hooks stand between "
            "a norm and its linear; set parallel.recompute to none or full, or parallel.zero_stage to 2"
        ),
    ),
    Constraint(
        name="parallel.zero_stage=3 and observe.sample_interval",
        keys=("observe.sample_interval", "parallel.zero_stage"),
        applies=lambda c: c.parallel.zero_engine == "deepspeed" and c.parallel.zero_stage == 3,
        holds=lambda c: c.config.observe.sample_interval == 0,
        message=lambda c: (
            f"observe.sample_interval={c.config.observe.sample_interval} with parallel.zero_stage=3, where no rank holds whole "
            f"weights; set observe.sample_interval to 0, or parallel.zero_stage to 2"
        ),
    ),
)

SCHEDULE = (
    Constraint(
        name="train.steps or train.tokens",
        keys=("train.steps", "train.tokens"),
        holds=_steps_known,
        message=lambda c: (
            "train.steps and train.tokens: neither is given; give one"
            if c.train.steps is None
            else f"train.steps={c.train.steps} and train.tokens={c.train.tokens}: both are given; remove one"
        ),
    ),
    Constraint(
        name="optim.warmup_steps <= steps",
        keys=("optim.warmup_steps", "train.steps", "train.tokens"),
        applies=_steps_known,
        holds=lambda c: c.optim.warmup_steps <= c.config.num_steps,
        message=lambda c: (
            f"optim.warmup_steps={c.optim.warmup_steps} is longer than the run of {c.config.num_steps} steps "
            f"(train.steps or train.tokens); set optim.warmup_steps to at most {c.config.num_steps}"
        ),
    ),
    Constraint(
        name="wsd needs optim.decay_steps",
        keys=("optim.decay_steps", "optim.schedule"),
        applies=lambda c: c.optim.schedule == "wsd",
        holds=lambda c: c.optim.decay_steps is not None,
        message=lambda c: "optim.decay_steps is not given, and optim.schedule=wsd needs it; a tenth of the steps is usual",
    ),
    Constraint(
        name="constant has no decay",
        keys=("optim.decay_steps", "optim.schedule"),
        applies=lambda c: c.optim.schedule == "constant",
        holds=lambda c: c.optim.decay_steps is None,
        message=lambda c: (
            f"optim.decay_steps={c.optim.decay_steps}, but optim.schedule=constant never decays; remove optim.decay_steps or "
            f"choose cosine, linear or wsd"
        ),
    ),
    Constraint(
        name="warmup + decay <= steps",
        keys=("optim.decay_steps", "optim.warmup_steps", "train.steps", "train.tokens"),
        applies=lambda c: (
            _steps_known(c)
            and c.optim.decay_steps is not None
            and c.optim.warmup_steps <= c.config.num_steps
            and c.optim.schedule != "constant"
        ),
        holds=lambda c: c.optim.warmup_steps + (c.optim.decay_steps or 0) <= c.config.num_steps,
        message=lambda c: (
            f"optim.warmup_steps={c.optim.warmup_steps} + optim.decay_steps={c.optim.decay_steps} is longer than the run of "
            f"{c.config.num_steps} steps; set optim.decay_steps to at most {c.config.num_steps - c.optim.warmup_steps}"
        ),
    ),
    Constraint(
        name="optim.min_lr <= optim.lr",
        keys=("optim.min_lr", "optim.lr"),
        holds=lambda c: c.optim.min_lr <= c.optim.lr,
        message=lambda c: f"optim.min_lr={c.optim.min_lr} is above optim.lr={c.optim.lr}; set optim.min_lr to at most {c.optim.lr}",
    ),
)

DATA = (
    Constraint(
        name="data.validation or data.validation_fraction",
        keys=("data.validation_fraction", "data.validation"),
        holds=lambda c: c.data.validation is None or c.data.validation_fraction == 0,
        message=lambda c: (
            f"data.validation={c.data.validation} and data.validation_fraction={c.data.validation_fraction}: both say what is "
            f"held out; remove one"
        ),
    ),
    Constraint(
        name="data.validation differs from data.train",
        keys=("data.validation", "data.train"),
        holds=lambda c: c.data.validation not in _prefixes(c),
        message=lambda c: (
            f"data.validation={c.data.validation} is data.train itself; name other files, or set data.validation_fraction"
        ),
    ),
    Constraint(
        name="train.eval_interval needs held-out data",
        keys=("train.eval_interval", "data.validation"),
        applies=lambda c: c.train.eval_interval > 0,
        holds=lambda c: c.data.validation is not None or c.data.validation_fraction > 0,
        message=lambda c: (
            f"train.eval_interval={c.train.eval_interval}, but nothing is held out; set data.validation or "
            f"data.validation_fraction, or train.eval_interval to 0"
        ),
    ),
    Constraint(
        name="train.patience needs train.eval_interval",
        keys=("train.patience", "train.eval_interval"),
        applies=lambda c: c.train.patience is not None,
        holds=lambda c: c.train.eval_interval > 0,
        message=lambda c: (
            f"train.patience={c.train.patience} counts evaluations, but train.eval_interval={c.train.eval_interval} makes none; "
            "set train.eval_interval above 0, or remove train.patience"
        ),
    ),
    *(
        Constraint(
            name=f"{key} is a prefix",
            keys=(key,),
            holds=lambda c, key=key: not _files_named(c, key),  # type: ignore[misc]
            message=lambda c, key=key: (  # type: ignore[misc]
                f"{key}={_files_named(c, key)[0]} names one file of a pair; "
                f"write {_files_named(c, key)[0][:-4]}, without .bin or .idx"
            ),
        )
        for key in ("data.train", "data.validation")
    ),
    Constraint(
        name="a blend has sources, each once",
        keys=("data.train",),
        applies=lambda c: not isinstance(c.data.train, str),
        holds=lambda c: 0 < len(_prefixes(c)) == len(set(_prefixes(c))),
        message=lambda c: (
            f"data.train holds {_twice(c)} twice; give it once, with the sum of the weights"
            if _prefixes(c)
            else "data.train is an empty list; give a prefix, or a list of {prefix: ..., weight: ...}"
        ),
    ),
    Constraint(
        name="a blend needs data.validation",
        keys=("data.validation_fraction", "data.train"),
        applies=lambda c: not isinstance(c.data.train, str),
        holds=lambda c: c.data.validation_fraction == 0,
        message=lambda c: (
            f"data.validation_fraction={c.data.validation_fraction} of a blend of {len(_prefixes(c))} sets in data.train; held-out "
            f"tokens of a blend are a set of their own: name it in data.validation"
        ),
    ),
    Constraint(
        name="data.order=megatron takes a seed of 32 bits",
        keys=("train.seed", "data.order"),
        applies=lambda c: c.data.order == "megatron",
        holds=lambda c: c.train.seed < 2**32,
        message=lambda c: (
            f"train.seed={c.train.seed}, but data.order=megatron shuffles with a seed below {2**32}; set train.seed below it, or "
            f"data.order to permutation"
        ),
    ),
)


def _prefixes(c: Layout) -> list[str]:
    train = c.data.train
    return [train] if isinstance(train, str) else [source.prefix for source in train]


def _files_named(c: Layout, key: str) -> list[str]:
    """What should be a prefix and names one of its two files."""
    prefixes = _prefixes(c) if key == "data.train" else [c.data.validation or ""]
    return [prefix for prefix in prefixes if prefix.endswith((".bin", ".idx"))]


def _twice(c: Layout) -> str:
    prefixes = _prefixes(c)
    return next(prefix for prefix in prefixes if prefixes.count(prefix) > 1)


def _there_are(world: int | None) -> str:
    return "there is 1" if world == 1 else f"there are {world}"


def _data_advice(c: Layout) -> str:
    world, asked = c.given_world or 0, c.model_ranks * (c.parallel.data or 0)
    if world % c.model_ranks == 0 and world:
        return f"start {asked}, or set parallel.data to {world // c.model_ranks}, or leave it out"
    return f"start {asked} ranks (on this machine: --nproc {asked}), or change parallel.tensor, parallel.pipeline or parallel.data"


def _profile(c: Layout) -> tuple[int, int]:
    assert c.config.observe.profile_steps is not None
    return c.config.observe.profile_steps


OBSERVE = (
    Constraint(
        name="observe.sample_interval needs data.tokenizer",
        keys=("observe.sample_interval", "data.tokenizer"),
        applies=lambda c: c.config.observe.sample_interval > 0,
        holds=lambda c: c.data.tokenizer is not None and len(c.config.observe.sample_prompts) > 0,
        message=lambda c: (
            f"observe.sample_interval={c.config.observe.sample_interval} continues text, but "
            + ("data.tokenizer is not given; set it" if c.data.tokenizer is None else "observe.sample_prompts is empty; give one")
            + ", or observe.sample_interval to 0"
        ),
    ),
    Constraint(
        name="observe.profile_steps is a window",
        keys=("observe.profile_steps",),
        applies=lambda c: c.config.observe.profile_steps is not None,
        holds=lambda c: _profile(c)[0] <= _profile(c)[1],
        message=lambda c: f"observe.profile_steps={list(_profile(c))}: its first step is after its last; set {sorted(_profile(c))}",
    ),
)

CONSTRAINTS: tuple[Constraint, ...] = (*MODEL, *TENSOR, *RANKS, *RAMP, *RECOMPUTE, *ENGINE, *SCHEDULE, *DATA, *OBSERVE)
