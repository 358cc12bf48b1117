"""Who trains what while the last samples are generated: a pure policy, which the simulator and the live driver ask.

A replica of the model that trains is free when all its devices are: no sample is generated or scored there, and none is
about to be. It then gets a few micro-batches of samples that may be trained already, and is asked again when they are
done: what comes up meanwhile, a sample to be scored or to move there, waits for no more than these.

Scoring comes first, for a rollout ends with its last score. Devices train only in the time that they have to spare:
from when all that is to be scored would be, if all devices shared it, to the expected end of the last sample. Where the
policy that moves samples does not know costs, that is while samples are live: what it has left unscored can wait.

Long samples go first: they are most of the work. The shortest that are ready are kept for the rest of the step, which
needs some. Where there is not enough for all free replicas, micro-batches are smaller, so that each has some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fuse.interstage.migration import Policy, RolloutState

_CAUTION = 0.5
"""A piece may take this part of the time to spare: when samples end is not certain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TailSettings:
    """Of one optimizer step.

    micro_batch_size: samples of a micro-batch, at most. num_stages: of a replica, which gets as many micro-batches at
    once. num_kept: samples of the step that are to be left for when all are known.
    """

    micro_batch_size: int
    num_stages: int = 1
    num_kept: int = 1


@dataclass(frozen=True, slots=True)
class Train:
    """Have a replica train micro-batches of these samples."""

    replica: int
    micro_batches: tuple[tuple[int, ...], ...]


def spare_s(policy: Policy, state: RolloutState) -> float:
    """Seconds that devices have to spare for training, by what the policy expects of the rollout."""
    if not len(state.live):
        return 0.0
    expected: Callable[[RolloutState], float] | None = getattr(policy, "spare_s", None)
    if expected is not None:
        return expected(state)
    return math.inf


def train_early(
    ready: Sequence[int],
    tokens: NDArray[np.int64],
    free: Sequence[int],
    settings: TailSettings,
    *,
    token_s: float | None = None,
    within_s: float = math.inf,
) -> list[Train]:
    """What free replicas are to train now.

    ready: samples of the step that may be trained. tokens: of every sample of the rollout, by which these are numbered,
    with the prompt. free: replicas. token_s: that a replica takes for a token; None before it is known, when each gets
    as little as shows it. within_s: see `spare_s`.
    """
    if not free or not within_s > 0:
        return []
    size = settings.micro_batch_size
    micro_batches_each = settings.num_stages if token_s is not None else 1
    room = math.inf if not token_s else _CAUTION * within_s / token_s  # tokens of a piece
    longest_first = sorted(ready, key=lambda one: (-int(tokens[one]), one))
    pieces: list[list[int]] = [[] for _ in free]
    held = [0] * len(free)
    for sample in longest_first[: max(0, len(longest_first) - settings.num_kept)]:
        place = min(range(len(free)), key=lambda index: (held[index], index))
        if len(pieces[place]) < micro_batches_each * size and held[place] + tokens[sample] <= room:
            pieces[place].append(sample)
            held[place] += int(tokens[sample])
    return [
        Train(replica, _cut(piece, settings.num_stages, size))
        for replica, piece in zip(free, pieces, strict=True)
        if piece
    ]


def _cut(piece: Sequence[int], num_stages: int, size: int) -> tuple[tuple[int, ...], ...]:
    """In as many micro-batches as there are stages, or as hold it, of neighbours in length."""
    count = max(min(len(piece), num_stages), -(-len(piece) // size))
    return tuple(tuple(own.tolist()) for own in np.array_split(np.array(piece), count))
