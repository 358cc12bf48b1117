"""The micro-batches of an update as they are trained: dealt by their costs, as many as are planned to train soonest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

from fuse.algorithms.batch import Experience
from fuse.intrastage.cost_profile import Shape
from fuse.intrastage.micro_batch_number import Work
from fuse.intrastage.placement import most_replicas
from fuse.intrastage.training_planner import TrainingPlanner
from fuse.training.layout import Layout
from fuse.training.rank import TrainingSettings
from fuse.training.regrouping import Dealing, prepared
from fuse.training.rounds import Round

_FEWEST_IN_PIECES = 2
"""Groups of a step that are dealt in pieces: of these there are enough then to tell what their sizes cost."""


def dealt(
    rounds: Sequence[Round],
    experience: Experience,
    settings: TrainingSettings,
    planner: TrainingPlanner,
    free_bytes: Callable[[], int | None],
) -> Sequence[Round]:
    """The rounds with weights and micro-batches as they are trained.

    Where the planner does not know yet what micro-batches of other sizes cost, these are of several, which shows it.

    free_bytes: as of `TrainingPlanner.plans`.
    """

    def made(dealing: Dealing) -> Sequence[Round]:
        normalization, units = settings.loss_normalization, settings.units
        dealing = replace(dealing, packs=settings.layout.packs)
        return prepared(rounds, experience, loss_normalization=normalization, units=units, dealing=dealing)

    replicas = most_replicas(planner.placement)

    @cache
    def with_times(times: float) -> Sequence[Round]:
        return made(Dealing(times=times, at_least=settings.least_micro_batches, replicas=replicas))

    @cache
    def works(times: float) -> list[Work]:
        return [work_of(one, experience, settings.layout) for one in with_times(times)]

    times = planner.times([one.counts for one in rounds], works, free_bytes)
    if times is not None:
        return with_times(times)
    return made(Dealing(at_least=_FEWEST_IN_PIECES, replicas=replicas, in_pieces=True))


def shapes_of(rounds: Sequence[Round], experience: Experience, layout: Layout) -> list[Shape]:
    """Of all that is trained; what several roles train counts once."""
    parts = [part for one in rounds for part in one.parts.values()]
    trained = dict.fromkeys(samples for part in parts for samples in part.micro_batches)
    texts = [text.shape(packs=layout.packs) for part in parts for text in part.auxiliary]
    return [*(layout.shape(experience, samples) for samples in trained), *texts]


def work_of(one: Round, experience: Experience, layout: Layout) -> Work:
    """The micro-batches of a round, those of what is scored in it as well."""
    trained = {
        role: (
            *(layout.shape(experience, samples) for samples in part.micro_batches),
            *(text.shape(packs=layout.packs) for text in part.auxiliary),
        )
        for role, part in one.parts.items()
    }
    scored = {
        column: tuple(layout.shape(experience, samples) for samples in micro_batches)
        for column, micro_batches in one.scored.items()
    }
    return Work(trained | scored)
