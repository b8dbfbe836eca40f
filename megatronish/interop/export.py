"""`megatronish export RUN --hf DIR`: a checkpoint as a folder that transformers loads: weights, config.json, tokenizer.

Streams: holds one file of weights at a time, reads master weights only. The folder appears under its name when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatronish.checkpoint import Checkpoint, newest_loadable, open_checkpoint, verify_checkpoint, whole_box
from megatronish.checkpoint.manifest import checkpoint_name
from megatronish.checkpointing import tensor_name
from megatronish.comm.groups import single_process_group
from megatronish.config import Config, ModelConfig
from megatronish.config_loader import config_of
from megatronish.data.tokenizer import end_of_text_id, load_tokenizer
from megatronish.errors import UserError
from megatronish.interop.names import Interop, parameter_shapes
from megatronish.interop.table import INTEROP
from megatronish.run_folder import RunFolder

FILE_BYTES = 5 * 10**9
"""Of weights in one file, unless one parameter alone has more."""
INDEX = "model.safetensors.index.json"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Request:
    """What is to be written, and where."""

    run: Path
    folder: Path
    step: int | None = None
    """None: the newest checkpoint that verifies."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """None: bfloat16 if the run computes in it, else float32."""


def main(run: str, folder: str, step: int | None, dtype: Literal["bfloat16", "float32"] | None) -> int:
    """Export in this process; the exit code."""
    written = export(Request(Path(run), Path(folder), step, dtype))
    print(f"wrote {written}: transformers.AutoModelForCausalLM.from_pretrained({str(written)!r}) loads it")
    return 0


def export(request: Request, *, file_bytes: int = FILE_BYTES) -> Path:
    """Write the folder and return its path. UserError for bad input, before anything is written."""
    if request.folder.exists():
        raise UserError(f"--hf {request.folder} exists already; name a new folder, or remove it")
    with closing(find_checkpoint(request.run, request.step)) as checkpoint:
        config = config_of(checkpoint.state.get("config"), f"checkpoint {checkpoint.path}")
        interop = INTEROP[config.model.architecture]
        dtype = request.dtype or ("bfloat16" if config.train.dtype == "bfloat16" else "float32")
        settings = interop.write_config(config.model, config.data.sequence_length)
        tokenizer = tokenizer_files(config)
        with appears_complete(request.folder) as temporary:
            write_weights(checkpoint, config.model, interop, temporary, dtype=DTYPES[dtype], file_bytes=file_bytes)
            # transformers 5 reads `dtype`, earlier ones `torch_dtype`.
            texts = {"config.json": {**settings, **tokenizer.ids, "dtype": dtype, "torch_dtype": dtype}}
            texts["generation_config.json"] = {"_from_model_config": True, **tokenizer.ids}
            for name, content in (texts | tokenizer.texts).items():
                (temporary / name).write_text(json.dumps(content, indent=2) + "\n")
            if tokenizer.source is not None:
                shutil.copyfile(tokenizer.source, temporary / "tokenizer.json")
    return request.folder


def find_checkpoint(run: Path, step: int | None) -> Checkpoint:
    """The run's checkpoint of `step`, or its newest, verified. UserError if there is none, or it is damaged."""
    root = RunFolder(run).checkpoints
    if not root.is_dir():
        raise UserError(f"{run} is not the folder of a run: there is no {root}; give RUN_ROOT/NAME of a run")
    if step is None:
        newest = newest_loadable(root, world=single_process_group(), log=lambda line: print(line, file=sys.stderr, flush=True))
        if newest is None:
            raise UserError(f"{run} has no checkpoint yet: {root} is empty; a run saves every checkpoint.interval steps")
        return newest
    path = root / checkpoint_name(step)
    verify_checkpoint(path, world=single_process_group())
    return open_checkpoint(path)


@contextmanager
def appears_complete(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `folder` at the end; nothing is left of it after an error."""
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def plan_files(model: ModelConfig, interop: Interop, *, element_bytes: int, file_bytes: int) -> list[list[str]]:
    """Our parameters by file, in order: a file is full when the next would make it larger than `file_bytes`."""
    shapes, size = interop.shapes(model), file_bytes + 1
    files: list[list[str]] = []
    for name, theirs in interop.name_map(model).items():
        own = sum(torch.Size(shapes[part]).numel() for part in theirs) * element_bytes
        if size + own > file_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += own
    return files


def write_weights(
    checkpoint: Checkpoint, model: ModelConfig, interop: Interop, folder: Path, *, dtype: torch.dtype, file_bytes: int
) -> None:
    """model.safetensors, or numbered files and their index."""
    shapes = parameter_shapes(model)
    files = plan_files(model, interop, element_bytes=dtype.itemsize, file_bytes=file_bytes)
    numbered = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    place: dict[str, str] = {}
    total = 0
    for file, names in zip(numbered if len(files) > 1 else ["model.safetensors"], files, strict=True):
        tensors = dict(_theirs(checkpoint, model, interop, names, shapes, dtype))
        save_file(tensors, folder / file, metadata={"format": "pt"})
        place |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": place}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _theirs(
    checkpoint: Checkpoint,
    model: ModelConfig,
    interop: Interop,
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        ours = torch.empty(shapes[name], dtype=dtype)
        checkpoint.read(tensor_name("master", name), whole_box(shapes[name]), ours, dtype="convert")
        yield from interop.parts(model, name, ours)


@dataclass(frozen=True)
class TokenizerFiles:
    """What a run's tokenizer gives a folder."""

    source: Path | None
    ids: dict[str, int]
    texts: dict[str, dict[str, Any]]


def tokenizer_files(config: Config) -> TokenizerFiles:
    """The tokenizer of the run's config, such that transformers.AutoTokenizer loads it; nothing if the config has none."""
    if config.data.tokenizer is None:
        return TokenizerFiles(None, {}, {})
    tokenizer = load_tokenizer(config.data.tokenizer)
    end = end_of_text_id(tokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.id_to_token(end),
        "eos_token": tokenizer.id_to_token(end),
        "model_max_length": config.model.max_positions or config.data.sequence_length,
        "clean_up_tokenization_spaces": False,
    }
    ids = {"bos_token_id": end, "eos_token_id": end}
    return TokenizerFiles(Path(config.data.tokenizer), ids, {"tokenizer_config.json": settings})
