"""bench step: both variants train the same work on real processes, and the ratio is of each round's own rates."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest
from typer.testing import CliRunner

from megatronish.bench import step as module
from megatronish.bench.cli import app
from megatronish.bench.step import StepBench, measure
from megatronish.errors import UserError
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


def test_another_model_than_the_peers_is_refused() -> None:
    config = Case(architecture="gpt2", tie_embeddings=True).config()
    with pytest.raises(UserError, match=r"model\.architecture=gpt2: bench step compares with a Llama"):
        measure(StepBench(config, num_ranks=1, rounds=1, steps=1, peer_threads=1))
