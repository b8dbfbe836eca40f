"""Faults that trainers of this kind have had, planted one at a time in the trainer's own code: the table, and what its rows are
made with. A row is a function in `collective_faults.py` or `pipeline_faults.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from megatronish.comm import Group
from megatronish.config import Config
from megatronish.preflight.findings import Kind
from megatronish.preflight.rehearse import Microbatches
from tests.parallel.parity import Case

Patch = tuple[Any, str, Any]
CUBE = Case(tp=2, pp=2, dp=4, num_layers=2, num_microbatches=2, dtype="bfloat16")
"""Rank = 8 x pp + 2 x dp + tp."""
DEVICE_KINDS = ("cuda", "cpu")


def with_evaluation(case: Case) -> Config:
    """Two steps, an evaluation after each, and a save at the end."""
    config = case.config()
    held_out = config.data.model_copy(update={"validation": "none"})
    evaluates = config.train.model_copy(update={"eval_interval": 1, "eval_steps": 1})
    return config.model_copy(update={"data": held_out, "train": evaluates})


@dataclass(frozen=True)
class Fault:
    """A row of the table."""

    plant: Callable[[], Patch]
    case: Case
    culprits: tuple[int, ...]
    says: tuple[str, ...]
    """What the first finding's text holds: who, what, where."""
    kind: Kind = "collective"
    also_on_cpu: bool | None = None
    """Whether it is found there too; None: it is looked for on GPUs alone."""
    microbatches: Microbatches = "two of each phase"


FAULTS: dict[str, Fault] = {}


def planted_in(
    case: Case, *culprits: int, says: tuple[str, ...], **more: Any
) -> Callable[[Callable[[], Patch]], Callable[[], Patch]]:
    """Puts a fault into the table; arguments: see Fault."""

    def register(plant: Callable[[], Patch]) -> Callable[[], Patch]:
        FAULTS[plant.__name__] = Fault(plant, case, culprits, says, **more)
        return plant

    return register


@contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """The fault, in this process."""
    with patch.object(*fault.plant()):
        yield


def is_at(groups: Mapping[str, Group], **place: int) -> bool:
    """Whether a rank with these groups is at this place: asked as the trainer would ask it."""
    return all(groups[axis].index == index for axis, index in place.items())


def only(owner: Any, name: str, is_here: Callable[[Any], bool], instead: Callable[..., Any]) -> Patch:
    """A method that does something else on some ranks: `instead(real, self, ...)`."""
    real = getattr(owner, name)

    def faulty(self: Any, *args: Any, **named: Any) -> Any:
        return instead(real, self, *args, **named) if is_here(self) else real(self, *args, **named)

    return owner, name, faulty


def trainer_at(**place: int) -> Callable[[Any], bool]:
    """For whatever has a mesh."""
    return lambda self: is_at(self.mesh.groups, **place)
