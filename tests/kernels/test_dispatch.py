"""Bodies are admitted by what they compute, chosen by what they take, kept with the run, and refused with the reason."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatronish.config import Config
from megatronish.kernel_choices import cases
from megatronish.kernels import dispatch, registry
from megatronish.kernels.dispatch import Case, Decision, as_keys, decide, read_decisions, why_not
from megatronish.kernels.registry import Implementation, Refused, bodies_of, choose, choosing, key_of, register
from megatronish.kernels.table import KERNELS, Kernel
from megatronish.packages import find_package

CPU = torch.device("cpu")
GPU_NAME = "some GPU"


def _wrong(x: Tensor) -> Tensor:
    return x * 2.001


def _raises(x: Tensor) -> Tensor:
    raise RuntimeError("no kernel image\nsecond line")


def _never(x: Tensor) -> str | None:
    return "odd rows" if x.shape[0] % 2 else None


register(
    "twice_for_tests(Tensor x) -> Tensor",
    lambda x: x + x,
    torch.empty_like,
    also={
        "reference": Implementation(lambda x: x * 2),
        "triton": Implementation(lambda x: x.mul(2), _never),
        "cuda": Implementation(_wrong),
        "liger": Implementation(_raises),
        "native": Implementation(lambda x: 2 * x, is_deterministic=False),
        "triton-tma": Implementation(lambda x: 2 * x, only_by_name=True),
    },
)
TWICE = Kernel(
    "twice_for_tests",
    lambda x: torch.ops.megatronish.twice_for_tests(x),
    lambda x: x * 2,
    lambda dtype, device: [
        (torch.arange(6.0, dtype=dtype, device=device).view(2, 3),),
        (torch.ones(3, 2, dtype=dtype, device=device),),
    ],
)


def _ones(device: str) -> tuple[Tensor]:
    return (torch.ones(4, 5, device=device),)


CASE = Case(TWICE, torch.float32, _ones, _ones)


@pytest.fixture(autouse=True)
def _no_choice_is_left_behind() -> Iterator[None]:
    yield
    choose(forced={}, measured={})


def decided(seconds: dict[str, float], **more: Any) -> Decision:
    """As on a GPU on which each body takes so long."""
    measured: list[str] = []

    def take(kernel: Kernel, name: str, arguments: tuple[Any, ...], device: torch.device) -> float:
        measured.append(name)
        return seconds[name]

    # A device that is no CPU by its name, whose tensors are here all the same.
    class Device:
        type = "cuda"

        def __str__(self) -> str:
            return "cpu"

    with patch.object(dispatch, "_seconds", take), patch.object(dispatch.streams, "device_name", lambda device: GPU_NAME):
        (decision,) = decide([CASE], **{"forced": {}, "device": Device(), **more})
    assert set(measured) <= set(seconds)
    return decision


def test_the_fastest_that_matches_the_reference_is_taken_and_the_others_are_named_with_a_reason() -> None:
    decision = decided({"torch": 3e-3, "triton": 1e-3, "native": 2e-3})
    assert decision.implementation == "triton"
    assert re.search(
        r"triton 1.000 ms, native 2.000 ms, torch 3.000 ms; cuda: off by 5.0e-04.*liger: RuntimeError: no kernel image; "
        r".*triton-tma: runs only where it is named$",
        decision.why,
    )
    assert decided({"torch": 1e-3, "triton": 2e-3, "native": 2e-3}).implementation == "torch"


def test_deterministic_training_admits_only_deterministic_bodies() -> None:
    decision = decided({"torch": 3e-3, "triton": 2e-3}, deterministic=True)
    assert decision.implementation == "triton" and "native: not deterministic" in decision.why
    with pytest.raises(Refused, match=r"not deterministic, and train\.deterministic is true"):
        decided({}, forced={"twice_for_tests": "native"}, deterministic=True)


def test_what_was_decided_on_this_device_is_taken_again_and_not_measured() -> None:
    before = replace(decided({"torch": 3e-3, "triton": 1e-3, "native": 2e-3}), implementation="native")
    assert decided({}, before=[before]) == before
    times = {"torch": 1e-3, "triton": 2e-3, "native": 3e-3}
    for other in (replace(before, device="another GPU"), replace(before, bucket="8x5"), replace(before, implementation="gone")):
        assert decided(times, before=[other]).implementation == "torch"


def test_what_is_kept_can_be_read_again_and_what_is_malformed_is_decided_anew() -> None:
    decision = Decision("attention", "8x1x2x16", "float32", "cpu", "torch", "why")
    assert read_decisions([decision.saved()]) == [decision]
    for bad in (None, {}, [1], [{**decision.saved(), "why": 3}], [{"choice": "attention"}]):
        assert read_decisions(bad) == []


def test_on_cpu_nothing_is_measured_and_what_ran_before_runs() -> None:
    with patch.object(dispatch, "_seconds", side_effect=AssertionError):
        (decision,) = decide([CASE], forced={}, device=CPU)
    assert (decision.implementation, decision.device) == ("torch", "cpu")


def test_a_choice_holds_for_its_bucket_alone_and_leaves_a_call_that_it_refuses_to_torch() -> None:
    calls: list[str] = []
    bodies = {name: Implementation(lambda x, name=name: calls.append(name) or x + x, _never) for name in ("torch", "triton")}  # type: ignore[misc]
    with patch.dict(registry._ops["twice_for_tests"].bodies, bodies):
        choose(forced={}, measured={key_of("twice_for_tests", (torch.ones(4, 5),)): "triton"})
        for shape in ((4, 5), (3, 5), (4, 6), (9, 5)):
            TWICE.function(torch.ones(shape))
        choose(forced={"twice_for_tests": "triton"}, measured={})
        TWICE.function(torch.ones(8, 9))
        with pytest.raises(Refused, match=r"^kernels.twice_for_tests=triton: not possible here: odd rows; set it to"):
            TWICE.function(torch.ones(3, 5))
    # [3, 5] is of the bucket, but has an odd number of rows.
    assert calls == ["triton", "torch", "torch", "torch", "triton"]


@pytest.mark.parametrize("kernel", [k for k in KERNELS.values() if len(bodies_of(k.chosen_as)) > 1], ids=lambda kernel: kernel.name)
def test_every_body_of_an_op_is_admitted_where_it_can_run(kernel: Kernel) -> None:
    for name in bodies_of(kernel.chosen_as):
        reason = why_not(kernel, name, torch.float32, "cpu")
        can_run = name in ("torch", "reference", "native") or (name == "triton" and find_package("triton") is not None)
        # Others are of packages that the tests do not need, or want a GPU, or do one kind only: they say so.
        says = ("not installed", "CPU", "does not do this kind")
        assert reason is None or (not can_run and any(words in reason for words in says)), (name, reason)


def config(**model: Any) -> Config:
    sizes = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "mlp_size": 64, "vocab_size": 100}
    return Config.model_validate(
        {
            "name": "x",
            "model": {**sizes, **model},
            "data": {"train": "x", "sequence_length": 16},
            "optim": {"lr": 1e-3},
            "train": {"steps": 1, "global_batch_size": 4, "micro_batch_size": 2},
        }
    )


@pytest.mark.parametrize("model", [{}, {"dropout": 0.1}, {"architecture": "gpt2", "max_positions": 16}], ids=str)
def test_the_calls_that_are_decided_are_those_that_a_model_makes(model: dict[str, Any]) -> None:
    from megatronish.batch import TokenContext
    from megatronish.comm.groups import single_process_group
    from megatronish.models import MODELS
    from megatronish.models.layers import place_dropout
    from megatronish.parallel.loss import vocab_parallel_cross_entropy
    from tests.kernels.test_kernels import recording

    given = config(**model)
    module = MODELS[given.model.architecture].module(given.model, dtype=torch.float32)
    place_dropout(module, seed=1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    S, B = 16, 2
    positions = torch.arange(S)[:, None].expand(S, B)
    context = TokenContext(positions_SB=positions, documents_SB=None, sample_numbers_B=torch.arange(B))
    with recording() as calls:
        logits = module(torch.zeros(S, B, dtype=torch.int64), context)
        loss = {"vocab_size": given.model.vocab_size, "padded_vocab_size": given.model.padded_vocab_size}
        vocab_parallel_cross_entropy(
            logits, torch.zeros(S, B, dtype=torch.int64), group=single_process_group(), **loss
        ).sum().backward()
    names = set(registry.choices())
    ops = {op.name().split("::")[1].split(".")[0]: arguments for op, arguments in calls}
    chosen = {name: arguments for name, arguments in ops.items() if registry._ops[name].choice in names}
    assert any(name.endswith("_backward") for name in chosen)
    # Forward and backward of a call have one key.
    made = {key_of(name, arguments) for name, arguments in chosen.items()}
    not_here = {"adamw", "square_sum"} | ({"attention"} if given.model.dropout else set())  # the optimizer; evaluation
    decided_on = [case for case in cases(given, 1) if case.kernel.name not in not_here]
    assert made == set(as_keys(decide(decided_on, forced={}, device=CPU), "cpu"))


def test_forcing_is_for_the_time_of_a_block() -> None:
    with choosing({"twice_for_tests": "cuda"}):
        assert float(TWICE.function(torch.ones(1, 1))) == pytest.approx(2.001)
    assert float(TWICE.function(torch.ones(1, 1))) == 2.0
