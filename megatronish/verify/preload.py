"""What the pool's fork server imports once, so that each rank starts with it."""

import torch.fx.experimental.symbolic_shapes  # the first backward of a process loads it, sympy with it: 0.6 s  # noqa: F401

import megatronish.assemble
import megatronish.checkpointing  # noqa: F401
