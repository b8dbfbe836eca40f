"""bench step: both variants train the same work on real processes, and the ratio is of each round's own rates."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from megatronish.bench import step as module
from megatronish.bench import step_peer
from megatronish.bench.cli import app
from megatronish.bench.step import StepBench, measure
from megatronish.bench.step_peer import _model
from megatronish.config import Config
from megatronish.errors import UserError
from megatronish.formulas import flops_per_token, num_parameters
from tests.parallel.parity import Case


@pytest.fixture(scope="module")
def result() -> dict[str, object]:
    config = Case(tp=2, sequence=True, dtype="float32", vocab_size=96, vocab_multiple=8).config()
    return measure(StepBench(config, num_ranks=2, rounds=3, steps=2, peer_threads=1))


@pytest.mark.slow
def test_rates_are_of_the_same_tokens_and_the_ratio_is_the_median_of_the_rounds(result) -> None:
    ours, peer = result["all_tokens_per_second"].values()
    assert len(ours) == len(peer) == 3 and min(*ours, *peer) > 0
    assert result["ratio"] == median(a / b for a, b in zip(ours, peer, strict=True))
    assert result["layout"] == "tp2 pp1 dp1 sequence parallel ZeRO 1"
    assert result["tokens_per_step"] == 6 * 16
    assert {"forward_backward", "reduce", "optimizer"} <= result["phase_seconds"].keys()


@pytest.mark.slow
def test_the_command_prints_the_ratio_and_writes_the_numbers(result, root: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "measure", lambda bench, on_round: result)
    run = CliRunner().invoke(app, ["step", str(root / "configs/demo_cpu.yaml"), "--json", str(tmp_path / "step.json")])
    assert run.exit_code == 0, run.output
    assert f"ratio {result['ratio']:.3f} (median of 3 interleaved rounds)" in run.output
    assert json.loads((tmp_path / "step.json").read_text()) == result


def gpt2(**more: Any) -> Config:
    config = Case(architecture="gpt2", tie_embeddings=True, dtype="float32", vocab_size=93, vocab_multiple=8, num_layers=2).config()
    return config.model_copy(update={"model": config.model.model_copy(update={"num_kv_heads": None, **more})})


def test_the_peer_has_our_parameters_and_learns() -> None:
    config = gpt2()
    model = _model(config)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config.model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_peer, "_model", lambda config: model)
        step = step_peer.make_peer(config, torch.device("cpu"), compiled=False)
    batch = module.make_loader(config, 0, 1).batch(1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(batch)
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters()}
    # AdamW's first step is lr in every element that has a gradient.
    assert all(0.5 * config.optim.lr < way < 1.5 * config.optim.lr for way in moved.values()), moved


def test_model_flops_are_compared_with_the_matrix_rate_a_device(monkeypatch) -> None:
    config = gpt2()
    bench = StepBench(config, num_ranks=2, rounds=1, steps=1, peer_threads=1, compiled=True)
    ours, peer = module.Workers("megatronish"), module.Workers(module._peer_name(bench))
    ours.rates, peer.rates = [3e9], [1e9]
    monkeypatch.setattr(module.streams, "device_name", lambda device: "NVIDIA H200")
    turns = {
        "megatronish": [module.Turn(1, 1, {}, 5), module.Turn(1, 1, {}, 7)],
        peer.name: [module.Turn(1, 1, {}, 4, matrix) for matrix in (600.0, 700.0, 1.0)],
    }
    result = module._against_limits(bench, ours, peer, turns)
    of_token = flops_per_token(config.model, 16)
    assert peer.name == "Hugging Face GPT-2, one process, torch.compile"
    assert result["peak_memory_bytes"] == {"megatronish": 7, peer.name: 4}
    # Two ranks have two GPUs.
    assert result["model_tflops"] == {"megatronish": 1.5e9 * of_token / 1e12, peer.name: 1e9 * of_token / 1e12}
    assert result["matrix_tflops"] == 600.0 and result["published_peak_tflops"] == 67.0
    assert result["fraction_of_matrix_rate"][peer.name] == result["model_tflops"][peer.name] / 600.0


def test_a_model_that_the_peer_cannot_be_is_refused_before_anything_is_started() -> None:
    with pytest.raises(UserError, match=r"model\.num_kv_heads=4 for model\.num_heads=8: Hugging Face's GPT-2"):
        measure(StepBench(gpt2(num_kv_heads=4), num_ranks=1, rounds=1, steps=1, peer_threads=1))
