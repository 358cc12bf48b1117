"""Where the stages of trained models run: replicas of each model, their ranks, and the layers of every stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fuse.intrastage.layer_range import even_layer_range


@dataclass(frozen=True, slots=True)
class Replica:
    """One copy of a model, cut into stages: stage s runs on `ranks[s]`, with layers [start, stop) `layer_ranges[s]`.

    model: its role, such as "actor". index: of this copy among the model's.
    scores: of what runs forward alone, the model whose replica of this index needs it; see `forward_only`.

    A rank that repeats holds several stages (virtual stages). Without `layer_ranges` layers are spread evenly.
    """

    model: str
    index: int
    ranks: tuple[int, ...]
    layer_ranges: tuple[tuple[int, int], ...] | None = None
    scores: str | None = None

    @property
    def name(self) -> str:
        """What profiles and errors call this replica's pipeline."""
        return f"{self.model}.{self.index}"

    def ranges(self, num_layers: int) -> tuple[tuple[int, int], ...]:
        """The layers of every stage, of a model of so many."""
        count = len(self.ranks)
        return self.layer_ranges or tuple(even_layer_range(num_layers, stage, count) for stage in range(count))


def replica_from_json(value: Mapping[str, Any]) -> Replica:
    """Read back what `dataclasses.asdict` made of a replica.

    Raises: KeyError or TypeError for anything else.
    """
    ranges = value["layer_ranges"]
    return Replica(
        model=value["model"],
        index=value["index"],
        ranks=tuple(value["ranks"]),
        layer_ranges=None if ranges is None else tuple((start, stop) for start, stop in ranges),
    )


def place(role: str, num_ranks: int, num_stages: int, *, reverse: bool = False) -> tuple[Replica, ...]:
    """Tile the ranks with replicas of a role's model, each on `num_stages` consecutive ranks.

    With a multiple of `num_ranks` as stages there is one replica, which passes over all ranks several times. `reverse`
    puts stage 0 on the highest rank of each replica.

    Raises:
        ValueError: the ranks are no multiple of the stages, nor the stages of the ranks.
    """
    if num_ranks % num_stages and num_stages % num_ranks:
        raise ValueError(
            f"{role}_stages={num_stages} neither divides the {num_ranks} pipeline ranks nor is a multiple of them: "
            f"choose a divisor, for data parallelism over the quotient, or a multiple, for several stages on each"
        )
    order = -1 if reverse else 1
    span = min(num_stages, num_ranks)
    return tuple(
        Replica(role, index, tuple(range(index * span, (index + 1) * span))[::order] * (num_stages // span))
        for index in range(num_ranks // span)
    )


def most_replicas(placement: Sequence[Replica]) -> int:
    """How many replicas the model has that has most."""
    return 1 + max(replica.index for replica in placement)


def share_ranks(placement: Sequence[Replica]) -> bool:
    """Whether several replicas, of one model or of several, are on some rank of a world of more than one."""
    held = [rank for replica in placement for rank in set(replica.ranks)]
    return len(set(held)) > 1 and len(set(held)) < len(held)


Counts = int | tuple[tuple[str, int], ...]
"""Micro-batches of every model; or of each model that trains, which then need not be all."""


def num_micro_batches(counts: Counts, model: str) -> int:
    """Of one model; 0 where it does not train."""
    return counts if isinstance(counts, int) else dict(counts).get(model, 0)


def replicas_of(replicas: Sequence[Replica], counts: Counts) -> tuple[Replica, ...]:
    """Those of the models that have micro-batches."""
    return tuple(replica for replica in replicas if num_micro_batches(counts, replica.model))


def describe(counts: Counts) -> str:
    """For people: `4 micro-batches`, or `2 micro-batches of actor, 4 of critic`."""
    if isinstance(counts, int) or not counts:
        return f"{counts or 0} micro-batches"
    (model, count), *others = counts
    return ", ".join([f"{count} micro-batches of {model}", *(f"{one} of {other}" for other, one in others)])


def replica_micro_batches(num_micro_batches: int, num_replicas: int, index: int) -> range:
    """The micro-batches that replica `index` trains on: every num_replicas-th."""
    return range(index, num_micro_batches, num_replicas)


def one_of_alike(replicas: Sequence[Replica], counts: Counts) -> tuple[tuple[Replica, ...], Counts]:
    """The replicas that share ranks with the first one, directly or through others, and what they have of `counts`.

    That is where all others are in groups of the same form, and this one takes longest: it is dealt the most
    micro-batches. Else all replicas, as they are.
    """
    groups: list[tuple[set[int], list[Replica]]] = []
    for replica in replicas:
        meeting = [group for group in groups if group[0] & set(replica.ranks)]
        ranks = set(replica.ranks).union(*(own for own, _ in meeting))
        members = [*(one for _, own in meeting for one in own), replica]
        groups = [group for group in groups if group not in meeting] + [(ranks, members)]
    forms = {tuple((one.model, tuple(r - min(ranks) for r in one.ranks)) for one in own) for ranks, own in groups}
    if len(groups) < 2 or len(forms) > 1:
        return tuple(replicas), counts
    ranks, members = groups[0]
    first: list[Replica] = []
    dealt: dict[str, int] = {}
    for one in members:
        index = sum(other.model == one.model for other in first)
        first.append(Replica(one.model, index, tuple(r - min(ranks) for r in one.ranks), one.layer_ranges))
        num_replicas = sum(other.model == one.model for other in replicas)
        own = replica_micro_batches(num_micro_batches(counts, one.model), num_replicas, one.index)
        dealt[one.model] = dealt.get(one.model, 0) + len(own)
    return tuple(first), tuple(dealt.items())
