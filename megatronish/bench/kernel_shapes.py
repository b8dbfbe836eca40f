"""The sizes that `bench kernels` measures: presets, and files of one's own.

Both give, for each op, a list of its dimensions (`DIMENSIONS`). T: tokens, S: tokens of a sample, B: samples, H: heads, G: groups
of key/value heads, K: head size, D: hidden size, F: width of the MLP, V: vocabulary, N: elements; W: window, L: length of a
document, C: chunks of a loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatronish.errors import Problems, UserError
from megatronish.yaml_file import read_yaml_file

Dims = Mapping[str, int]
_ATTENTION = ("S", "B", "H", "G", "K")

DIMENSIONS: dict[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "attention_full": _ATTENTION,
    "attention_window": (*_ATTENTION, "W"),
    "attention_documents": (*_ATTENTION, "L"),
    "attention_dropout": _ATTENTION,
    "rms_norm": ("T", "D"),
    "layer_norm": ("T", "D"),
    "add_rms_norm": ("T", "D"),
    "add_layer_norm": ("T", "D"),
    "split_rotary": _ATTENTION,
    "swiglu": ("T", "F"),
    "geglu": ("T", "F"),
    "gelu": ("T", "F"),
    "dropout": ("T", "D"),
    "bias_gelu_dropout_add": ("T", "D"),
    "cross_entropy": ("T", "V"),
    "linear_cross_entropy": ("T", "D", "V", "C"),
    "square_sum": ("N",),
    "adamw": ("N",),
    "adamw_bf16": ("N",),
    "adamw_16bit": ("N",),
    "optimizer_step": ("N",),
}
"""By op, in the order in which they are measured."""


@dataclass(frozen=True)
class _Model:
    """A transformer, and what one GPU sees of a step."""

    S: int
    B: int
    H: int
    G: int
    K: int
    F: int
    V: int
    N: int
    """Elements of one rank's share of the optimizer."""
    loss_tokens: int = 16_384
    """Of the fused loss, whose chunks should have some 1,000 tokens each."""
    C: int = 20

    def dims(self) -> dict[str, list[Dims]]:
        """Of every op."""
        T, D = self.S * self.B, self.H * self.K
        of = {
            **{name: getattr(self, name) for name in ("S", "B", "H", "G", "K", "F", "V", "N", "C")},
            "T": T,
            "D": D,
            "W": max(1, self.S // 4),
            "L": max(1, self.S // 4),
        }
        found: dict[str, list[Dims]] = {op: [{name: of[name] for name in names}] for op, names in DIMENSIONS.items()}
        found["linear_cross_entropy"] = [{"T": self.loss_tokens, "D": D, "V": self.V, "C": self.C}]
        return found


_MODELS = {
    "small": _Model(S=256, B=1, H=8, G=4, K=64, F=1024, V=4096, N=1_000_000, loss_tokens=256, C=4),
    "gpt2-124m": _Model(S=1024, B=8, H=12, G=12, K=64, F=3072, V=50257, N=124_000_000),
    "llama3-8b": _Model(S=8192, B=1, H=32, G=8, K=128, F=14336, V=128256, N=100_000_000),
    "llama3-70b": _Model(S=8192, B=1, H=64, G=8, K=128, F=28672, V=128256, N=100_000_000),
    "gpt3-175b": _Model(S=2048, B=1, H=96, G=96, K=128, F=49152, V=50257, N=100_000_000),
}


def _sizes(
    *, attention: Sequence[int], rows: int, widths: Sequence[int], heads: int, elements: Sequence[int]
) -> dict[str, list[Dims]]:
    """Every op at several sizes: as many tokens in long samples as in short ones; wider rows, vocabularies, tensors."""
    tokens, K = max(attention), 128 if heads > 4 else 64
    found: dict[str, list[Dims]] = {}
    for op, names in DIMENSIONS.items():
        if "S" in names:
            of_S = [{"S": S, "B": tokens // S, "H": heads, "G": heads, "K": K, "W": S // 4, "L": S // 4} for S in attention]
            found[op] = [{name: dims[name] for name in names} for dims in of_S]
        elif names == ("N",):
            found[op] = [{"N": N} for N in elements]
        elif "V" in names:
            whole = {"T": rows, "D": widths[0], "C": 4}
            found[op] = [{name: {**whole, "V": 8 * width}[name] for name in names} for width in widths]
        else:
            found[op] = [{"T": rows, names[1]: width} for width in widths]
    return found


def presets() -> dict[str, dict[str, list[Dims]]]:
    """By name: the dimensions of every op."""
    found = {name: model.dims() for name, model in _MODELS.items()}
    large, small = [1 << n for n in range(10, 15)], [64, 128, 256]
    found["sizes"] = _sizes(attention=large, rows=4096, widths=large, heads=16, elements=[1 << n for n in range(20, 28, 2)])
    found["small-sizes"] = _sizes(attention=small, rows=256, widths=[256, 512, 1024], heads=4, elements=[1 << 16, 1 << 18, 1 << 20])
    return found


def default_shapes(device: torch.device) -> str:
    """The preset of a kind of device."""
    return "llama3-8b" if device.type == "cuda" else "small"


def shapes_of(name: str) -> dict[str, list[Dims]]:
    """Of a preset, or of a YAML file. UserError with all that is wrong with it."""
    known = presets()
    if name in known:
        return known[name]
    path = Path(name)
    if not path.is_file():
        raise UserError(f"--shapes {name}: no file, and no preset; presets are {', '.join(known)}")
    return _read(path)


def _read(path: Path) -> dict[str, list[Dims]]:
    values, problems = read_yaml_file(path).values, Problems()
    found = {op: problems.attempt(op, partial(_checked, path, op, given)) for op, given in values.items()}
    problems.raise_all()
    if not any(found.values()):
        raise UserError(f"{path}: gives no sizes; name an op and its sizes, such as rms_norm: {{{_example('rms_norm')}}}")
    return {op: rows for op, rows in found.items() if rows is not None}


def _checked(path: Path, op: str, given: object) -> list[Dims]:
    if op not in DIMENSIONS:
        raise UserError(f"{path}: {op} is no op; ops are {', '.join(DIMENSIONS)}")
    names = DIMENSIONS[op]
    rows: list[Any] = given if isinstance(given, list) else [given]
    for row in rows:
        if not isinstance(row, dict) or row.keys() != set(names):
            raise UserError(f"{path}: {op}: {_plain(row)} must give {', '.join(names)}, such as {{{_example(op)}}}")
        if bad := next((n for n in names if type(row[n]) is not int or row[n] < 1), None):
            raise UserError(f"{path}: {op}: {bad}={row[bad]} must be a whole number from 1 up")
        if "G" in row and row["H"] % row["G"]:
            raise UserError(f"{path}: {op}: H={row['H']} is not a multiple of G={row['G']}; use a divisor of {row['H']}")
        if op == "split_rotary" and row["K"] % 2:
            raise UserError(f"{path}: {op}: K={row['K']} is odd, but elements turn in pairs; use {row['K'] + 1}")
    return rows


def _plain(row: object) -> str:
    return "{" + ", ".join(f"{k}: {v}" for k, v in row.items()) + "}" if isinstance(row, dict) else repr(row)


def _example(op: str) -> str:
    return describe(_MODELS["llama3-8b"].dims()[op][0], between=": ", joined=", ")


def describe(dims: Dims, *, between: str = " ", joined: str = " ") -> str:
    """For people: `S 8192 B 1 ...`."""
    return joined.join(f"{name}{between}{size}" for name, size in dims.items())
