"""Our GPT-2 against Hugging Face's: logits, gradients, names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatronish.batch import TokenContext
from megatronish.config import ModelConfig
from megatronish.errors import UserError
from megatronish.interop.gpt2 import GPT2
from megatronish.models import gpt2

transformers = pytest.importorskip("transformers")

COMMON = {"architecture": "gpt2", "max_positions": 24, "tie_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "square": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "mlp_size": 128, "vocab_size": 128},
    "untied": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "mlp_size": 128, "vocab_size": 128, "tie_embeddings": False},
    "odd sizes": {"num_layers": 3, "hidden_size": 30, "num_heads": 6, "mlp_size": 77, "vocab_size": 131, "vocab_multiple": 7},
    "odd heads": {"num_layers": 1, "hidden_size": 15, "num_heads": 5, "mlp_size": 40, "vocab_size": 50, "max_positions": 31},
    "large epsilon": {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "mlp_size": 48, "vocab_size": 64, "norm_eps": 1e-2},
}
shapes = pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES.keys())


def their_model(config: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """Hugging Face's model of this shape; every parameter random, so that one in the wrong place shows."""
    torch.manual_seed(0)
    given = transformers.GPT2Config.from_dict(GPT2.write_config(config, 24))
    model = transformers.GPT2LMHeadModel(given).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0, 0.2)
    return model


def parameters_of(theirs: nn.Module) -> dict[str, Tensor]:
    """Without the projection where it is the embedding."""
    return dict(theirs.named_parameters())


def both(fields: dict[str, Any], dtype: torch.dtype) -> tuple[ModelConfig, gpt2.GPT2, nn.Module, Tensor]:
    config = ModelConfig.model_validate({**COMMON, **fields})
    theirs = their_model(config, dtype)
    ours = gpt2.GPT2(config, dtype=dtype)
    ours.load_state_dict(GPT2.from_hugging_face(config, parameters_of(theirs)))
    tokens_SB = torch.randint(config.vocab_size, (24, 3), generator=torch.Generator().manual_seed(1))
    return config, ours, theirs, tokens_SB


def context_of(tokens_SB: Tensor) -> TokenContext:
    S, B = tokens_SB.shape
    return TokenContext(torch.arange(S)[:, None].expand(S, B), torch.arange(B))


@shapes
def test_logits_equal_hugging_face(fields: dict[str, Any]) -> None:
    config, ours, theirs, tokens_SB = both(fields, torch.float32)
    with torch.no_grad():
        got = ours(tokens_SB, context_of(tokens_SB))[..., : config.vocab_size]
        expected = theirs(tokens_SB.t()).logits.transpose(0, 1)
    assert expected.std() > 0.5  # else a small difference would say little
    assert (got - expected).abs().max() < 1e-4


@shapes
def test_every_gradient_equals_hugging_face(fields: dict[str, Any]) -> None:
    config, ours, theirs, tokens_SB = both(fields, torch.float64)
    labels = tokens_SB.roll(-1, 0)
    logits = ours(tokens_SB, context_of(tokens_SB))[..., : config.vocab_size]
    nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    nn.functional.cross_entropy(theirs(tokens_SB.t()).logits.transpose(0, 1).flatten(0, 1), labels.flatten()).backward()
    got = GPT2.to_hugging_face(config, {name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    names = [name for name, _ in theirs.named_parameters()]
    assert sorted(got) == sorted(names)
    for name, parameter in theirs.named_parameters():
        # float64 throughout: 2e-16 through a few layers and back. The gradient of a key's bias is zero but for rounding.
        error = (got[name] - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error < 1e-12, f"{name} is off by {error:.1e}"


@shapes
def test_the_name_map_is_total_and_reversible(fields: dict[str, Any]) -> None:
    config = ModelConfig.model_validate({**COMMON, **fields})
    theirs = parameters_of(their_model(config, torch.float32))
    ours = GPT2.from_hugging_face(config, theirs)
    plain = gpt2.GPT2(config, dtype=torch.float32, device="meta")
    assert {name: p.shape for name, p in ours.items()} == {name: p.shape for name, p in plain.named_parameters()}
    assert list(GPT2.name_map(config)) == [name for name, _ in plain.named_parameters()]
    assert GPT2.shapes(config) == {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    back = GPT2.to_hugging_face(config, ours)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    assert not ours["embedding.weight"][config.vocab_size :].any()


def test_a_model_with_grouped_keys_is_not_written_as_theirs() -> None:
    config = ModelConfig.model_validate({**COMMON, **SHAPES["square"], "num_kv_heads": 2})
    with pytest.raises(UserError, match=r"model\.num_kv_heads=2 for model\.num_heads=4"):
        GPT2.write_config(config, 24)
