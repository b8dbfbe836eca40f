"""A sample of several documents, with restarted positions, is the same as its documents one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatronish.batch import TokenContext
from megatronish.config import ModelConfig
from megatronish.models import MODELS

FIELDS = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "mlp_size": 48, "vocab_size": 61, "vocab_multiple": 1}


@pytest.mark.parametrize("architecture", MODELS)
def test_loss_and_gradients_of_a_packed_sample_equal_those_of_its_documents(architecture: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig.model_validate({"architecture": architecture, "max_positions": 32, **FIELDS})
    model = MODELS[architecture].module(config, dtype=torch.float64)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 0.3)
    lengths = [7, 1, 12, 4]
    tokens_SB = torch.randint(61, (sum(lengths), 1))
    labels_SB = torch.randint(61, (sum(lengths), 1))

    def losses(begin: int, size: int, documents: list[int] | None) -> torch.Tensor:
        positions = torch.cat([torch.arange(n) for n in (documents or [size])])[:, None]
        numbers = None if documents is None else torch.arange(len(documents)).repeat_interleave(torch.tensor(documents))[:, None]
        context = TokenContext(positions, torch.zeros(1, dtype=torch.int64), numbers)
        logits = model(tokens_SB[begin : begin + size], context)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels_SB[begin : begin + size].flatten(), reduction="none")

    packed = losses(0, sum(lengths), lengths)
    packed_grads = torch.autograd.grad(packed.sum(), list(model.parameters()))
    begins = [sum(lengths[:i]) for i in range(len(lengths))]
    alone = torch.cat([losses(begin, size, None) for begin, size in zip(begins, lengths, strict=True)])
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)
    for got, expected in zip(packed_grads, torch.autograd.grad(alone.sum(), list(model.parameters())), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    assert (losses(0, sum(lengths), None) - alone).abs().max() > 1e-3  # else documents would not matter
