"""What the pool's fork server imports once, so that each rank starts with it."""

import megatronish.assemble
import megatronish.checkpointing  # noqa: F401
