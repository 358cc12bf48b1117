"""What the driver has all model workers do around an update: its rounds, their free memory, their state."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import ray

from fuse.algorithms.batch import Experience
from fuse.driver.memory import free_for_micro_batches
from fuse.driver.memory_setup import MemorySetup
from fuse.driver.micro_batch_number import dealt, shapes_of, work_of
from fuse.driver.planned_spans import PlannedSpans
from fuse.driver.tail import Tail
from fuse.intrastage.forward_only import without_scorers
from fuse.intrastage.placement import Counts, Replica
from fuse.intrastage.training_planner import TrainingPlanner
from fuse.intrastage.training_schedule import Plan
from fuse.training.late_scores import fill, with_scores
from fuse.training.rank import TrainingSettings
from fuse.training.regrouping import drawn_metrics
from fuse.training.rounds import RankRound, Round, step_reports, unfused_counts
from fuse.training.state import check_saved
from fuse.training.steps import StepReport
from fuse.training.update_piece import UpdatePiece
from fuse.workers.calls import gather
from fuse.workers.errors import WorkerError
from fuse.workers.model_handle import ModelHandle


def train(
    workers: Sequence[ModelHandle],
    planner: TrainingPlanner,
    settings: TrainingSettings,
    experience: Experience,
    rounds: Sequence[Round],
    learning_rates: Sequence[Mapping[str, float]],
    *,
    late_columns: Collection[str],
    tail: Tail | None,
    pieces: Iterable[slice],
    between: Callable[[], None],
    meanwhile: Sequence[Callable[[], None]],
    memory: MemorySetup | None,
    tell: Callable[[str], None],
) -> tuple[Callable[[], dict[str, list[StepReport]]], PlannedSpans]:
    """Have an update's rounds trained as they are planned.

    Returns what makes reports of each role's, and what tells when their operations were to run.

    late_columns: what the rounds score. tail: has trained some of the first one. pieces, between: as of `take_rounds`.
    meanwhile: called in turn once devices train.
    memory: of the run, where it is planned.
    """
    free_bytes = partial(fullest_free_bytes, workers, memory, without_scorers(planner.placement))
    drawn, rounds = rounds, dealt(rounds, experience, settings, planner, free_bytes)
    if tail is not None:
        rounds = tail.rest(experience, drawn, rounds, planner)
    rounds = with_scores(rounds, late_columns)
    counts = [one.counts for one in rounds]
    shapes = shapes_of(rounds, experience, settings.layout)
    waits = tail is None or not tail.num_trained  # what is left of a step differs from update to update
    if waits and planner.will_solve(counts):
        tell("solving: the fused schedule")
    plans = planner.plans(counts, shapes, free_bytes, unfused_counts(rounds), waits=waits)
    tell("training")
    works, lanes = (work_of(one, experience, settings.layout) for one in rounds), settings.tensor_parallel_size
    planned = cache(partial(PlannedSpans.of, works, plans, planner.placement, lanes))
    args = workers, experience, rounds, learning_rates, plans

    with _beside(planner.search) as search:

        def once_training() -> None:
            for call in meanwhile:
                call()
            planned()
            planner.compare()
            search()

        results = take_rounds(*args, pieces=pieces, between=between, meanwhile=once_training)
    if tail is not None:
        rounds, results = tail.whole(experience, rounds, results)
    laid_out = cache(partial(settings.layout.micro_batches, experience))  # roles draw the same samples
    metrics = partial(drawn_metrics, settings.losses, laid_out, experience)
    return partial(step_reports, rounds, results[::lanes], planner.placement, metrics), planned()


@contextmanager
def _beside(search: Callable[[threading.Event], None]) -> Iterator[Callable[[], object]]:
    """What has another thread begin the search; it is stopped when the context ends, which raises what it raised."""
    stop, begun = threading.Event(), list[Future[None]]()
    with ThreadPoolExecutor(1, thread_name_prefix="search") as thread:
        try:
            yield lambda: begun.append(thread.submit(search, stop))
        finally:
            stop.set()
    for one in begun:
        one.result()


def take_rounds(
    workers: Sequence[ModelHandle],
    experience: Experience,
    rounds: Sequence[Round],
    learning_rates: Sequence[Mapping[str, float]],
    plans: Mapping[Counts, Plan],
    *,
    pieces: Iterable[slice],
    between: Callable[[], None],
    meanwhile: Callable[[], object] = lambda: None,
) -> list[list[RankRound]]:
    """What every device tells of every round. What is scored within them is written into the experience.

    pieces: of the rounds, between which `between` is called. Only the first scores old log-probabilities: those of a
    later one that are known are in the experience by then. meanwhile: called once devices train.
    """
    results: list[list[RankRound]] = [[] for _ in workers]
    for_ranks = {counts: plan.for_ranks for counts, plan in plans.items()}
    for index, piece in enumerate(pieces):
        if index:
            between()
        told = ray.put(UpdatePiece(experience, rounds[piece], learning_rates[piece], for_ranks))
        calls = [worker.train(told) for worker in workers]
        if not index:
            meanwhile()
        for taken, more in zip(results, gather(calls), strict=True):
            taken += more
            for one in more:
                for column, found in one.scored.items():
                    fill(experience, column, found)
    return results


def fullest_free_bytes(
    workers: Sequence[ModelHandle], memory: MemorySetup | None, placement: tuple[Replica, ...]
) -> int | None:
    """That micro-batches under way may take on the fullest device, if devices tell. placement: of what trains."""
    on_devices = gather([worker.free_bytes() for worker in workers])
    if memory is not None:
        on_devices = free_for_micro_batches(replace(memory, placement=placement), on_devices)
    return min((free for free in on_devices if free is not None), default=None)


def save_state(workers: Sequence[ModelHandle], directory: Path, mixed_roles: Sequence[str]) -> None:
    """Write the training state of all models that change.

    Raises: OSError when a worker could not write it, or wrote it where it is not seen from here.
    """
    try:
        seen = gather([worker.save(directory, mixed_roles) for worker in workers])
    except WorkerError as error:
        if isinstance(error.raised, OSError):
            raise OSError(str(error)) from error
        raise
    check_saved(directory, seen)
