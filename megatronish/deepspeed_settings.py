"""What DeepSpeed's engine is told, from a run's config; and a given DeepSpeed JSON checked against it. Does not import deepspeed.

One source for each number: a setting that our config decides is ours. A given file may repeat it, or say "auto"; another value is
an error that names both. What else the file may hold is passed on as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megatronish.config import Config
from megatronish.deepspeed_nvme import check_async_io
from megatronish.errors import UserError
from megatronish.json_file import write_json
from megatronish.packages import find_package

FILE_NAME = "ds_config.json"
"""In the run folder: what the engine got."""

ACCUMULATION = "train.global_batch_size / (train.micro_batch_size x data ranks)"
OF_THE_WORLD = ("gradient_accumulation_steps", "communication_data_type")
"""Depend on the number of data ranks."""
DECIDED_BY = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": ACCUMULATION,
    "gradient_clipping": "optim.clip_norm",
    "optimizer.params.lr": "optim.lr",
    "optimizer.params.betas": "optim.beta1 and optim.beta2",
    "optimizer.params.eps": "optim.eps",
    "optimizer.params.weight_decay": "optim.weight_decay",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer.device": "parallel.offload",
    "zero_optimization.offload_optimizer.nvme_path": "parallel.offload_path",
    "bf16.enabled": "train.dtype",
    "communication_data_type": "optim.grad_reduce_dtype",
    "fp16.enabled": "train.dtype",
}
"""The key of our config that decides a setting; for those that are not here, the way we run the engine does."""

PASSED_ON = (
    "aio",
    "comms_logger",
    "csv_monitor",
    "disable_allgather",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "tensorboard",
    "wall_clock_breakdown",
    "wandb",
)
"""At the top of a given file: changes how the engine works or what it tells, not what it computes."""

PASSED_ON_OF_ZERO = (
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "ignore_unused_parameters",
    "offload_param",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
    "use_multi_rank_bucket_allreduce",
)
"""The same within zero_optimization. Quantized communication, ZenFlow and the like compute other numbers."""

PASSED_ON_OF_OFFLOAD = ("buffer_count", "pin_memory")

ELSEWHERE = {
    "scheduler": "the learning rate follows optim.schedule",
    "activation_checkpointing": "parallel.recompute decides it",
    "checkpoint": "checkpoints are ours, see checkpoint",
    "amp": "train.dtype decides it",
    "pipeline": "there are no stages",
    "tensor_parallel": "parallel.tensor decides it",
}
"""Why a setting is not taken over, where there is more to say."""


def engine_settings(config: Config, world_size: int) -> dict[str, Any]:
    """What the engine is told, with what parallel.deepspeed_config adds. UserError, a line a conflict."""
    ours, given = settings_of(config, world_size), read_given(config)
    raise_problems(config, list(conflicts(ours, given)))
    return _merged(ours, given)


def check_engine(config: Config, world_size: int | None) -> None:
    """UserError, before a rank starts, if DeepSpeed's engine is asked for and is not installed, or the given file does not fit.
    `world_size` None: what can be said without it."""
    if config.parallel.zero_engine == "native":
        return
    if find_package("deepspeed") is None:
        raise UserError(
            "parallel.zero_engine=deepspeed, but the package deepspeed is not installed: pip install 'megatronish[deepspeed]', or "
            "set parallel.zero_engine to native"
        )
    if config.parallel.offload == "nvme":
        check_async_io()
    given = read_given(config)
    if world_size is None and config.parallel.data is None:
        given = {name: value for name, value in given.items() if name not in OF_THE_WORLD}
    ours = settings_of(config, world_size or config.parallel.tensor * (config.parallel.data or 1))
    raise_problems(config, list(conflicts(ours, given)))


def write_settings(config: Config, world_size: int, folder: Path) -> None:
    """Write RUN/ds_config.json, where DeepSpeed's engine runs. One process calls this."""
    if config.parallel.zero_engine == "deepspeed":
        write_json(folder / FILE_NAME, engine_settings(config, world_size))


def require_native(config: Config, command: str) -> None:
    """UserError for a command that knows our own engine only."""
    if config.parallel.zero_engine != "native":
        raise UserError(
            f"parallel.zero_engine={config.parallel.zero_engine}: {command} knows our own engine only; set parallel.zero_engine to "
            f"native, parallel.zero_stage to at most 2, and remove parallel.offload, offload_path and deepspeed_config"
        )


def settings_of(config: Config, world_size: int) -> dict[str, Any]:
    """The settings that follow from our config alone."""
    optim, train, parallel = config.optim, config.train, config.parallel
    num_replicas = config.data_parallel_size(world_size)
    offload = {"device": parallel.offload, **({"nvme_path": parallel.offload_path} if parallel.offload == "nvme" else {})}
    return {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": config.num_microbatches(world_size),
        # Always said: when it is silent, deepspeed 0.19.8 clips at 1.0.
        "gradient_clipping": optim.clip_norm,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optim.lr,
                "betas": [optim.beta1, optim.beta2],
                "eps": optim.eps,
                "weight_decay": optim.weight_decay,
                # torch's fused update is as fast as DeepSpeedCPUAdam (1.26 and 1.10 G parameters/s) and compiles nothing.
                "torch_adam": True,
                "fused": True,
            },
        },
        "zero_optimization": {"stage": parallel.zero_stage, "offload_optimizer": offload},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": train.dtype == "bfloat16", "immediate_grad_update": True, "check_grad_overflow": True},
        "fp16": {"enabled": False},
        # Else both are bfloat16 where parameters are.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "bf16" if optim.grad_reduce_dtype == "bfloat16" and num_replicas > 1 else "fp32",
    }


def read_given(config: Config) -> dict[str, Any]:
    """What is in parallel.deepspeed_config, nothing when there is none. UserError if it is no JSON object."""
    name = config.parallel.deepspeed_config
    if name is None:
        return {}
    try:
        given = json.loads(Path(name).read_text(encoding="utf-8"), object_pairs_hook=_no_key_twice)
    except OSError as error:
        raise UserError(f"parallel.deepspeed_config={name}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"parallel.deepspeed_config={name}: is no JSON ({error})") from None
    if not isinstance(given, dict):
        raise UserError(f"parallel.deepspeed_config={name}: must hold an object {{...}}, holds a {type(given).__name__}")
    return given


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"the key {twice[0]} is there twice")
    return dict(pairs)


def raise_problems(config: Config, problems: list[str]) -> None:
    """UserError, a line a problem, unless there are none."""
    if problems:
        raise UserError("\n".join(f"parallel.deepspeed_config={config.parallel.deepspeed_config}: {line}" for line in problems))


def conflicts(ours: Mapping[str, Any], given: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """One line for each setting of a given file that contradicts ours, or that is not taken over."""
    allowed = {"": PASSED_ON, "zero_optimization": PASSED_ON_OF_ZERO, "zero_optimization.offload_optimizer": PASSED_ON_OF_OFFLOAD}
    for name, value in given.items():
        path = f"{at}.{name}" if at else name
        if name in ours and isinstance(ours[name], Mapping):
            if isinstance(value, Mapping):
                yield from conflicts(ours[name], value, path)
            else:
                yield f"{path}={json.dumps(value)} must be an object {{...}}"
        elif name in ours:
            if value != "auto" and not _equal(value, ours[name]):
                yield _conflict(path, value, ours[name])
        elif path == "zero_optimization.offload_param" and isinstance(value, Mapping) and value.get("device") == "nvme":
            yield f'{path}.device="nvme" is not taken over: parallel.offload=nvme moves optimizer state; make it "cpu" or remove it'
        elif name not in allowed.get(at, ()):
            yield _not_taken_over(path, name, [*ours, *allowed.get(at, ())])


def _equal(value: object, ours: object) -> bool:
    if isinstance(value, list) and isinstance(ours, list):
        return len(value) == len(ours) and all(map(_equal, value, ours))
    return value == ours and (isinstance(value, bool) == isinstance(ours, bool))


def _conflict(path: str, value: object, ours: object) -> str:
    key, wanted = DECIDED_BY.get(path), json.dumps(ours)
    if key is None:
        return f"{path}={json.dumps(value)}, but the engine runs with {wanted}; remove it from the file"
    return f"{path}={json.dumps(value)} contradicts {key}, which makes it {wanted}; remove it from the file, or change {key}"


def _not_taken_over(path: str, name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1, cutoff=0.8)
    reason = ELSEWHERE.get(path) or (f"did you mean {close[0]}?" if close else "it may change what is computed, or is unknown")
    return f"{path} is not taken over: {reason}; remove it from the file"


def _merged(ours: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(ours)
    for name, value in given.items():
        if name not in ours:
            result[name] = value
        elif isinstance(ours[name], Mapping):
            result[name] = _merged(ours[name], value)
    return result
