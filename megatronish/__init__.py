"""megatronish: a 3D-parallel (tensor x pipeline x data, ZeRO-sharded) trainer for language models."""

__version__ = "0.1.0"
