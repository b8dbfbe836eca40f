"""csrc/cuda/adamw.cu, run on the CPU: the bits of the C++ code, whatever is kept and wherever the tensors begin."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatronish import native
from megatronish.kernels import square_sum
from megatronish.kernels.adamw import call_native
from tests.kernels.cuda_on_cpu import ORDERS, as_cuda, guarded, needs_compiler
from tests.kernels.test_adamw import NUMBERS, kinds, segments_of, state_of, tensors_of

pytestmark = [needs_compiler, pytest.mark.skipif(native.cpu is None, reason="the C++ code is not built")]

HYPER = [NUMBERS.lr, NUMBERS.beta1, NUMBERS.beta2, NUMBERS.eps, NUMBERS.weight_decay]


@kinds
@pytest.mark.parametrize(("n", "offset", "scale"), [(1, 0, 0.37), (1031, 3, 0.37), (2052, 4, 1.0), (1031, 0, math.inf)])
def test_a_step_has_the_bits_of_native_code(
    master: str, moments: torch.dtype, rounding: str, n: int, offset: int, scale: float
) -> None:
    ours, theirs = (state_of(n, master, moments, offset=offset) for _ in range(2))
    segments, scalars = guarded(segments_of(n)), torch.tensor([scale, 7.0])

    def step(module: object, where: dict[str, int], state: dict[str, Tensor]) -> None:
        kept = [state[name] for name in ("master", "grad", "exp_avg", "exp_avg_sq")]
        call_native(module, where, *kept, scalars, state["low"], HYPER, segments, rounding, True)  # type: ignore[arg-type]

    step(native.cpu, {"threads": 1}, theirs)
    with as_cuda(order=ORDERS[1][0], copies=ORDERS[1][1]) as cuda:
        step(cuda, {"stream": 0}, ours)
    for name, value in tensors_of(theirs).items():
        assert torch.equal(ours[name], value), name


def test_the_square_sum_is_float64_over_many_tensors_and_empty_ones() -> None:
    # More tensors than a launch takes, one of them of more blocks than one, some empty.
    tensors = [guarded(torch.randn(n, generator=torch.Generator().manual_seed(n))) for n in (*range(70), 40_001)]
    given = [(t.data_ptr(), t.numel()) for t in tensors]
    sums = []
    for order, copies in ORDERS:
        with as_cuda(order=order, copies=copies) as cuda:
            partials = torch.empty(sum(-(-n // cuda.sum_block) for _, n in given), dtype=torch.float64)
            total = torch.empty((), dtype=torch.float64)
            cuda.square_sum(given, False, partials.data_ptr(), total.data_ptr(), stream=0)
            sums.append(float(total))
    assert sums[0] == pytest.approx(float(square_sum.reference(tensors)), rel=1e-13) and len(set(sums)) == 1
