"""Ranks differ through their coordinates alone: where the program reads them, and what a rehearsal makes of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatronish.parallel.mesh import MeshShape
from megatronish.preflight.classes import Plan, corners, ranks_of_stage
from megatronish.preflight.coordinates import Coordinate, Questions
from megatronish.preflight.rehearse_job import RehearsedJob, rehearse_job
from megatronish.trainer import Trainer
from tests.parallel.parity import Case

PACKAGE = Path(__file__).resolve().parents[2] / "megatronish"
READ = re.compile(
    r"mesh\.rank$|mesh\.index\(|(group|groups\[[^]]*\]|\bdp|\btp|world)\.(index|ranks)$|get_rank|\.is_(first|last)_stage$|shape\.coordinates\(|mesh\.describe\("
)
PLACES = {
    # One rank writes files and speaks.
    "after_step.py": ("__post_init__", "report", "write_memory_snapshot"),
    "checkpoint/background.py": ("_commit", "poll"),
    "checkpoint/save.py": (
        "_named_tensors",
        "_raise_failures",
        "_require_replaceable",
        "accept",
        "save_checkpoint",
        "write_own_part",
    ),
    "checkpointing.py": ("__init__", "pieces"),
    "resume.py": ("resume_or_draw",),
    "startup.py": ("_require_equal_rows",),
    "train.py": ("log_facts", "peak_tflops", "run_training", "train_in_folder"),
    # File i is verified by rank i mod world.
    "checkpoint/verify.py": ("examine",),
    # A stage's layers and schedule.
    "assemble.py": (
        "apply_recompute",
        "assemble",
        "build_pipeline",
        "cut_model",
        "evaluation_steps",
        "forward_steps",
        "training_steps",
    ),
    # Whose share counts.
    "not_finite.py": ("_origin",),
    "optim/grad_norm.py": ("owned_square_sum",),
    "trainer.py": ("evaluate_batch", "join_scalars"),
    "training_samples.py": ("__call__", "__init__"),
    # Which slice of a bucket, a weight or the vocabulary.
    "deepspeed_engine.py": ("_given_gradients", "_set", "owned_pieces"),
    "optim/grad_buffer.py": ("owned",),
    "optim/sharded_grads.py": ("_start_oldest",),
    "optim/zero.py": ("_updated_range", "owned_pieces"),
    "parallel/loss.py": ("of",),
    # Rank 0 says which kernels run.
    "kernel_choices.py": ("_agree", "decided"),
    "parallel/mesh.py": ("index",),
    "parallel/tensor.py": ("_cut_module", "_shard", "extra_repr", "forward"),
}
"""Every function of a training run that reads a coordinate. A new one belongs here only if all ranks still make the same calls."""
ELSEWHERE = ("bench/", "verify/", "preflight/", "comm/", "generate/", "evaluate.py")
"""Not part of a training run, or the lowest package, where a place in a group is a peer."""


def reads(path: Path) -> Iterator[tuple[str, int, str]]:
    """(function, line, expression) of every read of a coordinate."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Call) and READ.search(text := ast.unparse(node)):
            line = node.lineno
            inside = [f for f in functions if f.lineno <= line <= (f.end_lineno or line)]
            yield max(inside, key=lambda f: f.lineno).name if inside else "", line, text


def test_coordinates_are_read_in_few_named_places() -> None:
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(ELSEWHERE):
            for function, _, _ in reads(path):
                found.setdefault(name, set()).add(function)
    assert found == {name: set(functions) for name, functions in PLACES.items()}


def coordinate(value: int, questions: Questions) -> Coordinate:
    return Coordinate(value, lambda at: at["dp"], "dp", questions)


def test_a_question_that_cannot_be_asked_of_another_rank_sets_it_apart() -> None:
    questions = Questions()
    assert 10 // coordinate(1, questions) > 3
    assert [dp for dp in range(8) if questions.same_answers({"dp": dp})] == [1, 2]


@pytest.mark.parametrize(
    ("ask", "alike"),
    [
        (lambda dp: dp == 5, [0, 1, 2, 3, 4, 6, 7]),
        (lambda dp: dp > 3, [0, 1, 2, 3]),
        (lambda dp: dp <= 3, [0, 1, 2, 3]),
        (lambda dp: dp % 2 == 0, [0, 2, 4, 6]),
        (lambda dp: (dp + 1) // 4 < 1, [0, 1, 2]),
        (lambda dp: dp in (2, 4), [0, 1, 3, 5, 6, 7]),
        (lambda dp: min(dp, 3), [0, 1, 2, 3]),  # is 3 less?
        (lambda dp: bool(dp - 2), [0, 1, 3, 4, 5, 6, 7]),
        (lambda dp: dp < 7 / 2, [0, 1, 2, 3]),
        (lambda dp: dp == 5.0, [0, 1, 2, 3, 4, 6, 7]),
        # What cannot be followed sets the rank apart.
        (lambda dp: {0: "a"}.get(dp), [0]),
        (lambda dp: {5: "a"}.get(dp), [0]),
        (lambda dp: dp in {2, 5}, [0]),
        (lambda dp: dp & 1, [0]),
        (lambda dp: dp >> 1 == 2, [0]),
        (lambda dp: -dp == -5, [0]),
        (lambda dp: abs(dp - 3) < 2, [0]),
        (lambda dp: dp / 2 < 1, [0]),
        (lambda dp: float(dp), [0]),
        (lambda dp: list(range(8))[dp], range(8)),  # data: followed no further
    ],
)
def test_ranks_are_alike_that_answer_every_question_alike(ask: Any, alike: Any) -> None:
    questions = Questions()
    ask(coordinate(0, questions))
    assert [dp for dp in range(8) if questions.same_answers({"dp": dp})] == list(alike)


def rehearsed(case: Case, *, every_rank: bool) -> RehearsedJob:
    return rehearse_job(Plan(case.config(), case.world_size, "cuda", "two of each phase", every_rank), processes=0)


@pytest.mark.parametrize(
    "case",
    [
        Case(tp=2, pp=3, dp=6, sequence=True, dtype="float32", architecture="gpt2", tie_embeddings=True, stage_layers=(1, 2, 1)),
        Case(tp=4, pp=2, dp=5, dtype="float32"),  # 105 rows over 4: shards of two lengths
    ],
    ids=str,
)
def test_inferred_ranks_do_what_they_do_when_they_run(case: Case) -> None:
    usual, full = rehearsed(case, every_rank=False), rehearsed(case, every_rank=True)
    assert len(usual.ran) < case.world_size == len(full.ran)
    assert len(usual.ran) + usual.num_inferred == case.world_size
    for rank in range(case.world_size):
        assert usual.job.groups[rank] == full.job.groups[rank], f"rank {rank}"
        assert list(usual.job.log(rank).events()) == list(full.job.log(rank).events()), f"rank {rank}"


def test_corners_that_contradict_each_other_make_every_rank_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinate that became data decides: nobody asked."""
    count = Trainer.count_targets

    def faulty(self: Trainer, batch: Any) -> Any:
        for _ in [0] * (self.mesh.index("dp") * 1 // 3):
            count(self, batch)
        return count(self, batch)

    monkeypatch.setattr(Trainer, "count_targets", faulty)
    usual = rehearsed(Case(tp=2, dp=7, dtype="float32"), every_rank=False)
    assert len(usual.ran) == 14


def test_first_inner_and_last_ranks_run_in_any_case() -> None:
    shape = MeshShape(pp=5, dp=4, tp=8)
    assert [len(corners(shape, stage)) for stage in range(5)] == [9, 3, 3, 3, 9]
    for stage in range(5):
        at = [shape.coordinates(rank) for rank in corners(shape, stage)]
        assert {(each["dp"], each["tp"]) for each in at} >= {(0, 0), (1, 1), (3, 7)}
        assert {each["pp"] for each in at} == {stage}
        assert len(ranks_of_stage(shape, stage)) == 32


def test_a_rank_that_a_question_sets_apart_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an inner rank only: no corner of the mesh."""
    count = Trainer.count_targets

    def faulty(self: Trainer, batch: Any) -> Any:
        if self.mesh.index("dp") == 4:
            count(self, batch)
        return count(self, batch)

    monkeypatch.setattr(Trainer, "count_targets", faulty)
    case = Case(tp=2, dp=7, dtype="float32")
    usual = rehearsed(case, every_rank=False)
    shape = MeshShape(tp=2, dp=7)
    assert len(usual.ran) < 14
    assert {shape.coordinates(rank)["dp"] for rank in usual.ran} >= {0, 1, 4, 6}
    logs = {rank: usual.job.log_of[rank] for rank in range(14)}
    odd = [rank for rank in range(14) if shape.coordinates(rank)["dp"] == 4]
    assert not {logs[rank] for rank in odd} & {log for rank, log in logs.items() if rank not in odd}
