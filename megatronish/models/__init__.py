"""Plain single-device models. The table that the config's `model.architecture` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from megatronish.config import ModelConfig
from megatronish.layout import Plan
from megatronish.models import llama


@dataclass(frozen=True)
class Architecture:
    """A row of MODELS: the module class and what stands beside it."""

    module: type[nn.Module]
    tensor_parallel_plan: Plan
    init_std: Callable[[ModelConfig, str], float | None]
    """`(config, parameter name) -> float | None`: standard deviation of its first weights; None: all ones."""
    selective_recompute: Mapping[str, str]
    """Module name -> the linear that consumes its output (`*`: the same part in both)."""


MODELS = {"llama": Architecture(llama.Llama, llama.TENSOR_PARALLEL_PLAN, llama.init_std, llama.SELECTIVE_RECOMPUTE)}
