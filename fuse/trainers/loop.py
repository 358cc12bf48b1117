"""The loop of a run: generate, score, train, over and over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

from fuse.algorithms.algorithm import Algorithm
from fuse.driver.fleet import Fleet
from fuse.driver.weight_streams import after_a_turn
from fuse.sample import Sample
from fuse.trace import PhaseClock
from fuse.trainers.iteration import Iteration
from fuse.trainers.metrics import reduce_metrics
from fuse.trainers.run import Run
from fuse.trainers.update_metrics import kl_by_position
from fuse.training.late_scores import tell
from fuse.training.rounds import Round


def updates(
    run: Run,
    fleet: Fleet,
    algorithm: Algorithm,
    *,
    roll_out: Callable[[PhaseClock], tuple[Sequence[Sample], dict[str, float]]],
    rounds_of: Callable[[int], Sequence[Round]],
    num_places: int | None,
) -> Iterator[Iteration]:
    """Take the updates that are left; gives each when it is over.

    roll_out: gives the samples of the next update, scored, and metrics of rewarding them.
    rounds_of: an update's number -> its optimizer steps, side by side. num_places: see `fuse.training.layout.Layout`.
    """
    for update in run.updates():
        clock = PhaseClock()
        samples, rewarding = roll_out(clock)
        experience, metrics = algorithm.estimate(samples)
        rounds, learning_rates = run.take_steps(rounds_of(update))
        with clock.phase("training"):
            late = fleet.late_columns
            report = fleet.train(experience, rounds, learning_rates, run.state.global_step)
            tell(experience, late, samples)
        with clock.phase("weights"):
            report = cache(report)
            fleet.synchronise(after_a_turn(report), num_steps=run.state.global_step + len(rounds))
        trained = reduce_metrics(report(), num_places)
        metrics |= kl_by_position(samples)
        yield run.finish_update(fleet, samples, rounds, metrics | trained | rewarding | fleet.tail_report, clock)
