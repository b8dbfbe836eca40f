"""`manifest.json`: what a checkpoint holds, as plain JSON. Names of its directories and files. Nothing here touches a disk."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from megatronish.checkpoint.pieces import IntArray, Piece, tiling_problem
from megatronish.errors import UserError

FORMAT = "megatronish checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"

TensorSpec = tuple[tuple[int, ...], str]
"""Global shape and the dtype's name, a key of DTYPES."""

DTYPES: Mapping[str, tuple[torch.dtype, str]] = {
    "float64": (torch.float64, "F64"),
    "float32": (torch.float32, "F32"),
    "bfloat16": (torch.bfloat16, "BF16"),
    "float16": (torch.float16, "F16"),
    "int64": (torch.int64, "I64"),
    "int32": (torch.int32, "I32"),
    "uint8": (torch.uint8, "U8"),
    "bool": (torch.bool, "BOOL"),
}
"""Name in the manifest -> torch dtype and its code in a safetensors header."""

_STEP_NAME = re.compile(r"step-(\d{8,})")
_FILE_NAME = re.compile(r"rank-\d{5,}\.safetensors")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_SEAL = b'"manifest_digest": '


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint."""

    name: str
    size: int
    """Bytes."""
    digest: str
    """xxh3-128 of all its bytes, 32 hexadecimal digits."""


@dataclass(frozen=True)
class TensorEntry:
    """One global tensor and where its n pieces lie: rows of [n], [n, dimensions] arrays."""

    shape: tuple[int, ...]
    dtype: str
    files: IntArray
    offsets: IntArray
    sizes: IntArray


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's contents, checked: every tensor is tiled exactly once."""

    step: int
    state: Mapping[str, Any]
    files: tuple[FileEntry, ...]
    tensors: Mapping[str, TensorEntry]
    fingerprint: int
    """Of the manifest's bytes, as a signed 64-bit number: ranks compare it."""


def dtype_name(dtype: torch.dtype) -> str:
    """The manifest's name of a dtype."""
    return str(dtype).removeprefix("torch.")


def checkpoint_name(step: int) -> str:
    """Directory of a complete checkpoint."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a complete checkpoint's directory name, None for any other name (attempts, set-aside ones)."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def attempt_step_of(name: str) -> int | None:
    """The step of an unfinished attempt's directory name (`step-00000100.tmp-...`), None for any other name."""
    head, found, _ = name.partition(".tmp-")
    return step_of(head) if found else None


def file_name(rank: int) -> str:
    """The file that `rank` writes."""
    return f"rank-{rank:05d}.safetensors"


def encode_manifest(
    step: int, state: Mapping[str, Any], shapes: Mapping[str, TensorSpec], files: Sequence[tuple[FileEntry, Sequence[Piece]]]
) -> bytes:
    """Plain JSON, one line for each tensor and file. Its last entry is the digest of all before it: a changed digit is seen."""
    tensors = [f"{_json(name)}: {_json({'shape': shape, 'dtype': dtype})}" for name, (shape, dtype) in shapes.items()]
    entries = [
        _json({"name": entry.name, "size": entry.size, "digest": entry.digest, "pieces": _pieces_by_tensor(pieces)})
        for entry, pieces in files
    ]
    lines = [
        "{",
        f'"format": {_json(FORMAT)},',
        f'"format_version": {FORMAT_VERSION},',
        f'"step": {step},',
        f'"state": {json.dumps(state, allow_nan=False, indent=1)},',
        '"tensors": {\n' + ",\n".join(tensors) + "\n},",
        '"files": [\n' + ",\n".join(entries) + "\n],",
    ]
    body = ("\n".join(lines) + "\n").encode()
    return body + _SEAL + f'"{xxhash.xxh3_128_hexdigest(body)}"\n}}\n'.encode()


def _pieces_by_tensor(pieces: Sequence[Piece]) -> dict[str, list[tuple[int, ...]]]:
    """Tensor -> [offsets and sizes of each piece, one after the other]. Flat: a large run has hundreds of thousands of them."""
    boxes: dict[str, list[tuple[int, ...]]] = {}
    for piece in pieces:
        boxes.setdefault(piece.tensor, []).append((*piece.box.offsets, *piece.box.sizes))
    return boxes


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def decode_manifest(data: bytes, where: Path) -> Manifest:
    """Parse and check. UserError names `where` and what is wrong: not JSON, another format, newer, changed since it was written,
    or tensors that the pieces do not tile exactly once."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}): it was truncated or changed") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f'{where} is not the manifest of a {FORMAT}: its "format" must be {FORMAT!r}')
    version = raw.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(f"{where} has format_version {version}, this program reads up to {FORMAT_VERSION}: use a newer megatronish")
    if version != FORMAT_VERSION:
        raise UserError(f"{where} has format_version {version!r}, this program reads {FORMAT_VERSION}")
    body, seal, _ = data.rpartition(_SEAL)
    if not seal or raw.get("manifest_digest") != xxhash.xxh3_128_hexdigest(body):
        raise UserError(f"{where} was changed since it was written: its manifest_digest does not match")
    try:
        files, tensors = _parse_contents(raw)
        step, state = raw["step"], raw["state"]
        if type(step) is not int or step < 0 or not isinstance(state, dict):
            raise ValueError(f"step {step!r}, state a {type(state).__name__}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} is malformed: {error}") from None
    for name, entry in tensors.items():
        if problem := tiling_problem(entry.shape, entry.offsets, entry.sizes):
            raise UserError(f"{where}: the pieces of tensor {name} do not tile it: {problem}")
    return Manifest(step, state, files, tensors, as_signed(xxhash.xxh3_64_intdigest(data)))


def _parse_contents(raw: dict[str, Any]) -> tuple[tuple[FileEntry, ...], dict[str, TensorEntry]]:
    files: list[FileEntry] = []
    numbers: dict[str, list[int]] = {name: [] for name in raw["tensors"]}
    rows: dict[str, list[list[int]]] = {name: [] for name in raw["tensors"]}
    for entry in raw["files"]:
        name, size, digest = entry["name"], entry["size"], entry["digest"]
        if not _FILE_NAME.fullmatch(name) or not _DIGEST.fullmatch(digest) or not isinstance(size, int):
            raise ValueError(f"file entry {name!r}, size {size!r}, digest {digest!r}")
        for tensor, boxes in entry["pieces"].items():
            numbers[tensor] += [len(files)] * len(boxes)
            rows[tensor] += boxes
        files.append(FileEntry(name, size, digest))
    if len({entry.name for entry in files}) != len(files):
        raise ValueError("a file is listed twice")
    tensors = {}
    for name, spec in raw["tensors"].items():
        shape, dtype = tuple(spec["shape"]), spec["dtype"]
        if dtype not in DTYPES or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"tensor {name} has shape {spec['shape']}, dtype {dtype!r}")
        boxes = _int_rows(rows[name], 2 * len(shape), name)
        owners = np.array(numbers[name], dtype=np.int64)
        tensors[name] = TensorEntry(shape, dtype, owners, boxes[:, : len(shape)], boxes[:, len(shape) :])
    return tuple(files), tensors


def _int_rows(rows: list[list[int]], width: int, tensor: str) -> IntArray:
    array = np.array(rows if rows else np.empty((0, width), np.int64))
    if array.shape != (len(rows), width) or (array.size and array.dtype != np.int64):
        raise ValueError(f"the pieces of tensor {tensor} are not rows of {width} integers")
    return array.astype(np.int64)


def as_signed(value: int) -> int:
    """The lowest 64 bits as a signed number, as an int64 tensor holds them."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def digest_to_numbers(digest: str) -> tuple[int, int]:
    """32 hexadecimal digits -> two signed 64-bit numbers."""
    value = int(digest, 16)
    return as_signed(value >> 64), as_signed(value)


def digest_from_numbers(high: int, low: int) -> str:
    """The way back."""
    mask = (1 << 64) - 1
    return f"{(high & mask) << 64 | (low & mask):032x}"
