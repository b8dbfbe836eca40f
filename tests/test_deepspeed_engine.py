"""DeepSpeed's engine on real ranks: the numbers and the checkpoints of our own, a bad step; and the JSON it is given."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
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


@dataclass(frozen=True)
class Tolerance:
    """Of losses: absolute. Of norms: relative. Of a state: of its largest element, or L2 of its L2 norm."""

    loss: float
    norm: float
    largest: float = math.inf
    square: float = math.inf


# Losses near 4.6 in float32, whose last bit is 4.8e-7 there: four of them.
# Gradients are summed in another order, and the weights they come from drift apart by the states' tolerance: seen, 7e-6.
# Adam divides by the root of the second moment: where a gradient is near zero its rounding decides part of an update of up to
# lr = 0.01. Seen: 9e-5 after six steps, in a bias that started at zero. A step left out gives 1e-1.
FLOAT32 = Tolerance(loss=2e-6, norm=5e-5, largest=4e-4)
# One step from the same checkpoint in bfloat16. Forward is the same. A gradient reaches the engine rounded to bfloat16, once a
# microbatch: each element, so their norm too, by at most u = 2^-9 = 2e-3, its square by 2 u; a tied weight's twice. Both add them
# up in float32. Seen: norms 9e-5, moments 4e-3. With a clip left out a moment is off by 1e2 of itself, with a wrong number of ranks
# or microbatches to average over the norm by 0.5: `test_what_is_wrong_in_bfloat16_...`.
BFLOAT16_STEP = Tolerance(loss=2e-4, norm=2e-3, square=1e-2)
# Several steps: masters differ by some of u x lr, and a weight that is then rounded the other way by u of itself. Seen: 3e-4 of a
# loss. Float32 from the same start is 1.6e-3 away, a run that loses a microbatch 9e-3. States are no measure here: where a
# gradient is zero but for rounding (the bias of keys) Adam makes steps of lr of it.
BFLOAT16_RUN = Tolerance(loss=1e-3, norm=1e-2)


def with_engine(case: Case, engine: str, *, reduce_dtype: str | None = None, **parallel: Any) -> Config:
    """The case's run, on one of the engines."""
    config = case.config()
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"grad_reduce_dtype": reduce_dtype})})
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


def beyond(tolerance: Tolerance, pairs: Iterable[tuple[tuple[float, float], tuple[float, float]]]) -> str | None:
    """The first (loss, norm) that differs from what is wanted by more."""
    for (loss, norm), (wanted_loss, wanted_norm) in pairs:
        if not (abs(loss - wanted_loss) < tolerance.loss and abs(norm - wanted_norm) < tolerance.norm * wanted_norm):
            return f"{loss, norm} for {wanted_loss, wanted_norm}"
    return None


def states_beyond(tolerance: Tolerance, got: dict[str, Tensor], wanted: dict[str, Tensor]) -> str | None:
    """The first tensor that differs by more."""
    assert got.keys() == wanted.keys()
    for name, values in wanted.items():
        difference = got[name] - values
        if difference.abs().max() > tolerance.largest * values.abs().max() or difference.norm() > tolerance.square * values.norm():
            return f"{name} by {difference.norm() / values.norm():.1e}"
    return None


FULL = partial(Case, dtype="float32")
HALF = partial(Case, dtype="bfloat16")
GPT2 = {"architecture": "gpt2", "tie_embeddings": True, "dropout": 0.1}


@pytest.mark.parametrize(
    ("case", "parallel"),
    [
        (FULL(dp=2), {"zero_stage": 1}),
        (FULL(dp=2, recompute="selective"), {"zero_stage": 2, "offload": "cpu"}),
        (FULL(dp=2, **GPT2), {"zero_stage": 3}),
        (FULL(tp=2), {"zero_stage": 1, "offload": "cpu"}),
        (FULL(tp=2, dp=2), {"zero_stage": 2}),
        (FULL(tp=2, dp=2), {"zero_stage": 3, "offload": "cpu"}),
        (FULL(dp=2), {"offload": "nvme"}),
        (FULL(tp=2, dp=2), {"offload": "nvme"}),
        (HALF(dp=2, recompute="selective"), {"zero_stage": 1, "reduce_dtype": "bfloat16"}),
        (HALF(tp=2), {"zero_stage": 1}),
        (HALF(tp=2), {"zero_stage": 1, "offload": "cpu"}),
        (HALF(dp=2, **GPT2), {"zero_stage": 2}),
        (HALF(dp=2, zero_stage=2), {"zero_stage": 2, "offload": "cpu", "reduce_dtype": "bfloat16"}),
        (HALF(tp=2, dp=2), {"zero_stage": 3, "offload": "cpu"}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else f"{value.dtype}-{value.layout}",
)
def test_deepspeed_engine_equals_ours_and_each_goes_on_from_the_other(case: Case, parallel: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    case = replace(case, num_microbatches=2)
    if parallel.get("offload") == "nvme":
        compiled_async_io()
        parallel = nvme(tmp_path)
    run, step = (FLOAT32, FLOAT32) if case.dtype == "float32" else (BFLOAT16_RUN, BFLOAT16_STEP)
    compared = [
        ("deepspeed", "native", run),
        ("deepspeed after native", "native", step),
        ("native after deepspeed", "deepspeed", step),
    ]
    for seen in ranks(case.world_size).run(train_both, case, parallel, tmp_path):
        if parallel.get("offload") == "nvme":
            # Master weights and two moments, but for the groups that are under 4 KiB.
            assert seen.swapped > 0.8 * seen.state_bytes
        for name, wanted, tolerance in compared:
            pairs = zip(reversed(seen.scalars[name]), reversed(seen.scalars[wanted]), strict=False)
            assert (found := beyond(tolerance, pairs)) is None, f"{name}, {wanted}: {found}"
    states = {name: saved(tmp_path / f"{name} at the end") for name in seen.scalars}
    for name, wanted, tolerance in compared:
        assert (found := states_beyond(tolerance, states[name], states[wanted])) is None, f"{name}, {wanted}: {found}"


def step_with_a_fault(rank: int, case: Case, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """(loss, norm) by native; and, from its checkpoint, the last step by an engine that does not clip, and one with half of each
    gradient."""
    torch.set_num_threads(1)
    native, engine = with_engine(case, "native"), with_engine(case, "deepspeed")
    mesh = build_mesh(mesh_shape(native, case.world_size), rank, device=torch.device("cpu"))
    seen: dict[str, list[tuple[float, float]]] = {}
    for fault in ("none", "unclipped", "half"):
        config = native if fault == "none" else engine
        if fault == "unclipped":
            config = config.model_copy(update={"optim": config.optim.model_copy(update={"clip_norm": 0.0})})
        run = build(config, mesh, None if fault == "none" else folder / "none")
        if fault == "half":
            run.optimizer.backward = lambda loss, backward=run.optimizer.backward: backward(loss / 2)
        for result in run.trainer.fit(1 if fault == "none" else STEPS, STEPS):
            seen.setdefault(fault, []).append((result.loss.item(), result.grad_norm.item()))
            if result.step == SAVED:
                save(run, folder / fault, SAVED)
        save(run, folder / f"{fault} at the end", STEPS)
    return seen


def test_what_is_wrong_in_bfloat16_is_beyond_ten_times_the_tolerance(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    far = Tolerance(*(10 * number for number in vars(BFLOAT16_STEP).values()))
    (seen, _) = ranks(2).run(step_with_a_fault, HALF(dp=2, num_microbatches=2), tmp_path)
    unclipped, wanted = (saved(tmp_path / f"{name} at the end") for name in ("unclipped", "none"))
    assert states_beyond(far, unclipped, wanted) is not None
    assert beyond(far, [(seen["half"][-1], seen["none"][-1])]) is not None


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


@pytest.mark.parametrize(
    ("dtype", "parallel"),
    [
        ("float32", {"zero_stage": 1, "offload": "cpu"}),
        ("float32", {"zero_stage": 3}),
        ("bfloat16", {"zero_stage": 1}),
        ("bfloat16", {"zero_stage": 2, "offload": "cpu"}),
    ],
    ids=str,
)
def test_a_step_that_is_not_finite_never_reaches_the_weights(dtype: str, parallel: dict[str, Any]) -> None:
    pytest.importorskip("deepspeed")
    case = Case(dp=2, dtype=dtype, num_microbatches=2)
    for seen, log, moved in ranks(2).run(train_with_a_bad_step, case, parallel):
        assert all(map(math.isfinite, seen)), "the losses go on"
        assert log == [f"step 2: the gradient of {DOWN} on rank 1 [pp0 dp1 tp0] is not finite; not applied"]
        assert moved and all(not difference.any() for difference in moved), "weights and moments are those before it"


def small(**parallel: Any) -> Config:
    return with_engine(Case(dp=2, dtype="float32"), "deepspeed", **parallel)


def test_the_settings_follow_from_the_config() -> None:
    settings = engine_settings(small(zero_stage=2, offload="cpu"), 2)
    assert settings["bf16"]["enabled"] is False and settings["communication_data_type"] == "fp32"
    assert settings["train_batch_size"] == 12 and settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == 0.1
    assert settings["optimizer"]["params"]["betas"] == [0.9, 0.95]
    assert settings["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}}


def test_bfloat16_adds_gradients_up_in_float32_and_sends_what_it_is_told_to() -> None:
    config = with_engine(HALF(dp=2), "deepspeed", reduce_dtype="bfloat16")
    assert engine_settings(config, 2)["bf16"]["enabled"] is True
    assert engine_settings(config, 2)["data_types"] == {"grad_accum_dtype": "fp32"}
    assert engine_settings(config, 2)["communication_data_type"] == "bf16"
    assert engine_settings(with_engine(HALF(dp=2), "deepspeed"), 2)["communication_data_type"] == "fp32"
    alone = with_engine(HALF(dp=1), "deepspeed", reduce_dtype="bfloat16")
    assert engine_settings(alone, 1)["communication_data_type"] == "fp32", "nothing travels"


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
        "bf16": {"bf16_master_weights_and_grads": True},
        "communication_data_type": "bf16",
        "data_types": {"grad_accum_dtype": "bf16"},
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
        "bf16.bf16_master_weights_and_grads is not taken over: it may change what is computed, or is unknown; remove it from the "
        "file",
        'communication_data_type="bf16" contradicts optim.grad_reduce_dtype, which makes it "fp32"; remove it from the file, or '
        "change optim.grad_reduce_dtype",
        'data_types.grad_accum_dtype="bf16", but the engine runs with "fp32"; remove it from the file',
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
