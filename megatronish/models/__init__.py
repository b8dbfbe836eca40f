"""Plain single-device models. The table that the config's `model.architecture` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from megatronish.config import ModelConfig
from megatronish.layout import Plan
from megatronish.models import decoder, gpt2, llama


@dataclass(frozen=True)
class Architecture:
    """A row of MODELS: the module class and what stands beside it."""

    module: type[nn.Module]
    tensor_parallel_plan: Plan
    init_std: Callable[[ModelConfig, str], float | None]
    """`(config, parameter name) -> float | None`: standard deviation of its first weights; None: all ones, 0: all zeros."""
    selective_recompute: Mapping[str, str]
    """Module name -> the linear that consumes its output (`*`: the same part in both)."""

    def plan(self, config: ModelConfig) -> Plan:
        """The rules for the modules that a model of this config has: a tied one has no head."""
        return {
            pattern: rule for pattern, rule in self.tensor_parallel_plan.items() if pattern != "head" or not config.tie_embeddings
        }

    def tied_parameters(self, config: ModelConfig) -> tuple[str, ...]:
        """Names of the parameters that are used at both ends of the model."""
        return ("embedding.weight",) if config.tie_embeddings else ()


MODELS = {
    "llama": Architecture(llama.Llama, llama.TENSOR_PARALLEL_PLAN, decoder.init_std, llama.SELECTIVE_RECOMPUTE),
    "gpt2": Architecture(gpt2.GPT2, gpt2.TENSOR_PARALLEL_PLAN, decoder.init_std, gpt2.SELECTIVE_RECOMPUTE),
}
