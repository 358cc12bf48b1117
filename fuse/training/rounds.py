"""What trains at once: the optimizer steps of all roles side by side, a round of them by one schedule.

Each role takes its own steps, of its own micro-batches, in its own order, and roles share no parameters: rounds say
when a role trains, and never what. Weights are those of training one role after the other, but for the order in which
replicas add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from fuse.algorithms.batch import Experience
from fuse.intrastage.placement import Counts, Replica
from fuse.micro_batch import Metric
from fuse.tensor_pickle import arrived_rows, sent_rows
from fuse.training.auxiliary import TextBatch
from fuse.training.steps import OptimizerStep, StepReport

_Row = TypeVar("_Row")

ScoredSamples = tuple[tuple[int, ...], Tensor]
"""Sample indices, and values at all of their positions, end to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a sample of a regrouped micro-batch counts: of the one it was drawn in, the loss's weight, and its sizes.

    place: of the sample among the step's, as they were drawn.
    """

    weight: float
    num_samples: int
    num_positions: int
    place: int = 0

    def __reduce__(self) -> tuple[Callable[..., Share], tuple[float, int, int, int]]:
        """Every sample of every epoch has one: as frozen dataclasses travel by themselves, four times as slowly."""
        return _share, (self.weight, self.num_samples, self.num_positions, self.place)


def _share(weight: float, num_samples: int, num_positions: int, place: int) -> Share:
    return Share(weight=weight, num_samples=num_samples, num_positions=num_positions, place=place)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPart:
    """Micro-batches of an optimizer step, in its order.

    micro_batches: sample indices of each. weights: of each one's loss. is_last: the optimizer steps after them.
    shares: of each one's samples where they are regrouped, see `fuse.training.regrouping`; else none.
    auxiliary: micro-batches of text, after those of samples; see `fuse.training.auxiliary`.
    """

    micro_batches: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...]
    is_last: bool
    shares: tuple[tuple[Share, ...], ...] = ()
    auxiliary: tuple[TextBatch, ...] = ()

    @property
    def num_micro_batches(self) -> int:
        """Of samples and of text."""
        return len(self.micro_batches) + len(self.auxiliary)


@dataclass(frozen=True, slots=True)
class Round:
    """What trains at once, by one schedule. parts: by role; a role that is not there waits.

    scored: by what is scored beside it, sample indices of each micro-batch; see `fuse.training.late_scores`.
    """

    parts: Mapping[str, StepPart]
    scored: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)

    @property
    def counts(self) -> tuple[tuple[str, int], ...]:
        trained = ((role, part.num_micro_batches) for role, part in self.parts.items())
        return (*trained, *((name, len(micro_batches)) for name, micro_batches in self.scored.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRound:
    """What one rank tells of a round, by role.

    metrics: of the micro-batches whose loss was computed there, in their order. gradient_norms: before clipping, of
    the roles that stepped. said: of regrouped micro-batches, in place of metrics, what the head said. scored: by what
    was scored here beside them, samples and their values. auxiliary: metrics of micro-batches of text.
    """

    metrics: Mapping[str, Sequence[Mapping[Metric, float]]]
    gradient_norms: Mapping[str, float]
    said: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    scored: Mapping[str, Sequence[ScoredSamples]] = field(default_factory=dict)
    auxiliary: Mapping[str, Sequence[Mapping[Metric, float]]] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Callable[..., RankRound], tuple[object, ...]]:
        said = {role: sent_rows(own) for role, own in self.said.items() if own}
        return _rank_round, (self.metrics, self.gradient_norms, said, self.scored, self.auxiliary)


def _rank_round(metrics: Any, gradient_norms: Any, said: Any, scored: Any, auxiliary: Any) -> RankRound:
    return RankRound(
        metrics=metrics,
        gradient_norms=gradient_norms,
        said={role: arrived_rows(*own) for role, own in said.items()},
        scored=scored,
        auxiliary=auxiliary,
    )


def rounds(
    steps: Mapping[str, Sequence[OptimizerStep]], num_replicas: Mapping[str, int], *, is_fused: bool
) -> list[Round]:
    """As many rounds as the role with most steps takes, which has one in each.

    Fused, the steps of other roles are spread evenly over the rounds, and the micro-batches of each over the rounds
    that fall to it, so that there are some to fill bubbles with everywhere; every one of the role's replicas has one.
    Without fusion a step is whole, for its pipeline would drain at the end of every part.

    steps: by role, in its order; a role without any does not train.
    """
    num_rounds = max(map(len, steps.values()))
    parts: list[dict[str, StepPart]] = [{} for _ in range(num_rounds)]
    for role, of_role in steps.items():
        places = np.array_split(np.arange(num_rounds), max(1, len(of_role)))
        for index, step in enumerate(of_role):
            first, count = (int(places[index][0]), len(places[index])) if is_fused else (index, 1)
            for offset, part in enumerate(_parts(step, count, num_replicas[role])):
                parts[first + offset][role] = part
    return [Round(of_round) for of_round in parts]


def _parts(step: OptimizerStep, most: int, num_replicas: int) -> list[StepPart]:
    """At most so many, as even as can be, with a micro-batch for each replica."""
    micro_batches = step.micro_batches
    count = max(1, min(most, len(micro_batches) // num_replicas))
    of_samples, of_text = (
        np.array_split(np.arange(len(all_of_step)), count) for all_of_step in (micro_batches, step.auxiliary)
    )
    return [
        StepPart(
            micro_batches=tuple(micro_batches[index] for index in indices),
            weights=(step.weight,) * len(indices),
            is_last=number == count - 1,
            auxiliary=tuple(step.auxiliary[index] for index in texts),
        )
        for number, (indices, texts) in enumerate(zip(of_samples, of_text, strict=True))
    ]


def by_tokens(rounds: Sequence[Round], experience: Experience) -> list[Round]:
    """The same with weights by which all positions of an optimizer step count the same, whatever micro-batch has them.

    Losses of micro-batches are means over the positions that their role has in the experience: tokens, or values.
    """
    weighted = [dict(one.parts) for one in rounds]
    for role, targets in experience.targets.items():
        counts = experience.segments.offsets(targets.positions).diff().tolist()
        for of_step in steps_of(role, rounds):
            sizes = [
                [sum(counts[sample] for sample in samples) for samples in rounds[index].parts[role].micro_batches]
                for index in of_step
            ]
            total = max(1, sum(map(sum, sizes)))  # none where all responses are empty
            for index, of_part in zip(of_step, sizes, strict=True):
                weights = tuple(size / total for size in of_part)
                weighted[index][role] = replace(rounds[index].parts[role], weights=weights)
    return [Round(parts) for parts in weighted]


def unfused_counts(rounds: Sequence[Round]) -> list[Counts]:
    """Micro-batches in the rounds of the same steps without fusion."""
    sizes = {
        role: [sum(rounds[index].parts[role].num_micro_batches for index in step) for step in steps_of(role, rounds)]
        for role in roles_of(rounds)
    }
    for name in dict.fromkeys(name for one in rounds for name in one.scored):
        sizes[name] = [len(one.scored.get(name, ())) for one in rounds]
    by_round = zip_longest(*sizes.values(), fillvalue=0)
    return [tuple((role, count) for role, count in zip(sizes, row, strict=True) if count) for row in by_round]


DrawnMetrics = Callable[[str, Sequence[StepPart], Sequence[Tensor]], Sequence[Mapping[Metric, float]]]
"""(role, a step's parts, what the head said by micro-batch) -> metrics of the micro-batches that were drawn."""


def step_reports(
    rounds: Sequence[Round],
    by_rank: Sequence[Sequence[RankRound]],
    placement: Sequence[Replica],
    drawn_metrics: DrawnMetrics | None = None,
) -> dict[str, list[StepReport]]:
    """What every optimizer step of each role gave. by_rank: [ranks][rounds]; a replica's last rank has its metrics.

    drawn_metrics: for steps whose micro-batches are regrouped.
    """
    reports: dict[str, list[StepReport]] = {}
    for role in roles_of(rounds):
        replicas = [replica for replica in placement if replica.model == role]
        for of_step in steps_of(role, rounds):
            parts = [rounds[index].parts[role] for index in of_step]
            of_ranks = [[by_rank[replica.ranks[-1]][index] for replica in replicas] for index in of_step]
            if parts[0].shares:
                assert drawn_metrics is not None
                rows = drawn_metrics(role, parts, _in_turn([[one.said[role] for one in ranks] for ranks in of_ranks]))
            else:
                rows = _in_turn([[one.metrics[role] for one in ranks] for ranks in of_ranks])
            norm = max(of_rank[of_step[-1]].gradient_norms[role] for of_rank in by_rank)
            texts = [row for ranks in of_ranks for one in ranks for row in one.auxiliary.get(role, ())]
            reports.setdefault(role, []).append(StepReport(metrics=rows, gradient_norm=norm, auxiliary=texts))
    return reports


def _in_turn(of_rounds: Sequence[Sequence[Sequence[_Row]]]) -> list[_Row]:
    """[rounds][replicas][micro-batches] -> [micro-batches] of a step, as `replica_micro_batches` deals them out."""
    turns = [turn for of_replicas in of_rounds for turn in zip_longest(*of_replicas)]
    return [row for turn in turns for row in turn if row is not None]


def roles_of(rounds: Sequence[Round]) -> list[str]:
    """Those that train in any of them."""
    return list(dict.fromkeys(role for one in rounds for role in one.parts))


def steps_of(role: str, rounds: Sequence[Round]) -> list[list[int]]:
    """The rounds that each of the role's steps takes."""
    steps: list[list[int]] = [[]]
    for index, one in enumerate(rounds):
        if role in one.parts:
            steps[-1].append(index)
            if one.parts[role].is_last:
                steps.append([])
    assert not steps[-1], f"a step of {role} has no end"
    return steps[:-1]
