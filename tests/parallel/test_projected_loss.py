"""The loss joined with its projection, some tokens at a time, equals the loss of whole logits: losses, gradients, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatronish.assemble import assemble, draw_weights, mesh_shape
from megatronish.parallel.mesh import build_mesh
from megatronish.verify.batches import SlicedBatches, global_batch
from tests.parallel.parity import Case, check

# float64, as in test_parity.py: sums of chunks in another order.
TOLERANCE = 1e-10


@pytest.mark.parametrize(
    "case",
    [
        # 32 tokens in chunks of 11; label smoothing and z-loss; the embedding's gradient is owed a lookup's as well.
        Case(loss_chunks=3, architecture="gpt2", tie_embeddings=True, label_smoothing=0.1, z_loss=1e-3),
        Case(loss_chunks=5, tp=2, sequence=True, label_smoothing=0.1, z_loss=1e-3, recompute="full"),
        # A tensor rank that holds only padding.
        Case(loss_chunks=4, tp=4, vocab_size=70, vocab_multiple=128),
        # The forwards of all microbatches come before the first backward; gradients leave their memory in between.
        Case(loss_chunks=4, pp=2, dp=2, zero_stage=2, schedule=("gpipe", 1), architecture="gpt2", tie_embeddings=True),
        Case(loss_chunks=64, pp=2, dp=2, zero_stage=2, schedule=("interleaved", 2), bucket_mib=1e-5),
    ],
    ids=str,
)
def test_chunks_of_tokens_change_nothing(case: Case) -> None:
    check(case, TOLERANCE)


class LargestLogits(TorchDispatchMode):
    """Notes the most rows of any tensor whose last dimension is the vocabulary's."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() > 1 and out.shape[-1] == self.columns:
            self.rows = max(self.rows, out.numel() // self.columns)
        return out


@pytest.mark.parametrize("loss_chunks", [1, 4])
def test_logits_of_more_than_one_chunk_never_exist(loss_chunks: int) -> None:
    config = Case(loss_chunks=loss_chunks, num_microbatches=1).config()
    mesh = build_mesh(mesh_shape(config, 1), 0, device=torch.device("cpu"))
    run = assemble(config, mesh, SlicedBatches(config, mesh))
    draw_weights(config, run.cut)
    run.optimizer.reset_master()
    with LargestLogits(config.model.padded_vocab_size) as seen:
        run.trainer.train_step(1)
        run.trainer.evaluate([global_batch(config, 1)])
    assert seen.rows == 32 // loss_chunks
