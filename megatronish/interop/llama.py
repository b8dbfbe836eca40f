"""Llama's counterpart in transformers, LlamaForCausalLM. It rotates half against half, so rows inside a head move where ours are
interleaved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatronish.config import ModelConfig
from megatronish.errors import UserError
from megatronish.interop import rope
from megatronish.interop.foreign_config import ForeignConfig
from megatronish.interop.names import VOCABULARY, Interop, pad_rows


def write_config(config: ModelConfig, positions: int) -> dict[str, Any]:
    """The config.json of the same model. UserError if only part of a head turns."""
    if config.rotary_size != config.head_size:
        raise UserError(
            f"model.partial_rotary_factor={config.partial_rotary_factor}: Hugging Face's Llama turns whole heads, so this model "
            f"cannot be written as one"
        )
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
        "max_position_embeddings": rope.positions(config, positions),
        "rms_norm_eps": config.norm_eps,
        **rope.write(config),
        "initializer_range": config.init_std,
        "hidden_act": "silu" if config.activation == "swiglu" else "gelu_pytorch_tanh",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
    }


def read_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Our model section of a config.json of theirs; what it leaves out has the library's defaults."""
    given = ForeignConfig(values)
    given.must_be("hidden_act", "silu", "gelu_pytorch_tanh", "gelu_new", default="silu")  # the last two are one formula
    for key in ("attention_bias", "mlp_bias"):
        given.must_be(key, False, default=False)
    heads, hidden = given.integer("num_attention_heads"), given.integer("hidden_size")
    given.must_be("head_dim", hidden // heads, None, default=None)
    given.must_be("sliding_window", None, default=None)
    given.ignore("pretraining_tp")
    section = {
        "architecture": "llama",
        "num_layers": given.integer("num_hidden_layers"),
        "hidden_size": hidden,
        "num_heads": heads,
        "mlp_size": given.integer("intermediate_size"),
        "vocab_size": given.integer("vocab_size"),
        **rope.read(given),
        "activation": "swiglu" if given.take("hidden_act", default="silu") == "silu" else "geglu",
        "norm_eps": given.number("rms_norm_eps", default=1e-6),
        "init_std": given.number("initializer_range", default=0.02),
        "tie_embeddings": given.boolean("tie_word_embeddings", default=False),
        "dropout": given.number("attention_dropout", default=0.0),
    }
    kv_heads = given.integer("num_key_value_heads", default=heads)
    given.finish()
    return section if kv_heads == heads else {**section, "num_kv_heads": kv_heads}


def split(config: ModelConfig, our_name: str, tensor: Tensor) -> list[Tensor]:
    """Ours -> theirs, views where possible."""
    if our_name.endswith("qkv.weight"):
        q = config.num_heads // config.kv_heads
        *turned, value = tensor.split([q, 1, 1], dim=1)
        if config.rope_layout == "interleaved":
            turned = [torch.cat((part[:, :, ::2], part[:, :, 1::2]), dim=2) for part in turned]
        return [part.flatten(0, 2) for part in (*turned, value)]
    if our_name.endswith("gate_up.weight"):
        return list(tensor.unbind(0))
    return [tensor[: config.vocab_size] if our_name in VOCABULARY else tensor]


def fuse(config: ModelConfig, our_name: str, parts: list[Tensor]) -> Tensor:
    """Theirs -> ours, a copy."""
    if our_name.endswith("qkv.weight"):
        *turned, value = (part.unflatten(0, (config.kv_heads, -1, config.head_size)) for part in parts)
        if config.rope_layout == "interleaved":
            turned = [torch.stack(part.chunk(2, dim=2), dim=3).flatten(2, 3) for part in turned]
        return torch.cat((*turned, value), dim=1)
    if our_name.endswith("gate_up.weight"):
        return torch.stack(parts)
    (tensor,) = parts
    return pad_rows(config, tensor) if our_name in VOCABULARY else tensor.clone()


LLAMA = Interop(
    model_type="llama",
    class_name="LlamaForCausalLM",
    outside={
        "embedding.weight": ("model.embed_tokens.weight",),
        "final_norm.weight": ("model.norm.weight",),
        "head.weight": ("lm_head.weight",),
    },
    in_block={
        "attention_norm.weight": ("input_layernorm.weight",),
        "attention.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "attention.output.weight": ("self_attn.o_proj.weight",),
        "mlp_norm.weight": ("post_attention_layernorm.weight",),
        "mlp.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "mlp.down.weight": ("mlp.down_proj.weight",),
    },
    block_prefix="model.layers.{}.",
    split=split,
    fuse=fuse,
    write_config=write_config,
    read_config=read_config,
    ignored=("*.rotary_emb.inv_freq",),
)
