"""cos and sin of the rotary position embedding (Su et al. 2021), with the frequencies scaled for longer sequences.

Each way of scaling does the operations of transformers' ROPE_INIT_FUNCTIONS in their order: the same bits in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scaling:
    """`linear`: every frequency / factor (Chen et al. 2023). `llama3`: those that turn less than `low_freq_factor` times in the
    original length, none that turns more than `high_freq_factor` times, between them a mixture (Grattafiori et al. 2024). `yarn`:
    the same with a linear ramp over the dimensions from `beta_fast` to `beta_slow` turns, and cos and sin times `attention_factor`
    (Peng et al. 2023; None: 0.1 ln(factor) + 1)."""

    type: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    @property
    def table_factor(self) -> float:
        """What cos and sin are multiplied with."""
        if self.type != "yarn":
            return 1.0
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor


def rotary_tables(
    positions_SB: Tensor, *, size: int, theta: float, dtype: torch.dtype, scaling: Scaling | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, each [S, B, 1, R/2] in the accumulation dtype of `dtype` (float32 or float64), for the
    R = `size` elements of a head that turn."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    frequencies = rotary_frequencies(size, theta=theta, scaling=scaling, dtype=wide, device=positions_SB.device)
    angle = positions_SB.to(wide)[..., None, None] * frequencies
    cos, sin = angle.cos(), angle.sin()
    if scaling is None or scaling.table_factor == 1.0:
        return cos, sin
    return cos * scaling.table_factor, sin * scaling.table_factor


def rotary_frequencies(
    size: int, *, theta: float, scaling: Scaling | None, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """[R/2] angles that a pair turns by from one position to the next."""
    powers = theta ** (torch.arange(0, size, 2, dtype=dtype, device=device) / size)
    if scaling is None:
        return 1.0 / powers
    if scaling.type == "linear":
        return 1.0 / powers / scaling.factor
    return _llama3(1.0 / powers, scaling) if scaling.type == "llama3" else _yarn(powers, scaling, size=size, theta=theta)


def _llama3(plain: Tensor, scaling: Scaling) -> Tensor:
    length, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / plain
    is_low, is_high = wavelength > length / low, wavelength < length / high
    share = (length / wavelength - low) / (high - low)
    mixed = (1 - share) * plain / scaling.factor + share * plain
    return torch.where(is_low, plain / scaling.factor, torch.where(is_high, plain, mixed))


def _yarn(powers: Tensor, scaling: Scaling, *, size: int, theta: float) -> Tensor:
    length = scaling.original_max_position_embeddings

    def dimension(turns: float) -> float:
        """Whose pair turns so often in the original length."""
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = max(math.floor(dimension(scaling.beta_fast)), 0), min(math.ceil(dimension(scaling.beta_slow)), size - 1)
    # A step where both ends are one dimension.
    steps = (torch.arange(size // 2, dtype=powers.dtype, device=powers.device) - first) / (last - first or 0.001)
    kept = 1 - steps.clamp(0, 1)
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept
