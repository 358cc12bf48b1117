"""Who trains what while the last samples are generated: a pure policy, which the simulator and the live driver ask.

A replica of the model that trains, be it one device or a pipeline over several, is free when all its devices are: no
sample is generated or scored there, and none is about to be. It then gets a few micro-batches of samples that may be
trained already, and is asked again when they are done: what comes up meanwhile, a sample to be scored or to move there,
waits for no more than these. `few_pipelines.py` has pipelines come free as wholes.

A pipeline over all devices is never free. Where none is, a replica may train while some of its devices decode a few
samples, if that pays by what is known of how the two slow each other down: see `Sharing`.

Scoring comes first, for a rollout ends with its last score. Devices train only in the time that they have to spare:
from when all that is to be scored would be, if all devices shared it, to the expected end of the last sample. Where the
policy that moves samples does not know costs, that is while samples are live: what it has left unscored can wait.

Long samples go first: they are most of the work. The shortest that are ready are kept for the rest of the step, which
needs some. Where there is not enough for all free replicas, micro-batches are smaller, so that each has some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fuse.interstage.migration import Policy, RolloutState

_CAUTION = 0.5
"""A piece may take this part of the time to spare: when samples end is not certain. A pipeline's piece half of that."""

_MOST_LOST = 0.7
"""Of what a piece beside samples takes off the training to come, its delay of these may be this part."""
_PASSES = 2
"""A pipeline's piece is cut into so many micro-batches for each stage, as far as its longest sample allows."""

MOST_BESIDE = 4
"""Samples of a device beside which it may train: with more, decoding needs more of the device than was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """How many times as long each takes when a device decodes and trains at once.

    num_samples: that it decodes, at most: of more nothing is known.

    Raises:
        ValueError: a factor is below one.
    """

    decoding: float
    training: float
    num_samples: int = MOST_BESIDE

    def __post_init__(self) -> None:
        for name in ("decoding", "training"):
            if not 1 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} beside the other takes {getattr(self, name)} times as long: it must be >= 1")

    def pays(self, num_replicas: int, fill: float = 1.0) -> bool:
        """Whether a piece takes more off the training to come than it delays the samples, which may be the last ones.

        A second of it alone would later take all replicas `fill` / num_replicas of a second: the whole step fills a
        pipeline, of which this piece fills a part. Beside decoding it takes `training` seconds, of which decoding loses
        what it does not get done; and the devices may soon be free.
        """
        return self.training * (1 - 1 / self.decoding) < _MOST_LOST * fill / num_replicas


ONE_CORE = Sharing(decoding=2.0, training=2.0)
"""Of a CPU core, whose time is split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TailSettings:
    """Of one optimizer step.

    micro_batch_size: samples of a micro-batch, at most. num_stages: of a replica, which gets as many micro-batches at
    once. num_kept: samples of the step that are to be left for when all are known. num_replicas: that train, on devices
    of their own. sharing: None where nothing is known of it, and no device trains while it decodes.
    """

    micro_batch_size: int
    num_stages: int = 1
    num_kept: int = 1
    num_replicas: int = 1
    sharing: Sharing | None = None

    def takers(self, decoding: Mapping[int, int]) -> dict[int, float]:
        """Replicas that may train now, and how many times as long each takes as alone.

        decoding: by replica whose devices do nothing else, the samples that one of them decodes at most.
        """
        if free := [replica for replica, count in decoding.items() if not count]:
            return dict.fromkeys(free, 1.0)
        sharing = self.sharing
        if sharing is None or not sharing.pays(self.num_replicas):
            return {}
        return {replica: sharing.training for replica, count in decoding.items() if count <= sharing.num_samples}


@dataclass(frozen=True, slots=True)
class Train:
    """Have a replica train micro-batches of these samples; factor: as of `TailSettings.takers`."""

    replica: int
    micro_batches: tuple[tuple[int, ...], ...]
    factor: float = 1.0


def time_tokens(sizes: Sequence[int], num_stages: int) -> int:
    """Tokens that a stage could compute for while a pipeline takes micro-batches of so many, waits included."""
    return sum(sizes) + (num_stages - 1) * max(sizes)


def micro_batch_tokens(micro_batches: Iterable[Sequence[int]], tokens: NDArray[np.int64]) -> list[int]:
    """Of each. tokens: of every sample, by which these are numbered."""
    return [int(tokens[list(own)].sum()) for own in micro_batches]


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
    takers: Mapping[int, float],
    settings: TailSettings,
    *,
    token_s: float | None = None,
    within_s: float = math.inf,
) -> list[Train]:
    """What replicas that may are to train now.

    ready: samples of the step that may be trained. tokens: of every sample of the rollout, by which these are numbered,
    with the prompt. takers: as of `TailSettings`. token_s: that a stage takes for a token, alone; None before it is
    known, when each gets as little as shows it. within_s: see `spare_s`.
    """
    if not takers or not within_s > 0:
        return []
    size, num_stages = settings.micro_batch_size, settings.num_stages
    factor = max(takers.values())
    count = 1 if num_stages == 1 else _PASSES * num_stages
    num_samples = size  # of a piece
    if token_s is not None:  # beside samples, small pieces that fill no pipeline do not pay
        num_samples *= num_stages if factor == 1 else count
    room = math.inf  # for the `time_tokens` of a piece
    if token_s:
        holds_many = num_stages > 1 and factor == 1
        room = _CAUTION * within_s / (2 if holds_many else 1) / token_s / factor

    def fits(piece: Sequence[int]) -> bool:
        if tokens[list(piece)].sum() > room:
            return False
        return time_tokens(micro_batch_tokens(_cut(piece, tokens, size, count), tokens), num_stages) <= room

    longest_first = sorted(ready, key=lambda one: (-int(tokens[one]), one))
    pieces: list[list[int]] = [[] for _ in takers]
    held = [0] * len(takers)
    for sample in longest_first[: max(0, len(longest_first) - settings.num_kept)]:
        place = min(range(len(takers)), key=lambda index: (held[index], index))
        if len(pieces[place]) < num_samples and fits([*pieces[place], sample]):
            pieces[place].append(sample)
            held[place] += int(tokens[sample])
    chosen = [
        Train(replica, _cut(piece, tokens, size, count), slower)
        for (replica, slower), piece in zip(takers.items(), pieces, strict=True)
        if piece
    ]
    return [one for one in chosen if token_s is None or _pays(one, tokens, settings)]


def _pays(action: Train, tokens: NDArray[np.int64], settings: TailSettings) -> bool:
    """Whether a piece fills its pipeline well enough, where its devices decode beside it."""
    if action.factor == 1:
        return True
    sizes = micro_batch_tokens(action.micro_batches, tokens)
    assert settings.sharing is not None
    return settings.sharing.pays(settings.num_replicas, sum(sizes) / time_tokens(sizes, settings.num_stages))


def _cut(piece: Sequence[int], tokens: NDArray[np.int64], size: int, count: int) -> tuple[tuple[int, ...], ...]:
    """In micro-batches of neighbours in length: about `count`, even in tokens as far as the longest sample allows."""
    most = max(int(tokens[piece[0]]), -(-int(tokens[list(piece)].sum()) // count))
    cut: list[list[int]] = []
    held = 0
    for sample in piece:
        if not cut or len(cut[-1]) == size or held + tokens[sample] > most:
            cut.append([])
            held = 0
        cut[-1].append(sample)
        held += int(tokens[sample])
    return tuple(map(tuple, cut))
