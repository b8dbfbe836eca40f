"""When held-out loss stops falling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class EarlyStopping:
    """Counts evaluations in a row without a new lowest loss. Plain numbers, saved with every checkpoint."""

    patience: int | None
    """None: never stop."""
    lowest: float = math.inf
    num_without: int = 0
    """Evaluations since the lowest."""

    def update(self, loss: float) -> None:
        """An evaluation gave `loss`. One that is not a number is no new lowest."""
        if loss < self.lowest:
            self.lowest, self.num_without = loss, 0
        else:
            self.num_without += 1

    @property
    def is_exhausted(self) -> bool:
        """Whether the run should end."""
        return self.patience is not None and self.num_without >= self.patience

    def describe(self) -> str:
        """Why it should."""
        return f"{self.num_without} evaluations without a new lowest loss (it is {self.lowest:.4f}); raise train.patience to go on"

    def state(self) -> dict[str, Any]:
        """For a checkpoint: JSON has no infinity."""
        return {"lowest": self.lowest if math.isfinite(self.lowest) else None, "num_without": self.num_without}

    def restore(self, state: Mapping[str, Any]) -> None:
        """What `state` gave; nothing of a checkpoint that has none."""
        lowest = state.get("lowest")
        self.lowest = math.inf if lowest is None else float(lowest)
        self.num_without = int(state.get("num_without", 0))
