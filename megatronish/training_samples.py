"""Text while training: the prompts of the config, continued greedily inside the run's own layout.

Every token is a forward of the whole text so far through the pipeline, without a cache: a fixed number of tokens and of columns, so
every rank knows what to do next without looking at a value, and a rehearsal can follow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatronish.assemble import DTYPES, Assembly, forward_steps
from megatronish.batch import Batch
from megatronish.comm import Group, all_gather, all_reduce
from megatronish.comm.host import read_values
from megatronish.errors import UserError
from megatronish.generate.text import continued_text
from megatronish.layout import shard_range
from megatronish.pipeline.runtime import ActivationSpec, PipelineRuntime
from megatronish.pipeline.stage import Stage

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE_NAME = "samples.jsonl"
_WIDTH = 96  # tokens of a prompt and its continuation: a step of a large model costs more than 48 of these


@dataclass
class _LikeliestToken:
    """Stands where the loss does on the last stage. Keeps the likeliest token after `place_B` of each sample; its loss is 0."""

    vocab_size: int
    padded_vocab_size: int
    group: Group
    place_B: Tensor
    """int64 [B]"""
    chosen_B: Tensor
    """int64 [B]; zeros on other stages."""

    def __call__(self, logits_SBV: Tensor, batch: Batch, *, training: bool) -> Tensor:
        start, stop = shard_range(self.padded_vocab_size, self.group.index, self.group.size)
        samples_B = torch.arange(self.place_B.shape[0], device=self.place_B.device)
        local_BV = logits_SBV[self.place_B, samples_B].double()
        columns_V = torch.arange(start, stop, device=local_BV.device)
        best_B, index_B = local_BV.masked_fill(columns_V >= self.vocab_size, -torch.inf).max(-1)
        # A float64 holds a token's number exactly: one gathering for both.
        of_ranks_R2B = all_gather(torch.stack((best_B, (index_B + start).double()))[None], self.group, what="likeliest tokens")
        winner_1B = of_ranks_R2B[:, 0].argmax(0, keepdim=True)
        self.chosen_B = of_ranks_R2B[:, 1].gather(0, winner_1B)[0].long()
        return torch.zeros((), device=logits_SBV.device)


class TrainingSamples:
    """Continues `prompts`. Without a tokenizer, in a rehearsal, with made-up tokens."""

    def __init__(self, run: Assembly, prompts: Sequence[str], tokenizer: Tokenizer | None) -> None:
        self.run, self.prompts, self.tokenizer = run, tuple(prompts), tokenizer
        config, mesh = run.config, run.mesh
        cut = mesh.size("tp") if config.parallel.sequence else 1
        self._width = min(_WIDTH, config.data.sequence_length) // cut * cut
        self.num_tokens = self._width // 2
        encoded = [list(tokenizer.encode(p, add_special_tokens=False).ids) if tokenizer is not None else [0] for p in prompts]
        for prompt, tokens in zip(self.prompts, encoded, strict=True):
            if not tokens:
                raise UserError(f"observe.sample_prompts: {prompt!r} gives no tokens; name a prompt with some text")
        # The end of a long prompt is what matters most.
        self._encoded = [tokens[-(self._width - self.num_tokens) :] for tokens in encoded]
        B = len(prompts)
        model, zeros_B = config.model, torch.zeros(B, dtype=torch.int64, device=mesh.device)
        self._pick = _LikeliestToken(model.vocab_size, model.padded_vocab_size, mesh.groups["tp"], zeros_B, zeros_B)
        stage = Stage(
            run.cut.model,
            stage=mesh.index("pp"),
            num_stages=mesh.size("pp"),
            num_chunks=config.parallel.num_chunks,
            loss_function=self._pick,
        )
        shape = (self._width // cut, B, config.model.hidden_size)
        activation = ActivationSpec(shape, DTYPES[config.train.dtype], mesh.device)
        self._pipeline = PipelineRuntime(stage, group=mesh.groups["pp"], activation=activation, device_kind=mesh.device_kind)
        self._steps = forward_steps(config, mesh)

    def draw(self) -> list[list[int]]:
        """The tokens that follow each prompt, the same on every rank. Collective over the job; the host waits once."""
        mesh, B = self.run.mesh, len(self.prompts)
        self.run.optimizer.ensure_parameters()
        tokens_SB = torch.zeros(self._width, B, dtype=torch.int64)
        for b, prompt in enumerate(self._encoded):
            tokens_SB[: len(prompt), b] = torch.tensor(prompt)
        tokens_SB = tokens_SB.to(mesh.device)
        lengths_B = torch.tensor([len(prompt) for prompt in self._encoded], device=mesh.device)
        samples_B = torch.arange(B, device=mesh.device)
        positions_SB = torch.arange(self._width, device=mesh.device)[:, None].expand(self._width, B).contiguous()
        batch = Batch(tokens_SB, tokens_SB, torch.zeros(self._width, B, device=mesh.device), positions_SB, samples_B)
        for i in range(self.num_tokens):
            self._pick.place_B = lengths_B + (i - 1)
            self._pipeline.run(self._steps, [batch])
            # Zeros on all stages but the last. A copy: the sum is in place.
            tokens_SB[lengths_B + i, samples_B] = all_reduce(self._pick.chosen_B.clone(), mesh.groups["pp"], what="chosen tokens")
        places_NB = lengths_B + torch.arange(self.num_tokens, device=mesh.device)[:, None]
        flat = tokens_SB.gather(0, places_NB).t().flatten()
        values = [int(value) for value in read_values(flat, [0] * flat.numel())]
        return [values[b * self.num_tokens : (b + 1) * self.num_tokens] for b in range(B)]

    def texts(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """What `draw` gave, as text."""
        assert self.tokenizer is not None
        return [continued_text(self.tokenizer, p, new) for p, new in zip(self._encoded, tokens, strict=True)]


def write_samples(run_dir: Path, *, step: int, prompts: Sequence[str], texts: Sequence[str], show: Callable[[str], None]) -> None:
    """One line a prompt to RUN/samples.jsonl and to `show`."""
    rows = [{"step": step, "prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
    try:
        with open(run_dir / FILE_NAME, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise UserError(f"{run_dir / FILE_NAME}: cannot be written ({error.strerror}); free space, or change run_root") from None
    for prompt, text in zip(prompts, texts, strict=True):
        show(f"step {step}: sample: {json.dumps(prompt + text, ensure_ascii=False)}")
