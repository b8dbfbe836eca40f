"""DeepSpeed's engine in the place of our optimizer and gradient buckets: the same model, tensor ranks, loss, data and checkpoints.

    Trainer.train_step -> PipelineRuntime -> EngineStage  --engine.forward, engine.backward--> DeepSpeed: ZeRO 1 to 3, offload
                       -> EngineTrainer.join_scalars      <--norm over all ranks------------
                       -> StepGuard -> EngineOptimizer.step --engine.step, or its way to drop a step-->

The engine is made once the weights have values (`reset_master`, `publish_master`), since it takes the parameters' memory over.
Checkpoints have our format: either engine goes on from the other's, on any layout. Written for deepspeed 0.19.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from megatronish.batch import Batch
from megatronish.comm import all_reduce
from megatronish.comm.host import read_values
from megatronish.config import Config
from megatronish.deepspeed_nvme import SwapFolder
from megatronish.deepspeed_package import LOGGER, Places, import_deepspeed
from megatronish.deepspeed_settings import engine_settings
from megatronish.deepspeed_tensors import EngineParameters
from megatronish.kernels.square_sum import square_sum
from megatronish.layout import ParamLayout, Rectangle
from megatronish.optim.buckets import Bucket, decays
from megatronish.optim.parameters import FlatParameters
from megatronish.optim.zero import STATES, saved_boxes
from megatronish.parallel.mesh import Mesh
from megatronish.pipeline.stage import LossFunction, Stage
from megatronish.trainer import Trainer

_TAKEN = {
    "DeepSpeedZeroOptimizer": ("scaled_global_norm", "_given_norm", "single_partition_of_fp32_groups"),
    "DeepSpeedZeroOptimizer_Stage3": ("_get_norm_groups", "_given_norms", "fp32_partitioned_groups_flat"),
    # bfloat16, stage 1, without offload.
    "BF16_Optimizer": ("get_grads_for_norm", "_given_gradients", "fp32_groups_flat_partition"),
}
"""By class of the engine's optimizer: what it takes its norm from, our method in its place, and where it keeps its slices."""


def _nothing(*given: Any, **named: Any) -> None:
    """In the place of a second search for what is not finite: the norm has told."""


class EngineStage(Stage):
    """The only stage. Its forward runs through the engine, once there is one, and its backward is the engine's."""

    def __init__(self, model: nn.Module, loss_function: LossFunction, optimizer: EngineOptimizer) -> None:
        super().__init__(model, stage=0, num_stages=1, num_chunks=1, loss_function=loss_function)
        self._optimizer = optimizer

    def forward(
        self,
        index: int,
        batch: Batch,
        received: Tensor | None,
        *,
        chunk: int = 0,
        keep: bool,
        loss_gradient: Tensor | None = None,
    ) -> Tensor:
        """See Stage."""
        assert self._optimizer.engine is not None, "forward before the weights have values"
        self.model = self._optimizer.engine
        return super().forward(index, batch, received, chunk=chunk, keep=keep, loss_gradient=loss_gradient)

    def backward(self, index: int, gradient: Tensor, *, chunk: int = 0) -> None:
        """See Stage. `gradient` is 1 / the global number of targets."""
        self._optimizer.backward(self._in_flight.pop((index, chunk)).output * gradient)


class EngineTrainer(Trainer):
    """The Trainer, but that the engine knows the gradient norm."""

    optimizer: EngineOptimizer

    def join_scalars(self, local_loss: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, gradient norm) of the whole job; the norm is infinite where a gradient is not finite."""
        loss = all_reduce(local_loss.clone(), self.mesh.groups["dp"], what="loss")
        return loss, self.optimizer.norm()


class Cut(Protocol):
    """This rank's part of the model (`assemble.CutModel`)."""

    model: nn.Module
    layout: ParamLayout
    parameters: FlatParameters


class EngineOptimizer:
    """What a Trainer and a checkpoint ask of an optimizer (see `optim.zero.Optimizer`), over DeepSpeed's engine."""

    def __init__(self, config: Config, mesh: Mesh, cut: Cut) -> None:
        self.config, self.mesh, self._cut = config, mesh, cut
        self.settings = engine_settings(config, mesh.shape.num_ranks)
        if config.parallel.offload_path is not None:
            self._swap_folder = SwapFolder(Path(config.parallel.offload_path), num_bytes=self.state_bytes())
            self.settings["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(self._swap_folder.path)
        self.engine: Any = None
        self._zero: Any = None
        """The engine's own optimizer; it is asked for its norm, and given it."""
        self._its_norm: Any = None
        self._norm: Any = None
        """The norm of this step; NaN, which the engine takes for an invalid one, to drop the step."""
        self._has_gradients = False
        self._loaded: dict[tuple[str, str], Tensor] = {}

    # The engine's life.

    def reset_master(self) -> None:
        """Make the engine, of parameters that were drawn. Collective over the job."""
        self._create()

    def publish_master(self) -> None:
        """Make the engine, of what was read into `needed_pieces`. Collective over the job."""
        with torch.no_grad():
            for name, parameter in self.parameters.by_name.items():
                if ("master", name) in self._loaded:
                    parameter.copy_(self._loaded["master", name].view_as(parameter))
        self._create()
        for name in self._in_turn({name: None for _, name in self._loaded}, then="write"):
            for state in STATES:
                if (state, name) in self._loaded:
                    self._set(self.parameters.by_name[name], state, self._loaded[state, name])
        self._loaded = {}

    def _create(self) -> None:
        assert self.engine is None, "weights have values already"
        mesh, by_name, decay = self.mesh, self.parameters.by_name, self.config.optim.weight_decay
        deepspeed = import_deepspeed(mesh)
        groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay}, {"params": [], "weight_decay": 0.0}]
        for name, parameter in by_name.items():
            placement = self._cut.layout.placements[name]
            groups[0 if decays(placement) else 1]["params"].append(parameter)
            # Else the norm counts a shard on tp rank 0 only, as it does a replica.
            parameter.model_parallel = placement.shard_dim is not None  # type: ignore[attr-defined]
        if self.config.parallel.offload == "nvme":
            self._swap_folder.release_reserve()
        self.engine, *_ = deepspeed.initialize(
            model=self._cut.model,
            model_parameters=[group for group in groups if group["params"]],
            mpu=Places(mesh),
            config=self.settings,
            dist_init_required=False,
        )
        self._zero = self.engine.optimizer
        norm, given, slices = _TAKEN[type(self._zero).__name__]
        self._its_norm = getattr(self._zero, norm)
        setattr(self._zero, norm, getattr(self, given))
        self._zero.check_overflow = _nothing
        if self.config.parallel.offload == "nvme":
            self._zero.optimizer_swapper.swap_out_gradients = self._keep_gradients
        # Before the first update there is no state: a checkpoint could be neither loaded nor saved.
        for index, flat in enumerate(getattr(self._zero, slices)):
            if self._is_swapped(index):
                self._zero._optimizer_states_and_gradient_swap_in(index)
            zeros = {state: torch.zeros_like(flat) for state in STATES[1:]}
            self._zero.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **zeros}
            if self._is_swapped(index):
                self._zero._optimizer_states_and_gradient_swap_out(index)
        if not self._is_stage_3:
            self._zero._lazy_init_hp_params_optimizer_state()

        self._cut.parameters = EngineParameters(self._cut.parameters)

    @property
    def parameters(self) -> FlatParameters:
        """By name; their memory is the engine's once it is made."""
        return self._cut.parameters

    @property
    def _is_stage_3(self) -> bool:
        return self.config.parallel.zero_stage == 3

    @property
    def _reduces_whole_gradients(self) -> bool:
        return type(self._zero).__name__ == "BF16_Optimizer"

    def _is_swapped(self, group: int) -> bool:
        """Whether the state of a group of stage 3 is on disk. What is under 1 MiB, or aio.block_size, stays in memory."""
        return self._is_stage_3 and self._zero._swappable_optimizer_subgroup(group)

    # A step.

    def begin_accumulation(self) -> None:
        """Start a step with no gradients."""
        if self._has_gradients:
            self._drop_step()
        self.engine.set_gradient_accumulation_boundary(False)

    def end_accumulation(self) -> None:
        """The next backward is the last of the step."""
        self.engine.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, a share of the global batch's mean; after the last one they are reduced."""
        # The engine averages over data ranks.
        self.engine.backward(loss * self.mesh.size("dp"), scale_wrt_gas=False)
        self._has_gradients = True
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def norm(self) -> Tensor:
        """Global L2 norm of the reduced gradients, before clipping; infinite where one is not finite. Collective over the job."""
        if self._reduces_whole_gradients:
            gradients, _ = self._its_norm()
            total = square_sum(list(gradients))
            norm = all_reduce(total, self.mesh.groups["tp"], what="gradient norm").sqrt()
        elif self._is_stage_3:
            norm = importlib.import_module("deepspeed.runtime.utils").combine_grad_norm_groups(self._its_norm())
        else:
            self._zero._wait_for_offload_copies()
            norm = self._its_norm()
        norm = torch.as_tensor(norm, dtype=torch.float32, device=self.mesh.device)
        # It says -1 where a part is not finite.
        self._norm = torch.where((norm >= 0) & torch.isfinite(norm), norm, math.inf)
        return self._norm

    def step(self, *, lr: float, scalars: Tensor) -> None:
        """Update for the scalars[1]th time, clipped by the norm; not at all if scalars[0] is not finite. Waits for the device."""
        factor, number = read_values(scalars, [1.0, 1.0])
        if not math.isfinite(factor):
            self._drop_step()
            return
        for group in self._zero.param_groups:
            group["lr"] = lr
        for state in self._zero.optimizer.state.values():
            state["step"].fill_(number - 1)  # it counts one up
        self._finish_step(self._norm)

    def _drop_step(self) -> None:
        """Let go of the gradients, with nothing updated: the engine's way with an invalid norm, which we tell of ourselves."""
        LOGGER.setLevel(logging.ERROR)
        self._finish_step(torch.full((), math.nan, device=self.mesh.device))
        LOGGER.setLevel(logging.WARNING)
        if not self._is_stage_3 and not self._reduces_whole_gradients:
            # With offload it would add the next step's to them.
            self._zero.averaged_gradients.update(dict.fromkeys(self._zero.averaged_gradients))

    def _finish_step(self, norm: Tensor) -> None:
        self._norm = norm
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()
        self._has_gradients = False

    def _given_norm(self, norm_type: float = 2) -> Any:
        return self._norm

    def _given_norms(self) -> list[Any]:
        return [self._norm]

    def _given_gradients(self, for_clipping: bool = False) -> Any:
        """One number whose norm is the given one: squares are added up over tensor ranks."""
        if for_clipping:
            return self._its_norm(for_clipping=True)
        return [self._norm.view(1) * float(self.mesh.index("tp") == 0)], {}

    def _keep_gradients(self, parameter: Tensor, gradient_offsets: list[int], gradient_tensors: list[Tensor]) -> None:
        """In the place of the engine's way with a group's gradients: it reads them from disk to addresses that direct I/O refuses
        where 512 bytes do not divide them, and takes what stands there for what it has read."""
        kept = self._zero.optimizer_swapper.swap_params_info[parameter.ds_id].unswapped_gradients  # type: ignore[attr-defined]
        kept.update((at, given.cpu()) for at, given in zip(gradient_offsets, gradient_tensors, strict=True))

    def ensure_parameters(self, names: Iterable[str] | None = None) -> None:
        """The engine gathers what a forward needs by itself."""

    # Checkpoints.

    def owned_pieces(self) -> Iterator[tuple[str, str, Rectangle, Tensor]]:
        """What this rank saves, as our own optimizer would. Collective over the data ranks: each parameter's state is put together
        on all of them, one after the other."""
        dp = self.mesh.groups["dp"]
        found: dict[tuple[str, str, Rectangle], Tensor] = {}
        at = {"tp_rank": self.mesh.index("tp"), "dp_rank": dp.index, "dp_size": dp.size}
        pieces: dict[str, list[tuple[Rectangle, int]]] = {}
        for bucket in self.parameters.buckets:
            pieces |= _by_parameter(bucket, *bucket.owned_range(dp.index, dp.size))
        for name in self._in_turn((slot.name for bucket in self.parameters.buckets for slot in bucket.slots), then="drop"):
            for state in STATES:
                whole = self._get(self.parameters.by_name[name], state).flatten()
                for box, start in pieces.get(name, ()):
                    found[state, name, box] = whole[start : start + box.num_elements].clone()
        for key in saved_boxes(self.parameters.buckets, **at):
            yield *key, found[key]

    def needed_pieces(self) -> Iterator[tuple[str, str, Rectangle, Tensor]]:
        """What this rank must load: all state of its part of the model, on the host until the engine has taken its slices."""
        for bucket in self.parameters.buckets:
            for slot in bucket.slots:
                for state in STATES:
                    self._loaded[state, slot.name] = torch.empty(slot.local_box.num_elements)
                    yield state, slot.name, slot.local_box, self._loaded[state, slot.name]

    def _in_turn(self, names: Iterable[str], *, then: Literal["drop", "write"]) -> Iterator[str]:
        """`names`, in the same order on all ranks, which reads each group of parameters from disk once; while a name is out, its
        state is in memory."""
        if not self._is_stage_3:
            yield from names
            return
        for group, members in groupby(sorted(names, key=self._group_of), key=self._group_of):
            if self._is_swapped(group):
                self._zero._optimizer_states_and_gradient_swap_in(group)
            yield from members
            if self._is_swapped(group):
                finish = self._zero._release_swap_buffers if then == "drop" else self._zero._optimizer_states_and_gradient_swap_out
                finish(group)

    def _group_of(self, name: str) -> int:
        """Of stage 3: what it updates, and reads from disk, at once."""
        group: int = self._zero.grad_position[self._zero.get_param_id(self.parameters.by_name[name])][0]
        return group

    def _slice(self, parameter: nn.Parameter, state: str) -> Tensor:
        """Of stage 3: this rank's share of the state, which is in memory."""
        group, start, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
        master = self._zero.fp32_partitioned_groups_flat[group]
        flat: Tensor = master if state == "master" else self._zero.optimizer.state[master][state]
        return flat.data.narrow(0, start, size)

    def _get(self, parameter: nn.Parameter, state: str) -> Tensor:
        """The whole state of this tp rank's part. Collective over the data ranks."""
        if self._is_stage_3:
            gathered: Tensor = self._zero._fp32_state_allgather(parameter, self._slice(parameter, state))
            return gathered
        utils = importlib.import_module("deepspeed.utils")
        if state == "master":
            whole: Tensor = utils.safe_get_full_fp32_param(parameter)
            return whole
        whole = utils.safe_get_full_optimizer_state(parameter, state)
        return whole

    def _set(self, parameter: nn.Parameter, state: str, values: Tensor) -> None:
        """Give this rank its slice of `values`, the whole state, flat."""
        if self._is_stage_3:
            mine, index = self._slice(parameter, state), self.mesh.groups["dp"].index
            given = values[mine.numel() * index : mine.numel() * (index + 1)]
            mine[: given.numel()].copy_(given)  # the last slices may reach over the end
            return
        utils = importlib.import_module("deepspeed.utils")
        if state == "master":
            utils.safe_set_full_fp32_param(parameter, values.view(parameter.shape))
        else:
            utils.safe_set_full_optimizer_state(parameter, values.view(parameter.shape), state)

    def state_bytes(self) -> int:
        """Bytes of this rank's master weights and moments, without padding."""
        elements = sum(slot.local_box.num_elements for bucket in self.parameters.buckets for slot in bucket.slots)
        return 4 * len(STATES) * -(-elements // self.mesh.size("dp"))


def _by_parameter(bucket: Bucket, start: int, stop: int) -> dict[str, list[tuple[Rectangle, int]]]:
    """The boxes of [start, stop) of a bucket: (box, place of its first element in the flat parameter), by parameter."""
    begins = {slot.name: slot.start for slot in bucket.slots}
    result: dict[str, list[tuple[Rectangle, int]]] = {}
    for name, box, flat in bucket.pieces(start, stop):
        result.setdefault(name, []).append((box, flat - begins[name]))
    return result
