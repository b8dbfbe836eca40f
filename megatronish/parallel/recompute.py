"""Activation recomputation (Chen et al. 2016): keep a block's input, run its forward again in backward.

Randomness is counter-based, so nothing of a generator's state has to be kept.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Recomputed(nn.Module):
    """Runs `block` keeping only its inputs for backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Tensor) -> Tensor:
        # Early stop leaves out what follows the last tensor that backward needs, so the block's last sum is not communicated twice.
        out: Tensor = checkpoint(self.block, *inputs, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
        return out


def recompute_blocks(blocks: nn.ModuleDict) -> None:
    """Wrap each block in place. Call it after parameters have their names: the wrapper adds a level to them."""
    for name, block in list(blocks.items()):
        blocks[name] = Recomputed(block)
