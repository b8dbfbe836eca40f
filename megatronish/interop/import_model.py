"""`megatronish import HF_DIR --out RUN`: a model of transformers as a run at step 0, to evaluate, continue or fine-tune.

config.json and safetensors are read as data. Nothing of the folder is executed: what needs its own code, or is pickled, is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatronish import __version__
from megatronish.checkpoint import FileStorage, Piece, save_checkpoint, whole_box
from megatronish.checkpoint.save import SaveJob
from megatronish.checkpointing import tensor_name
from megatronish.comm.groups import single_process_group
from megatronish.config import Config, ModelConfig
from megatronish.config_loader import load_config, to_yaml
from megatronish.errors import UserError
from megatronish.interop.export import INDEX, appears_complete
from megatronish.interop.names import Interop, parameter_shapes
from megatronish.interop.table import INTEROP
from megatronish.optim.zero import STATES
from megatronish.run_folder import RunFolder
from megatronish.text_measure import TextMeasure

LONGEST_SEQUENCE = 2048
"""Tokens of a sample, unless the model has fewer positions or data.sequence_length is given."""
TRAINABLE = ("float32", "bfloat16", "float16")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


def main(folder: str, out: str, overrides: list[str]) -> int:
    """Import in this process; the exit code."""
    run = Path(out)
    config, notes = import_model(Path(folder), run, overrides)
    print(f"wrote {run}: {config.model.architecture} at step 0")
    for note in notes:
        print(f"note: {note}")
    print("next:")
    print(f"  megatronish eval {run} --data PREFIX")
    print(f"  megatronish train {run / 'config.yaml'} data.train=PREFIX optim.lr=1e-5 train.steps=1000")
    print(f"  until step 1 is saved, every setting but the model's may still be changed there or in {run / 'config.yaml'}")
    return 0


def import_model(folder: Path, run: Path, overrides: list[str]) -> tuple[Config, list[str]]:
    """Write the run folder; its config, and what the user should know. UserError for bad input, before anything is written.

    Holds the weights in float32: 4 bytes a parameter of host memory."""
    if run.exists():
        raise UserError(f"--out {run} exists already; name a new folder, or remove it")
    values = read_foreign_config(folder)
    interop = counterpart(values)
    model = interop.read_config(values)
    weights = find_weights(folder)
    notes: list[str] = []
    with appears_complete(run) as temporary:
        config = _config(run, temporary, values, model, notes, folder=folder, overrides=overrides)
        with ExitStack() as stack:
            files = {path: stack.enter_context(_open(path)) for path in sorted(set(weights.values()))}
            place = _check(interop, config.model, {name: files[path] for name, path in weights.items()})
            _save(temporary, config, interop, place, source=folder)
        RunFolder(temporary).record(config)
    return config, notes


def read_foreign_config(folder: Path) -> dict[str, Any]:
    """config.json; UserError for what would have to be executed or is not there."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give a folder that save_pretrained wrote") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no mapping of settings")
    for key in ("auto_map", "trust_remote_code"):
        if values.get(key):
            raise UserError(f"{path}: {key} names code that comes with the model; it is not executed, so the model is not imported")
    if values.get("quantization_config"):
        raise UserError(f"{path}: quantization_config: the weights are quantised; give the original ones")
    return values


def counterpart(values: Mapping[str, Any]) -> Interop:
    """The architecture of a config.json; UserError names the known ones."""
    for interop in INTEROP.values():
        if values.get("model_type") == interop.model_type:
            classes = values.get("architectures") or [interop.class_name]
            if classes != [interop.class_name]:
                raise UserError(
                    f"config.json: architectures={classes}: only {interop.class_name} has the weights of a language model"
                )
            return interop
    known = ", ".join(interop.model_type for interop in INTEROP.values())
    raise UserError(f"config.json: model_type={values.get('model_type')!r} is not known; known are {known}")


def find_weights(folder: Path) -> dict[str, Path]:
    """Their name of every tensor -> its file. UserError if there are no safetensors, or a file is missing."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.is_file():
        try:
            places = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is damaged: {error!r}") from None
        outside = [path for path in places.values() if path.parent != folder]
        missing = sorted({path.name for path in places.values() if not path.is_file()})
        if outside or missing:
            what = f"{outside[0]}, which is not in the folder" if outside else f"{', '.join(missing[:10])}: not there"
            raise UserError(f"{index} names {what} ({len(outside) or len(missing)} files in all)")
        return places
    if single.is_file():
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
    if pickled:
        raise UserError(
            f"{folder} has its weights in {', '.join(pickled[:10])} alone: such files can run commands when they are "
            f"loaded, so they are not; save the model with safe_serialization=True"
        )
    raise UserError(f"{folder} has neither model.safetensors nor {INDEX}")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _config(
    run: Path,
    temporary: Path,
    values: Mapping[str, Any],
    model: Mapping[str, Any],
    notes: list[str],
    *,
    folder: Path,
    overrides: list[str],
) -> Config:
    """The run's config, checked: the model as it is, and settings of a small fine-tuning under `overrides`."""
    positions = model.get("max_positions") or values.get("max_position_embeddings") or LONGEST_SEQUENCE
    dtype = str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")
    data: dict[str, Any] = {"train": f"data/{run.name}/train", "sequence_length": min(positions, LONGEST_SEQUENCE)}
    if (tokenizer := _tokenizer(folder, temporary, model, notes)) is not None:
        data["tokenizer"] = str(run / tokenizer)
    sections = {
        "name": run.resolve().name,
        "run_root": str(run.parent),
        "model": dict(model),
        "data": data,
        "optim": {"lr": 1e-5},
        "train": {
            "steps": 1000,
            "global_batch_size": 8,
            "micro_batch_size": 1,
            "dtype": dtype if dtype in TRAINABLE else "float32",
        },
    }
    path = temporary / "config.yaml"
    path.write_text(json.dumps(sections))  # JSON is YAML
    config = load_config(path, overrides)
    if (Path(config.run_root) / config.name).resolve() != run.resolve():
        raise UserError(f"name and run_root are given by --out {run}; leave them out of the overrides")
    if _fixed_by_weights(config.model) != _fixed_by_weights(ModelConfig.model_validate(model)):
        raise UserError(
            "only model.dropout, model.rope_scaling, model.rope_theta and model.vocab_multiple may be overridden: all else is what "
            "the weights are"
        )
    path.write_text(to_yaml(config))
    return config


def _fixed_by_weights(model: ModelConfig) -> dict[str, Any]:
    """What of a model section the weights fix. Longer sequences are learned with other rotary frequencies."""
    return model.model_dump(exclude={"dropout", "vocab_multiple", "init_std", "rope_scaling", "rope_theta"})


def _tokenizer(folder: Path, temporary: Path, model: Mapping[str, Any], notes: list[str]) -> str | None:
    """Copy tokenizer.json if it can measure text; its name in the run folder."""
    source = folder / "tokenizer.json"
    if not source.is_file():
        notes.append(f"{folder} has no tokenizer.json: bits per byte and generation need data.tokenizer")
        return None
    try:
        TextMeasure.load(str(source), vocab_size=int(model["vocab_size"]))
    except UserError as error:
        notes.append(f"tokenizer.json is left out: {error}")
        return None
    shutil.copyfile(source, temporary / source.name)
    return source.name


def _check(interop: Interop, model: ModelConfig, found: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Their full name -> (open file, name in it). UserError unless names and shapes are the model's.

    Files of a bare transformer lack its name in front; tied models may hold the projection once more; masks are left out."""
    prefix = next(iter(interop.outside["embedding.weight"])).split(".")[0] + "."
    expected = interop.shapes(model)
    place: dict[str, tuple[Any, str]] = {}
    for name, file in found.items():
        full = name if name in expected or prefix + name not in expected else prefix + name
        ignored = any(fnmatchcase(full, pattern) for pattern in interop.ignored)
        repeated = model.tie_embeddings and full in interop.outside["head.weight"]
        if full in expected or not (ignored or repeated):
            place[full] = (file, name)
    interop.check(model, {full: tuple(file.get_slice(name).get_shape()) for full, (file, name) in place.items()})
    return place


def _save(temporary: Path, config: Config, interop: Interop, place: Mapping[str, tuple[Any, str]], *, source: Path) -> None:
    """A checkpoint of step 0: the weights as master weights, moments of zero."""
    shapes = parameter_shapes(config.model)
    pieces: list[tuple[Piece, Tensor]] = []
    for name, theirs in interop.name_map(config.model).items():
        parts = [place[part][0].get_tensor(place[part][1]).float() for part in theirs]
        master = interop.fuse(config.model, name, parts)
        zeros = torch.zeros((), dtype=torch.float32).expand(shapes[name])  # takes no memory until it is written
        values = {state: master if state == "master" else zeros for state in STATES}
        pieces += [(Piece(tensor_name(state, name), whole_box(shapes[name])), value) for state, value in values.items()]
    job = SaveJob(
        RunFolder(temporary).checkpoints,
        step=0,
        local=pieces,
        pieces_of_rank=lambda rank: [piece for piece, _ in pieces],
        shapes={piece.tensor: (piece.box.sizes, "float32") for piece, _ in pieces},
        state={
            "step": 0,
            "consumed_samples": 0,
            "consumed_tokens": 0,
            "data_fingerprint": None,
            "config": config.model_dump(),
            "layout": {"tp": 1, "pp": 1, "dp": 1},
            "versions": {"megatronish": __version__, "torch": torch.__version__},
            "imported_from": str(source),
        },
        world=single_process_group(),
        keep=1,
        storage=FileStorage(),
    )
    save_checkpoint(job)
