"""`python -m megatronish.bench.suite_calls`: bodies of ops on their sample inputs, forward and backward, against float64.

A line of JSON a body: op, body, dtype, seconds until all its results were there (the first call compiles), `wrong` (why it is not
admitted, "" if it is) or `refused` (it cannot do this here). What compute-sanitizer watches.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatronish.comm import streams
from megatronish.kernels.dispatch import why_not
from megatronish.kernels.registry import bodies_of, only_by_name
from megatronish.kernels.table import KERNELS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_IS_WRONG = re.compile(r"off by |\w*(Error|Exception|OutOfResources)\b")
"""What `why_not` says of a body that computes something else, or fails; it says more of those that refuse."""


def call_all(impls: Sequence[str], dtypes: Sequence[str], device: torch.device) -> Iterator[dict[str, Any]]:
    """A row a body and dtype; `impls`: bodies, all by default, but the reference. Of ops that have several: the others, such as
    matrix products, are torch's alone."""
    for kernel in KERNELS.values():
        bodies = bodies_of(kernel.chosen_as)
        left_out = ["reference", *(() if impls else only_by_name([kernel.chosen_as]))]
        for name in bodies if len(bodies) > 1 else ():
            # The optimizer's CUDA kernels are its `native` body.
            also = name == "native" and "cuda" in impls
            if name in left_out or (impls and name not in impls and not also):
                continue
            for dtype in dtypes:
                begun = streams.wall_time(device)
                reason = why_not(kernel, name, DTYPES[dtype], str(device)) or ""
                seconds = streams.wall_time(device) - begun
                is_wrong = _IS_WRONG.match(reason) is not None
                row = {"op": kernel.name, "body": name, "dtype": dtype, "seconds": seconds}
                yield row | {"wrong": reason if is_wrong else "", "refused": "" if is_wrong else reason}


def main() -> None:
    """See the file."""
    parser = argparse.ArgumentParser(prog="python -m megatronish.bench.suite_calls", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--impl", action="append", default=[], help="a body, such as triton; may be repeated [default: all]")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may be repeated [default: both]")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu"))
    options = parser.parse_args()
    device = torch.device("cpu") if options.device == "cpu" else streams.choose_device(0, 1)
    for row in call_all(options.impl, options.dtype or list(DTYPES), device):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
