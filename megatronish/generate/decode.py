"""The loop: prompts in, tokens out. One forward over all prompts, then one token of each a forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from megatronish.batch import TokenContext
from megatronish.comm import Group, all_reduce
from megatronish.comm.host import read_values
from megatronish.generate.cache import CacheRows, clear_cache, install_cache
from megatronish.generate.sampling import Sampling, next_tokens
from megatronish.layout import shard_range

Finish = Literal["end of text", "max tokens", "max positions"]


@dataclass(frozen=True)
class Limits:
    """When to stop."""

    max_tokens: int
    max_positions: int | None = None
    """Positions that the model has, prompt included."""
    end_token: int | None = None
    """Ends a text; not part of it."""


@dataclass
class Continuation:
    """What followed one prompt."""

    tokens: list[int]
    finish: Finish = "max tokens"


class Generator:
    """A model of one stage with a cache in place of its attention; cut over a tensor group, whose ranks all call it alike."""

    def __init__(self, model: nn.Module, *, vocab_size: int, padded_vocab_size: int, tp: Group, device: torch.device) -> None:
        self.model = model.eval()
        self.vocab_size, self.padded_vocab_size = vocab_size, padded_vocab_size
        self.tp, self.device = tp, device
        self._rows: CacheRows = install_cache(model)

    @torch.no_grad()
    def run(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        numbers: Sequence[int],
        sampling: Sampling,
        limits: Limits,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Continuation]:
        """Continue each prompt (of one token or more). `numbers` names the prompts in the draws; `on_token` hears (place, token).

        Collective over the tensor group; the host waits for each token."""
        lengths = [len(prompt) for prompt in prompts]
        room = max(lengths) + limits.max_tokens
        room = room if limits.max_positions is None else min(room, limits.max_positions)
        clear_cache(self.model, self._rows, reserved=room)
        numbers_B = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        next_positions = list(lengths)
        logits_BV = self._read_prompts(prompts, numbers_B)
        texts = [Continuation([]) for _ in prompts]
        going = [True] * len(prompts)
        while True:
            for b, position in enumerate(next_positions):
                if going[b] and (len(texts[b].tokens) == limits.max_tokens or position == limits.max_positions):
                    going[b] = False
                    texts[b].finish = "max tokens" if len(texts[b].tokens) == limits.max_tokens else "max positions"
            if not any(going):
                return texts
            positions_B = torch.tensor(next_positions, dtype=torch.int64, device=self.device)
            chosen_B = next_tokens(logits_BV, sampling=sampling, numbers_B=numbers_B, positions_B=positions_B)
            for b, token in enumerate(map(int, read_values(chosen_B, [0] * len(prompts)))):
                if not going[b]:
                    continue
                if token == limits.end_token:
                    going[b], texts[b].finish = False, "end of text"
                    continue
                texts[b].tokens.append(token)
                next_positions[b] += 1
                if on_token is not None:
                    on_token(b, token)
            if not any(going):
                return texts
            # Who has ended writes on where it stands: that row is its own, and nobody looks.
            places_B = (torch.tensor(next_positions, dtype=torch.int64, device=self.device) - 1).clamp_max(room - 1)
            self._rows.used = max(next_positions)
            logits_BV = self._whole(self._forward(chosen_B[None], places_B[None], numbers_B)[0])

    def _read_prompts(self, prompts: Sequence[Sequence[int]], numbers_B: Tensor) -> Tensor:
        """Fill the cache; logits [B, V] after each prompt's last token."""
        S, B = max(map(len, prompts)), len(prompts)
        tokens_SB = torch.zeros(S, B, dtype=torch.int64)
        for b, prompt in enumerate(prompts):
            tokens_SB[: len(prompt), b] = torch.tensor(prompt)
        self._rows.used = S
        positions_SB = torch.arange(S, device=self.device)[:, None].expand(S, B)
        logits_SBV = self._forward(tokens_SB.to(self.device), positions_SB, numbers_B)
        last_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        return self._whole(logits_SBV[last_B, torch.arange(B, device=self.device)])

    def _forward(self, tokens_SB: Tensor, positions_SB: Tensor, numbers_B: Tensor) -> Tensor:
        logits_SBV: Tensor = self.model(tokens_SB, TokenContext(positions_SB, numbers_B))
        return logits_SBV

    def _whole(self, local_BV: Tensor) -> Tensor:
        """Every tensor rank's columns, without the padding: the same bits on all of them. Collective over the tensor group."""
        if self.tp.size > 1:
            start, stop = shard_range(self.padded_vocab_size, self.tp.index, self.tp.size)
            whole_BV = local_BV.new_zeros(local_BV.shape[0], self.padded_vocab_size)
            whole_BV[:, start:stop] = local_BV
            local_BV = all_reduce(whole_BV, self.tp, what="logits")  # each element is a sum with zeros: exact
        return local_BV[:, : self.vocab_size]
