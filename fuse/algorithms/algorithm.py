"""What an algorithm is: the models it needs, and pure functions from samples to experience and from there to losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fuse.algorithms.batch import Experience, Targets
from fuse.micro_batch import Loss
from fuse.sample import Sample

Estimate = Callable[[Sequence[Sample]], tuple[Experience, dict[str, float]]]
"""Scored samples -> what is trained on, and what is reported of the rollout."""

LossNormalization = Literal["micro_batch", "token"]
"""What counts the same in an optimizer step: each micro-batch, or each position, tokens or values, of all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """What a run trains for.

    estimate: called once per update, on all of its samples. losses: by role that trains; pure, and pickled to workers.
    targets: what each of these compares with.
    loss_normalization: "token" for losses that are means over a micro-batch's positions.
    units: by role, how many samples side by side are one term of its loss, where that can be regrouped; see
        `fuse.training.regrouping`.
    late: columns of the actor's targets that its loss alone reads; see `fuse.training.late_scores`.
    """

    estimate: Estimate
    losses: Mapping[str, Loss]
    targets: Mapping[str, type[Targets]]
    loss_normalization: LossNormalization = "micro_batch"
    units: Mapping[str, int] = field(default_factory=dict)
    late: frozenset[str] = frozenset()
