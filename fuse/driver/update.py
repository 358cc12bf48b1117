"""What the driver has all model workers do around an update: its rounds, their free memory, their state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import ray

from fuse.algorithms.batch import Experience
from fuse.driver.memory import free_for_micro_batches
from fuse.driver.memory_setup import MemorySetup
from fuse.intrastage.placement import Counts, Replica
from fuse.intrastage.training_schedule import Plan
from fuse.training.late_scores import fill
from fuse.training.rounds import RankRound, Round
from fuse.training.state import check_saved
from fuse.workers.calls import gather
from fuse.workers.errors import WorkerError
from fuse.workers.model_handle import ModelHandle


def take_rounds(
    workers: Sequence[ModelHandle],
    experience: Experience,
    rounds: Sequence[Round],
    learning_rates: Sequence[Mapping[str, float]],
    plans: Mapping[Counts, Plan],
    *,
    pieces: Iterable[slice],
    between: Callable[[], None],
) -> list[list[RankRound]]:
    """What every device tells of every round. What is scored within them is written into the experience.

    pieces: of the rounds, between which `between` is called. Only the first scores old log-probabilities: those of a
    later one that are known are in the experience by then.
    """
    planned = ray.put(plans)
    results: list[list[RankRound]] = [[] for _ in workers]
    for index, piece in enumerate(pieces):
        if index:
            between()
        told = ray.put(experience), ray.put(rounds[piece]), learning_rates[piece], planned
        for taken, more in zip(results, gather([worker.train(*told) for worker in workers]), strict=True):
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
