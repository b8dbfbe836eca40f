"""The package deepspeed as we run it, and the mesh in its words."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from typing import Any

from megatronish.comm import Group
from megatronish.comm.groups import communicator
from megatronish.deepspeed_nvme import add_scripts_to_path
from megatronish.parallel.mesh import Mesh

LOGGER = logging.getLogger("DeepSpeed")


class Places:
    """DeepSpeed's `mpu`: the mesh in its words. Axes of one rank have real groups too."""

    def __init__(self, mesh: Mesh) -> None:
        self._axes: dict[str, Group] = {axis: mesh.groups[axis] for axis in ("tp", "dp")}
        self._handles = {axis: communicator(group, device_kind=mesh.device_kind) for axis, group in self._axes.items()}

    def get_model_parallel_rank(self) -> int:
        return self._axes["tp"].index

    def get_model_parallel_world_size(self) -> int:
        return self._axes["tp"].size

    def get_model_parallel_group(self) -> Any:
        return self._handles["tp"]

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self._axes["dp"].index

    def get_data_parallel_world_size(self) -> int:
        return self._axes["dp"].size

    def get_data_parallel_group(self) -> Any:
        return self._handles["dp"]

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self._axes["dp"].ranks)


def import_deepspeed(mesh: Mesh) -> Any:
    """The package. It reads the accelerator and, in the middle of a step too, this rank's device from the environment; srun and
    mpirun set neither."""
    os.environ["DS_ACCELERATOR"] = mesh.device_kind
    os.environ["LOCAL_RANK"] = str(mesh.device.index or 0)
    deepspeed = importlib.import_module("deepspeed")
    LOGGER.setLevel(logging.WARNING)
    # It calls, thousands of times, what torch 2.13 has other names for.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # On CPU it would compile its own collectives over shared memory at the first start, for minutes; gloo's are there.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Its optimizer for bfloat16 and ZeRO 1 prints the memory eight times at the start.
    bf16_optimizer: Any = importlib.import_module("deepspeed.runtime.bf16_optimizer")
    bf16_optimizer.see_memory_usage = lambda *given, **named: None
    add_scripts_to_path()
    return deepspeed
