"""Micro-batches of an optimizer step dealt anew by what they cost, with every gradient what it was.

Where samples are padded to the longest of their micro-batch, they are dealt by length, which pads them least; where
they are packed, into micro-batches of about as many tokens. Which one a sample passes through then says nothing of what
its loss counts: a *share* tells that of the micro-batch it was drawn in, whose weight, samples and positions its terms
are weighted by. The sum over the step is the same, to the order of additions. Metrics are of the micro-batches that
were drawn: the head's output at every position is kept, and the loss is computed of it once more, without gradient.

That is exact for a loss that is a sum of terms of units of samples (a sample; a pair), each of which depends on its own
unit alone and is weighted by numbers of samples or positions: all of fuse's but one. GRPO's `top_entropy_quantile`
below 1 trains on tokens above a quantile of the micro-batch's entropies, which no sample knows alone: such
micro-batches stay as they were drawn. So do those of a step that is to have only one.

How many there are may then differ from how many were drawn. Never fewer: so none is larger than the micro-batches that
were drawn may be, and what a step holds in memory is within what these may take.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fuse.algorithms.algorithm import LossNormalization
from fuse.algorithms.batch import Experience
from fuse.micro_batch import Loss, Metric, Metrics, MicroBatch, RowWeights
from fuse.ops.logprob import token_logprobs
from fuse.training.balanced_groups import balanced_groups
from fuse.training.layout import Layout
from fuse.training.length_groups import length_groups
from fuse.training.rounds import Round, Share, StepPart, by_tokens, steps_of

_WHOLE = 4
"""Quarters of a group."""
_SAID = Metric("said")
"""Of a regrouped micro-batch in place of metrics: what its head said, [positions, 1 or 2]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dealing:
    """Into how many micro-batches the samples of an optimizer step are dealt; by default as many as were drawn.

    times: of the number that was drawn. at_least: micro-batches; replicas: and so many in each part of the step, for
    every replica is to have one. in_pieces: into pieces of several sizes, so that their operations show what the size
    of a micro-batch costs. packs: what one costs is its tokens, and nothing is padded.
    """

    times: float = 1.0
    at_least: int = 1
    replicas: int = 1
    in_pieces: bool = False
    packs: bool = False

    def groups(self, lengths: Sequence[Sequence[int]], number: int) -> list[tuple[int, ...]]:
        """So many groups of units of samples; lengths: of each unit's. Pieces of alike samples tell sizes best."""
        if self.packs and not self.in_pieces:
            return balanced_groups([sum(own) for own in lengths], number)
        return length_groups([max(own) for own in lengths], number)

    def number(self, drawn: int, units: int, parts: int = 1) -> int:
        """Micro-batches of a step that was drawn in `drawn` and has so many units, each of which stays whole."""
        return max(drawn, min(units, max(self.at_least, parts * self.replicas, round(self.times * drawn))))


def prepared(
    rounds: Sequence[Round],
    experience: Experience,
    *,
    loss_normalization: LossNormalization,
    units: Mapping[str, int],
    dealing: Dealing = Dealing(),
) -> Sequence[Round]:
    """The rounds as they are trained: weighted as `loss_normalization` has it, micro-batches dealt anew.

    units: as of `Algorithm`; empty where micro-batches are to stay as they were drawn.
    """
    if loss_normalization == "token":
        rounds = by_tokens(rounds, experience)
    return regrouped(rounds, experience, units, dealing)


def regrouped(
    rounds: Sequence[Round],
    experience: Experience,
    units: Mapping[str, int],
    dealing: Dealing = Dealing(),
) -> list[Round]:
    """The same with each optimizer step's samples dealt anew."""
    dealt = [dict(one.parts) for one in rounds]
    for role, unit in units.items():
        for of_step in steps_of(role, rounds):
            parts = [rounds[index].parts[role] for index in of_step]
            for index, part in zip(of_step, _regrouped_step(parts, experience, role, unit, dealing), strict=True):
                dealt[index][role] = part
    return [Round(parts) for parts in dealt]


def _regrouped_step(
    parts: Sequence[StepPart], experience: Experience, role: str, unit: int, dealing: Dealing
) -> list[StepPart]:
    drawn = drawn_shares(parts, experience, role)
    in_units = [drawn[start : start + unit] for start in range(0, len(drawn), unit)]
    number = dealing.number(sum(len(part.micro_batches) for part in parts), len(in_units), len(parts))
    if number == 1 and not dealing.in_pieces:
        return list(parts)
    return deal_out(parts, in_units, experience, number, dealing)


def drawn_shares(parts: Sequence[StepPart], experience: Experience, role: str) -> list[tuple[int, Share]]:
    """Samples of a step as they were drawn, in their order, each with what it counts."""
    counts = _num_positions(experience, role)
    drawn: list[tuple[int, Share]] = []
    for part in parts:
        for samples, weight in zip(part.micro_batches, part.weights, strict=True):
            share = Share(
                weight=weight, num_samples=len(samples), num_positions=sum(counts[sample] for sample in samples)
            )
            drawn += [(sample, replace(share, place=len(drawn) + row)) for row, sample in enumerate(samples)]
    return drawn


def deal_out(
    parts: Sequence[StepPart],
    in_units: Sequence[Sequence[tuple[int, Share]]],
    experience: Experience,
    number: int,
    dealing: Dealing = Dealing(),
) -> list[StepPart]:
    """The parts of a step with these units of samples in so many micro-batches, dealt by what they cost."""
    lengths = [[len(experience.prompts[one]) + experience.lengths[one] for one, _ in own] for own in in_units]
    groups = dealing.groups(lengths, number)
    made = []
    for first, part in enumerate(parts):  # groups are in order of size, so each part gets every so many
        own_groups = range(first, number, len(parts))
        micro_batches = [piece for group in own_groups for piece in _pieces(groups, group, dealing)]
        dealt = [[one for index in piece for one in in_units[index]] for piece in micro_batches]
        made.append(
            replace(
                part,
                micro_batches=tuple(tuple(sample for sample, _ in own) for own in dealt),
                weights=(1.0,) * len(dealt),
                shares=tuple(tuple(share for _, share in own) for own in dealt),
            )
        )
    return made


def _pieces(groups: Sequence[tuple[int, ...]], index: int, dealing: Dealing) -> Iterator[tuple[int, ...]]:
    """The group; or quarters and eighths of it in turn, which hold less while nothing is known of what is held.

    Of small groups, whose pieces are alike, every other one before the last stays whole.
    """
    group = groups[index]
    if not dealing.in_pieces or len(group) == 1 or (len(group) < _WHOLE and (len(groups) - 1 - index) % 2):
        yield group
        return
    quarter = max(len(group) // _WHOLE, min(2, len(group) - 1))
    sizes = itertools.cycle((quarter, max(1, quarter // 2)))
    while group:
        size = next(sizes)
        yield group[:size]
        group = group[size:]


def row_weights(experience: Experience, role: str, samples: Sequence[int], shares: Sequence[Share]) -> RowWeights:
    """Of a regrouped micro-batch of these samples."""
    of_role = _num_positions(experience, role)
    counts = torch.tensor([of_role[sample] for sample in samples])
    of_sum = torch.tensor([share.weight for share in shares])
    of_mean = torch.tensor([share.weight / max(1, share.num_positions) for share in shares])
    return RowWeights(
        of_sum=of_sum.repeat_interleave(counts),
        of_positions=of_mean.repeat_interleave(counts),
        of_samples=torch.tensor([share.weight / share.num_samples for share in shares]),
    )


class Remembering:
    """A loss that remembers of a regrouped micro-batch what the head said; of others it is the loss itself."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss

    def __call__(self, hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
        if micro_batch.row_weights is None:
            return self._loss(hidden, head, micro_batch)
        listening = _Listening(head)
        loss, _ = self._loss(hidden, listening, micro_batch)
        assert listening.said is not None
        return loss, {_SAID: listening.said}


def said(metrics: Metrics) -> Tensor | None:
    """What the head said of a regrouped micro-batch, [positions, 1 or 2]; None for one as it was drawn."""
    return metrics.get(_SAID)


def drawn_metrics(
    losses: Mapping[str, Loss],
    layout: Layout,
    experience: Experience,
    role: str,
    parts: Sequence[StepPart],
    said: Sequence[Tensor],
) -> list[Mapping[Metric, float]]:
    """Metrics of the micro-batches that a step's samples were drawn in, in their order.

    losses: by role. parts: of the step, regrouped. said: by micro-batch, in their order.
    """
    loss = losses[role]
    of_role = _num_positions(experience, role)
    samples = [sample for part in parts for own in part.micro_batches for sample in own]
    shares = [share for part in parts for own in part.shares for share in own]
    rows = torch.cat(list(said)).split([of_role[sample] for sample in samples])
    as_drawn = sorted(zip(shares, samples, rows, strict=True), key=lambda one: one[0].place)
    found: list[Mapping[Metric, float]] = []
    start = 0
    while start < len(as_drawn):
        share = as_drawn[start][0]
        own = as_drawn[start : start + share.num_samples]
        start += share.num_samples
        micro_batch = layout.micro_batches(experience, [sample for _, sample, _ in own], share.weight)[role]
        with torch.no_grad():
            _, metrics = loss(torch.cat([of_sample for _, _, of_sample in own]), _Repeating(), micro_batch)
        found.append({metric: float(value) for metric, value in metrics.items()})
    return found


def _num_positions(experience: Experience, role: str) -> list[int]:
    """Of every sample."""
    counts: list[int] = experience.segments.offsets(experience.targets[role].positions).diff().tolist()
    return counts


class _Listening(nn.Module):
    """A head that keeps what it says."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self._head = head
        self.said: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        values: Tensor = self._head(hidden)
        self.said = values.detach().float()
        return values

    def token_logprobs(
        self, hidden: Tensor, targets: Tensor, temperature: float, num_tokens: int | None
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy = token_logprobs(hidden, self._head, targets, temperature, num_tokens=num_tokens)
        self.said = torch.stack([logprobs.detach(), entropy.detach()], dim=1)
        return logprobs, entropy


class _Repeating(nn.Module):
    """A head that says what was kept, which it gets in place of hidden states."""

    def forward(self, said: Tensor) -> Tensor:
        return said

    def token_logprobs(
        self, said: Tensor, targets: Tensor, temperature: float, num_tokens: int | None
    ) -> tuple[Tensor, Tensor]:
        return said[:, 0], said[:, 1]
