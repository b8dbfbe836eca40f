"""Joins the packages into one rank's trainer: config + mesh -> model -> memory -> optimizer -> pipeline -> Trainer.

`train.py`, `evaluate.py`, the tests and a rehearsal all build through these functions, so there is one trainer and no second
model of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from megatronish import formulas
from megatronish.batch import Batch
from megatronish.comm import Group
from megatronish.comm.streams import PhaseClock
from megatronish.config import Config
from megatronish.deepspeed_engine import EngineOptimizer, EngineStage, EngineTrainer
from megatronish.deepspeed_tensors import EngineGradients
from megatronish.layout import ParamLayout
from megatronish.models import MODELS
from megatronish.models.layers import place_dropout
from megatronish.optim.buckets import Bucket, bucket_elements, plan_buckets
from megatronish.optim.grad_buffer import GradBuffer
from megatronish.optim.parameters import FlatParameters
from megatronish.optim.sharded_grads import make_grad_buffer
from megatronish.optim.step_guard import StepGuard
from megatronish.optim.weight_gradients import AutogradGradients, WeightGradientQueue
from megatronish.optim.zero import Optimizer, ZeroAdamW
from megatronish.parallel.loss import Columns, LossTerms, projected_cross_entropy, vocab_parallel_cross_entropy
from megatronish.parallel.mesh import Mesh, MeshShape
from megatronish.parallel.recompute import recompute_blocks, recompute_selectively
from megatronish.parallel.tensor import (
    ColumnParallelLinear,
    TensorParallel,
    VocabParallelEmbedding,
    apply_plan,
    make_param_layout,
)
from megatronish.pipeline.lower import Step, Traffic, lower
from megatronish.pipeline.runtime import ActivationSpec, PipelineRuntime
from megatronish.pipeline.schedules import Action, Forward, actions_of_all_stages
from megatronish.pipeline.split import split_layers
from megatronish.pipeline.stage import Stage
from megatronish.remember import remembered
from megatronish.trainer import BatchSource, Trainer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def mesh_shape(config: Config, world_size: int) -> MeshShape:
    """The axes' sizes of a run on `world_size` ranks."""
    return MeshShape(pp=config.parallel.pipeline, dp=config.data_parallel_size(world_size), tp=config.parallel.tensor)


def main_dtype(config: Config) -> torch.dtype:
    """Of master weights, optimizer state and accumulated gradients."""
    return torch.float64 if config.train.dtype == "float64" else torch.float32


def reduce_dtype(config: Config) -> torch.dtype:
    """Of gradients on their way between data ranks."""
    return main_dtype(config) if config.optim.grad_reduce_dtype is None else DTYPES[config.optim.grad_reduce_dtype]


def split_model(config: Config) -> list[list[range]]:
    """The layers of each stage, chunk by chunk: as `parallel.stage_layers` says, or balanced by FLOPs with the output projection
    counted. Part i goes to stage i % pipeline."""
    num_stages, num_parts = config.parallel.pipeline, config.parallel.pipeline * config.parallel.num_chunks
    parts = _given_parts(config) or _balanced_parts(config, num_parts)
    return [parts[stage::num_stages] for stage in range(num_stages)]


def _given_parts(config: Config) -> list[range]:
    ends = list(accumulate(config.parallel.stage_layers or ()))
    return [range(start, end) for start, end in pairwise([0, *ends])]


def _balanced_parts(config: Config, num_parts: int) -> list[range]:
    model = config.model
    head = 6.0 * model.padded_vocab_size * model.hidden_size
    layer = (formulas.flops_per_token(model, config.data.sequence_length) - head) / model.num_layers
    # Looking up an embedding is no product: it costs next to nothing.
    return split_layers(model.num_layers, num_parts, layer_cost=layer, embedding_cost=0.0, head_cost=head)


def plain_stages(config: Config) -> list[nn.Module]:
    """Every stage of the plain model, on the meta device: shapes and names, no memory."""
    return [plain_stage(config, stage) for stage in range(config.parallel.pipeline)]


def plain_stage(config: Config, stage: int) -> nn.Module:
    """One of `plain_stages`."""
    architecture = MODELS[config.model.architecture]
    chunks = split_model(config)[stage]
    module: nn.Module = architecture.module(config.model, chunks=chunks, dtype=DTYPES[config.train.dtype], device="meta")
    return module


@remembered
def param_layout(config: Config, tp_size: int, sequence_parallel: bool) -> ParamLayout:
    """The whole model's table."""
    architecture = MODELS[config.model.architecture]
    plan, tied = architecture.plan(config.model), architecture.tied_parameters(config.model)
    return make_param_layout(plain_stages(config), plan, tp_size=tp_size, sequence_parallel=sequence_parallel, tied=tied)


@dataclass
class CutModel:
    """This rank's part of the model, with memory but without values, and the tables it was cut by."""

    model: nn.Module
    layout: ParamLayout
    buckets: list[Bucket]
    parameters: FlatParameters
    gradients: WeightGradientQueue | AutogradGradients


def buckets_of(config: Config, layout: ParamLayout, *, stage: int, tp_rank: int, dp_size: int) -> list[Bucket]:
    """The buckets of any rank: what it holds, reduces and saves is a function of its coordinates."""
    size = bucket_elements(config.optim.bucket_mib, torch.empty((), dtype=main_dtype(config)).element_size())
    placements = layout.of_stage(stage)
    close: Literal["by kind", "together"] = "together" if config.parallel.zero_stage == 2 else "by kind"
    at: dict[str, int] = {"stage": stage, "tp_rank": tp_rank, "tp_size": layout.tp_size, "dp_size": dp_size}
    return plan_buckets(placements, bucket_elements=size, close=close, **at)


def backward_order(layout: ParamLayout, stage: int) -> list[str]:
    """A stage's parameters in about the order in which backward reaches them."""
    return list(reversed(layout.of_stage(stage)))


def cut_model(config: Config, mesh: Mesh) -> CutModel:
    """Build this rank's stage under global names, cut it by its plan, and give it flat memory (NaN until drawn or loaded)."""
    architecture = MODELS[config.model.architecture]
    sequence_parallel = config.parallel.sequence and mesh.size("tp") > 1
    layout = param_layout(config, mesh.size("tp"), sequence_parallel)
    gradients = WeightGradientQueue() if config.parallel.zero_engine == "native" else AutogradGradients()
    tp = TensorParallel(
        group=mesh.groups["tp"],
        sequence_parallel=sequence_parallel,
        # On CPU memory is plentiful and a collective dear; under full recomputation the input is gathered anew anyway.
        regather_input=mesh.device_kind != "cpu" and sequence_parallel and config.parallel.recompute_of(mesh.index("pp")) != "full",
        sink=gradients,
    )
    model = plain_stage(config, mesh.index("pp"))
    apply_plan(model, architecture.plan(config.model), tp)
    place_dropout(model, seed=config.train.seed, tp_index=mesh.index("tp"), sequence_parallel=sequence_parallel)
    buckets = buckets_of(config, layout, stage=mesh.index("pp"), tp_rank=mesh.index("tp"), dp_size=mesh.size("dp"))
    parameters = FlatParameters(model, buckets, dtype=DTYPES[config.train.dtype], device=mesh.device)
    return CutModel(model, layout, buckets, parameters, gradients)


def draw_weights(config: Config, cut: CutModel) -> None:
    """First values, a function of the seed and of each weight's global name and coordinates."""
    std_of = MODELS[config.model.architecture].init_std
    cut.parameters.draw(cut.layout.placements, seed=config.train.seed, std_of=lambda name: std_of(config.model, name))


@dataclass(frozen=True)
class MaskedLossSum:
    """(logits, microbatch) -> the sum of the losses of its target tokens, equal on every tp rank. An evaluation's is the plain
    cross entropy, of which a perplexity is made."""

    vocab_size: int
    padded_vocab_size: int
    group: Group
    terms: LossTerms

    def __call__(self, logits_SBV: Tensor, batch: Batch, *, training: bool) -> Tensor:
        loss_SB = vocab_parallel_cross_entropy(
            logits_SBV,
            batch.labels_SB,
            vocab_size=self.vocab_size,
            padded_vocab_size=self.padded_vocab_size,
            group=self.group,
            terms=self.terms if training else LossTerms(),
            logits_after="overwritten",
        )
        return (loss_SB * batch.loss_mask_SB).sum()


@dataclass(frozen=True)
class ChunkedLossSum:
    """The same with the projection in it: the logits of 1/num_chunks of the tokens at a time."""

    plain: MaskedLossSum
    num_chunks: int

    def __call__(self, x: Tensor, projection: nn.Module, batch: Batch, *, loss_gradient: Tensor | None) -> Tensor:
        assert isinstance(projection, ColumnParallelLinear | VocabParallelEmbedding)
        plain = self.plain
        return projected_cross_entropy(
            x,
            projection,
            batch.labels_SB,
            batch.loss_mask_SB,
            columns=Columns.of(vocab_size=plain.vocab_size, padded_vocab_size=plain.padded_vocab_size, group=plain.group),
            terms=LossTerms() if loss_gradient is None else plain.terms,
            num_chunks=self.num_chunks,
            loss_gradient=loss_gradient,
        )


def masked_loss(config: Config, mesh: Mesh) -> MaskedLossSum:
    """What the last stage ends in."""
    terms = LossTerms(label_smoothing=config.train.label_smoothing, z_loss=config.train.z_loss)
    return MaskedLossSum(config.model.vocab_size, config.model.padded_vocab_size, mesh.groups["tp"], terms)


def build_pipeline(config: Config, mesh: Mesh, model: nn.Module) -> PipelineRuntime:
    """The runtime of this rank's stage."""
    plain = masked_loss(config, mesh)
    stage = Stage(
        model,
        stage=mesh.index("pp"),
        num_stages=mesh.size("pp"),
        num_chunks=config.parallel.num_chunks,
        loss_function=plain,
        projection_loss=ChunkedLossSum(plain, config.train.loss_chunks) if config.train.loss_chunks > 1 else None,
    )
    S = config.data.sequence_length // (mesh.size("tp") if config.parallel.sequence else 1)
    shape = (S, config.train.micro_batch_size, config.model.hidden_size)
    activation = ActivationSpec(shape, DTYPES[config.train.dtype], mesh.device)
    return PipelineRuntime(stage, group=mesh.groups["pp"], activation=activation, device_kind=mesh.device_kind)


def training_steps(config: Config, mesh: Mesh, num_microbatches: int) -> list[Step]:
    """This stage's lowered schedule."""
    parallel = config.parallel
    return _traffic(parallel.schedule, parallel.pipeline, num_microbatches, parallel.num_chunks, "all").steps(mesh.index("pp"))


def evaluation_steps(config: Config, mesh: Mesh) -> list[Step]:
    """The forwards of the training step, lowered."""
    m, parallel = config.num_microbatches(mesh.shape.num_ranks), config.parallel
    return _traffic(parallel.schedule, parallel.pipeline, m, parallel.num_chunks, "forwards").steps(mesh.index("pp"))


@remembered
def _traffic(schedule: str, num_stages: int, num_microbatches: int, num_chunks: int, kinds: Literal["all", "forwards"]) -> Traffic:
    actions = actions_of_all_stages(schedule, num_stages, num_microbatches, num_chunks=num_chunks)
    if kinds == "forwards":
        actions = [[action for action in of_stage if isinstance(action, Forward)] for of_stage in actions]
    return Traffic(actions)


def forward_steps(config: Config, mesh: Mesh) -> list[Step]:
    """The forward of one microbatch through all parts, lowered."""
    forwards: list[Action] = [Forward(0, chunk) for chunk in range(config.parallel.num_chunks)]
    return lower([forwards] * mesh.size("pp"), mesh.index("pp"))


def parameters_by_chunk(model: nn.Module, chunks: Sequence[range]) -> list[list[nn.Parameter]]:
    """The parameters that each chunk of a stage uses. What a model defines before its layers runs before the first of them, what it
    defines after them runs after the last; a stage that has only the last has what is before them too, tied."""
    first = min(range(len(chunks)), key=lambda chunk: chunks[chunk].start)
    last = max(range(len(chunks)), key=lambda chunk: chunks[chunk].stop)
    if chunks[first].start > 0:
        first = last
    result: list[list[nn.Parameter]] = [[] for _ in chunks]
    outside = first
    for name, child in model.named_children():
        if name != "layers":
            result[outside] += child.parameters()
            continue
        outside = last
        for layer, block in child.named_children():
            (chunk,) = (chunk for chunk, layers in enumerate(chunks) if int(layer) in layers)
            result[chunk] += block.parameters()
    return result


@dataclass
class Assembly:
    """One rank's trainer and what it was built from."""

    config: Config
    mesh: Mesh
    cut: CutModel
    optimizer: Optimizer
    trainer: Trainer


def assemble(config: Config, mesh: Mesh, batches: BatchSource) -> Assembly:
    """Build everything a rank needs to train. Weights are NaN until drawn (`draw_weights`) or loaded."""
    cut = cut_model(config, mesh)
    grads, optimizer = _own_optimizer(config, mesh, cut) if config.parallel.zero_engine == "native" else _engine(config, mesh, cut)
    apply_recompute(config, mesh, cut.model)
    pipeline, make_trainer = build_pipeline(config, mesh, cut.model), Trainer
    if isinstance(optimizer, EngineOptimizer):
        pipeline.stage, make_trainer = EngineStage(cut.model, masked_loss(config, mesh), optimizer), EngineTrainer
    trainer = make_trainer(
        config=config,
        mesh=mesh,
        batches=batches,
        pipeline=pipeline,
        # Lowered when first asked for: a ramp of the batch size has several.
        train_steps=cache(partial(training_steps, config, mesh)),
        evaluation_steps=evaluation_steps(config, mesh),
        grads=grads,
        optimizer=optimizer,
        guard=StepGuard(
            config.train,
            grads,
            clip_norm=config.optim.clip_norm,
            backward_order=backward_order(cut.layout, mesh.index("pp")),
        ),
        clock=PhaseClock(mesh.device),
        chunk_parameters=parameters_by_chunk(cut.model, split_model(config)[mesh.index("pp")]),
    )
    return Assembly(config, mesh, cut, optimizer, trainer)


def _own_optimizer(config: Config, mesh: Mesh, cut: CutModel) -> tuple[GradBuffer, Optimizer]:
    zero_stage = config.parallel.zero_stage
    assert zero_stage != 3 and isinstance(cut.gradients, WeightGradientQueue)
    grads = make_grad_buffer(
        cut.buckets,
        cut.parameters.by_name,
        groups=mesh.groups,
        zero_stage=zero_stage,
        dtype=main_dtype(config),
        device=mesh.device,
        reduce_dtype=reduce_dtype(config),
    )
    cut.gradients.attach(grads)
    optimizer = ZeroAdamW(
        config.optim,
        cut.parameters,
        grads,
        dp=mesh.groups["dp"],
        zero_stage=zero_stage,
        placements=cut.layout.placements,
        seed=config.train.seed,
    )
    _wait_before_use(cut.model, optimizer)
    return grads, optimizer


def _engine(config: Config, mesh: Mesh, cut: CutModel) -> tuple[GradBuffer, Optimizer]:
    optimizer = EngineOptimizer(config, mesh, cut)
    return EngineGradients(optimizer, groups=mesh.groups, device=mesh.device), optimizer


def apply_recompute(config: Config, mesh: Mesh, model: nn.Module) -> None:
    """Wrap what this stage makes again in backward, as parallel.recompute says."""
    recompute = config.parallel.recompute_of(mesh.index("pp"))
    if recompute == "full":
        blocks = model.get_submodule("layers")
        assert isinstance(blocks, nn.ModuleDict)
        recompute_blocks(blocks)
    elif recompute == "selective":
        recompute_selectively(model, MODELS[config.model.architecture].selective_recompute)


def _wait_before_use(model: nn.Module, optimizer: ZeroAdamW) -> None:
    """Each block, and each module outside blocks, waits for its own parameters: forward runs under the gathering of later ones."""
    units = {name: module for name, module in model.named_children() if name != "layers"}
    units |= {f"layers.{name}": block for name, block in model.get_submodule("layers").named_children()}
    # The projection's weight may be used without calling its module: a tied one, and one that the loss is joined with.
    projection = "head" if "head" in units else "embedding"
    for unit_name, unit in units.items():
        names = [f"{unit_name}.{name}" for name, _ in unit.named_parameters()]
        if unit_name == "final_norm":
            names += [f"{projection}.{name}" for name, _ in units[projection].named_parameters()]
        unit.register_forward_pre_hook(lambda module, inputs, names=names: optimizer.ensure_parameters(names))
