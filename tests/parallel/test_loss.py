"""The loss over a cut vocabulary, with label smoothing and z-loss, equals torch's on whole logits, gradients too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatronish.assemble import assemble, draw_weights, mesh_shape
from megatronish.comm.groups import new_group
from megatronish.layout import shard_range
from megatronish.parallel.loss import LossTerms, vocab_parallel_cross_entropy
from megatronish.parallel.mesh import build_mesh
from megatronish.verify.batches import SlicedBatches, global_batch
from tests.parallel.parity import Case, check
from tests.ranks import ranks

PADDED = 45


def logits_and_labels(vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits_SBV = torch.randn(7, 2, PADDED, generator=generator, dtype=torch.float64) * 5 + 20
    labels_SB = torch.randint(vocab_size, (7, 2), generator=generator)
    return logits_SBV, labels_SB, torch.rand(7, 2, generator=generator, dtype=torch.float64)


def on_rank(rank: int, size: int, vocab_size: int, terms: LossTerms) -> tuple[Tensor, Tensor]:
    """(loss, gradient of this rank's columns)."""
    group = new_group("tp", range(size), rank, device_kind="cpu")
    logits_SBV, labels_SB, dloss_SB = logits_and_labels(vocab_size)
    start, stop = shard_range(PADDED, rank, size)
    local = logits_SBV[..., start:stop].contiguous().requires_grad_()
    loss_SB = vocab_parallel_cross_entropy(
        local, labels_SB, vocab_size=vocab_size, padded_vocab_size=PADDED, group=group, terms=terms
    )
    (gradient,) = torch.autograd.grad(loss_SB, local, dloss_SB)
    return loss_SB.detach(), gradient


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [45, 41, 30])  # with 30 tokens the last of four ranks has padding alone
@pytest.mark.parametrize("terms", [LossTerms(0.1), LossTerms(0.0, 1e-3), LossTerms(0.3, 0.02)], ids=str)
def test_smoothing_and_z_loss_equal_torch_over_any_cut(size: int, vocab_size: int, terms: LossTerms) -> None:
    logits_SBV, labels_SB, dloss_SB = logits_and_labels(vocab_size)
    logits_SBV.requires_grad_()
    valid_TV = logits_SBV[..., :vocab_size].flatten(0, 1)
    smoothed = torch.nn.functional.cross_entropy(
        valid_TV, labels_SB.flatten(), reduction="none", label_smoothing=terms.label_smoothing
    )
    expected_SB = (smoothed + terms.z_loss * valid_TV.logsumexp(-1) ** 2).view(7, 2)
    (expected_gradient,) = torch.autograd.grad(expected_SB, logits_SBV, dloss_SB)
    results = ranks(size).run(on_rank, size, vocab_size, terms)
    for loss_SB, _ in results:
        torch.testing.assert_close(loss_SB, expected_SB.detach(), rtol=1e-13, atol=1e-13)
    # float64; terms of size 1 cancel in the gradient of the target.
    torch.testing.assert_close(torch.cat([g for _, g in results], -1), expected_gradient, rtol=1e-11, atol=1e-14)


def test_a_layout_with_all_terms_equals_one_process() -> None:
    check(Case(tp=2, pp=2, sequence=True, label_smoothing=0.1, z_loss=1e-3), 1e-10)


def evaluated_and_trained(case: Case) -> tuple[Tensor, Tensor]:
    """(held-out loss sum, training loss) of the first weights."""
    config = case.config()
    mesh = build_mesh(mesh_shape(config, 1), 0, device=torch.device("cpu"))
    run = assemble(config, mesh, SlicedBatches(config, mesh))
    draw_weights(config, run.cut)
    run.optimizer.reset_master()
    loss_sum, _ = run.trainer.evaluate([global_batch(config, 1)])
    return loss_sum, run.trainer.train_step(1).loss


def test_an_evaluation_is_the_plain_cross_entropy_without_dropout() -> None:
    plain = evaluated_and_trained(Case())
    regularised = evaluated_and_trained(Case(dropout=0.3, label_smoothing=0.2, z_loss=0.1, recompute="selective"))
    assert torch.equal(regularised[0], plain[0])
    assert regularised[1] > plain[1] + 0.1
