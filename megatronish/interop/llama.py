"""Llama's parameters under Hugging Face's names (LlamaForCausalLM), both ways. Needs torch alone.

Theirs are one matrix a projection; ours are fused: QKV [G, q + 2, K, D], gate and up [2, F, D]. Theirs have vocab_size rows; ours
are padded. Both rotate half against half, so no row changes its place inside a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatronish.config import ModelConfig
from megatronish.errors import UserError

# Ours -> theirs, outside of blocks and inside. Several names: ours is fused of them, in this order.
OUTSIDE: dict[str, tuple[str, ...]] = {
    "embedding.weight": ("model.embed_tokens.weight",),
    "final_norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
}
IN_BLOCK: dict[str, tuple[str, ...]] = {
    "attention_norm.weight": ("input_layernorm.weight",),
    "attention.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attention.output.weight": ("self_attn.o_proj.weight",),
    "mlp_norm.weight": ("post_attention_layernorm.weight",),
    "mlp.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.down.weight": ("mlp.down_proj.weight",),
}
VOCABULARY = ("embedding.weight", "head.weight")


def name_map(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Our name of every parameter of the model -> theirs, in our order."""
    names = {"embedding.weight": OUTSIDE["embedding.weight"]}
    for layer in range(config.num_layers):
        for ours, theirs in IN_BLOCK.items():
            names[f"layers.{layer}.{ours}"] = tuple(f"model.layers.{layer}.{name}" for name in theirs)
    return {**names, **OUTSIDE}


def to_hugging_face(config: ModelConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our whole parameters (or their gradients) by name -> theirs, contiguous copies; the vocabulary's padding is cut off."""
    theirs: dict[str, Tensor] = {}
    for our_name, their_names in name_map(config).items():
        for name, part in zip(their_names, _split(config, our_name, ours[our_name]), strict=True):
            theirs[name] = part.clone(memory_format=torch.contiguous_format)
    return theirs


def from_hugging_face(config: ModelConfig, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Theirs by name -> our whole parameters; the vocabulary's padding is zeros. UserError names what is missing, unknown or of
    another shape."""
    names = name_map(config)
    expected = {name for group in names.values() for name in group}
    for what, found in (("missing", expected - set(theirs)), ("unknown", set(theirs) - expected)):
        if found:
            first = ", ".join(sorted(found)[:10])
            raise UserError(f"{len(found)} {what} tensors for a Llama of model.num_layers={config.num_layers}: {first}")
    ours = {}
    for our_name, their_names in names.items():
        for name in their_names:
            _check_shape(config, name, theirs[name])
        ours[our_name] = _fuse(config, our_name, [theirs[name] for name in their_names])
    return ours


def hugging_face_config(config: ModelConfig, sequence_length: int) -> dict[str, Any]:
    """The config.json of the same model. Both spellings of the rotary base: `rope_parameters` is read since transformers 5."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": sequence_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


def _split(config: ModelConfig, our_name: str, tensor: Tensor) -> list[Tensor]:
    if our_name.endswith("qkv.weight"):
        q = config.num_heads // config.kv_heads
        return [part.flatten(0, 2) for part in tensor.split([q, 1, 1], dim=1)]
    if our_name.endswith("gate_up.weight"):
        return list(tensor.unbind(0))
    return [tensor[: config.vocab_size] if our_name in VOCABULARY else tensor]


def _fuse(config: ModelConfig, our_name: str, parts: list[Tensor]) -> Tensor:
    if our_name.endswith("qkv.weight"):
        by_group = [part.unflatten(0, (config.kv_heads, -1, config.head_size)) for part in parts]
        return torch.cat(by_group, dim=1)
    if our_name.endswith("gate_up.weight"):
        return torch.stack(parts)
    (tensor,) = parts
    if our_name in VOCABULARY:
        padding = tensor.new_zeros(config.padded_vocab_size - config.vocab_size, config.hidden_size)
        return torch.cat((tensor, padding))
    return tensor.clone()


def _check_shape(config: ModelConfig, name: str, tensor: Tensor) -> None:
    D, K = config.hidden_size, config.head_size
    rows = {
        "embed_tokens": config.vocab_size,
        "lm_head": config.vocab_size,
        "q_proj": config.num_heads * K,
        "k_proj": config.kv_heads * K,
        "v_proj": config.kv_heads * K,
        "gate_proj": config.mlp_size,
        "up_proj": config.mlp_size,
    }
    kind = name.split(".")[-2]
    columns = {"o_proj": config.num_heads * K, "down_proj": config.mlp_size}.get(kind, D)
    shape = (D,) if kind.endswith("norm") else (rows.get(kind, D), columns)
    if tuple(tensor.shape) != shape:
        raise UserError(f"{name} has shape {list(tensor.shape)}, the model section of the config makes it {list(shape)}")
