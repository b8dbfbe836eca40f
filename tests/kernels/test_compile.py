"""torch.compile sees each of our ops as one call: a model's ops are one graph, forward and backward, with the same results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatronish.batch import TokenContext
from megatronish.config import ModelConfig
from megatronish.models import MODELS
from megatronish.models.layers import place_dropout

S, B = 8, 2


def config(**more: Any) -> ModelConfig:
    sizes = {"num_layers": 1, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "mlp_size": 48, "vocab_size": 50}
    return ModelConfig.model_validate(sizes | more)


@pytest.mark.parametrize(
    "model",
    [config(dropout=0.2), config(architecture="gpt2", max_positions=S), config(activation="geglu", rope_layout="interleaved")],
    ids=["llama with dropout", "gpt2", "llama with GeGLU, interleaved"],
)
def test_a_model_is_one_graph_with_the_results_and_gradients_of_eager(model: ModelConfig) -> None:
    module: nn.Module = MODELS[model.architecture].module(model, dtype=torch.float64)
    place_dropout(module, seed=1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    positions = torch.arange(S)[:, None].expand(S, B)
    context = TokenContext(positions_SB=positions, sample_numbers_B=torch.arange(B), documents_SB=positions // 5)
    tokens = torch.arange(S * B).view(S, B) % 50
    graphs = []

    def count(graph: Any, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    def results(run: Any) -> list[Tensor]:
        module.zero_grad()
        logits = run(tokens, context)
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in module.parameters())]

    torch._dynamo.reset()
    compiled = results(torch.compile(module, fullgraph=True, backend=count))
    assert len(graphs) == 1
    for a, b in zip(compiled, results(module), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
