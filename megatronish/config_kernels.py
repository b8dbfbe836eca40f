"""The section `kernels` of a config."""

from __future__ import annotations

from typing import Literal

from megatronish.config_section import Section

AttentionBody = Literal["auto", "reference", "torch", "triton", "triton-tma", "cuda", "flash-attn", "cudnn"]
NormBody = Literal["auto", "reference", "torch", "triton", "cuda", "liger", "apex", "transformer-engine"]
AddNormBody = Literal["auto", "torch", "triton", "cuda"]
PointwiseBody = Literal["auto", "torch", "triton"]
OptimizerBody = Literal["auto", "reference", "native", "triton"]


class KernelsConfig(Section):
    """Which body of an op runs. `auto`: on GPU the fastest of those that match the reference on this device, measured at the start
    and kept with the run; on CPU `torch`, and `native` for the optimizer. A body that is named here runs, or the run is refused
    with the reason."""

    attention: AttentionBody = "auto"
    """Attention, with or without documents and dropout."""
    rms_norm: NormBody = "auto"
    """Llama's norm."""
    layer_norm: NormBody = "auto"
    """GPT-2's norm."""
    add_rms_norm: AddNormBody = "auto"
    """Llama's norm of a sum with the residual stream, which stands between attention and MLP."""
    add_layer_norm: AddNormBody = "auto"
    """GPT-2's."""
    split_rotary: PointwiseBody = "auto"
    """The split of queries, keys and values and their rotation."""
    swiglu: PointwiseBody = "auto"
    """Llama's activation."""
    geglu: PointwiseBody = "auto"
    """The same with model.activation=geglu."""
    gelu: PointwiseBody = "auto"
    """GPT-2's activation."""
    bias_gelu_dropout_add: PointwiseBody = "auto"
    """Dropout before a residual sum, with the sum."""
    cross_entropy: PointwiseBody = "auto"
    """A rank's part of the loss, and the logits' gradient."""
    adamw: OptimizerBody = "auto"
    """The optimizer's step; `native` is C++ on CPU and CUDA on GPU."""
    square_sum: OptimizerBody = "auto"
    """The gradient norm's sum of squares."""

    @property
    def forced(self) -> dict[str, str]:
        """What is named, by op."""
        return {op: name for op, name in self.model_dump().items() if name != "auto"}
