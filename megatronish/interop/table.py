"""INTEROP: each architecture's counterpart in the transformers library."""

from __future__ import annotations

from megatronish.interop.gpt2 import GPT2
from megatronish.interop.llama import LLAMA
from megatronish.interop.names import Interop

INTEROP: dict[str, Interop] = {"llama": LLAMA, "gpt2": GPT2}
"""By `model.architecture`."""
