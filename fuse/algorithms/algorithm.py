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


MeanOver = Literal["samples", "micro_batch", "step", "rollout"]
"""What the means of a loss are over, as far as that has to be known before a sample's part of it is.

Numbers of samples alone; the positions of the micro-batch that the sample was drawn in; those of the whole optimizer
step; or the tokens of the whole rollout, by the `batch_weights` of the targets.
"""

PROVISIONAL_TOKENS = 1 << 12
"""In place of a step's or a rollout's, until all are known; a power of two, by which nothing is rounded."""

LEAST_TOKENS = 2
"""Of responses that anything can be estimated of: advantages are whitened, whoever needs them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Early:
    """What can be trained before all samples of an update are scored: samples of the first optimizer step of one role.

    estimate: (scored samples, width) -> what they are trained on; pure, and the same as of all samples of the update:
        of any scored ones with LEAST_TOKENS together, in their order, or of any whole groups with `by_group`. width: a
        lower bound of the batch's.
    mean_over: of the role's loss. With "rollout", `estimate` takes it that there are PROVISIONAL_TOKENS.
    needs_longer: whether the batch must be known to be wider than a sample's response, or as wide as it can be.
    rollout_size: samples of a rollout, of several in an update; None where there is one.
    """

    role: str
    estimate: Callable[[Sequence[Sample], int], Experience]
    mean_over: MeanOver
    by_group: bool = False
    needs_longer: bool = False
    rollout_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """What a run trains for.

    estimate: called once per update, on all of its samples. losses: by role that trains; pure, and pickled to workers.
    targets: what each of these compares with.
    loss_normalization: "token" for losses that are means over a micro-batch's positions.
    units: by role, how many samples side by side are one term of its loss, where that can be regrouped; see
        `fuse.training.regrouping`.
    late: columns of the actor's targets that its loss alone reads; see `fuse.training.late_scores`.
    early: what can be trained before all samples are scored; None for nothing.
    """

    estimate: Estimate
    losses: Mapping[str, Loss]
    targets: Mapping[str, type[Targets]]
    loss_normalization: LossNormalization = "micro_batch"
    units: Mapping[str, int] = field(default_factory=dict)
    late: frozenset[str] = frozenset()
    early: Early | None = None
