"""The next token from logits: greedy, or drawn with temperature, top-k (Fan et al. 2018) and top-p (Holtzman et al. 2020).

A draw is a function of (seed, number of the prompt, position), by Philox: the same text comes out whatever other prompts are in the
batch, and on every tensor rank without a word between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatronish.comm.random import philox, stream_key
from megatronish.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. UserError for what cannot be."""

    temperature: float = 1.0
    """0: the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest tokens."""
    top_p: float | None = None
    """Only the fewest tokens that hold this share of the probability, after top_k."""
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"--temperature {self.temperature}: must be a finite number, 0 (the likeliest token) or more")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"--top-k {self.top_k}: must be 1 or more; leave it out for no limit")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"--top-p {self.top_p}: must be above 0 and at most 1; leave it out for no limit")
        if not 0 <= self.seed < 2**63:
            problems.append(f"--seed {self.seed}: must be 0 or more and below 2^63")
        if problems:
            raise UserError("\n".join(problems))


def next_tokens(logits_BV: Tensor, *, sampling: Sampling, numbers_B: Tensor, positions_B: Tensor) -> Tensor:
    """int64 [B]: the tokens at `positions_B` of the prompts `numbers_B`, from logits of real tokens only (no padding)."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    probabilities_BV, order_BV = kept_probabilities(logits_BV, sampling)
    sums_BV = probabilities_BV.cumsum(-1)
    # The inverse of the cumulative distribution. The last token kept is the one where the sum stops growing.
    drawn_B = uniform(sampling.seed, numbers_B, positions_B)[:, None] * sums_BV[:, -1:]
    index_B1 = (sums_BV <= drawn_B).sum(-1, keepdim=True)
    return order_BV.gather(-1, index_B1).squeeze(-1)


def kept_probabilities(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(float64 probabilities, falling, zero for tokens that top_k or top_p leaves out; the tokens in that order)."""
    sorted_BV, order_BV = logits_BV.double().sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        sorted_BV[:, sampling.top_k :] = -torch.inf
    probabilities_BV = (sorted_BV / sampling.temperature).softmax(-1)
    if sampling.top_p is not None:
        before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
        # The first token stays, whatever rounding does to `before`.
        out_BV = before_BV >= sampling.top_p
        out_BV[:, 0] = False
        probabilities_BV = probabilities_BV.masked_fill(out_BV, 0.0)
        probabilities_BV /= probabilities_BV.sum(-1, keepdim=True)
    return probabilities_BV, order_BV


def uniform(seed: int, numbers: Tensor, positions: Tensor) -> Tensor:
    """float64 in [0, 1), of 53 bits: a function of (seed, number, position)."""
    words = philox((numbers << 32) | positions, stream_key(seed, "generate"))
    return (((words[0] >> 5) << 26) | (words[1] >> 6)).double() * 2.0**-53
