"""What a training step is compared with: the Hugging Face model of the same shape, torch's fused AdamW and gradient clipping.

In bfloat16 everything of it is bfloat16, weights, gradients and moments too: the fastest way to use it, and less exact than ours,
which keeps float32 master weights, moments and sums of gradients. Its vocabulary is padded as ours is, since
matrices of odd sizes are slow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatronish.assemble import DTYPES
from megatronish.batch import Batch
from megatronish.comm import streams
from megatronish.config import Config
from megatronish.interop import gpt2, llama
from megatronish.observe.flops import measure_matmul_tflops

_MATRIX_SIZE, _PRODUCTS = 8192, 10


def make_peer(config: Config, device: torch.device, *, compiled: bool) -> Callable[[Batch], None]:
    """A function that makes one optimizer step on a global batch; `compiled`: model and loss go through torch.compile."""
    with device:
        model = _model(config)
    model.to(dtype=DTYPES[config.train.dtype])
    streams.release_cached_memory(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, weight_decay=config.optim.weight_decay, fused=True)

    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    run: Any = torch.compile(loss_of, dynamic=False) if compiled else loss_of

    def step(batch: Batch) -> None:
        microbatches = batch.microbatches(config.train.micro_batch_size)
        for part in microbatches:
            loss = run(part.tokens_SB.t().contiguous(), part.labels_SB.t().contiguous())
            (loss / len(microbatches)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def check_peer(config: Config) -> None:
    """UserError if there is no such model."""
    _settings(config)


def _settings(config: Config) -> dict[str, Any]:
    interop = {"llama": llama, "gpt2": gpt2}[config.model.architecture]
    # Their defaults for the ends of texts are not in every vocabulary.
    others = {"vocab_size": config.model.padded_vocab_size, "bos_token_id": None, "eos_token_id": None}
    return interop.write_config(config.model, config.data.sequence_length) | others


def _model(config: Config) -> nn.Module:
    import transformers

    make_config, make_model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    }[config.model.architecture]
    model: nn.Module = make_model(make_config(**_settings(config)))
    return model.train()


def matrix_tflops(device: torch.device, dtype: str, threads: int) -> float:
    """TFLOP/s of products of square matrices: of 8192 on a GPU, of observe/flops.py on CPU. Waits for the device."""
    if device.type == "cpu":
        return measure_matmul_tflops(DTYPES[dtype], threads)
    a, b = (torch.randn(_MATRIX_SIZE, _MATRIX_SIZE, dtype=DTYPES[dtype], device=device) for _ in range(2))
    out = a @ b
    begun = streams.wall_time(device)
    for _ in range(_PRODUCTS):
        torch.mm(a, b, out=out)
    return _PRODUCTS * 2 * _MATRIX_SIZE**3 / (streams.wall_time(device) - begun) / 1e12
