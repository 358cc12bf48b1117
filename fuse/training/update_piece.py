"""What all ranks are told to train next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fuse.algorithms.batch import Experience
from fuse.intrastage.placement import Counts
from fuse.intrastage.training_schedule import RankPlan
from fuse.training.rounds import Round


@dataclass(frozen=True, slots=True)
class UpdatePiece:
    """Rounds of an update, which travel in one piece: an object more takes longer than a small one does.

    learning_rates: by round, of the roles in it.
    """

    experience: Experience
    rounds: Sequence[Round]
    learning_rates: Sequence[Mapping[str, float]]
    plans: Mapping[Counts, RankPlan]
