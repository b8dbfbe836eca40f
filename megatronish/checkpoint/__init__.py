"""Checkpoints: pieces of global tensors, saved whole or not at all, verified before use, readable on any layout."""

from megatronish.checkpoint.background import BackgroundSaver
from megatronish.checkpoint.load import Checkpoint, find_checkpoints, newest_loadable, open_checkpoint
from megatronish.checkpoint.manifest import TensorSpec, dtype_name
from megatronish.checkpoint.pieces import Piece, pieces_of_slice, whole_box
from megatronish.checkpoint.save import SaveJob, save_checkpoint
from megatronish.checkpoint.storage import FileStorage, NoStorage, Storage
from megatronish.checkpoint.verify import verify_checkpoint

__all__ = [
    "BackgroundSaver",
    "Checkpoint",
    "FileStorage",
    "NoStorage",
    "Piece",
    "SaveJob",
    "Storage",
    "TensorSpec",
    "dtype_name",
    "find_checkpoints",
    "newest_loadable",
    "open_checkpoint",
    "pieces_of_slice",
    "save_checkpoint",
    "verify_checkpoint",
    "whole_box",
]
