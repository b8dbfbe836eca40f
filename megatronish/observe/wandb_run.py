"""Weights & Biases, an optional extra: the metrics of metrics.jsonl, sent as they come. WANDB_MODE=offline keeps them on disk."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatronish.errors import UserError
from megatronish.packages import find_package

ID_FILE = "wandb_id"


def require_wandb(project: str | None) -> None:
    """UserError if a project is given and the package is not installed."""
    if project is not None and find_package("wandb") is None:
        raise UserError(
            f"observe.wandb_project={project}, but the package wandb is not installed: pip install 'megatronish[wandb]', or remove "
            "observe.wandb_project"
        )


class WandbRun:
    """One run of a project. Lives of the same run folder go on with the same one: its id stands in RUN/wandb_id."""

    def __init__(self, project: str, *, name: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Opens it; UserError where wandb cannot start (no login, no network)."""
        require_wandb(project)
        wandb: Any = importlib.import_module("wandb")
        id_file = run_dir / ID_FILE
        if not id_file.is_file():
            id_file.write_text(uuid.uuid4().hex[:12])
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                id=id_file.read_text().strip(),
                resume="allow",
                dir=str(run_dir),
                config=dict(config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"observe.wandb_project={project}: wandb cannot start ({reason}); run `wandb login`, or set WANDB_MODE=offline"
            ) from None
        # Its own step may not go back, ours does where a life was killed after its last checkpoint.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send one row; does not wait for the network."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Send what is left. Waits for the network, unless offline. Calling it again does nothing."""
        self._run.finish()
