"""Find, verify and read checkpoints. JSON and safetensors only: nothing that is read can run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatronish.checkpoint.exchange import gather_rows
from megatronish.checkpoint.manifest import DTYPES, Manifest, TensorEntry, TensorSpec, checkpoint_name, step_of
from megatronish.checkpoint.pieces import piece_key, whole_box
from megatronish.checkpoint.verify import examine, read_manifest
from megatronish.comm import Group
from megatronish.errors import IntegrityError, UserError, disk_error
from megatronish.layout import Rectangle
from megatronish.retries import retried

_CPU = torch.device("cpu")
_MAX_OPEN_FILES = 128
_MAX_NAMED = 10


class Checkpoint:
    """A checkpoint open for reading: any box of any tensor, whatever boxes it was saved as."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self._manifest = manifest
        self._open_files: OrderedDict[int, Any] = OrderedDict()

    @property
    def step(self) -> int:
        """The step after which it was saved."""
        return self._manifest.step

    @property
    def state(self) -> Mapping[str, Any]:
        """What `save_checkpoint` was given as `state`."""
        return self._manifest.state

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor's global shape and dtype."""
        return {name: (entry.shape, entry.dtype) for name, entry in self._manifest.tensors.items()}

    def check_tensors(self, expected: Mapping[str, TensorSpec], *, convertible: Collection[str] = ()) -> None:
        """UserError unless the tensors are exactly the expected ones; names the first ten differences and their number. A dtype of
        `convertible` may stand for another of them."""
        found = self.tensors()
        problems = [f"tensor {name} {list(shape)} is missing" for name, (shape, _) in expected.items() if name not in found]
        for name, (shape, dtype) in found.items():
            if name not in expected:
                problems.append(f"tensor {name} {list(shape)} is unexpected")
            elif tuple(expected[name][0]) != shape:
                problems.append(f"tensor {name} has shape {list(shape)}, this run needs {list(expected[name][0])}")
            elif expected[name][1] != dtype and not {expected[name][1], dtype} <= set(convertible):
                problems.append(f"tensor {name} is {dtype}, this run needs {expected[name][1]}")
        if problems:
            more = [f"and {len(problems) - _MAX_NAMED} more"] if len(problems) > _MAX_NAMED else []
            head = f"checkpoint {self.path} does not fit this run, {len(problems)} problems:"
            raise UserError("\n  ".join([head, *problems[:_MAX_NAMED], *more]))

    def read(self, tensor: str, box: Rectangle, out: Tensor, *, dtype: Literal["exact", "convert"] = "exact") -> None:
        """Fill `out` (contiguous, any shape of box.num_elements elements, any device) with `box` of the global tensor, row-major.
        Reads the bytes of that box only. Another dtype than the saved one: an error, or with `dtype="convert"` rounded to out's."""
        entry = self._manifest.tensors.get(tensor)
        if entry is None:
            raise UserError(f"checkpoint {self.path} has no tensor {tensor}")
        if len(box.offsets) != len(entry.shape) or (box.num_elements and box.intersect(whole_box(entry.shape)) != box):
            raise ValueError(f"{box} is not within tensor {tensor} of shape {list(entry.shape)}")
        if out.numel() != box.num_elements or not out.is_contiguous():
            raise ValueError(f"out of shape {list(out.shape)} is not contiguous memory for {box}")
        if dtype == "exact" and out.dtype != DTYPES[entry.dtype][0]:
            raise UserError(f"checkpoint {self.path}: tensor {tensor} is {entry.dtype}, {out.dtype} was asked for")
        target = out.detach().view(box.sizes)
        for number in _touching(entry, box):
            held = Rectangle(tuple(entry.offsets[number].tolist()), tuple(entry.sizes[number].tolist()))
            common = held.intersect(box)
            assert common is not None
            target[common.within(box)].copy_(self._read_piece(tensor, entry, int(number), held, common))

    def _read_piece(self, tensor: str, entry: TensorEntry, number: int, held: Rectangle, common: Rectangle) -> Tensor:
        file, key = int(entry.files[number]), piece_key(tensor, held.offsets)
        path = self.path / self._manifest.files[file].name
        try:
            handle = retried(lambda: self._open(file, path))
            if not entry.shape:  # a scalar cannot be sliced
                whole: Tensor = handle.get_tensor(key)
                return whole
            piece = handle.get_slice(key)
            if tuple(piece.get_shape()) != held.sizes or piece.get_dtype() != DTYPES[entry.dtype][1]:
                raise UserError(f"{path}: piece {key} is {piece.get_dtype()} {piece.get_shape()}, the manifest says otherwise")
            part: Tensor = piece[common.within(held)]
            return part
        except (OSError, SafetensorError) as error:
            kind = disk_error(error.errno) if isinstance(error, OSError) else UserError
            raise kind(f"{path} cannot be read: {error}") from error

    def _open(self, file: int, path: Path) -> Any:
        if file in self._open_files:
            self._open_files.move_to_end(file)
        else:
            self._open_files[file] = safe_open(path, framework="pt")
            if len(self._open_files) > _MAX_OPEN_FILES:
                self._open_files.popitem(last=False)
        return self._open_files[file]

    def close(self) -> None:
        """Let go of its files. Reading opens them again."""
        self._open_files.clear()


def _touching(entry: TensorEntry, box: Rectangle) -> list[int]:
    """Numbers of the pieces that share an element with `box`."""
    start = np.array(box.offsets, dtype=np.int64)
    stop = start + np.array(box.sizes, dtype=np.int64)
    common = np.minimum(entry.offsets + entry.sizes, stop) > np.maximum(entry.offsets, start)
    numbers: list[int] = np.flatnonzero(common.all(axis=1)).tolist()
    return numbers


def find_checkpoints(root: Path) -> list[Path]:
    """Directories named step-N in `root`, newest first: complete by construction. None if there is no such root."""
    try:
        children = retried(lambda: list(root.iterdir()) if root.is_dir() else [])
    except OSError as error:
        raise disk_error(error.errno)(f"{root} cannot be listed: {error.strerror}") from None
    steps = [(step, child) for child in children if (step := step_of(child.name)) is not None]
    return [path for _, path in sorted(steps, reverse=True)]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open for reading by this process. UserError if the manifest is missing, newer or damaged, does not tile every tensor exactly
    once, or names a file that is missing or of another size. Digests are `verify_checkpoint`'s to check."""
    manifest = read_manifest(path)
    for entry in manifest.files:
        try:
            size = retried((path / entry.name).stat).st_size
        except OSError as error:
            raise disk_error(error.errno)(f"checkpoint {path}: {entry.name}: {error.strerror}") from None
        if size != entry.size:
            raise UserError(f"checkpoint {path}: {entry.name} has {size} bytes, {entry.size} were saved")
    return Checkpoint(path, manifest)


def newest_loadable(root: Path, *, world: Group, log: Callable[[str], None], device: torch.device = _CPU) -> Checkpoint | None:
    """The newest checkpoint that verifies, None if there is none at all. Every newer one that is refused is logged with the reason.
    IntegrityError if all are refused; Fault if the disk gives no answer about one, which may be whole. Collective over `world`: two
    all-gathers of fixed size for each one looked at."""
    refused: list[str] = []
    below: int | None = None
    while True:
        steps = [step for path in find_checkpoints(root) if (step := step_of(path.name)) is not None]
        own = next((step for step in steps if below is None or step < below), -1)
        # Views of a network file system may differ; a checkpoint that only some ranks see is refused by name, not passed over.
        step = max(step for (step,) in gather_rows([own], world, device, what="newest checkpoint"))
        if step < 0:
            break
        path = root / checkpoint_name(step)
        manifest, problem = examine(path, world=world, device=device)
        if manifest is not None and manifest.step != step:
            problem = f"checkpoint {path}: its manifest is of step {manifest.step}: the directory was renamed"
            manifest = None
        if manifest is not None:
            if refused:
                log(f"using checkpoint {path} instead of {len(refused)} newer refused")
            return Checkpoint(path, manifest)
        refused.append(str(problem))
        log(f"REFUSED {problem}")
        below = step
    if refused:
        raise IntegrityError(
            f"no checkpoint in {root} can be used:\n  " + "\n  ".join(refused) + "\nremove them all to start from step 0"
        )
    return None
