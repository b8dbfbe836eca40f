import os

import pytest
import torch

from megatronish.observe.flops import measure_matmul_tflops, num_cores


def test_the_measured_rate_is_that_of_the_same_product_timed_by_torch_and_threads_are_put_back():
    from torch.utils.benchmark import Timer

    before = torch.get_num_threads()
    rate = measure_matmul_tflops(torch.float32, 1)
    assert torch.get_num_threads() == before
    timer = Timer("a @ a", globals={"a": torch.ones(384, 384)}, num_threads=1)
    timed = min(timer.timeit(1).mean for _ in range(50))
    # Both are the best of many on a machine that others use too; a wrong unit or count of operations is off by far more.
    assert 0.3 < rate / (2 * 384**3 / timed / 1e12) < 3


def test_by_default_it_is_the_rate_of_all_cores():
    one, every = measure_matmul_tflops(torch.float32, 1), measure_matmul_tflops(torch.float32)
    assert every / one == pytest.approx(num_cores(), rel=0.5)
    assert 1 <= num_cores() <= len(os.sched_getaffinity(0))


def test_every_dtype_of_training_has_a_rate():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert 0 < measure_matmul_tflops(dtype, 1) < 1000
