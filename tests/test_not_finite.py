"""A NaN in one rank never reaches a weight on any; the run stops or skips, and says on which rank and in which parameter it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatronish.assemble import Assembly, assemble, draw_weights, mesh_shape
from megatronish.config import Config
from megatronish.errors import RunStopped
from megatronish.not_finite import require_sound_steps
from megatronish.parallel.mesh import build_mesh
from tests.batches import LearnableBatches
from tests.parallel.parity import Case
from tests.ranks import ranks
from tests.small_run import error_lines, forked, losses, megatronish, write_run
from tests.test_resume import train_life

BAD_STEP, NUM_STEPS = 3, 6


@dataclass(frozen=True)
class Plant:
    """Where a NaN comes from."""

    rank: int
    parameter: str | None = None
    """Its weight product gets one; None: the loss of a microbatch is one."""
    microbatch: int = 0
    steps: tuple[int, ...] = (BAD_STEP,)


def config_of(case: Case, **train: Any) -> Config:
    config = case.config()
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": NUM_STEPS, **train})})


def build(rank: int, config: Config, world_size: int) -> Assembly:
    mesh = build_mesh(mesh_shape(config, world_size), rank, device=torch.device("cpu"))
    run = assemble(config, mesh, LearnableBatches(config, mesh.index("dp"), mesh.size("dp")))
    draw_weights(config, run.cut)
    run.optimizer.reset_master()
    return run


def sow(run: Assembly, plant: Plant, now: Callable[[], int]) -> None:
    """Patch this rank's run."""
    calls = {"weights": 0, "losses": 0}
    if plant.parameter is not None:
        weight, multiply = run.cut.parameters.by_name[plant.parameter], run.cut.gradients.linear

        def linear(given: nn.Parameter, dy: Tensor, x: Tensor) -> None:
            if given is weight:
                hit = (
                    now() in plant.steps
                    and calls["weights"] % run.config.num_microbatches(run.mesh.shape.num_ranks) == plant.microbatch
                )
                calls["weights"] += 1
                if hit:
                    dy = dy.clone()
                    dy.view(-1)[-1] = math.nan
            multiply(given, dy, x)

        run.cut.gradients.linear = linear  # type: ignore[method-assign]
        return
    stage = run.trainer.pipeline.stage
    loss_function = stage.loss_function

    def loss(*given: Any, **options: Any) -> Tensor:
        hit = now() in plant.steps and calls["losses"] % run.config.num_microbatches(run.mesh.shape.num_ranks) == plant.microbatch
        calls["losses"] += 1
        return loss_function(*given, **options) * (math.nan if hit else 1.0)

    stage.loss_function = loss


@dataclass
class Seen:
    """On one rank."""

    weights: dict[int, list[Tensor]]
    """By step: states and parameters after it."""
    log: list[str]
    stopped: str | None
    states: dict[int, Any]


def train(rank: int, case: Case, plant: Plant | None, settings: dict[str, Any], left_out: tuple[int, ...] = ()) -> Seen:
    """NUM_STEPS steps, with a report at the end alone."""
    config = config_of(case, **settings)
    run, step = build(rank, config, case.world_size), 0
    if plant is not None and rank == plant.rank:
        sow(run, plant, lambda: step)
    seen = Seen({}, [], None, {})
    for step in range(1, NUM_STEPS + 1):
        if step not in left_out:
            run.trainer.train_step(step)
        run.optimizer.ensure_parameters()
        tensors = [t for state in run.optimizer.states for t in state.values()] + run.cut.parameters.flat
        seen.weights[step] = [t.detach().clone() for t in tensors]
        seen.states[step] = run.trainer.guard.read()
    try:
        require_sound_steps(run, log=seen.log.append)
    except RunStopped as error:
        seen.stopped = str(error)
    return seen


DOWN, QKV = "layers.3.mlp.down.weight", "layers.1.attention.qkv.weight"
CASES = [
    (Case(dp=2), Plant(1, DOWN, 2), f"the gradient of {DOWN} on rank 1 [pp0 dp1 tp0]"),
    (Case(dp=2, zero_stage=2), Plant(1, QKV, 1), f"the gradient of {QKV} on rank 1 [pp0 dp1 tp0]"),
    (Case(dp=3, zero_stage=0), Plant(2, DOWN), f"the gradient of {DOWN} on rank 2 [pp0 dp2 tp0]"),
    (Case(tp=2, sequence=True), Plant(1, QKV), f"the gradient of {QKV} on rank 1 [pp0 dp0 tp1]"),
    (Case(pp=2), Plant(1, DOWN, 1), f"the gradient of {DOWN} on rank 1 [pp1 dp0 tp0]"),
    (Case(pp=2), Plant(0, QKV, 2), f"the gradient of {QKV} on rank 0 [pp0 dp0 tp0]"),
    (Case(pp=2), Plant(1, None, 2), "the loss of microbatch 2 on rank 1 [pp1 dp0 tp0]"),
    (Case(pp=2, dp=2), Plant(3, None, 1), "the loss of microbatch 1 on rank 3 [pp1 dp1 tp0]"),
    (Case(dp=2, dtype="float16"), Plant(0, DOWN, 1), f"the gradient of {DOWN} on rank 0 [pp0 dp0 tp0]"),
]


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(("case", "plant", "named"), CASES, ids=lambda x: None if isinstance(x, str) else str(x))
def test_skipping_leaves_no_trace_and_names_the_origin(case: Case, plant: Plant, named: str) -> None:
    case = Case(**{**vars(case), "dtype": case.dtype if case.dtype == "float16" else "float32"})
    settings = {"on_not_finite": "skip"}
    with_plant = ranks(case.world_size).run(train, case, plant, settings)
    without = ranks(case.world_size).run(train, case, None, settings, left_out=(BAD_STEP,))
    for got, expected in zip(with_plant, without, strict=True):
        assert_equal(got.weights[BAD_STEP], got.weights[BAD_STEP - 1])
        if case.dtype != "float16":  # there the scale is another one afterwards
            assert_equal(got.weights[NUM_STEPS], expected.weights[NUM_STEPS])
        assert not torch.equal(got.weights[NUM_STEPS][0], got.weights[BAD_STEP][0])
        assert got.stopped is None
        assert got.log == [f"step {BAD_STEP}: {named} is not finite; not applied" + got.log[0].partition("not applied")[2]]
        assert got.states[NUM_STEPS].updates == NUM_STEPS - 1 and got.states[NUM_STEPS].skipped == 1


@pytest.mark.parametrize(
    ("case", "plant", "named"), [CASES[i] for i in (1, 3, 5, 7)], ids=lambda x: None if isinstance(x, str) else str(x)
)
def test_stopping_keeps_the_weights_of_the_step_before_on_every_rank(case: Case, plant: Plant, named: str) -> None:
    for seen in ranks(case.world_size).run(train, Case(**{**vars(case), "dtype": "bfloat16"}), plant, {"on_not_finite": "stop"}):
        assert_equal(seen.weights[NUM_STEPS], seen.weights[BAD_STEP - 1])
        assert not torch.equal(seen.weights[1][0], seen.weights[BAD_STEP - 1][0])
        assert seen.stopped is not None and len(seen.stopped.splitlines()) == 1 and seen.log == []
        assert seen.stopped.startswith(f"step {BAD_STEP}: {named} is not finite; the run stops")
        assert "train.on_not_finite=skip" in seen.stopped


def test_float16_finds_its_loss_scale_and_goes_on() -> None:
    # 2^21 times the gradient of the loss overflows; each bad step halves it.
    settings = {"loss_scale": 2.0**21}
    for seen in ranks(2).run(train, Case(dp=2, zero_stage=2, dtype="float16", num_microbatches=1), None, settings):
        skipped = seen.states[NUM_STEPS].skipped
        assert 1 <= skipped < NUM_STEPS and seen.stopped is None
        assert seen.states[1].skipped == 1 and seen.states[1].updates == 0
        for step in range(2, NUM_STEPS + 1):
            before, after = seen.states[step - 1], seen.states[step]
            if after.skipped > before.skipped:
                assert after.loss_scale == before.loss_scale / 2 and after.updates == before.updates
                assert_equal(seen.weights[step], seen.weights[step - 1])
            else:
                assert after.loss_scale == before.loss_scale and after.updates == before.updates + 1
                assert not torch.equal(seen.weights[step][0], seen.weights[step - 1][0])
        assert len(seen.log) == skipped and all("the loss scale is now" in line for line in seen.log)


def loss_curve(rank: int, case: Case, num_steps: int) -> list[float]:
    config = config_of(case, steps=num_steps)
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 3e-3, "min_lr": 0.0, "clip_norm": 1.0})})
    run = build(rank, config, case.world_size)
    curve = [float(result.loss) for result in run.trainer.fit(1, num_steps)]
    run.optimizer.ensure_parameters()
    assert run.trainer.guard.read().updates >= num_steps - 4
    return curve


@pytest.mark.parametrize("layout", [{}, {"dp": 2, "zero_stage": 2}, {"tp": 2, "pp": 2, "sequence": True}], ids=str)
def test_float16_learns_as_float32_does(layout: dict[str, Any]) -> None:
    num_microbatches = 4 if layout.get("dp", 1) == 1 else 2
    case = Case(dtype="float16", num_microbatches=num_microbatches, **layout)
    half = ranks(case.world_size).run(loss_curve, case, 40)[0]
    (whole,) = ranks(1).run(loss_curve, Case(dtype="float32", num_microbatches=4), 40)
    assert whole[-1] < whole[0] - 0.3
    # Activations have 11 bits (5e-4 a rounding, a few a layer); master weights and sums are float32. Forty steps feed the
    # difference back, and a skipped first step or two shift the curve by as many.
    assert half == pytest.approx(whole, rel=1e-2)
    assert half != whole


@pytest.mark.parametrize("overrides", [(), ("parallel.zero_stage=2", "optim.grad_reduce_dtype=bfloat16")], ids=["zero1", "zero2"])
def test_a_float16_run_resumes_bitwise(overrides: tuple[str, ...], tmp_path: Path) -> None:
    from tests.small_run import assert_same_bits, saved_tensors

    # A scale that is too large at first and then grows again every fourth step: its counters matter at step 10.
    scaling = {"dtype": "float16", "loss_scale": 2.0**24, "loss_scale_interval": 4, "micro_batch_size": 2}
    config = write_run(tmp_path, train=scaling, optim={"schedule": "constant"}, checkpoint={"interval": 10})
    train_life(config, "name=straight", *overrides, world_size=2)
    train_life(config, "name=parts", "train.steps=10", *overrides, world_size=2)
    train_life(config, "name=parts", *overrides, world_size=2)
    straight, parts = tmp_path / "runs/straight", tmp_path / "runs/parts"
    assert losses(parts) == losses(straight) and len(losses(parts)) == 20
    assert_same_bits(saved_tensors(parts, 20), saved_tensors(straight, 20))
    rows = [(row["step"], row["loss_scale"], row["skipped_steps"]) for row in metric_rows(straight)]
    assert rows == [(row["step"], row["loss_scale"], row["skipped_steps"]) for row in metric_rows(parts)]
    assert rows[-1][2] >= 1 and len({scale for _, scale, _ in rows}) >= 3


def metric_rows(run: Path) -> list[dict[str, Any]]:
    import json

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


PLANTED = (
    "import os\n"
    "if os.environ.get('RANK') == '1':\n"
    "    from megatronish.trainer import Trainer\n"
    "    from megatronish.optim.weight_gradients import WeightGradientQueue\n"
    "    whole, product, now = Trainer.train_step, WeightGradientQueue.linear, [0]\n"
    "    def train_step(self, step):\n"
    "        now[0] = step\n"
    "        return whole(self, step)\n"
    "    def linear(self, weight, dy, x):\n"
    "        return product(self, weight, dy * float('nan') if now[0] == 7 and weight.shape == (32, 48) else dy, x)\n"
    "    Trainer.train_step, WeightGradientQueue.linear = train_step, linear\n"
)


def test_a_run_ends_with_one_line_and_exit_code_77_and_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    config = write_run(tmp_path, observe={"log_interval": 10})
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(PLANTED)
    environment = {"PYTHONPATH": f"{tmp_path / 'site'}:{Path(__file__).parent.parent}"}
    stopped = megatronish("train", str(config), "--nproc", "2", **environment)
    assert stopped.returncode == 77, stopped.stderr
    (line,) = error_lines(stopped.stderr)
    # The last layer's is the first that backward reaches.
    assert line.startswith("error: step 7: the gradient of layers.3.mlp.down.weight on rank 1 [pp0 dp1 tp0] is not finite")
    assert "Traceback" not in stopped.stderr and "lost a peer" not in stopped.stderr
    run = tmp_path / "runs/tiny"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000005"]
    # The same without the fault: as if nothing had happened.
    resumed = forked("train", str(config), nproc=2)
    assert resumed.returncode == 0 and "resumed after step 5" in resumed.stderr, resumed.stderr
    straight = forked("train", str(config), "name=straight", nproc=2)
    assert straight.returncode == 0
    assert losses(run)[20] == losses(tmp_path / "runs/straight")[20]


def test_a_run_that_skips_says_so_once_and_counts(tmp_path: Path) -> None:
    config = write_run(tmp_path, train={"on_not_finite": "skip"}, observe={"log_interval": 10})
    result = forked("train", str(config), nproc=2, plant=PLANTED)
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "not applied" in line]
    assert "WARNING" in line and "step 7: the gradient of layers.3.mlp.down.weight on rank 1" in line
    rows = metric_rows(tmp_path / "runs/tiny")
    assert [row["skipped_steps"] for row in rows if row["step"] in (5, 10, 20)] == [0, 1, 1]
    assert all(math.isfinite(row["loss"]) for row in rows)
