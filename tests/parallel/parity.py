"""One case of the parity check: a layout on real gloo ranks against the plain model in one process, float64.

The reference uses nothing of `parallel/`, `pipeline/` or `optim/`: autograd over the plain model, torch's cross entropy and AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from megatronish.assemble import assemble, draw_weights, mesh_shape
from megatronish.batch import Batch
from megatronish.comm.random import normal_fill_, stream_key
from megatronish.config import Config
from megatronish.layout import Rectangle
from megatronish.models import MODELS
from megatronish.optim.lr_schedule import learning_rate
from megatronish.parallel.mesh import build_mesh
from tests.ranks import ranks

NUM_STEPS = 2
DIMENSIONS = {"num_layers": 4, "hidden_size": 32, "num_heads": 8, "num_kv_heads": 4, "mlp_size": 48}


@dataclass(frozen=True)
class Case:
    """A layout, and what else may change the way a step is computed."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero_stage: int = 1
    sequence: bool = False
    recompute: str = "none"
    vocab_size: int = 101
    vocab_multiple: int = 7
    """101 is padded to 105 rows, which neither tp 2 nor tp 4 divides; the last rank's have the padding."""
    bucket_mib: float = 0.02
    """Of float64: about 2,600 elements, so that there are many buckets and several parameters share some."""
    num_microbatches: int = 3
    dtype: str = "float64"
    architecture: str = "llama"

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        flags = (
            f"-zero{self.zero_stage}" + ("-sequence" if self.sequence else "") + ("-recompute" if self.recompute == "full" else "")
        )
        return f"{self.layout}{flags}-v{self.vocab_size}-b{self.bucket_mib}-m{self.num_microbatches}"

    @property
    def layout(self) -> str:
        return f"tp{self.tp}-pp{self.pp}-dp{self.dp}"

    @property
    def plain(self) -> Case:
        """The one-process case with the same global batch and model."""
        return Case(
            num_microbatches=self.num_microbatches * self.dp,
            vocab_size=self.vocab_size,
            vocab_multiple=self.vocab_multiple,
            dtype=self.dtype,
            architecture=self.architecture,
        )

    def config(self) -> Config:
        """The run of this case; the global batch is the same for every layout with the same product of dp and microbatches."""
        return Config.model_validate(
            {
                "name": "parity",
                "model": {
                    "architecture": self.architecture,
                    "vocab_size": self.vocab_size,
                    "vocab_multiple": self.vocab_multiple,
                    **DIMENSIONS,
                },
                "parallel": {
                    "tensor": self.tp,
                    "pipeline": self.pp,
                    "data": self.dp,
                    "sequence": self.sequence,
                    "zero_stage": self.zero_stage,
                    "recompute": self.recompute,
                },
                "data": {"train": "none", "sequence_length": 16},
                # A clip norm well below the gradient's: the norm decides the update. A large lr makes a wrong update show.
                "optim": {"lr": 0.01, "clip_norm": 0.1, "bucket_mib": self.bucket_mib, "warmup_steps": 0},
                "train": {
                    "steps": NUM_STEPS,
                    "global_batch_size": 2 * self.num_microbatches * self.dp,
                    "micro_batch_size": 2,
                    "dtype": self.dtype,
                    "seed": 7,
                },
            }
        )


def global_batch(config: Config, step: int) -> Batch:
    """Random tokens; about a third of the targets masked, and all but one of the last sample's."""
    generator = torch.Generator().manual_seed(100 + step)
    S, B = config.data.sequence_length, config.train.global_batch_size
    tokens = torch.randint(config.model.vocab_size, (S + 1, B), generator=generator)
    mask = (torch.rand(S, B, generator=generator) > 0.3).float()
    mask[1:, -1] = 0
    positions = torch.arange(S)[:, None].expand(S, B).contiguous()
    return Batch(tokens[:-1].contiguous(), tokens[1:].contiguous(), mask, positions, torch.arange(B))


class SlicedBatches:
    """A data rank's samples of the global batch."""

    def __init__(self, config: Config, dp_rank: int, dp_size: int) -> None:
        self.config, self.rank, self.size = config, dp_rank, dp_size

    def batch(self, step: int) -> Batch:
        per_rank = self.config.train.global_batch_size // self.size
        return global_batch(self.config, step).microbatches(per_rank)[self.rank]


Pieces = list[tuple[str, str, Rectangle, Tensor]]


@dataclass
class RankResult:
    """What a rank saw: by step the loss, the norm and its own pieces of the gradients; at the end its pieces of the states."""

    losses: list[float]
    norms: list[float]
    gradients: list[Pieces]
    states: Pieces


def run_rank(rank: int, case: Case) -> RankResult:
    """Train NUM_STEPS steps on this rank of the case's layout."""
    config = case.config()
    mesh = build_mesh(mesh_shape(config, case.world_size), rank, device=torch.device("cpu"))
    run = assemble(config, mesh, SlicedBatches(config, mesh.index("dp"), mesh.size("dp")))
    draw_weights(config, run.cut)
    run.optimizer.reset_master()
    result = RankResult([], [], [], [])
    for step_result in run.trainer.fit(1, NUM_STEPS):
        result.losses.append(step_result.loss.item())
        result.norms.append(step_result.grad_norm.item())
        gradients: Pieces = []
        grads = run.trainer.grads
        for index, bucket in enumerate(run.cut.buckets):
            if bucket.replicated and mesh.index("tp") > 0:
                continue
            start, stop = bucket.owned_range(mesh.index("dp"), mesh.size("dp"))
            for name, box, flat in bucket.pieces(start, stop):
                gradients.append(("gradient", name, box, grads.flat[index][flat : flat + box.num_elements].clone()))
        result.gradients.append(gradients)
    run.optimizer.ensure_parameters()
    result.states = [(kind, name, box, values.clone()) for kind, name, box, values in run.optimizer.owned_pieces()]
    for name, parameter in run.cut.parameters.by_name.items():
        box = run.cut.layout.placements[name].local_rectangle(mesh.index("tp"), mesh.size("tp"))
        result.states.append((f"parameter@{rank}", name, box, parameter.detach().clone()))
    return result


@dataclass
class Reference:
    """The same of the plain model; tensors by name."""

    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, Tensor]]
    parameters: dict[str, Tensor]


def plain_model(config: Config) -> nn.Module:
    """The whole model on one device, with the weights that every layout starts from."""
    architecture = MODELS[config.model.architecture]
    dtype = getattr(torch, config.train.dtype)
    model = architecture.module(config.model, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = architecture.init_std(config.model, name)
            if std is None:
                parameter.fill_(1.0)
            else:
                zero, key = (0,) * parameter.dim(), stream_key(config.train.seed, "init", name)
                normal_fill_(parameter, offsets=zero, global_shape=tuple(parameter.shape), key=key, std=std)
    return model


@cache
def reference(case: Case) -> Reference:
    """Train the plain model in this process. The layout of the case is not looked at, but for the size of the global batch."""
    config = case.config()
    model = plain_model(config)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    c = config.optim
    groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps)
    result = Reference([], [], [], {})
    for step in range(1, NUM_STEPS + 1):
        batch = global_batch(config, step)
        logits = model(batch.tokens_SB, batch.context)[..., : config.model.vocab_size]
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels_SB.flatten(), reduction="none")
        loss = (losses * batch.loss_mask_SB.flatten()).sum() / batch.loss_mask_SB.sum()
        optimizer.zero_grad()
        loss.backward()
        result.losses.append(loss.item())
        result.gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        result.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip_norm).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(c, step, NUM_STEPS)
        optimizer.step()
    result.parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return result


def relative_error(got: Tensor, expected: Tensor) -> float:
    """max |a - b| / max |b|; NaN and missing elements count as infinite."""
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    return error if error == error else float("inf")


def join(pieces: list[Pieces], kind: str, shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Global tensors from the boxes of all ranks; every element must be given exactly once."""
    joined = {name: torch.full_like(like, float("nan")) for name, like in shapes.items()}
    for rank_pieces in pieces:
        for piece_kind, name, box, values in rank_pieces:
            if piece_kind == kind:
                whole = Rectangle((0,) * len(box.sizes), tuple(shapes[name].shape))
                target = joined[name][box.within(whole)]
                assert target.isnan().all(), f"{name} {box} is given twice"
                target.copy_(values.view(box.sizes))
    return joined


def errors(results: list[RankResult], expected: Reference) -> Iterator[tuple[str, float]]:
    """(what, relative error) of all that the ranks saw, in the order in which a fault would spread."""
    for step in range(NUM_STEPS):
        gradients = join([r.gradients[step] for r in results], "gradient", expected.gradients[step])
        for name, gradient in gradients.items():
            yield f"gradient of {name} in step {step + 1}", relative_error(gradient, expected.gradients[step][name])
        for rank, result in enumerate(results):
            for what, got, truth in (("norm", result.norms, expected.norms), ("loss", result.losses, expected.losses)):
                yield f"{what} of step {step + 1} on rank {rank}", abs(got[step] / truth[step] - 1)
    masters = join([r.states for r in results], "master", expected.parameters)
    for name, master in masters.items():
        yield f"{name} after {NUM_STEPS} steps", relative_error(master, expected.parameters[name])
    for result in results:  # what each rank computes with, gathered after the last step
        for kind, name, box, values in result.states:
            if kind.startswith("parameter"):
                whole = Rectangle((0,) * len(box.sizes), tuple(expected.parameters[name].shape))
                yield f"{name} held by {kind}", relative_error(values, expected.parameters[name][box.within(whole)])


def check(case: Case, tolerance: float, *, run: Callable[[int, Case], RankResult] = run_rank) -> float:
    """Assert that every gradient, the norms, losses and every updated parameter equal the plain model's; the message names what
    does not. `run` is the function that each rank runs. Returns the largest relative error."""
    largest = 0.0
    for what, error in errors(ranks(case.world_size).run(run, case), reference(case.plain)):
        assert error < tolerance, f"{what} is off by {error:.1e}"
        largest = max(largest, error)
    return largest
