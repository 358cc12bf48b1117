"""Drawing from what sampling options leave: repetition penalty, top-k, top-p and min-p.

What is left of a row is a function of that row alone: probabilities are added up as integers, whose sum does not depend
on order or batch. The noise is the one of `sampling`. So filtered samples, too, draw the same tokens whatever they are
decoded with.

Source: the logits processors of transformers 5 (`generation/logits_process.py`), in the order in which `generate`
applies them: penalty, temperature, top-k, top-p, min-p. Of equal logits at the edge of top-k all are kept, as there; at
the edge of top-p those of the highest ids, where transformers leaves the choice to its sort.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fuse.ops.sampling import sample_tokens

_UNIT = 1 << 40
"""The mass of a row's most likely token; 2^22 such tokens add up without overflow."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Filters:
    """What each row of a batch leaves; a field is None where no row asks for it.

    active: bool [rows], rows that ask for anything.
    penalties: float32 [rows], above 0; 1 is none. seen: bool [rows, vocab or more], the tokens that they are for.
    top_ks: int64 [rows], at least 1; the vocabulary's size, or more, keeps all.
    top_ps: float64 [rows], in (0, 1]; 1 keeps all. min_ps: float32 [rows], in [0, 1]; 0 keeps all.
    """

    active: Tensor
    penalties: Tensor | None = None
    seen: Tensor | None = None
    top_ks: Tensor | None = None
    top_ps: Tensor | None = None
    min_ps: Tensor | None = None

    def at(self, rows: Tensor) -> Filters:
        """Copies of those of `rows`, int64 [any number], each any number of times."""
        optional = self.penalties, self.seen, self.top_ks, self.top_ps, self.min_ps
        penalties, seen, top_ks, top_ps, min_ps = (None if one is None else one[rows] for one in optional)
        return Filters(
            active=self.active[rows], penalties=penalties, seen=seen, top_ks=top_ks, top_ps=top_ps, min_ps=min_ps
        )


def sample_filtered_tokens(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, sample_ids: Tensor, positions: Tensor, filters: Filters
) -> tuple[Tensor, Tensor]:
    """`sample_tokens` from what the filters leave, with the log-probabilities that it would give without any.

    Shapes: as `sample_tokens`. A row of temperature 0 takes the first largest logit of what is left.
    """
    logits = logits.detach().float()
    divisors = torch.where(temperatures == 0, 1.0, temperatures).unsqueeze(1)
    left = penalize(logits, filters)
    left = left.masked_fill(~keep(left / divisors, filters), -torch.inf)
    tokens, logprobs = sample_tokens(left, temperatures, seeds, sample_ids, positions)
    unfiltered = (logits / divisors).log_softmax(dim=1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    return tokens, torch.where(filters.active, unfiltered, logprobs)


def penalize(logits: Tensor, filters: Filters) -> Tensor:
    """Positive logits of tokens that were seen, divided by the penalty, and negative ones times it.

    logits: float32 [rows, vocab], as is the result.
    """
    if filters.penalties is None or filters.seen is None:
        return logits
    penalties = filters.penalties.unsqueeze(1)
    penalized = torch.where(logits < 0, logits * penalties, logits / penalties)
    return torch.where(filters.seen[:, : logits.shape[1]], penalized, logits)


def keep(scaled: Tensor, filters: Filters) -> Tensor:
    """Which tokens may be drawn, bool [rows, vocab]; at least one in each row whose logits are numbers.

    scaled: penalized logits / temperature, float32 [rows, vocab].
    """
    kept = torch.ones_like(scaled, dtype=torch.bool)
    if filters.top_ks is not None:
        kept = _top_k(scaled, filters.top_ks)
    if filters.top_ps is None and filters.min_ps is None:
        return kept
    scaled = scaled.masked_fill(~kept, -torch.inf)
    odds = (scaled - scaled.amax(dim=1, keepdim=True)).exp_()  # of the most likely token exactly 1
    if filters.top_ps is not None:
        kept = kept & _top_p(scaled, odds, filters.top_ps)
    if filters.min_ps is not None:
        kept = kept & (odds >= filters.min_ps.unsqueeze(1))
    return kept


def _top_k(scaled: Tensor, top_ks: Tensor) -> Tensor:
    ks = top_ks.clamp(max=scaled.shape[1])
    largest = scaled.topk(int(ks.max()), dim=1).values
    return scaled >= largest.gather(1, ks.unsqueeze(1) - 1)


def _top_p(scaled: Tensor, odds: Tensor, top_ps: Tensor) -> Tensor:
    """Drop the least likely tokens as long as all that are dropped have no more than 1 - p of the probability."""
    mass = (odds * _UNIT).long()
    total = mass.sum(dim=1)
    # Below the total, so that the most likely token is kept however small p is.
    allowance = torch.minimum(((1 - top_ps) * total).floor().long(), total - 1)
    # Of tokens with no more than an equal share of the allowance all can be dropped: only the few others are sorted.
    candidates = mass > (allowance // mass.shape[1]).unsqueeze(1)
    rows, tokens = candidates.nonzero(as_tuple=True)
    counts = candidates.sum(dim=1)
    places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    shape = len(scaled), int(counts.max()) if len(rows) else 0
    values = scaled.new_full(shape, torch.inf)  # behind a row's candidates
    masses = mass.new_zeros(shape)
    values[rows, places], masses[rows, places] = scaled[rows, tokens], mass[rows, tokens]
    order = values.sort(dim=1, stable=True).indices
    below = total - masses.sum(dim=1)  # of what is dropped already
    dropped_so_far = masses.gather(1, order).cumsum(dim=1) + below.unsqueeze(1)
    is_kept = torch.empty(shape, dtype=torch.bool, device=scaled.device)
    is_kept.scatter_(1, order, dropped_so_far > allowance.unsqueeze(1))
    kept = (top_ps == 1).unsqueeze(1).expand_as(candidates).clone()  # there also what has no mass to speak of
    kept[rows, tokens] = is_kept[rows, places]
    return kept
