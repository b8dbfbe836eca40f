"""Dropout's places: every site has its own bits, the same in a stage as in the whole model, and acts in training only. A norm that
adds first: the bits of a sum and a norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatronish.batch import TokenContext
from megatronish.config import ModelConfig
from megatronish.models import MODELS
from megatronish.models.layers import Dropout, LayerNorm, RMSNorm, WeightsDropout, place_dropout

FIELDS = {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "mlp_size": 48, "vocab_size": 61, "vocab_multiple": 1, "dropout": 0.2}


def model_of(architecture: str, chunks: list[range] | None = None) -> nn.Module:
    positions = {"max_positions": 16} if architecture == "gpt2" else {}
    config = ModelConfig.model_validate({"architecture": architecture, **positions, **FIELDS})
    model = MODELS[architecture].module(config, chunks=chunks, dtype=torch.float64)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 0.3)
    return model


def sites(model: nn.Module) -> dict[str, Dropout]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Dropout)}


@pytest.mark.parametrize("architecture", MODELS)
def test_every_site_has_bits_of_its_own_that_a_stage_has_too(architecture: str) -> None:
    whole, stage = model_of(architecture), model_of(architecture, chunks=[range(1, 2)])
    for model in (whole, stage):
        place_dropout(model, seed=5)
    keys = {name: site.key for name, site in sites(whole).items()}
    assert len(set(keys.values())) == len(keys) == 1 + 3 * 3  # the embedding; weights, attention and MLP of each block
    assert {name: site.key for name, site in sites(stage).items()} == {n: k for n, k in keys.items() if n.startswith("layers.1.")}
    place_dropout(whole, seed=6)
    assert not set(keys.values()) & {site.key for site in sites(whole).values()}


@pytest.mark.parametrize("architecture", MODELS)
def test_a_tensor_rank_holds_its_part_where_activations_are_cut(architecture: str) -> None:
    model = model_of(architecture)
    for sequence_parallel in (False, True):
        place_dropout(model, seed=5, tp_index=2, sequence_parallel=sequence_parallel)
        for site in sites(model).values():
            assert site.part == (2 if sequence_parallel or isinstance(site, WeightsDropout) else 0)


@pytest.mark.parametrize("architecture", MODELS)
def test_dropout_acts_in_training_only_and_depends_on_the_sample_number(architecture: str) -> None:
    model = model_of(architecture)
    tokens_SB = torch.arange(7)[:, None].expand(7, 2)  # the same sample twice
    positions_SB = torch.arange(7)[:, None].expand(7, 2)

    def logits(*numbers: int) -> torch.Tensor:
        out: torch.Tensor = model(tokens_SB, TokenContext(positions_SB, torch.tensor(numbers)))
        return out

    with pytest.raises(AssertionError, match="place_dropout"):
        logits(0, 1)
    place_dropout(model, seed=5)
    first = logits(3, 4)
    assert torch.equal(first, logits(3, 4))
    assert torch.equal(first.flip(1), logits(4, 3))
    assert (first[:, 0] - first[:, 1]).abs().max() > 0.1
    model.eval()
    assert torch.equal(logits(3, 4), logits(5, 6))
    assert torch.equal(logits(3, 4)[:, 0], logits(3, 4)[:, 1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_a_norm_that_adds_first_has_the_bits_of_a_sum_and_a_norm(kind: type[RMSNorm | LayerNorm], dtype: torch.dtype) -> None:
    norm = kind(24, 1e-5, dtype=dtype, device="cpu")
    torch.manual_seed(2)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    given = [torch.randn(5, 2, 24, dtype=dtype) for _ in range(4)]
    results = []
    for fused in (False, True):
        x, added = (t.clone().requires_grad_() for t in given[:2])
        y, total = norm(x, added) if fused else (norm(x + added), x + added)
        leaves = [x, added, *norm.parameters()]
        results.append([y, total, *torch.autograd.grad((y, total), leaves, given[2:])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dropout_that_adds_has_the_bits_of_dropout_and_a_sum(dtype: torch.dtype) -> None:
    site = Dropout(0.3)
    site.key, site.part = -5, 2
    torch.manual_seed(2)
    x, residual, dy = (torch.randn(5, 2, 24, dtype=dtype) for _ in range(3))
    context = TokenContext(torch.arange(5)[:, None].expand(5, 2), torch.tensor([3, 2**40]))
    results = []
    for fused in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, residual)]
        out = site(leaves[0], context, leaves[1]) if fused else leaves[1] + site(leaves[0], context)
        results.append([out, *torch.autograd.grad(out, leaves, dy)])
    assert not torch.equal(results[0][0], x + residual)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
