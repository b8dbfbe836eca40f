"""The folder of a run: RUN_ROOT/NAME with config.yaml, environment.json, metrics.jsonl, logs/, tensorboard/ and checkpoints/."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatronish import __version__, native
from megatronish.checkpoint.load import find_checkpoints
from megatronish.checkpoint.manifest import step_of
from megatronish.config import Config
from megatronish.config_loader import load_config, to_yaml
from megatronish.errors import UserError, disk_error

FIXED_KEYS = (
    "model",
    "data.sequence_length",
    "data.separate_documents",
    "train.seed",
    "train.global_batch_size",
    "train.batch_ramp",
)
"""What makes a run the same run: another value needs another name. All other keys may change when it is resumed, the layout too."""
FIXED_BEFORE_STEP_1 = ("model",)
"""The same of an imported model that has not trained yet."""


COMMIT_FILE = "COMMIT"
"""Beside a copy of the package: the commit that it is of."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @staticmethod
    def of(config: Config) -> RunFolder:
        """The folder of a config's run."""
        return RunFolder(Path(config.run_root) / config.name)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    def check_belongs_to(self, config: Config) -> None:
        """UserError, one line a key, if the folder holds a run that `config` cannot go on with."""
        if self.config_file.exists():
            newest = find_checkpoints(self.checkpoints)[:1]
            self.check_same_run(load_config(self.config_file), config, step=step_of(newest[0].name) if newest else None)

    def check_same_run(self, before: Config, config: Config, *, step: int | None) -> None:
        """UserError, one line a key, if a run begun under the config `before` cannot go on under `config` after `step` steps (None:
        none are saved)."""
        problems = []
        for key in FIXED_BEFORE_STEP_1 if step == 0 else FIXED_KEYS:
            old, new = _get(before, key), _get(config, key)
            if old == new:
                continue
            fields = {key: (old, new)}
            if isinstance(old, dict) and isinstance(new, dict):
                fields = {f"{key}.{name}": (value, new[name]) for name, value in old.items()}
            problems += [
                f"{name}={b}: {self.path} holds a run with {name}={a}; use that value, or another `name`"
                for name, (a, b) in fields.items()
                if a != b
            ]
        if problems:
            raise UserError("\n".join(problems))

    def prepare(self, config: Config) -> None:
        """Create the folder, unless it holds another run. One process calls this."""
        self.check_belongs_to(config)
        try:
            for folder in (self.path, self.checkpoints, self.path / "logs"):
                folder.mkdir(parents=True, exist_ok=True)
                # That a folder is there does not say that it can be written: a run of before on a disk that is read-only now.
                with tempfile.TemporaryFile(dir=folder):
                    pass
        except OSError as error:
            reason = f"cannot write the run folder {self.path}: {error.strerror}; change run_root or name"
            raise disk_error(error.errno)(reason) from error

    def record(self, config: Config) -> None:
        """Write config.yaml (resolved) and environment.json, once the run is sure to go on with them. One process calls this."""
        try:
            _replace(self.config_file, to_yaml(config))
            _replace(self.path / "environment.json", json.dumps(_environment(), indent=2) + "\n")
        except OSError as error:
            reason = f"cannot write the run folder {self.path}: {error.strerror}; change run_root or name"
            raise disk_error(error.errno)(reason) from error


def _get(config: Config, key: str) -> Any:
    value: Any = config.model_dump()
    for part in key.split("."):
        assert isinstance(value, dict)
        value = value[part]
    return value


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def _environment() -> dict[str, object]:
    return {
        "commit": commit_of_code(),
        "host": socket.gethostname(),
        "megatronish": __version__,
        "native": native.describe().splitlines(),
        "num_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def commit_of_code() -> str | None:
    """The commit of the source tree, with `+changes` if it has any; None outside of a checkout."""
    here = Path(__file__).resolve().parent
    if (copied := here.parent / COMMIT_FILE).is_file():  # a copy may lie below another commit by now
        return copied.read_text().strip()
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes else "")
