"""How bytes get to a disk and stay there. `FileStorage` is the disk; `NoStorage` is a rehearsal's."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

from megatronish.checkpoint.durable import Bytes, write_all, write_stream
from megatronish.checkpoint.manifest import DTYPES, dtype_name

_READ_BYTES = 1 << 20
"""At a time: what was read is still in the cache when it is digested (1 GiB: 0.08 s; 0.14 s with 16 MiB)."""


class Storage(Protocol):
    """What saving asks of a disk. Every method may raise OSError; a write that returned has reached the disk."""

    def make_directory(self, path: Path) -> None:
        """Create it if it is not there; any number of ranks may do so at once."""

    def write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
        """Write a new safetensors file in place of whatever has that name, durably: (bytes, xxh3-128). Waits for the device."""

    def write_bytes(self, path: Path, data: bytes) -> None:
        """Write or overwrite a file, durably. A file that already is as long needs no new space."""

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""

    def rename(self, source: Path, target: Path) -> None:
        """Atomic. `target` must not exist."""

    def remove(self, path: Path) -> None:
        """Remove a file, or a directory with all in it; nothing there is fine."""

    def names(self, path: Path) -> list[str]:
        """Names in a directory; none if there is no such directory."""

    def holds(self, path: Path, size: int) -> bool:
        """Whether a file of that many bytes is there."""


class FileStorage:
    """A POSIX file system, shared by all ranks that save."""

    def make_directory(self, path: Path) -> None:
        """Also the directories above it."""
        if not path.is_dir():
            path.mkdir(parents=True, exist_ok=True)
            self.sync_directory(path.parent)

    def write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
        """Host memory needed beyond the tensors: one of them at a time, if it lies on a device."""
        ordered = {key: tensors[key] for key in file_order(tensors)}
        header = safetensors_header(ordered)
        self.remove(path)  # a leftover may be held open by a process that has not died yet; never write into its inode
        return write_stream(path, itertools.chain([np.frombuffer(header, np.uint8)], map(_bytes_of, ordered.values())))

    def write_bytes(self, path: Path, data: bytes) -> None:
        """In place: the name keeps its inode and its blocks."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            write_all(descriptor, memoryview(data))
            os.ftruncate(descriptor, len(data))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def sync_directory(self, path: Path) -> None:
        """fsync of the directory."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """`os.rename`, which would replace an empty directory silently: refused."""
        if target.exists():
            raise FileExistsError(17, "exists already", str(target))
        os.rename(source, target)

    def remove(self, path: Path) -> None:
        """Links are removed, not followed."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def names(self, path: Path) -> list[str]:
        """Sorted."""
        return sorted(os.listdir(path)) if path.is_dir() else []

    def holds(self, path: Path, size: int) -> bool:
        """From `stat`."""
        try:
            return path.stat().st_size == size
        except FileNotFoundError:
            return False


class NoStorage:
    """A rehearsal's disk: empty, takes everything, keeps nothing, reads no tensor (they may be on meta)."""

    def make_directory(self, path: Path) -> None:
        """Nothing."""

    def write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
        """The size the file would have; a digest of zeros."""
        return len(safetensors_header(tensors)) + sum(t.numel() * t.element_size() for t in tensors.values()), "0" * 32

    def write_bytes(self, path: Path, data: bytes) -> None:
        """Nothing."""

    def sync_directory(self, path: Path) -> None:
        """Nothing."""

    def rename(self, source: Path, target: Path) -> None:
        """Nothing."""

    def remove(self, path: Path) -> None:
        """Nothing."""

    def names(self, path: Path) -> list[str]:
        """None."""
        return []

    def holds(self, path: Path, size: int) -> bool:
        """What the plan says."""
        return True


def file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The keys in the order of a file: larger elements first, as the safetensors library does; so all are aligned to their
    elements."""
    return sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))


def _bytes_of(tensor: Tensor) -> Bytes:
    """A tensor's memory, or a copy in the host's. Waits for the device."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    array: Bytes = flat.view(torch.uint8).numpy()
    return array


def safetensors_header(tensors: Mapping[str, Tensor]) -> bytes:
    """Length and JSON header of a safetensors file that holds these tensors back to back, in this order. Reads no data.

    Source: https://github.com/huggingface/safetensors#format. The library would build the whole file in memory first."""
    entries, offset = {}, 0
    for key, tensor in tensors.items():
        stop = offset + tensor.numel() * tensor.element_size()
        code = DTYPES[dtype_name(tensor.dtype)][1]
        entries[key] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_digest(path: Path) -> str:
    """xxh3-128 of a file's bytes, 32 hexadecimal digits. Memory: one chunk."""
    digest, buffer = xxhash.xxh3_128(), bytearray(_READ_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()
