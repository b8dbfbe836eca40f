"""GPT-2's counterpart in transformers, GPT2LMHeadModel. Its matrices are [in, out], and its c_attn is all queries, all keys, all
values, where ours goes head by head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megatronish.config import ModelConfig
from megatronish.errors import UserError
from megatronish.interop.foreign_config import ForeignConfig
from megatronish.interop.names import VOCABULARY, Interop, pad_rows

_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
_TRANSPOSED = ("qkv.weight", "output.weight", "up.weight", "down.weight")


def write_config(config: ModelConfig, positions: int) -> dict[str, Any]:
    """The config.json of the same model; the table of positions has its own size, whatever `positions`."""
    if config.kv_heads != config.num_heads:
        raise UserError(
            f"model.num_kv_heads={config.kv_heads} for model.num_heads={config.num_heads}: Hugging Face's GPT-2 has a key and a "
            f"value for each query head, so this model cannot be written as one"
        )
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.max_positions,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        **dict.fromkeys(_DROPOUTS, config.dropout),
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": config.tie_embeddings,
    }


def read_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Our model section of a config.json of theirs; what it leaves out has the library's defaults."""
    given = ForeignConfig(values)
    given.must_be("activation_function", "gelu_new", "gelu_pytorch_tanh", default="gelu_new")
    given.must_be("scale_attn_weights", True, default=True)
    given.must_be("scale_attn_by_inverse_layer_idx", False, default=False)
    given.must_be("add_cross_attention", False, default=False)
    # The same mathematics in other precision; and of heads that are not the language model's.
    given.ignore("reorder_and_upcast_attn", "n_ctx", *(key for key in values if key.startswith("summary_")))
    hidden = given.integer("n_embd", default=768)
    rates = {given.number(key, default=0.1) for key in _DROPOUTS}
    inner = given.take("n_inner", default=None)
    section = {
        "architecture": "gpt2",
        "num_layers": given.integer("n_layer", default=12),
        "hidden_size": hidden,
        "num_heads": given.integer("n_head", default=12),
        "mlp_size": 4 * hidden if inner is None else inner,
        "vocab_size": given.integer("vocab_size", default=50257),
        "max_positions": given.integer("n_positions", default=1024),
        "norm_eps": given.number("layer_norm_epsilon", default=1e-5),
        "init_std": given.number("initializer_range", default=0.02),
        "tie_embeddings": given.boolean("tie_word_embeddings", default=True),
    }
    given.finish()
    # One rate for all three here. Where theirs differ, none: it says nothing of what the model computes.
    return {**section, "dropout": rates.pop() if len(rates) == 1 else 0.0}


def split(config: ModelConfig, our_name: str, tensor: Tensor) -> list[Tensor]:
    """Ours -> theirs, views where possible."""
    if our_name.endswith(("qkv.weight", "qkv.bias")):
        tensor = tensor.transpose(0, 1).flatten(0, 2)  # [H, 3, K, ...] -> [3 H K, ...]
    if our_name.endswith(_TRANSPOSED):
        return [tensor.t()]
    return [tensor[: config.vocab_size] if our_name in VOCABULARY else tensor]


def fuse(config: ModelConfig, our_name: str, parts: list[Tensor]) -> Tensor:
    """Theirs -> ours, a copy."""
    (tensor,) = parts
    if our_name.endswith(_TRANSPOSED):
        tensor = tensor.t()
    if our_name.endswith(("qkv.weight", "qkv.bias")):
        return tensor.unflatten(0, (3, config.num_heads, config.head_size)).transpose(0, 1).contiguous()
    return pad_rows(config, tensor) if our_name in VOCABULARY else tensor.contiguous().clone()


def _both(ours: str, theirs: str) -> dict[str, tuple[str, ...]]:
    return {f"{ours}.{leaf}": (f"{theirs}.{leaf}",) for leaf in ("weight", "bias")}


GPT2 = Interop(
    model_type="gpt2",
    class_name="GPT2LMHeadModel",
    outside={
        "embedding.weight": ("transformer.wte.weight",),
        "positions.weight": ("transformer.wpe.weight",),
        **_both("final_norm", "transformer.ln_f"),
        "head.weight": ("lm_head.weight",),
    },
    in_block={
        **_both("attention_norm", "ln_1"),
        **_both("attention.qkv", "attn.c_attn"),
        **_both("attention.output", "attn.c_proj"),
        **_both("mlp_norm", "ln_2"),
        **_both("mlp.up", "mlp.c_fc"),
        **_both("mlp.down", "mlp.c_proj"),
    },
    block_prefix="transformer.h.{}.",
    split=split,
    fuse=fuse,
    write_config=write_config,
    read_config=read_config,
    ignored=("*.attn.bias", "*.attn.masked_bias"),
)
