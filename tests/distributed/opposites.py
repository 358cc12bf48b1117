"""Two opposite replicas of a model on a world, against plain 1F1B of one on the same micro-batches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fuse.intrastage.executor import execute
from fuse.intrastage.optimizer import ModelOptimizer
from fuse.intrastage.program import program_of
from fuse.trace import SpanRecorder
from fuse.training.state import load_state, save_state
from schedules import Schedule
from schedules.baselines import one_f_one_b
from schedules.fused.greedy import greedy

from .pipelines import Run, batches_of

MODEL = "qwen2 tied"
NUM_STEPS = 3
COUNTS = (5, 4)
"""Micro-batches of a step: dealt 3 and 2, and 2 and 2."""


class Training:
    """One model in `placed` pipelines, which share its micro-batches in turn."""

    def __init__(self, rank: int, world: int, count: int, *, is_opposite: bool) -> None:
        ways = [range(world), range(world)[::-1]] if is_opposite else [range(world)]
        self._batches = [batches_of(count)[number :: len(ways)] for number in range(len(ways))]
        placed = [(MODEL, ranks, len(own)) for ranks, own in zip(ways, self._batches, strict=True)]
        self._run = Run.of(rank, world, placed)
        self.stages = self._run.build()
        self._communicators = self._run.communicators()
        (self.optimizer,) = self._run.optimizers(self.stages).values()
        self._schedule: Schedule = greedy(self._run.problem) if is_opposite else one_f_one_b(self._run.problem)

    def step(self) -> float:
        """The gradient's norm."""
        batches, recorder = self._batches, SpanRecorder()
        execute(program_of(self._schedule), self._run.rank, self.stages, batches, self._communicators, recorder)
        return self.optimizer.step(1e-3)

    def state(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """Parameters of a stage, and those moments that are on this rank."""
        return {
            f"{part}.{name}": tensor.clone()
            for part in ModelOptimizer.STATE_PARTS
            for name, tensor in self.optimizer._state_part(key, part).items()
        }


def check_opposites(rank: int, world: int, directory: Path) -> dict[str, Any]:
    """Weights, norms and bits after every step; checkpoints from either form into the other."""
    found: dict[str, Any] = {}
    for count in COUNTS:
        plain = Training(rank, world, count, is_opposite=False)
        both = Training(rank, world, count, is_opposite=True)
        norms, differences = [], []
        start = both.state((0, rank))
        for step in range(NUM_STEPS):
            expected, norm = plain.step(), both.step()
            norms.append(abs(norm / expected - 1))
            differences.append(difference(both.state((0, rank)), plain.state((0, rank))))
            for replica, stage in both.stages:
                state = both.state((replica, stage))
                moments = [name for name in state if not name.startswith("parameter.")]
                found[f"moments {count} {step} {stage} {replica}"] = {
                    name: digest({name: state.pop(name)}) for name in moments
                }
                found[f"bits {count} {step} {stage} {replica}"] = digest(state)
        found |= {f"norm {count}": max(norms), f"weights {count}": max(differences)}
        found[f"moved {count}"] = difference(both.state((0, rank)), start)

    alone = Training(rank, world, COUNTS[0], is_opposite=True)
    alone.optimizer._add_replicas = lambda: None  # type: ignore[method-assign]
    reference = Training(rank, world, COUNTS[0], is_opposite=False)
    for _ in range(NUM_STEPS):
        alone.step()
        reference.step()
    found["without exchange"] = difference(alone.state((0, rank)), reference.state((0, rank)))

    for name, saver in (("plain", plain), ("both", both)):
        target = directory / f"opposites-{world}-{name}"
        save_state(target, {"actor": saver.optimizer})
        for is_opposite in (False, True):
            loaded = Training(rank, world, COUNTS[1], is_opposite=is_opposite)
            load_state(target, {"actor": loaded.optimizer})
            assert loaded.optimizer.num_steps == NUM_STEPS
            found[f"{name} loaded {is_opposite}"] = difference(loaded.state((0, rank)), saver.state((0, rank)))
            if is_opposite and name == "both":
                upwards = 1, world - 1 - rank
                found["upwards loaded"] = difference(loaded.state(upwards), both.state(upwards))
    return found


def difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Of what both have: all parameters, and moments."""
    common = first.keys() & second.keys()
    assert {name for name in first if name.startswith("parameter.")} < common
    return max(float((first[name] - second[name]).abs().max()) for name in common)


def digest(state: Mapping[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for name in sorted(state):
        whole.update(name.encode() + state[name].contiguous().numpy().tobytes())
    return whole.hexdigest()
