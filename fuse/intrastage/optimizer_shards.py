"""Replicas share the optimizer: each keeps moments of some parameters, steps these, and gives them to the others.

Gradients are summed on all replicas as they are without, so that the norm and what is stepped have the same bits.

Source: Rajbhandari et al. 2020, "ZeRO", section 5.1 (optimizer state partitioning), by whole parameters rather than
equal pieces: moments then have the names and shapes that checkpoints have.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from fuse.intrastage.communication import naming


def owners(sizes: Mapping[str, int], group: dist.ProcessGroup) -> dict[str, int]:
    """Which rank of the group owns each parameter."""
    return shares_of(sizes, dist.get_world_size(group))


def shares_of(sizes: Mapping[str, int], num_shares: int) -> dict[str, int]:
    """Which share each parameter is in, given their sizes: the largest first, each to the share that has least.

    Source: Graham 1969, longest processing time first: no share has more than the mean and the largest parameter.
    """
    shares = [(0, share) for share in range(num_shares)]
    owner = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        total, share = heapq.heappop(shares)
        owner[name] = share
        heapq.heappush(shares, (total + sizes[name], share))
    return owner


def owned(owner: Mapping[str, int], group: dist.ProcessGroup) -> frozenset[str]:
    """What this rank of the group owns."""
    mine = dist.get_rank(group)
    return frozenset(name for name, one in owner.items() if one == mine)


@cache
def largest_share(sizes: tuple[int, ...], num_shares: int) -> int:
    """The size of the largest of `shares_of`."""
    totals = [0] * num_shares
    for name, share in shares_of({str(index): size for index, size in enumerate(sizes)}, num_shares).items():
        totals[share] += sizes[int(name)]
    return max(totals)


def share_parameters(
    copies: Sequence[Mapping[str, Tensor]], owner: Mapping[str, int], group: dist.ProcessGroup, what: str
) -> None:
    """Write into every rank's copies of some parameters what the rank of the group has in its own that owns them."""
    mine = dist.get_rank(group)
    for share in sorted(set(owner.values())):
        names = [name for name, one in owner.items() if one == share]
        own = [copies[0][name] for name in names]
        flat = _flatten_dense_tensors(own)
        with naming(f"rank {dist.get_rank()}: giving {what}"):
            dist.broadcast(flat, group=group, group_src=share)
        if share != mine:
            given = _unflatten_dense_tensors(flat, own)
            for copy in copies:
                torch._foreach_copy_([copy[name] for name in names], list(given))


def give_to_peer(tensors: Sequence[Tensor], group: dist.ProcessGroup, what: str, *, gives: bool) -> None:
    """Write into the tensors of one rank of two what the other, which `gives`, has in its own."""
    mine = dist.get_rank(group)
    with naming(f"rank {dist.get_rank()}: giving {what}"):
        for tensor in tensors:
            dist.broadcast(tensor, group=group, group_src=mine if gives else 1 - mine)
