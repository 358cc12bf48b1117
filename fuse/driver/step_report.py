"""What an optimizer step says, from what its ranks say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fuse.intrastage.placement import Replica, replica_micro_batches
from fuse.micro_batch import Metric
from fuse.training.steps import RankStep, StepReport


def step_report(
    num_micro_batches: int, by_rank: Sequence[RankStep], placement: Sequence[Replica], roles: Iterable[str]
) -> StepReport:
    """One row of metrics per micro-batch: a replica's last rank has those of the replica's micro-batches.

    roles: of the models that train.
    """
    merged: list[dict[Metric, float]] = [{} for _ in range(num_micro_batches)]
    for replica in placement:
        num_replicas = sum(other.model == replica.model for other in placement)
        indices = replica_micro_batches(num_micro_batches, num_replicas, replica.index)
        for index, row in zip(indices, by_rank[replica.ranks[-1]].metrics[replica.model], strict=True):
            merged[index] |= row
    norms = {role: max(of_rank.gradient_norms[role] for of_rank in by_rank) for role in roles}
    return StepReport(metrics=merged, gradient_norms=norms)
