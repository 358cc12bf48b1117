"""Cuts models into stages so that the fullest device holds as little as can be, where even cuts do not fit.

An embedding or a head of a large vocabulary takes as much as several layers, and opposite directions put one model's
head beside the other's embedding; early stages have most micro-batches under way. Even cuts give such devices their
full share of layers besides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from fuse.driver.memory_setup import MemorySetup
from fuse.intrastage.placement import Replica, num_micro_batches

_Counts = Mapping[str, tuple[int, ...]]
"""Layers of every stage, by model."""


def cut_by_size(setup: MemorySetup) -> tuple[Replica, ...]:
    """The placement with such cuts, or as it is where even ones are. Every stage keeps a layer.

    From even cuts on, a layer at a time leaves a stage on the fullest device for another of its model, wherever that
    makes the fullest emptiest, and among equals all devices most alike. It may end in a local minimum.
    """
    even: _Counts = {replica.model: _even(setup, replica) for replica in setup.placement}
    counts, held = even, _held(setup, even)
    while True:
        fullest = held.index(max(held))
        tried = ((one, _held(setup, one)) for one in _moved(setup.placement, counts, fullest))
        found = min(tried, key=lambda pair: _fullness(pair[1]), default=None)
        if found is None or _fullness(found[1]) >= _fullness(held):
            break
        counts, held = found
    if counts == even:
        return setup.placement
    return tuple(replace(replica, layer_ranges=_ranges(counts[replica.model])) for replica in setup.placement)


def _fullness(held: Sequence[int]) -> tuple[int, int]:
    return max(held), sum(one * one for one in held)


def _held(setup: MemorySetup, counts: _Counts) -> list[int]:
    """Bytes on each rank: training states, and what micro-batches under way by 1F1B hold."""
    held = [0] * (1 + max(rank for replica in setup.placement for rank in replica.ranks))
    num_replicas = Counter(replica.model for replica in setup.placement)
    for replica in setup.placement:
        model, num_stages = setup.models[replica.model], len(replica.ranks)
        most = -(-num_micro_batches(setup.num_micro_batches, replica.model) // num_replicas[replica.model])
        for stage, (start, stop) in enumerate(_ranges(counts[replica.model])):
            ends = {"is_first": stage == 0, "is_last": stage == num_stages - 1}
            num_parameters = model.size.stage(stage, num_stages, (0, 0)) + sum(model.size.layers[start:stop])
            activations = model.bytes.stage(setup.longest, stop - start, **ends).held
            # Of what trains: itself, its gradient and AdamW's two moments, in float32.
            trained = round(model.size.trained * num_parameters)
            state = 12 * trained + model.weight_bytes(num_parameters, trained, setup.autocast)
            held[replica.ranks[stage]] += state + min(most, num_stages - stage) * activations
    return held


def _moved(placement: Sequence[Replica], counts: _Counts, rank: int) -> Iterator[_Counts]:
    """All cuts in which a stage on the rank has given a layer away."""
    for replica in placement:
        own = counts[replica.model]
        for giver in (stage for stage, owner in enumerate(replica.ranks) if owner == rank and own[stage] > 1):
            for taker in (stage for stage in range(len(own)) if stage != giver):
                moved = [count - (stage == giver) + (stage == taker) for stage, count in enumerate(own)]
                yield {**counts, replica.model: tuple(moved)}


def _even(setup: MemorySetup, replica: Replica) -> tuple[int, ...]:
    bare = replace(replica, layer_ranges=None)
    return tuple(stop - start for start, stop in bare.ranges(len(setup.models[replica.model].size.layers)))


def _ranges(counts: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(pairwise(accumulate(counts, initial=0)))
