"""Length of a run, learning rate, numbers, data, and what is observed."""

from __future__ import annotations

from megatronish.constraints.row import Constraint, Layout


def _steps_known(c: Layout) -> bool:
    return (c.train.steps is None) != (c.train.tokens is None)


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
        name="optim.master of bfloat16 parameters",
        keys=("optim.master", "train.dtype"),
        holds=lambda c: c.optim.master == "full" or c.train.dtype == "bfloat16",
        message=lambda c: (
            f"optim.master={c.optim.master} with train.dtype={c.train.dtype}; bfloat16 parameters alone are half of a float32: "
            f"set optim.master to full, or train.dtype to bfloat16"
        ),
    ),
    Constraint(
        name="optim.master=none needs optim.rounding=stochastic",
        keys=("optim.master", "optim.rounding"),
        holds=lambda c: c.optim.master != "none" or c.optim.rounding == "stochastic",
        message=lambda c: (
            f"optim.master=none with optim.rounding={c.optim.rounding}: updates below half a bfloat16 step would be lost; set "
            f"optim.rounding to stochastic, or optim.master to full or remainder"
        ),
    ),
    Constraint(
        name="optim.rounding=stochastic needs something to round",
        keys=("optim.rounding", "optim.moments_dtype", "optim.master"),
        applies=lambda c: c.optim.rounding == "stochastic",
        holds=lambda c: c.optim.moments_dtype == "bfloat16" or c.optim.master == "none",
        message=lambda c: (
            "optim.rounding=stochastic, but nothing is kept in bfloat16; set optim.moments_dtype to bfloat16, or optim.rounding to "
            "nearest"
        ),
    ),
    Constraint(
        name="optim.moments_dtype of a float64 run",
        keys=("optim.moments_dtype", "train.dtype"),
        holds=lambda c: c.optim.moments_dtype is None or c.train.dtype != "float64",
        message=lambda c: f"optim.moments_dtype={c.optim.moments_dtype} with train.dtype=float64; remove optim.moments_dtype",
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
