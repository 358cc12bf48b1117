"""The sampling filters of a running batch, until its rows change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fuse.engines.engine import SamplingParams
from fuse.ops.logit_filters import Filters


def row_filters(
    params: Sequence[SamplingParams], token_ids: Iterable[Sequence[int]], num_tokens: int, device: torch.device
) -> Filters | None:
    """The filters of rows with these tokens of prompt and response, or None where no row has any.

    num_tokens: that a response may consist of. token_ids: looked at only where a row has a penalty.
    """
    if not any(one.is_filtered for one in params):
        return None
    # Greedy rows take the most likely token, which these keep: but of equal ones top-p would not keep the first.
    drawn = [one.temperature > 0 for one in params]
    top_ks = [one.top_k or num_tokens if draws else num_tokens for one, draws in zip(params, drawn, strict=True)]
    top_ps = [one.top_p if draws else 1.0 for one, draws in zip(params, drawn, strict=True)]
    min_ps = [one.min_p or 0.0 if draws else 0.0 for one, draws in zip(params, drawn, strict=True)]
    penalties = [one.repetition_penalty for one in params]
    penalizes = any(penalty != 1 for penalty in penalties)
    return Filters(
        active=torch.tensor([one.is_filtered for one in params], device=device),
        penalties=torch.tensor(penalties, device=device) if penalizes else None,
        seen=_seen(list(token_ids), num_tokens).to(device) if penalizes else None,
        top_ks=torch.tensor(top_ks, device=device) if min(top_ks) < num_tokens else None,
        top_ps=torch.tensor(top_ps, dtype=torch.float64, device=device) if min(top_ps) < 1 else None,
        min_ps=torch.tensor(min_ps, device=device) if max(min_ps) > 0 else None,
    )


def see(filters: Filters, token_ids: Tensor) -> None:
    """Remember tokens of each row, int64 [rows, any number], for the penalty; twice is once."""
    if filters.seen is not None:
        filters.seen.scatter_(1, token_ids.clamp(max=filters.seen.shape[1] - 1), True)


def _seen(token_ids: Sequence[Sequence[int]], num_tokens: int) -> Tensor:
    """Which tokens each row has, bool [rows, num_tokens + 1]; the last column is for those that no response has."""
    seen = torch.zeros(len(token_ids), num_tokens + 1, dtype=torch.bool)
    for row, ids in zip(seen, token_ids, strict=True):
        row[torch.tensor(ids).clamp_(max=num_tokens)] = True
    return seen
