"""What the fork server of a rehearsal loads once, so that its processes start with it."""

import torch._dynamo  # operations on the meta device load it  # noqa: F401

import megatronish.preflight.classes  # noqa: F401
