"""DeepSpeed's engine on real ranks: the numbers and the checkpoints of our own, a bad step; and the JSON it is given."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.cpp_extension import get_default_build_root

from megatronish import checkpointing
from megatronish.assemble import Assembly, assemble, draw_weights, mesh_shape
from megatronish.checkpoint.storage import FileStorage
from megatronish.config import Config
from megatronish.deepspeed_settings import check_engine, engine_settings
from megatronish.errors import UserError
from megatronish.not_finite import require_sound_steps
from megatronish.parallel.mesh import Mesh, build_mesh
from megatronish.preflight import command as preflight_command
from megatronish.startup import dry_batch
from megatronish.verify import command as verify_command
from megatronish.verify.batches import SlicedBatches
from tests.parallel.parity import Case
from tests.ranks import ranks
from tests.small_run import losses, megatronish, saved_tensors, write_run

STEPS = 4
SAVED = 3

# Losses near 4.6 in float32, whose last bit is 4.8e-7 there: four of them.
LOSS_TOLERANCE = 2e-6
# Gradients are summed in another order, and the weights they come from drift apart by the tolerance below: seen, 7e-6.
NORM_TOLERANCE = 5e-5
# Of a tensor's largest element. Adam divides by the root of the second moment: where a gradient is near zero its rounding decides
# part of an update of up to lr = 0.01. Seen: 9e-5 after six steps, in a bias that started at zero. A step left out gives 1e-1.
STATE_TOLERANCE = 4e-4


def with_engine(case: Case, engine: str, **parallel: Any) -> Config:
    """The case's run, on one of the engines."""
    config = case.config()
    if engine == "deepspeed":
        config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"zero_engine": engine, **parallel})})
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": STEPS})})


def count_modules_anew() -> None:
    """Stage 3 numbers modules and parameters over the life of a process, and compares the numbers between ranks: those of the pool
    have had other engines, each its own."""
    parameter_offload = importlib.import_module("deepspeed.runtime.zero.parameter_offload")
    parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    importlib.import_module("deepspeed.runtime.zero.partition_parameters").Init.param_id = 0


def compiled_async_io() -> None:
    """Skip where DeepSpeed would have to compile its asynchronous I/O: 10 minutes of one core. What another environment has
    compiled, torch compiles again."""
    pytest.importorskip("deepspeed")
    built = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    for recipe in Path(built).glob("*/async_io/build.ninja"):
        module = recipe.with_name("async_io.so")
        if f"{sys.prefix}/" in recipe.read_text() and module.exists() and module.stat().st_mtime >= recipe.stat().st_mtime:
            return
    pytest.skip(f"DeepSpeed's async_io is not compiled for {sys.prefix} in {built}; launch/README.md has the command")


def swap_small_tensors() -> None:
    """What is under 1 MiB stays in memory, whatever aio.block_size is: all of a small model."""
    importlib.import_module("deepspeed.runtime.swap_tensor.optimizer_utils").MIN_AIO_BYTES = 4096


def nvme(folder: Path) -> dict[str, Any]:
    """Sections of `parallel` that swap even a small model, in several groups."""
    path = folder / "ds.json"
    path.write_text(json.dumps({"aio": {"block_size": 4096}, "zero_optimization": {"sub_group_size": 5000}}))
    return {"zero_stage": 3, "offload": "nvme", "offload_path": str(folder / "disk"), "deepspeed_config": str(path)}


def build(config: Config, mesh: Mesh, checkpoints: Path | None = None) -> Assembly:
    """A run with weights drawn, or loaded."""
    if config.parallel.zero_stage == 3:
        count_modules_anew()
    if config.parallel.offload == "nvme":
        swap_small_tensors()
    run = assemble(config, mesh, SlicedBatches(config, mesh))
    if checkpoints is not None:
        assert checkpointing.load_newest(run, checkpoints, log=print) is not None
    else:
        draw_weights(config, run.cut)
        run.optimizer.reset_master()
    return run


def save(run: Assembly, checkpoints: Path, step: int) -> None:
    log = logging.getLogger("quiet")
    log.setLevel(logging.ERROR)
    checkpointing.Saver(run, checkpoints, data_fingerprint=0, token="t", storage=FileStorage(), log=log).save(step)


@dataclass
class Seen:
    """On one rank, by the name of the run."""

    scalars: dict[str, list[tuple[float, float]]]
    """(loss, gradient norm) of each step."""
    swapped: int = 0
    """Bytes on disk after the first run."""
    state_bytes: int = 0


def train_both(rank: int, case: Case, parallel: dict[str, Any], folder: Path) -> Seen:
    """All steps on either engine, saved after SAVED of them and at the end; then the last step once more by either engine, from
    what the other has saved."""
    torch.set_num_threads(1)
    configs = {engine: with_engine(case, engine, **parallel) for engine in ("native", "deepspeed")}
    mesh = build_mesh(mesh_shape(configs["native"], case.world_size), rank, device=torch.device("cpu"))
    seen = Seen({})

    def go_on(run: Assembly, name: str, first: int) -> None:
        for result in run.trainer.fit(first, STEPS):
            seen.scalars.setdefault(name, []).append((result.loss.item(), result.grad_norm.item()))
            if result.step == SAVED:
                save(run, folder / name, SAVED)
        save(run, folder / f"{name} at the end", STEPS)

    for engine, config in configs.items():
        run = build(config, mesh)
        dry_batch(run, 1)  # its gradients must be gone
        go_on(run, engine, 1)
        if config.parallel.offload == "nvme":
            seen.swapped = sum(path.stat().st_size for path in run.optimizer._swap_folder.path.rglob("*.swp"))
            seen.state_bytes = run.optimizer.state_bytes()
    for engine, other in (("native", "deepspeed"), ("deepspeed", "native")):
        go_on(build(configs[engine], mesh, folder / other), f"{engine} after {other}", SAVED + 1)
    return seen


def saved(folder: Path) -> dict[str, Tensor]:
    """The tensors of the only checkpoint in `folder`, saved after the last step."""
    (folder / "checkpoints").symlink_to(folder, target_is_directory=True)
    return saved_tensors(folder, STEPS)


@pytest.mark.parametrize(
    ("case", "parallel"),
    [
        (Case(dp=2), {"zero_stage": 1}),
        (Case(dp=2, recompute="selective"), {"zero_stage": 2, "offload": "cpu"}),
        (Case(dp=2, architecture="gpt2", tie_embeddings=True, dropout=0.1), {"zero_stage": 3}),
        (Case(tp=2), {"zero_stage": 1, "offload": "cpu"}),
        (Case(tp=2, dp=2), {"zero_stage": 2}),
        (Case(tp=2, dp=2), {"zero_stage": 3, "offload": "cpu"}),
        (Case(dp=2), {"offload": "nvme"}),
        (Case(tp=2, dp=2), {"offload": "nvme"}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value.layout,
)
def test_deepspeed_engine_equals_ours_and_each_goes_on_from_the_other(case: Case, parallel: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    case = replace(case, dtype="float32", num_microbatches=2)
    if parallel.get("offload") == "nvme":
        compiled_async_io()
        parallel = nvme(tmp_path)
    for seen in ranks(case.world_size).run(train_both, case, parallel, tmp_path):
        native = seen.scalars["native"]
        if parallel.get("offload") == "nvme":
            # Master weights and two moments, but for the groups that are under 4 KiB.
            assert seen.swapped > 0.8 * seen.state_bytes
        for name, scalars in seen.scalars.items():
            for (loss, norm), (wanted_loss, wanted_norm) in zip(scalars, native[-len(scalars) :], strict=True):
                assert abs(loss - wanted_loss) < LOSS_TOLERANCE, name
                assert abs(norm - wanted_norm) < NORM_TOLERANCE * wanted_norm, name
    wanted = saved(tmp_path / "native at the end")
    for name in ("deepspeed", "native after deepspeed", "deepspeed after native"):
        got = saved(tmp_path / f"{name} at the end")
        assert got.keys() == wanted.keys()
        for tensor, values in wanted.items():
            assert (got[tensor] - values).abs().max() < STATE_TOLERANCE * values.abs().max(), f"{name}: {tensor}"


DOWN = "layers.1.mlp.down.weight"


def train_with_a_bad_step(rank: int, case: Case, parallel: dict[str, Any]) -> tuple[list[float], list[str], list[Tensor]]:
    """STEPS steps, in the second of which rank 1 gets a gradient that is not finite: losses, reports, master weights after it less
    those before it."""
    torch.set_num_threads(1)
    config = with_engine(case, "deepspeed", **parallel)
    config = config.model_copy(update={"train": config.train.model_copy(update={"on_not_finite": "skip"})})
    mesh = build_mesh(mesh_shape(config, case.world_size), rank, device=torch.device("cpu"))
    step = 0
    count_modules_anew()
    run = assemble(config, mesh, SlicedBatches(config, mesh))
    weight, multiply = run.cut.parameters.by_name[DOWN], run.cut.gradients.linear

    def linear(given: nn.Parameter, dy: Tensor, x: Tensor) -> Tensor | None:
        gradient = multiply(given, dy, x)
        return gradient * math.nan if given is weight and step == 2 and rank == 1 else gradient

    run.cut.gradients.linear = linear  # type: ignore[method-assign]
    draw_weights(config, run.cut)
    run.optimizer.reset_master()
    seen: list[float] = []
    log: list[str] = []
    moved: list[Tensor] = []
    for step in range(1, STEPS + 1):
        before = [values for *_, values in run.optimizer.owned_pieces()] if step == 2 else []
        seen.append(run.trainer.train_step(step).loss.item())
        if step == 2:
            moved = [values - old for (*_, values), old in zip(run.optimizer.owned_pieces(), before, strict=True)]
    require_sound_steps(run, log=log.append)
    return seen, log, moved


@pytest.mark.parametrize("parallel", [{"zero_stage": 1, "offload": "cpu"}, {"zero_stage": 3}], ids=str)
def test_a_step_that_is_not_finite_never_reaches_the_weights(parallel: dict[str, Any]) -> None:
    pytest.importorskip("deepspeed")
    case = Case(dp=2, dtype="float32", num_microbatches=2)
    for seen, log, moved in ranks(2).run(train_with_a_bad_step, case, parallel):
        assert all(map(math.isfinite, seen)), "the losses go on"
        assert log == [f"step 2: the gradient of {DOWN} on rank 1 [pp0 dp1 tp0] is not finite; not applied"]
        assert moved and all(not difference.any() for difference in moved), "weights and moments are those before it"


def small(**parallel: Any) -> Config:
    return with_engine(Case(dp=2, dtype="float32"), "deepspeed", **parallel)


def test_the_settings_follow_from_the_config() -> None:
    settings = engine_settings(small(zero_stage=2, offload="cpu"), 2)
    assert settings["train_batch_size"] == 12 and settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == 0.1
    assert settings["optimizer"]["params"]["betas"] == [0.9, 0.95]
    assert settings["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}}


def test_a_given_file_adds_to_the_settings_and_every_conflict_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    config = small(zero_stage=2, deepspeed_config=str(path))
    given: dict[str, Any] = {
        "train_batch_size": "auto",
        "gradient_clipping": 0.1,
        "zero_optimization": {"stage": 2, "overlap_comm": True, "offload_optimizer": {"pin_memory": True}},
        "wall_clock_breakdown": True,
    }
    path.write_text(json.dumps(given))
    settings = engine_settings(config, 2)
    assert settings["wall_clock_breakdown"] is True and settings["train_batch_size"] == 12
    zero = {"stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "none", "pin_memory": True}}
    assert settings["zero_optimization"] == zero

    given |= {
        "train_batch_size": 64,
        "fp16": {"enabled": True},
        "scheduler": {"type": "WarmupLR"},
        "gradient_cliping": 1.0,
        "optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.999]}},
    }
    given["zero_optimization"] = {"stage": 3, "zero_quantized_gradients": True}
    path.write_text(json.dumps(given))
    with pytest.raises(UserError) as caught:
        engine_settings(config, 2)
    at = f"parallel.deepspeed_config={path}: "
    assert [line.removeprefix(at) for line in str(caught.value).splitlines()] == [
        "train_batch_size=64 contradicts train.global_batch_size, which makes it 12; remove it from the file, or change "
        "train.global_batch_size",
        "zero_optimization.stage=3 contradicts parallel.zero_stage, which makes it 2; remove it from the file, or change "
        "parallel.zero_stage",
        "zero_optimization.zero_quantized_gradients is not taken over: it may change what is computed, or is unknown; remove it "
        "from the file",
        "fp16.enabled=true contradicts train.dtype, which makes it false; remove it from the file, or change train.dtype",
        "scheduler is not taken over: the learning rate follows optim.schedule; remove it from the file",
        "gradient_cliping is not taken over: did you mean gradient_clipping?; remove it from the file",
        'optimizer.type="Adam", but the engine runs with "AdamW"; remove it from the file',
        "optimizer.params.betas=[0.9, 0.999] contradicts optim.beta1 and optim.beta2, which makes it [0.9, 0.95]; remove it from "
        "the file, or change optim.beta1 and optim.beta2",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no JSON"),
        ("[1]", "must hold an object"),
        ('{"a": 1, "a": 2}', "the key a is there twice"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_ds_config_is_one_line(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        check_engine(small(deepspeed_config=str(path)), None)
    assert len(str(caught.value).splitlines()) == 1 and str(path) in str(caught.value)


def test_train_runs_the_engine_and_says_what_it_got(tmp_path: Path) -> None:
    """With an evaluation; the other commands refuse it by name."""
    pytest.importorskip("deepspeed")
    path = write_run(tmp_path, train={"steps": 4, "eval_interval": 4, "eval_steps": 1}, checkpoint={"interval": 4})
    engine = ["parallel.zero_engine=deepspeed", "parallel.zero_stage=3"]
    trained = megatronish("train", str(path), *engine, "--nproc", "2")
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "runs" / "tiny"
    assert json.loads((run / "ds_config.json").read_text())["zero_optimization"]["stage"] == 3
    assert len(losses(run)) == 4 and '"eval_loss"' in (run / "metrics.jsonl").read_text()
    assert list(saved_tensors(run, 4)), "a checkpoint of ours"
    with pytest.raises(UserError, match="verify knows our own engine only"):
        verify_command.main(str(path), engine, 2, 8, None)
    with pytest.raises(UserError, match="preflight knows our own engine only"):
        preflight_command.main(str(path), engine, preflight_command.Options(world=2))
