"""Do the ranks of a job reach each other, and how fast? Sums that every rank checks; any launcher that README.md names starts it.

    srun python launch/collective_check.py --min-gbps 50

Exit code 1: a sum is wrong, or the slowest of five sums moved less than --min-gbps a rank."""

from __future__ import annotations

import argparse
import socket
import sys

import torch

from megatronish.comm import all_reduce, barrier, streams
from megatronish.comm.groups import world_group
from megatronish.comm.host import read_values
from megatronish.errors import UserError
from megatronish.parallel.rendezvous import connect, disconnect, find_place


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=float, default=0.0, help="megabytes of a sum [default: 256 on GPUs, 4 on CPU]")
    parser.add_argument("--min-gbps", type=float, default=0.0, help="gigabytes a second and rank that the slowest sum must move")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds until a rank that does not come is an error")
    arguments = parser.parse_args()
    place = find_place()
    device = connect(place, timeout_seconds=arguments.timeout)
    world = world_group(device_kind=device.type)
    size = place.world_size
    mib = arguments.mib or (256.0 if device.type == "cuda" else 4.0)
    # Whole numbers below 2^24: float32 sums them without rounding, in any order.
    numbers = (torch.arange(int(mib * 2**18), device=device) % 1024).float()
    expected = numbers * (size * (size + 1) // 2)
    slowest = 0.0
    for attempt in range(6):
        x = numbers * (place.rank + 1)
        barrier(world, what="start of a sum")
        begin = streams.wall_time(device)
        all_reduce(x, world, what="collective check")
        seconds = streams.wall_time(device) - begin
        wrong = (x != expected).sum().float().reshape(1)
        wrong, longest = read_values(torch.cat([wrong, wrong.new_tensor([seconds])]), [0.0, 0.0])
        if wrong:
            print(f"error: rank {place.rank} on {socket.gethostname()}: {wrong:.0f} of {x.numel()} sums are wrong", file=sys.stderr)
            return 1
        if attempt:  # the first one builds connections
            slowest = max(slowest, longest)
    # A ring moves 2 (n - 1) / n of the tensor through each rank.
    gbps = numbers.numel() * 4 * 2 * (size - 1) / size / max(slowest, 1e-9) / 1e9
    if place.rank == 0:
        print(f"{size} ranks ({place.launcher}): sums of {mib:g} MiB are right, {gbps:.3g} GB/s a rank (slowest of five)")
    disconnect()
    if size > 1 and gbps < arguments.min_gbps:  # all ranks wait for the slowest: which one it is they do not know
        if place.rank == 0:
            print(f"error: {gbps:.3g} GB/s are less than --min-gbps {arguments.min_gbps:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
