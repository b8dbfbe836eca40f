"""Rotary positions in a config.json of transformers: base and scaling.

`rope_parameters` is read since transformers 5, `rope_theta` and `rope_scaling` before: both are written, either is read.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megatronish.config import ModelConfig
from megatronish.errors import UserError
from megatronish.interop.foreign_config import ForeignConfig
from megatronish.kernels.rotary_tables import Scaling

_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
}
"""By their rope_type, what it reads beside the base."""


def write(config: ModelConfig) -> dict[str, Any]:
    """Their keys."""
    given = config.rope_scaling
    if given is None:
        parameters: dict[str, Any] = {"rope_type": "default"}
        before: dict[str, Any] = {}
    else:
        values = given.model_dump(exclude_none=True, exclude={"type"})
        if given.type == "llama3":  # they have no defaults
            values = {key: asdict(Scaling(type=given.type, **values))[key] for key in _NUMBERS["llama3"]}
        parameters = {"rope_type": given.type, **values}
        before = {"rope_scaling": dict(parameters)}
    return {"rope_theta": config.rope_theta, "rope_parameters": {**parameters, "rope_theta": config.rope_theta}, **before}


def positions(config: ModelConfig, trained: int) -> int:
    """max_position_embeddings: tokens that the model was trained on, or that its scaling is made for."""
    scaling = config.rope_scaling
    if scaling is None or scaling.original_max_position_embeddings is None:
        return trained
    return max(trained, int(scaling.original_max_position_embeddings * scaling.factor))


def read(given: ForeignConfig) -> dict[str, Any]:
    """Our keys. UserError for what this program does not compute."""
    theta = given.number("rope_theta", default=10000.0)
    longest = given.take("max_position_embeddings", default=None)
    found = {key: given.take(key, default=None) for key in ("rope_parameters", "rope_scaling")}
    read_of = {key: _read(key, value, longest) for key, value in found.items() if value is not None}
    if len(read_of) == 2 and len({str(scaling) for _, scaling in read_of.values()}) == 2:
        raise UserError(f"config.json: rope_parameters={found['rope_parameters']} and rope_scaling={found['rope_scaling']} differ")
    for own_theta, scaling in read_of.values():
        section = {"rope_theta": theta if own_theta is None else own_theta}
        return section if scaling is None else {**section, "rope_scaling": scaling}
    return {"rope_theta": theta}


def _read(key: str, value: Any, longest: Any) -> tuple[float | None, dict[str, Any] | None]:
    """(rotary base, our rope_scaling) as far as given."""
    fields = {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else {}
    kind = fields.pop("rope_type", fields.pop("type", "default"))
    fields.pop("type", None)
    theta = fields.pop("rope_theta", None)
    is_whole = fields.pop("partial_rotary_factor", 1.0) == 1.0 and fields.pop("truncate", True) is True
    if kind in ("llama3", "yarn") and longest is not None:
        fields.setdefault("original_max_position_embeddings", longest)
    known = _NUMBERS.get(kind) if isinstance(kind, str) else None
    numbers = [*fields.values(), *([] if theta is None else [theta])]
    are_numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in numbers)
    if not isinstance(value, dict) or known is None or set(fields) - set(known) or not is_whole or not are_numbers:
        raise UserError(
            f"config.json: {key}={value}: rope_type must be {', '.join(_NUMBERS)}, of whole heads, with no more than "
            f"{', '.join(dict.fromkeys(name for names in _NUMBERS.values() for name in names))}"
        )
    return (None if theta is None else float(theta)), (None if kind == "default" else {"type": kind, **fields})
