"""Which part of a layout a fault needs: leave out one thing after the other, as long as the fault stays (delta debugging)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatronish.config import Config
from megatronish.constraints import find_problems

# (section, the keys that go together and the values without them), axes first: what is left of them is the likely axis.
PLAINER: tuple[tuple[str, dict[str, object]], ...] = (
    ("parallel", {"data": 1}),
    ("parallel", {"pipeline": 1, "schedule": "1f1b", "num_chunks": 1, "stage_layers": None, "recompute": "none"}),
    ("parallel", {"pipeline": 1, "schedule": "1f1b", "num_chunks": 1, "stage_layers": None}),
    ("parallel", {"tensor": 1, "sequence": False}),
    ("parallel", {"sequence": False}),
    ("parallel", {"schedule": "1f1b", "num_chunks": 1, "stage_layers": None}),
    ("parallel", {"stage_layers": None}),
    ("parallel", {"zero_stage": 0}),
    ("parallel", {"recompute": "none"}),
    ("model", {"dropout": 0.0}),
    ("model", {"tie_embeddings": False}),
    ("train", {"label_smoothing": 0.0}),
    ("train", {"z_loss": 0.0}),
    ("data", {"separate_documents": False}),
    ("optim", {"grad_reduce_dtype": None}),
    ("optim", {"clip_norm": 0.0}),
)
AXES = {"tensor": 1, "pipeline": 1, "data": 1}


def without(config: Config, section: str, values: dict[str, object]) -> Config | None:
    """The config with these values; None if it has them already, or they make an impossible run."""
    old = getattr(config, section)
    changed = config.model_copy(update={section: old.model_copy(update=values)})
    parallel = changed.parallel
    world_size = parallel.tensor * parallel.pipeline * (parallel.data or 1)
    return None if changed == config or find_problems(changed, world_size) else changed


def narrow(config: Config, fails: Callable[[Config], bool]) -> Config:
    """The plainest config that still fails, of those that leave out one row of PLAINER after the other."""
    for section, values in PLAINER:
        plainer = without(config, section, values)
        if plainer is not None and fails(plainer):
            config = plainer
    return config


def what_is_left(config: Config) -> Iterator[tuple[str, object]]:
    """(key, value) of everything in PLAINER that `config` still has."""
    seen = set()
    for section, values in PLAINER:
        for key, plain in values.items():
            value = getattr(getattr(config, section), key)
            if value != plain and key not in seen and value is not None:
                seen.add(key)
                yield f"{section}.{key}", value
