"""What the bodies of ops that `kernels` can name do not do, as far as the config alone tells."""

from __future__ import annotations

from megatronish.constraints.row import Constraint, Layout


def _has_heads(c: Layout) -> bool:
    return c.model.hidden_size % c.model.num_heads == 0


KERNELS = (
    Constraint(
        name="kernels.attention=triton has no float64",
        keys=("kernels.attention", "train.dtype"),
        applies=lambda c: c.config.kernels.attention == "triton",
        holds=lambda c: c.train.dtype != "float64",
        message=lambda c: (
            "kernels.attention=triton does not take train.dtype=float64; set kernels.attention to auto, or train.dtype to float32, "
            "bfloat16 or float16"
        ),
    ),
    Constraint(
        name="kernels.attention=triton takes heads of 8 to 256",
        keys=("kernels.attention", "model.num_heads", "model.hidden_size"),
        applies=lambda c: c.config.kernels.attention == "triton" and _has_heads(c),
        holds=lambda c: c.model.head_size % 8 == 0 and c.model.head_size <= 256,
        message=lambda c: (
            "kernels.attention=triton takes head sizes that are multiples of 8 up to 256, but "
            f"model.hidden_size={c.model.hidden_size} / model.num_heads={c.model.num_heads} is {c.model.head_size}; "
            "set kernels.attention to auto, or change model.num_heads"
        ),
    ),
    Constraint(
        name="kernels.attention=cuda computes in 16 bits",
        keys=("kernels.attention", "train.dtype"),
        applies=lambda c: c.config.kernels.attention == "cuda",
        holds=lambda c: c.train.dtype in ("bfloat16", "float16"),
        message=lambda c: (
            f"kernels.attention=cuda does not take train.dtype={c.train.dtype}; set kernels.attention to auto, or train.dtype to "
            "bfloat16 or float16"
        ),
    ),
    Constraint(
        name="kernels.attention=cuda takes heads of 64 or 128",
        keys=("kernels.attention", "model.num_heads", "model.hidden_size"),
        applies=lambda c: c.config.kernels.attention == "cuda" and _has_heads(c),
        holds=lambda c: c.model.head_size in (64, 128),
        message=lambda c: (
            "kernels.attention=cuda takes head sizes of 64 or 128, but "
            f"model.hidden_size={c.model.hidden_size} / model.num_heads={c.model.num_heads} is {c.model.head_size}; "
            "set kernels.attention to auto, or change model.num_heads"
        ),
    ),
)
