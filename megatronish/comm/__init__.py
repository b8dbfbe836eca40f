"""The lowest package: the only one that talks to torch.distributed, to the device, and to the host side of a tensor."""

from megatronish.comm.collectives import Pending, all_gather, all_reduce, barrier, reduce_scatter
from megatronish.comm.groups import Group, new_group, single_process_group

__all__ = ["Group", "Pending", "all_gather", "all_reduce", "barrier", "new_group", "reduce_scatter", "single_process_group"]
