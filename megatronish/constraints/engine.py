"""What each of the two engines (parallel.zero_engine) can do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from megatronish.constraints.row import Constraint, Layout


def _only(
    engine: str, other: str, key: str, holds: Callable[[Layout], bool], given: Callable[[Layout], object], advice: str
) -> Constraint:
    """Of `key`, the engine that is not `other` has only what `holds`."""
    return Constraint(
        name=f"{key} of parallel.zero_engine={engine}",
        keys=(key, "parallel.zero_engine"),
        applies=lambda c: c.parallel.zero_engine == engine,
        holds=holds,
        message=lambda c: f"{key}={given(c)} with parallel.zero_engine={engine}; {advice}, or parallel.zero_engine to {other}",
    )


_native_has = partial(_only, "native", "deepspeed")
_deepspeed_has = partial(_only, "deepspeed", "native")

ENGINE = (
    _native_has("parallel.zero_stage", lambda c: c.parallel.zero_stage != 3, lambda c: 3, "set parallel.zero_stage to 0, 1 or 2"),
    _native_has(
        "parallel.offload", lambda c: c.parallel.offload == "none", lambda c: c.parallel.offload, "set parallel.offload to none"
    ),
    _native_has(
        "parallel.deepspeed_config",
        lambda c: c.parallel.deepspeed_config is None,
        lambda c: c.parallel.deepspeed_config,
        "remove parallel.deepspeed_config",
    ),
    _deepspeed_has("parallel.zero_stage", lambda c: c.parallel.zero_stage > 0, lambda c: 0, "set parallel.zero_stage to 1, 2 or 3"),
    _deepspeed_has(
        "parallel.pipeline", lambda c: c.parallel.pipeline == 1, lambda c: c.parallel.pipeline, "set parallel.pipeline to 1"
    ),
    _deepspeed_has(
        "parallel.num_chunks", lambda c: c.parallel.num_chunks == 1, lambda c: c.parallel.num_chunks, "set parallel.num_chunks to 1"
    ),
    _deepspeed_has("parallel.sequence", lambda c: not c.parallel.sequence, lambda c: "true", "set parallel.sequence to false"),
    _deepspeed_has(
        "train.dtype",
        lambda c: c.train.dtype in ("float32", "bfloat16"),
        lambda c: c.train.dtype,
        "set train.dtype to bfloat16 or float32",
    ),
    _deepspeed_has(
        "train.loss_chunks", lambda c: c.train.loss_chunks == 1, lambda c: c.train.loss_chunks, "set train.loss_chunks to 1"
    ),
    # optim.master wants bfloat16, which it does not train, and optim.rounding wants one of these two.
    _deepspeed_has(
        "optim.moments_dtype",
        lambda c: c.optim.moments_dtype in (None, "float32"),
        lambda c: c.optim.moments_dtype,
        "remove optim.moments_dtype",
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
        name="parallel.offload=nvme needs train.dtype=float32",
        keys=("parallel.offload", "train.dtype"),
        applies=lambda c: c.parallel.offload == "nvme",
        holds=lambda c: c.train.dtype == "float32",
        message=lambda c: (
            f"parallel.offload=nvme with train.dtype={c.train.dtype}, which has not been tried; set parallel.offload to cpu, or "
            f"train.dtype to float32"
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
