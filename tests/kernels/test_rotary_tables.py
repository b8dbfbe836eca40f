"""Rotary frequencies and tables against those of transformers, to the bit; in float64 against float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatronish.kernels.rotary_tables import Scaling, rotary_frequencies, rotary_tables

transformers = pytest.importorskip("transformers")

LONG = {"original_max_position_embeddings": 8192}
CASES: dict[str, tuple[int, float, float, dict[str, Any]]] = {
    # head size, share of it, base, scaling
    "linear": (64, 1.0, 1e4, {"type": "linear", "factor": 3.0}),
    "linear, in part": (80, 0.4, 1e4, {"type": "linear", "factor": 2.5}),
    "Llama 3.1": (128, 1.0, 5e5, {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LONG}),
    "Llama 3.2": (64, 1.0, 5e5, {"type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LONG}),
    "llama3, in part": (96, 0.5, 1e4, {"type": "llama3", "factor": 3.0, "low_freq_factor": 2.0, "high_freq_factor": 2.5, **LONG}),
    "YaRN": (128, 1.0, 1e6, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
    "YaRN, all given": (
        128,
        1.0,
        1e4,
        {"type": "yarn", "factor": 16.0, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.25, **LONG},
    ),
    "YaRN, in part, short": (64, 0.25, 1e4, {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 5}),
    "YaRN, a step": (8, 1.0, 1e12, {"type": "yarn", "factor": 2.0, "beta_fast": 1.01, "beta_slow": 1.0, **LONG}),
}
cases = pytest.mark.parametrize("name", CASES)


def theirs(name: str) -> tuple[torch.Tensor, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    K, share, theta, scaling = CASES[name]
    parameters = {"rope_type": scaling["type"], **{k: v for k, v in scaling.items() if k != "type"}, "rope_theta": theta}
    config = transformers.LlamaConfig(hidden_size=2 * K, num_attention_heads=2, rope_parameters=parameters)
    config.rope_parameters["partial_rotary_factor"] = share
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[scaling["type"]](config)
    return frequencies, attention_factor


@cases
def test_frequencies_have_the_bits_of_transformers(name: str) -> None:
    K, share, theta, scaling = CASES[name]
    R = int(K * share)
    got = rotary_frequencies(R, theta=theta, scaling=Scaling(**scaling), dtype=torch.float32)
    expected, attention_factor = theirs(name)
    assert torch.equal(got, expected)
    assert Scaling(**scaling).table_factor == attention_factor
    plain = rotary_frequencies(R, theta=theta, scaling=None, dtype=torch.float32)
    assert not torch.equal(got, plain)
    # In float64 the same formula: some ten roundings of float32, and of a sum of two terms.
    wide = rotary_frequencies(R, theta=theta, scaling=Scaling(**scaling), dtype=torch.float64)
    assert ((got - wide).abs() <= 16 * torch.finfo(torch.float32).eps * plain).all()


@cases
def test_tables_have_the_bits_of_transformers_llama(name: str) -> None:
    K, share, theta, scaling = CASES[name]
    frequencies, attention_factor = theirs(name)
    positions_SB = torch.tensor([[0, 7], [1, 4000], [2, 100_003]])
    cos, sin = rotary_tables(positions_SB, size=int(K * share), theta=theta, dtype=torch.bfloat16, scaling=Scaling(**scaling))
    angle = positions_SB[..., None].float() * frequencies
    assert torch.equal(cos.squeeze(2), angle.cos() * attention_factor) and torch.equal(
        sin.squeeze(2), angle.sin() * attention_factor
    )
