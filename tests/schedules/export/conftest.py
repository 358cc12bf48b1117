"""Schedules to export."""

from __future__ import annotations

from dataclasses import replace

import pytest

from schedules import Problem, Schedule
from schedules.baselines import serial, zero_bubble_h1
from schedules.fused.greedy import greedy
from schedules.instances import actor_and_critic


@pytest.fixture(scope="session")
def problem() -> Problem:
    """An actor over two ranks, a critic in the opposite direction, three micro-batches, a memory limit."""
    instance = actor_and_critic(
        actor_stages=2,
        critic_stages=2,
        actor_microbatches=3,
        critic_microbatches=3,
        actor_forward=2,
        critic_forward=1,
        actor_activation=2,
        critic_activation=1,
    )
    return replace(instance.problem, memory_limit_bytes=(8, 8))


@pytest.fixture(scope="session")
def fused(problem: Problem) -> Schedule:
    return greedy(problem)


@pytest.fixture
def split() -> Schedule:
    """Two models one after the other, backwards split, messages that take time."""
    instance = actor_and_critic(
        actor_stages=3,
        critic_stages=3,
        actor_microbatches=4,
        critic_microbatches=4,
        actor_forward=2,
        critic_forward=1,
        split_backward=True,
    )
    slow = tuple(replace(pipeline, transfer_ticks=1) for pipeline in instance.problem.pipelines)
    return serial(replace(instance.problem, pipelines=slow), zero_bubble_h1)
