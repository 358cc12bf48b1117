"""Two opposite replicas of a model on the same ranks, each of which fills the other's bubbles.

Beside a replica whose stage s is on rank s, another has stage s on rank N - 1 - s. Each trains on half of a step's
micro-batches, in one fused schedule, and their gradients are added up as those of any replicas are: of stage s on ranks
s and N - 1 - s, where N is odd of the middle stage on the one rank that holds it twice.

Source: Li and Hoefler, Chimera, SC 2021 (arXiv 2107.06925), section 3. Its schedule is replaced by a solved one, which
takes stages of unequal cost, any number of stages and any number of micro-batches; micro-batches are dealt in turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fuse.intrastage.cost_profile import Profile
from fuse.intrastage.placement import Replica


def with_opposites(placement: Sequence[Replica]) -> tuple[Replica, ...]:
    """Beside every replica one on the same ranks in the other direction; a pair's indices follow one another.

    Raises:
        ValueError: a replica is on one rank.
    """
    for replica in placement:
        if not _is_pipeline(replica):
            raise ValueError(f"a replica of the {replica.model} is on rank {replica.ranks[0]} alone: it has no bubbles")
    return tuple(
        replace(replica, index=2 * replica.index + number, ranks=replica.ranks[::order])
        for replica in placement
        for number, order in enumerate((1, -1))
    )


def without_opposites(placement: Sequence[Replica]) -> tuple[Replica, ...]:
    """The replicas that `with_opposites` was given; a placement without opposite ones stays as it is."""
    kept = _kept(placement)
    return tuple(replace(replica, index=index) for replica, index in kept.items())


def has_opposites(placement: Sequence[Replica]) -> bool:
    """Whether some replicas share their ranks with another of their model."""
    return len(_kept(placement)) < len(placement)


def can_have_opposites(placement: Sequence[Replica], num_micro_batches: int) -> bool:
    """Whether opposite replicas would have bubbles to fill, and each a micro-batch of an optimizer step."""
    return all(map(_is_pipeline, placement)) and num_micro_batches >= 2 * len(placement)


def plain_profile(profile: Profile, placement: Sequence[Replica]) -> Profile:
    """The costs of `without_opposites(placement)`, from those of `placement`."""
    names = {replica.name: replace(replica, index=index).name for replica, index in _kept(placement).items()}
    return Profile(
        tick_s=profile.tick_s,
        stages=tuple(replace(one, pipeline=names[one.pipeline]) for one in profile.stages if one.pipeline in names),
        transfers=tuple(
            replace(one, pipeline=names[one.pipeline]) for one in profile.transfers if one.pipeline in names
        ),
    )


@dataclass(frozen=True, slots=True)
class UpdateCosts:
    """Seconds of a parameter after a step's last micro-batch: in the optimizer, and to add its gradient to a peer's.

    Ranks that hold a parameter share its step, and give it to one another afterwards: half of what a sum moves.
    """

    step_s: float
    exchange_s: float

    def seconds(self, placement: Sequence[Replica], parameters: Mapping[str, Sequence[float]]) -> float:
        """What the optimizer step of placed models takes on the rank where it takes longest.

        parameters: that train, of every stage, by role.
        """
        by_rank: dict[int, float] = {}
        for replica in placement:
            holders = [other.ranks for other in placement if other.model == replica.model]
            for stage, rank in enumerate(replica.ranks):
                count = len({ranks[stage] for ranks in holders})
                each_s = self.step_s / count + self.exchange_s * 3 * (count - 1) / count
                by_rank[rank] = by_rank.get(rank, 0.0) + each_s * parameters[replica.model][stage]
        return max(by_rank.values())

    @classmethod
    def slowest(cls, measured: Iterable[UpdateCosts]) -> UpdateCosts:
        """Of all ranks: an exchange waits for the slower one, and a step ends with the last."""
        measured = list(measured)
        return cls(max(one.step_s for one in measured), max(one.exchange_s for one in measured))


def _kept(placement: Sequence[Replica]) -> dict[Replica, int]:
    """The first replica of each model on its ranks, and its index among these."""
    kept: dict[Replica, int] = {}
    seen: set[tuple[str, frozenset[int]]] = set()
    for replica in placement:
        key = replica.model, frozenset(replica.ranks)
        if key not in seen:
            kept[replica] = sum(model == replica.model for model, _ in seen)
            seen.add(key)
    return kept


def _is_pipeline(replica: Replica) -> bool:
    return len(set(replica.ranks)) > 1
