"""Rotary positions: how much of a head turns, and how the frequencies are scaled."""

from __future__ import annotations

from megatronish.config import RopeScaling
from megatronish.constraints.row import Constraint, Layout

_KEYS_OF: dict[str, tuple[str, ...]] = {
    "linear": (),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
}
"""Beside type and factor."""


def _scaling(c: Layout) -> RopeScaling:
    assert c.model.rope_scaling is not None
    return c.model.rope_scaling


def _is(c: Layout, *types: str) -> bool:
    return c.model.architecture == "llama" and c.model.rope_scaling is not None and c.model.rope_scaling.type in types


def _foreign(c: Layout) -> list[str]:
    """Keys that the type does not read."""
    given = _scaling(c).model_dump(exclude_none=True, exclude={"type", "factor"})
    return [f"{key}={value}" for key, value in given.items() if key not in _KEYS_OF[_scaling(c).type]]


def _of_rotary(c: Layout) -> list[str]:
    """What gpt2 would not read."""
    names = ("partial_rotary_factor", "rope_layout", "rope_scaling")
    defaults = type(c.model).model_fields
    return [f"model.{name}" for name in names if getattr(c.model, name) != defaults[name].default]


def _bounds(c: Layout) -> tuple[str, float, str, float]:
    """(key, value) of the slower bound and of the faster."""
    s = _scaling(c)
    if s.type == "llama3":
        return "low_freq_factor", s.low_freq_factor or 1.0, "high_freq_factor", s.high_freq_factor or 4.0
    return "beta_slow", s.beta_slow or 1.0, "beta_fast", s.beta_fast or 32.0


ROTARY = (
    Constraint(
        name="gpt2 has no rotary positions",
        keys=("model.rope_scaling", "model.rope_layout", "model.partial_rotary_factor", "model.architecture"),
        applies=lambda c: c.model.architecture == "gpt2",
        holds=lambda c: not _of_rotary(c),
        message=lambda c: (
            f"{', '.join(_of_rotary(c))}: model.architecture=gpt2 has learned positions, which do not turn; remove "
            f"{'it' if len(_of_rotary(c)) == 1 else 'them'}"
        ),
    ),
    Constraint(
        name="model.partial_rotary_factor turns pairs",
        keys=("model.partial_rotary_factor", "model.num_heads", "model.hidden_size"),
        applies=lambda c: (
            c.model.architecture == "llama" and c.model.hidden_size % c.model.num_heads == 0 and c.model.head_size % 2 == 0
        ),
        holds=lambda c: c.model.rotary_size > 0 and c.model.rotary_size % 2 == 0,
        message=lambda c: (
            f"model.partial_rotary_factor={c.model.partial_rotary_factor} of heads of {c.model.head_size} elements is "
            f"{c.model.rotary_size}, but they turn in pairs; for {c.model.rotary_size // 2 * 2 or 2} of them set it to "
            f"{(c.model.rotary_size // 2 * 2 or 2) / c.model.head_size:g}"
        ),
    ),
    Constraint(
        name="model.rope_scaling has the keys of its type",
        keys=("model.rope_scaling",),
        applies=lambda c: _is(c, *_KEYS_OF),
        holds=lambda c: not _foreign(c),
        message=lambda c: (
            f"model.rope_scaling: type={_scaling(c).type} does not read {', '.join(_foreign(c))}; remove "
            f"{'it' if len(_foreign(c)) == 1 else 'them'} (it reads {', '.join(('factor', *_KEYS_OF[_scaling(c).type]))})"
        ),
    ),
    Constraint(
        name="model.rope_scaling needs the length before",
        keys=("model.rope_scaling",),
        applies=lambda c: _is(c, "llama3", "yarn"),
        holds=lambda c: _scaling(c).original_max_position_embeddings is not None,
        message=lambda c: (
            f"model.rope_scaling: type={_scaling(c).type} needs original_max_position_embeddings, the longest sequence that the "
            f"model was trained on before, 8192 say"
        ),
    ),
    Constraint(
        name="model.rope_scaling has its bounds in order",
        keys=("model.rope_scaling",),
        applies=lambda c: _is(c, "llama3", "yarn"),
        holds=lambda c: _bounds(c)[1] < _bounds(c)[3],
        message=lambda c: (
            "model.rope_scaling: {0}={1:g} must be below {2}={3:g}; what turns more often than {2} stays, what turns less "
            "often than {0} is slowed down".format(*_bounds(c))
        ),
    ),
    Constraint(
        name="yarn needs model.rope_theta > 1",
        keys=("model.rope_theta", "model.rope_scaling"),
        applies=lambda c: _is(c, "yarn"),
        holds=lambda c: c.model.rope_theta > 1,
        message=lambda c: (
            f"model.rope_theta={c.model.rope_theta:g}, but type=yarn of model.rope_scaling goes by frequencies that fall; set "
            f"model.rope_theta above 1, 10000 say"
        ),
    ),
)
