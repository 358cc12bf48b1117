"""The first optimizer step of a role, some samples of which are trained before all samples of the update are scored.

Which samples a step has is known before they are generated. What one of them adds to the gradient depends on what is
known of it and of a few others: its group, where advantages are of groups; the micro-batch that it was drawn in, where
the loss is a mean over that one's positions. Once these are known the sample may be trained, in a micro-batch with
others that may, each with its own `Share` of the loss. Where the loss is a mean over all positions of the step, or of
the rollout, what was trained early is scaled when their number is known. The rest is dealt into micro-batches when all
is known, and the optimizer steps after that: its gradient is the same sum, to the order of additions.

A step keeps account of its samples: each is trained once, early or with the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from fuse.algorithms.algorithm import PROVISIONAL_TOKENS, Early
from fuse.algorithms.batch import Experience
from fuse.sample import Sample
from fuse.training.micro_batches import rows_of_samples
from fuse.training.regrouping import Dealing, deal_out, drawn_shares
from fuse.training.rounds import Round, Share, StepPart, by_tokens, steps_of

_KNOWN_LATER = "batch_weights"
_RELATIVE, _ABSOLUTE = 1e-4, 1e-5
"""Within which what a sample is trained on must be what the whole update has of it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EarlyPiece:
    """Micro-batches that a replica trains early.

    micro_batches: indices of the update's samples. experience, part: what workers are given of it, whose samples are
    those `samples` of the update, in this order.
    """

    replica: int
    micro_batches: tuple[tuple[int, ...], ...]
    samples: tuple[int, ...]
    experience: Experience
    part: StepPart


class FirstStep:
    """What of it may be trained, what has been, and what is left.

    parts: the step as it was drawn. groups: by sample of the update, all samples of its group.
    """

    def __init__(self, early: Early, parts: Sequence[StepPart], groups: Sequence[Sequence[int]]) -> None:
        self.early = early
        self.pieces: list[EarlyPiece] = []
        self._parts = tuple(parts)
        self._shares: dict[int, Share] = {}
        self._drawn_in: dict[int, tuple[int, ...]] = {}
        self._needs: dict[int, frozenset[int]] = {}
        for part in parts:
            for samples, weight in zip(part.micro_batches, part.weights, strict=True):
                share = Share(weight=weight, num_samples=len(samples), num_positions=1)
                for sample in samples:
                    assert sample not in self._needs, f"sample {sample} is twice in a step"
                    together = samples if early.mean_over == "micro_batch" else (sample,)
                    self._needs[sample] = frozenset(
                        needed for one in together for needed in (groups[one] if early.by_group else (one,))
                    )
                    self._drawn_in[sample], self._shares[sample] = samples, share
        self._left = dict.fromkeys(self._needs)

    @classmethod
    def of(cls, early: Early, rounds: Sequence[Round], groups: Sequence[Sequence[int]]) -> FirstStep | None:
        """That of these rounds; None where nothing of it can be trained early.

        That is where the role has none, it has samples twice, or they are of several rollouts over which means are.
        """
        steps = steps_of(early.role, rounds)
        if not steps:
            return None
        parts = [rounds[index].parts[early.role] for index in steps[0]]
        samples = [sample for part in parts for own in part.micro_batches for sample in own]
        rollouts = {sample // (early.rollout_size or len(groups)) for sample in samples}
        if len(set(samples)) < len(samples) or (early.mean_over == "rollout" and len(rollouts) > 1):
            return None
        return cls(early, parts, groups)

    @property
    def samples(self) -> Collection[int]:
        """All of the step's, in the order in which they were drawn."""
        return self._needs

    @property
    def num_samples(self) -> int:
        return len(self._needs)

    @property
    def num_left(self) -> int:
        """Samples that have not been trained."""
        return len(self._left)

    @property
    def num_parts(self) -> int:
        """Rounds that the step takes."""
        return len(self._parts)

    @property
    def micro_batch_size(self) -> int:
        """Samples of the largest micro-batch that was drawn, which memory has room for."""
        return max(len(own) for part in self._parts for own in part.micro_batches)

    def ready(self, known: Set[int]) -> list[int]:
        """Samples that are left and need none but these."""
        return [sample for sample in self._left if self._needs[sample] <= known]

    def take(
        self, replica: int, micro_batches: Sequence[Sequence[int]], samples: Sequence[Sample], width: int
    ) -> EarlyPiece:
        """Have ready samples trained by a replica. samples: of the update. width: as of `Early`."""
        taken = [sample for own in micro_batches for sample in own]
        for sample in taken:
            del self._left[sample]
        needed = sorted(frozenset().union(*(self._needs[sample] for sample in taken)))
        places = {sample: place for place, sample in enumerate(needed)}
        experience = self.early.estimate([samples[sample] for sample in needed], width)
        offsets = experience.segments.offsets(experience.targets[self.early.role].positions).tolist()
        counts = {sample: offsets[place + 1] - offsets[place] for sample, place in places.items()}
        part = StepPart(
            micro_batches=tuple(tuple(places[sample] for sample in own) for own in micro_batches),
            weights=(1.0,) * len(micro_batches),
            is_last=False,
            shares=tuple(tuple(self._share(sample, counts) for sample in own) for own in micro_batches),
        )
        made = tuple(tuple(own) for own in micro_batches)
        piece = EarlyPiece(replica=replica, micro_batches=made, samples=tuple(needed), experience=experience, part=part)
        self.pieces.append(piece)
        return piece

    def _share(self, sample: int, counts: Mapping[int, int]) -> Share:
        """What a sample counts, as far as that is known. counts: positions of what it needs."""
        share = self._shares[sample]
        if self.early.mean_over == "step":
            return replace(share, weight=1 / PROVISIONAL_TOKENS)
        if self.early.mean_over == "micro_batch":
            return replace(share, num_positions=sum(counts[one] for one in self._drawn_in[sample]))
        return share

    # When all samples are known

    def scale(self, experience: Experience, rounds: Sequence[Round]) -> float:
        """What gradients of what was trained early are to be multiplied by. rounds: as of `rest`."""
        role = self.early.role
        if self.early.mean_over == "step":
            shares = self._final_shares(experience, rounds).values()
            return PROVISIONAL_TOKENS * max(share.weight / max(1, share.num_positions) for share in shares)
        if self.early.mean_over == "rollout":
            targets: Any = experience.targets[role]
            offsets = experience.segments.offsets(targets.positions)
            rows = rows_of_samples(
                offsets, [sample for piece in self.pieces for own in piece.micro_batches for sample in own]
            )
            return PROVISIONAL_TOKENS * float(targets.batch_weights[rows[0]]) if len(rows) else 1.0
        return 1.0

    def rest(
        self,
        experience: Experience,
        rounds: Sequence[Round],
        dealt: Sequence[Round],
        *,
        num_replicas: int,
        halves: bool,
        packs: bool = False,
    ) -> list[Round]:
        """The rounds as they are trained, less what has been trained.

        rounds: as they were drawn. dealt: as they would be trained. num_replicas: each of which needs a micro-batch of
        every round. halves: whether the number of micro-batches is to be one of few. packs: as of `Dealing`.
        """
        self._check(experience)
        role = self.early.role
        (first, *_) = steps_of(role, dealt)
        parts = [dealt[index].parts[role] for index in first]
        drawn = sum(len(part.micro_batches) for part in parts)
        shares = self._final_shares(experience, rounds)
        left = [[(sample, shares[sample])] for sample in self._left]
        least = num_replicas * len(parts)
        number = _number(drawn, len(left), self.num_samples, least, halves=halves)
        made = [dict(one.parts) for one in dealt]
        of_rest = deal_out(parts, left, experience, number, Dealing(packs=packs))
        for index, part in zip(first, of_rest, strict=True):
            made[index][role] = part
        trained = [sample for piece in self.pieces for own in piece.micro_batches for sample in own]
        rest = [sample for index in first for own in made[index][role].micro_batches for sample in own]
        assert sorted([*trained, *rest]) == sorted(self._needs), "a sample of the step was lost or trained twice"
        return [replace(one, parts=parts) for one, parts in zip(dealt, made, strict=True)]

    def early_rounds(self, experience: Experience, rounds: Sequence[Round]) -> list[Round]:
        """What was trained early, piece by piece, as rounds of the update. rounds: as of `rest`."""
        shares = self._final_shares(experience, rounds)
        return [
            Round(
                {
                    self.early.role: replace(
                        piece.part,
                        micro_batches=piece.micro_batches,
                        shares=tuple(tuple(shares[sample] for sample in own) for own in piece.micro_batches),
                    )
                }
            )
            for piece in self.pieces
        ]

    def _final_shares(self, experience: Experience, rounds: Sequence[Round]) -> dict[int, Share]:
        weighted = by_tokens(rounds, experience) if self.early.mean_over == "step" else rounds
        (first, *_) = steps_of(self.early.role, weighted)
        parts = [weighted[index].parts[self.early.role] for index in first]
        return dict(drawn_shares(parts, experience, self.early.role))

    def _check(self, experience: Experience) -> None:
        """Whether what was trained early was trained on what the update has of it."""
        targets: Any = experience.targets[self.early.role]
        offsets = experience.segments.offsets(targets.positions)
        for piece in self.pieces:
            early: Any = piece.experience.targets[self.early.role]
            early_offsets = piece.experience.segments.offsets(early.positions)
            taken = [sample for own in piece.micro_batches for sample in own]
            rows = rows_of_samples(offsets, taken)
            early_rows = rows_of_samples(early_offsets, [piece.samples.index(sample) for sample in taken])
            assert len(rows) == len(early_rows), "a sample that was trained early has other positions"
            for field in fields(targets):
                if field.name != _KNOWN_LATER:
                    now, then = getattr(targets, field.name)[rows], getattr(early, field.name)[early_rows]
                    assert torch.allclose(now.float(), then.float(), rtol=_RELATIVE, atol=_ABSOLUTE), (
                        f"{field.name} of a sample that was trained early is another now"
                    )


def _number(drawn: int, left: int, samples: int, least: int, *, halves: bool) -> int:
    """Micro-batches that the rest is dealt into: no larger than they would have been, and as many for every replica.

    The last is where samples suffice. least: one for each replica in every round. halves: one of `drawn`, about half of
    that, and so on, so that schedules are made for few numbers.
    """
    assert left >= least, "every replica needs a sample in every round"
    wanted = min(left, _evened(-(-drawn * left // samples), least))
    if not halves:
        return wanted
    numbers = [drawn]
    while numbers[-1] // 2 >= least:
        numbers.append(_evened(numbers[-1] // 2, least))
    fitting = [number for number in numbers if number <= left]
    return min([number for number in fitting if number >= wanted], default=fitting[0] if fitting else least)


def _evened(number: int, least: int) -> int:
    """The next one that all replicas have as many of."""
    return -(-number // least) * least
