"""`megatronish verify` finds planted gradient faults, names parameter and axis, and is silent on sound code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from megatronish.comm.local_ranks import RankPool
from megatronish.config_loader import load_config
from megatronish.errors import UserError
from megatronish.verify import command
from megatronish.verify.check import Verdict, verify
from megatronish.verify.command import PRELOAD, conclusion, main
from megatronish.verify.fold import fold
from tests.verify.faults import FAULTS, run_with_fault

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
DEMO = CONFIGS[0].parent / "demo_cpu.yaml"
PLAIN = ("parallel.tensor=1", "parallel.pipeline=1", "parallel.data=1", "parallel.sequence=false")
GPT2 = ("model.architecture=gpt2", "model.max_positions=256", "model.tie_embeddings=true", "model.num_kv_heads=8")


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(preload=PRELOAD) as started:
        yield started


def verdict_of(pool: RankPool, fault: str, *overrides: str) -> Verdict:
    folded = fold(load_config(DEMO, [*PLAIN, *overrides]))
    return verify(folded, pool, run=partial(run_with_fault, fault=fault))


# fault -> (layout, the first wrong thing, the likely axis)
EXPECTED: dict[str, tuple[tuple[str, ...], str, str]] = {
    "norms_are_not_summed_over_tp": (
        ("parallel.tensor=2", "parallel.sequence=true", "parallel.data=2"),
        "norm.weight in step 1",
        "likely axis: parallel.tensor; the fault needs parallel.tensor=2, parallel.sequence=true",
    ),
    "each_replica_divides_by_its_own_targets": (
        ("parallel.tensor=2", "parallel.data=3", "train.global_batch_size=24"),
        "gradient of ",
        "likely axis: parallel.data;",
    ),
    "replicated_parameters_count_once_a_rank": (("parallel.tensor=2", "parallel.data=2"), "norm of step 1", "parallel.tensor;"),
    "gradients_of_the_last_step_stay": (("parallel.data=2",), "gradient of embedding.weight in step 2", "not the layout"),
    "the_input_gradient_is_not_summed_over_tp": (("parallel.tensor=2",), "gradient of ", "likely axis: parallel.tensor;"),
    "rows_of_other_ranks_count_here": (
        ("parallel.tensor=2", "parallel.data=2"),
        "gradient of embedding.weight in step 1",
        "likely axis: parallel.tensor;",
    ),
    "the_last_microbatch_counts_twice": (
        ("parallel.pipeline=2", "parallel.data=2", "train.global_batch_size=24"),
        "gradient of ",
        "likely axis: parallel.pipeline;",
    ),
    "gathered_parameters_are_one_step_old": (
        ("parallel.data=2", "parallel.tensor=2"),
        "gradient of embedding.weight in step 2",
        "likely axis: parallel.data; the fault needs parallel.data=2, parallel.zero_stage=1",
    ),
    "decay_reaches_every_parameter": (("parallel.tensor=2",), "norm.weight after step 1", "not the layout"),
    "dropout_depends_on_the_rank": (
        ("parallel.tensor=2", "parallel.data=2", "model.dropout=0.1"),
        "gradient of ",
        "likely axis: parallel.tensor; the fault needs parallel.tensor=2, model.dropout=0.1",
    ),
    "dropout_is_the_same_in_every_microbatch": (
        ("parallel.data=2", "model.dropout=0.1"),
        "gradient of ",
        "not the layout: one process of the trainer differs from plain PyTorch too, with model.dropout=0.1",
    ),
    "tied_embeddings_are_not_summed": (
        ("parallel.pipeline=2", "parallel.tensor=2", *GPT2),
        "gradient of embedding.weight in step 1",
        "likely axis: parallel.pipeline; the fault needs parallel.pipeline=2, model.tie_embeddings=true",
    ),
    "a_bias_is_added_on_every_tp_rank": (
        ("parallel.pipeline=2", "parallel.tensor=2", *GPT2),
        "bias in step 1",
        "likely axis: parallel.tensor;",
    ),
    "gradients_are_rounded_on_their_way": (
        ("parallel.data=2", "optim.grad_reduce_dtype=float32"),
        "gradient of ",
        "likely axis: parallel.data;",
    ),
    "moments_are_not_loaded": (("parallel.data=2",), "after step 3", "not the layout"),
    "a_tied_embedding_is_reduced_at_its_first_gradient": (
        ("model.tie_embeddings=true", "parallel.data=2", "optim.bucket_mib=1e-5"),
        # In which step depends on how far the lookup's backward has come when the sum reads the bucket: a race, as it would be.
        "gradient of embedding.weight in step",
        "likely axis: parallel.data;",
    ),
    "row_biases_and_positions_see_a_part_of_the_tokens": (
        (*GPT2, "parallel.tensor=2", "parallel.sequence=true"),
        "gradient of positions.weight in step 1",
        "parallel.sequence=true",
    ),
    "the_last_backward_of_one_chunk_is_that_of_all": (
        ("parallel.pipeline=2", "parallel.data=2", "parallel.schedule=interleaved", "parallel.num_chunks=2"),
        "gradient of ",
        "parallel.pipeline=2, parallel.schedule=interleaved, parallel.num_chunks=2",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_with_its_parameter_and_axis(pool: RankPool, fault: str) -> None:
    overrides, first, axis = EXPECTED[fault]
    verdict = verdict_of(pool, fault, *overrides)
    assert not verdict.ok
    assert verdict.first_wrong is not None and first in verdict.first_wrong.what
    assert axis in conclusion(verdict)


def test_the_command_ends_with_1_and_says_what_is_wrong_and_where(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = partial(run_with_fault, fault="the_input_gradient_is_not_summed_over_tp")
    monkeypatch.setattr(command, "verify", partial(verify, run=run))
    assert main(str(DEMO), [*PLAIN, "parallel.tensor=2"], None, 8, str(tmp_path / "result.json")) == 1
    table, _, conclusion = capsys.readouterr().out.partition("first wrong: gradient of ")
    assert "gradients, every parameter and step" in table and "WRONG" in table
    assert "likely axis: parallel.tensor; the fault needs parallel.tensor=2" in conclusion
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["ok"] is False and result["needs"] == {"parallel.tensor": 2}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_sound_code_passes_for_every_shipped_config(path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(str(path), [], None, 8, str(tmp_path / "result.json")) == 0
    assert capsys.readouterr().out.rstrip().endswith("the layout computes what one process computes")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.data=2", "optim.grad_reduce_dtype=bfloat16"),
        ("parallel.data=3", "optim.grad_reduce_dtype=float32", "parallel.zero_stage=2", "train.global_batch_size=24"),
        ("parallel.tensor=2", "parallel.data=2", "train.dtype=float16", "data.separate_documents=true", "model.dropout=0.1"),
        ("parallel.pipeline=2", "parallel.stage_layers=[3,5]", "train.label_smoothing=0.1", "train.z_loss=1e-4"),
        (
            "parallel.pipeline=2",
            "parallel.schedule=interleaved",
            "parallel.num_chunks=2",
            "parallel.recompute=[selective,full]",
            *GPT2,
        ),
        (
            "parallel.tensor=3",
            "parallel.sequence=true",
            "data.sequence_length=768",
            "model.num_heads=12",
            "model.num_kv_heads=12",
            "model.hidden_size=384",
            "model.mlp_size=384",
        ),
    ],
)
def test_sound_code_passes_with_any_option(pool: RankPool, overrides: tuple[str, ...]) -> None:
    verdict = verify(fold(load_config(DEMO, [*PLAIN, *overrides])), pool)
    assert verdict.ok, conclusion(verdict)
    assert all(check.tolerance < 0.1 for check in verdict.checks)


def test_a_file_that_cannot_be_written_is_said_before_the_work() -> None:
    with pytest.raises(UserError, match=r"--json /nonexistent/result\.json: there is no folder /nonexistent"):
        main(str(DEMO), [], None, 8, "/nonexistent/result.json")


def test_a_rank_that_fails_is_reported_with_its_traceback(pool: RankPool) -> None:
    folded = fold(load_config(DEMO, [*PLAIN, "parallel.data=2"]))
    verdict = verify(folded, pool, run=crash)
    assert not verdict.ok and "ZeroDivisionError" in conclusion(verdict)


def crash(rank: int, *args: object) -> None:
    """A rank that ends badly."""
    raise ZeroDivisionError
